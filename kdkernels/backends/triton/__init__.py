"""The Triton backend: NVIDIA and AMD GPUs, and a CPU under TRITON_INTERPRET=1.

`refuse` answers without an import of Triton.
"""

import importlib.util
import os

import torch
from torch import Tensor

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# The most points on one side of a transport problem: a kernel holds a row of costs in the registers of one program.
MAX_POINTS = 1024


def refuse_points(points: int) -> str | None:
    if points > MAX_POINTS:
        return (
            f"it takes transport problems of at most {MAX_POINTS} points a side; got {points} "
            "(cpu, cuda and reference take more)"
        )
    return None


def refuse(student: Tensor, teacher: Tensor, points: int = 0) -> str | None:
    if not _INSTALLED:
        return "triton is not installed (pip install kdkernels[triton])"
    if torch.float64 in (student.dtype, teacher.dtype):
        return "its arithmetic is fp32; for fp64 use reference, or cpu for tensors on a CPU"
    for name, x in (("student", student), ("teacher", teacher)):
        if x.device.type != "cuda" and not (_INTERPRETED and x.device.type == "cpu"):
            return (
                f"it takes tensors on a GPU; got {name} on {x.device} "
                "(TRITON_INTERPRET=1, set before the import, runs it on a CPU, slowly)"
            )
    return refuse_points(points)
