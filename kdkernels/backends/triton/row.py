"""How a kernel reads and writes one row: functions that Triton inlines into the kernels of every family.

One program works on one row, a tile of BLOCK columns at a time.
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from ...families import options as families
from ...families.rows import ROW_FLOATS, ROW_STATISTICS, ROW_SUMS, ROW_TOP1
from .table import weighted

# The place of each number of a row in a tensor [places, rows].
STUDENT_MAX = tl.constexpr(ROW_FLOATS.index("student_max"))
STUDENT_LOG_SUM = tl.constexpr(ROW_FLOATS.index("student_log_sum"))
TEACHER_MAX = tl.constexpr(ROW_FLOATS.index("teacher_max"))
TEACHER_LOG_SUM = tl.constexpr(ROW_FLOATS.index("teacher_log_sum"))
UNIT_LOG_SUM = tl.constexpr(ROW_FLOATS.index("unit_log_sum"))
FLOATS_COUNT = tl.constexpr(len(ROW_FLOATS))

PHI = tl.constexpr(ROW_SUMS.index("phi"))
PSI = tl.constexpr(ROW_SUMS.index("psi"))
SHIFT = tl.constexpr(ROW_SUMS.index("shift"))
SUMS_COUNT = tl.constexpr(len(ROW_SUMS))

DIVERGENCE = tl.constexpr(ROW_STATISTICS.index("divergence"))
CROSS_ENTROPY = tl.constexpr(ROW_STATISTICS.index("cross_entropy"))
TV = tl.constexpr(ROW_STATISTICS.index("tv"))
STUDENT_ENTROPY = tl.constexpr(ROW_STATISTICS.index("student_entropy"))
TEACHER_ENTROPY = tl.constexpr(ROW_STATISTICS.index("teacher_entropy"))
STUDENT_MAX_LOG_PROB = tl.constexpr(ROW_STATISTICS.index("student_max_log_prob"))
TEACHER_MAX_LOG_PROB = tl.constexpr(ROW_STATISTICS.index("teacher_max_log_prob"))
STUDENT_LABEL_LOG_PROB = tl.constexpr(ROW_STATISTICS.index("student_label_log_prob"))
TEACHER_LABEL_LOG_PROB = tl.constexpr(ROW_STATISTICS.index("teacher_label_log_prob"))
STUDENT_LSE = tl.constexpr(ROW_STATISTICS.index("student_lse"))
TEACHER_LSE = tl.constexpr(ROW_STATISTICS.index("teacher_lse"))
STATISTICS_COUNT = tl.constexpr(len(ROW_STATISTICS))

STUDENT_TOP1 = tl.constexpr(ROW_TOP1.index("student_top1"))
TEACHER_TOP1 = tl.constexpr(ROW_TOP1.index("teacher_top1"))
TOP1_COUNT = tl.constexpr(len(ROW_TOP1))


# The tensors of the row options, as a kernel gets them: by name, None where there is none. With it comes `strides`,
# an integer whose bits are the strides of these tensors in their order: 1, or 0 for a number that all rows share.
Given = namedtuple("Given", (name for name, kind in families.RowOptions.__annotations__.items() if kind is not bool))
ROW_SCALE = tl.constexpr(Given._fields.index("row_scale"))
TEMPERATURE = tl.constexpr(Given._fields.index("temperature"))
HARD_WEIGHT = tl.constexpr(Given._fields.index("hard_weight"))
LOSS_CAP = tl.constexpr(Given._fields.index("loss_cap"))


class RowOptions(NamedTuple):
    scale: tl.tensor
    temperature: tl.tensor
    inverse_temperature: tl.tensor
    hard_weight: tl.tensor  # 0 without a label term
    loss_cap: tl.tensor  # infinite without a cap
    label: tl.tensor  # -1 without labels
    bad: tl.tensor  # whether one of these values makes the row NaN


class GradientTerms(NamedTuple):
    """Values of a row that every tile of its gradient needs."""

    gradient_row: tl.tensor
    soft: tl.tensor  # factor of the divergence's term; it holds the row's scale
    hard: tl.tensor  # factor of the label's term, or None without a label term; it holds the row's scale
    label: tl.tensor
    student_max: tl.tensor
    unit_log_sum: tl.tensor


# A row's statistics by name, and the first class that holds each side's maximum (no class if each is NaN: `columns`).
Statistics = namedtuple("Statistics", (*ROW_STATISTICS, "student_first", "teacher_first"))


# ---- loads


@triton.jit
def start_of_row(logits, row, inner, outer_stride, inner_stride):
    return logits + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def load_tile(row_start, start, columns, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    return tl.load(row_start + column, mask=column < columns, other=-float("inf")).to(tl.float32)


@triton.jit
def _load_option(option, row, strides, PLACE: tl.constexpr):
    """`PLACE`: the option's in Given."""
    return tl.load(option + row * ((strides >> PLACE) & 1))


