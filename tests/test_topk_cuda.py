"""The CUDA kernels of sparse teachers against the reference in fp64: the loss, and the extraction of the top k.

Without a GPU every test runs in the execution model of CUDA (cuda_model/), on chips of chips.py.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import chips
import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from truth import DEVICE, DIVERGENCES, assert_gradient_close, assert_loss_close

from kdkernels import Divergence
from kdkernels.backends import native
from kdkernels.backends.reference import topk as reference
from kdkernels.families.options import RowOptions
from kdkernels.families.rows import ROW_STATISTICS
from kdkernels.families.topk import Entries, TopkRows

pytestmark = pytest.mark.skipif(emulated.missing_because is not None, reason=str(emulated.missing_because))

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGERS[x.element_size()])


def assert_same_bits(one, other, what=""):
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"{what}: result {number}, {(bits(a) != bits(b)).sum()} elements"


def on(chip: str, seed: int = 0):
    """Selects the chip of the execution model; does nothing on a GPU."""
    return nullcontext() if DEVICE == "cuda" else chips.on(chip, seed)


# ---- calls


@dataclass(frozen=True)
class Call:
    """A problem of topk_rows on a CPU."""

    student: torch.Tensor  # [outer, inner, columns]
    indices: torch.Tensor
    log_probs: torch.Tensor
    tail_log_prob: torch.Tensor
    row_scale: torch.Tensor
    temperature: torch.Tensor
    vocab: int
    labels: torch.Tensor | None = None
    hard_weight: torch.Tensor | None = None
    temperature_squared: bool = False
    conditional: bool = False

    def problem(self, divergence: Divergence, student: torch.Tensor, dtype=torch.float32, statistics=True) -> TopkRows:
        """The problem for these student logits, on the student's device. Other numbers have the dtype `dtype`."""
        device = student.device
        parameter = 1.0 if divergence.parameter is None else divergence.parameter
        numbers = [
            x if x is None else x.to(device, dtype)
            for x in (self.log_probs, self.tail_log_prob, self.row_scale, self.temperature, self.hard_weight)
        ]
        log_probs, tail_log_prob, row_scale, temperature, hard_weight = numbers
        labels = None if self.labels is None else self.labels.to(device)
        options = RowOptions(row_scale, temperature, labels, hard_weight, self.temperature_squared)
        entries = Entries(self.indices.to(device), log_probs, tail_log_prob)
        parameters = torch.full((1,), parameter, dtype=dtype, device=device)
        return TopkRows(
            student, entries, options, divergence.name, parameters, self.vocab, statistics, self.conditional
        )

    def run(self, divergence, chip="small", seed=0, gradient=True, statistics=True, in_place=False):
        """Loss, gradient, statistics and top-1 from the kernels."""
        student = self.student.to(DEVICE)
        if in_place:
            student = student.contiguous().clone()
        problem = self.problem(divergence, student, statistics=statistics)
        with on(chip, seed):
            got = native.cuda.topk_rows(problem, gradient, student if in_place else None)
        return tuple(x.cpu() for x in got)

    def truth(self, divergence):
        """The same results from the reference in fp64."""
        student = self.student.double().requires_grad_()
        # On a CPU the reference raises for invalid values, so the tests of those do not call it.
        loss, statistics, top1 = reference.topk_rows(self.problem(divergence, student, torch.float64))
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        return loss.detach(), gradient, statistics, top1


def kept_rows(call: Call) -> torch.Tensor:
    return call.row_scale != 0


def ulps(call: Call) -> torch.Tensor:
    """4 ulp of the size of a row's log-probabilities in fp32, as in truth.rounding."""
    student = call.student.double().flatten(0, 1)[:, : call.vocab] / call.temperature.double()[:, None]
    lse = student.logsumexp(-1)
    lowest = torch.where(torch.isfinite(student), student, lse[:, None]).amin(-1)
    of_student = torch.maximum(lse.abs(), (lse - lowest).clamp(max=87.0))
    of_teacher = -call.log_probs.double().clamp(min=-87.0).amin(-1)
    return 4 * 2.0**-23 * torch.maximum(of_student, of_teacher).nan_to_num(1).clamp(min=1)


