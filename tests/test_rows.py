"""Every divergence on every backend against fp64: losses, gradients, statistics, options, reductions."""

from contextlib import nullcontext

import chips
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, Logits, logits, row_options
from truth import (
    BACKENDS,
    DIVERGENCES,
    assert_gradient_close,
    assert_loss_close,
    device_of,
    rounding,
    run,
    serves,
    slopes_if_steep,
    slopes_of_kl,
    truth,
    undecided_signs,
)

from kdkernels.losses.options import STATISTICS

LABEL_FREE = tuple(name for name in STATISTICS if "label" not in name and name != "cross_entropy")
# Triton's interpreter is a hundred times slower.
EXAMPLES = {"cpu": 40, "cuda": 20, "triton": 6, "reference": 8}
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def vocabularies(backend):
    return st.integers(1, 700) if backend == "triton" else None


def check(recipe: Logits, options, divergence, backend, statistics=()):
    device = device_of(backend)
    student, teacher = recipe.make(device)
    options = {**options, "vocab_size": recipe.vocab_size, "statistics": statistics}
    with chips.on_any(recipe.seed) if backend == "cuda" and device == "cpu" else nullcontext():
        got = run(student, teacher, divergence, backend=backend, **options)
    want = truth(student, teacher, divergence, **options)
    # The rounding of exponentials of the log-ratio is relative to the loss, and the loss may be larger than any number
    # of the gradient's dtype.
    steep = want.loss.abs() if divergence.is_steep else 0
    assume(torch.as_tensor(steep).max() < 1e3)

    temperature = torch.as_tensor(options["temperature"], device=device)
    column = temperature[..., None].double() if temperature.dim() else temperature
    kept_student, kept_teacher = student[..., : recipe.vocab], teacher[..., : recipe.vocab]
    ulps = rounding(kept_student, kept_teacher, column)
    # A factor of the divergence multiplies its error too.
    factor = temperature**2 if options["temperature_squared"] else torch.ones_like(temperature)
    weight = options.get("row_weight", torch.ones((), device=device)).abs()
    slopes = weight * (factor / temperature).clamp(min=1) + want.loss.abs()
    # Log-probabilities have an error of 1.5 ulp; a KL has 1.5 ulp times the sum of its |slopes| by log-probability.
    steep = steep + slopes_of_kl(kept_student, kept_teacher, column, divergence) * factor * weight
    size = factor.clamp(min=1) * weight + steep
    size = torch.maximum(
        size, 1.5 / 4 * slopes_if_steep(kept_student, kept_teacher, column, divergence) * factor * weight
    )
    allowed = 1e-6 * want.loss.abs() + ulps * size
    assert_loss_close(got.loss, want.loss, allowed, divergence)
    kept_classes = slice(0, recipe.vocab)
    of_class = torch.zeros_like(want.gradient)
    if divergence.name == "tv":
        undecided = undecided_signs(kept_student, kept_teacher, column, ulps)
        of_class[..., kept_classes] = undecided * (weight * factor / temperature)[..., None]
    assert_gradient_close(got.gradient, want.gradient, ulps * slopes, divergence, of_class)
    assert not got.gradient[..., recipe.vocab :].any(), "gradient: expected 0 in padding columns"
    for name in statistics:
        if "top1" in name:
            assert torch.equal(got.statistics[name], want.statistics[name]), name
        else:
            value = want.statistics[name]
            # A lane adds at most 128 terms. Equal terms round the same way, together by 64 half ulp of their sum.
            of_sum = 2.0**-18 if name in ("tv", "student_entropy", "teacher_entropy") else 1e-6
            allowed = of_sum * value.abs() + ulps * (1 + (value.abs() if name == "divergence" else 0))
            assert_loss_close(got.statistics[name], value, allowed, name)


