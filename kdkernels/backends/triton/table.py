"""The table in Triton: every divergence as two pointwise functions of one class.

    value(lp, lq, p, q, parameter)    phi, the class's share of the row's loss    L = sum phi
    slope(lp, lq, p, q, parameter)    psi = d phi / d lq          dL/ds = (psi - q * sum psi) / temperature

lp and lq are the log-probabilities of teacher and student, p = exp(lp) and q = exp(lq). The formulas are the same as in
csrc/divergences.h: every term vanishes at p = q. An entry may have a third function,

    slope_sum(mean_log_ratio, parameter)    sum psi from E_q[lq - lp]

The sweep that finds the normalisers then finds the mean log-ratio too, and the gradient needs no sweep for sum psi.

A row whose divergence is small has the close lines instead (`CLOSE_TABLE`), as in csrc/divergences.h:

    value(d, p, q, parameter), slope(d, p, q, parameter)    for |d| < 2,  d = lq - lp

The functions use Triton's own mathematics alone, so that the interpreter runs them: no libdevice, no inline assembly.
"""

import triton
import triton.language as tl

SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def weighted(weight, x):
    """weight * x with 0 * log 0 = 0: a term of probability 0 is dropped. A weight of NaN gives NaN."""
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def ratio(x, m):
    """x / m, or 0 if m has underflowed to 0 together with x."""
    return tl.where(m == 0, 0.0, x / m)


@triton.jit
def mixture(weight, p, q):
    """weight * p + (1 - weight) * q, from the side of larger weight: exactly p where p = q."""
    return tl.where(weight < 0.5, q + weight * (p - q), p + (1 - weight) * (q - p))


@triton.jit
def log_mixture(weight, p, q):
    # A GPU's logarithm may flush a subnormal to 0, and the product with the weight may not: -inf times a weight
    # that is not 0. So the argument is at least the smallest normal number.
    m = mixture(weight, p, q)
    return tl.log(tl.where(m < SMALLEST_NORMAL, SMALLEST_NORMAL, m))


# KL(p || q) = sum p log(p / q)


@triton.jit
def kl_value(lp, lq, p, q, _):
    return weighted(p, lp - lq) - p + q


@triton.jit
def kl_slope(lp, lq, p, q, _):
    return q - p


@triton.jit
def kl_slope_sum(mean_log_ratio, _):
    return 0.0


# KL(q || p) = sum q log(q / p)


@triton.jit
def reverse_kl_value(lp, lq, p, q, _):
    return weighted(q, lq - lp) - q + p


@triton.jit
def reverse_kl_slope(lp, lq, p, q, _):
    return weighted(q, lq - lp)


@triton.jit
def reverse_kl_slope_sum(mean_log_ratio, _):
    return mean_log_ratio


# weight * KL(p || q) + (1 - weight) * KL(q || p)


@triton.jit
def mixed_kl_value(lp, lq, p, q, weight):
    forward = weighted(weight * p, lp - lq)
    reverse = weighted((1 - weight) * q, lq - lp)
    return forward + reverse + (2 * weight - 1) * (q - p)


@triton.jit
def mixed_kl_slope(lp, lq, p, q, weight):
    return weight * (q - p) + weighted((1 - weight) * q, lq - lp)


@triton.jit
def mixed_kl_slope_sum(mean_log_ratio, weight):
    return weighted(1 - weight, mean_log_ratio)


# beta * KL(p || m) + (1 - beta) * KL(q || m),  m = beta * p + (1 - beta) * q


@triton.jit
def js_value(lp, lq, p, q, beta):
    lm = log_mixture(beta, p, q)
    return weighted(beta * p, lp - lm) + weighted((1 - beta) * q, lq - lm)


@triton.jit
def js_slope(lp, lq, p, q, beta):
    return weighted((1 - beta) * q, lq - log_mixture(beta, p, q))


# KL(p || m),  m = alpha * p + (1 - alpha) * q


@triton.jit
def skew_kl_value(lp, lq, p, q, alpha):
    return weighted(p, lp - log_mixture(alpha, p, q)) + (1 - alpha) * (q - p)


@triton.jit
def skew_kl_slope(lp, lq, p, q, alpha):
    return (1 - alpha) * (1 - alpha) * (q - p) * ratio(q, mixture(alpha, p, q))


# KL(q || m),  m = (1 - alpha) * p + alpha * q


@triton.jit
def skew_reverse_kl_value(lp, lq, p, q, alpha):
    return weighted(q, lq - log_mixture(alpha, q, p)) + (1 - alpha) * (p - q)


@triton.jit
def skew_reverse_kl_slope(lp, lq, p, q, alpha):
    through_m = alpha * (1 - alpha) * (p - q) * ratio(q, mixture(alpha, q, p))
    return weighted(q, lq - log_mixture(alpha, q, p)) + through_m


