"""Optimal transport: SinKD beside the loop that everyone writes, batches of problems beside POT and GeomLoss."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from contenders import eager, installed
from data import synthetic_logits
from timing import interleaved, ratio

import kdkernels

SINKD, OVER_V, OVER_B = "SinKD", "SinKD over the vocabulary", "SinKD over the rows"
PROBLEMS, PROBLEM_ERRORS = "Sinkhorn, 64 x 64, 50 rounds", "Sinkhorn: errors against fp64"
OURS, EAGER, POT, GEOMLOSS = "kdkernels", "eager loop", "POT ot.batch", "GeomLoss"
LIBRARIES = {POT: "ot", GEOMLOSS: "geomloss"}  # and their modules
EPSILON = 0.1
# Targets on a CPU: at least so many times faster than the eager loop, than POT and than GeomLoss.
OVER_EAGER, OVER_LIBRARIES = 6, 8


def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return kdkernels.fused_sinkhorn_kd(student, teacher)


LOSSES = {OURS: ours, EAGER: eager.sinkhorn_loss}


def add(benchmark, case: str, name: str, rows: int, columns: int, **values) -> None:
    benchmark.results.add(case, name, dtype="float32", N=rows, V=columns, **values)


# ---- SinKD


def measure_sinkd(benchmark, shapes, rounds: int) -> None:
    """Answers, then loss and gradient of one cloud of each shape [B, V]."""
    for rows, vocabulary in shapes:
        student, teacher = synthetic_logits(rows, vocabulary, torch.float32, benchmark.device)
        check_sinkd(benchmark, student, teacher)
        seconds = time_sinkd(benchmark, SINKD, LOSSES, student, teacher, rounds)
        what = f"SinKD, B = {rows}, V = {vocabulary:,}: faster than the eager loop"
        benchmark.cpu_target(what, ratio(seconds[EAGER], seconds[OURS]), OVER_EAGER, at_least=True)


def sweep_sinkd(benchmark, case: str, shapes, rounds: int) -> None:
    for rows, vocabulary in shapes:
        student, teacher = synthetic_logits(rows, vocabulary, torch.float32, benchmark.device)
        time_sinkd(benchmark, case, LOSSES, student, teacher, rounds)


def time_sinkd(benchmark, case, losses, student, teacher, rounds) -> dict[str, list[float]]:
    leaf = student.detach().requires_grad_()

    def drop_gradient():
        leaf.grad = None

    steps = {name: (lambda loss=loss: loss(leaf, teacher).backward()) for name, loss in losses.items()}
    advance = benchmark.screen.task(f"{case}: {list(student.shape)}", total=rounds)
    seconds = interleaved(steps, rounds, benchmark.device, before=drop_gradient, after_round=advance)
    for name in steps:
        over = {"ratio_to_kdkernels": ratio(seconds[name], seconds[OURS])}
        add(benchmark, case, name, *student.shape, median_ms=1e3 * statistics.median(seconds[name]), **over)
    return seconds


def check_sinkd(benchmark, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Errors of loss and gradient, relative to the largest element, on a part of the columns. Where p and q of a class
    agree to fp32, rounding decides the sign of p - q, and the gradient is off by as much as that class has: the answer
    is judged by the median of the rows' largest errors."""
    student, teacher = student[:, :4096], teacher[:, :4096]
    want = loss_and_gradient(partial(kdkernels.fused_sinkhorn_kd, backend="reference"), student.double(), teacher)
    for name, loss in LOSSES.items():
        found = loss_and_gradient(loss, student, teacher)
        errors = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, want, strict=True)]
        add(benchmark, f"{SINKD}: errors against fp64", name, *student.shape,
            loss_error=errors[0], gradient_error=errors[1])  # fmt: skip
        of_rows = (found[1] - want[1]).abs().amax(1) / want[1].abs().max()
        if name == OURS and not max(errors[0], of_rows.median().item()) < 1e-5:
            benchmark.results.failures.append(f"{name}, {SINKD}: errors {errors[0]} and, of rows, {of_rows.median()}")


