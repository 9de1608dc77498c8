"""The kernels of csrc/, CPU and CUDA: loads the compiled module and launches its kernels, with a call's fields by name.

`cpu` and `cuda` have one function per operator (see ops.py), with one file per family. They differ in how they launch
and in which tensors they refuse.
"""

import functools

import torch
from torch import Tensor

from ... import callers
from ...families.options import check_values
from ...forks import has_lost_threads
from .linear import CpuLinearKernels, LinearKernels
from .module import build_record, find, load
from .pairwise import PairwiseKernels
from .rows import RowKernels
from .sinkhorn import CpuSinkhornKernels, SinkhornKernels
from .threads import count_threads
from .topk import CpuTopkKernels, TopkKernels
from .uld import RankedUldKernel, UldKernel

_native, missing_because = load()


def warn_once() -> None:
    """Says why the native kernels are missing, once per process and not in the workers of a DataLoader."""
    if _native is None and not callers.in_worker():
        _warn(missing_because)


@functools.cache
def _warn(reason: str) -> None:
    callers.warn(
        f"kdkernels goes without its native kernels: {reason}. Tensors on a CPU take the reference, which is several "
        'times slower. `python -m kdkernels.info` says more; backend="reference" asks for the reference, unwarned',
        UserWarning,
    )


# While a compiler traces a call, it runs the function (as `_cuda_device_refusal`, below).
warn_once._dynamo_marked_constant = True

# A module that is here and does not serve is a fault on every device. Without a module, backends.select warns.
if _native is None and find() is not None:
    warn_once()

# Why the module has no CUDA kernels, or None. Read at import, since a compiler that traces `refuse` cannot read files.
cuda_missing_because = None
if not hasattr(_native, "cuda_rows"):
    cuda_missing_because = build_record().get("cuda_missing_because") or "the build gave no reason"

_HUGE_PAGE = 2 << 20
_MOST_POINTS = 2048  # on a side of a transport problem, whose vectors must fit the shared memory of a block
_POINTS_OF_ANY_DEVICE = 1024  # some devices have less shared memory than 2,048 points take


def processors() -> int:
    """The processors that the calling thread may use, or 0 in a process that must start no threads."""
    return 0 if has_lost_threads() else _native.processors()


def refuse(name: str, student: Tensor, teacher: Tensor, points: int = 0) -> str | None:
    """Why "cpu" or "cuda" cannot serve these tensors, or None. `points`: the larger side of a transport problem."""
    return KERNELS[name].refuse(student, teacher, points)


class Cpu(RowKernels, CpuLinearKernels, CpuTopkKernels, PairwiseKernels, CpuSinkhornKernels, UldKernel):
    def refuse(self, student: Tensor, teacher: Tensor, points: int = 0) -> str | None:
        if _native is None:
            return _missing()
        if student.device.type != "cpu" or teacher.device.type != "cpu":
            return f"it takes CPU tensors; got student on {student.device} and teacher on {teacher.device}"
        return None

    def launch(self, kernel: str, device: torch.device, fields: dict) -> None:
        """Runs a kernel. Raises if a kept row has an invalid label, temperature or hard weight."""
        if getattr(_native, f"cpu_{kernel}")(fields, _cpu_bytes, count_threads(processors)):
            check_values(fields["options"], fields["columns"])
            raise RuntimeError("the kernel refused a row option that check_values accepts; expected both to agree")

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """An uninitialised tensor; the kernel is advised to use huge pages for a large one."""
        out = torch.empty(shape, dtype=dtype, device=device)
        if out.nbytes >= _HUGE_PAGE:
            _native.advise_huge_pages(out.data_ptr(), out.nbytes)
        return out


