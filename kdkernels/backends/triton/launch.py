"""What the kernels of every family share: how one meets a row, and what a launch needs of its tensors."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...families.rows import ROW_STATISTICS, ROW_TOP1

_THREADS = 256

# ---- of kernels: one program works on one row, a tile of BLOCK columns at a time


@triton.jit
def load_tile(row_start, start, columns, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    return tl.load(row_start + column, mask=column < columns, other=-float("inf")).to(tl.float32)


@triton.jit
def finite_base(maximum):
    """What exponentials are taken relative to: 0 while all that was seen is -inf."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def log_of_sum(maximum, sum_exp):
    """A row of -inf alone has no distribution: NaN, as log_softmax."""
    return tl.where(maximum == -float("inf"), float("nan"), tl.log(sum_exp))


@triton.jit
def start_of_row(logits, row, inner, outer_stride, inner_stride):
    return logits + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def fill_gradient(gradient_row, first, end, value, BLOCK: tl.constexpr):
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        fill = tl.zeros([BLOCK], tl.float32) + value
        tl.store(gradient_row + column, fill.to(gradient_row.dtype.element_ty), mask=column < end)


@triton.jit
def finite_or_nan(slope_sum):
    """An infinite slope leaves the whole row without a gradient."""
    return tl.where(tl.abs(slope_sum) < float("inf"), slope_sum, float("nan"))


@triton.jit
def is_bad_temperature(temperature):
    bad = (temperature <= 0) | (temperature == float("inf")) | (temperature != temperature)
    return bad | (1 / temperature == float("inf"))


# ---- of launches


def device_of(x: Tensor):
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def written(x: Tensor | None):
    """The tensor that the kernel writes: `x` itself.

    The interpreter's cast to bf16 truncates, and makes infinities of some NaN: there an fp32 copy is written,
    and torch rounds it.
    """
    if x is None or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        yield x
        return
    widened = x.float()
    yield widened
    x.copy_(widened)


def gradient_target(student: Tensor, gradient: bool, into: Tensor | None) -> Tensor:
    """`into`, or a fresh tensor for the gradient; without a gradient an empty one."""
    if into is None:
        return torch.empty(student.shape if gradient else 0, dtype=student.dtype, device=student.device)
    assert gradient and into.is_contiguous(), "into takes a gradient, and is contiguous"
    assert (into.shape, into.dtype, into.device) == (student.shape, student.dtype, student.device), "as the student"
    return into


def tile(columns: int, statistics: bool = False) -> tuple[int, int]:
    """Columns of a tile, and warps: 16 columns a thread (of 32 a warp), 8 where statistics need registers."""
    per_thread = 8 if statistics else 16
    block = min(max(triton.next_power_of_2(columns), 64), _THREADS * per_thread)
    return block, max(block // (32 * per_thread), 1)


def per_row_empty(like: Tensor, leading: tuple[int, ...], row_scale: Tensor, dtype=torch.float32) -> Tensor:
    return torch.empty(*leading, row_scale.numel(), dtype=dtype, device=like.device)


def statistics_empty(like: Tensor, row_scale: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    return (
        per_row_empty(like, (len(ROW_STATISTICS) if wanted else 0,), row_scale),
        per_row_empty(like, (len(ROW_TOP1) if wanted else 0,), row_scale, torch.int64),
    )


def row_strides(x: Tensor) -> tuple[int, int]:
    """0 for a dimension of size 1, whose stride may be anything, so that it decides no compilation."""
    return tuple(x.stride(d) if x.shape[d] > 1 else 0 for d in (0, 1))


def stride(per_row: Tensor) -> int:
    return 0 if per_row.numel() == 1 else per_row.stride(0)
