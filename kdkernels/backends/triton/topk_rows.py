"""The loss against a sparse teacher in Triton, a twin of csrc/cpu/topk_rows.cpp; csrc/calls/topk.h has the formulas.

One program works on one row, a tile of BLOCK columns at a time:

    others      running maximum, and the sum of exponentials, of the classes that no entry names
    entries     their logits, gathered: the row's normaliser, then phi and psi of each entry and of the bucket
    gradient    of every tile, from the sums                                                       -> gradient

The kernel reads a row of logits twice (once without a gradient), and makes no tensor of the vocabulary's width but the
gradient. The entries of a row ascend, so the entries of a tile are a range of them; `starts` has the begin of each
range. In a tile with n entries each column finds its own entry by bisection: 1 + log2(n) loads that neighbours share. A
row whose entries are all classes costs log2(BLOCK) loads a column, not BLOCK comparisons.

The kernel leaves a close row (`close_below` in families/rows.py) to a second launch, with CLOSE. That one finds the
log-sums in fp64 and has the close lines; csrc/divergences.h says why. The programs of all other rows return at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...families.rows import CLOSE_TEMPERATURE, close_below
from ...families.topk import TopkRows
from .close_topk_rows import close_terms_of_entries, wide_sums, without_slack
from .entries import Row, entry_of, load_entries, load_others
from .launch import (
    device_of,
    gradient_target,
    lanes,
    loss_arguments,
    per_row_empty,
    row_strides,
    starts_of,
    statistics_empty,
    topk_tile,
    written,
)
from .row import (
    DIVERGENCE,
    Statistics,
    add_exponentials,
    exponentials,
    fill_gradient,
    fill_statistics,
    finite_base,
    finite_or_nan,
    gradient_terms,
    has_no_result,
    load_row_options,
    load_tile,
    log_of_rest,
    log_of_sum,
    log_prob,
    scale_of_gradient,
    start_of_row,
    store_gradient,
    store_loss,
    store_statistics,
    value_without_result,
)
from .table import CLOSE_TABLE, TABLE, close_terms, weighted


class _Softmax(NamedTuple):
    """Running numbers of some classes of the student."""

    maximum: tl.tensor
    sum_exp: tl.tensor
    unit_sum: tl.tensor  # the sum at temperature 1
    moment: tl.tensor  # the sum of e (x - max), e = exp((x - max) / temperature): all terms are <= 0, so none cancels
    first: tl.tensor  # the first class that holds the maximum


class _Normaliser(NamedTuple):
    maximum: tl.tensor
    log_sum: tl.tensor
    wide_log_sum: tl.tensor  # of a close row: the log-sum in fp64


class _Bucket(NamedTuple):
    """The classes that no entry names."""

    base: tl.tensor
    log_sum: tl.tensor
    slope: tl.tensor  # psi - q * sum psi of the bucket


class _Sums(NamedTuple):
    phi: tl.tensor
    psi: tl.tensor
    tv: tl.tensor
    teacher_entropy: tl.tensor
    teacher_max: tl.tensor
    teacher_sum: tl.tensor
    teacher_first: tl.tensor
    teacher_label: tl.tensor


# ---- the softmax of the student


@triton.jit
def _first_of(x, index, maximum, new_maximum, first, columns):
    """The first class so far that holds the maximum, or `columns`."""
    here = tl.min(tl.where(x == new_maximum, index, columns), 0)
    return tl.where(new_maximum > maximum, here, tl.minimum(first, here))


@triton.jit
def _no_classes(columns):
    zero = tl.full((), 0, tl.float32)
    return _Softmax(tl.full((), -float("inf"), tl.float32), zero, zero, zero, tl.full((), 0, tl.int32) + columns)


@triton.jit
def _add_classes(softmax, x, index, row, UNIT: tl.constexpr, STATISTICS: tl.constexpr):
    """The running numbers with the classes x. `unit_sum` needs UNIT; `moment` and `first` need STATISTICS."""
    new_maximum, base, decay, e = exponentials(x, softmax.maximum, row.inverse_temperature)
    sum_exp = softmax.sum_exp * decay + tl.sum(e, 0)
    unit_sum = softmax.unit_sum
    if UNIT:
        unit_sum = unit_sum * tl.exp(softmax.maximum - base) + tl.sum(tl.exp(x - base), 0)
    moment = softmax.moment
    first = softmax.first
    if STATISTICS:
        # A new maximum moves each difference by the same number.
        moved = moment + softmax.sum_exp * (finite_base(softmax.maximum) - base)
        moment = weighted(decay, moved) + tl.sum(weighted(e, x - base), 0)
        first = _first_of(x, index, softmax.maximum, new_maximum, first, row.columns)
    return _Softmax(new_maximum, sum_exp, unit_sum, moment, first)


@triton.jit
def _add_others(others, row, UNIT: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the classes that no entry names."""
    for tile in range(tl.cdiv(row.columns, BLOCK)):
        column, s = load_others(row, tile, BLOCK)
        others = _add_classes(others, s, column, row, UNIT, STATISTICS)
    return others


