"""The linear family, in place on contiguous tensors of any shape: csrc/calls/linear.h has the formulas."""

import torch
from torch import Tensor

from .launcher import Launcher


class LinearKernels(Launcher):
    def softcap_(self, logits: Tensor, cap: float) -> None:
        """logits = cap * tanh(logits / cap)"""
        assert logits.is_contiguous(), logits.stride()
        self.launch("softcap", logits.device, {"count": logits.numel(), "logits": logits, "cap": cap})

    def softcap_gradient_(self, gradient: Tensor, logits: Tensor, cap: float) -> None:
        """gradient *= 1 - (logits / cap)**2, for capped logits. A gradient of 0 stays 0, whatever its logit is."""
        assert gradient.is_contiguous() and logits.is_contiguous(), (gradient.stride(), logits.stride())
        assert (gradient.shape, gradient.dtype) == (logits.shape, logits.dtype), (gradient.dtype, logits.dtype)
        self.launch(
            "softcap_gradient",
            gradient.device,
            {"count": logits.numel(), "gradient": gradient, "logits": logits, "cap": cap},
        )

    def accumulate_(self, total: Tensor, part: Tensor) -> None:
        """total (fp32) += part (bf16 or fp16)"""
        total.add_(part)


class CpuLinearKernels(LinearKernels):
    def accumulate_(self, total: Tensor, part: Tensor) -> None:
        """total (fp32) += part (bf16 or fp16), at the speed of memory."""
        assert total.is_contiguous() and part.is_contiguous(), (total.stride(), part.stride())
        assert total.shape == part.shape and total.dtype == torch.float32, (total.shape, part.shape, total.dtype)
        assert part.dtype in (torch.bfloat16, torch.float16), part.dtype
        self.launch("accumulate", total.device, {"count": part.numel(), "total": total, "part": part})
