"""The functional losses as torch modules."""

import inspect

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import divergences
from .distributions import LinearLogits, SparseLogProbs
from .losses.class_ot import fused_class_ot
from .losses.divergence import DivergenceOptions, fused_divergence
from .losses.options import LossOutput
from .losses.signatures import unknown_keyword
from .losses.sinkhorn import SinkhornOutput, fused_sinkhorn, fused_sinkhorn_divergence, fused_sinkhorn_kd
from .losses.uld import fused_uld


class _Loss(torch.nn.Module):
    """A loss function together with options that stay the same from call to call.

    The module takes the function's options. An option given in a call replaces the module's own for that call. The
    module has no parameters and no state.
    """

    function = staticmethod(lambda: None)

    def __init__(self, **options):
        super().__init__()
        parameters = inspect.signature(self.function).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
        for name in options:
            if name not in known:
                raise unknown_keyword(type(self).__name__, name, known)
        self.options = options

    def _call(self, *tensors, **options):
        return self.function(*tensors, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class Divergence(_Loss):
    """`fused_divergence` with static options.

    >>> loss = kdkernels.nn.Divergence("js", temperature=2.0)
    >>> loss(student, teacher, mask=mask)

    `divergence` is a name or a `kdkernels.Divergence`.
    """

    function = staticmethod(fused_divergence)

    def __init__(self, divergence: str | divergences.Divergence = "kl", **options: Unpack[DivergenceOptions]):
        super().__init__(**options)
        if not isinstance(divergence, divergences.Divergence):
            divergence = divergences.Divergence(divergence)
        self.divergence = divergence

    @staticmethod
    def gkd(beta: float, **options: Unpack[DivergenceOptions]) -> "Divergence":
        """The module for beta in [0, 1]: kl at 0, reverse_kl at 1, js between, as `kdkernels.Divergence.gkd`."""
        return Divergence(divergences.Divergence.gkd(beta), **options)

    def forward(
        self,
        student: Tensor | LinearLogits,
        teacher: Tensor | LinearLogits | SparseLogProbs,
        **options: Unpack[DivergenceOptions],
    ) -> Tensor | LossOutput:
        return self._call(student, teacher, self.divergence, **options)

    def extra_repr(self) -> str:
        return ", ".join(x for x in (repr(self.divergence), super().extra_repr()) if x)


class SinkhornKD(_Loss):
    """`fused_sinkhorn_kd` with static options."""

    function = staticmethod(fused_sinkhorn_kd)

    def forward(self, student: Tensor, teacher: Tensor, **options) -> Tensor:
        return self._call(student, teacher, **options)


class Sinkhorn(_Loss):
    """`fused_sinkhorn` with static options."""

    function = staticmethod(fused_sinkhorn)

    def forward(self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, **options) -> SinkhornOutput:
        return self._call(cost, a, b, **options)


class SinkhornDivergence(_Loss):
    """`fused_sinkhorn_divergence` with static options; epsilon is one of them, or goes with each call.

    >>> loss = kdkernels.nn.SinkhornDivergence(epsilon=0.1)
    >>> loss(cost_xy, cost_xx, cost_yy)
    """

    function = staticmethod(fused_sinkhorn_divergence)

    def forward(
        self,
        cost_xy: Tensor,
        cost_xx: Tensor,
        cost_yy: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        **options,
    ) -> Tensor:
        return self._call(cost_xy, cost_xx, cost_yy, a, b, **options)


class ClassOT(_Loss):
    """`fused_class_ot` with static options; each call passes the costs of classes.

    >>> loss = kdkernels.nn.ClassOT(temperature=10.0, epsilon=0.05)
    >>> loss(student, teacher, class_cost, exclude_labels=labels)
    """

    function = staticmethod(fused_class_ot)

    def forward(self, student: Tensor, teacher: Tensor, class_cost: Tensor, **options) -> Tensor:
        return self._call(student, teacher, class_cost, **options)


class ULD(_Loss):
    """`fused_uld` with static options.

    >>> loss = kdkernels.nn.ULD(temperature=2.0)
    >>> loss(student, teacher, mask=mask)
    """

    function = staticmethod(fused_uld)

    def forward(self, student: Tensor, teacher: Tensor, **options) -> Tensor | LossOutput:
        return self._call(student, teacher, **options)
