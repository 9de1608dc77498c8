"""Sinkhorn's iterations and SinKD in plain PyTorch.

Everything is in the log domain, in any float dtype. Autograd differentiates "unrolled". The formulas of
families/sinkhorn.py give the "implicit" and "envelope" gradients of a value computed without a graph.
"""

import torch
from torch import Tensor

from ...families.options import bad_values_raise, is_transformed
from ...families.sinkhorn import (
    Sinkhorn,
    SinkhornKD,
    Solution,
    check_problems,
    costs_times_plan,
    plan_gradient,
    plan_of,
)
from .derivative import GivenDerivative
from .pairwise import pairwise_costs


def potentials(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, tolerance: Tensor, iterations: int):
    """f [..., n] and g [..., m] after `iterations` rounds, rows first, from g = 0; the error, and the rounds done.

    A problem stops before a round if its error is at most the tolerance; a tolerance of 0 means none.
    """
    scores = -cost / epsilon
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    running = torch.ones(cost.shape[:-2], dtype=torch.bool, device=cost.device)
    done = torch.zeros(cost.shape[:-2], dtype=torch.int32, device=cost.device)
    mass = a.sum(-1)
    for step in range(iterations + 1):
        next_f = half_step(scores, a, b, g, epsilon)
        row_sums = a * torch.where(a == 0, 0, (f - next_f) / epsilon).exp()
        error = torch.where(mass == 0, 0, (row_sums - a).abs().sum(-1) / mass).detach()
        if step == iterations:
            break
        if step > 0:
            running = running & ~((tolerance > 0) & (error <= tolerance))
        if not (is_transformed() or running.any()):
            break
        f = torch.where(running[..., None], next_f, f)
        g = torch.where(running[..., None], half_step(scores.transpose(-1, -2), b, a, f, epsilon), g)
        done = done + running.to(torch.int32)
    return f, g, error, done


def half_step(scores: Tensor, own_mass: Tensor, mass: Tensor, potential: Tensor, epsilon: Tensor) -> Tensor:
    """-epsilon log sum_j mass_j exp(potential_j / epsilon + scores_ij).

    A point without any partner that has mass cannot send its mass: it gets NaN, or 0 if it has no mass itself.
    """
    x = scores + (potential / epsilon)[..., None, :]
    weight = mass[..., None, :].expand_as(x)
    shift = torch.where(weight == 0, -torch.inf, x + weight.log()).amax(-1, keepdim=True).detach()
    nothing = torch.isneginf(shift[..., 0])
    shift = torch.where(torch.isneginf(shift), 0, shift)
    x = torch.where(torch.isneginf(x), -torch.inf, x - shift)
    # A point without mass adds 0 to the sum; its term matters only for its derivative.
    terms = weight * torch.where(weight == 0, x.clamp_max(80), x).exp()
    total = torch.where(nothing, 1, terms.sum(-1))
    updated = -epsilon * (total.log() + shift[..., 0])
    return torch.where(nothing, torch.where(own_mass == 0, 0, torch.nan), updated)


def sinkhorn(problem: Sinkhorn) -> Solution:
    """The solution: autograd differentiates the value, and the rest is detached."""
    if bad_values_raise(problem.cost.device):
        check_problems(*(x.detach() for x in problem[:3]))
    return solve(problem)


def solve(problem: Sinkhorn) -> Solution:
    """`sinkhorn` without the check of values."""
    cost, a, b, epsilon, tolerance, iterations, entropic, gradient, _ = problem
    with torch.set_grad_enabled(torch.is_grad_enabled() and gradient == "unrolled"):
        f, g, error, done = potentials(cost, a, b, epsilon, tolerance, iterations)
        value = entropic_value(a, b, f, g, epsilon) if entropic else transport_value(cost, a, b, f, g, epsilon)
    if gradient in ("envelope", "implicit"):
        with torch.no_grad():
            derivatives = plan_gradient(problem, f, g, gradient == "implicit" and not entropic)
        for derivative, x in zip(derivatives, (cost, a, b), strict=True):
            value = value + GivenDerivative.apply(x, derivative)
    return Solution(value, f.detach(), g.detach(), error, done)


def transport_value(cost, a, b, f, g, epsilon):
    return costs_times_plan(cost, plan_of(cost, a, b, f, g, epsilon)).sum((-1, -2))


def entropic_value(a, b, f, g, epsilon):
    """<a, f> + <b, g> - epsilon (sum P - sum a sum b): the dual; after a round sum P is sum b."""
    mass_a, mass_b = a.sum(-1), b.sum(-1)
    return (a * f).sum(-1) + (b * g).sum(-1) - epsilon * (mass_b - mass_a * mass_b)


def sinkhorn_kd(problem: SinkhornKD) -> tuple[Tensor]:
    """Losses [clouds]."""
    student, teacher, row_mass, temperature, cost, vocab_size = problem.clouds
    there = (row_mass != 0)[..., None]
    p, q = (
        torch.softmax(torch.where(there, x[..., :vocab_size].to(row_mass.dtype), 0) / temperature, -1)
        for x in (student, teacher)
    )
    if not row_mass.shape[1]:
        return (p.sum((1, 2)),)  # 0
    pairs = torch.where(there & there.transpose(1, 2), pairwise_costs(p, q, cost), 0)
    no_tolerance = torch.zeros_like(problem.epsilon)
    transport = Sinkhorn(
        pairs, row_mass, row_mass, problem.epsilon, no_tolerance, problem.iterations, False, *problem[3:]
    )
    return (solve(transport).value,)
