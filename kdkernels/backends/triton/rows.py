"""The row sweeps of the dense family in Triton: the twin of csrc/cpu/rows.cpp.

One program works on one row, a tile of BLOCK columns at a time, and sweeps over the row up to three times:

    floats      running maximum, and the sum of exponentials relative to it              -> max, log sum
    sums        p, q from the log-probabilities, the divergence's value and slope        -> sum phi, sum psi
    gradient    scale / temperature * (psi - q * sum psi), and the label term            -> gradient

A divergence that knows sum psi after the first sweep (kl, reverse_kl, mixed_kl: see table.py) has the last
two done in one, so that a row in bf16 moves 10 bytes a column instead of 14. A tile is summed as a tree and
the tiles one after the other, so that no running sum is long.

Log-probabilities are (x - max) / temperature - log sum: differences first, so that a large common offset of
the logits costs no digits. Logits are widened to fp32 straight after the load. Columns past the row's end
read as -inf on both sides, which contributes nothing to any sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...families.rows import ROW_FLOATS, ROW_SUMS
from .launch import (
    device_of,
    fill_gradient,
    finite_base,
    finite_or_nan,
    gradient_target,
    is_bad_temperature,
    load_tile,
    log_of_sum,
    per_row_empty,
    row_strides,
    start_of_row,
    statistics_empty,
    stride,
    tile,
    written,
)
from .table import TABLE, weighted


@triton.jit
def _first_of(x, maximum, start, columns, BLOCK: tl.constexpr):
    """The tile's first column that holds the row's maximum, or `columns`."""
    return tl.min(tl.where(x == maximum, start + tl.arange(0, BLOCK), columns), 0)


@triton.jit
def _store_gradient(
    gradient_row, start, columns, s, q, slope, slope_sum, soft, hard, student_max, unit_log_sum, label,
    HAS_HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """soft * (psi - q * sum psi) + hard * (softmax(s) - one_hot(label)); the factors hold the row's scale."""
    column = start + tl.arange(0, BLOCK)
    # soft = 0 drops the divergence, also where it is not finite.
    value = tl.where(soft == 0, 0.0, soft * (slope - q * slope_sum))
    if HAS_HARD:
        unit_q = tl.exp(s - student_max - unit_log_sum)
        value += hard * tl.where(column == label, unit_q - 1, unit_q)
    tl.store(gradient_row + column, value.to(gradient_row.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "inner", "row_scale_stride", "temperature_stride", "hard_weight_stride"])
