"""Per-row options as every operator takes them, the rules for their values, and helpers that slice rows."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(student: torch.Tensor, teacher: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic, the loss and every per-row number: fp64 when a side is fp64, else fp32."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


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


# Whether values (labels, temperatures, hard weights) are checked also where that costs a synchronisation.
_checked = os.environ.get("KDKERNELS_CHECK") == "1"


def checks(enabled: bool) -> bool:
    """Whether a bad value in a tensor (a label out of range, a temperature <= 0, a hard weight) raises on a GPU too.

    On a CPU it always does. On a GPU it costs a synchronisation, so without this the row becomes NaN.
    KDKERNELS_CHECK=1 sets it from outside. Returns what was set before.
    """
    global _checked
    before, _checked = _checked, bool(enabled)
    return before


def values_are_checked() -> bool:
    return _checked


def is_transformed() -> bool:
    """Whether a compiler or torch.func traces the call, whose values cannot be read then."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def bad_values_raise(device: torch.device) -> bool:
    """On a CPU, and elsewhere where `checks` asks for it."""
    return (device.type == "cpu" or _checked) and not is_transformed()


def bad_rows(
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    vocab_size: int,
) -> dict[str, Tensor]:
    """Which kept rows have a value that no loss has: a bool tensor [rows] for each argument that is there."""
    kept = row_scale != 0
    bad = {"temperature": kept & ~((temperature > 0) & (temperature < torch.inf) & (1 / temperature < torch.inf))}
    if labels is not None:
        bad["labels"] = kept & ((labels < 0) | (labels >= vocab_size))
    if hard_weight is not None:
        bad["hard_weight"] = kept & ~((hard_weight >= 0) & (hard_weight <= 1))
    return bad


def check_values(
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    vocab_size: int,
) -> None:
    """Raises ValueError for the first row of `bad_rows`. Reads values: a synchronisation on a GPU."""
    given = {"labels": labels, "temperature": temperature, "hard_weight": hard_weight}
    expected = {
        "labels": f"0 <= label < {vocab_size} (the vocabulary) or ignore_index",
        "temperature": f"finite and > 0 in {temperature.dtype}, as its inverse",
        "hard_weight": "from 0 to 1",
    }
    for name, bad in bad_rows(row_scale, labels, temperature, hard_weight, vocab_size).items():
        if bad.any():
            row = int(bad.nonzero()[0])
            got = given[name].expand_as(row_scale)[row].item()
            raise ValueError(f"{name}: expected {expected[name]}; got {got} in row {row}")
