"""The top-k kernels in Triton against the reference in fp64. Tests of every backend are in other files."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from truth import DEVICE, DIVERGENCES, assert_gradient_close, assert_loss_close, rounding

pytest.importorskip("triton")
from kdkernels.backends.reference import topk as reference
from kdkernels.backends.triton import kernels, launch
from kdkernels.backends.triton import topk as family
from kdkernels.families.options import RowOptions
from kdkernels.families.rows import ROW_STATISTICS
from kdkernels.families.topk import Entries, TopkRows

INF = float("inf")
EXAMPLES = 4
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def small_tiles(monkeypatch):
    """Few columns already need many tiles."""
    monkeypatch.setattr(launch, "_TOPK_BLOCK", 64)


# ---- losses


@dataclass
class Call:
    """A problem of `topk_rows`, and the error allowed in its results."""

    divergence: object
    student: torch.Tensor
    indices: torch.Tensor
    log_probs: torch.Tensor
    tail_log_prob: torch.Tensor
    row_scale: torch.Tensor
    vocab: int
    labels: torch.Tensor | None = None
    temperature: torch.Tensor | float = 1.0
    hard_weight: torch.Tensor | None = None
    temperature_squared: bool = False
    conditional: bool = False
    statistics: bool = False

    def __post_init__(self):
        self.temperature = torch.as_tensor(self.temperature, dtype=torch.float32, device=DEVICE).reshape(-1)

    def problem(self, student, dtype) -> TopkRows:
        """The problem with numbers of the dtype `dtype`."""
        numbers = self.log_probs, self.tail_log_prob, self.row_scale, self.temperature, self.hard_weight
        log_probs, tail, scale, temperature, hard_weight = (x if x is None else x.to(dtype) for x in numbers)
        parameter = 1.0 if self.divergence.parameter is None else self.divergence.parameter
        # The kernels' parameter is fp32, so the reference uses its rounded value.
        parameters = torch.full((1,), parameter, dtype=torch.float32, device=DEVICE).to(dtype)
        entries = Entries(self.indices, log_probs, tail)
        options = RowOptions(
            scale,
            temperature,
            labels=self.labels,
            hard_weight=hard_weight,
            temperature_squared=self.temperature_squared,
        )
        return TopkRows(
            student, entries, options, self.divergence.name, parameters, self.vocab, self.statistics, self.conditional
        )

    def run(self, gradient=True, into=None, student=None):
        student = self.student if student is None else student
        return kernels.topk_rows(self.problem(student, torch.float32), gradient, into)

    def truth(self):
        student = self.student.double().requires_grad_()
        loss, statistics, top1 = reference.topk_rows(self.problem(student, torch.float64))
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        return loss.detach(), gradient, statistics, top1

    def class_log_probs(self):
        """The student's log-probabilities of all classes in fp64, of the bucket, and a mask of the entries."""
        rows, temperature = self.row_scale.numel(), self.temperature.double()[:, None]
        logits = self.student[..., : self.vocab].reshape(rows, self.vocab).double()
        lq = (torch.where(self.row_scale[:, None] != 0, logits, 0) / temperature).log_softmax(-1)
        named = torch.zeros(rows, self.vocab + 1, dtype=torch.bool, device=DEVICE)
        named = named.scatter(-1, self.indices.clamp(max=self.vocab).long(), True)[:, : self.vocab]
        return lq, torch.where(named, -INF, lq).logsumexp(-1), named

    def undecided(self, ulps):
        """Like `truth.undecided_signs`, for entries and bucket."""
        lq, bucket, named = self.class_log_probs()
        if self.conditional:
            lq = torch.where(named, lq - torch.where(named, lq, -INF).logsumexp(-1, keepdim=True), -INF)
        lp = torch.full_like(lq, torch.nan)
        lp = torch.nn.functional.pad(lp, (0, 1)).scatter(-1, self.indices.clamp(max=self.vocab).long(),
                                                         self.log_probs.double())[:, : self.vocab]  # fmt: skip
        q = lq.exp().nan_to_num(0)
        of_entries = torch.where(named & ((lp - lq).abs() <= ulps[:, None]), q, 0)
        of_bucket = torch.where((self.tail_log_prob - bucket).abs() <= ulps, bucket.exp(), 0).nan_to_num(0)
        total = of_entries.sum(-1) + of_bucket
        share = (lq - bucket[:, None]).exp().nan_to_num(0)
        of_others = torch.where(named, 0, share * of_bucket[:, None])
        return of_entries + of_others + q * total[:, None]

    def check(self, **how):
        got, want = self.run(**how), self.truth()
        rows = self.row_scale.numel()
        scale = self.row_scale.double().abs()
        temperature = self.temperature.double()
        factor = temperature**2 if self.temperature_squared else torch.ones_like(temperature)
        logits = torch.where(self.row_scale[:, None] != 0, self.student[..., : self.vocab].reshape(rows, -1), 0)
        ulps = rounding(logits, logits, temperature[:, None])
        # The teacher's log-probabilities are fp32 too.
        sizes = torch.cat([self.log_probs, self.tail_log_prob[:, None]], 1).double().abs()
        ulps = torch.maximum(ulps, 4 * 2.0**-23 * torch.where(sizes.isfinite(), sizes, 0).amax(-1).clamp(max=87))
        divergence = self.divergence
        steep = want[0].abs() if divergence.is_steep else 0
        if isinstance(steep, torch.Tensor) and currently_in_test_context():
            assume(steep.nan_to_num(0, 0, 0).max() < 1e3)
        allowed = 1e-6 * want[0].abs() + ulps * (factor.clamp(min=1) * scale + steep)
        assert_loss_close(got[0], want[0], allowed, divergence)
        slopes = scale * (factor / temperature).clamp(min=1) + want[0].abs()
        if how.get("gradient", True):
            found, right = (x.reshape(rows, -1) for x in (got[1], want[1]))
            of_class = torch.zeros_like(right)
            if divergence.name == "tv":
                weight = (scale * factor / temperature)[:, None]
                of_class[:, : self.vocab] = self.undecided(ulps) * weight
            slopes = torch.where(slopes.isfinite(), slopes, 0)
            assert_gradient_close(found, right, ulps * slopes, divergence, of_class)
            assert not found[:, self.vocab :].any(), "padding columns have no gradient"
        if self.statistics:
            for name, value, right in zip(ROW_STATISTICS, got[2], want[2], strict=True):
                large = right.abs() if name in ("divergence", "cross_entropy", "student_lse") else 0
                assert_loss_close(value, right, 1e-6 * right.abs() + ulps * (1 + large), name)
            assert torch.equal(got[3], want[3])
        return got


