"""The Sinkhorn family: csrc/calls/sinkhorn.h says what the kernels do."""

import torch
from torch import Tensor

from .launcher import Launcher


class Sinkhorn(Launcher):
    def sinkhorn(
        self,
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        tolerance: Tensor,
        iterations: int,
        entropic: bool,
        unrolled: bool,
    ):
        """Values, potentials, errors and rounds done of problems [problems, n, m], and the derivatives with respect to
        cost, a and b (or empty)."""
        problems, n, m = cost.shape
        out = {
            "value": cost.new_empty(problems),
            "f": torch.empty_like(a),
            "g": torch.empty_like(b),
            "error": cost.new_empty(problems),
            "done": torch.empty(problems, dtype=torch.int32, device=cost.device),
        }
        for name, x in (("of_cost", cost), ("of_a", a), ("of_b", b)):
            out[name] = torch.empty_like(x) if unrolled else cost.new_empty(0)
        if problems:
            self.launch(
                "sinkhorn",
                cost.device,
                {
                    "problems": problems,
                    "n": n,
                    "m": m,
                    "iterations": iterations,
                    "entropic": entropic,
                    "unrolled": unrolled,
                    "cost": cost,
                    "a": a,
                    "b": b,
                    "epsilon": epsilon,
                    "tolerance": tolerance,
                    **out,
                },
            )
        return tuple(out.values())


class CpuSinkhorn(Sinkhorn):
    def plan_gradient(
        self, cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, implicit: bool
    ):  # fmt: skip
        """The results of `transport.plan_gradient`, in a fraction of its time and memory."""
        problems, n, m = cost.shape
        out = {f"of_{name}": torch.empty_like(x) for name, x in (("cost", cost), ("a", a), ("b", b))}
        if cost.numel():
            self.launch(
                "plan_gradient",
                cost.device,
                {
                    "problems": problems,
                    "n": n,
                    "m": m,
                    "implicit": implicit,
                    "cost": cost,
                    "a": a,
                    "b": b,
                    "f": f,
                    "g": g,
                    "epsilon": epsilon,
                    **out,
                },
            )
        return list(out.values())
