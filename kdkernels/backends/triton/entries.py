"""A sparse teacher's entries in a row of logits: a twin of csrc/cuda/entries.h."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row import load_tile


class Row(NamedTuple):
    student: tl.tensor  # pointer to the row's first logit
    columns: tl.tensor
    inverse_temperature: tl.tensor
    indices: tl.tensor  # pointer to the row's first entry, as the next two
    log_probs: tl.tensor
    rounding: tl.tensor  # pointer to what fp32 does not hold of the row's first log-probability, or None
    starts: tl.tensor
    entries: tl.tensor
    temperature: tl.tensor
    parameter: tl.tensor  # the divergence's


@triton.jit
def load_entries(row, first, LANES: tl.constexpr):
    """LANES entries of a row: class, logit, log-probability. Lanes past the last entry: `columns`, -inf, -inf."""
    lane = first + tl.arange(0, LANES)
    index = tl.load(row.indices + lane, mask=lane < row.entries, other=row.columns)
    there = index < row.columns
    s = tl.load(row.student + index, mask=there, other=-float("inf")).to(tl.float32)
    lp = tl.load(row.log_probs + lane, mask=there, other=-float("inf"))
    return tl.where(there, index, row.columns), s, lp


@triton.jit
def entry_of(column, row, first, end):
    """The entry of each column, or -1, in a tile with the entries from `first` to before `end`, at least one."""
    place = tl.zeros_like(column) + first
    count = end - first
    while count > 1:  # the column's entry, if any, is among `count` entries from `place` on
        half = count // 2
        below = tl.load(row.indices + place + (half - 1)) < column
        place = tl.where(below, place + half, place)
        count -= half
    return tl.where(tl.load(row.indices + place) == column, place, -1)


@triton.jit
def load_others(row, tile, BLOCK: tl.constexpr):
    """The columns of a tile, and their logits, with -inf in the places of entries."""
    column = tile * BLOCK + tl.arange(0, BLOCK)
    s = load_tile(row.student, tile * BLOCK, row.columns, BLOCK)
    first = tl.load(row.starts + tile)
    end = tl.load(row.starts + tile + 1)
    if first < end:
        s = tl.where(entry_of(column, row, first, end) >= 0, -float("inf"), s)
    return column, s
