"""Sparse teachers (SparseLogProbs) on every backend against fp64 formulas; top-k extraction and sampling."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from truth import BACKENDS, DIVERGENCES, GRADIENT_TOLERANCE, assert_loss_close, device_of, formula_value, opcheck

import kdkernels
from kdkernels import CATALOGUE, Divergence, LinearLogits, SparseLogProbs, fused_divergence, fused_kl, ops
from kdkernels.backends.reference import table as reference
from kdkernels.distributions import TAILS
from kdkernels.families.linear import ChunkedRows, Chunking, LogitsSource, TopK
from kdkernels.families.options import RowOptions
from kdkernels.families.topk import Sparse
from kdkernels.losses.options import STATISTICS

KERNELS = ["cpu", "cuda", "triton"]
EXAMPLES = {"cpu": 80, "cuda": 8, "triton": 3, "reference": 12}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
kernel_backends = pytest.mark.parametrize("backend", KERNELS)
each_tail = pytest.mark.parametrize("tail", TAILS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def is_finite(divergence: Divergence, tail: str) -> bool:
    """Whether the divergence is finite where the teacher has no mass outside of its entries."""
    return not (divergence.is_infinite_without_teacher and tail in ("renormalize", "truncate"))


def distributions(student, teacher: SparseLogProbs, temperature):
    """Probabilities of teacher and student over the classes that the loss compares, in fp64: [rows, classes] each."""
    classes = student.shape[-1]
    q = torch.softmax(student.double() / temperature, -1)
    t, named = torch.zeros_like(q), torch.zeros_like(q, dtype=torch.bool)
    logits = torch.full_like(q, -torch.inf)
    for row in range(q.shape[0]):
        for index, log_prob in zip(teacher.indices[row].tolist(), teacher.log_probs[row].double(), strict=True):
            if index >= 0 and log_prob > -torch.inf:
                t[row, index] += log_prob.exp()
                logits[row, index] = log_prob * teacher.source_temperature / temperature
                named[row, index] = True
    if teacher.tail_log_prob is None:
        left = (1 - t.sum(-1, keepdim=True)).clamp(min=0)
    else:
        left = teacher.tail_log_prob.double()[:, None].exp()
    match teacher.tail:
        case "bucket":
            p = torch.cat([t, left], -1)
            return p, torch.cat([torch.where(named, q, 0), torch.where(named, 0, q).sum(-1, keepdim=True)], -1)
        case "renormalize":
            return torch.softmax(logits, -1), q
        case "support":
            tempered = torch.where(named, student.double() / temperature, -torch.inf)
            return torch.softmax(logits, -1), torch.softmax(tempered, -1)
        case "uniform":
            outside = (classes - named.sum(-1, keepdim=True)).clamp(min=1)
            return torch.where(named, t, left / outside), q
        case "truncate":
            return t, q


def formula(student, teacher, divergence, temperature):
    """Row losses of the formula and their gradient by autograd."""
    student = student.detach().double().requires_grad_()
    loss = formula_value(divergence, *distributions(student, teacher, temperature))
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


# ---- recipes


@dataclass(frozen=True)
class Case:
    """Recipe for a student's logits and a sparse teacher."""

    leading: tuple[int, ...]
    vocab: int
    entries: int
    tail: str
    given_tail: bool  # whether the teacher has tail_log_prob
    ragged: bool
    dtype: torch.dtype
    indices_dtype: torch.dtype
    scale: float
    offset: float
    temperature: float
    padding: int
    strided: bool
    seed: int

    def make(self, device="cpu"):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        k = min(self.entries, self.vocab)
        student = self.scale * normal(*self.leading, self.vocab) + self.offset
        log_probs = torch.log_softmax(self.scale * normal(*self.leading, self.vocab) / self.temperature, -1)
        values, order = log_probs.sort(-1, descending=True)
        shuffled = torch.randperm(k, generator=generator)
        indices, kept = order[..., :k][..., shuffled], values[..., :k][..., shuffled]
        tail_log_prob = None
        if self.ragged:
            there = torch.rand(*self.leading, k, generator=generator) < 0.6
            rest = torch.where(there, -torch.inf, kept).logsumexp(-1)
            tail_log_prob = torch.logaddexp(rest, values[..., k:].logsumexp(-1)) if k < self.vocab else rest
            negative = torch.rand(*self.leading, k, generator=generator) < 0.5
            kept = torch.where(there | negative, kept, -torch.inf)
            indices = torch.where(there | ~negative, indices, -1)
        elif self.given_tail:
            tail_log_prob = values[..., k:].logsumexp(-1) if k < self.vocab else torch.full(self.leading, -torch.inf)
        if self.tail not in ("bucket", "uniform"):
            tail_log_prob = None
        student = torch.nn.functional.pad(student, (0, self.padding), value=torch.nan).to(device, self.dtype)
        if self.strided and self.leading:
            student = torch.nn.functional.pad(student, (0, 0, 0, 1), value=torch.nan)[..., :-1, :]
        teacher = SparseLogProbs(
            indices.to(device, self.indices_dtype), kept.float().to(device), tail=self.tail,
            tail_log_prob=None if tail_log_prob is None else tail_log_prob.float().to(device),
            source_temperature=self.temperature,
        )  # fmt: skip
        return student, teacher

    @property
    def vocab_size(self):
        return self.vocab if self.padding else None


def cases(**fixed):
    drawn = {
        "leading": st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)]),
        "vocab": st.one_of(st.integers(1, 80), st.integers(81, 5000)),
        "entries": st.sampled_from([1, 2, 5, 64, 200]),
        "tail": st.sampled_from(TAILS),
        "given_tail": st.booleans(),
        "ragged": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
        "indices_dtype": st.sampled_from([torch.int32, torch.int64]),
        "scale": st.sampled_from([0.1, 1.0, 5.0, 25.0]),
        "offset": st.sampled_from([0.0, 0.0, -30.0, 200.0]),
        "temperature": st.sampled_from([1.0, 2.0, 0.7]),
        "padding": st.sampled_from([0, 0, 3]),
        "strided": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    }
    return st.builds(Case, **{name: fixed.get(name, strategy) for name, strategy in drawn.items()})


def run(student, teacher, divergence="kl", *, grad_output=None, **options):
    """Loss, gradient and statistics on a fresh leaf; the default reduction is "none"."""
    student = student.detach().clone().requires_grad_()
    out = fused_divergence(student, teacher, divergence, **{"reduction": "none", **options})
    loss, found = (out, {}) if isinstance(out, torch.Tensor) else (out.loss, out.statistics)
    grad_output = torch.ones_like(loss) if grad_output is None else grad_output
    (gradient,) = torch.autograd.grad(loss, student, grad_output.to(loss))
    return loss.detach(), gradient, found