@each_divergence
@each_backend
def test_matches_fp64(divergence, backend):
    @settings(max_examples=EXAMPLES[backend])
    @given(recipe=logits(vocabularies(backend)), recipe_of_options=row_options)
    def property_holds(recipe, recipe_of_options):
        options = recipe_of_options.make(recipe.leading, recipe.vocab, device_of(backend))
        check(recipe, options, divergence, backend)

    property_holds()


@each_backend
def test_statistics_match_fp64(backend):
    @settings(max_examples=EXAMPLES[backend])
    @given(recipe=logits(vocabularies(backend)), recipe_of_options=row_options)
    def property_holds(recipe, recipe_of_options):
        options = recipe_of_options.make(recipe.leading, recipe.vocab, device_of(backend))
        statistics = STATISTICS if "labels" in options else LABEL_FREE
        check(recipe, options, DIVERGENCES[0], backend, statistics)

    property_holds()


@each_divergence
def test_cpu_in_fp64(divergence):
    """For fp64 inputs, the native kernels agree with the reference to fp64 rounding."""

    @settings(max_examples=10)
    @given(recipe=logits(st.integers(1, 5000), dtypes=[torch.float64]), recipe_of_options=row_options)
    def property_holds(recipe, recipe_of_options):
        options = recipe_of_options.make(recipe.leading, recipe.vocab)
        student, teacher = recipe.make()
        got = run(student, teacher, divergence, backend="cpu", vocab_size=recipe.vocab_size, **options)
        want = truth(student, teacher, divergence, vocab_size=recipe.vocab_size, **options)
        if divergence.is_steep:
            assume(want.loss.abs().max() < 1e3)  # exponentials of the log-ratio magnify its rounding
        assert got.loss.dtype == torch.float64 and got.gradient.dtype == torch.float64
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-9, atol=1e-11)

    property_holds()


