"""The Sinkhorn family: csrc/calls/sinkhorn.h describes the kernels."""

import torch
from torch import Tensor

from ...families.sinkhorn import Sinkhorn, plan_gradient
from .launcher import Launcher


class SinkhornKernels(Launcher):
    def sinkhorn(self, problem: Sinkhorn, unrolled: bool):
        """Values, potentials, errors and rounds done, and the gradients with respect to cost, a and b (or empty)."""
        cost, a, b = problem[:3]
        problems, n, m = cost.shape
        results = {
            "value": cost.new_empty(problems),
            "f": torch.empty_like(a),
            "g": torch.empty_like(b),
            "error": cost.new_empty(problems),
            "done": cost.new_empty(problems, dtype=torch.int32),
        }
        for name, x in (("grad_cost", cost), ("grad_a", a), ("grad_b", b)):
            results[name] = torch.empty_like(x) if unrolled else cost.new_empty(0)
        if problems:
            fields = {
                "problems": problems,
                "n": n,
                "m": m,
                "iterations": problem.iterations,
                "entropic": problem.entropic,
                "unrolled": unrolled,
                "cost": cost,
                "a": a,
                "b": b,
                "epsilon": problem.epsilon,
                "tolerance": problem.tolerance,
                **results,
            }
            self.launch("sinkhorn", cost.device, fields)
        return tuple(results.values())

    plan_gradient = staticmethod(plan_gradient)


class CpuSinkhornKernels(SinkhornKernels):
    def plan_gradient(self, problem: Sinkhorn, f: Tensor, g: Tensor, implicit: bool):
        """The results of `families.sinkhorn.plan_gradient`, in a fraction of its time and memory."""
        cost, a, b = problem[:3]
        problems, n, m = cost.shape
        results = {f"grad_{name}": torch.empty_like(x) for name, x in (("cost", cost), ("a", a), ("b", b))}
        if cost.numel():
            fields = {
                "problems": problems,
                "n": n,
                "m": m,
                "implicit": implicit,
                "cost": cost,
                "a": a,
                "b": b,
                "f": f,
                "g": g,
                "epsilon": problem.epsilon,
                **results,
            }
            self.launch("plan_gradient", cost.device, fields)
        return tuple(results.values())