def truth(student, teacher, divergence="kl", **options):
    options = {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in options.items()
    }
    options.pop("gradient", None)
    return run(student.double(), as_double(teacher), divergence, **{**options, "backend": "reference"})


def as_double(teacher: SparseLogProbs) -> SparseLogProbs:
    tail = None if teacher.tail_log_prob is None else teacher.tail_log_prob.double()
    return replace(teacher, log_probs=teacher.log_probs.double(), tail_log_prob=tail)


def rounding(student, teacher, temperature):
    """4 ulp of each row's largest operand: log-probabilities are differences of these numbers."""
    tempered = student.double() / temperature
    lse = tempered.logsumexp(-1)
    span = (lse - tempered.amin(-1)).clamp(max=87)
    of_teacher = torch.where(torch.isfinite(teacher.log_probs), teacher.log_probs, 0).abs().amax(-1).double()
    return 4 * 2.0**-23 * torch.maximum(torch.maximum(lse.abs(), span), of_teacher).clamp(min=1)


def assert_close(got, want, ulps, divergence, dtype, factor=1.0, signs_decided=True):
    """Loss and gradient of rows; `ulps` [rows] is the rounding of log-probabilities."""
    finite = want[0].abs().nan_to_num(0, 0, 0)
    assert_loss_close(got[0], want[0], divergence.magnification * factor * ulps * (1 + finite) + 2e-6 * finite, "loss")
    if not signs_decided:
        return
    gradient, expected = got[1].double().cpu(), want[1].double().cpu()
    assert torch.equal(torch.isnan(gradient), torch.isnan(expected)), "gradient: NaN at unexpected positions"
    gradient, expected = gradient.nan_to_num(0), expected.nan_to_num(0)
    largest = expected.abs().amax(-1, keepdim=True)
    # A gradient saved by the forward call is rounded twice.
    allowed = (
        2.01 * GRADIENT_TOLERANCE[dtype] * expected.abs() + 1e-5 * largest + (8 * factor * ulps.cpu())[..., None] + 1e-7
    )
    error = (gradient - expected).abs()
    assert (error <= allowed).all(), f"gradient: {(error / allowed).max():.2f} times the tolerance"


# ---- losses


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_table_plus_slack_is_the_formula(divergence):
    """The sum of phi plus the catalogue's slack equals the formula, also for teachers whose mass is not 1.

    The sum is infinite for a class without teacher mass exactly when the catalogue says so.
    """
    entry, parameter = CATALOGUE[divergence.name], torch.tensor(divergence.parameter or 1.0, dtype=torch.float64)
    q = torch.softmax(torch.randn(5, 20, dtype=torch.float64), -1)
    p = torch.softmax(torch.randn(5, 20, dtype=torch.float64), -1) * torch.linspace(0.2, 1.5, 5)[:, None]
    phi = reference.TABLE[divergence.name](p.log(), q.log(), p, q, parameter).sum(-1)
    offset = entry.slack(parameter) * (p.sum(-1) - 1)
    torch.testing.assert_close(phi + offset, formula_value(divergence, p, q))

    p = torch.cat([p[:, :-1], torch.zeros(5, 1)], -1)
    phi = reference.TABLE[divergence.name](p.log(), q.log(), p, q, parameter).sum(-1)
    assert torch.isinf(phi).all() if divergence.is_infinite_without_teacher else torch.isfinite(phi).all()

    p, q = q, p
    phi = reference.TABLE[divergence.name](p.log(), q.log(), p, q, parameter).sum(-1)
    assert torch.isinf(phi).all() if divergence.is_infinite_without_student else torch.isfinite(phi).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@each_tail
@settings(max_examples=6)
@given(data=st.data())
def test_reference_is_the_formula(tail, divergence, data):
    if not is_finite(divergence, tail):
        pytest.skip("infinite")
    case = data.draw(cases(
        leading=st.just((3,)), vocab=st.integers(1, 60), tail=st.just(tail), dtype=st.just(torch.float64),
        scale=st.sampled_from([0.3, 2.0]), padding=st.just(0), strided=st.just(False), offset=st.just(0.0),
        given_tail=st.just(True),
    ))  # fmt: skip
    student, teacher = case.make()
    named = ((teacher.indices >= 0) & ~torch.isneginf(teacher.log_probs)).any(-1)
    assume(tail == "bucket" or named.all())
    want = formula(student, as_double(teacher), divergence, case.temperature)
    got = run(student, as_double(teacher), divergence, temperature=case.temperature, backend="reference")
    # The teacher's log-probabilities are fp32 numbers, so its mass differs from 1 by rounding. The table's terms and
    # the formula differ by that rounding.
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


@each_backend
def test_kernels_against_fp64(backend):
    @settings(max_examples=EXAMPLES[backend])
    @given(case=cases(), divergence=st.sampled_from(DIVERGENCES), gradient=st.sampled_from(["forward", "backward"]),
           squared=st.booleans(), hard=st.sampled_from([None, 0.0, 0.3, 1.0]), masked=st.booleans())  # fmt: skip
    def check(case, divergence, gradient, squared, hard, masked):
        if not is_finite(divergence, case.tail):
            return
        if backend in ("cuda", "triton"):
            case = replace(case, vocab=min(case.vocab, 700), leading=case.leading[:2])
        student, teacher = case.make(device_of(backend))
        generator = torch.Generator().manual_seed(case.seed)
        options = {"temperature": case.temperature, "temperature_squared": squared, "vocab_size": case.vocab_size}
        if hard is not None:
            labels = torch.randint(0, case.vocab, case.leading, generator=generator)
            options |= {"labels": labels.to(student.device), "hard_weight": hard}
        if masked and case.leading:
            options["mask"] = (torch.rand(case.leading, generator=generator) < 0.7).to(student.device)
            student = torch.where(options["mask"][..., None], student, torch.nan)
        weights = torch.rand(case.leading, generator=generator).to(student.device)
        # Kernels skip a divergence of weight 0. The reference computes it, so an infinite divergence shows there.
        counted = Divergence("kl") if hard == 1 and backend != "reference" else divergence
        want = truth(student, teacher, counted, grad_output=weights, **options)
        if divergence.is_steep:
            assume(want[0].abs().max() < 100 if want[0].numel() else True)  # it magnifies the rounding of its terms
        got = run(student, teacher, divergence, grad_output=weights, gradient=gradient, backend=backend, **options)
        ulps = rounding(student[..., : case.vocab].nan_to_num(0), teacher, case.temperature)
        # The slope of tv jumps at p = q: rounding decides the gradient of a class with p close to q.
        assert_close(got, want, ulps, divergence, case.dtype, case.temperature**2 if squared else 1.0,
                     signs_decided=divergence.name != "tv" or case.scale > 0.5)  # fmt: skip

    check()