class Cuda(RowKernels, LinearKernels, TopkKernels, PairwiseKernels, SinkhornKernels, RankedUldKernel):
    """Launches on the current stream of the tensors' device; the host waits for nothing.

    The tests run the kernels on a CPU, through a module that a host compiler makes from the same files: they set
    `module` to it and `device_type` to "cpu". "auto" never chooses that.
    """

    module = None  # None: the compiled module
    device_type = "cuda"

    def compiled(self):
        """The module with the functions to launch."""
        return _native if self.module is None else self.module

    def refuse(self, student: Tensor, teacher: Tensor, points: int = 0) -> str | None:
        reason, device = self.refuse_tensors(student, teacher, points), student.device.index or 0
        reason = reason or _cuda_device_refusal(device)
        if not reason and points > _POINTS_OF_ANY_DEVICE and self.device_type == "cuda":
            reason = _refuse_points(device, points)
        return reason or None

    def refuse_tensors(self, student: Tensor, teacher: Tensor, points: int = 0) -> str | None:
        """The reason that no device could change, or None."""
        if self.module is None:
            if _native is None:
                return _missing()
            if cuda_missing_because is not None:
                return f"the native module was built without CUDA kernels ({cuda_missing_because})"
            if torch.version.hip is not None:
                return "it takes tensors of an NVIDIA GPU, and this torch is a ROCm build; triton serves there"
        if student.device != teacher.device or student.device.type != self.device_type:
            return (
                f"it takes tensors on one {self.device_type} device; "
                f"got student on {student.device} and teacher on {teacher.device}"
            )
        if torch.float64 in (student.dtype, teacher.dtype):
            return "its arithmetic is fp32; for fp64 use reference, or cpu for tensors on a CPU"
        if points > _MOST_POINTS:
            return f"it takes transport problems of at most {_MOST_POINTS} points a side; got {points}"
        return None

    def launch(self, kernel: str, device: torch.device, fields: dict) -> None:
        function = getattr(self.compiled(), f"cuda_{kernel}")
        allocate = functools.partial(torch.empty, dtype=torch.uint8, device=device)
        if self.device_type == "cpu":
            function(fields, allocate, 0, 0)
            return
        with torch.cuda.device(device):
            function(fields, allocate, device.index, torch.cuda.current_stream(device).cuda_stream)


cpu, cuda = Cpu(), Cuda()
KERNELS = {"cpu": cpu, "cuda": cuda}


@functools.cache
def _asked_once(module, device: int) -> str:
    return module.cuda_refusal(device)


def _cuda_device_refusal(device: int) -> str:
    return _asked_once(cuda.compiled(), device)


# The mark of torch.compiler.assume_constant_result, which itself would import the compiler (1.2 s, and Triton): while a
# compiler traces a call, it runs this function and takes the answer as a constant.
_cuda_device_refusal._dynamo_marked_constant = True


def _refuse_points(device: int, points: int) -> str | None:
    """A block holds 9 numbers of each point of both sides, and 2 more of each point of a side: see `plan_sinkhorn` in
    csrc/cuda/sinkhorn.cu.
    """
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    most = (shared - 1024) // (4 * (2 * 9 + 2))
    return f"this device's shared memory holds {most} points a side; got {points}" if points > most else None


_refuse_points._dynamo_marked_constant = True


def warn_if_passed_over(student: Tensor, teacher: Tensor, points: int = 0) -> None:
    """Says once per process why an NVIDIA GPU does not run the CUDA kernels that were built: an old driver, say."""
    if cuda.refuse_tensors(student, teacher, points) is None:
        reason = _cuda_device_refusal(student.device.index or 0)
        if reason:
            _warn_of_device(reason)


@functools.cache
def _warned_of_device(reason: str) -> None:
    callers.warn(
        f"kdkernels passes over its CUDA kernels on this GPU: {reason}. `python -m kdkernels.info` says which backend "
        "serves; a call that names its backend does not warn"
    )


def _warn_of_device(reason: str) -> None:
    _warned_of_device(reason)


_warn_of_device._dynamo_marked_constant = True  # as `_cuda_device_refusal`


def _missing() -> str:
    return f"the native module is missing ({missing_because}); `python -m kdkernels.info` says more"


def _cpu_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
