"""Launches: tile shapes, strides, empty results, and the row options as arguments of a kernel."""

import contextlib

import torch
import triton
from torch import Tensor

from ...families.options import RowOptions
from ...families.rows import ROW_STATISTICS, ROW_TOP1
from .row import Given

_THREADS = 256
_TOPK_BLOCK = 2048


def row_arguments(options: RowOptions) -> dict:
    """The row options as the arguments `given` and `strides` of a kernel, which `load_row_options` reads."""
    given = Given(*(getattr(options, name) for name in Given._fields))
    strides = [0 if x is None else stride(x) for x in given]
    assert max(strides) <= 1, strides
    return {"given": given, "strides": sum(step << bit for bit, step in enumerate(strides))}


def loss_arguments(options: RowOptions) -> dict:
    """`row_arguments`, and the flags of a kernel that computes a loss."""
    flags = {"TEMPERATURE_SQUARED": options.temperature_squared, "NEEDS_LOSS": options.gradient_needs_loss}
    return row_arguments(options) | flags


def device_of(x: Tensor):
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def written(x: Tensor | None):
    """The tensor that the kernel writes: `x` itself.

    The interpreter's cast to bf16 truncates, and turns some NaN into infinities. So in the interpreter the kernel
    writes an fp32 copy, and torch rounds that copy to bf16.
    """
    if x is None or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        yield x
        return
    widened = x.float()
    yield widened
    x.copy_(widened)


def gradient_target(student: Tensor, gradient: bool, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor for the gradient; an empty tensor without a gradient."""
    if out is None:
        return torch.empty(student.shape if gradient else 0, dtype=student.dtype, device=student.device)
    assert gradient and out.is_contiguous(), "out takes a gradient, and is contiguous"
    assert (out.shape, out.dtype, out.device) == (student.shape, student.dtype, student.device), "as the student"
    return out


def tile(columns: int, statistics: bool = False) -> tuple[int, int]:
    """Columns of a tile, and warps of 32 threads: 16 columns a thread, or 8 if statistics need registers."""
    per_thread = 8 if statistics else 16
    block = min(max(triton.next_power_of_2(columns), 64), _THREADS * per_thread)
    return block, max(block // (32 * per_thread), 1)


def topk_tile(columns: int) -> tuple[int, int]:
    """As `tile`, for the kernels of the top-k family."""
    block = min(max(triton.next_power_of_2(columns), 64), _TOPK_BLOCK)
    return block, max(block // (32 * 16), 1)


def lanes(entries: int) -> int:
    """Entries that a kernel of the top-k family works on at a time."""
    return min(max(triton.next_power_of_2(entries), 32), 1024)


def per_row_empty(like: Tensor, leading: tuple[int, ...], row_scale: Tensor, dtype=torch.float32) -> Tensor:
    return torch.empty(*leading, row_scale.numel(), dtype=dtype, device=like.device)


def statistics_empty(like: Tensor, row_scale: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    return (
        per_row_empty(like, (len(ROW_STATISTICS) if wanted else 0,), row_scale),
        per_row_empty(like, (len(ROW_TOP1) if wanted else 0,), row_scale, torch.int64),
    )


def row_strides(x: Tensor) -> tuple[int, int]:
    """0 for a dimension of size 1: its stride may be any number, and must not cause another compilation."""
    return tuple(x.stride(d) if x.shape[d] > 1 else 0 for d in (0, 1))


def stride(per_row: Tensor) -> int:
    """0 for a number that all rows share."""
    return 0 if per_row.numel() == 1 else per_row.stride(0)


def starts_of(indices: Tensor, block: int, vocab_size: int) -> Tensor:
    """The number of entries of each row whose class comes before each tile, and of all entries: [rows, tiles + 1]."""
    tiles = triton.cdiv(vocab_size, block)
    bounds = torch.arange(tiles + 1, dtype=torch.int32, device=indices.device).mul_(block).clamp_(max=vocab_size)
    return torch.searchsorted(indices, bounds.repeat(indices.shape[0], 1), out_int32=True)
