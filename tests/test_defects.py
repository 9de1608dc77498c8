"""Known defects of other libraries' losses on dense logits: one test for each."""

import math

import pytest
import torch
import torch.nn.functional as F
from truth import BACKENDS, DIVERGENCES, device_of, rounding, run, truth

from kdkernels import CATALOGUE, Divergence, fused_divergence, fused_js, fused_kl

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_gradient = pytest.mark.parametrize("gradient", ["forward", "backward"])


def leaf(*shape, backend="cpu", dtype=torch.float32):
    return torch.randn(*shape, device=device_of(backend)).to(dtype).requires_grad_()


@each_backend
@each_gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_backward_does_not_scale_twice(backend, gradient, dtype):
    """Each backward over a retained graph scales by its own grad_output.

    Another library scaled twice: grad_output = 2 gave four times the gradient the second time.
    """
    student, teacher = leaf(4, 90, backend=backend, dtype=dtype), leaf(4, 90, backend=backend).detach()
    loss = fused_js(student, teacher, gradient=gradient, backend=backend)
    two = torch.full_like(loss, 2.0)
    first, second, third = (
        torch.autograd.grad(loss, student, g, retain_graph=True)[0].clone() for g in (two, two, two / 2)
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(third * 2, first)
    last = torch.autograd.grad(loss, student, two)[0]
    assert torch.equal(first, last)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student, two)


@each_backend
def test_loss_factor_reaches_the_gradient_exactly(backend):
    """A factor of 1/3 is not rounded to bf16 before it multiplies a bf16 gradient."""
    student, teacher = leaf(4, 90, backend=backend, dtype=torch.bfloat16), leaf(4, 90, backend=backend).detach()
    whole = torch.autograd.grad(fused_kl(student, teacher, reduction="sum", backend=backend), student)[0].float()
    third = torch.autograd.grad(fused_kl(student, teacher, reduction="sum", backend=backend) / 3, student)[0]
    torch.testing.assert_close(third.float(), whole / 3, rtol=2.0**-7, atol=1e-9)
    assert ((third.float() * 3 / whole).nanmean() - 1).abs() < 5e-4


@each_backend
def test_tv_with_all_rows_ignored_is_zero(backend):
    """Loss and gradient are 0 when labels ignore all rows; another library raised ZeroDivisionError."""
    student, teacher = leaf(3, 20, backend=backend), leaf(3, 20, backend=backend).detach()
    labels = torch.full((3,), -100, device=student.device)
    loss = fused_divergence(student, teacher, "tv", labels=labels, backend=backend)
    loss.backward()
    assert loss == 0 and not student.grad.any()


@each_backend
def test_tv_slope_is_zero_where_p_is_q(backend):
    """The slope of tv is 0 at p = q; another library gave -1/2 for every class."""
    student = leaf(3, 20, backend=backend)
    fused_divergence(student, student.detach().clone(), "tv", backend=backend).backward()
    assert not student.grad.any()


@each_backend
@pytest.mark.parametrize("divergence", list(CATALOGUE))
def test_bf16_on_both_sides_runs(backend, divergence):
    """bf16 logits are valid on both sides; another library raised "Expected dtype fp32/fp64 got bf16"."""
    student, teacher = leaf(2, 70, backend=backend, dtype=torch.bfloat16), leaf(2, 70, backend=backend).detach()
    loss = fused_divergence(student, teacher.bfloat16(), divergence, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16


@each_backend
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if not d.is_infinite_without_teacher], ids=repr)
def test_vocabulary_masked_in_the_teacher_is_finite(backend, divergence):
    """A class that the teacher masks leaves loss and gradient finite.

    Other libraries gave NaN or inf in KL with log targets and in every JS.
    """
    student, teacher = leaf(3, 80, backend=backend), leaf(3, 80, backend=backend).detach()
    teacher[:, 60:] = -math.inf
    loss = fused_divergence(student, teacher, divergence, backend=backend)
    loss.backward()
    want = truth(student.detach(), teacher, divergence, reduction="mean")
    torch.testing.assert_close(loss.double(), want.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), want.gradient, rtol=1e-4, atol=1e-7)


@each_backend
@pytest.mark.parametrize("divergence", list(CATALOGUE))
def test_padding_classes_have_no_mass(backend, divergence):
    """Identical models have loss 0 when one side has padding classes.

    Another library padded the student with zero logits, and the KL of identical models was above 0.
    """
    logits = torch.randn(3, 50, device=device_of(backend)) - 5
    padded = F.pad(logits, (0, 14))
    got = run(padded, logits, divergence, vocab_size=50, backend=backend)
    assert got.loss.abs().max() < 1e-6 and got.gradient.abs().max() < 1e-6
    got = run(logits, F.pad(logits, (0, 7), value=math.nan), divergence, vocab_size=50, backend=backend)
    assert got.loss.abs().max() < 1e-6


