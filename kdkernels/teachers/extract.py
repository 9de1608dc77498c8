"""Makes sparse teachers from logits: the top k, or samples."""

from typing import NoReturn

import torch
from torch import Tensor

from .. import backends, ops
from ..distributions import LinearLogits, SparseLogProbs
from ..families.linear import TopK, logits_in_chunks
from ..families.topk import sampled
from ..losses import head_options, options
from ..losses.signatures import check_keywords, shows_keywords


@torch.no_grad()
@shows_keywords()
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
    **unknown: NoReturn,
) -> SparseLogProbs:
    """The k most probable classes of each row, and the probability of all others: the entries that a cache of a teacher
    keeps.

    log_probs = log_softmax(logits / temperature) of the k classes, in descending order (the smaller index first among
    equals). tail_log_prob is the log-sum-exp of the other classes' log-probabilities, computed over those classes, so
    it is exact even if 1 - sum rounds to 0. The kernel reads a row twice, the second time from a cache if the row fits
    one. No temporary has the logits' size: for a `LinearLogits` the logits of a few rows exist at a time. The result
    has no gradient.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64, or a `LinearLogits`.
        k: from 1 to the number of classes.
        temperature: a number > 0. Divides the logits, and becomes the result's source_temperature.
        mask: bool, leading shape. Rows that are False are not read and become padding (index -1, log-probability -inf,
            tail 0), with loss 0. Pass the mask to the loss too, so that its mean does not count these rows.
        vocab_size: the number of classes that count; columns past it are padding.
        chunk_rows, compact_rows, logits_dtype: for `LinearLogits`, as in `fused_divergence`.
        backend: as in `fused_divergence`.

    Returns:
        SparseLogProbs of tail "bucket" with int32 indices; log_probs and tail_log_prob are fp32 (fp64 for fp64 logits).
        A class of probability 0 becomes padding. A row with a NaN is NaN throughout.

    Raises:
        TypeError, ValueError: for arguments that do not fit. RuntimeError: if the backend cannot serve the call.
    """
    check_keywords(topk_log_probs, unknown)
    vocab_size, rows, source, chunking = _checked(
        logits, temperature, mask, vocab_size, head_options.HeadOptions(chunk_rows, compact_rows, logits_dtype)
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
        indices.view(*leading, k),
        log_probs.view(*leading, k),
        tail_log_prob=tail_log_prob.view(leading),
        source_temperature=float(temperature),
    )


@torch.no_grad()
@shows_keywords()
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
    **unknown: NoReturn,
) -> SparseLogProbs:
    """An unbiased sparse teacher: samples of each row, weighted by their importance (Sparse Logit Sampling).

    Let p = softmax(logits / temperature), and let the proposal be g = softmax(logits / proposal_temperature). The call
    draws n classes from g with replacement. Class c, drawn n_c times, gets the target n_c / n * p_c / g_c, whose
    expectation is p_c. Under the "truncate" tail the gradient of kl is M q - t, with M the sum of t; its expectation is
    the gradient of the whole teacher, so it is unbiased too. The other divergences are not linear in the teacher, so
    samples bias them; the loss warns of it once. At equal temperatures the targets are counts divided by n, and M is 1.
    Memory besides the result stays within `kdkernels.chunk_budget`. The result has no gradient.

    With `exact`, that many of the most probable classes get the target p_c, and g covers only the other classes. The
    teacher is still unbiased, and has less variance, since only the tail is drawn. At equal temperatures the drawn
    classes share the tail's mass.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64, or a `LinearLogits`.
        samples: n, from 1.
        exact: from 0 to the number of classes.
        temperature, proposal_temperature: numbers > 0. The loss needs `temperature` as its own temperature.
        generator: a torch.Generator on the logits' device.
        mask: bool, leading shape. Rows that are False are not read and become padding.
        vocab_size: the number of classes that count.
        chunk_rows, compact_rows, logits_dtype: for `LinearLogits`, as in `fused_divergence`, but compact_rows=None
            means False: the draws of a row then do not depend on the mask.
        backend: as in `fused_divergence`. The backend makes the logits of a `LinearLogits`; torch draws the samples.

    Returns:
        SparseLogProbs of tail "truncate". Indices are int32 [..., exact + n], each class once, in ascending order,
        followed by padding. log_probs are fp32 (fp64 for fp64 logits). The entries of a row with a NaN are NaN.

    Raises:
        TypeError, ValueError: for arguments that do not fit. RuntimeError: if the backend cannot serve the call.

    Source: arXiv:2503.16870.
    """
    check_keywords(sampled_log_probs, unknown)
    vocab_size, rows, source, chunking = _checked(
        logits, temperature, mask, vocab_size, head_options.HeadOptions(chunk_rows, compact_rows, logits_dtype)
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
    # A chunk holds, besides its logits: a copy of them, both distributions, and the proposal in fp64; the classes and
    # targets of the entries, before and after sorting and merging. On a CPU torch.multinomial allocates as much as the
    # proposal for a single sample, and else the sums of one row. On a GPU twice the proposal is counted, unmeasured.
    proposals = 3 if logits.device.type != "cpu" else 2 if samples == 1 else 1
    row_bytes = vocab_size * (3 * dtype.itemsize + proposals * 8) + entries * 8 * (8 + dtype.itemsize)
    indices = torch.full((row_scale.shape[0], entries), -1, dtype=torch.int32, device=logits.device)
    log_probs = torch.full((row_scale.shape[0], entries), -torch.inf, dtype=dtype, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        for chunk, x in logits_in_chunks(kernels, source, rows, vocab_size, chunking, (row_bytes, 8 * vocab_size)):
            kept = (row_scale[chunk] != 0)[:, None]
            x = torch.where(kept, x.flatten(0, 1)[:, :vocab_size].to(dtype), 0)
            classes, targets = sampled(x, samples, exact, temperature, proposal_temperature, generator)
            indices[chunk] = torch.where(kept, classes, -1)
            log_probs[chunk] = torch.where(kept, targets, -torch.inf)
    return SparseLogProbs(
        indices.view(*leading, entries),
        log_probs.view(*leading, entries),
        tail="truncate",
        source_temperature=float(temperature),
        drawn=True,
    )


def _checked(logits, temperature, mask, vocab_size, heads: head_options.HeadOptions):
    """The vocabulary's size, the row options, and the logits as a source with its chunking."""
    if not isinstance(logits, (Tensor, LinearLogits)):
        raise TypeError(f"logits: expected a tensor or a LinearLogits; got {type(logits).__name__}")
    options.check_stored_or_head("logits", logits)
    vocab_size = options.check_vocab_size(vocab_size, {"logits": logits.shape[-1]})
    options.check_temperature("temperature", temperature)
    chunking = head_options.resolve_chunking(heads, logits=logits) or head_options.whole_rows(logits.device)
    given = options.GivenRowOptions(temperature=temperature, mask=mask, reduction="none")
    rows = options.resolve(logits, logits, given)
    source = head_options.source_of(logits, chunking)
    return vocab_size, rows, source._replace(data=options.as_outer_inner(source.data)[0]), chunking
