"""Universal Logit Distillation in Triton, the twin of csrc/cuda/uld.cu; csrc/calls/uld.h has the formulas.

torch.sort ranks the logits of some rows, a few hundred MiB, at a time. Then the kernels take a tile of BLOCK ranks at a
time:

    uld_ranks_kernel      one program a row
                          sums       of exponentials of both sides
                          loss       and signs: their sum before each rank, and the sum of p times the sign
    uld_gradient_kernel   one program a tile
                          gradient   of the class of each rank. Equal logits share the mean sign of their run: the
                                     sums of signs at the run's ends give that mean.
"""

import torch
import triton
import triton.language as tl

from ...families.options import RowOptions, per_row
from ...families.uld import Uld, ranked_chunks
from .launch import device_of, gradient_target, row_arguments, tile, written
from .row import fill_gradient, has_no_result, load_row_options, load_tile, value_without_result


@triton.jit
def _probabilities(row_start, start, columns, maximum, inverse_temperature, inverse_sum, BLOCK: tl.constexpr):
    """The probabilities of a tile of ranks; 0 past the last rank."""
    x = load_tile(row_start, start, columns, BLOCK)
    return tl.exp((x - maximum) * inverse_temperature) * inverse_sum


@triton.jit(do_not_specialize=["strides"])
def uld_ranks_kernel(
    student,  # [rows, student_columns], descending
    teacher,  # [rows, teacher_columns]
    given,  # the row options
    strides,  # theirs
    sums_of_signs,  # [rows, student_columns + 1], or None without a gradient
    floats,  # [2, rows] with a gradient: 1 / sum of exponentials, sum p s
    loss,  # [rows]
    divergence,  # [rows]
    rows,
    student_columns,
    teacher_columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    options = load_row_options(row, student_columns, given, strides)
    if has_no_result(options):
        tl.store(loss + row, value_without_result(options))
        tl.store(divergence + row, value_without_result(options))
        return
    inverse_temperature = options.inverse_temperature
    student_row = student + row * student_columns
    teacher_row = teacher + row * teacher_columns
    student_max = tl.load(student_row).to(tl.float32)
    teacher_max = tl.load(teacher_row).to(tl.float32)
    ranks = tl.maximum(student_columns, teacher_columns)

    student_sum = tl.full((), 0, tl.float32)
    teacher_sum = tl.full((), 0, tl.float32)
    for start in range(0, ranks, BLOCK):
        student_sum += tl.sum(
            _probabilities(student_row, start, student_columns, student_max, inverse_temperature, 1.0, BLOCK), 0
        )
        teacher_sum += tl.sum(
            _probabilities(teacher_row, start, teacher_columns, teacher_max, inverse_temperature, 1.0, BLOCK), 0
        )
    student_factor = 1 / student_sum
    teacher_factor = 1 / teacher_sum

    distance = tl.full((), 0, tl.float32)
    signed_mass = tl.full((), 0, tl.float32)
    before = tl.full((), 0, tl.int32)
    for start in range(0, ranks, BLOCK):
        p = _probabilities(student_row, start, student_columns, student_max, inverse_temperature, student_factor, BLOCK)
        q = _probabilities(teacher_row, start, teacher_columns, teacher_max, inverse_temperature, teacher_factor, BLOCK)
        distance += tl.sum(tl.abs(p - q), 0)
        if sums_of_signs is not None:
            rank = start + tl.arange(0, BLOCK)
            inside = rank < student_columns
            sign = tl.where(inside, (p > q).to(tl.int32) - (p < q).to(tl.int32), 0)
            signed_mass += tl.sum(p * sign.to(tl.float32), 0)
            up_to = before + tl.cumsum(sign, 0)
            tl.store(sums_of_signs + row * (student_columns + 1) + rank, up_to - sign, mask=inside)
            before += tl.sum(sign, 0)
    tl.store(loss + row, options.scale * distance)
    tl.store(divergence + row, distance)
    if sums_of_signs is not None:
        tl.store(sums_of_signs + row * (student_columns + 1) + student_columns, before)
        tl.store(floats + row, student_factor)
        # A NaN of the teacher gives no sign, so the distance decides.
        tl.store(floats + rows + row, tl.where(distance == distance, signed_mass, float("nan")))


@triton.jit
def _first_below(row_start, x, low, high, OR_EQUAL: tl.constexpr):
    """The first rank from `low` on whose logit is less than x (or equal), or `high` if no rank before `high` is."""
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        at = tl.load(row_start + middle, mask=searching, other=0).to(tl.float32)
        found = at < x
        if OR_EQUAL:
            found = at <= x
        high = tl.where(searching & found, middle, high)
        low = tl.where(searching & (found == 0), middle + 1, low)
    return high


@triton.jit(do_not_specialize=["strides"])
def uld_gradient_kernel(
    student,
    indices,  # [rows, student_columns], int64
    given,  # the row options
    strides,  # theirs
    sums_of_signs,
    floats,
    gradient,  # [rows, gradient_columns], contiguous
    rows,
    student_columns,
    gradient_columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    gradient_row = gradient + row * gradient_columns
    if start == 0:
        fill_gradient(gradient_row, student_columns, gradient_columns, 0.0, BLOCK)
    options = load_row_options(row, student_columns, given, strides)
    if has_no_result(options):
        end = tl.minimum(start + BLOCK, student_columns)
        fill_gradient(gradient_row, start, end, value_without_result(options), BLOCK)
        return
    inverse_temperature = options.inverse_temperature
    student_row = student + row * student_columns
    signs_row = sums_of_signs + row * (student_columns + 1)
    rank = start + tl.arange(0, BLOCK)
    inside = rank < student_columns
    x = tl.load(student_row + rank, mask=inside, other=-float("inf")).to(tl.float32)
    above = tl.load(student_row + rank - 1, mask=inside & (rank > 0), other=float("nan")).to(tl.float32)
    below = tl.load(student_row + rank + 1, mask=rank + 1 < student_columns, other=float("nan")).to(tl.float32)
    first = _first_below(student_row, x, tl.where(x == above, 0, rank), rank, True)
    end = _first_below(student_row, x, rank + 1, tl.where(inside & (x == below), student_columns, rank + 1), False)

    signs = tl.load(signs_row + end, mask=inside, other=0) - tl.load(signs_row + first, mask=inside, other=0)
    mean_sign = signs.to(tl.float32) / (end - first).to(tl.float32)
    p = tl.exp((x - tl.load(student_row).to(tl.float32)) * inverse_temperature) * tl.load(floats + row)
    value = options.scale * inverse_temperature * p * (mean_sign - tl.load(floats + rows + row))
    index = tl.load(indices + row * student_columns + rank, mask=inside, other=0)
    tl.store(gradient_row + index, value.to(gradient_row.dtype.element_ty), mask=inside)


def uld(problem: Uld, gradient: bool):
    """Returns loss [rows], gradient (or an empty tensor) and divergence [rows]."""
    student, row_scale = problem.student, problem.row_scale
    student_vocab_size, teacher_vocab_size = problem.student_vocab_size, problem.teacher_vocab_size
    device = student.device
    out = gradient_target(student, gradient, None)
    loss, divergence = (torch.empty(row_scale.numel(), device=device) for _ in range(2))
    block, warps = tile(max(student_vocab_size, teacher_vocab_size))
    gradient_block, gradient_warps = tile(student_vocab_size, statistics=True)
    with device_of(student), written(out) as target:
        target = target.flatten(0, 1) if gradient else None
        for ranked in ranked_chunks(problem, gradient):
            chunk, rows = ranked.rows, ranked.student.shape[0]
            options = RowOptions(row_scale[chunk], per_row(problem.temperature, row_scale, chunk))
            arguments = row_arguments(options).values()
            signs, floats = None, None
            if gradient:
                signs = torch.empty(rows, student_vocab_size + 1, dtype=torch.int32, device=device)
                floats = torch.empty(2, rows, device=device)
            tensors = (ranked.student, ranked.teacher, *arguments, signs, floats, loss[chunk], divergence[chunk])
            sizes = (rows, student_vocab_size, teacher_vocab_size)
            uld_ranks_kernel[(rows,)](*tensors, *sizes, BLOCK=block, num_warps=warps)
            if gradient:
                tensors = (ranked.student, ranked.indices, *arguments, signs, floats, target[chunk])
                sizes = (rows, student_vocab_size, student.shape[2])
                uld_gradient_kernel[(rows, triton.cdiv(student_vocab_size, gradient_block))](
                    *tensors, *sizes, BLOCK=gradient_block, num_warps=gradient_warps
                )
    return loss, out, divergence
