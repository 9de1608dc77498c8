"""The Sinkhorn family in Triton: rounds of problems [n, m], the value, and its derivatives through all rounds.

csrc/calls/sinkhorn.h has the formulas. The kernels divide potentials by epsilon: u = f / epsilon, v = g / epsilon. The
exponents of a half-step are relative to a base, their maximum over the points with mass:

    u_i = -(log sum_j b_j exp(v_j - C_ij / epsilon - base_i) + base_i)

One program works on one problem, in one of two kernels:

    sinkhorn_kernel         the costs stay in registers from the first round to the derivatives
    tiled_sinkhorn_kernel   reads the costs a tile of rows at a time, once a round: a tile first gives the u of its
                            rows, and then adds to the sums of the columns with that u

The error of a row compares u with the u of the next round. So both kernels begin a last round for its u alone.

The weights P_ij / (a_i b_j) are the terms of a half-step over their own sum, and not exp(u_i + v_j - C_ij / epsilon).
The rounding of u and v is relative to C / epsilon: with it the weights of a column would not add up to the number that
the derivatives subtract from C / epsilon. So a round keeps the base and the sum of each column, and not v.
"""

import torch
import triton
import triton.language as tl

from ...families.sinkhorn import Sinkhorn
from . import refuse_points
from .launch import device_of
from .row import finite_base

# The most costs (padded to powers of two) that stay in registers, and the costs of a tile. Larger numbers spill.
_RESIDENT, _TILE = 4096, 4096
_COSTS_A_THREAD = 16


@triton.jit
def _potential(base, total, masses):
    """-log of a half-step's sum, total * exp(base). A point without a partner has 0, or NaN if it has mass."""
    nothing = tl.where(masses == 0, 0.0, float("nan"))
    return tl.where(total == 0, nothing, -(tl.log(tl.where(total == 0, 1.0, total)) + base))


@triton.jit
def _exp(x):
    """Points with mass have exponents <= 0. The others need weights for derivatives alone: those are clamped."""
    return tl.exp(tl.where(x > 80, 80.0, x))


@triton.jit
def _where_mass(masses):
    """-inf for points without mass, else 0: added to exponents it keeps such points out of a maximum."""
    return tl.where(masses == 0, -float("inf"), 0.0)


@triton.jit
def _inverse(total):
    return 1 / tl.where(total == 0, 1.0, total)


@triton.jit
def _half_step_of_rows(cost, v, b, scale):
    """exp(v_j - C_ij / epsilon - base_i), base_i, and the sums over j weighted by b; scale is -1 / epsilon."""
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
def _weights(cost, u, base, total, scale):
    """P_ij / (a_i b_j)"""
    return _terms_of_columns(cost, u, base, scale) * _inverse(total)[None, :]


@triton.jit
def _error(a, u, next_u):
    """sum_i |sum_j P_ij - a_i| of some rows. The u of the next half-step gives the sums over j."""
    return tl.sum(tl.abs(a * tl.exp(tl.where(a == 0, 0.0, u - next_u)) - a), 0)


@triton.jit
def _relative(error, mass):
    return tl.where(mass == 0, 0.0, error / tl.where(mass == 0, 1.0, mass))


@triton.jit
def _finite_cost(cost):
    """An infinite cost means P = 0, and so P C = 0."""
    return tl.where(cost == float("inf"), 0.0, cost)


@triton.jit
def _cost_gradient(cost, weights, a, b, scale):
    """P (1 - C / epsilon): the derivative of sum P C by C with the potentials held fixed."""
    return a[:, None] * b[None, :] * weights * (1 + scale * _finite_cost(cost))


@triton.jit
def _load_columns(history_base, history_sum, place, mask, masses, exists):
    """Base, sum and v of the columns after an earlier round. v is 0 before the first round."""
    base = tl.load(history_base + place, mask=mask, other=0)
    total = tl.load(history_sum + place, mask=mask, other=0)
    return base, total, tl.where(exists, _potential(base, total, masses), 0.0)


