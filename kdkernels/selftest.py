"""`python -m kdkernels.selftest [--device cuda]`: every kernel of every backend here against the reference in fp64.

One table; exit code 1 when a kernel is wrong, or when there was none to check. It needs torch alone, so it can be run
wherever the package is installed.
"""

import argparse
import sys

import torch

from . import backends
from .distributions import TAILS, LinearLogits, SparseLogProbs
from .divergences import CATALOGUE
from .functional import fused_divergence
from .options import STATISTICS
from .teachers import topk_log_probs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows, classes): widths that are odd and that are aligned, one tile and many. A GPU gets more rows than it holds at
# once, and rows that take a cluster of blocks. Every fifth row is dropped and holds NaN.
SHAPES = ((5, 1), (5, 1000), (5, 50_001))
GPU_SHAPES = ((5, 1), (8000, 1000), (500, 50_001), (250, 128_256))
INTERPRETED_SHAPES = ((5, 1), (5, 1000), (5, 5001))
# (rows, classes, width) of heads: several chunks.
HEAD_SHAPE, GPU_HEAD_SHAPE = (30, 1001, 64), (1500, 32_001, 256)
TOPK_ENTRIES = 100
PADDING = 8  # columns past the classes, which hold NaN


def tolerance(dtype: torch.dtype) -> float:
    """Of a gradient, relative to the largest element of its row: fp32 arithmetic, and two roundings to the dtype (a
    gradient kept from the forward call is rounded again where it is scaled)."""
    return {torch.float32: 1e-5, torch.bfloat16: 1.01 * 2.0**-8, torch.float16: 1.01 * 2.0**-10}[dtype]


def one_call(student, teacher, divergence, options, backend, gradient):
    student = student.detach().requires_grad_()
    out = fused_divergence(student, teacher, divergence, backend=backend, gradient=gradient, **options)
    (2 * out.loss).sum().backward()  # a factor, so that a gradient kept from the forward call is scaled
    return out.loss.detach(), student.grad, out.statistics


def undecided(divergence: str, student, teacher, temperature) -> torch.Tensor:
    """What rounding may do to the gradient of tv, whose sign is that of p - q: q of a class whose sign it decides, and
    of any class its part of their sum."""
    if divergence != "tv":
        return torch.zeros((), device=student.device)
    lq, lp = ((x.double() / temperature[:, None]).log_softmax(-1) for x in (student, teacher))
    q = lq.exp()
    of_class = torch.where((lp - lq).abs() < 1e-5, q, 0)
    return (of_class + q * of_class.sum(-1, keepdim=True)).nan_to_num(0)  # NaN: a row that is dropped


def errors(divergence: str, dtype: torch.dtype, shape: tuple[int, int], device: str, backend: str):
    """Largest errors of loss, gradient and statistics, with every row option in use, as parts of the tolerance."""
    rows, width = shape
    generator = torch.Generator().manual_seed(width)

    def logits():
        x = 3 * torch.randn(rows, width + PADDING, generator=generator)
        x[4::5], x[:, width:] = torch.nan, torch.nan
        return x.to(device, dtype)

    def every_five(*values):
        return torch.tensor(values, device=device).repeat(rows // 5)

    student, teacher = logits(), logits()
    if width > 2:
        student[1::5, 2], teacher[1::5, 2] = -torch.inf, -torch.inf
    options = {
        "temperature": every_five(0.7, 1.0, 1.0, 2.0, 1.0),
        "mask": every_five(True, True, True, True, False),
        "row_weight": every_five(1.0, 0.5, 2.0, 1.0, 1.0),
        "labels": torch.randint(0, width, (rows,), generator=generator).to(device),
        "hard_weight": every_five(0.0, 0.0, 0.3, 1.0, 0.0),
        "vocab_size": width,
        "statistics": STATISTICS,
        "reduction": "none",
    }
    double = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
              for name, x in options.items()}  # fmt: skip
    want = one_call(student.double(), teacher.double(), divergence, double, "reference", "auto")
    # A slope is made of log-ratios of order 10, whose rounding stays where they cancel.
    allowed = tolerance(dtype) * want[1].abs().amax(-1, keepdim=True) + 4e-6
    signs = undecided(divergence, student[:, :width], teacher[:, :width], options["temperature"])
    if signs.dim():  # times the largest row weight and the factor of one_call
        allowed = allowed + torch.nn.functional.pad(2 * 2 * signs, (0, PADDING))
    worst = [0.0, 0.0, 0.0]
    for gradient in ("forward", "backward"):
        got = one_call(student, teacher, divergence, options, backend, gradient)
        found = (
            ((got[0] - want[0]).abs() / (1e-5 + 1e-6 * want[0].abs())).max(),
            ((got[1].double() - want[1]).abs() / allowed).nan_to_num(torch.inf).max(),
            max(((got[2][s] - want[2][s]).abs() / (1e-4 + 1e-5 * want[2][s].abs())).max() for s in STATISTICS),
        )
        worst = [max(a, float(b)) for a, b in zip(worst, found, strict=True)]
    return tuple(worst)


