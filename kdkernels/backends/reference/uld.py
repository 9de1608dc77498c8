"""Universal Logit Distillation in plain PyTorch."""

import torch

from ...families.options import RowOptions, compute_dtype
from ...families.uld import Uld, mean_of_runs
from .rows import checked_bad_rows, kept_logits, row_loss


def uld(problem: Uld):
    """Losses, divergences and error bounds [rows] (csrc/calls/uld.h has the formulas).

    The loss is linear in the sorted probabilities as long as their order does not change. Its slopes are the signs of
    the differences; classes of equal logits take the mean of their signs.
    """
    student, teacher, row_scale, temperature, k, student_vocab_size, teacher_vocab_size, _ = problem
    options = RowOptions(row_scale, temperature)
    dtype, kept = compute_dtype(student, teacher), row_scale != 0
    bad = checked_bad_rows(options, student_vocab_size)
    s = kept_logits(student, kept, student_vocab_size, dtype)
    t = kept_logits(teacher, kept, teacher_vocab_size, dtype)
    sorted_logits, order = s.detach().sort(dim=-1, descending=True, stable=True)
    p = torch.softmax(s / temperature[:, None], -1).gather(-1, order)
    q = torch.softmax(t / temperature[:, None], -1).detach().sort(dim=-1, descending=True).values
    ranks = max(student_vocab_size, teacher_vocab_size) if k is None else k
    error_bound = p[:, ranks:].detach().sum(-1) + q[:, ranks:].sum(-1)
    p, q, sorted_logits = p[:, :ranks], q[:, :ranks], sorted_logits[:, :ranks]
    p = torch.nn.functional.pad(p, (0, ranks - p.shape[1]))
    q = torch.nn.functional.pad(q, (0, ranks - q.shape[1]))

    difference = (p - q).detach()
    # 0 at 0, and NaN for NaN, for which torch.sign gives 0.
    sign = torch.where(difference == 0, 0, difference / difference.abs())
    divergence = difference.abs().sum(-1)
    count = sorted_logits.shape[1]
    slopes = p[:, :count] * mean_of_runs(sign[:, :count], sorted_logits)
    # The value is the divergence; the derivative is that of the slopes' sum.
    loss = slopes.sum(-1)
    loss = divergence + (loss - loss.detach())
    divergence, error_bound = (torch.where(kept, x, 0) for x in (divergence, error_bound))
    return row_loss(loss, None, options, bad), divergence, error_bound