def assert_right(call: Call, divergence: Divergence, got, what="", gradient=True, statistics=True):
    loss, found_gradient, found_statistics, top1 = got
    want_loss, want_gradient, want_statistics, want_top1 = call.truth(divergence)
    temperature = call.temperature.double().expand_as(want_loss)
    allowed = ulps(call)
    # The slopes of a row are at most its loss plus 1.
    size = (1 + want_statistics[0].nan_to_num(0, 0, 0).abs()) * call.row_scale.double().abs().nan_to_num(0)
    if call.temperature_squared:
        size = size * torch.maximum(temperature, torch.ones(())) ** 2
    assert_loss_close(loss, want_loss, 1e-6 * want_loss.abs() + allowed * size, f"loss {what}")
    if gradient:
        assert (found_gradient[..., call.vocab :] == 0).all(), what
        of_row = 2 * allowed * size / torch.minimum(temperature, torch.ones(()))
        # If rounding decides the sign of p - q, tv's slope may have either sign.
        of_class = 0
        if divergence.name == "tv":
            of_class = undecided_signs(call, allowed)
        found, right = (x.flatten(0, 1)[:, : call.vocab] for x in (found_gradient, want_gradient))
        too_large = right.abs() > torch.finfo(found.dtype).max  # a steep divergence overflows fp16 if q is small
        assert found[too_large].isinf().all(), what
        found, right = (torch.where(too_large, 0, x) for x in (found, right))
        assert_gradient_close(found, right, of_row, f"gradient {what}", of_class)
    if statistics:
        for name, value, right in zip(ROW_STATISTICS, found_statistics, want_statistics, strict=True):
            tolerance = 1e-6 * right.abs() + allowed * (1 + right.abs().nan_to_num(0, 0, 0))
            assert_loss_close(value, right, tolerance, f"{name} {what}")
        settled = torch.isfinite(want_statistics[list(ROW_STATISTICS).index("student_lse")])
        assert torch.equal(top1[:, settled], want_top1[:, settled]), (what, top1, want_top1)


def undecided_signs(call: Call, allowed: torch.Tensor) -> torch.Tensor:
    """The error allowed in the gradient of tv where rounding decides the sign of p - q."""
    lq = (call.student.double().flatten(0, 1)[:, : call.vocab] / call.temperature.double()[:, None]).log_softmax(-1)
    there = call.indices < call.vocab
    of_entries = lq.gather(-1, torch.where(there, call.indices, 0).long())
    named = torch.zeros(lq.shape[0], call.vocab + 1, dtype=torch.bool)
    named.scatter_(-1, torch.where(there, call.indices, call.vocab).long(), True)
    others = lq.masked_fill(named[:, : call.vocab], -torch.inf).logsumexp(-1)
    if call.conditional:
        of_entries = of_entries - of_entries.masked_fill(~there, -torch.inf).logsumexp(-1, keepdim=True)
    near = there & ((of_entries - call.log_probs.double()).abs() <= 4 * allowed[:, None])
    off = torch.where(near, of_entries.exp(), 0).sum(-1)
    if not call.conditional:
        off = off + torch.where((others - call.tail_log_prob.double()).abs() <= 4 * allowed, others.exp(), 0)
    scale = call.row_scale.double().abs() * torch.maximum(call.temperature, 1 / call.temperature).double()
    return (2 * off * scale).nan_to_num(0)[:, None]


# ---- recipes


@dataclass(frozen=True)
class Recipe:
    """Recipe for a call: hypothesis draws these numbers, not tensors."""

    vocab: int
    entries: int
    dtype: torch.dtype
    outer: int = 1
    inner: int = 3
    padding: int = 0  # columns past the vocabulary, filled with NaN
    strided: bool = False
    scale: float = 2.0
    offset: float = 0.0
    closeness: float = 0.0  # 1: the teacher equals the student
    ragged: bool = False  # rows have different numbers of entries
    masked: bool = False
    labels: bool = False
    hard_weight: float | None = None
    temperature: float | None = 1.0  # None: one per row
    temperature_squared: bool = False
    conditional: bool = False
    mass: float = 1.0  # the sum over entries and tail; conditional: over the entries
    seed: int = 0

    def make(self) -> Call:
        generator = torch.Generator().manual_seed(self.seed)
        rows, vocab = self.outer * self.inner, self.vocab

        def normal():
            return torch.randn(rows, vocab, dtype=torch.float64, generator=generator)

        def uniform(low, high):
            return low + (high - low) * torch.rand(rows, generator=generator, dtype=torch.float64)

        logits = self.scale * normal()
        logits[:, 0] += 3 * self.scale
        logits = (logits + self.offset).to(self.dtype)
        temperature = uniform(0.5, 3.0).float() if self.temperature is None else torch.full((rows,), self.temperature)
        teacher = self.closeness * logits.double() + (1 - self.closeness) * self.scale * normal()
        teacher = (teacher / temperature.double()[:, None]).log_softmax(-1)
        indices, log_probs, tail = self.entries_of(teacher, generator)

        shape = (self.outer, self.inner + self.strided, vocab + self.padding)
        student = torch.full(shape, torch.nan, dtype=self.dtype)[:, : self.inner]
        student[..., :vocab] = logits.view(self.outer, self.inner, vocab)
        row_scale = uniform(-1.0, 2.0).float()
        if self.masked:
            row_scale = torch.where(uniform(0, 1) < 0.4, 0, row_scale)
            skipped = row_scale == 0
            student[skipped.view(self.outer, self.inner)] = torch.nan
            log_probs[skipped], indices[skipped] = torch.nan, 2**31 - 1
        labels = torch.randint(0, vocab, (rows,), generator=generator) if self.labels else None
        hard_weight = None if self.hard_weight is None else torch.full((1,), self.hard_weight)
        return Call(
            student, indices, log_probs, tail, row_scale, temperature, vocab, labels, hard_weight,
            self.temperature_squared, self.conditional,
        )  # fmt: skip

    def entries_of(self, teacher: torch.Tensor, generator):
        """Draws classes in ascending order, the most likely among them; absent entries come last."""
        rows, vocab = teacher.shape
        drawn = torch.rand(rows, vocab, generator=generator) + (teacher == teacher.amax(-1, keepdim=True))
        indices = drawn.topk(self.entries, -1).indices
        if self.ragged:
            absent = torch.rand(rows, self.entries, generator=generator) < 0.3
            absent[0] = True
            indices = torch.where(absent, vocab, indices)
        indices = indices.sort(-1).values
        there = indices < vocab
        log_probs = torch.where(there, teacher.gather(-1, torch.where(there, indices, 0)), -torch.inf)
        named = torch.zeros(rows, vocab + 1, dtype=torch.bool).scatter(-1, indices, True)[:, :vocab]
        tail = teacher.masked_fill(named, -torch.inf).logsumexp(-1)
        if self.conditional:
            log_probs = torch.where(there, log_probs - log_probs.logsumexp(-1, keepdim=True), -torch.inf)
            tail = torch.full_like(tail, -torch.inf)
        log_mass = torch.tensor(self.mass).log()
        return indices.to(torch.int32), (log_probs + log_mass).float(), (tail + log_mass).float()


