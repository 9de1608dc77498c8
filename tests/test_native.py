"""The compiled module: correctness and packed instructions on every instruction set, and the calling convention."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cuda_compile import build
from truth import rounding, run

import kdkernels
from kdkernels import backends
from kdkernels.backends import native
from kdkernels.families.options import RowOptions
from kdkernels.families.rows import Rows, softmaxes

x = torch.zeros(1, 2)
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(native._native is None, reason=f"no native module: {native.missing_because}")


def isas() -> list[str]:
    """The instruction sets that this processor supports, best first."""
    if native._native is None:
        return ["baseline"]  # all tests are skipped
    found = []
    for isa in ("avx512", "avx2", "baseline"):
        # The file alone, because the package imports torch. Every test process runs this.
        code = (
            "from importlib.util import module_from_spec, spec_from_file_location; "
            f"file = spec_from_file_location('_native', {native._native.__file__!r}); "
            "module = module_from_spec(file); file.loader.exec_module(module); print(module.cpu_isa)"
        )
        out = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "KDKERNELS_CPU_ISA": isa}, capture_output=True, text=True
        )
        if out.returncode == 0:
            assert out.stdout.strip() == isa
            found.append(isa)
    return found


ISAS = isas()
assert "baseline" in ISAS, "the module supports no instruction set of this processor"


@pytest.mark.parametrize("isa", ISAS[1:])
def test_suite_passes_on_every_instruction_set(isa):
    """The current process tests the best instruction set. For each other set, a subprocess runs the CPU's property and
    edge tests.
    """
    files = (
        "test_rows.py",
        "test_edges.py",
        "test_linear_kernels.py",
        "test_topk.py",
        "test_uld.py",
        "test_sinkhorn.py",
    )
    tests = [str(ROOT / "tests" / name) for name in files]
    # Of other backends, or of no instruction set.
    left_out = ("cuda", "triton", "reference", "compile", "opcheck", "gradcheck", "bad", "sampled", "counts_past")
    others = " and ".join(f"not {name}" for name in left_out)
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", others, *tests],
        env={**os.environ, "KDKERNELS_CPU_ISA": isa}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout[-3000:]
    assert re.search(r"\d+ passed", out.stdout)


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_unknown_instruction_set_is_named(isa):
    code = "import kdkernels.backends.native as n; print(n.missing_because)"
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "KDKERNELS_CPU_ISA": isa}, capture_output=True, text=True
    )
    built = ", ".join(build.ISA_FLAGS)
    assert out.stdout == f"KDKERNELS_CPU_ISA: expected one of {built}, as built; got {isa}\n"


# Instructions of each kernel's inner loops that only packed code contains.
PACKED = {
    "avx512": ["vfmadd[0-9]*ps.*zmm", "vmaxps.*zmm", "vsqrtps.*zmm", "vdivps.*zmm", "vcvtph2ps", "vcvtps2ph"],
    "avx2": ["vfmadd[0-9]*ps.*ymm", "vmaxps.*ymm", "vsqrtps.*ymm", "vdivps.*ymm", "vcvtph2ps", "vcvtps2ph"],
    "baseline": ["mulps.*xmm", "maxps.*xmm", "sqrtps.*xmm", "divps.*xmm"],
}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.parametrize("isa", [isa for isa in PACKED if isa in ISAS])
def test_inner_loops_are_packed(isa):
    """The compiler must vectorise every loop. Without -fno-trapping-math it leaves selects scalar, and so the loops."""
    module = native._native.__file__
    dump = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", module], capture_output=True, text=True).stdout
    functions = {}
    for block in dump.split("\n\n"):
        head, _, body = block.partition("\n")
        if f"kdk::{isa}::" in head:
            functions[head.partition("<")[2].rstrip(">:")] = body
    assert functions
    everything = "\n".join(functions.values())
    for pattern in PACKED[isa]:
        assert re.search(pattern, everything), f"{isa} has no {pattern}"
    # The fp32 loops of every divergence.
    packed = {"avx512": "ps.*zmm", "avx2": "ps.*ymm", "baseline": "ps .*xmm"}[isa]
    for name in native._native.divergences:
        struct = "".join(part.capitalize() for part in name.split("_"))
        for loop in ("divergence_sums", "close_sums"):
            mine = [body for head, body in functions.items() if f"{loop}<float, kdk::{isa}::{struct}<float>" in head]
            assert mine, f"{name}: found no {loop} in {isa}"
            assert all(len(re.findall(packed, body)) >= 6 for body in mine), f"{name}: {loop} is not packed in {isa}"
    # Sparse teachers' entries; the sweep of the top-k extraction and its search for the k-th largest logit.
    register = {"avx512": "zmm", "avx2": "ymm", "baseline": "xmm"}[isa]
    integers = rf"p(cmp|max|min|add|sub)[a-z]+ .*{register}"
    extraction = (("Extraction<float>::sweep(", packed), ("Extraction<float>::extract(", integers))
    for name, loop in (("entry_sums<float", packed), *extraction):
        mine = [body for head, body in functions.items() if f"kdk::{isa}::{name}" in head]
        assert any(len(re.findall(loop, body)) >= 2 for body in mine), f"{name} is not packed in {isa}"
    # Optimal transport: a tile of the gradient, and the reverse of a round in each domain.
    reverses = [f"Problem<float, kdk::{isa}::{domain}>::unroll" for domain in ("Scalings", "Logarithms")]
    for name in ("Gradient<float>::write(", *reverses):
        mine = [body for head, body in functions.items() if f"kdk::{isa}::{name}" in head]
        assert any(len(re.findall(packed, body)) >= 6 for body in mine), f"{name} is not packed in {isa}"
    # Heads: the soft cap, its gradient, and the fp32 sums of 16-bit products.
    for name in ("cap_block<float>", "cap_gradient_block<float>", "accumulate"):
        mine = [body for head, body in functions.items() if re.search(rf"kdk::{isa}::{re.escape(name)}\(", head)]
        assert any(len(re.findall(packed, body)) >= 3 for body in mine), f"{name} is not packed in {isa}"


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_exp_and_log_are_near_the_last_digit(scale):
    """Through statistics: lse, entropy and cross-entropy of fp32 logits must match fp64."""
    from kdkernels import fused_kl

    student, teacher = scale * torch.randn(8, 5000), scale * torch.randn(8, 5000)
    names = ("student_lse", "student_entropy", "student_max_log_prob")
    got = fused_kl(student, teacher, statistics=names, backend="cpu").statistics
    log_probs = student.double().log_softmax(-1)
    ulps = rounding(student, teacher)
    for name, want in (
        ("student_lse", student.double().logsumexp(-1)),
        ("student_entropy", -(log_probs.exp() * log_probs).sum(-1)),
        ("student_max_log_prob", log_probs.max(-1).values),
    ):
        assert ((got[name].double() - want).abs() <= ulps).all(), name


# ---- fields by name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cap": None}, "cpu_softcap: cap: expected a number; got NoneType None"),
        ({"cap": True}, "cap: expected a number; got bool True"),
        ({"count": 4.0}, "count: expected an int; got float 4.0"),
        ({"logits": torch.ones(8)[::2]}, r"logits: expected a contiguous tensor of .*; got a tensor of torch.float32"),
        ({"logits": torch.ones(4, dtype=torch.int32)}, r"logits: expected .*; got a tensor of torch.int32, shape"),
        ({"logits": torch.ones(4, device="meta")}, "logits: expected a contiguous tensor"),
        ({"logits": [1.0]}, r"logits: expected .*; got list \[1.0\]"),
        ({"colour": 1}, "unknown field colour; the fields are count, logits, cap"),
    ],
)
def test_a_field_that_a_kernel_does_not_take_is_named(changed, message):
    fields = {"count": 4, "logits": torch.ones(4), "cap": 2.0} | changed
    with pytest.raises(TypeError, match=message):
        native._native.cpu_softcap(fields, None, 1)


def test_a_missing_field_is_named():
    with pytest.raises(TypeError, match="cpu_softcap: the field cap is missing"):
        native._native.cpu_softcap({"count": 4, "logits": torch.ones(4)}, None, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"divergence": "kld"}, r"divergence: expected None or a name of \('kl', .*; got str 'kld'"),
        ({"student": torch.ones(2, 5)}, r"student: expected a tensor \[outer, inner, columns\]"),
        ({"student": torch.ones(1, 2, 10)[..., ::2]}, r"student: expected .* of stride 1 along columns"),
        ({"loss": torch.ones(2).double()}, "loss: expected .*, which is torch.float32 as row_scale; got .*float64"),
        ({"top1": torch.ones(2, 2).int()}, "top1: expected a contiguous tensor of int64, or None; got .*int32"),
        ({"options": (1, 2)}, "options: expected a NamedTuple of row_scale, labels"),
        (
            {"options": RowOptions(torch.ones(2).half(), x)},
            "row_scale: .*torch.float32 or torch.float64",
        ),
        ({"options": RowOptions(torch.ones(2), x, labels=torch.ones(2))}, "labels: expected .* int64"),
        ({"options": RowOptions(torch.ones(1, 2), x)}, r"row_scale: expected a tensor \[rows\] or"),
    ],
)
def test_a_field_of_rows_that_is_of_another_kind_is_named(changed, message):
    seen = {}
    kernels = native.Cpu()
    kernels.launch = lambda kernel, device, fields: seen.update(fields)
    logits, ones = torch.ones(1, 2, 5), torch.ones(2)
    problem = Rows(logits, logits, RowOptions(ones, torch.ones(1)), "kl", torch.ones(1), 5, True)
    kernels.rows(problem, True)
    with pytest.raises(TypeError, match=message):
        native._native.cpu_rows(seen | changed, None, 1)


# ---- the CUDA side of backends/native, without CUDA: calls and refusals


class StandIn:
    """Replaces the CUDA functions: records each call and runs the CPU kernel instead."""

    divergences = native._native and native._native.divergences

    def __init__(self):
        self.placed, self.asked, self.answer = [], [], ""

    def __getattr__(self, name):
        assert name.startswith("cuda_"), name
        kernel = getattr(native._native, name.replace("cuda_", "cpu_"))

        def run(fields, allocate, device, stream):
            self.placed.append((device, stream))
            kernel(fields, allocate, 1)

        return run

    def cuda_refusal(self, device):
        native._native.advise_huge_pages(0, 0)  # compiled code: torch.compile cannot trace it, like the real function
        self.asked.append(device)
        return self.answer


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    monkeypatch.setattr(native.cuda, "module", module)
    monkeypatch.setattr(native.cuda, "device_type", "cpu")
    return module


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_cuda_calls_as_the_cpu_does(stand_in, gradient):
    student, teacher = torch.randn(3, 4, 700).bfloat16(), torch.randn(3, 4, 700)
    options = {"temperature": 2.0, "labels": torch.randint(0, 700, (3, 4)), "hard_weight": 0.3, "gradient": gradient,
               "statistics": ("tv", "student_top1"), "grad_output": torch.rand(3, 4)}  # fmt: skip
    want = run(student, teacher, "js", backend="cpu", **options)
    assert not stand_in.placed
    got = run(student, teacher, "js", backend="cuda", **options)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.gradient, want.gradient)
    assert torch.equal(got.statistics["tv"], want.statistics["tv"])
    assert stand_in.placed == [(0, 0)] * 2, "expected two calls: rows, then scale or row_gradient"
    one = torch.ones(1)
    problem = Rows(student, teacher, RowOptions(torch.ones(12), one), "js", 0.5 * one, 700, True)
    floats = [k.row_floats(problem) for k in (native.cpu, native.cuda)]
    assert torch.equal(*floats)
    sums = [k.row_sums(problem, floats[0]) for k in (native.cpu, native.cuda)]
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


def test_cuda_calls_for_heads_as_the_cpu_does(stand_in):
    logits, gradient = 40 * torch.randn(3, 700), torch.randn(3, 700)
    found = []
    for kernels in (native.cpu, native.cuda):
        capped, sloped, total = logits.clone(), gradient.clone(), logits.clone()
        kernels.softcap_(capped, 30.0)
        kernels.softcap_gradient_(sloped, capped, 30.0)
        kernels.accumulate_(total, gradient.bfloat16())
        found.append(torch.stack([capped, sloped, total]))
    assert torch.equal(*found) and not torch.equal(found[0][0], logits)
    assert stand_in.placed == [(0, 0)] * 2, "expected two calls: torch, not the module, computes the sum"


@pytest.mark.parametrize("kernels", [native.cpu, native.cuda], ids=["cpu", "cuda"])
def test_tensors_that_are_written_in_place_are_what_they_should_be(stand_in, kernels):
    student = torch.randn(1, 3, 8)
    problem = softmaxes(student, student, RowOptions(torch.ones(3), torch.ones(1)), 7)
    for into in (student.bfloat16(), student[..., :7], torch.randn(1, 3, 16)[..., ::2], student.to("meta")):
        with pytest.raises(AssertionError):
            kernels.rows(problem, True, into)
    with pytest.raises(AssertionError):
        kernels.rows(problem, False, student)
    with pytest.raises(AssertionError):
        kernels.softcap_(student[..., ::2], 30.0)
    for gradient, logits in ((student[..., :7], student), (student.half(), student), (student, student[..., ::2])):
        with pytest.raises(AssertionError):
            kernels.softcap_gradient_(gradient, logits, 30.0)
    assert not stand_in.placed


@pytest.mark.parametrize(
    ("total", "part"),
    [
        (torch.zeros(4, 6), torch.zeros(4, 5).bfloat16()),
        (torch.zeros(4, 6), torch.zeros(4, 6)),
        (torch.zeros(4, 6).double(), torch.zeros(4, 6).half()),
        (torch.zeros(4, 12)[:, ::2], torch.zeros(4, 6).half()),
        (torch.zeros(4, 6), torch.zeros(6, 4).half().t()),
    ],
)
def test_sums_that_the_cpu_does_not_take(total, part):
    with pytest.raises(AssertionError):
        native.cpu.accumulate_(total, part)


def test_cuda_launches_nothing_without_rows(stand_in):
    student = torch.randn(0, 7, requires_grad=True)
    kdkernels.fused_kl(student, torch.randn(0, 7), backend="cuda", gradient="backward").backward()
    assert student.grad.shape == (0, 7)
    native.cuda.scale_(torch.randn(0, 7), torch.ones(1))
    native.cuda.scale_(torch.randn(1, 3, 0), torch.ones(1))
    assert not stand_in.placed


def test_cuda_launches_on_the_current_stream_of_the_device(monkeypatch):
    current, placed = [], []

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: SimpleNamespace(cuda_stream=100 + d.index))
    device = torch.device("cuda", 3)
    module = SimpleNamespace(cuda_rows=lambda fields, allocate, *where: placed.append((fields, where, list(current))))
    monkeypatch.setattr(native.cuda, "module", module)
    native.cuda.launch("rows", device, {"rows": 2})
    assert placed == [({"rows": 2}, (3, 103), [device])] and not current


def test_cuda_is_asked_once_a_device_and_while_compiling(stand_in):
    """A device is asked once, outside the graph: torch.compile(fullgraph=True) traces the backend's choice, but cannot
    trace compiled code.
    """

    def loss(student, teacher):
        return kdkernels.fused_js(student, teacher, backend="cuda")

    student, teacher = torch.randn(4, 50), torch.randn(4, 50)
    torch.compiler.reset()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher)
    assert torch.equal(got, loss(student, teacher))
    assert stand_in.asked == [0] and len(stand_in.placed) == 2
    torch.compiler.reset()


def test_cuda_refuses_in_words(stand_in, monkeypatch):
    def refusal(student=x, teacher=x):
        return backends.refuse("cuda", student, teacher)

    assert refusal() is None
    stand_in.answer = "no such device"
    assert refusal() is None, "the answer must be cached"
    other = StandIn()
    other.answer = "no image for this chip"
    monkeypatch.setattr(native.cuda, "module", other)
    assert refusal() == "no image for this chip"
    assert refusal(x.double()).startswith("its arithmetic is fp32")
    assert "one cpu device" in refusal(x, x.to("meta")) and "teacher on meta" in refusal(x, x.to("meta"))
    assert "one cpu device" in refusal(x.to("meta").double(), x), "the device must be checked before the dtype"

    monkeypatch.setattr(native.cuda, "module", None)
    monkeypatch.setattr(native.cuda, "device_type", "cuda")
    monkeypatch.setattr(native, "cuda_missing_because", None)
    assert "one cuda device; got student on cpu and teacher on cpu" in refusal(x.double())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in refusal()
    monkeypatch.setattr(native, "cuda_missing_because", "no nvcc was found")
    assert "built without CUDA kernels (no nvcc was found)" in refusal()
    monkeypatch.setattr(native, "_native", None)
    assert "the native module is missing" in refusal()


def test_auto_chooses_no_cuda_for_a_cpu(stand_in, monkeypatch):
    assert backends.refuse("cuda", x, x) is None
    assert backends.select("auto", x, x) == "cpu"
    monkeypatch.setattr(native, "_native", None)
    assert backends.refuse("cuda", x, x) is None
    assert backends.select("auto", x, x) == "reference"


@pytest.mark.gpu
@pytest.mark.skipif(native.cuda_missing_because is not None, reason=f"no CUDA kernels: {native.cuda_missing_because}")
def test_auto_chooses_cuda_on_a_gpu():
    reason = backends.refuse("cuda", x.cuda(), x.cuda())
    assert backends.select("auto", x.cuda(), x.cuda()) == ("cuda" if reason is None else "triton"), reason