@each_divergence
@each_backend
def test_both_gradients_agree(divergence, backend):
    """gradient="forward" and gradient="backward" agree, with a grad_output per row."""
    recipe = Logits((2, 3), 613, (0, 0), torch.float32, torch.bfloat16, 3.0, 0.0, 0.0, True, 5)
    student, teacher = recipe.make(device_of(backend))
    labels = torch.randint(0, 613, (2, 3), device=student.device)
    labels[1, 1] = -100
    options = {"temperature": 1.7, "labels": labels, "hard_weight": 0.3, "backend": backend}
    grad_output = torch.randn(2, 3, device=student.device)
    grad_output[1, 1] = torch.nan  # a dropped row has gradient 0 for any grad_output
    at_once = run(student, teacher, divergence, gradient="forward", grad_output=grad_output, **options)
    assert not at_once.gradient[1, 1].any()
    in_backward = run(student, teacher, divergence, gradient="backward", grad_output=grad_output, **options)
    # The loops with and without slopes are compiled separately and may fuse different multiply-adds.
    torch.testing.assert_close(at_once.loss, in_backward.loss, rtol=2.0**-22, atol=0)
    scale = at_once.gradient.abs().max()
    torch.testing.assert_close(at_once.gradient, in_backward.gradient, rtol=1e-5, atol=1e-6 * scale.item())


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp64_on_one_side(gradient, dtypes, reduction):
    """With one fp64 side, arithmetic is fp64, and the gradient has the student's dtype and grad_output's factor."""
    student, teacher = torch.randn(4, 300).to(dtypes[0]), torch.randn(4, 300).to(dtypes[1])
    options = {"backend": "cpu", "reduction": reduction, "grad_output": torch.tensor([2.0, 1.0, 0.5, -1.0])}
    if reduction == "mean":
        options["grad_output"] = torch.tensor(3.0)
    got = run(student, teacher, "js", gradient=gradient, **options)
    want = truth(student, teacher, "js", **options)
    assert got.loss.dtype == torch.float64 and got.gradient.dtype == dtypes[0]
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.gradient.double(), want.gradient, rtol=1e-5, atol=1e-9)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_options_of_any_real_dtype(backend, dtype):
    device = device_of(backend)
    student, teacher = torch.randn(4, 100, device=device), torch.randn(4, 100, device=device)
    numbers = {"row_weight": torch.tensor([1, 2, 0, 3], device=device), "temperature": torch.tensor(2, device=device),
               "hard_weight": torch.tensor([0, 1, 0, 1], device=device), "normalizer": torch.tensor(3)}  # fmt: skip
    labels = torch.tensor([1, 2, 3, 4], device=device)
    got = run(student, teacher, "kl", labels=labels, backend=backend, reduction="mean",
              **{name: x.to(dtype) for name, x in numbers.items()})  # fmt: skip
    want = run(student, teacher, "kl", labels=labels, backend=backend, reduction="mean",
               **{name: x.float() for name, x in numbers.items()})  # fmt: skip
    assert got.loss.dtype == torch.float32
    assert torch.equal(got.loss, want.loss) and torch.equal(got.gradient, want.gradient)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_reductions(backend, reduction, gradient):
    """mean divides by the number of kept rows, sum does not divide.

    Row weights do not change the number. A normalizer replaces it.
    """
    recipe = Logits((4, 3), 300, (0, 0), torch.float32, torch.float32, 2.0, 0.0, 0.0, False, 1)
    student, teacher = recipe.make(device_of(backend))
    mask = torch.rand(4, 3, device=student.device) > 0.4
    mask[0, 0], mask[0, 1] = True, False
    weight = torch.rand(4, 3, device=student.device)
    rows = truth(student, teacher, "js").loss.float()
    denominator = {"mean": mask.sum(), "sum": 1, "none": 1}[reduction]
    want = torch.where(mask, rows * weight, 0) / denominator
    options = {"mask": mask, "row_weight": weight, "backend": backend, "gradient": gradient}
    got = run(student, teacher, "js", reduction=reduction, **options)
    torch.testing.assert_close(got.loss, want if reduction == "none" else want.sum(), rtol=1e-5, atol=1e-6)
    masked_truth = truth(student, teacher, "js", reduction=reduction, mask=mask, row_weight=weight)
    torch.testing.assert_close(got.gradient.double(), masked_truth.gradient, rtol=1e-4, atol=1e-7)
    if reduction == "mean":
        for normalizer in (7, 7.0, torch.tensor(7), torch.tensor([[7.0]], dtype=torch.float64, device=student.device)):
            again = run(student, teacher, "js", reduction="mean", normalizer=normalizer, **options)
            torch.testing.assert_close(again.loss, got.loss * mask.sum() / 7)
            torch.testing.assert_close(again.gradient, got.gradient * (mask.sum() / 7))


@each_backend
def test_masked_rows_are_not_read_or_counted(backend):
    """NaN in masked rows changes no result; the mean is over the kept rows alone."""
    recipe = Logits((6,), 400, (0, 0), torch.float32, torch.float32, 2.0, 0.0, 0.0, False, 2)
    student, teacher = recipe.make(device_of(backend))
    mask = torch.tensor([True, False, True, True, False, False], device=student.device)
    alone = run(student[mask], teacher[mask], "kl", reduction="mean", backend=backend)
    student[~mask], teacher[~mask] = torch.nan, torch.nan
    for options in ({"mask": mask}, {"labels": torch.where(mask, 3, -100)}):
        got = run(student, teacher, "kl", reduction="mean", backend=backend, statistics=LABEL_FREE, **options)
        torch.testing.assert_close(got.loss, alone.loss)
        torch.testing.assert_close(got.gradient[mask], alone.gradient)
        assert not got.gradient[~mask].any()
        for name in LABEL_FREE:
            assert not got.statistics[name][~mask].any(), name


