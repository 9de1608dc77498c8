"""The families of losses: each family's problem, and the code that all backends share."""

from . import class_ot, linear, rows, sinkhorn, topk, uld

__all__ = ["class_ot", "linear", "rows", "sinkhorn", "topk", "uld"]