@triton.jit
def _add_entries(
    student, row, ALL_CLASSES: tl.constexpr, UNIT: tl.constexpr, STATISTICS: tl.constexpr, LANES: tl.constexpr
):
    """Adds the entries; with the result, the maximum and the sum of the entries alone."""
    entries_max = tl.full((), -float("inf"), tl.float32)
    entries_sum = tl.full((), 0, tl.float32)
    for lane in range(0, row.entries, LANES):
        index, s, _ = load_entries(row, lane, LANES)
        if ALL_CLASSES:
            student = _add_classes(student, s, index, row, UNIT, STATISTICS)
        entries_max, entries_sum = add_exponentials(s, entries_max, entries_sum, row.inverse_temperature)
    return student, entries_max, entries_sum


# ---- sums


@triton.jit
def _entry_sums(
    row, softmax, tail, label, parameter,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, STATISTICS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """phi, psi and statistics of the entries, whose student's probabilities are those of the _Normaliser `softmax`.

    `teacher_label` is the log-probability of `label`: `tail` if no entry is the label, or if `label` is None.
    """
    phi = tl.full((), 0, tl.float32)
    psi = tl.full((), 0, tl.float32)
    tv = tl.full((), 0, tl.float32)
    teacher_entropy = tl.full((), 0, tl.float32)
    teacher_max = tl.full((), -float("inf"), tl.float32)
    teacher_sum = tl.full((), 0, tl.float32)
    teacher_first = row.columns
    teacher_label = tail
    for lane in range(0, row.entries, LANES):
        index, s, lp = load_entries(row, lane, LANES)
        lq = log_prob(s, softmax.maximum, softmax.log_sum, row.inverse_temperature)
        lq = tl.where(index < row.columns, lq, -float("inf"))
        q = tl.exp(lq)
        p = tl.exp(lp)
        phi += tl.sum(VALUE(lp, lq, p, q, parameter), 0)
        psi += tl.sum(SLOPE(lp, lq, p, q, parameter), 0)
        if STATISTICS:
            tv += tl.sum(0.5 * tl.abs(p - q), 0)
            teacher_entropy -= tl.sum(weighted(p, lp), 0)
            new_teacher_max, teacher_sum = add_exponentials(lp, teacher_max, teacher_sum, 1.0)
            teacher_first = _first_of(lp, index, teacher_max, new_teacher_max, teacher_first, row.columns)
            teacher_max = new_teacher_max
            if label is not None:
                is_label = index == label
                of_entry = tl.sum(tl.where(is_label, lp, 0.0), 0)
                teacher_label = tl.where(tl.max(is_label.to(tl.int32), 0) > 0, of_entry, teacher_label)
    return _Sums(phi, psi, tv, teacher_entropy, teacher_max, teacher_sum, teacher_first, teacher_label)


@triton.jit
def _bucket_log_prob(row, student_max, student_log_sum, others, entries_max, entries_sum):
    """The log-probability of the bucket, and the log sum of its classes."""
    # Without mass in the bucket no maximum is its base. A row without a softmax has no bucket.
    nothing = others.sum_exp == 0
    others_log_sum = tl.where(nothing, 0.0, tl.log(others.sum_exp))
    lq = (others.maximum - student_max) * row.inverse_temperature + (others_log_sum - student_log_sum)
    # Near 1 the share of the bucket gets its digits from the share of the entries.
    relative = log_prob(entries_max, student_max, student_log_sum, row.inverse_temperature)
    share = weighted(entries_sum, tl.exp(relative))
    lq = tl.where(lq > -0.5, log_of_rest(share), lq)
    return tl.where(nothing & (student_log_sum == student_log_sum), -float("inf"), lq), others_log_sum


@triton.jit
def _teacher_lse(sums, tail, WITH_TAIL: tl.constexpr):
    maximum = sums.teacher_max
    total = sums.teacher_sum
    if WITH_TAIL:
        maximum = tl.maximum(sums.teacher_max, tail)
        base = finite_base(maximum)
        total = total * tl.exp(sums.teacher_max - base) + tl.exp(tail - base)
    return tl.where(total == 0, -float("inf"), maximum + tl.log(total))


# ---- gradient


@triton.jit
def _find_gradient(
    row, softmax, bucket, psi, terms,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, CLOSE_VALUE: tl.constexpr, CLOSE_SLOPE: tl.constexpr,
    CLOSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of every tile. `bucket` is None if the teacher's support is its entries alone."""
    tiles = tl.cdiv(row.columns, BLOCK)
    for back in range(tiles):
        tile = tiles - 1 - back  # the last tiles of the sweep before may still be in a cache
        column = tile * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(row.starts + tile)
        end = tl.load(row.starts + tile + 1)
        if bucket is None:
            slope = tl.zeros([BLOCK], tl.float32) + (psi - psi)  # 0, or NaN
            if terms.hard is not None:
                s = load_tile(row.student, tile * BLOCK, row.columns, BLOCK)
            else:
                # Only a tile with entries is read.
                s = tl.full([BLOCK], -float("inf"), tl.float32)
                if first < end:
                    s = load_tile(row.student, tile * BLOCK, row.columns, BLOCK)
        else:
            s = load_tile(row.student, tile * BLOCK, row.columns, BLOCK)
            # (psi - q Psi) (q / q_R) of the bucket. Its q / q_R is a softmax over the classes that no entry names.
            slope = bucket.slope * tl.exp(log_prob(s, bucket.base, bucket.log_sum, row.inverse_temperature))
        if first < end:
            entry = entry_of(column, row, first, end)
            lp = tl.load(row.log_probs + entry, mask=entry >= 0, other=-float("inf"))
            lq = log_prob(s, softmax.maximum, softmax.log_sum, row.inverse_temperature)
            q = tl.exp(lq)
            of_entry = SLOPE(lp, lq, tl.exp(lp), q, row.parameter) - q * psi
            if CLOSE:
                q, _, close_psi, _ = close_terms_of_entries(
                    row, s, lp, entry, softmax, VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE
                )
                of_entry = close_psi - q * psi
            slope = tl.where(entry >= 0, of_entry, slope)
        store_gradient(terms, tile * BLOCK, row.columns, slope, s, BLOCK)


@triton.jit(do_not_specialize=["rows", "inner", "entries", "strides"])
def topk_rows_kernel(
    student,
    indices,  # [rows, entries], ascending; an index from `columns` on is no entry
    log_probs,  # [rows, entries]
    starts,  # [rows, tiles + 1]: the number of entries whose class comes before each tile
    tail_log_prob,  # [rows]
    log_probs_rounding,  # [rows, entries] or None: what fp32 does not hold of log_probs
    tail_rounding,  # [rows] or None: the same of tail_log_prob
    parameters,
    slack,  # [1] or None: c, if phi has c (p - q) more in rows of CLOSE_TEMPERATURE or a higher one
    loss,  # [rows]
    statistics,  # [11, rows], in the order of ROW_STATISTICS, or None
    top1,  # [2, rows] with statistics
    gradient,  # [rows, gradient_columns], contiguous, or None; it may be `student`
    close,  # [rows] int32: whether each row is close; None if no row is
    rows,
    inner,  # row r is (r // inner, r % inner) of the logits
    columns,  # classes that count
    gradient_columns,
    entries,
    student_outer_stride: tl.int64,
    student_inner_stride: tl.int64,
    given,  # the row options
    strides,  # theirs
    TEMPERATURE_SQUARED: tl.constexpr,
    NEEDS_LOSS: tl.constexpr,  # whether the gradient depends on the loss
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    CLOSE_VALUE: tl.constexpr,
    CLOSE_SLOPE: tl.constexpr,
    CLOSE_BELOW: tl.constexpr,  # a row whose divergence is below is close
    CLOSE_TEMPERATURE: tl.constexpr,  # and so is a row of this temperature or a higher one
    CLOSE: tl.constexpr,  # whether to work on the close rows, which an earlier launch found
    SUPPORT_ONLY: tl.constexpr,  # no bucket; the student is renormalised over the entries
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # entries that are worked on at a time
):
    row_index = tl.program_id(0).to(tl.int64)
    if gradient is not None:
        gradient_row = gradient + row_index * gradient_columns
    options = load_row_options(row_index, columns, given, strides)

    if CLOSE:
        if has_no_result(options):
            return
        if tl.load(close + row_index) == 0:
            return
    if has_no_result(options):  # before any logit is read: a label may be out of bounds
        value = value_without_result(options)
        tl.store(loss + row_index, value)
        if statistics is not None:
            fill_statistics(statistics, top1, row_index, rows, value)
        if gradient is not None:
            fill_gradient(gradient_row, 0, gradient_columns, value, BLOCK)
        return

    HAS_HARD: tl.constexpr = given.hard_weight is not None
    STATISTICS: tl.constexpr = (statistics is not None) and not CLOSE
    # The softmax at temperature 1 is for the label term or the cross-entropy.
    UNIT: tl.constexpr = HAS_HARD or (STATISTICS and given.labels is not None)
    # With SUPPORT_ONLY the other classes matter only to the label term and the statistics.
    ALL_CLASSES: tl.constexpr = (not SUPPORT_ONLY) or UNIT or STATISTICS
    inverse_temperature = options.inverse_temperature
    parameter = tl.load(parameters)
    row = Row(
        start_of_row(student, row_index, inner, student_outer_stride, student_inner_stride),
        columns,
        inverse_temperature,
        indices + row_index * entries,
        log_probs + row_index * entries,
        None if log_probs_rounding is None else log_probs_rounding + row_index * entries,
        starts + row_index * (tl.cdiv(columns, BLOCK) + 1),
        entries,
        options.temperature,
        parameter,
    )
    tail = tl.load(tail_log_prob + row_index)
    if given.labels is not None:
        student_label = tl.load(row.student + options.label).to(tl.float32)

    others = _no_classes(columns)
    if ALL_CLASSES:
        others = _add_others(others, row, UNIT, STATISTICS, BLOCK)
    whole, entries_max, entries_sum = _add_entries(others, row, ALL_CLASSES, UNIT, STATISTICS, LANES)
    student_log_sum = log_of_sum(whole.maximum, whole.sum_exp)
    unit_log_sum = log_of_sum(whole.maximum, whole.unit_sum)
    if SUPPORT_ONLY:
        softmax = _Normaliser(entries_max, log_of_sum(entries_max, entries_sum), 0.0)
    else:
        softmax = _Normaliser(whole.maximum, student_log_sum, 0.0)

    label = None if given.labels is None else options.label
    sums = _entry_sums(row, softmax, tail, label, parameter, VALUE, SLOPE, STATISTICS, LANES)
    phi = sums.phi
    psi = sums.psi
    if not SUPPORT_ONLY:
        lq_bucket, others_log_sum = _bucket_log_prob(
            row, whole.maximum, student_log_sum, others, entries_max, entries_sum
        )
        q_bucket = tl.exp(lq_bucket)
        p_bucket = tl.exp(tail)
        phi += VALUE(tail, lq_bucket, p_bucket, q_bucket, parameter)
        bucket_slope = SLOPE(tail, lq_bucket, p_bucket, q_bucket, parameter)
        psi += bucket_slope

    if CLOSE:
        of_others, of_entries = wide_sums(row, softmax.maximum, SUPPORT_ONLY, BLOCK, LANES)
        wide_log_sum = tl.log(of_others + of_entries)
        softmax = _Normaliser(softmax.maximum, softmax.log_sum, wide_log_sum)
        c = tl.full((), 0, tl.float32)
        if slack is not None:
            c = tl.where(options.temperature >= CLOSE_TEMPERATURE, tl.load(slack), c)
        phi = tl.full((), 0, tl.float32)
        psi = tl.full((), 0, tl.float32)
        for lane in range(0, entries, LANES):
            index, s, lp = load_entries(row, lane, LANES)
            place = tl.where(index < columns, lane + tl.arange(0, LANES), -1)
            _, phi_of, psi_of, change = close_terms_of_entries(
                row, s, lp, place, softmax, VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE
            )
            phi += tl.sum(without_slack(c, phi_of, change), 0)
            psi += tl.sum(psi_of, 0)
        if not SUPPORT_ONLY:
            d = tl.log(of_others / (of_others + of_entries)) - tail
            if tail_rounding is not None:
                d -= tl.load(tail_rounding + row_index)
            phi_of, bucket_slope, change = close_terms(
                d.to(tl.float32), tail, lq_bucket, p_bucket, q_bucket, parameter,
                VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE,
            )  # fmt: skip
            phi += without_slack(c, phi_of, change)
            psi += bucket_slope

    cross_entropy = tl.full((), 0, tl.float32)
    if UNIT and given.labels is not None:
        cross_entropy = unit_log_sum + (whole.maximum - student_label)
    store_loss(loss, row_index, options, phi, cross_entropy, TEMPERATURE_SQUARED)

    if CLOSE and statistics is not None:
        tl.store(statistics + rows * DIVERGENCE + row_index, phi)
    if STATISTICS:
        tv = sums.tv
        teacher_entropy = sums.teacher_entropy
        if not SUPPORT_ONLY:
            tv += 0.5 * tl.abs(p_bucket - q_bucket)
            teacher_entropy -= weighted(p_bucket, tail)
        student_label_log_prob = tl.full((), 0, tl.float32)
        teacher_label_log_prob = tl.full((), 0, tl.float32)
        if given.labels is not None:
            student_label_log_prob = log_prob(student_label, whole.maximum, student_log_sum, inverse_temperature)
            teacher_label_log_prob = sums.teacher_label
        row_statistics = Statistics(
            divergence=phi,
            cross_entropy=cross_entropy,
            tv=tv,
            # -sum q lq with lq = (s - max) / temperature - log sum, in two parts
            student_entropy=student_log_sum - whole.moment / whole.sum_exp * inverse_temperature,
            teacher_entropy=teacher_entropy,
            student_max_log_prob=-student_log_sum,
            # An entry that is NaN is no maximum.
            teacher_max_log_prob=tl.where(sums.teacher_sum == sums.teacher_sum, sums.teacher_max, float("nan")),
            student_label_log_prob=student_label_log_prob,
            teacher_label_log_prob=teacher_label_log_prob,
            student_lse=whole.maximum * inverse_temperature + student_log_sum,
            teacher_lse=_teacher_lse(sums, tail, not SUPPORT_ONLY),
            student_first=whole.first,
            teacher_first=sums.teacher_first,
        )
        store_statistics(statistics, top1, row_index, rows, columns, row_statistics)

    if not CLOSE and close is not None:
        is_close = (phi < CLOSE_BELOW) | (options.temperature >= CLOSE_TEMPERATURE)
        tl.store(close + row_index, is_close.to(tl.int32))
        if is_close:
            return

    if gradient is not None:
        scale = options.scale
        if NEEDS_LOSS:
            scale = scale_of_gradient(options, phi, cross_entropy, TEMPERATURE_SQUARED)
        terms = gradient_terms(gradient_row, options, scale, whole.maximum, unit_log_sum, HAS_HARD, TEMPERATURE_SQUARED)
        psi = finite_or_nan(psi)
        bucket = None
        if not SUPPORT_ONLY:
            bucket = _Bucket(finite_base(others.maximum), others_log_sum, bucket_slope - q_bucket * psi)
        fill_gradient(gradient_row, columns, gradient_columns, 0.0, BLOCK)
        # The gradient may overwrite the logits. All threads have loaded the logits of the label and the entries before
        # one thread writes. A tile is loaded before it is written.
        tl.debug_barrier()
        _find_gradient(row, softmax, bucket, psi, terms, VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE, CLOSE, BLOCK)


# ---- the operator: ../native.py says what it takes and returns


def topk_rows(problem: TopkRows, gradient: bool, out: Tensor | None = None):
    """Returns loss [rows], gradient, statistics and top-1 of student logits against entries. `out` as in `rows`."""
    student, vocab_size, statistics = problem.student, problem.vocab_size, problem.statistics
    row_scale = problem.options.row_scale
    indices, log_probs, tail_log_prob, log_probs_rounding, tail_rounding = problem.entries
    for x in problem.entries:
        assert x is None or x.is_contiguous(), x.stride()
    out = gradient_target(student, gradient, out)
    loss = per_row_empty(student, (), row_scale)
    row_statistics, top1 = statistics_empty(student, row_scale, statistics)
    count, entries = indices.shape
    if count:
        value, slope, _ = TABLE[problem.divergence]
        bound = close_below(problem.divergence, torch.float32)
        close_value, close_slope = CLOSE_TABLE.get(problem.divergence, (value, slope))
        block, warps = topk_tile(vocab_size)
        outer_stride, inner_stride = row_strides(student)
        starts = starts_of(indices, block, vocab_size)
        close = torch.empty(count, dtype=torch.int32, device=student.device) if bound else None
        with device_of(student), written(out if gradient else None) as target:
            for CLOSE in (False, True) if bound else (False,):
                topk_rows_kernel[(count,)](
                    student, indices, log_probs, starts, tail_log_prob, log_probs_rounding, tail_rounding,
                    problem.parameters, problem.slack,
                    loss, row_statistics if statistics else None, top1 if statistics else None, target, close,
                    count, student.shape[1], vocab_size, student.shape[2], entries, outer_stride, inner_stride,
                    **loss_arguments(problem.options),
                    VALUE=value, SLOPE=slope, CLOSE_VALUE=close_value, CLOSE_SLOPE=close_slope,
                    CLOSE_BELOW=bound, CLOSE_TEMPERATURE=CLOSE_TEMPERATURE if bound else float("inf"),
                    CLOSE=CLOSE, SUPPORT_ONLY=problem.support_only,
                    BLOCK=block, LANES=lanes(entries), num_warps=warps,
                )  # fmt: skip
    return loss, out, row_statistics, top1
