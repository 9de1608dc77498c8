"""Sparse teachers: kl against the top k of a teacher, and the extraction of it, beside what PyTorch users write."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from data import synthetic_logits
from timing import interleaved, ratio

import kdkernels
from kdkernels import SparseLogProbs

CASE, EXTRACTION = "top-k teacher", "top-k extraction"
ERRORS, OVER_CONFIDENT = "top-k teacher: errors against fp64", "top-k teacher: an over-confident student"
OURS, EAGER = "kdkernels", "eager, gather and clamp"
ENTRIES = 64
# Targets on a CPU, in fp32: at least so many times faster than eager, at most so many times a copy of the logits, at
# most so many times the time of 16 entries with 256; extraction at least so many times faster than log_softmax and
# topk.
OVER_EAGER, OVER_COPY, OF_ENTRIES, OVER_TOPK = 6, 2.2, 1.2, 8


def eager_loss(student: torch.Tensor, teacher: SparseLogProbs) -> torch.Tensor:
    """What most trainers do: gather the student's log-probabilities, and the tail as a clamped 1 - sum."""
    log_q = torch.log_softmax(student.float(), -1).gather(-1, teacher.indices.long())
    log_p = teacher.log_probs
    rest_p, rest_q = (torch.log((1 - x.exp().sum(-1)).clamp(min=1e-8)) for x in (log_p, log_q))
    return ((log_p.exp() * (log_p - log_q)).sum(-1) + rest_p.exp() * (rest_p - rest_q)).mean()


def ours(student: torch.Tensor, teacher: SparseLogProbs) -> torch.Tensor:
    return kdkernels.fused_kl(student, teacher)


LOSSES = {OURS: ours, EAGER: eager_loss}


def torch_topk(logits: torch.Tensor, k: int):
    return torch.log_softmax(logits.float(), -1).topk(k, -1)


def measure(benchmark, student: torch.Tensor, teacher: torch.Tensor, rounds: int) -> None:
    """Answers, then times, on logits [N, V]."""
    check(benchmark, student, teacher)
    time_losses(benchmark, student, teacher, rounds)
    time_extraction(benchmark, teacher, rounds)


def add(benchmark, case: str, name: str, student: torch.Tensor, **columns) -> None:
    dtype = str(student.dtype).removeprefix("torch.")
    benchmark.results.add(case, name, divergence="kl", dtype=dtype, N=student.shape[0], V=student.shape[1], **columns)


