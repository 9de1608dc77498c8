"""The definition: every divergence and the row loop in plain PyTorch.

Differentiable by autograd (twice), in fp64 too, on any device, with every [rows, vocabulary] temporary that the kernels
exist to avoid. The other backends' slopes are tested against the derivatives that autograd takes of the values here.
"""

import torch
from torch import Tensor

from ...families import options
from ...families.options import bad_values_raise, check_values, compute_dtype
from ...families.rows import ROW_STATISTICS, ROW_TOP1
from .table import TABLE, weighted


class WholeRowOrNaN(torch.autograd.Function):
    """Identity whose gradient is NaN in every class of a row where the sum over the row is not finite.

    An infinite slope (reverse_kl where the teacher has no mass) leaves a row without a gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_probs):
        return log_probs.view_as(log_probs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        finite = torch.isfinite(gradient.sum(-1, keepdim=True))
        return torch.where(finite, gradient, torch.nan)


def rows(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    parameters: Tensor,
    divergence: str,
    vocab_size: int,
    temperature_squared: bool,
    statistics: bool,
):
    """Per-row losses [rows], statistics and top-1 as `ops.rows` returns them."""
    dtype, kept = compute_dtype(student, teacher), row_scale != 0
    bad = bad_rows(row_scale, labels, temperature, hard_weight, vocab_size)
    s, t = (kept_logits(x, kept, vocab_size, dtype) for x in (student, teacher))
    student_tempered, teacher_tempered = s / temperature[:, None], t / temperature[:, None]
    lq = WholeRowOrNaN.apply(torch.log_softmax(student_tempered, -1))
    lp = torch.log_softmax(teacher_tempered, -1)
    p, q = lp.exp(), lq.exp()

    row_divergence = TABLE[divergence](lp, lq, p, q, parameters[0]).sum(-1)
    index = None if labels is None else torch.where(kept & ~bad["labels"], labels, 0)[:, None]
    cross_entropy = label_cross_entropy(s, index)
    loss = row_loss(row_divergence, cross_entropy, row_scale, temperature, hard_weight, temperature_squared, bad)
    if not statistics:
        return loss, None, None

    def label_log_prob(log_probs):
        return log_probs.gather(-1, index)[:, 0] if labels is not None else torch.zeros_like(loss)

    values = {
        "divergence": row_divergence,
        "cross_entropy": cross_entropy,
        "tv": 0.5 * (p - q).abs().sum(-1),
        "student_entropy": -weighted(q, lq).sum(-1),
        "teacher_entropy": -weighted(p, lp).sum(-1),
        "student_max_log_prob": lq.max(-1).values,
        "teacher_max_log_prob": lp.max(-1).values,
        "student_label_log_prob": label_log_prob(lq),
        "teacher_label_log_prob": label_log_prob(lp),
        "student_lse": student_tempered.logsumexp(-1),
        "teacher_lse": teacher_tempered.logsumexp(-1),
    }
    top1 = {"student_top1": s.argmax(-1), "teacher_top1": t.argmax(-1)}
    return loss, *stacked(values, top1, kept)


def bad_rows(row_scale, labels, temperature, hard_weight, vocab_size) -> dict[str, Tensor]:
    """`options.bad_rows`; raises for them where values are checked."""
    if bad_values_raise(row_scale.device):
        check_values(row_scale, labels, temperature, hard_weight, vocab_size)
    return options.bad_rows(row_scale, labels, temperature, hard_weight, vocab_size)


def kept_logits(x: Tensor, kept: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """[rows, vocab_size]. A skipped row may hold anything: zeros take its place, so that nothing of it reaches a
    gradient."""
    return torch.where(kept[:, None], x[..., :vocab_size].reshape(kept.shape[0], vocab_size).to(dtype), 0)


def label_cross_entropy(logits: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return logits.new_zeros(logits.shape[0])
    return -torch.log_softmax(logits, -1).gather(-1, index)[:, 0]


def row_loss(divergence, cross_entropy, row_scale, temperature, hard_weight, temperature_squared, bad) -> Tensor:
    loss = divergence * temperature**2 if temperature_squared else divergence
    if hard_weight is not None:
        loss = weighted(1 - hard_weight, loss) + weighted(hard_weight, cross_entropy)
    for rows_of_it in bad.values():
        loss = loss * torch.where(rows_of_it, torch.nan, 1)
    return torch.where(row_scale != 0, row_scale * loss, 0)


def stacked(values: dict[str, Tensor], top1: dict[str, Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.where(kept, torch.stack([values[name] for name in ROW_STATISTICS]), 0).detach(),
        torch.where(kept, torch.stack([top1[name] for name in ROW_TOP1]), 0),
    )
