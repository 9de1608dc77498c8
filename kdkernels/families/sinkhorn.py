"""What every backend of the transport losses shares: the formulas of a plan and its gradients, and SinKD's two halves.

Problems are [problems, n, m] with masses a [problems, n] and b [problems, m]; potentials f and g are in units of the
cost::

    P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import linear
from .options import bad_values_raise

COSTS = ("l1", "l2", "sqeuclidean", "dot")
GRADIENTS = ("unrolled", "implicit", "envelope")
# Costs of pairs of rows that need each pair's difference class by class; the others are products of matrices.
PAIRWISE = ("l1", "l2")
_RIDGE = 1e-10


class Sinkhorn(NamedTuple):
    """value [problems], potentials f [problems, n] and g [problems, m], the rows' error and the iterations done."""

    value: Tensor
    f: Tensor
    g: Tensor
    error: Tensor
    iterations: Tensor


# ---- a plan and its gradients


def plan_of(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    masses = a[..., :, None] * b[..., None, :]
    return masses * _bounded((f[..., :, None] + g[..., None, :] - cost) / epsilon, masses, 80).exp()


def _bounded(exponents: Tensor, masses: Tensor, most: float) -> Tensor:
    """Exponents of pairs without mass end at `most`: no sum bounds them, and 0 * inf would be NaN."""
    return torch.where(masses == 0, exponents.clamp_max(most), exponents)


def costs_times_plan(cost: Tensor, plan: Tensor) -> Tensor:
    """P C, and 0 where an infinite cost forbids a pair."""
    return plan * torch.where(torch.isposinf(cost), 0, cost)


def envelope_gradient(cost, a, b, f, g, epsilon):
    """Of the entropic value, the plan held fixed: P, f and g, with respect to cost, a and b. Copies of the potentials:
    backward scales a derivative in place."""
    return plan_of(cost, a, b, f, g, epsilon), f.clone(), g.clone()


def plan_gradient(cost, a, b, f, g, epsilon, implicit: bool):
    return (implicit_gradient if implicit else envelope_gradient)(cost, a, b, f, g, epsilon)


def implicit_gradient(cost, a, b, f, g, epsilon):
    """Of <P, C> where the rounds have converged, with respect to cost, a and b: P (1 - (C - x - y) / epsilon), x, y.

    x and y solve the symmetric system of the marginals' derivatives,

        [diag(r) P; P^T diag(c)] [x; y] = [(P C) 1; (P C)^T 1],        r = P 1, c = P^T 1

    here by its Schur complement in y, which is diag(c) times the identity less two Sinkhorn half-steps. It is singular
    for y = 1, which c c^T / sum(c) mends; the system is solved in fp64, since P's own rounding would be divided by the
    distance of its second eigenvalue from 1. A point without mass takes the x or y that its neighbours give it.
    """
    dtype = cost.dtype
    found = [_implicit_of_chunk(*chunk, epsilon.double()) for chunk in _chunks(cost, a, b, f, g)]
    return tuple(torch.cat(x).to(dtype) for x in zip(*found, strict=True))


def _chunks(cost, *others):
    """Some problems at a time, in fp64: some eight matrices of each are there at once."""
    size = max(linear.current_budget() // (64 * cost.shape[1] * cost.shape[2]), 1)
    for first in range(0, max(cost.shape[0], 1), size):
        chunk = slice(first, first + size)
        yield [cost[chunk].double(), *(x[chunk].double() for x in others)]


def _implicit_of_chunk(cost, a, b, f, g, epsilon):
    masses = a[:, :, None] * b[:, None, :]
    weights = _bounded((f[:, :, None] + g[:, None, :] - cost) / epsilon, masses, 600).exp()  # P without the masses
    plan = masses * weights
    c = plan.sum(1)
    # How a row's mass is spread over columns, and a column's over rows, also where there is none.
    of_rows = _normalized(b[:, None, :] * weights, 2)
    of_columns = _normalized(a[:, :, None] * weights, 1)
    finite = torch.where(torch.isposinf(cost), 0, cost)
    x_alone = (of_rows * finite).sum(2)
    rhs = (plan * finite).sum(1) - torch.einsum("pij,pi->pj", plan, x_alone)

    total = c.sum(1)[:, None, None].clamp_min(torch.finfo(c.dtype).tiny)
    schur = torch.diag_embed(torch.where(c == 0, 1, c * (1 + _RIDGE))) - plan.transpose(1, 2) @ of_rows
    schur = schur + c[:, :, None] * c[:, None, :] / total
    factor, _ = torch.linalg.cholesky_ex(schur)
    y = torch.cholesky_solve(rhs[..., None], factor)[..., 0]
    x = x_alone - torch.einsum("pij,pj->pi", of_rows, y)
    y = torch.where(b == 0, (of_columns * (finite - x[:, :, None])).sum(1), y)
    return plan * (1 - (finite - x[:, :, None] - y[:, None, :]) / epsilon), x, y


def _normalized(x: Tensor, dim: int) -> Tensor:
    total = x.sum(dim, keepdim=True)
    return torch.where(total == 0, 0, x / total)


def check_problems(cost: Tensor, a: Tensor, b: Tensor):
    """Raises ValueError for values that no problem has. Reads them: a synchronisation on a GPU."""
    bad = torch.isnan(cost) | torch.isneginf(cost)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"cost: expected numbers, or inf for a forbidden pair; got {cost[tuple(at)].item()} at {at}")
    for name, x in (("a", a), ("b", b)):
        bad = ~((x >= 0) & (x < torch.inf))
        if bad.any():
            at = bad.nonzero()[0].tolist()
            raise ValueError(f"{name}: expected masses, finite and not negative; got {x[tuple(at)].item()} at {at}")
    bad = _differ(a.sum(1), b.sum(1))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"a and b: expected equal sums (to 1e-4: masses normalised in 16 bits are not); got {a[at].sum().item()} "
            f"and {b[at].sum().item()} in problem {at}"
        )


