"""Heads (LinearLogits) on every backend, against fp64 arithmetic from the hidden states on."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from memory import peak_bytes
from strategies import DTYPES, LEADING, row_options
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint
from truth import BACKENDS, DIVERGENCES, device_of, opcheck, rounding_if_steep, undecided_signs

import kdkernels
from kdkernels import LinearLogits, chunk_budget, fused_divergence, fused_js, fused_kl, ops
from kdkernels.families import linear as chunks
from kdkernels.families.budget import current_budget
from kdkernels.families.linear import LogitsSource
from kdkernels.families.options import RowOptions
from kdkernels.losses.options import STATISTICS, GivenRowOptions, resolve

CPU = torch.device("cpu")

KERNELS = ["cpu", "cuda", "triton"]
EXAMPLES = {"cpu": 40, "cuda": 12, "triton": 4, "reference": 8}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
kernel_backends = pytest.mark.parametrize("backend", KERNELS)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)


@dataclass(frozen=True)
class Heads:
    """Recipe for a student and a teacher; at least one side is a head."""

    leading: tuple[int, ...]
    vocab: int
    widths: tuple[int, int]  # widths of the hidden states
    padding: tuple[int, int]  # classes past the vocabulary
    dtypes: tuple[torch.dtype, torch.dtype]
    biased: tuple[bool, bool]
    scales: tuple[float, float]
    softcaps: tuple[float | None, float | None]
    stored: int | None  # index of the side with stored logits
    strided: bool
    seed: int

    def make(self, device="cpu"):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape, dtype):
            return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)

        def rows(width, dtype):
            if not (self.strided and self.leading):
                return normal(*self.leading, width, dtype=dtype)
            return normal(*self.leading[:-1], self.leading[-1] + 1, width, dtype=dtype)[..., :-1, :]

        sides = []
        for side in (0, 1):
            dtype, classes, width = self.dtypes[side], self.vocab + self.padding[side], self.widths[side]
            if side == self.stored:
                sides.append(2 * rows(classes, dtype))
                continue
            weight = 2 * normal(classes, width, dtype=dtype) / width**0.5
            bias = normal(classes, dtype=dtype) if self.biased[side] else None
            hidden = rows(width, dtype)
            sides.append(LinearLogits(hidden, weight, bias, scale=self.scales[side], softcap=self.softcaps[side]))
        return sides

    @property
    def vocab_size(self) -> int | None:
        return self.vocab if self.padding != (0, 0) else None


def heads(dtypes=DTYPES):
    def pair(values):
        return st.tuples(values, values)

    return st.builds(
        Heads,
        leading=st.sampled_from(LEADING),
        vocab=st.integers(1, 300),
        widths=pair(st.integers(1, 24)),
        padding=st.sampled_from([(0, 0), (0, 0), (0, 5), (3, 0), (1, 2)]),
        dtypes=pair(st.sampled_from(dtypes)),
        biased=pair(st.booleans()),
        scales=pair(st.sampled_from([1.0, 1.0, 0.0625, 0.37, -1.5])),
        softcaps=pair(st.sampled_from([None, None, 30.0, 2.0])),
        stored=st.sampled_from([None, None, 0, 1]),
        strided=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )


def parts(side):
    """A side's differentiable tensors."""
    return [side] if isinstance(side, torch.Tensor) else [side.hidden, side.weight, side.bias]


def mapped(side, f):
    if isinstance(side, torch.Tensor):
        return f(side)
    return LinearLogits(
        *(None if x is None else f(x) for x in parts(side)), scale=side.scale, softcap=side.softcap
    )  # fmt: skip


def run(student, teacher, divergence="kl", *, grad_output=None, statistics=(), **options):
    """Loss, gradients of the student's parts (absent parts are left out) and statistics, on fresh leaves."""
    student = mapped(student, lambda x: x.detach().clone().requires_grad_())
    out = fused_divergence(student, mapped(teacher, torch.Tensor.detach), divergence, statistics=statistics, **options)
    loss, found = (out.loss, out.statistics) if statistics else (out, {})
    leaves = [x for x in parts(student) if x is not None]
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    gradients = torch.autograd.grad(loss, leaves, grad_output.to(loss))
    return loss.detach(), gradients, found


def truth(student, teacher, divergence="kl", **options):
    options = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
               for k, x in options.items()}  # fmt: skip
    for name in ("gradient", "chunk_rows", "compact_rows", "logits_dtype"):
        options.pop(name, None)
    return run(mapped(student, torch.Tensor.double), mapped(teacher, torch.Tensor.double), divergence,
               **{**options, "backend": "reference"})  # fmt: skip


def logits_of(side):
    """Logits as a model computes them in its dtype: F.linear, scale and softcap, each rounded."""
    if isinstance(side, torch.Tensor):
        return side
    logits = torch.nn.functional.linear(side.hidden, side.weight, side.bias) * side.scale
    return logits if side.softcap is None else torch.tanh(logits / side.softcap) * side.softcap


def eager(student, teacher, divergence="kl", *, grad_output=None, **options):
    """The same call on logits that eager PyTorch stores in their dtype; the divergence is in fp32."""
    student = mapped(student, lambda x: x.detach().clone().requires_grad_())
    with torch.no_grad():
        teacher = logits_of(teacher)
    loss = fused_divergence(logits_of(student), teacher, divergence, **{**options, "backend": "reference"})
    leaves = [x for x in parts(student) if x is not None]
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    return loss.detach(), torch.autograd.grad(loss, leaves, grad_output.to(loss))


