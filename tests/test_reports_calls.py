"""Calls that newcomers made: names and keywords of other packages, masks, counts, log-probabilities as logits."""

import inspect
import itertools
import linecache
import sys
import typing
import warnings

import pytest
import torch
import torch.nn.functional as F
from truth import BACKENDS, device_of

import kdkernels
from kdkernels import CATALOGUE, Divergence, LinearLogits, fused_divergence, fused_js, fused_kl, fused_uld, selftest
from kdkernels.backends import native
from kdkernels.backends.native import threads
from kdkernels.losses.divergence import DivergenceOptions

ROWS, VOCAB = 6, 23
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def logits(device="cpu", *, vocab=VOCAB):
    return torch.randn(ROWS, vocab, device=device)


# ---- names


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("forward_kl", "kl"), ("fkl", "kl"), ("kld", "kl"), ("KL", "kl"), ("Forward KL", "kl"),
        ("rkl", "reverse_kl"), ("reverse-kld", "reverse_kl"), ("symmetric_kl", "mixed_kl"),
        ("jsd", "js"), ("generalized_jsd", "js"), ("js_divergence", "js"),
        ("tvd", "tv"), ("total_variation", "tv"), ("skl", "skew_kl"), ("sfkl", "skew_kl"),
        ("skewed_forward_kl", "skew_kl"), ("srkl", "skew_reverse_kl"), ("skewed_reverse_kl", "skew_reverse_kl"),
        ("chi2", "chi_square"), ("pearson", "chi_square"),
    ],
)  # fmt: skip
def test_a_name_of_another_package_is_answered_with_ours(theirs, ours):
    with pytest.raises(ValueError) as raised:
        Divergence(theirs)
    assert f"{theirs!r} is called {ours!r} here, {CATALOGUE[ours].formula}" in str(raised.value)
    assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    ("theirs", "answer"),
    [
        ("akl", "'akl' is 'mixed_kl' with a weight for each row"),
        ("jeffreys", "2 times 'mixed_kl' at weight 0.5"),
        ("cross_entropy", "'kl' plus the teacher's entropy"),
        ("foward_kl", "did you mean 'forward_kl', which is called 'kl' here?"),
        ("hellingr", "did you mean 'hellinger'?"),
    ],
)
def test_a_name_that_is_no_entry_is_related_to_one(theirs, answer):
    with pytest.raises(ValueError, match="unknown divergence") as raised:
        fused_divergence(logits(), logits(), theirs)
    assert answer in str(raised.value)


