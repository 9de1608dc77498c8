"""The family of Universal Logit Distillation: csrc/calls/uld.h says what the kernels do.

Both classes return the loss [rows], the gradient and the divergence [rows].
"""

import torch
from torch import Tensor

from .. import uld
from .launcher import Launcher


class Uld(Launcher):
    """The kernel sorts the rows by itself."""

    def uld(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        temperature: Tensor,
        student_vocab_size: int,
        teacher_vocab_size: int,
        chunk_budget: int,
        gradient: bool,
    ):
        into = self.gradient_target(student, gradient)
        loss, divergence = torch.empty_like(row_scale), torch.empty_like(row_scale)
        if row_scale.numel():
            self.launch(
                "uld",
                student.device,
                {
                    "rows": row_scale.numel(),
                    "inner": student.shape[1],
                    "student_columns": student_vocab_size,
                    "teacher_columns": teacher_vocab_size,
                    "gradient_columns": student.shape[2],
                    "student": student,
                    "teacher": teacher,
                    "row_scale": row_scale,
                    "temperature": temperature,
                    "loss": loss,
                    "divergence": divergence,
                    "gradient": into,
                },
            )
        return loss, into, divergence


class RankedUld(Launcher):
    """torch sorts the rows, a chunk at a time."""

    def uld(
        self,
        student: Tensor,
        teacher: Tensor,
        row_scale: Tensor,
        temperature: Tensor,
        student_vocab_size: int,
        teacher_vocab_size: int,
        chunk_budget: int,
        gradient: bool,
    ):
        device = student.device
        into = self.gradient_target(student, gradient)
        loss, divergence = (torch.empty(row_scale.numel(), device=device) for _ in range(2))
        target = into.flatten(0, 1) if gradient else None
        sizes = student_vocab_size, teacher_vocab_size
        for ranked in uld.ranked_chunks(student, teacher, *sizes, chunk_budget, gradient):
            chunk, rows = ranked.rows, ranked.student.shape[0]
            signs_shape = (rows, student_vocab_size + 1) if gradient else 0
            self.launch(
                "ranked_uld",
                device,
                {
                    "rows": rows,
                    "student_columns": student_vocab_size,
                    "teacher_columns": teacher_vocab_size,
                    "gradient_columns": student.shape[2],
                    "student": ranked.student,
                    "teacher": ranked.teacher,
                    "indices": ranked.indices,
                    "sums_of_signs": torch.empty(signs_shape, dtype=torch.int32, device=device),
                    "row_scale": row_scale[chunk],
                    "temperature": temperature if temperature.numel() == 1 else temperature[chunk],
                    "loss": loss[chunk],
                    "divergence": divergence[chunk],
                    "gradient": target[chunk] if gradient else None,
                },
            )
        return loss, into, divergence
