"""The kernels that heads use: row sweeps whose gradient overwrites the logits, the soft cap and its gradient, sums in
fp32, and memory.
"""

import ctypes
import mmap
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import chips
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, Logits, RowOptions, logits, row_options
from truth import BACKENDS, DIVERGENCES, device_of, rounding

from kdkernels import Divergence, backends
from kdkernels.backends import native
from kdkernels.families import options as options_of_rows
from kdkernels.families.rows import ROW_STATISTICS, Rows, softmaxes

COMPILED = [backend for backend in BACKENDS if backend != "reference"]
if native.missing_because is not None:
    COMPILED.remove("cpu")
# The interpreter is a hundred times slower, so it runs fewer examples.
EXAMPLES = {"cpu": 25, "cuda": 12, "triton": 4}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
each_backend = pytest.mark.parametrize("backend", COMPILED)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
only_cpu = pytest.mark.skipif("cpu" not in COMPILED, reason=f"no native module: {native.missing_because}")


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGERS[x.element_size()])


# ---- row sweeps in place


def with_divergence(problem: Rows, divergence: Divergence, statistics: bool) -> Rows:
    parameter = 1.0 if divergence.parameter is None else divergence.parameter
    parameters = torch.full((1,), parameter, dtype=problem.row_scale.dtype, device=problem.student.device)
    return problem._replace(divergence=divergence.name, parameters=parameters, statistics=statistics)


def problem_of(recipe: Logits, recipe_of_options: RowOptions, hard: bool, backend: str, dtype=torch.float32) -> Rows:
    """The problem without its divergence, which `with_divergence` sets."""
    device = device_of(backend)
    student, teacher = (x.reshape(1, -1, x.shape[-1]).contiguous() for x in recipe.make(device))
    rows = student.shape[1]
    options = recipe_of_options.make((rows,), recipe.vocab, device)

    def numbers(name):
        return torch.as_tensor(options[name], dtype=dtype, device=device).reshape(-1) if name in options else None

    kept = options.get("mask", torch.ones(rows, dtype=torch.bool, device=device))
    labels = options.get("labels")
    if labels is not None:
        kept = kept & (labels != -100)
    weight = numbers("row_weight")
    weight = torch.ones(rows, dtype=dtype, device=device) if weight is None else weight
    student[0, ~kept], teacher[0, ~kept] = torch.nan, torch.nan
    row_options = options_of_rows.RowOptions(
        torch.where(kept, weight, 0),
        numbers("temperature"),
        labels=labels,
        hard_weight=numbers("hard_weight") if hard else None,
        temperature_squared=options["temperature_squared"],
    )
    return softmaxes(student, teacher, row_options, recipe.vocab)


def assert_in_place_is_fresh(problem: Rows, backend, divergence, statistics, seed):
    problem, kernels = with_divergence(problem, divergence, statistics), backends.kernels(backend)

    def order(seed):
        on_cpu = backend == "cuda" and problem.student.device.type == "cpu"
        return chips.on(list(chips.CHIPS)[seed % len(chips.CHIPS)], seed) if on_cpu else nullcontext()

    before = problem.student.clone()
    with order(seed):
        fresh = kernels.rows(problem, True)
    assert torch.equal(bits(problem.student), bits(before)), "the kernel must not write the logits"
    apart, in_place = torch.full_like(before, torch.nan), before.clone()
    for student, into in ((before, apart), (in_place, in_place)):
        with order(seed + len(chips.CHIPS)):  # the seeds select the same chip
            got = kernels.rows(problem._replace(student=student), True, into)
        assert got[1] is into
        names = ("loss", "gradient", "floats", "sums", "statistics", "top1")
        for name, one, other in zip(names, got, fresh, strict=True):
            assert torch.equal(bits(one), bits(other)), f"{name}, in place: {student is into}"


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@each_backend
def test_gradient_in_place_is_the_fresh_one(divergence, backend):
    """In place, the gradient and all other results are bitwise the same: logits are read before being overwritten."""
    vocabularies = {"cuda": st.integers(1, 2500), "triton": st.integers(1, 700)}.get(backend)

    @settings(max_examples=EXAMPLES[backend])
    @given(
        recipe=logits(vocabularies), recipe_of_options=row_options, hard=st.booleans(), statistics=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def property_holds(recipe, recipe_of_options, hard, statistics, seed):
        problem = problem_of(recipe, recipe_of_options, hard, backend)
        assert_in_place_is_fresh(problem, backend, divergence, statistics, seed)

    property_holds()


@only_cpu
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64)], ids=str)
def test_gradient_in_place_in_fp64(divergence, dtypes):
    recipe = Logits((7,), 1501, (3, 1), *dtypes, 3.0, 0.0, 0.0, False, 3)
    options = RowOptions(None, True, 0.3, True, True, None, 4)
    for statistics in (False, True):
        problem = problem_of(recipe, options, True, "cpu", torch.float64)
        assert_in_place_is_fresh(problem, "cpu", divergence, statistics, 0)


