"""The Sinkhorn family: the formulas of a plan and its gradients, and SinKD's two halves.

Problems are [problems, n, m] with masses a [problems, n] and b [problems, m]; potentials f and g are in units of the
cost::

    P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .options import RowOptions, bad_values_raise, fp64_device, slices
from .rows import softmaxes

COSTS = ("l1", "l2", "sqeuclidean", "dot")
GRADIENTS = ("unrolled", "implicit", "envelope")
# The costs that need the difference of each pair of rows in every class. The others are matrix products.
PAIRWISE = ("l1", "l2")
_RIDGE = 1e-10


class Sinkhorn(NamedTuple):
    """Problems of entropic transport, contiguous in one compute dtype."""

    cost: Tensor  # [problems, n, m]
    a: Tensor  # [problems, n]
    b: Tensor  # [problems, m]
    epsilon: Tensor  # [1]
    tolerance: Tensor  # [1]; 0: none
    iterations: int
    entropic: bool  # whether the value is the regularised value
    gradient: str  # one of GRADIENTS
    chunk_budget: int  # bytes for the implicit gradient's matrices

    def tracked(self) -> tuple[Tensor | None, ...]:
        return self[:3]

    @property
    def row_scale(self) -> None:
        return None  # every problem is computed


class Solution(NamedTuple):
    """The results of the iterations."""

    value: Tensor  # [problems]
    f: Tensor  # [problems, n], a potential
    g: Tensor  # [problems, m], a potential
    error: Tensor  # [problems], the relative error of the row sums
    iterations: Tensor  # [problems] int32, the rounds done


class Clouds(NamedTuple):
    """Rows of logits, [clouds, n, columns]; each student row of a cloud is compared with every teacher row of the
    cloud."""

    student: Tensor
    teacher: Tensor
    row_mass: Tensor  # [clouds, n]: 1, or 0 for a row that is dropped and never read
    temperature: Tensor  # [1]
    cost: str  # one of COSTS
    vocab_size: int


class SinkhornKD(NamedTuple):
    """Clouds of distributions and the transport between them."""

    clouds: Clouds
    epsilon: Tensor  # [1]
    iterations: int
    gradient: str  # one of GRADIENTS
    chunk_budget: int  # bytes for the columns of probabilities that one product takes

    def tracked(self) -> tuple[Tensor | None, ...]:
        return (self.clouds.student,)


def plan_of(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    masses = a[..., :, None] * b[..., None, :]
    return masses * _bounded((f[..., :, None] + g[..., None, :] - cost) / epsilon, masses, 80).exp()


def _bounded(exponents: Tensor, masses: Tensor, most: float) -> Tensor:
    """Clamps the exponents of pairs without mass to `most`: no sum bounds them, and 0 * inf would be NaN."""
    return torch.where(masses == 0, exponents.clamp_max(most), exponents)


def costs_times_plan(cost: Tensor, plan: Tensor) -> Tensor:
    """P C elementwise, and 0 if an infinite cost forbids a pair."""
    return plan * torch.where(torch.isposinf(cost), 0, cost)


def plan_gradient(problem: Sinkhorn, f: Tensor, g: Tensor, implicit: bool):
    """The gradients with respect to cost, a and b from the plan of the potentials f and g."""
    return implicit_gradient(problem, f, g) if implicit else envelope_gradient(problem, f, g)


def envelope_gradient(problem: Sinkhorn, f: Tensor, g: Tensor):
    """P, f and g: the gradient of the entropic value with the plan held fixed.

    The potentials are copied, since backward scales a gradient in place.
    """
    return plan_of(*problem[:3], f, g, problem.epsilon), f.clone(), g.clone()


def implicit_gradient(problem: Sinkhorn, f: Tensor, g: Tensor):
    """The gradient of <P, C> at convergence: P (1 - (C - x - y) / epsilon), x and y.

    x and y solve the symmetric system of the marginals' derivatives,

        [diag(r) P; P^T diag(c)] [x; y] = [(P C) 1; (P C)^T 1],        r = P 1, c = P^T 1

    The code solves it by the Schur complement in y, which is diag(c) times (the identity minus two Sinkhorn
    half-steps). The complement is singular along y = 1; adding c c^T / sum(c) makes it regular. The solve is in fp64,
    since the distance of P's second eigenvalue from 1 divides P's rounding error. A point without mass gets the x or y
    that its neighbours give it.
    """
    cost, (problems, n, m) = problem.cost, problem.cost.shape
    *inputs, epsilon = (x.to(fp64_device(cost.device)) for x in (*problem[:3], f, g, problem.epsilon))
    # About eight fp64 matrices of a problem exist at once.
    chunks = [
        _implicit_of_chunk(*(x[chunk].double() for x in inputs), epsilon.double())
        for chunk in slices(max(problems, 1), 64 * n * m, problem.chunk_budget)
    ]
    return tuple(torch.cat(x).to(cost.dtype).to(cost.device) for x in zip(*chunks, strict=True))


def _implicit_of_chunk(cost, a, b, f, g, epsilon):
    masses = a[:, :, None] * b[:, None, :]
    weights = _bounded((f[:, :, None] + g[:, None, :] - cost) / epsilon, masses, 600).exp()  # P without the masses
    plan = masses * weights
    c = plan.sum(1)
    # The shares of each row's mass in the columns, and of each column's mass in the rows, also for points without mass.
    row_shares = _normalized(b[:, None, :] * weights, 2)
    column_shares = _normalized(a[:, :, None] * weights, 1)
    finite = torch.where(torch.isposinf(cost), 0, cost)
    x_alone = (row_shares * finite).sum(2)
    rhs = (plan * finite).sum(1) - torch.einsum("pij,pi->pj", plan, x_alone)

    total = c.sum(1)[:, None, None].clamp_min(torch.finfo(c.dtype).tiny)
    schur = torch.diag_embed(torch.where(c == 0, 1, c * (1 + _RIDGE))) - plan.transpose(1, 2) @ row_shares
    schur = schur + c[:, :, None] * c[:, None, :] / total
    factor, _ = torch.linalg.cholesky_ex(schur)
    y = torch.cholesky_solve(rhs[..., None], factor)[..., 0]
    x = x_alone - torch.einsum("pij,pj->pi", row_shares, y)
    y = torch.where(b == 0, (column_shares * (finite - x[:, :, None])).sum(1), y)
    return plan * (1 - (finite - x[:, :, None] - y[:, None, :]) / epsilon), x, y


def _normalized(x: Tensor, dim: int) -> Tensor:
    total = x.sum(dim, keepdim=True)
    return torch.where(total == 0, 0, x / total)


def check_problems(cost: Tensor, a: Tensor, b: Tensor):
    """Raises ValueError for invalid costs or masses. Reads values: a synchronisation on a GPU."""
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
            f"a and b: expected equal sums to 1e-4 (masses normalised in 16 bits differ); got {a[at].sum().item()} "
            f"and {b[at].sum().item()} in problem {at}"
        )


def _differ(mass_a: Tensor, mass_b: Tensor) -> Tensor:
    return ~((mass_a - mass_b).abs() <= 1e-4 * mass_a)


def checked_sinkhorn(kernels, problem: Sinkhorn, wanted: list[bool]):
    """Value, gradients and solution: `ops.sinkhorn`. Bad values raise if `bad_values_raise`, else they make their
    problem NaN."""
    if bad_values_raise(problem.cost.device):
        check_problems(*problem[:3])
    else:
        a, b = problem.a, problem.b
        a = torch.where(_differ(a.sum(1), b.sum(1))[:, None] | ~(a >= 0), torch.nan, a)
        problem = problem._replace(a=a, b=torch.where(b >= 0, b, torch.nan))
    solution, gradients = sinkhorn(kernels, problem, any(wanted))
    return solution.value, *gradients, *solution[1:]


def sinkhorn(kernels, problem: Sinkhorn, wanted: bool) -> tuple[Solution, tuple[Tensor, ...]]:
    """A backend's solution, and the gradients with respect to cost, a and b (of shape [0] if not wanted)."""
    if wanted and problem.gradient == "unrolled":
        results = kernels.sinkhorn(problem, True)
        return Solution(*results[:5]), results[5:]
    solution = Solution(*kernels.sinkhorn(problem, False)[:5])
    if not wanted:
        return solution, tuple(problem.cost.new_empty(0) for _ in range(3))
    implicit = problem.gradient == "implicit" and not problem.entropic
    return solution, kernels.plan_gradient(problem, solution.f, solution.g, implicit)


