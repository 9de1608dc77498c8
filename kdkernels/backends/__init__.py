"""Which backend serves a call, and why another does not.

A backend says why it cannot serve a call's tensors (`refuse`), and has one function per operator (`kernels`; see
ops.py). Nothing here imports a backend before it is needed.
"""

import torch

# Tried in this order by backend="auto".
NAMES = ("cpu", "cuda", "triton", "reference")
# Those that run GPU kernels: what runs them on a CPU (an interpreter, a model in the tests) is slower than the
# reference there, and serves only a call that names them.
_GPU = ("cuda", "triton")


def refuse(name: str, student: torch.Tensor, teacher: torch.Tensor, points: int = 0) -> str | None:
    """Why backend `name` cannot serve these tensors, or None. `points`: of the larger side of a transport problem."""
    if name == "reference":
        return None
    if name in ("cpu", "cuda"):
        from . import native

        return native.refuse(name, student, teacher, points)
    if name == "triton":
        from . import triton

        return triton.refuse(student, teacher, points)
    raise ValueError(f"unknown backend {name!r}; expected 'auto' or one of {', '.join(map(repr, NAMES))}")


def select(name: str, student: torch.Tensor, teacher: torch.Tensor, points: int = 0) -> str:
    """The backend that serves this call: `name` itself, or for "auto" the first that does not refuse."""
    if name == "auto":
        for candidate in NAMES:
            modelled = candidate in _GPU and student.device.type == "cpu"
            if not modelled and refuse(candidate, student, teacher, points) is None:
                return candidate
    reason = refuse(name, student, teacher, points)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve this call: {reason}")
    return name


def kernels(name: str):
    """What has the functions that implement the operators for a backend."""
    if name in ("cpu", "cuda"):
        from . import native

        return native.KERNELS[name]
    if name == "triton":
        from .triton import kernels

        return kernels
    raise ValueError(f"backend {name!r} implements no operators")
