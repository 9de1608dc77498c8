"""Optimal transport between the classes of two distributions of each row, under one cost of classes.

With a the student's and b the teacher's distribution of a row, M the cost, and u = 1 / V to begin with::

    K = exp(-M / epsilon)                                 [V, V], the same for all rows
    v = b / (K^T u),  u = a / (K v)                       `iterations` times, columns first
    P = diag(u) K diag(v),  loss = <P, M> = sum_c u_c ((K * M) v)_c

Every half step is one matrix product of [rows, V] and [V, V], which is torch's: nothing here is a backend's. Rows go in
chunks whose vectors fit the budget; K and K * M, which are there once, are beside it.

Numbers. P does not change where K has a factor, u a factor and v its inverse, and the next half step removes any factor
of the last one. So K is exp((m - M) / epsilon) with m in the middle of the costs, and u and v are divided by their
largest element: with R = (max M - min M) / epsilon every K v and K^T u then lies between exp(-R / 2) and
V exp(R / 2), whatever the logits. What is kept is 1 / (K v) and 1 / (K^T u): u = a / (K v) is 0 where a class has no
mass, and no quotient of two zeros is formed. M is shifted to min M = 0 in K * M, which moves the loss by min M.
"""

import contextlib
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .options import bad_rows, check_values, rows_of, values_are_checked

GRADIENTS = ("unrolled", "implicit", "envelope")
NOTHING = torch.iinfo(torch.int64).min  # in exclude_labels: all classes of the row are there
# The largest range (max M - min M) / epsilon of costs: v of two classes of equal mass may be exp(R) apart.
RANGE = {torch.float32: 80.0, torch.float64: 600.0}
# Of conjugate gradients: at most so many, until the residual is so small beside the first one. A larger one than the
# last is told: it is some percent of a percent of the gradient.
CONJUGATE_STEPS = 200
RESIDUAL = {torch.float32: 1e-6, torch.float64: 1e-12}
TOLD_RESIDUAL = 1e-5


class Kernel(NamedTuple):
    """exp((m - M) / epsilon), that times M - min M, min M and epsilon, in the dtype of the arithmetic."""

    plain: Tensor
    of_cost: Tensor
    least: Tensor
    epsilon: Tensor

    @staticmethod
    def of(class_cost: Tensor, epsilon: Tensor, dtype: torch.dtype) -> "Kernel":
        cost, epsilon = class_cost.to(dtype), epsilon.to(dtype)
        least, most = cost.aminmax()
        plain = (torch.lerp(least, most, 0.5) - cost).div_(epsilon).exp_()
        # All rows are NaN where none can be had, which was not looked for. What was has been rounded otherwise.
        fits = (most - least) / epsilon <= 1.001 * RANGE[dtype]
        return Kernel(plain, (cost - least).mul_(plain), torch.where(fits, least, torch.nan), epsilon)

    def columns(self, u: Tensor) -> Tensor:
        """K^T u of each row."""
        return u @ self.plain

    def rows(self, v: Tensor) -> Tensor:
        """K v of each row."""
        return v @ self.plain.t()


class Plan(NamedTuple):
    """P = diag(u) K diag(v) of each row [rows, V], and, by iteration, 1 / (K^T u) and 1 / (K v)."""

    a: Tensor
    b: Tensor
    u: Tensor
    v: Tensor
    over_columns: list[Tensor]
    over_rows: list[Tensor]


