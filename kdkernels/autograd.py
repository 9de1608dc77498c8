"""The autograd Functions: the only place that saves for backward."""

import torch

from . import ops

# Absent from some torch versions; without it a gradient is never scaled in place.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def _may_scale_in_place(grad_loss: torch.Tensor) -> bool:
    """Whether no other backward will want the gradient as it is.

    Batched gradients (is_grads_batched, vectorized Jacobians) want it once each: torch runs an operator without a
    batching rule in a loop, if it returns its result.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor(grad_loss)
    return not batched and _keeps_graph is not None and not _keeps_graph()


class Rows(torch.autograd.Function):
    """Per-row losses [rows] of student logits [outer, inner, columns], with row_scale folded in.

    `mode` is "forward" (the call that finds the loss writes the gradient; backward scales it) or "backward" (row
    floats and sums are kept; backward sweeps the logits again).
    """

    @staticmethod
    def forward(ctx, student, teacher, row_scale, labels, temperature, hard_weight, parameters,
                divergence, vocab_size, temperature_squared, statistics, mode, backend):  # fmt: skip
        loss, gradient, floats, sums, row_statistics, top1 = ops.rows(
            student, teacher, row_scale, labels, temperature, hard_weight, parameters,
            divergence, vocab_size, temperature_squared, mode == "forward", statistics, backend,
        )  # fmt: skip
        if mode == "forward":
            ctx.save_for_backward(gradient, row_scale)
        else:
            ctx.save_for_backward(
                student, teacher, row_scale, labels, temperature, hard_weight, parameters, floats, sums
            )
        ctx.call = (divergence, vocab_size, temperature_squared, mode, backend)
        ctx.mark_non_differentiable(row_statistics, top1)
        return loss, row_statistics, top1

    @staticmethod
    def backward(ctx, grad_loss, *_):
        divergence, vocab_size, temperature_squared, mode, backend = ctx.call
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                f"second derivatives: the {backend!r} backend has first derivatives only; "
                'backend="reference" is twice differentiable'
            )
        if mode == "forward":
            gradient, row_scale = ctx.saved_tensors
            # A skipped row stays 0, whatever (NaN, say) comes back for its loss.
            factor = torch.where(row_scale == 0, 1, grad_loss)
            factor = factor.to(torch.float64 if gradient.dtype == torch.float64 else torch.float32)
            if compiling or not _may_scale_in_place(grad_loss):
                gradient = ops.scale(gradient, factor, backend)
            else:
                ops.scale_(gradient, factor, backend)
        else:
            (student, teacher, row_scale, labels, temperature, hard_weight, parameters, floats, sums) = (
                ctx.saved_tensors
            )
            factor = torch.where(row_scale == 0, 0, row_scale * grad_loss)
            gradient = ops.row_gradient(
                student, teacher, factor, labels, temperature, hard_weight, parameters, floats, sums,
                divergence, vocab_size, temperature_squared, backend,
            )  # fmt: skip
        return gradient, *(None,) * 12