@dataclass(frozen=True)
class Recipe:
    vocab: int
    entries: int | None  # None: all classes
    dtype: torch.dtype
    leading: tuple[int, int]
    padding: int
    strided: bool
    scale: float
    offset: float
    closeness: float
    top: bool  # entries are the teacher's largest classes; False: any classes
    ragged: bool
    tail: bool
    conditional: bool
    temperature: float | None
    temperature_squared: bool
    masked: bool
    labels: bool
    hard_weight: float | None
    statistics: bool
    small_tiles: bool
    seed: int

    def make(self, divergence) -> Call:
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(low, high, *shape):
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
            return (low + (high - low) * drawn).float().to(DEVICE)

        def normal():
            return torch.randn(rows, vocab, generator=generator, dtype=torch.float64)

        rows, vocab = self.leading[0] * self.leading[1], self.vocab
        student = self.scale * normal()
        student[:, 0] += 2 * self.scale
        teacher = self.closeness * student + (1 - self.closeness) * self.scale * normal()
        lp = teacher.log_softmax(-1)
        count = min(self.entries or vocab, vocab)
        order = lp if self.top else torch.rand(rows, vocab, generator=generator)
        indices = order.topk(count).indices.sort(-1).values
        if self.ragged:
            absent = torch.rand(rows, count, generator=generator) < torch.rand(rows, 1, generator=generator)
            absent[0] = rows > 1  # one row has no entry
            indices = torch.where(absent, vocab, indices).sort(-1).values
        log_probs = torch.nn.functional.pad(lp, (0, 1), value=-INF).gather(-1, indices)
        rest = torch.nn.functional.pad(lp, (0, 1)).scatter(-1, indices, -INF)[:, :vocab].logsumexp(-1)
        if self.conditional or not (self.tail or divergence.is_infinite_without_teacher):
            mass = log_probs.logsumexp(-1, keepdim=True)
            log_probs = torch.where(log_probs == -INF, -INF, log_probs - mass)
            rest = torch.full_like(rest, -INF)

        logits = (student + self.offset).to(self.dtype).view(*self.leading, vocab)
        columns = vocab + self.padding
        wide = torch.full((self.leading[0], self.leading[1] + self.strided, columns), torch.nan, dtype=self.dtype)
        wide[:, : self.leading[1], :vocab] = logits
        row_scale = uniform(-1, 2, rows)
        if self.masked:
            row_scale[uniform(0, 1, rows) < 0.4] = 0
            wide[:, : self.leading[1]].masked_fill_((row_scale == 0).cpu().view(*self.leading, 1), torch.nan)
        labels = torch.randint(0, vocab, (rows,), generator=generator).to(DEVICE) if self.labels else None
        hard_weight = None
        if self.labels:
            hard_weight = uniform(0, 1, rows) if self.hard_weight is None else torch.full((1,), self.hard_weight)
        return Call(
            divergence, wide.to(DEVICE)[:, : self.leading[1]], indices.int().to(DEVICE), log_probs.float().to(DEVICE),
            rest.float().to(DEVICE), row_scale, vocab, labels, self.temperature or uniform(0.5, 3, rows),
            hard_weight if hard_weight is None else hard_weight.to(DEVICE), self.temperature_squared, self.conditional,
            self.statistics,
        )  # fmt: skip


