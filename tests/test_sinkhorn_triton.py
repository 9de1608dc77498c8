"""The transport kernels in Triton against the reference in fp64. Tests of every backend are in other files.

The rounding error of an exponent (f + g - C) / epsilon is relative to its own size. A plan's relative error is `ulps`,
4 ulp of 1 + max C / epsilon. A kernel's error may be `ulps` plus 4 times the error of the reference in fp32.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from truth import DEVICE, GRADIENT_TOLERANCE

pytest.importorskip("triton")
import kdkernels
from kdkernels import backends
from kdkernels.backends.reference.sinkhorn import potentials
from kdkernels.backends.triton import kernels, pairwise
from kdkernels.backends.triton import sinkhorn as family
from kdkernels.families import sinkhorn as transport
from kdkernels.families.options import RowOptions
from kdkernels.families.rows import softmaxes

INF = float("inf")
EXAMPLES = 8
each_gradient = pytest.mark.parametrize("gradient", transport.GRADIENTS)
each_value = pytest.mark.parametrize("value", kdkernels.losses.sinkhorn.VALUES)


def take_tiles(patch):
    """Costs stay in memory, and a tile holds some of their rows."""
    patch.setattr(family, "_RESIDENT", 0)
    patch.setattr(family, "_TILE", 16)


def split_classes(patch):
    """Each program takes a few classes."""
    patch.setattr(pairwise, "_LEAST_SHARE", 128)


@pytest.fixture(params=["registers", "tiles"])
def each_path(request, monkeypatch):
    if request.param == "tiles":
        take_tiles(monkeypatch)


def assert_close(got, want, of_fp32, allowed, what):
    """NaN and infinities must match; the error is at most 4 times the reference's error in fp32, plus `allowed`."""
    got, want, of_fp32 = got.double(), want.double(), of_fp32.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places; got {got}, expected {want}"
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite]), f"{what}: got {got}, expected {want}"
    error, usual = ((x - want)[want.isfinite()].abs() for x in (got, of_fp32))
    if error.numel():
        bound = 4 * usual.max() + allowed
        assert error.max() <= bound, f"{what}: error {error.max():.2e}, allowed {bound:.2e}, in fp32 {usual.max():.2e}"


# ---- Sinkhorn's iterations


@dataclass
class Problems:
    cost: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    epsilon: float
    iterations: int = 4
    tolerance: float | None = None
    value: str = "transport"
    gradient: str = "unrolled"

    def problem(self) -> transport.Sinkhorn:
        """The problem in the form that the kernel takes."""
        numbers = torch.tensor([[self.epsilon], [self.tolerance or 0.0]], device=DEVICE)
        entropic = self.value == "entropic"
        return transport.Sinkhorn(
            self.cost, self.a, self.b, *numbers, self.iterations, entropic, self.gradient, 1 << 20
        )

    def run(self, backend, dtype):
        """Returns the result and the gradients of cost, a and b."""
        # For fp32 arithmetic, 16-bit costs keep their dtype, because their gradient has it too.
        inputs = [x if dtype == torch.float32 else x.to(dtype) for x in (self.cost, self.a, self.b)]
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        epsilon = torch.full((), self.epsilon, dtype=torch.float32, device=DEVICE).to(dtype)
        out = kdkernels.fused_sinkhorn(
            *inputs, epsilon=epsilon, iterations=self.iterations, tolerance=self.tolerance, value=self.value,
            gradient=self.gradient, backend=backend,
        )  # fmt: skip
        return out, torch.autograd.grad(out.value.sum(), inputs)

    def check(self):
        (got, gradients), (want, right), (low, of_low) = (
            self.run(*how)
            for how in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32))
        )
        finite = torch.where(self.cost.isfinite(), self.cost, 0).double()
        span = 1 + finite.max().item() / self.epsilon
        ulps = 4 * 2.0**-23 * span
        mass = self.a.sum(-1).max().item()
        sizes = [
            finite.max().item() * mass + self.epsilon * span,
            self.epsilon * span,
            1 + want.error.nan_to_num(0).max(),
        ]
        assert torch.equal(got.iterations, want.iterations), f"got {got.iterations} rounds; expected {want.iterations}"
        sums = [x.f[..., :, None] + x.g[..., None, :] for x in (got, want, low)]
        assert_close(got.value, want.value, low.value, ulps * sizes[0], "value")
        assert_close(*sums, ulps * sizes[1], "f + g")
        assert_close(got.error, want.error, low.error, ulps * sizes[2], "error")
        for name, x, truth, other in zip(("cost", "a", "b"), gradients, right, of_low, strict=True):
            # The gradient of a mass has the unit of the costs; the gradient of the costs is a plan.
            size = mass if name == "cost" else span * self.epsilon
            rounding = GRADIENT_TOLERANCE[x.dtype] if x.dtype != torch.float32 else 0
            if name != "cost" and self.epsilon < 0.1:
                # The gradient of a mass of 0 has no bound: it must be finite, but is not compared.
                assert x.isfinite().all(), f"gradient of {name}: {x}"
                x, truth, other = (y[getattr(self, name) != 0] for y in (x, truth, other))
            size = max(truth.nan_to_num(0).abs().max().item(), size)
            assert_close(x, truth, other, (ulps + rounding) * size, f"gradient of {name}")
        return got, gradients

    def decided(self) -> bool:
        """Whether every round's error is far enough from the tolerance that rounding does not decide the last round."""
        if self.tolerance is None:
            return True
        numbers = [x.double() for x in (self.cost, self.a, self.b)]
        epsilon, none = torch.tensor([self.epsilon], device=DEVICE).double(), torch.zeros(1, device=DEVICE)
        for rounds in range(1, self.iterations + 1):
            error = potentials(*numbers, epsilon, none, rounds)[2]
            if ((error / self.tolerance - 1).abs() < 1e-2).any():
                return False
        return True


