"""The autograd Functions: the only place that saves for backward."""

import torch

from . import ops

# Absent from some torch versions; without it a gradient is never scaled in place.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


class Rows(torch.autograd.Function):
    """Per-row losses [rows] of student logits [outer, inner, columns], with row_scale folded in.

    `mode` is "forward" (the sweep that finds the loss writes the gradient; backward scales it) or "backward" (row
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
            ctx.save_for_backward(gradient)
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
            (gradient,) = ctx.saved_tensors
            factor = grad_loss.contiguous()
            if compiling or _keeps_graph is None or _keeps_graph():
                gradient = ops.scale(gradient, factor, backend)
            else:
                ops.scale_(gradient, factor, backend)
        else:
            (student, teacher, row_scale, labels, temperature, hard_weight, parameters, floats, sums) = (
                ctx.saved_tensors
            )
            # A skipped row stays skipped, whatever (NaN, say) comes back for its loss.
            factor = torch.where(row_scale == 0, 0, row_scale * grad_loss)
            gradient = ops.row_gradient(
                student, teacher, factor, labels, temperature, hard_weight, parameters, floats, sums,
                divergence, vocab_size, temperature_squared, backend,
            )  # fmt: skip
        return gradient, *(None,) * 12
