"""The dense row family: ops.py says what the functions take and return, csrc/calls/rows.h what the kernel does."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ROW_FLOATS, ROW_STATISTICS, ROW_SUMS, ROW_TOP1, compute_dtype
from .launcher import Launcher

FLOATS, SUMS, GRADIENT = 1, 2, 4  # Sweep in csrc/calls/rows.h


class Options(NamedTuple):
    """RowOptions in csrc/calls/rows.h."""

    row_scale: Tensor
    labels: Tensor | None
    temperature: Tensor
    hard_weight: Tensor | None
    temperature_squared: bool


class Rows(Launcher):
    def rows(
        self,
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
        gradient: bool,
        statistics: bool,
        into: Tensor | None = None,
    ):
        """`into`, with a gradient: a contiguous tensor of the student's shape and dtype that takes the gradient, in
        place of a fresh one. It may be the student itself."""
        rows = row_scale.numel()
        out = {
            "loss": torch.empty_like(row_scale),
            "gradient": self.gradient_target(student, gradient, into),
            "floats": row_scale.new_empty(len(ROW_FLOATS), rows),
            "sums": row_scale.new_empty(len(ROW_SUMS), rows),
            **empty_statistics(row_scale, statistics),
        }
        options = Options(row_scale, labels, temperature, hard_weight, temperature_squared)
        found = {"divergence": divergence, "parameters": parameters, **out}
        found["unit_log_sum"] = hard_weight is not None or (labels is not None and statistics)
        self._sweep(FLOATS | SUMS | (GRADIENT if gradient else 0), student, teacher, options, vocab_size, found)
        return tuple(out.values())

    def row_floats(self, student: Tensor, teacher: Tensor, row_scale: Tensor, temperature: Tensor, vocab_size: int):
        floats = row_scale.new_empty(len(ROW_FLOATS), row_scale.numel(), dtype=compute_dtype(student, teacher))
        options = Options(row_scale, None, temperature, None, False)
        self._sweep(FLOATS, student, teacher, options, vocab_size, {"unit_log_sum": True, "floats": floats})
        return floats

    def row_sums(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        labels: Tensor | None,
        temperature: Tensor,
        parameters: Tensor,
        floats: Tensor,
        divergence: str,
        vocab_size: int,
        statistics: bool,
    ):
        out = {"sums": row_scale.new_empty(len(ROW_SUMS), row_scale.numel()), **empty_statistics(row_scale, statistics)}
        options = Options(row_scale, labels, temperature, None, False)
        found = {"divergence": divergence, "parameters": parameters, "floats": floats, **out}
        self._sweep(SUMS, student, teacher, options, vocab_size, found)
        return tuple(out.values())

    def row_gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        labels: Tensor | None,
        temperature: Tensor,
        hard_weight: Tensor | None,
        parameters: Tensor,
        floats: Tensor,
        sums: Tensor,
        divergence: str,
        vocab_size: int,
        temperature_squared: bool,
    ):
        gradient = self.gradient_target(student, True)
        options = Options(row_scale, labels, temperature, hard_weight, temperature_squared)
        found = {
            "divergence": divergence,
            "parameters": parameters,
            "floats": floats,
            "sums": sums,
            "gradient": gradient,
        }
        self._sweep(GRADIENT, student, teacher, options, vocab_size, found)
        return gradient

    def _sweep(
        self, sweeps: int, student: Tensor, teacher: Tensor, options: Options, vocab_size: int, fields: dict
    ) -> None:
        """Launches sweeps over the rows. `fields`: those that differ between the sweeps."""
        rows = options.row_scale.numel()
        if not rows:
            return
        _, inner, width = student.shape
        self.launch(
            "rows",
            student.device,
            {
                **_ABSENT,
                "sweeps": sweeps,
                "rows": rows,
                "inner": inner,
                "columns": vocab_size,
                "gradient_columns": width,
                "student": student,
                "teacher": teacher,
                "options": options,
                **fields,
            },
        )

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        assert factor.dtype == (torch.float64 if gradient.dtype == torch.float64 else torch.float32), factor.dtype
        if gradient.numel():
            columns = gradient.shape[-1]
            rows = gradient.numel() // columns
            self.launch(
                "scale_rows", gradient.device, {"rows": rows, "columns": columns, "x": gradient, "factor": factor}
            )


# The fields that some sweeps have no value for.
_ABSENT = {
    "unit_log_sum": False,
    **dict.fromkeys(("divergence", "parameters", "floats", "sums", "loss", "statistics", "top1", "gradient")),
}


def empty_statistics(row_scale: Tensor, wanted: bool) -> dict[str, Tensor]:
    """The tensors that take the statistics of rows; empty ones where none are wanted."""
    rows = row_scale.numel()
    return {
        "statistics": row_scale.new_empty(len(ROW_STATISTICS) if wanted else 0, rows),
        "top1": torch.empty(len(ROW_TOP1) if wanted else 0, rows, dtype=torch.int64, device=row_scale.device),
    }
