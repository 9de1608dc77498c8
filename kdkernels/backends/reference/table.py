"""The table of divergences in plain PyTorch: the value of one class, which autograd differentiates.

The close lines give the same value from d = lq - lp, where |d| < `NEAR`: they lose no digits as d goes to 0.
"""

import torch
from torch import Tensor


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x with 0 * log 0 = 0: a weight of 0 drops the term and its derivative."""
    return weight * torch.where(weight == 0, 0, x)


def log_mixture(lp: Tensor, lq: Tensor, weight: Tensor) -> Tensor:
    """log(weight * p + (1 - weight) * q)."""
    lp, lq = lp + torch.log(weight), lq + torch.log1p(-weight)
    both = torch.isneginf(lp) & torch.isneginf(lq)  # logaddexp has no derivative there
    mixture = torch.logaddexp(torch.where(both, 0, lp), torch.where(both, 0, lq))
    return torch.where(both, -torch.inf, mixture)


# The table: value(lp, lq, p, q, parameter) of one class, from the teacher's and the student's log-probability and their
# exponentials. A value may add c * (q - p), which sums to 0 over the classes; c makes every value and slope 0 at p = q.


def kl(lp, lq, p, q, _):
    return weighted(p, lp - lq) - p + q


def reverse_kl(lp, lq, p, q, _):
    return weighted(q, lq - lp) - q + p


def mixed_kl(lp, lq, p, q, weight):
    return weighted(weight * p, lp - lq) + weighted((1 - weight) * q, lq - lp) + (2 * weight - 1) * (q - p)


def js(lp, lq, p, q, beta):
    lm = log_mixture(lp, lq, beta)
    return weighted(beta * p, lp - lm) + weighted((1 - beta) * q, lq - lm)


def skew_kl(lp, lq, p, q, alpha):
    return weighted(p, lp - log_mixture(lp, lq, alpha)) + (1 - alpha) * (q - p)


def skew_reverse_kl(lp, lq, p, q, alpha):
    return weighted(q, lq - log_mixture(lq, lp, alpha)) + (1 - alpha) * (p - q)


def tv(lp, lq, p, q, _):
    difference = p - q
    # A constant sign: 0 at 0, and NaN for NaN, for which abs() has the derivative 0.
    sign = torch.where(difference == 0, 0, difference / difference.abs()).detach()
    return 0.5 * difference * sign


def hellinger(lp, lq, p, q, _):
    return 0.5 * (torch.exp(0.5 * lp) - torch.exp(0.5 * lq)) ** 2


def alpha(lp, lq, p, q, alpha):
    nowhere = torch.isneginf(lp) & torch.isneginf(lq)
    exponent = alpha * torch.where(nowhere, 0, lp) + (1 - alpha) * torch.where(nowhere, 0, lq)
    power = torch.where(nowhere, 0, torch.exp(exponent))
    return (power - alpha * p - (1 - alpha) * q) / (alpha * (alpha - 1))


def chi_square(lp, lq, p, q, _):
    is_normal = lq > -87  # elsewhere q may underflow where p does not
    nowhere = torch.isneginf(lp) & torch.isneginf(lq)
    power = torch.where(nowhere, 0, torch.exp(2 * torch.where(nowhere, 0, lp) - torch.where(nowhere, 0, lq)))
    return torch.where(is_normal, (p - q) ** 2 / torch.where(is_normal, q, 1), power - 2 * p + q)


TABLE = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "mixed_kl": mixed_kl,
    "js": js,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tv": tv,
    "hellinger": hellinger,
    "alpha": alpha,
    "chi_square": chi_square,
}


# The close lines: value(d, p, q, parameter) of one class.

NEAR = 2.0


def excess(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, to full precision also for small |x|."""
    small = x.abs() < 0.5
    inner = torch.where(small, x, 0)
    series = torch.full_like(x, 1 / 40320)
    for coefficient in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series = series * inner + coefficient
    return torch.where(small, inner * inner * series, torch.expm1(x) - x)


def close_kl(d, p, q, _):
    return p * excess(d)


def close_reverse_kl(d, p, q, _):
    return q * excess(-d)


def close_mixed_kl(d, p, q, weight):
    return weight * p * excess(d) + (1 - weight) * q * excess(-d)


def close_js(d, p, q, beta):
    # log(m / p) and log(m / q)
    of_teacher, of_student = torch.log1p((1 - beta) * torch.expm1(d)), torch.log1p(beta * torch.expm1(-d))
    return beta * p * excess(of_teacher) + (1 - beta) * q * excess(of_student)


def close_skew_kl(d, p, q, alpha):
    return p * excess(torch.log1p((1 - alpha) * torch.expm1(d)))


def close_skew_reverse_kl(d, p, q, alpha):
    return q * excess(torch.log1p((1 - alpha) * torch.expm1(-d)))


def close_tv(d, p, q, _):
    return 0.5 * p * torch.expm1(d).abs()  # abs() has the derivative 0 at 0


def close_hellinger(d, p, q, _):
    return 0.5 * p * torch.expm1(0.5 * d) ** 2


def close_alpha(d, p, q, alpha):
    # The two forms are equal. The first cancels near alpha = 1, the second near alpha = 0.
    of_student = q * (excess(-alpha * d) - alpha * excess(-d))
    of_teacher = p * (excess((1 - alpha) * d) - (1 - alpha) * excess(d))
    return torch.where(alpha < 0.5, of_student, of_teacher) / (alpha * (alpha - 1))


def close_chi_square(d, p, q, _):
    return q * torch.expm1(-d) ** 2


CLOSE_TABLE = {
    "kl": close_kl,
    "reverse_kl": close_reverse_kl,
    "mixed_kl": close_mixed_kl,
    "js": close_js,
    "skew_kl": close_skew_kl,
    "skew_reverse_kl": close_skew_reverse_kl,
    "tv": close_tv,
    "hellinger": close_hellinger,
    "alpha": close_alpha,
    "chi_square": close_chi_square,
}
