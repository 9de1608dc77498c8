"""SinKD, optimal transport between clouds of rows by pairwise distances, compared with the loop that users write."""

from dataclasses import dataclass

from family import (
    OURS,
    Errors,
    Family,
    Problem,
    Shape,
    check,
    largest_error,
    limit_by_dtype,
    synthetic_problem,
    time_losses,
    weigh,
)
from rows import eager

import kdkernels

CASE, OVER_V, OVER_B = "SinKD", "SinKD over the vocabulary", "SinKD over the rows"
EAGER = "eager loop"
OVER_EAGER = 6  # target on a CPU: at least this many times faster


@dataclass(frozen=True)
class Plan:
    rows: int
    classes: tuple[int, ...]  # one cloud each; the first one's memory is measured
    swept_classes: tuple[int, ...]
    swept_rows: tuple[int, ...]
    classes_of_swept_rows: int
    rounds: int


PLANS = {
    "cpu": Plan(64, (32_000, 128_000), (8_000, 16_000, 64_000), (16, 32, 128), 16_000, 5),
    "cpu quick": Plan(16, (4_000,), (2_000, 4_000), (8, 16), 4_000, 5),
    "cuda": Plan(64, (32_000, 128_000), (8_000, 16_000, 64_000), (16, 32, 128), 32_000, 10),
    "cuda quick": Plan(64, (32_000,), (8_000,), (16,), 32_000, 10),
}


def ours(student, teacher, **options):
    return kdkernels.fused_sinkhorn_kd(student, teacher, **options)


def exact_loss(student, teacher):
    return ours(student, teacher, backend="reference")


def errors(answer, truth, problem: Problem) -> Errors:
    """Largest errors of loss and gradient. Rounding decides the sign of p - q where the two agree to fp32, and that
    class's gradient is off by its share; so the median of the rows' largest errors is judged."""
    columns = {"loss_error": largest_error(answer[0], truth[0]), "gradient_error": largest_error(answer[1], truth[1])}
    row_errors = (answer[1] - truth[1]).abs().amax(1) / truth[1].abs().max()
    return Errors(columns, (columns["loss_error"], row_errors.median().item()))


LOSSES = {OURS: ours, EAGER: eager.sinkhorn_loss}
FAMILY = Family("pairwise", LOSSES, exact_loss, errors, limit_by_dtype(float32=1e-5))


def measure(benchmark, plan: Plan) -> None:
    """Answers on a part of the columns; loss and gradient of each cloud, over the columns, over the rows; memory."""
    rounds, device = benchmark.capped(plan.rounds), benchmark.device
    shapes = [Shape(plan.rows, classes) for classes in plan.classes]
    for shape in shapes:
        cloud = synthetic_problem(shape, device)
        part = Problem(*(x[:, :4096] for x in (cloud.student, *cloud.others)))
        check(benchmark, FAMILY, part, f"{CASE}: errors against fp64")
        seconds = time_losses(benchmark, FAMILY, CASE, cloud, rounds)
        what = f"SinKD, B = {shape.rows}, V = {shape.classes:,}: faster than the eager loop"
        benchmark.faster_target(what, seconds, EAGER, OURS, OVER_EAGER)
    swept = [(OVER_V, Shape(plan.rows, classes)) for classes in plan.swept_classes]
    swept += [(OVER_B, Shape(rows, plan.classes_of_swept_rows)) for rows in plan.swept_rows]
    for case, shape in swept:
        time_losses(benchmark, FAMILY, case, synthetic_problem(shape, device), rounds)
    weigh(benchmark, FAMILY, f"{CASE}: memory", [(name, shapes[0]) for name in FAMILY.losses])
