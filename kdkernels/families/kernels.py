"""The interface of a backend: the functions that operators and the loops of the families call.

A backend is any object with these functions: a module (triton/kernels.py) or an instance (`Cpu`, `Cuda` in native/).
Every result is fresh. A gradient that is not wanted is an empty tensor, and so are statistics that the problem does not
ask for. A row whose row_scale is 0 is not read, and its results are 0.
"""

from typing import Protocol

import torch
from torch import Tensor

from .rows import Rows
from .sinkhorn import Clouds, Sinkhorn
from .topk import TopkRows
from .uld import Uld


class Kernels(Protocol):
    def rows(self, problem: Rows, gradient: bool, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """Loss [rows], gradient, row floats, row sums, statistics and top-1. `out` takes the gradient: a contiguous
        tensor of the student's shape and dtype, which may be the student itself."""

    def row_floats(self, problem: Rows) -> Tensor:
        """Row floats [len(ROW_FLOATS), rows]."""

    def row_sums(self, problem: Rows, floats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row sums [len(ROW_SUMS), rows], statistics and top-1."""

    def row_gradient(self, problem: Rows, floats: Tensor, sums: Tensor) -> Tensor:
        """The gradient, of the student's shape and dtype."""

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """gradient[..., r, :] *= factor[r], in place. A row whose factor is 1 is left alone."""

    def topk_rows(self, problem: TopkRows, gradient: bool, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """Loss [rows], gradient, statistics and top-1; `out` as in `rows`."""

    def topk(self, logits: Tensor, row_scale: Tensor, temperature: Tensor, k: int, vocab_size: int):
        """Indices int32 and log-probabilities [rows, k], descending, and the log-sum-exp of the others [rows]."""

    def sorted_entries(self, indices: Tensor, log_probs: Tensor, row_scale: Tensor, vocab_size: int):
        """`families.topk.sorted_entries`, or a kernel with its results."""

    def pairwise_costs(self, clouds: Clouds, floats: Tensor, moments: bool) -> tuple[Tensor, Tensor]:
        """Costs [clouds, n, n] of "l1" or "l2" between the rows of clouds, and their moments, or an empty tensor."""

    def pairwise_gradient(self, clouds: Clouds, floats: Tensor, weights: Tensor, dot: Tensor) -> Tensor:
        """The gradient of the student's logits, from weights [clouds, n, n] of the costs' derivatives."""

    def sinkhorn(self, problem: Sinkhorn, unrolled: bool) -> tuple[Tensor, ...]:
        """Value, f, g, error, rounds done, and the unrolled gradients of cost, a and b, or three empty tensors."""

    def plan_gradient(self, problem: Sinkhorn, f: Tensor, g: Tensor, implicit: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`families.sinkhorn.plan_gradient`, or a kernel with its results."""

    def uld(self, problem: Uld, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [rows], gradient and divergence [rows] of all ranks."""

    def softcap_(self, logits: Tensor, cap: float) -> None:
        """logits = cap * tanh(logits / cap), in place."""

    def softcap_gradient_(self, gradient: Tensor, logits: Tensor, cap: float) -> None:
        """gradient *= 1 - (logits / cap)**2 of capped logits, in place. A gradient of 0 stays 0, whatever its logit."""

    def accumulate_(self, total: Tensor, part: Tensor) -> None:
        """total (fp32) += part (bf16 or fp16), in place."""

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """An uninitialised tensor."""
