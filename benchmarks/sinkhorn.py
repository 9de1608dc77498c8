"""Batches of Sinkhorn problems between points of a plane, compared with POT and GeomLoss."""

from dataclasses import dataclass
from functools import partial

import torch
from family import OURS, Errors, Family, Problem, check, limit_by_dtype, time_steps
from rows import installed

import kdkernels

CASE, ERRORS = "Sinkhorn, 64 x 64, 50 rounds", "Sinkhorn: errors against fp64"
POT, GEOMLOSS, FROM_POINTS = "POT ot.batch", "GeomLoss", f"{OURS}, from points"
LIBRARIES = {POT: "ot", GEOMLOSS: "geomloss"}  # the module of each
EPSILON, SIZE, CHECKED = 0.1, 64, 32
OVER_LIBRARIES = 8  # target on a CPU: at least this many times faster


@dataclass(frozen=True)
class Plan:
    problems: int  # in one batch
    rounds: int


PLANS = {"cpu": Plan(4096, 3), "cpu quick": Plan(256, 3), "cuda": Plan(4096, 10), "cuda quick": Plan(1024, 10)}


def batch(count: int, device: str) -> tuple[torch.Tensor, ...]:
    """Points x and y of a plane [count, SIZE, 2], and their masses a and b."""
    generator = torch.Generator(device).manual_seed(0)
    x, y = (torch.rand(count, SIZE, 2, generator=generator, device=device) for _ in range(2))
    a, b = (torch.rand(count, SIZE, generator=generator, device=device) + 0.1 for _ in range(2))
    return x, y, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


def half_squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The cost between points: half the squared distance."""
    return 0.5 * ((x[:, :, None] - y[:, None]) ** 2).sum(-1)


def ours(cost, a, b, gradient="envelope", value="transport", **options):
    options |= {"epsilon": EPSILON, "iterations": 50, "gradient": gradient, "value": value}
    return kdkernels.fused_sinkhorn(cost, a, b, **options).value


def ours_from_points(x, y, a, b, **options):
    return ours(half_squares(x, y), a, b, value="entropic", **options)


def pot_value(cost, a, b):
    """<P, C> with POT's envelope gradient. tol=0 turns its check of convergence off: it runs all 50 rounds."""
    import ot

    return ot.batch.solve_batch(cost, EPSILON, a, b, max_iter=50, tol=0.0, grad="envelope").value_linear


def geomloss_value(x, y, a, b):
    """GeomLoss with a schedule of epsilons that ends within 1e-5 of the value; its default ends within 1e-2."""
    import geomloss

    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=EPSILON**0.5, scaling=0.98, debias=False, backend="tensorized")
    return loss(a, x, b, y)


def errors(answer, truth, problem: Problem) -> Errors:
    error = ((answer[0] - truth[0]).abs() / truth[0]).max().item()
    return Errors({"loss_error": error}, (error,))


def values_alone(loss, problem: Problem) -> list[torch.Tensor]:
    return [loss(problem.student, *problem.others).detach().double()]


def _family(losses, truth, checked) -> Family:
    options = {"checked": checked, "answer": values_alone}
    return Family(
        "sinkhorn", losses, partial(truth, backend="reference"), errors, limit_by_dtype(float32=1e-5), **options
    )


GRADIENTS = ("implicit", "unrolled")
LOSSES = {OURS: ours} | {f"{OURS}, {name}": partial(ours, gradient=name) for name in GRADIENTS} | {POT: pot_value}
# GeomLoss takes points and returns the entropic value. Its truth is the converged value, which 50 rounds reach here.
LOSSES_FROM_POINTS = {FROM_POINTS: ours_from_points, GEOMLOSS: geomloss_value}


def family() -> Family:
    losses = {name: loss for name, loss in LOSSES.items() if installed(LIBRARIES.get(name, "torch"))}
    return _family(losses, ours, tuple(name for name in losses if name in (OURS, POT)))


def measure(benchmark, plan: Plan) -> None:
    """Values against fp64, then value and gradient of one batch of problems."""
    missing = {name: module for name, module in LIBRARIES.items() if not installed(module)}
    benchmark.leave_out({name: f"{module} is not installed" for name, module in missing.items()})
    x, *others = batch(plan.problems, benchmark.device)
    y, *masses = others
    costs, points = Problem(half_squares(x, y), *masses), Problem(x.clone(), *others)
    cost_family, point_family = family(), _family(LOSSES_FROM_POINTS, ours_from_points, ())
    check(benchmark, cost_family, first_of(costs), ERRORS)
    more_steps = {}
    if GEOMLOSS not in missing:
        check(benchmark, point_family, first_of(points), ERRORS)
        more_steps = {name: summed(points, loss) for name, loss in LOSSES_FROM_POINTS.items()}
    steps = {name: summed(costs, loss) for name, loss in cost_family.losses.items()} | more_steps
    drop = lambda: (costs.drop_gradients(), points.drop_gradients())  # noqa: E731
    options = {"before": drop, "over": {"ratio_to_kdkernels": OURS}}
    seconds = time_steps(benchmark, cost_family, CASE, costs.shape, steps, benchmark.capped(plan.rounds), **options)
    for name, other in ((POT, OURS), (GEOMLOSS, FROM_POINTS)):
        if name in seconds:
            what = f"{plan.problems:,} problems of 64 x 64: faster than {name}"
            benchmark.faster_target(what, seconds, name, other, OVER_LIBRARIES)


def first_of(problem: Problem) -> Problem:
    return Problem(*(x[:CHECKED] for x in (problem.student, *problem.others)))


def summed(problem: Problem, value):
    return lambda: value(problem.student, *problem.others).sum().backward()
