"""The Sinkhorn family in Triton, of problems [n, m]: rounds, their value, and its derivatives through all of them.

csrc/calls/sinkhorn.h says what is computed. Potentials are over epsilon here, u = f / epsilon and v = g / epsilon, and
the exponents of a half-step relative to their maximum where there is mass, its base:

    u_i = -(log sum_j b_j exp(v_j - C_ij / epsilon - base_i) + base_i)

One program works on one problem, in one of two kernels:

    sinkhorn_kernel         its costs stay in registers from the first round to the derivatives
    tiled_sinkhorn_kernel   it goes through them a tile of rows at a time, once a round: the columns' sums of a round
                            take each tile with the u that its own costs have just given it

A row's error is that of u against the next round's u. So both begin a next round with its u, and end there.

The weights P_ij / (a_i b_j) are a half-step's terms over their own sum, and not exp(u_i + v_j - C_ij / epsilon): the
rounding of u and v, of the size of C / epsilon, would keep a column's weights from adding up to what the derivatives
take away from C / epsilon. So a round leaves the base and the sum of each column, and not v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import refuse_points
from .launch import device_of, finite_base

# Costs, padded to powers of two, that are held in registers, and those of a tile elsewhere: more, and they spill.
_RESIDENT, _TILE = 4096, 4096
_COSTS_A_THREAD = 16


@triton.jit
def _potential(base, total, masses):
    """-log of a half-step's sum, that is total exp(base). A point without a partner has 0, or NaN where it has mass."""
    nothing = tl.where(masses == 0, 0.0, float("nan"))
    return tl.where(total == 0, nothing, -(tl.log(tl.where(total == 0, 1.0, total)) + base))


@triton.jit
def _exp(x):
    """Of masses no exponent is above 0. Points without mass have weights for their derivatives alone, bounded so."""
    return tl.exp(tl.where(x > 80, 80.0, x))


@triton.jit
def _where_mass(masses):
    """What keeps points without mass out of a maximum."""
    return tl.where(masses == 0, -float("inf"), 0.0)


@triton.jit
def _inverse(total):
    return 1 / tl.where(total == 0, 1.0, total)


@triton.jit
def _half_step_of_rows(cost, v, b, scale):
    """exp(v_j - C_ij / epsilon - base_i), base_i, and their sums over b; scale is -1 / epsilon."""
    x = cost * scale + v[None, :]
    base = finite_base(tl.max(x + _where_mass(b)[None, :], 1))
    terms = _exp(x - base[:, None])
    return terms, base, tl.sum(terms * b[None, :], 1)


@triton.jit
def _step_of_rows(cost, v, b, a, scale):
    _, base, total = _half_step_of_rows(cost, v, b, scale)
    return _potential(base, total, a)


@triton.jit
def _max_of_columns(cost, u, a, scale):
    return tl.max(cost * scale + (u + _where_mass(a))[:, None], 0)


@triton.jit
def _terms_of_columns(cost, u, base, scale):
    return _exp(cost * scale + u[:, None] - base[None, :])


@triton.jit
def _error(a, u, next_u):
    """Of some rows: sum_i |sum_j P_ij - a_i|, as the next half-step's u says what the sums of rows are."""
    return tl.sum(tl.abs(a * tl.exp(tl.where(a == 0, 0.0, u - next_u)) - a), 0)


@triton.jit
def _relative(error, mass):
    return tl.where(mass == 0, 0.0, error / tl.where(mass == 0, 1.0, mass))


@triton.jit
def _finite_cost(cost):
    """Where a cost is infinite, P is 0, and so is P C."""
    return tl.where(cost == float("inf"), 0.0, cost)


@triton.jit
def _back_through_columns(weights, a, alpha_g, scale):
    """What the half-step of columns passes on to a, and to the costs."""
    products = weights * alpha_g[None, :]
    return -tl.sum(products, 1), -scale * a[:, None] * products