SIZES = [(1, 1), (7, 1), (7, 3), (7, 7), (64, 3), (64, 64), (1000, 1), (1000, 64), (1000, 1000), (9001, 3), (9001, 64)]
recipes = st.builds(
    lambda size, **others: Recipe(*size, **others),
    size=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES),
    outer=st.sampled_from([1, 2]),
    inner=st.sampled_from([1, 3]),
    padding=st.sampled_from([0, 1, 9]),
    strided=st.booleans(),
    scale=st.sampled_from([0.5, 3.0, 12.0]),
    offset=st.sampled_from([0.0, 80.0]),
    closeness=st.sampled_from([0.0, 0.9, 1.0]),
    ragged=st.booleans(),
    masked=st.booleans(),
    labels=st.booleans(),
    temperature=st.sampled_from([1.0, 2.0, None]),
    temperature_squared=st.booleans(),
    conditional=st.booleans(),
    mass=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)


# ---- the loss


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_against_the_reference_in_fp64(divergence):
    @settings(max_examples=8)
    @given(
        recipe=recipes, hard_weight=st.sampled_from([None, 0.0, 0.25, 1.0]), gradient=st.booleans(),
        statistics=st.booleans(), chip=st.sampled_from(list(chips.CHIPS)),
    )  # fmt: skip
    def property_holds(recipe, hard_weight, gradient, statistics, chip):
        recipe = replace(recipe, hard_weight=hard_weight if recipe.labels else None)
        if divergence.is_steep:  # its powers overflow fp32
            recipe = replace(recipe, scale=min(recipe.scale, 3.0))
        call = recipe.make()
        got = call.run(divergence, chip, recipe.seed, gradient, statistics)
        assert_right(call, divergence, got, "", gradient, statistics)

    property_holds()


WIDE = [
    Recipe(9001, 64, torch.float32, 2, 1, labels=True, hard_weight=0.3, temperature=None, ragged=True, masked=True),
    Recipe(9001, 9001, torch.bfloat16, 1, 2, 7, labels=True, hard_weight=0.3, temperature=2.0),
    Recipe(9001, 3, torch.float16, 1, 3, 3, strided=True, temperature=0.5, temperature_squared=True, seed=3),
    Recipe(9001, 64, torch.bfloat16, 1, 3, 7, labels=True, hard_weight=0.5, temperature=2.0, conditional=True),
]  # fmt: skip


@pytest.mark.parametrize("chip", chips.CHIPS)
@pytest.mark.parametrize("recipe", WIDE, ids=["ragged", "every class an entry", "strided", "conditional"])
def test_wide_rows(recipe, chip):
    call = recipe.make()
    for divergence in (DIVERGENCES[0], DIVERGENCES[3]):
        assert_right(call, divergence, call.run(divergence, chip, 5), chip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_on_an_h100(dtype):
    recipe = Recipe(152_064, 100, dtype, 1, 2, labels=True, hard_weight=0.3, temperature=2.0, scale=3.0)
    call = recipe.make()
    for statistics in (False, True):
        got = call.run(DIVERGENCES[0], "h100", 1, True, statistics)
        assert_right(call, DIVERGENCES[0], got, "", True, statistics)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=repr)
def test_gradient_in_place_is_the_fresh_one(divergence, conditional):
    for number, chip in enumerate(name for name in chips.CHIPS if name != "h100"):
        recipe = Recipe(
            (301, 1000, 64, 3001)[number % 4], (5, 64, 64, 100)[number % 4], DTYPES[number % 3], 1, 4, number % 2 * 5,
            labels=number % 3 != 2, hard_weight=0.5 if number % 3 != 2 else None, masked=number % 2 == 0,
            temperature=2.0, conditional=conditional, seed=number,
        )  # fmt: skip
        call = recipe.make()
        for statistics in (False, True):
            fresh = call.run(divergence, chip, number, True, statistics)
            in_place = call.run(divergence, chip, number + 1, True, statistics, in_place=True)
            assert_same_bits(fresh, in_place, f"{chip}, {recipe}")
            assert_right(call, divergence, fresh, chip, True, statistics)


