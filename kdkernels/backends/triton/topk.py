"""The top-k family in Triton, the twin of csrc/cpu/topk.cpp: a loss against a sparse teacher, and its extraction.

csrc/calls/topk.h says what is computed. One program works on one row, a tile of BLOCK columns at a time:

    topk_rows   others      running maximum, and the sum of exponentials, of the classes that no entry names
                entries     their logits, gathered: the row's normaliser, then phi and psi of each and of the bucket
                gradient    of every tile, from the left-over sums                                   -> gradient

    topk        maxima      of BLOCK groups of classes; k of them bound the k-th largest class from below
                rest        running maximum and sum of what is below that bound; what is above it is set aside
                selection   of the exact k among what was set aside

A row of logits is read twice in both (once without a gradient), and no tensor of the vocabulary's width is made but the
gradient. The entries of a row ascend, so those of a tile are a range of them; `starts` says where it begins. In a tile
that has n entries each column looks for its own by bisection: 1 + log2(n) loads that neighbours share, so that a row
whose entries are all classes costs log2(BLOCK) of them a column, not BLOCK comparisons.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    written,
)
from .table import TABLE, weighted

_BLOCK, _COLUMNS_A_THREAD = 2048, 16
# Of the keys that topk sets aside: rows are taken so many at a time that these fit.
_WORKSPACE_BYTES = 256 << 20


@triton.jit
def _add(x, maximum, sum_exp, inverse_temperature):
    """The maximum of all that was seen and the sum of exponentials relative to it, with the classes x."""
    new_maximum = tl.maximum(maximum, tl.max(x, 0))
    base = finite_base(new_maximum)
    # What was summed relative to the old maximum is worth this much relative to the new.
    decay = tl.exp((maximum - base) * inverse_temperature)
    return new_maximum, sum_exp * decay + tl.sum(tl.exp((x - base) * inverse_temperature), 0)


@triton.jit
def _first_of(x, index, maximum, new_maximum, first, columns):
    """The first class that holds the maximum of all that was seen, or `columns`."""
    here = tl.min(tl.where(x == new_maximum, index, columns), 0)
    return tl.where(new_maximum > maximum, here, tl.minimum(first, here))


@triton.jit
def _add_student(
    x, index, maximum, sum_exp, unit_sum, moment, first, inverse_temperature, columns,
    UNIT: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """`_add`, with the sum at temperature 1 and, for statistics, the first class of the maximum and the moment.

    That is the sum of e (x - max), e = exp((x - max) / temperature): no term is positive, so none cancels another.
    """
    new_maximum, new_sum_exp = _add(x, maximum, sum_exp, inverse_temperature)
    base = finite_base(new_maximum)
    if UNIT:
        unit_sum = unit_sum * tl.exp(maximum - base) + tl.sum(tl.exp(x - base), 0)
    if STATISTICS:
        # A new maximum moves each difference by as much.
        moved = moment + sum_exp * (finite_base(maximum) - base)
        moment = weighted(tl.exp((maximum - base) * inverse_temperature), moved)
        moment += tl.sum(weighted(tl.exp((x - base) * inverse_temperature), x - base), 0)
        first = _first_of(x, index, maximum, new_maximum, first, columns)
    return new_maximum, new_sum_exp, unit_sum, moment, first


@triton.jit
def _load_entries(student_row, indices_row, log_probs_row, first, entries, columns, LANES: tl.constexpr):
    """Some entries of a row: class, logit, log-probability. Where there is none: `columns`, -inf, -inf."""
    lane = first + tl.arange(0, LANES)
    index = tl.load(indices_row + lane, mask=lane < entries, other=columns)
    there = index < columns
    s = tl.load(student_row + index, mask=there, other=-float("inf")).to(tl.float32)
    return tl.where(there, index, columns), s, tl.load(log_probs_row + lane, mask=there, other=-float("inf"))


@triton.jit
def _entry_of(column, indices_row, first, end):
    """Which entry each column is, or -1, where the tile has the entries from `first` to before `end`, at least one."""
    place = tl.zeros_like(column) + first
    count = end - first
    while count > 1:  # an entry that is the column is among `count` from `place` on
        half = count // 2
        below = tl.load(indices_row + place + (half - 1)) < column
        place = tl.where(below, place + half, place)
        count -= half
    return tl.where(tl.load(indices_row + place) == column, place, -1)


@triton.jit
def _log_of_rest(share):
    """log(1 - share) of a share below 0.4, with all its digits: -2 artanh(share / (2 - share))."""
    x = share / (2 - share)
    square = x * x
    series = square * (1 / 11) + 1 / 9
    for i in tl.static_range(4):
        series = series * square + 1 / (7 - 2 * i)
    return -2 * x * series


@triton.jit(
    do_not_specialize=["rows", "inner", "entries", "row_scale_stride", "temperature_stride", "hard_weight_stride"]
)
def topk_rows_kernel(
    student,
    indices,  # [rows, entries], ascending; those from `columns` on are no entries
    log_probs,  # [rows, entries]
    starts,  # [rows, tiles + 1]: how many entries are of columns before each tile
    tail_log_prob,  # [rows]
    row_scale,
    labels,  # may be None
    temperature,
    hard_weight,  # may be None: no label term
    parameters,
    loss,  # [rows]
    statistics,  # [11, rows], in the order of ROW_STATISTICS, or None
    top1,  # [2, rows] with statistics
    gradient,  # [rows, gradient_columns], contiguous, or None; it may be `student`
    rows,
    inner,  # row r is (r // inner, r % inner) of the logits
    columns,  # classes that count
    gradient_columns,
    entries,
    student_outer_stride: tl.int64,
    student_inner_stride: tl.int64,
    row_scale_stride,
    temperature_stride,
    hard_weight_stride,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    CONDITIONAL: tl.constexpr,  # the entries alone, of which the student is renormalised
    TEMPERATURE_SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # entries that are worked on at a time
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

    # As rows.py: a skipped row is 0 everywhere, one with a bad value is NaN, and neither is read.
    if (scale == 0) | bad:
        fill = tl.where(scale == 0, 0.0, float("nan"))
        tl.store(loss + row, fill)
        if statistics is not None:
            for i in tl.static_range(11):
                tl.store(statistics + i * rows + row, fill)
            for i in tl.static_range(2):
                tl.store(top1 + i * rows + row, 0)
        if gradient is not None:
            fill_gradient(gradient_row, 0, gradient_columns, fill, BLOCK)
        return

    HARD: tl.constexpr = hard_weight is not None
    STATISTICS: tl.constexpr = statistics is not None
    # The softmax at temperature 1, for the label term or the cross-entropy.
    UNIT: tl.constexpr = HARD or (STATISTICS and labels is not None)
    # "conditional" has no use for the other classes but in what is of all classes.
    ALL_CLASSES: tl.constexpr = (not CONDITIONAL) or UNIT or STATISTICS
    inverse_temperature = 1 / row_temperature
    parameter = tl.load(parameters)
    student_row = start_of_row(student, row, inner, student_outer_stride, student_inner_stride)
    indices_row = indices + row * entries
    log_probs_row = log_probs + row * entries
    tiles = tl.cdiv(columns, BLOCK)
    starts_row = starts + row * (tiles + 1)
    tail = tl.load(tail_log_prob + row)
    if labels is not None:
        student_label = tl.load(student_row + label).to(tl.float32)

    # ---- others
    student_max = tl.full((), -float("inf"), tl.float32)
    student_sum = tl.full((), 0, tl.float32)
    unit_sum = tl.full((), 0, tl.float32)
    moment = tl.full((), 0, tl.float32)
    student_first = columns
    if ALL_CLASSES:
        for tile in range(tiles):
            column = tile * BLOCK + tl.arange(0, BLOCK)
            s = load_tile(student_row, tile * BLOCK, columns, BLOCK)
            first = tl.load(starts_row + tile)
            end = tl.load(starts_row + tile + 1)
            if first < end:
                s = tl.where(_entry_of(column, indices_row, first, end) >= 0, -float("inf"), s)
            student_max, student_sum, unit_sum, moment, student_first = _add_student(
                s, column, student_max, student_sum, unit_sum, moment, student_first, inverse_temperature, columns,
                UNIT, STATISTICS,
            )  # fmt: skip
    others_max = student_max
    others_sum = student_sum

    # ---- entries: their own sum, and with them that of all classes
    entries_max = tl.full((), -float("inf"), tl.float32)
    entries_sum = tl.full((), 0, tl.float32)
    for lane in range(0, entries, LANES):
        index, s, lp = _load_entries(student_row, indices_row, log_probs_row, lane, entries, columns, LANES)
        if ALL_CLASSES:
            student_max, student_sum, unit_sum, moment, student_first = _add_student(
                s, index, student_max, student_sum, unit_sum, moment, student_first, inverse_temperature, columns,
                UNIT, STATISTICS,
            )  # fmt: skip
        entries_max, entries_sum = _add(s, entries_max, entries_sum, inverse_temperature)
    student_log_sum = log_of_sum(student_max, student_sum)
    unit_log_sum = log_of_sum(student_max, unit_sum)
    # What the entries' log-probabilities are relative to.
    lq_max = entries_max if CONDITIONAL else student_max
    lq_log_sum = log_of_sum(entries_max, entries_sum) if CONDITIONAL else student_log_sum

    # ---- sums
    phi = tl.full((), 0, tl.float32)
    slope_sum = tl.full((), 0, tl.float32)
    tv = tl.full((), 0, tl.float32)
    teacher_entropy = tl.full((), 0, tl.float32)
    teacher_max = tl.full((), -float("inf"), tl.float32)
    teacher_sum = tl.full((), 0, tl.float32)
    teacher_first = columns
    teacher_label = tail
    for lane in range(0, entries, LANES):
        index, s, lp = _load_entries(student_row, indices_row, log_probs_row, lane, entries, columns, LANES)
        there = index < columns
        lq = tl.where(there, (s - lq_max) * inverse_temperature - lq_log_sum, -float("inf"))
        q = tl.exp(lq)
        p = tl.exp(lp)
        phi += tl.sum(VALUE(lp, lq, p, q, parameter), 0)
        slope_sum += tl.sum(SLOPE(lp, lq, p, q, parameter), 0)
        if STATISTICS:
            tv += tl.sum(0.5 * tl.abs(p - q), 0)
            teacher_entropy -= tl.sum(weighted(p, lp), 0)
            new_teacher_max, teacher_sum = _add(lp, teacher_max, teacher_sum, 1.0)
            teacher_first = _first_of(lp, index, teacher_max, new_teacher_max, teacher_first, columns)
            teacher_max = new_teacher_max
            if labels is not None:
                is_label = index == label
                of_entry = tl.sum(tl.where(is_label, lp, 0.0), 0)
                teacher_label = tl.where(tl.max(is_label.to(tl.int32), 0) > 0, of_entry, teacher_label)
    if not CONDITIONAL:
        # The bucket. A class of no mass has no maximum to be relative to; a row that has no softmax has no bucket.
        nothing = others_sum == 0
        others_log_sum = tl.where(nothing, 0.0, tl.log(others_sum))
        lq_bucket = (others_max - student_max) * inverse_temperature + (others_log_sum - student_log_sum)
        # Near 1 the share of the bucket has the digits of what the entries have.
        relative = (entries_max - student_max) * inverse_temperature - student_log_sum
        share = weighted(entries_sum, tl.exp(relative))
        lq_bucket = tl.where(lq_bucket > -0.5, _log_of_rest(share), lq_bucket)
        lq_bucket = tl.where(nothing & (student_log_sum == student_log_sum), -float("inf"), lq_bucket)
        q_bucket = tl.exp(lq_bucket)
        p_bucket = tl.exp(tail)
        phi += VALUE(tail, lq_bucket, p_bucket, q_bucket, parameter)
        bucket_slope = SLOPE(tail, lq_bucket, p_bucket, q_bucket, parameter)
        slope_sum += bucket_slope

    # Cross-entropy with the label, at temperature 1.
    cross_entropy = tl.full((), 0, tl.float32)
    if UNIT and labels is not None:
        cross_entropy = unit_log_sum + (student_max - student_label)
    divergence = phi
    if TEMPERATURE_SQUARED:
        divergence = row_temperature * row_temperature * phi
    row_loss = weighted(1 - row_hard_weight, divergence) + weighted(row_hard_weight, cross_entropy)
    tl.store(loss + row, scale * row_loss)

    if STATISTICS:
        # An entry that is NaN is no maximum.
        teacher_max_log_prob = tl.where(teacher_sum == teacher_sum, teacher_max, float("nan"))
        if not CONDITIONAL:
            tv += 0.5 * tl.abs(p_bucket - q_bucket)
            teacher_entropy -= weighted(p_bucket, tail)
            whole_max = tl.maximum(teacher_max, tail)
            base = finite_base(whole_max)
            teacher_sum = teacher_sum * tl.exp(teacher_max - base) + tl.exp(tail - base)
            teacher_max = whole_max
        teacher_lse = tl.where(teacher_sum == 0, -float("inf"), teacher_max + tl.log(teacher_sum))
        student_label_log_prob = tl.full((), 0, tl.float32)
        teacher_label_log_prob = tl.full((), 0, tl.float32)
        if labels is not None:
            student_label_log_prob = (student_label - student_max) * inverse_temperature - student_log_sum
            teacher_label_log_prob = teacher_label
        tl.store(statistics + row, phi)
        tl.store(statistics + rows + row, cross_entropy)
        tl.store(statistics + 2 * rows + row, tv)
        # lq = (s - max) / temperature - log sum, of which -sum q lq is taken apart
        tl.store(statistics + 3 * rows + row, student_log_sum - moment / student_sum * inverse_temperature)
        tl.store(statistics + 4 * rows + row, teacher_entropy)
        tl.store(statistics + 5 * rows + row, -student_log_sum)
        tl.store(statistics + 6 * rows + row, teacher_max_log_prob)
        tl.store(statistics + 7 * rows + row, student_label_log_prob)
        tl.store(statistics + 8 * rows + row, teacher_label_log_prob)
        tl.store(statistics + 9 * rows + row, student_max * inverse_temperature + student_log_sum)
        tl.store(statistics + 10 * rows + row, teacher_lse)
        # Of what is not NaN; 0 where nothing is.
        tl.store(top1 + row, tl.where(student_first < columns, student_first, 0))
        tl.store(top1 + rows + row, tl.where(teacher_first < columns, teacher_first, 0))

    # ---- gradient
    if gradient is not None:
        gradient_factor = row_temperature if TEMPERATURE_SQUARED else inverse_temperature
        soft = scale * (1 - row_hard_weight) * gradient_factor
        hard = scale * row_hard_weight
        slope_sum = finite_or_nan(slope_sum)
        fill_gradient(gradient_row, columns, gradient_columns, 0.0, BLOCK)
        # It may take the place of the logits: all threads have theirs of the label and the entries before one writes.
        # A tile's own are loaded before they are written.
        tl.debug_barrier()
        for back in range(tiles):
            tile = tiles - 1 - back  # the last tiles of the sweep before may still be in a cache
            column = tile * BLOCK + tl.arange(0, BLOCK)
            first = tl.load(starts_row + tile)
            end = tl.load(starts_row + tile + 1)
            if CONDITIONAL:
                value = tl.zeros([BLOCK], tl.float32) + (slope_sum - slope_sum)  # 0, or NaN
                if HARD:
                    s = load_tile(student_row, tile * BLOCK, columns, BLOCK)
                else:
                    # Only an entry's logit is read.
                    s = tl.full([BLOCK], -float("inf"), tl.float32)
                    if first < end:
                        s = load_tile(student_row, tile * BLOCK, columns, BLOCK)
            else:
                s = load_tile(student_row, tile * BLOCK, columns, BLOCK)
                # (psi - q Psi) (q / q_R) of the bucket, whose q / q_R is a softmax over the others.
                of_others = tl.exp((s - finite_base(others_max)) * inverse_temperature - others_log_sum)
                value = (bucket_slope - q_bucket * slope_sum) * of_others
            if first < end:
                entry = _entry_of(column, indices_row, first, end)
                lp = tl.load(log_probs_row + entry, mask=entry >= 0, other=-float("inf"))
                lq = (s - lq_max) * inverse_temperature - lq_log_sum
                q = tl.exp(lq)
                of_entry = SLOPE(lp, lq, tl.exp(lp), q, parameter) - q * slope_sum
                value = tl.where(entry >= 0, of_entry, value)
            # soft = 0 drops the divergence, also where it is not finite.
            value = tl.where(soft == 0, 0.0, soft * value)
            if HARD:
                unit_q = tl.exp(s - student_max - unit_log_sum)
                value += hard * tl.where(column == label, unit_q - 1, unit_q)
            tl.store(gradient_row + column, value.to(gradient_row.dtype.element_ty), mask=column < columns)


# ---- extraction. A class's key is one integer: its logit's bits in an order of integers, above the complement of its
# index. Keys are unique, and the largest k are the result, ties settled.


@triton.jit
def _key(x, column):
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 and 0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def _logit(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _column(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _between(low, high):
    """The middle, rounded down; their sum might not fit."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _kth_of_lanes(keys, k, LANES: tl.constexpr):
    """A bound that k of the lanes' keys reach, and no other; the lanes are at least k."""
    low = tl.min(keys, 0)
    high = tl.max(keys, 0) + 1
    reach = tl.full((), LANES, tl.int32)
    middle = _between(low, high)
    while (reach != k) & (middle != low):  # more than k reach `low`, fewer reach `high`
        count = tl.sum((keys >= middle).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
        reach = tl.where(count >= k, count, reach)
        middle = _between(low, high)
    return low


@triton.jit
def _kth_of_stored(keys, total, low, high, k, LANES: tl.constexpr):
    """The same of `total` keys in memory, all from `low` to before `high`."""
    reach = total
    middle = _between(low, high)
    while (reach != k) & (middle != low):
        count = tl.full((), 0, tl.int32)
        for start in range(0, total, LANES):
            lane = start + tl.arange(0, LANES)
            key = tl.load(keys + lane, mask=lane < total, other=low)
            count += tl.sum(((key >= middle) & (lane < total)).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
        reach = tl.where(count >= k, count, reach)
        middle = _between(low, high)
    return low


@triton.jit(do_not_specialize=["first_row", "rows", "inner", "k", "row_scale_stride", "temperature_stride"])
def topk_kernel(
    logits,
    row_scale,
    temperature,
    keys,  # [rows, k], in no order
    floats,  # [3, rows]: maximum, 1 / temperature, log sum
    tail_log_prob,  # [rows]
    workspace,  # [rows of this launch, capacity]: the keys that are set aside
    first_row,
    rows,
    inner,
    columns,
    k,
    capacity,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    row_scale_stride,
    temperature_stride,
    BOUNDED: tl.constexpr,  # k is at most BLOCK; otherwise all keys are set aside
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # keys that are worked on at a time
):
    aside = workspace + tl.program_id(0).to(tl.int64) * capacity
    row = first_row + tl.program_id(0).to(tl.int64)
    keys_row = keys + row * k
    scale = tl.load(row_scale + row * row_scale_stride)
    row_temperature = tl.load(temperature + row * temperature_stride)
    skipped = scale == 0
    bad = is_bad_temperature(row_temperature)
    logits_row = start_of_row(logits, row, inner, outer_stride, inner_stride)
    tiles = tl.cdiv(columns, BLOCK)
    lanes = tl.arange(0, BLOCK)

    # ---- maxima
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    at = lanes
    if not (skipped | bad):
        nans = tl.zeros([BLOCK], tl.int32)
        for tile in range(tiles):
            x = load_tile(logits_row, tile * BLOCK, columns, BLOCK)
            larger = x > largest  # a tie goes to the class that came first
            at = tl.where(larger, tile * BLOCK + lanes, at)
            largest = tl.where(larger, x, largest)
            nans = tl.where(x != x, 1, nans)
        maximum = tl.max(largest, 0)
        # No softmax, as log_softmax has none.
        bad = (tl.max(nans, 0) > 0) | (tl.abs(maximum) == float("inf"))

    # A skipped row is k keys of no mass, one without a softmax is NaN.
    if skipped | bad:
        for start in range(0, k, LANES):
            lane = start + tl.arange(0, LANES)
            none = tl.full([LANES], -float("inf"), tl.float32)
            tl.store(keys_row + lane, _key(none, lane), mask=lane < k)
        fill = tl.where(skipped, 0.0, float("nan"))
        tl.store(floats + row, fill)
        tl.store(floats + rows + row, tl.where(skipped, 1.0, float("nan")))
        tl.store(floats + 2 * rows + row, fill)
        tl.store(tail_log_prob + row, fill)
        return

    # ---- rest: k lanes have a class that reaches the bound, so k classes do, and those are of these lanes: at most
    # k * tiles.
    inverse_temperature = 1 / row_temperature
    lane_keys = _key(largest, at)
    high = tl.max(lane_keys, 0) + 1
    lowest = _key(tl.full((), -float("inf"), tl.float32), tl.full((), 0x7FFFFFFF, tl.int32))
    bound = _kth_of_lanes(lane_keys, k, BLOCK) if BOUNDED else lowest
    bound_logit = _logit(bound)
    bound_column = _column(bound)
    rest_max = tl.full((), -float("inf"), tl.float32)
    rest_sum = tl.full((), 0, tl.float32)
    total = tl.full((), 0, tl.int32)
    for back in range(tiles):
        tile = tiles - 1 - back  # the last tiles of the sweep before may still be in a cache
        column = tile * BLOCK + lanes
        x = load_tile(logits_row, tile * BLOCK, columns, BLOCK)
        reaches = (x > bound_logit) | ((x == bound_logit) & (column <= bound_column))
        reaches = reaches & (column < columns)
        rest_max, rest_sum = _add(tl.where(reaches, -float("inf"), x), rest_max, rest_sum, inverse_temperature)
        count = tl.sum(reaches.to(tl.int32), 0)
        if count > 0:
            place = total + tl.cumsum(reaches.to(tl.int32), 0) - 1
            tl.store(aside + place, _key(x, column), mask=reaches)
        total += count

    # ---- selection
    tl.debug_barrier()  # each thread sees what the others have set aside
    bound = _kth_of_stored(aside, total, bound, high, k, LANES)
    whole_max = rest_max
    whole_sum = rest_sum
    chosen = tl.full((), 0, tl.int32)
    for start in range(0, total, LANES):
        lane = start + tl.arange(0, LANES)
        key = tl.load(aside + lane, mask=lane < total, other=bound)
        x = tl.where(lane < total, _logit(key), -float("inf"))
        choose = (key >= bound) & (lane < total)
        place = chosen + tl.cumsum(choose.to(tl.int32), 0) - 1
        tl.store(keys_row + place, key, mask=choose)
        chosen += tl.sum(choose.to(tl.int32), 0)
        whole_max, whole_sum = _add(x, whole_max, whole_sum, inverse_temperature)
        rest_max, rest_sum = _add(tl.where(choose, -float("inf"), x), rest_max, rest_sum, inverse_temperature)
    log_sum = tl.log(whole_sum)
    tail = (rest_max - whole_max) * inverse_temperature + (tl.log(rest_sum) - log_sum)
    tl.store(floats + row, whole_max)
    tl.store(floats + rows + row, inverse_temperature)
    tl.store(floats + 2 * rows + row, log_sum)
    tl.store(tail_log_prob + row, tl.where(rest_sum == 0, -float("inf"), tail))


@triton.jit(do_not_specialize=["rows", "k"])
def topk_result_kernel(keys, floats, indices, log_probs, rows, k, LANES: tl.constexpr):
    """Indices and log-probabilities of keys."""
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.load(floats + row)
    inverse_temperature = tl.load(floats + rows + row)
    log_sum = tl.load(floats + 2 * rows + row)
    for start in range(0, k, LANES):
        lane = start + tl.arange(0, LANES)
        key = tl.load(keys + row * k + lane, mask=lane < k, other=0)
        log_prob = (_logit(key) - maximum) * inverse_temperature - log_sum
        index = tl.where(log_prob == -float("inf"), -1, _column(key))
        tl.store(indices + row * k + lane, index, mask=lane < k)
        tl.store(log_probs + row * k + lane, log_prob, mask=lane < k)


# ---- the operators: what they take and return is said in ../native/topk.py


def topk_rows(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail_log_prob: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    parameters: Tensor,
    divergence: str,
    vocab_size: int,
    temperature_squared: bool,
    conditional: bool,
    gradient: bool,
    statistics: bool,
    into: Tensor | None = None,
):
    """Loss [rows], gradient, statistics and top-1 of student logits against entries. `into` as in `rows`."""
    for x in (indices, log_probs, tail_log_prob):
        assert x.is_contiguous(), x.stride()
    into = gradient_target(student, gradient, into)
    loss = per_row_empty(student, (), row_scale)
    row_statistics, top1 = statistics_empty(student, row_scale, statistics)
    count, entries = indices.shape
    if count:
        value, slope, _ = TABLE[divergence]
        block, warps = _tile(vocab_size)
        with device_of(student), written(into if gradient else None) as target:
            topk_rows_kernel[(count,)](
                student, indices, log_probs, _starts(indices, block, vocab_size), tail_log_prob, row_scale, labels,
                temperature, hard_weight, parameters, loss,
                row_statistics if statistics else None, top1 if statistics else None, target,
                count, student.shape[1], vocab_size, student.shape[2], entries,
                *row_strides(student), stride(row_scale), stride(temperature),
                0 if hard_weight is None else stride(hard_weight),
                VALUE=value, SLOPE=slope, CONDITIONAL=conditional, TEMPERATURE_SQUARED=temperature_squared,
                BLOCK=block, LANES=_lanes(entries), num_warps=warps,
            )  # fmt: skip
    return loss, into, row_statistics, top1


def topk(logits: Tensor, row_scale: Tensor, temperature: Tensor, k: int, vocab_size: int):
    """Indices int32 and log-probabilities [rows, k] and the rest's [rows], of logits [outer, inner, columns].

    Beside a key of 8 bytes for each index, it takes a workspace: 8 bytes for each of k * tiles classes, k / 2048 of the
    vocabulary (for k above 2048 all of it), of as many rows as 256 MiB hold. Of that only what is set aside is touched,
    which is little more than k where the largest classes do not stand in one place modulo 2048.
    """
    count = row_scale.numel()
    indices = torch.empty(count, k, dtype=torch.int32, device=logits.device)
    log_probs = torch.empty(count, k, dtype=torch.float32, device=logits.device)
    tail_log_prob = per_row_empty(logits, (), row_scale)
    if not count:
        return indices, log_probs, tail_log_prob
    block, warps = _tile(vocab_size)
    lanes = _lanes(k)
    capacity = min(vocab_size, k * triton.cdiv(vocab_size, block)) if k <= block else vocab_size
    at_once = min(count, max(_WORKSPACE_BYTES // (8 * capacity), 1))
    keys = torch.empty(count, k, dtype=torch.int64, device=logits.device)
    workspace = torch.empty(at_once, capacity, dtype=torch.int64, device=logits.device)
    floats = per_row_empty(logits, (3,), row_scale)
    with device_of(logits):
        for first_row in range(0, count, at_once):
            topk_kernel[(min(at_once, count - first_row),)](
                logits, row_scale, temperature, keys, floats, tail_log_prob, workspace,
                first_row, count, logits.shape[1], vocab_size, k, capacity,
                *row_strides(logits), stride(row_scale), stride(temperature),
                BOUNDED=k <= block, BLOCK=block, LANES=lanes, num_warps=warps,
            )  # fmt: skip
        keys = keys.sort(-1, descending=True).values
        topk_result_kernel[(count,)](keys, floats, indices, log_probs, count, k, LANES=min(lanes, 256), num_warps=1)
    return indices, log_probs, tail_log_prob


def _starts(indices: Tensor, block: int, vocab_size: int) -> Tensor:
    """How many entries of each row are of classes before each tile's, and of all classes: [rows, tiles + 1]."""
    tiles = triton.cdiv(vocab_size, block)
    bounds = torch.arange(tiles + 1, dtype=torch.int32, device=indices.device).mul_(block).clamp_(max=vocab_size)
    return torch.searchsorted(indices, bounds.repeat(indices.shape[0], 1), out_int32=True)


def _tile(columns: int) -> tuple[int, int]:
    """Columns of a tile, and warps of 32 threads."""
    block = min(max(triton.next_power_of_2(columns), 64), _BLOCK)
    return block, max(block // (32 * _COLUMNS_A_THREAD), 1)


def _lanes(entries: int) -> int:
    return min(max(triton.next_power_of_2(entries), 32), 1024)