@only_cpu
@each_dtype
def test_gradient_in_place_by_threads_that_share_a_row(dtype):
    recipe = Logits((2,), 40_001, (7, 0), dtype, torch.float32, 3.0, 0.0, 0.0, False, 5)
    problem = problem_of(recipe, RowOptions(2.0, False, 0.0, False, True, 0.5, 8), True, "cpu")
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            for divergence in (DIVERGENCES[0], DIVERGENCES[3]):
                assert_in_place_is_fresh(problem, "cpu", divergence, True, 0)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("hard", [False, True])
@each_dtype
@each_backend
def test_the_logit_of_a_label_is_read_before_its_gradient_is_there(backend, dtype, hard):
    """For divergences whose gradient is written in the same sweep as the loss: in place, the results that use the
    label's logit (cross-entropy, log-probabilities, the loss) must match fp64.
    """
    device, vocab = device_of(backend), 611
    student, teacher = (3 * torch.randn(1, 6, 616, device=device).to(dtype) for _ in range(2))
    student[0, 2], teacher[0, 2] = torch.nan, torch.nan
    labels = torch.randint(0, vocab, (6,), device=device)
    labels[5] = vocab - 1
    one, kept = torch.ones(1, device=device), torch.arange(6, device=device) != 2
    options = options_of_rows.RowOptions(kept.float(), one, labels=labels, hard_weight=0.5 * one if hard else None)
    problem = softmaxes(student, teacher, options, vocab)
    log_q, log_p = (x[0, kept, :vocab].double().log_softmax(-1) for x in (student, teacher))
    label_log_q = log_q.gather(1, labels[kept, None])[:, 0]
    ulps = rounding(student[0, kept, :vocab], teacher[0, kept, :vocab])
    for divergence in DIVERGENCES[:3]:
        for chip in ("small", "single", "streaming", "a100") if backend == "cuda" and device == "cpu" else ("",):
            logits = student.clone()
            in_place = with_divergence(problem, divergence, True)._replace(student=logits)
            with chips.on(chip) if chip else nullcontext():
                loss, _, _, sums, statistics, _ = backends.kernels(backend).rows(in_place, True, logits)
            found = dict(zip(ROW_STATISTICS, statistics[:, kept].double(), strict=True))
            for got, want in (
                (found["cross_entropy"], -label_log_q),
                (found["student_label_log_prob"], label_log_q),
                (found["teacher_label_log_prob"], log_p.gather(1, labels[kept, None])[:, 0]),
                (loss[kept].double(), 0.5 * (sums[0, kept].double() - label_log_q) if hard else sums[0, kept].double()),
            ):
                assert ((got - want).abs() <= ulps + 1e-6 * want.abs()).all(), (divergence, chip, got, want)
            assert not loss[2] and not logits[0, 2].any() and not logits[..., vocab:].any()


# ---- the soft cap

CAPS = [1e-3, 0.5, 1.0, 30.0, 50.0, 1e4, 1e30]
# Bit patterns as integers of the dtype: quiet NaN, signalling NaN, all ones, and negative ones.
NANS = {
    torch.float32: [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001],
    torch.bfloat16: [0x7FC0, 0x7FFF, 0xFFFF, 0x7F81],
    torch.float16: [0x7E00, 0x7FFF, 0xFFFF, 0x7C01],
}