@triton.jit
def _back_through_rows(cost, v, b, alpha_f, scale):
    """What the half-step of rows passes on to the v before it, over -b, and to the costs."""
    terms, _, total = _half_step_of_rows(cost, v, b, scale)
    products = terms * (alpha_f * _inverse(total))[:, None]
    return tl.sum(products, 0), -scale * b[None, :] * products


@triton.jit(do_not_specialize=["n", "iterations"])
def sinkhorn_kernel(
    cost,  # [problems, n, m]
    a,  # [problems, n]
    b,  # [problems, m]
    epsilon,
    tolerance,
    value,  # [problems]
    f,  # [problems, n]
    g,  # [problems, m]
    error,  # [problems]
    done,  # [problems]
    of_cost,  # [problems, n, m], or None: no derivatives
    of_a,  # [problems, n] with of_cost
    of_b,  # [problems, m] with of_cost
    history_u,  # [problems, iterations, n] with of_cost
    history_base,  # [problems, iterations, m] with of_cost
    history_sum,  # [problems, iterations, m] with of_cost
    n,
    m,
    iterations,
    ENTROPIC: tl.constexpr,
    ROWS: tl.constexpr,  # at least n
    COLUMNS: tl.constexpr,  # at least m
):
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    i_there, j_there = i < n, j < m
    there = i_there[:, None] & j_there[None, :]
    at = problem * n * m + i[:, None] * m + j[None, :]
    c = tl.load(cost + at, mask=there, other=float("inf"))
    mass_a = tl.load(a + problem * n + i, mask=i_there, other=0)
    mass_b = tl.load(b + problem * m + j, mask=j_there, other=0)
    eps = tl.load(epsilon)
    scale = -1 / eps
    limit = tl.load(tolerance)
    sum_a, sum_b = tl.sum(mass_a, 0), tl.sum(mass_b, 0)

    # ---- rounds
    u = tl.zeros_like(mass_a)
    v = tl.zeros_like(mass_b)
    column_base = tl.zeros_like(mass_b)
    column_sum = tl.zeros_like(mass_b)
    next_u = _step_of_rows(c, v, mass_b, mass_a, scale)
    reached = tl.full((), float("inf"), tl.float32)
    rounds = tl.full((), 0, tl.int32)
    while (rounds < iterations) & ~((limit > 0) & (reached <= limit)):
        u = next_u
        column_base = finite_base(_max_of_columns(c, u, mass_a, scale))
        column_sum = tl.sum(_terms_of_columns(c, u, column_base, scale) * mass_a[:, None], 0)
        v = _potential(column_base, column_sum, mass_b)
        if of_cost is not None:
            at_round = problem * iterations + rounds
            tl.store(history_u + at_round * n + i, u, mask=i_there)
            tl.store(history_base + at_round * m + j, column_base, mask=j_there)
            tl.store(history_sum + at_round * m + j, column_sum, mask=j_there)
        next_u = _step_of_rows(c, v, mass_b, mass_a, scale)
        reached = _relative(_error(mass_a, u, next_u), sum_a)
        rounds += 1
    tl.store(f + problem * n + i, u * eps, mask=i_there)
    tl.store(g + problem * m + j, v * eps, mask=j_there)
    tl.store(error + problem, reached)
    tl.store(done + problem, rounds)

    # ---- value
    if ENTROPIC:
        total = eps * (tl.sum(mass_a * u, 0) + tl.sum(mass_b * v, 0) - (sum_b - sum_a * sum_b))
    else:
        w = _terms_of_columns(c, u, column_base, scale) * _inverse(column_sum)[None, :]
        total = tl.sum(tl.sum(mass_a[:, None] * mass_b[None, :] * w * _finite_cost(c), 1), 0)
    tl.store(value + problem, total)

    # ---- derivatives, from the last round to the first
    if of_cost is not None:
        if ENTROPIC:
            found = tl.zeros_like(c)
            found_a = eps * (u + sum_b)
            found_b = eps * (v - 1 + sum_a)
            alpha_f = eps * mass_a
            alpha_g = eps * mass_b
        else:
            found = mass_a[:, None] * mass_b[None, :] * w * (1 + scale * _finite_cost(c))
            found_a = tl.sum(mass_b[None, :] * w * _finite_cost(c), 1)
            found_b = tl.sum(mass_a[:, None] * w * _finite_cost(c), 0)
            alpha_f = mass_a * found_a
            alpha_g = mass_b * found_b
        tl.debug_barrier()  # the history that is read was stored by other threads
        step = rounds - 1
        while step >= 0:
            w = _terms_of_columns(c, u, column_base, scale) * _inverse(column_sum)[None, :]
            s, part = _back_through_columns(w, mass_a, alpha_g, scale)
            found_a += s
            alpha_f += mass_a * s
            found += part
            at_round = problem * iterations + tl.maximum(step - 1, 0)  # the round before, if there is one
            u = tl.load(history_u + at_round * n + i, mask=i_there, other=0)
            column_base = tl.load(history_base + at_round * m + j, mask=j_there, other=0)
            column_sum = tl.load(history_sum + at_round * m + j, mask=j_there, other=0)
            v = tl.where(step > 0, _potential(column_base, column_sum, mass_b), 0.0)
            s, part = _back_through_rows(c, v, mass_b, alpha_f, scale)
            found_b -= s
            found += part
            alpha_f = tl.zeros_like(alpha_f)
            alpha_g = -mass_b * s
            step -= 1
        tl.store(of_cost + at, found, mask=there)
        tl.store(of_a + problem * n + i, found_a, mask=i_there)
        tl.store(of_b + problem * m + j, found_b, mask=j_there)


