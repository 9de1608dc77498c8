"""The logits of a head in plain PyTorch."""

import torch
from torch import Tensor


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None,
    row_scale: Tensor, vocab_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """softcap * tanh(scale * (hidden weight^T + bias) / softcap) in `dtype`, of [outer, inner, H]: the definition.

    Of the first `vocab_size` classes; the weights of others may be anything.
    """
    kept = (row_scale != 0).view(hidden.shape[:-1])[..., None]
    hidden = torch.where(kept, hidden.to(dtype), 0)  # a skipped row may hold anything
    weight, bias = (x if x is None else x[:vocab_size].to(dtype) for x in (weight, bias))
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
