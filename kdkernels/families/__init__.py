"""A family's problem, and what every backend shares of it."""

from . import class_ot, linear, rows, sinkhorn, topk, uld

__all__ = ["class_ot", "linear", "rows", "sinkhorn", "topk", "uld"]
