"""torch.library operators of every family: schema, fake, and dispatch to a backend's function.

An operator takes a family's problem flat (families/problem.py), then its own arguments, then the backend's name. It
mutates no input and returns fresh tensors (`scale_` excepted). It takes no float that changes from call to call, since
a float argument recompiles at every new value. It knows nothing of autograd.

Shapes: student and teacher are [outer, inner, columns] views with unit stride in the last dimension; rows = outer *
inner; every per-row tensor is contiguous [rows], or [1] for one number that serves all rows, in the compute dtype.
A row with row_scale 0 is skipped before any load, and its results are 0.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, families
from .families.options import check_values, compute_dtype, values_are_checked
from .families.problem import Fields
from .families.rows import ROW_FLOATS, ROW_STATISTICS, ROW_SUMS, ROW_TOP1, Rows
from .sources import version_of_operators

NAMESPACE = "kdkernels"
_library = torch.library.Library(NAMESPACE, "DEF")


VERSION = version_of_operators(Path(__file__).parent)


class Operator(NamedTuple):
    """An operator and the fields of its problem. A call passes the problem flat, as autograd.py does."""

    flat: Callable  # (problem's values..., arguments..., backend)
    fields: Fields

    def __call__(self, problem, *arguments):
        return self.flat(*self.fields.flatten(problem), *arguments)


def _define(name: str, problem: type, arguments: str, results: int, implementation, fake) -> Operator:
    """Registers an operator. The implementation gets the backend's kernels and the problem, the fake gets the problem,
    and both get the arguments.
    """
    fields = Fields(problem)
    count = len(fields)
    schema = ", ".join(filter(None, (fields.schema, arguments, "str backend")))

    def call_backend(*values):
        with torch._C._DisableAutocast():
            return implementation(backends.kernels(values[-1]), fields.unflatten(values[:count]), *values[count:-1])

    def call_fake(*values):
        return fake(fields.unflatten(values[:count]), *values[count:-1])

    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    return Operator(_register(f"{name}({schema}) -> {returned}", call_backend, call_fake), fields)


def _register(schema: str, implementation, fake):
    name, rest = schema.split("(", 1)
    qualified = f"{name}.{VERSION}"
    _library.define(f"{qualified}({rest}")
    for key in ("CPU", "CUDA", "MPS", "XPU"):  # torch's products serve `class_ot` on any device
        _library.impl(qualified, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=_library)
    return getattr(getattr(getattr(torch.ops, NAMESPACE), name), VERSION)


def _new(like: Tensor, *shape, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _if(wanted: bool, like: Tensor, shape=None, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the shape (`like`'s own, if None) if it is wanted, else an empty one."""
    shape = like.shape if shape is None else shape
    return _new(like, *(shape if wanted else (0,)), dtype=dtype)


# ---- the row family


