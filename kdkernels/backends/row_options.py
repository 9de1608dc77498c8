"""What a row has of its own, as every operator takes it, and some rows out of all."""

from typing import NamedTuple

import torch
from torch import Tensor


class RowOptions(NamedTuple):
    """Contiguous [rows], or (temperature, hard_weight) [1], in the compute dtype; labels int64."""

    row_scale: Tensor
    labels: Tensor | None
    temperature: Tensor
    hard_weight: Tensor | None

    def of(self, chunk) -> "RowOptions":
        """Those of some rows: a slice or indices."""
        rows = self.row_scale.shape[0]
        return RowOptions(*(x if x is None or x.shape[0] != rows else x[chunk] for x in self))


def rows_of(x: Tensor, chunk) -> Tensor:
    """Rows of [outer, inner, width] as [n, width]: a view where they lie at one stride, else a copy."""
    if isinstance(chunk, slice):
        if at_one_stride(x):
            return x.flatten(0, 1)[chunk]
        chunk = torch.arange(chunk.start, chunk.stop, device=x.device)
    return x[chunk // x.shape[1], chunk % x.shape[1]]


def at_one_stride(x: Tensor) -> bool:
    return x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
