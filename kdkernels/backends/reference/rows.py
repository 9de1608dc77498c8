"""The row family in plain PyTorch: the loss of each row and its statistics.

Autograd differentiates it, also twice, also in fp64, on any device. It makes every [rows, vocabulary] temporary that
the kernels avoid. Tests compare the other backends' slopes with autograd's derivatives of these values.
"""

import torch
from torch import Tensor

from ...families.options import (
    RowOptions,
    bad_rows,
    bad_values_raise,
    check_values,
    compute_dtype,
    is_transformed,
)
from ...families.rows import CLOSE_TEMPERATURE, ROW_STATISTICS, ROW_TOP1, Rows, close_below
from ...families.topk import TopkRows
from .table import CLOSE_TABLE, NEAR, TABLE, weighted


class WholeRowOrNaN(torch.autograd.Function):
    """The identity. Its gradient is NaN in every class of a row if the gradient's sum over the row is not finite.

    An infinite slope (reverse_kl for a class without teacher mass) leaves the row without a gradient.
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


def rows(problem: Rows):
    """Losses [rows], statistics and top-1 (or None), as `ops.rows` returns them."""
    student, teacher, options, divergence, parameters, vocab_size, statistics = problem
    labels, temperature = options.labels, options.temperature
    dtype, kept = compute_dtype(student, teacher), options.row_scale != 0
    bad = checked_bad_rows(options, vocab_size)
    s, t = (kept_logits(x, kept, vocab_size, dtype) for x in (student, teacher))
    s = without_gradient_of_capped(s, rows, problem)
    student_tempered, teacher_tempered = s / temperature[:, None], t / temperature[:, None]
    lq = WholeRowOrNaN.apply(torch.log_softmax(student_tempered, -1))
    lp = torch.log_softmax(teacher_tempered, -1)
    p, q = lp.exp(), lq.exp()

    terms = TABLE[divergence](lp, lq, p, q, parameters[0])
    close = close_rows(terms.sum(-1), divergence, temperature)
    if close is not None:
        exact = log_ratio(s, t, temperature, lp.detach(), lq.detach())
        whole = [x / x.detach().sum(-1, keepdim=True) for x in (p, q)]
        terms = close_terms(close, terms, problem, exact, lq - lp, *whole)
    row_divergence = terms.sum(-1)
    index, cross_entropy, loss = label_and_loss(row_divergence, s, options, bad)
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


def close_rows(divergence: Tensor, name: str, temperature: Tensor) -> Tensor | None:
    """The rows [rows] that have the close lines, from their divergences by the other lines; None if no row has them."""
    bound = close_below(name, divergence.dtype)
    if bound == 0:
        return None
    close = (divergence.detach() < bound) | (temperature >= CLOSE_TEMPERATURE)
    return None if close.device.type == "cpu" and not is_transformed() and not close.any() else close


@torch.no_grad()
def log_ratio(s: Tensor, t: Tensor, temperature: Tensor, lp: Tensor, lq: Tensor) -> Tensor:
    """lq - lp to its last digits, however small it is: (s - t) / T minus its log-mean-exp under p. Infinite logits stay
    lq - lp.
    """
    finite = torch.isfinite(s) & torch.isfinite(t)
    high, low = difference(torch.where(finite, s, 0), torch.where(finite, t, 0))
    offset, offset_low = difference(s.amax(-1, keepdim=True), t.amax(-1, keepdim=True))
    ratio = ((high - offset) + (low - offset_low)) / temperature[:, None]
    ratio = ratio - (lp.amax(-1, keepdim=True) - lq.amax(-1, keepdim=True))
    # exp(ratio) has the mean 1 under p, but for the rounding of the two log-sums.
    near, p = finite & (ratio.abs() < NEAR), lp.exp()
    excess = torch.where(near, p * torch.expm1(torch.where(near, ratio, 0)), lq.exp() - p)
    return torch.where(finite, ratio - torch.log1p(excess.sum(-1, keepdim=True)), lq - lp)


def difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a - b, rounded, and the rest (Knuth): together the exact difference."""
    high = a - b
    of_b = high - a
    return high, (a - (high - of_b)) - (b + of_b)