@kernel_backends
@each_tail
@pytest.mark.parametrize("labelled", [False, True])
def test_statistics(backend, tail, labelled):
    case = Case((4,), 700, 40, tail, True, True, torch.float32, torch.int64, 2.0, 3.0, 2.0, 3, False, 5)
    student, teacher = case.make(device_of(backend))
    options = {"temperature": 2.0, "vocab_size": 700, "statistics": STATISTICS}
    if labelled:
        named = torch.where(torch.isneginf(teacher.log_probs), -1, teacher.indices).amax(-1)  # label of the last row
        options["labels"] = torch.tensor([3, 4, 5, 0], device=student.device)
        options["labels"][3] = named[3]
    else:
        options["statistics"] = tuple(s for s in STATISTICS if "label" not in s and s != "cross_entropy")
    if tail == "uniform":  # a uniform tail makes the teacher dense; teacher_lse is not compared
        options["statistics"] = tuple(s for s in options["statistics"] if s != "teacher_lse")
    _, _, want = truth(student, teacher, "js", **options)
    _, _, got = run(student, teacher, "js", backend=backend, **options)
    for name in options["statistics"]:
        torch.testing.assert_close(got[name].double(), want[name].double(), rtol=1e-5, atol=2e-5)


@kernel_backends
@each_tail
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_student_that_is_a_head(backend, tail, gradient):
    """Hidden states and weight get the gradients that autograd finds through stored logits."""
    device = device_of(backend)
    case = Case((2, 3), 203, 20, tail, True, True, torch.float32, torch.int32, 2.0, 0.0, 2.0, 0, False, 6)
    _, teacher = case.make(device)
    hidden = torch.randn(2, 3, 8, device=device, requires_grad=True)
    weight = torch.randn(203, 8, device=device, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]], device=device)
    common = {"temperature": 2.0, "temperature_squared": True, "mask": mask, "reduction": "sum"}
    logits = 0.5 * torch.nn.functional.linear(hidden, weight)
    want = fused_kl(10 * torch.tanh(logits / 10), teacher, backend="reference", **common)
    expected = torch.autograd.grad(want, (hidden, weight))
    for chunk_rows in (None, 2):
        head = LinearLogits(hidden, weight, scale=0.5, softcap=10.0)
        got = fused_kl(head, teacher, backend=backend, gradient=gradient, chunk_rows=chunk_rows, **common)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)
        for x, y in zip(torch.autograd.grad(got, (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


@each_backend
@each_tail
def test_all_entries_are_the_dense_loss(backend, tail):
    """A teacher that names every class gives the dense loss, for every tail."""
    device = device_of(backend)
    student, whole = (3 * torch.randn(4, 90, device=device) for _ in range(2))
    teacher = kdkernels.topk_log_probs(whole, 90, temperature=2.0, backend=backend).with_tail(tail)
    want = run(student, whole, "js", temperature=2.0, backend=backend)
    got = run(student, teacher, "js", temperature=2.0, backend=backend)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-6)


@kernel_backends
def test_support_and_renormalize_at_another_temperature(backend):
    """support and renormalize equal the dense teacher cut to its top k, at temperatures other than the source's too."""
    device = device_of(backend)
    student, whole = (3 * torch.randn(4, 90, device=device) for _ in range(2))
    temperature = torch.tensor([0.5, 1.0, 2.0, 3.0], device=device)
    top = whole.topk(7, -1)
    log_probs = torch.log_softmax(whole / 2, -1).gather(-1, top.indices)
    for tail in ("support", "renormalize"):
        teacher = SparseLogProbs(top.indices, log_probs, tail=tail, source_temperature=2.0)
        raw = SparseLogProbs(top.indices, top.values, tail=tail)  # raw logits, not normalized
        cut = torch.full_like(whole, -torch.inf).scatter(-1, top.indices, top.values)
        named = torch.isfinite(cut)
        of_student = torch.where(named, student, -torch.inf) if tail == "support" else student
        want = run(of_student, cut, temperature=temperature, backend="reference")
        for x in (teacher, raw):
            got = run(student, x, temperature=temperature, backend=backend)
            torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(got[1], want[1].nan_to_num(0), rtol=1e-4, atol=1e-6)


@each_backend
def test_duplicates_add_up_in_truncate(backend):
    device = device_of(backend)
    student = torch.randn(2, 9, device=device)
    indices = torch.tensor([[3, 1, 3, 3, -1], [0, 0, 8, -1, 8]], device=device)
    log_probs = torch.tensor([[0.2, 0.3, 0.1, 0.4, 0.9], [0.1, 0.2, 0.3, 0.9, 0.2]], device=device).log()
    want = formula(student, SparseLogProbs(indices, log_probs, tail="truncate"), Divergence("kl"), 1.0)
    got = run(student, SparseLogProbs(indices, log_probs, tail="truncate"), backend=backend)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-6)


@kernel_backends
@pytest.mark.parametrize("tail", ["bucket", "support", "renormalize", "uniform", "truncate"])
def test_rows_without_entries(backend, tail):
    """A row without entries has loss 0 and gradient 0; "mean" counts the row for "bucket" alone."""
    device = device_of(backend)
    student = torch.randn(3, 20, device=device)
    indices = torch.tensor([[4, 5], [-1, 3], [-7, -1]], device=device)
    log_probs = torch.tensor([[0.5, 0.5], [0.1, 0.0], [0.3, 0.2]], device=device).log()
    teacher = SparseLogProbs(indices, log_probs, tail=tail)
    loss, gradient, _ = run(student, teacher, backend=backend)
    assert (loss[1:] == 0).all() and (gradient[1:] == 0).all() and loss[0] > 0
    mean = fused_kl(student, teacher, backend=backend)
    torch.testing.assert_close(mean, loss[0] / (3 if tail == "bucket" else 1))


# ---- numbers: known defects of other implementations


@kernel_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["kl", "js", "hellinger"])
def test_over_confident_student_learns_of_the_tail(backend, divergence, dtype):
    """The tail's gradient is right although 1 - sum(q) is 0 in fp32.

    Other implementations clamp log(1 - sum(q)). Their gradient was 300 times too small, or NaN.
    """
    device = device_of(backend)
    student = torch.randn(3, 300, device=device)
    student[:, :8] += torch.tensor([18.0, 60.0, 200.0], device=device)[:, None]
    student = student.to(dtype)
    indices = torch.arange(8, device=device).expand(3, 8)
    log_probs = torch.full((3, 8), 0.994 / 8, device=device).log()
    teacher = SparseLogProbs(indices, log_probs, tail_log_prob=torch.full((3,), 0.006, device=device).log())
    want = truth(student, teacher, divergence)
    got = run(student, teacher, divergence, backend=backend)
    assert_close(got, want, rounding(student, teacher, 1.0), Divergence(divergence), dtype)
    if divergence == "kl":  # the whole tail mass of the teacher acts on the student's unnamed classes, in each row
        torch.testing.assert_close(
            got[1][:, 8:].double().sum(-1),
            torch.full((3,), -0.006, dtype=torch.float64, device=device),
            rtol=2e-2,
            atol=0,
        )


