"""Warnings that show the user's line: the innermost one that is neither this package's nor torch's."""

import os
import sys
import warnings

import torch

_INSIDE = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, torch.__file__))


def warn(text: str, kind: type[Warning] = RuntimeWarning) -> None:
    """Warns at the call of the package, or at the backward, that led here."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    seen = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__")
    warnings.warn_explicit(text, kind, frame.f_code.co_filename, frame.f_lineno, name, seen)


def _is_inside(file: str) -> bool:
    return file.startswith((*_INSIDE, "<frozen importlib"))


def in_worker() -> bool:
    """Whether this process is a worker of a DataLoader: a loader starts new ones in each epoch."""
    return torch.utils.data.get_worker_info() is not None
