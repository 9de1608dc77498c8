"""Sinkhorn and SinKD: closed forms, symmetries, bounds, other libraries, derivatives and argument errors.

These tests compare the reference and the CPU kernels with the mathematics. The CUDA and Triton kernels have test files
of their own.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import opcheck

import kdkernels
from kdkernels import fused_sinkhorn, fused_sinkhorn_divergence, fused_sinkhorn_kd, ops
from kdkernels.backends import native
from kdkernels.backends.reference.pairwise import pairwise_costs
from kdkernels.families import sinkhorn as transport

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(native._native is None, reason="no module"))]
GRADIENTS = transport.GRADIENTS
COSTS = transport.COSTS
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def problems(count=2, n=5, m=7, *, seed=0, dtype=torch.float64, uniform=False):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(count, n, m, generator=generator, dtype=torch.float64)
    a, b = (torch.rand(count, size, generator=generator, dtype=torch.float64) + 0.1 for size in (n, m))
    if uniform:
        a, b = torch.ones_like(a), torch.ones_like(b)
    return cost.to(dtype), (a / a.sum(-1, keepdim=True)).to(dtype), (b / b.sum(-1, keepdim=True)).to(dtype)


def clouds(*leading, rows=6, vocab=40, scale=3.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, noise = (
        scale * torch.randn(*leading, rows, vocab, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.to(dtype), (student + noise).to(dtype)


def converged(cost, a=None, b=None, *, epsilon, **options):
    out = fused_sinkhorn(cost, a, b, epsilon=epsilon, iterations=5000, tolerance=1e-11, **options)
    assert out.converged.all(), out.error
    return out


# ---- plans and values


@both_backends
@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.02, 0.002])  # the scaling form and the log-sum-exp form
def test_marginals_and_formula(backend, epsilon):
    cost, a, b = problems()
    out = fused_sinkhorn(cost, a, b, epsilon=epsilon, iterations=30, plan=True, backend=backend)
    torch.testing.assert_close(out.plan.sum(1), b, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close((out.plan.sum(2) - a).abs().sum(-1), out.error, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close((out.plan * cost).sum((1, 2)), out.value, rtol=1e-12, atol=0)
    assert (out.iterations == 30).all() and out.converged is None
    exponent = (out.f[:, :, None] + out.g[:, None, :] - cost) / epsilon
    torch.testing.assert_close(out.plan, a[:, :, None] * b[:, None] * exponent.exp())


@both_backends
def test_literal_loop(backend):
    """The plan must match the common loop of row and column divisions, up to fp64 rounding."""
    cost, _, _ = problems(3, 6, 6)
    ones = torch.ones(3, 6, dtype=torch.float64)
    plan = torch.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    out = fused_sinkhorn(cost, ones, ones, epsilon=0.1, iterations=20, plan=True, backend=backend)
    torch.testing.assert_close(out.plan, plan, rtol=1e-12, atol=1e-15)


@both_backends
@pytest.mark.parametrize("value", ["transport", "entropic"])
def test_scaling_shift_and_swap(backend, value):
    cost, a, b = problems()
    options = {"value": value, "backend": backend}
    want = converged(cost, a, b, epsilon=0.05, **options).value
    scaled = converged(7 * cost, a, b, epsilon=0.35, **options).value
    torch.testing.assert_close(scaled, 7 * want)
    torch.testing.assert_close(converged(cost + 3, a, b, epsilon=0.05, **options).value, want + 3)
    torch.testing.assert_close(converged(cost.transpose(1, 2), b, a, epsilon=0.05, **options).value, want)
    # The transport value is linear in the masses, and so is the product a (x) b in each factor.
    if value == "transport":
        torch.testing.assert_close(converged(cost, 5 * a, 5 * b, epsilon=0.05, **options).value, 5 * want)


@both_backends
def test_dual_is_never_above_primal(backend):
    cost, a, b = problems(4)
    for rounds in (1, 2, 5, 1000):
        out = fused_sinkhorn(cost, a, b, epsilon=0.05, iterations=rounds, value="entropic", plan=True, backend=backend)
        relative = torch.where(out.plan > 0, out.plan / (a[:, :, None] * b[:, None]), 1)
        divergence = (out.plan * relative.log()).sum((1, 2))
        best = converged(cost, a, b, epsilon=0.05, value="entropic", backend=backend).value
        assert (out.value <= best + 1e-12).all()
        if rounds == 1000:
            torch.testing.assert_close(out.value, (out.plan * cost).sum((1, 2)) + 0.05 * divergence)


@both_backends
def test_linear_program_is_the_limit(backend):
    optimize = pytest.importorskip("scipy.optimize")
    cost, _, _ = problems(1, 7, 7)
    rows, columns = optimize.linear_sum_assignment(cost[0].numpy())
    best = cost[0, rows, columns].mean()
    values = [converged(cost, epsilon=epsilon, backend=backend).value.item() for epsilon in (0.3, 0.1, 0.05, 0.03)]
    assert all(x >= best - 1e-12 for x in values) and values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(best.item(), rel=0.1)


@both_backends
def test_two_classes_have_a_closed_form(backend):
    """For V = 2 the L1 cost is twice a distance on a line: sorted rows are matched as epsilon goes to 0."""
    student, teacher = clouds(rows=32, vocab=2, scale=1.0)
    p, q = (torch.softmax(x / 2, -1)[:, 0].sort().values for x in (student, teacher))
    exact = 2 * (p - q).abs().sum()
    loss = fused_sinkhorn_kd(student, teacher, epsilon=0.005, iterations=5000, backend=backend)
    assert exact < loss < 1.05 * exact
    assert fused_sinkhorn_kd(student, teacher, epsilon=0.05, iterations=5000, backend=backend) > loss


@both_backends
@pytest.mark.parametrize("kind", ["entropy", "kl"])
def test_pot_finds_the_same(backend, kind):
    ot = pytest.importorskip("ot")
    cost, a, b = problems(1, 8, 5)
    cost, a, b = cost[0], a[0], b[0]
    ours = converged(cost, a, b, epsilon=0.05, plan=True, value="entropic", backend=backend)
    theirs = ot.solve(cost.numpy(), a.numpy(), b.numpy(), reg=0.05, reg_type=kind, max_iter=20_000, tol=1e-13)
    assert ours.plan.tolist() == [pytest.approx(row, abs=1e-9) for row in theirs.plan.tolist()]
    assert (ours.plan * cost).sum().item() == pytest.approx(theirs.value_linear, rel=1e-8)
    if kind == "kl":
        assert ours.value.item() == pytest.approx(theirs.value, rel=1e-6)


@both_backends
@pytest.mark.parametrize("debias", [False, True])
def test_geomloss_finds_the_same(backend, debias):
    geomloss = pytest.importorskip("geomloss")
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, size, 3, generator=generator, dtype=torch.float64) for size in (9, 6))
    # The schedule is fine enough that geomloss converges.
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.2, scaling=0.995, debias=debias, backend="tensorized")(x, y)

    def half_squares(x, y):
        return 0.5 * ((x[:, :, None] - y[:, None]) ** 2).sum(-1)

    costs = half_squares(x, y), half_squares(x, x), half_squares(y, y)
    options = {"epsilon": 0.2**2, "iterations": 10_000, "tolerance": 1e-12, "backend": backend}
    if debias:
        ours = fused_sinkhorn_divergence(*costs, **options)
    else:
        ours = fused_sinkhorn(costs[0], value="entropic", **options).value
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@both_backends
def test_divergence_of_equal_clouds_is_zero(backend):
    x = torch.rand(3, 6, 2, dtype=torch.float64)
    moving = x.clone().requires_grad_()

    def l1(x, y):
        return (x[:, :, None] - y[:, None]).abs().sum(-1)

    options = {"epsilon": 0.3, "iterations": 3000, "tolerance": 1e-12, "backend": backend}
    same = fused_sinkhorn_divergence(l1(moving, x), l1(moving, moving), l1(x, x), **options)
    assert torch.equal(same, torch.zeros_like(same))
    (gradient,) = torch.autograd.grad(same.sum(), moving)
    assert gradient.abs().max() < 1e-11
    y = torch.rand(3, 4, 2, dtype=torch.float64)
    assert (fused_sinkhorn_divergence(l1(x, y), l1(x, x), l1(y, y), **options) > 1e-3).all()


def test_divergence_that_has_not_converged_is_nan():
    """Without convergence the divergence may be negative; it must be NaN if a tolerance is given."""
    x, y = torch.rand(1, 9, 2, dtype=torch.float64), torch.rand(1, 9, 2, dtype=torch.float64)
    costs = [torch.cdist(u, v) for u, v in ((x, y), (x, x), (y, y))]
    assert torch.isnan(fused_sinkhorn_divergence(*costs, epsilon=0.01, iterations=3, tolerance=1e-12)).all()
    assert torch.isfinite(fused_sinkhorn_divergence(*costs, epsilon=0.01, iterations=3)).all()


@both_backends
def test_tolerance_is_reported(backend):
    cost, a, b = problems(6, 8, 8)
    out = fused_sinkhorn(cost, a, b, epsilon=0.05, iterations=40, tolerance=1e-4, backend=backend)
    assert torch.equal(out.converged, out.error <= 1e-4)
    stopped = out.iterations < 40
    assert stopped.any() and out.converged[stopped].all()
    for problem in range(6):  # each problem matches a separate call with the same number of rounds
        rounds = out.iterations[problem].item()
        alone = fused_sinkhorn(cost[problem], a[problem], b[problem], epsilon=0.05, iterations=rounds, backend=backend)
        torch.testing.assert_close(alone.value, out.value[problem])
        if rounds > 1:
            before = fused_sinkhorn(
                cost[problem], a[problem], b[problem], epsilon=0.05, iterations=rounds - 1, backend=backend
            )
            assert before.error > 1e-4
    hurried = fused_sinkhorn(cost, a, b, epsilon=0.01, iterations=2, tolerance=1e-9, backend=backend)
    assert not hurried.converged.any() and (hurried.error > 1e-9).all()


# ---- points without mass, forbidden pairs, small epsilon


@both_backends
@pytest.mark.parametrize("epsilon", [0.1, 0.003])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_mass_is_no_point(backend, epsilon, gradient):
    cost, a, b = problems(2, 6, 5)
    a[:, 2], b[:, 0] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    rows, columns = [0, 1, 3, 4, 5], [1, 2, 3, 4]
    leaves = [x.clone().requires_grad_() for x in (cost, a, b)]
    options = {"epsilon": epsilon, "iterations": 40, "gradient": gradient, "backend": backend}
    whole = fused_sinkhorn(*leaves, **options)
    gradients = torch.autograd.grad(whole.value.sum(), leaves)
    fewer = [x.clone().requires_grad_() for x in (cost[:, rows][:, :, columns], a[:, rows], b[:, columns])]
    want = fused_sinkhorn(*fewer, **options)
    torch.testing.assert_close(whole.value, want.value)
    expected = torch.autograd.grad(want.value.sum(), fewer)
    found = [gradients[0][:, rows][:, :, columns], gradients[1][:, rows], gradients[2][:, columns]]
    if gradient == "implicit" and epsilon < 0.01:  # nearly separate blocks: each has its own constant
        found, expected = found[:1], expected[:1]
    for got, its in zip(found, expected, strict=True):
        torch.testing.assert_close(got, its, rtol=1e-5, atol=1e-7)
    assert all(torch.isfinite(x).all() for x in gradients)
    assert not gradients[0][:, 2].any() and not gradients[0][:, :, 0].any()


@both_backends
def test_gradient_of_no_mass_is_that_of_a_little(backend):
    cost, a, b = problems(1, 4, 4)
    a[:, 1] = 0
    a = a / a.sum(-1, keepdim=True)

    def of_a(a):
        a = a.clone().requires_grad_()
        out = fused_sinkhorn(cost, a, b, epsilon=0.2, iterations=7, gradient="unrolled", backend=backend)
        return torch.autograd.grad(out.value.sum(), a)[0]

    little = a + torch.tensor([0, 1e-9, 0, -1e-9], dtype=torch.float64)
    torch.testing.assert_close(of_a(a), of_a(little), rtol=1e-6, atol=1e-7)


@both_backends
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_forbidden_pairs(backend, gradient):
    cost, a, b = problems(1, 4, 4, uniform=True)
    cost[0, 0, 1:3] = torch.inf
    leaf = cost.clone().requires_grad_()
    options = {"iterations": 4000, "tolerance": 1e-12, "gradient": gradient, "plan": True, "backend": backend}
    out = fused_sinkhorn(leaf, a, b, epsilon=0.1, **options)
    (found,) = torch.autograd.grad(out.value.sum(), leaf)
    assert torch.isfinite(out.value).all() and torch.isfinite(found).all() and not found[0, 0, 1:3].any()
    assert not out.plan[0, 0, 1:3].any()
    torch.testing.assert_close(out.plan.sum(2), a)
    cost[0, 0] = torch.inf  # row 0 has mass and no allowed partner: no plan exists
    nowhere = fused_sinkhorn(cost, a, b, epsilon=0.1, iterations=5, backend=backend)
    assert torch.isnan(nowhere.value).all()
    a = torch.tensor([[0, 1, 1, 2]], dtype=torch.float64) / 4
    assert torch.isfinite(fused_sinkhorn(cost, a, b, epsilon=0.1, backend=backend).value).all()


@both_backends
def test_small_epsilon(backend):
    """exp(-C / epsilon) underflows in fp32 for epsilon <= 0.02; values and gradients must stay finite."""
    cost, a, b = problems(3, 20, 20, dtype=torch.float32)
    for epsilon in (0.05, 0.02, 0.01, 0.005):
        for gradient in GRADIENTS:
            leaf = (2 * cost).requires_grad_()
            out = fused_sinkhorn(
                leaf, a, b, epsilon=epsilon, iterations=200, gradient=gradient, plan=True, backend=backend
            )
            (found,) = torch.autograd.grad(out.value.sum(), leaf)
            assert torch.isfinite(out.value).all() and torch.isfinite(found).all()
            torch.testing.assert_close(out.plan.sum(1), b, rtol=2e-4, atol=1e-7)


# ---- derivatives


@both_backends
@pytest.mark.parametrize("value", ["transport", "entropic"])
@pytest.mark.parametrize("epsilon", [0.2, 0.004])
def test_unrolled_is_the_derivative_of_the_rounds(backend, value, epsilon):
    cost, a, b = problems(2, 3, 4)
    inputs = (cost * (0.1 if epsilon < 0.1 else 1), a.log(), b.log())

    def loss(cost, log_a, log_b):
        out = fused_sinkhorn(
            cost, log_a.softmax(-1), log_b.softmax(-1), epsilon=epsilon, iterations=4, value=value,
            gradient="unrolled", backend=backend,
        )  # fmt: skip
        return out.value

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs], eps=1e-7, rtol=1e-5, atol=1e-6)


@both_backends
@pytest.mark.parametrize(
    ("value", "gradient"), [("transport", "implicit"), ("entropic", "implicit"), ("entropic", "envelope")]
)
def test_derivative_at_convergence(backend, value, gradient):
    cost, a, b = problems(2, 3, 4)

    def loss(cost, log_a, log_b):
        out = fused_sinkhorn(
            cost, log_a.softmax(-1), log_b.softmax(-1), epsilon=0.2, iterations=2000, tolerance=1e-15, value=value,
            gradient=gradient, backend=backend,
        )  # fmt: skip
        return out.value

    inputs = [x.requires_grad_() for x in (cost, a.log(), b.log())]
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, rtol=1e-5, atol=1e-7)


@both_backends
@pytest.mark.parametrize("value", ["transport", "entropic"])
def test_many_rounds_unrolled_are_implicit(backend, value):
    cost, a, b = problems(2, 9, 6)
    found = {}
    for gradient in ("unrolled", "implicit"):
        leaves = [x.clone().requires_grad_() for x in (cost, a, b)]
        options = {"epsilon": 0.1, "iterations": 1500, "value": value, "gradient": gradient, "backend": backend}
        found[gradient] = torch.autograd.grad(fused_sinkhorn(*leaves, **options).value.sum(), leaves)
    for name, got, want in zip("Cab", found["unrolled"], found["implicit"], strict=True):
        if name != "C":  # defined up to a constant, because the sums of the masses stay equal
            got, want = got - got.mean(-1, keepdim=True), want - want.mean(-1, keepdim=True)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_envelope_holds_the_plan():
    cost, a, b = problems()
    leaf = cost.clone().requires_grad_()
    out = fused_sinkhorn(leaf, a, b, epsilon=0.1, iterations=9, gradient="envelope", plan=True)
    torch.testing.assert_close(torch.autograd.grad(out.value.sum(), leaf)[0], out.plan)
    unrolled = fused_sinkhorn(leaf, a, b, epsilon=0.1, iterations=9, gradient="unrolled")
    other = torch.autograd.grad(unrolled.value.sum(), leaf)[0]
    assert not torch.allclose(other, out.plan, rtol=0.05)  # the plan is not the unrolled gradient


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    epsilon=st.sampled_from([1.0, 0.1, 0.04, 0.03, 0.01, 0.005]),
    spread=st.sampled_from([0.0, 1.0, 2.0]),
    gradient=st.sampled_from(GRADIENTS),
    value=st.sampled_from(["transport", "entropic"]),
    rounds=st.integers(1, 25),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
@pytest.mark.skipif(native._native is None, reason="no module")
def test_cpu_matches_fp64(shape, epsilon, spread, gradient, value, rounds, dtype, seed):
    cost, a, b = problems(*shape, seed=seed)
    cost = (spread * cost).to(dtype)
    a, b = a.to(dtype), b.to(dtype)
    found = {}
    # The error of the reference in fp32 sets the scale of the allowed error.
    for name, backend, its in (
        ("cpu", "cpu", dtype),
        ("truth", "reference", torch.float64),
        ("eager", "reference", dtype),
    ):
        leaves = [x.to(its).clone().requires_grad_() for x in (cost, a, b)]
        out = fused_sinkhorn(
            *leaves, epsilon=epsilon, iterations=rounds, value=value, gradient=gradient, plan=True, backend=backend
        )
        derivatives = torch.autograd.grad(out.value.sum(), leaves) if gradient != "implicit" else ()
        # An implicit derivative is ill-conditioned if the rounds converge slowly; see
        # test_many_rounds_unrolled_are_implicit.
        potentials = out.f[:, :, None] + out.g[:, None]
        found[name] = [x.double() for x in (out.value, potentials, out.error, out.plan, *derivatives)]
    unit = torch.finfo(dtype).eps
    for number, (got, want, eager) in enumerate(zip(found["cpu"], found["truth"], found["eager"], strict=True)):
        # The error of an exponent is relative to cost / epsilon; the error of an adjoint is relative to the adjoint of
        # each round. Potentials and errors are of size 1, the other results of size epsilon.
        size = want.abs().max() + (1 if number in (1, 2) else epsilon)
        rounding = unit * (4 + rounds + 4 * spread / epsilon) * size
        allowed = 3 * (eager - want).abs().max() + 8 * rounding
        assert (got - want).abs().max() <= allowed, (gradient, value)


@both_backends
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("value", ["transport", "entropic"])
def test_a_common_offset_of_costs_loses_no_precision(backend, gradient, value):
    cost, a, b = problems(2, 6, 7)
    cost = (64 * cost).round() / 64  # multiples of 1/64 stay exact after the offset is added
    found = []
    for offset, dtype in ((0, torch.float64), (1024, torch.float32)):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (cost + offset, a, b)]
        options = {"epsilon": 0.05, "iterations": 500, "gradient": gradient, "value": value, "plan": True}
        out = fused_sinkhorn(*leaves, backend=backend, **options)
        assert (out.error < 1e-5).all()
        of_cost, of_a, of_b = torch.autograd.grad(out.value.sum(), leaves)
        centred = (of_a - of_a.mean(-1, keepdim=True), of_b - of_b.mean(-1, keepdim=True))
        found.append((out.value - offset, out.plan, of_cost, *centred))
    for name, got, want in zip(("value", "plan", "C", "a", "b"), found[1], found[0], strict=True):
        tolerance = 1e-3 if name == "value" else 2e-5  # the value carries the offset's rounding error
        assert (got - want).abs().max() <= tolerance * want.abs().max() + 1e-7, name


@both_backends
@pytest.mark.parametrize("epsilon", [0.2, 0.02])
def test_gradient_of_tiny_masses(backend, epsilon):
    cost, a, b = problems(1, 5, 6, seed=3)
    a[0, 2], b[0, 4] = 1e-30, 1e-20
    a, b = a / a.sum(), b / b.sum()
    found = []
    for dtype, its in ((torch.float64, "reference"), (torch.float32, backend)):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (cost, a, b)]
        out = fused_sinkhorn(*leaves, epsilon=epsilon, iterations=30, gradient="unrolled", backend=its)
        found.append([x - x.mean() for x in torch.autograd.grad(out.value.sum(), leaves)[1:]])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


def test_second_derivatives_are_of_rounds_alone():
    x = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    cost = (x[:, None] - x.detach()[None] - 0.1).square().sum(-1)
    for gradient in ("implicit", "envelope"):
        value = fused_sinkhorn(cost, epsilon=0.1, gradient=gradient, backend="reference").value
        with pytest.raises(RuntimeError, match="'unrolled' is twice differentiable"):
            torch.autograd.grad(value, x, create_graph=True)


# ---- SinKD


def literal_sinkd(student, teacher, temperature=2.0, epsilon=0.1, rounds=20):
    """The published loop, for one cloud."""
    p, q = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    cost = (p[:, None] - q[None]).abs().sum(-1)
    plan = torch.exp(-cost / epsilon)
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


@both_backends
def test_sinkd_is_the_papers(backend):
    student, teacher = clouds(3)
    leaf = student.clone().requires_grad_()
    loss = fused_sinkhorn_kd(leaf, teacher, reduction="none", backend=backend)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((loss * weight).sum(), leaf)
    other = student.clone().requires_grad_()
    want = torch.stack([literal_sinkd(s, t) for s, t in zip(other, teacher, strict=True)])
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad((want * weight).sum(), other)[0], rtol=1e-10, atol=1e-14)


@both_backends
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_sinkd_gradcheck(backend, cost, gradient):
    student, teacher = clouds(2, rows=3, vocab=5, scale=1.0)
    rounds, epsilon = (80, 0.5) if gradient == "implicit" else (3, 0.1)

    def loss(student):
        return fused_sinkhorn_kd(
            student, teacher, cost=cost, gradient=gradient, iterations=rounds, epsilon=epsilon, temperature=1.3,
            reduction="none", backend=backend,
        )  # fmt: skip

    if gradient != "envelope":
        assert torch.autograd.gradcheck(loss, student.requires_grad_(), eps=1e-7, rtol=1e-5, atol=1e-6)
        return
    # The envelope gradient is the derivative of <P, C> with a constant P.
    leaf = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    p, q = torch.softmax(leaf / 1.3, -1), torch.softmax(teacher / 1.3, -1)
    costs = pairwise_costs(p, q, cost)
    ones = torch.ones(2, 3, dtype=torch.float64)
    plan = fused_sinkhorn(costs.detach(), ones, ones, epsilon=0.1, iterations=3, plan=True, backend=backend).plan
    torch.testing.assert_close(found, torch.autograd.grad((plan * costs).sum(), leaf)[0])


def rounding_of_slopes(p, q, mask, cost, gradient, unit):
    """The error allowed in p (g - sum p g), [..., n, V], with g = sum_j W_ij dC_ij / dp_i and W = d loss / dC.

    A probability has a relative error of unit (|log p| + 4), from the rounding of its exponent. The sum of a lane's 128
    terms has a relative error of 32 units. The entropy is at most log 5000, so the error of sum p g is 64 units of
    sum_j |W_ij| |dC_ij / dp_i|. In saturated rows g and sum p g cancel, and the gradient is rounding error alone.
    """
    mass = mask.double()
    pairs = mask[..., :, None] & mask[..., None, :]
    costs = torch.where(pairs, pairwise_costs(p, q, cost), 0).requires_grad_()
    options = {"epsilon": 0.1, "iterations": 20, "gradient": gradient, "backend": "reference"}
    (weights,) = torch.autograd.grad(fused_sinkhorn(costs, mass, mass, **options).value.sum(), costs)
    weights, undecided = weights.abs(), 0
    if cost == "l1":  # rounding decides the sign of p - q if |p - q| is as small as its error
        of_p, of_q = (unit * x * (4 - x.clamp_min(1e-300).log()) for x in (p, q))
        close = (p[..., :, None, :] - q[..., None, :, :]).abs() <= of_p[..., :, None, :] + of_q[..., None, :, :]
        undecided = 2 * p * torch.einsum("...ij,...ijv->...iv", weights, close.double())
        undecided = undecided + p * undecided.sum(-1, keepdim=True)
    elif cost == "l2":  # (p - q) / |p - q|: the error of the difference relative to its norm
        sizes = p.norm(dim=-1)[..., :, None] + q.norm(dim=-1)[..., None, :]
        weights = weights * sizes / costs.detach().clamp_min(unit)
    elif cost == "sqeuclidean":  # 2 (p - q)
        weights = 2 * weights
    return 64 * unit * p * weights.sum(-1, keepdim=True) + undecided


@given(
    leading=st.sampled_from([(), (1,), (3,), (2, 2)]),
    rows=st.integers(1, 21),
    vocab=st.one_of(st.integers(1, 70), st.integers(71, 5000)),
    padding=st.sampled_from([0, 0, 3]),
    dtypes=st.tuples(*2 * [st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])]),
    cost=st.sampled_from(COSTS),
    gradient=st.sampled_from(["unrolled", "envelope"]),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    strided=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 8.0]),
    temperature=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
@pytest.mark.skipif(native._native is None, reason="no module")
def test_sinkd_on_a_cpu_matches_fp64(
    leading, rows, vocab, padding, dtypes, cost, gradient, masked, strided, scale, temperature, seed
):
    student, teacher = clouds(*leading, rows=rows, vocab=vocab, scale=scale, seed=seed)
    mask = torch.rand(*leading, rows, generator=torch.Generator().manual_seed(seed)) >= masked
    options = {"cost": cost, "gradient": gradient, "temperature": temperature, "mask": mask, "reduction": "none"}
    if padding:
        options["vocab_size"] = vocab
    made = []
    for x, dtype in zip((student, teacher), dtypes, strict=True):
        x = torch.where(mask[..., None], x, torch.nan).to(dtype)
        x = torch.nn.functional.pad(x, (0, padding), value=torch.nan)
        if strided:
            x = torch.nn.functional.pad(x, (0, 0, 0, 1), value=torch.nan)[..., :-1, :]
        made.append(x)
    found = []
    for backend, wide in (("cpu", False), ("reference", True), ("reference", False)):
        leaf = (made[0].double() if wide else made[0].detach()).requires_grad_()
        loss = fused_sinkhorn_kd(leaf, made[1].double() if wide else made[1], backend=backend, **options)
        (gradient_of_loss,) = torch.autograd.grad(loss.sum(), leaf)
        found.append((loss.double(), gradient_of_loss.double(), gradient_of_loss.dtype))
    (loss, got, dtype), (want_loss, want, _), (eager_loss, eager, _) = found
    assert dtype == dtypes[0] and not got[~mask].any() and not got[..., vocab:].any()
    unit = 1e-15 if torch.float64 in dtypes else 2.0**-23
    assert (loss - want_loss).abs().max() <= 3 * (eager_loss - want_loss).abs().max() + 32 * unit * rows
    # A gradient is rounded to its dtype once.
    of_dtype = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 64 * unit)
    largest = want.abs().amax((-1, -2), keepdim=True)
    p, q = (torch.softmax(x.double()[..., :vocab] / temperature, -1).nan_to_num(0) for x in made)
    of_class = torch.nn.functional.pad(rounding_of_slopes(p, q, mask, cost, gradient, unit) / temperature, (0, padding))
    allowed = of_dtype * want.abs() + 3 * (eager - want).abs().amax((-1, -2), keepdim=True)
    allowed = allowed + 64 * unit * largest + of_class + (2.0**-24 if dtype == torch.float16 else 1e-30)
    assert ((got - want).abs() <= allowed).all(), ((got - want).abs() / allowed).max()


@both_backends
def test_masked_rows_are_no_part_of_the_cloud(backend):
    student, teacher = clouds(rows=7)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    student[~mask], teacher[~mask] = torch.nan, torch.inf
    for cost, gradient in itertools.product(COSTS, GRADIENTS):
        leaf, fewer = student.clone().requires_grad_(), student[mask].clone().requires_grad_()
        options = {"cost": cost, "gradient": gradient, "backend": backend}
        loss = fused_sinkhorn_kd(leaf, teacher, mask=mask, **options)
        want = fused_sinkhorn_kd(fewer, teacher[mask], **options)
        torch.testing.assert_close(loss, want)
        found, expected = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(want, fewer)[0]
        torch.testing.assert_close(found[mask], expected)
        assert not found[~mask].any()


@both_backends
@pytest.mark.parametrize("cost", COSTS)
def test_no_rows(backend, cost):
    student, teacher = clouds(2, rows=4)
    student = student.requires_grad_()
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    for reduction in ("sum", "mean"):
        loss = fused_sinkhorn_kd(student, teacher, mask=nothing, cost=cost, reduction=reduction, backend=backend)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss == 0 and not gradient.any()
    # The mean is over clouds with rows. A NaN gradient for a cloud without rows must not reach the student.
    nothing[0] = True
    loss = fused_sinkhorn_kd(student, teacher, mask=nothing, cost=cost, reduction="none", backend=backend)
    mean = fused_sinkhorn_kd(student, teacher, mask=nothing, cost=cost, reduction="mean", backend=backend)
    assert loss[1] == 0 and torch.equal(mean, loss[0])
    if backend != "reference":
        (gradient,) = torch.autograd.grad(loss, student, torch.tensor([1, torch.nan], dtype=torch.float64))
        assert not gradient[1].any() and torch.isfinite(gradient).all()
    for shape in ((0, 4, 9), (2, 0, 9)):
        empty = torch.zeros(shape, requires_grad=True)
        loss = fused_sinkhorn_kd(empty, empty.detach(), cost=cost, backend=backend)
        loss.backward()
        assert loss == 0 and empty.grad.shape == shape


@both_backends
def test_one_row_is_its_cost(backend):
    student, teacher = clouds(rows=1)
    loss = fused_sinkhorn_kd(student, teacher, backend=backend)
    p, q = torch.softmax(student / 2, -1), torch.softmax(teacher / 2, -1)
    torch.testing.assert_close(loss, (p - q).abs().sum())


@both_backends
def test_equal_clouds_are_biased(backend):
    """The loss is not debiased: a student equal to its teacher has a nonzero loss and gradient."""
    student, _ = clouds(rows=8)
    leaf = student.clone().requires_grad_()
    loss = fused_sinkhorn_kd(leaf, student, epsilon=0.5, backend=backend)
    assert loss > 0.1 and torch.autograd.grad(loss, leaf)[0].abs().max() > 1e-3


@both_backends
def test_ties_have_no_slope(backend):
    """The derivative of |p - q| at p = q is 0: equal uniform rows must have gradient 0."""
    leaf = torch.zeros(4, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused_sinkhorn_kd(leaf, torch.zeros(4, 9), backend=backend), leaf)
    assert not gradient.any()


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturated_logits_and_small_epsilon(backend, dtype):
    student, teacher = (x.to(dtype) for x in clouds(rows=8, vocab=300, scale=20.0))
    student[0, 0], teacher[1, 1], student[2, :100] = 80, -80, -torch.inf
    for epsilon, cost, gradient in itertools.product((0.1, 0.02, 0.005), COSTS, GRADIENTS):
        leaf = student.clone().requires_grad_()
        loss = fused_sinkhorn_kd(
            leaf, teacher, epsilon=epsilon, cost=cost, gradient=gradient, temperature=1.0, backend=backend
        )
        (found,) = torch.autograd.grad(loss, leaf)
        assert torch.isfinite(loss) and torch.isfinite(found).all(), (epsilon, cost, gradient)


@both_backends
@pytest.mark.parametrize("cost", COSTS)
def test_nan_stays_in_its_cloud(backend, cost):
    student, teacher = clouds(3)
    student[1, 2, 5] = torch.nan
    leaf = student.requires_grad_()
    loss = fused_sinkhorn_kd(leaf, teacher, cost=cost, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.isnan(gradient[1]).all() and torch.isfinite(gradient[[0, 2]]).all()


def test_temperature_is_used_unchanged():
    """The temperature applies unchanged. The class in the paper's code ignores its argument and divides by 2."""
    student, teacher = clouds()
    torch.testing.assert_close(
        fused_sinkhorn_kd(student, teacher, temperature=5.0), literal_sinkd(student, teacher, temperature=5.0)
    )