@kernel_backends
@each_tail
def test_top_k_mass_that_rounds_to_one(backend, tail):
    """A teacher whose mass rounds to 1 has a finite loss; log(1 - 1) made it NaN elsewhere."""
    device = device_of(backend)
    indices = torch.tensor([[3, 7], [3, 7]], device=device)
    log_probs = torch.tensor([[-1e-9, -40.0], [-1e-12, -torch.inf]], device=device)
    teacher = SparseLogProbs(indices, log_probs, tail=tail)
    student = torch.randn(2, 50, device=device)
    want = truth(student, teacher)
    got = run(student, teacher, backend=backend)
    assert torch.isfinite(got[0]).all() and torch.isfinite(got[1]).all()
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-6)


def test_tail_that_is_not_given_is_exact():
    """A single class of log-probability -1e-9 leaves a tail of 1e-9; 1 - exp(-1e-9) is 0 in fp32."""
    teacher = SparseLogProbs(torch.tensor([[3]]), torch.tensor([[-1e-9]]))
    loss = fused_divergence(torch.tensor([[0.0, 0, 0, 30.0]]), teacher, "reverse_kl")
    p, q = 1e-9, 3 * torch.tensor(-30.0, dtype=torch.float64).exp()
    torch.testing.assert_close(loss.double(), q * (q / p).log() - q + p, rtol=1e-5, atol=0)


@kernel_backends
@each_tail
def test_gradient_has_the_factor_of_the_value(backend, tail):
    """The gradient agrees with central differences of the value, at temperature_squared=True.

    Another implementation multiplied its value by T**2, and its gradient not.
    """
    device = device_of(backend)
    case = Case((2,), 30, 6, tail, False, False, torch.float32, torch.int64, 1.0, 0.0, 4.0, 0, False, 3)
    student, teacher = case.make(device)
    options = {"temperature": 4.0, "temperature_squared": True}
    _, gradient, _ = run(student, teacher, backend=backend, **options)
    direction = torch.randn(2, 30, dtype=torch.float64, device=device)
    losses = [
        fused_kl(
            student.double() + step * direction, as_double(teacher), reduction="sum", backend="reference", **options
        )
        for step in (1e-4, -1e-4)
    ]
    torch.testing.assert_close((gradient * direction).sum(), (losses[0] - losses[1]) / 2e-4, rtol=1e-4, atol=1e-6)


@kernel_backends
@each_tail
def test_padding_is_no_nan(backend, tail):
    """Padding (-inf at index 0) changes no row; another implementation's loss was NaN for it."""
    device = device_of(backend)
    student = torch.randn(2, 40, device=device)
    short = SparseLogProbs(
        torch.tensor([[5, 9, 0, 0], [1, 0, 0, 0]], device=device),
        torch.tensor([[-0.3, -2.0, -torch.inf, -torch.inf], [-0.1, *[-torch.inf] * 3]], device=device), tail=tail,
    )  # fmt: skip
    alone = [
        SparseLogProbs(short.indices[i : i + 1, :n], short.log_probs[i : i + 1, :n], tail=tail)
        for i, n in ((0, 2), (1, 1))
    ]
    loss, gradient, _ = run(student, short, backend=backend)
    for i, teacher in enumerate(alone):
        want = run(student[i : i + 1], teacher, backend=backend)
        torch.testing.assert_close(loss[i : i + 1], want[0])
        torch.testing.assert_close(gradient[i : i + 1], want[1])
    assert torch.isfinite(loss).all()


@kernel_backends
@pytest.mark.parametrize("tail", ["uniform", "bucket", "support"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_student_that_is_the_teacher_has_no_loss(backend, tail, temperature):
    """A student equal to its teacher has loss 0 at every temperature.

    Another implementation tempered the tail as one token on the teacher's side alone. Its loss was 2.07 at T = 4.
    """
    device = device_of(backend)
    whole = torch.full((1, 200), -3.0, device=device)
    whole[0, :5] = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0])
    teacher = kdkernels.topk_log_probs(whole, 5, temperature=temperature, backend=backend).with_tail(tail)
    loss, gradient, _ = run(whole, teacher, temperature=temperature, backend=backend)
    assert loss.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


@kernel_backends
def test_tail_of_16_bit_logits(backend):
    """The tail of bf16 logits is computed in fp32.

    Another implementation computed it in bf16 and gave the first class a gradient of 0.014 instead of 0.716.
    """
    device = device_of(backend)
    student = torch.zeros(1, 1000, device=device, dtype=torch.bfloat16)
    student[0, 0] = 9.0
    teacher = SparseLogProbs(torch.tensor([[0]], device=device), torch.tensor([[0.2]], device=device).log())
    want, got = truth(student, teacher), run(student, teacher, backend=backend)
    torch.testing.assert_close(got[1].double(), want[1], rtol=2**-8, atol=1e-8)
    assert got[1][0, 0] > 0.5


@kernel_backends
@each_tail
def test_infinite_and_nan_logits(backend, tail):
    device = device_of(backend)
    student = torch.randn(5, 60, device=device)
    student[0, 40:] = -torch.inf  # outside the entries
    student[1, 3] = -torch.inf  # an entry: kl is infinite
    student[2, 50] = torch.nan
    student[3, 3] = torch.nan
    indices = torch.tensor([3, 7, 11], device=device).expand(5, 3)
    log_probs = torch.tensor([0.5, 0.2, 0.1], device=device).log().expand(5, 3)
    teacher = SparseLogProbs(indices, log_probs, tail=tail)
    want, got = truth(student, teacher), run(student, teacher, backend=backend)
    assert torch.isfinite(got[0][4]) and got[0][1] == torch.inf and torch.isnan(got[0][3])
    assert torch.isfinite(got[0][0]) == (tail != "uniform")  # the teacher of "uniform" has mass outside the entries
    assert torch.isnan(got[0][2]) == (tail != "support")  # "support" does not read logits outside the entries
    assert_close([x[[0, 1, 2, 4]] for x in got[:2]], [x[[0, 1, 2, 4]] for x in want[:2]],
                 torch.full((4,), 1e-6), Divergence("kl"), torch.float32)  # fmt: skip
    assert torch.isnan(got[1][3][:12:4]).all()


