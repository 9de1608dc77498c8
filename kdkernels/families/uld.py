"""Universal Logit Distillation, what its backends share: sorted rows, and the comparison of the k largest alone."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .options import rows_of

# Of a buffer that stays in a CPU's cache while one operation after the other goes through it.
_CACHE_BYTES = 2 << 20


class Ranked(NamedTuple):
    """Rows in descending order, contiguous; torch.sort has NaN first."""

    rows: slice
    student: Tensor  # [n, student_vocab_size]
    indices: Tensor | None  # int64, the class of each rank; with a gradient
    teacher: Tensor  # [n, teacher_vocab_size]


def ranked_chunks(
    student: Tensor, teacher: Tensor, student_vocab_size: int, teacher_vocab_size: int, budget: int, gradient: bool
) -> Iterator[Ranked]:
    """All rows, so many at a time that what is sorted fits the budget. The logits themselves are sorted: softmax keeps
    their order, and 16-bit keys take a radix sort half the passes of fp32 probabilities."""
    rows = student.shape[0] * student.shape[1]
    # Sorted values and indices, and the sums of signs; the sort takes as much again.
    row_bytes = student_vocab_size * (2 * (student.element_size() + 8) + 4)
    row_bytes += teacher_vocab_size * 2 * (teacher.element_size() + 8)
    size = max(budget // row_bytes, 1)
    for first in range(0, rows, size):
        chunk = slice(first, min(first + size, rows))
        values, indices = _sorted(student, chunk, student_vocab_size)
        others, _ = _sorted(teacher, chunk, teacher_vocab_size)
        yield Ranked(chunk, values, indices if gradient else None, others)


def _sorted(logits: Tensor, chunk: slice, vocab_size: int) -> tuple[Tensor, Tensor]:
    values, indices = rows_of(logits, chunk)[:, :vocab_size].sort(dim=-1, descending=True)
    return values.contiguous(), indices.contiguous()


def uld_topk(
    kernels,
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    temperature: Tensor,
    k: int,
    student_vocab_size: int,
    teacher_vocab_size: int,
    chunk_budget: int,
    gradient: bool,
):
    """Of the k largest probabilities of each side, exact and of whole vocabularies: loss, gradient, divergence and
    error bound [rows].

    With the classes past them taken for no difference, l_k = sum over k ranks |p - q| is off by at most what both sides
    have there. Its gradient is p (s [class among the k] - sum p s) / temperature, of every class of the student.
    """

    def ranked(logits, vocab_size):
        # Where one side alone is fp64, the other is widened to it.
        wide = logits.to(row_scale.dtype) if row_scale.dtype == torch.float64 else logits
        return kernels.topk(wide, row_scale, temperature, min(k, vocab_size), vocab_size)

    of_student, rank_log_probs, tail = ranked(student, student_vocab_size)
    _, teacher_log_probs, teacher_tail = ranked(teacher, teacher_vocab_size)
    kept = row_scale != 0
    p, q = (torch.nn.functional.pad(x.exp(), (0, k - x.shape[1])) for x in (rank_log_probs, teacher_log_probs))
    difference = p - q
    divergence = torch.where(kept, difference.abs().sum(-1), 0)
    error_bound = torch.where(kept, tail.exp() + teacher_tail.exp(), 0)
    loss = torch.where(kept, row_scale * divergence, 0)
    if not gradient:
        return loss, student.new_empty(0), divergence, error_bound

    sign = torch.where(difference == 0, 0, difference / difference.abs())
    ranks = of_student.shape[1]
    p, sign = p[:, :ranks], mean_of_runs(sign[:, :ranks], rank_log_probs)
    slope = row_scale / temperature
    signed_mass = (p * sign).sum(-1)
    of_ranks = torch.where(of_student >= 0, slope[:, None] * p * sign, 0)  # a row that is NaN is so by signed_mass
    # The log of the softmax's denominator, from the largest class.
    largest = _at(student, of_student[:, 0].clamp(min=0).long()).to(row_scale.dtype)
    log_sum = largest / temperature - rank_log_probs[:, 0]
    at = of_student.clamp(min=0).long()
    made = kernels.empty(*student.shape, dtype=student.dtype, device=student.device)
    target = made.flatten(0, 1)
    if student.device.type == "cpu":
        chunk_budget = min(chunk_budget, _CACHE_BYTES)
    size = max(chunk_budget // (student_vocab_size * row_scale.element_size()), 1)
    buffer = torch.empty(min(size, kept.shape[0]), student_vocab_size, dtype=row_scale.dtype, device=student.device)
    for first in range(0, kept.shape[0], size):
        chunk = slice(first, min(first + size, kept.shape[0]))
        x = buffer[: chunk.stop - first]
        x.copy_(rows_of(student, chunk)[:, :student_vocab_size])
        x.div_((temperature if temperature.numel() == 1 else temperature[chunk])[:, None])
        x.sub_(log_sum[chunk, None]).exp_()  # the softmax, and then the gradient
        x.mul_(-(slope * signed_mass)[chunk, None]).scatter_add_(-1, at[chunk], of_ranks[chunk])
        target[chunk, :student_vocab_size] = x.masked_fill_(~kept[chunk, None], 0)
    target[:, student_vocab_size:] = 0
    return loss, made, divergence, error_bound


def _at(logits: Tensor, column: Tensor) -> Tensor:
    """logits[r, column[r]] of [outer, inner, columns]."""
    return logits.gather(-1, column.view(*logits.shape[:2], 1)).reshape(-1)


def mean_of_runs(x: Tensor, keys: Tensor) -> Tensor:
    """Of x [rows, n] the means over neighbours whose keys are equal, in the place of each."""
    run = torch.nn.functional.pad(keys[:, 1:] != keys[:, :-1], (1, 0)).cumsum(-1)
    total = torch.zeros_like(x).scatter_add(-1, run, x)
    number = torch.zeros_like(x).scatter_add(-1, run, torch.ones_like(x))
    return (total / number.clamp(min=1)).gather(-1, run)