def close_terms(
    close: Tensor, terms: Tensor, problem: Rows | TopkRows, exact: Tensor, far: Tensor, p: Tensor, q: Tensor
) -> Tensor:
    """`terms` [rows, classes] of the table, with those of the close lines in the classes of close rows that are near.

    `exact` is lq - lp to its last digits, without a derivative; `far` is lq - lp as it is.
    """
    value, parameter = CLOSE_TABLE[problem.divergence], problem.parameters[0]
    near = close[:, None] & (exact.abs() < NEAR)
    with torch.no_grad():  # a power of a large |alpha| overflows; the lines for all rows find it in log space
        near &= torch.isfinite(value(exact, p, q, parameter))
    far, p, q = (torch.where(near, x, 0) for x in (far, p, q))
    d = far + torch.where(near, exact - far.detach(), 0)  # the exact value, with the derivative of lq - lp
    return torch.where(near, value(d, p, q, parameter), terms)


def checked_bad_rows(options: RowOptions, vocab_size: int) -> dict[str, Tensor]:
    """`bad_rows`; raises for such rows if `bad_values_raise`."""
    if bad_values_raise(options.row_scale.device):
        check_values(options, vocab_size)
    return bad_rows(options, vocab_size)


def kept_logits(x: Tensor, kept: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """[rows, vocab_size]. Zeros replace the logits of a skipped row, which may hold anything, so no NaN reaches a
    gradient."""
    return torch.where(kept[:, None], x[..., :vocab_size].reshape(kept.shape[0], vocab_size).to(dtype), 0)


def without_gradient_of_capped(s: Tensor, rows, problem) -> Tensor:
    """The logits s [rows, classes], of which capped rows get no gradient: 0 times an infinite slope would be NaN.

    `rows`: the function that finds the losses of the problem. A row whose scale is NaN is not capped.
    """
    options = problem.options
    if options.loss_cap is None:
        return s
    with torch.no_grad():
        ones = torch.where(options.row_scale == 0, 0, torch.ones_like(options.row_scale))
        alone = problem._replace(options=options._replace(row_scale=ones, loss_cap=None), statistics=False)
        capped = (rows(alone)[0] > options.loss_cap) & ~torch.isnan(options.row_scale)
    return torch.where(capped[:, None], s.detach(), s)


def label_and_loss(divergence: Tensor, s: Tensor, options: RowOptions, bad: dict[str, Tensor]):
    """The labels as an index [rows, 1] (or None), their cross-entropies with the logits s, and the losses: [rows]."""
    index = None
    if options.labels is not None:
        index = torch.where((options.row_scale != 0) & ~bad["labels"], options.labels, 0)[:, None]
    cross_entropy = label_cross_entropy(s, index)
    return index, cross_entropy, row_loss(divergence, cross_entropy, options, bad)


def label_cross_entropy(logits: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return logits.new_zeros(logits.shape[0])
    return -torch.log_softmax(logits, -1).gather(-1, index)[:, 0]


def row_loss(divergence: Tensor, cross_entropy: Tensor, options: RowOptions, bad: dict[str, Tensor]) -> Tensor:
    loss = divergence * options.temperature**2 if options.temperature_squared else divergence
    if options.hard_weight is not None:
        loss = weighted(1 - options.hard_weight, loss) + weighted(options.hard_weight, cross_entropy)
    for bad_row in bad.values():
        loss = loss * torch.where(bad_row, torch.nan, 1)
    if options.loss_cap is not None:
        loss = torch.where(loss > options.loss_cap, options.loss_cap, loss)
    return torch.where(options.row_scale != 0, options.row_scale * loss, 0)


def stacked(values: dict[str, Tensor], top1: dict[str, Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.where(kept, torch.stack([values[name] for name in ROW_STATISTICS]), 0).detach(),
        torch.where(kept, torch.stack([top1[name] for name in ROW_TOP1]), 0),
    )
