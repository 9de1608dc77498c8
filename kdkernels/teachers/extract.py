"""Sparse teachers out of whole ones: the top k, or samples, of logits."""

import torch
from torch import Tensor

from .. import backends, ops
from ..distributions import LinearLogits, SparseLogProbs
from ..families.linear import TopK, logits_in_chunks
from ..families.topk import sampled
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
    vocab_size, rows, source, chunking = _checked(
        logits, temperature, mask, vocab_size, options.HeadOptions(chunk_rows, compact_rows, logits_dtype)
    )
    options.check_type("k", k, int)
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k: expected from 1 to {vocab_size}, the vocabulary; got {k}")
    leading, backend = logits.shape[:-1], backends.select(backend, logits, logits)
    problem = TopK(source, rows, k, vocab_size, chunking)
    if backend == "reference":
        with torch.autocast(logits.device.type, enabled=False):
            indices, log_probs, tail_log_prob = backends.kernels(backend).topk_log_probs(problem)
    else:
        indices, log_probs, tail_log_prob = ops.topk_log_probs(problem, backend)
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
    chunk_rows: int | None = None,
    compact_rows: bool | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
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
        chunk_rows, compact_rows, logits_dtype: of `LinearLogits`, as in `fused_divergence`, but compact_rows=None is
            False: the draws of a row then do not depend on the mask.
        backend: as in `fused_divergence`: it makes the logits of a `LinearLogits`; torch draws the samples.

    Returns:
        SparseLogProbs of tail "truncate": indices int32 [..., exact + n], each class once, in ascending order, with
        padding after them, and log_probs fp32 (fp64 of fp64). The entries of a row with a NaN are NaN.

    Raises:
        TypeError, ValueError: for what does not fit.

    Source: arXiv:2503.16870.
    """
    vocab_size, rows, source, chunking = _checked(
        logits, temperature, mask, vocab_size, options.HeadOptions(chunk_rows, compact_rows, logits_dtype)
    )
    options.check_int("samples", samples, 1)
    options.check_type("exact", exact, int)
    if not 0 <= exact <= vocab_size:
        raise ValueError(f"exact: expected from 0 to {vocab_size}, the vocabulary; got {exact}")
    options.check_temperature("proposal_temperature", proposal_temperature)
    leading, dtype, row_scale = logits.shape[:-1], rows.row_scale.dtype, rows.row_scale
    if compact_rows is None:
        chunking = chunking._replace(compact_rows=False)
    kernels = backends.kernels(backends.select(backend, logits, logits))
    entries = exact + samples
    # In a chunk, beside its logits: both distributions, and the sampler's in fp64; the classes and targets of the
    # entries, before and after they are sorted and merged.
    row_bytes = vocab_size * (3 * dtype.itemsize + 2 * 8) + entries * 8 * (8 + dtype.itemsize)
    indices = torch.full((row_scale.shape[0], entries), -1, dtype=torch.int32, device=logits.device)
    log_probs = torch.full((row_scale.shape[0], entries), -torch.inf, dtype=dtype, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        for chunk, x in logits_in_chunks(kernels, source, rows, vocab_size, chunking, row_bytes):
            kept = (row_scale[chunk] != 0)[:, None]
            x = torch.where(kept, x.flatten(0, 1)[:, :vocab_size].to(dtype), 0)
            found, targets = sampled(x, samples, exact, temperature, proposal_temperature, generator)
            indices[chunk] = torch.where(kept, found, -1)
            log_probs[chunk] = torch.where(kept, targets, -torch.inf)
    return SparseLogProbs(
        indices.view(*leading, entries),
        log_probs.view(*leading, entries),
        tail="truncate",
        source_temperature=float(temperature),
    )


def _checked(logits, temperature, mask, vocab_size, heads: options.HeadOptions):
    """The vocabulary's size, the row options, and the logits as a source with its chunking."""
    if not isinstance(logits, (Tensor, LinearLogits)):
        raise TypeError(f"logits: expected a tensor or a LinearLogits; got {type(logits).__name__}")
    options.check_stored_or_head("logits", logits)
    vocab_size = options.check_vocab_size(vocab_size, {"logits": logits.shape[-1]})
    options.check_temperature("temperature", temperature)
    chunking = options.resolve_chunking(heads, logits=logits) or options.whole_rows()
    given = options.GivenRowOptions(temperature=temperature, mask=mask, reduction="none")
    rows = options.resolve(logits, logits, given)
    source = options.source_of(logits, chunking)
    return vocab_size, rows, source._replace(data=options.as_outer_inner(source.data)[0]), chunking