def _differ(mass_a: Tensor, mass_b: Tensor) -> Tensor:
    return ~((mass_a - mass_b).abs() <= 1e-4 * mass_a)


def checked_sinkhorn(kernels, cost, a, b, *others):
    """On a CPU bad values raise; elsewhere, unless checks are on, they make their problem NaN."""
    if bad_values_raise(cost.device):
        check_problems(cost, a, b)
    else:
        a = torch.where(_differ(a.sum(1), b.sum(1))[:, None] | ~(a >= 0), torch.nan, a)
        b = torch.where(b >= 0, b, torch.nan)
    return sinkhorn(kernels, cost, a, b, *others)


def sinkhorn(kernels, cost, a, b, epsilon, tolerance, iterations: int, entropic: bool, gradient: str | None):
    """A backend's Sinkhorn, and the gradients with respect to cost, a and b: of shape [0] where none is named."""
    if gradient == "unrolled":
        return kernels.sinkhorn(cost, a, b, epsilon, tolerance, iterations, entropic, True)
    *found, _, _, _ = kernels.sinkhorn(cost, a, b, epsilon, tolerance, iterations, entropic, False)
    if gradient is None:
        return *found, *(cost.new_empty(0) for _ in range(3))
    formula = getattr(kernels, "plan_gradient", plan_gradient)
    return *found, *formula(cost, a, b, found[1], found[2], epsilon, gradient == "implicit" and not entropic)


# ---- SinKD: costs between the rows of clouds [clouds, n, columns], and back to their logits


class Floats(NamedTuple):
    """Of each row of logits its maximum and the log-sum of its exponentials at the temperature: [clouds, n]."""

    student_max: Tensor
    student_log_sum: Tensor
    teacher_max: Tensor
    teacher_log_sum: Tensor


def sinkhorn_kd(kernels, student, teacher, kept, temperature, epsilon, iterations: int, cost: str,
                gradient: str | None, vocab_size: int):  # fmt: skip
    """Losses [clouds], and what the gradient of the logits is made of (`sinkhorn_kd_gradient`): the gradient of the
    cost [clouds, n, n], its products with the costs' moments [clouds, n], and the rows' floats [4, clouds, n]."""
    wanted = gradient is not None
    clouds, n = kept.shape
    floats = kernels.row_floats(student, teacher, kept.view(-1), temperature, vocab_size)[:4].view(4, clouds, n)
    if cost in PAIRWISE:
        pairs, moments = kernels.pairwise_costs(student, teacher, kept, temperature, floats, cost, vocab_size, wanted)
    else:
        pairs, moments = product_costs(student, teacher, kept, temperature, Floats(*floats), cost, vocab_size)
    no_tolerance = torch.zeros_like(epsilon)
    found = sinkhorn(kernels, pairs, kept, kept, epsilon, no_tolerance, iterations, False, gradient)
    if not wanted:
        return found[0], pairs.new_empty(0), pairs.new_empty(0), floats
    of_pairs = found[5]
    dot = (of_pairs * moments).sum(2)
    if cost == "l2":  # whose derivative is the difference over the cost
        of_pairs = torch.where(pairs == 0, 0, of_pairs / pairs)
    return found[0], of_pairs, dot, floats