class Floats(NamedTuple):
    """The maximum of each row of logits and the log-sum of its exponentials at the temperature: [clouds, n]."""

    student_max: Tensor
    student_log_sum: Tensor
    teacher_max: Tensor
    teacher_log_sum: Tensor


def sinkhorn_kd(kernels, problem: SinkhornKD, wanted: list[bool]):
    """Losses [clouds] and the tensors that `sinkhorn_kd_gradient` needs.

    These are the gradient of the costs [clouds, n, n], the sums of its products with the costs' moments [clouds, n],
    and the rows' floats [4, clouds, n].
    """
    clouds, wanted = problem.clouds, any(wanted)
    row_mass, shape = clouds.row_mass, clouds.row_mass.shape
    options = RowOptions(row_mass.view(-1), clouds.temperature)
    rows = softmaxes(clouds.student, clouds.teacher, options, clouds.vocab_size)
    floats = kernels.row_floats(rows)[:4].view(4, *shape)
    if clouds.cost in PAIRWISE:
        pairs, moments = kernels.pairwise_costs(clouds, floats, wanted)
    else:
        pairs, moments = product_costs(clouds, Floats(*floats), problem.chunk_budget)
    transport = Sinkhorn(
        pairs,
        row_mass,
        row_mass,
        problem.epsilon,
        torch.zeros_like(problem.epsilon),
        problem.iterations,
        False,
        problem.gradient,
        problem.chunk_budget,
    )
    solution, (grad_costs, _, _) = sinkhorn(kernels, transport, wanted)
    if not wanted:
        return solution.value, pairs.new_empty(0), pairs.new_empty(0), floats
    dot = (grad_costs * moments).sum(2)
    if clouds.cost == "l2":  # its derivative is the difference divided by the cost
        grad_costs = torch.where(pairs == 0, 0, grad_costs / pairs)
    return solution.value, grad_costs, dot, floats


