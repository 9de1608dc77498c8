"""The pairwise family: csrc/calls/pairwise.h says what the kernels do."""

import torch
from torch import Tensor

from .launcher import Launcher


class Pairwise(Launcher):
    def pairwise_costs(
        self,
        student: Tensor,
        teacher: Tensor,
        kept: Tensor,
        temperature: Tensor,
        floats: Tensor,
        cost: str,
        vocab_size: int,
        moments: bool,
    ):
        """Costs and moments [clouds, n, n] (or empty) between rows of logits [clouds, n, columns]."""
        clouds, rows = kept.shape
        costs = torch.empty(clouds, rows, rows, dtype=kept.dtype, device=kept.device)
        out = {"costs": costs, "moments": torch.empty_like(costs) if moments else costs.new_empty(0)}
        if costs.numel():
            self.launch(
                "pair_costs",
                student.device,
                {
                    "kind": cost,
                    "clouds": clouds,
                    "rows": rows,
                    "columns": vocab_size,
                    "student": student,
                    "teacher": teacher,
                    "kept": kept,
                    "temperature": temperature,
                    "floats": floats,
                    **out,
                },
            )
        return tuple(out.values())

    def pairwise_gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        kept: Tensor,
        temperature: Tensor,
        weights: Tensor,
        dot: Tensor,
        floats: Tensor,
        cost: str,
        vocab_size: int,
    ):
        """The gradient of the student's logits, from weights [clouds, n, n] of the costs' derivatives."""
        clouds, rows = kept.shape
        gradient = self.gradient_target(student, True)
        if gradient.numel():
            self.launch(
                "pair_gradient",
                student.device,
                {
                    "kind": cost,
                    "clouds": clouds,
                    "rows": rows,
                    "columns": vocab_size,
                    "gradient_columns": student.shape[2],
                    "student": student,
                    "teacher": teacher,
                    "kept": kept,
                    "temperature": temperature,
                    "floats": floats,
                    "weights": weights,
                    "dot": dot,
                    "gradient": gradient,
                },
            )
        return gradient
