"""The base class of the native kernels' families; `Cpu` and `Cuda` (in __init__) implement its launch."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Launcher(ABC):
    @abstractmethod
    def launch(self, kernel: str, device: torch.device, fields: dict) -> None:
        """Runs a kernel on tensors of the device. csrc/calls has the fields of each kernel's call; csrc/calls/types.h
        has the kinds of values that the fields take.
        """

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """An uninitialised tensor."""
        return torch.empty(shape, dtype=dtype, device=device)

    def gradient_target(self, student: Tensor, gradient: bool, out: Tensor | None = None) -> Tensor:
        """The tensor that takes the student's gradient: `out`, or a fresh tensor; an empty one without a gradient."""
        if not gradient:
            assert out is None, "out takes a gradient"
            return student.new_empty(0)
        if out is None:
            return self.empty(*student.shape, dtype=student.dtype, device=student.device)
        assert out.is_contiguous(), "out is contiguous"
        assert (out.shape, out.dtype, out.device) == (student.shape, student.dtype, student.device), "as the student"
        return out