def values_around(cap: float, dtype: torch.dtype, backend: str, count: int = 4000) -> torch.Tensor:
    parts = [scale * torch.randn(count, dtype=torch.float64) for scale in (cap / 300, cap / 3, cap, 5 * cap, 20, 1e-6)]
    parts.append(torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6e-8, 65504]))
    largest = torch.finfo(dtype).max
    return torch.cat([part.double() for part in parts]).clamp(-largest, largest).to(dtype).to(device_of(backend))


def nans(dtype: torch.dtype, backend: str) -> torch.Tensor:
    size = dtype.itemsize * 8
    patterns = [x - (1 << size) if x >> (size - 1) else x for x in NANS[dtype]]
    return torch.tensor(patterns, dtype=INTEGERS[dtype.itemsize]).view(dtype).to(device_of(backend))


def units(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit in the last place of x in the dtype."""
    tiny = torch.finfo(dtype).smallest_normal
    return torch.exp2(x.abs().clamp(min=tiny).log2().floor()) * torch.finfo(dtype).eps


def assert_within_ulps(got: torch.Tensor, want: torch.Tensor, ulps: float):
    """The error is within `ulps` units of fp32, the arithmetic's dtype, plus half a unit of `got`'s dtype."""
    allowed = ulps * units(want, torch.float32)
    if got.dtype != torch.float32:
        allowed += units(want, got.dtype) / 2
    error = (got.double() - want).abs() / allowed
    assert error.max() <= 1, f"{ulps * error.max():.2f} of {ulps} ulp; expected {want[error.argmax()]}"


@pytest.mark.parametrize("cap", CAPS)
@each_dtype
@each_backend
def test_softcap(backend, dtype, cap):
    """tanh is within 1.4 ulp (2 on a GPU). x / cap and the product are rounded too, unless cap is a power of two."""
    x = values_around(cap, dtype, backend)
    got = x.clone()
    backends.kernels(backend).softcap_(got, cap)
    exact_cap = torch.tensor(cap).double().item()
    assert_within_ulps(got, exact_cap * torch.tanh(x.double() / exact_cap), 2.2 if cap in (0.5, 1.0) else 5)
    assert torch.equal(torch.signbit(got), torch.signbit(x))
    small = x.double().abs() < cap * 2.0**-13
    assert small.any() and torch.equal(bits(got[small]), bits(x[small])), "a small logit must not change"


@pytest.mark.parametrize("cap", [0.5, 30.0])
@each_dtype
@each_backend
def test_softcap_of_infinity_and_nan(backend, dtype, cap):
    special = torch.cat(
        [torch.tensor([torch.inf, -torch.inf], device=device_of(backend)).to(dtype), nans(dtype, backend)]
    )
    for shift in range(17):  # moves the values through every lane
        x = torch.cat([torch.ones(shift, device=special.device).to(dtype), special, torch.ones(33).to(special)])
        backends.kernels(backend).softcap_(x, cap)
        got = x[shift : shift + len(special)]
        assert got[0] == cap and got[1] == -cap and got[2:].isnan().all(), got
        assert x.isnan().sum() == 4


@pytest.mark.parametrize("cap", CAPS)
@each_dtype
@each_backend
def test_softcap_gradient(backend, dtype, cap):
    x = values_around(cap, dtype, backend)
    backends.kernels(backend).softcap_(x, cap)
    gradient = torch.randn(x.shape, device=x.device).to(dtype)
    got = gradient.clone()
    backends.kernels(backend).softcap_gradient_(got, x, cap)
    exact_cap = torch.tensor(cap).double().item()
    slope = (1 - (x.double() / exact_cap) ** 2).clamp(min=0)
    assert_within_ulps(got, gradient.double() * slope, 4)


@each_dtype
@each_backend
def test_softcap_gradient_of_zero_stays_zero(backend, dtype):
    """Skipped rows and padding columns have gradient 0, and any logits, even NaN, must leave it 0."""
    infinite = torch.tensor([torch.inf, -torch.inf, 1e4, -1e4, 0.0], device=device_of(backend)).to(dtype)
    anything = torch.cat([infinite, nans(dtype, backend)]).repeat(13)
    for zero in (0.0, -0.0):
        gradient = torch.full_like(anything, zero)
        backends.kernels(backend).softcap_gradient_(gradient, anything, 30.0)
        assert (gradient == 0).all()
    gradient, finite = torch.full_like(anything, torch.nan), torch.ones_like(anything)
    backends.kernels(backend).softcap_gradient_(gradient, finite, 30.0)
    assert gradient.isnan().all(), "a NaN gradient stays NaN"
    backends.kernels(backend).softcap_gradient_(finite, anything, 30.0)
    assert torch.equal(finite.isnan(), anything.isnan())


@each_backend
def test_a_capped_logit_that_was_rounded_past_the_cap_has_no_slope(backend):
    cap = 30.1
    logits = torch.tensor([1e3, -1e3, torch.inf, 31.0], device=device_of(backend)).bfloat16()
    backends.kernels(backend).softcap_(logits, cap)
    assert (logits[:3].abs() == 30.125).all()
    gradient = torch.ones_like(logits)
    backends.kernels(backend).softcap_gradient_(gradient, logits, cap)
    assert gradient[:3].tolist() == [0, 0, 0] and gradient[3] > 0


@each_dtype
@each_backend
def test_softcap_of_any_part_of_a_tensor(backend, dtype):
    """A result must not depend on the tensor's length or address; elements outside the part must stay unchanged."""
    kernels, length = backends.kernels(backend), 2053
    logits = 40 * torch.randn(length, device=device_of(backend)).to(dtype)
    gradient = torch.randn(length, device=device_of(backend)).to(dtype)
    capped, sloped = logits.clone(), gradient.clone()
    kernels.softcap_(capped, 30.0)
    kernels.softcap_gradient_(sloped, capped, 30.0)
    assert not torch.equal(capped, logits) and not torch.equal(sloped, gradient)
    for offset, count in ((0, 0), (0, 1), (1, 1), (3, 5), (7, 8), (1, 9), (5, 17), (8, 1000), (2, 1027), (9, 2044)):
        part = slice(offset, offset + count)
        got, of_gradient = logits.clone(), gradient.clone()
        kernels.softcap_(got[part], 30.0)
        kernels.softcap_gradient_(of_gradient[part], capped[part], 30.0)
        for found, before, after in ((got, logits, capped), (of_gradient, gradient, sloped)):
            want = before.clone()
            want[part] = after[part]
            assert torch.equal(bits(found), bits(want)), (offset, count)
        if offset:  # the two tensors have different offsets from a 16-byte boundary
            of_gradient, moved = gradient.clone(), torch.zeros(count + 1, device=logits.device).to(dtype)
            moved[1:] = capped[part]
            kernels.softcap_gradient_(of_gradient[part], moved[1:], 30.0)
            assert torch.equal(bits(of_gradient[part]), bits(sloped[part]))
    cube = logits[:2040].clone().view(5, 24, 17)
    kernels.softcap_(cube, 30.0)
    assert torch.equal(bits(cube.flatten()), bits(capped[:2040]))


@only_cpu
def test_softcap_in_fp64():
    x = torch.cat([30 * torch.randn(5000).double(), 1e-9 * torch.randn(100).double(), torch.tensor([0.0, torch.inf])])
    got, gradient = x.clone(), torch.randn(x.shape).double()
    kernels = backends.kernels("cpu")
    kernels.softcap_(got, 30.0)
    torch.testing.assert_close(got, 30 * torch.tanh(x / 30), rtol=4 * 2.0**-52, atol=0)
    want = gradient * (1 - (got / 30) ** 2)
    kernels.softcap_gradient_(gradient, got, 30.0)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-15)
    x[7] = torch.nan
    kernels.softcap_(x, 30.0)
    assert x.isnan().nonzero().tolist() == [[7]]