@torch.no_grad()
def class_ot(
    student: Tensor,
    teacher: Tensor,
    class_cost: Tensor,
    row_scale: Tensor,
    exclude_labels: Tensor | None,
    temperature: Tensor,
    epsilon: Tensor,
    iterations: int,
    gradient: str | None,
    budget: int,
):
    """Losses [rows] with row_scale folded in, and their gradient of the student's shape, or empty: `ops.class_ot`."""
    rows, classes = row_scale.shape[0], student.shape[-1]
    reads_values, working = _reads_values(row_scale.device), row_scale.dtype
    if reads_values or values_are_checked():
        check_row_values(row_scale, exclude_labels, temperature, classes)
        working = working_dtype(class_cost, epsilon, working)
    poison = _poison(row_scale, exclude_labels, temperature, classes)
    kernel = Kernel.of(class_cost, epsilon, working)

    # On a GPU the rows that are not skipped would have to be counted: there all are gone through.
    kept = row_scale.nonzero()[:, 0] if reads_values else None
    if kept is not None and kept.shape[0] == rows:
        kept = None
    new = torch.empty if kept is None else torch.zeros
    device, slope_dtype = row_scale.device, gradient_dtype(student.dtype)
    loss = new(rows, dtype=row_scale.dtype, device=device)
    slopes = new(rows if gradient else 0, classes, dtype=slope_dtype, device=device)

    vectors = {"unrolled": 2 * iterations + 10, "implicit": 20}.get(gradient, 10)
    size = max(budget // (vectors * classes * working.itemsize), 1)
    count = rows if kept is None else kept.shape[0]
    with _whole_products(device.type, working):
        for first in range(0, count, size):
            chunk = slice(first, min(first + size, count))
            chunk = chunk if kept is None else kept[chunk]
            scale = row_scale[chunk]
            tempered = temperature if temperature.shape[0] == 1 else temperature[chunk]
            excluded = None if exclude_labels is None else exclude_labels[chunk]
            a, b = (distribution(rows_of(x, chunk), scale, excluded, tempered, working) for x in (student, teacher))
            found, slope = _row_losses(kernel, a, b, excluded, iterations, gradient)
            # 0 of a skipped row, and not 0 * NaN where the costs have no answer.
            loss[chunk] = torch.where(scale == 0, 0, found * (scale * poison[chunk])).to(loss.dtype)
            if gradient:
                factor = scale * poison[chunk] / tempered
                slopes[chunk] = torch.where((scale == 0)[:, None], 0, slope.mul_(factor[:, None])).to(slope_dtype)
    return loss, slopes.view(student.shape) if gradient else slopes.view(0)


def _reads_values(device: torch.device) -> bool:
    """Whether values may be looked at: on a GPU that would be a synchronisation."""
    return device.type == "cpu"


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the gradient with respect to a student of `dtype` is kept: a small one would be 0 in fp16 before the
    scale of the loss, which backward brings, lifts it."""
    return torch.float32 if dtype == torch.float16 else dtype


def working_dtype(class_cost: Tensor, epsilon: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel matrix of these costs can be had: `dtype`, or fp64. Raises where none can. Reads
    values."""
    least, most = (x.item() for x in class_cost.aminmax())
    if not (-torch.inf < least and most < torch.inf):  # NaN is in both
        raise ValueError(f"class_cost: expected finite costs; got from {least} to {most}")
    spread, largest = most - least, RANGE[torch.float64]
    if spread / epsilon.item() > largest:
        raise ValueError(
            f"epsilon: expected at least {spread / largest:.3g}, the costs' range of {spread:.3g} over {largest:.0f}, "
            f"so that exp(-cost / epsilon) can be had in fp64; got {epsilon.item():.3g}"
        )
    return dtype if spread / epsilon.item() <= RANGE[dtype] else torch.float64


def check_row_values(row_scale: Tensor, exclude_labels: Tensor | None, temperature: Tensor, classes: int) -> None:
    """Raises ValueError for the first kept row with a value that no loss has. Reads values."""
    check_values(row_scale, None, temperature, None, classes)
    if exclude_labels is None:
        return
    bad = _bad_labels(row_scale, exclude_labels, classes)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"exclude_labels: expected 0 <= label < {classes} (the vocabulary) or ignore_index; "
            f"got {exclude_labels[row].item()} in row {row}"
        )


def _bad_labels(row_scale: Tensor, exclude_labels: Tensor, classes: int) -> Tensor:
    in_range = (exclude_labels >= 0) & (exclude_labels < classes)
    return (row_scale != 0) & ~in_range & (exclude_labels != NOTHING)


def _poison(row_scale: Tensor, exclude_labels: Tensor | None, temperature: Tensor, classes: int) -> Tensor:
    """[rows]: NaN in rows with a value that no loss has, which were not looked for, else 1."""
    bad = bad_rows(row_scale, None, temperature, None, classes)["temperature"]
    if exclude_labels is not None:
        bad = bad | _bad_labels(row_scale, exclude_labels, classes)
    return torch.where(bad, torch.nan, torch.ones_like(row_scale))


def distribution(
    logits: Tensor, row_scale: Tensor, excluded: Tensor | None, temperature: Tensor, dtype: torch.dtype
) -> Tensor:
    """softmax(logits / T) over the classes that are not excluded. A skipped row may hold anything: 0 stands there."""
    tempered = torch.where((row_scale != 0)[:, None], logits.to(dtype), 0) / temperature[:, None].to(dtype)
    if excluded is not None:
        tempered = tempered.masked_fill(of_class(excluded, tempered.shape[-1]), -torch.inf)
    return torch.softmax(tempered, -1)


def of_class(labels: Tensor, classes: int) -> Tensor:
    """[rows, V]: where the class is the row's label."""
    return labels[:, None] == torch.arange(classes, device=labels.device)


