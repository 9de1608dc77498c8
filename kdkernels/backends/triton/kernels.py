"""The functions that implement the operators, for ops.py and for the chunk loop of families/linear.py."""

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
    "row_floats",
    "row_gradient",
    "row_sums",
    "rows",
    "scale_",
    "sinkhorn",
    "softcap_",
    "softcap_gradient_",
    "topk",
    "topk_rows",
    "uld",
]
