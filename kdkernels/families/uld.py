"""Universal Logit Distillation: sorts rows for the kernels, and compares only the k largest probabilities for topk."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .options import RowOptions, bad_values_raise, check_values, per_row, rows_of, scaled_rows, slices

_CACHE_BYTES = 2 << 20  # a buffer of this size stays in a CPU's cache from one operation to the next


class Uld(NamedTuple):
    """Student and teacher logits of two vocabularies, whose sorted probabilities are compared."""

    student: Tensor  # [outer, inner, columns], the last stride is 1
    teacher: Tensor  # [outer, inner, columns]
    row_scale: Tensor  # [rows]; 0 skips the row
    temperature: Tensor  # [rows] or [1]
    k: int | None  # the number of compared ranks; None: all
    student_vocab_size: int
    teacher_vocab_size: int
    chunk_budget: int  # bytes

    def tracked(self) -> tuple[Tensor | None, ...]:
        return (self.student,)

    def scaled(self, grad_loss: Tensor) -> "Uld":
        return self._replace(row_scale=scaled_rows(self.row_scale, grad_loss))


class Ranked(NamedTuple):
    """Rows in descending order, contiguous; torch.sort puts NaN first."""

    rows: slice
    student: Tensor  # [n, student_vocab_size]
    indices: Tensor | None  # int64, the class of each rank; None without a gradient
    teacher: Tensor  # [n, teacher_vocab_size]


def ranked_chunks(problem: Uld, gradient: bool) -> Iterator[Ranked]:
    """Sorts all rows, one chunk within the budget at a time.

    It sorts the logits themselves: softmax keeps their order, and a radix sort makes half as many passes over 16-bit
    keys as over fp32 probabilities.
    """
    student, teacher = problem.student, problem.teacher
    rows = student.shape[0] * student.shape[1]
    # Sorted values and indices, and the sums of signs; the sort takes the same memory again for values and indices.
    row_bytes = problem.student_vocab_size * (2 * (student.element_size() + 8) + 4)
    row_bytes += problem.teacher_vocab_size * 2 * (teacher.element_size() + 8)
    for chunk in slices(rows, row_bytes, problem.chunk_budget):
        values, indices = _sorted(student, chunk, problem.student_vocab_size)
        others, _ = _sorted(teacher, chunk, problem.teacher_vocab_size)
        yield Ranked(chunk, values, indices if gradient else None, others)


def _sorted(logits: Tensor, chunk: slice, vocab_size: int) -> tuple[Tensor, Tensor]:
    values, indices = rows_of(logits, chunk)[:, :vocab_size].sort(dim=-1, descending=True)
    return values.contiguous(), indices.contiguous()


def uld(kernels, problem: Uld, wanted: list[bool]):
    """Loss, gradient, divergence and error bound [rows]: `ops.uld`."""
    row_scale = problem.row_scale
    if bad_values_raise(row_scale.device):
        check_values(RowOptions(row_scale, problem.temperature), 0)
    if problem.k is not None:
        return _uld_topk(kernels, problem, wanted[0])
    loss, gradient, divergence = kernels.uld(problem, wanted[0])
    return loss, gradient, divergence, torch.zeros_like(divergence)


def _uld_topk(kernels, problem: Uld, wanted: bool):
    """`uld` for the k largest probabilities of each side; these are exact, from the softmax over the whole vocabulary.

    The classes past the k largest count as equal on both sides. So l_k = sum over k ranks |p - q| is off by at most
    the mass that both sides have past them. The gradient is p (s [class among the k] - sum p s) / temperature, for
    every class of the student.
    """
    student, row_scale, temperature, k = problem.student, problem.row_scale, problem.temperature, problem.k

    def ranked(logits, vocab_size):
        # If only one side is fp64, the other is widened to fp64.
        wide = logits.to(row_scale.dtype) if row_scale.dtype == torch.float64 else logits
        return kernels.topk(wide, row_scale, temperature, min(k, vocab_size), vocab_size)

    classes, rank_log_probs, tail = ranked(student, problem.student_vocab_size)
    _, teacher_log_probs, teacher_tail = ranked(problem.teacher, problem.teacher_vocab_size)
    kept = row_scale != 0
    p, q = (torch.nn.functional.pad(x.exp(), (0, k - x.shape[1])) for x in (rank_log_probs, teacher_log_probs))
    difference = p - q
    divergence = torch.where(kept, difference.abs().sum(-1), 0)
    error_bound = torch.where(kept, tail.exp() + teacher_tail.exp(), 0)
    loss = torch.where(kept, row_scale * divergence, 0)
    if not wanted:
        return loss, student.new_empty(0), divergence, error_bound

    sign = torch.where(difference == 0, 0, difference / difference.abs())
    ranks = classes.shape[1]
    p, sign = p[:, :ranks], mean_of_runs(sign[:, :ranks], rank_log_probs)
    slope = row_scale / temperature
    signed_mass = (p * sign).sum(-1)
    # A NaN row has no classes; signed_mass makes its gradient NaN.
    rank_gradient = torch.where(classes >= 0, slope[:, None] * p * sign, 0)
    # The log of the softmax's denominator, from the class with the largest logit.
    largest = _at(student, classes[:, 0].clamp(min=0).long()).to(row_scale.dtype)
    log_sum = largest / temperature - rank_log_probs[:, 0]
    gradient = _topk_gradient(kernels, problem, log_sum, slope * signed_mass, classes, rank_gradient)
    return loss, gradient, divergence, error_bound


def _topk_gradient(
    kernels, problem: Uld, log_sum: Tensor, row_slope: Tensor, classes: Tensor, rank_gradient: Tensor
) -> Tensor:
    """-row_slope softmax(student / temperature), plus the gradient of the ranks at their classes."""
    student, vocab_size, kept = problem.student, problem.student_vocab_size, problem.row_scale != 0
    at = classes.clamp(min=0).long()
    gradient = kernels.empty(*student.shape, dtype=student.dtype, device=student.device)
    target = gradient.flatten(0, 1)
    budget = min(problem.chunk_budget, _CACHE_BYTES) if student.device.type == "cpu" else problem.chunk_budget
    row_bytes = vocab_size * log_sum.element_size()
    size = min(max(budget // row_bytes, 1), kept.shape[0])
    buffer = torch.empty(size, vocab_size, dtype=log_sum.dtype, device=student.device)
    for chunk in slices(kept.shape[0], row_bytes, budget):
        x = buffer[: chunk.stop - chunk.start]
        x.copy_(rows_of(student, chunk)[:, :vocab_size])
        x.div_(per_row(problem.temperature, problem.row_scale, chunk)[:, None])
        x.sub_(log_sum[chunk, None]).exp_()  # the softmax, and then the gradient
        x.mul_(-row_slope[chunk, None]).scatter_add_(-1, at[chunk], rank_gradient[chunk])
        target[chunk, :vocab_size] = x.masked_fill_(~kept[chunk, None], 0)
    target[:, vocab_size:] = 0
    return gradient


def _at(logits: Tensor, column: Tensor) -> Tensor:
    """logits[r, column[r]] of [outer, inner, columns]."""
    return logits.gather(-1, column.view(*logits.shape[:2], 1)).reshape(-1)


def mean_of_runs(x: Tensor, keys: Tensor) -> Tensor:
    """Replaces each element of x [rows, n] by the mean over its run: neighbours with equal keys."""
    run = torch.nn.functional.pad(keys[:, 1:] != keys[:, :-1], (1, 0)).cumsum(-1)
    total = torch.zeros_like(x).scatter_add(-1, run, x)
    number = torch.zeros_like(x).scatter_add(-1, run, torch.ones_like(x))
    return (total / number.clamp(min=1)).gather(-1, run)
