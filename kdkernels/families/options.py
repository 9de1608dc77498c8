"""Per-row options as every operator takes them, the rules for their values, and helpers that slice rows."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, the loss and every per-row number: fp64 when a side is fp64, else fp32."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def has_fp64(device: torch.device) -> bool:
    """Whether the device computes in fp64. Apple's GPUs do not, nor do some of Intel's."""
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).has_fp64
    return device.type != "mps"


def fp64_device(device: torch.device) -> torch.device:
    """The device for steps in fp64: this one, or the CPU if this one has no fp64."""
    return device if has_fp64(device) else torch.device("cpu")


class RowOptions(NamedTuple):
    """The options of each row. Tensors are contiguous, in the compute dtype unless named otherwise."""

    row_scale: Tensor  # [rows]: the row's weight divided by the denominator; 0 skips the row before any load
    temperature: Tensor  # [rows] or [1]
    labels: Tensor | None = None  # [rows] int64
    hard_weight: Tensor | None = None  # [rows] or [1]: the label term's share of the loss
    temperature_squared: bool = False  # whether the divergence is multiplied by the temperature's square
    loss_cap: Tensor | None = None  # [rows] or [1]: the most that a row's loss is before the row scale

    def of(self, chunk) -> "RowOptions":
        """The options of some rows, given as a slice or indices."""
        return RowOptions(*(per_row(x, self.row_scale, chunk) if isinstance(x, Tensor) else x for x in self))

    @property
    def gradient_needs_loss(self) -> bool:
        """Whether the factors of a row's gradient follow from its loss: no sweep writes a gradient before the loss."""
        return self.loss_cap is not None

    def soft_factor(self) -> Tensor:
        """[rows]: the factor of a row's divergence in its loss; 0 for a skipped row, which may have any options."""
        factor = self.row_scale if self.hard_weight is None else self.row_scale * (1 - self.hard_weight)
        factor = factor * self.temperature**2 if self.temperature_squared else factor
        return torch.where(self.row_scale == 0, 0, factor)

    def scaled(self, grad_loss: Tensor) -> "RowOptions":
        """The options for row losses times `grad_loss`. A skipped row stays skipped, whatever its gradient is."""
        return self._replace(row_scale=scaled_rows(self.row_scale, grad_loss))


def per_row(x: Tensor, row_scale: Tensor, chunk) -> Tensor:
    """Some rows of [rows]; a number for all rows, [1], unchanged."""
    return x if x.shape[0] != row_scale.shape[0] else x[chunk]


def scaled_rows(row_scale: Tensor, grad_loss: Tensor) -> Tensor:
    """The row scale times the gradient of the row losses; 0 for a skipped row, even if its gradient is NaN."""
    return torch.where(row_scale == 0, 0, row_scale * grad_loss)


def slices(count: int, bytes_each: int, budget: int) -> Iterator[slice]:
    """Slices of `count` rows, each of as many rows as the budget holds, and at least one."""
    size = max(budget // bytes_each, 1)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def rows_of(x: Tensor, chunk) -> Tensor:
    """Rows of [outer, inner, width] as [n, width]: a view if they have one stride, else a copy."""
    if isinstance(chunk, slice):
        if at_one_stride(x):
            return x.flatten(0, 1)[chunk]
        chunk = torch.arange(chunk.start, chunk.stop, device=x.device)
    return x[chunk // x.shape[1], chunk % x.shape[1]]


def at_one_stride(x: Tensor) -> bool:
    return x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


# Whether values (labels, temperatures, hard weights) are checked even if that costs a synchronisation.
_checked = os.environ.get("KDKERNELS_CHECK") == "1"


def checks(enabled: bool) -> bool:
    """Sets whether a bad value in a tensor (a label out of range, a temperature <= 0, a hard weight) raises on a GPU
    too.

    On a CPU a bad value always raises. On a GPU the check costs a synchronisation; without it, a bad value makes its
    row NaN. The environment variable KDKERNELS_CHECK=1 sets it for the process. Returns the setting before the call.
    """
    global _checked
    before, _checked = _checked, bool(enabled)
    return before


def values_are_checked() -> bool:
    return _checked


def is_transformed() -> bool:
    """Whether a compiler or torch.func traces the call. Values cannot be read then."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def bad_values_raise(device: torch.device) -> bool:
    """Whether bad values raise: on a CPU, and on another device if `checks` asks for it."""
    return (device.type == "cpu" or _checked) and not is_transformed()


def bad_rows(options: RowOptions, vocab_size: int) -> dict[str, Tensor]:
    """The kept rows with an invalid value: a bool tensor [rows] for each option that is given."""
    kept, temperature = options.row_scale != 0, options.temperature
    bad = {"temperature": kept & ~((temperature > 0) & (temperature < torch.inf) & (1 / temperature < torch.inf))}
    if options.labels is not None:
        bad["labels"] = kept & ((options.labels < 0) | (options.labels >= vocab_size))
    if options.hard_weight is not None:
        bad["hard_weight"] = kept & ~((options.hard_weight >= 0) & (options.hard_weight <= 1))
    if options.loss_cap is not None:
        bad["loss_cap"] = kept & ~(options.loss_cap > 0)
    return bad


def check_values(options: RowOptions, vocab_size: int) -> None:
    """Raises ValueError for the first row of `bad_rows`. Reads values: a synchronisation on a GPU."""
    expected = {
        "labels": f"0 <= label < {vocab_size} (the vocabulary) or ignore_index",
        "temperature": f"finite and > 0 in {options.temperature.dtype}, as its inverse",
        "hard_weight": "from 0 to 1",
        "loss_cap": "> 0",
    }
    for name, bad in bad_rows(options, vocab_size).items():
        if bad.any():
            row = int(bad.nonzero()[0])
            got = getattr(options, name).expand_as(options.row_scale)[row].item()
            raise ValueError(f"{name}: expected {expected[name]}; got {got} in row {row}")