# sum |p - q| / 2, slope 0 where p = q


@triton.jit
def tv_value(lp, lq, p, q, _):
    return 0.5 * tl.abs(p - q)


@triton.jit
def tv_slope(lp, lq, p, q, _):
    signed_q = tl.where(q > p, q, -q)
    return tl.where(q == p, 0.0, 0.5 * signed_q + (p - p))  # p - p is NaN where p is


# sum (sqrt p - sqrt q)^2 / 2


@triton.jit
def hellinger_value(lp, lq, p, q, _):
    difference = tl.sqrt(p) - tl.sqrt(q)
    return 0.5 * difference * difference


@triton.jit
def hellinger_slope(lp, lq, p, q, _):
    return 0.5 * tl.sqrt(q) * (tl.sqrt(q) - tl.sqrt(p))


# (sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1)).  The power is found in log space: it may be a normal number
# when p and q have both underflowed.


@triton.jit
def power(lp, lq, p, alpha):
    d = lp - lq
    # d is +inf where lq alone is -inf
    exponent = tl.where(d == float("inf"), (alpha - 1) * d, lq + alpha * d)
    return tl.where(lp == lq, p, tl.exp(exponent))


@triton.jit
def alpha_value(lp, lq, p, q, alpha):
    d = p - q
    r = power(lp, lq, p, alpha)
    return tl.where(alpha < 0.5, r - q - alpha * d, r - p + (1 - alpha) * d) / (alpha * (alpha - 1))


@triton.jit
def alpha_slope(lp, lq, p, q, alpha):
    return (q - power(lp, lq, p, alpha)) / alpha


# sum (p - q)^2 / q.  Where q may have underflowed, p^2 / q is found in log space: it may be of any size.


@triton.jit
def square_over_q(lp, lq, p):
    return tl.where(lp == lq, p, tl.exp(lp + (lp - lq)))  # also where both are -inf


@triton.jit
def chi_square_value(lp, lq, p, q, _):
    d = p - q
    return tl.where(lq > -87.0, d * ratio(d, q), square_over_q(lp, lq, p) - p - d)


@triton.jit
def chi_square_slope(lp, lq, p, q, _):
    return tl.where(lq > -87.0, (q - p) * ratio(p + q, q), q - square_over_q(lp, lq, p))


# name in kdkernels/divergences.py: (value, slope, slope_sum or None)
TABLE = {
    "kl": (kl_value, kl_slope, kl_slope_sum),
    "reverse_kl": (reverse_kl_value, reverse_kl_slope, reverse_kl_slope_sum),
    "mixed_kl": (mixed_kl_value, mixed_kl_slope, mixed_kl_slope_sum),
    "js": (js_value, js_slope, None),
    "skew_kl": (skew_kl_value, skew_kl_slope, None),
    "skew_reverse_kl": (skew_reverse_kl_value, skew_reverse_kl_slope, None),
    "tv": (tv_value, tv_slope, None),
    "hellinger": (hellinger_value, hellinger_slope, None),
    "alpha": (alpha_value, alpha_slope, None),
    "chi_square": (chi_square_value, chi_square_slope, None),
}


# ---- the close lines. Their functions have full precision for small arguments.


@triton.jit
def excess(x):
    """exp(x) - 1 - x"""
    series = 1 / 40320 * x + 1 / 5040
    series = series * x + 1 / 720
    series = series * x + 1 / 120
    series = series * x + 1 / 24
    series = series * x + 1 / 6
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - 1 - x)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + excess(x), tl.exp(x) - 1)


@triton.jit
def excess_of_log1p(x):
    """x - log(1 + x) for x > -1, with a minimax polynomial of degree 7 near 0."""
    y = -7.634506375e-2 * x + 1.276158839e-1
    y = y * x - 1.316018403e-1
    y = y * x + 1.420175582e-1
    y = y * x - 1.662335694e-1
    y = y * x + 2.000122666e-1
    y = y * x - 2.500081956e-1
    y = y * x + 3.333333135e-1
    return tl.where((x < 0.4) & (x > -0.29), x * x * (0.5 - x * y), x - tl.log(1 + x))


@triton.jit
def log1p(x):
    return tl.where((x < 0.4) & (x > -0.29), x - excess_of_log1p(x), tl.log(1 + x))


@triton.jit
def kl_close_value(d, p, q, _):
    return p * excess(d)


@triton.jit
def kl_close_slope(d, p, q, _):
    return p * expm1(d)


@triton.jit
def reverse_kl_close_value(d, p, q, _):
    return q * excess(-d)


@triton.jit
def reverse_kl_close_slope(d, p, q, _):
    return q * d