recipes = st.builds(
    Recipe,
    vocab=st.sampled_from([1, 7, 64, 1000, 3001]),
    entries=st.sampled_from([1, 3, 64, None]),
    dtype=st.sampled_from(DTYPES),
    leading=st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]),
    padding=st.sampled_from([0, 0, 5]),
    strided=st.booleans(),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0, 15.0]),
    offset=st.sampled_from([0.0, 0.0, -30.0, 200.0]),
    closeness=st.sampled_from([0.0, 0.0, 0.9, 0.999, 1.0]),
    top=st.booleans(),
    ragged=st.booleans(),
    tail=st.booleans(),
    conditional=st.sampled_from([False, False, True]),
    temperature=st.sampled_from([1.0, 2.0, None]),
    temperature_squared=st.booleans(),
    masked=st.booleans(),
    labels=st.booleans(),
    hard_weight=st.sampled_from([0.0, 0.25, 1.0, None]),
    statistics=st.booleans(),
    small_tiles=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


@each_divergence
def test_matches_fp64(divergence):
    @settings(max_examples=EXAMPLES)
    @given(recipe=recipes)
    def property_holds(recipe):
        with pytest.MonkeyPatch.context() as patch:
            if recipe.small_tiles:
                patch.setattr(launch, "_TOPK_BLOCK", 256)
            recipe.make(divergence).check()

    property_holds()


def simple(divergence=DIVERGENCES[0], rows=3, vocab=150, entries=5, dtype=torch.float32, **options) -> Call:
    """Rows of logits and the top entries of a teacher of the same shape."""
    student, teacher = torch.randn(1, rows, vocab, device=DEVICE).to(dtype), torch.randn(rows, vocab, device=DEVICE)
    log_probs = (2 * teacher).log_softmax(-1)
    indices = log_probs.topk(entries).indices.sort(-1).values
    rest = log_probs.scatter(-1, indices, -INF).logsumexp(-1)
    log_probs = log_probs.gather(-1, indices)
    if options.get("conditional"):
        log_probs, rest = log_probs.log_softmax(-1), torch.full_like(rest, -INF)
    row_scale = 0.5 + torch.rand(rows, device=DEVICE)
    return Call(divergence, student, indices.int(), log_probs, rest, row_scale, vocab, **options)


def with_labels(rows=3, vocab=150, **options) -> dict:
    labels = torch.randint(0, vocab, (rows,), device=DEVICE)
    return {"labels": labels, "hard_weight": torch.rand(rows, device=DEVICE), **options}


@pytest.mark.parametrize(
    "divergence", [d for d in DIVERGENCES if d.is_infinite_without_student and not d.is_steep], ids=repr
)
def test_gradient_of_other_classes_of_an_over_confident_student(divergence, small_tiles):
    """The other classes' share of the student underflows in fp32; their gradient must keep its precision."""
    call = simple(divergence)
    call.student.scatter_(-1, call.indices[None, :, :1].long(), 250.0)
    lq, bucket, named = call.class_log_probs()
    assert (bucket < -200).all()
    _, gradient, _, _ = call.run()
    others = ~named & (lq - bucket[:, None] > -20)
    torch.testing.assert_close(gradient[0][others].double(), call.truth()[1][0][others], rtol=1e-5, atol=0)
    assert (gradient[0][others] < 0).all()


