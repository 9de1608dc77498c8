"""The pairwise family in Triton: costs between the rows of two clouds of logits, and their gradient for the student.

csrc/calls/pairwise.h has the formulas. p_i and q_j are the softmaxes of the student's and the teacher's rows:

    costs       a program sums over a share of the classes for a tile of pairs (i, j)             -> parts
                a second kernel adds the parts in their order, and takes the root of l2           -> costs, moments
    gradient    a program works on a tile of rows i and classes, and loops over the rows j        -> gradient

In a tile of pairs a thread has classes of its own and one running sum for each pair. So it reads 8 + 8 logits for 64
pairs, and the threads' sums are added once, at the end. No result depends on the order in which programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...families.sinkhorn import Clouds
from .launch import device_of, row_strides, written
from .row import STUDENT_LOG_SUM, STUDENT_MAX, TEACHER_LOG_SUM, TEACHER_MAX

# Rows and classes of a tile of pairs. Each thread of 4 warps has one class.
_PAIR_ROWS, _PAIR_BLOCK = 8, 128
# The most terms of a running sum.
_MOST_TERMS = 4096
# The classes are split until there are _PROGRAMS programs, or a share has _LEAST_SHARE classes.
_PROGRAMS, _LEAST_SHARE = 1024, 2048
_GRADIENT_ROWS, _GRADIENT_BLOCK = 16, 256
_WARPS = 4
_FINISH_BLOCK = 256


@triton.jit
def _softmax(logits, maximum, log_sum, inverse_temperature):
    """Classes that were not read are -inf and get 0. A row that is not read has maximum 0 and log sum 0."""
    return tl.exp((logits.to(tl.float32) - maximum) * inverse_temperature - log_sum)


@triton.jit
def _times_sign(x, difference):
    """x * sign(difference), 0 if the difference is 0. The sign bit of the difference flips the sign bit of x."""
    turned = x.to(tl.int32, bitcast=True) ^ (difference.to(tl.int32, bitcast=True) & -0x80000000)
    return tl.where(difference == 0, 0.0, turned.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["clouds", "n", "share"])
def pair_costs_kernel(
    student,
    teacher,
    kept,  # [clouds, n]
    temperature,
    floats,  # [4, clouds, n], in the order of ROW_FLOATS
    costs,  # [splits, clouds, n, n]: one part for each share of the classes; l2 before the root
    moments,  # [splits, clouds, n, n] or None; l2 before the division by the cost
    clouds,
    n,
    columns,  # classes that count
    share,  # blocks of classes that a program works on
    student_cloud_stride: tl.int64,
    student_row_stride: tl.int64,
    teacher_cloud_stride: tl.int64,
    teacher_row_stride: tl.int64,
    SQUARED: tl.constexpr,  # l2
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Neighbouring programs read the same classes.
    tiles = tl.cdiv(n, ROWS)
    program = tl.program_id(0)
    i = program % tiles * ROWS + tl.arange(0, ROWS)
    j = program // tiles % tiles * ROWS + tl.arange(0, ROWS)
    cloud_and_split = program // tiles // tiles
    cloud = (cloud_and_split % clouds).to(tl.int64)
    split = cloud_and_split // clouds

    rows = clouds.to(tl.int64) * n
    row_i, row_j = cloud * n + i, cloud * n + j
    i_kept = tl.load(kept + row_i, mask=i < n, other=0) != 0
    j_kept = tl.load(kept + row_j, mask=j < n, other=0) != 0
    student_max = tl.load(floats + rows * STUDENT_MAX + row_i, mask=i_kept, other=0)[:, None]
    student_log_sum = tl.load(floats + rows * STUDENT_LOG_SUM + row_i, mask=i_kept, other=0)[:, None]
    teacher_max = tl.load(floats + rows * TEACHER_MAX + row_j, mask=j_kept, other=0)[:, None]
    teacher_log_sum = tl.load(floats + rows * TEACHER_LOG_SUM + row_j, mask=j_kept, other=0)[:, None]
    inverse_temperature = 1 / tl.load(temperature)
    student_rows = student + cloud * student_cloud_stride + i[:, None] * student_row_stride
    teacher_rows = teacher + cloud * teacher_cloud_stride + j[:, None] * teacher_row_stride

    cost = tl.zeros([ROWS, ROWS, BLOCK], tl.float32)
    moment = tl.zeros([ROWS, ROWS, BLOCK], tl.float32)
    last = tl.minimum((split + 1) * share, tl.cdiv(columns, BLOCK))
    for block in range(split * share, last):
        column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = column < columns
        s = tl.load(student_rows + column, mask=inside & i_kept[:, None], other=-float("inf"))
        t = tl.load(teacher_rows + column, mask=inside & j_kept[:, None], other=-float("inf"))
        p = _softmax(s, student_max, student_log_sum, inverse_temperature)[:, None, :]
        q = _softmax(t, teacher_max, teacher_log_sum, inverse_temperature)[None, :, :]
        difference = p - q
        if SQUARED:
            cost += difference * difference
            if moments is not None:
                moment += p * difference
        else:
            cost += tl.abs(difference)
            if moments is not None:
                moment += _times_sign(tl.broadcast_to(p, [ROWS, ROWS, BLOCK]), difference)

    pairs = ((split * clouds.to(tl.int64) + cloud) * n + i[:, None]) * n + j[None, :]
    inside = (i < n)[:, None] & (j < n)[None, :]
    tl.store(costs + pairs, tl.sum(cost, 2), mask=inside)
    if moments is not None:
        tl.store(moments + pairs, tl.sum(moment, 2), mask=inside)


@triton.jit(do_not_specialize=["pairs", "n", "splits"])
def pair_costs_sum_kernel(
    parts,  # [splits, clouds, n, n]
    moment_parts,  # [splits, clouds, n, n] or None
    kept,  # [clouds, n]
    costs,  # [clouds, n, n]
    moments,  # [clouds, n, n] with moment_parts
    pairs,  # clouds * n * n
    n,
    splits,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    row = pair // n  # (cloud, i)
    there = tl.load(kept + row, mask=inside, other=0) != 0
    there = there & (tl.load(kept + row // n * n + pair % n, mask=inside, other=0) != 0)
    cost = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        part = split * pairs.to(tl.int64) + pair
        cost += tl.load(parts + part, mask=inside, other=0)
        if moment_parts is not None:
            moment += tl.load(moment_parts + part, mask=inside, other=0)
    if SQUARED:
        cost = tl.sqrt_rn(cost)
        moment = tl.where(cost == 0, 0.0, moment / tl.where(cost == 0, 1.0, cost))
    tl.store(costs + pair, tl.where(there, cost, 0.0), mask=inside)
    if moment_parts is not None:
        tl.store(moments + pair, tl.where(there, moment, 0.0), mask=inside)


@triton.jit(do_not_specialize=["clouds", "n"])
def pair_gradient_kernel(
    student,
    teacher,
    kept,  # [clouds, n]
    temperature,
    floats,  # [4, clouds, n], in the order of ROW_FLOATS
    weights,  # [clouds, n, n]
    dot,  # [clouds, n]
    gradient,  # [clouds, n, gradient_columns], contiguous
    clouds,
    n,
    columns,  # classes that count
    gradient_columns,
    student_cloud_stride: tl.int64,
    student_row_stride: tl.int64,
    teacher_cloud_stride: tl.int64,
    teacher_row_stride: tl.int64,
    SQUARED: tl.constexpr,  # l2; the weights are already divided by the cost
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Neighbouring programs read the same classes of the teacher.
    tiles = tl.cdiv(n, ROWS)
    program = tl.program_id(0)
    i = program % tiles * ROWS + tl.arange(0, ROWS)
    cloud = (program // tiles % clouds).to(tl.int64)
    column = program // tiles // clouds * BLOCK + tl.arange(0, BLOCK)

    rows = clouds.to(tl.int64) * n
    row_i = cloud * n + i
    i_kept = tl.load(kept + row_i, mask=i < n, other=0) != 0
    counts = (column < columns)[None, :] & i_kept[:, None]
    inverse_temperature = 1 / tl.load(temperature)
    student_rows = student + cloud * student_cloud_stride + i[:, None] * student_row_stride
    s = tl.load(student_rows + column[None, :], mask=counts, other=-float("inf"))
    student_max = tl.load(floats + rows * STUDENT_MAX + row_i, mask=i_kept, other=0)[:, None]
    student_log_sum = tl.load(floats + rows * STUDENT_LOG_SUM + row_i, mask=i_kept, other=0)[:, None]
    p = _softmax(s, student_max, student_log_sum, inverse_temperature)

    g = tl.zeros([ROWS, BLOCK], tl.float32)
    teacher_cloud = teacher + cloud * teacher_cloud_stride
    for j in range(n):
        row_j = cloud * n + j
        if tl.load(kept + row_j) != 0:
            t = tl.load(teacher_cloud + j * teacher_row_stride + column, mask=column < columns, other=-float("inf"))
            teacher_max = tl.load(floats + rows * TEACHER_MAX + row_j)
            teacher_log_sum = tl.load(floats + rows * TEACHER_LOG_SUM + row_j)
            difference = p - _softmax(t, teacher_max, teacher_log_sum, inverse_temperature)[None, :]
            weight = tl.load(weights + row_i * n + j, mask=i_kept, other=0)[:, None]
            if SQUARED:
                g += weight * difference
            else:
                g += _times_sign(tl.broadcast_to(weight, [ROWS, BLOCK]), difference)

    dots = tl.load(dot + row_i, mask=i_kept, other=0)[:, None]
    value = tl.where(counts, p * inverse_temperature * (g - dots), 0.0)
    target = gradient + row_i[:, None] * gradient_columns + column[None, :]
    inside = (i < n)[:, None] & (column < gradient_columns)[None, :]
    tl.store(target, value.to(gradient.dtype.element_ty), mask=inside)


# ---- the launchers: families/kernels.py says what they take and return


def pairwise_costs(clouds: Clouds, floats: Tensor, moments: bool):
    student, teacher, row_mass, temperature, cost, vocab_size = clouds
    count, n = row_mass.shape
    costs = torch.empty(count, n, n, dtype=torch.float32, device=student.device)
    moment_sums = torch.empty(costs.shape if moments else 0, dtype=torch.float32, device=student.device)
    if not costs.numel():
        return costs, moment_sums
    tiles = count * triton.cdiv(n, _PAIR_ROWS) ** 2
    share = _share(tiles, vocab_size)
    splits = triton.cdiv(triton.cdiv(vocab_size, _PAIR_BLOCK), share)
    parts = torch.empty(1 + moments, splits, count, n, n, dtype=torch.float32, device=student.device)
    moment_parts = parts[1] if moments else None
    with device_of(student):
        pair_costs_kernel[(tiles * splits,)](
            student, teacher, row_mass, temperature, floats, parts[0], moment_parts,
            count, n, vocab_size, share, *row_strides(student), *row_strides(teacher),
            SQUARED=cost == "l2", ROWS=_PAIR_ROWS, BLOCK=_PAIR_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        tensors = (parts[0], moment_parts, row_mass, costs, moment_sums if moments else None)
        pair_costs_sum_kernel[(triton.cdiv(costs.numel(), _FINISH_BLOCK),)](
            *tensors, costs.numel(), n, splits, SQUARED=cost == "l2", BLOCK=_FINISH_BLOCK, num_warps=_WARPS
        )
    return costs, moment_sums


def _share(tiles: int, vocab_size: int) -> int:
    """Blocks of classes of one program of `pair_costs_kernel`. Only sizes decide it, because splits change rounding."""
    blocks = triton.cdiv(vocab_size, _PAIR_BLOCK)
    least = max(_LEAST_SHARE // _PAIR_BLOCK, 1)
    return min(max(triton.cdiv(blocks * tiles, _PROGRAMS), least), _MOST_TERMS)


def pairwise_gradient(clouds: Clouds, floats: Tensor, weights: Tensor, dot: Tensor):
    student, teacher, row_mass, temperature, cost, vocab_size = clouds
    count, n = row_mass.shape
    columns = student.shape[2]
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if not gradient.numel():
        return gradient
    programs = count * triton.cdiv(n, _GRADIENT_ROWS) * triton.cdiv(columns, _GRADIENT_BLOCK)
    with device_of(student), written(gradient) as target:
        pair_gradient_kernel[(programs,)](
            student, teacher, row_mass, temperature, floats, weights, dot, target,
            count, n, vocab_size, columns, *row_strides(student), *row_strides(teacher),
            SQUARED=cost == "l2", ROWS=_GRADIENT_ROWS, BLOCK=_GRADIENT_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return gradient