def test_leading_dimensions_are_clouds():
    """Leading dimensions are clouds; the softmax never runs over positions, unlike the paper's code for 3-d logits."""
    student, teacher = clouds(2, 2)
    loss = fused_sinkhorn_kd(student, teacher, reduction="none")
    assert loss.shape == (2, 2)
    torch.testing.assert_close(loss[1, 0], literal_sinkd(student[1, 0], teacher[1, 0]))


# ---- integration with PyTorch


@pytest.mark.skipif(native._native is None, reason="no module")
@pytest.mark.parametrize("rows", [9, 130])
def test_thread_count_changes_nothing(rows):
    student, teacher = clouds(rows=rows, vocab=3000, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaf = student.clone().requires_grad_()
            loss = fused_sinkhorn_kd(leaf, teacher, backend="cpu")
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.skipif(native._native is None, reason="no module")
@pytest.mark.parametrize("gradient", [*GRADIENTS, None])
def test_opcheck(gradient):
    cost, a, b = problems(2, 3, 4, dtype=torch.float32)
    one = torch.ones(1)
    named, wanted = gradient or "unrolled", gradient is not None
    problem = transport.Sinkhorn(cost, a, b, 0.1 * one, 0 * one, 5, False, named, 2**20)
    opcheck(ops.sinkhorn, problem, 3 * [wanted], "cpu")
    for kind in ("l1", "dot"):
        student, teacher = clouds(2, dtype=torch.float32)
        cloud = transport.Clouds(student, teacher, torch.ones(2, 6), one, kind, 40)
        problem = transport.SinkhornKD(cloud, 0.1 * one, 5, named, 2**20)
        opcheck(ops.sinkhorn_kd, problem, [wanted], "cpu")
        if wanted:
            _, *kept = ops.sinkhorn_kd(problem, [True], "cpu")
            opcheck(ops.sinkhorn_kd_gradient, problem, *kept, "cpu")


@pytest.mark.skipif(native._native is None, reason="no module")
def test_compiles_whole():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def loss(student, teacher, cost, epsilon):
        found = fused_sinkhorn(cost, epsilon=epsilon, iterations=9, tolerance=1e-3, gradient="unrolled", plan=True)
        return fused_sinkhorn_kd(student, teacher, epsilon=epsilon) + found.value.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for step in range(8):
        student, teacher = clouds(rows=4 + step, dtype=torch.float32)
        cost = problems(2, 3 + step, 4, dtype=torch.float32)[0]
        leaves = [[x.clone().requires_grad_() for x in (student, cost)] for _ in range(2)]
        epsilon = 0.1 + 0.01 * step
        got = compiled(leaves[0][0], teacher, leaves[0][1], epsilon)
        want = loss(leaves[1][0], teacher, leaves[1][1], epsilon)
        torch.testing.assert_close(got, want)
        got.backward()
        want.backward()
        for x, y in zip(*leaves, strict=True):
            torch.testing.assert_close(x.grad, y.grad)
    assert counter.frame_count <= 3


@pytest.mark.skipif(native._native is None, reason="no module")
def test_composes():
    student, teacher = clouds(2, dtype=torch.float32)
    leaf = student.clone().requires_grad_()
    want = fused_sinkhorn_kd(leaf, teacher)
    (expected,) = torch.autograd.grad(want, leaf, retain_graph=True)
    assert torch.equal(torch.autograd.grad(want, leaf)[0], expected)  # the backward runs a second time
    (of_products,) = torch.autograd.grad(fused_sinkhorn_kd(leaf, teacher, cost="dot"), leaf)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_sinkhorn_kd(leaf, teacher), want)
        within = fused_sinkhorn_kd(leaf, teacher, cost="dot")
        assert torch.equal(torch.autograd.grad(within, leaf)[0], of_products)
    again = torch.utils.checkpoint.checkpoint(lambda s: fused_sinkhorn_kd(2 * s, teacher), leaf, use_reentrant=False)
    direct = fused_sinkhorn_kd(2 * leaf, teacher)
    assert torch.equal(torch.autograd.grad(again, leaf)[0], torch.autograd.grad(direct, leaf)[0])
    with torch.no_grad():
        assert torch.equal(fused_sinkhorn_kd(leaf, teacher), want.detach())
    with torch.inference_mode():
        made = teacher.clone()
    assert torch.equal(torch.autograd.grad(fused_sinkhorn_kd(leaf, made), leaf)[0], expected)
    for loss in (fused_sinkhorn_kd(leaf, teacher), fused_sinkhorn(leaf @ leaf.mT, epsilon=1.0).value.sum()):
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(loss, leaf, create_graph=True)
    module = kdkernels.nn.SinkhornKD(epsilon=0.2, temperature=1.0)
    assert torch.equal(module(leaf, teacher), fused_sinkhorn_kd(leaf, teacher, epsilon=0.2, temperature=1.0))
    assert "epsilon=0.2" in repr(module)
    cost = problems(dtype=torch.float32)[0]
    module = kdkernels.nn.Sinkhorn(epsilon=0.2, value="entropic")
    assert torch.equal(module(cost).value, fused_sinkhorn(cost, epsilon=0.2, value="entropic").value)


