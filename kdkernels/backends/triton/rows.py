"""The row sweeps of the dense family in Triton: the twin of csrc/cpu/rows.cpp.

One program works on one row, a tile of BLOCK columns at a time, and sweeps over the row up to three times:

    floats      running maximum, and the sum of exponentials relative to it              -> max, log sum
    sums        p, q from the log-probabilities, the divergence's value and slope        -> sum phi, sum psi
    gradient    scale / temperature * (psi - q * sum psi), and the label term            -> gradient

Some divergences (kl, reverse_kl, mixed_kl: see table.py) give sum psi after the first sweep. For them one sweep does
the work of the last two, so that a row in bf16 moves 10 bytes a column instead of 14. But a row whose divergence comes
out small is swept again, by close_rows.py, and keeps its logits until then: a gradient that overwrites logits has a
sweep of its own, unless the first sweep shows that the row is far. A tile is summed as a tree, and tiles are summed one
after the other, so that no running sum is long.

Log-probabilities are (x - max) / temperature - log sum. The difference comes first, so that a large common offset of
the logits costs no digits. Logits are widened to fp32 right after the load. Columns past the row's end are read as
-inf on both sides, which contributes nothing to any sum.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...families.options import RowOptions
from ...families.rows import CLOSE_TEMPERATURE, ROW_FLOATS, ROW_SUMS, Rows, close_below
from .close_rows import Floats, Logits, close_rows_kernel, first_shift, load_floats, load_log_probs
from .launch import (
    device_of,
    gradient_target,
    loss_arguments,
    per_row_empty,
    row_strides,
    statistics_empty,
    stride,
    tile,
    written,
)
from .row import (
    FLOATS_COUNT,
    PHI,
    PSI,
    SHIFT,
    STUDENT_LOG_SUM,
    STUDENT_MAX,
    SUMS_COUNT,
    TEACHER_LOG_SUM,
    TEACHER_MAX,
    UNIT_LOG_SUM,
    Statistics,
    exponentials,
    fill_gradient,
    fill_places,
    fill_statistics,
    finite_base,
    finite_or_nan,
    gradient_terms,
    has_no_result,
    load_row_options,
    load_tile,
    log_of_sum,
    log_prob,
    scale_of_gradient,
    start_of_row,
    store_gradient,
    store_loss,
    store_statistics,
    value_without_result,
)
from .table import CLOSE_TABLE, KINKED, TABLE, weighted


class _Sums(NamedTuple):
    phi: tl.tensor
    psi: tl.tensor
    tv: tl.tensor
    student_entropy: tl.tensor
    teacher_entropy: tl.tensor
    student_first: tl.tensor
    teacher_first: tl.tensor


@triton.jit
def _find_floats(logits, UNIT: tl.constexpr, LOG_RATIO: tl.constexpr, BLOCK: tl.constexpr):
    """The floats of a row and, with LOG_RATIO, the mean of lq - lp under q."""
    inverse_temperature = logits.inverse_temperature
    student_max = tl.full((), -float("inf"), tl.float32)
    teacher_max = tl.full((), -float("inf"), tl.float32)
    student_sum = tl.full((), 0, tl.float32)
    teacher_sum = tl.full((), 0, tl.float32)
    unit_sum = tl.full((), 0, tl.float32)
    log_ratio_sum = tl.full((), 0, tl.float32)
    for start in range(0, logits.columns, BLOCK):
        s = load_tile(logits.student, start, logits.columns, BLOCK)
        t = load_tile(logits.teacher, start, logits.columns, BLOCK)
        new_student_max, student_base, student_decay, student_e = exponentials(s, student_max, inverse_temperature)
        new_teacher_max, teacher_base, teacher_decay, teacher_e = exponentials(t, teacher_max, inverse_temperature)
        if LOG_RATIO:
            # The sum of e * ((s - student_max) - (t - teacher_max)): a new maximum moves each difference by `shift`.
            # An infinite sum whose exponentials have since decayed to 0 is dropped with them.
            shift = finite_base(student_max) - student_base - (finite_base(teacher_max) - teacher_base)
            log_ratio_sum = weighted(student_decay, log_ratio_sum + student_sum * shift)
            log_ratio_sum += tl.sum(weighted(student_e, (s - student_base) - (t - teacher_base)), 0)
        student_sum = student_sum * student_decay + tl.sum(student_e, 0)
        teacher_sum = teacher_sum * teacher_decay + tl.sum(teacher_e, 0)
        if UNIT:
            unit_sum = unit_sum * tl.exp(student_max - student_base) + tl.sum(tl.exp(s - student_base), 0)
        student_max = new_student_max
        teacher_max = new_teacher_max
    student_log_sum = log_of_sum(student_max, student_sum)
    teacher_log_sum = log_of_sum(teacher_max, teacher_sum)
    unit_log_sum = tl.full((), 0, tl.float32)
    if UNIT:
        unit_log_sum = log_of_sum(student_max, unit_sum)
    mean_log_ratio = tl.full((), 0, tl.float32)
    if LOG_RATIO:
        mean_log_ratio = log_ratio_sum / student_sum * inverse_temperature
        mean_log_ratio = mean_log_ratio + (teacher_log_sum - student_log_sum)
    floats = Floats(
        student_max=student_max,
        student_log_sum=student_log_sum,
        teacher_max=teacher_max,
        teacher_log_sum=teacher_log_sum,
        unit_log_sum=unit_log_sum,
    )
    return floats, mean_log_ratio


@triton.jit
def _store_floats(floats, row, rows, found):
    tl.store(floats + rows * STUDENT_MAX + row, found.student_max)
    tl.store(floats + rows * STUDENT_LOG_SUM + row, found.student_log_sum)
    tl.store(floats + rows * TEACHER_MAX + row, found.teacher_max)
    tl.store(floats + rows * TEACHER_LOG_SUM + row, found.teacher_log_sum)
    tl.store(floats + rows * UNIT_LOG_SUM + row, found.unit_log_sum)


@triton.jit
def _first_of(x, maximum, start, columns, BLOCK: tl.constexpr):
    """The tile's first column that holds the row's maximum, or `columns`."""
    return tl.min(tl.where(x == maximum, start + tl.arange(0, BLOCK), columns), 0)


@triton.jit
def _find_sums(
    logits, floats, known_psi, terms, at_once, parameter,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a row. With `known_psi` (else None) and `terms` (else None) this sweep stores the gradient too; with
    `at_once` (else None) only where that is true."""
    phi = tl.full((), 0, tl.float32)
    psi = tl.full((), 0, tl.float32)
    tv = tl.full((), 0, tl.float32)
    student_entropy = tl.full((), 0, tl.float32)
    teacher_entropy = tl.full((), 0, tl.float32)
    student_first = logits.columns
    teacher_first = logits.columns
    # From the last tile to the first: the last tiles of the sweep before may still be in a cache.
    last = (logits.columns - 1) // BLOCK * BLOCK
    for back in range(0, logits.columns, BLOCK):
        start = last - back
        s, t, lp, lq = load_log_probs(logits, floats, start, BLOCK)
        if STATISTICS:
            student_first = tl.minimum(student_first, _first_of(s, floats.student_max, start, logits.columns, BLOCK))
            teacher_first = tl.minimum(teacher_first, _first_of(t, floats.teacher_max, start, logits.columns, BLOCK))
        q = tl.exp(lq)
        p = tl.exp(lp)
        phi += tl.sum(VALUE(lp, lq, p, q, parameter), 0)
        if known_psi is None:
            psi += tl.sum(SLOPE(lp, lq, p, q, parameter), 0)
        elif terms is not None:
            slope = SLOPE(lp, lq, p, q, parameter) - q * finite_or_nan(known_psi)
            if at_once is None:
                store_gradient(terms, start, logits.columns, slope, s, BLOCK)
            else:
                if at_once:
                    store_gradient(terms, start, logits.columns, slope, s, BLOCK)
        if STATISTICS:
            tv += tl.sum(0.5 * tl.abs(p - q), 0)
            student_entropy -= tl.sum(weighted(q, lq), 0)
            teacher_entropy -= tl.sum(weighted(p, lp), 0)
    if known_psi is not None:
        psi = known_psi
        # The first sweep may count a class without teacher mass that has underflowed in this one.
        phi = tl.where(tl.abs(psi) == float("inf"), float("inf"), phi)
    return _Sums(phi, psi, tv, student_entropy, teacher_entropy, student_first, teacher_first)