def distance(got, want) -> float:
    return (got.double() - want.double()).norm().item()


# Error allowed for one more rounding of each element to the dtype and for another order of summation.
ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def errors_of_slopes(student, teacher, divergence, options):
    """Allowed errors (norms) of loss and gradients beyond those of slopes of size 1: from tv's signs that the rounding
    of logits decides, and from the rounding of log-probabilities times the slopes of a steep divergence.
    """
    if not (divergence.name == "tv" or divergence.is_steep):
        return 0, 0, 0, 0
    with torch.no_grad():
        logits = [logits_of(mapped(x, torch.Tensor.double)) for x in (student, teacher)]
    if options.get("vocab_size"):
        logits = [x[..., : options["vocab_size"]] for x in logits]
    temperature = torch.as_tensor(options["temperature"], device=student.device).double()
    column = temperature[..., None] if temperature.dim() else temperature
    if divergence.name == "tv":
        dtype = max((student.dtype, teacher.dtype), key=lambda x: torch.finfo(x).eps)
        largest = torch.stack([x.abs().amax(-1) for x in logits]).amax(0) / temperature
        ulps = 4 * torch.finfo(dtype).eps * (1 + largest)
        factor = options.get("row_weight", torch.ones((), device=student.device)).abs()
        factor = factor * (temperature if options["temperature_squared"] else 1 / temperature)
        of_loss, slopes = 0, undecided_signs(*logits, column, ulps)
    else:
        given = {name: options[name] for name in GivenRowOptions._fields if name in options}
        factor = resolve(student, teacher, GivenRowOptions(**given)).soft_factor().reshape(student.shape[:-1])
        dtype = max((student.dtype, teacher.dtype), key=lambda x: torch.finfo(x).eps)
        dtype = torch.float32 if dtype == torch.float64 else dtype
        of_loss, slopes = rounding_if_steep(*logits, column, divergence, dtype)
        of_loss = of_loss * factor.abs()
        of_loss = (of_loss.norm() if options.get("reduction") == "none" else of_loss.sum()).item()
        factor = factor.abs() * options.get("grad_output", 1) / temperature
    slopes = slopes * factor[..., None]
    if isinstance(student, torch.Tensor):
        return of_loss, slopes.norm().item()
    slopes, scale = slopes.reshape(-1, slopes.shape[-1]), abs(student.scale)
    weight, hidden = student.weight[: slopes.shape[1]].double().abs(), student.hidden.double().abs()
    of_weight = slopes.t() @ hidden.reshape(-1, hidden.shape[-1])
    return of_loss, *(scale * x.norm().item() for x in (slopes @ weight, of_weight, slopes.sum(0)))


def assert_close(got, want, same_dtype, dtypes, what="", more=(0, 0, 0, 0)):
    """Errors (in norm) stay within 1.5 times the error of eager PyTorch in the same dtypes, plus one rounding.

    The factor 1.5 covers chance: in a small tensor, two roundings of one size may differ. The large tensors of
    `test_errors_are_at_most_those_of_eager` need no factor.
    """
    tolerance = max(ROUNDING[dtype] for dtype in dtypes)
    for name, x, y, z, slack in zip(("loss", "data", "weight", "bias"), (got[0], *got[1]), (want[0], *want[1]),
                                    (same_dtype[0], *same_dtype[1]), more, strict=False):  # fmt: skip
        assert torch.isfinite(x).all(), (what, name, x)
        # Near p = q the gradient is rounding of logits alone. It scales with the slopes' size, not with their sum.
        slopes = 1 if name == "loss" else 0.02 * y.numel() ** 0.5
        allowed = 1.5 * distance(z, y) + tolerance * (y.norm().item() + slopes) + slack
        assert distance(x, y) <= allowed, (what, name, distance(x, y), allowed)


