"""Rows whose divergence is small, because the distributions are close or the temperature is high, keep their digits.

The truth is found in numpy's widest floats, from log-ratios: sums of rounded log-probabilities would not do.
"""

from contextlib import nullcontext
from dataclasses import replace

import chips
import numpy as np
import pytest
import torch
from truth import BACKENDS, DIVERGENCES, assert_gradient_close, assert_loss_close, device_of, run, truth

from kdkernels import CATALOGUE, Divergence, LinearLogits, SparseLogProbs, fused_divergence
from kdkernels.backends.reference import table as reference
from kdkernels.families.rows import CLOSE_TEMPERATURE

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
WIDE = np.longdouble
BOUND = 3e-6  # of the loss, and of the largest element of a row's gradient


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def true_row(divergence: Divergence, student: np.ndarray, teacher: np.ndarray, temperature: float):
    """The divergence of one row and its gradient by the student's logits; the log-ratio of each class."""
    lq, lp = (log_softmax(WIDE(x) / WIDE(temperature)) for x in (student, teacher))
    value, slope = true_terms(divergence, lp, lq)
    return value.sum(), (slope - np.exp(lq) * slope.sum()) / WIDE(temperature), lq - lp


def true_terms(divergence: Divergence, lp: np.ndarray, lq: np.ndarray):
    """phi and psi of each class, with the table's slack."""
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
    return value, slope


def true_sparse_row(divergence: Divergence, student: np.ndarray, teacher: SparseLogProbs, temperature: float):
    """The divergence of one row against its entries, its gradient, the size of the loss, the log-ratio of each class
    (of the others: the bucket's), and the student's mass of a bucket without teacher mass.

    The size is the loss, but under "truncate", whose terms have both signs, it is at least the sum of their sizes.
    """
    entries = teacher.indices[0].tolist()
    lp, tail = WIDE(teacher.log_probs[0].double().numpy()), teacher.tail
    lq = log_softmax(WIDE(student) / WIDE(temperature))
    others = np.ones(len(student), bool)
    others[entries] = False
    of_entries, of_others = lq[entries], np.exp(lq[others]).sum()
    if tail in ("support", "renormalize"):
        lp = log_softmax(lp * WIDE(teacher.source_temperature) / WIDE(temperature))
    if tail == "support":
        of_entries, of_others = log_softmax(of_entries), WIDE(0)
    value, slope = true_terms(divergence, lp, of_entries)
    if tail == "bucket":
        given = teacher.tail_log_prob
        lp_rest = np.log1p(-np.exp(lp).sum()) if given is None else WIDE(given[0].item())
        rest, rest_slope = true_terms(divergence, lp_rest, np.log(of_others))
    else:  # phi is a number times q in a class without teacher mass, and so is psi
        lp_rest = WIDE(-np.inf)
        rest = rest_slope = of_others * WIDE(without_teacher(divergence)) if tail != "support" else WIDE(0)
    loss = size = value.sum() + rest
    if tail == "truncate":
        loss += WIDE(CATALOGUE[divergence.name].slack(divergence.parameter)) * (np.exp(lp).sum() - 1)
        size = max(abs(loss), (np.exp(lp) * abs(of_entries - lp)).sum())
    total, gradient, d = slope.sum() + rest_slope, np.zeros(len(student), WIDE), np.zeros(len(student), WIDE)
    gradient[entries], d[entries] = slope - np.exp(of_entries) * total, of_entries - lp
    if tail != "support":
        gradient[others] = (rest_slope - of_others * total) * np.exp(lq[others]) / of_others
        d[others] = np.log(of_others) - lp_rest
    return loss, gradient / WIDE(temperature), size, d, float(of_others) if tail in ("renormalize", "truncate") else 0.0


