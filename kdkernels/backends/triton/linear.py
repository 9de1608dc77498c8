"""Elementwise kernels of a head in Triton: the twin of csrc/cpu/linear.cpp.

They cap logits softly and find the gradient of the soft cap, in place. Torch adds 16-bit products to an fp32 sum in one
kernel of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_of, written

_BLOCK, _WARPS = 1024, 4


@triton.jit
def _tanh(x):
    """|x| < 0.625: x + x^3 y(x^2), with a minimax polynomial y of degree 5 (relative error 2e-9).

    Other x: 1 - 2 / (exp(2 |x|) + 1) with the sign of x. The result is +-1 from |x| = 10 on.
    """
    magnitude = tl.abs(x)
    bounded = tl.where(magnitude > 10, 10.0, magnitude)  # NaN stays NaN
    square = bounded * bounded
    y = 2.292744815e-3 * square - 8.343945257e-3
    y = y * square + 2.176891826e-2
    y = y * square - 5.395925790e-2
    y = y * square + 1.333330423e-1
    y = y * square - 3.333333433e-1
    near_zero = bounded * square * y + bounded
    far = 1 - 2 / (tl.exp(2 * bounded) + 1)
    value = tl.where(magnitude < 0.625, near_zero, far)
    return tl.where(x < 0, -value, value)


@triton.jit
def softcap_kernel(logits, count, cap, inverse_cap, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    x = tl.load(logits + index, mask=inside, other=0).to(tl.float32)
    ratio = x * inverse_cap
    # cap * tanh(x / cap) is x to the last digit if |x / cap| < 2^-12. A NaN keeps its bits.
    capped = tl.where(tl.abs(ratio) >= 0.000244140625, cap * _tanh(ratio), x)
    tl.store(logits + index, capped.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def softcap_gradient_kernel(gradient, logits, count, cap, inverse_cap, BLOCK: tl.constexpr):
    """The slope is 1 - (x / cap)^2 = d (2 - d) with d = 1 - |x| / cap.

    Near the cap d keeps all digits; the square would lose them. Rounding to 16 bits may move a capped logit past the
    cap: there the slope is 0.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    g = tl.load(gradient + index, mask=inside, other=0).to(tl.float32)
    x = tl.load(logits + index, mask=inside, other=0).to(tl.float32)
    d = (cap - tl.abs(x)) * inverse_cap
    d = tl.where(d < 0, 0.0, d)
    # A gradient of 0 belongs to a skipped row or to padding. The logits there may hold any value.
    product = tl.where(g == 0, g, g * (d * (2 - d)))
    tl.store(gradient + index, product.to(gradient.dtype.element_ty), mask=inside)


def softcap_(logits: Tensor, cap: float) -> None:
    """logits = cap * tanh(logits / cap)"""
    assert logits.is_contiguous(), logits.stride()
    if logits.numel():
        with device_of(logits), written(logits) as target:
            softcap_kernel[_grid(logits)](target, logits.numel(), cap, 1 / cap, BLOCK=_BLOCK, num_warps=_WARPS)


def softcap_gradient_(gradient: Tensor, logits: Tensor, cap: float) -> None:
    """gradient *= 1 - (logits / cap)**2, with capped logits. A gradient of 0 stays 0, even if its logit is NaN."""
    assert gradient.is_contiguous() and logits.is_contiguous(), (gradient.stride(), logits.stride())
    assert (gradient.shape, gradient.dtype) == (logits.shape, logits.dtype), (gradient.dtype, logits.dtype)
    if logits.numel():
        with device_of(logits), written(gradient) as target:
            softcap_gradient_kernel[_grid(logits)](
                target, logits, logits.numel(), cap, 1 / cap, BLOCK=_BLOCK, num_warps=_WARPS
            )


def accumulate_(total: Tensor, part: Tensor) -> None:
    """total (fp32) += part (bf16 or fp16)"""
    total.add_(part)


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialised tensor."""
    return torch.empty(shape, dtype=dtype, device=device)


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), _BLOCK),)