@triton.jit
def mixed_kl_close_value(d, p, q, weight):
    return weight * p * excess(d) + (1 - weight) * q * excess(-d)


@triton.jit
def mixed_kl_close_slope(d, p, q, weight):
    return weight * p * expm1(d) + (1 - weight) * q * d


@triton.jit
def js_close_value(d, p, q, beta):
    # m / p - 1 = (1 - beta) (exp(d) - 1),  m / q - 1 = beta (exp(-d) - 1)
    of_teacher = beta * p * excess_of_log1p((1 - beta) * expm1(d))
    return of_teacher + (1 - beta) * q * excess_of_log1p(beta * expm1(-d))


@triton.jit
def js_close_slope(d, p, q, beta):
    return (beta - 1) * q * log1p(beta * expm1(-d))


@triton.jit
def skew_kl_close_value(d, p, q, alpha):
    return p * excess_of_log1p((1 - alpha) * expm1(d))


@triton.jit
def skew_kl_close_slope(d, p, q, alpha):
    x = (1 - alpha) * expm1(d)  # m / p - 1
    return (1 - alpha) * q * (x / (1 + x))


@triton.jit
def skew_reverse_kl_close_value(d, p, q, alpha):
    return q * excess_of_log1p((1 - alpha) * expm1(-d))


@triton.jit
def skew_reverse_kl_close_slope(d, p, q, alpha):
    x = (1 - alpha) * expm1(-d)  # m / q - 1
    return q * (alpha * (x / (1 + x)) - log1p(x))


@triton.jit
def tv_close_value(d, p, q, _):
    return 0.5 * p * tl.abs(expm1(d))


@triton.jit
def tv_close_slope(d, p, q, _):
    return tl.where(d == 0, 0.0, tl.where(d > 0, 0.5 * q, -0.5 * q))


@triton.jit
def hellinger_close_value(d, p, q, _):
    x = expm1(0.5 * d)
    return 0.5 * p * x * x


@triton.jit
def hellinger_close_slope(d, p, q, _):
    return -0.5 * q * expm1(-0.5 * d)


@triton.jit
def alpha_close_value(d, p, q, alpha):
    # The two forms are equal. The first cancels near alpha = 1, the second near alpha = 0.
    of_student = q * (excess(-alpha * d) - alpha * excess(-d))
    of_teacher = p * (excess((1 - alpha) * d) - (1 - alpha) * excess(d))
    return tl.where(alpha < 0.5, of_student, of_teacher) / (alpha * (alpha - 1))


@triton.jit
def alpha_close_slope(d, p, q, alpha):
    return -q * expm1(-alpha * d) / alpha


@triton.jit
def chi_square_close_value(d, p, q, _):
    x = expm1(-d)
    return q * x * x


@triton.jit
def chi_square_close_slope(d, p, q, _):
    return -q * expm1(-2 * d)


@triton.jit
def close_terms(
    d, lp, lq, p, q, parameter,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, CLOSE_VALUE: tl.constexpr, CLOSE_SLOPE: tl.constexpr,
):  # fmt: skip
    """phi, psi and p (exp(d) - 1) of classes of a close row."""
    near = tl.abs(d) < 2
    close_phi = CLOSE_VALUE(d, p, q, parameter)
    close_psi = CLOSE_SLOPE(d, p, q, parameter)
    # A power of a large |alpha| overflows; the lines for all rows find it in log space.
    serves = near & (close_phi < float("inf")) & (tl.abs(close_psi) < float("inf"))
    phi = tl.where(serves, close_phi, VALUE(lp, lq, p, q, parameter))
    psi = tl.where(serves, close_psi, SLOPE(lp, lq, p, q, parameter))
    return phi, psi, tl.where(near, p * expm1(d), q - p)


# name: (value, slope) of the close lines. A divergence without them has `close_below` 0 in kdkernels/divergences.py.
CLOSE_TABLE = {
    "kl": (kl_close_value, kl_close_slope),
    "reverse_kl": (reverse_kl_close_value, reverse_kl_close_slope),
    "mixed_kl": (mixed_kl_close_value, mixed_kl_close_slope),
    "js": (js_close_value, js_close_slope),
    "skew_kl": (skew_kl_close_value, skew_kl_close_slope),
    "skew_reverse_kl": (skew_reverse_kl_close_value, skew_reverse_kl_close_slope),
    "tv": (tv_close_value, tv_close_slope),
    "hellinger": (hellinger_close_value, hellinger_close_slope),
    "alpha": (alpha_close_value, alpha_close_slope),
    "chi_square": (chi_square_close_value, chi_square_close_slope),
}
# Divergences whose value has a kink at p = q.
KINKED = ("tv",)
