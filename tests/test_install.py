"""`pip install .` without a compiler: the package is there, and says what is missing and why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("CXX", "/nowhere/g++", "/nowhere/g++"), ("KDKERNELS_NO_NATIVE", "1", "KDKERNELS_NO_NATIVE=1 was set")],
)
def test_installs_without_a_compiler(tmp_path, variable, value, reason):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".venv*", ".git", "build", "*.so", "_build.json", "results")
    )
    target = tmp_path / "target"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", target, source],
        env={**os.environ, variable: value}, check=True, capture_output=True,
    )  # fmt: skip
    code = (
        # An editable installation of this repository would lend its compiled module.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
        "import torch, kdkernels; from kdkernels import info; print(info.report()); print(kdkernels.__file__); "
        "s = torch.randn(2, 5, requires_grad=True); kdkernels.fused_js(s, s.detach() + 1).backward(); print(s.grad)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(target)}, cwd=tmp_path,
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(target) in out
    assert reason in out and "auto on cpu       reference" in out
