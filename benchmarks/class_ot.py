"""Optimal transport between classes (WKD-L): loss and gradient, compared with a loop over a kernel matrix per row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from data import synthetic_logits
from family import OURS, Family, Problem, Shape, check, errors_by, largest_error, limit_by_dtype, time_losses, weigh

import kdkernels

CASE, ERRORS = "transport between classes", "transport between classes: errors against fp64"
EAGER, PRODUCTS = "eager, a kernel matrix a row", "the matrix products alone"
ITERATIONS, EPSILON, TEMPERATURE = 10, 0.05, 2.0
CHECKED_ROWS = 4
OVER_EAGER = 10  # target on a CPU: at least this many times faster
ALLOWED = 2e-5  # of the gradient's largest element: the error of 40 matrix products in fp32


@dataclass(frozen=True)
class Plan:
    images: int
    classes: int
    rounds: int


# Three rounds on a CPU: each takes seconds, because of eager PyTorch.
PLANS = {
    "cpu": Plan(64, 1000, 3),
    "cpu quick": Plan(16, 300, 3),
    "cuda": Plan(64, 1000, 10),
    "cuda quick": Plan(16, 300, 10),
}


def problem(shape: Shape, device: str = "cpu") -> Problem:
    """Logits of images, costs between classes, labels. Classes are points on a sphere; cost = 1 - exp(-2 distance)."""
    rows, classes = shape.rows, shape.classes
    student, teacher = synthetic_logits(rows, classes, shape.torch_dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    places = torch.nn.functional.normalize(torch.randn(classes, 8, generator=generator, device=device), dim=-1)
    cost = 1 - torch.exp(-2 * torch.cdist(places, places))
    return Problem(student, teacher, cost, torch.randint(0, classes, (rows,), generator=generator, device=device))


def products(problem: Problem) -> Callable[[], None]:
    """The matrix products of a loss with its unrolled gradient: two in each half step."""
    teacher, cost, _ = problem.others
    factor, out = torch.rand_like(teacher), torch.empty_like(teacher)

    def multiply():
        for _ in range(2 * ITERATIONS):
            torch.mm(factor, cost, out=out)
            torch.mm(factor, cost.t(), out=out)

    return multiply


def ours(student, teacher, cost, labels, gradient: str = "unrolled") -> torch.Tensor:
    return kdkernels.fused_class_ot(
        student, teacher, cost, temperature=TEMPERATURE, epsilon=EPSILON, iterations=ITERATIONS, gradient=gradient,
        exclude_labels=labels,
    )  # fmt: skip


def eager_loss(student, teacher, cost, labels, guard: float = 1e-8) -> torch.Tensor:
    """The method's usual code: each row has its own costs, without the row and column of its label."""
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
    EAGER: eager_loss,
}
# The truth is eager PyTorch's loop in fp64 without the guard in its denominators.
FAMILY = Family(
    "class_ot", LOSSES, partial(eager_loss, guard=0), errors_by(largest_error, "loss_error", "gradient_error"),
    limit_by_dtype(float32=ALLOWED), "class_ot", checked=(OURS, EAGER), problem=problem,
)  # fmt: skip


def measure(benchmark, plan: Plan) -> None:
    shape = Shape(plan.images, plan.classes)
    images = problem(shape, benchmark.device)
    teacher, cost, labels = images.others
    few = Problem(images.student[:CHECKED_ROWS], teacher[:CHECKED_ROWS], cost, labels[:CHECKED_ROWS])
    check(benchmark, FAMILY, few, ERRORS)
    steps = {PRODUCTS: products(images)}
    rounds = benchmark.capped(plan.rounds)
    seconds = time_losses(benchmark, FAMILY, CASE, images, rounds, {"over_products": PRODUCTS}, **steps)
    benchmark.faster_target(f"{CASE}: faster than eager", seconds, EAGER, OURS, OVER_EAGER)
    weigh(benchmark, FAMILY, f"{CASE}: memory", [(name, shape) for name in FAMILY.checked])
