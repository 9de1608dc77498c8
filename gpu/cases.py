"""Cases that the scripts of a visit run: drawn logits, a loss with its gradient, the comparison with fp64.

An error is a fraction of the allowed one, as in `kdkernels.selftest`: 1 or more is wrong.
"""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import kdkernels
from kdkernels.selftest import part, tolerance

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
FACTOR = 2  # of the loss before backward, so that a gradient kept from the forward call is scaled
COMPARED = {"cuda": 2**22, "cpu": 2**20}  # elements of the logits whose reference is computed at a time


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--backend", choices=["cuda", "triton", "cpu"], default="cuda")
    return options


def serving(backend: str, device: str):
    """A context in which the backend serves tensors of the device. The execution model serves as "cuda" on a CPU."""
    if (backend, device) != ("cuda", "cpu"):
        return contextlib.nullcontext()
    sys.path.append(str(ROOT / "tests"))
    import emulated

    return emulated.serving()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


class Cases:
    """Runs cases one after the other. A case's name is printed before the case runs, so that a hang shows its name.

    A RuntimeError whose text contains `refusal` is no error: the case is refused and not counted.
    """

    def __init__(self, device: str, refusal: str | None = None):
        self.device, self.refusal, self.start = device, refusal, time.perf_counter()
        self.count, self.wrong, self.refusals = 0, [], []

    def run(self, name: str, errors: Callable[..., tuple[float, ...]], *arguments) -> None:
        print(f"{time.perf_counter() - self.start:6.1f} s  {name} ...", end=" ", flush=True)
        try:
            found = errors(*arguments)
            synchronize(self.device)
        except Exception as error:
            self.take(name, error)
            return
        self.count += 1
        right = all(0 <= error < 1 for error in found)
        if not right:
            self.wrong.append(name)
        print("right" if right else "WRONG", *(f"{error:.2g}" for error in found), flush=True)

    def take(self, name: str, error: Exception) -> None:
        text = str(error)
        if self.refusal and isinstance(error, RuntimeError) and self.refusal in text:
            self.refusals.append(text)
            print(f"refused: {text}", flush=True)
            return
        self.count += 1
        self.wrong.append(name)
        print(f"RAISED {type(error).__name__}: {text[:500]}", flush=True)

    def conclude(self) -> int:
        """Prints the count and the wrong cases; returns the exit code."""
        for name in self.wrong:
            print(f"WRONG: {name}")
        refused = f"; {len(self.refusals)} were refused" if self.refusals else ""
        print(f"{self.count - len(self.wrong)} of {self.count} cases are right{refused}")
        return 1 if self.wrong or not self.count else 0


def drawn(rows: int, columns: int, dtype: torch.dtype, device: str, is_shifted: bool = False):
    """Student and teacher logits. Shifted rows begin at odd elements and have an odd stride, so that hardly any row
    begins at a multiple of 16 bytes.
    """
    generator = torch.Generator(device).manual_seed(columns)
    stride = columns | 1 if is_shifted else columns

    def normal():
        flat = torch.randn(rows * stride + is_shifted, generator=generator, device=device)
        return flat[int(is_shifted) :].view(rows, stride)

    teacher = 2 * normal()
    student = teacher + normal()

    def stored(x):
        flat = torch.empty(rows * stride + is_shifted, dtype=dtype, device=device)
        return flat[int(is_shifted) :].view(rows, stride).copy_(x)[:, :columns]

    return stored(student), stored(teacher)


def loss_and_gradient(student, teacher, divergence: str, backend: str, **options):
    student = student.detach().requires_grad_()
    loss = kdkernels.fused_divergence(student, teacher, divergence, backend=backend, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, FACTOR))
    return loss.detach(), gradient


def against_reference(student, teacher, divergence: str, backend: str, gradients=("forward", "backward")):
    """The largest errors of the losses and of the gradients of all rows, over the modes of the gradient."""
    rows, columns = student.shape
    results = [loss_and_gradient(student, teacher, divergence, backend, gradient=mode) for mode in gradients]
    at_once = max(COMPARED[student.device.type] // columns, 1)
    worst = [0.0, 0.0]
    for first in range(0, rows, at_once):
        chunk = slice(first, first + at_once)
        pair = student[chunk].double(), teacher[chunk].double()
        loss, gradient = loss_and_gradient(*pair, divergence, "reference")
        allowed = tolerance(student.dtype) * gradient.abs().amax(-1, keepdim=True) + 4e-6
        for result in results:
            errors = part(result[0][chunk], loss, 1e-5 + 1e-6 * loss.abs()), part(result[1][chunk], gradient, allowed)
            worst = [larger(*pair) for pair in zip(worst, errors, strict=True)]
    return tuple(worst)


def larger(a: float, b: float) -> float:
    """The larger error; NaN is the largest."""
    return math.inf if math.isnan(a) or math.isnan(b) else max(a, b)
