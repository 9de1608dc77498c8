"""Optimal transport between classes (fused_class_ot) against the loop over plans [rows, V, V] in fp64."""

import math
import re
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from truth import BACKENDS, DEVICE, opcheck

import kdkernels
from kdkernels import fused_class_ot, nn, ops
from kdkernels.families import class_ot

GRADIENTS = class_ot.GRADIENTS
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def distributions(student, teacher, temperature=1.0, excluded=None):
    """Softmaxes of student and teacher, and the initial u: [rows, V] each."""
    u = torch.full_like(teacher, 1 / teacher.shape[-1])
    if excluded is not None:
        here = torch.nn.functional.one_hot(excluded.clamp(min=0), student.shape[-1]).bool() & (excluded >= 0)[:, None]
        student, teacher, u = (
            x.masked_fill(here, y) for x, y in ((student, -torch.inf), (teacher, -torch.inf), (u, 0))
        )
    return torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1), u


def scalings(a, b, u, cost, epsilon, iterations, guard=0.0):
    """The released Sinkhorn loop: a kernel matrix per row, columns first. `guard` is added to both denominators."""
    kernel = torch.exp(-cost / epsilon).expand(a.shape[0], -1, -1)
    for _ in range(iterations):
        v = b / (torch.bmm(kernel.mT, u[:, :, None])[..., 0] + guard)
        u = a / (torch.bmm(kernel, v[:, :, None])[..., 0] + guard)
    return u, kernel, v


def plan(*args, **options):
    u, kernel, v = scalings(*args, **options)
    return u[:, :, None] * kernel * v[:, None, :]


def loop(student, teacher, cost, *, temperature=1.0, epsilon=0.05, iterations=10, excluded=None, guard=0.0):
    """Row losses <P, M> of logits [rows, V]."""
    marginals = distributions(student, teacher, temperature, excluded)
    return (plan(*marginals, cost, epsilon, iterations, guard=guard) * cost).sum((-2, -1))


def entropic(student, teacher, cost, *, temperature=1.0, epsilon=0.05, iterations=10):
    """<P, M> + epsilon KL(P || a b^T)."""
    a, b, u = distributions(student, teacher, temperature)
    p = plan(a, b, u, cost, epsilon, iterations)
    return (p * (cost + epsilon * torch.log(p / (a[:, :, None] * b[:, None, :])))).sum((-2, -1))