def test_no_result_depends_on_the_order_of_threads():
    @settings(max_examples=25)
    @given(recipe=recipes, divergence=st.sampled_from(DIVERGENCES), chip=st.sampled_from(list(chips.CHIPS)[1:]))
    def property_holds(recipe, divergence, chip):
        call = replace(recipe, hard_weight=0.3 if recipe.labels else None).make()
        first = call.run(divergence, chip, recipe.seed)
        for seed in (1, 2):
            assert_same_bits(first, call.run(divergence, chip, recipe.seed + seed), chip)

    property_holds()


def test_a_conditional_row_reads_only_its_entries():
    """A conditional row must read only the logits of its entries: the model allows no other memory
    (emulated.memory_of), the other logits are NaN, and their gradient is 0.
    """
    recipe = Recipe(1000, 20, torch.float32, 1, 3, conditional=True, labels=True, ragged=True, temperature=1.5)
    call = recipe.make()
    right = call.truth(DIVERGENCES[0])
    named = torch.zeros(3, 1001, dtype=torch.bool).scatter(-1, call.indices.long(), True)[:, :1000]
    student = torch.where(named, call.student[0], torch.nan)[None]
    for chip in ("small", "a100", "h100"):
        got = replace(call, student=student).run(DIVERGENCES[0], chip, statistics=False)
        torch.testing.assert_close(got[0].double(), right[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1].double(), right[1], rtol=1e-5, atol=1e-6)
        assert (got[1][0][~named] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_sure_student_has_an_exact_gradient_outside_the_entries(divergence):
    """The bucket has 1e-60 of the student's mass, which underflows fp32. Its logarithm must be exact, and so must its
    classes' gradients, each relative to its own size.
    """
    vocab, torch_generator = 700, torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, vocab, generator=torch_generator) * 3
    indices = torch.arange(100, 110, dtype=torch.int32).repeat(2, 1)
    logits[..., 100:110] += 138.0
    log_probs = torch.full((2, 10), 0.09).log()
    call = Call(logits, indices, log_probs, torch.full((2,), 0.1).log(), torch.ones(2), torch.ones(2), vocab)
    want_loss, right, _, _ = call.truth(divergence)
    named = torch.zeros(vocab, dtype=torch.bool)
    named[100:110] = True
    assert (logits.double().log_softmax(-1)[..., ~named].logsumexp(-1) < -120).all()
    for chip in ("small", "streaming", "a100"):
        got = call.run(divergence, chip)
        if divergence.is_steep and (want_loss > torch.finfo(torch.float32).max).all():
            assert got[0].isinf().all(), got[0]
            continue
        assert_right(call, divergence, got, chip)
        want = right[..., ~named]
        seen = want.abs() > 1e-36  # the range of fp32
        assert divergence.name != "kl" or want.abs().max() > 1e-2, want
        torch.testing.assert_close(got[1][..., ~named][seen].double(), want[seen], rtol=2e-5, atol=0)


def test_entries_of_hardly_any_mass():
    """The bucket's share is 1 - 1e-9 and the divergence is of the size 1e-9."""
    vocab = 500
    logits = torch.randn(1, 2, vocab)
    logits[..., 40:44] -= 20.0
    indices = torch.arange(40, 44, dtype=torch.int32).repeat(2, 1)
    log_probs = torch.full((2, 4), 3e-10).log()
    tail = torch.log1p(-log_probs.double().exp().sum(-1)).float()
    call = Call(logits, indices, log_probs, tail, torch.ones(2), torch.ones(2), vocab)
    for divergence in DIVERGENCES:
        assert_right(call, divergence, call.run(divergence, "a100"))
    loss, right = call.run(Divergence("kl"))[0], call.truth(Divergence("kl"))[0]
    assert (right < 1e-7).all() and (loss.double() - right).abs().max() < 4e-7


def test_logits_of_minus_infinity():
    """The student's logit is -inf for an entry, another class, all other classes, all entries, or the whole row."""
    vocab, entries = 90, torch.tensor([3, 5, 40, 41, 88], dtype=torch.int32)
    logits = torch.randn(1, 6, vocab)
    named = torch.zeros(vocab, dtype=torch.bool)
    named[entries.long()] = True
    logits[0, 0, 5], logits[0, 1, 7], logits[0, 1, 50:] = -torch.inf, -torch.inf, -torch.inf
    logits[0, 2, ~named], logits[0, 3, named], logits[0, 4] = -torch.inf, -torch.inf, -torch.inf
    for tail in (-torch.inf, 0.3):
        log_probs = torch.randn(6, 5).log_softmax(-1) + (torch.tensor(0.7).log() if tail > 0 else 0)
        tail_log_prob = torch.full((6,), tail).log() if tail > 0 else torch.full((6,), tail)
        for conditional in (False, True):
            if conditional and tail > 0:
                continue
            call = Call(
                logits, entries.repeat(6, 1), log_probs, tail_log_prob, torch.ones(6), torch.full((6,), 1.5), vocab,
                conditional=conditional,
            )  # fmt: skip
            for divergence in DIVERGENCES:
                loss, gradient, _, _ = call.truth(divergence)
                for chip in ("small", "a100"):
                    got = call.run(divergence, chip)
                    what = f"{divergence} {chip} tail {tail} conditional {conditional}"
                    assert torch.equal(got[0].isnan(), loss.isnan()), (what, got[0], loss)
                    assert torch.equal(got[0].isinf(), loss.isinf()), (what, got[0], loss)
                    finite = torch.isfinite(loss)
                    torch.testing.assert_close(got[0][finite].double(), loss[finite], rtol=1e-5, atol=1e-5)
                    found, right = got[1][0, finite], gradient[0, finite]
                    assert torch.equal(found.isnan(), right.isnan()), what
                    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-6, equal_nan=True)


