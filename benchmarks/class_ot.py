"""Optimal transport between classes (WKD-L): loss and gradient, beside the loop with a kernel matrix a row."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from data import synthetic_logits
from timing import interleaved, ratio

import kdkernels

CASE, ERRORS = "transport between classes", "transport between classes: errors against fp64"
OURS, EAGER, PRODUCTS = "kdkernels", "eager, a kernel matrix a row", "the matrix products alone"
SHAPE, QUICK = (64, 1000), (16, 300)  # images and classes
ITERATIONS, EPSILON, TEMPERATURE = 10, 0.05, 2.0
CHECKED_ROWS = 4
OVER_EAGER = 10  # target on a CPU: at least so many times faster
ALLOWED = 2e-5  # of the gradient, beside its largest element, after so many products in fp32


class Batch:
    """Logits of images, their labels, and costs between classes that are points on a sphere: 1 - exp(-2 distance)."""

    def __init__(self, rows: int, classes: int, device: str = "cpu"):
        self.student, self.teacher = synthetic_logits(rows, classes, torch.float32, device)
        generator = torch.Generator(device).manual_seed(1)
        places = torch.nn.functional.normalize(torch.randn(classes, 8, generator=generator, device=device), dim=-1)
        self.cost = 1 - torch.exp(-2 * torch.cdist(places, places))
        self.labels = torch.randint(0, classes, (rows,), generator=generator, device=device)
        self.leaf = self.student.requires_grad_()

    def inputs(self):
        return self.leaf, self.teacher, self.cost, self.labels

    def step(self, loss: Callable) -> Callable[[], None]:
        return lambda: loss(*self.inputs()).backward()

    def drop_gradient(self) -> None:
        self.leaf.grad = None

    def products(self) -> Callable[[], None]:
        """As many as a loss and its unrolled gradient take: two for each half step."""
        factor, out = torch.rand_like(self.teacher), torch.empty_like(self.teacher)

        def multiply():
            for _ in range(2 * ITERATIONS):
                torch.mm(factor, self.cost, out=out)
                torch.mm(factor, self.cost.t(), out=out)

        return multiply


def ours(student, teacher, cost, labels, gradient: str = "unrolled") -> torch.Tensor:
    return kdkernels.fused_class_ot(
        student, teacher, cost, temperature=TEMPERATURE, epsilon=EPSILON, iterations=ITERATIONS, gradient=gradient,
        exclude_labels=labels,
    )  # fmt: skip


def eager(student, teacher, cost, labels, guard: float = 1e-8) -> torch.Tensor:
    """What the method's users run: each row has its own costs, without the row and column of its label."""
    rows, classes = student.shape
    others = torch.arange(classes, device=cost.device).expand(rows, classes)
    others = others[others != labels[:, None]].view(rows, classes - 1)
    a, b = (torch.softmax(x.gather(-1, others) / TEMPERATURE, -1) for x in (student, teacher))
    costs = cost[others[:, :, None], others[:, None, :]]
    kernel = torch.exp(-costs / EPSILON)
    u = torch.full_like(a, 1 / (classes - 1))
    for _ in range(ITERATIONS):
        v = b / (torch.bmm(kernel.mT, u[:, :, None])[..., 0] + guard)
        u = a / (torch.bmm(kernel, v[:, :, None])[..., 0] + guard)
    return (u[:, :, None] * kernel * v[:, None, :] * costs).sum((-2, -1)).mean()


LOSSES = {
    OURS: ours,
    "kdkernels, implicit": partial(ours, gradient="implicit"),
    "kdkernels, envelope": partial(ours, gradient="envelope"),
    EAGER: eager,
}


def measure(benchmark, batch: Batch, rounds: int) -> None:
    """Answers, then times."""
    check(benchmark, batch)
    steps = {name: batch.step(loss) for name, loss in LOSSES.items()} | {PRODUCTS: batch.products()}
    advance = benchmark.screen.task(f"{CASE}: {len(batch.labels)} rows", total=rounds)
    seconds = interleaved(steps, rounds, benchmark.device, before=batch.drop_gradient, after_round=advance)
    for name in steps:
        add(
            benchmark, CASE, name, *batch.teacher.shape,
            median_ms=1e3 * statistics.median(seconds[name]),
            ratio_to_kdkernels=ratio(seconds[name], seconds[OURS]),
            over_products=ratio(seconds[name], seconds[PRODUCTS]),
        )  # fmt: skip
    faster = ratio(seconds[EAGER], seconds[OURS])
    benchmark.cpu_target(f"{CASE}: faster than eager", faster, OVER_EAGER, at_least=True)


def check(benchmark, batch: Batch) -> None:
    """Errors of loss and gradient against the eager loop in fp64 without its guard."""
    some = [x[:CHECKED_ROWS].detach() for x in (batch.student, batch.teacher)]
    cost, labels = batch.cost, batch.labels[:CHECKED_ROWS]
    want = loss_and_gradient(partial(eager, guard=0), *(x.double() for x in (*some, cost)), labels)
    for name in (OURS, EAGER):
        found = loss_and_gradient(LOSSES[name], *some, cost, labels)
        errors = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, want, strict=True)]
        add(
            benchmark, ERRORS, name, CHECKED_ROWS, cost.shape[0], loss_error=errors[0], gradient_error=errors[1]
        )  # fmt: skip
        if name == OURS and not max(errors) < ALLOWED:
            benchmark.results.failures.append(f"{name}, {CASE}: errors {errors}, allowed {ALLOWED}")


def loss_and_gradient(loss: Callable, student, *others) -> list[torch.Tensor]:
    leaf = student.requires_grad_()
    value = loss(leaf, *others)
    return [value.detach().double(), torch.autograd.grad(value, leaf)[0].double()]


def add(benchmark, case: str, name: str, rows: int, classes: int, **columns) -> None:
    benchmark.results.add(case, name, divergence="class_ot", dtype="float32", N=rows, V=classes, **columns)


def measure_memory(benchmark, rows: int, classes: int, peak_bytes: Callable[[str], int]) -> None:
    peaks = {name: peak_bytes(name) for name in (OURS, EAGER)}
    for name, peak in peaks.items():
        against = peak / peaks[OURS] if peaks[OURS] else None
        add(
            benchmark, f"{CASE}: memory", name, rows, classes, ratio_to_kdkernels=against, peak_extra_MiB=peak / 2**20
        )  # fmt: skip
