"""What every launch of a Triton kernel needs: the device, and a tensor that the interpreter can round to."""

import contextlib

import torch
from torch import Tensor


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
