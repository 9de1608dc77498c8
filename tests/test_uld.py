"""Universal Logit Distillation: the definition against closed forms, and every backend against the definition."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, LEADING, row_options
from torch._dynamo.testing import CompileCounter
from truth import BACKENDS, assert_gradient_close, assert_loss_close, device_of, opcheck, rounding

import kdkernels
from kdkernels import fused_uld, ops
from kdkernels.backends import native
from kdkernels.families import uld as family
from kdkernels.selftest import undecided_ranks

INF, NAN = float("inf"), float("nan")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
kernel_backends = pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
in_fp64 = pytest.mark.parametrize("backend", ["cpu", "reference"])
SLOW = "the interpreter takes a second per row of a top k; test_topk_is_right covers it"
EXAMPLES = {"cpu": 40, "reference": 10, "cuda": 4, "triton": 4}
LARGEST = {"cpu": 9000, "reference": 9000, "cuda": 700, "triton": 5000}


def run(student, teacher, *, grad_output=None, statistics=("divergence", "error_bound"), **options):
    """Loss, gradient and statistics. The reduction defaults to "none"."""
    student = student.detach().requires_grad_()
    out = fused_uld(student, teacher, **{"reduction": "none", **options}, statistics=statistics)
    grad_output = torch.ones_like(out.loss) if grad_output is None else grad_output
    (gradient,) = torch.autograd.grad(out.loss, student, grad_output)
    return out.loss.detach(), gradient, out.statistics


def truth(student, teacher, **options):
    """The same results from the reference in fp64."""
    options = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    options.pop("gradient", None)
    return run(student.double(), teacher.double(), **{**options, "backend": "reference"})


def sizes(student, teacher, options) -> tuple[int, int]:
    names = ("student_vocab_size", "teacher_vocab_size")
    return tuple(options.get(name) or x.shape[-1] for name, x in zip(names, (student, teacher), strict=True))


def undecided(student, teacher, temperature, allowed, options):
    """`kdkernels.selftest.undecided_ranks` at these options, with a closeness `allowed` for each row."""
    logits = (x[..., :size] for x, size in zip((student, teacher), sizes(student, teacher, options), strict=True))
    return undecided_ranks(*logits, temperature[..., None], allowed[..., None], options.get("topk"))


def assert_right(student, teacher, got, **options):
    loss, gradient, statistics = got
    want_loss, want_gradient, want_statistics = truth(student, teacher, **options)
    student_size, teacher_size = sizes(student, teacher, options)
    leading = student.shape[:-1]
    temperature = torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64).to(student.device)
    temperature = temperature.expand(leading)
    mask = options.get("mask", torch.ones(leading, dtype=torch.bool, device=student.device))
    weight = options.get("row_weight", torch.ones(leading, device=student.device)).double().abs()
    weight = weight * temperature**2 if options.get("temperature_squared") else weight
    s, t = (
        torch.where(mask[..., None], x[..., :size].double(), 0)
        for x, size in ((student, student_size), (teacher, teacher_size))
    )
    allowed = torch.maximum(rounding(s, s, temperature[..., None]), rounding(t, t, temperature[..., None]))
    label_part = rounding(s, s) if "hard_weight" in options else 0
    assert loss.dtype == (torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32)
    tolerance = 1e-6 * want_loss.abs() + (2 * allowed + label_part) * weight.clamp(min=1)
    assert_loss_close(loss, want_loss, tolerance, "loss")
    for name, value in statistics.items():
        assert_loss_close(value, want_statistics[name], 1e-6 + 2 * allowed, name)
    assert gradient.dtype == student.dtype
    assert (gradient[..., student_size:] == 0).all()
    slopes = (weight / temperature)[..., None]
    of_class = undecided(s, t, temperature, 2 * allowed, options) * slopes
    # With a label, the gradient is the sum of two rounded parts: ULD's and the cross-entropy's.
    parts = 2.0 if "hard_weight" in options else 1.0
    got_gradient, want_gradient = (x[..., :student_size].double() for x in (gradient, want_gradient))
    if parts == 2:
        rounding_of_parts = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(student.dtype, 1e-6)
        of_class = of_class + 2 * rounding_of_parts * (slopes + weight[..., None])
    assert_gradient_close(got_gradient.to(student.dtype), want_gradient, 4 * allowed * slopes[..., 0], "gradient",
                          of_class)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Recipe for a student and a teacher with two vocabularies."""

    leading: tuple[int, ...]
    vocab: tuple[int, int]
    padding: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    scale: float
    closeness: float  # 1: the teacher's logits equal the student's over their common columns
    grid: float  # logits are multiples of the grid, which makes ties
    strided: bool
    seed: int

    def make(self, device="cpu"):
        generator = torch.Generator().manual_seed(self.seed)
        wide = [
            self.scale * torch.randn(*self.leading, max(self.vocab), dtype=torch.float64, generator=generator)
            for _ in range(2)
        ]
        wide[1] = self.closeness * wide[0] + (1 - self.closeness) * wide[1]
        made = []
        for x, vocab, padding, dtype in zip(wide, self.vocab, self.padding, self.dtypes, strict=True):
            x = x[..., :vocab]
            x[..., vocab // 2] += 3 * self.scale
            if self.grid:
                x = (x / self.grid).round() * self.grid
            x = torch.cat([x.to(dtype), torch.full((*self.leading, padding), NAN, dtype=dtype)], -1)
            if self.strided and self.leading:
                wider = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1]), NAN, dtype=dtype)
                wider[..., :-1, :] = x
                x = wider.to(device)[..., :-1, :]
            made.append(x.to(device))
        return made

    @property
    def options(self) -> dict:
        return {f"{name}_vocab_size": vocab for name, vocab in zip(("student", "teacher"), self.vocab, strict=True)}


