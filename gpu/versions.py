"""The machine of a visit: driver, card, compilers and packages, and what is missing for which step."""

import importlib.util
import os
import platform
import subprocess
import sys
from importlib import metadata

from tools import found

PROGRAMS = (
    "nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit "
    "--format=csv",
    "rocm-smi --showproductname --showdriverversion",
    "nvcc --version",
    f"{os.environ.get('CXX', 'g++')} --version",
    "ncu --version",
    "compute-sanitizer --version",
)
PACKAGES = ("torch", "triton", "setuptools", "pybind11", "ninja", "numpy", "pytest", "hypothesis", "filelock")
NEEDED = {
    "pybind11": "the build",
    "ninja": "the build (a program of that name serves too)",
    "setuptools": "the build",
    "triton": "the backend triton",
    "pytest": "the step gpu-tests",
    "hypothesis": "the step gpu-tests",
    "filelock": "the step gpu-tests",
}


def printed(command: str) -> str:
    program, *arguments = command.split()
    path = found(program)
    if path is None:
        return f"{program}: not found"
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=8, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program}: {error}"
    lines = [line for line in (done.stdout + done.stderr).split("\n") if line.strip()]
    return f"{path}\n" + "\n".join(f"    {line}" for line in lines[:12])


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed" if importlib.util.find_spec(package) is None else "installed, of unknown version"


def main() -> int:
    print(f"{platform.platform()}, {os.cpu_count()} processors, Python {sys.version.split()[0]} at {sys.executable}")
    for command in PROGRAMS:
        print(printed(command))
    print("packages:", ", ".join(f"{package} {version(package)}" for package in PACKAGES))
    for package, purpose in NEEDED.items():
        if importlib.util.find_spec(package) is None and not (package == "ninja" and found("ninja")):
            print(f"missing: {package}, for {purpose}")
    if importlib.util.find_spec("torch") is None:
        print("missing: torch, for every step")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
