"""Every bound on memory that a docstring or README.md promises holds: without a gradient, and with one.

Each case is a call, the tensors that get gradients, and the bytes that the call may take besides the gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from memory import peak_bytes

import kdkernels
from kdkernels import LinearLogits, fused_class_ot, fused_kl, fused_sinkhorn_kd, fused_uld

ROWS, VOCAB, WIDTH = 48, 6000, 32
BUDGET = 1 << 19
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Case(NamedTuple):
    call: Callable
    leaves: tuple[torch.Tensor, ...]
    bound: int


def draw(*shape, dtype=FP32, grad=False):
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def size(dtype) -> int:
    """The bytes of a number in the arithmetic of the dtype."""
    return 8 if dtype == FP64 else 4


def workspace(dtype) -> int:
    """A kernel keeps some exponentials of a row for each thread, and each row has some numbers."""
    return torch.get_num_threads() * 3 * size(dtype) * VOCAB + 200 * ROWS


def logits(dtype, mode):
    student, teacher = draw(ROWS, VOCAB, dtype=dtype, grad=True), draw(ROWS, VOCAB, dtype=dtype)
    return Case(lambda: fused_kl(student, teacher, gradient=mode), (student,), workspace(dtype))


def head(dtype, mode):
    """The weight's gradient is summed in fp32; a CPU adds a slab of a product that is rounded to 16 bits."""
    student = LinearLogits(draw(ROWS, WIDTH, dtype=dtype, grad=True), draw(VOCAB, WIDTH, dtype=dtype, grad=True))
    teacher = LinearLogits(draw(ROWS, WIDTH, dtype=dtype), draw(VOCAB, WIDTH, dtype=dtype))
    summed = 4 * student.weight.numel() if dtype.itemsize == 2 else 0
    leaves = (student.hidden, student.weight)
    return Case(lambda: fused_kl(student, teacher, gradient=mode), leaves, BUDGET + summed + workspace(dtype))


def sparse(dtype, tail):
    """The entries of a row are sorted and merged; "uniform" makes logits of them in chunks."""
    student = draw(ROWS, VOCAB, dtype=dtype, grad=True)
    teacher = kdkernels.topk_log_probs(draw(ROWS, VOCAB, dtype=dtype), 8).with_tail(tail)
    bound = workspace(dtype) + 200 * 8 * ROWS + (BUDGET if tail == "uniform" else 0)
    return Case(lambda: fused_kl(student, teacher), (student,), bound)


def uld(dtype, topk):
    student, teacher = draw(ROWS, VOCAB, dtype=dtype, grad=True), draw(ROWS, 4000, dtype=dtype)
    each = 49 * VOCAB + 1_600_000 if dtype == FP64 else 25 * VOCAB + 1_320_000
    bound = torch.get_num_threads() * each if topk is None else BUDGET + 200 * topk * ROWS + workspace(dtype)
    return Case(lambda: fused_uld(student, teacher, topk=topk), (student,), bound + 200 * ROWS)


def sinkhorn_kd(dtype, cost, gradient):
    """2 clouds. At most 10 matrices [B, B] exist at a time; the implicit gradient solves in fp64. The costs l1 and l2
    take tiles of the rows.
    """
    student, teacher = (draw(2, ROWS, VOCAB, dtype=dtype, grad=grad) for grad in (True, False))
    matrices = 2 * ROWS * ROWS * (10 * size(dtype) + 64 * (gradient == "implicit"))
    columns = BUDGET if cost in ("sqeuclidean", "dot") else torch.get_num_threads() * (1 << 19)
    return Case(
        lambda: fused_sinkhorn_kd(student, teacher, cost=cost, gradient=gradient, iterations=3),
        (student,),
        matrices + columns + 400 * ROWS,
    )


