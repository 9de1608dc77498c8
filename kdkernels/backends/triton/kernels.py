"""Triton's functions behind the interface of families/kernels.py."""

from ...families.sinkhorn import plan_gradient
from ...families.topk import sorted_entries
from .linear import accumulate_, empty, softcap_, softcap_gradient_
from .pairwise import pairwise_costs, pairwise_gradient
from .rows import row_floats, row_gradient, row_sums, rows, scale_
from .sinkhorn import sinkhorn
from .topk import topk
from .topk_rows import topk_rows
from .uld import uld

__all__ = [
    "accumulate_",
    "empty",
    "pairwise_costs",
    "pairwise_gradient",
    "plan_gradient",
    "row_floats",
    "row_gradient",
    "row_sums",
    "rows",
    "scale_",
    "sinkhorn",
    "softcap_",
    "softcap_gradient_",
    "sorted_entries",
    "topk",
    "topk_rows",
    "uld",
]
