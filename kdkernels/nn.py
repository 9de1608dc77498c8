"""Modules over the functional losses."""

import torch
from torch import Tensor

from . import divergences
from .distributions import LinearLogits, SparseLogProbs
from .functional import LossOutput, fused_divergence


class Divergence(torch.nn.Module):
    """`fused_divergence` with the options that stay the same from call to call.

    >>> loss = kdkernels.nn.Divergence("js", temperature=2.0)
    >>> loss(student, teacher, mask=mask)

    `divergence` is a name or a `kdkernels.Divergence`; static and per-call options are those of `fused_divergence`, and
    one that is given in the call replaces the static one. Holds no parameters and no state.
    """

    def __init__(self, divergence: str | divergences.Divergence = "kl", **options):
        super().__init__()
        if not isinstance(divergence, divergences.Divergence):
            divergence = divergences.Divergence(divergence)
        unknown = set(options) - set(fused_divergence.__kwdefaults__)
        if unknown:
            known = ", ".join(fused_divergence.__kwdefaults__)
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; known: {known}")
        self.divergence = divergence
        self.options = options

    @staticmethod
    def gkd(beta: float, **options) -> "Divergence":
        """kl at beta = 0, reverse_kl at 1, js between: `kdkernels.Divergence.gkd`."""
        return Divergence(divergences.Divergence.gkd(beta), **options)

    def forward(
        self, student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | SparseLogProbs, **options
    ) -> Tensor | LossOutput:
        return fused_divergence(student, teacher, self.divergence, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.divergence), *(f"{name}={value!r}" for name, value in self.options.items())])
