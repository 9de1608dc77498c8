"""The loss layer of knowledge distillation at vocabulary scale."""

from . import nn
from .backends import checks
from .backends.linear import chunk_budget
from .distributions import LinearLogits, SparseLogProbs
from .divergences import CATALOGUE, Divergence
from .functional import LossOutput, fused_divergence, fused_js, fused_kl, next_token_labels
from .teachers import sampled_log_probs, topk_log_probs

__version__ = "0.1.0"

__all__ = [
    "CATALOGUE",
    "Divergence",
    "LinearLogits",
    "LossOutput",
    "SparseLogProbs",
    "checks",
    "chunk_budget",
    "fused_divergence",
    "fused_js",
    "fused_kl",
    "next_token_labels",
    "nn",
    "sampled_log_probs",
    "topk_log_probs",
]
