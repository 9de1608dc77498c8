"""SinKD, optimal transport between clouds of rows by pairwise distances, compared with the loop that users write."""

from dataclasses import dataclass

from data import synthetic_logits
from family import OURS, Errors, Family, Problem, Shape, check, largest_error, limit_by_dtype, time_losses, weigh
from rows import eager
from timing import ratio

import kdkernels

CASE, OVER_V, OVER_B = "SinKD", "SinKD over the vocabulary", "SinKD over the rows"
EAGER = "eager loop"
OVER_EAGER = 6  # target on a CPU: at least this many times faster


@dataclass(frozen=True)
class Plan:
    clouds: tuple[tuple[int, int], ...]  # rows and classes; the first one's memory is measured
    swept_classes: tuple[tuple[int, int], ...]
    swept_rows: tuple[tuple[int, int], ...]
    rounds: int
    weighed: tuple[int, int]


def _plan(rows, clouds, swept_classes, swept_rows, fixed_classes, rounds) -> Plan:
    return Plan(
        tuple((rows, classes) for classes in clouds),
        tuple((rows, classes) for classes in swept_classes),
        tuple((swept, fixed_classes) for swept in swept_rows),
        rounds,
        (rows, clouds[0]),
    )


PLANS = {
    "cpu": _plan(64, (32_000, 128_000), (8_000, 16_000, 64_000), (16, 32, 128), 16_000, 5),
    "cpu quick": _plan(16, (4_000,), (2_000, 4_000), (8, 16), 4_000, 5),
    "cuda": _plan(64, (32_000, 128_000), (8_000, 16_000, 64_000), (16, 32, 128), 32_000, 10),
    "cuda quick": _plan(64, (32_000,), (8_000,), (16,), 32_000, 10),
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


def problem(shape: Shape, device: str) -> Problem:
    return Problem(*synthetic_logits(shape.rows, shape.classes, shape.torch_dtype, device))


ALLOWED = limit_by_dtype(float32=1e-5)
LOSSES = {OURS: ours, EAGER: eager.sinkhorn_loss}
FAMILY = Family("pairwise", LOSSES, exact_loss, errors, ALLOWED, problem=problem)


def family(device: str = "cpu", with_peers: bool = True) -> Family:
    return FAMILY


def measure(benchmark, plan: Plan) -> None:
    """Answers on a part of the columns; loss and gradient of each cloud, over the columns, over the rows; memory."""
    rounds, device = benchmark.capped(plan.rounds), benchmark.device
    for rows, classes in plan.clouds:
        cloud = problem(Shape(rows, classes), device)
        check(benchmark, FAMILY, Problem(*(x[:, :4096] for x in (cloud.student, *cloud.others))),
              f"{CASE}: errors against fp64")  # fmt: skip
        seconds = time_losses(benchmark, FAMILY, CASE, cloud, rounds)
        what = f"SinKD, B = {rows}, V = {classes:,}: faster than the eager loop"
        benchmark.cpu_target(what, ratio(seconds[EAGER], seconds[OURS]), OVER_EAGER, at_least=True)
    for case, shapes in ((OVER_V, plan.swept_classes), (OVER_B, plan.swept_rows)):
        for shape in shapes:
            time_losses(benchmark, FAMILY, case, problem(Shape(*shape), device), rounds)
    weigh(benchmark, FAMILY, f"{CASE}: memory", [(name, Shape(*plan.weighed)) for name in FAMILY.losses])
