"""Edge cases of a row: infinities, NaN, one class, equal and saturated distributions, offsets, strides past 2^31."""

import math

import pytest
import torch
from truth import BACKENDS, DIVERGENCES, assert_gradient_close, assert_loss_close, device_of, rounding, run, truth

from kdkernels import CATALOGUE, Divergence, fused_divergence, topk_log_probs

INF = math.inf
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
each_gradient = pytest.mark.parametrize("gradient", ["forward", "backward"])


def check(student, teacher, divergence, backend, **options):
    student, teacher = student.to(device_of(backend)), teacher.to(device_of(backend))
    got = run(student, teacher, divergence, backend=backend, **options)
    want = truth(student, teacher, divergence, **options)
    ulps = rounding(student, teacher, options.get("temperature", 1.0))
    assert_loss_close(got.loss, want.loss, 1e-6 * want.loss.abs() + ulps * (1 + want.loss.abs()), divergence)
    assert_gradient_close(got.gradient, want.gradient, ulps * (1 + want.loss.abs().nan_to_num(0, 0)), divergence)
    return got


@each_divergence
@each_backend
@each_gradient
def test_class_that_is_minus_infinity_on_both_sides_contributes_nothing(divergence, backend, gradient):
    student, teacher = torch.randn(3, 300), torch.randn(3, 300)
    without = run(student[:, 10:].contiguous(), teacher[:, 10:].contiguous(), divergence, backend="reference")
    student[:, :10], teacher[:, :10] = -INF, -INF
    got = check(student, teacher, divergence, backend, gradient=gradient)
    torch.testing.assert_close(got.loss.cpu(), without.loss, rtol=1e-4, atol=1e-6)
    assert not got.gradient[:, :10].any()


@each_backend
@each_gradient
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_a_row_scale_that_is_not_finite_stays_in_its_row(backend, gradient, value):
    """A non-finite row_weight or grad_output changes no other row, with and without labels.

    A normalizer of 0 in a tensor makes loss and gradients non-finite.
    """
    device = device_of(backend)
    student, teacher = torch.randn(3, 50, device=device), torch.randn(3, 50, device=device)
    bad = torch.tensor([1.0, value, 1.0], device=device)
    labels = {"labels": torch.tensor([1, 2, 3], device=device), "hard_weight": 0.5}
    for more in ({}, labels):
        options = {"gradient": gradient, "backend": backend, **more}
        want = run(student, teacher, "js", **options)
        for got in (
            run(student, teacher, "js", row_weight=bad, **options),
            run(student, teacher, "js", grad_output=bad, **options),
        ):
            torch.testing.assert_close(got.gradient[[0, 2]], want.gradient[[0, 2]])
            assert not got.gradient[1].isfinite().any()
        whole = run(student, teacher, "js", reduction="mean", normalizer=torch.zeros((), device=device), **options)
        assert not whole.loss.isfinite() and not whole.gradient.isfinite().any()


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
@pytest.mark.parametrize("sparse", [False, True], ids=["logits", "sparse"])
@each_gradient
@pytest.mark.parametrize("value", [INF, -INF])
def test_a_hard_weight_of_0_drops_the_label_term_of_an_infinite_row_scale(backend, sparse, gradient, value):
    """A hard weight of 0 drops the label term, since inf * 0 is NaN.

    The row has the same infinite gradient as without labels.
    """
    device = device_of(backend)
    student, teacher = torch.randn(3, 50, device=device), torch.randn(3, 50, device=device)
    if sparse:
        teacher = topk_log_probs(teacher, 7)
    weight = torch.tensor([1.0, value, 1.0], device=device)
    label_term = {
        "labels": torch.tensor([1, 2, 3], device=device),
        "hard_weight": torch.tensor([0.5, 0.0, 0.5], device=device),
    }
    found = []
    for options in ({}, label_term):
        leaf = student.clone().requires_grad_()
        options = {"row_weight": weight, "gradient": gradient, "backend": backend, "reduction": "none", **options}
        loss = fused_divergence(leaf, teacher, "js", **options)
        found.append((loss[1].detach(), torch.autograd.grad(loss.sum(), leaf)[0][1]))
    (loss_alone, gradient_alone), (loss, row) = found
    assert row.isinf().all() and torch.equal(row, gradient_alone)
    assert loss == loss_alone == value


