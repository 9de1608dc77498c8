"""Optimal transport: Sinkhorn's iterations for batches of problems, the Sinkhorn divergence, and SinKD."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .. import backends
from ..autograd import SINKHORN, SINKHORN_KD, run
from ..families import sinkhorn as transport
from ..families.budget import current_budget
from ..families.options import compute_dtype
from ..families.sinkhorn import Clouds, Sinkhorn, SinkhornKD, Solution
from . import options
from .signatures import check_keywords, shows_keywords

VALUES = ("transport", "entropic")


@dataclass(frozen=True, eq=False)
class SinkhornOutput:
    """The result of `fused_sinkhorn`, in the problems' leading shape. Everything but the value is detached.

    Attributes:
        value: [...], differentiable.
        f: [..., n] and
        g: [..., m], the potentials of the entropic problem, in units of the cost. Only f_i + g_j is determined.
        error: [...], sum_i |sum_j P_ij - a_i| / sum a: the distance of the row sums from their masses. Each round
            scales the columns last, so the column sums are right but for rounding.
        iterations: [...] int32, the rounds done.
        converged: [...] bool, whether the error is at most the tolerance. None without a tolerance.
        plan: [..., n, m] if the call asked for it, else None.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    error: Tensor
    iterations: Tensor
    converged: Tensor | None
    plan: Tensor | None