@each_backend
def test_widths_that_differ_are_not_silent(backend):
    with pytest.raises(ValueError, match="vocab_size"):
        fused_kl(leaf(3, 32, backend=backend), leaf(3, 40, backend=backend).detach(), backend=backend)


@each_backend
def test_three_dimensions_are_rows_like_any_other(backend):
    """[B, T, V] is B * T rows in value, count and gradient; another library counted B rows."""
    student, teacher = (
        torch.randn(2, 5, 60, device=device_of(backend)),
        torch.randn(2, 5, 60, device=device_of(backend)),
    )
    deep = run(student, teacher, "js", reduction="mean", backend=backend)
    flat = run(student.view(10, 60), teacher.view(10, 60), "js", reduction="mean", backend=backend)
    assert torch.equal(deep.loss, flat.loss) and torch.equal(deep.gradient.view(10, 60), flat.gradient)


@each_backend
def test_ignored_tokens_leave_the_divisor_too(backend):
    """Ignored tokens enter neither the sum nor the count; other libraries summed or counted them."""
    student, teacher = leaf(6, 60, backend=backend).detach(), leaf(6, 60, backend=backend).detach()
    labels = torch.tensor([1, -100, 2, -100, -100, 3], device=student.device)
    got = run(student, teacher, "kl", labels=labels, reduction="mean", backend=backend)
    kept = run(student[labels != -100], teacher[labels != -100], "kl", reduction="mean", backend=backend)
    torch.testing.assert_close(got.loss, kept.loss)
    torch.testing.assert_close(got.gradient[labels != -100], kept.gradient)


@each_backend
def test_loss_requires_grad_and_statistics_are_detached(backend):
    """The loss requires grad; statistics are detached and say so.

    Another library returned soft and hard losses that required grad and passed none on.
    """
    student, teacher = leaf(3, 60, backend=backend), leaf(3, 60, backend=backend).detach()
    labels = torch.tensor([1, 2, 3], device=student.device)
    names = ("divergence", "cross_entropy")
    out = fused_kl(student, teacher, labels=labels, hard_weight=0.3, statistics=names, backend=backend)
    assert out.loss.requires_grad and not any(out.statistics[name].requires_grad for name in names)
    mixed = 0.7 * out.statistics["divergence"] + 0.3 * out.statistics["cross_entropy"]
    torch.testing.assert_close(out.loss.detach(), mixed.mean())


@each_backend
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_bf16_logits_are_not_rounded_again(backend, divergence):
    """A gradient of bf16 logits has the error of one rounding of the result; bf16 log-probs cost 15 % of a gradient."""
    vocab = 32_000 if backend != "triton" else 2000
    student, teacher = torch.randn(2, vocab).bfloat16(), torch.randn(2, vocab).bfloat16()
    got = run(student.to(device_of(backend)), teacher.to(device_of(backend)), divergence, backend=backend)
    want = truth(student, teacher, divergence)
    error = (got.gradient.double().cpu() - want.gradient).norm() / want.gradient.norm()
    rounded_once = (want.gradient.bfloat16().double() - want.gradient).norm() / want.gradient.norm()
    assert error <= 1.05 * rounded_once


@each_backend
def test_probabilities_that_underflow_mix_without_nan(backend):
    """A class whose p and q both underflow is finite; log(beta * p + (1 - beta) * q) was NaN in another library."""
    for divergence in DIVERGENCES:
        student, teacher = torch.randn(2, 60), torch.randn(2, 60)
        student[:, 5:20] -= 150
        teacher[:, 10:30] -= 150
        if divergence.is_steep:
            continue  # p^2 / q of these classes overflows fp32
        got = run(student.to(device_of(backend)), teacher.to(device_of(backend)), divergence, backend=backend)
        want = truth(student, teacher, divergence)
        assert ((got.loss.double().cpu() - want.loss).abs() <= 1e-6 * want.loss + rounding(student, teacher)).all()
        assert got.gradient.isfinite().all()