@each_divergence
@each_backend
def test_matches_fp64_from_the_hidden_states(divergence, backend):
    @settings(max_examples=EXAMPLES[backend])
    @given(recipe=heads(), recipe_of_options=row_options, chunk_rows=st.sampled_from([None, 1, 2, 5]),
           gradient=st.sampled_from(["auto", "backward"]), compact=st.sampled_from([None, False]),
           reduction=st.sampled_from(["mean", "sum", "none"]))  # fmt: skip
    def property_holds(recipe, recipe_of_options, chunk_rows, gradient, compact, reduction):
        device = device_of(backend)
        student, teacher = recipe.make(device)
        options = recipe_of_options.make(recipe.leading, recipe.vocab, device)
        options |= {"vocab_size": recipe.vocab_size, "reduction": reduction}
        kernel_options = {"chunk_rows": chunk_rows, "gradient": gradient, "compact_rows": compact}
        if reduction == "none":
            options["grad_output"] = torch.rand(recipe.leading, generator=torch.Generator().manual_seed(1)).to(device)
        got = run(student, teacher, divergence, backend=backend, **options, **kernel_options)
        for x, y in zip(got[1], [x for x in parts(student) if x is not None], strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
        want = truth(student, teacher, divergence, **options)
        # Exponentials of the log-ratio magnify the rounding of logits.
        assume(not divergence.is_steep or want[0].abs().max() < 1e1)
        dtypes = [x.dtype for x in (student, teacher)]
        more = errors_of_slopes(student, teacher, divergence, options)
        assert_close(got, want, eager(student, teacher, divergence, **options), dtypes, divergence, more)

    property_holds()


@pytest.mark.parametrize("divergence", [x for x in DIVERGENCES if x.is_steep], ids=repr)
def test_a_steep_row_has_the_rounding_of_its_slopes(divergence):
    """In this row alpha = -0.5 has slopes that sum to 16, and an error of three times the one for slopes of size 1."""
    fp32 = (torch.float32, torch.float32)
    recipe = Heads((1,), 21, (11, 4), (0, 0), fp32, (True, True), (-1.5, -1.5), (None, None), 1, True, 2597257540)
    (student, teacher), options = recipe.make(), {"temperature": 1.0, "temperature_squared": False, "reduction": "sum"}
    got, want, same = (f(student, teacher, divergence, **options) for f in (run, truth, eager))
    assert_close(got, want, same, fp32, divergence, errors_of_slopes(student, teacher, divergence, options))
    of_equals = errors_of_slopes(student, logits_of(student), divergence, options)
    assert max(of_equals) < 1e-12, "where p = q the slopes have size 1, and the bound is the one of every divergence"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_errors_are_at_most_those_of_eager(dtype, softcap):
    recipe = Heads((96,), 5000, (64, 48), (0, 0), (dtype, dtype), (True, False), (1.5, 1.0), (softcap, softcap), None,
                   False, 0)  # fmt: skip
    student, teacher = recipe.make()
    for divergence in ("kl", "js"):
        want, same = (f(student, teacher, divergence, reduction="sum") for f in (truth, eager))
        for gradient in ("forward", "backward"):
            got = run(student, teacher, divergence, reduction="sum", chunk_rows=32, gradient=gradient, backend="cpu")
            for x, y, z in zip(got[1], want[1], same[1], strict=True):
                assert distance(x, y) <= distance(z, y) + 1e-6 * y.norm().item(), (divergence, gradient)


@each_divergence
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_cpu_in_fp64(divergence, gradient):
    @settings(max_examples=8)
    @given(recipe=heads(dtypes=[torch.float64]), recipe_of_options=row_options,
           chunk_rows=st.sampled_from([None, 1, 3]))  # fmt: skip
    def property_holds(recipe, recipe_of_options, chunk_rows):
        student, teacher = recipe.make()
        options = recipe_of_options.make(recipe.leading, recipe.vocab)
        options["vocab_size"] = recipe.vocab_size
        got = run(student, teacher, divergence, backend="cpu", gradient=gradient, chunk_rows=chunk_rows, **options)
        want = truth(student, teacher, divergence, **options)
        for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)

    property_holds()


@each_divergence
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(divergence, backend):
    torch.manual_seed(3)
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (7, 4), (7,))]
    teacher = LinearLogits(torch.randn(3, 5).double(), torch.randn(7, 5).double(), softcap=3.0)
    labels = torch.tensor([1, -100, 3])

    def loss(hidden, weight, bias, **options):
        student = LinearLogits(hidden, weight, bias, scale=0.7, softcap=2.0)
        return fused_divergence(student, teacher, divergence, labels=labels, hard_weight=0.3, temperature=1.3,
                                backend=backend, chunk_rows=2, **options)  # fmt: skip

    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "gradient": "backward"}):
        torch.autograd.gradcheck(partial(loss, **options), leaves)


def test_reference_is_twice_differentiable():
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (5, 3))]
    teacher = torch.randn(2, 5).double()
    torch.autograd.gradgradcheck(
        lambda h, w: fused_js(LinearLogits(h, w, softcap=2.0), teacher, backend="reference"), leaves
    )


@each_backend
def test_statistics(backend):
    """All statistics of a head, in chunks and with dropped rows, equal the statistics of its logits."""
    device = device_of(backend)
    recipe = Heads((3, 4), 60, (8, 8), (0, 3), (torch.float32,) * 2, (True, False), (1.0, 0.5), (5.0, None), None,
                   True, 0)  # fmt: skip
    student, teacher = recipe.make(device)
    labels = torch.randint(0, 60, (3, 4), device=device)
    labels[1] = -100
    options = {"vocab_size": 60, "labels": labels, "temperature": 1.5, "statistics": STATISTICS, "backend": backend}
    for chunk_rows in (None, 1, 5):
        for compact in (None, False):
            *_, got = run(student, teacher, "js", chunk_rows=chunk_rows, compact_rows=compact, **options)
            want = fused_divergence(logits_of(student), logits_of(teacher), "js", **options).statistics
            for name in STATISTICS:
                torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-5)
                assert not got[name][1].any(), name


# ---- costs that a head must avoid


