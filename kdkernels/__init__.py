"""The loss layer of knowledge distillation at vocabulary scale."""

from . import nn
from .backends import checks
from .backends.chunks import chunk_budget
from .class_ot import fused_class_ot
from .distributions import LinearLogits, SparseLogProbs
from .divergences import CATALOGUE, Divergence
from .functional import fused_divergence, fused_js, fused_kl, next_token_labels
from .options import LossOutput
from .teachers import sampled_log_probs, topk_log_probs
from .transport import SinkhornOutput, fused_sinkhorn, fused_sinkhorn_divergence, fused_sinkhorn_kd
from .uld import fused_uld

__version__ = "0.1.0"

__all__ = [
    "CATALOGUE",
    "Divergence",
    "LinearLogits",
    "LossOutput",
    "SinkhornOutput",
    "SparseLogProbs",
    "checks",
    "chunk_budget",
    "fused_class_ot",
    "fused_divergence",
    "fused_js",
    "fused_kl",
    "fused_sinkhorn",
    "fused_sinkhorn_divergence",
    "fused_sinkhorn_kd",
    "fused_uld",
    "next_token_labels",
    "nn",
    "sampled_log_probs",
    "topk_log_probs",
]
