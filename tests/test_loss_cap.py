"""loss_cap: a row's loss is w * min(L, c), and a row with L > c has no gradient. L is found here without the option."""

from contextlib import nullcontext

import chips
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import logits, row_options
from torch._dynamo.testing import CompileCounter
from truth import BACKENDS, DIVERGENCES, assert_gradient_close, assert_loss_close, device_of, rounding, run, truth

import kdkernels
from kdkernels import Divergence, LinearLogits, SparseLogProbs, fused_divergence, fused_kl

EXAMPLES = {"cpu": 60, "cuda": 25, "triton": 8, "reference": 15}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_mode = pytest.mark.parametrize("gradient", ["forward", "backward"])


def formula(student, teacher, divergence, options) -> torch.Tensor:
    """L = (1 - lambda) D T^2 + lambda CE of each row in fp64, from D and CE: 0 of a row that is dropped."""
    names = ("divergence", "cross_entropy") if "labels" in options else ("divergence",)
    alone = {name: x for name, x in options.items() if name != "row_weight"}
    found = truth(student, teacher, divergence, statistics=names, **alone).statistics
    loss = found["divergence"]
    if options.get("temperature_squared"):
        loss = loss * torch.as_tensor(options["temperature"], dtype=torch.float64, device=loss.device) ** 2
    hard = options.get("hard_weight", 0.0)
    hard = hard.double() if isinstance(hard, torch.Tensor) else torch.tensor(hard, dtype=torch.float64)
    return loss * (1 - hard) + hard * found.get("cross_entropy", torch.zeros_like(loss))


def caps_around(loss: torch.Tensor, seed: int) -> torch.Tensor:
    """Caps that some losses exceed, none of them by less than half of itself; NaN and 0 where the loss is 0."""
    generator = torch.Generator().manual_seed(seed)
    exceeded = (torch.rand(loss.shape, generator=generator) < 0.5).to(loss.device)
    caps = torch.where(loss > 0.05, loss * torch.where(exceeded, 0.5, 2.0), 0.1)
    return caps.float()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@each_backend