def sinkhorn_kd_gradient(kernels, problem: SinkhornKD, grad_costs: Tensor, dot: Tensor, floats: Tensor):
    """The gradient of the student's logits: (p / T) (g - sum p g), g = sum_j grad_costs_ij d C_ij / d p_i."""
    clouds = problem.clouds
    if clouds.cost in PAIRWISE:
        return kernels.pairwise_gradient(clouds, floats, grad_costs, dot)
    return product_gradient(kernels, clouds, Floats(*floats), grad_costs, dot, problem.chunk_budget)


def _probabilities(clouds: Clouds, floats: Floats, budget: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(columns, the student's and the teacher's probabilities in these columns), 0 in dropped rows.

    Three tensors of a chunk's columns fit the budget: the two and one of the caller, who may overwrite all.
    """
    row_mass = clouds.row_mass

    def probabilities(logits: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
        x = logits.to(row_mass.dtype, copy=True).sub_(maximum[..., None])
        return x.div_(clouds.temperature).sub_(log_sum[..., None]).exp_().masked_fill_(row_mass[..., None] == 0, 0)

    column_bytes = 3 * row_mass.dtype.itemsize * max(row_mass.numel(), 1)
    for columns in slices(clouds.vocab_size, column_bytes, budget):
        yield (
            columns,
            probabilities(clouds.student[..., columns], floats.student_max, floats.student_log_sum),
            probabilities(clouds.teacher[..., columns], floats.teacher_max, floats.teacher_log_sum),
        )


def product_costs(clouds: Clouds, floats: Floats, budget: int):
    """Costs from products of probabilities, and their moments sum_v p_iv d C_ij / d p_iv.

    "dot": 1 - <p, q>. "sqeuclidean": |p - q|^2 = |p|^2 + |q|^2 - 2 <p, q>, exact up to the rounding of its terms, which
    are at most 1.
    """
    row_mass, (count, n) = clouds.row_mass, clouds.row_mass.shape
    products = row_mass.new_zeros(count, n, n)
    p_squares, q_squares = row_mass.new_zeros(count, n, 1), row_mass.new_zeros(count, 1, n)
    for _, p, q in _probabilities(clouds, floats, budget):
        products += p @ q.transpose(1, 2)
        if clouds.cost == "sqeuclidean":
            p_squares += p.square_().sum(2, keepdim=True)
            q_squares += q.square_().sum(2)[:, None]
        del p, q  # before the next chunk's are made
    if clouds.cost == "dot":
        costs, moments = 1 - products, -products
    else:
        costs, moments = (p_squares + q_squares - 2 * products).clamp_min(0), 2 * (p_squares - products)
    pairs = (row_mass[:, :, None] != 0) & (row_mass[:, None, :] != 0)
    return torch.where(pairs, costs, 0), torch.where(pairs, moments, 0)


def product_gradient(kernels, clouds: Clouds, floats: Floats, grad_costs: Tensor, dot: Tensor, budget: int):
    student, row_mass = clouds.student, clouds.row_mass
    gradient = kernels.empty(*student.shape, dtype=student.dtype, device=student.device)
    gradient[..., clouds.vocab_size :] = 0
    row_sums, dropped = grad_costs.sum(2)[..., None], row_mass[..., None] == 0
    for columns, p, q in _probabilities(clouds, floats, budget):
        g = grad_costs @ q
        if clouds.cost == "dot":
            g.neg_()
        else:
            torch.mul(row_sums, p, out=q).sub_(g)
            g.copy_(q).mul_(2)
        slope = g.sub_(dot[..., None]).mul_(p).div_(clouds.temperature)
        gradient[..., columns] = slope.masked_fill_(dropped, 0)
        del p, q, g, slope  # before the next chunk's are made
    return gradient