@shows_keywords()
def fused_sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    iterations: int = 100,
    tolerance: float | Tensor | None = None,
    value: str = "transport",
    gradient: str = "implicit",
    plan: bool = False,
    backend: str = "auto",
    **unknown: NoReturn,
) -> SinkhornOutput:
    """Entropic optimal transport of many problems at once, by Sinkhorn's iterations, with gradients of cost and masses.

    For masses a and b and costs C, the plan minimises <P, C> + epsilon KL(P | a (x) b) over plans with these marginals,
    where KL(P | a (x) b) = sum P log(P / (a b)) - P + a b. It is

        P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)

    Starting from g = 0, each iteration updates rows first, with log-sum-exps weighted by the masses:

        f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)
        g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon)

    Args:
        cost: C [..., n, m], fp32, bf16, fp16 or fp64; leading dimensions are problems. inf forbids a pair.
        a: [..., n], masses that are not negative; the leading shape broadcasts. None: 1 / n each.
        b: [..., m], with the same sum as a (to 1e-4 of the sum: normalise in fp32, not in 16 bits). None: 1 / m each.
        epsilon: > 0, a number or a 0-d tensor, in the unit of the cost.
        iterations: the number of rounds, at least 1; with a tolerance, the largest number of rounds.
        tolerance: a problem stops when its error is at most the tolerance. `error` and `converged` in the result say
            how far each problem got.
        value: "transport" is <P, C>; "entropic" the regularised minimum <P, C> + epsilon KL(P | a (x) b), computed as
            its dual <a, f> + <b, g> - epsilon (sum P - sum a sum b), which is never above the minimum.
        gradient: chooses the derivatives with respect to cost, a and b.
            "implicit": the derivatives of the value at convergence, by the implicit function theorem at the plan that
            the rounds reached. They are right if the rounds have converged. For "entropic" they equal "envelope".
            "unrolled": the exact derivatives of the value that these rounds give, however few they are.
            "envelope": the derivatives of the entropic value with the plan held fixed, for both values: P, f and g.
            Derivatives with respect to a and b apply to changes that keep the sums equal: they are determined up to a
            constant (one constant for each block of points that finite costs connect).
        plan: whether the result has P. Otherwise P is not stored.
        backend: "auto" or one of "cpu" (C++), "cuda" (CUDA C++; at most 2,048 points a side, and 1,254 where a block
            has 99 KiB of shared memory), "triton" (at most 1,024), "reference" (PyTorch, in the log domain).

    Returns:
        SinkhornOutput. All numbers are fp32, or fp64 if cost is fp64. Each gradient has the dtype of its tensor.

    Rounding in fp32: exponents carry the rounding of (max C - min C) / epsilon, and "entropic" carries the rounding of
    terms of size epsilon.

    A point without mass contributes to no sum, but has a potential and a finite gradient. A point with mass makes its
    problem NaN if no finite cost connects it to mass on the other side.

    Raises:
        TypeError, ValueError: for arguments that do not fit. NaN and -inf in cost, negative masses and unequal sums
            raise on a CPU; on a GPU they make their problem NaN, unless `kdkernels.checks(True)` is set.
        RuntimeError: if the backend cannot serve the call, with the reason; in backward, for second derivatives outside
            backend="reference" with gradient="unrolled".

    The masses and KL are those of GeomLoss and OTT-JAX, and "entropic" gives their regularised values. It also gives
    POT's value for its regularisation "KL"; POT's "entropy" has sum P log P in place of KL. Source: arXiv:1306.0895;
    the unrolled and implicit derivatives follow from the formulas above.
    """
    check_keywords(fused_sinkhorn, unknown)
    _check_cost("cost", cost)
    options.check_choice("value", value, VALUES)
    options.check_choice("gradient", gradient, transport.GRADIENTS)
    options.check_type("plan", plan, bool)
    options.check_int("iterations", iterations, 1)
    dtype, device = compute_dtype(cost, cost), cost.device
    leading, (n, m) = cost.shape[:-2], cost.shape[-2:]
    epsilon = options.positive_number("epsilon", epsilon, device, dtype)
    # The tolerance is a tensor even if none is given, so that giving one later does not recompile.
    limit = torch.zeros(1, dtype=dtype, device=device)
    if tolerance is not None:
        limit = options.positive_number("tolerance", tolerance, device, dtype)
    a, b = (_masses(name, x, leading, size, device, dtype) for name, x, size in (("a", a, n), ("b", b, m)))
    backend = backends.select(backend, cost, cost, max(n, m))
    problems = cost.to(dtype).reshape(-1, n, m).contiguous()
    # A large common part of the costs would cancel digits, so it is subtracted. P stays the same, f shrinks by the
    # common part, and the value by the common part times the mass. That product has no derivative here: its derivative
    # with respect to b is one constant, which the derivatives of b leave undetermined.
    common = problems.detach().where(torch.isfinite(problems.detach()), torch.inf).amin((1, 2))
    common = torch.where(torch.isfinite(common), common, 0)
    problems = problems - common[:, None, None]
    entropic, budget = value == "entropic", current_budget(device)
    problem = Sinkhorn(problems, a, b, epsilon, limit, iterations, entropic, gradient, budget)
    solution = Solution(*run(SINKHORN, problem, backend, "forward"))
    with torch.no_grad():
        plans = transport.plan_of(problems, a, b, solution.f, solution.g, epsilon).view(cost.shape) if plan else None
        f = solution.f + common[:, None]
    converged = None if tolerance is None else (solution.error <= limit).view(leading)
    return SinkhornOutput(
        (solution.value + common * b.detach().sum(1)).view(leading),
        f.view(*leading, n),
        solution.g.view(*leading, m),
        solution.error.view(leading),
        solution.iterations.view(leading),
        converged,
        plans,
    )


