"""What a row has of its own, as every operator takes it."""

from typing import NamedTuple

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
