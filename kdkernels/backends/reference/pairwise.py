"""Costs between pairs of distributions in plain PyTorch."""

import torch
from torch import Tensor


def pairwise_costs(p: Tensor, q: Tensor, cost: str) -> Tensor:
    """The costs [..., n, m] between distributions [..., n, V] and [..., m, V]."""
    if cost in ("l1", "l2"):
        difference = p[..., :, None, :] - q[..., None, :, :]
        if cost == "l1":
            return difference.abs().sum(-1)
        squares = (difference**2).sum(-1)
        return torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).sqrt())
    products = p @ q.transpose(-1, -2)
    if cost == "dot":
        return 1 - products
    return (p**2).sum(-1)[..., :, None] + (q**2).sum(-1)[..., None, :] - 2 * products