@each_backend
def test_fp16_gradients_survive_until_the_loss_scale(backend):
    """fp16 gradients are scaled by the loss scaler before they are rounded.

    Gradients of a mean are about 1 / (N V), which is 0 in fp16.
    """
    rows, vocab = 8, 4000 if backend != "triton" else 1000
    student, teacher = (
        leaf(rows, vocab, backend=backend, dtype=torch.float16),
        leaf(rows, vocab, backend=backend).detach(),
    )
    loss = fused_kl(student, teacher, normalizer=8000 * 150, backend=backend)
    (loss * 2.0**16).backward()
    want = truth(student.detach(), teacher, "kl", reduction="mean", normalizer=8000 * 150)
    error = (student.grad.double() / 2.0**16 - want.gradient).norm() / want.gradient.norm()
    assert error < 5e-3


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_has_a_graph(backend, reduction):
    """The loss of ignored rows alone is 0 and has a graph.

    Other libraries returned NaN, or a loss without grad_fn, so that backward raised.
    """
    student, teacher = leaf(3, 20, backend=backend), leaf(3, 20, backend=backend).detach()
    mask = torch.zeros(3, dtype=torch.bool, device=student.device)
    loss = fused_kl(student, teacher, mask=mask, reduction=reduction, backend=backend)
    assert loss.requires_grad and not loss.any()
    loss.sum().backward()
    assert not student.grad.any()


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
@each_gradient
def test_second_derivative_raises(backend, gradient):
    """A second derivative raises; another library returned a gradient penalty with an error of 89 %."""
    student, teacher = leaf(3, 20, backend=backend), leaf(3, 20, backend=backend).detach()
    loss = fused_kl(student, teacher, gradient=gradient, backend=backend)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(loss, student, create_graph=True)


def test_identical_inputs_give_zero_not_the_teachers_entropy():
    """Identical inputs have KL 0; another library's forward KL was a cross-entropy, 1.6 for identical inputs."""
    logits = torch.randn(4, 30)
    assert fused_kl(logits, logits).abs() < 1e-6


def test_directions_are_gkds():
    """p is the teacher, beta weights KL(p, m), and m is beta p + (1 - beta) q; another library swapped p and q in m."""
    student, teacher = torch.randn(1, 9).double(), torch.randn(1, 9).double()
    p, q = teacher.softmax(-1), student.softmax(-1)
    kl = lambda a, b: (a * (a / b).log()).sum().item()  # noqa: E731
    m = 0.1 * p + 0.9 * q
    value = lambda d: fused_divergence(student, teacher, d).item()  # noqa: E731
    assert value("kl") == pytest.approx(kl(p, q))
    assert value("kl") == pytest.approx(F.kl_div(q.log(), p, reduction="sum").item())
    assert value("reverse_kl") == pytest.approx(kl(q, p))
    assert value(Divergence("js", beta=0.1)) == pytest.approx(0.1 * kl(p, m) + 0.9 * kl(q, m))
    assert value(Divergence("mixed_kl", weight=0.1)) == pytest.approx(0.1 * kl(p, q) + 0.9 * kl(q, p))
    assert value(Divergence("skew_kl", alpha=0.1)) == pytest.approx(kl(p, m))
    assert value(Divergence("skew_reverse_kl", alpha=0.1)) == pytest.approx(kl(q, 0.9 * p + 0.1 * q))
    assert value("tv") == pytest.approx(0.5 * (p - q).abs().sum().item())
    assert value("hellinger") == pytest.approx(0.5 * (p.sqrt() - q.sqrt()).square().sum().item())
    assert value(Divergence("alpha", alpha=0.3)) == pytest.approx(
        ((p**0.3 * q**0.7).sum().item() - 1) / (0.3 * (0.3 - 1))
    )
    assert Divergence.gkd(0) == Divergence("kl") and Divergence.gkd(1) == Divergence("reverse_kl")
    assert Divergence.gkd(0.3) == Divergence("js", beta=0.3)


def test_temperature_divides_both_sides_and_is_squared_only_when_asked():
    student, teacher = torch.randn(3, 40).double(), torch.randn(3, 40).double()
    plain = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1), log_target=True, reduction="none")
    assert fused_kl(student, teacher, temperature=3.0).item() == pytest.approx(plain.sum(-1).mean().item())
    squared = fused_kl(student, teacher, temperature=3.0, temperature_squared=True)
    assert squared.item() == pytest.approx(9 * plain.sum(-1).mean().item())


def test_pure_distillation_by_default():
    """Labels alone drop ignored rows and add no term; another library added half a cross-entropy."""
    student, teacher = torch.randn(3, 40), torch.randn(3, 40)
    labels = torch.tensor([3, 4, 5])
    assert torch.equal(fused_kl(student, teacher, labels=labels), fused_kl(student, teacher))
