"""Builds the kernels in place, with the CUDA kernels for the card that is present. Fails if they were not built.

On a CPU it builds the execution model of the CUDA kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import torch

VARIANTS = {"90": "90a"}  # as the wheels have it (CUDA_ARCHS in setup.py)


def build() -> int:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print(f"expected an NVIDIA GPU that torch can use; torch {torch.__version__} finds none")
        return 1
    number = "".join(map(str, torch.cuda.get_device_capability()))
    archs = os.environ.get("KDKERNELS_CUDA_ARCHS") or VARIANTS.get(number, number)
    print(f"{torch.cuda.get_device_name()}: building for {archs}", flush=True)
    environment = {**os.environ, "KDKERNELS_CUDA_ARCHS": archs, "KDKERNELS_REQUIRE_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code = subprocess.run(command, cwd=cases.ROOT, env=environment).returncode
    return code or check(cases.ROOT / "kdkernels" / "_build.json")


def check(record: Path) -> int:
    """Reads the record of the build. A build may end well without CUDA kernels."""
    built = json.loads(record.read_text())
    reason = built.get("native_missing_because") or built.get("cuda_missing_because")
    if reason or not built.get("cuda_archs"):
        print(f"the CUDA kernels were not built: {reason or f'{record} names no architecture'}")
        return 1
    print(f"built for {' '.join(built['cuda_archs'])} by nvcc {built.get('nvcc')}")
    return 0


def main(words: list[str] | None = None) -> int:
    given = cases.parser(__doc__).parse_args(words)
    if given.device == "cuda":
        return build()
    with cases.serving(given.backend, given.device):
        print("built the execution model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