@each_backend
def test_tail_mass_that_the_student_excludes(backend):
    """Tail mass on classes that the student excludes makes kl +inf, with the formula's finite gradient q - t."""
    device = device_of(backend)
    student = torch.tensor([[1.0, 0.5, -torch.inf, -torch.inf]], device=device)
    teacher = SparseLogProbs(torch.tensor([[0, 1]], device=device), torch.tensor([[0.5, 0.3]], device=device).log())
    loss, gradient, _ = run(student, teacher, backend=backend)
    q = torch.softmax(student, -1)
    assert loss.item() == torch.inf
    torch.testing.assert_close(gradient, q - torch.tensor([[0.5, 0.3, 0.0, 0.0]], device=device))
    loss, gradient, _ = run(student, teacher, Divergence("alpha", alpha=1.7), backend=backend)
    assert loss.item() == torch.inf and torch.isnan(gradient).all()


@each_backend
def test_tail_of_nothing_but_rounding(backend):
    """A tail of about 1e-8 is rounding and counts as no tail.

    A student without mass on the other classes has a finite loss.
    """
    device = device_of(backend)
    whole, student = torch.randn(24, 50, device=device), torch.randn(24, 50, device=device)
    log_probs, indices = torch.log_softmax(whole, -1).sort(-1, descending=True)
    loss, _, _ = run(student, SparseLogProbs(indices, log_probs), backend=backend)
    want, _, _ = run(student, whole, backend=backend)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    few = torch.where(torch.arange(50, device=device) < 10, whole, -torch.inf)
    top = kdkernels.topk_log_probs(few, 20, backend=backend)
    loss, _, _ = run(
        torch.where(torch.isinf(few), few, student), SparseLogProbs(top.indices, top.log_probs), backend=backend
    )
    assert torch.isfinite(loss).all()


@kernel_backends
def test_nan_outside_the_support_changes_no_gradient(backend):
    """NaN outside the support changes no gradient, also when a statistic reads it."""
    student = torch.randn(2, 8, device=device_of(backend))
    student[0, 5] = torch.nan
    log_probs = torch.tensor([[0.5, 0.2, 0.1]] * 2, device=student.device).log()
    teacher = SparseLogProbs(torch.tensor([[0, 1, 2]] * 2, device=student.device), log_probs, tail="support")
    plain = run(student, teacher, backend=backend)
    found = run(student, teacher, backend=backend, statistics=("student_entropy",))
    assert torch.isfinite(plain[1]).all() and torch.isnan(found[2]["student_entropy"]).tolist() == [True, False]
    torch.testing.assert_close(found[1], plain[1])


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("tail", ["bucket", "support"])
def test_threads_do_not_change_the_result(rows, tail):
    """Results are equal for any thread count: all threads share few rows, and each takes its own of many rows."""
    case = Case((rows,), 60_000, 64, tail, True, True, torch.bfloat16, torch.int32, 3.0, 0.0, 1.0, 5, False, 8)
    student, teacher = case.make()
    labels = torch.randint(0, 60_000, (rows,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                run(student, teacher, "js", vocab_size=60_000, labels=labels, hard_weight=0.2, backend="cpu")
            )
    finally:
        torch.set_num_threads(before)
    for loss, gradient, _ in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


# ---- torch


def small(backend, tail="bucket", dtype=torch.float32):
    device = device_of(backend)
    case = Case((2, 3), 40, 6, tail, False, True, dtype, torch.int64, 1.0, 0.0, 1.0, 0, False, 2)
    student, teacher = case.make(device)
    return student, replace(teacher, tail_log_prob=None) if tail == "uniform" else teacher


@each_tail
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend, tail):
    case = Case((2,), 9, 3, tail, True, False, torch.float64, torch.int64, 1.0, 0.0, 1.0, 0, False, 2)
    student, teacher = case.make()
    labels = torch.tensor([1, 5])
    call = partial(fused_divergence, teacher=as_double(teacher), divergence="js", labels=labels, hard_weight=0.3,
                   backend=backend)  # fmt: skip
    assert torch.autograd.gradcheck(lambda s: call(s), student.double().requires_grad_())
    if backend == "reference":
        assert torch.autograd.gradgradcheck(lambda s: call(s), student.double().requires_grad_())


@each_tail
def test_no_second_derivatives_outside_of_the_reference(tail):
    student, teacher = small("cpu", tail)
    loss = fused_kl(student.requires_grad_(), teacher)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("backend", ["cpu"])
@each_tail
def test_compiles_whole(backend, tail):
    student, teacher = small(backend, tail)

    def loss(student, indices, log_probs, tail_log_prob, temperature):
        teacher = SparseLogProbs(indices, log_probs, tail=tail, tail_log_prob=tail_log_prob)
        return fused_kl(student, teacher, temperature=temperature, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tempered = tail in ("support", "renormalize")
    for temperature in (1.0, 1.5, 2.5, 3.5) if tempered else (1.0,):
        x, y = (student.clone().requires_grad_() for _ in range(2))
        want = loss(x, teacher.indices, teacher.log_probs, teacher.tail_log_prob, temperature)
        got = compiled(y, teacher.indices, teacher.log_probs, teacher.tail_log_prob, temperature)
        want.backward()
        got.backward()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(y.grad, x.grad)


@pytest.mark.parametrize(
    ("backend", "tail"),
    [*(("cpu", tail) for tail in TAILS), ("cuda", "bucket"), ("cuda", "uniform"), ("triton", "bucket")],
)
def test_opcheck(backend, tail):
    student, teacher = small(backend, tail)
    count, one = 6, torch.ones(1, device=student.device)
    tail_log_prob = None if teacher.tail_log_prob is None else teacher.tail_log_prob.reshape(count)
    sparse = Sparse(teacher.log_probs.reshape(count, -1), teacher.indices.reshape(count, -1), tail_log_prob, one, tail)
    source = LogitsSource(student, None, None, 1.0, None)
    options = RowOptions(torch.ones(count, device=student.device), one)
    chunking = Chunking(None, None, 0, 2**20, False)
    problem = ChunkedRows(source, None, sparse, options, "kl", one, 40, True, chunking)
    opcheck(ops.chunked_rows, problem, [True, False, False], backend)
    opcheck(ops.topk_log_probs, TopK(source, options, 5, 40, chunking._replace(compact_rows=True)), backend)


@kernel_backends
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, use_reentrant):
    student, teacher = small(backend)
    x, y = (student.clone().requires_grad_() for _ in range(2))
    fused_kl(2 * x, teacher, backend=backend).backward()
    checkpoint(lambda s: fused_kl(2 * s, teacher, backend=backend), y, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, y.grad)