def pairs(largest: int, dtypes=DTYPES):
    vocab = st.one_of(st.integers(1, 80), st.integers(1, largest))
    return st.builds(
        Pair,
        leading=st.sampled_from(LEADING),
        vocab=st.one_of(st.tuples(vocab, vocab), vocab.map(lambda v: (v, v))),
        padding=st.sampled_from([(0, 0), (0, 5), (3, 0), (1, 2)]),
        dtypes=st.tuples(st.sampled_from(dtypes), st.sampled_from(dtypes)),
        scale=st.sampled_from([0.0, 0.1, 1.0, 5.0, 25.0]),
        closeness=st.sampled_from([0.0, 0.9, 0.99999, 1.0]),
        grid=st.sampled_from([0.0, 0.0, 0.25, 1.0]),
        strided=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )


# ---- the definition


def integral(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The integral over x of |N_p(x) - N_q(x)|; N(x) is the number of classes with a probability above x."""
    ends = torch.cat([torch.zeros(1), p, q]).double().unique()
    counts = [(x[None, :] > ends[:-1, None]).sum(-1) for x in (p, q)]
    return ((counts[0] - counts[1]).abs() * ends.diff()).sum()


@pytest.mark.parametrize(("vocab", "other"), [(1, 1), (1, 6), (6, 1), (50, 33), (33, 50), (40, 40)])
@in_fp64
def test_the_loss_is_the_integral_over_counts(vocab, other, backend):
    for temperature in (0.7, 2.0):
        student, teacher = 2 * torch.randn(4, vocab).double(), 2 * torch.randn(4, other).double()
        loss, _, statistics = run(student, teacher, temperature=temperature, backend=backend)
        p, q = ((x / temperature).softmax(-1) for x in (student, teacher))
        want = torch.stack([integral(*row) for row in zip(p, q, strict=True)])
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(statistics["divergence"], want)
        assert (statistics["error_bound"] == 0).all()


@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize(("backend", "gradient"), [("cpu", "forward"), ("cpu", "backward"), ("reference", "auto")])
def test_gradcheck(backend, gradient, topk):
    student, teacher = 3 * torch.randn(2, 6).double(), 3 * torch.randn(2, 5).double()
    options = {"temperature": 1.7, "temperature_squared": True, "labels": torch.tensor([1, 5]), "hard_weight": 0.3}

    def loss(x):
        return fused_uld(x, teacher, reduction="none", topk=topk, gradient=gradient, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, student)


@each_backend
def test_equal_logits_take_the_mean_of_their_signs(backend):
    """The sorted student is p = (a, a, a, b): two ranks with probability a lie below q, one lies above."""
    device = device_of(backend)
    student = torch.tensor([[1.0, -0.5, 1.0, 1.0], [0.0, -0.0, 0.0, -9.0]], device=device)
    teacher = torch.tensor([[3.0, 2.5, -1.0], [0.0, -0.0, -0.0]], device=device)
    loss, gradient, _ = run(student, teacher, backend=backend)
    p, q = student.double().softmax(-1), teacher.double().softmax(-1)
    a, b = p[0, 0], p[0, 1]
    torch.testing.assert_close(loss[0].double(), q[0, 0] - a + q[0, 1] - a + a - q[0, 2] + b)
    s = torch.tensor([-1 / 3, 1.0, -1 / 3, -1 / 3], device=device).double()
    torch.testing.assert_close(gradient[0].double(), p[0] * (s - (p[0] * s).sum()), rtol=1e-5, atol=1e-7)
    # 0 and -0 are equal logits.
    assert gradient[1, 0] == gradient[1, 1] == gradient[1, 2]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_permutation_of_classes_permutes_the_gradient(backend, dtype):
    student = (2 * torch.randn(3, 300)).to(device_of(backend), dtype)
    student[:, ::7] = student[:, :1]  # fp32 has ties too
    teacher = (2 * torch.randn(3, 211)).to(device_of(backend), dtype)
    order, others = torch.randperm(300).to(student.device), torch.randperm(211).to(student.device)
    loss, gradient, _ = run(student, teacher, backend=backend)
    loss_of_it, gradient_of_it, _ = run(student[:, order], teacher[:, others], backend=backend)
    if backend != "reference":  # the reference's softmax sums in the order of the classes
        assert torch.equal(loss_of_it, loss) and torch.equal(gradient_of_it, gradient[:, order])
    torch.testing.assert_close(loss_of_it, loss)
    torch.testing.assert_close(gradient_of_it, gradient[:, order])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_of_no_mass_are_no_classes(backend, dtype):
    student = torch.randn(3, 40).to(device_of(backend), dtype)
    teacher = torch.randn(3, 30).to(device_of(backend), dtype)
    nothing = torch.full((3, 25), -INF, device=student.device, dtype=dtype)
    loss, gradient, _ = run(student, teacher, backend=backend)
    for more in (0, 25):
        wide = torch.cat([nothing[:, :more], student], -1)
        got = run(wide, torch.cat([teacher, nothing], -1), backend=backend)
        torch.testing.assert_close(got[0], loss)
        torch.testing.assert_close(got[1][:, more:], gradient)
        assert (got[1][:, :more] == 0).all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_loss_between_equal_distributions(backend, dtype):
    student = (4 * torch.randn(3, 500)).to(device_of(backend), dtype)
    shuffled = student[:, torch.randperm(500).to(student.device)]
    loss, gradient, _ = run(student, student if backend == "reference" else shuffled, backend=backend, temperature=0.7)
    assert (loss == 0).all() and (gradient == 0).all()


# ---- every backend against the definition


@each_backend
def test_every_backend_is_right(backend):
    @settings(max_examples=EXAMPLES[backend])
    @given(pair=pairs(LARGEST[backend]), row=row_options, gradient=st.sampled_from(["forward", "backward"]))
    def holds(pair, row, gradient):
        student, teacher = pair.make(device_of(backend))
        options = pair.options | row.make(pair.leading, pair.vocab[0], device_of(backend))
        if "mask" in options:
            student, teacher = (
                torch.where(options["mask"][..., None], x, NAN if x.numel() % 2 else INF) for x in (student, teacher)
            )
        options["gradient"] = gradient
        assert_right(student, teacher, run(student, teacher, backend=backend, **options), **options)

    holds()


def test_the_cpu_is_right_in_fp64():
    @settings(max_examples=25)
    @given(pair=pairs(3000, [torch.float64, torch.float32, torch.bfloat16]))
    def holds(pair):
        student, teacher = pair.make()
        student = student.double() if torch.float64 not in pair.dtypes else student
        got = run(student, teacher, backend="cpu", **pair.options)
        want = truth(student, teacher, **pair.options)
        torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-13)
        s, t = (x[..., :n] for x, n in zip((student, teacher), pair.vocab, strict=True))
        one = torch.ones(pair.leading, dtype=torch.float64)
        of_class = undecided(s, t, one, 1e-13 * one, pair.options)
        found, right = (x[..., : pair.vocab[0]].double() for x in (got[1], want[1]))
        relative = {torch.float64: 1e-11, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}[student.dtype]
        # p and the signed mass are sums; a lane adds 128 rounded terms before a merge. If they cancel in
        # p (s - sum p s), the error that remains is relative to p.
        of_sums = 4 * 128 * 2.0**-53 * s.double().softmax(-1)
        allowed = relative * right.abs() + of_class + of_sums + torch.finfo(student.dtype).smallest_normal
        assert ((found - right).abs() <= allowed).all()

    holds()


@each_backend
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_topk_is_right(backend, dtypes):
    cases = ((1, 1, 1), (60, 40, 7), (60, 40, 50), (40, 60, 60))
    for vocab, other, k in cases[1::2] if backend == "triton" else cases:  # SLOW
        student = (2 * torch.randn(4, vocab + 2)).to(device_of(backend), dtypes[0])
        teacher = (2 * torch.randn(4, other)).to(device_of(backend), dtypes[1])
        options = {"student_vocab_size": vocab, "temperature": 1.4, "topk": k}
        options["mask"] = torch.tensor([True, True, False, True], device=student.device)
        student[2], teacher[2] = NAN, NAN
        for gradient in ("backward",) if backend == "triton" else ("forward", "backward"):
            got = run(student, teacher, backend=backend, gradient=gradient, **options)
            assert_right(student, teacher, got, **options)
        whole = run(student, teacher, backend=backend, **{**options, "topk": None})
        difference = (whole[0] - got[0]).abs()
        assert (difference <= got[2]["error_bound"] + 1e-6).all()
        if k >= max(vocab, other):
            assert (got[2]["error_bound"] == 0).all()
            torch.testing.assert_close(got[0], whole[0])
            torch.testing.assert_close(got[1], whole[1])


def test_topk_takes_rows_in_chunks():
    student, teacher = torch.randn(2, 9, 50), torch.randn(2, 9, 70)
    strided = torch.full((2, 10, 50), NAN)
    strided[:, :-1] = student
    want = run(student, teacher, topk=5, backend="cpu")
    with kdkernels.chunk_budget(50 * 8 * 4):
        for x in (student, strided[:, :-1]):
            got = run(x, teacher, topk=5, backend="cpu")
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_sorted_rows_are_taken_in_chunks(backend, monkeypatch):
    student, teacher = torch.randn(2, 5, 41).bfloat16(), torch.randn(2, 5, 30)
    student, teacher = (x.to(device_of(backend)) for x in (student, teacher))
    temperature = torch.rand(2, 5, device=student.device) + 0.5
    want = run(student, teacher, backend=backend, temperature=temperature)
    wide = torch.full((2, 7, 41), NAN, device=student.device).bfloat16()
    wide[:, 1:-1] = student
    taken, sort = [], family._sorted
    monkeypatch.setattr(family, "_sorted", lambda x, chunk, size: taken.append(chunk) or sort(x, chunk, size))
    for x in (student, wide[:, 1:-1]):
        taken.clear()
        with kdkernels.chunk_budget(3500):  # room for two rows of 1704 bytes
            got = run(x, teacher, backend=backend, temperature=temperature)
        assert taken[:10:2] == taken[1:10:2] == [slice(first, first + 2) for first in range(0, 10, 2)]
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


# ---- edges


@each_backend
@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(backend, dtype, topk):
    if backend == "triton" and topk and dtype != torch.float16:
        pytest.skip(SLOW)
    device = device_of(backend)
    student, teacher = torch.randn(8, 9).to(device, dtype), torch.randn(8, 6).to(device, dtype)
    bad = [1, 2, 3, 5, 6, 7]
    clean = [0, 4]
    want = run(student[clean], teacher[clean], backend=backend, topk=topk)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    negative_nan = torch.full((), -1, dtype=integers).view(dtype)
    student[1, 4], student[2, 3], student[3] = NAN, INF, -INF
    teacher[5, 4], teacher[6, 3], teacher[7] = negative_nan, INF, -INF
    for gradient in ("forward", "backward") if topk is None else ("forward",):
        got = run(student, teacher, backend=backend, topk=topk, gradient=gradient)
        assert torch.equal(got[0][clean], want[0]) and torch.equal(got[1][clean], want[1])
        assert got[0][bad].isnan().all() and got[1][bad].isnan().all(), got
    student[1, 4] = negative_nan
    if topk is None:
        assert run(student, teacher, backend=backend, topk=topk)[1][1].isnan().all()


@each_backend
@pytest.mark.parametrize("topk", [None, 4])
def test_dropped_rows_may_hold_anything(backend, topk):
    if backend == "triton" and topk:
        pytest.skip(SLOW)
    device = device_of(backend)
    student, teacher = torch.randn(2, 3, 20, device=device), torch.randn(2, 3, 31, device=device)
    mask = torch.tensor([[True, False, True], [False, True, True]], device=device)
    labels = torch.tensor([[1, 2, -100], [3, 19, 0]], device=device)
    kept = mask & (labels != -100)
    options = {"labels": labels, "hard_weight": 0.25, "backend": backend, "topk": topk}
    want, want_gradient, _ = run(student[kept], teacher[kept], **{**options, "labels": labels[kept]})
    student[~kept], teacher[~kept] = NAN, INF
    loss, gradient, statistics = run(student, teacher, mask=mask, **options)
    torch.testing.assert_close(loss[kept], want)
    torch.testing.assert_close(gradient[kept], want_gradient)
    for x in (loss, gradient, *statistics.values()):
        assert (x[~kept] == 0).all()
    mean = fused_uld(student, teacher, mask=mask, **options)
    torch.testing.assert_close(mean, want.mean())


@each_backend
@pytest.mark.parametrize("topk", [None, 2])
def test_without_rows(backend, topk):
    device = device_of(backend)
    for rows, mask in ((0, None), (3, torch.zeros(3, dtype=torch.bool, device=device))):
        student = torch.full((rows, 7), NAN, device=device, requires_grad=True)
        loss = fused_uld(student, torch.full((rows, 5), NAN, device=device), mask=mask, backend=backend, topk=topk)
        loss.backward()
        assert loss == 0 and (student.grad == 0).all() and student.grad.shape == (rows, 7)


@each_backend
def test_row_options(backend):
    """The label's term, per-row temperatures, weights, the normalizer and reductions must match sums of their parts."""
    device = device_of(backend)
    student, teacher = torch.randn(5, 30, device=device), torch.randn(5, 40, device=device)
    labels = torch.randint(0, 30, (5,), device=device)
    temperature = torch.rand(5, device=device) + 0.5
    weight, hard_weight = torch.randn(5, device=device), torch.tensor([0.0, 1.0, 0.3, 0.5, 0.9], device=device)
    uld = run(student, teacher, temperature=temperature, backend=backend)
    leaf = student.clone().requires_grad_()
    entropy = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    (of_entropy,) = torch.autograd.grad(entropy.sum(), leaf)
    options = {"temperature": temperature, "temperature_squared": True, "row_weight": weight, "labels": labels,
               "hard_weight": hard_weight, "backend": backend}  # fmt: skip
    for gradient in ("forward", "backward"):
        loss, found, _ = run(student, teacher, gradient=gradient, **options)
        factors = weight * (1 - hard_weight) * temperature**2, weight * hard_weight
        torch.testing.assert_close(loss, factors[0] * uld[0] + factors[1] * entropy.detach(), rtol=1e-5, atol=1e-6)
        want = factors[0][:, None] * uld[1] + factors[1][:, None] * of_entropy
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused_uld(student, teacher, reduction="sum", **options), loss.sum())
    torch.testing.assert_close(fused_uld(student, teacher, **options), loss.sum() / 5)
    torch.testing.assert_close(fused_uld(student, teacher, normalizer=torch.tensor([8]), **options), loss.sum() / 8)