@dataclass(frozen=True)
class Recipe:
    """Recipe for problems: shapes, special cases and a seed."""

    leading: tuple[int, ...]
    n: int
    m: int
    dtype: torch.dtype
    scale: float
    epsilon: float
    iterations: int
    tolerance: float | None
    value: str
    gradient: str
    empty_points: bool
    forbidden: bool
    tiles: bool
    seed: int

    def make(self) -> Problems:
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(*shape):
            return torch.rand(*self.leading, *shape, generator=generator)

        cost = (self.scale * uniform(self.n, self.m)).to(self.dtype)
        a, b = uniform(self.n) + 0.1, uniform(self.m) + 0.1
        if self.empty_points:
            a[..., 1:] *= uniform(self.n - 1) > 0.3
            b[..., 1:] *= uniform(self.m - 1) > 0.3
        if self.forbidden:
            # The first points have mass and keep all their partners.
            cost[..., 1:, 1:][uniform(self.n - 1, self.m - 1) < 0.3] = INF
        a, b = (x / x.sum(-1, keepdim=True) for x in (a, b))
        return Problems(cost.to(DEVICE), a.to(DEVICE), b.to(DEVICE), self.epsilon, self.iterations, self.tolerance,
                        self.value, self.gradient)  # fmt: skip


recipes = st.builds(
    Recipe,
    leading=st.sampled_from([(), (2,), (1, 2)]),
    n=st.sampled_from([1, 2, 5, 8, 11]),
    m=st.sampled_from([1, 3, 4, 9]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1.0, 2.0]),
    epsilon=st.sampled_from([0.005, 0.02, 0.1, 1.0]),
    iterations=st.integers(1, 5),
    tolerance=st.sampled_from([None, 0.02, 0.2]),
    value=st.sampled_from(kdkernels.losses.sinkhorn.VALUES),
    gradient=st.sampled_from(transport.GRADIENTS),
    empty_points=st.booleans(),
    forbidden=st.booleans(),
    tiles=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=EXAMPLES)
@given(recipe=recipes)
def test_sinkhorn_matches_fp64(recipe):
    problems = recipe.make()
    assume(problems.decided())
    with pytest.MonkeyPatch.context() as patch:
        if recipe.tiles:
            take_tiles(patch)
        problems.check()


def simple(*leading, n=5, m=7, **options) -> Problems:
    a, b = (torch.rand(*leading, size, device=DEVICE) + 0.1 for size in (n, m))
    a, b = (x / x.sum(-1, keepdim=True) for x in (a, b))
    return Problems(torch.rand(*leading, n, m, device=DEVICE), a, b, **{"epsilon": 0.1, **options})


