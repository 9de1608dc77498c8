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


def _refuse_second_derivatives(backend: str):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"second derivatives: the {backend!r} backend has first derivatives only; "
            'backend="reference" is twice differentiable'
        )


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, grad_loss: torch.Tensor, backend: str) -> torch.Tensor:
    """A gradient kept from the forward call, times a factor of each row."""
    factor = factor.to(torch.float64 if gradient.dtype == torch.float64 else torch.float32)
    if torch.compiler.is_compiling() or not _may_scale_in_place(grad_loss):
        return ops.scale(gradient, factor, backend)
    ops.scale_(gradient, factor, backend)
    return gradient


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
        _refuse_second_derivatives(backend)
        if mode == "forward":
            gradient, row_scale = ctx.saved_tensors
            # A skipped row stays 0, whatever (NaN, say) comes back for its loss.
            gradient = _scaled(gradient, torch.where(row_scale == 0, 1, grad_loss), grad_loss, backend)
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


class LinearRows(torch.autograd.Function):
    """Losses of rows that are made in chunks (`ops.linear_rows`), with row_scale folded in.

    `mode` is "forward" (the call that finds the loss finds the gradients; backward scales them) or "backward" (the
    inputs are kept; backward makes the rows again). Returns the row losses [rows]; but their sum where mode "forward"
    found the gradient of a weight, which one factor must serve.
    """

    @staticmethod
    def forward(ctx, student, student_weight, student_bias, teacher, teacher_weight, teacher_bias,
                teacher_indices, tail_log_prob, source_temperature,
                row_scale, labels, temperature, hard_weight, parameters, *static):  # fmt: skip
        *static, wanted, statistics, mode, backend = static
        inputs = (student, student_weight, student_bias, teacher, teacher_weight, teacher_bias,
                  teacher_indices, tail_log_prob, source_temperature)  # fmt: skip
        options = (labels, temperature, hard_weight, parameters)
        found = wanted if mode == "forward" else (False, False, False)
        loss, *gradients, row_statistics, top1 = ops.linear_rows(
            *inputs, row_scale, *options, *static, found, statistics, backend
        )
        if mode == "forward":
            ctx.save_for_backward(row_scale, *gradients)
        else:
            ctx.save_for_backward(row_scale, *inputs, *options)
        ctx.call = (static, wanted, mode, backend)
        ctx.mark_non_differentiable(row_statistics, top1)
        return loss.sum() if mode == "forward" and student_weight is not None else loss, row_statistics, top1

    @staticmethod
    def backward(ctx, grad_loss, *_):
        static, wanted, mode, backend = ctx.call
        _refuse_second_derivatives(backend)
        row_scale, *saved = ctx.saved_tensors
        skipped = row_scale == 0
        if mode == "forward":
            # A skipped row, and a weight that no row reaches, stay 0, whatever (NaN, say) comes back for the loss.
            factors = [torch.where(skipped, 1, grad_loss)] + 2 * [torch.where(skipped.all(), 1, grad_loss)]
            gradients = [
                _scaled(gradient, factor, grad_loss, backend) if wants else None
                for gradient, factor, wants in zip(saved, factors, wanted, strict=True)
            ]
        else:
            inputs, options = saved[:9], saved[9:]
            factor = torch.where(skipped, 0, row_scale * grad_loss)
            _, *gradients, _, _ = ops.linear_rows(*inputs, factor, *options, *static, wanted, False, backend)
            gradients = [gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)]
        return *gradients, *(None,) * (len(static) + 15)