@each_divergence
@each_backend
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_long_stretches_of_minus_infinity_at_a_low_maximum(divergence, backend, side):
    """Half of the vocabulary may be -inf while all other logits are far below 0."""
    vocab = 300 if backend == "triton" else 5000
    student, teacher = torch.randn(2, vocab) - 200, torch.randn(2, vocab) - 300
    for name, x in (("student", student), ("teacher", teacher)):
        if side in (name, "both"):
            x[:, vocab // 2 :] = -INF
    check(student, teacher, divergence, backend, temperature=0.5)


@each_divergence
@each_backend
@each_gradient
def test_teacher_without_mass_where_the_student_has_some(divergence, backend, gradient):
    """The loss is exact, or +inf with a NaN gradient for the row, as the docstring says; other rows are unchanged."""
    student, teacher = torch.randn(3, 300), torch.randn(3, 300)
    teacher[1, 5:20] = -INF
    got = check(student, teacher, divergence, backend, gradient=gradient)
    if divergence.is_infinite_without_teacher:
        assert got.loss[1] == INF and got.gradient[1].isnan().all()
    else:
        assert got.loss[1].isfinite() and got.gradient[1].isfinite().all()
    assert got.loss[[0, 2]].isfinite().all() and got.gradient[[0, 2]].isfinite().all()


@each_divergence
@each_backend
@each_gradient
def test_student_without_mass_where_the_teacher_has_some(divergence, backend, gradient):
    student, teacher = torch.randn(3, 300), torch.randn(3, 300)
    student[1, 5:20] = -INF
    got = check(student, teacher, divergence, backend, gradient=gradient)
    if divergence.is_infinite_without_student:
        gradient_is = torch.isnan if divergence.is_steep else torch.isfinite
        assert got.loss[1] == INF and gradient_is(got.gradient[1]).all()
    else:
        assert got.loss[1].isfinite() and got.gradient[1].isfinite().all()


@each_backend
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_mixed_kl_of_weight_0_or_1_is_one_term(backend, weight):
    """mixed_kl at weight 0 or 1 drops the term of weight 0, also an infinite one."""
    student, teacher = torch.randn(2, 100), torch.randn(2, 100)
    (teacher if weight == 1.0 else student)[:, 3] = -INF
    end = "kl" if weight == 1.0 else "reverse_kl"
    got = check(student, teacher, Divergence("mixed_kl", weight=weight), backend)
    torch.testing.assert_close(got.loss.cpu(), run(student, teacher, end, backend="reference").loss)
    assert got.gradient.isfinite().all()


@each_divergence
@each_backend
def test_rows_of_minus_infinity_but_one(divergence, backend):
    """Point masses: student and teacher on the same class (loss 0), and on two different classes."""
    student, teacher = torch.full((2, 300 if backend == "triton" else 5000), -INF), None
    teacher = student.clone()
    student[:, 7] = 1.0
    teacher[0, 7], teacher[1, 9] = -2.0, 3.0
    got = check(student, teacher, divergence, backend)
    assert got.loss[0].abs() < 1e-7 and got.gradient[0].abs().max() < 1e-7
    if divergence.name in ("tv", "hellinger"):
        assert got.loss[1].item() == pytest.approx(1.0)


@each_backend
@each_gradient
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("bad", ["7fc00000", "7fffffff", "ffffffff", "7f800001", "inf", "all -inf"])
@pytest.mark.parametrize("divergence", list(CATALOGUE))
def test_nan_stays_in_its_row(backend, gradient, where, bad, divergence):
    if backend == "triton" and (divergence not in ("kl", "js", "tv") or bad in ("7fffffff", "7f800001")):
        pytest.skip("Triton's interpreter is slow; the other cases cover every path")
    student, teacher = torch.randn(3, 70), torch.randn(3, 70)
    row = {"student": student, "teacher": teacher}[where][1]
    if bad == "inf":
        row[4] = INF
    elif bad == "all -inf":
        row[:] = -INF
    else:
        row[4] = torch.tensor(int(bad, 16), dtype=torch.uint32).view(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        device = device_of(backend)
        got = run(student.to(device, dtype), teacher.to(device), divergence, backend=backend, gradient=gradient)
        assert got.loss.isnan().tolist() == [False, True, False], dtype
        assert got.gradient[1].isnan().all() and not got.gradient[[0, 2]].isnan().any(), dtype


@each_backend
@pytest.mark.parametrize("bits", [0x7FC0, 0x7FFF, 0xFFFF, 0x7F81])
def test_every_nan_of_bf16_is_nan(backend, bits):
    student = torch.randn(2, 50).bfloat16()
    student[0, 3] = torch.tensor(bits, dtype=torch.uint16).view(torch.bfloat16)
    got = run(student.to(device_of(backend)), torch.randn(2, 50, device=device_of(backend)), "kl", backend=backend)
    assert got.loss.isnan().tolist() == [True, False] and got.gradient[0].isnan().all()


@each_divergence
@each_backend
def test_one_class(divergence, backend):
    got = check(torch.randn(4, 1), torch.randn(4, 1), divergence, backend)
    assert got.loss.abs().max() < 1e-7 and got.gradient.abs().max() < 1e-7


@each_divergence
@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_distributions_give_zero(divergence, backend, dtype):
    logits = (5 * torch.randn(3, 1000)).to(dtype)
    got = check(logits, logits, divergence, backend)
    assert got.loss.abs().max() < 1e-6 and got.gradient.abs().max() < 1e-6


@each_backend
@pytest.mark.parametrize("alpha", [-0.5, 0.001, 0.4, 0.5, 0.999, 1.5])
def test_identical_distributions_in_alpha(backend, alpha):
    """Equal distributions have a loss within a probability's rounding over |alpha (alpha - 1)|.

    Each term is a difference divided by alpha (alpha - 1), which magnifies its rounding. A fused multiply-subtract
    leaves the rounding of one probability.
    """
    logits = (5 * torch.randn(3, 1000)).to(device_of(backend))
    got = run(logits, logits, Divergence("alpha", alpha=alpha), backend=backend)
    # The reference rounds p**alpha q**(1 - alpha).
    allowed = (1e-6 if backend == "reference" else 1e-8) / abs(alpha * (alpha - 1))
    assert got.loss.abs().max() < allowed and got.gradient.abs().max() < allowed


@each_divergence
@each_backend
@each_gradient
@pytest.mark.parametrize("side", ["both", "teacher"])
def test_classes_masked_with_the_smallest_number(divergence, backend, gradient, side):
    """A mask of finfo.min acts as -inf, although its product with a scale overflows."""
    if side == "teacher" and divergence.is_infinite_without_teacher:
        pytest.skip("the loss is as large as the mask")
    student, teacher = torch.randn(2, 300), torch.randn(2, 300)
    teacher[:, 5:90] = torch.finfo(torch.float32).min
    if side == "both":
        student[:, 5:90] = torch.finfo(torch.float32).min
    if side == "both" and divergence.is_steep:
        pytest.skip("a term is 0 * inf")
    student, teacher = student.to(device_of(backend)), teacher.to(device_of(backend))
    got = run(student, teacher, divergence, backend=backend, gradient=gradient)
    want = truth(student, teacher, divergence)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.gradient.double(), want.gradient, rtol=1e-4, atol=1e-5)


@each_backend
@each_gradient
@pytest.mark.parametrize("divergence", [Divergence("reverse_kl"), Divergence("mixed_kl", weight=0.3)], ids=repr)
def test_an_infinite_loss_and_its_gradient_agree(backend, gradient, divergence):
    """An infinite loss has a NaN gradient, and a finite loss a finite gradient.

    The student's probability of the class that the teacher excludes underflows in fp32.
    """
    student, teacher = torch.zeros(1, 64), torch.zeros(1, 64)
    student[0, :8], student[0, 3], teacher[0, 3] = -30, -100, -INF
    student, teacher = student.to(device_of(backend)), teacher.to(device_of(backend))
    got = run(student, teacher, divergence, backend=backend, gradient=gradient)
    assert got.loss.isinf().item() == got.gradient.isnan().all().item()
    assert got.loss.isfinite().item() == got.gradient.isfinite().all().item()


@each_backend
@pytest.mark.parametrize("row", [-INF, math.nan])
def test_top1_of_a_row_that_has_none(backend, row):
    """A row without a largest logit has top-1 class 0, at any offset from 16-byte alignment."""
    student = torch.randn(3, 48, device=device_of(backend))[:, 3:45]
    student[1] = row
    names = ("student_top1", "teacher_top1")
    got = run(student, torch.randn(3, 48, device=device_of(backend))[:, 3:45], "kl", backend=backend, statistics=names)
    assert got.statistics["student_top1"][1] == 0
    assert ((got.statistics["teacher_top1"] >= 0) & (got.statistics["teacher_top1"] < 42)).all()


@each_divergence
@each_backend
def test_saturated_logits(divergence, backend):
    if divergence.is_steep:
        pytest.skip("e^160 overflows fp32, as the docstring says")
    sign = torch.where(torch.rand(4, 500) < 0.5, -80.0, 80.0)
    check(sign, sign.roll(1, -1), divergence, backend)
    one_hot = torch.full((2, 500), -80.0)
    other = one_hot.clone()
    one_hot[:, 3], other[:, 4] = 80.0, 80.0
    check(one_hot, other, divergence, backend)


@each_divergence
@each_backend
def test_common_offset_changes_nothing(divergence, backend):
    """A large lse costs no digits. fp32 holds the logits exactly at both offsets."""
    student, teacher = torch.randint(-64, 64, (2, 3, 400)).float() / 16
    device = device_of(backend)
    here = run(student.to(device), teacher.to(device), divergence, backend=backend)
    far = run((student + 4096).to(device), (teacher - 8192).to(device), divergence, backend=backend)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if backend != "reference" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(far.loss, here.loss, **tolerance)
    torch.testing.assert_close(far.gradient, here.gradient, **tolerance)


@each_divergence
def test_close_distributions_keep_their_digits(divergence):
    """A divergence of 1e-5 at V = 262,144 keeps its digits, summed term by term; an lse's rounding is 10 % of it."""
    torch.manual_seed(0)
    student = torch.randn(1, 262_144)
    teacher = student + 0.005 * torch.randn(1, 262_144)
    got = run(student, teacher, divergence, backend="cpu")
    want = truth(student, teacher, divergence)
    absolute = 1e-8 * divergence.magnification
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=2e-3, abs=absolute)