def test_module_of_the_divergence():
    x, y = torch.rand(2, 3, 4, 2, dtype=torch.float64)
    costs = [torch.cdist(*pair) for pair in ((x, y), (x, x), (y, y))]
    a, b = torch.rand(2, 3, 4, dtype=torch.float64).softmax(-1)
    module = kdkernels.nn.SinkhornDivergence(epsilon=0.2, iterations=7)
    assert torch.equal(module(*costs), fused_sinkhorn_divergence(*costs, epsilon=0.2, iterations=7))
    weighted = fused_sinkhorn_divergence(*costs, a, b, epsilon=0.5, iterations=7)
    assert torch.equal(module(*costs, a, b, epsilon=0.5), weighted)
    assert not torch.equal(weighted, module(*costs, epsilon=0.5))
    assert "epsilon=0.2" in repr(module)
    with pytest.raises(TypeError, match="tolerence"):
        kdkernels.nn.SinkhornDivergence(tolerence=1e-3)


def test_reference_has_second_derivatives():
    cost, a, b = problems(1, 3, 3)

    def loss(cost):
        return fused_sinkhorn(cost, a, b, epsilon=0.2, iterations=3, gradient="unrolled", backend="reference").value

    assert torch.autograd.gradgradcheck(loss, cost.requires_grad_())