@each_divergence
@pytest.mark.parametrize("conditional", [False, True])
def test_a_student_of_minus_infinity(divergence, conditional, small_tiles):
    """The student's logit is -inf for some other classes, or for an entry."""
    call = simple(divergence, conditional=conditional, statistics=True, **with_labels())
    other = (call.indices[0] + 1).tolist()
    call.student[0, 0, [i for i in other if i < 150 and i not in call.indices[0]]] = -INF
    call.labels[0] = call.indices[0, 1]
    call.check()
    call.statistics = False
    call.student[0, 1, call.indices[1, 2]] = -INF
    call.labels[1] = call.indices[1, 1]
    if not divergence.is_infinite_without_student:
        call.check()
        return
    loss, gradient, _, _ = call.run()
    assert loss[1] == INF and loss[[0, 2]].isfinite().all()
    assert gradient[0, 1].isfinite().all() != divergence.is_steep and gradient[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("entries", [5, 150])
def test_a_student_without_others_where_the_teacher_has_them(entries, small_tiles):
    """The loss is +inf, and the gradient is its limit, as in `rows` without sparse teachers."""
    call = simple(entries=entries)
    call.tail_log_prob.fill_(-1.0)
    call.log_probs = call.log_probs.log_softmax(-1) + call.tail_log_prob.exp().neg().log1p()[:, None]
    named = call.class_log_probs()[2]
    call.student[0][~named] = -INF
    loss, gradient, _, _ = call.run()
    assert (loss == INF).all()
    lq = call.class_log_probs()[0].gather(-1, call.indices.long())
    want = (lq.exp() - call.log_probs.exp()) * call.row_scale[:, None]
    torch.testing.assert_close(gradient[0][named].view(3, -1), want.float(), rtol=1e-5, atol=1e-6)
    assert not gradient[0][~named].any()


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("of", ["entry", "other", "log_probs", "tail", "infinite entry", "infinite other", "all -inf"])
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d.name in ("kl", "tv")], ids=repr)
def test_nan_stays_in_its_row(divergence, of, conditional, small_tiles):
    for statistics in (False, True) if conditional else (True,):
        unread = conditional and (of == "tail" or "other" in of)
        call = simple(divergence, conditional=conditional, statistics=statistics)
        value = INF if "infinite" in of else torch.nan
        entry = int(call.indices[1, 2])
        other = next(i for i in range(40, 150) if i not in call.indices[1])
        if of == "log_probs":
            call.log_probs[1, 2] = value
        elif of == "tail":
            call.tail_log_prob[1] = value
        elif of == "all -inf":
            call.student[0, 1] = -INF
        else:
            call.student[0, 1, entry if "entry" in of else other] = value
        loss, gradient, found, _ = call.run()
        if unread:
            assert loss.isfinite().all() and gradient.isfinite().all()
            continue
        assert loss[1].isnan() and gradient[0, 1].isnan().all()
        assert loss[[0, 2]].isfinite().all() and gradient[0, [0, 2]].isfinite().all()
        if statistics:
            assert found[:, [0, 2]].isfinite().all() and found[0, 1].isnan()


@pytest.mark.parametrize("conditional", [False, True])
def test_a_bad_value_makes_its_row_nan(conditional, small_tiles):
    """A row with a bad value must not cause a read out of bounds: the label may be any integer."""
    bad = {
        "labels": [-1, 150, -(2**40)],
        "temperature": [0.0, INF, torch.nan, 1e-40],
        "hard_weight": [-0.1, 1.1, torch.nan],
        "row_scale": [torch.nan],
    }
    good = simple(conditional=conditional, temperature=torch.ones(3), **with_labels())
    right = good.run()
    for name, values in bad.items():
        for value in values:
            call = replace(good, **{name: getattr(good, name).clone()})
            getattr(call, name)[1] = value
            loss, gradient, _, _ = call.run()
            assert loss[1].isnan() and gradient[0, 1].isnan().all(), (name, value)
            assert torch.equal(loss[[0, 2]], right[0][[0, 2]]), (name, value)
            assert torch.equal(gradient[0, [0, 2]], right[1][0, [0, 2]]), (name, value)
        call = replace(call, row_scale=torch.tensor([1.0, 0.0, 1.0], device=DEVICE))
        loss, gradient, _, _ = call.run()
        assert loss[1] == 0 and not gradient[0, 1].any(), "a skipped row has loss 0 and gradient 0, whatever it holds"