@triton.jit
def _reverse_round(cost, weights, v_before, a, b, alpha_f, alpha_g, d_cost, scale):
    """One round backwards, for some rows of costs and all columns: (columns) and (rows) of csrc/calls/sinkhorn.h.

    Returns `d_cost` with this round's part, the part of d_a, and the sum over the rows that d_b loses.
    """
    products = weights * alpha_g[None, :]
    row_part = -tl.sum(products, 1)
    d_cost += -scale * a[:, None] * products
    alpha_f += a * row_part
    terms, _, total = _half_step_of_rows(cost, v_before, b, scale)
    products = terms * (alpha_f * _inverse(total))[:, None]
    d_cost += -scale * b[None, :] * products
    return d_cost, row_part, tl.sum(products, 0)


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
    grad_cost,  # [problems, n, m], or None: no derivatives
    grad_a,  # [problems, n] with grad_cost
    grad_b,  # [problems, m] with grad_cost
    history_u,  # [problems, iterations, n] with grad_cost
    history_base,  # [problems, iterations, m] with grad_cost
    history_sum,  # [problems, iterations, m] with grad_cost
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
        if grad_cost is not None:
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
        w = _weights(c, u, column_base, column_sum, scale)
        total = tl.sum(tl.sum(mass_a[:, None] * mass_b[None, :] * w * _finite_cost(c), 1), 0)
    tl.store(value + problem, total)

    # ---- derivatives, from the last round to the first
    if grad_cost is not None:
        if ENTROPIC:
            d_cost = tl.zeros_like(c)
            d_a = eps * (u + sum_b)
            d_b = eps * (v - 1 + sum_a)
            alpha_f = eps * mass_a
            alpha_g = eps * mass_b
        else:
            d_cost = _cost_gradient(c, w, mass_a, mass_b, scale)
            d_a = tl.sum(mass_b[None, :] * w * _finite_cost(c), 1)
            d_b = tl.sum(mass_a[:, None] * w * _finite_cost(c), 0)
            alpha_f = mass_a * d_a
            alpha_g = mass_b * d_b
        tl.debug_barrier()  # other threads have stored the history that each thread reads
        step = rounds - 1
        while step >= 0:
            w = _weights(c, u, column_base, column_sum, scale)
            before = problem * iterations + tl.maximum(step - 1, 0)
            u = tl.load(history_u + before * n + i, mask=i_there, other=0)
            column_base, column_sum, v = _load_columns(
                history_base, history_sum, before * m + j, j_there, mass_b, step > 0
            )
            d_cost, row_part, column_part = _reverse_round(c, w, v, mass_a, mass_b, alpha_f, alpha_g, d_cost, scale)
            d_a += row_part
            d_b -= column_part
            alpha_f = tl.zeros_like(alpha_f)
            alpha_g = -mass_b * column_part
            step -= 1
        tl.store(grad_cost + at, d_cost, mask=there)
        tl.store(grad_a + problem * n + i, d_a, mask=i_there)
        tl.store(grad_b + problem * m + j, d_b, mask=j_there)


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
    grad_cost,  # [problems, n, m], or None: no derivatives
    grad_a,  # [problems, n] with grad_cost
    grad_b,  # [problems, m] with grad_cost
    history_u,  # [problems, slots, n]
    history_base,  # [problems, slots, m] with grad_cost
    history_sum,  # [problems, slots, m] with grad_cost
    n,
    m,
    iterations,
    slots,  # iterations + 1 with grad_cost; otherwise 2: this round and the round before
    ENTROPIC: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a tile
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
    if grad_cost is not None:
        history_base += problem * slots * m
        history_sum += problem * slots * m

    # ---- rounds: the last one begins for the error alone
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
        # Values that depend on j alone are found again in each tile: kept across tiles, they would take its registers.
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
            # From the old base to the new one.
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
            if grad_cost is not None:
                tl.store(history_base + step * m + j, column_base, mask=j_there)
                tl.store(history_sum + step * m + j, column_sum, mask=j_there)
        tl.debug_barrier()  # threads load what other threads have stored
    tl.store(g + problem * m + j, v * eps, mask=j_there)
    tl.store(error + problem, reached)
    tl.store(done + problem, rounds)

    # ---- value, and the first derivatives
    last = rounds - 1
    sum_b = tl.sum(mass_b, 0)
    total = tl.full((), 0, tl.float32)
    d_b = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, n, ROWS):
        i = first + lane
        mass_a = tl.load(a + i, mask=i < n, other=0)
        u = tl.load(history_u + (last % slots) * n + i, mask=i < n, other=0)
        tl.store(f + problem * n + i, u * eps, mask=i < n)
        if ENTROPIC:
            total += eps * tl.sum(mass_a * u, 0)
            if grad_cost is not None:
                tl.store(grad_a + problem * n + i, eps * (u + sum_b), mask=i < n)
        else:
            there = (i < n)[:, None] & j_there[None, :]
            at = i[:, None] * m + j[None, :]
            c = tl.load(cost + at, mask=there, other=float("inf"))
            w = _weights(c, u, column_base, column_sum, scale)
            products = mass_a[:, None] * (w * _finite_cost(c))
            total += tl.sum(tl.sum(products * mass_b[None, :], 1), 0)
            if grad_cost is not None:
                d_b += tl.sum(products, 0)
                d_a = tl.sum(mass_b[None, :] * (w * _finite_cost(c)), 1)
                tl.store(grad_a + problem * n + i, d_a, mask=i < n)
    if ENTROPIC:
        total += eps * (tl.sum(mass_b * v, 0) - (sum_b - sum_a * sum_b))
        d_b = eps * (v - 1 + sum_a)
    tl.store(value + problem, total)

    # ---- derivatives, from the last round to the first
    if grad_cost is not None:
        alpha_g = mass_b * d_b
        if ENTROPIC:
            alpha_g = eps * mass_b
        step = last
        while step >= 0:
            tl.debug_barrier()
            before = tl.maximum(step - 1, 0)
            base_before, sum_before, v_before = _load_columns(
                history_base, history_sum, before * m + j, j_there, mass_b, step > 0
            )
            column_part = tl.zeros([COLUMNS], tl.float32)
            for first in range(0, n, ROWS):
                i = first + lane
                there = (i < n)[:, None] & j_there[None, :]
                at = i[:, None] * m + j[None, :]
                c = tl.load(cost + at, mask=there, other=float("inf"))
                mass_a = tl.load(a + i, mask=i < n, other=0)
                u = tl.load(history_u + step * n + i, mask=i < n, other=0)
                d_a = tl.load(grad_a + problem * n + i, mask=i < n, other=0)
                w = _weights(c, u, column_base, column_sum, scale)
                d_cost = tl.load(grad_cost + problem * n * m + at, mask=there, other=0)
                alpha_f = tl.zeros_like(mass_a)
                if step == last:
                    if ENTROPIC:
                        alpha_f = eps * mass_a
                        d_cost = tl.zeros_like(c)
                    else:
                        alpha_f = mass_a * d_a
                        d_cost = _cost_gradient(c, w, mass_a, mass_b, scale)
                d_cost, row_part, tile_part = _reverse_round(
                    c, w, v_before, mass_a, mass_b, alpha_f, alpha_g, d_cost, scale
                )
                column_part += tile_part
                tl.store(grad_cost + problem * n * m + at, d_cost, mask=there)
                tl.store(grad_a + problem * n + i, d_a + row_part, mask=i < n)
            d_b -= column_part
            alpha_g = -mass_b * column_part
            column_base = base_before
            column_sum = sum_before
            step -= 1
        tl.store(grad_b + problem * m + j, d_b, mask=j_there)