@shows_keywords()
def fused_sinkhorn_divergence(
    cost_xy: Tensor,
    cost_xx: Tensor,
    cost_yy: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    iterations: int = 100,
    tolerance: float | Tensor | None = None,
    gradient: str = "implicit",
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """The debiased Sinkhorn divergence W(x, y) - W(x, x) / 2 - W(y, y) / 2 of entropic values W.

    It is 0 between equal clouds, where W is not 0. It is positive between other clouds if exp(-C / epsilon) is a
    positive definite kernel. Euclidean distances, squared or not, and L1 distances give such kernels; an arbitrary cost
    matrix may not. To train x, pass cost_xy = C(x, y) and cost_xx = C(x, x) with their graph.

    Args:
        cost_xy: [..., n, m], cost_xx: [..., n, n], cost_yy: [..., m, m], with one leading shape.
        a, b: masses of x [..., n] and y [..., m].
        epsilon, iterations, tolerance, gradient, backend: as in `fused_sinkhorn`, for each of the three problems.

    Returns:
        [...], fp32 or fp64. With a tolerance, a problem that does not reach it makes its divergence NaN: half a
        difference of values that have not converged may have any sign. `fused_sinkhorn` gives the error of each
        problem.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_sinkhorn`.

    Source: arXiv:1810.08278.
    """
    check_keywords(fused_sinkhorn_divergence, unknown)
    for name, x in (("cost_xy", cost_xy), ("cost_xx", cost_xx), ("cost_yy", cost_yy)):
        _check_cost(name, x)
    leading, (n, m) = cost_xy.shape[:-2], cost_xy.shape[-2:]
    if cost_xx.shape != (*leading, n, n) or cost_yy.shape != (*leading, m, m):
        raise ValueError(
            f"cost_xx and cost_yy: expected {[*leading, n, n]} and {[*leading, m, m]} with cost_xy "
            f"{list(cost_xy.shape)}; got {list(cost_xx.shape)} and {list(cost_yy.shape)}"
        )

    def entropic(cost, a, b):
        out = fused_sinkhorn(
            cost,
            a,
            b,
            epsilon=epsilon,
            iterations=iterations,
            tolerance=tolerance,
            value="entropic",
            gradient=gradient,
            backend=backend,
        )
        return out.value if tolerance is None else torch.where(out.converged, out.value, torch.nan)

    return entropic(cost_xy, a, b) - 0.5 * entropic(cost_xx, a, a) - 0.5 * entropic(cost_yy, b, b)


@shows_keywords()
def fused_sinkhorn_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 2.0,
    epsilon: float | Tensor = 0.1,
    iterations: int = 20,
    cost: str = "l1",
    gradient: str = "unrolled",
    mask: Tensor | None = None,
    reduction: str = "sum",
    vocab_size: int | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """SinKD: the cost of transporting a batch's student distributions to its teacher distributions.

    The rows of one batch form a cloud. Let p_i = softmax(student_i / T), q_j = softmax(teacher_j / T), and C_ij a cost
    between them. The rounds of `fused_sinkhorn`, with a mass of 1 per row (not 1 / B), give a plan P, and

        loss of the cloud = sum_ij P_ij C_ij

    The loss compares every student row with every teacher row: a plan with all its mass on the diagonal sends each row
    to its own teacher row. One sweep over the logits computes their log-sum-exps, a second sweep the costs, and a third
    the gradient; no [B, B, V] differences are stored. No factor of T multiplies the loss, so its gradient shrinks as T
    grows. A student that equals its teacher has neither loss 0 nor gradient 0: that is the entropic bias, which
    `fused_sinkhorn_divergence` removes.

    Args:
        student: logits [..., B, V], fp32, bf16, fp16 or fp64. Leading dimensions are separate clouds. Gets the
            gradient. A `LinearLogits` is refused.
        teacher: logits [..., B, V]; the dtype may differ. Must not require grad. A `LinearLogits` or a `SparseLogProbs`
            is refused.
        temperature: T > 0, a number or a 0-d tensor. Divides both sides' logits.
        epsilon: > 0, a number or a 0-d tensor, in the unit of the cost.
        iterations: the number of rounds, at least 1; rows first.
        cost: "l1": sum_v |p_v - q_v| (SinKD's; at most 2). "l2": sqrt(sum_v (p_v - q_v)^2). "sqeuclidean":
            sum_v (p_v - q_v)^2. "dot": 1 - sum_v p_v q_v.
        gradient: "unrolled" is exact for these rounds; autograd computes it in SinKD's own code. "implicit"
            differentiates the converged plan. "envelope" holds the plan fixed. As in `fused_sinkhorn`.
        mask: bool [..., B]; rows that are False belong to no cloud, on both sides, and may hold anything.
        reduction: "sum" of the clouds' losses; "mean" over the clouds that have a row; "none": [...].
        vocab_size: the number of classes that count. Columns past it are padding in either tensor, with gradient 0.
        backend: as in `fused_divergence`.

    Returns:
        The loss in fp32 (fp64 if a side is fp64). The gradient has the student's dtype. A cloud without rows has loss 0
        and gradient 0. A NaN, or a row of -inf alone, makes its cloud NaN.

    Memory besides the gradient: some matrices [B, B] per cloud. "sqeuclidean" and "dot" also take the probabilities of
    some columns at a time, within `kdkernels.chunk_budget`. Backward reads the logits again, so neither side may change
    before it.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_divergence`.

    Source: arXiv:2402.17110; mass, rounds and "unrolled" are those of its code.
    """
    check_keywords(fused_sinkhorn_kd, unknown)
    sides = {"student": student, "teacher": teacher}
    for name, x in sides.items():
        options.check_is_tensor(name, x)
    vocab_size = options.check_logits(student, teacher, vocab_size)
    for name, x in sides.items():
        if x.dim() < 2:
            raise ValueError(f"{name}: expected logits of shape [..., B, vocabulary]; got {list(x.shape)}")
    options.check_choice("cost", cost, transport.COSTS)
    options.check_choice("gradient", gradient, transport.GRADIENTS)
    options.check_choice("reduction", reduction, options.REDUCTIONS)
    options.check_int("iterations", iterations, 1)
    dtype, device, leading = compute_dtype(student, teacher), student.device, student.shape[:-2]
    temperature = options.positive_number("temperature", temperature, device, dtype)
    epsilon = options.positive_number("epsilon", epsilon, device, dtype)
    if mask is not None:
        options.check_per_row("mask", mask, student.shape[:-1], device, torch.bool)
    backend = backends.select(backend, student, teacher, student.shape[-2])

    rows = student.shape[-2]
    row_mass = torch.ones(leading.numel(), rows, dtype=dtype, device=device)
    if mask is not None:
        row_mass = torch.where(mask.reshape(row_mass.shape), row_mass, 0)
    views = [x.reshape(leading.numel(), rows, x.shape[-1]) for x in (student, teacher)]
    clouds = Clouds(*views, row_mass, temperature, cost, vocab_size)
    problem = SinkhornKD(clouds, epsilon, iterations, gradient, current_budget(student.device))
    (loss,) = run(SINKHORN_KD, problem, backend, "backward", reduce=reduction != "none")
    if reduction == "none":
        return loss.view(leading)
    if reduction == "sum":
        return loss
    with_rows = (row_mass != 0).any(1).sum()
    return loss / with_rows.clamp_min(1)


def _check_cost(name: str, cost: Tensor):
    options.check_dense(name, cost)
    options.check_has_data(name, cost)
    if cost.dim() < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"{name}: expected costs of shape [..., n, m], n and m at least 1; got {list(cost.shape)}")


def _masses(name: str, x: Tensor | None, leading, size: int, device, dtype) -> Tensor:
    """The masses as [problems, size], contiguous, in the compute dtype."""
    if x is None:
        return torch.full((leading.numel(), size), 1 / size, dtype=dtype, device=device)
    options.check_dense(name, x)
    if x.device != device:
        raise ValueError(f"{name}: expected on the cost's device {device}; got {x.device}")
    expected = (*leading, size)
    fits = 0 < x.dim() <= len(expected) and x.shape[-1] == size
    if not fits or any(mine not in (1, its) for mine, its in zip(x.shape[::-1], expected[::-1], strict=False)):
        raise ValueError(f"{name}: expected masses of a shape that broadcasts to {list(expected)}; got {list(x.shape)}")
    return x.to(dtype).expand(expected).reshape(-1, size).contiguous()