@contextlib.contextmanager
def _whole_products(device: str, dtype: torch.dtype):
    """Products of fp32 in fp32: the scalings of a plan do not converge in TF32 or bf16, which a program may allow."""
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
    """<P, M> [rows], and a (x - sum a x) with x its gradient with respect to a [rows, V], or None."""
    plan = _plan(kernel, a, b, excluded, iterations, keep=gradient == "unrolled")
    costs = plan.v @ kernel.of_cost.t()  # (K * M) v
    loss = (plan.u * costs).sum(-1) + kernel.least
    if gradient is None:
        return loss, None
    if gradient == "unrolled":
        x = _unrolled(kernel, plan, costs)
    elif gradient == "implicit":
        x = _implicit(kernel, plan, costs)
    else:
        x = kernel.epsilon * plan.over_rows[-1].log()
    # x of the most probable class becomes 0, so that nothing cancels in rows that are sure of it.
    x = torch.where(a == 0, 0, x - x.gather(-1, a.argmax(-1, keepdim=True)))
    slope = a * (x - (a * x).sum(-1, keepdim=True))
    return loss, slope + (kernel.least - kernel.least)  # NaN where the loss is


def _plan(kernel: Kernel, a: Tensor, b: Tensor, excluded: Tensor | None, iterations: int, keep: bool) -> Plan:
    u = torch.ones_like(a)
    if excluded is not None:
        u.masked_fill_(of_class(excluded, a.shape[-1]), 0)
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
    """The gradient with respect to a of the loss of this many iterations, which are gone through backwards.

    With the adjoints of log u and log v, which any factors of u and v leave as they are::

        loss = u (K * M) v         of_u = u * ((K * M) v),   of_v = v * ((K * M)^T u)
        u = a / (K v)              of_a += of_u / a,         of_v -= v * (K^T (of_u / (K v)))
        v = b / (K^T u)            of_u = -u * (K (of_v / (K^T u)))        with the u of the iteration before

    of_u / a is found first, without a quotient: u / a = 1 / (K v).
    """
    a, b, v = plan.a, plan.b, plan.v
    of_v = v * (plan.u @ kernel.of_cost)
    of_u_over_a = plan.over_rows[-1] * costs
    of_a = of_u_over_a.clone()
    for t in range(len(plan.over_rows) - 1, 0, -1):
        of_v = of_v - v * kernel.columns((a * of_u_over_a).mul_(plan.over_rows[t]))
        largest = (a * plan.over_rows[t - 1]).amax(-1, keepdim=True)  # by which u was divided
        of_u_over_a = kernel.rows(of_v.mul_(plan.over_columns[t])).mul_(plan.over_rows[t - 1] / -largest)
        of_a += of_u_over_a
        of_v, v = 0, _scaled(b, plan.over_columns[t - 1])
    return of_a


def _implicit(kernel: Kernel, plan: Plan, costs: Tensor) -> Tensor:
    """The gradient x of the converged plan's cost with respect to a: of P that is a function of its marginals, ::

        [diag(P 1)  P          ] [x]   [(P * M) 1  ]
        [P^T        diag(P^T 1)] [y] = [(P * M)^T 1]

    Without x = ((P * M) 1 - P y) / a, and with y = z / sqrt(P^T 1), this is (1 - B) z = r with
    B = D P^T diag(1 / a) P D, D = diag(1 / sqrt(P^T 1)): symmetric, its eigenvalues within [0, 1], singular along
    sqrt(P^T 1) (a constant may go from x to y). Conjugate gradients; a row stands still once its residual has vanished,
    which costs a device no synchronisation. Classes without mass: P / a is K v / (K v), and y there is 0.
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

    of_columns, rounding = v_over_root * (u @ kernel.of_cost), 8 * torch.finfo(u.dtype).eps
    residual = projected(of_columns - spread(mean_costs))
    z, direction = torch.zeros_like(residual), residual
    first = square = dot(residual, residual)
    noise = dot(of_columns, of_columns) * rounding**2  # what rounding leaves of a residual that is 0
    reads_values = _reads_values(square.device)
    for _ in range(CONJUGATE_STEPS):
        moves = square > torch.maximum(first * RESIDUAL[square.dtype] ** 2, noise)
        if reads_values and not moves.any():
            break
        image = projected(direction - spread(averaged(direction)))
        curvature = dot(direction, image)
        moves &= curvature > rounding * dot(direction, direction)  # else singular, but for rounding
        step = torch.where(moves, square / torch.where(moves, curvature, 1), 0)
        z = z + step * direction
        residual = residual - step * image
        after = torch.where(moves, dot(residual, residual), square)
        direction = residual + torch.where(moves, after / torch.where(moves, square, 1), 0) * direction
        square = after
    untold = torch.maximum(first * TOLD_RESIDUAL**2, noise)
    if reads_values and (square > untold).any():
        left = (square / first).nan_to_num(0).max().sqrt().item()
        warnings.warn(
            f"gradient='implicit': {CONJUGATE_STEPS} steps of conjugate gradients left a residual of {left:.1e} of the "
            "first, for the plan is too sharp; expected a larger epsilon, or gradient='unrolled'",
            RuntimeWarning,
            stacklevel=2,
        )
    return mean_costs - averaged(z)