def products(monkeypatch, call):
    """Shapes (rows, inner, columns) of the operator's matrix products."""
    made, addmm = [], torch.addmm

    def counted(add, a, b, **options):
        made.append((a.shape[0], a.shape[1], b.shape[1]))
        return addmm(add, a, b, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", counted)
        call()
    return made


def example(leading=(12,), vocab=40, width=6, dtype=torch.float32, device="cpu"):
    def head():
        return LinearLogits(torch.randn(*leading, width, device=device).to(dtype),
                            torch.randn(vocab, width, device=device).to(dtype))  # fmt: skip

    return head(), head()


@kernel_backends
def test_frozen_parts_cost_no_product(backend, monkeypatch):
    device = device_of(backend)
    student, teacher = example(device=device)
    project, of_hidden, of_weight = (12, 6, 40), (12, 40, 6), (40, 12, 6)
    for trains, expected in (
        ((False, False), []),
        ((True, False), [of_hidden]),
        ((False, True), [of_weight]),
        ((True, True), [of_hidden, of_weight]),
    ):
        leaves = LinearLogits(*(x.clone().requires_grad_(on) for x, on in
                                zip((student.hidden, student.weight), trains, strict=True)))  # fmt: skip
        for gradient, again in (("forward", 0), ("backward", 1)):

            def step(leaves=leaves, gradient=gradient):
                loss = fused_kl(leaves, teacher, gradient=gradient, backend=backend)
                if leaves.requires_grad:
                    loss.backward()

            again = again if any(trains) else 0
            made = products(monkeypatch, step)
            assert sorted(made) == sorted([project, project] * (1 + again) + expected)
            assert (leaves.hidden.grad is not None, leaves.weight.grad is not None) == trains
        with torch.no_grad():
            evaluate = partial(fused_kl, leaves, teacher, backend=backend)
            assert products(monkeypatch, evaluate) == [project] * 2
            assert not evaluate().requires_grad


@kernel_backends
def test_rows_that_are_dropped_cost_no_product(backend, monkeypatch):
    """Dropped rows take part in no product: on a CPU by default, on other devices with compact_rows=True."""
    device = device_of(backend)
    student, teacher = example((4, 25), device=device)
    mask = torch.rand(4, 25, device=device) < 0.2
    kept = int(mask.sum())

    def rows_of_products(**options):
        made = products(monkeypatch, lambda: run(student, teacher, mask=mask, backend=backend, **options))
        return {sum(m for m, k, n in made if (k, n) == shape) for shape in ((6, 40), (40, 6))}

    assert rows_of_products(compact_rows=True, chunk_rows=7) == {2 * kept, kept}
    assert rows_of_products(compact_rows=False, chunk_rows=7) == {200, 100}
    assert rows_of_products(chunk_rows=7) == ({2 * kept, kept} if device == "cpu" else {200, 100})


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_budget_and_the_gradients(dtype, gradient):
    """Peak memory stays within the chunk budget plus the gradients, for any number and shape of rows."""
    torch.use_deterministic_algorithms(False)
    vocab, width, budget = 6000, 64, 4 << 20
    for leading in ((200,), (1, 800), (8, 100)):
        student, teacher = example(leading, vocab, width, dtype)
        leaves = LinearLogits(student.hidden.requires_grad_(), student.weight.requires_grad_())

        def step(leaves=leaves, teacher=teacher):
            with chunk_budget(budget):
                loss = fused_kl(leaves, teacher, gradient=gradient, backend="cpu")
            return torch.autograd.grad(loss, (leaves.hidden, leaves.weight))

        rows = student.hidden.shape[:-1].numel()
        gradients = 4 * vocab * width + rows * width * dtype.itemsize
        # Per-row numbers, the buffer of a product before its addition, and the kernels' workspace.
        small = 200 * rows + (1 << 20)
        peak = peak_bytes(step)
        assert peak <= budget + gradients + small
        assert peak >= gradients, "the profiler missed allocations"


def test_large_chunks_take_no_more_than_the_rows():
    student, teacher = example((4,), 2000, 16)
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        assert peak_bytes(lambda: fused_kl(student, teacher, chunk_rows=10**6, backend="cpu")) < 400_000


def test_chunk_buffers_are_freed_before_the_weight_gradient_is_rounded():
    torch.use_deterministic_algorithms(False)
    vocab, width, budget = 4000, 512, 4 << 20
    student, teacher = example((1000,), vocab, width, torch.bfloat16)
    leaves = mapped(student, lambda x: x.requires_grad_())
    with chunk_budget(budget):
        peak = peak_bytes(lambda: fused_kl(leaves, teacher, backend="cpu"))
    fp32, rounded = 4 * vocab * width, 2 * vocab * width  # `rounded` is allocated after the chunk's buffers are freed
    assert peak < fp32 + 2 * 1000 * width + max(rounded, budget) + (4 << 20)


def test_evaluation_keeps_nothing():
    student, teacher = example((64,), 2000, 16)
    torch.use_deterministic_algorithms(False)
    with torch.no_grad(), chunk_budget(1 << 18):
        assert peak_bytes(lambda: fused_kl(student, teacher, backend="cpu")) < (1 << 18) + 200_000


@kernel_backends
def test_backward_keeps_the_inputs_alone(backend):
    device = device_of(backend)
    student, teacher = example((16,), 90, device=device)
    for gradient, largest in (("forward", 90 * 6), ("backward", 90 * 6)):
        saved = []
        leaves = mapped(student, lambda x: x.clone().requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            loss = fused_kl(leaves, teacher, gradient=gradient, backend=backend)
        assert max(x.numel() for x in saved) == largest
        if gradient == "backward":
            given = {x.data_ptr() for side in (leaves, teacher) for x in parts(side) if x is not None}
            assert {x.data_ptr() for x in saved if x.numel() > 16} == given
        loss.backward()


def test_budget_decides_the_chunks(monkeypatch):
    student, teacher = example((1000,), 64, 4)
    rows_of = partial(products, monkeypatch, lambda: fused_kl(student, teacher, backend="cpu"))
    assert rows_of()[0][0] == 1000
    with chunk_budget(64 * 4 * 2 * 300):
        rows = [m for m, k, n in rows_of() if (k, n) == (4, 64)][::2]
        # Rows are spread evenly: 4 chunks of like size, not 3 full chunks and a short one.
        assert sum(rows) == 1000 and len(rows) == 4 and min(rows) > 200
        with chunk_budget(2**30):
            assert rows_of()[0][0] == 1000
        assert rows_of()[0][0] < 300
    assert rows_of()[0][0] == 1000
    with chunk_budget(2**30):
        chunk_budget(64 * 4 * 2 * 300)  # as a setter
        assert rows_of()[0][0] < 300


def test_a_budget_below_one_row_takes_one_and_warns():
    student, teacher = example((3,), 64, 4)
    want = run(student, teacher, backend="cpu")
    with chunk_budget(100), pytest.warns(RuntimeWarning, match="100 bytes holds no row: a row takes .* one row"):
        got = run(student, teacher, backend="cpu")
    for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(x, y)


# ---- numbers


def test_the_weight_s_gradient_is_summed_in_fp32():
    """512 chunks add parts of one sign to the weight's gradient; a bf16 sum stops growing at 256 of them."""
    rows, vocab, width = 512, 8, 4
    student = LinearLogits(torch.ones(rows, width).bfloat16(), torch.zeros(vocab, width).bfloat16())
    teacher = torch.zeros(rows, vocab)
    teacher[:, 0] = 1.0
    _, got, _ = run(student, teacher, reduction="sum", chunk_rows=1, backend="cpu")
    _, want, _ = truth(student, teacher, reduction="sum")
    assert distance(got[1], want[1]) <= 2.0**-8 * want[1].norm()


@kernel_backends
def test_fp32_logits_out_of_bf16_products(backend):
    """logits_dtype=torch.float32 avoids rounding logits to bf16, the largest part of a gradient's error."""
    device = device_of(backend)
    hidden = 4 * torch.randn(24, 32, device=device).bfloat16()
    weight = torch.randn(150, 32, device=device).bfloat16()
    student = LinearLogits(hidden, weight)
    teacher = LinearLogits(hidden, (weight + 0.02 * torch.randn_like(weight)))
    want = truth(student, teacher)
    errors = []
    for logits_dtype in (None, torch.float32):
        got = run(student, teacher, logits_dtype=logits_dtype, chunk_rows=10, backend=backend)
        errors.append([distance(x, y) / y.norm().item() for x, y in zip(got[1], want[1], strict=True)])
    assert min(errors[0]) > 0.02
    assert max(errors[1]) < 2.0**-7


@kernel_backends
@pytest.mark.parametrize("compact", [True, False])
def test_masked_rows_may_hold_anything(backend, compact):
    device = device_of(backend)
    student, teacher = example((3, 5), 30, device=device)
    mask = torch.rand(3, 5, device=device) < 0.6
    mask[0] = False
    want = run(student, teacher, "js", mask=mask, backend=backend)
    for garbage in (torch.nan, torch.inf):
        for side in (student, teacher):
            side.hidden[~mask] = garbage
        for options in ({"gradient": "forward"}, {"gradient": "backward"}, {"chunk_rows": 2}):
            got = run(student, teacher, "js", mask=mask, backend=backend, compact_rows=compact, **options)
            for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
                torch.testing.assert_close(x, y)
            assert not got[1][0][~mask].any()


@each_backend
def test_weights_of_padding_classes_may_hold_anything(backend):
    device = device_of(backend)
    student, teacher = example(vocab=43, device=device)
    student = LinearLogits(student.hidden, student.weight, torch.randn(43, device=device), softcap=5.0)
    want = run(student, teacher, vocab_size=40, backend=backend)
    for side in (student, teacher):
        side.weight[40:] = torch.nan
    student.bias[40:] = torch.inf
    got = run(student, teacher, vocab_size=40, backend=backend)
    for x, y in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(x, y)


@kernel_backends
@pytest.mark.parametrize("compact", [True, False])
def test_masked_rows_have_no_gradient_whatever_the_weight_is(backend, compact):
    device = device_of(backend)
    student, teacher = example(device=device)
    student.weight[3] = torch.inf
    mask = torch.arange(12, device=device) % 3 > 0
    _, gradients, _ = run(student, teacher, mask=mask, compact_rows=compact, chunk_rows=5, backend=backend)
    assert not gradients[0][~mask].any()


@kernel_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inference_tensors_can_be_the_teacher(backend, reduction):
    device = device_of(backend)
    student, made = example(device=device)
    made = LinearLogits(made.hidden, made.weight, torch.randn(40, device=device))
    with torch.inference_mode():
        teacher = LinearLogits(made.hidden.clone(), made.weight.clone(), made.bias.clone())
    options = {"grad_output": torch.rand(12, device=device)} if reduction == "none" else {}
    got = run(student, teacher, reduction=reduction, backend=backend, **options)
    want = run(student, made, reduction=reduction, backend=backend, **options)
    for x, y in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(x, y)
    with torch.inference_mode():
        logits = logits_of(teacher)
    got = run(student, logits, reduction=reduction, backend=backend, **options)
    for x, y in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(x, y)


def test_a_scale_that_changes_compiles(fresh_compiler):
    compiled = torch.compile(
        lambda h, w, t, scale, cap: fused_kl(LinearLogits(h, w, scale=scale, softcap=cap), t, backend="cpu"),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    student, teacher = example()
    for scale, cap in ((0.5, 3.0), (0.25, 4.0), (2.0, 5.0)):
        want = fused_kl(LinearLogits(student.hidden, student.weight, scale=scale, softcap=cap), teacher, backend="cpu")
        torch.testing.assert_close(compiled(student.hidden, student.weight, teacher, scale, cap), want)


def test_a_gpu_has_a_larger_budget(monkeypatch):
    """At least 1 GiB, 2 % of its memory, and rows in steps of a product's tile."""
    device = torch.device("cuda", 1)
    memory = {0: 16 << 30, 1: 140 << 30}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=memory[i]))
    assert current_budget(device) == (140 << 30) // 50 > 1 << 30
    assert current_budget(torch.device("cuda")) == 1 << 30
    assert current_budget(CPU) == 256 << 20
    with chunk_budget(7000):
        assert current_budget(device) == 7000
    chunking = chunks.Chunking(None, None, 0, 300, False)
    sources = [SimpleNamespace(row_bytes=1, fixed_bytes=0)]
    assert chunks._chunk_size(550, chunking, sources, CPU) == 192
    assert chunks._chunk_size(550, chunking, sources, device) == 256


def test_a_budget_object_serves_several_blocks():
    with chunk_budget(7000):
        budget = chunk_budget(5000)
        for _ in range(2):
            with budget:
                assert current_budget(CPU) == 5000
            assert current_budget(CPU) == 7000


@each_backend
def test_no_kept_rows(backend):
    device = device_of(backend)
    for leading, mask in (((4,), torch.zeros(4, dtype=torch.bool, device=device)), ((0,), None), ((2, 0), None)):
        student, teacher = example(leading, device=device)
        student = LinearLogits(student.hidden, student.weight, torch.zeros(40, device=device))
        for compact in (None, False):
            for statistics in ((), ("tv", "student_top1")):
                loss, gradients, found = run(student, teacher, mask=mask, normalizer=0, compact_rows=compact,
                                             statistics=statistics, backend=backend)  # fmt: skip
                assert loss == 0 and not any(x.any() for x in gradients)
                assert all(x.shape == leading and not x.any() for x in found.values())


@kernel_backends
def test_grad_output_scales_the_gradients(backend):
    """grad_output scales the gradients, also over a retained graph.

    A backward scales saved gradients in place only if no later backward reads them.
    """
    device = device_of(backend)
    student, teacher = example(device=device)
    for gradient in ("forward", "backward"):
        leaves = mapped(student, lambda x: x.clone().requires_grad_())
        loss = fused_kl(leaves, teacher, gradient=gradient, backend=backend)
        inputs = (leaves.hidden, leaves.weight)
        once = torch.autograd.grad(loss, inputs, retain_graph=True)
        twice = torch.autograd.grad(2 * loss, inputs, retain_graph=True)
        again = torch.autograd.grad(3 * loss, inputs)
        for x, y, z in zip(once, twice, again, strict=True):
            torch.testing.assert_close(2 * x, y)
            torch.testing.assert_close(3 * x, z)


@kernel_backends
def test_a_tied_weight_gets_the_sum(backend):
    device = device_of(backend)
    tokens = torch.randint(0, 40, (12,), device=device)
    weight, teacher = torch.randn(40, 6, device=device), torch.randn(12, 40, device=device)
    found = []
    for make in (lambda h, w: LinearLogits(h, w), lambda h, w: h @ w.t()):
        leaf = weight.clone().requires_grad_()
        fused_kl(make(torch.tanh(leaf[tokens]), leaf), teacher, backend=backend).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


# ---- torch: autocast, checkpointing, compilation, custom operators


@kernel_backends
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_autocast_decides_the_products_dtype(backend, gradient):
    """A head acts as F.linear under autocast: fp32 parameters, bf16 products, gradients in the parameters' dtype."""
    device = device_of(backend)
    student, teacher = example((20,), 50, 16, device=device)
    student = LinearLogits(student.hidden, student.weight.bfloat16().float(), torch.randn(50, device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(student, teacher, gradient=gradient, chunk_rows=6, backend=backend)
    assert all(x.dtype == torch.float32 for x in (got[0], *got[1]))
    halves = run(mapped(student, torch.Tensor.bfloat16), mapped(teacher, torch.Tensor.bfloat16), gradient=gradient,
                 chunk_rows=6, backend=backend)  # fmt: skip
    assert torch.equal(got[0], halves[0])
    for x, y in zip(got[1], halves[1], strict=True):
        torch.testing.assert_close(x.bfloat16(), y, rtol=2.0**-7, atol=1e-6)
    # Each product is rounded to bf16; the sum over chunks is fp32.
    assert not torch.equal(got[1][1], got[1][1].bfloat16().float())
    exact = run(student, teacher, gradient=gradient, backend=backend)
    assert not torch.equal(got[0], exact[0])


def test_autocast_leaves_fp64_alone():
    student, teacher = (mapped(x, torch.Tensor.double) for x in example())
    want = run(student, teacher, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(student, teacher, backend="cpu")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1][1], want[1][1])


@kernel_backends
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant):
    device = device_of(backend)
    student, teacher = example(device=device)
    weight = student.weight.requires_grad_()

    def loss(hidden):
        return fused_kl(LinearLogits(hidden, weight), teacher, backend=backend)

    hidden = student.hidden.requires_grad_()
    want = torch.autograd.grad(loss(hidden), (hidden, weight))
    checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), want)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_compiles_whole(gradient, fresh_compiler):
    """A compiled step that builds the head gives the eager gradients, with operations before and after the loss."""
    _, teacher = example((6, 3), 50, 16)

    def step(x, weight, bias, factor, temperature):
        student = LinearLogits(torch.tanh(x), weight, bias, scale=0.5, softcap=20.0)
        loss = fused_js(student, LinearLogits(teacher.hidden[: len(x)], teacher.weight), temperature=temperature,
                        gradient=gradient, chunk_rows=4, backend="cpu")  # fmt: skip
        return factor * loss + weight.square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    for rows in (3, 5, 6):
        leaves = [torch.randn(*shape).requires_grad_() for shape in ((rows, 3, 16), (50, 16), (50,))]
        want = torch.autograd.grad(step(*leaves, 2.5, 1.0 + rows), leaves)
        got = torch.autograd.grad(compiled(*leaves, 2.5, 1.0 + rows), leaves)
        torch.testing.assert_close(got, want)