def test_masses_broadcast_and_dtypes():
    cost, a, b = problems(3, 4, 5, dtype=torch.float32)
    a = a[0].clone().requires_grad_()
    out = fused_sinkhorn(cost.view(3, 1, 4, 5), a, b[:, None], epsilon=0.1)
    assert out.value.shape == (3, 1) and out.f.shape == (3, 1, 4) and out.g.shape == (3, 1, 5)
    each = [fused_sinkhorn(c, a.detach(), m, epsilon=0.1).value for c, m in zip(cost, b, strict=True)]
    assert torch.equal(out.value.view(3), torch.stack(each))
    assert torch.autograd.grad(out.value.sum(), a)[0].shape == a.shape
    leaf = cost.to(torch.bfloat16).requires_grad_()
    out = fused_sinkhorn(leaf, epsilon=0.1)
    assert out.value.dtype == torch.float32 and torch.autograd.grad(out.value.sum(), leaf)[0].dtype == torch.bfloat16
    assert fused_sinkhorn(torch.rand(0, 3, 4), epsilon=0.1).value.shape == (0,)
    uniform = torch.full((4,), 0.25)
    assert torch.equal(fused_sinkhorn(cost, epsilon=0.1).value, fused_sinkhorn(cost, uniform, epsilon=0.1).value)


