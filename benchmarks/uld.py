"""Universal Logit Distillation between two vocabularies, beside what PyTorch users write: two sorts."""

import statistics
from collections.abc import Callable

import torch
from contenders import eager
from data import synthetic_logits
from timing import interleaved, ratio

import kdkernels

CASE, ERRORS = "uld", "uld: errors against fp64"
OURS, EAGER = "kdkernels", "eager, sorts of probabilities"
TOPK = "kdkernels, 64 of each side"
TEACHER_CLASSES = 128_256  # beside a student of benchmark.VOCABULARY
# Target on a CPU: at least so many times faster than eager.
OVER_EAGER = 4


LOSSES = {
    OURS: kdkernels.fused_uld,
    EAGER: eager.uld_loss,
    TOPK: lambda student, teacher: kdkernels.fused_uld(student, teacher, topk=min(64, student.shape[-1])),
}


def logits(rows: int, student_classes: int, teacher_classes: int, dtype: torch.dtype, device: str = "cpu"):
    """Logits of one scale, that of `synthetic_logits`' student, so that the sorted curves cross."""
    student, _ = synthetic_logits(rows, student_classes, dtype, device)
    teacher, _ = synthetic_logits(rows, teacher_classes, dtype, device, seed=1)
    return student, teacher


def measure(benchmark, student: torch.Tensor, teacher: torch.Tensor, rounds: int) -> None:
    """Answers, then times, on logits [N, V] of two vocabularies."""
    check(benchmark, student[:4], teacher[:4])
    leaf = student.detach().requires_grad_()
    steps = {name: lambda loss=loss: loss(leaf, teacher).backward() for name, loss in LOSSES.items()}

    def drop_gradient():
        leaf.grad = None

    advance = benchmark.screen.task(f"{CASE}: {len(student)} rows", total=rounds)
    seconds = interleaved(steps, rounds, benchmark.device, before=drop_gradient, after_round=advance)
    for name in steps:
        of_ours = ratio(seconds[name], seconds[OURS])
        add(
            benchmark, CASE, name, student, median_ms=1e3 * statistics.median(seconds[name]), ratio_to_kdkernels=of_ours
        )
    dtype, classes = str(student.dtype).removeprefix("torch."), f"{student.shape[1]:,} and {teacher.shape[1]:,} classes"
    faster = ratio(seconds[EAGER], seconds[OURS])
    benchmark.cpu_target(f"uld {dtype}, {classes}: faster than eager", faster, OVER_EAGER, at_least=True)


def add(benchmark, case: str, name: str, student: torch.Tensor, **columns) -> None:
    dtype = str(student.dtype).removeprefix("torch.")
    benchmark.results.add(case, name, divergence="uld", dtype=dtype, N=student.shape[0], V=student.shape[1], **columns)


def loss_and_gradient(loss: Callable, student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    return [value.detach().double(), torch.autograd.grad(value, leaf)[0].double()]


def check(benchmark, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Errors of the loss, relative, and of the gradient, in norm: a class whose sign rounding decides is off by its
    probability."""
    want = loss_and_gradient(
        lambda *pair: kdkernels.fused_uld(*pair, backend="reference"), student.double(), teacher.double()
    )
    for name in (OURS, EAGER):
        found = loss_and_gradient(LOSSES[name], student, teacher)
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, want, strict=True)]
        add(benchmark, ERRORS, name, student, loss_error=errors[0], gradient_error=errors[1])
        allowed = 1e-4 if student.dtype == torch.float32 else 2.0**-8
        if name == OURS and not max(errors) < allowed:
            benchmark.results.failures.append(f"{name}, {ERRORS}: {errors}, allowed {allowed}")