def differentiated(loss, student, *args, **options):
    """Values, and the gradient of their sum, on a fresh leaf."""
    leaf = student.detach().requires_grad_()
    value = loss(leaf, *args, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


ours = partial(differentiated, partial(fused_class_ot, reduction="none"))


def drawn(*leading, classes, scale=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(*leading, classes, generator=generator, dtype=dtype) for _ in range(2))
    return student, teacher, torch.rand(classes, classes, generator=generator, dtype=dtype)


def labels_of(rows, classes):
    """A label for each row; every third row has none (-100)."""
    return torch.where(torch.arange(rows) % 3 == 2, -100, torch.arange(rows) % classes)


# ---- the loss and its gradients


@settings(max_examples=40)
@given(
    rows=st.integers(1, 5), classes=st.integers(2, 40), scale=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.sampled_from([1.0, 2.0, 10.0]), epsilon=st.sampled_from([0.03, 0.1, 1.0]),
    iterations=st.integers(1, 12), offset=st.sampled_from([0.0, -3.0]), excluding=st.booleans(),
    budget=st.sampled_from([1, 20_000, 2**28]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_loss_and_gradient_are_those_of_the_loop(rows, classes, scale, temperature, epsilon, iterations, offset,
                                                 excluding, budget, seed):  # fmt: skip
    student, teacher, cost = drawn(rows, classes=classes, scale=scale, seed=seed)
    cost = cost + offset
    excluded = labels_of(rows, classes) if excluding else None
    numbers = {"temperature": temperature, "epsilon": epsilon, "iterations": iterations}
    want = differentiated(loop, student, teacher, cost, excluded=excluded, **numbers)
    with kdkernels.chunk_budget(budget):
        got = ours(student, teacher, cost, exclude_labels=excluded, **numbers)
    literal = ours(student, teacher, cost, exclude_labels=excluded, backend="reference", **numbers)
    for found in (got, literal):
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    # fp32 inputs.
    single = ours(student.float(), teacher.float(), cost.float(), exclude_labels=excluded, **numbers)
    wide = (x.float().double() for x in (student, teacher, cost))
    want = differentiated(loop, *wide, excluded=excluded, **numbers)
    torch.testing.assert_close(single[0].double(), want[0], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(single[1].double(), want[1], rtol=1e-3, atol=2e-6 / temperature)


@each_gradient
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(gradient, backend):
    """Each gradient agrees with finite differences of its own function.

    The plans of "implicit" and "envelope" have converged.
    """
    student, teacher, cost = drawn(3, classes=6, seed=3)
    student.requires_grad_()
    of_row = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    iterations = 3 if gradient == "unrolled" else 60
    numbers = {"temperature": 1.5, "epsilon": 0.5, "iterations": iterations}
    of_ours = partial(fused_class_ot, gradient=gradient, backend=backend, reduction="none", **numbers)
    if gradient != "envelope":
        torch.autograd.gradcheck(lambda s: of_row * of_ours(s, teacher, cost), student)
        excluded = torch.tensor([5, -100, 0])
        torch.autograd.gradcheck(lambda s: of_row * of_ours(s, teacher, cost, exclude_labels=excluded), student)
        return
    (got,) = torch.autograd.grad((of_row * of_ours(student, teacher, cost)).sum(), student)
    value, step, change = (of_row * entropic(student, teacher, cost, **numbers)).sum(), 1e-6, torch.zeros_like(student)
    with torch.no_grad():
        for i in range(student.numel()):
            at = student.detach().clone()
            at.view(-1)[i] += step
            up = (of_row * entropic(at, teacher, cost, **numbers)).sum()
            at.view(-1)[i] -= 2 * step
            change.view(-1)[i] = (up - (of_row * entropic(at, teacher, cost, **numbers)).sum()) / (2 * step)
    torch.testing.assert_close(got, change, rtol=1e-6, atol=1e-8)
    (of_value,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(got, of_value, rtol=1e-8, atol=1e-10)


@each_gradient
def test_reference_has_the_same_gradients(gradient):
    student, teacher, cost = drawn(4, classes=20, scale=2.0, seed=5)
    student[1, 3], teacher[1, 4] = -torch.inf, -torch.inf
    numbers = {"epsilon": 0.1, "gradient": gradient, "exclude_labels": labels_of(4, 20)}
    got, want = (ours(student, teacher, cost, backend=backend, **numbers) for backend in ("auto", "reference"))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-11)


def test_unrolled_of_many_iterations_is_implicit():
    student, teacher, cost = drawn(4, classes=15, scale=2.0, seed=1)
    far = partial(ours, student, teacher, cost, epsilon=0.05, exclude_labels=labels_of(4, 15))
    unrolled, implicit = (far(gradient=gradient, iterations=3000) for gradient in ("unrolled", "implicit"))
    torch.testing.assert_close(implicit[1], unrolled[1], rtol=1e-8, atol=1e-10)
    # After few iterations they differ: the released loop's gradient is the gradient of its own iterations.
    few = [far(gradient=gradient, iterations=2)[1] for gradient in ("unrolled", "implicit")]
    assert (few[0] - few[1]).norm() > 1e-3 * few[0].norm()


def test_implicit_warns_without_convergence():
    torch.manual_seed(0)
    places = torch.randn(200, 16, dtype=torch.float64)
    cost = 1 - torch.exp(-torch.cdist(places, places) / 4)
    student, teacher, _ = drawn(3, classes=200)
    with pytest.warns(RuntimeWarning, match="larger epsilon"):
        ours(student, teacher, cost, epsilon=cost.max().item() / 40, gradient="implicit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(student, teacher, cost, epsilon=cost.max().item() / 5, gradient="implicit")


def test_a_plan_that_moves_nothing_has_a_finite_gradient():
    """A plan that keeps each class in place has a finite gradient.

    Its linear system is singular, and the right-hand side is rounding.
    """
    torch.manual_seed(0)
    places = torch.randn(200, 16, dtype=torch.float64)
    cost = 1 - torch.exp(-torch.cdist(places, places) / 4)
    student, teacher, _ = drawn(3, classes=200, scale=0.1)
    for over in (80, 200, 500):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, slope = ours(student, teacher, cost, epsilon=cost.max().item() / over, gradient="implicit")
        # The bound is the cost of moving a class's whole mass over the largest cost, there and back.
        assert (slope.abs() <= 2 * cost.max() * torch.softmax(student, -1)).all()


def test_marginals():
    """The plan's row sums are exact after any number of iterations; its column sums converge."""
    a, b, _ = distributions(*drawn(4, classes=12, scale=3.0)[:2])
    kernel = class_ot.Kernel.of(drawn(1, classes=12)[2], torch.tensor([0.05]), torch.float64)
    for iterations, close in ((1, False), (2000, True)):
        found = class_ot._plan(kernel, a, b, None, iterations, keep=True)
        p = found.u[:, :, None] * kernel.plain * found.v[:, None, :]
        torch.testing.assert_close(p.sum(-1), a, rtol=1e-12, atol=1e-15)
        assert torch.allclose(p.sum(-2), b, rtol=1e-8, atol=1e-12) is close


@each_gradient
def test_scaling_and_shifting_the_costs(gradient):
    """(s M, s epsilon) scales loss and gradient by s; M + c adds c to the loss and leaves the gradient."""
    student, teacher, cost = drawn(4, classes=12)
    loss, slope = ours(student, teacher, cost, epsilon=0.1, gradient=gradient)
    scaled = ours(student, teacher, 40 * cost, epsilon=4.0, gradient=gradient)
    torch.testing.assert_close(scaled[0], 40 * loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled[1], 40 * slope, rtol=1e-9, atol=1e-12)
    shifted = ours(student, teacher, cost - 7, epsilon=0.1, gradient=gradient)
    torch.testing.assert_close(shifted[0], loss - 7, rtol=1e-12, atol=0)
    torch.testing.assert_close(shifted[1], slope, rtol=1e-9, atol=1e-12)


def test_the_least_cost_bounds_it_and_is_its_limit():
    optimize = pytest.importorskip("scipy.optimize")
    student, teacher, cost = drawn(3, classes=7, scale=2.0, seed=8)
    a, b, _ = distributions(student, teacher)
    ones, eye = torch.ones(1, 7), torch.eye(7)
    sums = torch.cat([torch.kron(eye, ones), torch.kron(ones, eye)]).numpy()
    least = torch.tensor(
        [
            optimize.linprog(cost.reshape(-1).numpy(), A_eq=sums, b_eq=torch.cat(both).numpy()).fun
            for both in zip(a, b, strict=True)
        ],
        dtype=torch.float64,
    )
    before = torch.inf
    for epsilon in (1.0, 0.1, 0.01):
        loss = fused_class_ot(student, teacher, cost, epsilon=epsilon, iterations=5000, reduction="none")
        # P minimizes <P, M> + epsilon KL(P || a b^T), and KL is at most log(classes).
        assert (loss >= least - 1e-9).all() and (loss <= least + epsilon * math.log(7)).all() and (loss < before).all()
        before = loss


def test_against_pot():
    ot = pytest.importorskip("ot")
    student, teacher, cost = drawn(3, classes=9, seed=2)
    a, b, _ = distributions(student, teacher)
    want = [ot.sinkhorn2(x.numpy(), y.numpy(), cost.numpy(), 0.1, stopThr=1e-13) for x, y in zip(a, b, strict=True)]
    got = fused_class_ot(student, teacher, cost, epsilon=0.1, iterations=2000, reduction="none")
    torch.testing.assert_close(got, torch.tensor(want).reshape(3), rtol=1e-8, atol=0)


def test_costs_are_from_the_students_class_to_the_teachers():
    student, teacher = (torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]]))
    assert fused_class_ot(student, teacher, torch.tensor([[0.0, 3.0], [1.0, 0.0]])).item() == pytest.approx(3)


def test_equal_distributions_do_not_have_loss_zero():
    """An entropic plan is biased: loss and gradient are not 0 at student = teacher, as the docstrings warn."""
    student, _, cost = drawn(3, classes=8)
    cost = (cost + cost.t()).fill_diagonal_(0)
    loss, slope = ours(student, student, cost, epsilon=0.5, iterations=500)
    assert (loss > 0.05).all() and (slope.abs().amax(-1) > 1e-3).all()
    sharp, _ = ours(student, student, cost, epsilon=0.01, iterations=500)
    assert (sharp < 1e-2).all()


# ---- excluded classes, masked rows, empty inputs


@each_gradient
def test_excluding_a_class_is_removing_it(gradient):
    student, teacher, cost = drawn(3, classes=9)
    numbers = {"epsilon": 0.1, "temperature": 2.0, "gradient": gradient}
    for label in (0, 4, 8):
        labels = torch.full((3,), label)
        with_nan = [x.clone() for x in (student, teacher)]
        for x in with_nan:
            x[:, label] = torch.nan  # an excluded logit is not read
        left = torch.arange(9) != label
        want = ours(student[:, left], teacher[:, left], cost[left][:, left], **numbers)
        for backend in ("auto", "reference"):
            got = ours(*with_nan, cost, exclude_labels=labels, backend=backend, **numbers)
            torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=0)
            if backend == "auto":  # autograd of the reference's loop gives NaN for the excluded class
                torch.testing.assert_close(got[1][:, left], want[1], rtol=1e-9, atol=1e-12)
                assert (got[1][:, label] == 0).all()


def test_a_costly_class_that_is_excluded_costs_nothing():
    """An excluded class's large costs change neither loss nor gradient; they enter the costs' range alone."""
    student, teacher, cost = drawn(2, classes=5)
    dear = cost.clone()
    dear[2], dear[:, 2] = 20.0, 20.0
    labels = torch.tensor([2, 2])
    got, want = (ours(student, teacher, x, exclude_labels=labels) for x in (dear, cost))
    torch.testing.assert_close(got[0], want[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(got[1], want[1], rtol=1e-7, atol=1e-12)


def test_ignore_index():
    student, teacher, cost = drawn(3, classes=5)
    plain = fused_class_ot(student, teacher, cost, reduction="none")
    for ignore_index in (-100, -1, 7):
        labels = torch.tensor([ignore_index, 3, ignore_index])
        got = fused_class_ot(student, teacher, cost, exclude_labels=labels, ignore_index=ignore_index, reduction="none")
        assert ((got - plain).abs() < 1e-12).tolist() == [True, False, True]


@each_gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(gradient, dtype):
    """Logits of ±80, of −inf, and a class of probability 1 give finite results that agree with a plan in fp64."""
    classes = 60
    student, teacher, cost = drawn(5, classes=classes, seed=4)
    student, teacher = 80 * student.sign(), 80 * teacher.sign()
    student[1, 5:], teacher[2, :50] = -torch.inf, -torch.inf
    student[3], teacher[3] = -80.0, -80.0
    student[3, 2], teacher[3, 7] = 80.0, 80.0
    student[4, 1:] = -torch.inf
    for epsilon in (1.0, 0.05, cost.max().item() / 79):
        numbers = {"epsilon": epsilon, "iterations": 10}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # conjugate gradients do not converge for sharp plans
            got = ours(student.to(dtype), teacher.to(dtype), cost.to(dtype), gradient=gradient, **numbers)
        want = differentiated(loop, student, teacher, cost, **numbers)
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
        assert got[1].isfinite().all()
        assert (got[1][torch.isinf(student)] == 0).all() and (got[1][4] == 0).all()
        if gradient == "unrolled":
            torch.testing.assert_close(got[1].double(), want[1].nan_to_num(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@each_gradient
def test_a_bad_row_is_nan_alone(bad, gradient):
    student, teacher, cost = drawn(4, classes=6, dtype=torch.float32)
    want = ours(student, teacher, cost, gradient=gradient)
    for side in (student, teacher):
        row = side[2].clone()
        side[2, 3 if bad != -torch.inf else slice(None)] = bad
        for backend in ("auto", "reference"):
            got = ours(student, teacher, cost, gradient=gradient, backend=backend)
            assert got[0].isnan().tolist() == [False, False, True, False]
            assert got[1].isnan().all(-1).tolist() == [False, False, True, False]
            others = torch.tensor([0, 1, 3])
            torch.testing.assert_close(got[1][others], want[1][others], rtol=1e-4, atol=1e-6)
        side[2] = row


@pytest.mark.parametrize("backend", ["auto", "reference"])
@each_gradient
def test_masked_rows_may_hold_anything(backend, gradient):
    student, teacher, cost = drawn(2, 3, classes=6)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    labels = torch.tensor([[1, 99, 0], [-7, -100, 5]])  # labels of masked rows are not checked
    temperature = torch.tensor([[1.0, -1.0, 2.0], [0.0, 1.0, 1.0]])
    options = {"mask": mask, "exclude_labels": labels, "temperature": temperature, "gradient": gradient}
    options |= {"backend": backend, "epsilon": 0.2}
    want = [x[mask] for x in ours(student, teacher, cost, **options)]
    for x in (student, teacher):
        x[~mask] = torch.nan
    got = ours(student, teacher, cost, **options)
    assert (got[0][~mask] == 0).all() and (got[1][~mask] == 0).all()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x[mask], y)
    alone = ours(
        student[mask], teacher[mask], cost, exclude_labels=labels[mask], temperature=temperature[mask], epsilon=0.2,
        gradient=gradient, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(got[0][mask], alone[0])
    torch.testing.assert_close(got[1][mask], alone[1])


def test_no_rows_kept_and_no_rows():
    student, teacher, cost = drawn(3, classes=4)
    student[0] = torch.nan
    nothing = torch.zeros(3, dtype=torch.bool)
    for options in ({}, {"normalizer": 0}, {"reduction": "sum"}):
        loss, slope = differentiated(fused_class_ot, student, teacher, cost, mask=nothing, **options)
        assert loss == 0 and (slope == 0).all()
    loss, slope = differentiated(fused_class_ot, student[:0], teacher[:0], cost)
    assert loss == 0 and slope.shape == (0, 4)
    assert fused_class_ot(student[:0], teacher[:0], cost, reduction="none").shape == (0,)


# ---- row options, shapes and dtypes


def test_reductions_weights_and_normalizers():
    student, teacher, cost = drawn(4, classes=5)
    rows, slopes = ours(student, teacher, cost)
    mask, weight = torch.tensor([True, True, False, True]), torch.tensor([1.0, 0.5, 3.0, -2.0]).double()
    kept = torch.where(mask, weight, 0)
    for options, factor in (
        ({}, torch.full((4,), 0.25)),
        ({"reduction": "sum"}, torch.ones(4)),
        ({"mask": mask}, mask / 3),
        ({"mask": mask, "row_weight": weight}, kept / 3),
        ({"mask": mask, "row_weight": weight, "normalizer": torch.tensor([[8]])}, kept / 8),
        ({"mask": mask, "row_weight": weight, "normalizer": 8, "reduction": "mean"}, kept / 8),
    ):
        loss, slope = differentiated(fused_class_ot, student, teacher, cost, **options)
        torch.testing.assert_close(loss, (factor * rows).sum(), rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(slope, factor[:, None].double() * slopes, rtol=1e-7, atol=1e-12)
    of_row = torch.tensor([2.0, 0.0, torch.nan, 1.0]).double()  # grad_output is NaN for the masked row
    leaf = student.clone().requires_grad_()
    loss = fused_class_ot(leaf, teacher, cost, mask=mask, reduction="none")
    (slope,) = torch.autograd.grad(loss, leaf, of_row)
    torch.testing.assert_close(slope, torch.where(mask, of_row, 0)[:, None] * slopes)


def test_temperatures_per_row():
    student, teacher, cost = drawn(3, classes=5)
    temperature = torch.tensor([0.5, 1.0, 4.0])
    got = ours(student, teacher, cost, temperature=temperature)
    for i in range(3):
        one = ours(student[i], teacher[i], cost, temperature=temperature[i].item())
        torch.testing.assert_close(got[0][i], one[0])
        torch.testing.assert_close(got[1][i], one[1])


@pytest.mark.parametrize("budget", [1, 10_000, 2**28])
def test_shapes_and_strides(budget):
    student, teacher, cost = drawn(3, 4, classes=10)
    with kdkernels.chunk_budget(budget):
        want = ours(student.view(12, 10), teacher.view(12, 10), cost)
        got = ours(student, teacher, cost)
        assert got[0].shape == (3, 4)
        torch.testing.assert_close(got[1].view(12, 10), want[1])
        sliced = ours(student[:, :-1], teacher[:, 1:], cost.t().contiguous().t())
        copied = ours(student[:, :-1].contiguous(), teacher[:, 1:].contiguous(), cost)
        torch.testing.assert_close(sliced[1], copied[1])
        one = ours(student[0, 0], teacher[0, 0], cost)
        assert one[0].shape == () and one[1].shape == (10,)
        torch.testing.assert_close(one[1], want[1][0])


@each_gradient
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_is_rounded_once(dtype, gradient):
    student, teacher, cost = (x.to(dtype) for x in drawn(5, classes=40, scale=2.0))
    got = ours(student, teacher, cost, gradient=gradient, epsilon=0.1)
    want = ours(student.double(), teacher.double(), cost.double(), gradient=gradient, epsilon=0.1)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(got[1].double(), want[1], rtol=ROUNDING[dtype], atol=4e-7)


def test_small_gradients_of_fp16_reach_the_loss_scale():
    student, teacher, cost = drawn(4, classes=30, dtype=torch.float32)
    leaf = student.half().requires_grad_()
    loss = 2.0**16 * fused_class_ot(leaf, teacher, cost, normalizer=2.0**20)
    loss.backward()
    want = ours(leaf.double(), teacher.double(), cost.double())[1] / 2**4
    torch.testing.assert_close(leaf.grad.double(), want, rtol=2.0**-9, atol=2.0**-20)


def test_costs_in_fp64_make_the_arithmetic_fp64():
    student, teacher, cost = drawn(4, classes=30)
    single = student.float(), teacher.float()
    want = loop(single[0].double(), single[1].double(), cost)
    loss = fused_class_ot(*single, cost, reduction="none")
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert ours(*single, cost)[1].dtype == torch.float32


@each_gradient
def test_small_epsilons_are_computed_in_fp64_on_a_cpu(gradient):
    student, teacher, cost = drawn(4, classes=20, dtype=torch.float32)
    spread = (cost.max() - cost.min()).item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for over in (79.9, 79.9999999, 80.0000001, 81.0, 300.0, 599.9999999):
            numbers = {"epsilon": spread / over, "gradient": gradient}
            loss, slope = ours(student, teacher, cost, **numbers)
            wide = ours(student.double(), teacher.double(), cost.double(), **numbers)
            assert loss.dtype == slope.dtype == torch.float32
            torch.testing.assert_close(loss.double(), wide[0], rtol=2e-6, atol=0)
            if gradient != "implicit":
                torch.testing.assert_close(slope.double(), wide[1], rtol=1e-3, atol=1e-6)
            literal = fused_class_ot(
                student, teacher, cost, epsilon=spread / over, reduction="none", backend="reference"
            )
            torch.testing.assert_close(loss, literal, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="epsilon: expected at least") as raised:
        fused_class_ot(student, teacher, cost, epsilon=spread / 601)
    least = float(re.search(r"at least (\S+),", str(raised.value)).group(1))
    assert fused_class_ot(student, teacher, cost, epsilon=1.01 * least).isfinite()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="only oneDNN rounds products on a CPU")
def test_lower_precision_of_products_is_not_taken():
    """fp32 products stay fp32 although the program allows TF32 or bf16: scalings do not converge in lower precision."""
    student, teacher, cost = drawn(64, classes=128, dtype=torch.float32)
    want = ours(student, teacher, cost)
    torch.set_float32_matmul_precision("medium")
    try:
        got = ours(student, teacher, cost)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


# ---- torch: compilation, custom operators, autocast, checkpointing


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles_whole_and_twice_at_most(fresh_compiler):
    counter = CompileCounter()

    def step(student, teacher, cost, epsilon, temperature, mask, labels):
        return fused_class_ot(
            student, teacher, cost, epsilon=epsilon, temperature=temperature, mask=mask, exclude_labels=labels
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(8):
        rows = 7 + 2 * i
        student, teacher, cost = drawn(rows, classes=12, dtype=torch.float32)
        compiled(
            student.requires_grad_(), teacher, cost, 0.1 + 0.01 * i, 1.0 + 0.1 * i, torch.rand(rows) > 0.3,
            torch.randint(0, 12, (rows,)),
        )  # fmt: skip
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
@each_gradient
def test_compiled_gradients_are_the_eager_ones(gradient, backend, fresh_compiler):
    def step(student, teacher, cost, epsilon):
        loss = fused_class_ot(student * 2, teacher, cost, epsilon=epsilon, gradient=gradient, backend=backend)
        return 3 * loss + student.square().mean()

    student, teacher, cost = drawn(4, classes=10)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want, got = (differentiated(x, student, teacher, cost, 0.2) for x in (step, compiled))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("gradient", [*GRADIENTS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(gradient, dtype):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs of the operator
    student, teacher, cost = (x.to(DEVICE) for x in drawn(2, 3, classes=10, dtype=torch.float32))
    row_scale = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0], device=DEVICE)
    labels = torch.tensor([3, 1, class_ot.NO_LABEL, 0, 9, 2], device=DEVICE)
    epsilon = torch.full((1,), 0.2, dtype=torch.float64, device=DEVICE)
    for excluded, temperature in ((labels, torch.rand(6)), (None, torch.ones(1))):
        tensors = (student.to(dtype), teacher, cost, row_scale, excluded, temperature.to(DEVICE), epsilon)
        problem = class_ot.ClassOT(*tensors, 4, gradient or "unrolled", 2**20)
        opcheck(ops.class_ot, problem, [gradient is not None], "cpu")


@each_gradient
def test_autocast_changes_nothing(gradient):
    student, teacher, cost = drawn(4, classes=30, dtype=torch.float32)
    for backend in ("auto", "reference"):
        plain = ours(student, teacher, cost, gradient=gradient, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = ours(student, teacher, cost, gradient=gradient, backend=backend)
        assert torch.equal(cast[0], plain[0]) and torch.equal(cast[1], plain[1])


def test_gradient_is_computed_only_if_required(monkeypatch):
    asked = []
    right = class_ot._row_losses
    monkeypatch.setattr(class_ot, "_row_losses", lambda *args: asked.append(args[-1]) or right(*args))
    student, teacher, cost = drawn(2, classes=5)
    assert not fused_class_ot(student, teacher, cost).requires_grad
    with torch.no_grad():
        assert not fused_class_ot(student.requires_grad_(), teacher, cost).requires_grad
    assert asked == [None, None]
    assert fused_class_ot(student, teacher, cost, gradient="envelope").requires_grad
    assert asked[2:] == ["envelope"]


def test_backward_twice_and_checkpoint_and_hooks():
    student, teacher, cost = drawn(3, classes=6)
    want = ours(student, teacher, cost)[1]
    leaf, saved = student.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        loss = fused_class_ot(leaf, teacher, cost, reduction="sum")
    assert sum(len(shape) > 1 for shape in saved) == 1  # the gradient alone
    for factor in (2, 5):
        (got,) = torch.autograd.grad(factor * loss, leaf, retain_graph=True)
        torch.testing.assert_close(got, factor * want)
    for reentrant in (False, True):
        leaf.grad = None
        loss = checkpoint(lambda x: fused_class_ot(x, teacher, cost, reduction="sum"), leaf, use_reentrant=reentrant)
        loss.backward()
        torch.testing.assert_close(leaf.grad, want)

    def rows(x):
        return fused_class_ot(x, teacher, cost, reduction="none")

    one_by_one = torch.autograd.functional.jacobian(rows, student)
    torch.testing.assert_close(torch.autograd.functional.jacobian(rows, student, vectorize=True), one_by_one)


def test_missing_derivatives_raise():
    student, teacher, cost = drawn(3, classes=6)
    for options in ({}, {"gradient": "implicit"}, {"gradient": "envelope", "backend": "reference"}):
        leaf = student.clone().requires_grad_()
        loss = fused_class_ot(leaf, teacher, cost, **options)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(loss, leaf, create_graph=True)
    loss = partial(fused_class_ot, teacher=teacher, class_cost=cost)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.grad(loss)(student)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        loss(torch.autograd.forward_ad.make_dual(student, teacher))
    torch.testing.assert_close(
        torch.func.grad(partial(loss, backend="reference"))(student), differentiated(loss, student)[1]
    )
    torch.autograd.gradgradcheck(
        lambda s: fused_class_ot(s, teacher, cost, epsilon=0.3, iterations=3, backend="reference"),
        student.requires_grad_(),
    )


def test_no_value_is_read_on_the_way():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        student, teacher, cost = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8), torch.rand(8, 8)
        labels, mask = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
        for gradient in GRADIENTS:
            loss = fused_class_ot(
                student, teacher, cost, exclude_labels=labels, mask=mask, gradient=gradient,
                temperature=torch.rand(2, 5), row_weight=torch.rand(2, 5), normalizer=torch.tensor(3),
            )  # fmt: skip
            loss.backward()
            assert student.grad.shape == student.shape


def test_without_checks_a_bad_value_makes_its_row_nan(monkeypatch):
    """Without checks (as on a GPU), all rows are computed, and a row with a bad value is NaN."""
    for name in ("_reads_values", "bad_values_raise"):
        monkeypatch.setattr(class_ot, name, lambda device: False)
    student, teacher, cost = drawn(4, classes=6, dtype=torch.float32)
    mask = torch.tensor([True, True, False, True])
    student[2] = torch.nan
    call = partial(ours, student, teacher, mask=mask)
    want = [x.clone() for x in call(cost)]
    assert want[0].isfinite().all() and (want[1][2] == 0).all()
    labels, temperature = torch.tensor([1, 6, 77, -100]), torch.tensor([1.0, 1.0, -1.0, 0.0])
    for options, bad in (({"exclude_labels": labels}, 1), ({"temperature": temperature}, 3)):
        got = call(cost, **options)
        assert got[0].isnan().nonzero().tolist() == [[bad]] and got[1].isnan().all(-1).nonzero().tolist() == [[bad]]
    for costs, epsilon in ((torch.full_like(cost, torch.nan), 1.0), (cost / cost[:, :1] / 0, 1.0), (cost, 1e-3)):
        for gradient in GRADIENTS:
            got = call(costs, epsilon=epsilon, gradient=gradient)
            assert got[0].isnan().tolist() == mask.tolist() and got[1].isnan().all(-1).tolist() == mask.tolist()
    assert call(cost.double(), epsilon=cost.max().item() / 500)[0].isfinite().all()


@pytest.mark.gpu
@each_gradient
def test_on_a_gpu(gradient):
    """A GPU gives the CPU's numbers without a synchronisation; with checks(True), bad costs raise."""
    student, teacher, cost = (x.cuda() for x in drawn(64, classes=300, dtype=torch.float32))
    labels = torch.arange(64, device="cuda")
    call = partial(ours, student, teacher, epsilon=0.1, gradient=gradient, exclude_labels=labels)
    got = call(cost)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(cost)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = ours(*(x.cpu().double() for x in (student, teacher, cost)), epsilon=0.1, gradient=gradient,
                exclude_labels=labels.cpu())  # fmt: skip
    torch.testing.assert_close(got[0].cpu().double(), want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1].cpu().double(), want[1], rtol=1e-3, atol=1e-6)
    assert call(cost * torch.nan)[0].isnan().all()
    before = kdkernels.checks(True)
    try:
        with pytest.raises(ValueError, match="class_cost"):
            call(cost * torch.nan)
    finally:
        kdkernels.checks(before)


# ---- defects of other implementations


def test_defect_a_guard_in_the_denominators_moves_the_plan():
    """The plan keeps each row's mass.

    The released loop adds 1e-8 to K^T u and K v. At a small epsilon these products are as small, and rows lose mass.
    """
    student, teacher, cost = drawn(4, classes=6, scale=0.1)
    cost = 0.2 + cost  # the guarded kernel is not shifted by the smallest cost
    numbers = {"epsilon": 0.01, "iterations": 50}
    a, b, u = distributions(student, teacher)
    guarded = plan(a, b, u, cost, numbers["epsilon"], numbers["iterations"], guard=1e-8)
    assert ((guarded.sum(-1) - a).abs() > 0.1 * a).any()
    want = loop(student, teacher, cost, **numbers)
    torch.testing.assert_close(fused_class_ot(student, teacher, cost, reduction="none", **numbers), want)


def test_defect_a_kernel_matrix_a_row():
    """Allocations are two [V, V] matrices and vectors per row; no tensor is [rows, V, V]."""
    torch.use_deterministic_algorithms(False)
    rows, classes = 64, 256
    student, teacher, cost = drawn(rows, classes=classes, dtype=torch.float32)
    for gradient in GRADIENTS:
        with torch.profiler.profile(profile_memory=True) as profile:
            ours(student, teacher, cost, gradient=gradient)
        sizes = [event.self_cpu_memory_usage for event in profile.events()]
        assert max(sizes) <= 2 * 4 * classes * classes
        assert sum(x for x in sizes if x > 0) < 400 * 4 * rows * classes < 4 * rows * classes * classes * 2
    with kdkernels.chunk_budget(64 * 1024), torch.profiler.profile(profile_memory=True) as profile:
        ours(student, teacher, cost)
    few = [event.self_cpu_memory_usage for event in profile.events()]
    few = [x for x in few if x > 0 and x not in (4 * classes * classes, 4 * rows * classes)]
    assert max(few) <= 64 * 1024 // 8


# ---- arguments


def good(**changed):
    student, teacher, cost = drawn(3, classes=5, dtype=torch.float32)
    return {"student": student, "teacher": teacher, "class_cost": cost, **changed}


LABELS = torch.tensor([0, 1, 2])
BAD = {
    "student list": (good(student=[1.0]), TypeError, ["student", "tensor", "list"]),
    "cost list": (good(class_cost=[[1.0]]), TypeError, ["class_cost", "tensor", "list"]),
    "widths": (good(teacher=torch.randn(3, 6)), ValueError, ["one vocabulary", "5", "6"]),
    "leading": (good(teacher=torch.randn(2, 5)), ValueError, ["[3, 5]", "[2, 5]"]),
    "teacher grad": (good(teacher=torch.randn(3, 5, requires_grad=True)), ValueError, ["teacher", ".detach()"]),
    "cost shape": (good(class_cost=torch.rand(5, 4)), ValueError, ["class_cost", "[V, V] of 5", "[5, 4]"]),
    "cost dims": (good(class_cost=torch.rand(5)), ValueError, ["class_cost", "[5]"]),
    "cost dtype": (good(class_cost=torch.ones(5, 5, dtype=torch.int64)), TypeError, ["class_cost", "int64"]),
    "cost sparse": (good(class_cost=torch.rand(5, 5).to_sparse()), TypeError, ["class_cost", "dense"]),
    "cost device": (good(class_cost=torch.rand(5, 5, device="meta")), ValueError, ["class_cost", "cpu", "meta"]),
    "cost grad": (good(class_cost=torch.rand(5, 5, requires_grad=True)), ValueError, ["class_cost", ".detach()"]),
    "cost nan": (good(class_cost=torch.full((5, 5), torch.nan)), ValueError, ["class_cost", "finite", "nan"]),
    "cost inf": (good(class_cost=torch.full((5, 5), torch.inf)), ValueError, ["class_cost", "finite", "inf"]),
    "epsilon 0": (good(epsilon=0.0), ValueError, ["epsilon", "> 0", "0.0"]),
    "epsilon negative": (good(epsilon=-1), ValueError, ["epsilon", "> 0", "-1"]),
    "epsilon nan": (good(epsilon=float("nan")), ValueError, ["epsilon", "finite"]),
    "epsilon tensor": (good(epsilon=torch.tensor([0.1])), ValueError, ["epsilon", "0-d", "[1]"]),
    "epsilon small": (good(epsilon=1e-4), ValueError, ["epsilon", "at least", "0.0001"]),
    "iterations 0": (good(iterations=0), ValueError, ["iterations", "at least 1", "0"]),
    "iterations float": (good(iterations=2.0), TypeError, ["iterations", "int", "float"]),
    "gradient": (good(gradient="forward"), ValueError, ["gradient", "'unrolled'", "'envelope'", "'forward'"]),
    "labels dtype": (good(exclude_labels=LABELS.int()), TypeError, ["exclude_labels", "int64", "int32"]),
    "labels shape": (good(exclude_labels=LABELS[:2]), ValueError, ["exclude_labels", "[3]", "[2]"]),
    "labels range": (good(exclude_labels=LABELS + 3), ValueError, ["exclude_labels", "0 <= label < 5", "5 in row 2"]),
    "labels -1": (good(exclude_labels=LABELS - 1), ValueError, ["exclude_labels", "-1 in row 0"]),
    "ignore_index": (good(exclude_labels=LABELS, ignore_index=1.0), TypeError, ["ignore_index", "float"]),
    "temperature": (good(temperature=0.0), ValueError, ["temperature", "> 0"]),
    "temperature tensor": (good(temperature=torch.tensor([1.0, 0, 1])), ValueError, ["temperature", "row 1"]),
    "mask": (good(mask=LABELS), TypeError, ["mask", "bool"]),
    "batchmean": (good(reduction="batchmean"), ValueError, ["batchmean"]),
    "normalizer": (good(reduction="sum", normalizer=2), ValueError, ["normalizer"]),
    "backend": (good(backend="tpu"), ValueError, ["unknown backend", "tpu"]),
    "one class": (
        good(
            student=torch.ones(3, 1), teacher=torch.ones(3, 1), class_cost=torch.ones(1, 1), exclude_labels=LABELS * 0
        ),
        ValueError,
        ["exclude_labels", "at least 2 classes"],
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_say_what_was_expected(name, backend):
    call, error, parts = BAD[name]
    with pytest.raises(error) as raised:
        fused_class_ot(**{"backend": backend, **call})
    for part in parts:
        assert part in str(raised.value), f"{part!r} not in: {raised.value}"


def test_backends_that_serve_the_call():
    call = good()
    assert fused_class_ot(**call, backend="cpu").isfinite()
    for backend in set(BACKENDS) - {"cpu", "reference", "triton"}:
        if DEVICE == "cpu":
            with pytest.raises(RuntimeError, match=f"'{backend}' cannot serve"):
                fused_class_ot(**call, backend=backend)


def test_without_a_compiled_backend_auto_is_not_the_literal_loop(monkeypatch):
    monkeypatch.setattr(kdkernels.backends, "NAMES", ())
    monkeypatch.setattr("kdkernels.backends.reference.class_ot", None)
    monkeypatch.setattr(kdkernels.backends, "select", lambda *_: "reference")
    student, teacher, cost = drawn(3, classes=5)
    loss, slope = ours(student, teacher, cost)
    want = differentiated(loop, student, teacher, cost)
    torch.testing.assert_close(loss, want[0])
    torch.testing.assert_close(slope, want[1])


def test_module_is_the_function():
    student, teacher, cost = drawn(2, 3, classes=7)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    module = nn.ClassOT(temperature=2.0, epsilon=0.1, reduction="sum")
    want = fused_class_ot(student, teacher, cost, temperature=2.0, epsilon=0.1, reduction="sum", mask=mask)
    assert torch.equal(module(student, teacher, cost, mask=mask), want)
    assert torch.equal(module(student, teacher, cost, mask=mask, reduction="none").sum(), want)
    assert "temperature=2.0" in repr(module) and not list(module.parameters())
    with pytest.raises(TypeError, match=r"labels.*exclude_labels"):
        nn.ClassOT(labels=None)


def test_dropped_rows_where_the_arithmetic_is_wider():
    """Costs with a range too wide for fp32 are computed in fp64, also when a mask drops rows."""
    student, teacher, cost = torch.randn(3, 5), torch.randn(3, 5), torch.rand(5, 5)
    leaf, mask = student.clone().requires_grad_(), torch.tensor([True, False, True])
    options = {"epsilon": 0.005, "reduction": "none"}
    loss = fused_class_ot(leaf, teacher, cost, mask=mask, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.dtype == gradient.dtype == torch.float32 and not gradient[1].any()
    assert torch.equal(loss[mask], fused_class_ot(student, teacher, cost, **options)[mask])
