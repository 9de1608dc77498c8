"""torch.library operators of every family: schema, fake, and dispatch to a backend's function.

They mutate nothing and return fresh tensors (`scale_` excepted), take no floats that change from call to call (a float
argument recompiles at every new value), and know nothing of autograd: autograd.py stands outside.

Shapes: student and teacher are [outer, inner, columns] views with unit stride in the last dimension; rows = outer *
inner; every per-row tensor is contiguous [rows], or [1] where one number serves all rows, in the compute dtype.
A row whose row_scale is 0 is skipped before any load, and its results are 0.
"""

import torch
from torch import Tensor

from . import backends
from .backends import ROW_FLOATS, ROW_STATISTICS, ROW_SUMS, ROW_TOP1, chunks, class_ot, compute_dtype, transport
from .backends import uld as uld_family
from .backends.row_options import RowOptions
from .backends.topk import Sparse

NAMESPACE = "kdkernels"
_library = torch.library.Library(NAMESPACE, "DEF")

_LOGITS = "Tensor student, Tensor teacher, Tensor row_scale"
_LABEL = "Tensor? labels, Tensor temperature, Tensor? hard_weight"


def _define(schema: str, implementation, fake):
    """Registers an operator whose last argument names the backend."""

    def of_backend(*args):
        *args, backend = args
        return implementation(backends.kernels(backend), *args)

    return _define_for_all(schema, of_backend, fake)


