"""The row family: losses between stored logits of one vocabulary, and the names of its sweeps' results."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import CATALOGUE
from .options import RowOptions

# Statistics of a row, in the order of the [len, rows] tensor that every backend fills.
ROW_STATISTICS = (
    "divergence",
    "cross_entropy",
    "tv",
    "student_entropy",
    "teacher_entropy",
    "student_max_log_prob",
    "teacher_max_log_prob",
    "student_label_log_prob",
    "teacher_label_log_prob",
    "student_lse",
    "teacher_lse",
)
# Statistics that are class indices, in the order of the int64 [2, rows] tensor.
ROW_TOP1 = ("student_top1", "teacher_top1")
ROW_FLOATS = ("student_max", "student_log_sum", "teacher_max", "teacher_log_sum", "unit_log_sum")
# shift: what the close lines subtract from (s - t) / T to get log q - log p; +inf in a row that has the other lines.
ROW_SUMS = ("phi", "psi", "shift")

# A row of this temperature or a higher one is taken for close before its divergence is known: at T the log-ratios are
# 1 / T of what they are at 1.
CLOSE_TEMPERATURE = 16.0


def close_below(divergence: str, dtype: torch.dtype) -> float:
    """The divergence below which a row is found by the close lines, in arithmetic of this dtype: 0 if none is.

    A row below it, and a row from `CLOSE_TEMPERATURE` on, has the close lines. All others have the lines for all rows.
    """
    return CATALOGUE[divergence].close_below if dtype == torch.float32 else 0.0


class Rows(NamedTuple):
    """Student and teacher logits, compared row by row."""

    student: Tensor  # [outer, inner, columns], the last stride is 1
    teacher: Tensor  # [outer, inner, columns]
    options: RowOptions
    divergence: str
    parameters: Tensor  # [1], the divergence's, in the compute dtype
    vocab_size: int
    statistics: bool  # whether the row statistics are wanted

    def tracked(self) -> tuple[Tensor | None, ...]:
        return (self.student,)

    @property
    def row_scale(self) -> Tensor:
        return self.options.row_scale

    def scaled(self, grad_loss: Tensor) -> "Rows":
        return self._replace(options=self.options.scaled(grad_loss), statistics=False)


def softmaxes(student: Tensor, teacher: Tensor, options: RowOptions, vocab_size: int) -> Rows:
    """The problem whose row floats are those of the two softmaxes; the row floats do not depend on the divergence."""
    return Rows(student, teacher, options, "kl", options.temperature, vocab_size, False)
