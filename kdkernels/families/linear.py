"""Rows in chunks: what is not there as logits is made some rows at a time, and swept.

Heads: logits that are made by a matrix product, swept in place, and turned into gradients. Sparse teachers: the entries
of a chunk; or, where every class needs its own probability ("uniform"), logits that are made of them.

For each chunk of rows::

    logits   = softcap(scale * (hidden weight^T + bias))     of each side that is a head
    dlogits                                                  the row sweeps of the dense family, in the logits' place
    dhidden  = scale * dlogits weight
    dweight += scale * dlogits^T hidden                      summed in fp32
    dbias   += scale * the sum of dlogits over the rows      summed in fp32

The products are torch's, the sweeps a backend's: this loop is the same for all of them. A product whose factors have 16
bits is summed over chunks in fp32: where the library writes products in fp32 (CUDA), it adds them too; elsewhere it
rounds each chunk's to 16 bits, a slab at a time, which is added while it lies in a cache. (oneDNN writes fp32 from fp32
factors alone; rounding those to bf16 itself, it takes 2.3 times as long.)
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import topk
from .options import RowOptions, at_one_stride, check_values, rows_of, values_are_checked
from .rows import ROW_STATISTICS, ROW_TOP1

_budget = 256 << 20  # bytes of a chunk's buffers
_SLAB = 2 << 20  # bytes of a product that is added while it lies in a cache
_ALIGNMENT = 8  # columns of a buffer's row, in which 16-bit rows begin at multiples of 16 bytes
_ROUND = 64  # rows of a chunk are a multiple of it, where the budget holds so many
_HALVES = (torch.bfloat16, torch.float16)


class chunk_budget:
    """Sets the bytes that a call's chunk buffers may take where `chunk_rows` is None: 256 MiB unless set.

    ``kdkernels.chunk_budget(2**30)`` sets it from then on; ``with kdkernels.chunk_budget(2**30):`` for a block.
    Raises TypeError for what is no int, ValueError below 1 and past 63 bits.
    """

    def __init__(self, bytes: int):
        global _budget
        if isinstance(bytes, bool) or not isinstance(bytes, int):
            raise TypeError(f"chunk_budget: expected an int (bytes); got {type(bytes).__name__}")
        if not 1 <= bytes < 2**63:
            raise ValueError(f"chunk_budget: expected from 1 byte to 2**63 - 1; got {bytes}")
        self._before, self._bytes = _budget, bytes
        _budget = bytes

    def __enter__(self):
        global _budget
        _budget = self._bytes  # again, where the block is not the first
        return self

    def __exit__(self, *_):
        global _budget
        _budget = self._before


def current_budget() -> int:
    return _budget


def product_dtype(dtype: torch.dtype, autocast_dtype: torch.dtype | None) -> torch.dtype:
    """Of the factors of the products of hidden states of `dtype`. Autocast casts all but fp64."""
    return dtype if autocast_dtype is None or dtype == torch.float64 else autocast_dtype


class Side(NamedTuple):
    """Student or teacher: logits [outer, inner, columns], or (with a weight) hidden states [outer, inner, H]."""

    data: Tensor
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None


class Wanted(NamedTuple):
    """Which gradients to find: of the student's data (logits or hidden states), its weight and its bias."""

    data: bool = False
    weight: bool = False
    bias: bool = False