def rows_kernel(
    student,
    teacher,
    row_scale,
    labels,  # may be None
    temperature,
    hard_weight,  # may be None: no label term
    parameters,  # None where only FLOATS is run
    floats,  # [5, rows], in the order of ROW_FLOATS
    sums,  # [2, rows], in the order of ROW_SUMS; None where only FLOATS is run
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
    row_scale_stride,
    temperature_stride,
    hard_weight_stride,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    SLOPE_SUM: tl.constexpr,  # None where sum psi needs a sweep of its own
    FLOATS: tl.constexpr,  # whether to find the row floats; otherwise they are read
    SUMS: tl.constexpr,  # whether to find the row sums; otherwise they are read, if the gradient needs them
    UNIT_LOG_SUM: tl.constexpr,  # whether FLOATS finds the log sum at temperature 1, for the label term
    TEMPERATURE_SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if gradient is not None:
        gradient_row = gradient + row * gradient_columns
    scale = tl.load(row_scale + row * row_scale_stride)
    row_temperature = tl.load(temperature + row * temperature_stride)
    bad = is_bad_temperature(row_temperature)
    if hard_weight is not None:
        row_hard_weight = tl.load(hard_weight + row * hard_weight_stride)
        bad = bad | (row_hard_weight < 0) | (row_hard_weight > 1) | (row_hard_weight != row_hard_weight)
    else:
        row_hard_weight = tl.full((), 0, tl.float32)
    label = -1
    if labels is not None:
        label = tl.load(labels + row)
        bad = bad | (label < 0) | (label >= columns)

    # A skipped row is 0 everywhere. A row with a bad value is NaN: nothing is read or written out of bounds,
    # and to raise would cost a synchronisation.
    if (scale == 0) | bad:
        fill = tl.where(scale == 0, 0.0, float("nan"))
        if FLOATS:
            for i in tl.static_range(5):
                tl.store(floats + i * rows + row, fill)
        if SUMS:
            for i in tl.static_range(2):
                tl.store(sums + i * rows + row, fill)
        if loss is not None:
            tl.store(loss + row, fill)
        if statistics is not None:
            for i in tl.static_range(11):
                tl.store(statistics + i * rows + row, fill)
            for i in tl.static_range(2):
                tl.store(top1 + i * rows + row, 0)
        if gradient is not None:
            fill_gradient(gradient_row, 0, gradient_columns, fill, BLOCK)
        return

    inverse_temperature = 1 / row_temperature
    student_row = start_of_row(student, row, inner, student_outer_stride, student_inner_stride)
    teacher_row = start_of_row(teacher, row, inner, teacher_outer_stride, teacher_inner_stride)
    # The gradient may take the place of the student's logits. The label's is loaded here, before a reduction that all
    # threads of the program take part in, and so before any of them writes; a tile is loaded before it is written.
    if SUMS and labels is not None:
        student_label = tl.load(student_row + label).to(tl.float32)
    # Sweeps go to and fro: the last tiles of one are the first of the next, and may still be in a cache.
    last = (columns - 1) // BLOCK * BLOCK
    KNOWS_SLOPE_SUM: tl.constexpr = FLOATS and SUMS and SLOPE_SUM is not None

    # ---- floats
    if FLOATS:
        student_max = tl.full((), -float("inf"), tl.float32)
        teacher_max = tl.full((), -float("inf"), tl.float32)
        student_sum = tl.full((), 0, tl.float32)
        teacher_sum = tl.full((), 0, tl.float32)
        unit_sum = tl.full((), 0, tl.float32)
        log_ratio_sum = tl.full((), 0, tl.float32)
        for start in range(0, columns, BLOCK):
            s = load_tile(student_row, start, columns, BLOCK)
            t = load_tile(teacher_row, start, columns, BLOCK)
            new_student_max = tl.maximum(student_max, tl.max(s, 0))
            new_teacher_max = tl.maximum(teacher_max, tl.max(t, 0))
            student_base = finite_base(new_student_max)
            teacher_base = finite_base(new_teacher_max)
            # What was summed relative to the old maximum is worth this much relative to the new.
            student_decay = tl.exp((student_max - student_base) * inverse_temperature)
            teacher_decay = tl.exp((teacher_max - teacher_base) * inverse_temperature)
            student_e = tl.exp((s - student_base) * inverse_temperature)
            teacher_e = tl.exp((t - teacher_base) * inverse_temperature)
            if KNOWS_SLOPE_SUM:
                # The sum of e * ((s - student_max) - (t - teacher_max)): a new maximum moves each difference
                # by `shift`. An infinite sum whose exponentials have since decayed to 0 is dropped with them.
                shift = finite_base(student_max) - student_base - (finite_base(teacher_max) - teacher_base)
                log_ratio_sum = weighted(student_decay, log_ratio_sum + student_sum * shift)
                log_ratio_sum += tl.sum(weighted(student_e, (s - student_base) - (t - teacher_base)), 0)
            student_sum = student_sum * student_decay + tl.sum(student_e, 0)
            teacher_sum = teacher_sum * teacher_decay + tl.sum(teacher_e, 0)
            if UNIT_LOG_SUM:
                unit_sum = unit_sum * tl.exp(student_max - student_base) + tl.sum(tl.exp(s - student_base), 0)
            student_max = new_student_max
            teacher_max = new_teacher_max
        student_log_sum = log_of_sum(student_max, student_sum)
        teacher_log_sum = log_of_sum(teacher_max, teacher_sum)
        unit_log_sum = tl.full((), 0, tl.float32)
        if UNIT_LOG_SUM:
            unit_log_sum = log_of_sum(student_max, unit_sum)
        tl.store(floats + row, student_max)
        tl.store(floats + rows + row, student_log_sum)
        tl.store(floats + 2 * rows + row, teacher_max)
        tl.store(floats + 3 * rows + row, teacher_log_sum)
        tl.store(floats + 4 * rows + row, unit_log_sum)
    else:
        student_max = tl.load(floats + row)
        student_log_sum = tl.load(floats + rows + row)
        teacher_max = tl.load(floats + 2 * rows + row)
        teacher_log_sum = tl.load(floats + 3 * rows + row)
        unit_log_sum = tl.load(floats + 4 * rows + row)

    # ---- what the other two need of the row
    if SUMS or gradient is not None:
        parameter = tl.load(parameters)
        gradient_factor = row_temperature if TEMPERATURE_SQUARED else inverse_temperature
        soft = scale * (1 - row_hard_weight) * gradient_factor
        hard = scale * row_hard_weight
        slope_sum = tl.full((), 0, tl.float32)
        if KNOWS_SLOPE_SUM:
            log_ratio = log_ratio_sum / student_sum * inverse_temperature
            slope_sum += SLOPE_SUM(log_ratio + (teacher_log_sum - student_log_sum), parameter)
        elif not SUMS:
            slope_sum = tl.load(sums + rows + row)

    # ---- sums, with the gradient where sum psi is known
    if SUMS:
        phi = tl.full((), 0, tl.float32)
        if statistics is not None:
            tv = tl.full((), 0, tl.float32)
            student_entropy = tl.full((), 0, tl.float32)
            teacher_entropy = tl.full((), 0, tl.float32)
            student_first = columns
            teacher_first = columns
        for back in range(0, columns, BLOCK):
            start = last - back
            s = load_tile(student_row, start, columns, BLOCK)
            t = load_tile(teacher_row, start, columns, BLOCK)
            if statistics is not None:
                student_first = tl.minimum(student_first, _first_of(s, student_max, start, columns, BLOCK))
                teacher_first = tl.minimum(teacher_first, _first_of(t, teacher_max, start, columns, BLOCK))
            lq = (s - student_max) * inverse_temperature - student_log_sum
            lp = (t - teacher_max) * inverse_temperature - teacher_log_sum
            q = tl.exp(lq)
            p = tl.exp(lp)
            phi += tl.sum(VALUE(lp, lq, p, q, parameter), 0)
            if KNOWS_SLOPE_SUM:
                if gradient is not None:
                    _store_gradient(
                        gradient_row, start, columns, s, q, SLOPE(lp, lq, p, q, parameter),
                        finite_or_nan(slope_sum), soft, hard, student_max, unit_log_sum, label,
                        hard_weight is not None, BLOCK,
                    )  # fmt: skip
            else:
                slope_sum += tl.sum(SLOPE(lp, lq, p, q, parameter), 0)
            if statistics is not None:
                tv += tl.sum(0.5 * tl.abs(p - q), 0)
                student_entropy -= tl.sum(weighted(q, lq), 0)
                teacher_entropy -= tl.sum(weighted(p, lp), 0)
        if KNOWS_SLOPE_SUM:
            # A class without a teacher's mass may count in the first sweep, and have underflowed in the second.
            phi = tl.where(tl.abs(slope_sum) == float("inf"), float("inf"), phi)
        tl.store(sums + row, phi)
        tl.store(sums + rows + row, slope_sum)

        # Cross-entropy with the label, at temperature 1.
        cross_entropy = tl.full((), 0, tl.float32)
        if labels is not None:
            cross_entropy = unit_log_sum + (student_max - student_label)

        if loss is not None:
            divergence = phi
            if TEMPERATURE_SQUARED:
                divergence = row_temperature * row_temperature * phi
            row_loss = weighted(1 - row_hard_weight, divergence) + weighted(row_hard_weight, cross_entropy)
            tl.store(loss + row, scale * row_loss)

        if statistics is not None:
            student_label_log_prob = tl.full((), 0, tl.float32)
            teacher_label_log_prob = tl.full((), 0, tl.float32)
            if labels is not None:
                teacher_label = tl.load(teacher_row + label).to(tl.float32)
                student_label_log_prob = (student_label - student_max) * inverse_temperature - student_log_sum
                teacher_label_log_prob = (teacher_label - teacher_max) * inverse_temperature - teacher_log_sum
            tl.store(statistics + row, phi)
            tl.store(statistics + rows + row, cross_entropy)
            tl.store(statistics + 2 * rows + row, tv)
            tl.store(statistics + 3 * rows + row, student_entropy)
            tl.store(statistics + 4 * rows + row, teacher_entropy)
            tl.store(statistics + 5 * rows + row, -student_log_sum)
            tl.store(statistics + 6 * rows + row, -teacher_log_sum)
            tl.store(statistics + 7 * rows + row, student_label_log_prob)
            tl.store(statistics + 8 * rows + row, teacher_label_log_prob)
            tl.store(statistics + 9 * rows + row, student_max * inverse_temperature + student_log_sum)
            tl.store(statistics + 10 * rows + row, teacher_max * inverse_temperature + teacher_log_sum)
            # Of what is not NaN; 0 where nothing is.
            tl.store(top1 + row, tl.where(student_first < columns, student_first, 0))
            tl.store(top1 + rows + row, tl.where(teacher_first < columns, teacher_first, 0))

    # ---- gradient
    if gradient is not None:
        fill_gradient(gradient_row, columns, gradient_columns, 0.0, BLOCK)
        if not KNOWS_SLOPE_SUM:
            for start in range(0, columns, BLOCK):
                s = load_tile(student_row, start, columns, BLOCK)
                t = load_tile(teacher_row, start, columns, BLOCK)
                lq = (s - student_max) * inverse_temperature - student_log_sum
                lp = (t - teacher_max) * inverse_temperature - teacher_log_sum
                q = tl.exp(lq)
                _store_gradient(
                    gradient_row, start, columns, s, q, SLOPE(lp, lq, tl.exp(lp), q, parameter),
                    finite_or_nan(slope_sum), soft, hard, student_max, unit_log_sum, label,
                    hard_weight is not None, BLOCK,
                )  # fmt: skip


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


# ---- the operators: what they take and return is said in ops.py


def rows(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    parameters: Tensor,
    divergence: str,
    vocab_size: int,
    temperature_squared: bool,
    gradient: bool,
    statistics: bool,
    into: Tensor | None = None,
):
    """`into`, with a gradient: a contiguous tensor of the student's shape and dtype that takes it, in place of a fresh
    one. It may be the student itself."""
    into = gradient_target(student, gradient, into)
    loss = per_row_empty(student, (), row_scale)
    floats = per_row_empty(student, (len(ROW_FLOATS),), row_scale)
    sums = per_row_empty(student, (len(ROW_SUMS),), row_scale)
    row_statistics, top1 = statistics_empty(student, row_scale, statistics)
    _launch(
        student, teacher, row_scale, temperature, vocab_size, floats,
        labels=labels, hard_weight=hard_weight, parameters=parameters, divergence=divergence,
        temperature_squared=temperature_squared, sums=sums, loss=loss,
        statistics=row_statistics if statistics else None, top1=top1 if statistics else None,
        gradient=into if gradient else None, find_floats=True, find_sums=True,
        unit_log_sum=hard_weight is not None or (labels is not None and statistics),
    )  # fmt: skip
    return loss, into, floats, sums, row_statistics, top1


def row_floats(student: Tensor, teacher: Tensor, row_scale: Tensor, temperature: Tensor, vocab_size: int):
    floats = per_row_empty(student, (len(ROW_FLOATS),), row_scale)
    _launch(student, teacher, row_scale, temperature, vocab_size, floats, find_floats=True, unit_log_sum=True)
    return floats


def row_sums(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    parameters: Tensor,
    floats: Tensor,
    divergence: str,
    vocab_size: int,
    statistics: bool,
):
    sums = per_row_empty(student, (len(ROW_SUMS),), row_scale)
    row_statistics, top1 = statistics_empty(student, row_scale, statistics)
    _launch(
        student, teacher, row_scale, temperature, vocab_size, floats,
        labels=labels, parameters=parameters, divergence=divergence, sums=sums,
        statistics=row_statistics if statistics else None, top1=top1 if statistics else None, find_sums=True,
    )  # fmt: skip
    return sums, row_statistics, top1


def row_gradient(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    parameters: Tensor,
    floats: Tensor,
    sums: Tensor,
    divergence: str,
    vocab_size: int,
    temperature_squared: bool,
):
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch(
        student, teacher, row_scale, temperature, vocab_size, floats,
        labels=labels, hard_weight=hard_weight, parameters=parameters, divergence=divergence,
        temperature_squared=temperature_squared, sums=sums, gradient=gradient,
    )  # fmt: skip
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


def _launch(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    temperature: Tensor,
    vocab_size: int,
    floats: Tensor,
    *,
    labels: Tensor | None = None,
    hard_weight: Tensor | None = None,
    parameters: Tensor | None = None,
    divergence: str | None = None,
    temperature_squared: bool = False,
    sums: Tensor | None = None,
    loss: Tensor | None = None,
    statistics: Tensor | None = None,
    top1: Tensor | None = None,
    gradient: Tensor | None = None,
    find_floats: bool = False,
    find_sums: bool = False,
    unit_log_sum: bool = False,
):
    count = row_scale.numel()
    if count == 0:
        return
    value, slope, slope_sum = (None, None, None) if divergence is None else TABLE[divergence]
    block, warps = tile(vocab_size, statistics is not None)
    with device_of(student), written(gradient) as target:
        rows_kernel[(count,)](
            student, teacher, row_scale, labels, temperature, hard_weight, parameters,
            floats, sums, loss, statistics, top1, target,
            count, student.shape[1], vocab_size, student.shape[2],
            *row_strides(student), *row_strides(teacher),
            stride(row_scale), stride(temperature), 0 if hard_weight is None else stride(hard_weight),
            VALUE=value, SLOPE=slope, SLOPE_SUM=slope_sum, FLOATS=find_floats, SUMS=find_sums,
            UNIT_LOG_SUM=unit_log_sum, TEMPERATURE_SQUARED=temperature_squared, BLOCK=block, num_warps=warps,
        )  # fmt: skip
