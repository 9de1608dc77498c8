"""The pairwise family: csrc/calls/pairwise.h describes the kernels."""

import torch
from torch import Tensor

from ...families.sinkhorn import Clouds
from .launcher import Launcher


class PairwiseKernels(Launcher):
    def pairwise_costs(self, clouds: Clouds, floats: Tensor, moments: bool):
        """Costs and moments (or empty), both [clouds, n, n], between the rows of each cloud."""
        count, rows = clouds.row_mass.shape
        costs = clouds.row_mass.new_empty(count, rows, rows)
        results = {"costs": costs, "moments": torch.empty_like(costs) if moments else costs.new_empty(0)}
        if costs.numel():
            self.launch("pair_costs", costs.device, {**_fields(clouds, floats), **results})
        return tuple(results.values())

    def pairwise_gradient(self, clouds: Clouds, floats: Tensor, weights: Tensor, dot: Tensor):
        """The gradient of the student's logits, from the gradients [clouds, n, n] of the costs."""
        gradient = self.gradient_target(clouds.student, True)
        if gradient.numel():
            fields = {
                **_fields(clouds, floats),
                "gradient_columns": clouds.student.shape[2],
                "weights": weights,
                "dot": dot,
                "gradient": gradient,
            }
            self.launch("pair_gradient", gradient.device, fields)
        return gradient


def _fields(clouds: Clouds, floats: Tensor) -> dict:
    count, rows = clouds.row_mass.shape
    return {
        "kind": clouds.cost,
        "clouds": count,
        "rows": rows,
        "columns": clouds.vocab_size,
        "student": clouds.student,
        "teacher": clouds.teacher,
        "row_mass": clouds.row_mass,
        "temperature": clouds.temperature,
        "floats": floats,
    }