@each_value
@each_gradient
def test_values_and_gradients(value, gradient, each_path):
    simple(2, value=value, gradient=gradient).check()


def test_a_small_epsilon(each_path):
    """exp(-C / epsilon) underflows in fp32."""
    problems = simple(n=4, m=4, epsilon=0.005)
    problems.cost += 2
    assert (-problems.cost / problems.epsilon).exp().max() == 0
    out, _ = problems.check()
    assert out.value.isfinite()


def test_problems_stop_at_rounds_of_their_own(each_path):
    problems = simple(3, iterations=9, tolerance=0.01)
    problems.cost *= torch.tensor([0.01, 0.4, 1.0], device=DEVICE)[:, None, None]
    assert problems.decided()
    out, _ = problems.check()
    assert len(set(out.iterations.tolist())) == 3, "the problems must stop at three different rounds"
    assert out.converged.tolist() == (out.error <= 0.01).tolist()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (6, 1), (33, 2)])
def test_shapes(n, m, each_path):
    simple(n=n, m=m, iterations=2).check()


@pytest.mark.parametrize(("value", "gradient"), [("transport", "unrolled"), ("entropic", "unrolled"),
                                                 ("transport", "implicit"), ("transport", "envelope")])  # fmt: skip
def test_points_without_mass(value, gradient, each_path):
    """Points without mass have potentials and exact gradients; without a partner, such a point has potential 0."""
    problems = simple(2, value=value, gradient=gradient)
    problems.a[0, 1] = problems.a[1, 0] = 0
    problems.b[0, 3:5] = problems.b[1, 6] = 0
    problems.a /= problems.a.sum(-1, keepdim=True)
    problems.b /= problems.b.sum(-1, keepdim=True)
    problems.cost[0, 1] = INF
    problems.cost[1, :, 2] = torch.tensor([0.5, INF, INF, 0.3, INF], device=DEVICE)
    problems.cost[0, :, 4] = INF
    out, gradients = problems.check()
    least = problems.cost[0].min()  # potential 0, relative to the smallest cost
    assert abs(out.f[0, 1] - least) < 1e-6 and out.g[0, 4] == 0
    assert all(x.isfinite().all() for x in gradients)


@each_gradient
def test_far_points_without_mass_have_finite_gradients(gradient, each_path):
    """The exact gradient of a far point's mass overflows fp32; the kernel's gradients must be finite."""
    problems = simple(n=3, m=3, epsilon=0.005, gradient=gradient)
    problems.cost[1:, 0] += 5  # b_0 exchanges mass only with a_0, which has no mass
    problems.a[0], problems.b[2] = 0, 0
    problems.a /= problems.a.sum()
    problems.b /= problems.b.sum()
    out, gradients = problems.run("triton", torch.float32)
    assert out.value.isfinite() and all(x.isfinite().all() for x in gradients)


def test_the_error_of_far_points_without_mass(each_path):
    """A far point's potential may change without bound between rounds; the reported error must be right."""
    problems = simple(n=3, m=2, epsilon=0.005, iterations=1)
    problems.cost = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.1, 3.1]], device=DEVICE)
    problems.a = torch.tensor([0.0, 0.5, 0.5], device=DEVICE)
    out, _ = problems.check()
    assert out.error.isfinite()


def test_a_point_that_can_be_sent_nowhere_makes_its_problem_nan(each_path):
    problems = simple(3)
    problems.cost[0, 2] = INF
    problems.cost[2, :, 3] = INF
    out, gradients = problems.run("triton", torch.float32)
    want, _ = problems.run("reference", torch.float64)
    assert out.value.isnan().tolist() == want.value.isnan().tolist() == [True, False, True]
    assert all(x[1].isfinite().all() for x in gradients)


