"""The close rows of the dense family in Triton: a second kernel, which finds again what the first one found.

A row is close if its divergence came out small, or if its temperature is high: `close_below` in families/rows.py. The
first kernel marks such a row with a finite shift, and leaves its gradient to this kernel. The formulas stand at the
close lines of csrc/divergences.h. The programs of all other rows return at once.
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from ...families.rows import ROW_FLOATS
from .row import (
    DIVERGENCE,
    PHI,
    PSI,
    SHIFT,
    STUDENT_LOG_SUM,
    STUDENT_MAX,
    TEACHER_LOG_SUM,
    TEACHER_MAX,
    UNIT_LOG_SUM,
    finite_or_nan,
    gradient_terms,
    has_no_result,
    load_row_options,
    load_tile,
    log_prob,
    scale_of_gradient,
    start_of_row,
    store_gradient,
    store_loss,
)
from .table import close_terms, log1p


class Logits(NamedTuple):
    student: tl.tensor  # pointer to the row's first logit
    teacher: tl.tensor
    columns: tl.tensor
    inverse_temperature: tl.tensor


Floats = namedtuple("Floats", ROW_FLOATS)


class _Sums(NamedTuple):
    phi: tl.tensor
    psi: tl.tensor
    excess: tl.tensor  # of p (exp(d) - 1)


@triton.jit
def load_floats(floats, row, rows):
    return Floats(
        student_max=tl.load(floats + rows * STUDENT_MAX + row),
        student_log_sum=tl.load(floats + rows * STUDENT_LOG_SUM + row),
        teacher_max=tl.load(floats + rows * TEACHER_MAX + row),
        teacher_log_sum=tl.load(floats + rows * TEACHER_LOG_SUM + row),
        unit_log_sum=tl.load(floats + rows * UNIT_LOG_SUM + row),
    )


@triton.jit
def load_log_probs(logits, floats, start, BLOCK: tl.constexpr):
    """The logits of student and teacher in one tile, and the log-probabilities lp (teacher) and lq (student)."""
    s = load_tile(logits.student, start, logits.columns, BLOCK)
    t = load_tile(logits.teacher, start, logits.columns, BLOCK)
    lq = log_prob(s, floats.student_max, floats.student_log_sum, logits.inverse_temperature)
    lp = log_prob(t, floats.teacher_max, floats.teacher_log_sum, logits.inverse_temperature)
    return s, t, lp, lq


@triton.jit
def _rest(a, b):
    """(a - b) minus the rounded a - b (Knuth)."""
    difference = a - b
    of_b = difference - a
    return (a - (difference - of_b)) - (b + of_b)


@triton.jit
def first_shift(floats, inverse_temperature):
    """The shift before its correction: the difference of the log-sums, and the rounding of the maxima's difference."""
    log_sums = floats.student_log_sum - floats.teacher_log_sum
    return log_sums + _rest(floats.student_max, floats.teacher_max) * inverse_temperature