def test_token_counts_and_temperatures_recompile_nothing(fresh_compiler):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def step(hidden, weight, teacher, mask, temperature):
        out = fused_kl(LinearLogits(hidden, weight), teacher, mask=mask, temperature=temperature, statistics=("tv",),
                       backend="cpu")  # fmt: skip
        return out.loss, out.statistics["tv"]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    weight = torch.randn(50, 16, requires_grad=True)
    for i in range(8):
        rows = 7 + 2 * i
        hidden, teacher = torch.randn(rows, 16, requires_grad=True), torch.randn(rows, 50)
        compiled(hidden, weight, teacher, torch.rand(rows) > 0.3, 1.0 + 0.1 * i)
    assert counter.frame_count <= 2


def test_a_head_that_is_passed_in_compiles(fresh_compiler):
    student, teacher = example()
    leaves = mapped(student, lambda x: x.clone().requires_grad_())
    compiled = torch.compile(lambda s, t: fused_kl(s, t, backend="cpu"), fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(fused_kl(leaves, teacher, backend="cpu"), (leaves.hidden, leaves.weight))
    got = torch.autograd.grad(compiled(leaves, teacher), (leaves.hidden, leaves.weight))
    torch.testing.assert_close(got, want)


@kernel_backends
@pytest.mark.parametrize("case", ["both", "student", "teacher", "none wanted"])
def test_opcheck(backend, case):
    device = device_of(backend)
    student, teacher = example((2, 3), device=device)
    stored = torch.randn(2, 3, 40, device=device)
    sources = [
        LogitsSource(student.hidden, student.weight, student.weight[:, 0].clone(), 0.5, 3.0),
        LogitsSource(teacher.hidden, teacher.weight, None, 1.0, None),
    ]
    if case in ("teacher", "student"):
        sources[case == "student"] = LogitsSource(stored, None, None, 1.0, None)
    ones = torch.ones(1, device=device)
    labels = torch.randint(0, 40, (6,), device=device)
    options = RowOptions(torch.rand(6, device=device), ones, labels=labels, hard_weight=0.3 * ones)
    chunking = chunks.Chunking(None, None, 4, 1 << 20, case == "both")
    problem = chunks.ChunkedRows(*sources, None, options, "kl", ones, 40, True, chunking)
    wanted = [case != "none wanted"] + 2 * [case in ("both", "student")]
    torch.use_deterministic_algorithms(False)
    opcheck(ops.chunked_rows, problem, wanted, backend)


def test_no_value_is_read_on_the_way():
    """Forward and backward run on fake tensors: no code around the operator reads a value, so none synchronises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
        teacher = torch.randn(2, 5, 64)
        for gradient in ("forward", "backward"):
            out = fused_kl(
                LinearLogits(hidden, weight, softcap=3.0), teacher, mask=torch.ones(2, 5, dtype=torch.bool),
                temperature=torch.rand(2, 5), statistics=("tv",), gradient=gradient, backend="cpu",
            )  # fmt: skip
            out.loss.backward()
            assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_synchronisation_on_a_gpu(backend):
    student, teacher = example((30,), 640, 64, torch.bfloat16, "cuda")
    leaves = mapped(student, lambda x: x.requires_grad_())
    mask = torch.rand(30, device="cuda") > 0.5

    def step(gradient):
        fused_kl(leaves, teacher, mask=mask, gradient=gradient, chunk_rows=8, backend=backend).backward()

    step("forward")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gradient in ("forward", "backward"):
            step(gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["2.9.1+cu128", "2.10.0a0+nv25.11", "2.10.0", "2.13.0+cu130"])
def library_that_writes_fp32(request, monkeypatch):
    """A CPU mock of CUDA's mm and addmm, whose products of 16-bit factors are fp32, in a version of torch.

    The pre-release refuses what 2.9 refuses, as one of before November 2025 does. Yields the names of the products.
    """
    called, version = [], TorchVersion(request.param)

    def product(a, b, out_dtype, out):
        assert a.dtype == b.dtype and out_dtype == out.dtype == torch.float32 and out.shape == (len(a), b.shape[1])
        return a.float() @ b.float()

    def mm(a, b, out_dtype, *, out):
        called.append("mm")
        return out.copy_(product(a, b, out_dtype, out))

    def addmm(add, a, b, out_dtype, *, beta=1, alpha=1, out):
        called.append("addmm")
        if version < "2.10":
            assert add.dtype == b.dtype, f"self and mat2 must have the same dtype, but got {add.dtype} and {b.dtype}"
        assert add.dtype in (b.dtype, out_dtype) and add.shape == out.shape
        made = alpha * product(a, b, out_dtype, out)
        return out.copy_(made if beta == 0 else beta * add + made)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype_out", mm, "CPU")
        library.impl("addmm.dtype_out", addmm, "CPU")
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(chunks, "writes_fp32", lambda device: True)
        monkeypatch.setattr(chunks, "_SLAB", 16 * 4 * 8)  # 8 rows of the weight
        yield called


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_products_in_fp32_by_the_library(library_that_writes_fp32, logits_dtype):
    """CUDA's path is right on mocked operators: the library writes fp32 logits and sums over chunks."""
    recipe = Heads((20,), 70, (16, 16), (0, 0), (torch.bfloat16,) * 2, (True, True), (0.5, 1.0), (None, None), None,
                   False, 0)  # fmt: skip
    student, teacher = recipe.make()
    want, same = truth(student, teacher), eager(student, teacher)
    for chunk_rows in (None, 6):
        got = run(student, teacher, chunk_rows=chunk_rows, logits_dtype=logits_dtype, backend="cpu")
        assert_close(got, want, same, [torch.bfloat16])
    assert ("addmm" in library_that_writes_fp32) == (torch.__version__ >= "2.10"), "who adds the chunks' products"
    assert "mm" in library_that_writes_fp32 or chunks.adds_fp32(torch.device("cpu"))


# ---- bad input


def test_bad_input_raises():
    student, teacher = example()
    hidden, weight = student.hidden, student.weight
    logits = torch.randn(12, 40)
    for call, error, expected in (
        (lambda: fused_kl(student, teacher, chunk_rows=0), ValueError, "chunk_rows: expected at least 1; got 0"),
        (lambda: fused_kl(student, teacher, chunk_rows=2.0), TypeError, "chunk_rows: expected int.*float"),
        (lambda: fused_kl(student, teacher, chunk_rows=True), TypeError, "chunk_rows: expected int.*bool"),
        (lambda: fused_kl(logits, logits, chunk_rows=4), ValueError, "chunk_rows: expected None.*LinearLogits.*4"),
        (lambda: fused_kl(logits, logits, compact_rows=True), ValueError, "compact_rows: expected None.*LinearLogits"),
        (lambda: fused_kl(student, teacher, compact_rows=1), TypeError, "compact_rows: expected bool; got int"),
        (lambda: fused_kl(student, teacher, logits_dtype=torch.float16), TypeError, "logits_dtype.*float16"),
        (lambda: fused_kl(LinearLogits(hidden.bfloat16(), weight), teacher), TypeError,
         "student: .*one dtype outside autocast, or logits_dtype=torch.float32; got torch.bfloat16 and torch.float32"),
        (lambda: fused_kl(student, LinearLogits(hidden, weight.requires_grad_())), ValueError, r"teacher\.detach\(\)"),
        (lambda: fused_kl(student, example((11,))[0]), ValueError, r"\[12, 40\] and \[11, 40\]"),
        (lambda: fused_kl(student, example(vocab=41)[0]), ValueError, "40 classes and teacher 41.*vocab_size"),
        (lambda: fused_kl(student, torch.randn(12, 41)), ValueError, "40 classes and teacher 41.*vocab_size"),
        (lambda: fused_kl(student, teacher, labels=torch.full((12,), 40)), ValueError, "labels: expected 0 <= label"),
        (lambda: fused_kl((hidden, weight), teacher), TypeError, "student: expected a tensor of logits or a Linear"),
        (lambda: fused_kl(LinearLogits(hidden.requires_grad_(), weight), logits, reduction="none",
                          gradient="forward"), ValueError, "reduction='none'.*gradient='backward'"),
        (lambda: chunk_budget(0), ValueError, "from 1 byte.*got 0"),
        (lambda: chunk_budget(2**63), ValueError, "from 1 byte"),
        (lambda: chunk_budget(1e9), TypeError, "expected an int"),
    ):  # fmt: skip
        before = current_budget(CPU)
        with pytest.raises(error, match=expected):
            call()
        assert current_budget(CPU) == before
        weight.requires_grad_(False), hidden.requires_grad_(False)


def test_the_module_takes_heads():
    student, teacher = example()
    module = kdkernels.nn.Divergence("kl", chunk_rows=5)
    torch.testing.assert_close(module(student, teacher), fused_kl(student, teacher))
    torch.testing.assert_close(module(student, teacher, chunk_rows=2), fused_kl(student, teacher))