@pytest.mark.parametrize("of", ["cost", "a", "b"])
def test_nan_makes_its_problem_nan(of, each_path):
    problems = simple(3)
    problem = problems.problem()
    clean = kernels.sinkhorn(problem, True)
    getattr(problem, of)[1].view(-1)[2] = torch.nan
    found = kernels.sinkhorn(problem, True)
    assert found[0][1].isnan() and found[3][1].isnan() and found[5][1].isnan().any()
    for x, before in zip(found, clean, strict=True):
        assert torch.equal(x[[0, 2]], before[[0, 2]])


def test_no_problems():
    out, gradients = simple(0).run("triton", torch.float32)
    assert out.value.shape == (0,) and gradients[0].shape == (0, 5, 7)


def test_both_paths_at_their_limits(monkeypatch):
    """64 x 64 costs stay in registers; 65 rows do not."""
    calls = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: calls.append((self.name, options["ROWS"], options["COLUMNS"]))

    for name in ("sinkhorn_kernel", "tiled_sinkhorn_kernel"):
        monkeypatch.setattr(family, name, Kernel(name))
    for n, m in ((64, 64), (65, 64), (1024, 1024)):
        kernels.sinkhorn(simple(1, n=n, m=m).problem(), False)
    assert calls == [("sinkhorn_kernel", 64, 64), ("tiled_sinkhorn_kernel", 64, 64), ("tiled_sinkhorn_kernel", 4, 1024)]


def test_more_points_than_it_takes_are_refused():
    problems = simple(n=2, m=1025)
    with pytest.raises(RuntimeError, match=r"triton.*at most 1024 points a side; got 1025 \(cpu, cuda and reference"):
        problems.run("triton", torch.float32)
    with pytest.raises(RuntimeError, match="1024 points"):
        kernels.sinkhorn(simple(1, n=2, m=1025).problem(), False)
    logits = torch.zeros(1025, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="1024 points"):
        kdkernels.fused_sinkhorn_kd(logits, logits, backend="triton")
    assert backends.refuse("triton", logits, logits) is None, "the limit of points applies to transport only"


# ---- SinKD