@each_divergence
def test_a_teacher_without_others_where_the_student_has_them(divergence, small_tiles):
    call = simple(divergence)
    call.tail_log_prob[1] = -INF
    if not divergence.is_infinite_without_teacher:
        call.check()
        return
    loss, gradient, _, _ = call.run()
    assert loss[1] == INF and gradient[0, 1].isnan().all()
    assert loss[[0, 2]].isfinite().all() and gradient[0, [0, 2]].isfinite().all()
    call.labels, call.hard_weight = torch.tensor([3, 4, 5], device=DEVICE), torch.ones(1, device=DEVICE)
    loss, gradient, _, _ = call.run()
    assert loss.isfinite().all() and gradient.isfinite().all(), "a term of weight 0 must be dropped"


@each_dtype
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("label", [False, True])
def test_in_place(dtype, conditional, label, small_tiles):
    """The gradient may overwrite the logits. The loss must not depend on whether a gradient is computed."""
    options = with_labels(rows=2, statistics=True) if label else {}
    call = simple(DIVERGENCES[3], rows=2, entries=20, dtype=dtype, conditional=conditional, temperature=2.0, **options)
    want = call.run()
    student = call.student.clone()
    got = call.run(into=student, student=student)
    assert got[1].data_ptr() == student.data_ptr()
    for found, right in zip(got, want, strict=True):
        assert torch.equal(found, right)
    loss, gradient, statistics, top1 = call.run(gradient=False)
    assert torch.equal(loss, want[0]) and not gradient.numel()
    assert torch.equal(statistics, want[2]) and torch.equal(top1, want[3])


def test_no_rows():
    call = simple(rows=0)
    loss, gradient, statistics, top1 = call.run()
    assert loss.shape == (0,) and gradient.shape == (1, 0, 150) and statistics.shape == top1.shape == (0, 0)
    indices, log_probs, tail = kernels.topk(call.student, call.row_scale, call.temperature, 3, 150)
    assert indices.shape == log_probs.shape == (0, 3) and tail.shape == (0,)


# ---- extraction


def check_topk(logits, k, vocab=None, row_scale=None, temperature=None):
    rows, vocab = logits.shape[0] * logits.shape[1], vocab or logits.shape[2]
    row_scale = torch.ones(rows, device=DEVICE) if row_scale is None else row_scale
    temperature = torch.ones(1, device=DEVICE) if temperature is None else temperature
    indices, log_probs, tail = kernels.topk(logits, row_scale, temperature, k, vocab)
    want = reference.topk(logits.double(), row_scale.double(), temperature.double(), k, vocab)
    assert indices.dtype == torch.int32 and log_probs.dtype == tail.dtype == torch.float32
    assert torch.equal(indices, want[0])
    kept = torch.where(row_scale[:, None] != 0, logits[..., :vocab].reshape(rows, vocab), 0)
    ulps = rounding(kept, kept, temperature.double()[:, None])
    assert_loss_close(log_probs, want[1], (ulps[:, None] + 2.0**-22 * want[1].abs()).nan_to_num(0), "log_probs")
    # The error of the tail's log-probability is relative to its own size.
    assert_loss_close(tail, want[2], (1e-6 * (1 + want[2].abs()) + ulps).nan_to_num(0), "tail")
    return indices, log_probs, tail


@settings(max_examples=25)
@given(
    vocab=st.sampled_from([1, 7, 64, 1000, 3001]),
    k=st.sampled_from([1, 3, 64, None]),
    dtype=st.sampled_from(DTYPES),
    leading=st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]),
    scale=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    padding=st.sampled_from([0, 5]),
    steps=st.sampled_from([None, 2, 9]),  # few distinct values: most logits are equal
    per_row=st.booleans(),
    masked=st.booleans(),
    small_tiles=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_topk_matches_fp64(vocab, k, dtype, leading, scale, padding, steps, per_row, masked, small_tiles, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = leading[0] * leading[1]
    logits = scale * torch.randn(*leading, vocab, generator=generator)
    if steps:
        logits = torch.randint(-steps, steps, logits.shape, generator=generator) / steps * logits.sign()  # includes -0
    wide = torch.full((leading[0], leading[1] + 1, vocab + padding), torch.nan, dtype=dtype)
    wide[:, :-1, :vocab] = logits.to(dtype)
    row_scale, temperature = torch.ones(rows), torch.ones(1)
    if masked:
        row_scale[torch.rand(rows, generator=generator) < 0.4] = 0
        wide[:, :-1].masked_fill_((row_scale == 0).view(*leading, 1), torch.nan)
    if per_row:
        temperature = 0.5 + torch.rand(rows, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        if small_tiles:
            patch.setattr(launch, "_TOPK_BLOCK", 256)
        check_topk(wide.to(DEVICE)[:, :-1], min(k or vocab, vocab), vocab, row_scale.to(DEVICE), temperature.to(DEVICE))


@pytest.mark.parametrize("k", [1, 5, 65, 400])
@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "one lane", "two values"])
def test_topk_of_logits_that_set_most_aside(order, k, small_tiles):
    """The largest classes share lanes, which fills the workspace up to its bound."""
    column = torch.arange(400.0, device=DEVICE)
    logits = {
        "ascending": column,
        "descending": -column,
        "equal": torch.zeros_like(column),
        "one lane": torch.where(column % 64 == 5, 1e3 + column, column),
        "two values": (column % 3 == 1).float(),
    }[order]
    check_topk(logits.repeat(1, 1, 1) / 100, k)


