"""The family of Universal Logit Distillation: csrc/calls/uld.h describes the kernels.

Both classes return the loss [rows], the gradient (or an empty tensor) and the divergence [rows].
"""

import torch

from ...families.options import per_row
from ...families.uld import Uld, ranked_chunks
from .launcher import Launcher


class UldKernel(Launcher):
    """The kernel sorts the rows itself."""

    def uld(self, problem: Uld, gradient: bool):
        student, row_scale = problem.student, problem.row_scale
        results = {
            "loss": torch.empty_like(row_scale),
            "gradient": self.gradient_target(student, gradient),
            "divergence": torch.empty_like(row_scale),
        }
        if row_scale.numel():
            fields = {
                "rows": row_scale.numel(),
                "inner": student.shape[1],
                "student_columns": problem.student_vocab_size,
                "teacher_columns": problem.teacher_vocab_size,
                "gradient_columns": student.shape[2],
                "student": student,
                "teacher": problem.teacher,
                "row_scale": row_scale,
                "temperature": problem.temperature,
                **results,
            }
            self.launch("uld", student.device, fields)
        return tuple(results.values())


class RankedUldKernel(Launcher):
    """torch sorts the rows, one chunk at a time."""

    def uld(self, problem: Uld, gradient: bool):
        student, row_scale = problem.student, problem.row_scale
        out = self.gradient_target(student, gradient)
        loss, divergence = torch.empty_like(row_scale), torch.empty_like(row_scale)
        target = out.flatten(0, 1) if gradient else None
        for ranked in ranked_chunks(problem, gradient):
            chunk, rows = ranked.rows, ranked.student.shape[0]
            signs_shape = (rows, problem.student_vocab_size + 1) if gradient else 0
            fields = {
                "rows": rows,
                "student_columns": problem.student_vocab_size,
                "teacher_columns": problem.teacher_vocab_size,
                "gradient_columns": student.shape[2],
                "student": ranked.student,
                "teacher": ranked.teacher,
                "indices": ranked.indices,
                "sums_of_signs": torch.empty(signs_shape, dtype=torch.int32, device=student.device),
                "row_scale": row_scale[chunk],
                "temperature": per_row(problem.temperature, row_scale, chunk),
                "loss": loss[chunk],
                "divergence": divergence[chunk],
                "gradient": target[chunk] if gradient else None,
            }
            self.launch("ranked_uld", student.device, fields)
        return loss, out, divergence