def generalized_jsd(student, teacher, beta):
    """The convention of GKD, TRL, Liger and ms-swift: forward kl at 0, reverse kl at 1, the teacher's part is beta."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1).mean()
    if beta == 1:
        return (q * (log_q - log_p)).sum(-1).mean()
    m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (log_p - m) + (1 - beta) * q * (log_q - m)).sum(-1).mean()


@pytest.mark.parametrize("beta", [0, 0.0, 0.1, 0.5, 0.9, 1, 1.0])
def test_gkd_has_the_convention_of_gkd(beta):
    student, teacher = logits().double(), logits().double()
    got = fused_divergence(student, teacher, Divergence.gkd(beta))
    torch.testing.assert_close(got, generalized_jsd(student, teacher, beta))


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan"), True, torch.tensor(0.0)])
def test_gkd_refuses_what_is_no_beta(beta):
    is_number = isinstance(beta, float)
    with pytest.raises(
        ValueError if is_number else TypeError,
        match=rf"gkd: beta must be {r'in .0, 1.' if is_number else 'a float'}; got",
    ):
        Divergence.gkd(beta)


# ---- keywords

PUBLIC = [f for name in kdkernels.__all__ if inspect.isfunction(f := getattr(kdkernels, name))]
WITH_KEYWORDS = [f for f in PUBLIC if "backend" in inspect.signature(f).parameters]


@pytest.mark.parametrize(("function", "own"), [(fused_kl, {}), (fused_js, {"beta"})])
def test_signatures_show_every_option(function, own):
    """Editors complete the keywords from DivergenceOptions; inspect, help and notebooks read the signature."""
    whole = inspect.signature(fused_divergence).parameters
    options = {name: x for name, x in whole.items() if x.kind == x.KEYWORD_ONLY}
    shown = inspect.signature(function).parameters
    assert list(shown)[:2] == ["student", "teacher"]
    assert set(shown) == {"student", "teacher", *own, *options}
    assert all(shown[name] == x for name, x in options.items())
    assert typing.get_type_hints(DivergenceOptions) == {name: x.annotation for name, x in options.items()}
    static = inspect.unwrap(function).__annotations__["options"]
    assert typing.get_args(static) == (DivergenceOptions,)


def test_every_public_function_with_options_is_tried():
    assert {f.__name__ for f in WITH_KEYWORDS} == {
        "fused_divergence", "fused_kl", "fused_js", "fused_uld", "fused_class_ot", "fused_sinkhorn",
        "fused_sinkhorn_divergence", "fused_sinkhorn_kd", "topk_log_probs", "sampled_log_probs",
    }  # fmt: skip


@pytest.mark.parametrize("function", WITH_KEYWORDS, ids=lambda f: f.__name__)
def test_a_misspelt_keyword_is_answered_with_the_right_one(function):
    """The signature has no catch-all, and an unknown keyword is a TypeError, with the nearest name."""
    parameters = inspect.signature(function).parameters.values()
    assert not any(x.kind in (x.VAR_KEYWORD, x.VAR_POSITIONAL) for x in parameters)
    given = [logits() for x in parameters if x.kind != x.KEYWORD_ONLY and x.default is x.empty]
    needed = {x.name: 0.1 for x in parameters if x.kind == x.KEYWORD_ONLY and x.default is x.empty}
    for x in parameters:
        if x.kind == x.KEYWORD_ONLY:
            typo = x.name[:2] + x.name[3:]
            with pytest.raises(TypeError) as raised:
                function(*given, **needed, **{typo: 1})
            assert f"{function.__name__}: unknown argument {typo!r}, did you mean {x.name!r}?" in str(raised.value)
    with pytest.raises(TypeError, match="unknown argument 'zzzzzzzz'; known: "):
        function(*given, **needed, zzzzzzzz=1)


def test_a_misspelt_option_of_a_module_is_answered_with_the_right_one():
    with pytest.raises(TypeError, match=r"Divergence: unknown argument 'temprature', did you mean 'temperature'\?"):
        kdkernels.nn.Divergence("kl", temprature=2.0)
    with pytest.raises(TypeError, match=r"fused_uld: unknown argument 'temprature', did you mean 'temperature'\?"):
        kdkernels.nn.ULD()(logits(), logits(), temprature=2.0)


# ---- masks, normalizer, meta tensors


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_mask_that_is_not_bool_is_answered_with_bool(dtype):
    mask, x = torch.ones(ROWS, dtype=dtype), logits()
    for call in (
        lambda: fused_kl(x, x, mask=mask),
        lambda: fused_uld(x, x, mask=mask),
        lambda: kdkernels.fused_sinkhorn_kd(x, x, mask=mask),
        lambda: kdkernels.fused_class_ot(x, x, torch.rand(VOCAB, VOCAB), mask=mask),
        lambda: kdkernels.topk_log_probs(x, 3, mask=mask),
        lambda: kdkernels.sampled_log_probs(x, 3, mask=mask),
    ):
        with pytest.raises(TypeError, match=rf"mask: expected dtype torch.bool; got {dtype}; pass mask.bool\(\)"):
            call()
    with pytest.raises(TypeError, match=r"labels: expected dtype torch.int64; got torch.int32; pass labels.long\(\)"):
        fused_kl(x, x, labels=torch.zeros(ROWS, dtype=torch.int32))


@pytest.mark.parametrize("zero", [0, 0.0, False])
@pytest.mark.parametrize("loss", [fused_kl, fused_uld, "class_ot"])
def test_a_normalizer_of_0_with_kept_rows_raises(loss, zero):
    if loss == "class_ot":

        def loss(student, teacher, **options):
            return kdkernels.fused_class_ot(student, teacher, torch.rand(VOCAB, VOCAB), **options)

    student, mask = logits().requires_grad_(), torch.arange(ROWS) < 2
    if zero is False:
        with pytest.raises(TypeError, match="normalizer: expected a number or a tensor; got bool"):
            loss(student, logits(), normalizer=zero)
        return
    with pytest.raises(ValueError, match=r"normalizer: expected > 0, .*; got 0, and 2 kept rows"):
        loss(student, logits(), mask=mask, normalizer=zero)
    nothing = loss(student, logits(), mask=torch.zeros_like(mask), normalizer=zero)
    nothing.backward()
    assert nothing == 0 and not student.grad.any()
    # A tensor is not read, as on a GPU: its 0 shows in the loss.
    assert not loss(student, logits(), normalizer=torch.zeros(())).isfinite()


def test_a_normalizer_of_0_is_not_looked_at_under_a_compiler():
    """The check reads values, which a compiler cannot."""
    torch._dynamo.reset()
    step = torch.compile(lambda s, t, n: fused_kl(s, t, normalizer=n), fullgraph=True, backend="aot_eager")
    assert not step(logits(), logits(), 0).isfinite()


def test_meta_tensors_are_named():
    real, meta, cost = logits(), logits("meta"), torch.rand(VOCAB, VOCAB)
    head = LinearLogits(torch.randn(ROWS, 4, device="meta"), torch.randn(VOCAB, 4, device="meta"))
    for name, call in (
        ("student", lambda: fused_kl(meta, meta)),
        ("teacher", lambda: fused_js(real, meta)),
        ("student", lambda: fused_divergence(head, real)),
        ("student", lambda: fused_uld(meta, real)),
        ("student", lambda: kdkernels.fused_sinkhorn_kd(meta, meta)),
        ("student", lambda: kdkernels.fused_class_ot(meta, meta, cost)),
        ("cost", lambda: kdkernels.fused_sinkhorn(cost.to("meta"), epsilon=0.1)),
        ("logits", lambda: kdkernels.topk_log_probs(meta, 3)),
        ("logits", lambda: kdkernels.sampled_log_probs(head, 3)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor with data; got one on the device meta"):
            call()
    with pytest.raises(ValueError, match=r"mask: expected on the logits' device cpu; got meta"):
        fused_kl(real, real, mask=torch.ones(ROWS, dtype=torch.bool, device="meta"))


# ---- the statistic "kept"


MASK = torch.tensor([True, False, True, True, True, True])
LABELS = torch.tensor([1, 2, 3, -7, 5, 6])
# Options, and the rows that they keep. A row of weight 0 is counted.
DROPS = (
    ({}, torch.ones(ROWS, dtype=torch.bool)),
    ({"mask": MASK}, MASK),
    ({"labels": LABELS, "ignore_index": -7, "row_weight": torch.tensor([0, 1, 1, 1, 1, 2])}, LABELS != -7),
    ({"mask": MASK, "labels": LABELS, "ignore_index": -7}, MASK & (LABELS != -7)),
)


def teachers():
    """The teachers of a row loss, and the rows in which each has a distribution."""
    indices = torch.tensor([[1, 2], [3, -1], [-1, -1], [4, 5], [-1, -1], [0, 7]])
    log_probs = torch.full((ROWS, 2), -1.0)
    log_probs[3] = -torch.inf
    every, named = torch.ones(ROWS, dtype=torch.bool), torch.tensor([True, True, False, False, False, True])
    yield logits(), every
    yield LinearLogits(torch.randn(ROWS, 4), torch.randn(VOCAB, 4)), every
    for tail in ("bucket", "support", "renormalize", "truncate", "uniform"):
        yield kdkernels.SparseLogProbs(indices, log_probs, tail=tail), every if tail == "bucket" else named


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_kept_is_what_the_mean_counts(backend):
    """kept is 1 for rows that neither mask, labels nor a teacher without entries drops, whatever else is asked for."""
    for (teacher, with_teacher), (options, kept_by_options) in itertools.product(teachers(), DROPS):
        student, want = logits().requires_grad_(), with_teacher & kept_by_options
        for others in ((), ("tv", "student_top1")):
            out = fused_kl(student, teacher, statistics=("kept", *others), backend=backend, **options)
            kept = out.statistics["kept"]
            assert list(out.statistics) == ["kept", *others]
            assert kept.dtype == out.loss.dtype and not kept.requires_grad
            assert torch.equal(kept, want.to(kept.dtype))
        rows = fused_kl(student, teacher, reduction="none", backend=backend, **options)
        assert not rows[kept == 0].any()
        torch.testing.assert_close(out.loss, rows.sum() / kept.sum())
        alone = fused_kl(student, teacher, backend=backend, **options)
        assert torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in (out.loss, alone)))


@each_backend
def test_kept_of_two_vocabularies_and_of_any_leading_shape(backend):
    device = device_of(backend)
    student, teacher = logits(device).view(2, 3, VOCAB), logits(device, vocab=17).view(2, 3, 17)
    mask = torch.tensor([[True, False, True], [True, True, False]], device=device)
    for call, options in ((fused_uld, {}), (fused_kl, {"vocab_size": 17})):
        for more, want in (({}, torch.ones_like(mask)), ({"mask": mask}, mask)):
            out = call(student, teacher, statistics=("kept",), backend=backend, **options, **more)
            assert torch.equal(out.statistics["kept"], want.to(out.loss.dtype))
    double = fused_uld(student.double(), teacher, statistics=("kept",), backend="reference")
    assert double.statistics["kept"].dtype == torch.float64


def test_kept_compiles():
    torch._dynamo.reset()
    mask = torch.arange(ROWS) < 4

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(student, teacher, mask):
        return fused_kl(student, teacher, mask=mask, statistics=("kept",)).statistics["kept"].sum()

    assert step(logits(), logits(), mask) == 4


# ---- log-probabilities as logits


@each_backend
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_log_probabilities_are_logits(backend, gradient):
    """The loss of log-probabilities is that of their logits. Their gradient is that of logits, q - p; F.kl_div has -p.
    The gradient behind a log_softmax equals that of F.kl_div.
    """
    device = device_of(backend)
    student, teacher = logits(device).requires_grad_(), logits(device)
    log_p, p = teacher.log_softmax(-1), teacher.softmax(-1)
    options = {"reduction": "sum", "gradient": gradient, "backend": backend}

    theirs = F.kl_div(student.log_softmax(-1), p, reduction="sum")
    (want,) = torch.autograd.grad(theirs, student)
    for of_teacher in (teacher, log_p, p.log()):
        got = fused_kl(student.log_softmax(-1), of_teacher, **options)
        torch.testing.assert_close(got, theirs)
        torch.testing.assert_close(torch.autograd.grad(got, student)[0], want, rtol=1e-5, atol=1e-6)

    leaf = student.detach().log_softmax(-1).requires_grad_()
    (of_logits,) = torch.autograd.grad(fused_kl(leaf, log_p, **options), leaf)
    torch.testing.assert_close(of_logits, leaf.detach().exp() - p, rtol=1e-5, atol=1e-6)
    (of_log_probs,) = torch.autograd.grad(F.kl_div(leaf, p, reduction="sum"), leaf)
    torch.testing.assert_close(of_log_probs, -p)


# ---- the self-test


def self_checks():
    yield selftest.Check("rows", "kl", torch.float32, (5, 7), (0.1, 0.2, 0.3))
    yield selftest.Check("rows", "js", torch.float16, (5, 1000), (0.5, float("inf"), 0.0))
    yield selftest.Check("rows", "tv", torch.float16, (5, 1000), (1.7e308, 0.5, 0.0))
    yield selftest.Check("top k", "top k, bucket", torch.float32, (5, 7), (0.1, 0.2, 0.3), "extraction")


@pytest.mark.parametrize("verbose", [False, True])
def test_the_selftest_prints_a_line_a_family(verbose, capsys):
    """A line for each family, and each wrong check; --verbose prints all. No error is printed as 309 digits."""
    assert not selftest.report("cpu", self_checks(), verbose)
    lines = capsys.readouterr().out.splitlines()
    families = [line for line in lines if " checks, largest error " in line]
    assert families[0].startswith("cpu      rows         3 checks, largest error inf (js, float16)")
    assert "WRONG: 2" in families[0] and "WRONG" not in families[1] and len(families) == 2
    wrong = [line for line in lines if line.endswith("  WRONG")]
    assert len(wrong) == 2 and " js " in wrong[0] and "gradient     inf" in wrong[0] and "loss 1.7e+308" in wrong[1]
    assert len(lines) == (6 if verbose else 4) and max(map(len, lines)) < 120
    assert any("extraction    0.30" in line for line in lines) == verbose
    assert selftest.report("cpu", (check for check in self_checks() if not check.is_wrong), verbose)


def test_the_selftest_counts_nan_and_overflow_as_wrong():
    inf, nan = float("inf"), float("nan")
    want = torch.tensor([1.0, inf, -2.0], dtype=torch.float64)
    assert selftest.part(want.float(), want, 1e-5) == 0
    for bad in ([nan, inf, -2.0], [1.0, nan, -2.0], [1.0, 2.0, -2.0], [inf, inf, -2.0], [1.0, -inf, -2.0]):
        assert selftest.part(torch.tensor(bad, dtype=torch.float16), want, 1e-5) == inf
    assert selftest.part(torch.tensor([1.0, inf, -2.5]), want, 1.0) == 0.5


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [([], (False, [])), (["--verbose"], (True, [])), (["--backend", "cuda", "triton"], (False, ["cuda", "triton"]))],
)
@pytest.mark.parametrize("right", [True, False])
def test_the_selftest_passes_its_arguments_on_and_exits_with_the_result(arguments, passed, right, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["selftest", "--device", "cpu", *arguments])
    monkeypatch.setattr(selftest, "check", lambda *given: given == ("cpu", *passed) and right)
    with pytest.raises(SystemExit) as ended:
        selftest.main()
    assert ended.value.code == (0 if right else 1)


# ---- warnings


def warns_at(call) -> tuple[str, str]:
    """The text of the one warning of the call, and the source line that it shows."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (one,) = (each for each in caught if issubclass(each.category, (RuntimeWarning, UserWarning)))
    return str(one.message), linecache.getline(one.filename, one.lineno).strip()


