"""The CUDA kernels of optimal transport (pairwise costs, Sinkhorn's iterations) against the reference in fp64.

The kernels run in the execution model of CUDA (cuda_model/), on chips of chips.py with enough shared memory. The error
against fp64 must be at most twice the error of the reference in fp32, plus the slack that each test states.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

import chips
import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from truth import GRADIENT_TOLERANCE

from kdkernels import fused_sinkhorn, fused_sinkhorn_kd
from kdkernels.backends import native
from kdkernels.backends.reference import sinkhorn as reference_sinkhorn
from kdkernels.backends.reference.pairwise import pairwise_costs
from kdkernels.families import sinkhorn as transport
from kdkernels.families.options import RowOptions
from kdkernels.families.rows import softmaxes

pytestmark = pytest.mark.skipif(emulated.missing_because is not None, reason=str(emulated.missing_because))

# The chips differ in clusters and in shared memory: if a problem does not fit, its history, or the matrix too, is in
# the workspace.
CHIPS = ["h100", "wide", "a100"]
EPSILONS = [float(torch.tensor(x)) for x in (0.005, 0.02, 0.1, 1.0)]  # the fp32 values of these epsilons
ULP = 2.0**-23


def exponent_rounding(span: float, epsilon: float) -> float:
    """The relative error of exp(x), |x| <= span / epsilon, when x is rounded: half a unit in the last place of x."""
    return ULP / 2 * (4 + span / epsilon)


def assert_close(got, want, in_fp32, relative, size, what=""):
    """Compares element by element, [problems, ...]. `size` is an absolute error: one number, or one per problem."""
    got, want, in_fp32 = got.double(), want.double(), in_fp32.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places; got {got}, expected {want}"
    assert torch.equal(got.isinf(), want.isinf()), f"{what}: infinities in other places; got {got}, expected {want}"
    error, eager = ((x - want).nan_to_num(0, 0, 0).abs().view(len(x), -1) for x in (got, in_fp32))
    allowed = 2 * eager.amax(1, keepdim=True) + relative * want.nan_to_num(0, 0, 0).abs().view(len(want), -1)
    allowed = allowed + torch.as_tensor(size, dtype=torch.float64).reshape(-1, 1)
    assert (error <= allowed).all(), (
        f"{what}: error {(error / allowed).max():.2f} times the allowed error\n{got}\n{want}"
    )


# ---- problems


@dataclass(frozen=True)
class Recipe:
    """Recipe for a batch of problems: hypothesis draws these numbers, not tensors."""

    n: int
    m: int
    epsilon: float
    problems: int = 2
    iterations: int = 5
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    offset: float = 0.0
    mass: float | None = 1.0  # None: the default masses
    massless: bool = False
    forbidden: bool = False
    tolerance: float | None = None
    value: str = "transport"
    gradient: str = "unrolled"
    seed: int = 0

    def make(self):
        """Returns cost, a and b."""
        generator = torch.Generator().manual_seed(self.seed)

        def uniform(*shape):
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        cost = (self.offset + self.scale * uniform(self.problems, self.n, self.m)).to(self.dtype)
        if self.forbidden:
            banned = uniform(*cost.shape) < 0.3
            for i in range(max(self.n, self.m)):  # every point keeps one partner with mass
                banned[:, min(i, self.n - 1), min(i, self.m - 1)] = False
            cost[banned] = torch.inf
        if self.mass is None:
            return cost, None, None
        masses = []
        for size in (self.n, self.m):
            x = 0.2 + uniform(self.problems, size)
            if self.massless and size > 2:
                x[:, 1 : 1 + size // 3] = 0
            masses.append((self.mass * x / x.sum(1, keepdim=True)).float())
        if self.massless and self.forbidden:  # the first point has mass and may be paired with all points
            cost[:, 0, :], cost[:, :, 0] = (torch.as_tensor(self.offset + 0.5 * self.scale).to(self.dtype),) * 2
        return cost, *masses

    def run(self, backend: str, dtype: torch.dtype, inputs=None):
        """Returns the SinkhornOutput and the gradients with respect to cost, a and b."""
        tensors = [None if x is None else x.detach().clone() for x in (inputs or self.make())]
        if backend == "reference":
            tensors = [None if x is None else x.to(dtype) for x in tensors]
        there = [x.requires_grad_() for x in tensors if x is not None]
        found = fused_sinkhorn(
            *tensors, epsilon=self.epsilon, iterations=self.iterations, tolerance=self.tolerance, value=self.value,
            gradient=self.gradient, backend=backend,
        )  # fmt: skip
        weights = torch.arange(1, found.value.numel() + 1, dtype=found.value.dtype)
        derivatives = torch.autograd.grad((found.value * weights).sum(), there)
        return found, derivatives

    def assert_right(self, chip: str, seed: int, inputs=None):
        inputs = inputs or self.make()
        with chips.on(chip, seed):
            got, of_inputs = self.run("cuda", torch.float32, inputs)
        want, right = self.run("reference", torch.float64, inputs)
        eager, in_fp32 = self.run("reference", torch.float32, inputs)
        mass = 1.0 if self.mass is None else self.mass
        largest = abs(self.offset) + self.scale
        rounding = exponent_rounding(self.scale, self.epsilon)
        assert_close(got.value, want.value, eager.value, 8 * ULP, mass * rounding * largest, "value")
        potentials = [x.f[..., :, None].double() + x.g[..., None, :] for x in (got, want, eager)]
        of_mass = self.epsilon * abs(torch.tensor(mass).log().item())
        assert_close(*potentials, 8 * ULP, 8 * ULP * (largest + self.epsilon + of_mass), "potentials")
        if self.tolerance is None or self.tolerance > 100 * rounding:
            assert torch.equal(got.iterations, want.iterations), (got.iterations, want.iterations)
        assert_close(got.error, want.error, eager.error, 0, 4 * rounding, "error")
        for name, found, truth, other, source in zip("Cab", of_inputs, right, in_fp32, inputs, strict=False):
            assert found.dtype == source.dtype
            relative = GRADIENT_TOLERANCE[found.dtype] + rounding
            self.assert_derivative(found, truth, other, relative, rounding, name, inputs)

    def assert_derivative(self, found, truth, other, relative, rounding, name, inputs):
        # The gradient with respect to costs is as large as the plan, and no mass exceeds the plan's largest element.
        size = abs(self.offset) + self.scale + self.epsilon
        if name == "C":
            size = 1 / self.m if inputs[2] is None else inputs[2].max().item()
        if self.gradient == "implicit":  # the plan comes from rounded potentials and is multiplied by costs / epsilon
            size = size * (1 + (abs(self.offset) + self.scale) / self.epsilon)
        if name != "C" and self.massless:
            # A point without mass has a gradient with terms up to exp(span / epsilon) times those elsewhere.
            assert torch.isfinite(found).all(), found
            if self.scale > 5 * self.epsilon:
                masses = inputs[1 if name == "a" else 2]
                found, truth, other = (torch.where(masses == 0, 0, x) for x in (found, truth, other))
            else:
                size = size * torch.tensor(2 * self.scale / self.epsilon).exp()
        weights = torch.arange(1, self.problems + 1, dtype=torch.float64)
        assert_close(found, truth, other, relative, weights * rounding * size, f"derivative of {name}")


recipes = st.builds(
    lambda size, **others: Recipe(*size, **others),
    size=st.sampled_from([(1, 1), (1, 5), (6, 1), (5, 7), (17, 9), (33, 40)]),
    epsilon=st.sampled_from(EPSILONS),
    iterations=st.sampled_from([1, 2, 6]),
    problems=st.sampled_from([1, 3]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 1.0, 2.0]),
    offset=st.sampled_from([0.0, 0.0, 3.0]),
    mass=st.sampled_from([None, 1.0, 7.0]),
    massless=st.booleans(),
    forbidden=st.booleans(),
    value=st.sampled_from(["transport", "entropic"]),
    gradient=st.sampled_from(transport.GRADIENTS),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=70)
@given(recipe=recipes, chip=st.sampled_from(CHIPS))
def test_against_the_reference_in_fp64(recipe, chip):
    recipe.assert_right(chip, recipe.seed)


@pytest.mark.parametrize("epsilon", EPSILONS[1:])
def test_both_domains_find_the_same(epsilon):
    """A forbidden pair forces the log domain. Its point has no mass, so all other results must stay the same."""
    recipe = Recipe(9, 14, epsilon, 3, 8, scale=28 * epsilon, mass=2.0)
    cost, a, b = recipe.make()
    with_point = torch.cat([cost, torch.full((3, 9, 1), torch.inf)], 2), a, torch.cat([b, torch.zeros(3, 1)], 1)
    for value in ("transport", "entropic"):
        same = replace(recipe, value=value)
        same.assert_right("h100", 1, (cost, a, b))
        same.assert_right("h100", 1, with_point)
        with chips.on("h100"):
            scalings, of_scalings = same.run("cuda", torch.float32, (cost, a, b))
            logarithms, of_logarithms = same.run("cuda", torch.float32, with_point)
        rounding = exponent_rounding(recipe.scale, epsilon)
        torch.testing.assert_close(scalings.value, logarithms.value, rtol=rounding, atol=0)
        for one, other in zip(of_scalings, of_logarithms, strict=True):
            other = other[..., : one.shape[-1]]
            torch.testing.assert_close(one, other, rtol=0, atol=4 * rounding * one.abs().max().item())


def test_costs_far_above_zero_and_their_span():
    """The offset of the costs must not matter: only their span selects the domain."""
    for offset in (-100.0, 0.0, 100.0):
        for scale in (0.5, 2.9, 3.1, 6.0):
            Recipe(5, 6, EPSILONS[2], scale=scale, offset=offset, iterations=4).assert_right("h100", 0)


@pytest.mark.parametrize("mass", [1e-36, 1e-30, 1e-8, 1e8, 1e30])
def test_masses_of_any_size(mass):
    for epsilon in EPSILONS[1:]:
        for value in ("transport", "entropic"):
            if value == "entropic" and mass > 1:  # the entropic value has the term sum a sum b
                continue
            for gradient in ("unrolled", "envelope"):
                recipe = Recipe(6, 5, epsilon, mass=mass, value=value, gradient=gradient, iterations=3)
                if gradient == "unrolled" and value == "entropic":
                    recipe.assert_right("h100", 0)
                with chips.on("h100"):
                    found, _ = recipe.run("cuda", torch.float32)
                want, _ = recipe.run("reference", torch.float64)
                torch.testing.assert_close(found.value.double(), want.value, rtol=1e-4, atol=1e-5 * min(mass, 1.0))


def test_masses_that_differ_by_orders():
    recipe = Recipe(12, 12, EPSILONS[1], 2, 6, gradient="unrolled", scale=1.0)
    cost, a, _ = recipe.make()
    a = a * 10.0 ** -torch.arange(12)
    recipe.assert_right("h100", 0, (cost, a / a.sum(1, keepdim=True), (a.flip(1) / a.sum(1, keepdim=True))))


def test_problems_stop_at_their_own_round():
    cost = torch.stack([scale * torch.rand(8, 8, generator=torch.Generator().manual_seed(3)) for scale in (0.01, 1, 5)])
    recipe = Recipe(8, 8, EPSILONS[2], 3, 60, mass=None, scale=5.0, tolerance=1e-2)
    for gradient in transport.GRADIENTS:
        replace(recipe, gradient=gradient).assert_right("wide", 2, (cost, None, None))
    with chips.on("wide"):
        found, _ = recipe.run("cuda", torch.float32, (cost, None, None))
    assert found.converged.all() and len(set(found.iterations.tolist())) == 3, found.iterations
    few = replace(recipe, iterations=2)
    few.assert_right("wide", 2, (cost, None, None))


def test_points_without_a_partner():
    """With no allowed partner, a point without mass has potential 0; a point with mass makes only its problem NaN."""
    cost, a, b = Recipe(6, 5, EPSILONS[2], 3, mass=1.0).make()
    a[0, 2] = 0
    a[0] /= a[0].sum()
    cost[0, 2] = torch.inf  # the point has no mass and no partner
    cost[0, 2, 1] = 0.5
    b[0, 1] = 0
    b[0] /= b[0].sum()
    cost[2, 4] = torch.inf  # the point has mass and no partner
    for gradient in ("unrolled", "envelope"):
        recipe = Recipe(6, 5, EPSILONS[2], 3, gradient=gradient)
        with chips.on("h100"):
            found, derivatives = recipe.run("cuda", torch.float32, (cost, a, b))
        want, right = recipe.run("reference", torch.float64, (cost, a, b))
        least = cost[0].min()  # potential 0, relative to the smallest cost
        assert abs(found.f[0, 2] - least) < 1e-6 and abs(want.f[0, 2] - least) < 1e-6
        assert found.value[2].isnan() and want.value[2].isnan()
        torch.testing.assert_close(found.value[:2].double(), want.value[:2], rtol=1e-5, atol=1e-6)
        for x, truth in zip(derivatives, right, strict=True):
            torch.testing.assert_close(x[:2].double(), truth[:2], rtol=1e-4, atol=1e-5)


def sinkhorn(cost, a, b, epsilon, tolerance=0.0, iterations=3, entropic=False, unrolled=True, chip="h100", seed=0):
    """Calls the operator, which does not validate values."""
    numbers = [torch.tensor([x]) for x in (epsilon, tolerance)]
    problem = transport.Sinkhorn(cost, a, b, *numbers, iterations, entropic, "unrolled", 1 << 20)
    with chips.on(chip, seed):
        return native.cuda.sinkhorn(problem, unrolled)


def zeros(n, m, iterations, problems=1, dtype=torch.float32) -> transport.Sinkhorn:
    cost, a, b = (torch.zeros(problems, *shape, dtype=dtype) for shape in ((n, m), (n,), (m,)))
    one = torch.ones(1, dtype=dtype)
    return transport.Sinkhorn(cost, a, b, one, 0 * one, iterations, False, "unrolled", 1 << 20)


def workspace_bytes(problem: transport.Sinkhorn, unrolled: bool) -> int:
    """The workspace size that the kernel requests. The allocation fails, so the kernel never runs."""
    asked = []

    def allocate(size):
        asked.append(size)
        raise MemoryError

    def launch(kernel, device, fields):
        getattr(native.cuda.compiled(), f"cuda_{kernel}")(fields, allocate, 0, 0)

    with pytest.MonkeyPatch.context() as patch, suppress(MemoryError):
        patch.setattr(native.cuda, "launch", launch)
        native.cuda.sinkhorn(problem, unrolled)
    return sum(asked)


def test_a_nan_makes_its_problem_nan_and_no_other():
    cost, a, b = Recipe(5, 9, 0.1, 8).make()
    clean = sinkhorn(cost, a, b, 0.1)
    cost, a, b = cost.clone(), a.clone(), b.clone()
    cost[1, 2, 3], cost[2, 4, 0] = torch.nan, -torch.inf
    a[3, 1] = b[4, 5] = torch.nan
    a[5, 0] = 0
    cost[5, 0, 0] = torch.nan  # a point without mass counts too
    for entropic in (False, True):
        found = sinkhorn(cost, a, b, 0.1, entropic=entropic)
        for number in (0, 1, 2, 3, 5, 6, 7):
            assert found[number][1:6].isnan().all(), (number, found[number])
    for whole, alone in zip(sinkhorn(cost, a, b, 0.1), clean, strict=True):
        assert torch.equal(whole[[0, 6, 7]], alone[[0, 6, 7]])


def test_a_bad_epsilon_makes_every_problem_nan():
    cost, a, b = Recipe(5, 9, 0.1, 2).make()
    for epsilon in (0.0, -0.1, torch.nan):
        value, f, g, *_ = sinkhorn(cost, a, b, epsilon)
        assert value.isnan().all() and f.isnan().all() and g.isnan().all(), epsilon


def test_no_mass_at_all_is_no_cost():
    cost, a, b = Recipe(5, 9, 0.1, 2).make()
    a[1], b[1] = 0, 0
    value, f, g, error, _, of_cost, _, _ = sinkhorn(cost, a, b, 0.1)
    assert value[1] == error[1] == 0 and not f[1].any() and not g[1].any() and not of_cost[1].any()
    assert value[0] > 0 and torch.isfinite(of_cost).all()


@pytest.mark.parametrize(
    ("n", "m", "iterations", "chip", "shared", "workspace"),
    [
        (20, 20, 4, "wide", "matrix and history", False),
        (80, 130, 2, "wide", "nothing", True),
        (200, 3, 2, "wide", "matrix and history", False),
        (8, 8, 4, "small", "matrix", True),
        (14, 13, 6, "small", "nothing", True),
    ],
)
def test_arrays_beyond_shared_memory_are_in_the_workspace(n, m, iterations, chip, shared, workspace):
    for epsilon in (EPSILONS[0], EPSILONS[2]):
        recipe = Recipe(n, m, epsilon, 2, iterations)
        recipe.assert_right(chip, n)
    with chips.on(chip) as model:
        model.clear_launches()
        recipe.run("cuda", torch.float32)
        launch = model.launches()[0]
        size = workspace_bytes(zeros(n, m, iterations, problems=2), unrolled=True)
    matrix, history = 4 * n * m, 16 * (iterations * (n + m) + m)
    around = launch["shared"] - {"matrix and history": matrix + history, "matrix": matrix, "nothing": 0}[shared]
    assert 0 < around < 2000 + 36 * (n + m) + 8 * max(m, 512), launch
    assert (size > 0) == workspace


def test_more_problems_than_blocks():
    for epsilon in (EPSILONS[0], EPSILONS[2]):
        Recipe(4, 3, epsilon, 60, 3).assert_right("small", 5)


def test_results_do_not_depend_on_the_order_of_threads():
    for epsilon in (EPSILONS[0], EPSILONS[2]):
        cost, a, b = Recipe(40, 37, epsilon, 3).make()
        results = [sinkhorn(cost, a, b, epsilon, chip="wide", seed=seed) for seed in range(4)]
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_too_many_points_are_refused_in_words():
    with chips.on("wide"), pytest.raises(RuntimeError, match=r"900 and 99 points take \d+ bytes of shared"):
        workspace_bytes(zeros(900, 99, 5), unrolled=False)
    with chips.on("h100"):
        assert workspace_bytes(zeros(2500, 2500, 5), unrolled=False) == 4 * 2500**2
    with chips.on("h100"), pytest.raises(RuntimeError, match="fp32"):
        workspace_bytes(zeros(2, 2, 5, dtype=torch.float64), unrolled=False)


# ---- SinKD


@dataclass(frozen=True)
class Clouds:
    """Recipe for a call of fused_sinkhorn_kd."""

    rows: int
    vocab: int
    clouds: int = 2
    student: torch.dtype = torch.float32
    teacher: torch.dtype = torch.float32
    padding: int = 0  # columns past the vocabulary, filled with NaN
    strided: bool = False
    scale: float = 2.0
    offset: float = 0.0
    masked: bool = False
    temperature: float = 2.0
    epsilon: float = EPSILONS[2]
    iterations: int = 4
    cost: str = "l1"
    gradient: str = "unrolled"
    seed: int = 0

    def make(self):
        """Returns student, teacher and mask."""
        generator = torch.Generator().manual_seed(self.seed)
        made = []
        for dtype, padding in ((self.student, self.padding), (self.teacher, 2 * self.padding)):
            wide = torch.full((self.clouds, self.rows + self.strided, self.vocab + padding), torch.nan, dtype=dtype)
            logits = wide[:, : self.rows]
            x = torch.randn(self.clouds, self.rows, self.vocab, generator=generator)
            logits[..., : self.vocab] = (self.scale * x + self.offset).to(dtype)
            made.append(logits)
        if not self.masked:
            return *made, None
        mask = torch.rand(self.clouds, self.rows, generator=generator) < 0.6
        mask[0] = self.clouds == 1  # the first of several clouds has no rows
        for logits in made:
            logits[~mask] = torch.nan
        return *made, mask

    def options(self, mask, backend):
        names = ("temperature", "epsilon", "iterations", "cost", "gradient")
        return {name: getattr(self, name) for name in names} | {
            "mask": mask, "vocab_size": self.vocab, "reduction": "none", "backend": backend,
        }  # fmt: skip

    def run(self, backend: str, dtype: torch.dtype | None = None, inputs=None):
        """Losses [clouds] and the student's gradient. A `dtype` converts the logits first."""
        student, teacher, mask = inputs or self.make()
        if dtype is not None:
            student, teacher = student.to(dtype), teacher.to(dtype)
        student = student.detach().requires_grad_()
        loss = fused_sinkhorn_kd(student, teacher, **self.options(mask, backend))
        weights = torch.arange(1, self.clouds + 1, dtype=loss.dtype)
        (gradient,) = torch.autograd.grad((loss * weights).sum(), student)
        return loss.detach(), gradient

    def assert_right(self, chip: str, seed: int):
        inputs = self.make()
        with chips.on(chip, seed):
            loss, gradient = self.run("cuda", None, inputs)
        want, right = self.run("reference", torch.float64, inputs)
        eager, in_fp32 = self.run("reference", torch.float32, inputs)
        rounding = exponent_rounding(2.0, self.epsilon)
        assert_close(loss, want, eager, 8 * rounding, 0, "loss")
        assert not gradient[..., self.vocab :].any()
        if inputs[2] is not None:
            assert not gradient[~inputs[2]].any()
        of_row, of_class = self.slack(inputs, rounding)
        got, right, in_fp32 = (x[..., : self.vocab].double() for x in (gradient, right, in_fp32))
        assert torch.equal(got.isnan(), right.isnan())
        subnormal = 2.0**-24 if self.student == torch.float16 else 0
        allowed = GRADIENT_TOLERANCE[self.student] * right.abs() + of_row + of_class + subnormal
        allowed = allowed + 2 * (in_fp32 - right).abs().amax((1, 2), keepdim=True)
        error = (got - right).abs().nan_to_num(0)
        assert (error <= allowed).all(), f"gradient: error {(error / allowed).max():.2f} times the allowed error"

    def slack(self, inputs, rounding):
        """The error allowed in the gradient: per row, from the rounding of costs and probabilities; per class, from
        signs of p - q that rounding decides.
        """
        student, teacher, mask = inputs
        kept = torch.ones(self.clouds, self.rows, dtype=torch.float64) if mask is None else mask.double()
        there = (kept != 0)[..., None]
        p, q = (
            torch.where(there, x[..., : self.vocab].double() / self.temperature, 0).softmax(-1)
            for x in (student, teacher)
        )
        pairs = pairwise_costs(p, q, self.cost)
        pairs = torch.where(there & there.mT, pairs, 0).requires_grad_()
        epsilon = torch.tensor([self.epsilon], dtype=torch.float64)
        problem = transport.Sinkhorn(
            pairs, kept, kept, epsilon, torch.zeros_like(epsilon), self.iterations, False, self.gradient, 1 << 28
        )
        found = reference_sinkhorn(problem)
        weights = torch.arange(1, self.clouds + 1, dtype=torch.float64)
        of_pairs = torch.autograd.grad((found.value * weights).sum(), pairs)[0].abs()
        if self.cost == "l2":  # the derivative of the norm is at most 1
            off = torch.zeros_like(p)
        else:
            near = (p[:, :, None] - q[:, None]).abs() <= 32 * ULP * p[:, :, None]
            off = 2 * torch.einsum("cij,cijv->civ", of_pairs, near.double())
        of_class = p / self.temperature * (off + (p * off).sum(-1, keepdim=True))
        of_row = 8 * rounding * (p.amax(-1, keepdim=True) * of_pairs.sum(-1, keepdim=True)) / self.temperature
        return of_row.detach(), of_class.detach()