def class_ot(dtype, gradient, cost_dtype=FP32):
    """Two matrices [V, V]; an fp16 student's gradient is kept in fp32."""
    student, teacher = (draw(ROWS, 200, dtype=dtype, grad=grad) for grad in (True, False))
    cost = torch.rand(200, 200, dtype=cost_dtype)
    number = size(FP64 if FP64 in (dtype, cost_dtype) else dtype)
    matrices = 2 * 200 * 200 * number + (4 * student.numel() if dtype == FP16 else 0)
    return Case(
        lambda: fused_class_ot(student, teacher, cost, gradient=gradient),
        (student,),
        matrices + BUDGET // 4 + 200 * ROWS,
    )


def topk(dtype, is_head):
    x = LinearLogits(draw(ROWS, WIDTH, dtype=dtype), draw(VOCAB, WIDTH, dtype=dtype))
    x = x if is_head else draw(ROWS, VOCAB, dtype=dtype)
    bound = (BUDGET if is_head else 0) + workspace(dtype) + ROWS * 8 * (4 + size(dtype))
    return Case(lambda: kdkernels.topk_log_probs(x, 8), (), bound)


def sampled(dtype, is_head, samples, exact):
    x = LinearLogits(draw(ROWS, WIDTH, dtype=dtype), draw(VOCAB, WIDTH, dtype=dtype))
    x = x if is_head else draw(ROWS, VOCAB, dtype=dtype)
    result = ROWS * (samples + exact) * (4 + size(dtype))
    return Case(lambda: kdkernels.sampled_log_probs(x, samples, exact=exact), (), BUDGET + result + 20 * ROWS)


CASES = [
    *((logits, dtype, mode) for dtype in (FP32, BF16, FP16, FP64) for mode in ("forward", "backward")),
    *((head, dtype, mode) for dtype in (FP32, BF16) for mode in ("forward", "backward")),
    *((sparse, FP32, tail) for tail in ("bucket", "support", "renormalize", "uniform", "truncate")),
    *((uld, dtype, k) for dtype in (FP32, BF16, FP64) for k in (None, 8)),
    *((sinkhorn_kd, FP32, cost, "unrolled") for cost in ("l1", "l2", "sqeuclidean", "dot")),
    *((sinkhorn_kd, dtype, "sqeuclidean", "envelope") for dtype in (BF16, FP64)),
    (sinkhorn_kd, FP32, "dot", "implicit"),
    *((class_ot, dtype, gradient) for dtype in (FP32, FP16) for gradient in ("unrolled", "implicit", "envelope")),
    (class_ot, FP64, "envelope"), (class_ot, FP32, "envelope", FP64),
    *((topk, dtype, is_head) for dtype in (FP32, BF16, FP64) for is_head in (False, True)),
    *((sampled, dtype, False, samples, 4) for dtype in (FP32, BF16, FP64) for samples in (1, 20, 2000)),
    (sampled, FP32, True, 20, 0), (sampled, BF16, True, 20, 4), (sampled, FP32, False, 1, 3000),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(getattr(x, "__name__", x)) for x in case))
def test_memory_stays_within_the_bound(case):
    torch.use_deterministic_algorithms(False)
    make, *arguments = case
    case = make(*arguments)
    budget = BUDGET // 4 if make is class_ot else BUDGET

    def without_gradient():
        with kdkernels.chunk_budget(budget), torch.no_grad():
            return case.call()

    def with_gradient():
        with kdkernels.chunk_budget(budget):
            loss = case.call()
        return torch.autograd.grad(loss, case.leaves)

    peak = peak_bytes(without_gradient)
    assert peak <= case.bound, f"without a gradient: {peak:,} bytes; expected at most {case.bound:,}"
    if not case.leaves:
        return
    gradients = sum(x.nbytes for x in case.leaves)
    peak = peak_bytes(with_gradient)
    assert peak >= gradients, "the profiler missed allocations"
    beyond = peak - gradients
    assert beyond <= case.bound, f"besides the gradient: {beyond:,} bytes; expected at most {case.bound:,}"