@pytest.mark.skipif(native._native is None, reason=f"no native module: {native.missing_because}")
def test_a_warning_of_threads_shows_the_users_line(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    monkeypatch.setattr(native, "count_threads", threads.count_threads)
    student, teacher = logits().requires_grad_(), logits()
    loss_of = kdkernels.nn.Divergence("kl", gradient="backward")

    def forward():
        monkeypatch.setattr(threads, "_warned", False)
        return loss_of(student, teacher)  # the module

    text, line = warns_at(forward)
    assert "one thread" in text and line == "return loss_of(student, teacher)  # the module"
    loss = forward()
    monkeypatch.setattr(threads, "_warned", False)
    text, line = warns_at(lambda: loss.backward())  # the backward
    assert "one thread" in text and line.endswith("# the backward")


def test_other_warnings_show_the_users_line(monkeypatch):
    head = LinearLogits(torch.randn(ROWS, 4), torch.randn(VOCAB, 4))
    with kdkernels.chunk_budget(100):
        text, line = warns_at(lambda: fused_kl(head, logits()))  # the head
    assert "holds no row" in text and line.endswith("# the head")
    monkeypatch.setattr(native, "_native", None)
    native._warn.cache_clear()
    text, line = warns_at(lambda: fused_kl(logits(), logits()))  # without the module
    native._warn.cache_clear()
    assert "native kernels" in text and line.endswith("# without the module")