def test_kl_is_closer_than_eager_near_equality():
    torch.manual_seed(0)
    student = torch.randn(1, 262_144)
    teacher = student + 0.01 * torch.randn(1, 262_144)
    want = truth(student, teacher, "kl").loss.item()
    eager = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
    ).item()
    got = run(student, teacher, "kl", backend="cpu").loss.item()
    assert abs(got - want) < 0.02 * abs(eager - want)


@each_divergence
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_offsets_past_two_to_the_31(divergence, backend):
    """Rows may lie further apart than int32 counts. The storage is strided; only its rows are touched."""
    stride, device = 2**31 + 64, device_of(backend)
    torch.use_deterministic_algorithms(False)  # do not fill the storage
    try:
        storage = torch.empty(stride + 4096, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("4 GiB cannot be allocated")
    rows = storage.as_strided((2, 1000), (stride, 1))
    values, teacher = torch.randn(2, 1000).bfloat16().to(device), torch.randn(2, 1000, device=device)
    rows.copy_(values)
    got = run(rows, teacher, divergence, backend=backend)
    want = run(values, teacher, divergence, backend=backend)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.gradient, want.gradient)


@each_backend
def test_label_term_ignores_the_temperature_and_the_divergence(backend):
    """hard_weight=1 gives cross-entropy at temperature 1 and its gradient, for any teacher."""
    device = device_of(backend)
    student, teacher = torch.randn(4, 200, device=device), torch.randn(4, 200, device=device)
    labels = torch.randint(0, 200, (4,), device=device)
    got = run(student, teacher, "js", labels=labels, hard_weight=1.0, temperature=3.0, backend=backend)
    leaf = student.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    want.sum().backward()
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(got.gradient, leaf.grad, rtol=1e-4, atol=1e-6)


@each_backend
def test_label_of_probability_zero_is_infinite_only_where_it_counts(backend):
    device = device_of(backend)
    student, teacher = torch.randn(2, 50, device=device), torch.randn(2, 50, device=device)
    student[:, 3], teacher[:, 3] = -INF, -INF
    labels = torch.tensor([3, 3], device=device)
    hard_weight = torch.tensor([0.0, 0.5], device=device)
    got = run(student, teacher, "kl", labels=labels, hard_weight=hard_weight, backend=backend)
    assert got.loss[0].isfinite() and got.loss[1] == INF
    assert got.gradient[0].isfinite().all()