@kernel_backends
@each_tail
def test_retained_graph_and_autocast(backend, tail):
    student, teacher = small(backend, tail)
    x = student.clone().requires_grad_()
    with torch.autocast(student.device.type, torch.bfloat16):
        loss = fused_kl(x, teacher, backend=backend)
    (first,) = torch.autograd.grad(3 * loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    want = run(student, teacher, backend=backend, reduction="mean")
    torch.testing.assert_close(loss.detach(), want[0], rtol=0, atol=0)
    torch.testing.assert_close(first, 3 * second)
    assert loss.dtype == torch.float32


# ---- extraction


@each_backend
def test_topk_against_fp64(backend):
    @settings(max_examples=EXAMPLES[backend])
    @given(case=cases(tail=st.just("bucket")), k=st.sampled_from([1, 2, 7, 64, 300, 5000]), rounded=st.booleans())
    def check(case, k, rounded):
        if backend in ("cuda", "triton"):
            case = replace(case, vocab=min(case.vocab, 700), leading=case.leading[:2])
        logits, _ = case.make(device_of(backend))
        if rounded:  # many ties
            logits = logits.round()
        k = min(k, case.vocab)
        generator = torch.Generator().manual_seed(case.seed)
        mask = (torch.rand(case.leading, generator=generator) < 0.8).to(logits.device)
        options = {"temperature": case.temperature, "mask": mask, "vocab_size": case.vocab_size}
        got = kdkernels.topk_log_probs(logits, k, backend=backend, **options)
        want = kdkernels.topk_log_probs(logits.double(), k, backend="reference", **options)
        assert got.indices.dtype == torch.int32 and got.log_probs.dtype == torch.float32
        assert got.source_temperature == case.temperature and got.tail == "bucket"
        kept = want.indices >= 0
        # A probability that is 0 in fp32 may be above 0 in fp64.
        visible = kept & (got.log_probs > -torch.inf)
        assert torch.equal(got.indices[visible].long(), want.indices[visible].long())
        assert (got.log_probs[~mask] == -torch.inf).all() and (got.tail_log_prob[~mask] == 0).all()
        ulps = rounding(logits[..., : case.vocab].nan_to_num(0), want, case.temperature)
        tolerance = ulps[..., None].expand(kept.shape)
        assert_loss_close(got.log_probs, want.log_probs, tolerance)
        assert_loss_close(
            got.tail_log_prob, want.tail_log_prob, ulps + 1e-6 * want.tail_log_prob.abs().nan_to_num(0, 0, 0)
        )

    check()


@each_backend
def test_topk_of_hard_rows(backend):
    device = device_of(backend)
    logits = torch.randn(8, 2100, device=device)
    logits[0] = 1.5  # all tied: the first k win
    logits[1, 5:] = -torch.inf  # fewer than k classes have mass
    logits[2, 2000] = torch.nan
    logits[3, 77] = 90.0  # the other terms are below half an ulp of an fp32 sum
    logits[4] = -torch.inf
    logits[5, 3] = torch.inf
    logits[6, :9] = 200.0
    logits[7] = torch.nan
    got = kdkernels.topk_log_probs(logits, 9, backend=backend)
    assert got.indices[0].tolist() == list(range(9))
    torch.testing.assert_close(got.log_probs[0], torch.full((9,), 1 / 2100, device=device).log())
    assert (got.indices[1, 5:] == -1).all() and sorted(got.indices[1, :5].tolist()) == list(range(5))
    assert got.tail_log_prob[1] == -torch.inf
    for row in (2, 4, 5, 7):
        assert ((got.indices[row] >= -1) & (got.indices[row] < 2100)).all()
        assert torch.isnan(got.log_probs[row]).all() and torch.isnan(got.tail_log_prob[row]), row
    want = kdkernels.topk_log_probs(logits[[3, 6]].double(), 9, backend="reference")
    torch.testing.assert_close(got.tail_log_prob[[3, 6]].double(), want.tail_log_prob, rtol=1e-6, atol=0)
    assert want.tail_log_prob[0] < -80 and want.tail_log_prob[1] < -180
    assert got.indices[6].tolist() == list(range(9))


@each_backend
def test_topk_of_a_head(backend):
    device = device_of(backend)
    head = LinearLogits(torch.randn(5, 7, 8, device=device), torch.randn(203, 8, device=device), scale=0.5, softcap=3.0)
    mask = torch.rand(5, 7, device=device) < 0.6
    logits = 3 * torch.tanh(0.5 * head.hidden @ head.weight.t() / 3)
    want = kdkernels.topk_log_probs(logits, 10, temperature=2.0, mask=mask, backend="reference")
    for options in ({}, {"compact_rows": False, "chunk_rows": 8 if backend != "triton" else 20}):
        got = kdkernels.topk_log_probs(head, 10, temperature=2.0, mask=mask, backend=backend, **options)
        torch.testing.assert_close(got.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.tail_log_prob, want.tail_log_prob, rtol=1e-5, atol=1e-5)
        assert (got.indices == want.indices).float().mean() > 0.99  # near ties may swap


def test_topk_has_no_gradient_and_takes_strides():
    logits = torch.randn(2, 6, 50, requires_grad=True)
    got = kdkernels.topk_log_probs(logits[:, :-1], 3)
    assert not got.requires_grad and got.shape == (2, 5, 3)
    want = torch.log_softmax(logits[:, :-1], -1).topk(3, -1)
    torch.testing.assert_close(got.log_probs, want.values.detach())
    assert torch.equal(got.indices.long(), want.indices)


# ---- sampling


@pytest.mark.parametrize("exact", [0, 3])
@pytest.mark.parametrize("proposal_temperature", [1.5, 2.5, 1.0])
def test_sampled_teacher_is_unbiased(proposal_temperature, exact):
    """The mean gradient over many draws equals the dense teacher's within 5 standard errors."""
    torch.manual_seed(1)
    student, whole = torch.randn(1, 12, dtype=torch.float64), 2 * torch.randn(1, 12, dtype=torch.float64)
    samples, draws, generator = 5, 4000, torch.Generator().manual_seed(3)
    teacher = kdkernels.sampled_log_probs(
        whole.expand(draws, 12),
        samples,
        exact=exact,
        temperature=1.5,
        proposal_temperature=proposal_temperature,
        generator=generator,
    )
    assert teacher.tail == "truncate" and teacher.source_temperature == 1.5 and teacher.indices.dtype == torch.int32
    targets = torch.zeros(draws, 13, dtype=torch.float64).scatter_add(
        -1, torch.where(teacher.indices >= 0, teacher.indices, 12).long(), teacher.log_probs.exp()
    )[:, :12]
    p, g, q = (torch.softmax(x / t, -1)[0] for x, t in ((whole, 1.5), (whole, proposal_temperature), (student, 1.5)))
    certain = p.topk(exact).indices
    g[certain] = 0
    g /= g.sum()

    def assert_mean(found, of_draw, of_certain):
        """`of_draw` [drawn class, 12]: a sample's contribution; `of_certain` [12]: the exact classes' contribution."""
        mean = (g[:, None] * of_draw).sum(0)
        variance = ((g[:, None] * of_draw**2).sum(0) - mean**2).clamp(min=1e-24)
        error = (found.mean(0) - mean - of_certain).abs() / (variance / samples / draws).sqrt()
        assert error.max() < 5, error
        return mean + of_certain

    one_hot = torch.eye(12, dtype=torch.float64)
    weight = torch.where(g == 0, 0, p / g)[:, None]
    exactly = (p[:, None] * one_hot)[certain].sum(0)
    torch.testing.assert_close(targets[:, certain], exactly[certain].expand(draws, exact))
    torch.testing.assert_close(assert_mean(targets, weight * one_hot, exactly), p)
    _, gradient, _ = run(student.expand(draws, 12), teacher, temperature=1.5)
    _, want, _ = run(student, whole, temperature=1.5, backend="reference")
    of_certain = (exactly.sum() * q - exactly) / 1.5
    torch.testing.assert_close(assert_mean(gradient, weight * (q - one_hot) / 1.5, of_certain), want[0])
    if proposal_temperature == 1.5:
        torch.testing.assert_close(targets.sum(-1), torch.ones(draws, dtype=torch.float64))


def test_sampled_counts_and_reproducibility():
    whole = torch.randn(3, 4, 30)
    mask = torch.tensor([[True, False, True, True]] * 3)
    make = partial(kdkernels.sampled_log_probs, whole, 16, temperature=2.0, proposal_temperature=2.0, mask=mask)
    first, second = (make(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.indices, second.indices) and torch.equal(first.log_probs, second.log_probs)
    counts = first.log_probs.exp() * 16
    torch.testing.assert_close(counts, counts.round(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(counts.sum(-1), torch.where(mask, 16.0, 0.0), rtol=1e-4, atol=1e-4)
    assert (first.indices[~mask] == -1).all()
    there = first.indices[mask]
    for row in there:
        named = row[row >= 0]
        assert len(named.unique()) == len(named)
    with kdkernels.chunk_budget(1000):
        few_rows = make(generator=torch.Generator().manual_seed(5))
    assert few_rows.shape == first.shape


def test_exact_classes_are_each_there_once_and_share_a_mass_of_1_with_the_samples():
    whole = 3 * torch.randn(2, 5, 40)
    whole[0, 0, 1:] = -torch.inf  # no class is left to draw
    whole[0, 1, 3] = torch.nan
    teacher = kdkernels.sampled_log_probs(whole, 6, exact=4, generator=torch.Generator().manual_seed(2))
    assert teacher.shape == (2, 5, 10) and teacher.tail == "truncate"
    log_probs, top = torch.log_softmax(whole, -1), kdkernels.topk_log_probs(whole, 4)
    for row in ((0, 2), (1, 4)):
        named = teacher.indices[row]
        assert len(named[named >= 0].unique()) == (named >= 0).sum() > 4
        for index in top.indices[row]:
            at = (named == index).nonzero().item()
            torch.testing.assert_close(teacher.log_probs[row][at], log_probs[row][index])
        torch.testing.assert_close(teacher.log_probs[row].exp().sum(), torch.tensor(1.0))
    assert teacher.indices[0, 0].tolist() == [0] + 9 * [-1] and teacher.log_probs[0, 0, 0] == 0
    assert torch.isnan(teacher.log_probs[0, 1][teacher.indices[0, 1] >= 0]).all()
    # Samples come from the proposal restricted to the other classes, however improbable these are together.
    far = torch.tensor([[0.0, -10.0, -11.0]]).expand(4000, 3)
    teacher = kdkernels.sampled_log_probs(far, 2, exact=1, temperature=10.0, proposal_temperature=0.01)
    targets = torch.zeros(4000, 4).scatter_add(-1, teacher.indices.long() % 4, teacher.log_probs.exp())
    assert (targets[:, 1] > 0.2).all() and (teacher.log_probs[teacher.indices == 1] <= 0).all()
    every = kdkernels.sampled_log_probs(whole[1], 3, exact=40)
    torch.testing.assert_close(every.log_probs[:, :40], log_probs[1])
    assert (every.indices[:, 40:] == -1).all()


def test_sampled_of_a_head_and_of_nan():
    head = LinearLogits(torch.randn(4, 8), torch.randn(40, 8), softcap=3.0)
    whole = 3 * torch.tanh(head.hidden @ head.weight.t() / 3)
    got = kdkernels.sampled_log_probs(head, 8, generator=torch.Generator().manual_seed(2))
    want = kdkernels.sampled_log_probs(whole, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(got.log_probs, want.log_probs, rtol=1e-4, atol=1e-4)
    whole[1, 5] = torch.nan
    broken = kdkernels.sampled_log_probs(whole, 8)
    assert torch.isnan(broken.log_probs[1]).any() and not torch.isnan(broken.log_probs[[0, 2, 3]]).any()
    assert torch.isnan(fused_kl(torch.randn(4, 40), broken, reduction="none")).tolist() == [False, True, False, False]


def test_sampling_does_not_lose_a_long_tail():
    """A long tail keeps its mass of 0.01; fp32 sums over 100,001 classes gave 0.0118."""
    whole = torch.full((10, 100_001), 1e-7).log()
    whole[:, 0] = torch.tensor(0.99).log()
    teacher = kdkernels.sampled_log_probs(whole, 20_000, generator=torch.Generator().manual_seed(7))
    tail = torch.where(teacher.indices > 0, teacher.log_probs.exp(), 0).sum(-1).mean()
    assert abs(tail - 0.01) < 5 * (0.01 / 200_000) ** 0.5


def test_more_samples_than_classes():
    whole, student = torch.randn(4, 8), torch.randn(4, 8)
    teacher = kdkernels.sampled_log_probs(whole, 200_000, generator=torch.Generator().manual_seed(7))
    want = run(student, whole)
    got = run(student, teacher)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0.01)


# ---- bad input

INDICES = torch.tensor([[1, 2], [3, 4]])
LOG_PROBS = torch.tensor([[0.5, 0.2], [0.3, 0.1]]).log()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SparseLogProbs(INDICES.float(), LOG_PROBS), TypeError, "int32 or int64"),
        (lambda: SparseLogProbs([1], LOG_PROBS), TypeError, "expected a tensor; got list"),
        (lambda: SparseLogProbs(INDICES, LOG_PROBS.long()), TypeError, "fp32"),
        (lambda: SparseLogProbs(INDICES, LOG_PROBS[:1]), ValueError, "one shape"),
        (lambda: SparseLogProbs(INDICES[:, :0], LOG_PROBS[:, :0]), ValueError, "K from 1"),
        (lambda: SparseLogProbs(INDICES, LOG_PROBS, tail="ghost"), ValueError, "'bucket', 'renormalize'"),
        (lambda: SparseLogProbs(INDICES, LOG_PROBS, tail_log_prob=torch.zeros(3)), ValueError, "leading shape"),
        (
            lambda: SparseLogProbs(INDICES, LOG_PROBS, tail="support", tail_log_prob=torch.zeros(2)),
            ValueError,
            "no mass",
        ),
        (lambda: SparseLogProbs(INDICES, LOG_PROBS, source_temperature=0.0), ValueError, "> 0"),
        (lambda: SparseLogProbs(INDICES, LOG_PROBS, source_temperature=torch.ones(1)), TypeError, "number"),
        (lambda: SparseLogProbs(INDICES, LOG_PROBS.to("meta")), ValueError, "device"),
    ],
)
def test_bad_distributions(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("teacher", "options", "error", "message"),
    [
        ((INDICES + 7, LOG_PROBS), {}, ValueError, "below 9.*got 9 in row 0"),
        ((INDICES * 0, LOG_PROBS), {}, ValueError, "0 twice in row 0.*truncate"),
        ((INDICES, LOG_PROBS.abs()), {}, ValueError, "mass of at most 1; got .* in row 0"),
        ((INDICES, LOG_PROBS + 0.5), {}, ValueError, "mass of at most 1; got 1.15.* in row 0"),
        ((INDICES.repeat(1, 5), LOG_PROBS.repeat(1, 5)), {}, ValueError, "at most 9 entries.*got 10"),
        ((INDICES[:1], LOG_PROBS[:1]), {}, ValueError, "must agree in all dimensions"),
        ((INDICES, LOG_PROBS.clone().requires_grad_()), {}, ValueError, "detach"),
        ((INDICES, LOG_PROBS), {"temperature": 2.0}, ValueError, "source_temperature=1, .*; got 2 in row 0"),
        ((INDICES, LOG_PROBS), {"temperature": torch.tensor([1.0, 3.0])}, ValueError, "got 3 in row 1"),
        ((INDICES, LOG_PROBS), {"chunk_rows": 3}, ValueError, "LinearLogits"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_teachers(backend, teacher, options, error, message):
    student = torch.randn(2, 9, requires_grad=True)
    with pytest.raises(error, match=message):
        fused_kl(student, SparseLogProbs(*teacher), backend=backend, **options)
    assert student.grad is None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_tails(backend):
    student = torch.randn(2, 9)
    for tail in ("bucket", "uniform"):
        teacher = SparseLogProbs(INDICES, LOG_PROBS, tail=tail, tail_log_prob=torch.tensor([0.3, 0.3]).log())
        with pytest.raises(ValueError, match=r"mass of 1 together; got 0\.7 in row 1"):
            fused_kl(student, teacher, backend=backend)
    for tail in ("renormalize", "truncate"):
        for divergence in (d for d in DIVERGENCES if d.is_infinite_without_teacher):
            with pytest.raises(ValueError, match="'bucket', 'support' and 'uniform'"):
                fused_divergence(student, SparseLogProbs(INDICES, LOG_PROBS, tail=tail), divergence, backend=backend)
    with pytest.raises(TypeError, match="SparseLogProbs is a teacher"):
        fused_kl(SparseLogProbs(INDICES, LOG_PROBS), student, backend=backend)


def test_bad_values_make_their_row_nan_on_a_gpu():
    """A bad entry makes its row NaN without a synchronisation; a CPU with checked=False stands in for the GPU."""
    from kdkernels.families import topk
    from kdkernels.families.options import RowOptions

    one = torch.ones(1)
    options = RowOptions(torch.tensor([1.0, 1.0, 1.0, 0.0]), one)
    indices = torch.tensor([[1, 99], [2, 2], [3, 4], [99, 99]])
    log_probs = torch.tensor([[0.5, 0.2], [0.4, 0.4], [0.9, 0.9], [2.0, 2.0]]).log()
    sparse = topk.Sparse(log_probs, indices, None, one, "bucket")
    entries, row_scale = topk.entries_of(sparse, options, 9, checked=False)
    assert torch.isnan(row_scale).tolist() == [True, False, True, False] and row_scale[3] == 0
    # A repeated index counts once. Padding is the only index that equals the number of classes.
    assert entries.indices[1].tolist() == [2, 9] and (entries.indices <= 9).all()
    torch.testing.assert_close(entries.tail_log_prob[1].exp(), torch.tensor(0.6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: kdkernels.topk_log_probs(x, 0), ValueError, "from 1 to 9"),
        (lambda x: kdkernels.topk_log_probs(x, 10), ValueError, "from 1 to 9"),
        (lambda x: kdkernels.topk_log_probs(x, 2.0), TypeError, "int"),
        (lambda x: kdkernels.topk_log_probs(x, 2, temperature=0.0), ValueError, "> 0"),
        (
            lambda x: kdkernels.topk_log_probs(x, 2, temperature=torch.ones(2)),
            TypeError,
            "expected a number; got a tensor",
        ),
        (lambda x: kdkernels.topk_log_probs(x, 2, mask=torch.ones(3, dtype=torch.bool)), ValueError, "leading shape"),
        (lambda x: kdkernels.topk_log_probs(x, 2, vocab_size=10), ValueError, "vocab_size"),
        (lambda x: kdkernels.topk_log_probs(x.long(), 2), TypeError, "float32"),
        (lambda x: kdkernels.topk_log_probs([1.0], 2), TypeError, "list"),
        (lambda x: kdkernels.topk_log_probs(x, 2, chunk_rows=1), ValueError, "LinearLogits"),
        (lambda x: kdkernels.sampled_log_probs(x, 0), ValueError, "at least 1"),
        (lambda x: kdkernels.sampled_log_probs(x, 1, exact=-1), ValueError, "exact: expected from 0"),
        (lambda x: kdkernels.sampled_log_probs(x, 1, exact=1.0), TypeError, "exact"),
        (lambda x: kdkernels.sampled_log_probs(x, 3, proposal_temperature=-1.0), ValueError, "proposal_temperature"),
    ],
)
def test_bad_extractions(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 9))