@triton.jit(do_not_specialize=["n", "iterations", "slots"])
def tiled_sinkhorn_kernel(
    cost,  # [problems, n, m]
    a,  # [problems, n]
    b,  # [problems, m]
    epsilon,
    tolerance,
    value,  # [problems]
    f,  # [problems, n]
    g,  # [problems, m]
    error,  # [problems]
    done,  # [problems]
    of_cost,  # [problems, n, m], or None: no derivatives
    of_a,  # [problems, n] with of_cost
    of_b,  # [problems, m] with of_cost
    history_u,  # [problems, slots, n]
    history_base,  # [problems, slots, m] with of_cost
    history_sum,  # [problems, slots, m] with of_cost
    n,
    m,
    iterations,
    slots,  # iterations + 1 with of_cost; otherwise 2, of this round and the one before
    ENTROPIC: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # at least m
):
    problem = tl.program_id(0).to(tl.int64)
    lane, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    j_there = j < m
    mass_b = tl.load(b + problem * m + j, mask=j_there, other=0)
    eps = tl.load(epsilon)
    scale = -1 / eps
    limit = tl.load(tolerance)
    cost += problem * n * m
    a += problem * n
    history_u += problem * slots * n
    if of_cost is not None:
        history_base += problem * slots * m
        history_sum += problem * slots * m

    # ---- rounds: the last one is begun for the error alone
    v = tl.zeros_like(mass_b)
    column_base = tl.zeros_like(mass_b)
    column_sum = tl.zeros_like(mass_b)
    rounds = tl.full((), -1, tl.int32)
    reached = tl.full((), float("inf"), tl.float32)
    sum_a = tl.full((), 0, tl.float32)
    running = tl.full((), True, tl.int1)
    while running:
        step = rounds + 1
        off = tl.full((), 0, tl.float32)
        sum_a = tl.full((), 0, tl.float32)
        next_max = tl.full([COLUMNS], -float("inf"), tl.float32)
        next_sum = tl.zeros([COLUMNS], tl.float32)
        u_step = history_u + (step % slots) * n
        u_before = history_u + (tl.maximum(rounds, 0) % slots) * n
        # What depends on j alone is found in each tile again: kept from tile to tile, it takes the tile's registers.
        for first in tl.range(0, n, ROWS, disable_licm=True):
            i = first + lane
            there = (i < n)[:, None] & j_there[None, :]
            c = tl.load(cost + i[:, None] * m + j[None, :], mask=there, other=float("inf"))
            mass_a = tl.load(a + i, mask=i < n, other=0)
            sum_a += tl.sum(mass_a, 0)
            next_u = _step_of_rows(c, v, mass_b, mass_a, scale)
            u = tl.where(step > 0, tl.load(u_before + i, mask=i < n, other=0), 0.0)
            off += _error(mass_a, u, next_u)
            tl.store(u_step + i, next_u, mask=i < n)

            new_max = tl.maximum(next_max, _max_of_columns(c, next_u, mass_a, scale))
            base = finite_base(new_max)
            # What was summed relative to the old maximum is worth this much relative to the new.
            next_sum *= tl.exp(next_max - base)
            next_sum += tl.sum(_terms_of_columns(c, next_u, base, scale) * mass_a[:, None], 0)
            next_max = new_max
        rounds = step
        if step > 0:
            reached = _relative(off, sum_a)
        running = (step < iterations) & ~((step > 0) & (limit > 0) & (reached <= limit))
        if running:
            column_base = finite_base(next_max)
            column_sum = next_sum
            v = _potential(column_base, column_sum, mass_b)
            if of_cost is not None:
                tl.store(history_base + step * m + j, column_base, mask=j_there)
                tl.store(history_sum + step * m + j, column_sum, mask=j_there)
        tl.debug_barrier()  # what a thread has stored is what others load
    tl.store(g + problem * m + j, v * eps, mask=j_there)
    tl.store(error + problem, reached)
    tl.store(done + problem, rounds)

    # ---- value, and what its derivatives begin with
    last = rounds - 1
    sum_b = tl.sum(mass_b, 0)
    total = tl.full((), 0, tl.float32)
    found_b = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, n, ROWS):
        i = first + lane
        mass_a = tl.load(a + i, mask=i < n, other=0)
        u = tl.load(history_u + (last % slots) * n + i, mask=i < n, other=0)
        tl.store(f + problem * n + i, u * eps, mask=i < n)
        if ENTROPIC:
            total += eps * tl.sum(mass_a * u, 0)
            if of_cost is not None:
                tl.store(of_a + problem * n + i, eps * (u + sum_b), mask=i < n)
        else:
            there = (i < n)[:, None] & j_there[None, :]
            at = i[:, None] * m + j[None, :]
            c = tl.load(cost + at, mask=there, other=float("inf"))
            w = _terms_of_columns(c, u, column_base, scale) * _inverse(column_sum)[None, :]
            products = mass_a[:, None] * (w * _finite_cost(c))
            total += tl.sum(tl.sum(products * mass_b[None, :], 1), 0)
            if of_cost is not None:
                found_b += tl.sum(products, 0)
                of_row = tl.sum(mass_b[None, :] * (w * _finite_cost(c)), 1)
                tl.store(of_a + problem * n + i, of_row, mask=i < n)
    if ENTROPIC:
        total += eps * (tl.sum(mass_b * v, 0) - (sum_b - sum_a * sum_b))
        found_b = eps * (v - 1 + sum_a)
    tl.store(value + problem, total)

    # ---- derivatives, from the last round to the first
    if of_cost is not None:
        alpha_g = mass_b * found_b
        if ENTROPIC:
            alpha_g = eps * mass_b
        step = last
        while step >= 0:
            tl.debug_barrier()
            before = tl.maximum(step - 1, 0)
            base_before = tl.load(history_base + before * m + j, mask=j_there, other=0)
            sum_before = tl.load(history_sum + before * m + j, mask=j_there, other=0)
            v_before = tl.where(step > 0, _potential(base_before, sum_before, mass_b), 0.0)
            of_v = tl.zeros([COLUMNS], tl.float32)
            for first in range(0, n, ROWS):
                i = first + lane
                there = (i < n)[:, None] & j_there[None, :]
                at = i[:, None] * m + j[None, :]
                c = tl.load(cost + at, mask=there, other=float("inf"))
                mass_a = tl.load(a + i, mask=i < n, other=0)
                u = tl.load(history_u + step * n + i, mask=i < n, other=0)
                found_a = tl.load(of_a + problem * n + i, mask=i < n, other=0)
                w = _terms_of_columns(c, u, column_base, scale) * _inverse(column_sum)[None, :]
                found = tl.load(of_cost + problem * n * m + at, mask=there, other=0)
                alpha_f = tl.zeros_like(mass_a)
                if step == last:
                    if ENTROPIC:
                        alpha_f = eps * mass_a
                        found = tl.zeros_like(c)
                    else:
                        alpha_f = mass_a * found_a
                        found = mass_a[:, None] * mass_b[None, :] * w * (1 + scale * _finite_cost(c))
                s, part = _back_through_columns(w, mass_a, alpha_g, scale)
                found_a += s
                alpha_f += mass_a * s
                found += part
                s, part = _back_through_rows(c, v_before, mass_b, alpha_f, scale)
                of_v += s
                found += part
                tl.store(of_cost + problem * n * m + at, found, mask=there)
                tl.store(of_a + problem * n + i, found_a, mask=i < n)
            found_b -= of_v
            alpha_g = -mass_b * of_v
            column_base = base_before
            column_sum = sum_before
            step -= 1
        tl.store(of_b + problem * m + j, found_b, mask=j_there)


