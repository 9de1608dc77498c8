"""A derivative given by a formula, for a value that was computed without a graph."""

import torch
from torch import Tensor


class GivenDerivative(torch.autograd.Function):
    """0 [n] with a given first derivative with respect to x [n, ...], and no second derivative. Add it to a value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, derivative: Tensor):
        return x.new_zeros(x.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad_value):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "second derivatives: gradient='implicit' and 'envelope' have first derivatives only; "
                "'unrolled' is twice differentiable"
            )
        (derivative,) = ctx.saved_tensors
        return derivative * grad_value.view(-1, *(1,) * (derivative.dim() - 1)), None
