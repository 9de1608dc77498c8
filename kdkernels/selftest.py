"""`python -m kdkernels.selftest [--device cuda]`: every kernel of every backend here against the reference in fp64.

One table; exit code 1 when a kernel is wrong, or when there was none to check. It needs torch alone, so it can be run
wherever the package is installed.
"""

import argparse
import sys

import torch

from . import backends
from .divergences import CATALOGUE
from .functional import fused_divergence
from .options import STATISTICS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd and aligned widths, one tile and many; the last row is dropped and holds NaN.
WIDTHS = (1, 1000, 50_001)
INTERPRETED_WIDTHS = (1, 1000, 5001)


def tolerance(dtype: torch.dtype) -> float:
    """Of a gradient, relative to the largest element of its row: fp32 arithmetic, one rounding to the dtype."""
    return {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]


def one_call(student, teacher, divergence, options, backend, gradient):
    student = student.detach().requires_grad_()
    out = fused_divergence(student, teacher, divergence, backend=backend, gradient=gradient, **options)
    (2 * out.loss).sum().backward()  # a factor, so that a gradient kept from the forward call is scaled
    return out.loss.detach(), student.grad, out.statistics


def errors(divergence: str, dtype: torch.dtype, width: int, device: str, backend: str) -> tuple[float, float, float]:
    """Largest errors of loss, gradient and statistics, with every row option in use, as parts of the tolerance."""
    generator = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows, padded = 5, width + 3
    student, teacher = (3 * normal(rows, padded)).to(device, dtype), (3 * normal(rows, padded)).to(device, dtype)
    student[-1], teacher[-1] = torch.nan, torch.nan
    student[:, width:], teacher[:, width:] = torch.nan, torch.nan
    if width > 2:
        student[1, 2], teacher[1, 2] = -torch.inf, -torch.inf
    options = {
        "temperature": torch.tensor([0.7, 1.0, 1.0, 2.0, 1.0], device=device),
        "mask": torch.tensor([True, True, True, True, False], device=device),
        "row_weight": torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0], device=device),
        "labels": torch.randint(0, width, (rows,), generator=generator).to(device),
        "hard_weight": torch.tensor([0.0, 0.0, 0.3, 1.0, 0.0], device=device),
        "vocab_size": width,
        "statistics": STATISTICS,
        "reduction": "none",
    }
    double = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
              for name, x in options.items()}  # fmt: skip
    want = one_call(student.double(), teacher.double(), divergence, double, "reference", "auto")
    worst = [0.0, 0.0, 0.0]
    for gradient in ("forward", "backward"):
        got = one_call(student, teacher, divergence, options, backend, gradient)
        # A slope is made of log-ratios of order 10, whose rounding stays where they cancel.
        allowed = tolerance(dtype) * want[1].abs().amax(-1, keepdim=True) + 4e-6
        found = (
            ((got[0] - want[0]).abs() / (1e-5 + 1e-6 * want[0].abs())).max(),
            ((got[1].double() - want[1]).abs() / allowed).nan_to_num(torch.inf).max(),
            max(((got[2][s] - want[2][s]).abs() / (1e-4 + 1e-5 * want[2][s].abs())).max() for s in STATISTICS),
        )
        worst = [max(a, float(b)) for a, b in zip(worst, found, strict=True)]
    return tuple(worst)


def check(device: str) -> bool:
    x = torch.empty(1, 1, device=device)
    served = []
    for name in backends.NAMES:
        reason = backends.refuse(name, x, x)
        if name == "reference":
            continue
        print(f"{name:10} " + ("checked below" if reason is None else f"not checked: {reason}"))
        if reason is None:
            served.append(name)
    if not served:
        print("no backend but the reference serves here: nothing was checked")
        return False
    print(f"\nerrors on {device}, in parts of what is allowed (1.00 fails)")
    print(f"{'backend':8} {'divergence':16} {'dtype':9} {'V':>7} {'loss':>6} {'gradient':>9} {'statistics':>11}")
    right = True
    for backend in served:
        widths = INTERPRETED_WIDTHS if backend == "triton" and device == "cpu" else WIDTHS
        for divergence in CATALOGUE:
            for dtype in DTYPES:
                for width in widths:
                    found = errors(divergence, dtype, width, device, backend)
                    wrong = not all(e < 1 for e in found)
                    right &= not wrong
                    print(f"{backend:8} {divergence:16} {str(dtype)[6:]:9} {width:7} {found[0]:6.2f} {found[1]:9.2f} "
                          f"{found[2]:11.2f}{'  WRONG' if wrong else ''}")  # fmt: skip
    print("\nall right" if right else "\nWRONG: see above")
    return right


def main():
    parser = argparse.ArgumentParser(prog="python -m kdkernels.selftest", description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"where to run (default here: {default})")
    sys.exit(0 if check(parser.parse_args().device) else 1)


if __name__ == "__main__":
    main()