@each_backend
def test_values_that_no_loss_has_raise_on_a_cpu(backend):
    if device_of(backend) != "cpu":
        pytest.skip("a GPU backend makes the row NaN instead")
    student, teacher, labels = torch.randn(3, 9, requires_grad=True), torch.randn(3, 7), torch.tensor([0, 9, 1])
    for topk in (None, 3):
        with pytest.raises(ValueError, match=r"temperature: .*got -1.0 in row 1"):
            fused_uld(student, teacher, temperature=torch.tensor([1.0, -1.0, 1.0]), backend=backend, topk=topk)
    if backend in ("cuda", "triton"):
        return  # the label term of these backends does not validate
    with pytest.raises(ValueError, match=r"labels: expected 0 <= label < 9 .*got 9 in row 1"):
        fused_uld(student, teacher, labels=labels, hard_weight=0.5, backend=backend)
    with pytest.raises(ValueError, match=r"hard_weight: expected from 0 to 1; got 1.5 in row 2"):
        weight = torch.tensor([0.0, 0.1, 1.5])
        fused_uld(student, teacher, labels=labels.clamp(max=8), hard_weight=weight, backend=backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kernels_make_rows_of_bad_temperatures_nan(backend):
    from kdkernels import backends

    device = device_of(backend)
    student, teacher = torch.randn(1, 5, 9, device=device), torch.randn(1, 5, 7, device=device)
    temperature = torch.tensor([1.0, 0.0, -1.0, NAN, INF], device=device)
    scale = torch.ones(5, device=device)
    problem = family.Uld(student, teacher, scale, temperature, None, 9, 7, 1 << 20)
    loss, gradient, divergence = backends.kernels(backend).uld(problem, True)
    for x in (loss, divergence, gradient[0]):
        assert x[0].isfinite().all() and x[1:].isnan().all()


def test_results_do_not_depend_on_the_threads():
    student, teacher = torch.randn(9, 20_000), torch.randn(9, 15_000).bfloat16()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(run(student, teacher, backend="cpu"))
    torch.set_num_threads(before)
    for got in found[1:]:
        assert torch.equal(got[0], found[0][0]) and torch.equal(got[1], found[0][1])


# ---- integration with PyTorch


@kernel_backends
def test_modes_agree_and_a_graph_can_be_gone_through_twice(backend):
    device = device_of(backend)
    student = torch.randn(3, 30, device=device, requires_grad=True)
    teacher, factor = torch.randn(3, 25, device=device), torch.rand(3, device=device)
    for topk in (None,) if backend == "triton" else (None, 6):
        found = []
        for gradient in ("forward", "backward"):
            loss = fused_uld(student, teacher, reduction="none", gradient=gradient, topk=topk, backend=backend)
            found += [torch.autograd.grad(loss, student, factor, retain_graph=True)[0] for _ in range(2)]
        for got in found[1:]:
            torch.testing.assert_close(got, found[0])
        (again,) = torch.autograd.grad(2 * fused_uld(student, teacher, reduction="none", backend=backend, topk=topk),
                                       student, factor)  # fmt: skip
        torch.testing.assert_close(again, 2 * found[0])


@kernel_backends
def test_missing_derivatives_raise(backend):
    student, teacher = torch.randn(3, 9, device=device_of(backend)), torch.randn(3, 9, device=device_of(backend))
    for gradient in ("forward", "backward"):
        leaf = student.clone().requires_grad_()
        loss = fused_uld(leaf, teacher, gradient=gradient, backend=backend)
        with pytest.raises(RuntimeError, match='backend="reference" is twice differentiable'):
            torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.grad(lambda x: fused_uld(x, teacher, backend=backend))(student)


def test_the_reference_goes_through_torch_func():
    student, teacher = torch.randn(3, 9).double(), torch.randn(3, 5).double()
    want = run(student, teacher, backend="reference")[1]
    got = torch.func.grad(lambda x: fused_uld(x, teacher, reduction="sum", backend="reference"))(student)
    torch.testing.assert_close(got, want)


@kernel_backends
def test_opcheck(backend):
    device = device_of(backend)
    student, teacher = torch.randn(2, 3, 40, device=device), torch.randn(2, 3, 44, device=device).bfloat16()
    tensors = (student, teacher, torch.rand(6, device=device), torch.full((1,), 1.5, device=device))
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, and NaN fills would differ
    for wanted in (True, False):
        for k in (None, 5) if backend != "triton" else (None,):  # SLOW
            opcheck(ops.uld, family.Uld(*tensors, k, 38, 44, 1 << 20), [wanted], backend)


@pytest.mark.parametrize("topk", [None, 5])
def test_compiles_whole_and_twice_at_most(topk):
    torch._dynamo.reset()
    counter = CompileCounter()

    def step(student, teacher, temperature, labels, hard_weight):
        out = fused_uld(student, teacher, temperature=temperature, labels=labels, hard_weight=hard_weight, topk=topk,
                        statistics=("divergence",))  # fmt: skip
        return out.loss, out.statistics["divergence"]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(6):
        rows = 5 + 2 * i
        student, teacher = torch.randn(rows, 20, requires_grad=True), torch.randn(rows, 30)
        labels = torch.randint(0, 20, (rows,))
        arguments = (student, teacher, 1.0 + 0.1 * i, labels, 0.1 + 0.05 * i)
        loss, divergence = compiled(*arguments)
        want, want_divergence = step(*arguments)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(divergence, want_divergence)
        torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@each_backend
def test_autocast_changes_nothing(backend):
    device = device_of(backend)
    student, teacher = torch.randn(3, 30, device=device), torch.randn(3, 20, device=device)
    for topk in (None,) if backend == "triton" else (None, 4):
        want = run(student, teacher, backend=backend, topk=topk)
        with torch.autocast(device, torch.bfloat16):
            got = run(student, teacher, backend=backend, topk=topk)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@each_backend
def test_slices_are_taken(backend):
    student = torch.randn(2, 5, 30, device=device_of(backend), requires_grad=True)
    teacher = torch.randn(2, 5, 40, device=device_of(backend))
    loss = fused_uld(student[:, :-1], teacher[:, 1:], backend=backend)
    want = fused_uld(student[:, :-1].contiguous(), teacher[:, 1:].contiguous(), backend=backend)
    assert torch.equal(loss, want)
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[:, -1] == 0).all() and (gradient[:, :-1] != 0).any()


