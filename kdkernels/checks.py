"""Checks of plain numbers among the arguments of a call."""

import math
import reprlib

import torch

_LARGEST = torch.finfo(torch.float32).max


def check_number(name: str, value):
    """Raises unless the value is an int or a float that `check_size` lets pass."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, a constant of the model; got {type(value).__name__}")
    check_size(name, value)


def check_size(name: str, value: int | float):
    """Raises for a finite number beyond fp32's range, which fp64 calls have too, or an int beyond int64's.

    A traced number is not compared, which would make a guard.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int within int64's range; got {reprlib.repr(value)}")
    if isinstance(value, float) and _LARGEST < abs(value) < math.inf:
        raise ValueError(f"{name}: expected a number within fp32's range; got {value}")