# ---- the operator: ../transport.py says what it takes and returns


def sinkhorn(problem: Sinkhorn, unrolled: bool):
    cost, a, b, epsilon, tolerance, iterations, entropic, _, _ = problem
    problems, n, m = cost.shape
    reason = refuse_points(max(n, m))
    if reason is not None:
        raise RuntimeError(reason)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=cost.device)

    value, error, done = empty(problems), empty(problems), empty(problems, dtype=torch.int32)
    f, g = empty(problems, n), empty(problems, m)
    derivatives = [torch.empty_like(x) if unrolled else empty(0) for x in (cost, a, b)]
    results = (value, f, g, error, done, *derivatives)
    if not problems:
        return results
    rows, columns = triton.next_power_of_2(n), triton.next_power_of_2(m)
    gradients = derivatives if unrolled else (None,) * 3
    tensors = (cost, a, b, epsilon, tolerance, value, f, g, error, done, *gradients)
    with device_of(cost):
        if rows * columns <= _RESIDENT:
            history = [empty(problems, iterations, x) if unrolled else None for x in (n, m, m)]
            arguments, warps = (*tensors, *history, n, m, iterations), _warps(rows * columns)
            sinkhorn_kernel[(problems,)](*arguments, ENTROPIC=entropic, ROWS=rows, COLUMNS=columns, num_warps=warps)
        else:
            slots = iterations + 1 if unrolled else 2
            history = [empty(problems, slots, n), *(empty(problems, slots, m) if unrolled else None for _ in range(2))]
            tile_rows = min(max(_TILE // columns, 1), rows)
            arguments, warps = (*tensors, *history, n, m, iterations, slots), _warps(tile_rows * columns)
            tiled_sinkhorn_kernel[(problems,)](
                *arguments, ENTROPIC=entropic, ROWS=tile_rows, COLUMNS=columns, num_warps=warps
            )
    return results


def _warps(costs: int) -> int:
    return max(costs // (32 * _COSTS_A_THREAD), 1)
