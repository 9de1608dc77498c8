"""`python -m kdkernels.info`: says which backends serve this machine and, for every other backend, the reason.

The report is for machines on which something is wrong: a part of the report that fails says so in its place.
"""

import platform
import sys
import warnings
from collections.abc import Callable
from importlib import metadata

import torch

from . import __version__, backends

# Nightlies and ROCm builds of torch bring Triton under other names.
TRITONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu")


def version(*packages: str) -> str:
    """The version of the first of these packages that is installed."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def version_lines() -> list[tuple[str, str]]:
    return [
        ("kdkernels", __version__),
        ("torch", torch.__version__),
        ("triton", version(*TRITONS)),
        ("python", f"{sys.version.split()[0]} on {platform.machine()}"),
    ]


def gpu_lines() -> list[tuple[str, str]]:
    return [(f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]


def devices() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def backend_lines() -> list[tuple[str, str]]:
    """Each backend with "available" or the reason that it is not, for CPU tensors and, on a machine with a GPU, for GPU
    tensors.
    """
    lines = []
    for name in backends.NAMES:
        for device in devices():
            try:
                x = torch.empty(1, 1, device=device)
                reason = backends.refuse(name, x, x)
            except Exception as error:
                reason = in_words(error)
            lines.append((f"{name} on {device}", reason or "available"))
    return lines


def in_words(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}"


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


def auto_lines() -> list[tuple[str, str]]:
    tensors = {device: torch.empty(1, 1, device=device) for device in devices()}
    return [(f"auto on {device}", backends.automatic(x, x)) for device, x in tensors.items()]


def launches(call: Callable[[], object]) -> list[dict]:
    """The launches of CUDA kernels during call(), in order: kernel; way (halves, staged or streaming); cluster, its
    number of blocks; threads, and shared, the bytes of shared memory, of a block; grid, the number of blocks.

    The launches of other threads count too, because autograd runs backward on a thread of its own. Raises RuntimeError
    if no CUDA kernels are built.
    """
    from .backends import native

    module = native.cuda.compiled()
    if not hasattr(module, "record_launches"):
        raise RuntimeError(f"no CUDA kernels are here: {native.missing_because or native.cuda_missing_because}")
    module.record_launches(True)
    try:
        call()
    finally:
        found = module.record_launches(False)
    return found


def plan_lines(device: str = "cuda") -> list[tuple[str, str]]:
    """How the CUDA kernels are launched for 8 rows of kl with its gradient."""
    from . import fused_kl

    def line(dtype: torch.dtype) -> tuple[str, str]:
        student, teacher = torch.zeros(2, 8, 151_936, dtype=dtype, device=device)
        plan = launches(lambda: fused_kl(student.requires_grad_(), teacher, backend="cuda"))[0]
        text = "{way}, clusters of {cluster}, {threads} threads and {shared:,} bytes a block, grid {grid}"
        name = str(dtype).removeprefix("torch.")
        return f"plan, {name}", f"{text.format(**plan)} (kl, 151,936 classes; KDKERNELS_PLAN forces one)"

    if device not in devices():
        return []
    x = torch.empty(1, 1, device=device)
    return [line(torch.bfloat16), line(torch.float32)] if backends.refuse("cuda", x, x) is None else []


def report() -> str:
    lines = []
    for part in (version_lines, gpu_lines, backend_lines, native_lines, auto_lines, plan_lines):
        try:
            lines += part()
        except Exception as error:
            lines.append((part.__name__.replace("_", " "), in_words(error)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the report has the reasons
    sys.stdout.reconfigure(errors="backslashreplace")  # a reason may hold a path in another encoding
    print(report())