def _statistics_fake(row_scale: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    count = row_scale.shape[0]
    return (
        _new(row_scale, len(ROW_STATISTICS) if wanted else 0, count),
        _new(row_scale, len(ROW_TOP1) if wanted else 0, count, dtype=torch.int64),
    )


def _rows(kernels, problem: Rows, wanted: list[bool]):
    if values_are_checked():
        check_values(problem.options, problem.vocab_size)
    return kernels.rows(problem, wanted[0])


def _rows_fake(problem: Rows, wanted: list[bool]):
    row_scale = problem.row_scale
    count = row_scale.shape[0]
    return (
        _new(row_scale, count),
        _if(wanted[0], problem.student),
        _new(row_scale, len(ROW_FLOATS), count),
        _new(row_scale, len(ROW_SUMS), count),
        *_statistics_fake(row_scale, problem.statistics),
    )


def _row_floats_fake(problem: Rows):
    dtype = compute_dtype(problem.student, problem.teacher)
    return _new(problem.student, len(ROW_FLOATS), problem.row_scale.shape[0], dtype=dtype)


def _row_sums_fake(problem: Rows, floats: Tensor):
    row_scale = problem.row_scale
    return _new(row_scale, len(ROW_SUMS), row_scale.shape[0]), *_statistics_fake(row_scale, problem.statistics)


# All sweeps in one call: loss [rows] (row_scale folded in), gradient (the student's shape, or empty), row floats,
# row sums, statistics and top-1 (or empty).
rows = _define("rows", Rows, "bool[] wanted", 6, _rows, _rows_fake)

# The sweeps one by one, for callers that work between two sweeps. phi and psi are a divergence's value and slope of
# one class (csrc/divergences.h). Row floats are the maxima and log-sums of a row's softmaxes. row_floats returns the
# floats; row_sums returns the sums, statistics and top-1 (or empty).
row_floats = _define("row_floats", Rows, "", 1, lambda kernels, *given: kernels.row_floats(*given), _row_floats_fake)
row_sums = _define(
    "row_sums", Rows, "Tensor floats", 3, lambda kernels, *given: kernels.row_sums(*given), _row_sums_fake
)
row_gradient = _define(
    "row_gradient",
    Rows,
    "Tensor floats, Tensor sums",
    1,
    lambda kernels, *given: kernels.row_gradient(*given),
    lambda problem, *_: _if(True, problem.student),
)

# ---- heads and sparse teachers


def _chunked_rows_fake(problem: families.linear.ChunkedRows, wanted: list[bool]):
    row_scale, student = problem.row_scale, problem.student
    return (
        _new(row_scale, row_scale.shape[0]),
        *(_if(wants, student.data if x is None else x) for x, wants in zip(student[:3], wanted, strict=True)),
        *_statistics_fake(row_scale, problem.statistics),
    )


def _topk_log_probs_fake(problem: families.linear.TopK):
    row_scale = problem.options.row_scale
    count = row_scale.shape[0]
    return (
        _new(row_scale, count, problem.k, dtype=torch.int32),
        _new(row_scale, count, problem.k),
        _new(row_scale, count),
    )


# `rows` for sides whose logits are not stored, computed in chunks of rows: loss [rows], the gradients of the student's
# data, weight and bias (or empty), statistics and top-1.
chunked_rows = _define(
    "chunked_rows", families.linear.ChunkedRows, "bool[] wanted", 6, families.linear.chunked_rows, _chunked_rows_fake
)
# The k most probable classes of each row: indices int32 and log-probabilities [rows, k], descending, and the
# log-sum-exp of the other classes [rows]. A skipped row has indices -1, log-probabilities -inf, and 0 for the rest.
topk_log_probs = _define(
    "topk_log_probs", families.linear.TopK, "", 3, families.linear.topk_log_probs, _topk_log_probs_fake
)

# ---- optimal transport


def _sinkhorn_fake(problem: families.sinkhorn.Sinkhorn, wanted: list[bool]):
    cost, a, b = problem[:3]
    values = [_new(cost, cost.shape[0]) for _ in range(2)]
    return (
        values[0],
        *(_if(any(wanted), x) for x in (cost, a, b)),
        torch.empty_like(a),
        torch.empty_like(b),
        values[1],
        _new(cost, cost.shape[0], dtype=torch.int32),
    )


# Sinkhorn's iterations: value [problems], its gradients with respect to cost, a and b (all three if any is wanted,
# else empty), potentials f and g, errors, rounds done. csrc/calls/sinkhorn.h has the formulas.
sinkhorn = _define(
    "sinkhorn", families.sinkhorn.Sinkhorn, "bool[] wanted", 8, families.sinkhorn.checked_sinkhorn, _sinkhorn_fake
)


def _sinkhorn_kd_fake(problem: families.sinkhorn.SinkhornKD, wanted: list[bool]):
    row_mass = problem.clouds.row_mass
    clouds, n = row_mass.shape
    return (
        _new(row_mass, clouds),
        _if(wanted[0], row_mass, (clouds, n, n)),
        _if(wanted[0], row_mass),
        _new(row_mass, 4, clouds, n),
    )


# SinKD: losses [clouds], and the three tensors from which sinkhorn_kd_gradient makes the gradient
# (families/sinkhorn.py).
sinkhorn_kd = _define(
    "sinkhorn_kd", families.sinkhorn.SinkhornKD, "bool[] wanted", 4, families.sinkhorn.sinkhorn_kd, _sinkhorn_kd_fake
)
sinkhorn_kd_gradient = _define(
    "sinkhorn_kd_gradient",
    families.sinkhorn.SinkhornKD,
    "Tensor grad_costs, Tensor dot, Tensor floats",
    1,
    families.sinkhorn.sinkhorn_kd_gradient,
    lambda problem, *_: _if(True, problem.clouds.student),
)


def _class_ot_fake(problem: families.class_ot.ClassOT, wanted: list[bool]):
    row_scale, student = problem.row_scale, problem.student
    dtype = families.class_ot.gradient_dtype(student.dtype)
    return _new(row_scale, row_scale.shape[0]), _if(wanted[0], student, dtype=dtype)


# Optimal transport between classes: loss [rows] and its gradient (fp32 for an fp16 student), or empty. The products are
# torch's: every backend computes the same.
class_ot = _define(
    "class_ot",
    families.class_ot.ClassOT,
    "bool[] wanted",
    2,
    lambda _, problem, wanted: families.class_ot.class_ot(problem, wanted),
    _class_ot_fake,
)


def _uld_fake(problem: families.uld.Uld, wanted: list[bool]):
    row_scale = problem.row_scale
    loss, divergence, error_bound = (_new(row_scale, row_scale.shape[0]) for _ in range(3))
    return loss, _if(wanted[0], problem.student), divergence, error_bound


# Universal Logit Distillation of two vocabularies: loss [rows], gradient (the student's shape, or empty), divergence
# [rows], and a bound on the divergence's error (0 unless only k ranks are compared).
uld = _define("uld", families.uld.Uld, "bool[] wanted", 4, families.uld.uld, _uld_fake)

# ---- gradients computed before backward

# gradient[..., r, :] *= factor[r], in place; rows whose factor is 1 are left alone.
scale_ = _register(
    "scale_(Tensor(a!) gradient, Tensor factor, str backend) -> ()",
    lambda gradient, factor, backend: backends.kernels(backend).scale_(gradient, factor),
    lambda gradient, factor, backend: None,
)


def _scaled(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    gradient = gradient.clone()
    backends.kernels(backend).scale_(gradient, factor)
    return gradient


# `scale_` into a fresh tensor.
scale = _register(
    "scale(Tensor gradient, Tensor factor, str backend) -> Tensor",
    _scaled,
    lambda gradient, factor, backend: torch.empty_like(gradient),
)