@torch.no_grad()
def chunked_rows(
    kernels,
    student: Side,
    teacher: Side | topk.Sparse,
    options: RowOptions,
    parameters: Tensor,
    divergence: str,
    vocab_size: int,
    temperature_squared: bool,
    autocast_dtype: torch.dtype | None,
    logits_dtype: torch.dtype | None,
    chunk_rows: int,
    budget: int,
    compact_rows: bool,
    wanted: Wanted,
    statistics: bool,
):
    """Losses [rows], the gradients of student, weight and bias, statistics and top-1: `ops.chunked_rows`."""
    checked = options.row_scale.device.type == "cpu" or values_are_checked()
    if checked:
        check_values(*options, vocab_size)
    entries = None
    if isinstance(teacher, topk.Sparse):
        sort = getattr(kernels, "sorted_entries", None)  # of the CPU's
        entries, row_scale = topk.entries_of(teacher, options, vocab_size, checked, sort)
        options = options._replace(row_scale=row_scale)
    row_scale = options.row_scale
    rows = row_scale.shape[0]
    kept = _kept(row_scale, compact_rows)
    count = rows if kept is None else kept.shape[0]
    gradient = any(wanted)
    every = kept is None and rows > 0  # all rows are written below
    teacher_is_entries = entries is not None and teacher.tail != "uniform"

    def source(side: Side, wanted: Wanted):
        if side.weight is None:
            return _Stored(kernels, side, wanted, kept is not None, alone=teacher_is_entries)
        return _Head(kernels, side, wanted, vocab_size, autocast_dtype, logits_dtype)

    sources = [source(student, wanted)]
    if entries is None:
        sources.append(source(teacher, Wanted()))
    elif not teacher_is_entries:
        sources.append(_Spread(kernels, entries, options, vocab_size))
    fixed_bytes, row_bytes = (sum(getattr(x, name) for x in sources) for name in ("fixed_bytes", "row_bytes"))
    size = _chunk_size(count, chunk_rows, budget, fixed_bytes, row_bytes)
    for x in sources:
        x.allocate(size, chunks=-(-count // size), every=every)

    new = torch.empty if every else torch.zeros
    dtype, device = row_scale.dtype, row_scale.device
    loss = new(rows, dtype=dtype, device=device)
    row_statistics = new(len(ROW_STATISTICS) if statistics else 0, rows, dtype=dtype, device=device)
    top1 = new(len(ROW_TOP1) if statistics else 0, rows, dtype=torch.int64, device=device)

    def sweep(chunk):  # a function, so that nothing of a chunk outlives it
        own = options.of(chunk)
        logits = [x.logits(chunk, own.row_scale) for x in sources]
        into = sources[0].gradient_target(chunk) if gradient else None
        if teacher_is_entries:
            loss[chunk], _, row_statistics[:, chunk], top1[:, chunk] = kernels.topk_rows(
                *logits, *entries.of(chunk), *own, parameters, divergence, vocab_size, temperature_squared,
                teacher.tail == "support", gradient, statistics, into,
            )  # fmt: skip
        else:
            loss[chunk], _, _, _, row_statistics[:, chunk], top1[:, chunk] = kernels.rows(
                *logits, *own, parameters, divergence, vocab_size, temperature_squared, gradient, statistics, into
            )
        if gradient:
            sources[0].add_gradients(chunk)

    for chunk in _chunks(count, size, kept):
        sweep(chunk)
    for x in sources:
        x.release()
    if entries is not None and teacher.tail == "truncate":
        offset = topk.tail_offset(divergence, parameters, entries.log_probs)
        loss, row_statistics = topk.with_offset(offset, options, temperature_squared, loss, row_statistics)
    return loss, *sources[0].gradients(), row_statistics, top1


@torch.no_grad()
def topk_log_probs(
    kernels,
    side: Side,
    row_scale: Tensor,
    temperature: Tensor,
    k: int,
    vocab_size: int,
    autocast_dtype: torch.dtype | None,
    logits_dtype: torch.dtype | None,
    chunk_rows: int,
    budget: int,
    compact_rows: bool,
):
    """Indices and log-probabilities [rows, k] and the rest's [rows]: `ops.topk_log_probs`."""
    options = RowOptions(row_scale, None, temperature, None)
    if row_scale.device.type == "cpu" or values_are_checked():
        check_values(*options, vocab_size)
    rows, new = row_scale.shape[0], {"dtype": row_scale.dtype, "device": row_scale.device}
    kept = _kept(row_scale, compact_rows)
    count = rows if kept is None else kept.shape[0]
    indices = torch.full((rows, k), -1, dtype=torch.int32, device=row_scale.device)
    log_probs, tail_log_prob = torch.full((rows, k), -torch.inf, **new), torch.zeros(rows, **new)
    if side.weight is None:
        source = _Stored(kernels, side, Wanted(), kept is not None, alone=True)
    else:
        source = _Head(kernels, side, Wanted(), vocab_size, autocast_dtype, logits_dtype)
    size = _chunk_size(count, chunk_rows, budget, source.fixed_bytes, source.row_bytes)
    source.allocate(size, chunks=-(-count // size), every=True)
    for chunk in _chunks(count, size, kept):
        own = options.of(chunk)
        logits = source.logits(chunk, own.row_scale)
        indices[chunk], log_probs[chunk], tail_log_prob[chunk] = kernels.topk(
            logits, own.row_scale, own.temperature, k, vocab_size
        )
    return indices, log_probs, tail_log_prob


def _kept(row_scale: Tensor, compact_rows: bool) -> Tensor | None:
    """Indices of the rows that are not skipped; None where all rows are to be gone through."""
    kept = row_scale.nonzero()[:, 0] if compact_rows else None
    return None if kept is None or kept.shape[0] == row_scale.shape[0] else kept


def _chunks(count: int, size: int, kept: Tensor | None) -> Iterator[slice | Tensor]:
    for first in range(0, count, size):
        chunk = slice(first, min(first + size, count))
        yield chunk if kept is None else kept[chunk]


def _chunk_size(count: int, chunk_rows: int, budget: int, fixed_bytes: int, row_bytes: int) -> int:
    """Rows of a chunk: as asked for, or as many as the budget holds, spread evenly over the chunks."""
    if chunk_rows:
        return max(min(chunk_rows, count), 1)
    most = (budget - fixed_bytes) // row_bytes if row_bytes else count
    if most < 1 and count:
        warnings.warn(
            f"a chunk budget of {budget} bytes holds no row, which takes {row_bytes} beside {fixed_bytes} of all: "
            "chunks have one row (kdkernels.chunk_budget sets the budget)",
            RuntimeWarning,
            stacklevel=2,
        )
    most = max(most // _ROUND * _ROUND or most, 1)
    evenly = -(-count // max(-(-count // most), 1))
    return max(min(-(-evenly // _ROUND) * _ROUND, most, count), 1)


class _Stored:
    """Logits that the caller has. `alone`: nothing else is made in chunks, so they are taken whole, as they lie."""

    def __init__(self, kernels, side: Side, wanted: Wanted, gathered: bool, alone: bool):
        self.kernels, self.data, self.wanted, self.gathered = kernels, side.data, wanted, gathered
        self.whole = alone and not gathered
        copies = 0 if self.whole else (gathered or not at_one_stride(side.data)) + (gathered and wanted.data)
        self.row_bytes = copies * side.data.shape[-1] * side.data.element_size()
        self.fixed_bytes = 0

    def allocate(self, size: int, chunks: int, every: bool):
        self.whole &= chunks == 1
        if not self.wanted.data:
            return
        outer, inner, columns = self.data.shape
        new = {"dtype": self.data.dtype, "device": self.data.device}
        self.gradient = self.kernels.empty(outer * inner, columns, **new)
        if not every:
            self.gradient.zero_()
        self.part = self.kernels.empty(size, columns, **new) if self.gathered else None

    def logits(self, chunk, row_scale: Tensor) -> Tensor:
        return self.data if self.whole else rows_of(self.data, chunk)[None]

    def gradient_target(self, chunk) -> Tensor:
        if self.whole:
            return self.gradient.view(self.data.shape)
        return (self.gradient[chunk] if isinstance(chunk, slice) else self.part[: chunk.shape[0]])[None]

    def add_gradients(self, chunk):
        if not isinstance(chunk, slice):
            self.gradient[chunk] = self.part[: chunk.shape[0]]

    def release(self):
        self.part = None

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        data = self.gradient.view(self.data.shape) if self.wanted.data else self.data.new_empty(0)
        return data, self.data.new_empty(0), self.data.new_empty(0)


class _Spread:
    """Logits of a sparse teacher whose missing mass is spread over the classes that it does not name."""

    fixed_bytes = 0

    def __init__(self, kernels, entries: topk.Entries, options: RowOptions, vocab_size: int):
        self.kernels, self.entries, self.vocab_size = kernels, entries, vocab_size
        self.temperature = options.temperature.expand_as(options.row_scale)
        self.columns = -(-(vocab_size + 1) // _ALIGNMENT) * _ALIGNMENT  # one more, for padding
        self.row_bytes = self.columns * entries.log_probs.element_size()

    def allocate(self, size: int, chunks: int, every: bool):
        log_probs = self.entries.log_probs
        self.buffer = self.kernels.empty(size, self.columns, dtype=log_probs.dtype, device=log_probs.device)

    def logits(self, chunk, row_scale: Tensor) -> Tensor:
        out = self.buffer[: row_scale.shape[0]]
        topk.fill_uniform(self.entries.of(chunk), self.temperature[chunk], self.vocab_size, out)
        return out[None]

    def release(self):
        self.buffer = None


class _Head:
    """Logits made from hidden states, in a buffer of a chunk's rows, which their gradient takes over."""

    def __init__(self, kernels, side: Side, wanted: Wanted, classes: int, autocast_dtype, logits_dtype):
        self.kernels, self.side, self.wanted, self.classes = kernels, side, wanted, classes
        self.dtype = product_dtype(side.data.dtype, autocast_dtype)
        self.logits_dtype = logits_dtype if logits_dtype is not None and self.dtype in _HALVES else self.dtype
        self.weight = side.weight[:classes].to(self.dtype)
        self.bias = None if side.bias is None else side.bias[:classes].to(self.dtype)
        self.columns = -(-classes // _ALIGNMENT) * _ALIGNMENT
        # The gradient needs a buffer of its own where the capped logits must outlive it; where it is fp32, the products
        # need it rounded.
        self.apart = any(wanted) and side.softcap is not None
        self.rounded = any(wanted) and self.logits_dtype != self.dtype
        logits_bytes, factor_bytes = self.logits_dtype.itemsize, self.dtype.itemsize
        self.row_bytes = self.columns * (logits_bytes * (1 + self.apart) + factor_bytes * self.rounded)
        self.row_bytes += side.data.shape[-1] * factor_bytes
        slabs = wanted.weight and self.dtype in _HALVES and not writes_fp32(side.data.device)
        self.fixed_bytes = min(_SLAB, self.weight.nbytes) if slabs else 0

    def allocate(self, size: int, chunks: int, every: bool):
        def new(*shape, dtype):
            return self.kernels.empty(*shape, dtype=dtype, device=self.side.data.device)

        self.buffer = new(size, self.columns, dtype=self.logits_dtype)
        self.gradient_buffer = new(size, self.columns, dtype=self.logits_dtype) if self.apart else self.buffer
        self.factor = new(size, self.columns, dtype=self.dtype) if self.rounded else self.gradient_buffer
        outer, inner, width = self.side.data.shape
        self.data_gradient = self.weight_sum = self.bias_sum = None
        if self.wanted.data:
            self.data_gradient = new(outer * inner, width, dtype=self.side.data.dtype)
            if not every:
                self.data_gradient.zero_()
        if self.wanted.weight:
            self.weight_sum = _ProductSum(self.kernels, self.side.weight, self.classes, self.dtype, chunks)
        if self.wanted.bias:
            total = torch.promote_types(self.dtype, torch.float32)
            self.bias_sum = torch.zeros(self.side.bias.shape, dtype=total, device=self.side.bias.device)

    def logits(self, chunk, row_scale: Tensor) -> Tensor:
        hidden = rows_of(self.side.data, chunk).to(self.dtype)
        # A skipped row may hold anything, and so may a weight: their products with dlogits of 0 would be NaN.
        self.skipped = (row_scale == 0)[:, None] if isinstance(chunk, slice) else None
        if self.wanted.weight and self.skipped is not None:
            hidden = hidden.masked_fill(self.skipped, 0)
        self.hidden = hidden
        out = self.buffer[: hidden.shape[0]]
        _project(hidden, self.weight, self.bias, self.side.scale, out[:, : self.classes])
        if self.side.softcap is not None:
            self.kernels.softcap_(out, self.side.softcap)
        return out[None]

    def gradient_target(self, chunk) -> Tensor:
        return self.gradient_buffer[None, : self.hidden.shape[0]]

    def add_gradients(self, chunk):
        n, scale = self.hidden.shape[0], self.side.scale
        gradient, factor = self.gradient_buffer[:n], self.factor[:n]
        if self.apart:
            self.kernels.softcap_gradient_(gradient, self.buffer[:n], self.side.softcap)
        if self.rounded:
            factor.copy_(gradient)
        factor = factor[:, : self.classes]
        if self.data_gradient is not None:
            if isinstance(chunk, slice) and self.data_gradient.dtype == self.dtype:
                _product(factor, self.weight, scale, out=self.data_gradient[chunk])
            else:
                self.data_gradient[chunk] = _product(factor, self.weight, scale, out=torch.empty_like(self.hidden))
            if self.skipped is not None:
                self.data_gradient[chunk].masked_fill_(self.skipped, 0)
        if self.weight_sum is not None:
            self.weight_sum.add(factor, self.hidden, scale)
        if self.bias_sum is not None:
            self.bias_sum[: self.classes].add_(factor.sum(0), alpha=scale)  # sum() rounds what it added in fp32

    def release(self):
        """Drops what the chunks needed, before the gradients take the dtypes of what they are gradients of."""
        self.buffer = self.gradient_buffer = self.factor = self.weight = self.hidden = None

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        data = self.side.data
        return (
            data.new_empty(0) if self.data_gradient is None else self.data_gradient.view(data.shape),
            data.new_empty(0) if self.weight_sum is None else self.weight_sum.result(),
            data.new_empty(0) if self.bias_sum is None else self.bias_sum.to(self.side.bias.dtype),
        )


class _ProductSum:
    """The sum over chunks of scale * a^T b: the gradient of a weight, whose rows past `classes` are 0."""

    def __init__(self, kernels, weight: Tensor, classes: int, dtype: torch.dtype, chunks: int):
        self.kernels, self.weight = kernels, weight
        one = chunks == 1 and weight.dtype == dtype
        total = dtype if one else torch.promote_types(dtype, torch.float32)
        self.total = kernels.empty(*weight.shape, dtype=total, device=weight.device)
        self.total[classes if chunks else 0 :].zero_()
        self.active = self.total[:classes]
        self.started = False

    def add(self, a: Tensor, b: Tensor, scale: float):
        """a is [n, classes], b is [n, H]."""
        beta, self.started, total = 1 if self.started else 0, True, self.active
        if total.dtype == a.dtype:
            torch.addmm(total, a.t(), b, beta=beta, alpha=scale, out=total)
        elif writes_fp32(a.device):
            torch.addmm(total, a.t(), b, out_dtype=total.dtype, beta=beta, alpha=scale, out=total)
        else:
            step = max(_SLAB // (b.shape[1] * b.element_size()), 1)
            slab = torch.empty(min(step, total.shape[0]), b.shape[1], dtype=a.dtype, device=a.device)
            for first in range(0, total.shape[0], step):
                target = total[first : first + step]
                part = _product(a[:, first : first + step].t(), b, scale, out=slab[: target.shape[0]])
                if beta:
                    self.kernels.accumulate_(target, part)
                else:
                    target.copy_(part)

    def result(self) -> Tensor:
        if self.total.dtype == self.weight.dtype:
            return self.total
        return self.kernels.empty(*self.weight.shape, dtype=self.weight.dtype, device=self.weight.device).copy_(
            self.total
        )


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def writes_fp32(device: torch.device) -> bool:
    """Whether the library writes products of 16-bit factors in fp32: cuBLAS does; of ROCm's not all do."""
    return device.type == "cuda" and torch.version.hip is None


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor):
    """out = scale * (hidden weight^T + bias), rounded once."""
    add, beta = (out, 0) if bias is None else (bias.to(out.dtype), scale)
    if out.dtype == hidden.dtype:
        torch.addmm(add, hidden, weight.t(), beta=beta, alpha=scale, out=out)
    elif writes_fp32(out.device):
        if bias is not None:
            out.copy_(add)  # with out_dtype, addmm broadcasts nothing
        torch.addmm(out, hidden, weight.t(), out_dtype=out.dtype, beta=beta, alpha=scale, out=out)
    else:
        hidden = hidden.to(out.dtype)
        step = max(_SLAB // (weight.shape[1] * out.element_size()), 1)
        for first in range(0, weight.shape[0], step):
            slab = slice(first, first + step)
            add = out[:, slab] if bias is None else bias[slab].to(out.dtype)
            factor = weight[slab].to(out.dtype)
            torch.addmm(add, hidden, factor.t(), beta=beta, alpha=scale, out=out[:, slab])
