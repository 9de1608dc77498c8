"""Heads and sparse teachers in plain PyTorch: whole logits, and the row loss between them."""

import torch
from torch import Tensor

from ...families import topk as sparse_teachers
from ...families.linear import ChunkedRows, LogitsSource, TopK
from ...families.options import RowOptions, bad_values_raise
from ...families.rows import Rows
from ...families.topk import TopkRows
from .rows import rows
from .topk import topk, topk_rows


def linear_logits(source: LogitsSource, row_scale: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """softcap * tanh(scale * (hidden weight^T + bias) / softcap) in `dtype`, [outer, inner, vocab_size].

    The weights of classes past `vocab_size` may hold anything.
    """
    hidden, weight, bias, scale, softcap = source
    kept = (row_scale != 0).view(hidden.shape[:-1])[..., None]
    hidden = torch.where(kept, hidden.to(dtype), 0)  # a skipped row may hold anything
    weight, bias = (x if x is None else x[:vocab_size].to(dtype) for x in (weight, bias))
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _logits(source: LogitsSource, options: RowOptions, vocab_size: int) -> Tensor:
    if source.weight is None:
        return source.data
    return linear_logits(source, options.row_scale, vocab_size, options.row_scale.dtype)


def chunked_rows(problem: ChunkedRows):
    """Losses [rows], statistics and top-1 (or None), from whole logits."""
    options, vocab_size = problem.options, problem.vocab_size
    loss_terms = (problem.divergence, problem.parameters, vocab_size, problem.statistics)
    student, sparse = _logits(problem.student, options, vocab_size), problem.sparse
    if sparse is None:
        return rows(Rows(student, _logits(problem.teacher, options, vocab_size), options, *loss_terms))
    dtype, device = options.row_scale.dtype, options.row_scale.device
    entries, row_scale = sparse_teachers.entries_of(sparse, options, vocab_size, bad_values_raise(device))
    options = options._replace(row_scale=row_scale)
    if sparse.tail == "uniform":
        teacher = torch.empty(row_scale.shape[0], vocab_size + 1, dtype=dtype, device=device)
        sparse_teachers.fill_uniform(entries, options.temperature.expand_as(row_scale), vocab_size, teacher)
        return rows(Rows(student, teacher.view(*student.shape[:2], vocab_size + 1), options, *loss_terms))
    truncated = sparse.tail == "truncate"
    slack = sparse_teachers.slack_of(problem.divergence, problem.parameters) if truncated else None
    loss, statistics, top1 = topk_rows(
        TopkRows(student, entries, options, *loss_terms, sparse.tail == "support", slack)
    )
    if truncated:
        offset = sparse_teachers.tail_offset(
            problem.divergence, problem.parameters, entries.log_probs, options.temperature
        )
        loss, statistics = sparse_teachers.with_offset(offset, options, loss, statistics)
    return loss, statistics, top1


def topk_log_probs(problem: TopK):
    """Indices and log-probabilities [rows, k], and the log-sum-exp of the other classes [rows]."""
    options = problem.options
    logits = _logits(problem.source, options, problem.vocab_size)
    return topk(logits, options.row_scale, options.temperature, problem.k, problem.vocab_size)


def softcap_(logits: Tensor, cap: float) -> None:
    """logits = cap * tanh(logits / cap)"""
    logits.copy_(cap * torch.tanh(logits / cap))


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialised tensor."""
    return torch.empty(shape, dtype=dtype, device=device)