# ---- the operator: what it takes and returns is said in ../transport.py


def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    tolerance: Tensor,
    iterations: int,
    entropic: bool,
    unrolled: bool,
):
    """Beside its results it takes a workspace: with `unrolled` 1 number a row and 2 a column of every round."""
    problems, n, m = cost.shape
    reason = refuse_points(max(n, m))
    if reason is not None:
        raise RuntimeError(reason)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=cost.device)

    value, error, done = empty(problems), empty(problems), empty(problems, dtype=torch.int32)
    f, g = empty(problems, n), empty(problems, m)
    derivatives = [torch.empty_like(x) if unrolled else empty(0) for x in (cost, a, b)]
    found = (value, f, g, error, done, *derivatives)
    if not problems:
        return found
    rows, columns = triton.next_power_of_2(n), triton.next_power_of_2(m)
    of_inputs = derivatives if unrolled else (None,) * 3
    with device_of(cost):
        if rows * columns <= _RESIDENT:
            history = [empty(problems, iterations, x) if unrolled else None for x in (n, m, m)]
            sinkhorn_kernel[(problems,)](
                cost, a, b, epsilon, tolerance, value, f, g, error, done, *of_inputs, *history, n, m, iterations,
                ENTROPIC=entropic, ROWS=rows, COLUMNS=columns, num_warps=_warps(rows * columns),
            )  # fmt: skip
        else:
            slots = iterations + 1 if unrolled else 2
            history = [empty(problems, slots, n), *(empty(problems, slots, m) if unrolled else None for _ in range(2))]
            tile_rows = min(max(_TILE // columns, 1), rows)
            tiled_sinkhorn_kernel[(problems,)](
                cost, a, b, epsilon, tolerance, value, f, g, error, done, *of_inputs, *history, n, m, iterations, slots,
                ENTROPIC=entropic, ROWS=tile_rows, COLUMNS=columns, num_warps=_warps(tile_rows * columns),
            )  # fmt: skip
    return found


def _warps(costs: int) -> int:
    return max(costs // (32 * _COSTS_A_THREAD), 1)