def head_errors(dtype: torch.dtype, shape: tuple[int, int, int], device: str, backend: str, logits_dtype=None):
    """Of heads with a bias, scale and cap, in chunks: errors of the loss and of all gradients, in norm, as parts of
    those of eager PyTorch in the same dtype (that of fp32 logits being another rounding of the gradient alone)."""
    rows, classes, width = shape
    generator = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tensors = [normal(rows, width), normal(classes, width) / width**0.5, normal(classes), normal(rows, width),
               normal(classes, width) / width**0.5]  # fmt: skip
    mask = torch.arange(rows, device=device) % 5 != 4

    def one_call(tensors, to_logits=None, **options):
        tensors = [x.detach().requires_grad_(i < 3) for i, x in enumerate(tensors)]
        student = LinearLogits(*tensors[:3], scale=2.0, softcap=5.0)
        teacher = LinearLogits(*tensors[3:], scale=2.0)
        if to_logits:
            student, teacher = to_logits(student), to_logits(teacher)
        loss = 2 * fused_divergence(student, teacher, "js", mask=mask, reduction="sum", **options)
        return loss.detach(), *torch.autograd.grad(loss, tensors[:3])

    def eager_logits(head):
        logits = head.scale * torch.nn.functional.linear(head.hidden, head.weight, head.bias)
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    want = one_call([x.double() for x in tensors], backend="reference")
    eager = one_call(tensors, eager_logits, backend="reference")
    rounding = tolerance(dtype)
    worst = [0.0, 0.0]
    for gradient in ("forward", "backward"):
        got = one_call(tensors, backend=backend, gradient=gradient, chunk_rows=rows // 3, logits_dtype=logits_dtype)
        for i, (x, y, z) in enumerate(zip(got, want, eager, strict=True)):
            of_eager = 0 if logits_dtype else 1.5 * (z - y).norm()
            part = (x - y).norm() / (of_eager + 2 * rounding * y.norm())
            worst[min(i, 1)] = max(worst[min(i, 1)], float(part.nan_to_num(torch.inf)))
    return tuple(worst)


def topk_errors(tail: str, dtype: torch.dtype, shape: tuple[int, int], device: str, backend: str):
    """Of the loss and gradient against a sparse teacher, and of its extraction, as parts of the tolerance."""
    rows, width = shape
    generator = torch.Generator().manual_seed(width)
    student, whole = ((3 * torch.randn(rows, width + PADDING, generator=generator)).to(device, dtype) for _ in range(2))
    student[4::5], whole[4::5] = torch.nan, torch.nan
    mask = (torch.arange(rows) % 5 != 4).to(device)
    k = min(TOPK_ENTRIES, width)
    options = {"mask": mask, "vocab_size": width}
    want = topk_log_probs(whole.double(), k, backend="reference", temperature=2.0, **options)
    got = topk_log_probs(whole, k, backend=backend, temperature=2.0, **options)
    extraction = max(
        float(((x - y).nan_to_num(0).abs() / (1e-5 + 1e-6 * y.nan_to_num(0, 0, 0).abs())).max())
        for x, y in ((got.log_probs, want.log_probs), (got.tail_log_prob, want.tail_log_prob))
    )
    teacher = SparseLogProbs(
        want.indices, want.log_probs.float(), tail_log_prob=want.tail_log_prob.float(), source_temperature=2.0
    ).with_tail(tail)
    labels = torch.randint(0, width, (rows,), generator=generator).to(device)
    options |= {"temperature": 2.0, "labels": labels, "hard_weight": 0.25, "statistics": (), "reduction": "none"}
    worst = [0.0, 0.0]

    def one_call(student, backend, gradient):
        student = student.detach().requires_grad_()
        loss = fused_divergence(student, teacher, "js", backend=backend, gradient=gradient, **options)
        (2 * loss).sum().backward()
        return loss.detach(), student.grad

    right = one_call(student.double(), "reference", "auto")
    allowed = tolerance(dtype) * right[1].abs().amax(-1, keepdim=True) + 4e-6
    for gradient in ("forward", "backward"):
        found = one_call(student, backend, gradient)
        errors = (
            ((found[0] - right[0]).abs() / (1e-5 + 1e-6 * right[0].abs())).max(),
            ((found[1].double() - right[1]).abs() / allowed).nan_to_num(torch.inf).max(),
        )
        worst = [max(a, float(b)) for a, b in zip(worst, errors, strict=True)]
    return (*worst, extraction)


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
    print(
        f"{'backend':8} {'divergence':17} {'dtype':9} {'N':>5} {'V':>7} {'loss':>6} {'gradient':>9} {'statistics':>11}"
    )
    print(f"{'':>66} or, of a top k, its extraction")
    right = True
    for backend in served:
        shapes = GPU_SHAPES if device != "cpu" else INTERPRETED_SHAPES if backend == "triton" else SHAPES
        for divergence in CATALOGUE:
            for dtype in DTYPES:
                for shape in shapes:
                    found = errors(divergence, dtype, shape, device, backend)
                    wrong = not all(e < 1 for e in found)
                    right &= not wrong
                    print(f"{backend:8} {divergence:17} {str(dtype)[6:]:9} {shape[0]:5} {shape[1]:7} {found[0]:6.2f} "
                          f"{found[1]:9.2f} {found[2]:11.2f}{'  WRONG' if wrong else ''}")  # fmt: skip
        for dtype in DTYPES:
            for logits_dtype in (None,) if dtype == torch.float32 else (None, torch.float32):
                shape = GPU_HEAD_SHAPE if device != "cpu" else HEAD_SHAPE
                found = head_errors(dtype, shape, device, backend, logits_dtype)
                wrong = not all(e < 1 for e in found)
                right &= not wrong
                name = "head, fp32 logits" if logits_dtype else "head"
                print(f"{backend:8} {name:17} {str(dtype)[6:]:9} {shape[0]:5} {shape[1]:7} {found[0]:6.2f} "
                      f"{found[1]:9.2f} {'':>11}{'  WRONG' if wrong else ''}")  # fmt: skip
        for tail in TAILS:
            for dtype in DTYPES:
                for shape in shapes:
                    found = topk_errors(tail, dtype, shape, device, backend)
                    wrong = not all(e < 1 for e in found)
                    right &= not wrong
                    print(f"{backend:8} {'top k, ' + tail:17} {str(dtype)[6:]:9} {shape[0]:5} {shape[1]:7} "
                          f"{found[0]:6.2f} {found[1]:9.2f} {found[2]:11.2f}{'  WRONG' if wrong else ''}")  # fmt: skip
    print("\nall right" if right else "\nWRONG: see above")
    return right


def main():
    parser = argparse.ArgumentParser(prog="python -m kdkernels.selftest", description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"where to run (default here: {default})")
    sys.exit(0 if check(parser.parse_args().device) else 1)


if __name__ == "__main__":
    main()
