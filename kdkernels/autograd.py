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
            'backend="reference" is twice differentiable (of transport with gradient="unrolled")'
        )


def refuse_transforms(student: torch.Tensor, backend: str):
    """torch.func's transforms and forward-mode AD would find no derivative in an operator, and say nothing."""
    if torch.compiler.is_compiling():
        return
    forward_ad = torch.autograd.forward_ad
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(student).tangent is not None
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"forward-mode AD and torch.func transforms: the {backend!r} backend has reverse-mode derivatives only; "
            'backend="reference" goes through torch.func.grad and vmap, and leading dimensions take the place of vmap'
        )


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, grad_loss: torch.Tensor, backend: str) -> torch.Tensor:
    """A gradient kept from the forward call, times a factor of each row."""
    factor = factor.to(torch.float64 if gradient.dtype == torch.float64 else torch.float32)
    if backend == "reference":  # which has no kernels
        return gradient * factor.view(*gradient.shape[:-1], 1)
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


class ChunkedRows(torch.autograd.Function):
    """Losses of rows that are made in chunks (`ops.chunked_rows`), with row_scale folded in.

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
        loss, *gradients, row_statistics, top1 = ops.chunked_rows(
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
            _, *gradients, _, _ = ops.chunked_rows(*inputs, factor, *options, *static, wanted, False, backend)
            gradients = [gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)]
        return *gradients, *(None,) * (len(static) + 15)


class Sinkhorn(torch.autograd.Function):
    """Values [problems] of `ops.sinkhorn`; the call that finds them finds the derivatives, and backward scales them."""

    @staticmethod
    def forward(ctx, cost, a, b, epsilon, tolerance, iterations, entropic, gradient, backend):
        value, *found = ops.sinkhorn(cost, a, b, epsilon, tolerance, iterations, entropic, gradient, backend)
        *info, of_cost, of_a, of_b = found
        ctx.save_for_backward(of_cost, of_a, of_b)
        ctx.backend = backend
        ctx.mark_non_differentiable(*info)
        return value, *info

    @staticmethod
    def backward(ctx, grad_value, *_):
        _refuse_second_derivatives(ctx.backend)
        of_cost, of_a, of_b = ctx.saved_tensors
        scaled = [
            _scaled(x.flatten(1), grad_value, grad_value, ctx.backend).view(x.shape) if wants else None
            for x, wants in zip((of_cost, of_a, of_b), ctx.needs_input_grad, strict=False)
        ]
        return *scaled, *(None,) * 6


class SinkhornKD(torch.autograd.Function):
    """Losses [clouds] of `ops.sinkhorn_kd`; kept are the derivatives with respect to the costs, [clouds, n, n], and
    row floats: backward goes through the logits once more."""

    @staticmethod
    def forward(ctx, student, teacher, kept, temperature, epsilon, iterations, cost, gradient, vocab_size, backend):
        loss, *found = ops.sinkhorn_kd(
            student, teacher, kept, temperature, epsilon, iterations, cost, gradient, vocab_size, backend
        )
        ctx.save_for_backward(student, teacher, kept, temperature, *found)
        ctx.call = (cost, vocab_size, backend)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        _refuse_second_derivatives(ctx.call[-1])
        student, teacher, kept, temperature, of_pairs, dot, floats = ctx.saved_tensors
        # A cloud without rows stays 0, whatever comes back for its loss.
        factor = torch.where((kept != 0).any(1), grad_loss, 0).to(kept.dtype)[:, None]
        of_pairs, dot = of_pairs * factor[..., None], dot * factor
        gradient = ops.sinkhorn_kd_gradient(student, teacher, kept, temperature, of_pairs, dot, floats, *ctx.call)
        return gradient, *(None,) * 9


class ClassOT(torch.autograd.Function):
    """Losses [rows] of `ops.class_ot`, with row_scale folded in; their gradient is found then, and scaled in backward.

    `gradient` is the way in which it is found: "unrolled", "implicit" or "envelope".
    """

    @staticmethod
    def forward(ctx, student, teacher, class_cost, row_scale, exclude_labels, temperature, epsilon,
                iterations, gradient, chunk_budget, backend):  # fmt: skip
        loss, slopes = ops.classes_ot(
            student, teacher, class_cost, row_scale, exclude_labels, temperature, epsilon, iterations, gradient,
            chunk_budget,
        )  # fmt: skip
        ctx.save_for_backward(slopes, row_scale)
        ctx.call = (student.dtype, backend)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        dtype, backend = ctx.call
        _refuse_second_derivatives(backend)
        slopes, row_scale = ctx.saved_tensors
        # A skipped row stays 0, whatever (NaN, say) comes back for its loss.
        gradient = _scaled(slopes, torch.where(row_scale == 0, 1, grad_loss), grad_loss, backend)
        return gradient.to(dtype), *(None,) * 10


class Uld(torch.autograd.Function):
    """Per-row losses [rows] of Universal Logit Distillation (`ops.uld`; with `topk` ranks alone, `ops.uld_topk`), with
    row_scale folded in.

    `mode` is "forward" (the call that finds the loss writes the gradient; backward scales it) or "backward" (the
    inputs are kept; backward compares them again).
    """

    @staticmethod
    def forward(ctx, student, teacher, row_scale, temperature, student_vocab_size, teacher_vocab_size,
                topk, mode, chunk_budget, backend):  # fmt: skip
        static = (student_vocab_size, teacher_vocab_size, topk, chunk_budget, backend)
        loss, gradient, divergence, error_bound = uld_rows(
            student, teacher, row_scale, temperature, *static, gradient=mode == "forward"
        )
        if mode == "forward":
            ctx.save_for_backward(gradient, row_scale)
        else:
            ctx.save_for_backward(student, teacher, row_scale, temperature)
        ctx.call = (static, mode)
        ctx.mark_non_differentiable(divergence, error_bound)
        return loss, divergence, error_bound

    @staticmethod
    def backward(ctx, grad_loss, *_):
        static, mode = ctx.call
        _refuse_second_derivatives(static[-1])
        if mode == "forward":
            gradient, row_scale = ctx.saved_tensors
            # A skipped row stays 0, whatever (NaN, say) comes back for its loss.
            gradient = _scaled(gradient, torch.where(row_scale == 0, 1, grad_loss), grad_loss, static[-1])
        else:
            student, teacher, row_scale, temperature = ctx.saved_tensors
            factor = torch.where(row_scale == 0, 0, row_scale * grad_loss)
            gradient = uld_rows(student, teacher, factor, temperature, *static, gradient=True)[1]
        return gradient, *(None,) * 9


def uld_rows(student, teacher, row_scale, temperature, student_vocab_size, teacher_vocab_size, topk: int | None,
             chunk_budget: int, backend: str, gradient: bool):  # fmt: skip
    """Loss, gradient, divergence and error bound of the operator that `topk` asks for."""
    sizes = (student_vocab_size, teacher_vocab_size)
    if topk is not None:
        return ops.uld_topk(student, teacher, row_scale, temperature, topk, *sizes, chunk_budget, gradient, backend)
    loss, found, divergence = ops.uld(student, teacher, row_scale, temperature, *sizes, chunk_budget, gradient, backend)
    return loss, found, divergence, torch.zeros_like(divergence)
