"""The losses as PyTorch users write them: kdkernels is compared with these.

p is the teacher, q the student, lp and lq are their log-probabilities [..., V]. Each function returns one value a row.
Logits are converted to fp32 first, because a log-softmax rounded to bf16 spoils the gradient.
"""

import math

import torch
import torch.nn.functional as F


def kl(lp, lq):
    return F.kl_div(lq, lp, log_target=True, reduction="none").sum(-1)


def reverse_kl(lp, lq):
    return F.kl_div(lp, lq, log_target=True, reduction="none").sum(-1)


def mixed_kl(lp, lq, weight=0.5):
    return weight * kl(lp, lq) + (1 - weight) * reverse_kl(lp, lq)


def log_mixture(lp, lq, beta):
    return torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))


def js(lp, lq, beta=0.5):
    lm = log_mixture(lp, lq, beta)
    return beta * kl(lp, lm) + (1 - beta) * kl(lq, lm)


def skew_kl(lp, lq, alpha=0.1):
    return kl(lp, log_mixture(lp, lq, alpha))


def skew_reverse_kl(lp, lq, alpha=0.1):
    return kl(lq, log_mixture(lq, lp, alpha))


def tv(lp, lq):
    return 0.5 * (lp.exp() - lq.exp()).abs().sum(-1)


def hellinger(lp, lq):
    return 0.5 * ((lp / 2).exp() - (lq / 2).exp()).square().sum(-1)


def alpha(lp, lq, alpha=0.5):
    return ((alpha * lp + (1 - alpha) * lq).exp().sum(-1) - 1) / (alpha * (alpha - 1))


DIVERGENCES = {
    function.__name__: function
    for function in (kl, reverse_kl, mixed_kl, js, skew_kl, skew_reverse_kl, tv, hellinger, alpha)
}


def sinkhorn_loss(student, teacher, temperature=2.0, epsilon=0.1, iterations=20):
    """SinKD between clouds of rows [..., B, V]: divides the plan's rows, then its columns, by their sums."""
    p, q = (torch.softmax(x.float() / temperature, -1) for x in (student, teacher))
    cost = torch.cdist(p, q, p=1)
    plan = torch.exp(-cost / epsilon)
    for _ in range(iterations):
        plan = plan / plan.sum(-1, keepdim=True)
        plan = plan / plan.sum(-2, keepdim=True)
    return (plan * cost).sum((-1, -2)).mean()


def uld_loss(student, teacher, temperature=1.0):
    """ULD between vocabularies of any size: compares sorted probabilities; zeros pad the shorter row."""
    p, q = (torch.softmax(x.float() / temperature, -1).sort(dim=-1, descending=True).values for x in (student, teacher))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(x, (0, width - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1).mean()


def row_divergences(student, teacher, name="kl", temperature=1.0, **parameters):
    """The named divergence of each row of logits [..., V]; fp32 [...]."""
    student, teacher = student.float(), teacher.float()
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    return DIVERGENCES[name](teacher.log_softmax(-1), student.log_softmax(-1), **parameters)


def divergence_loss(student, teacher, name="kl", temperature=1.0, **parameters):
    """The mean over the rows of `row_divergences`."""
    return row_divergences(student, teacher, name, temperature, **parameters).mean()