def test_the_operator_without_a_gradient_makes_none():
    student, teacher = torch.randn(1, 3, 30), torch.randn(1, 3, 20)
    problem = family.Uld(student, teacher, torch.ones(3), torch.ones(1), None, 30, 20, 1 << 20)
    loss, gradient, _, _ = ops.uld(problem, [False], "cpu")
    assert gradient.numel() == 0 and torch.equal(loss, ops.uld(problem, [True], "cpu")[0])


def test_module_is_the_function():
    student, teacher = torch.randn(3, 40), torch.randn(3, 30)
    module = kdkernels.nn.ULD(temperature=2.0, reduction="sum")
    assert torch.equal(module(student, teacher), fused_uld(student, teacher, temperature=2.0, reduction="sum"))
    assert torch.equal(module(student, teacher, reduction="none").sum(), module(student, teacher))
    assert repr(module) == "ULD(temperature=2.0, reduction='sum')"
    with pytest.raises(TypeError, match=r"ULD: unknown argument 'beta'.*; known: temperature, "):
        kdkernels.nn.ULD(beta=0.5)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"student_vocab_size: .* the student's 9 classes; got 10", {"student_vocab_size": 10}),
        (ValueError, r"teacher_vocab_size: expected from 1 .* 7 classes; got 0", {"teacher_vocab_size": 0}),
        (TypeError, "student_vocab_size: expected int; got float", {"student_vocab_size": 3.0}),
        (ValueError, "topk: expected from 1 to 9, the larger vocabulary; got 10", {"topk": 10}),
        (ValueError, "topk: expected from 1 to 7, the larger", {"topk": 8, "student_vocab_size": 4}),
        (TypeError, "topk: expected int; got bool", {"topk": True}),
        (ValueError, "statistics: unknown name 'tv'; known: divergence, error_bound, kept", {"statistics": ("tv",)}),
        (TypeError, "statistics: expected a tuple of names, as in", {"statistics": "divergence"}),
        (ValueError, "gradient: expected 'auto' or 'forward' or 'backward'", {"gradient": "both"}),
        (ValueError, "reduction: .* got 'batchmean'", {"reduction": "batchmean"}),
        (ValueError, "hard_weight needs labels", {"hard_weight": 0.5}),
        (ValueError, "temperature: expected finite and > 0", {"temperature": 0}),
        (ValueError, r"mask: expected the logits' leading shape \[3\]", {"mask": torch.ones(2, dtype=torch.bool)}),
        (ValueError, "unknown backend", {"backend": "gpu"}),
    ],
)  # fmt: skip
def test_bad_options_are_named(error, message, options):
    with pytest.raises(error, match=message):
        fused_uld(torch.randn(3, 9), torch.randn(3, 7), **options)


def test_bad_tensors_are_named():
    student, teacher = torch.randn(3, 9), torch.randn(3, 7)
    with pytest.raises(ValueError, match=r"agree in all dimensions but the last; got \[3, 9\] and \[2, 7\]"):
        fused_uld(student, teacher[:2])
    with pytest.raises(ValueError, match=r"teacher requires grad.*detach"):
        fused_uld(student, teacher.clone().requires_grad_())
    with pytest.raises(TypeError, match="teacher: expected a tensor of logits; got SparseLogProbs"):
        fused_uld(student, kdkernels.topk_log_probs(teacher, 3))
    with pytest.raises(TypeError, match="student: expected dtype"):
        fused_uld(student.long(), teacher)
    with pytest.raises(ValueError, match="teacher: expected a last dimension of stride 1"):
        fused_uld(student, torch.randn(7, 3).t())
    assert native.cpu.refuse(student, teacher) is None