BAD = [
    ({"epsilon": 0.0}, ValueError, "epsilon"),
    ({"epsilon": torch.tensor(-1.0)}, ValueError, "epsilon"),
    ({"epsilon": 1e-46}, ValueError, "float32"),
    ({"epsilon": torch.ones(2)}, ValueError, "0-d"),
    ({"epsilon": "small"}, TypeError, "epsilon"),
    ({"iterations": 0}, ValueError, "iterations"),
    ({"iterations": 2.5}, TypeError, "iterations"),
    ({"tolerance": -1e-3}, ValueError, "tolerance"),
    ({"value": "primal"}, ValueError, "'transport' or 'entropic'"),
    ({"gradient": "autograd"}, ValueError, "'unrolled' or 'implicit' or 'envelope'"),
    ({"a": torch.tensor([0.5, 0.6, -0.1])}, ValueError, r"a: expected masses.*-0.1"),
    ({"a": torch.tensor([0.5, 0.6, 0.1])}, ValueError, "equal sums"),
    ({"a": torch.tensor([0.5, torch.nan, 0.5])}, ValueError, "nan"),
    ({"b": torch.ones(3) / 3}, ValueError, r"broadcasts to \[2, 4\]"),
    ({"b": [0.25] * 4}, TypeError, "list"),
    ({"cost": torch.ones(3)}, ValueError, r"\[..., n, m\]"),
    ({"cost": torch.ones(2, 3, 0)}, ValueError, "at least 1"),
    ({"cost": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "int64"),
    ({"cost": torch.full((2, 3, 4), torch.nan)}, ValueError, "nan"),
    ({"cost": torch.full((2, 3, 4), -torch.inf)}, ValueError, "-inf"),
]


@both_backends
@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_bad_problems(backend, options, error, match):
    options = {"cost": torch.rand(2, 3, 4), "epsilon": 0.1, "backend": backend, **options}
    with pytest.raises(error, match=match):
        fused_sinkhorn(options.pop("cost"), **options)


BAD_CLOUDS = [
    ({"teacher": torch.rand(3, 6)}, ValueError, "vocab_size"),
    ({"teacher": torch.rand(4, 5)}, ValueError, "agree"),
    ({"student": torch.rand(5), "teacher": torch.rand(5)}, ValueError, "B, vocabulary"),
    ({"student": [1.0]}, TypeError, "list"),
    ({"teacher": torch.rand(3, 5, requires_grad=True)}, ValueError, "detach"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": torch.ones(3)}, ValueError, "0-d"),
    ({"epsilon": float("inf")}, ValueError, "epsilon"),
    ({"iterations": -1}, ValueError, "iterations"),
    ({"cost": "cosine"}, ValueError, "'l1' or 'l2'"),
    ({"reduction": "batchmean"}, ValueError, "reduction"),
    ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask"),
    ({"mask": torch.ones(3)}, TypeError, "mask"),
    ({"vocab_size": 6}, ValueError, "vocab_size"),
]


@both_backends
@pytest.mark.parametrize(("options", "error", "match"), BAD_CLOUDS)
def test_bad_clouds(backend, options, error, match):
    options = {"student": torch.rand(3, 5), "teacher": torch.rand(3, 5), "backend": backend, **options}
    with pytest.raises(error, match=match):
        fused_sinkhorn_kd(options.pop("student"), options.pop("teacher"), **options)


def test_bad_divergence():
    x = torch.rand(2, 3, 4)
    with pytest.raises(ValueError, match=r"\[2, 3, 3\] and \[2, 4, 4\]"):
        fused_sinkhorn_divergence(x, x, x, epsilon=0.1)


def test_a_sparse_teacher_is_refused():
    student = torch.rand(3, 5)
    with pytest.raises(TypeError, match="expected a tensor of logits"):
        fused_sinkhorn_kd(student, kdkernels.topk_log_probs(student, 2))