@triton.jit
def load_row_options(row, columns, given, strides):
    """`given`: a Given, whose `labels` and all after `temperature` may be None."""
    scale = _load_option(given.row_scale, row, strides, ROW_SCALE)
    temperature = _load_option(given.temperature, row, strides, TEMPERATURE)
    inverse_temperature = 1 / temperature
    bad = (temperature <= 0) | (temperature == float("inf")) | (temperature != temperature)
    bad = bad | (inverse_temperature == float("inf"))
    hard_weight = tl.full((), 0, tl.float32)
    if given.hard_weight is not None:
        hard_weight = _load_option(given.hard_weight, row, strides, HARD_WEIGHT)
        bad = bad | (hard_weight < 0) | (hard_weight > 1) | (hard_weight != hard_weight)
    label = tl.full((), -1, tl.int64)
    if given.labels is not None:
        label = tl.load(given.labels + row)
        bad = bad | (label < 0) | (label >= columns)
    loss_cap = tl.full((), float("inf"), tl.float32)
    if given.loss_cap is not None:
        loss_cap = _load_option(given.loss_cap, row, strides, LOSS_CAP)
        bad = bad | (loss_cap <= 0) | (loss_cap != loss_cap)
    return RowOptions(scale, temperature, inverse_temperature, hard_weight, loss_cap, label, bad)


# ---- a row without a result


@triton.jit
def has_no_result(options):
    return (options.scale == 0) | options.bad


@triton.jit
def value_without_result(options):
    """A skipped row (scale 0) is 0 everywhere. A row with a bad value is NaN: an error would cost a synchronisation."""
    return tl.where(options.scale == 0, 0.0, float("nan"))


@triton.jit
def fill_places(tensor, row, rows, value, COUNT: tl.constexpr):
    """The row's numbers in a tensor [COUNT, rows]."""
    for i in tl.static_range(COUNT):
        tl.store(tensor + i * rows + row, value)


@triton.jit
def fill_statistics(statistics, top1, row, rows, value):
    fill_places(statistics, row, rows, value, STATISTICS_COUNT)
    fill_places(top1, row, rows, 0, TOP1_COUNT)


@triton.jit
def fill_gradient(gradient_row, first, end, value, BLOCK: tl.constexpr):
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        fill = tl.zeros([BLOCK], tl.float32) + value
        tl.store(gradient_row + column, fill.to(gradient_row.dtype.element_ty), mask=column < end)


# ---- sums of exponentials


@triton.jit
def finite_base(maximum):
    """The base of exponentials: the maximum, or 0 while every value was -inf."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def exponentials(x, maximum, inverse_temperature):
    """Raises the running maximum to that of the tile x.

    Returns the new maximum, its base, the factor that rescales sums from the old base, and the exponentials of x.
    """
    new_maximum = tl.maximum(maximum, tl.max(x, 0))
    base = finite_base(new_maximum)
    decay = tl.exp((maximum - base) * inverse_temperature)
    return new_maximum, base, decay, tl.exp((x - base) * inverse_temperature)


@triton.jit
def add_exponentials(x, maximum, sum_exp, inverse_temperature):
    """The running maximum, and the sum of exponentials relative to it, with the tile x."""
    new_maximum, _, decay, e = exponentials(x, maximum, inverse_temperature)
    return new_maximum, sum_exp * decay + tl.sum(e, 0)


@triton.jit
def log_of_rest(share):
    """log(1 - share) of a share below 0.4, with all its digits: -2 artanh(share / (2 - share))."""
    x = share / (2 - share)
    square = x * x
    series = square * (1 / 11) + 1 / 9
    for i in tl.static_range(4):
        series = series * square + 1 / (7 - 2 * i)
    return -2 * x * series


@triton.jit
def log_of_sum(maximum, sum_exp):
    """A row that is -inf everywhere has no distribution: NaN, as log_softmax."""
    return tl.where(maximum == -float("inf"), float("nan"), tl.log(sum_exp))


@triton.jit
def log_prob(x, maximum, log_sum, inverse_temperature):
    return (x - maximum) * inverse_temperature - log_sum


# ---- results


@triton.jit
def row_loss(options, phi, cross_entropy, TEMPERATURE_SQUARED: tl.constexpr):
    """Before the row's scale."""
    divergence = phi
    if TEMPERATURE_SQUARED:
        divergence = options.temperature * options.temperature * phi
    return weighted(1 - options.hard_weight, divergence) + weighted(options.hard_weight, cross_entropy)


