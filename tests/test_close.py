"""Rows whose divergence is small, because the distributions are close or the temperature is high, keep their digits.

The truth is found in numpy's widest floats, from log-ratios: sums of rounded log-probabilities would not do.
"""

from contextlib import nullcontext

import chips
import numpy as np
import pytest
import torch
from truth import BACKENDS, DIVERGENCES, assert_gradient_close, assert_loss_close, device_of, run, truth

from kdkernels import CATALOGUE, Divergence, LinearLogits, fused_divergence
from kdkernels.backends.reference import table as reference
from kdkernels.families.rows import CLOSE_TEMPERATURE

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
WIDE = np.longdouble
BOUND = 3e-6  # of the loss, and of the largest element of a row's gradient


def true_row(divergence: Divergence, student: np.ndarray, teacher: np.ndarray, temperature: float):
    """The divergence of one row and its gradient by the student's logits; the log-ratio of each class."""
    lq, lp = (WIDE(x) / WIDE(temperature) for x in (student, teacher))
    lq, lp = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (lq, lp))
    p, q, d = np.exp(lp), np.exp(lq), lq - lp
    a = None if divergence.parameter is None else WIDE(divergence.parameter)
    e, up, down = np.expm1, np.expm1(d), np.expm1(-d)
    match divergence.name:
        case "kl":
            value, slope = p * (up - d), p * up
        case "reverse_kl":
            value, slope = q * (down + d), q * d
        case "mixed_kl":
            value, slope = a * p * (up - d) + (1 - a) * q * (down + d), a * p * up + (1 - a) * q * d
        case "js":
            of_teacher, of_student = np.log1p((1 - a) * up), np.log1p(a * down)  # log(m / p), log(m / q)
            value = a * p * (e(of_teacher) - of_teacher) + (1 - a) * q * (e(of_student) - of_student)
            slope = (a - 1) * q * of_student
        case "skew_kl":
            of_teacher = np.log1p((1 - a) * up)
            value, slope = p * (e(of_teacher) - of_teacher), (a - 1) * q * e(-of_teacher)
        case "skew_reverse_kl":
            of_student = np.log1p((1 - a) * down)
            value, slope = q * (e(of_student) - of_student), -q * (of_student + a * e(-of_student))
        case "tv":
            value, slope = abs(p * up) / 2, q * np.sign(d) / 2
        case "hellinger":
            value, slope = p * e(d / 2) ** 2 / 2, -q * e(-d / 2) / 2
        case "alpha":
            power = e((1 - a) * d)
            value, slope = p * (power - (1 - a) * up) / (a * (a - 1)), p * (up - power) / a
        case "chi_square":
            value, slope = q * down**2, -q * e(-2 * d)
    return value.sum(), (slope - q * slope.sum()) / WIDE(temperature), d


# (temperature, the size of the logits' differences, a common offset of the teacher's logits)
CASES = [(1, 0.2, 0), (1, 0.03, 200), (1, 1e-3, 0), (1, 4e-4, -30), (2, 0.3, 0), (16, 3, 0), (100, 3, 50), (1e3, 3, 0),
         (1e4, 3, 0), (1e5, 3, 0), (1, 1.0, 0)]  # fmt: skip


def rows(cases, vocab: int, seed: int, dtype=torch.float32):
    """A student, a teacher and temperatures: a row for each case."""
    generator = torch.Generator().manual_seed(seed)
    temperature, noise, offset = (torch.tensor(x, dtype=torch.float64)[:, None] for x in zip(*cases, strict=True))
    student = 3 * torch.randn(len(cases), vocab, generator=generator, dtype=torch.float64)
    student[:, 0] += 6
    student = student.to(dtype)
    teacher = student + noise * torch.randn(len(cases), vocab, generator=generator, dtype=torch.float64) + offset
    return student, teacher.to(dtype), temperature[:, 0].float()


def check(student, teacher, temperature, divergence, loss, gradient, factor=1.0):
    """Each row's loss and gradient, without T² and times `factor`, against the truth."""
    for row in range(student.shape[0]):
        s, t = (x[row].double().cpu().numpy() for x in (student, teacher))
        tau = float(temperature[row])
        value, slopes, d = true_row(divergence, s, t, tau)
        small = value < CATALOGUE[divergence.name].close_below or tau >= CLOSE_TEMPERATURE
        where = f"{divergence}, T = {tau:g}, divergence {float(value):.2e}"
        error = abs(WIDE(loss[row].item()) - value * factor) / (value * factor)
        assert error <= (BOUND if small else 2 * BOUND), f"{where}: the loss is {float(error):.1e} of itself off"
        if gradient is None:
            continue
        errors = abs(gradient[row].double().cpu().numpy() - slopes * factor) / (abs(slopes).max() * factor)
        if divergence.name == "tv":  # whose slope has a jump where p = q
            errors[abs(d) < (2e-6 if not small else 1e-5 * np.sqrt((d**2).mean()))] = 0
        error = errors.max()
        assert error <= (BOUND if small else 4 * BOUND), f"{where}: the gradient is {float(error):.1e} off"


def on_small_chips(backend: str, seed: int):
    return chips.on_any(seed) if backend == "cuda" and device_of(backend) == "cpu" else nullcontext()