NANS = {
    torch.float32: [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001],
    torch.bfloat16: [0x7FC0, 0x7FFF, -1, 0x7F81],
    torch.float16: [0x7E00, 0x7FFF, -1, 0x7C01],
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_makes_its_row_nan_and_no_other(dtype):
    """The NaN is in an entry's logit, another class's logit, an entry's log-probability, or the tail."""
    recipe = Recipe(600, 20, dtype, 1, 8, labels=True, hard_weight=0.5, temperature=2.0)
    clean = recipe.make()
    student, log_probs, tail = clean.student.clone(), clean.log_probs.clone(), clean.tail_log_prob.clone()
    patterns = torch.tensor(NANS[dtype]).to(INTEGERS[dtype.itemsize]).view(dtype)
    named = torch.zeros(8, 601, dtype=torch.bool).scatter(-1, clean.indices.long(), True)[:, :600]
    for row in range(4):
        other = named[row].logical_not().nonzero()[row * 100 + 7, 0] if row % 2 else clean.indices[row, 4].long()
        student[0, row, other] = patterns[row]
    log_probs[4, 7], tail[5] = torch.nan, torch.nan
    call = replace(clean, student=student, log_probs=log_probs, tail_log_prob=tail)
    for number, divergence in enumerate(DIVERGENCES):
        right = clean.truth(divergence)
        loss, gradient, statistics, top1 = call.run(divergence, ("small", "streaming", "a100")[number % 3])
        assert loss[:6].isnan().all() and gradient[0, :6].isnan().all(), (divergence, loss, gradient)
        assert ((top1 >= 0) & (top1 < 600)).all()
        torch.testing.assert_close(loss[6:].double(), right[0][6:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(statistics[:, 6:].double(), right[2][:, 6:], rtol=1e-4, atol=1e-5)


def test_bad_values_make_their_row_nan():
    recipe = Recipe(300, 20, torch.float32, 1, 9, labels=True, hard_weight=0.5)
    clean = recipe.make()
    temperature, labels, row_scale = clean.temperature.clone(), clean.labels.clone(), clean.row_scale.clone()
    hard_weight = torch.full((9,), 0.5)
    temperature[0], temperature[1], temperature[2], temperature[3] = 0, -1, torch.nan, torch.inf
    labels[4], labels[5], hard_weight[6], row_scale[7] = 300, -1, 1.5, torch.nan
    call = replace(clean, temperature=temperature, labels=labels, row_scale=row_scale, hard_weight=hard_weight)
    for conditional in (False, True):
        for chip in ("small", "a100"):
            loss, gradient, statistics, top1 = replace(call, conditional=conditional).run(DIVERGENCES[0], chip)
            assert loss[:8].isnan().all() and gradient[0, :8].isnan().all()
            assert torch.isfinite(loss[8]) and torch.isfinite(gradient[0, 8]).all()
            assert torch.isfinite(statistics[:, 8]).all() and ((top1 >= 0) & (top1 < 300)).all()
    loss, gradient, _, _ = replace(call, labels=None, hard_weight=None, conditional=True).run(
        DIVERGENCES[0], "a100", statistics=False
    )
    assert gradient[0, 7].isnan().all(), "a row without a sweep is NaN too"
    assert torch.isfinite(gradient[0, 8]).all()


def test_indices_that_name_no_class_touch_no_memory():
    recipe = Recipe(100, 4, torch.float32, 1, 2)
    call = recipe.make()
    indices = torch.tensor([[-(2**31), -5, 3, 2**31 - 1], [-1, 99, 100, 101]], dtype=torch.int32)
    for conditional in (False, True):
        for chip in ("small", "a100"):
            got = replace(call, indices=indices, conditional=conditional).run(DIVERGENCES[0], chip)
            assert torch.isfinite(got[0]).all() and torch.isfinite(got[1]).all()


def test_rows_past_a_skipped_one_and_none_at_all():
    recipe = Recipe(257, 9, torch.bfloat16, 1, 5, padding=3)
    call = recipe.make()
    call.row_scale[:] = torch.tensor([0.0, 1.0, 0.0, 0.0, -2.0])
    call.student[0, call.row_scale == 0] = torch.nan
    for chip in ("single", "streaming"):
        got = call.run(DIVERGENCES[3], chip)
        assert_right(call, DIVERGENCES[3], got, chip)
        assert not got[0][[0, 2, 3]].any() and not got[1][0, [0, 2, 3]].any() and not got[2][:, [0, 2, 3]].any()
    empty = replace(
        call, student=call.student[:, :0], indices=call.indices[:0], log_probs=call.log_probs[:0],
        tail_log_prob=call.tail_log_prob[:0], row_scale=call.row_scale[:0], temperature=call.temperature[:0],
    )  # fmt: skip
    assert [x.numel() for x in empty.run(DIVERGENCES[0])] == [0, 0, 0, 0]


# ---- how a call is launched


def launches(call: Call, chip: str, gradient: bool, statistics: bool) -> list[dict]:
    """Without the launch of the kernel of close rows, which follows."""
    problem = call.problem(DIVERGENCES[0], call.student, statistics=statistics)
    with chips.on(chip) as model:
        model.clear_launches()
        native.cuda.topk_rows(problem, gradient)
        return model.launches()[::2]


@pytest.mark.parametrize(
    ("vocab", "dtype", "cluster"),
    [(1000, torch.bfloat16, 1), (32_000, torch.bfloat16, 1), (152_064, torch.bfloat16, 4),
     (262_144, torch.bfloat16, 8), (152_064, torch.float32, 8), (262_144, torch.float32, 16)],
)  # fmt: skip
def test_a_row_is_held_by_the_smallest_cluster_that_leaves_room_for_another(vocab, dtype, cluster):
    call = Recipe(vocab, 8, dtype, 1, 1).make()
    call.row_scale[:] = 0
    (launch,) = launches(call, "h100", gradient=True, statistics=False)
    assert launch["cluster"] == cluster
    per_block = -(-vocab // cluster // 8) * 8
    staged = per_block * dtype.itemsize + per_block // 8
    slots = launch["block"][0] // 32 + (2 * cluster if cluster > 1 else 0)
    assert launch["shared"] == 64 + -(-staged // 16) * 16 + 32 * slots
    assert 2 * (launch["shared"] + 1024) <= 228 * 1024


def test_one_sweep_is_streamed():
    call = Recipe(3000, 8, torch.bfloat16, 1, 2).make()
    for gradient, statistics, conditional, staged in (
        (False, False, False, False), (True, False, False, True), (False, True, False, True),
        (True, False, True, False),
    ):  # fmt: skip
        (launch,) = launches(replace(call, conditional=conditional), "h100", gradient=gradient, statistics=statistics)
        assert (launch["shared"] > 3000) == staged, (gradient, statistics, conditional)


# ---- the extraction


def topk(logits, row_scale, temperature, k, vocab, chip="small", seed=0):
    arguments = (logits.to(DEVICE), row_scale.to(DEVICE), temperature.to(DEVICE), k, vocab)
    with on(chip, seed):
        return tuple(x.cpu() for x in native.cuda.topk(*arguments))


def assert_topk_right(got, logits, row_scale, temperature, k, vocab, what=""):
    indices, log_probs, tail = got
    want = reference.topk(logits.double(), row_scale.double(), temperature.double(), k, vocab)
    want_indices, want_log_probs, want_tail = want
    is_nan = want_tail.isnan()
    assert torch.equal(tail.isnan(), is_nan) and log_probs[is_nan].isnan().all(), (what, tail, want_tail)
    assert ((indices[is_nan] >= 0) & (indices[is_nan] < vocab)).all(), what
    assert torch.equal(indices[~is_nan], want_indices[~is_nan]), (what, indices, want_indices)
    for value, right in ((log_probs, want_log_probs), (tail, want_tail)):
        allowed = 4 * 2.0**-23 * (1 + right[~is_nan].nan_to_num(0, 0, 0).abs())
        assert_loss_close(value[~is_nan], right[~is_nan], allowed, what)


@settings(max_examples=60)
@given(
    size=st.sampled_from([*SIZES, (1000, 300), (9001, 300), (9001, 1500)]), dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(1, 1), (1, 3), (2, 2)]), padding=st.sampled_from([0, 1, 9]), strided=st.booleans(),
    scale=st.sampled_from([0.0, 0.05, 3.0, 30.0]), infinite=st.sampled_from([0.0, 0.1, 0.99]), masked=st.booleans(),
    chip=st.sampled_from(list(chips.CHIPS)), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_largest_against_the_reference(size, dtype, shape, padding, strided, scale, infinite, masked, chip, seed):
    (vocab, k), generator = size, torch.Generator().manual_seed(seed)
    rows = shape[0] * shape[1]
    wide = torch.full((shape[0], shape[1] + strided, vocab + padding), torch.nan, dtype=dtype)
    logits = wide[:, : shape[1]]
    logits[..., :vocab] = (scale * torch.randn(*shape, vocab, generator=generator)).to(dtype)
    logits[..., :vocab][torch.rand(*shape, vocab, generator=generator) < infinite] = -torch.inf
    row_scale = torch.ones(rows)
    if masked:
        row_scale = (torch.rand(rows, generator=generator) < 0.6).float()
        logits[(row_scale == 0).view(shape)] = torch.nan
    temperature = 0.5 + 2 * torch.rand(rows, generator=generator)
    got = topk(logits, row_scale, temperature, k, vocab, chip, seed)
    assert_topk_right(got, logits, row_scale, temperature, k, vocab, chip)


def rows_of_trouble(vocab: int) -> dict[str, torch.Tensor]:
    """Rows with ties, and rows whose largest logits fall in few groups: a threshold on group maxima sees few logits."""
    column = torch.arange(vocab).float()
    random = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    return {
        "ascending": column / 100,
        "descending": -column / 100,
        "in one group": torch.where(column % 4096 == 8, 50 + random, random),
        "in few threads": torch.where(column // 8 % 512 < 60, 50 + random, random),
        "all equal": torch.full((vocab,), 3.0),
        "two values": (column % 7 == 0).float(),
        "zeros of both signs": torch.where(column % 3 == 0, -0.0, 0.0),
        "all but some -inf": torch.where(column % 1000 == 1, random, -torch.inf),
        "all but one -inf": torch.where(column == vocab - 1, 1.0, -torch.inf),
        "negative": random - 100,
        "far apart": torch.where(column % 50 == 0, random, random - 300),
        "largest last": torch.where(column >= vocab - 100, 5.0, random),
    }


@pytest.mark.parametrize(
    ("k", "chip", "dtype"),
    [(1, "a100", torch.float32), (100, "a100", torch.bfloat16), (100, "small", torch.float16),
     (100, "small", torch.bfloat16), (700, "small", torch.float32), (700, "h100", torch.bfloat16),
     (5000, "h100", torch.float16)],
)  # fmt: skip
def test_rows_of_trouble(k, chip, dtype):
    rows = rows_of_trouble(9001)
    logits = torch.stack(list(rows.values()))[None].to(dtype)
    count = len(rows)
    temperature = torch.full((count,), 1.25)
    got = topk(logits, torch.ones(count), temperature, k, 9001, chip, k)
    for number, name in enumerate(rows):
        row = slice(number, number + 1)
        assert_topk_right([x[row] for x in got], logits[:, row], torch.ones(1), temperature[row], k, 9001, name)


def test_the_rest_is_exact_even_where_it_is_tiny():
    """The tail has 1e-90 of the mass, or all of the mass but 1e-9."""
    vocab, k = 2000, 16
    logits = torch.randn(1, 2, vocab, generator=torch.Generator().manual_seed(0)).double()
    logits[0, 0, 100 : 100 + k] += 210
    logits[0, 1] = torch.linspace(0, 1e-3, vocab)
    ones = torch.ones(2)
    got = topk(logits.float(), ones, ones, k, vocab)
    indices, _, tail = reference.topk(logits.float().double(), ones.double(), ones.double(), k, vocab)
    assert torch.equal(got[0], indices)
    assert tail[0] < -195
    torch.testing.assert_close(got[2].double(), tail, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_makes_the_top_k_of_its_row_nan(dtype):
    vocab, k = 500, 20
    logits = torch.randn(1, 7, vocab).to(dtype)
    logits[0, :4, 123] = torch.tensor(NANS[dtype]).to(INTEGERS[dtype.itemsize]).view(dtype)
    logits[0, 4, 5], logits[0, 5] = torch.inf, -torch.inf
    for chip in ("small", "a100"):
        got = topk(logits, torch.ones(7), torch.ones(7), k, vocab, chip)
        assert_topk_right(got, logits, torch.ones(7), torch.ones(7), k, vocab, chip)
        assert got[2][:6].isnan().all() and torch.isfinite(got[2][6])
    temperature = torch.tensor([0.0, -1.0, torch.inf, torch.nan, 1.0, 1.0, 1.0])
    indices, log_probs, tail = topk(logits, torch.ones(7), temperature, k, vocab)
    assert log_probs[:4].isnan().all() and tail[:4].isnan().all() and torch.isfinite(tail[6])
    assert ((indices[:4] >= 0) & (indices[:4] < vocab)).all()


def test_the_top_k_does_not_depend_on_the_order_of_threads():
    for dtype, k in ((torch.bfloat16, 100), (torch.float32, 700), (torch.float32, 1400)):
        logits = torch.stack(list(rows_of_trouble(2600).values()))[None].to(dtype)
        ones = torch.ones(logits.shape[1])
        for chip in ("small", "a100"):
            results = [topk(logits, ones, ones, k, 2600, chip, seed) for seed in range(3)]
            for result in results[1:]:
                assert_same_bits(results[0], result, (dtype, k, chip))


def test_a_vocabulary_of_an_h100_is_taken_from():
    logits = 3 * torch.randn(1, 2, 152_064).bfloat16()
    for k in (64, 1000):
        got = topk(logits, torch.ones(2), torch.ones(2), k, 152_064, "h100")
        assert_topk_right(got, logits, torch.ones(2), torch.ones(2), k, 152_064)


# ---- the tests of the tests: a kernel with one fault must fail

# (the fault, its text in csrc/cuda, the replacement)
FAULTS = [
    ("the bitmap of entries is overwritten during reads",
     "        __syncthreads();  // all threads have read the names\n", ""),
    ("entries in one word of the bitmap overwrite each other",
     "if (before >= 0 && before / kWarp == word) continue;", ""),
    ("an entry's gradient is overwritten", "if (!(named >> i & 1) && student.holds(position + i))",
     "if (student.holds(position + i))"),
    ("the bucket is 1 minus the entries", "return (part.max - whole.max) * whole.inverse_temperature",
     "return log1pf(-beside / (beside + part_sum)); return (part.max - whole.max) * whole.inverse_temperature"),
    ("the label's logit is read after its gradient may have replaced it", "unit_log_sum, team.board.label_logit};",
     "unit_log_sum, load_logit(logits, dtype, numbers.label)};"),
    ("logits beyond the collection's room are lost", "  if (*count > room) {",
     "  const int had = *count;\n  __syncthreads();\n  if (threadIdx.x == 0 && had > room) *count = room;\n"
     "  __syncthreads();\n  if (*count > room) {"),
    ("steps of the sort overlap",
     "if (a < b) set(low, b), set(high, a);\n        }\n        __syncthreads();",
     "if (a < b) set(low, b), set(high, a);\n        }"),
    ("collected logits outside the k largest miss the tail", "else mine.rest.add(logit, at);", ""),
]  # fmt: skip


def wrong_result(module) -> str | None:
    """The first call that ends in an error of the model or in a wrong result."""
    # A single block processes all rows one after the other and streams them.
    devices = {**chips.CHIPS, "one block": chips.small(1, 6000, major=8)}

    def failure(chip, seed, body) -> str | None:
        try:
            with emulated.serving(module, module.configure_device(**devices[chip]), seed):
                body()
        except RuntimeError as error:
            assert "CUDA model" in str(error), error
            return f"{chip}, seed {seed}: {error}"
        except AssertionError as error:
            return f"{chip}, seed {seed}: {error}"
        return None

    def loss(call, chip, seed, statistics, in_place):
        student = call.student.contiguous().clone()
        problem = call.problem(DIVERGENCES[0], student, statistics=statistics)
        got = native.cuda.topk_rows(problem, True, student if in_place else None)
        assert_right(call, DIVERGENCES[0], got, chip, True, statistics)

    for seed in range(6):
        recipe = Recipe(
            (301, 1000, 64)[seed % 3], (60, 100, 7)[seed % 3], DTYPES[seed % 3], 1, 7, ragged=seed % 2 == 1,
            labels=seed % 2 == 0, hard_weight=0.5 if seed % 2 == 0 else None, masked=True, conditional=seed == 5,
            temperature=2.0, seed=seed,
        )  # fmt: skip
        call = recipe.make()
        if seed == 3:
            student = call.student.clone()
            named = torch.zeros(7, 302, dtype=torch.bool).scatter(-1, call.indices.long().clamp(max=301), True)
            student[0][named[:, :301]] += 150
            call = replace(call, student=student)
        for chip in ("small", "streaming", "one block"):
            if found := failure(chip, seed, lambda: loss(call, chip, seed, recipe.labels, seed % 2 == 0)):  # noqa: B023
                return found
    for seed, (k, dtype) in enumerate([(100, torch.float32), (60, torch.bfloat16), (700, torch.float16)]):
        logits = torch.stack(list(rows_of_trouble(2600).values()))[None].to(dtype)
        count = logits.shape[1]
        arguments = (logits, torch.ones(count), torch.ones(count), k, 2600)
        for chip in ("single", "one block"):
            if found := failure(chip, seed, lambda: assert_topk_right(native.cuda.topk(*arguments), *arguments)):  # noqa: B023
                return found
    return None


def test_kernels_without_a_fault_pass():
    assert wrong_result(emulated.cuda_model()) is None


@pytest.mark.parametrize(("what", "text", "instead"), FAULTS, ids=[what for what, _, _ in FAULTS])
def test_a_fault_is_caught(what, text, instead):
    caught = wrong_result(emulated.mutated(text, instead, "topk", "topk_rows"))
    print(f"{what}: {caught}")
    assert caught, what


# ---- errors


def test_a_launch_that_fails_is_an_error():
    call = Recipe(100, 4, torch.float32, 1, 2).make()
    with chips.on("small") as model:
        model.fail_call("cudaLaunchKernelEx", "cudaErrorLaunchOutOfResources")
        try:
            with pytest.raises(RuntimeError, match=r"cudaLaunchKernelEx: .*cudaErrorLaunchOutOfResources"):
                native.cuda.topk_rows(call.problem(DIVERGENCES[0], call.student, statistics=False), True)
            with pytest.raises(RuntimeError, match=r"cudaLaunchKernelEx: .*cudaErrorLaunchOutOfResources"):
                native.cuda.topk(call.student, torch.ones(2), torch.ones(2), 5, 100)
        finally:
            model.fail_call("cudaLaunchKernelEx", "cudaSuccess")
    assert_right(call, DIVERGENCES[0], call.run(DIVERGENCES[0]))
