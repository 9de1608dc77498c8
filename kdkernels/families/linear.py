"""Chunked rows: makes logits that are not stored a few rows at a time, and runs the row kernels on them.

Heads: a matrix product makes the logits, the sweeps overwrite them with their gradients, and products turn these into
the gradients of the hidden states and the weight. Sparse teachers: the sweeps take the entries of a chunk. Under the
tail "uniform", which gives every class a probability, the chunk's entries become logits.

For each chunk of rows::

    logits   = softcap(scale * (hidden weight^T + bias))     for each side that is a head
    dlogits                                                  the row sweeps of the dense family, in the logits' place
    dhidden  = scale * dlogits weight
    dweight += scale * dlogits^T hidden                      summed in fp32
    dbias   += scale * the sum of dlogits over the rows      summed in fp32

torch computes the products and a backend runs the sweeps, so one loop serves every backend. Products of 16-bit factors
are summed over chunks in fp32. If the library writes products in fp32 (CUDA), it adds them too from torch 2.10 on.
Otherwise each chunk's product comes one slab at a time, in fp32 or rounded to 16 bits, and the slab is added while it
is in the cache. (oneDNN writes fp32 from fp32 factors alone. Its rounding of those to bf16 takes 2.3 times as long.)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import callers
from . import topk
from .budget import rows_per_step
from .options import RowOptions, at_one_stride, bad_values_raise, check_values, rows_of
from .rows import ROW_STATISTICS, ROW_TOP1, Rows

_SLAB = 2 << 20  # bytes of a product that is added while it is in the cache of a CPU; 16 times as many on a GPU
_ALIGNMENT = 8  # a buffer's row is a multiple of 8 columns, so that 16-bit rows begin at multiples of 16 bytes
_HALVES = (torch.bfloat16, torch.float16)


def product_dtype(hidden: torch.dtype, weight: torch.dtype, autocast_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a product's factors: autocast's, which casts every dtype but fp64, or the dtype that holds both."""
    if autocast_dtype is None or hidden == torch.float64:
        return torch.promote_types(hidden, weight)
    return autocast_dtype


class LogitsSource(NamedTuple):
    """Logits [outer, inner, columns]; or, with a weight, the hidden states [outer, inner, H] of a head."""

    data: Tensor
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None


class Chunking(NamedTuple):
    """How the loss makes logits in chunks, decided at the call."""

    autocast_dtype: torch.dtype | None
    logits_dtype: torch.dtype | None
    chunk_rows: int  # 0: as many as the budget holds
    budget: int  # bytes
    compact_rows: bool  # whether the products leave out skipped rows


class ChunkedRows(NamedTuple):
    """`Rows` with a side whose logits are not stored: a head, or a sparse teacher."""

    student: LogitsSource
    teacher: LogitsSource | None
    sparse: topk.Sparse | None  # the teacher, if `teacher` is None
    options: RowOptions
    divergence: str
    parameters: Tensor  # [1], the divergence's, in the compute dtype
    vocab_size: int
    statistics: bool
    chunking: Chunking

    def tracked(self) -> tuple[Tensor | None, ...]:
        return self.student[:3]

    @property
    def row_scale(self) -> Tensor:
        return self.options.row_scale

    def scaled(self, grad_loss: Tensor) -> "ChunkedRows":
        return self._replace(options=self.options.scaled(grad_loss), statistics=False)


class TopK(NamedTuple):
    """Logits, or a head, and the number k of classes to extract from each row."""

    source: LogitsSource
    options: RowOptions  # row_scale and temperature
    k: int
    vocab_size: int
    chunking: Chunking


class NeedsGrad(NamedTuple):
    """The gradients to compute: of the student's data (logits or hidden states), its weight and its bias."""

    data: bool = False
    weight: bool = False
    bias: bool = False