# ---- sums in fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_backend
def test_accumulate(backend, dtype):
    kernels, device = backends.kernels(backend), device_of(backend)
    for shape in ((0,), (1,), (3, 5), (1025,), (7, 0), (33_331,), (41, 2999)):
        total = torch.randn(shape, device=device)
        part = torch.randn(shape, device=device).to(dtype)
        want = total + part.float()
        kernels.accumulate_(total, part)
        assert torch.equal(bits(total), bits(want)), shape
    for offset in (1, 3):  # views that are not aligned
        total, part = torch.randn(5000, device=device), torch.randn(5000, device=device).to(dtype)
        want = total.clone()
        want[offset:-1] += part[: -1 - offset].float()
        kernels.accumulate_(total[offset:-1], part[: -1 - offset])
        assert torch.equal(bits(total), bits(want))
    special = torch.tensor([torch.inf, -torch.inf, 1e-7, -0.0, 2.0], device=device).to(dtype)
    special = torch.cat([special, nans(dtype, backend)])
    total = torch.tensor([1.0, torch.inf, 0.0, -0.0, torch.nan, 1, 1, 1, 1], device=device)
    want = total + special.float()
    kernels.accumulate_(total, special)
    torch.testing.assert_close(total, want, rtol=0, atol=0, equal_nan=True)
    assert total.isnan().tolist() == [False, True, False, False, True, True, True, True, True]