def test_caps_match_the_formula(divergence, backend):
    vocabularies = st.integers(1, 700) if backend == "triton" else None

    @settings(max_examples=max(EXAMPLES[backend] // 5, 3))
    @given(recipe=logits(vocabularies), of_options=row_options, gradient=st.sampled_from(["forward", "backward"]))
    def property_holds(recipe, of_options, gradient):
        device = device_of(backend)
        student, teacher = recipe.make(device)
        options = of_options.make(recipe.leading, recipe.vocab, device) | {"vocab_size": recipe.vocab_size}
        loss = formula(student, teacher, divergence, options)
        assume(bool((loss.abs() < 1e3).all()))
        caps = caps_around(loss, recipe.seed)
        kept = options.get("mask", torch.ones_like(loss, dtype=torch.bool))
        if "labels" in options:
            kept = kept & (options["labels"] != -100)
        weight = options.get("row_weight", torch.ones_like(loss))
        skipped = ~kept | (weight == 0)
        with chips.on_any(recipe.seed) if backend == "cuda" and device == "cpu" else nullcontext():
            got = run(student, teacher, divergence, backend=backend, gradient=gradient,
                      loss_cap=torch.where(skipped, torch.nan, caps), **options)  # fmt: skip
        uncapped = truth(student, teacher, divergence, **options)

        capped = (loss > caps.double()) & ~skipped
        want = torch.where(skipped, 0, weight.double() * torch.minimum(loss, caps.double()))
        temperature = torch.as_tensor(options["temperature"], device=device)
        column = temperature[..., None].double() if temperature.dim() else temperature
        ulps = rounding(student[..., : recipe.vocab], teacher[..., : recipe.vocab], column)
        # As in test_rows.py, but for all divergences alike.
        factor = temperature.double() ** 2 if options["temperature_squared"] else torch.ones_like(temperature)
        size = (1 + loss.abs()) * factor.clamp(min=1) * weight.abs().double()
        assert_loss_close(got.loss, want, 1e-6 * want.abs() + 20 * ulps * size, divergence)
        assert torch.equal(got.gradient[capped], torch.zeros_like(got.gradient[capped])), "a capped row has no gradient"
        if divergence.name != "tv":  # whose gradient jumps where p = q
            size = size * (1 / temperature).clamp(min=1)
            of_row = torch.where(capped, torch.zeros_like(size), 20 * ulps * size)
            gradient_of_all = torch.where(capped[..., None], 0, uncapped.gradient)
            assert_gradient_close(got.gradient, gradient_of_all, of_row, divergence)

    property_holds()


def some(backend, rows=6, vocab=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(rows, vocab, generator=generator) for _ in range(2))
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    return student.to(device_of(backend)), teacher.to(device_of(backend)), labels.to(device_of(backend))


@each_mode
@each_backend
def test_a_row_at_its_cap_keeps_its_gradient(backend, gradient):
    student, teacher, labels = some(backend)
    options = {"labels": labels, "hard_weight": 0.3, "temperature": 2.0, "backend": backend, "gradient": gradient}
    free = run(student, teacher, "js", **options)
    at = run(student, teacher, "js", loss_cap=free.loss, **options)
    assert torch.equal(at.loss, free.loss) and torch.equal(at.gradient, free.gradient)
    below = torch.nextafter(free.loss, torch.zeros_like(free.loss))
    got = run(student, teacher, "js", loss_cap=below, **options)
    assert torch.equal(got.loss, below) and not got.gradient.any()


@each_mode
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
@each_backend
def test_infinite_and_nan_rows(backend, divergence, gradient):
    student, teacher, _ = some(backend)
    teacher[0, 1::3] = -torch.inf  # reverse_kl is infinite, and its slope too
    student[1, 1::3] = -torch.inf  # kl is
    student[2, 5] = torch.nan
    student[3] = -torch.inf
    got = run(student, teacher, divergence, loss_cap=0.25, backend=backend, gradient=gradient)
    assert got.loss.tolist()[:2] == [0.25, 0.25] and not got.gradient[:2].any()
    assert got.loss[2:4].isnan().all() and got.gradient[2:4].isnan().all()
    assert got.loss.tolist()[4:] == [0.25, 0.25] and not got.gradient[4:].any()


@each_mode
@each_backend
def test_a_number_a_0d_tensor_and_one_per_row_are_one(backend, gradient):
    student, teacher, _ = some(backend)
    losses = run(student, teacher, "kl", backend=backend).loss
    cap = losses.median().item()
    options = {"backend": backend, "gradient": gradient, "statistics": ("divergence",), "reduction": "mean"}
    rows = torch.full_like(losses, cap)
    results = [run(student, teacher, "kl", loss_cap=c, **options) for c in (cap, torch.tensor(cap).double(), rows)]
    for other in results[1:]:
        assert torch.equal(results[0].loss, other.loss) and torch.equal(results[0].gradient, other.gradient)
    assert 0 < results[0].gradient.any(-1).sum() < 6
    torch.testing.assert_close(results[0].loss, losses.clamp(max=cap).mean())
    assert torch.equal(results[0].statistics["divergence"], losses), "statistics are not capped"


@each_mode
@each_backend
def test_heads(backend, gradient):
    generator = torch.Generator().manual_seed(4)
    device = device_of(backend)
    hidden, of_teacher = (torch.randn(7, 16, generator=generator).to(device) for _ in range(2))
    weight = torch.randn(90, 16, generator=generator).to(device)
    labels = torch.randint(0, 90, (7,), generator=generator).to(device)
    options = {"labels": labels, "hard_weight": 0.3, "temperature": 1.5}
    teacher = of_teacher @ weight.T
    caps = caps_around(formula(hidden @ weight.T, teacher, Divergence("kl"), options), 1)
    options |= {"loss_cap": caps, "backend": backend, "reduction": "sum"}

    def step(call):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = call(x, w)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    got = step(lambda x, w: fused_kl(LinearLogits(x, w), teacher, chunk_rows=3, gradient=gradient, **options))
    want = step(lambda x, w: fused_kl(x @ w.T, teacher, **{**options, "backend": "reference"}))
    assert want[1].any(-1).sum() not in (0, 7)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_mode
@pytest.mark.parametrize("tail", ["bucket", "support", "renormalize", "uniform"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.4])
@each_backend
def test_sparse_teachers(backend, tail, gradient, hard_weight):
    student, teacher, labels = some(backend, rows=8)
    log_probs, indices = (teacher / 2).log_softmax(-1).topk(9)
    sparse = SparseLogProbs(indices, log_probs, tail=tail, source_temperature=2.0)
    options = {"labels": labels, "hard_weight": hard_weight, "temperature": 2.0, "temperature_squared": True}
    wide = SparseLogProbs(indices, log_probs.double(), tail=tail, source_temperature=2.0)
    free = run(student.double(), _Given(wide), "kl", backend="reference", **options)
    caps = caps_around(free.loss, 2)
    capped = free.loss > caps.double()
    assert capped.any() and not capped.all()
    got = run(student, _Given(sparse), "kl", backend=backend, gradient=gradient, loss_cap=caps, **options)
    torch.testing.assert_close(got.loss.double(), torch.minimum(free.loss, caps.double()), rtol=1e-5, atol=1e-5)
    assert not got.gradient[capped].any()
    torch.testing.assert_close(got.gradient[~capped].double(), free.gradient[~capped], rtol=1e-4, atol=1e-5)


class _Given:
    """A teacher for `run`, which detaches it."""

    def __init__(self, teacher):
        self.teacher = teacher

    def detach(self):
        return self.teacher


def test_truncate_does_not_take_it():
    student = torch.randn(3, 20)
    sparse = SparseLogProbs(student.topk(4)[1], student.log_softmax(-1).topk(4)[0], tail="truncate")
    with pytest.raises(ValueError, match="loss_cap: expected None for tail='truncate'"):
        fused_kl(student, sparse, loss_cap=1.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bad_cap_raises(backend, bad):
    student, teacher, _ = some(backend)
    with pytest.raises(ValueError, match=rf"loss_cap: expected > 0; got {bad}"):
        fused_kl(student, teacher, loss_cap=bad, backend=backend)
    caps = torch.ones(6)
    caps[3] = bad
    with pytest.raises(ValueError, match=rf"loss_cap: expected > 0; got {bad} in row 3"):
        fused_kl(student, teacher, loss_cap=caps, backend=backend)
    mask = torch.arange(6) != 3
    assert fused_kl(student, teacher, loss_cap=caps, mask=mask, backend=backend).isfinite()


def test_a_cap_of_another_kind_raises():
    with pytest.raises(TypeError, match="loss_cap: expected a number or a tensor; got bool"):
        fused_kl(torch.randn(2, 5), torch.randn(2, 5), loss_cap=True)
    with pytest.raises(TypeError, match="loss_cap"):
        kdkernels.fused_uld(torch.randn(2, 5), torch.randn(2, 5), loss_cap=1.0)


@each_mode
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_bad_cap_makes_its_row_nan(backend, bad, gradient):
    student, teacher, _ = some(backend)
    caps = torch.full((6,), torch.inf, device=student.device)
    caps[3] = bad
    for divergence in ("kl", "js"):
        got = run(student, teacher, divergence, loss_cap=caps, backend=backend, gradient=gradient)
        nan = [row == 3 for row in range(6)]
        assert got.loss.isnan().tolist() == nan and got.gradient.isnan().all(-1).tolist() == nan


@each_mode
def test_a_new_cap_compiles_nothing(gradient):
    counter = CompileCounter()
    torch._dynamo.reset()

    def step(student, teacher, cap):
        return fused_divergence(student, teacher, "js", loss_cap=cap, gradient=gradient, backend="cpu")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(10):
        student, teacher = torch.randn(7, 50, requires_grad=True), torch.randn(7, 50)
        cap = 0.05 + 0.03 * i
        torch.testing.assert_close(compiled(student, teacher, cap), step(student, teacher, cap))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_the_reference_has_second_derivatives():
    student, teacher, _ = some("reference", rows=4, vocab=6)
    student = student.double().requires_grad_()
    caps = caps_around(run(student, teacher.double(), "kl", backend="reference").loss, 3)
    call = lambda s: fused_kl(s, teacher.double(), loss_cap=caps, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, student) and torch.autograd.gradgradcheck(call, student)
