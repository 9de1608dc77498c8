"""Sparse teachers: kl against a teacher's top k, and its extraction, compared with what PyTorch users write."""

from dataclasses import dataclass

import torch
from data import real_or_synthetic, synthetic_logits
from family import (
    COPY,
    OURS,
    Errors,
    Family,
    Problem,
    Shape,
    check,
    largest_error,
    limit_by_dtype,
    name_of,
    time_losses,
    time_steps,
    weigh,
)
from timing import copying, ratio

import kdkernels
from kdkernels import SparseLogProbs

CASE, EXTRACTION = "top-k teacher", "top-k extraction"
ERRORS, OVER_CONFIDENT = "top-k teacher: errors against fp64", "top-k teacher: an over-confident student"
EAGER, TORCH_TOPK = "eager, gather and clamp", "log_softmax and topk"
ENTRIES = 64
# Targets on a CPU in fp32: at least this many times faster than eager; at most this multiple of a copy of the logits;
# 256 entries in at most this multiple of the time of 16; extraction at least this many times faster than log_softmax
# and topk.
OVER_EAGER, OVER_COPY, OVER_16_ENTRIES, OVER_TOPK = 6, 2.2, 1.2, 8


@dataclass(frozen=True)
class Plan:
    rows: int
    vocabulary: int | None  # None: logits of a language model, where its packages are installed
    dtypes: tuple[str, ...]
    rounds: int
    weighs: bool = False  # measures memory too, in fp32


PLANS = {
    "cpu": Plan(512, None, ("float32", "bfloat16"), 9, True),
    "cpu quick": Plan(64, None, ("float32", "bfloat16"), 9, True),
    "cuda": Plan(4096, 151_936, ("bfloat16", "float32"), 10),
    "cuda quick": Plan(4096, 151_936, ("bfloat16",), 10),
}


def ours(student: torch.Tensor, teacher: SparseLogProbs, **options) -> torch.Tensor:
    return kdkernels.fused_kl(student, teacher, **options)


def exact_loss(student: torch.Tensor, teacher: SparseLogProbs) -> torch.Tensor:
    return ours(student, teacher, backend="reference")


def eager_loss(student: torch.Tensor, teacher: SparseLogProbs) -> torch.Tensor:
    """Most trainers' loss: it gathers the student's log-probabilities, and clamps 1 - sum for the tail."""
    log_q = torch.log_softmax(student.float(), -1).gather(-1, teacher.indices.long())
    log_p = teacher.log_probs
    rest_p, rest_q = (torch.log((1 - x.exp().sum(-1)).clamp(min=1e-8)) for x in (log_p, log_q))
    return ((log_p.exp() * (log_p - log_q)).sum(-1) + rest_p.exp() * (rest_p - rest_q)).mean()


def errors(answer, truth, problem: Problem) -> Errors:
    """Largest errors of the loss, of the gradient, and of the gradient outside the entries, which the tail causes."""
    indices = problem.others[0].indices.long()
    tails = [x[1].scatter(-1, indices, 0) for x in (answer, truth)]
    parts = largest_error(answer[0], truth[0]), largest_error(answer[1], truth[1]), largest_error(*tails)
    return Errors(dict(zip(("loss_error", "gradient_error", "tail_gradient_error"), parts, strict=True)), parts)


def problem(shape: Shape, device: str) -> Problem:
    student, teacher = synthetic_logits(shape.rows, shape.classes, shape.torch_dtype, device)
    return Problem(student, kdkernels.topk_log_probs(teacher, ENTRIES))


ALLOWED = limit_by_dtype(float32=1e-5, bfloat16=2.0**-8)
FAMILY = Family("topk", {OURS: ours, EAGER: eager_loss}, exact_loss, errors, ALLOWED, "kl", problem=problem)


def measure(benchmark, plan: Plan) -> None:
    for dtype in plan.dtypes:
        torch_dtype = getattr(torch, dtype)
        if plan.vocabulary is None:
            logits = [x.to(torch_dtype) for x in real_or_synthetic(plan.rows)[:2]]
        else:
            logits = synthetic_logits(plan.rows, plan.vocabulary, torch_dtype, benchmark.device)
        check_answers(benchmark, *logits)
        time_kl(benchmark, *logits, plan.rounds)
        time_extraction(benchmark, logits[1], plan.rounds)
    if plan.weighs:
        shape = Shape(plan.rows, logits[0].shape[1])
        weigh(benchmark, FAMILY, f"{CASE}: memory", [(name, shape) for name in FAMILY.losses])


def check_answers(benchmark, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Check on 32 rows, and with a student whose entries' logits are so large that its tail is 0 in fp32."""
    student, teacher = student[:32], teacher[:32]
    top = kdkernels.topk_log_probs(teacher, ENTRIES)
    lifted = student.scatter_add(-1, top.indices.long(), torch.full_like(top.log_probs, 60).to(student.dtype))
    for case, logits in ((ERRORS, student), (OVER_CONFIDENT, lifted)):
        check(benchmark, FAMILY, Problem(logits, top), case)


def time_kl(benchmark, student: torch.Tensor, teacher: torch.Tensor, rounds: int) -> None:
    top = {k: kdkernels.topk_log_probs(teacher, k) for k in (16, ENTRIES, 256)}
    problem = Problem(student, top[ENTRIES])
    variants = {f"{k} entries": top[k] for k in (16, 256)}
    variants |= {tail: top[ENTRIES].with_tail(tail) for tail in ("support", "uniform")}

    def step(variant):
        return lambda: ours(problem.student, variant).backward()

    steps = {f"{OURS}, {name}": step(variant) for name, variant in variants.items()}
    steps[COPY] = copying(student)
    seconds = time_losses(benchmark, FAMILY, CASE, problem, benchmark.capped(rounds), {"over_copy": COPY}, **steps)

    dtype, options = name_of(student.dtype), {"judged": student.dtype == torch.float32}
    what = f"kl against the top {ENTRIES} {dtype}:"
    benchmark.faster_target(f"{what} faster than eager", seconds, EAGER, OURS, OVER_EAGER, **options)
    over_copy = ratio(seconds[OURS], seconds[COPY])
    benchmark.cpu_target(f"{what} over the copy of the logits", over_copy, OVER_COPY, **options)
    growth = ratio(seconds[f"{OURS}, 256 entries"], seconds[f"{OURS}, 16 entries"])
    benchmark.cpu_target(f"kl against a top k {dtype}: 256 entries over 16", growth, OVER_16_ENTRIES, **options)


def time_extraction(benchmark, teacher: torch.Tensor, rounds: int) -> None:
    steps = {
        OURS: lambda: kdkernels.topk_log_probs(teacher, ENTRIES),
        TORCH_TOPK: lambda: torch.log_softmax(teacher.float(), -1).topk(ENTRIES, -1),
        "logsumexp alone": lambda: torch.logsumexp(teacher.float(), -1),
    }
    problem, over = Problem(teacher), {"ratio_to_kdkernels": OURS}
    rounds, options = benchmark.capped(rounds), {"before": problem.drop_gradients, "over": over}
    seconds = time_steps(benchmark, FAMILY, EXTRACTION, problem.shape, steps, rounds, **options)
    what = f"top {ENTRIES} {name_of(teacher.dtype)}: faster than {TORCH_TOPK}"
    judged = teacher.dtype == torch.float32
    benchmark.faster_target(what, seconds, TORCH_TOPK, OURS, OVER_TOPK, judged=judged)