@triton.jit
def _find_gradient(logits, floats, psi, terms, parameter, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient in a sweep of its own."""
    for start in range(0, logits.columns, BLOCK):
        s, _, lp, lq = load_log_probs(logits, floats, start, BLOCK)
        q = tl.exp(lq)
        slope = SLOPE(lp, lq, tl.exp(lp), q, parameter) - q * finite_or_nan(psi)
        store_gradient(terms, start, logits.columns, slope, s, BLOCK)


@triton.jit(do_not_specialize=["rows", "inner", "strides"])
def rows_kernel(
    student,
    teacher,
    parameters,  # None if only FLOATS is run
    floats,  # [5, rows], in the order of ROW_FLOATS
    sums,  # [3, rows], in the order of ROW_SUMS; None if only FLOATS is run
    loss,  # [rows] or None
    statistics,  # [11, rows], in the order of ROW_STATISTICS, or None
    top1,  # [2, rows] with statistics
    gradient,  # [rows, gradient_columns], contiguous, or None; it may be `student`
    rows,
    inner,  # row r is (r // inner, r % inner) of the logits
    columns,  # classes that count
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
    SLOPE_SUM: tl.constexpr,  # None if sum psi needs a sweep of its own
    CLOSE_BELOW: tl.constexpr,  # a row whose divergence is smaller is close: its gradient is left to close_rows_kernel
    CLOSE_TEMPERATURE: tl.constexpr,  # and so is a row of this temperature or a higher one
    IN_PLACE: tl.constexpr,  # whether the gradient overwrites the student's logits
    FLOATS: tl.constexpr,  # whether to find the row floats; otherwise they are read
    SUMS: tl.constexpr,  # whether to find the row sums; otherwise they are read, if the gradient needs them
    NEEDS_LOSS: tl.constexpr,  # whether the gradient depends on the loss, so that no sweep finds both
    UNIT: tl.constexpr,  # whether FLOATS finds the log sum at temperature 1, for the label term
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if gradient is not None:
        gradient_row = gradient + row * gradient_columns
    options = load_row_options(row, columns, given, strides)

    if has_no_result(options):  # before any logit is read: a label may be out of bounds
        value = value_without_result(options)
        if FLOATS:
            fill_places(floats, row, rows, value, FLOATS_COUNT)
        if SUMS:
            fill_places(sums, row, rows, value, SUMS_COUNT)
        if loss is not None:
            tl.store(loss + row, value)
        if statistics is not None:
            fill_statistics(statistics, top1, row, rows, value)
        if gradient is not None:
            fill_gradient(gradient_row, 0, gradient_columns, value, BLOCK)
        return

    inverse_temperature = options.inverse_temperature
    student_row = start_of_row(student, row, inner, student_outer_stride, student_inner_stride)
    teacher_row = start_of_row(teacher, row, inner, teacher_outer_stride, teacher_inner_stride)
    logits = Logits(student_row, teacher_row, columns, inverse_temperature)
    # The gradient may overwrite the student's logits. So the label's logit is loaded here, before a reduction of all
    # threads of the program, and so before any thread writes. A tile is loaded before it is written.
    if (SUMS or NEEDS_LOSS) and given.labels is not None:
        student_label = tl.load(student_row + options.label).to(tl.float32)

    KNOWS_PSI: tl.constexpr = FLOATS and SUMS and SLOPE_SUM is not None and not NEEDS_LOSS
    if FLOATS:
        norms, mean_log_ratio = _find_floats(logits, UNIT, KNOWS_PSI, BLOCK)
        _store_floats(floats, row, rows, norms)
    else:
        norms = load_floats(floats, row, rows)

    cross_entropy = tl.full((), 0, tl.float32)
    if (SUMS or NEEDS_LOSS) and given.labels is not None:
        cross_entropy = norms.unit_log_sum + (norms.student_max - student_label)
    HAS_HARD: tl.constexpr = given.hard_weight is not None
    terms = None
    if gradient is not None and not NEEDS_LOSS:
        terms = gradient_terms(
            gradient_row, options, options.scale, norms.student_max, norms.unit_log_sum, HAS_HARD, TEMPERATURE_SQUARED
        )
    if SUMS or gradient is not None:
        parameter = tl.load(parameters)
    known_psi = None
    if KNOWS_PSI:
        known_psi = tl.full((), 0, tl.float32) + SLOPE_SUM(mean_log_ratio, parameter)
    # Whether the sums' sweep stores the gradient. In place it does if the row is surely not close: the divergence is at
    # least sum psi, and twice the square of the total variation, which no difference of two largest probabilities
    # exceeds.
    at_once = None  # always
    if KNOWS_PSI and IN_PLACE:
        gap = tl.exp(-norms.student_log_sum) - tl.exp(-norms.teacher_log_sum)
        far = (known_psi > 1.01 * CLOSE_BELOW) | (2 * gap * gap > 1.01 * CLOSE_BELOW)
        at_once = far & (options.temperature < CLOSE_TEMPERATURE)

    if SUMS:
        totals = _find_sums(
            logits, norms, known_psi, terms, at_once, parameter, VALUE, SLOPE, statistics is not None, BLOCK
        )
        psi = totals.psi
        shift = tl.full((), float("inf"), tl.float32)
        if (totals.phi < CLOSE_BELOW) | (options.temperature >= CLOSE_TEMPERATURE):
            shift = first_shift(norms, inverse_temperature)
        tl.store(sums + rows * SHIFT + row, shift)
        tl.store(sums + rows * PHI + row, totals.phi)
        tl.store(sums + rows * PSI + row, psi)
        if loss is not None:
            store_loss(loss, row, options, totals.phi, cross_entropy, TEMPERATURE_SQUARED)
        if statistics is not None:
            student_label_log_prob = tl.full((), 0, tl.float32)
            teacher_label_log_prob = tl.full((), 0, tl.float32)
            if given.labels is not None:
                teacher_label = tl.load(teacher_row + options.label).to(tl.float32)
                student_label_log_prob = log_prob(
                    student_label, norms.student_max, norms.student_log_sum, inverse_temperature
                )
                teacher_label_log_prob = log_prob(
                    teacher_label, norms.teacher_max, norms.teacher_log_sum, inverse_temperature
                )
            row_statistics = Statistics(
                divergence=totals.phi,
                cross_entropy=cross_entropy,
                tv=totals.tv,
                student_entropy=totals.student_entropy,
                teacher_entropy=totals.teacher_entropy,
                student_max_log_prob=-norms.student_log_sum,
                teacher_max_log_prob=-norms.teacher_log_sum,
                student_label_log_prob=student_label_log_prob,
                teacher_label_log_prob=teacher_label_log_prob,
                student_lse=norms.student_max * inverse_temperature + norms.student_log_sum,
                teacher_lse=norms.teacher_max * inverse_temperature + norms.teacher_log_sum,
                student_first=totals.student_first,
                teacher_first=totals.teacher_first,
            )
            store_statistics(statistics, top1, row, rows, columns, row_statistics)

    if gradient is not None:
        fill_gradient(gradient_row, columns, gradient_columns, 0.0, BLOCK)
        if not KNOWS_PSI or IN_PLACE:
            if not SUMS:
                psi = tl.load(sums + rows * PSI + row)
                shift = tl.load(sums + rows * SHIFT + row)
            if NEEDS_LOSS:
                phi = totals.phi if SUMS else tl.load(sums + rows * PHI + row)
                scale = scale_of_gradient(options, phi, cross_entropy, TEMPERATURE_SQUARED)
                terms = gradient_terms(
                    gradient_row, options, scale, norms.student_max, norms.unit_log_sum, HAS_HARD, TEMPERATURE_SQUARED
                )
            waits = (shift < float("inf")) == 0
            if at_once is not None:
                waits = waits & (at_once == 0)
            if waits:
                _find_gradient(logits, norms, psi, terms, parameter, SLOPE, BLOCK)


@triton.jit(do_not_specialize=["factor_stride"])
def scale_kernel(gradient, factor, columns, factor_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_factor = tl.load(factor + row * factor_stride)
    if row_factor == 1:
        return
    gradient_row = gradient + row * columns
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        value = tl.load(gradient_row + column, mask=inside, other=0).to(tl.float32) * row_factor
        tl.store(gradient_row + column, value.to(gradient_row.dtype.element_ty), mask=inside)


# ---- the launchers: families/kernels.py says what they take and return


def rows(problem: Rows, gradient: bool, out: Tensor | None = None):
    """`out`: a contiguous tensor of the student's shape and dtype that receives the gradient, or None for a new one.
    It may be the student itself."""
    student, options, statistics = problem.student, problem.options, problem.statistics
    row_scale = options.row_scale
    out = gradient_target(student, gradient, out)
    loss = per_row_empty(student, (), row_scale)
    floats = per_row_empty(student, (len(ROW_FLOATS),), row_scale)
    sums = per_row_empty(student, (len(ROW_SUMS),), row_scale)
    row_statistics, top1 = statistics_empty(student, row_scale, statistics)
    _launch(
        problem,
        options,
        out if gradient else None,
        floats=floats,
        sums=sums,
        loss=loss,
        statistics=row_statistics if statistics else None,
        top1=top1 if statistics else None,
        FLOATS=True,
        SUMS=True,
        UNIT=options.hard_weight is not None or (options.labels is not None and statistics),
    )
    return loss, out, floats, sums, row_statistics, top1


def row_floats(problem: Rows):
    floats = per_row_empty(problem.student, (len(ROW_FLOATS),), problem.row_scale)
    options = problem.options._replace(labels=None, hard_weight=None)
    _launch(problem, options, floats=floats, FLOATS=True, UNIT=True)
    return floats


def row_sums(problem: Rows, floats: Tensor):
    sums = per_row_empty(problem.student, (len(ROW_SUMS),), problem.row_scale)
    row_statistics, top1 = statistics_empty(problem.student, problem.row_scale, problem.statistics)
    wanted = {"statistics": row_statistics, "top1": top1} if problem.statistics else {}
    _launch(problem, problem.options._replace(hard_weight=None), floats=floats, sums=sums, SUMS=True, **wanted)
    return sums, row_statistics, top1


def row_gradient(problem: Rows, floats: Tensor, sums: Tensor):
    student = problem.student
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(problem, problem.options, gradient, floats=floats, sums=sums)
    return gradient


def scale_(gradient: Tensor, factor: Tensor) -> None:
    if gradient.numel() == 0:
        return
    columns = gradient.shape[-1]
    block, warps = tile(columns)
    with device_of(gradient), written(gradient) as target:
        scale_kernel[(gradient.numel() // columns,)](
            target, factor, columns, stride(factor), BLOCK=block, num_warps=warps
        )


# Arguments of the kernel that a launch may leave out.
_NOT_GIVEN = dict.fromkeys(("sums", "loss", "statistics", "top1"))
_NOT_FOUND = dict.fromkeys(("FLOATS", "SUMS", "UNIT"), False)


def _launch(problem: Rows, options: RowOptions, gradient: Tensor | None = None, **arguments):
    """Runs sweeps over the rows. `arguments` have the kernel's names."""
    student, teacher, vocab_size = problem.student, problem.teacher, problem.vocab_size
    count = options.row_scale.numel()
    if count == 0:
        return
    arguments = _NOT_GIVEN | _NOT_FOUND | loss_arguments(options) | arguments
    value, slope, slope_sum = TABLE[problem.divergence]
    bound = close_below(problem.divergence, torch.float32)
    block, warps = tile(vocab_size, arguments["statistics"] is not None)
    (student_outer, student_inner), (teacher_outer, teacher_inner) = row_strides(student), row_strides(teacher)
    common = {
        "parameters": problem.parameters,
        "rows": count,
        "inner": student.shape[1],
        "columns": vocab_size,
        "gradient_columns": student.shape[2],
        "VALUE": value,
        "SLOPE": slope,
        "student_outer_stride": student_outer,
        "student_inner_stride": student_inner,
        "teacher_outer_stride": teacher_outer,
        "teacher_inner_stride": teacher_inner,
    }
    with device_of(student), written(gradient) as target:
        rows_kernel[(count,)](
            student, teacher, gradient=target, SLOPE_SUM=slope_sum, CLOSE_BELOW=bound,
            CLOSE_TEMPERATURE=CLOSE_TEMPERATURE if bound else float("inf"),
            IN_PLACE=gradient is not None and gradient.data_ptr() == student.data_ptr() != 0,
            BLOCK=block, num_warps=warps, **common, **arguments,
        )  # fmt: skip
        if not bound or arguments["sums"] is None:
            return
        close_value, close_slope = CLOSE_TABLE[problem.divergence]
        block, warps = tile(vocab_size, True)
        of_close = {name: x for name, x in arguments.items() if name not in ("FLOATS", "UNIT", "top1")}
        close_rows_kernel[(count,)](
            student, teacher, gradient=target, CLOSE_VALUE=close_value, CLOSE_SLOPE=close_slope,
            KINK=problem.divergence in KINKED, BLOCK=block, num_warps=warps, **common, **of_close,
        )  # fmt: skip
