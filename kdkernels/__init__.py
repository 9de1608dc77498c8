"""The loss layer of knowledge distillation at vocabulary scale."""

from . import nn
from .distributions import LinearLogits, SparseLogProbs
from .divergences import CATALOGUE, Divergence
from .families.budget import chunk_budget
from .families.options import checks
from .losses.class_ot import fused_class_ot
from .losses.divergence import fused_divergence, fused_js, fused_kl
from .losses.next_token import next_token_labels, next_token_mask
from .losses.normalizer import global_normalizer, reduce_rows
from .losses.options import LossOutput
from .losses.sinkhorn import SinkhornOutput, fused_sinkhorn, fused_sinkhorn_divergence, fused_sinkhorn_kd
from .losses.uld import fused_uld
from .teachers.extract import sampled_log_probs, topk_log_probs

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
    "global_normalizer",
    "next_token_labels",
    "next_token_mask",
    "nn",
    "reduce_rows",
    "sampled_log_probs",
    "topk_log_probs",
]
