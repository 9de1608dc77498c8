"""Optimal transport between classes in plain PyTorch."""

import torch
from torch import Tensor

from ...families.class_ot import ClassOT, check_row_values, working_dtype
from ...families.options import bad_values_raise
from .derivative import GivenDerivative
from .rows import kept_logits


def class_ot(problem: ClassOT) -> tuple[Tensor]:
    """Losses [rows] by the formulas of families/class_ot.py, with the plans [rows, V, V] of all rows.

    Autograd differentiates "unrolled". Formulas give the other gradients with respect to a, the student's distribution.
    """
    student, teacher, class_cost, row_scale, exclude_labels, temperature, epsilon, iterations, gradient, _ = problem
    dtype = row_scale.dtype
    if bad_values_raise(student.device):
        check_row_values(problem)
        dtype = working_dtype(class_cost, epsilon, dtype)
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
        loss = loss.detach() + GivenDerivative.apply(a, -epsilon * torch.log(row_sums).detach())
    elif gradient == "implicit":
        loss = loss.detach() + GivenDerivative.apply(a, _implicit_slope(plan.detach(), cost))
    return (torch.where(kept, row_scale * loss, 0).to(row_scale.dtype),)


def _implicit_slope(plan: Tensor, cost: Tensor) -> Tensor:
    """x of [diag(P 1) P; P^T diag(P^T 1)] [x; y] = [(P * M) 1; (P * M)^T 1], up to a constant.

    Rows and columns are first divided by the square roots of their masses, so that small masses keep their digits.
    """
    masses = torch.cat([plan.sum(-1), plan.sum(-2)], -1)
    over_roots = torch.where(masses > 0, masses.rsqrt(), 0)
    row_block, column_block = torch.diag_embed(plan.sum(-1)), torch.diag_embed(plan.sum(-2))
    system = torch.cat([torch.cat([row_block, plan], -1), torch.cat([plan.mT, column_block], -1)], -2)
    system = over_roots[:, :, None] * system * over_roots[:, None, :]
    costs = over_roots * torch.cat([(plan * cost).sum(-1), (plan * cost).sum(-2)], -1)
    inverse = torch.linalg.pinv(system.nan_to_num(0), hermitian=True)  # pinv raises on NaN
    solution = over_roots * (inverse * costs[:, None, :]).sum(-1)
    return solution[:, : cost.shape[0]] + 0 * plan.sum((-2, -1))[:, None]
