"""The definition of every loss in plain PyTorch, one file per family. Tests compare the kernels with it.

It has one function per family. The function takes the family's problem and returns the losses, which autograd
differentiates, and the detached results. It has no operators: nothing here goes through torch.library.
"""

from .class_ot import class_ot
from .linear import chunked_rows, empty, softcap_, topk_log_probs
from .rows import rows
from .sinkhorn import sinkhorn, sinkhorn_kd
from .uld import uld

__all__ = [
    "chunked_rows",
    "class_ot",
    "empty",
    "rows",
    "sinkhorn",
    "sinkhorn_kd",
    "softcap_",
    "topk_log_probs",
    "uld",
]
