"""Universal Logit Distillation between two vocabularies, compared with the two sorts that PyTorch users write."""

from dataclasses import dataclass

import torch
from data import synthetic_logits
from family import OURS, Family, Problem, check, errors_by, limit_by_dtype, name_of, norm_error, time_losses
from rows import eager

import kdkernels

CASE, ERRORS = "uld", "uld: errors against fp64"
EAGER = "eager, sorts of probabilities"
TOPK = "kdkernels, 64 of each side"
OVER_EAGER = 4  # target on a CPU: at least this many times faster


@dataclass(frozen=True)
class Plan:
    rows: int
    student_classes: int
    teacher_classes: tuple[int, ...]
    dtypes: tuple[str, ...]
    rounds: int


CLASSES = 151_936, (128_256, 151_936)
GPU_CLASSES = 151_936, (151_936 - 151_936 // 8,)
PLANS = {
    "cpu": Plan(8, *CLASSES, ("float32", "bfloat16"), 5),
    "cpu quick": Plan(4, *CLASSES, ("float32", "bfloat16"), 5),
    "cuda": Plan(512, *GPU_CLASSES, ("bfloat16", "float32"), 10),
    "cuda quick": Plan(512, *GPU_CLASSES, ("bfloat16",), 10),
}


def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return kdkernels.fused_uld(student, teacher)


def ours_topk(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return kdkernels.fused_uld(student, teacher, topk=min(64, student.shape[-1]))


def exact_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return kdkernels.fused_uld(student, teacher, backend="reference")


LOSSES = {OURS: ours, EAGER: eager.uld_loss, TOPK: ours_topk}
# In norm: where rounding decides the sign of a class, its gradient is off by its probability.
NORM = errors_by(norm_error, "loss_error", "gradient_error")
ALLOWED = limit_by_dtype(float32=1e-4, bfloat16=2.0**-8)
FAMILY = Family("uld", LOSSES, exact_loss, NORM, ALLOWED, "uld", checked=(OURS, EAGER))


def measure(benchmark, plan: Plan) -> None:
    for teacher_classes in plan.teacher_classes:
        for dtype in plan.dtypes:
            # Both sides have the scale of the student's synthetic logits, so that the sorted curves cross.
            options = getattr(torch, dtype), benchmark.device
            sizes = plan.student_classes, teacher_classes
            logits = [synthetic_logits(plan.rows, size, *options, seed)[0] for seed, size in enumerate(sizes)]
            check(benchmark, FAMILY, Problem(*(x[:4] for x in logits)), ERRORS)
            seconds = time_losses(benchmark, FAMILY, CASE, Problem(*logits), benchmark.capped(plan.rounds))
            what = f"uld {name_of(logits[0].dtype)}, {plan.student_classes:,} and {teacher_classes:,} classes"
            benchmark.faster_target(f"{what}: faster than eager", seconds, EAGER, OURS, OVER_EAGER)
