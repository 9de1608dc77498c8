"""Optimal transport between classes in plain PyTorch."""

import torch
from torch import Tensor

from .rows import kept_logits


class _WithSlope(torch.autograd.Function):
    """A loss [rows] whose gradient with respect to a [rows, V] is said to be `slope`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, loss, slope):
        return loss.view_as(loss)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "second derivatives: gradient='implicit' and 'envelope' have first derivatives only; "
                "'unrolled' is twice differentiable"
            )
        return grad_loss[:, None] * ctx.saved_tensors[0], None, None


def class_ot(
    student: Tensor,
    teacher: Tensor,
    class_cost: Tensor,
    row_scale: Tensor,
    exclude_labels: Tensor | None,
    temperature: Tensor,
    epsilon: Tensor,
    iterations: int,
    gradient: str,
    dtype: torch.dtype,
) -> Tensor:
    """Losses [rows] of `ops.class_ot`, by its formulas in `dtype`, with the plans [rows, V, V] of all rows.

    "unrolled" is left to autograd; the other gradients with respect to a, the student's distribution, are put in.
    """
    kept = row_scale != 0
    classes = student.shape[-1]
    tempered = torch.where(kept, temperature, 1)[:, None].to(dtype)
    s, t = (kept_logits(x, kept, classes, dtype) / tempered for x in (student, teacher))
    u = torch.full_like(t, 1 / classes)
    if exclude_labels is not None:
        excluded = exclude_labels[:, None] == torch.arange(classes, device=student.device)
        s, t, u = s.masked_fill(excluded, -torch.inf), t.masked_fill(excluded, -torch.inf), u.masked_fill(excluded, 0)
    a, b = torch.softmax(s, -1), torch.softmax(t, -1)
    cost, epsilon = class_cost.to(dtype), epsilon.to(dtype)
    kernel = torch.exp(-(cost - cost.min()) / epsilon)
    for _ in range(iterations):
        v = b / (u[:, :, None] * kernel).sum(-2)
        row_sums = (kernel * v[:, None, :]).sum(-1)
        u = a / row_sums
    plan = u[:, :, None] * kernel * v[:, None, :]
    loss = (plan * cost).sum((-2, -1))
    if gradient == "envelope":
        loss = _WithSlope.apply(a, loss.detach(), -epsilon * torch.log(row_sums).detach())
    elif gradient == "implicit":
        loss = _WithSlope.apply(a, loss.detach(), _implicit_slope(plan.detach(), cost))
    return torch.where(kept, row_scale * loss, 0)


def _implicit_slope(plan: Tensor, cost: Tensor) -> Tensor:
    """x of [diag(P 1) P; P^T diag(P^T 1)] [x; y] = [(P * M) 1; (P * M)^T 1], up to a constant.

    Rows and columns are divided by the roots of their masses first, so that small ones keep their digits.
    """
    masses = torch.cat([plan.sum(-1), plan.sum(-2)], -1)
    over_roots = torch.where(masses > 0, masses.rsqrt(), 0)
    of_rows, of_columns = torch.diag_embed(plan.sum(-1)), torch.diag_embed(plan.sum(-2))
    system = torch.cat([torch.cat([of_rows, plan], -1), torch.cat([plan.mT, of_columns], -1)], -2)
    system = over_roots[:, :, None] * system * over_roots[:, None, :]
    costs = over_roots * torch.cat([(plan * cost).sum(-1), (plan * cost).sum(-2)], -1)
    inverse = torch.linalg.pinv(system.nan_to_num(0), hermitian=True)  # which raises on NaN
    found = over_roots * (inverse * costs[:, None, :]).sum(-1)
    return found[:, : cost.shape[0]] + 0 * plan.sum((-2, -1))[:, None]