@triton.jit
def _capped(options, loss):
    """Whether a row has the cap for its loss, and no gradient. NaN stays NaN, as a NaN scale does."""
    return (loss > options.loss_cap) & (options.scale == options.scale)


@triton.jit
def store_loss(loss, row, options, phi, cross_entropy, TEMPERATURE_SQUARED: tl.constexpr):
    found = row_loss(options, phi, cross_entropy, TEMPERATURE_SQUARED)
    tl.store(loss + row, options.scale * tl.where(_capped(options, found), options.loss_cap, found))


@triton.jit
def scale_of_gradient(options, phi, cross_entropy, TEMPERATURE_SQUARED: tl.constexpr):
    """The row's scale in its gradient, where that depends on the loss (`RowOptions.gradient_needs_loss`)."""
    found = row_loss(options, phi, cross_entropy, TEMPERATURE_SQUARED)
    return tl.where(_capped(options, found), 0.0, options.scale)


@triton.jit
def store_statistics(statistics, top1, row, rows, columns, found):
    tl.store(statistics + rows * DIVERGENCE + row, found.divergence)
    tl.store(statistics + rows * CROSS_ENTROPY + row, found.cross_entropy)
    tl.store(statistics + rows * TV + row, found.tv)
    tl.store(statistics + rows * STUDENT_ENTROPY + row, found.student_entropy)
    tl.store(statistics + rows * TEACHER_ENTROPY + row, found.teacher_entropy)
    tl.store(statistics + rows * STUDENT_MAX_LOG_PROB + row, found.student_max_log_prob)
    tl.store(statistics + rows * TEACHER_MAX_LOG_PROB + row, found.teacher_max_log_prob)
    tl.store(statistics + rows * STUDENT_LABEL_LOG_PROB + row, found.student_label_log_prob)
    tl.store(statistics + rows * TEACHER_LABEL_LOG_PROB + row, found.teacher_label_log_prob)
    tl.store(statistics + rows * STUDENT_LSE + row, found.student_lse)
    tl.store(statistics + rows * TEACHER_LSE + row, found.teacher_lse)
    tl.store(top1 + rows * STUDENT_TOP1 + row, tl.where(found.student_first < columns, found.student_first, 0))
    tl.store(top1 + rows * TEACHER_TOP1 + row, tl.where(found.teacher_first < columns, found.teacher_first, 0))


@triton.jit
def finite_or_nan(slope_sum):
    """An infinite slope leaves the whole row without a gradient."""
    return tl.where(tl.abs(slope_sum) < float("inf"), slope_sum, float("nan"))


@triton.jit
def gradient_terms(
    gradient_row, options, scale, student_max, unit_log_sum, HAS_HARD: tl.constexpr, TEMPERATURE_SQUARED: tl.constexpr
):
    """`scale`: the row's scale in its gradient."""
    factor = options.temperature if TEMPERATURE_SQUARED else options.inverse_temperature
    soft = scale * (1 - options.hard_weight) * factor
    hard = None
    if HAS_HARD:
        # The scale may be infinite or NaN. A weight of 0 still means no label term.
        hard = tl.where(options.hard_weight == 0, 0.0, scale * options.hard_weight)
    return GradientTerms(gradient_row, soft, hard, options.label, student_max, unit_log_sum)


@triton.jit
def store_gradient(terms, start, columns, slope, s, BLOCK: tl.constexpr):
    """soft * slope + hard * (softmax(s) - one_hot(label)) of one tile, with slope = psi - q * sum psi."""
    column = start + tl.arange(0, BLOCK)
    # soft = 0 drops the divergence, also if it is infinite or NaN.
    value = tl.where(terms.soft == 0, 0.0, terms.soft * slope)
    if terms.hard is not None:
        unit_q = tl.exp(s - terms.student_max - terms.unit_log_sum)
        value += terms.hard * tl.where(column == terms.label, unit_q - 1, unit_q)
    tl.store(terms.gradient_row + column, value.to(terms.gradient_row.dtype.element_ty), mask=column < columns)