def problem_of(student, teacher, mask=None, temperature=2.0, cost="l1") -> transport.Clouds:
    """The call in the form that the kernels take."""
    clouds, rows, vocab = student.shape
    row_mass = torch.ones(clouds, rows) if mask is None else mask.float()
    return transport.Clouds(student, teacher, row_mass, torch.tensor([temperature]), cost, vocab)


def floats_of(problem: transport.Clouds) -> torch.Tensor:
    """The normalizers of the rows, computed by the kernel: [4, clouds, n]."""
    options = RowOptions(problem.row_mass.view(-1), problem.temperature)
    rows = softmaxes(problem.student, problem.teacher, options, problem.vocab_size)
    return native.cuda.row_floats(rows)[:4].view(4, *problem.row_mass.shape)


clouds = st.builds(
    Clouds,
    rows=st.sampled_from([1, 2, 9, 19, 35, 70]),
    vocab=st.sampled_from([1, 7, 64, 129, 300]),
    clouds=st.sampled_from([1, 2, 3]),
    student=st.sampled_from(DTYPES),
    teacher=st.sampled_from(DTYPES),
    padding=st.sampled_from([0, 1, 8, 70]),
    strided=st.booleans(),
    scale=st.sampled_from([0.5, 3.0]),
    offset=st.sampled_from([0.0, 50.0]),
    masked=st.booleans(),
    temperature=st.sampled_from([1.0, 2.0]),
    epsilon=st.sampled_from(EPSILONS[1:]),
    iterations=st.sampled_from([1, 4]),
    cost=st.sampled_from(["l1", "l2"]),
    gradient=st.sampled_from(transport.GRADIENTS),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=30)