def loss_and_gradient(loss: Callable, student: torch.Tensor, teacher: SparseLogProbs) -> list[torch.Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    return [value.detach().double(), torch.autograd.grad(value, leaf)[0].double()]


def check(benchmark, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Errors of loss and gradient, relative to the largest element: on these logits, and where the student's largest
    ones are so large that its tail is 0 in fp32."""
    student, teacher = student[:32], teacher[:32]
    top = kdkernels.topk_log_probs(teacher, ENTRIES)
    lifted = student.scatter_add(-1, top.indices.long(), torch.full_like(top.log_probs, 60).to(student.dtype))
    for case, logits in ((ERRORS, student), (OVER_CONFIDENT, lifted)):
        wide = SparseLogProbs(top.indices, top.log_probs.double(), tail_log_prob=top.tail_log_prob.double())
        want = loss_and_gradient(partial(kdkernels.fused_kl, backend="reference"), logits.double(), wide)
        for name, loss in LOSSES.items():
            found = loss_and_gradient(loss, logits, top)
            # Outside of the entries, where the tail's gradient goes.
            errors = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, want, strict=True)]
            others = [x[1].scatter(-1, top.indices.long(), 0) for x in (found, want)]
            tail = ((others[0] - others[1]).abs().max() / others[1].abs().max()).item()
            add(benchmark, case, name, logits, loss_error=errors[0], gradient_error=errors[1], tail_gradient_error=tail)
            allowed = 1e-5 if logits.dtype == torch.float32 else 2.0**-8
            if name == OURS and not max(errors[0], errors[1], tail) < allowed:
                benchmark.results.failures.append(f"{name}, {case}: errors {errors} and {tail}, allowed {allowed}")


def time_losses(benchmark, student: torch.Tensor, teacher: torch.Tensor, rounds: int) -> None:
    leaf = student.detach().requires_grad_()
    written = student.clone()  # memory that is there already
    top = {k: kdkernels.topk_log_probs(teacher, k) for k in (16, ENTRIES, 256)}

    def step(loss, teacher):
        return lambda: loss(leaf, teacher).backward()

    steps = {OURS: step(ours, top[ENTRIES]), EAGER: step(eager_loss, top[ENTRIES])}
    steps |= {f"kdkernels, {k} entries": step(ours, top[k]) for k in (16, 256)}
    steps |= {f"kdkernels, {tail}": step(ours, top[ENTRIES].with_tail(tail)) for tail in ("support", "uniform")}
    steps["copy"] = lambda: written.copy_(student)

    def drop_gradient():
        leaf.grad = None

    advance = benchmark.screen.task(f"{CASE}: {len(student)} rows", total=rounds)
    seconds = interleaved(steps, rounds, benchmark.device, before=drop_gradient, after_round=advance)
    for name in steps:
        over = {
            "ratio_to_kdkernels": ratio(seconds[name], seconds[OURS]),
            "over_copy": ratio(seconds[name], seconds["copy"]),
        }
        add(benchmark, CASE, name, student, median_ms=1e3 * statistics.median(seconds[name]), **over)
    dtype = str(student.dtype).removeprefix("torch.")
    what = f"kl against the top {ENTRIES} {dtype}:"
    judged = {} if student.dtype == torch.float32 else {"judged": False}
    benchmark.cpu_target(
        f"{what} faster than eager", ratio(seconds[EAGER], seconds[OURS]), OVER_EAGER, at_least=True, **judged
    )
    benchmark.cpu_target(
        f"{what} over the copy of the logits", ratio(seconds[OURS], seconds["copy"]), OVER_COPY, **judged
    )
    grown = ratio(seconds["kdkernels, 256 entries"], seconds["kdkernels, 16 entries"])
    benchmark.cpu_target(f"kl against a top k {dtype}: 256 entries over 16", grown, OF_ENTRIES, **judged)


def time_extraction(benchmark, teacher: torch.Tensor, rounds: int) -> None:
    steps = {
        OURS: lambda: kdkernels.topk_log_probs(teacher, ENTRIES),
        "log_softmax and topk": lambda: torch_topk(teacher, ENTRIES),
        "logsumexp alone": lambda: torch.logsumexp(teacher.float(), -1),
    }
    advance = benchmark.screen.task(f"{EXTRACTION}: {len(teacher)} rows", total=rounds)
    seconds = interleaved(steps, rounds, benchmark.device, after_round=advance)
    for name in steps:
        of_ours = ratio(seconds[name], seconds[OURS])
        add(
            benchmark,
            EXTRACTION,
            name,
            teacher,
            median_ms=1e3 * statistics.median(seconds[name]),
            ratio_to_kdkernels=of_ours,
        )
    dtype = str(teacher.dtype).removeprefix("torch.")
    judged = {} if teacher.dtype == torch.float32 else {"judged": False}
    faster = ratio(seconds["log_softmax and topk"], seconds[OURS])
    benchmark.cpu_target(
        f"top {ENTRIES} {dtype}: faster than log_softmax and topk", faster, OVER_TOPK, at_least=True, **judged
    )


def memory_step(name: str, rows: int, vocabulary: int, dtype: torch.dtype):
    """A step of one contender and what drops its gradient, for the peak of a process of its own."""
    student, teacher = synthetic_logits(rows, vocabulary, dtype)
    top = kdkernels.topk_log_probs(teacher, ENTRIES)
    leaf = student.requires_grad_()

    def drop_gradient():
        leaf.grad = None

    return lambda: LOSSES[name](leaf, top).backward(), drop_gradient


def measure_memory(benchmark, rows: int, vocabulary: int, peak_bytes: Callable[[str], int]) -> None:
    peaks = {name: peak_bytes(name) for name in LOSSES}
    for name, peak in peaks.items():
        benchmark.results.add(
            f"{CASE}: memory", name, divergence="kl", dtype="float32", N=rows, V=vocabulary,
            ratio_to_kdkernels=peak / peaks[OURS] if peaks[OURS] else None, peak_extra_MiB=peak / 2**20,
        )  # fmt: skip
