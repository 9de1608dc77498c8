"""`pip install .` with a broken compiler, or with a broken CUDA compiler.

The package installs, and its report names the missing parts and the reason. tests/test_reports_install.py has the other
reasons, without installations.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from test_cuda_compile import build, fake_nvcc

ROOT = Path(__file__).parent.parent


def report_of_installation(folder: Path, **environment: str) -> str:
    """`python -m kdkernels.info` of a fresh installation, after a loss and its gradient."""
    source, target = folder / "source", folder / "target"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".venv*", ".git", "build", "*.so", "_build.json", "results")
    )
    (source / "build").touch()  # no folder can be made here
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", target, source],
        env={**os.environ, **environment}, check=True, capture_output=True,
    )  # fmt: skip
    code = (
        # Hides an editable installation of this repository, whose compiled module would be imported.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
        "import torch, kdkernels; from kdkernels import info; print(info.report()); print(kdkernels.__file__); "
        "s = torch.randn(2, 5, requires_grad=True); kdkernels.fused_js(s, s.detach() + 1).backward(); print(s.grad)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(target)}, cwd=folder,
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(target) in out
    return out


def test_installs_where_the_compiler_is_broken(tmp_path):
    cxx = tmp_path / "g++"
    cxx.write_text("#!/bin/sh\nprintf 'kaputt: \\325\\322\\n'; exit 1\n")  # not UTF-8
    cxx.chmod(0o755)
    out = report_of_installation(tmp_path, CXX=str(cxx))
    assert r"the compiler failed: kaputt: \xd5\xd2" in out and "auto on cpu       reference" in out


def test_installs_where_the_cuda_kernels_do_not_compile(tmp_path):
    nvcc, cxx = fake_nvcc(tmp_path / "nvcc", "80 90a 100 120"), tmp_path / "g++"
    # The bindings are compiled, without optimisation. The CPU kernels are those of this repository's build, if it has
    # compiled them since the last change.
    compiled = build.native_folder()
    changed = max(path.stat().st_mtime for path in (*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"))
    kept = [path.name for path in compiled.glob("*.o") if path.stat().st_mtime > changed and path.name != "bindings.o"]
    cxx.write_text(
        "#!/bin/sh\n"
        "for object; do :; done  # the last argument\n"
        f'case "$object" in {"|".join(kept) or "no object"}) exec cp "{compiled}/$object" "$object";; esac\n'
        f'exec {os.environ.get("CXX", "g++")} "$@" -O0\n'
    )
    cxx.chmod(0o755)
    out = report_of_installation(
        tmp_path, CXX=str(cxx), KDKERNELS_NVCC=nvcc, KDKERNELS_NO_CUDA="", KDKERNELS_CUDA_ARCHS=""
    )
    assert "cuda kernels      not built: the compiler failed: nvcc fatal   : this one only pretends" in out
    assert "auto on cpu       cpu" in out
