"""Optimal transport between the classes of two distributions of each row, with one class cost for all rows.

Let a be the student's and b the teacher's distribution of a row, and M the cost. From u = 1 / V::

    K = exp(-M / epsilon)                                 [V, V], the same for all rows
    v = b / (K^T u),  u = a / (K v)                       `iterations` times, columns first
    P = diag(u) K diag(v),  loss = <P, M> = sum_c u_c ((K * M) v)_c

Every half step is one matrix product of [rows, V] and [V, V]. torch computes the products, so this code serves every
backend. Rows go in chunks whose vectors fit the budget; K and K * M exist once, outside the budget.

Numbers. P does not change if a factor multiplies K and u and divides v, and the next half step removes any factor of
the last one. So K is exp((m - M) / epsilon) with m in the middle of the costs, and u and v are divided by their largest
element. With R = (max M - min M) / epsilon, every K v and K^T u then lies between exp(-R / 2) and V exp(R / 2), for any
logits. The code keeps 1 / (K v) and 1 / (K^T u): u = a / (K v) is 0 for a class without mass, and no quotient of two
zeros is formed. K * M uses M - min M, so the loss adds min M at the end.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from .. import callers
from .options import RowOptions, bad_rows, bad_values_raise, check_values, has_fp64, per_row, rows_of, slices

GRADIENTS = ("unrolled", "implicit", "envelope")
NO_LABEL = torch.iinfo(torch.int64).min  # in exclude_labels: the row keeps all classes
# The largest range R = (max M - min M) / epsilon of costs: v of two classes of equal mass may differ by exp(R).
RANGE = {torch.float32: 80.0, torch.float64: 600.0}
# Conjugate gradients: maximum steps, relative residual at which they stop, and the relative residual above which a
# warning is raised (about 1e-4 of the gradient).
CONJUGATE_STEPS = 200
RESIDUAL = {torch.float32: 1e-6, torch.float64: 1e-12}
WARN_RESIDUAL = 1e-5


class ClassOT(NamedTuple):
    """Student and teacher logits of one vocabulary, and the costs of its classes."""

    student: Tensor  # [outer, inner, V], the last stride is 1
    teacher: Tensor  # [outer, inner, V]
    class_cost: Tensor  # [V, V]
    row_scale: Tensor  # [rows]; 0 skips the row
    exclude_labels: Tensor | None  # [rows] int64: the class that the row leaves out, or NO_LABEL
    temperature: Tensor  # [rows] or [1]
    epsilon: Tensor  # [1] in `widest_dtype`
    iterations: int
    gradient: str  # one of GRADIENTS
    chunk_budget: int  # bytes

    def tracked(self) -> tuple[Tensor | None, ...]:
        return (self.student,)

    def options(self) -> RowOptions:
        return RowOptions(self.row_scale, self.temperature)


class Kernel(NamedTuple):
    """The kernel matrix of the costs, in the dtype of the arithmetic."""

    plain: Tensor  # exp((m - M) / epsilon)
    times_cost: Tensor  # plain * (M - min M)
    min_cost: Tensor
    epsilon: Tensor

    @staticmethod
    def of(class_cost: Tensor, epsilon: Tensor, dtype: torch.dtype) -> "Kernel":
        cost, epsilon = class_cost.to(dtype), epsilon.to(dtype)
        least, most = cost.aminmax()
        plain = (torch.lerp(least, most, 0.5) - cost).div_(epsilon).exp_()
        # A GPU did not check the costs' range: if it is too wide, every row becomes NaN. 1.001: the CPU's check rounds
        # differently.
        fits = (most - least) / epsilon <= 1.001 * RANGE[dtype]
        times_cost = cost - least if cost is class_cost else cost.sub_(least)
        return Kernel(plain, times_cost.mul_(plain), torch.where(fits, least, torch.nan), epsilon)

    def columns(self, u: Tensor) -> Tensor:
        """K^T u of each row."""
        return u @ self.plain

    def rows(self, v: Tensor) -> Tensor:
        """K v of each row."""
        return v @ self.plain.t()


class Plan(NamedTuple):
    """P = diag(u) K diag(v) of each row, by its vectors [rows, V]."""

    a: Tensor
    b: Tensor
    u: Tensor
    v: Tensor
    over_columns: list[Tensor]  # 1 / (K^T u) of each iteration, or of the last
    over_rows: list[Tensor]  # 1 / (K v)


@torch.no_grad()
def class_ot(problem: ClassOT, wanted: list[bool]):
    """Losses [rows] with row_scale folded in, and their gradient (the student's shape, or empty): `ops.class_ot`."""
    student, row_scale = problem.student, problem.row_scale
    rows, classes, wanted = row_scale.shape[0], student.shape[-1], any(wanted)
    reads_values, working = _reads_values(row_scale.device), row_scale.dtype
    if bad_values_raise(row_scale.device):
        check_row_values(problem)
        working = working_dtype(problem.class_cost, problem.epsilon, working)
    poison = _poison(problem)
    kernel = Kernel.of(problem.class_cost, problem.epsilon, working)

    # Counting the kept rows would make the host wait for a GPU, so a GPU computes all rows.
    kept_rows = row_scale.nonzero()[:, 0] if reads_values else None
    if kept_rows is not None and kept_rows.shape[0] == rows:
        kept_rows = None
    new = torch.empty if kept_rows is None else torch.zeros
    device, slope_dtype = row_scale.device, gradient_dtype(student.dtype)
    loss = new(rows, dtype=row_scale.dtype, device=device)
    slopes = new(rows if wanted else 0, classes, dtype=slope_dtype, device=device)

    gradient = problem.gradient if wanted else None
    vectors = {"unrolled": 2 * problem.iterations + 12, "implicit": 21, "envelope": 12}.get(gradient, 10)
    count = rows if kept_rows is None else kept_rows.shape[0]
    with _whole_products(device.type, working):
        for chunk in slices(count, vectors * classes * working.itemsize, problem.chunk_budget):
            chunk = chunk if kept_rows is None else kept_rows[chunk]
            scale, excluded = row_scale[chunk], problem.exclude_labels
            excluded = None if excluded is None else excluded[chunk]
            temperature = per_row(problem.temperature, row_scale, chunk)
            a, b = (
                distribution(rows_of(x, chunk), scale, excluded, temperature, working)
                for x in (student, problem.teacher)
            )
            row_loss, slope = _row_losses(kernel, a, b, excluded, problem.iterations, gradient)
            # A skipped row has loss 0, not 0 * NaN, even if the costs make every row NaN.
            loss[chunk] = torch.where(scale == 0, 0, row_loss * (scale * poison[chunk])).to(loss.dtype)
            if wanted:
                factor = scale * poison[chunk] / temperature
                slopes[chunk] = torch.where((scale == 0)[:, None], 0, slope.mul_(factor[:, None])).to(slope_dtype)
    return loss, slopes.view(student.shape) if wanted else slopes.view(0)


def _reads_values(device: torch.device) -> bool:
    """Whether the code may read values: on a GPU that would be a synchronisation."""
    return device.type == "cpu"


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the kept gradient: fp32 for fp16, which would round small gradients to 0 until backward multiplies
    them by the loss scale.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def widest_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if has_fp64(device) else torch.float32


def working_dtype(class_cost: Tensor, epsilon: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that holds the kernel matrix of these costs: `dtype` or the widest one. Raises if neither does. Reads
    values.
    """
    least, most = (x.item() for x in class_cost.aminmax())
    if not (-torch.inf < least and most < torch.inf):  # a NaN makes both NaN
        raise ValueError(f"class_cost: expected finite costs; got from {least} to {most}")
    widest = widest_dtype(class_cost.device)
    spread, largest = most - least, RANGE[widest]
    if spread / epsilon.item() > largest:
        name = "fp64" if widest == torch.float64 else "fp32"
        raise ValueError(
            f"epsilon: expected at least {spread / largest:.3g}, the costs' range of {spread:.3g} over {largest:.0f}, "
            f"so that {name} holds exp(-cost / epsilon); got {epsilon.item():.3g}"
        )
    return dtype if spread / epsilon.item() <= RANGE[dtype] else widest


def check_row_values(problem: ClassOT) -> None:
    """Raises ValueError for the first kept row with an invalid value. Reads values."""
    exclude_labels, classes = problem.exclude_labels, problem.student.shape[-1]
    check_values(problem.options(), classes)
    if exclude_labels is None:
        return
    bad = _bad_labels(problem.row_scale, exclude_labels, classes)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"exclude_labels: expected 0 <= label < {classes} (the vocabulary) or ignore_index; "
            f"got {exclude_labels[row].item()} in row {row}"
        )


def _bad_labels(row_scale: Tensor, exclude_labels: Tensor, classes: int) -> Tensor:
    in_range = (exclude_labels >= 0) & (exclude_labels < classes)
    return (row_scale != 0) & ~in_range & (exclude_labels != NO_LABEL)


def _poison(problem: ClassOT) -> Tensor:
    """[rows]: NaN for rows with an invalid value (if no check has raised for it), else 1."""
    row_scale, classes = problem.row_scale, problem.student.shape[-1]
    bad = bad_rows(problem.options(), classes)["temperature"]
    if problem.exclude_labels is not None:
        bad = bad | _bad_labels(row_scale, problem.exclude_labels, classes)
    return torch.where(bad, torch.nan, torch.ones_like(row_scale))


def distribution(
    logits: Tensor, row_scale: Tensor, excluded: Tensor | None, temperature: Tensor, dtype: torch.dtype
) -> Tensor:
    """softmax(logits / T) without the excluded class. Zeros replace the logits of a skipped row, which may hold
    anything."""
    tempered = torch.where((row_scale != 0)[:, None], logits.to(dtype), 0) / temperature[:, None].to(dtype)
    if excluded is not None:
        tempered = tempered.masked_fill(is_class(excluded, tempered.shape[-1]), -torch.inf)
    return torch.softmax(tempered, -1)


def is_class(labels: Tensor, classes: int) -> Tensor:
    """[rows, V] bool: whether the class is the row's label."""
    return labels[:, None] == torch.arange(classes, device=labels.device)


@contextlib.contextmanager
def _whole_products(device: str, dtype: torch.dtype):
    """Computes products of fp32 in fp32: a plan's scalings do not converge in TF32 or bf16."""
    settings = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if dtype != torch.float32 or before in ("none", "ieee"):
        yield
        return
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _row_losses(kernel: Kernel, a: Tensor, b: Tensor, excluded: Tensor | None, iterations: int, gradient: str | None):
    """<P, M> [rows], and a (x - sum a x) [rows, V] or None, where x is the gradient of <P, M> with respect to a."""
    plan = _plan(kernel, a, b, excluded, iterations, keep=gradient == "unrolled")
    costs = plan.v @ kernel.times_cost.t()  # (K * M) v
    loss = (plan.u * costs).sum(-1) + kernel.min_cost
    if gradient is None:
        return loss, None
    if gradient == "unrolled":
        x = _unrolled(kernel, plan, costs)
    elif gradient == "implicit":
        x = _implicit(kernel, plan, costs)
    else:
        x = kernel.epsilon * plan.over_rows[-1].log()
    # Subtracts x of the most probable class, so that nothing cancels in rows where that class has nearly all mass.
    x = torch.where(a == 0, 0, x - x.gather(-1, a.argmax(-1, keepdim=True)))
    slope = a * (x - (a * x).sum(-1, keepdim=True))
    return loss, slope + (kernel.min_cost - kernel.min_cost)  # NaN if the costs made the loss NaN


def _plan(kernel: Kernel, a: Tensor, b: Tensor, excluded: Tensor | None, iterations: int, keep: bool) -> Plan:
    u = torch.ones_like(a)
    if excluded is not None:
        u.masked_fill_(is_class(excluded, a.shape[-1]), 0)
    over_columns, over_rows = [], []
    for _ in range(iterations):
        if not keep:
            over_columns.clear()
            over_rows.clear()
        over_columns.append(kernel.columns(u).reciprocal_())
        v = _scaled(b, over_columns[-1])
        over_rows.append(kernel.rows(v).reciprocal_())
        u = _scaled(a, over_rows[-1])
    return Plan(a, b, a * over_rows[-1], v, over_columns, over_rows)


def _scaled(mass: Tensor, over: Tensor) -> Tensor:
    """mass * over, divided by its largest element."""
    product = mass * over
    return product.div_(product.amax(-1, keepdim=True))


def _unrolled(kernel: Kernel, plan: Plan, costs: Tensor) -> Tensor:
    """The exact gradient of the loss of these iterations with respect to a: the iterations in reverse.

    grad_u and grad_v are the adjoints of log u and log v. Factors of u and v do not change them::

        loss = u (K * M) v         grad_u = u * ((K * M) v),   grad_v = v * ((K * M)^T u)
        u = a / (K v)              grad_a += grad_u / a,       grad_v -= v * (K^T (grad_u / (K v)))
        v = b / (K^T u)            grad_u = -u * (K (grad_v / (K^T u)))      with the u of the iteration before

    The code computes grad_u / a first, without a quotient: u / a = 1 / (K v).
    """
    a, b, v = plan.a, plan.b, plan.v
    grad_v = v * (plan.u @ kernel.times_cost)
    grad_u_over_a = plan.over_rows[-1] * costs
    grad_a = grad_u_over_a.clone()
    for t in range(len(plan.over_rows) - 1, 0, -1):
        grad_v = grad_v - v * kernel.columns((a * grad_u_over_a).mul_(plan.over_rows[t]))
        largest = (a * plan.over_rows[t - 1]).amax(-1, keepdim=True)  # the divisor of u
        grad_u_over_a = kernel.rows(grad_v.mul_(plan.over_columns[t])).mul_(plan.over_rows[t - 1] / -largest)
        grad_a += grad_u_over_a
        grad_v, v = 0, _scaled(b, plan.over_columns[t - 1])
    return grad_a


def _implicit(kernel: Kernel, plan: Plan, costs: Tensor) -> Tensor:
    """The gradient x of the converged plan's cost with respect to a. P is a function of its marginals, so ::

        [diag(P 1)  P          ] [x]   [(P * M) 1  ]
        [P^T        diag(P^T 1)] [y] = [(P * M)^T 1]

    Elimination of x = ((P * M) 1 - P y) / a and the substitution y = z / sqrt(P^T 1) give (1 - B) z = r with
    B = D P^T diag(1 / a) P D, D = diag(1 / sqrt(P^T 1)). The matrix 1 - B is symmetric, has eigenvalues in [0, 1], and
    is singular along sqrt(P^T 1) (a constant may move from x to y). Conjugate gradients solve the system. A row stops
    changing once its residual is 0; the loop runs on, so that a GPU needs no synchronisation. For classes without mass,
    P / a is K v / (K v), and y is 0.
    """
    u, v, over_rows = plan.u, plan.v, plan.over_rows[-1]
    column_sums = v * kernel.columns(u)
    null = column_sums.sqrt()
    null = null / torch.linalg.vector_norm(null, dim=-1, keepdim=True)
    v_over_root = torch.where(column_sums > 0, v * column_sums.rsqrt(), 0)
    mean_costs = over_rows * costs  # ((P * M) 1) / a

    def dot(x, y):
        return (x * y).sum(-1, keepdim=True)

    def projected(x):
        return x - dot(x, null) * null

    def averaged(z):  # (P y) / a
        return over_rows * kernel.rows(v_over_root * z)

    def spread(x):  # D P^T x
        return v_over_root * kernel.columns(u * x)

    column_costs, rounding = v_over_root * (u @ kernel.times_cost), 8 * torch.finfo(u.dtype).eps
    residual = projected(column_costs - spread(mean_costs))
    z, direction = torch.zeros_like(residual), residual
    first = square = dot(residual, residual)
    noise = dot(column_costs, column_costs) * rounding**2  # the size of a zero residual after rounding
    reads_values = _reads_values(square.device)
    for _ in range(CONJUGATE_STEPS):
        moves = square > torch.maximum(first * RESIDUAL[square.dtype] ** 2, noise)
        if reads_values and not moves.any():
            break
        image = projected(direction - spread(averaged(direction)))
        curvature = dot(direction, image)
        moves &= curvature > rounding * dot(direction, direction)  # else the direction is singular up to rounding
        step = torch.where(moves, square / torch.where(moves, curvature, 1), 0)
        z = z + step * direction
        residual = residual - step * image
        after = torch.where(moves, dot(residual, residual), square)
        direction = residual + torch.where(moves, after / torch.where(moves, square, 1), 0) * direction
        square = after
    warn_above = torch.maximum(first * WARN_RESIDUAL**2, noise)
    if reads_values and (square > warn_above).any():
        left = (square / first).nan_to_num(0).max().sqrt().item()
        callers.warn(
            f"gradient='implicit': {CONJUGATE_STEPS} steps of conjugate gradients left a residual of {left:.1e} of the "
            "first one, since the plan is too sharp; expected a larger epsilon, or gradient='unrolled'",
        )
    return mean_costs - averaged(z)
