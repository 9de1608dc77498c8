"""Chooses the backend that serves a call, and says why another backend does not.

A backend says why it cannot serve a call's tensors (`refuse`), and has one function per operator (`kernels`; see
ops.py). This module imports a backend only when a call needs it.
"""

import torch

from .. import forks  # noqa: F401, imported before the process forks

# Tried in this order by backend="auto".
NAMES = ("cpu", "cuda", "triton", "reference")
# GPU backends. They can run on CPU tensors (Triton's interpreter, the tests' CUDA model), but slower than the
# reference, so "auto" skips them there.
_GPU = ("cuda", "triton")


def refuse(name: str, student: torch.Tensor, teacher: torch.Tensor, points: int = 0) -> str | None:
    """Why backend `name` cannot serve these tensors, or None. `points`: the larger side of a transport problem."""
    if name == "reference":
        return None
    if name in ("cpu", "cuda"):
        from . import native

        return native.refuse(name, student, teacher, points)
    if name == "triton":
        from . import triton

        return triton.refuse(student, teacher, points)
    raise ValueError(f"unknown backend {name!r}; expected 'auto' or one of {', '.join(map(repr, NAMES))}")


def automatic(student: torch.Tensor, teacher: torch.Tensor, points: int = 0) -> str:
    """The backend of "auto": the first that does not refuse."""
    for candidate in NAMES:
        modelled = candidate in _GPU and student.device.type == "cpu"
        if not modelled and refuse(candidate, student, teacher, points) is None:
            return candidate
    raise AssertionError("the reference refuses nothing")


def select(name: str, student: torch.Tensor, teacher: torch.Tensor, points: int = 0) -> str:
    """The backend that serves this call: `name` itself, or the backend of "auto".

    Warns once per process, and not in the workers of a DataLoader, if "auto" is the reference because the CPU's kernels
    are missing, or another backend than "cuda" because an NVIDIA GPU does not run the CUDA kernels that were built.
    """
    if name == "auto":
        from . import native

        name = automatic(student, teacher, points)
        if name == "reference" and student.device.type == teacher.device.type == "cpu":
            native.warn_once()
        elif name != "cuda" and student.device.type == "cuda":
            native.warn_if_passed_over(student, teacher, points)
        return name
    reason = refuse(name, student, teacher, points)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve this call: {reason}")
    return name


def kernels(name: str):
    """The functions that implement a backend's operators; for "reference", its function of each family."""
    if name in ("cpu", "cuda"):
        from . import native

        return native.KERNELS[name]
    if name == "triton":
        from .triton import kernels

        return kernels
    from . import reference

    return reference