def _define_for_all(schema: str, implementation, fake):
    """Registers an operator that is the same for every backend."""
    name = schema.split("(")[0].strip()
    _library.define(schema)

    def run(*args):
        with torch._C._DisableAutocast():
            return implementation(*args)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _new(like: Tensor, *shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _gradient_like(student: Tensor) -> Tensor:
    return _new(student, *student.shape, dtype=student.dtype)


def _rows(kernels, student, teacher, row_scale, labels, temperature, hard_weight, parameters, divergence, vocab_size,
          *flags):  # fmt: skip
    if backends.values_are_checked():
        backends.check_values(row_scale, labels, temperature, hard_weight, vocab_size)
    return kernels.rows(student, teacher, row_scale, labels, temperature, hard_weight, parameters, divergence,
                        vocab_size, *flags)  # fmt: skip


def _statistics_fake(student, count, dtype, statistics):
    return (
        _new(student, len(ROW_STATISTICS) if statistics else 0, count, dtype=dtype),
        _new(student, len(ROW_TOP1) if statistics else 0, count, dtype=torch.int64),
    )


def _rows_fake(student, teacher, row_scale, labels, temperature, hard_weight, parameters, divergence, vocab_size,
               temperature_squared, gradient, statistics, backend):  # fmt: skip
    count, dtype = row_scale.shape[0], compute_dtype(student, teacher)
    return (
        _new(student, count, dtype=dtype),
        _gradient_like(student) if gradient else _new(student, 0, dtype=student.dtype),
        _new(student, len(ROW_FLOATS), count, dtype=dtype),
        _new(student, len(ROW_SUMS), count, dtype=dtype),
        *_statistics_fake(student, count, dtype, statistics),
    )


def _row_floats_fake(student, teacher, row_scale, temperature, vocab_size, backend):
    return _new(student, len(ROW_FLOATS), row_scale.shape[0], dtype=compute_dtype(student, teacher))


def _row_sums_fake(student, teacher, row_scale, labels, temperature, parameters, floats, divergence, vocab_size,
                   statistics, backend):  # fmt: skip
    count, dtype = row_scale.shape[0], compute_dtype(student, teacher)
    return _new(student, len(ROW_SUMS), count, dtype=dtype), *_statistics_fake(student, count, dtype, statistics)


# All sweeps in one call: loss [rows] (row_scale folded in), gradient (the student's shape, or empty), row floats,
# row sums, statistics and top-1 (or empty).
rows = _define(
    f"rows({_LOGITS}, {_LABEL}, Tensor parameters, str divergence, SymInt vocab_size, bool temperature_squared, "
    "bool gradient, bool statistics, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _rows,
    _rows_fake,
)

# The sweeps one by one, for callers that need what lies between them. phi and psi are a divergence's value and slope of
# one class (csrc/divergences.h); row floats are what a row's softmaxes need: maxima and log sums. row_floats gives the
# floats, row_sums the sums, statistics and top-1 (or empty).
row_floats = _define(
    f"row_floats({_LOGITS}, Tensor temperature, SymInt vocab_size, str backend) -> Tensor",
    lambda kernels, *args: kernels.row_floats(*args),
    _row_floats_fake,
)
row_sums = _define(
    f"row_sums({_LOGITS}, Tensor? labels, Tensor temperature, Tensor parameters, Tensor floats, str divergence, "
    "SymInt vocab_size, bool statistics, str backend) -> (Tensor, Tensor, Tensor)",
    lambda kernels, *args: kernels.row_sums(*args),
    _row_sums_fake,
)
row_gradient = _define(
    f"row_gradient({_LOGITS}, {_LABEL}, Tensor parameters, Tensor floats, Tensor sums, str divergence, "
    "SymInt vocab_size, bool temperature_squared, str backend) -> Tensor",
    lambda kernels, *args: kernels.row_gradient(*args),
    lambda student, *args: _gradient_like(student),
)


def _chunked_rows(kernels, student, student_weight, student_bias, teacher, teacher_weight, teacher_bias,
                 teacher_indices, tail_log_prob, source_temperature, row_scale, labels, temperature, hard_weight,
                 parameters, divergence, vocab_size, temperature_squared, student_scale, student_softcap, teacher_scale,
                 teacher_softcap, tail, autocast_dtype, logits_dtype, chunk_rows, chunk_budget, compact_rows, wanted,
                 statistics):  # fmt: skip
    if tail is None:
        of_teacher = chunks.Side(teacher, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    else:
        of_teacher = Sparse(teacher, teacher_indices, tail_log_prob, source_temperature, tail)
    return chunks.chunked_rows(
        kernels,
        chunks.Side(student, student_weight, student_bias, student_scale, student_softcap),
        of_teacher,
        RowOptions(row_scale, labels, temperature, hard_weight),
        parameters, divergence, vocab_size, temperature_squared, autocast_dtype, logits_dtype, chunk_rows,
        chunk_budget, compact_rows, chunks.Wanted(*wanted), statistics,
    )  # fmt: skip


def _chunked_rows_fake(student, student_weight, student_bias, *others):
    row_scale = others[6]
    wanted, statistics, _ = others[-3:]
    count, dtype = row_scale.shape[0], row_scale.dtype
    return (
        _new(student, count, dtype=dtype),
        *(_gradient_like(x) if wants else _new(student, 0, dtype=student.dtype)
          for x, wants in zip((student, student_weight, student_bias), wanted, strict=True)),
        *_statistics_fake(student, count, dtype, statistics),
    )  # fmt: skip


# The same where not both sides are logits that are there: they are made in chunks of rows. student and teacher are
# [outer, inner, columns]; or, with a weight, hidden states [outer, inner, H]; or, of a teacher with a tail
# (distributions.TAILS), log-probabilities [rows, K] of its indices [rows, K]. Loss [rows], the gradients of student,
# weight and bias (those that `wanted` names, else empty), statistics and top-1. Scales and caps are constants of a
# model, and factors of products on the host: floats. chunk_rows = 0: as many as the budget, in bytes, holds.
chunked_rows = _define(
    "chunked_rows(Tensor student, Tensor? student_weight, Tensor? student_bias, "
    "Tensor teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_indices, Tensor? tail_log_prob, Tensor? source_temperature, Tensor row_scale, "
    f"{_LABEL}, Tensor parameters, str divergence, SymInt vocab_size, bool temperature_squared, "
    "float student_scale, float? student_softcap, float teacher_scale, float? teacher_softcap, str? tail, "
    "ScalarType? autocast_dtype, ScalarType? logits_dtype, SymInt chunk_rows, SymInt chunk_budget, bool compact_rows, "
    "bool[] wanted, bool statistics, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _chunked_rows,
    _chunked_rows_fake,
)


def _topk_log_probs(kernels, data, weight, bias, row_scale, temperature, k, vocab_size, scale, softcap, *chunking):
    side = chunks.Side(data, weight, bias, scale, softcap)
    return chunks.topk_log_probs(kernels, side, row_scale, temperature, k, vocab_size, *chunking)


def _topk_log_probs_fake(data, weight, bias, row_scale, temperature, k, *others):
    count = row_scale.shape[0]
    return (
        _new(data, count, k, dtype=torch.int32),
        _new(data, count, k, dtype=row_scale.dtype),
        _new(data, count, dtype=row_scale.dtype),
    )


# The k most probable classes of logits [outer, inner, columns] or, with a weight, of hidden states: indices int32 and
# log-probabilities [rows, k], descending, and the log-sum-exp of the others' [rows]. A row whose row_scale is 0 is not
# read: indices -1, log-probabilities -inf, the others' 0.
topk_log_probs = _define(
    "topk_log_probs(Tensor data, Tensor? weight, Tensor? bias, Tensor row_scale, Tensor temperature, SymInt k, "
    "SymInt vocab_size, float scale, float? softcap, ScalarType? autocast_dtype, ScalarType? logits_dtype, "
    "SymInt chunk_rows, SymInt chunk_budget, bool compact_rows, str backend) -> (Tensor, Tensor, Tensor)",
    _topk_log_probs,
    _topk_log_probs_fake,
)


def _sinkhorn_fake(cost, a, b, epsilon, tolerance, iterations, entropic, gradient, backend):
    problems = cost.shape[0]
    derivatives = [torch.empty_like(x) if gradient else _new(x, 0, dtype=x.dtype) for x in (cost, a, b)]
    return (
        _new(cost, problems, dtype=cost.dtype),
        torch.empty_like(a),
        torch.empty_like(b),
        _new(cost, problems, dtype=cost.dtype),
        _new(cost, problems, dtype=torch.int32),
        *derivatives,
    )


# Sinkhorn's iterations of problems [problems, n, m] with masses a [problems, n] and b [problems, m], all contiguous in
# one compute dtype: values, potentials f and g, errors, rounds done, and the derivatives of the values with respect to
# cost, a and b as `gradient` defines them (of shape [0] where none is named). csrc/calls/sinkhorn.h has the formulas.
sinkhorn = _define(
    "sinkhorn(Tensor cost, Tensor a, Tensor b, Tensor epsilon, Tensor tolerance, SymInt iterations, bool entropic, "
    "str? gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda kernels, *args: transport.checked_sinkhorn(kernels, *args),
    _sinkhorn_fake,
)


def _sinkhorn_kd_fake(student, teacher, kept, temperature, epsilon, iterations, cost, gradient, vocab_size, backend):
    clouds, n = kept.shape
    wanted = gradient is not None
    return (
        _new(kept, clouds, dtype=kept.dtype),
        _new(kept, *((clouds, n, n) if wanted else (0,)), dtype=kept.dtype),
        _new(kept, *((clouds, n) if wanted else (0,)), dtype=kept.dtype),
        _new(kept, 4, clouds, n, dtype=kept.dtype),
    )


# SinKD between the rows of clouds of logits [clouds, n, columns]; kept [clouds, n] is 1, or 0 for a row that is dropped
# and never read. Losses [clouds], and what its gradient is made of: derivatives with respect to the costs
# [clouds, n, n], their products with the costs' moments [clouds, n] (both [0] where no gradient is named), row floats.
sinkhorn_kd = _define(
    "sinkhorn_kd(Tensor student, Tensor teacher, Tensor kept, Tensor temperature, Tensor epsilon, SymInt iterations, "
    "str cost, str? gradient, SymInt vocab_size, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda kernels, *args: transport.sinkhorn_kd(kernels, *args),
    _sinkhorn_kd_fake,
)
# The gradient of the student's logits, of these.
sinkhorn_kd_gradient = _define(
    "sinkhorn_kd_gradient(Tensor student, Tensor teacher, Tensor kept, Tensor temperature, Tensor of_pairs, "
    "Tensor dot, Tensor floats, str cost, SymInt vocab_size, str backend) -> Tensor",
    lambda kernels, *args: transport.sinkhorn_kd_gradient(kernels, *args),
    lambda student, *args: _gradient_like(student),
)


def _class_ot_fake(student, teacher, class_cost, row_scale, exclude_labels, temperature, epsilon, iterations, gradient,
                   chunk_budget):  # fmt: skip
    dtype = class_ot.gradient_dtype(student.dtype)
    return (
        _new(student, row_scale.shape[0], dtype=row_scale.dtype),
        _new(student, *(student.shape if gradient else (0,)), dtype=dtype),
    )


# Optimal transport between the classes of student and teacher [outer, inner, V] under class_cost [V, V]: loss [rows],
# and its gradient by the named way (of the student's shape; fp32 of an fp16 student), or empty where none is named.
# The products are torch's, and no backend's. exclude_labels: a class of each row that is left out, or class_ot.NOTHING;
# epsilon [1] is fp64.
classes_ot = _define_for_all(
    "class_ot(Tensor student, Tensor teacher, Tensor class_cost, Tensor row_scale, Tensor? exclude_labels, "
    "Tensor temperature, Tensor epsilon, SymInt iterations, str? gradient, SymInt chunk_budget) -> (Tensor, Tensor)",
    class_ot.class_ot,
    _class_ot_fake,
)


def _uld(kernels, student, teacher, row_scale, temperature, *others):
    _check_temperature(row_scale, temperature)
    return kernels.uld(student, teacher, row_scale, temperature, *others)


def _uld_topk(kernels, student, teacher, row_scale, temperature, *others):
    _check_temperature(row_scale, temperature)
    return uld_family.uld_topk(kernels, student, teacher, row_scale, temperature, *others)


def _check_temperature(row_scale: Tensor, temperature: Tensor):
    if backends.bad_values_raise(row_scale.device):
        backends.check_values(row_scale, None, temperature, None, 0)


def _uld_fake(student, teacher, row_scale, temperature, student_vocab_size, teacher_vocab_size, chunk_budget, gradient,
              backend):  # fmt: skip
    count = row_scale.shape[0]
    return (
        _new(student, count, dtype=row_scale.dtype),
        _gradient_like(student) if gradient else _new(student, 0, dtype=student.dtype),
        _new(student, count, dtype=row_scale.dtype),
    )


def _uld_topk_fake(student, teacher, row_scale, temperature, k, *others):
    found = _uld_fake(student, teacher, row_scale, temperature, *others)
    return *found, _new(student, row_scale.shape[0], dtype=row_scale.dtype)


# Universal Logit Distillation (csrc/calls/uld.h) of two vocabularies: loss [rows] (row_scale folded in), gradient (the
# student's shape, or empty), divergence [rows]. uld_topk compares the k largest probabilities of each side alone, in
# chunks of rows whose buffers take so many bytes, and says by how much the divergence may be off.
uld = _define(
    f"uld({_LOGITS}, Tensor temperature, SymInt student_vocab_size, SymInt teacher_vocab_size, SymInt chunk_budget, "
    "bool gradient, str backend) -> (Tensor, Tensor, Tensor)",
    _uld,
    _uld_fake,
)
uld_topk = _define(
    f"uld_topk({_LOGITS}, Tensor temperature, SymInt k, SymInt student_vocab_size, SymInt teacher_vocab_size, "
    "SymInt chunk_budget, bool gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _uld_topk,
    _uld_topk_fake,
)

# gradient[..., r, :] *= factor[r], in place; rows whose factor is 1 are left alone.
scale_ = _define(
    "scale_(Tensor(a!) gradient, Tensor factor, str backend) -> ()",
    lambda kernels, gradient, factor: kernels.scale_(gradient, factor),
    lambda gradient, factor, backend: None,
)


def _scaled(kernels, gradient: Tensor, factor: Tensor) -> Tensor:
    gradient = gradient.clone()
    kernels.scale_(gradient, factor)
    return gradient


# The same into a fresh tensor.
scale = _define(
    "scale(Tensor gradient, Tensor factor, str backend) -> Tensor",
    _scaled,
    lambda gradient, factor, backend: torch.empty_like(gradient),
)
