"""Sparse teachers in plain PyTorch: the loss against entries, and the top k of logits."""

import torch
from torch import Tensor

from ...families.options import fp64_device
from ...families.rows import CLOSE_TEMPERATURE
from ...families.topk import Entries, TopkRows
from .rows import (
    WholeRowOrNaN,
    checked_bad_rows,
    close_rows,
    close_terms,
    kept_logits,
    label_and_loss,
    stacked,
    without_gradient_of_capped,
)
from .table import NEAR, TABLE, weighted


def topk_rows(problem: TopkRows):
    """Losses [rows], statistics and top-1 (or None) of logits against the entries of a sparse teacher."""
    student, entries, options, divergence, parameters, vocab_size, statistics, support_only, slack = problem
    indices, log_probs, tail_log_prob = entries[:3]
    row_scale, temperature, labels = options[:3]
    kept = row_scale != 0
    bad = checked_bad_rows(options, vocab_size)
    s = without_gradient_of_capped(kept_logits(student, kept, vocab_size, row_scale.dtype), topk_rows, problem)
    tempered = WholeRowOrNaN.apply(s / temperature[:, None])
    lse, lq_of_all = tempered.logsumexp(-1), torch.log_softmax(tempered, -1)

    there, lp = indices < vocab_size, with_tail(log_probs, tail_log_prob, support_only)
    lq = compared(tempered, lse, lq_of_all, indices, support_only)
    p, q = lp.exp(), lq.exp()

    terms = TABLE[divergence](lp, lq, p, q, parameters[0])
    close = close_rows(terms.sum(-1), divergence, temperature)
    if close is not None:
        exact = log_ratio(s, entries, temperature, support_only)
        terms = close_terms(close, terms, problem, exact, lq - lp, p, q)
        if slack is not None:  # its sum over the classes is the offset, which has no derivative
            change = torch.where(exact.abs() < NEAR, p * torch.expm1(exact), q - p)
            terms = terms - torch.where((temperature >= CLOSE_TEMPERATURE)[:, None], slack * change, 0).detach()
    row_divergence = terms.sum(-1)
    index, cross_entropy, loss = label_and_loss(row_divergence, s, options, bad)
    if not statistics:
        return loss, None, None

    zero = torch.zeros_like(loss)
    q_of_all, student_label, teacher_label = lq_of_all.exp(), zero, zero
    if labels is not None:
        student_label = lq_of_all.gather(-1, index)[:, 0]
        is_label = there & (indices == index)
        label_entry = torch.where(is_label, log_probs, -torch.inf).amax(-1)
        teacher_label = torch.where(is_label.any(-1), label_entry, tail_log_prob)
    values = {
        "divergence": row_divergence,
        "cross_entropy": cross_entropy,
        "tv": 0.5 * (p - q).abs().sum(-1),
        "student_entropy": -weighted(q_of_all, lq_of_all).sum(-1),
        "teacher_entropy": -weighted(p, lp).sum(-1),
        "student_max_log_prob": lq_of_all.max(-1).values,
        "teacher_max_log_prob": log_probs.max(-1).values,
        "student_label_log_prob": student_label,
        "teacher_label_log_prob": teacher_label,
        "student_lse": lse,
        "teacher_lse": lp.logsumexp(-1),
    }
    teacher_top1 = indices.gather(-1, log_probs.argmax(-1, keepdim=True))[:, 0].long()
    top1 = {"student_top1": s.argmax(-1), "teacher_top1": torch.where(there.any(-1), teacher_top1, 0)}
    return loss, *stacked(values, top1, kept)


def with_tail(log_probs: Tensor, tail_log_prob: Tensor, support_only: bool) -> Tensor:
    """The entries' log-probabilities, and the tail's unless `support_only`: [rows, K + 1] or [rows, K]."""
    return log_probs if support_only else torch.cat([log_probs, tail_log_prob[:, None]], -1)


def compared(tempered: Tensor, lse: Tensor, lq_of_all: Tensor, indices: Tensor, support_only: bool) -> Tensor:
    """The student's log-probabilities of the classes that the loss compares, as `with_tail` orders the teacher's."""
    vocab_size = tempered.shape[1]
    there = indices < vocab_size
    # Tail "support" renormalises the student over the entries, and does not read the other classes.
    source = tempered if support_only else lq_of_all
    lq = torch.where(there, source.gather(-1, torch.where(there, indices, 0).long()), -torch.inf)
    if support_only:
        return torch.where(there, lq - log_sum_exp(lq)[:, None], -torch.inf)
    named = torch.zeros(tempered.shape[0], vocab_size + 1, dtype=torch.bool, device=tempered.device)
    named = named.scatter(-1, torch.where(there, indices, vocab_size).long(), True)[:, :vocab_size]
    # -inf if no other class has mass, with the derivative of -lse.
    return with_tail(lq, log_sum_exp(torch.where(named, -torch.inf, tempered)) - lse, support_only)


@torch.no_grad()
def log_ratio(s: Tensor, entries: Entries, temperature: Tensor, support_only: bool) -> Tensor:
    """lq - lp of the classes that the loss compares, found in fp64: csrc/divergences.h says why."""
    place = fp64_device(s.device)
    tempered = s.to(place).double() / temperature.to(place)[:, None]
    lse, lq_of_all = tempered.logsumexp(-1), torch.log_softmax(tempered, -1)
    lq = compared(tempered, lse, lq_of_all, entries.indices.to(place), support_only)

    def exact(rounded: Tensor, rounding: Tensor | None) -> Tensor:
        return rounded.to(place).double() + (0 if rounding is None else rounding.to(place))

    log_probs = exact(entries.log_probs, entries.log_probs_rounding)
    return (lq - with_tail(log_probs, exact(entries.tail_log_prob, entries.tail_rounding), support_only)).to(s)


def topk(logits: Tensor, row_scale: Tensor, temperature: Tensor, k: int, vocab_size: int):
    """Indices and log-probabilities [rows, k], and the log-sum-exp of the other classes [rows]."""
    kept = row_scale != 0
    x = kept_logits(logits, kept, vocab_size, row_scale.dtype)
    log_probs = torch.log_softmax(x / temperature[:, None], -1)
    # Sorts whole rows: torch.topk does not define the order of equal values.
    values, indices = log_probs.sort(dim=-1, descending=True, stable=True)
    values, rest, indices = values[:, :k], values[:, k:], indices[:, :k]
    tail = rest.logsumexp(-1) if rest.shape[1] else torch.full_like(row_scale, -torch.inf)
    tail = torch.where(torch.isnan(log_probs).any(-1), torch.nan, tail)
    values = torch.where(kept[:, None], values, -torch.inf)
    indices = torch.where(torch.isneginf(values), -1, indices)
    return indices.to(torch.int32), values, torch.where(kept, tail, 0)


def log_sum_exp(x: Tensor) -> Tensor:
    """log-sum-exp over the last dimension; -inf with a gradient of 0 if every element is -inf."""
    nothing = torch.isneginf(x).all(-1)
    return torch.where(nothing, -torch.inf, torch.where(nothing[:, None], 0, x).logsumexp(-1))