@each_backend
def test_rows_of_weight_zero_are_skipped_whatever_the_normalizer(backend):
    student, teacher = torch.randn(3, 50, device=device_of(backend)), torch.randn(3, 50, device=device_of(backend))
    student[1] = torch.nan
    weight = torch.tensor([0.0, 0.0, 0.0], device=student.device)
    got = run(student, teacher, "kl", reduction="mean", row_weight=weight, normalizer=0, backend=backend)
    assert got.loss == 0 and not got.gradient.any()


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalizer", [None, 0, 5])
def test_no_kept_rows_is_zero(backend, reduction, normalizer):
    if reduction == "sum" and normalizer is not None:
        pytest.skip("a normalizer is valid only with mean")
    device = device_of(backend)
    for shape in ((3, 50), (0, 50), (2, 0, 50)):
        student, teacher = torch.randn(shape, device=device), torch.randn(shape, device=device)
        mask = torch.zeros(shape[:-1], dtype=torch.bool, device=device)
        got = run(student, teacher, "js", reduction=reduction, normalizer=normalizer, mask=mask, backend=backend)
        assert got.loss == 0 and got.gradient.shape == shape and not got.gradient.any()


@each_backend
def test_leading_shapes_and_statistics_shapes(backend):
    device = device_of(backend)
    base_s, base_t = torch.randn(12, 130, device=device), torch.randn(12, 130, device=device)
    flat = run(base_s, base_t, "tv", backend=backend, statistics=("tv", "student_top1"))
    for leading in ((12,), (3, 4), (2, 3, 2), (1, 2, 1, 6)):
        got = run(base_s.view(*leading, 130), base_t.view(*leading, 130), "tv", backend=backend,
                  statistics=("tv", "student_top1"))  # fmt: skip
        assert got.loss.shape == leading and got.statistics["tv"].shape == leading
        assert torch.equal(got.loss.flatten(), flat.loss)
        assert torch.equal(got.gradient.view(12, 130), flat.gradient)
        assert torch.equal(got.statistics["student_top1"].flatten(), base_s.argmax(-1))
    single = run(base_s[0], base_t[0], "tv", backend=backend)
    assert single.loss.shape == () and torch.equal(single.loss, flat.loss[0])


@each_backend
def test_strides_are_honoured(backend):
    """Slices, transposed leading dimensions and expanded teachers give the results of their contiguous copies."""
    device = device_of(backend)
    # The summation order of the CUDA kernels depends on a row's offset from 16-byte alignment; other orders are fixed.
    close = {"rtol": 2e-6, "atol": 1e-6} if backend == "cuda" else {"rtol": 0, "atol": 0}
    logits = torch.randn(2, 3, 4, 90, device=device)
    for view in (
        logits[0, :, :-1],
        logits[0].transpose(0, 1),
        logits[:, 1:, 2],
        logits[:, :, ::2],
        logits[..., 3:80],
        logits[:1].expand(2, 3, 4, 90),
        logits[:, ::2, ::3],
        logits.permute(2, 0, 1, 3),
    ):
        teacher = torch.randn(view.shape, device=device)
        strided = run(view, teacher, "js", backend=backend)
        packed = run(view.contiguous(), teacher, "js", backend=backend)
        torch.testing.assert_close(strided.loss, packed.loss, **close)
        torch.testing.assert_close(strided.gradient, packed.gradient, **close)
        as_teacher = run(teacher, view, "js", backend=backend)
        torch.testing.assert_close(
            as_teacher.loss, run(teacher, view.contiguous(), "js", backend=backend).loss, **close
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_thread_count(dtype):
    student, teacher = torch.randn(3, 70_001).to(dtype), torch.randn(3, 70_001).to(dtype)
    threads = torch.get_num_threads()
    results = {"forward": [], "backward": []}
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for gradient, found in results.items():
                found.append(run(student, teacher, "js", backend="cpu", gradient=gradient))
    finally:
        torch.set_num_threads(threads)
    for first, *others in results.values():
        for other in others:
            assert torch.equal(other.loss, first.loss) and torch.equal(other.gradient, first.gradient)


@each_backend
def test_backend_serves_plain_logits(backend):
    x = torch.randn(1, 4, device=device_of(backend))
    assert serves(backend, x, x)