@triton.jit
def _terms(
    logits, floats, shift, start, parameter,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, CLOSE_VALUE: tl.constexpr, CLOSE_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The student's logits, q, phi, psi and p (exp(d) - 1) in one tile."""
    s, t, lp, lq = load_log_probs(logits, floats, start, BLOCK)
    p = tl.exp(lp)
    q = tl.exp(lq)
    ratio = (s - t - (floats.student_max - floats.teacher_max)) + _rest(s, t)
    d = ratio * logits.inverse_temperature - shift  # NaN if a logit is infinite
    phi, psi, change = close_terms(d, lp, lq, p, q, parameter, VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE)
    return s, q, phi, psi, change


@triton.jit
def _find_sums(
    logits, floats, shift, parameter,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, CLOSE_VALUE: tl.constexpr, CLOSE_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    found = _Sums(tl.full((), 0, tl.float32), tl.full((), 0, tl.float32), tl.full((), 0, tl.float32))
    for start in range(0, logits.columns, BLOCK):
        _, _, phi, psi, excess = _terms(
            logits, floats, shift, start, parameter, VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE, BLOCK
        )
        found = _Sums(found.phi + tl.sum(phi, 0), found.psi + tl.sum(psi, 0), found.excess + tl.sum(excess, 0))
    return found


@triton.jit(do_not_specialize=["rows", "inner", "strides"])
def close_rows_kernel(
    student,
    teacher,
    parameters,
    floats,  # [5, rows], read
    sums,  # [3, rows]: the shift says which rows are close. With SUMS, the kernel writes the sums of those
    loss,  # [rows] or None
    statistics,  # [11, rows] or None; the kernel writes the divergence
    gradient,  # [rows, gradient_columns], contiguous, or None; it may be `student`
    rows,
    inner,
    columns,
    gradient_columns,
    student_outer_stride: tl.int64,
    student_inner_stride: tl.int64,
    teacher_outer_stride: tl.int64,
    teacher_inner_stride: tl.int64,
    given,  # the row options
    strides,  # theirs
    TEMPERATURE_SQUARED: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    CLOSE_VALUE: tl.constexpr,
    CLOSE_SLOPE: tl.constexpr,
    KINK: tl.constexpr,  # whether the value has a kink at p = q
    SUMS: tl.constexpr,  # whether to find the row sums; otherwise they are read
    NEEDS_LOSS: tl.constexpr,  # whether the gradient depends on the loss
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    options = load_row_options(row, columns, given, strides)
    if has_no_result(options):
        return
    shift = tl.load(sums + rows * SHIFT + row)
    if (shift < float("inf")) == 0:
        return
    inverse_temperature = options.inverse_temperature
    student_row = start_of_row(student, row, inner, student_outer_stride, student_inner_stride)
    teacher_row = start_of_row(teacher, row, inner, teacher_outer_stride, teacher_inner_stride)
    logits = Logits(student_row, teacher_row, columns, inverse_temperature)
    norms = load_floats(floats, row, rows)
    parameter = tl.load(parameters)
    # Before the gradient, which may overwrite the logits.
    cross_entropy = tl.full((), 0, tl.float32)
    if (SUMS or NEEDS_LOSS) and given.labels is not None:
        student_label = tl.load(student_row + options.label).to(tl.float32)
        cross_entropy = norms.unit_log_sum + (norms.student_max - student_label)

    if SUMS:
        found = _find_sums(logits, norms, shift, parameter, VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE, BLOCK)
        if KINK:
            shift += log1p(found.excess)
            found = _find_sums(logits, norms, shift, parameter, VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE, BLOCK)
        corrected = found.phi - 0.5 * log1p(found.excess) * found.psi
        phi = tl.where(found.phi < float("inf"), corrected, found.phi)
        psi = found.psi
        tl.store(sums + rows * PHI + row, phi)
        tl.store(sums + rows * PSI + row, psi)
        tl.store(sums + rows * SHIFT + row, shift)
        if loss is not None:
            store_loss(loss, row, options, phi, cross_entropy, TEMPERATURE_SQUARED)
        if statistics is not None:
            tl.store(statistics + rows * DIVERGENCE + row, phi)
    else:
        phi = tl.load(sums + rows * PHI + row)
        psi = tl.load(sums + rows * PSI + row)

    if gradient is not None:
        HAS_HARD: tl.constexpr = given.hard_weight is not None
        scale = options.scale
        if NEEDS_LOSS:
            scale = scale_of_gradient(options, phi, cross_entropy, TEMPERATURE_SQUARED)
        terms = gradient_terms(
            gradient + row * gradient_columns,
            options,
            scale,
            norms.student_max,
            norms.unit_log_sum,
            HAS_HARD,
            TEMPERATURE_SQUARED,
        )
        for start in range(0, columns, BLOCK):
            s, q, _, slope, _ = _terms(
                logits, norms, shift, start, parameter, VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE, BLOCK
            )
            store_gradient(terms, start, columns, slope - q * finite_or_nan(psi), s, BLOCK)