@given(call=clouds, chip=st.sampled_from(CHIPS))
def test_clouds_against_the_reference_in_fp64(call, chip):
    call.assert_right(chip, call.seed)


@pytest.mark.parametrize("cost", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_are_cut_into_ranges(cost, dtype):
    """The columns form at least one range per 4,096, and enough ranges to fill the chip. The costs must stay right."""
    call = Clouds(3, 9001, 1, dtype, dtype, padding=3, scale=4.0, cost=cost)
    for chip in ("wide", "h100"):
        call.assert_right(chip, 1)
        with chips.on(chip) as model:
            model.clear_launches()
            call.run("cuda")
            ranges = [launch["grid"][0] for launch in model.launches() if launch["block"][0] == 64]
        assert 3 <= ranges[0] <= -(-9001 // 64), ranges
        assert (ranges[0] > 100) == (chip == "h100")


@pytest.mark.parametrize("cost", ["l1", "l2"])
def test_rows_that_are_their_teacher(cost):
    """Equal logits have bitwise equal probabilities: their cost must be 0, and its slope sign(0) = 0."""
    call = Clouds(7, 130, 2, torch.bfloat16, torch.float32, scale=3.0, cost=cost)
    student, _, _ = call.make()
    problem = problem_of(student, student.float(), cost=cost)
    with chips.on("h100"):
        floats = floats_of(problem)
        costs, moments = native.cuda.pairwise_costs(problem, floats, True)
        weights = torch.eye(7).expand(2, 7, 7).contiguous()  # weights on the diagonal only
        gradient = native.cuda.pairwise_gradient(problem, floats, weights, torch.zeros(2, 7))
    assert not costs.diagonal(dim1=1, dim2=2).any() and not moments.diagonal(dim1=1, dim2=2).any()
    assert not gradient.any() and (costs.sum() > 1)


def test_moments_are_sums_of_slopes():
    for cost in ("l1", "l2"):
        call = Clouds(35, 200, 2, masked=True, cost=cost)
        student, teacher, mask = call.make()
        problem = problem_of(student, teacher, mask, cost=cost)
        with chips.on("wide"):
            floats = floats_of(problem)
            costs, moments = native.cuda.pairwise_costs(problem, floats, True)
            without, empty = native.cuda.pairwise_costs(problem, floats, False)
        assert torch.equal(costs, without) and empty.numel() == 0
        there = mask[..., None]
        p, q = (torch.where(there, x.double() / 2, 0).softmax(-1).requires_grad_() for x in (student, teacher))
        pairs = pairwise_costs(p, q, cost)
        pairs = torch.where(there & there.mT, pairs, 0)
        torch.testing.assert_close(costs.double(), pairs.detach(), rtol=4e-6, atol=0)
        difference = p[:, :, None] - q[:, None]
        slopes = difference.sign() if cost == "l1" else difference / pairs.clamp_min(1e-30)[..., None]
        want = torch.where(there & there.mT, (p[:, :, None] * slopes).sum(-1), 0)
        torch.testing.assert_close(moments.double(), want.detach(), rtol=0, atol=4e-6)


def test_a_nan_makes_its_cloud_nan_and_no_other():
    for cost in ("l1", "l2"):
        call = Clouds(5, 90, 5, torch.bfloat16, torch.float16, cost=cost)
        student, teacher, _ = call.make()
        student[0, 3, 17], teacher[1, 2, 3], student[2, 4] = torch.nan, torch.nan, -torch.inf
        teacher[3, 0, 5] = torch.inf
        with chips.on("h100"):
            loss, gradient = call.run("cuda", None, (student, teacher, None))
        assert loss[:4].isnan().all() and gradient[:4].isnan().all()
        assert torch.isfinite(loss[4]) and torch.isfinite(gradient[4]).all()


def test_a_bad_temperature_makes_every_kept_pair_nan():
    student, teacher, mask = Clouds(4, 30, 1, masked=True).make()
    mask[0, :3] = torch.tensor([True, False, True])
    student[0, 0], teacher[0, 0], student[0, 2], teacher[0, 2] = (torch.randn(30) for _ in range(4))
    with chips.on("h100"):
        floats = floats_of(problem_of(student, teacher, mask, 1.0))
        for temperature in (0.0, -1.0, torch.nan):
            problem = problem_of(student, teacher, mask, temperature)
            costs, moments = native.cuda.pairwise_costs(problem, floats, True)
            gradient = native.cuda.pairwise_gradient(problem, floats, torch.ones(1, 4, 4), torch.ones(1, 4))
            pairs = mask[:, :, None] & mask[:, None, :]
            assert costs[pairs].isnan().all() and moments[pairs].isnan().all() and gradient[mask].isnan().all()
            assert not costs[~pairs].any() and not moments[~pairs].any() and not gradient[~mask].any()


def test_clouds_do_not_depend_on_the_order_of_threads():
    call = Clouds(35, 300, 2, torch.bfloat16, torch.float32, padding=5, masked=True)
    results = []
    for seed in range(3):
        with chips.on("wide", seed):
            results.append(call.run("cuda"))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


# ---- the tests of the tests: a kernel with one fault must fail

# (the fault, its text in csrc/cuda, the replacement)
FAULTS = [
    ("columns are overwritten while they are read", "    __syncthreads();  // all have read the columns\n", ""),
    ("teachers are overwritten while they are read", "    __syncthreads();  // all have read the teachers\n", ""),
    ("a problem overwrites the previous problem",
     "    __syncthreads();  // all have read what the next problem overwrites\n", ""),
    ("columns are merged before their parts are written", "  __syncthreads();  // all parts are there\n", ""),
    ("points without mass are not guarded", "return mass[i] == 0 ? kGuard : INFINITY;", "return INFINITY;"),
]  # fmt: skip


def wrong_result(module) -> str | None:
    """The first call that ends in an error of the model or in a wrong result."""

    def failure(chip, seed, body) -> str | None:
        try:
            with emulated.serving(module, module.configure_device(**chips.CHIPS[chip]), seed):
                body()
        except RuntimeError as error:
            assert "CUDA model" in str(error), error
            return f"{chip}, seed {seed}: {error}"
        except AssertionError as error:
            return f"{chip}, seed {seed}: {error}"
        return None

    def transport_of(recipe):
        inputs = recipe.make()
        found, derivatives = recipe.run("cuda", torch.float32, inputs)
        want, right = recipe.run("reference", torch.float64, inputs)
        torch.testing.assert_close(found.value.double(), want.value, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.f[..., :1].double() + found.g, want.f[..., :1] + want.g, rtol=1e-4, atol=0)
        for x, truth, source in zip(derivatives, right, inputs, strict=True):
            assert torch.isfinite(x).all()
            counts = (
                torch.ones_like(source) if source is inputs[0] else source
            )  # the gradient of a point without mass may be huge
            x, truth = (torch.where(counts == 0, 0, y.double()) for y in (x, truth))
            torch.testing.assert_close(x, truth, rtol=1e-2, atol=1e-3)

    def clouds_of(call):
        loss, gradient = call.run("cuda")
        want, right = call.run("reference", torch.float64)
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)
        torch.testing.assert_close(gradient.double(), right.double(), rtol=0, atol=2e-2 * right.abs().max().item())

    for seed in range(4):
        massless = replace(Recipe(9, 7, EPSILONS[0]), problems=3, massless=True, scale=2.0, offset=1.0, seed=seed)
        stopping = Recipe(40, 20, EPSILONS[2], 7, 20, tolerance=0.05, offset=1.0, seed=seed)
        for recipe in (massless, stopping):
            chip = "small" if recipe is massless else "wide"
            if found := failure(chip, seed, lambda: transport_of(recipe)):  # noqa: B023
                return found
        call = Clouds(20, 90, 2, cost=("l1", "l2")[seed % 2], seed=seed)
        if found := failure("wide", seed, lambda: clouds_of(call)):  # noqa: B023
            return found
    return None


def test_kernels_without_a_fault_pass():
    assert wrong_result(emulated.cuda_model()) is None


@pytest.mark.parametrize(("what", "text", "instead"), FAULTS, ids=[what for what, _, _ in FAULTS])
def test_a_fault_is_caught(what, text, instead):
    caught = wrong_result(emulated.mutated(text, instead, "sinkhorn", "pairwise", "rows"))
    print(f"{what}: {caught}")
    assert caught, what


# ---- errors


def test_a_launch_that_fails_is_an_error():
    with chips.on("h100") as model:
        model.fail_call("cudaLaunchKernelEx", "cudaErrorLaunchOutOfResources")
        try:
            for call in (lambda: Recipe(2, 2, 0.1).run("cuda", torch.float32), lambda: Clouds(2, 5).run("cuda")):
                with pytest.raises(RuntimeError, match=r"cudaLaunchKernelEx: .*cudaErrorLaunchOutOfResources"):
                    call()
        finally:
            model.fail_call("cudaLaunchKernelEx", "cudaSuccess")
    Recipe(2, 2, EPSILONS[2]).assert_right("h100", 0)