def without_teacher(divergence: Divergence) -> float:
    """phi / q of a class without teacher mass, where it is finite."""
    a = divergence.parameter
    match divergence.name:
        case "js":
            return -(1 - a) * np.log1p(-WIDE(a))
        case "skew_kl":
            return 1 - WIDE(a)
        case "skew_reverse_kl":
            return -np.log(WIDE(a)) - (1 - WIDE(a))
        case "tv" | "hellinger":
            return 0.5
        case "alpha":
            return 1 / WIDE(a)
    return 1.0


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


# ---- sparse teachers

TAILS = ["bucket", "the rest as bucket", "support", "renormalize", "truncate"]
# The sizes of the logits' differences for each temperature.
SPARSE_CASES = {1: (1.0, 0.2, 0.03, 1e-3, 4e-4), 16: (3,), 1e3: (3,), 1e5: (3,)}


def sparse_rows(noises, temperature: float, vocab: int, entries: int, tail: str, seed: int):
    """A student and a teacher's entries, half of them the largest: a row for each noise."""
    student, teacher, _ = rows([(temperature, noise, 0) for noise in noises], vocab, seed)
    log_probs = (teacher.double() / temperature).log_softmax(-1)
    largest = log_probs.topk(entries // 2).indices
    free = torch.rand(log_probs.shape, generator=torch.Generator().manual_seed(seed)).scatter(-1, largest, -1)
    indices = torch.cat([largest, free.topk(entries - entries // 2).indices], -1)
    rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1).float()
    return student, SparseLogProbs(
        indices, log_probs.gather(-1, indices).float(), tail=tail.removeprefix("the rest as "),
        tail_log_prob=rest if tail == "bucket" else None, source_temperature=float(temperature),
    )  # fmt: skip


def row_of(teacher: SparseLogProbs, row: int) -> SparseLogProbs:
    tail = teacher.tail_log_prob
    return replace(
        teacher, indices=teacher.indices[row : row + 1], log_probs=teacher.log_probs[row : row + 1],
        tail_log_prob=None if tail is None else tail[row : row + 1],
    )  # fmt: skip


def to_device(teacher: SparseLogProbs, device: str) -> SparseLogProbs:
    tail = teacher.tail_log_prob
    return replace(
        teacher, indices=teacher.indices.to(device), log_probs=teacher.log_probs.to(device),
        tail_log_prob=None if tail is None else tail.to(device),
    )  # fmt: skip


def check_sparse(student, teacher: SparseLogProbs, divergence: Divergence, temperature: float, loss, gradient, what=""):
    bound = CATALOGUE[divergence.name].close_below
    for row in range(student.shape[0]):
        want, slopes, size, d, without_mass = true_sparse_row(
            divergence, student[row].double().numpy(), row_of(teacher, row), temperature
        )
        where = f"{what} {divergence}, {teacher.tail}, T = {temperature:g}, divergence {float(want):.2e}"
        small = want < bound or temperature >= CLOSE_TEMPERATURE
        # Below CLOSE_TEMPERATURE the offset of "truncate" is rounded by itself. A class without teacher mass has the
        # lines for all rows: 4 units in the last place of the log-sum-exp, times the mass of the class.
        offset = teacher.tail == "truncate" and CATALOGUE[divergence.name].slack(divergence.parameter) != 0
        unit = 2.0**-23 * max(1, abs(student[row].double() / temperature).max().item())
        rounded = 4 * unit * without_mass
        if offset and temperature < CLOSE_TEMPERATURE:
            rounded += 4 * 2.0**-23
        error = abs(WIDE(loss[row].item()) - want)
        allowed = (BOUND if small else 2 * BOUND) * size + rounded
        assert error <= allowed, f"{where}: the loss is {float(error / size):.1e} of itself off"
        errors = abs(gradient[row].double().cpu().numpy() - slopes) / abs(slopes).max()
        if divergence.name == "tv":  # whose slope has a jump where p = q
            errors[abs(d) < (5e-6 if not small else 1e-5 * np.sqrt((d[np.isfinite(d)] ** 2).mean()))] = 0
        allowed = (BOUND if small else 4 * BOUND) + 4 * unit * without_mass / (temperature * abs(slopes).max())
        assert errors.max() <= allowed, f"{where}: the gradient is {errors.max():.1e} off"


def sparse_calls(divergence: Divergence, backend: str):
    """(tail, temperature, noises); few of them for a backend that is slow without a GPU."""
    tails = TAILS[:3] if divergence.is_infinite_without_teacher else TAILS
    if backend in ("cpu", "reference") or device_of(backend) != "cpu":
        return [(tail, temperature, noises) for tail in tails for temperature, noises in SPARSE_CASES.items()]
    number = DIVERGENCES.index(divergence)
    calls = [("bucket", 1, (0.03, 1e-3)), (tails[1 + number % (len(tails) - 1)], [16, 1e3, 1e5][number % 3], (3,))]
    return calls if backend == "cuda" else [calls[number % 2]]


@each_divergence
@each_backend
def test_small_divergences_from_sparse_teachers_keep_their_digits(divergence, backend):
    """KL from 1 to 1e-7 at T = 1, and temperatures up to 1e5, for the tails that have kernels of their own."""
    vocab, entries = {"cpu": (2000, 40), "reference": (500, 30)}.get(backend, (150, 12))
    # These seeds give no row in which rounding decides the sign of a slope of tv.
    for seed, (tail, temperature, noises) in enumerate(sparse_calls(divergence, backend), start=40):
        student, teacher = sparse_rows(noises, temperature, vocab, entries, tail, seed)
        with on_small_chips(backend, seed):
            got = run(
                student.to(device_of(backend)), to_device(teacher, device_of(backend)), divergence,
                temperature=float(temperature), backend=backend, gradient=["forward", "backward"][seed % 2],
            )  # fmt: skip
        check_sparse(student, teacher, divergence, temperature, got.loss, got.gradient, backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("divergence", [x for x in DIVERGENCES if x.name in ("kl", "reverse_kl", "js")], ids=repr)
def test_divergences_of_1e_13_from_sparse_teachers_keep_their_digits(divergence, backend):
    """The sums of exponentials must be right to 1e-15: the log-ratios of most classes are about 1e-7."""
    student, teacher = sparse_rows((1e-6, 3e-7), 1, 1000, 40, "bucket", 0)
    got = run(student, teacher, divergence, backend=backend)
    check_sparse(student, teacher, divergence, 1, got.loss, got.gradient, backend)


@pytest.mark.parametrize("temperature", [1, 1000])
@each_backend
def test_a_sparse_teacher_whose_mass_is_not_1_keeps_its_digits(temperature, backend):
    """As one that was stored in 16 bits. No sum over the classes shows the rounding of the student's log-sum then."""
    student, teacher = sparse_rows((0.01,), temperature, 150, 12, "bucket", seed=7)
    teacher = replace(teacher, log_probs=teacher.log_probs.half(), tail_log_prob=teacher.tail_log_prob.half())
    for divergence in map(Divergence, ("kl",) if backend == "triton" else ("kl", "js", "tv")):
        with on_small_chips(backend, temperature):
            got = run(student.to(device_of(backend)), to_device(teacher, device_of(backend)), divergence,
                      temperature=float(temperature), backend=backend)  # fmt: skip
        check_sparse(student, teacher, divergence, temperature, got.loss, got.gradient, backend)


@each_backend
def test_rows_of_other_temperatures_than_the_sparse_teacher_s_keep_their_digits(backend):
    """Log-probabilities that the loss tempers and renormalises itself are not rounded for the close lines."""
    student, teacher = sparse_rows((0.01, 3), 1, 150, 12, "support", seed=8)
    temperatures = torch.tensor([3.0, 1e4])
    for tail in ("support",) if backend == "triton" else ("support", "renormalize"):
        with on_small_chips(backend, 8):
            got = run(student.to(device_of(backend)), to_device(replace(teacher, tail=tail), device_of(backend)), "kl",
                      temperature=temperatures.to(device_of(backend)), backend=backend)  # fmt: skip
        for row, temperature in enumerate(temperatures.tolist()):
            one = row_of(replace(teacher, tail=tail), row)
            some = slice(row, row + 1)
            check_sparse(student[some], one, Divergence("kl"), temperature, got.loss[some], got.gradient[some], backend)


@each_backend
def test_infinite_logits_of_close_rows_against_entries(backend):
    """At a high temperature: infinities, NaN, absent entries and a bucket without mass have the usual results."""
    vocab, device, T = 100, device_of(backend), 20.0
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, vocab, generator=generator)
    log_probs, indices = (torch.randn(7, vocab, generator=generator) / T).log_softmax(-1).topk(90)
    tail = (1 - log_probs.double().exp().sum(-1)).log().float()
    student[0, indices[0, :3]] = -torch.inf
    student[1].scatter_(0, torch.tensor([x for x in range(vocab) if x not in indices[1]]), -torch.inf)
    student[2, 50], student[3, :] = torch.nan, -torch.inf
    log_probs[4, 2:], tail[4] = -torch.inf, torch.log1p(-log_probs[4, :2].exp().sum())
    log_probs[5], tail[5] = log_probs[5].log_softmax(-1), -torch.inf
    log_probs[6], tail[6] = -torch.inf, 0.0
    calls = [(name, kind) for name in ("kl", "js", "tv", "alpha") for kind in ("bucket", "support", "truncate")]
    if backend == "triton" and device == "cpu":  # its interpreter is slow
        calls = [("kl", "bucket")]
    for name, kind in calls:
        divergence = Divergence(name)
        teacher = SparseLogProbs(
            indices, log_probs, tail=kind, tail_log_prob=tail if kind == "bucket" else None, source_temperature=T
        )
        wide = replace(teacher, log_probs=log_probs.double(), tail_log_prob=tail.double() if kind == "bucket" else None)
        with on_small_chips(backend, 0):
            got = run(student.to(device), to_device(teacher, device), divergence, temperature=T, backend=backend)
        want = run(student.double(), wide, divergence, temperature=T, backend="reference")
        assert_loss_close(got.loss, want.loss, 3e-6 * want.loss.abs() + 1e-7, f"{divergence}, {kind}")
        largest = want.gradient.nan_to_num(0).abs().amax(-1)
        assert_gradient_close(got.gradient, want.gradient, 3e-6 * largest, f"{divergence}, {kind}")


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@each_backend
def test_heads_keep_the_digits_of_small_divergences_from_entries(gradient, backend):
    """Also where the gradient overwrites the logits that a head's chunk holds."""
    student, teacher = sparse_rows((1e-3, 1.0), 1, 130, 12, "bucket", seed=2)
    weight = student.T.contiguous().to(device_of(backend)).requires_grad_()
    one = torch.eye(2, device=weight.device)  # the products with it are exact
    with on_small_chips(backend, 1):
        loss = fused_divergence(
            LinearLogits(one, weight), to_device(teacher, device_of(backend)), backend=backend, gradient=gradient,
            reduction="none" if gradient == "backward" else "sum", statistics=("divergence",),
        )  # fmt: skip
        (found,) = torch.autograd.grad(loss.loss.sum(), weight)
    check_sparse(student, teacher, Divergence("kl"), 1, loss.statistics["divergence"], found.T, backend)


@pytest.mark.parametrize("tail", ["bucket", "support"])
def test_close_rows_against_entries_do_not_depend_on_the_number_of_threads(tail):
    student, teacher = sparse_rows((1e-3, 1.0), 1, 70_001, 40, tail, seed=3)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(student, teacher, "kl", backend="cpu", gradient="forward"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x.loss, found[0].loss) and torch.equal(x.gradient, found[0].gradient) for x in found[1:])


def test_every_divergence_has_close_lines_or_says_that_it_has_none():
    triton_table = pytest.importorskip("kdkernels.backends.triton.table")
    with_lines = [name for name, entry in CATALOGUE.items() if entry.close_below]
    assert list(reference.CLOSE_TABLE) == list(triton_table.CLOSE_TABLE) == with_lines