def sinkhorn_kd_gradient(kernels, student, teacher, kept, temperature, of_pairs, dot, floats, cost: str,
                         vocab_size: int):  # fmt: skip
    """The gradient of student logits: (p / T) (g - sum p g), g = sum_j of_pairs_ij d C_ij / d p_i."""
    if cost in PAIRWISE:
        return kernels.pairwise_gradient(student, teacher, kept, temperature, of_pairs, dot, floats, cost, vocab_size)
    return product_gradient(
        kernels, student, teacher, kept, temperature, of_pairs, dot, Floats(*floats), cost, vocab_size
    )


def probabilities(logits, kept, temperature, maximum, log_sum, first: int, end: int) -> Tensor:
    """Of some columns of [clouds, n, columns], in the compute dtype; 0 in rows that are dropped."""
    x = logits[..., first:end].to(kept.dtype) - maximum[..., None]
    return torch.where(kept[..., None] == 0, 0, torch.exp(x / temperature - log_sum[..., None]))


def _column_chunks(student: Tensor, kept: Tensor, vocab_size: int):
    """So many columns at a time that four tensors of them are within the budget."""
    size = max(linear.current_budget() // (4 * kept.dtype.itemsize * max(kept.numel(), 1)), 1)
    for first in range(0, vocab_size, size):
        yield first, min(first + size, vocab_size)


def product_costs(student, teacher, kept, temperature, floats: Floats, cost: str, vocab_size: int):
    """Costs out of products of probabilities, and their moments sum_v p_iv d C_ij / d p_iv.

    "dot": 1 - <p, q>. "sqeuclidean": |p - q|^2 = |p|^2 + |q|^2 - 2 <p, q>, right to the rounding of its terms, which
    are at most 1.
    """
    clouds, n = kept.shape
    products = kept.new_zeros(clouds, n, n)
    p_squares, q_squares = kept.new_zeros(clouds, n, 1), kept.new_zeros(clouds, 1, n)
    for first, end in _column_chunks(student, kept, vocab_size):
        p = probabilities(student, kept, temperature, floats.student_max, floats.student_log_sum, first, end)
        q = probabilities(teacher, kept, temperature, floats.teacher_max, floats.teacher_log_sum, first, end)
        products += p @ q.transpose(1, 2)
        if cost == "sqeuclidean":
            p_squares += (p * p).sum(2, keepdim=True)
            q_squares += (q * q).sum(2)[:, None]
    if cost == "dot":
        costs, moments = 1 - products, -products
    else:
        costs, moments = (p_squares + q_squares - 2 * products).clamp_min(0), 2 * (p_squares - products)
    pairs = (kept[:, :, None] != 0) & (kept[:, None, :] != 0)
    return torch.where(pairs, costs, 0), torch.where(pairs, moments, 0)


def product_gradient(kernels, student, teacher, kept, temperature, of_pairs, dot, floats: Floats, cost: str,
                     vocab_size: int):  # fmt: skip
    gradient = kernels.empty(*student.shape, dtype=student.dtype, device=student.device)
    gradient[..., vocab_size:] = 0
    of_rows = of_pairs.sum(2)[..., None]
    for first, end in _column_chunks(student, kept, vocab_size):
        p = probabilities(student, kept, temperature, floats.student_max, floats.student_log_sum, first, end)
        q = probabilities(teacher, kept, temperature, floats.teacher_max, floats.teacher_log_sum, first, end)
        g = -(of_pairs @ q) if cost == "dot" else 2 * (of_rows * p - of_pairs @ q)
        gradient[..., first:end] = torch.where(kept[..., None] == 0, 0, p * (g - dot[..., None]) / temperature)
    return gradient
