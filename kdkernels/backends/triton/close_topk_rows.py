"""The close rows of a sparse teacher in Triton: log-sums and log-ratios in fp64, which csrc/divergences.h explains.

A row is close if its divergence came out small, or if its temperature is high: `close_below` in families/rows.py. The
kernel of topk_rows.py finds such a row's sums, and the gradients of its entries, by these functions.
"""

import triton
import triton.language as tl

from .entries import load_entries, load_others
from .row import finite_base, log_prob
from .table import close_terms


@triton.jit
def _wide_distance(s, maximum, row):
    """(s - maximum) / temperature in fp64."""
    return (s.to(tl.float64) - finite_base(maximum).to(tl.float64)) / row.temperature.to(tl.float64)


@triton.jit
def wide_sums(row, maximum, SUPPORT_ONLY: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The sums of exponentials in fp64 of the others (0 with SUPPORT_ONLY) and of the entries."""
    others = tl.full((), 0, tl.float64)
    entries = tl.full((), 0, tl.float64)
    if not SUPPORT_ONLY:
        for tile in range(tl.cdiv(row.columns, BLOCK)):
            _, s = load_others(row, tile, BLOCK)
            others += tl.sum(tl.exp(_wide_distance(s, maximum, row)), 0)
    for lane in range(0, row.entries, LANES):
        _, s, _ = load_entries(row, lane, LANES)
        entries += tl.sum(tl.exp(_wide_distance(s, maximum, row)), 0)
    return others, entries


@triton.jit
def close_terms_of_entries(
    row, s, lp, lane, softmax,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, CLOSE_VALUE: tl.constexpr, CLOSE_SLOPE: tl.constexpr,
):  # fmt: skip
    """q, phi, psi and q - p of the entries `lane`, or of none where it is -1, with the logits s."""
    there = lane >= 0
    lq = log_prob(s, softmax.maximum, softmax.log_sum, row.inverse_temperature)
    lq = tl.where(there, lq, -float("inf"))
    q = tl.exp(lq)
    d = _wide_distance(s, softmax.maximum, row) - softmax.wide_log_sum - lp
    if row.rounding is not None:
        d -= tl.load(row.rounding + lane, mask=there, other=0.0)
    phi, psi, change = close_terms(
        d.to(tl.float32), lp, lq, tl.exp(lp), q, row.parameter, VALUE, SLOPE, CLOSE_VALUE, CLOSE_SLOPE
    )
    return q, phi, psi, change


@triton.jit
def without_slack(slack, phi, change):
    """phi without c (q - p). In a class without teacher mass the rest of some formulas is 0, and only rounding would be
    left."""
    rest = phi - slack * change
    return tl.where(tl.abs(rest) < 1e-6 * tl.abs(phi), 0.0, rest)
