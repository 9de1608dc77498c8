"""The extraction of the top k in Triton, a twin of csrc/cpu/topk.cpp; csrc/calls/topk.h has the formulas.

One program works on one row, a tile of BLOCK columns at a time:

    maxima      of BLOCK groups of classes; k of them bound the k-th largest class from below
    rest        running maximum and sum of the classes below that bound; the keys of the others are set aside
    selection   of the exact k among the keys that were set aside

The kernel reads a row of logits twice, and makes no tensor of the vocabulary's width.

The key of a class is one integer: the bits of its logit, in an order of integers, above the complement of its index.
Keys are unique, so the largest k keys are the result, and ties are settled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...families.options import RowOptions
from .launch import device_of, lanes, per_row_empty, row_arguments, row_strides, topk_tile
from .row import add_exponentials, load_row_options, load_tile, start_of_row

# Bytes of the keys that topk sets aside. A launch takes as many rows as fit.
_WORKSPACE_BYTES = 256 << 20


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
    """The middle, rounded down. The sum low + high might overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _kth_of_lanes(keys, k, LANES: tl.constexpr):
    """A bound that exactly k of the lanes' keys reach. There are at least k lanes."""
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
    """A bound that exactly k of `total` keys in memory reach. All keys are from `low` to before `high`."""
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


@triton.jit(do_not_specialize=["first_row", "rows", "inner", "k", "strides"])
def topk_kernel(
    logits,
    given,  # the row options
    strides,  # theirs
    keys,  # [rows, k], in no order
    floats,  # [3, rows]: maximum, 1 / temperature, log sum
    tail_log_prob,  # [rows]
    workspace,  # [rows of this launch, capacity]: keys that are set aside
    first_row,
    rows,
    inner,
    columns,
    k,
    capacity,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    BOUNDED: tl.constexpr,  # k is at most BLOCK; otherwise all keys are set aside
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # keys that are worked on at a time
):
    aside = workspace + tl.program_id(0).to(tl.int64) * capacity
    row = first_row + tl.program_id(0).to(tl.int64)
    keys_row = keys + row * k
    options = load_row_options(row, columns, given, strides)
    skipped = options.scale == 0
    bad = options.bad
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
        # log_softmax is NaN for such a row too.
        bad = (tl.max(nans, 0) > 0) | (tl.abs(maximum) == float("inf"))

    # A skipped row has k keys without mass. A row without a softmax is NaN.
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

    # ---- rest: k lanes have a class that reaches the bound, so at least k classes reach it. All of them lie in these
    # lanes: at most k * tiles.
    inverse_temperature = options.inverse_temperature
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
        rest_max, rest_sum = add_exponentials(
            tl.where(reaches, -float("inf"), x), rest_max, rest_sum, inverse_temperature
        )
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
        whole_max, whole_sum = add_exponentials(x, whole_max, whole_sum, inverse_temperature)
        rest_max, rest_sum = add_exponentials(
            tl.where(choose, -float("inf"), x), rest_max, rest_sum, inverse_temperature
        )
    log_sum = tl.log(whole_sum)
    tail = (rest_max - whole_max) * inverse_temperature + (tl.log(rest_sum) - log_sum)
    tl.store(floats + row, whole_max)
    tl.store(floats + rows + row, inverse_temperature)
    tl.store(floats + 2 * rows + row, log_sum)
    tl.store(tail_log_prob + row, tl.where(rest_sum == 0, -float("inf"), tail))


@triton.jit(do_not_specialize=["rows", "k"])
def topk_result_kernel(keys, floats, indices, log_probs, rows, k, LANES: tl.constexpr):
    """Writes the index and the log-probability of each key."""
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


# ---- the operator: ../native.py says what it takes and returns


def topk(logits: Tensor, row_scale: Tensor, temperature: Tensor, k: int, vocab_size: int):
    """Returns indices (int32) and log-probabilities [rows, k] and the log-probability of the rest [rows].

    Memory: a key of 8 bytes for each index, and a workspace of 8 bytes for each of k * tiles classes. That is k / 2048
    of the vocabulary (all of it for k above 2048), for as many rows as 256 MiB hold. The kernel touches only the keys
    that it sets aside: few more than k, unless the largest classes share one place modulo 2048.
    """
    count = row_scale.numel()
    indices = torch.empty(count, k, dtype=torch.int32, device=logits.device)
    log_probs = torch.empty(count, k, dtype=torch.float32, device=logits.device)
    tail_log_prob = per_row_empty(logits, (), row_scale)
    if not count:
        return indices, log_probs, tail_log_prob
    block, warps = topk_tile(vocab_size)
    k_lanes = lanes(k)
    capacity = min(vocab_size, k * triton.cdiv(vocab_size, block)) if k <= block else vocab_size
    at_once = min(count, max(_WORKSPACE_BYTES // (8 * capacity), 1))
    keys = torch.empty(count, k, dtype=torch.int64, device=logits.device)
    workspace = torch.empty(at_once, capacity, dtype=torch.int64, device=logits.device)
    floats = per_row_empty(logits, (3,), row_scale)
    arguments = row_arguments(RowOptions(row_scale, temperature)).values()
    with device_of(logits):
        for first_row in range(0, count, at_once):
            topk_kernel[(min(at_once, count - first_row),)](
                logits, *arguments, keys, floats, tail_log_prob, workspace,
                first_row, count, logits.shape[1], vocab_size, k, capacity,
                *row_strides(logits),
                BOUNDED=k <= block, BLOCK=block, LANES=k_lanes, num_warps=warps,
            )  # fmt: skip
        keys = keys.sort(-1, descending=True).values
        topk_result_kernel[(count,)](keys, floats, indices, log_probs, count, k, LANES=min(k_lanes, 256), num_warps=1)
    return indices, log_probs, tail_log_prob
