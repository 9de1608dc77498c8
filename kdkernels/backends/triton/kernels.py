"""The functions of every family that implement the operators (ops.py, and the loop of ../linear.py)."""

from .linear import accumulate_, empty, softcap_, softcap_gradient_
from .rows import row_floats, row_gradient, row_sums, rows, scale_
from .topk import topk, topk_rows

__all__ = [
    "accumulate_",
    "empty",
    "row_floats",
    "row_gradient",
    "row_sums",
    "rows",
    "scale_",
    "softcap_",
    "softcap_gradient_",
    "topk",
    "topk_rows",
]
