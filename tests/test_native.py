"""The compiled module: every instruction set is right, and is made of packed instructions."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from truth import rounding

from kdkernels.backends import native

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(native._native is None, reason=f"no native module: {native.missing_because}")


def isas() -> list[str]:
    """The instruction sets that this processor runs, the best first."""
    found = []
    for isa in ("avx512", "avx2", "baseline"):
        code = "from kdkernels import _native; print(_native.cpu_isa)"
        out = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "KDKERNELS_CPU_ISA": isa}, capture_output=True, text=True
        )
        if out.returncode == 0:
            assert out.stdout.strip() == isa
            found.append(isa)
    return found


ISAS = isas()
assert "baseline" in ISAS, "the module runs on no instruction set"


@pytest.mark.parametrize("isa", ISAS[1:])
def test_suite_passes_on_every_instruction_set(isa):
    """The best one runs in this process; the others run the CPU's property and edge tests in one of their own."""
    tests = [str(ROOT / "tests" / name) for name in ("test_rows.py", "test_edges.py")]
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "not triton and not reference", *tests],
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
    assert isa in out.stdout and "expected" in out.stdout


# Of each kernel's inner loops: an instruction that only packed code has.
PACKED = {
    "avx512": ["vfmadd[0-9]*ps.*zmm", "vmaxps.*zmm", "vsqrtps.*zmm", "vdivps.*zmm", "vcvtph2ps", "vcvtps2ph"],
    "avx2": ["vfmadd[0-9]*ps.*ymm", "vmaxps.*ymm", "vsqrtps.*ymm", "vdivps.*ymm", "vcvtph2ps", "vcvtps2ph"],
    "baseline": ["mulps.*xmm", "maxps.*xmm", "sqrtps.*xmm", "divps.*xmm"],
}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.parametrize("isa", [isa for isa in PACKED if isa in ISAS])
def test_inner_loops_are_packed(isa):
    """Without -fno-trapping-math a compiler leaves every select, and with it every loop, scalar."""
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
    # Every divergence's fp32 loop, one by one.
    packed = {"avx512": "ps.*zmm", "avx2": "ps.*ymm", "baseline": "ps .*xmm"}[isa]
    for name in native._native.divergences:
        struct = "".join(part.capitalize() for part in name.split("_"))
        mine = [
            body for head, body in functions.items() if f"divergence_sums<float, kdk::{isa}::{struct}<float>" in head
        ]
        assert mine, f"{name}: no loop of its own found in {isa}"
        assert all(len(re.findall(packed, body)) >= 6 for body in mine), f"{name} is not packed in {isa}"


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_exp_and_log_are_near_the_last_digit(scale):
    """Through statistics: lse, entropy and cross-entropy of fp32 logits against fp64."""
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
