"""Sparse teachers out of whole ones: the top k, or samples, of logits."""

import torch
from torch import Tensor

from .. import backends, ops
from ..backends.reference import linear as reference_linear
from ..backends.reference import topk as reference
from ..distributions import LinearLogits, SparseLogProbs
from ..families import linear as chunks
from ..families import options as row_options
from ..families import topk
from ..losses import options


@torch.no_grad()
def topk_log_probs(
    logits: Tensor | LinearLogits,
    k: int,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    compact_rows: bool | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> SparseLogProbs:
    """The k most probable classes of each row, and the probability of all others: what a cache of a teacher keeps.

    log_probs = log_softmax(logits / temperature) of those k, in descending order (the smaller index first among
    equals), and tail_log_prob the log-sum-exp of the others': found as that, so that it is exact where 1 - sum rounds
    to 0. A row is gone through twice, the second time out of a cache where it fits one, and nothing of the logits' size
    is made: of a `LinearLogits` the logits of some rows at a time. Has no gradient.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64, or a `LinearLogits`.
        k: from 1 to the number of classes.
        temperature: a number > 0; becomes the source_temperature.
        mask: bool, leading shape; False rows are not read, and are padding (index -1, log-probability -inf, tail 0).
            Their loss is 0; pass it the mask too, so that its mean does not count them.
        vocab_size: classes that count; columns past it are padding.
        chunk_rows, compact_rows, logits_dtype: of `LinearLogits`, as in `fused_divergence`.
        backend: as in `fused_divergence`.

    Returns:
        SparseLogProbs of tail "bucket" with indices int32, log_probs and tail_log_prob fp32 (fp64 of fp64). A class of
        probability 0 is padding. A row with a NaN is NaN throughout.

    Raises:
        TypeError, ValueError: for what does not fit. RuntimeError: where the backend cannot serve the call.
    """
    vocab_size, rows, heads = _checked(
        logits, temperature, mask, vocab_size, chunk_rows=chunk_rows, compact_rows=compact_rows,
        logits_dtype=logits_dtype,
    )  # fmt: skip
    options.check_type("k", k, int)
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k: expected from 1 to {vocab_size}, the vocabulary; got {k}")
    leading, backend = logits.shape[:-1], backends.select(backend, logits, logits)
    side = options.side_of(logits, heads)
    side = side._replace(data=options.as_outer_inner(side.data)[0])
    if backend == "reference":
        whole = side.data
        if side.weight is not None:
            whole = reference_linear.linear_logits(*side, rows.row_scale, vocab_size, rows.row_scale.dtype)
        found = reference.topk_log_probs(whole, rows.row_scale, rows.temperature, k, vocab_size)
    else:
        found = ops.topk_log_probs(
            *side[:3], rows.row_scale, rows.temperature, k, vocab_size, *side[3:], heads.autocast_dtype,
            heads.logits_dtype, heads.chunk_rows, chunks.current_budget(), heads.compact_rows, backend,
        )  # fmt: skip
    indices, log_probs, tail_log_prob = found
    return SparseLogProbs(
        indices.view(*leading, k), log_probs.view(*leading, k), tail_log_prob=tail_log_prob.view(leading),
        source_temperature=float(temperature),
    )  # fmt: skip


@torch.no_grad()
def sampled_log_probs(
    logits: Tensor | LinearLogits,
    samples: int,
    *,
    exact: int = 0,
    temperature: float = 1.0,
    proposal_temperature: float = 1.0,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> SparseLogProbs:
    """An unbiased sparse teacher: samples of each row, weighted by their importance (Sparse Logit Sampling).

    Of p = softmax(logits / temperature) and the proposal g = softmax(logits / proposal_temperature), n classes are
    drawn from g with replacement; class c, drawn n_c times, has the target n_c / n * p_c / g_c, whose expectation is
    p_c. The gradient of kl under the "truncate" tail, M q - t with M the sum of t, is then unbiased too: its
    expectation is the gradient of the whole teacher. The other divergences are no linear functions of the teacher, and
    samples bias them. At equal temperatures the targets are counts over samples and M is 1. Memory beside what is
    returned is within `kdkernels.chunk_budget`. Has no gradient.

    With `exact`, so many of the most probable classes have the target p_c, and g is of the others alone: as unbiased,
    and of less variance, since only the tail is drawn. At equal temperatures what was drawn shares the tail's mass.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64, or a `LinearLogits`.
        samples: n, from 1.
        exact: from 0 to the number of classes.
        temperature, proposal_temperature: numbers > 0. The loss's temperature must be the former.
        generator: of the logits' device.
        mask: bool, leading shape; False rows are not read, and are padding.
        vocab_size: classes that count.

    Returns:
        SparseLogProbs of tail "truncate": indices int32 [..., exact + n], each class once, in ascending order, with
        padding after them, and log_probs fp32 (fp64 of fp64). The entries of a row with a NaN are NaN.

    Raises:
        TypeError, ValueError: for what does not fit.

    Source: arXiv:2503.16870.
    """
    vocab_size, rows, heads = _checked(logits, temperature, mask, vocab_size)
    options.check_type("samples", samples, int)
    if samples < 1:
        raise ValueError(f"samples: expected from 1; got {samples}")
    options.check_type("exact", exact, int)
    if not 0 <= exact <= vocab_size:
        raise ValueError(f"exact: expected from 0 to {vocab_size}, the vocabulary; got {exact}")
    options.check_temperature("proposal_temperature", proposal_temperature)
    leading, dtype = logits.shape[:-1], rows.row_scale.dtype
    side = options.side_of(logits, heads)
    side = side._replace(data=options.as_outer_inner(side.data)[0])
    with torch.autocast(logits.device.type, enabled=False):
        drawn = [
            topk.sampled(x, samples, exact, temperature, proposal_temperature, generator)
            for x in _logits_in_chunks(side, rows.row_scale, vocab_size, exact + samples, dtype, heads.autocast_dtype)
        ]
    none = rows.row_scale.new_empty(0, exact + samples)
    indices = torch.cat([x[0] for x in drawn]) if drawn else none.to(torch.int32)
    log_probs = torch.cat([x[1] for x in drawn]) if drawn else none
    absent = (rows.row_scale == 0)[:, None]
    return SparseLogProbs(
        torch.where(absent, -1, indices).view(*leading, exact + samples),
        torch.where(absent, -torch.inf, log_probs).view(*leading, exact + samples),
        tail="truncate",
        source_temperature=float(temperature),
    )


def _logits_in_chunks(
    side: chunks.Side, row_scale: Tensor, vocab_size: int, entries: int, dtype: torch.dtype, autocast_dtype
):
    """Logits [n, vocab_size] in the compute dtype, some rows at a time; zeros in rows that are not read."""
    rows, kept = row_scale.shape[0], (row_scale != 0)[:, None]
    # What lies beside each other at a time: the logits, both distributions, and in fp64 the sampler's; of the entries,
    # classes and targets as they are sorted and merged.
    row_bytes = vocab_size * (3 * dtype.itemsize + 2 * 8) + entries * 8 * (8 + dtype.itemsize)
    size = max(chunks.current_budget() // row_bytes, 1)
    of_product = chunks.product_dtype(side.data.dtype, autocast_dtype)
    weight, bias = (x if x is None else x[:vocab_size].to(of_product) for x in (side.weight, side.bias))
    for first in range(0, rows, size):
        chunk = slice(first, min(first + size, rows))
        data = row_options.rows_of(side.data, chunk)
        if weight is None:
            yield torch.where(kept[chunk], data[:, :vocab_size].to(dtype), 0)
            continue
        hidden = torch.where(kept[chunk], data.to(of_product), 0)
        logits = torch.nn.functional.linear(hidden, weight, bias).to(dtype) * side.scale
        yield logits if side.softcap is None else side.softcap * torch.tanh(logits / side.softcap)


def _checked(logits, temperature, mask, vocab_size, *, chunk_rows=None, compact_rows=None, logits_dtype=None):
    """The number of classes that count, the row options, and how the logits of a head are made."""
    if not isinstance(logits, (Tensor, LinearLogits)):
        raise TypeError(f"logits: expected a tensor or a LinearLogits; got {type(logits).__name__}")
    options.check_stored_or_head("logits", logits)
    vocab_size = options.check_vocab_size(vocab_size, {"logits": logits.shape[-1]})
    options.check_temperature("temperature", temperature)
    heads = options.resolve_heads(
        logits=logits, chunk_rows=chunk_rows, compact_rows=compact_rows, logits_dtype=logits_dtype
    )
    rows = options.resolve(
        logits, logits, temperature=temperature, mask=mask, row_weight=None, labels=None, ignore_index=-100,
        hard_weight=0.0, reduction="none", normalizer=None,
    )  # fmt: skip
    return vocab_size, rows, heads or options.HeadOptions(None, None, 0, False)