def loss_and_gradient(loss: Callable, student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    return [value.detach().double(), torch.autograd.grad(value, leaf)[0].double()]


def memory_step(name: str, rows: int, vocabulary: int, device: str = "cpu"):
    """A step of one contender and what drops its gradient, for its peak: on a CPU, that of a process of its own."""
    student, teacher = synthetic_logits(rows, vocabulary, torch.float32, device)
    leaf = student.requires_grad_()

    def drop_gradient():
        leaf.grad = None

    return lambda: LOSSES[name](leaf, teacher).backward(), drop_gradient


def measure_memory(benchmark, rows: int, vocabulary: int, peak_bytes: Callable[[str], int]) -> None:
    peaks = {name: peak_bytes(name) for name in LOSSES}
    for name, peak in peaks.items():
        over = {"ratio_to_kdkernels": peak / peaks[OURS] if peaks[OURS] else None}
        add(benchmark, f"{SINKD}: memory", name, rows, vocabulary, peak_extra_MiB=peak / 2**20, **over)


# ---- batches of problems


def problems(count: int, size: int, device: str):
    """Points of a plane, between which half the squared distance is the cost, and masses."""
    generator = torch.Generator(device).manual_seed(0)
    x, y = (torch.rand(count, size, 2, generator=generator, device=device) for _ in range(2))
    a, b = (torch.rand(count, size, generator=generator, device=device) + 0.1 for _ in range(2))
    return x, y, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


def half_squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((x[:, :, None] - y[:, None]) ** 2).sum(-1)


def pot_value(cost, a, b):
    """<P, C> with POT's envelope gradient; its own check of convergence off, so that it does as many rounds."""
    import ot

    return ot.batch.solve_batch(cost, EPSILON, a, b, max_iter=50, tol=0.0, grad="envelope").value_linear


def geomloss_value(x, y, a, b):
    """Its schedule of epsilons so fine that it ends within 1e-5 of the value; the default's ends within 1e-2."""
    import geomloss

    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=EPSILON**0.5, scaling=0.98, debias=False, backend="tensorized")
    return loss(a, x, b, y)


def our_value(cost, a, b, gradient="envelope", value="transport"):
    return kdkernels.fused_sinkhorn(cost, a, b, epsilon=EPSILON, iterations=50, gradient=gradient, value=value).value


def measure_problems(benchmark, count: int, rounds: int) -> None:
    x, y, a, b = problems(count, 64, benchmark.device)
    cost = half_squares(x, y).requires_grad_()
    points = x.clone().requires_grad_()
    steps = {
        OURS: lambda: our_value(cost, a, b),
        f"{OURS}, implicit": lambda: our_value(cost, a, b, "implicit"),
        f"{OURS}, unrolled": lambda: our_value(cost, a, b, "unrolled"),
    }
    skipped = {name: f"{module} is not installed" for name, module in LIBRARIES.items() if not installed(module)}
    benchmark.leave_out(skipped)
    if POT not in skipped:
        steps[POT] = lambda: pot_value(cost, a, b)
    if GEOMLOSS not in skipped:
        steps[f"{OURS}, from points"] = lambda: our_value(half_squares(points, y), a, b, value="entropic")
        steps[GEOMLOSS] = lambda: geomloss_value(points, y, a, b)
    check_problems(benchmark, cost.detach()[:32], (x[:32], y[:32], a[:32], b[:32]), steps)

    def drop_gradients():
        cost.grad = points.grad = None

    def step(value):
        return lambda: value().sum().backward()

    timed = {name: step(value) for name, value in steps.items()}
    advance = benchmark.screen.task(f"{PROBLEMS}: {count}", total=rounds)
    seconds = interleaved(timed, rounds, benchmark.device, before=drop_gradients, after_round=advance)
    for name in steps:
        over = {"ratio_to_kdkernels": ratio(seconds[name], seconds[OURS])}
        add(benchmark, PROBLEMS, name, count, 64, median_ms=1e3 * statistics.median(seconds[name]), **over)
    for name, other in ((POT, OURS), (GEOMLOSS, f"{OURS}, from points")):
        if name in seconds:
            what = f"{count:,} problems of 64 x 64: faster than {name}"
            benchmark.cpu_target(what, ratio(seconds[name], seconds[other]), OVER_LIBRARIES, at_least=True)


def check_problems(benchmark, cost, inputs, steps) -> None:
    """Values of 50 rounds against fp64; of GeomLoss against the converged value, which 50 rounds reach here."""
    x, y, a, b = inputs
    exact = kdkernels.fused_sinkhorn(
        cost.double(), a.double(), b.double(), epsilon=EPSILON, iterations=50, value="transport", backend="reference"
    ).value
    entropic = kdkernels.fused_sinkhorn(
        cost.double(), a.double(), b.double(), epsilon=EPSILON, iterations=50, value="entropic", backend="reference"
    ).value
    values = {OURS: (our_value(cost, a, b), exact)}
    if POT in steps:
        values[POT] = pot_value(cost, a, b), exact
    if GEOMLOSS in steps:
        values[f"{OURS}, from points"] = our_value(cost, a, b, value="entropic"), entropic
        values[GEOMLOSS] = geomloss_value(x, y, a, b), entropic
    for name, (value, want) in values.items():
        error = ((value.double() - want).abs() / want).max().item()
        add(benchmark, PROBLEM_ERRORS, name, len(cost), 64, loss_error=error)
        if name.startswith(OURS) and not error < 1e-5:
            benchmark.results.failures.append(f"{name}, {PROBLEMS}: error {error}, allowed 1e-5")
