"""The dense row family: families/kernels.py says what the functions return, csrc/calls/rows.h describes the kernel."""

import torch
from torch import Tensor

from ...families.options import RowOptions
from ...families.rows import CLOSE_TEMPERATURE, ROW_FLOATS, ROW_STATISTICS, ROW_SUMS, ROW_TOP1, Rows, close_below
from .launcher import Launcher

FLOATS, SUMS, GRADIENT = 1, 2, 4  # Sweep in csrc/calls/rows.h


class RowKernels(Launcher):
    def rows(self, problem: Rows, gradient: bool, out: Tensor | None = None):
        """Runs all sweeps. `out`, with a gradient: a contiguous tensor of the student's shape and dtype that takes the
        gradient in place of a fresh one. `out` may be the student itself.
        """
        options, statistics = problem.options, problem.statistics
        row_scale = options.row_scale
        rows = row_scale.numel()
        results = {
            "loss": torch.empty_like(row_scale),
            "gradient": self.gradient_target(problem.student, gradient, out),
            "floats": row_scale.new_empty(len(ROW_FLOATS), rows),
            "sums": row_scale.new_empty(len(ROW_SUMS), rows),
            **empty_statistics(row_scale, statistics),
        }
        needs_label = options.hard_weight is not None or (options.labels is not None and statistics)
        self._sweep(FLOATS | SUMS | (GRADIENT if gradient else 0), problem, options, needs_label, results)
        return tuple(results.values())

    def row_floats(self, problem: Rows):
        floats = problem.row_scale.new_empty(len(ROW_FLOATS), problem.row_scale.numel())
        options = problem.options._replace(labels=None, hard_weight=None)
        self._sweep(FLOATS, problem, options, True, {"floats": floats})
        return floats

    def row_sums(self, problem: Rows, floats: Tensor):
        row_scale = problem.row_scale
        results = {
            "sums": row_scale.new_empty(len(ROW_SUMS), row_scale.numel()),
            **empty_statistics(row_scale, problem.statistics),
        }
        options = problem.options._replace(hard_weight=None)
        self._sweep(SUMS, problem, options, False, {"floats": floats, **results})
        return tuple(results.values())

    def row_gradient(self, problem: Rows, floats: Tensor, sums: Tensor):
        gradient = self.gradient_target(problem.student, True)
        self._sweep(GRADIENT, problem, problem.options, False, {"floats": floats, "sums": sums, "gradient": gradient})
        return gradient

    def _sweep(self, sweeps: int, problem: Rows, options: RowOptions, needs_unit_log_sum: bool, results: dict) -> None:
        """Launches sweeps over the rows. `results`: of these sweeps, and of earlier sweeps that these read."""
        rows = options.row_scale.numel()
        if not rows:
            return
        _, inner, width = problem.student.shape
        fields = {
            **_ABSENT,
            "sweeps": sweeps,
            "divergence": problem.divergence,
            "rows": rows,
            "inner": inner,
            "columns": problem.vocab_size,
            "gradient_columns": width,
            "student": problem.student,
            "teacher": problem.teacher,
            "options": options,
            "parameters": problem.parameters,
            "close_below": close_below(problem.divergence, options.row_scale.dtype),
            "close_temperature": CLOSE_TEMPERATURE,
            "needs_unit_log_sum": needs_unit_log_sum,
            **results,
        }
        self.launch("rows", problem.student.device, fields)

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        assert factor.dtype == (torch.float64 if gradient.dtype == torch.float64 else torch.float32), factor.dtype
        if gradient.numel():
            columns = gradient.shape[-1]
            rows = gradient.numel() // columns
            fields = {"rows": rows, "columns": columns, "x": gradient, "factor": factor}
            self.launch("scale_rows", gradient.device, fields)


# The results that some sweeps neither write nor read.
_ABSENT = dict.fromkeys(("floats", "sums", "loss", "statistics", "top1", "gradient"))


def empty_statistics(row_scale: Tensor, wanted: bool) -> dict[str, Tensor]:
    """The tensors that take the rows' statistics; empty if none are wanted."""
    rows = row_scale.numel()
    return {
        "statistics": row_scale.new_empty(len(ROW_STATISTICS) if wanted else 0, rows),
        "top1": row_scale.new_empty(len(ROW_TOP1) if wanted else 0, rows, dtype=torch.int64),
    }
