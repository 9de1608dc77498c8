"""`python -m kdkernels.info`: which backends are here and, for one that is not, why."""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, backends


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def build() -> dict:
    """What setup.py wrote when the package was built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {"native_missing_because": "no build has run here"}


def backend_lines() -> list[tuple[str, str]]:
    """Each backend with "available" or the reason it is not, for CPU tensors and, where there is a GPU, for its own."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = []
    for name in backends.NAMES:
        for device in devices:
            x = torch.empty(1, 1, device=device)
            reason = backends.refuse(name, x, x)
            lines.append((f"{name} on {device}", reason or "available"))
    return lines


def report() -> str:
    from .backends import native

    built = build()
    lines = [
        ("kdkernels", __version__),
        ("torch", torch.__version__),
        ("triton", version("triton")),
        ("python", f"{sys.version.split()[0]} on {platform.machine()}"),
    ]
    lines += [(f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    lines += backend_lines()
    if native.missing_because is None:
        isas = ", ".join(built.get("cpu_isas", []))
        lines.append(("cpu kernels", f"{native._native.cpu_isa} (built: {isas}; KDKERNELS_CPU_ISA forces one)"))
    elif built.get("native_missing_because"):
        lines.append(("native build", built["native_missing_because"]))
    x = torch.empty(1, 1)
    lines.append(("auto on cpu", backends.select("auto", x, x)))
    if torch.cuda.is_available():
        lines.append(("auto on cuda", backends.select("auto", x.cuda(), x.cuda())))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


if __name__ == "__main__":
    print(report())