# ---- threads, memory


@only_cpu
def test_no_element_depends_on_the_number_of_threads():
    kernels, threads = backends.kernels("cpu"), torch.get_num_threads()
    logits, gradient, part = 40 * torch.randn(100_003), torch.randn(100_003), torch.randn(100_003).bfloat16()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            capped, sloped, total = logits.clone(), gradient.clone(), logits.clone()
            kernels.softcap_(capped, 30.0)
            kernels.softcap_gradient_(sloped, capped, 30.0)
            kernels.accumulate_(total, part)
            found.append(torch.stack([capped, sloped, total]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bits(found[0]), bits(found[1])) and torch.equal(bits(found[0]), bits(found[2]))


@each_backend
def test_empty(backend):
    made = backends.kernels(backend).empty(3, 5, dtype=torch.bfloat16, device=device_of(backend))
    assert made.shape == (3, 5) and made.dtype == torch.bfloat16 and made.device.type == device_of(backend)
    assert made.is_contiguous()
    assert backends.kernels(backend).empty(0, dtype=torch.float32, device=device_of(backend)).shape == (0,)


def advised(x: torch.Tensor) -> bool:
    """Whether the kernel was advised to use huge pages for the middle of x."""
    middle, inside = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    return False


@only_cpu
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_large_tensors_are_advised_to_be_huge_pages():
    torch.use_deterministic_algorithms(False)  # a fill would touch the memory
    kernels = backends.kernels("cpu")
    assert not advised(torch.empty(16 << 20, dtype=torch.uint8))
    assert advised(kernels.empty(2, 8 << 20, dtype=torch.uint8, device="cpu"))
    student, teacher = torch.randn(1, 40, 100_000), torch.randn(1, 40, 100_000)
    one = torch.ones(1)
    options = options_of_rows.RowOptions(torch.ones(40), one)
    gradient = kernels.rows(softmaxes(student, teacher, options, 100_000), True)[1]
    assert advised(gradient)


@only_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create and mmap as on Linux")
def test_counts_past_two_to_the_31():
    """A tensor of more than 2^31 elements: 2^24 elements mapped 129 times, so that one thread caps each 129 times."""
    elements, times = 1 << 24, 129
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    file, size = os.memfd_create("logits"), 4 * elements
    os.ftruncate(file, size)
    private, anonymous, fixed = 2, 32, 16
    read_and_write = mmap.PROT_READ | mmap.PROT_WRITE
    start = libc.mmap(None, times * size, mmap.PROT_READ, private | anonymous, -1, 0)
    try:
        for i in range(times):
            where = start + i * size
            assert libc.mmap(where, size, read_and_write, mmap.MAP_SHARED | fixed, file, 0) == where
        first = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=torch.float32)
        first.fill_(3)
        mapped = torch.frombuffer((ctypes.c_char * (times * size)).from_address(start), dtype=torch.float32)
        native._native.cpu_softcap({"count": times * elements, "logits": mapped, "cap": 4.0}, None, 1)
        want = torch.full((1,), 3.0)
        for _ in range(times):
            backends.kernels("cpu").softcap_(want, 4.0)
        assert (first == want).all()
        del first, mapped
    finally:
        libc.munmap(start, times * size)
        os.close(file)