def test_topk_of_more_classes_than_a_tile_has():
    logits = torch.randn(1, 2, 5000, device=DEVICE).bfloat16()
    check_topk(logits, 2048)
    check_topk(logits, 2049)


def test_topk_takes_rows_in_turns(monkeypatch, small_tiles):
    logits = torch.randn(2, 3, 150, device=DEVICE)
    want = check_topk(logits, 7)
    monkeypatch.setattr(family, "_WORKSPACE_BYTES", 8 * 7 * 3 * 4)
    for found, right in zip(check_topk(logits, 7), want, strict=True):
        assert torch.equal(found, right)
    monkeypatch.setattr(family, "_WORKSPACE_BYTES", 1)
    check_topk(logits, 7)


def test_a_tail_far_below_what_is_known(small_tiles):
    """The tail must be exact where 1 - sum rounds to 0, and where its exponentials underflow."""
    logits = torch.randn(1, 3, 150, device=DEVICE)
    logits[0, 0, :5] += 40
    logits[0, 1, 145:] += 500
    logits[0, 2, 100:105] += 1e4
    tail = check_topk(logits, 5)[2]
    assert (tail < torch.tensor([-25.0, -400, -9e3], device=DEVICE)).all() and tail.isfinite().all()
    check_topk(logits, 7)
    check_topk(logits, 3)


@each_dtype
def test_topk_of_minus_infinity(dtype, small_tiles):
    """A logit of -inf has no mass and is never taken. A row of -inf alone has no distribution."""
    logits = torch.randn(1, 4, 150, device=DEVICE).to(dtype)
    logits[0, 0, 3:] = -INF
    logits[0, 1, :100] = -INF
    logits[0, 2, 1:] = -INF
    indices, _, tail = check_topk(logits, 5)
    assert indices[0, 3:].tolist() == [-1, -1] and tail[[0, 2]].tolist() == [-INF, -INF]
    logits[0, 1] = -INF
    _, log_probs, tail = check_topk(logits, 5)
    assert log_probs[1].isnan().all() and tail[1].isnan()
    assert not log_probs[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("value", [torch.nan, INF])
@pytest.mark.parametrize("column", [0, 63, 64, 149])
def test_topk_of_nan(value, column, small_tiles):
    logits = torch.randn(1, 3, 150, device=DEVICE)
    logits[0, 1, column] = value
    indices, log_probs, tail = check_topk(logits, 5)
    assert indices[1].tolist() == [0, 1, 2, 3, 4], "the row of NaN lists some classes, each once"
    assert log_probs[1].isnan().all() and tail[1].isnan()
    logits[0, 1, 2:] = value
    check_topk(logits, 5)


def test_topk_of_a_bad_temperature():
    logits = torch.randn(1, 6, 100, device=DEVICE)
    temperature = torch.tensor([1.0, 0.0, -1.0, INF, torch.nan, 1e-40], device=DEVICE)
    row_scale = torch.ones(6, device=DEVICE)
    _, log_probs, tail = kernels.topk(logits, row_scale, temperature, 5, 100)
    assert log_probs[1:].isnan().all() and tail[1:].isnan().all()
    assert log_probs[0].isfinite().all() and tail[0].isfinite()
    indices, log_probs, tail = kernels.topk(logits, 0 * row_scale, temperature, 5, 100)
    assert (indices == -1).all() and (log_probs == -INF).all() and (tail == 0).all()