@dataclass
class Clouds:
    student: torch.Tensor
    teacher: torch.Tensor
    vocab: int
    mask: torch.Tensor | None = None
    temperature: float = 2.0
    epsilon: float = 0.1
    iterations: int = 2
    cost: str = "l1"
    gradient: str = "unrolled"

    def run(self, backend, dtype=None):
        """Losses of the clouds and the student's gradient. A `dtype` converts the tensors first."""
        student, teacher = (x if dtype is None else x.to(dtype) for x in (self.student, self.teacher))
        student = student.detach().requires_grad_()
        numbers = torch.tensor([self.temperature, self.epsilon], device=DEVICE)
        temperature, epsilon = numbers if dtype is None else numbers.to(dtype)
        loss = kdkernels.fused_sinkhorn_kd(
            student, teacher, temperature=temperature, epsilon=epsilon, iterations=self.iterations, cost=self.cost,
            gradient=self.gradient, mask=self.mask, reduction="none", vocab_size=self.vocab, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        return loss.detach(), gradient

    def check(self):
        got, want, low = self.run("triton"), self.run("reference", torch.float64), self.run("reference")
        n = self.student.shape[-2]
        span = 1 + 2 / self.epsilon  # costs are at most 2
        ulps = 8 * 2.0**-23 * span
        assert_close(got[0], want[0], low[0], ulps * 2 * n, "loss")
        assert got[1].dtype == self.student.dtype
        rounding = GRADIENT_TOLERANCE[got[1].dtype]
        size = want[1].nan_to_num(0).abs().max().item()
        # A row's derivatives by its costs are at most `span`; a class's share of their sum is its probability.
        allowed = rounding * size + ulps * span * 2.0**-4 / self.temperature * (size > 0)
        assert_close(got[1], want[1], low[1], allowed, "gradient")
        assert not got[1][..., self.vocab :].any(), "padding columns have no gradient"
        if self.mask is not None:
            assert not got[1][~self.mask].any(), "dropped rows have no gradient"
        return got


@dataclass(frozen=True)
class CloudRecipe:
    clouds: tuple[int, ...]
    n: int
    vocab: int
    padding: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    scale: float
    closeness: float
    strided: bool
    masked: bool
    temperature: float
    epsilon: float
    iterations: int
    cost: str
    gradient: str
    splits: bool
    tiles: bool
    seed: int

    def make(self) -> Clouds:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (*self.clouds, self.n, self.vocab)
        student = self.scale * torch.randn(shape, generator=generator)
        teacher = self.closeness * student + (1 - self.closeness) * self.scale * torch.randn(shape, generator=generator)
        mask = None
        if self.masked:
            mask = torch.rand(shape[:-1], generator=generator) > 0.4
        made = []
        for x, dtype, padding in zip((student, teacher), self.dtypes, self.padding, strict=True):
            wide = torch.full((*self.clouds, self.n + self.strided, self.vocab + padding), torch.nan, dtype=dtype)
            wide[..., : self.n, : self.vocab] = x.to(dtype)
            rows = wide.to(DEVICE)[..., : self.n, :]
            if mask is not None:
                rows.masked_fill_(~mask.to(DEVICE)[..., None], torch.nan)
            made.append(rows)
        return Clouds(*made, self.vocab, None if mask is None else mask.to(DEVICE), self.temperature, self.epsilon,
                      self.iterations, self.cost, self.gradient)  # fmt: skip


cloud_recipes = st.builds(
    CloudRecipe,
    clouds=st.sampled_from([(), (1,), (2,)]),
    n=st.sampled_from([1, 2, 5, 9]),
    vocab=st.sampled_from([1, 7, 129, 300]),
    padding=st.sampled_from([(0, 0), (0, 0), (5, 0), (1, 2)]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    closeness=st.sampled_from([0.0, 0.0, 0.9]),
    strided=st.booleans(),
    masked=st.booleans(),
    temperature=st.sampled_from([1.0, 2.0]),
    epsilon=st.sampled_from([0.02, 0.1, 1.0]),
    iterations=st.integers(1, 3),
    cost=st.sampled_from(transport.PAIRWISE),
    gradient=st.sampled_from(transport.GRADIENTS),
    splits=st.booleans(),
    tiles=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=EXAMPLES)
@given(recipe=cloud_recipes)
def test_clouds_match_fp64(recipe):
    with pytest.MonkeyPatch.context() as patch:
        if recipe.tiles:
            take_tiles(patch)
        if recipe.splits:
            split_classes(patch)
        recipe.make().check()


def clouds(*leading, n=3, vocab=150, dtype=torch.float32, **options) -> Clouds:
    student, teacher = (torch.randn(*leading, n, vocab, device=DEVICE).to(dtype) for _ in range(2))
    return Clouds(student, teacher, vocab, **options)


@pytest.mark.parametrize("cost", transport.PAIRWISE)
@each_gradient
def test_costs_and_gradients(cost, gradient):
    clouds(2, cost=cost, gradient=gradient).check()


@pytest.mark.parametrize("cost", transport.COSTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_cost_of_each_dtype(cost, dtype):
    clouds(n=2, vocab=40, dtype=dtype, cost=cost).check()


@pytest.mark.parametrize("cost", transport.PAIRWISE)
def test_many_classes_are_split(cost, monkeypatch):
    """The classes form two splits, and their partial sums are added."""
    sums = []
    original = pairwise.pair_costs_sum_kernel

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: (sums.append(args[0].shape[0]), original[grid](*args, **options))

    monkeypatch.setattr(pairwise, "pair_costs_sum_kernel", Kernel())
    clouds(n=2, vocab=2500, cost=cost, iterations=1).check()
    assert sums == [2]


@pytest.mark.parametrize("cost", transport.PAIRWISE)
def test_rows_that_are_dropped(cost):
    """Dropped rows may hold anything and do not change the kept rows' results. A cloud without kept rows has loss 0."""
    given = clouds(3, n=4, cost=cost)
    given.mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], device=DEVICE).bool()
    for x in (given.student, given.teacher):
        x[~given.mask] = torch.nan
    loss, gradient = given.check()
    assert loss[1] == 0
    kept = [0, 2, 3]
    alone = Clouds(given.student[:1, kept], given.teacher[:1, kept], 150, cost=cost)
    loss_alone, gradient_alone = alone.run("triton")
    torch.testing.assert_close(loss[:1], loss_alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[:1, kept], gradient_alone, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cost", transport.PAIRWISE)
def test_pairs_with_dropped_rows_are_0(cost):
    problem, floats = _pairs(clouds(n=4, cost=cost))
    problem.row_mass[0, 1] = problem.student[0, 1] = problem.teacher[0, 1] = floats[:, 0, 1] = 0
    found = kernels.pairwise_costs(problem, floats, True)
    for x in found:
        assert not x[0, 1].any() and not x[0, :, 1].any()
        assert x[0, [0, 2, 3]][:, [0, 2, 3]].all()


@pytest.mark.parametrize("cost", transport.PAIRWISE)
def test_nan_in_a_cloud_stays_there(cost):
    given = clouds(2, cost=cost)
    given.student[0, 1, 70] = torch.nan
    loss, gradient = given.run("triton")
    assert loss[0].isnan() and gradient[0].isnan().all()
    assert loss[1].isfinite() and gradient[1].isfinite().all()
    given = clouds(2, cost=cost)
    given.teacher[1, 2] = -INF
    loss, gradient = given.run("triton")
    assert loss[0].isfinite() and loss[1].isnan() and gradient[1].isnan().all()


@pytest.mark.parametrize("cost", transport.PAIRWISE)
def test_equal_rows_have_no_slope_between_them(cost):
    """sign(0) = 0, and the norm's slope at 0 is 0."""
    given = clouds(cost=cost, n=4)
    given.teacher = given.student.clone()
    given.teacher[3] = given.student[0]
    given.student[:, :20] = given.teacher[:, :20] = -INF
    given.check()
    costs, moments = kernels.pairwise_costs(*_pairs(given), True)
    equal = [0, 1, 2, 0], [0, 1, 2, 3]
    assert not costs[0][equal].any() and not moments[0][equal].any()


def _pairs(given: Clouds):
    """One cloud in the form that the kernels take, at temperature 1, and the normalizers of its rows."""
    student, teacher = given.student[None], given.teacher[None]
    kept, one = torch.ones(student.shape[:2], device=DEVICE), torch.ones(1, device=DEVICE)
    problem = transport.Clouds(student, teacher, kept, one, given.cost, given.vocab)
    options = RowOptions(kept.view(-1), one)
    floats = kernels.row_floats(softmaxes(student, teacher, options, given.vocab))[:4]
    return problem, floats.view(4, *kept.shape)


@pytest.mark.parametrize("cost", transport.PAIRWISE)
def test_splits_and_tiles_of_pairs(cost, monkeypatch):
    """Costs, moments and the gradient of any weights match the formulas in fp64. A cloud exceeds one tile of rows."""
    split_classes(monkeypatch)
    monkeypatch.setattr(pairwise, "_PAIR_ROWS", 4)
    monkeypatch.setattr(pairwise, "_GRADIENT_ROWS", 4)
    monkeypatch.setattr(pairwise, "_GRADIENT_BLOCK", 64)
    given = clouds(n=5, vocab=257, cost=cost)
    problem, floats = _pairs(given)
    costs, moments = kernels.pairwise_costs(problem, floats, True)
    alone, nothing = kernels.pairwise_costs(problem, floats, False)
    assert torch.equal(costs, alone) and nothing.shape == (0,)

    p, q = (x.double().softmax(-1) for x in (given.student, given.teacher))
    difference = p[:, None] - q
    pairs = difference.abs().sum(-1) if cost == "l1" else difference.norm(dim=-1)
    slopes = difference.sign() if cost == "l1" else difference / pairs[..., None]
    torch.testing.assert_close(costs[0].double(), pairs, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments[0].double(), (p[:, None] * slopes).sum(-1), rtol=1e-5, atol=1e-6)

    weights = torch.randn(5, 5, device=DEVICE)
    g = (weights.double()[..., None] * (slopes if cost == "l1" else difference)).sum(1)
    dot = (p * g).sum(-1)
    gradient = kernels.pairwise_gradient(problem, floats, weights[None], dot[None].float())
    torch.testing.assert_close(gradient[0].double(), p * (g - dot[:, None]), rtol=1e-5, atol=1e-8)


def test_no_clouds():
    loss, gradient = clouds(0).run("triton")
    assert loss.shape == (0,) and gradient.shape == (0, 3, 150)