@torch.no_grad()
def chunked_rows(kernels, problem: ChunkedRows, wanted: list[bool]):
    """Losses [rows], the gradients of student, weight and bias, statistics and top-1: `ops.chunked_rows`."""
    wanted, options, sparse, chunking = NeedsGrad(*wanted), problem.options, problem.sparse, problem.chunking
    statistics, gradient = problem.statistics, any(wanted)
    checked = bad_values_raise(options.row_scale.device)
    if checked:
        check_values(options, problem.vocab_size)
    entries = None
    if sparse is not None:
        entries, row_scale = topk.entries_of(sparse, options, problem.vocab_size, checked, kernels.sorted_entries)
        options = options._replace(row_scale=row_scale)
    row_scale = options.row_scale
    rows = row_scale.shape[0]
    kept_rows = _kept_rows(row_scale, chunking.compact_rows)
    count = rows if kept_rows is None else kept_rows.shape[0]
    all_rows_written = kept_rows is None and rows > 0
    teacher_is_entries = entries is not None and sparse.tail != "uniform"
    truncated = sparse is not None and sparse.tail == "truncate"
    slack = topk.slack_of(problem.divergence, problem.parameters) if truncated else None

    def logits_of(source: LogitsSource, wanted: NeedsGrad):
        if source.weight is None:
            return _StoredLogits(kernels, source, wanted, kept_rows is not None, only_source=teacher_is_entries)
        return _HeadLogits(kernels, source, wanted, problem.vocab_size, chunking)

    sources = [logits_of(problem.student, wanted)]
    if entries is None:
        sources.append(logits_of(problem.teacher, NeedsGrad()))
    elif not teacher_is_entries:
        sources.append(_UniformTailLogits(kernels, entries, options, problem.vocab_size))
    size = _chunk_size(count, chunking, sources, row_scale.device)
    for x in sources:
        x.allocate(size, chunks=-(-count // size), all_rows_written=all_rows_written)

    new = torch.empty if all_rows_written else torch.zeros
    dtype, device = row_scale.dtype, row_scale.device
    loss = new(rows, dtype=dtype, device=device)
    row_statistics = new(len(ROW_STATISTICS) if statistics else 0, rows, dtype=dtype, device=device)
    top1 = new(len(ROW_TOP1) if statistics else 0, rows, dtype=torch.int64, device=device)

    def sweep(chunk):  # a function, so that a chunk's tensors are freed before the next chunk
        own = options.of(chunk)
        logits = [x.logits(chunk, own.row_scale) for x in sources]
        out = sources[0].gradient_target(chunk) if gradient else None
        common = (own, problem.divergence, problem.parameters, problem.vocab_size, statistics)
        if teacher_is_entries:
            part = topk.TopkRows(*logits, entries.of(chunk), *common, sparse.tail == "support", slack)
            loss[chunk], _, row_statistics[:, chunk], top1[:, chunk] = kernels.topk_rows(part, gradient, out)
        else:
            part = Rows(*logits, *common)
            loss[chunk], _, _, _, row_statistics[:, chunk], top1[:, chunk] = kernels.rows(part, gradient, out)
        if gradient:
            sources[0].add_gradients(chunk)

    for chunk in _chunks(count, size, kept_rows):
        sweep(chunk)
    for x in sources:
        x.release()
    if truncated:
        offset = topk.tail_offset(problem.divergence, problem.parameters, entries.log_probs, options.temperature)
        loss, row_statistics = topk.with_offset(offset, options, loss, row_statistics)
    return loss, *sources[0].gradients(), row_statistics, top1


@torch.no_grad()
def topk_log_probs(kernels, problem: TopK):
    """Indices and log-probabilities [rows, k], and the log-probability of the other classes [rows]:
    `ops.topk_log_probs`."""
    options, k, row_scale = problem.options, problem.k, problem.options.row_scale
    if bad_values_raise(row_scale.device):
        check_values(options, problem.vocab_size)
    rows, new = row_scale.shape[0], {"dtype": row_scale.dtype, "device": row_scale.device}
    indices = torch.full((rows, k), -1, dtype=torch.int32, device=row_scale.device)
    log_probs, tail_log_prob = torch.full((rows, k), -torch.inf, **new), torch.zeros(rows, **new)
    for chunk, logits in logits_in_chunks(kernels, problem.source, options, problem.vocab_size, problem.chunking):
        own = options.of(chunk)
        indices[chunk], log_probs[chunk], tail_log_prob[chunk] = kernels.topk(
            logits, own.row_scale, own.temperature, k, problem.vocab_size
        )
    return indices, log_probs, tail_log_prob


def logits_in_chunks(
    kernels, source: LogitsSource, options: RowOptions, vocab_size: int, chunking: Chunking, own_bytes=(0, 0)
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """(rows, their logits [1, n, columns]) a chunk at a time; the next chunk overwrites the logits of a head.

    `own_bytes`: the caller's bytes for each row of a chunk, and for the chunk; they count against the budget too.
    """
    row_scale = options.row_scale
    kept_rows = _kept_rows(row_scale, chunking.compact_rows)
    count = row_scale.shape[0] if kept_rows is None else kept_rows.shape[0]
    if source.weight is None:
        chunked = _StoredLogits(kernels, source, NeedsGrad(), kept_rows is not None, only_source=True)
    else:
        chunked = _HeadLogits(kernels, source, NeedsGrad(), vocab_size, chunking)
    chunked.row_bytes += own_bytes[0]
    chunked.fixed_bytes += own_bytes[1]
    size = _chunk_size(count, chunking, [chunked], row_scale.device)
    chunked.allocate(size, chunks=-(-count // size), all_rows_written=True)
    for chunk in _chunks(count, size, kept_rows):
        yield chunk, chunked.logits(chunk, row_scale[chunk])


def _kept_rows(row_scale: Tensor, compact_rows: bool) -> Tensor | None:
    """Indices of the rows that are not skipped; None if the chunks hold all rows."""
    kept_rows = row_scale.nonzero()[:, 0] if compact_rows else None
    return None if kept_rows is None or kept_rows.shape[0] == row_scale.shape[0] else kept_rows


def _chunks(count: int, size: int, kept_rows: Tensor | None) -> Iterator[slice | Tensor]:
    for first in range(0, count, size):
        chunk = slice(first, min(first + size, count))
        yield chunk if kept_rows is None else kept_rows[chunk]


def _chunk_size(count: int, chunking: Chunking, sources: list, device: torch.device) -> int:
    """Rows per chunk: the requested number, or as many as the budget holds, spread evenly over the chunks."""
    if chunking.chunk_rows:
        return max(min(chunking.chunk_rows, count), 1)
    budget = chunking.budget
    fixed_bytes, row_bytes = (sum(getattr(x, name) for x in sources) for name in ("fixed_bytes", "row_bytes"))
    most = (budget - fixed_bytes) // row_bytes if row_bytes else count
    if most < 1 and count:
        callers.warn(
            f"a chunk budget of {budget} bytes holds no row: a row takes {row_bytes} bytes, and the chunk itself "
            f"{fixed_bytes}. Chunks have one row now; kdkernels.chunk_budget sets the budget",
        )
    step = rows_per_step(device)
    most = max(most // step * step or most, 1)
    evenly = -(-count // max(-(-count // most), 1))
    return max(min(-(-evenly // step) * step, most, count), 1)


class _StoredLogits:
    """Logits that the caller has. `only_source`: no other logits are made in chunks, so the tensor is used whole and
    uncopied.
    """

    def __init__(self, kernels, source: LogitsSource, wanted: NeedsGrad, gathered: bool, only_source: bool):
        self.kernels, self.data, self.wanted, self.gathered = kernels, source.data, wanted, gathered
        self.uncopied = only_source and not gathered
        copies = 0 if self.uncopied else (gathered or not at_one_stride(self.data)) + (gathered and wanted.data)
        self.row_bytes = copies * self.data.shape[-1] * self.data.element_size()
        self.fixed_bytes = 0

    def allocate(self, size: int, chunks: int, all_rows_written: bool):
        self.uncopied &= chunks == 1
        if not self.wanted.data:
            return
        outer, inner, columns = self.data.shape
        new = {"dtype": self.data.dtype, "device": self.data.device}
        self.gradient = self.kernels.empty(outer * inner, columns, **new)
        if not all_rows_written:
            self.gradient.zero_()
        self.part = self.kernels.empty(size, columns, **new) if self.gathered else None

    def logits(self, chunk, row_scale: Tensor) -> Tensor:
        return self.data if self.uncopied else rows_of(self.data, chunk)[None]

    def gradient_target(self, chunk) -> Tensor:
        if self.uncopied:
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


class _UniformTailLogits:
    """Logits of a sparse teacher whose missing mass is spread evenly over the classes that it does not name."""

    fixed_bytes = 0

    def __init__(self, kernels, entries: topk.Entries, options: RowOptions, vocab_size: int):
        self.kernels, self.entries, self.vocab_size = kernels, entries, vocab_size
        self.temperature = options.temperature.expand_as(options.row_scale)
        self.columns = -(-(vocab_size + 1) // _ALIGNMENT) * _ALIGNMENT  # one extra column takes the padding entries
        self.row_bytes = self.columns * entries.log_probs.element_size()

    def allocate(self, size: int, chunks: int, all_rows_written: bool):
        log_probs = self.entries.log_probs
        self.buffer = self.kernels.empty(size, self.columns, dtype=log_probs.dtype, device=log_probs.device)

    def logits(self, chunk, row_scale: Tensor) -> Tensor:
        out = self.buffer[: row_scale.shape[0]]
        topk.fill_uniform(self.entries.of(chunk), self.temperature[chunk], self.vocab_size, out)
        return out[None]

    def release(self):
        self.buffer = None


class _HeadLogits:
    """Logits made from hidden states, in a buffer for one chunk's rows. Their gradient overwrites them."""

    def __init__(self, kernels, source: LogitsSource, wanted: NeedsGrad, classes: int, chunking: Chunking):
        self.kernels, self.source, self.wanted, self.classes = kernels, source, wanted, classes
        self.dtype = product_dtype(source.data.dtype, source.weight.dtype, chunking.autocast_dtype)
        halves = chunking.logits_dtype is not None and self.dtype in _HALVES
        self.logits_dtype = chunking.logits_dtype if halves else self.dtype
        self.weight = source.weight[:classes].to(self.dtype)
        self.bias = None if source.bias is None else source.bias[:classes].to(self.dtype)
        self.columns = -(-classes // _ALIGNMENT) * _ALIGNMENT
        # The softcap's derivative needs the capped logits after the sweep, so the gradient has its own buffer then. The
        # products take an fp32 gradient rounded to their factors' dtype.
        self.apart = any(wanted) and source.softcap is not None
        self.rounded = any(wanted) and self.logits_dtype != self.dtype
        logits_bytes, factor_bytes = self.logits_dtype.itemsize, self.dtype.itemsize
        self.row_bytes = self.columns * (logits_bytes * (1 + self.apart) + factor_bytes * self.rounded)
        self.row_bytes += source.data.shape[-1] * factor_bytes
        slabs = wanted.weight and self.dtype in _HALVES and not adds_fp32(source.data.device)
        self.fixed_bytes = min(_slab_bytes(source.data.device), self.weight.nbytes) if slabs else 0

    def allocate(self, size: int, chunks: int, all_rows_written: bool):
        def new(*shape, dtype):
            return self.kernels.empty(*shape, dtype=dtype, device=self.source.data.device)

        self.buffer = new(size, self.columns, dtype=self.logits_dtype)
        self.gradient_buffer = new(size, self.columns, dtype=self.logits_dtype) if self.apart else self.buffer
        self.factor = new(size, self.columns, dtype=self.dtype) if self.rounded else self.gradient_buffer
        outer, inner, width = self.source.data.shape
        self.data_gradient = self.weight_sum = self.bias_sum = None
        if self.wanted.data:
            self.data_gradient = new(outer * inner, width, dtype=self.source.data.dtype)
            if not all_rows_written:
                self.data_gradient.zero_()
        if self.wanted.weight:
            self.weight_sum = _ProductSum(self.kernels, self.source.weight, self.classes, self.dtype, chunks)
        if self.wanted.bias:
            total = torch.promote_types(self.dtype, torch.float32)
            self.bias_sum = torch.zeros(self.source.bias.shape, dtype=total, device=self.source.bias.device)

    def logits(self, chunk, row_scale: Tensor) -> Tensor:
        hidden = rows_of(self.source.data, chunk).to(self.dtype)
        # Hidden states of a skipped row and the weight may hold NaN or inf: their products with zero dlogits are NaN.
        self.skipped = (row_scale == 0)[:, None] if isinstance(chunk, slice) else None
        if self.wanted.weight and self.skipped is not None:
            hidden = hidden.masked_fill(self.skipped, 0)
        self.hidden = hidden
        out = self.buffer[: hidden.shape[0]]
        _project(hidden, self.weight, self.bias, self.source.scale, out[:, : self.classes])
        if self.source.softcap is not None:
            self.kernels.softcap_(out, self.source.softcap)
        return out[None]

    def gradient_target(self, chunk) -> Tensor:
        return self.gradient_buffer[None, : self.hidden.shape[0]]

    def add_gradients(self, chunk):
        n, scale = self.hidden.shape[0], self.source.scale
        gradient, factor = self.gradient_buffer[:n], self.factor[:n]
        if self.apart:
            self.kernels.softcap_gradient_(gradient, self.buffer[:n], self.source.softcap)
        if self.rounded:
            factor.copy_(gradient)
        factor = factor[:, : self.classes]
        if self.data_gradient is not None:
            if isinstance(chunk, slice) and self.data_gradient.dtype == self.dtype:
                _product(factor, self.weight, scale, out=self.data_gradient[chunk])
            else:
                product = _product(factor, self.weight, scale, out=torch.empty_like(self.hidden))
                self.data_gradient[chunk] = product.to(self.data_gradient.dtype)  # indexing does not cast
            if self.skipped is not None:
                self.data_gradient[chunk].masked_fill_(self.skipped, 0)
        if self.weight_sum is not None:
            self.weight_sum.add(factor, self.hidden, scale)
        if self.bias_sum is not None:
            self.bias_sum[: self.classes].add_(factor.sum(0), alpha=scale)  # sum() adds in fp32 and rounds its result

    def release(self):
        """Frees the chunk buffers before the gradients are cast to the dtypes of their tensors."""
        self.buffer = self.gradient_buffer = self.factor = self.weight = self.hidden = None

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        data = self.source.data
        return (
            data.new_empty(0) if self.data_gradient is None else self.data_gradient.view(data.shape),
            data.new_empty(0) if self.weight_sum is None else self.weight_sum.result(),
            data.new_empty(0) if self.bias_sum is None else self.bias_sum.to(self.source.bias.dtype),
        )


class _ProductSum:
    """The sum over chunks of scale * a^T b: the gradient of a weight, whose rows past `classes` are 0."""

    def __init__(self, kernels, weight: Tensor, classes: int, dtype: torch.dtype, chunks: int):
        self.kernels, self.weight = kernels, weight
        total = dtype if chunks == 1 and weight.dtype == dtype else torch.promote_types(dtype, torch.float32)
        self.total = kernels.empty(*weight.shape, dtype=total, device=weight.device)
        self.total[classes if chunks else 0 :].zero_()
        self.active = self.total[:classes]
        self.started = False

    def add(self, a: Tensor, b: Tensor, scale: float):
        """a is [n, classes], b is [n, H]."""
        beta, self.started, total = 1 if self.started else 0, True, self.active
        if total.dtype == a.dtype or adds_fp32(a.device):
            out_dtype = {} if total.dtype == a.dtype else {"out_dtype": total.dtype}
            torch.addmm(total, a.t(), b, **out_dtype, beta=beta, alpha=scale, out=total)
        else:
            dtype = total.dtype if writes_fp32(a.device) else a.dtype
            step = max(_slab_bytes(a.device) // (b.shape[1] * dtype.itemsize), 1)
            slab = torch.empty(min(step, total.shape[0]), b.shape[1], dtype=dtype, device=a.device)
            add = Tensor.copy_ if not beta else Tensor.add_ if dtype == total.dtype else self.kernels.accumulate_
            for target, factor in zip(total.split(step), a.split(step, dim=1), strict=True):
                add(target, _product(factor.t(), b, scale, out=slab[: target.shape[0]]))

    def result(self) -> Tensor:
        total, dtype = self.total, self.weight.dtype
        if total.dtype == dtype:
            return total
        return self.kernels.empty(*total.shape, dtype=dtype, device=total.device).copy_(total)


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """out = scale * a b. `out` has the factors' dtype, or is fp32 where the library `writes_fp32`."""
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)
    torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out if scale == 1 else out.mul_(scale)


def writes_fp32(device: torch.device) -> bool:
    """Whether the library writes products of 16-bit factors in fp32: cuBLAS does; not all ROCm libraries do."""
    return device.type == "cuda" and torch.version.hip is None


def adds_fp32(device: torch.device) -> bool:
    """Whether addmm takes an fp32 tensor beside 16-bit factors: not before torch 2.10, nor in every 2.10.0a0."""
    return writes_fp32(device) and torch.__version__ >= "2.10"


def _slab_bytes(device: torch.device) -> int:
    return _SLAB if device.type == "cpu" else 16 * _SLAB


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor):
    """out = scale * (hidden weight^T + bias), rounded to 16 bits once or not at all."""
    add, beta = (out, 0) if bias is None else (bias.to(out.dtype), scale)
    if out.dtype == hidden.dtype:
        torch.addmm(add, hidden, weight.t(), beta=beta, alpha=scale, out=out)
    elif writes_fp32(out.device):
        _product(hidden, weight.t(), scale, out)
        if bias is not None:
            out.add_(add, alpha=scale)
    else:
        hidden = hidden.to(out.dtype)
        step = max(_SLAB // (weight.shape[1] * out.element_size()), 1)
        for first in range(0, weight.shape[0], step):
            slab = slice(first, first + step)
            add = out[:, slab] if bias is None else bias[slab].to(out.dtype)
            factor = weight[slab].to(out.dtype)
            torch.addmm(add, hidden, factor.t(), beta=beta, alpha=scale, out=out[:, slab])
