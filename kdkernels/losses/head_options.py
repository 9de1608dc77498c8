"""The options of `LinearLogits`: how a loss makes the logits of its sides, and which tensors it makes them from."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions import LinearLogits, gathered, is_sharded
from ..families.budget import current_budget
from ..families.linear import Chunking, LogitsSource, product_dtype
from .options import check_int, check_type


class HeadOptions(NamedTuple):
    """The options of `LinearLogits`, as the caller gave them."""

    chunk_rows: int | None
    compact_rows: bool | None
    logits_dtype: torch.dtype | None


def resolve_chunking(given: HeadOptions, **sides) -> Chunking | None:
    """How the loss makes the logits of the sides, given by their names in the call; None if no side is a head."""
    heads = {name: x for name, x in sides.items() if isinstance(x, LinearLogits)}
    if not heads:
        for name, value in zip(given._fields, given, strict=True):
            if value is not None:
                raise ValueError(f"{name}: expected None without a LinearLogits, which has this option; got {value}")
        return None
    if given.chunk_rows is not None:
        check_int("chunk_rows", given.chunk_rows, 1)
    if given.compact_rows is not None:
        check_type("compact_rows", given.compact_rows, bool)
    if given.logits_dtype not in (None, torch.float32):
        raise TypeError(f"logits_dtype: expected torch.float32 or None (the factors' dtype); got {given.logits_dtype}")
    device = next(iter(heads.values())).device
    autocast_dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    for name, x in heads.items():
        dtypes = (x.hidden.dtype, x.weight.dtype)
        # Autocast and products in fp32 cast every dtype but fp64. A sharded weight is cast when it is gathered.
        casts = (autocast_dtype is not None or given.logits_dtype is not None) and torch.float64 not in dtypes
        if dtypes[0] != dtypes[1] and not casts and not is_sharded(x.weight):
            if torch.float64 in dtypes:
                expected = "fp64 in both hidden and weight, or in neither"
            else:
                expected = "hidden and weight of one dtype outside autocast, or logits_dtype=torch.float32"
            raise TypeError(f"{name}: expected {expected}; got {dtypes[0]} and {dtypes[1]}")
    compact_rows = device.type == "cpu" if given.compact_rows is None else given.compact_rows
    return Chunking(autocast_dtype, given.logits_dtype, given.chunk_rows or 0, current_budget(device), compact_rows)


def whole_rows(device: torch.device) -> Chunking:
    """The chunking of stored logits."""
    return Chunking(None, None, 0, current_budget(device), False)


def source_of(x: Tensor | LinearLogits, chunking: Chunking) -> LogitsSource:
    """The tensors of a side. Gathers a sharded weight; the data keeps its shape [..., columns]."""
    if isinstance(x, Tensor):
        return LogitsSource(x, None, None, 1.0, None)
    dtype = product_dtype(x.hidden.dtype, x.hidden.dtype, chunking.autocast_dtype)  # of a sharded weight
    bias = None if x.bias is None else gathered(x.bias, dtype)
    return LogitsSource(x.hidden, gathered(x.weight, dtype), bias, x.scale, x.softcap)


def gradient_dtypes(student: LogitsSource, chunking: Chunking) -> list[torch.dtype]:
    """The dtypes of the gradients of a student's tensors, and of the logits that a head makes."""
    dtypes = [x.dtype for x in student[:3] if x is not None and x.requires_grad]
    if student.weight is not None:
        dtypes.append(product_dtype(student.data.dtype, student.weight.dtype, chunking.autocast_dtype))
    return dtypes