@each_divergence
@each_backend
def test_small_divergences_keep_their_digits(divergence, backend):
    """KL from 1 to 1e-7 at T = 1, and temperatures up to 1e5: losses and gradients, found at once and in backward."""
    vocab = {"triton": 130, "cuda": 900}.get(backend, 5000)
    cases = CASES[1::2] if backend == "triton" and device_of(backend) == "cpu" else CASES  # its interpreter is slow
    student, teacher, temperature = (x.to(device_of(backend)) for x in rows(cases, vocab, seed=1))
    for seed, gradient in enumerate(("forward", "backward")):
        with on_small_chips(backend, seed):
            got = run(student, teacher, divergence, temperature=temperature, backend=backend, gradient=gradient)
        check(student, teacher, temperature, divergence, got.loss, got.gradient)


@pytest.mark.parametrize("alpha", [1e-3, -1e-3, 0.999])
@each_backend
def test_alpha_near_its_limits_keeps_its_digits(alpha, backend):
    """Where two terms of one size cancel, in one of two forms of the value."""
    student, teacher, temperature = (x.to(device_of(backend)) for x in rows([(1, 0.03, 0), (16, 3, 0)], 130, seed=4))
    divergence = Divergence("alpha", alpha=alpha)
    for seed, gradient in enumerate(("forward", "backward")):
        with on_small_chips(backend, seed):
            got = run(student, teacher, divergence, temperature=temperature, backend=backend, gradient=gradient)
        check(student, teacher, temperature, divergence, got.loss, got.gradient)


@pytest.mark.parametrize("alpha", [-60.0, 60.0])
@each_backend
def test_a_power_that_overflows_is_found_in_log_space(alpha, backend):
    """A class of nearly no mass, whose log-ratio is small but not 1 / alpha of it."""
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(1, 130, generator=generator)
    teacher = student + 0.01 * torch.randn(1, 130, generator=generator)
    student[0, 7], teacher[0, 7] = -300.0, -300.0 - 1.9 * (1 if alpha < 0 else -1)
    student, teacher = student.to(device_of(backend)), teacher.to(device_of(backend))
    divergence = Divergence("alpha", alpha=alpha)
    want = truth(student, teacher, divergence)
    allowed = BOUND + abs(alpha) * 2.0**-22  # the power magnifies the rounding of the two log-sums
    for seed, gradient in enumerate(("forward", "backward")):
        with on_small_chips(backend, seed):
            got = run(student, teacher, divergence, backend=backend, gradient=gradient)
        torch.testing.assert_close(got.loss.double(), want.loss, rtol=allowed, atol=0)
        largest = want.gradient.abs().max().item()
        torch.testing.assert_close(got.gradient.double(), want.gradient, rtol=0, atol=allowed * largest)


@each_divergence
@each_backend
def test_infinite_logits_of_close_rows(divergence, backend):
    """At a high temperature: infinities, NaN and classes without mass have the results that they have at others."""
    vocab, device = 100, device_of(backend)
    student, teacher = (torch.randn(5, vocab, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    student[0, 3:7], teacher[0, 3:7] = -torch.inf, -torch.inf
    teacher[1, 2], student[2, 4], teacher[3, 5] = -torch.inf, -torch.inf, torch.nan
    student, teacher = student.to(device), teacher.to(device)
    for gradient in ("forward", "backward"):
        with on_small_chips(backend, 0):
            got = run(student, teacher, divergence, temperature=20.0, backend=backend, gradient=gradient)
        want = truth(student, teacher, divergence, temperature=20.0)
        # A class whose log-ratio is infinite has the lines for all rows.
        of_infinite = torch.tensor([0, 1e-8, 1e-8, 0, 0], device=device)
        assert_loss_close(got.loss, want.loss, 3e-6 * want.loss.abs() + of_infinite, divergence)
        largest = want.gradient.nan_to_num(0).abs().amax(-1)
        assert_gradient_close(got.gradient, want.gradient, 3e-6 * largest, divergence)


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@each_backend
def test_heads_keep_the_digits_of_small_divergences(gradient, backend):
    """Also where the gradient overwrites the logits that a head's chunk holds."""
    cases = [(1, 1e-3, 0), (1, 0.03, 0), (100, 3, 0), (1, 1.0, 0)]
    student, teacher, temperature = (x.to(device_of(backend)) for x in rows(cases, 130, seed=2))
    # The products with the identity are exact.
    weight, one = student.T.contiguous().requires_grad_(), torch.eye(len(cases), device=student.device)
    for divergence in map(Divergence, ("kl", "reverse_kl", "js")):
        with on_small_chips(backend, 1):
            loss = fused_divergence(
                LinearLogits(one, weight), teacher, divergence, temperature=temperature, backend=backend,
                gradient=gradient, reduction="none" if gradient == "backward" else "sum",
            )  # fmt: skip
            (found,) = torch.autograd.grad(loss.sum(), weight)
        if gradient == "forward":
            loss = run(student, teacher, divergence, temperature=temperature, backend=backend).loss
        check(student, teacher, temperature, divergence, loss, found.T)


@pytest.mark.parametrize("divergence", ["kl", "tv"])
def test_close_rows_do_not_depend_on_the_number_of_threads(divergence):
    student, teacher, temperature = rows([(1, 1e-3, 0), (50, 3, 0), (1, 1.0, 0)], 70_001, seed=3)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(student, teacher, divergence, temperature=temperature, backend="cpu", gradient="forward"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x.loss, found[0].loss) and torch.equal(x.gradient, found[0].gradient) for x in found[1:])


def test_every_divergence_has_close_lines_or_says_that_it_has_none():
    triton_table = pytest.importorskip("kdkernels.backends.triton.table")
    with_lines = [name for name, entry in CATALOGUE.items() if entry.close_below]
    assert list(reference.CLOSE_TABLE) == list(triton_table.CLOSE_TABLE) == with_lines
