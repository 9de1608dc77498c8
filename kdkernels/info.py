"""`python -m kdkernels.info`: says which backends serve this machine and, for every other backend, the reason."""

import platform
import sys
from importlib import metadata

import torch

from . import __version__, backends


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def backend_lines() -> list[tuple[str, str]]:
    """Each backend with "available" or the reason that it is not, for CPU tensors and, on a machine with a GPU, for GPU
    tensors.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = []
    for name in backends.NAMES:
        for device in devices:
            x = torch.empty(1, 1, device=device)
            reason = backends.refuse(name, x, x)
            lines.append((f"{name} on {device}", reason or "available"))
    return lines


def native_lines() -> list[tuple[str, str]]:
    """How the compiled module was built, or why it is missing."""
    from .backends import native

    built = native.build_record()
    if native.missing_because is not None:
        reason = built.get("native_missing_because")
        return [("native build", reason)] if reason else []
    isas = ", ".join(built.get("cpu_isas", []))
    lines = [("cpu kernels", f"{native._native.cpu_isa} (built: {isas}; KDKERNELS_CPU_ISA forces one)")]
    if native.cuda_missing_because is not None:
        return [*lines, ("cuda kernels", f"not built: {native.cuda_missing_because}")]
    archs, left_out = ", ".join(built.get("cuda_archs", [])), built.get("cuda_archs_left_out", [])
    made = f"built for {archs} by nvcc {built.get('nvcc')} (KDKERNELS_CUDA_ARCHS, set for the build, chooses)"
    if left_out:
        made += f"; not for {', '.join(left_out)}, which that nvcc does not know"
    return [*lines, ("cuda kernels", made)]


def report() -> str:
    lines = [
        ("kdkernels", __version__),
        ("torch", torch.__version__),
        ("triton", version("triton")),
        ("python", f"{sys.version.split()[0]} on {platform.machine()}"),
    ]
    lines += [(f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    lines += backend_lines() + native_lines()
    x = torch.empty(1, 1)
    lines.append(("auto on cpu", backends.select("auto", x, x)))
    if torch.cuda.is_available():
        lines.append(("auto on cuda", backends.select("auto", x.cuda(), x.cuda())))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


if __name__ == "__main__":
    print(report())
