"""`python -m kdkernels.selftest [--device cuda] [--backend cuda]`: checks every kernel here against the fp64 reference.

Prints a line for each backend and family, and each wrong check; --verbose prints every check. The exit code is 1 if a
kernel is wrong, if a backend that was named does not serve, or if no kernel could be checked. It needs torch alone, so
it runs wherever the package is installed.
"""

import argparse
import itertools
import sys
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch

from . import backends
from .distributions import TAILS, LinearLogits, SparseLogProbs
from .divergences import CATALOGUE, Divergence
from .families import class_ot
from .families import sinkhorn as transport
from .families.uld import mean_of_runs
from .losses.class_ot import fused_class_ot
from .losses.divergence import fused_divergence
from .losses.options import STATISTICS
from .losses.sinkhorn import fused_sinkhorn, fused_sinkhorn_kd
from .losses.uld import fused_uld
from .teachers.extract import topk_log_probs

KERNELS = tuple(name for name in backends.NAMES if name != "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows, classes): odd and aligned widths, one tile and many. A GPU gets more rows than it holds at once, and rows that
# take a cluster of blocks. Every fifth row is dropped and holds NaN.
SHAPES = ((5, 1), (5, 1000), (5, 50_001))
GPU_SHAPES = ((5, 1), (8000, 1000), (500, 50_001), (250, 128_256))
INTERPRETED_SHAPES = ((5, 1), (5, 1000), (5, 5001))
# (rows, classes, width) of heads, in several chunks.
HEAD_SHAPE, GPU_HEAD_SHAPE = (30, 1001, 64), (1500, 32_001, 256)
# (clouds, rows, classes) of SinKD, and (problems, n, m).
CLOUD_SHAPE, GPU_CLOUD_SHAPE = (2, 10, 501), (3, 100, 32_001)
PROBLEM_SHAPE, GPU_PROBLEM_SHAPE = (3, 9, 12), (300, 64, 70)
TOPK_ENTRIES = 100
# (rows, classes) of transport between classes. The reference has plans [rows, classes, classes].
CLASS_OT_SHAPE, GPU_CLASS_OT_SHAPE = (10, 50), (20, 200)
PADDING = 8  # columns past the classes; they hold NaN


def tolerance(dtype: torch.dtype) -> float:
    """The allowed error of a gradient, relative to the largest element of its row: fp32 arithmetic, and two roundings
    to the dtype (backward rounds a gradient kept from the forward call again when it scales the gradient).
    """
    return {torch.float32: 1e-5, torch.bfloat16: 1.01 * 2.0**-8, torch.float16: 1.01 * 2.0**-10}[dtype]


def part(got: torch.Tensor, want: torch.Tensor, allowed) -> float:
    """The largest error as a fraction of the allowed error; inf for a NaN, and for an infinity of one side alone."""
    error = torch.where(got == want, 0, (got.double() - want).abs() / allowed)
    return float(error.nan_to_num(torch.inf, torch.inf).max())


def drawn_on(device: str, seed: int) -> dict[str, object]:
    """Options of torch's random functions: the device draws its own inputs, since a CPU takes longer than the checks
    on a GPU. (Devices draw different numbers from one seed.)
    """
    return {"device": device, "generator": torch.Generator(device).manual_seed(seed)}


def one_call(student, teacher, divergence, options, backend, gradient, statistics=STATISTICS):
    student = student.detach().requires_grad_()
    options = {**options, "statistics": statistics}
    out = fused_divergence(student, teacher, divergence, backend=backend, gradient=gradient, **options)
    loss, found = (out.loss, out.statistics) if statistics else (out, {})
    (2 * loss).sum().backward()  # a factor, so that a gradient kept from the forward call is scaled
    return loss.detach(), student.grad, found


def undecided_signs(student, teacher, temperature, closeness) -> torch.Tensor:
    """Bound on the error of tv's gradient from signs of p - q that rounding decides, in fp64 of the logits' shape.

    A class is undecided if abs(log p - log q) <= closeness. Its own error is at most q, and every class's error at most
    q times the mass of the undecided classes. The bound excludes the slope's factors (1 / temperature, row weights).
    `temperature` and `closeness` broadcast to the logits. NaN rows, which are dropped, get 0.
    """
    log_q, log_p = ((x.double() / temperature).log_softmax(-1) for x in (student, teacher))
    q = log_q.exp().nan_to_num(0)
    undecided = torch.where((log_p - log_q).abs() <= closeness, q, 0)
    return undecided + q * undecided.sum(-1, keepdim=True)


def undecided_ranks(student, teacher, temperature, closeness, topk: int | None = None) -> torch.Tensor:
    """The same bound for ULD, whose gradient has the sign of p - q of each rank: [..., V], at the student's classes.

    A wrong sign of a rank is an error of 2. ULD's gradient spreads it over the run of equal logits. Only the first
    `topk` ranks count.
    """
    (s, order), (t, _) = (x.double().sort(dim=-1, descending=True, stable=True) for x in (student, teacher))
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (s, t))
    ranks = min(topk or s.shape[-1], s.shape[-1], t.shape[-1])
    close = torch.zeros_like(log_p)
    close[..., :ranks] = 2 * ((log_p[..., :ranks] - log_q[..., :ranks]).abs() <= closeness)
    p = log_p.exp()
    run_means = mean_of_runs(*(x.reshape(-1, x.shape[-1]) for x in (close, s))).view_as(close)
    bound = p * run_means + p * (p * close).sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, order, bound).nan_to_num(0)


def errors(divergence: str, dtype: torch.dtype, shape: tuple[int, int], device: str, backend: str):
    """Largest errors of loss, gradient and statistics, with every row option in use, as fractions of the tolerance."""
    rows, width = shape
    drawn = drawn_on(device, width)

    is_steep, magnification = Divergence(divergence).is_steep, Divergence(divergence).magnification
    scale = 1 if is_steep else 3  # the powers of a steep divergence leave fp16

    def logits():
        x = scale * torch.randn(rows, width + PADDING, **drawn)
        x[4::5], x[:, width:] = torch.nan, torch.nan
        return x.to(dtype)

    def every_five(*values):
        return torch.tensor(values, device=device).repeat(rows // 5)

    student, teacher = logits(), logits()
    if width > 2:
        student[1::5, 2], teacher[1::5, 2] = -torch.inf, -torch.inf
    options = {
        "temperature": every_five(0.7, 1.0, 1.0, 2.0, 1.0),
        "mask": every_five(True, True, True, True, False),
        "row_weight": every_five(1.0, 0.5, 2.0, 1.0, 1.0),
        "labels": torch.randint(0, width, (rows,), **drawn),
        "hard_weight": every_five(0.0, 0.0, 0.3, 1.0, 0.0),
        "vocab_size": width,
        "reduction": "none",
    }
    double = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    want = one_call(student.double(), teacher.double(), divergence, double, "reference", "auto")
    # For losses and the statistic "divergence": the rounding of a steep divergence is relative to its value.
    steep = 1e-5 * magnification * want[0].abs() if is_steep else 0
    steep_statistic = {"divergence": 1e-5 * magnification * want[2]["divergence"].abs() if is_steep else 0}
    # A slope consists of log-ratios of order 10. Their rounding remains when the log-ratios cancel.
    allowed = tolerance(dtype) * want[1].abs().amax(-1, keepdim=True) + 4e-6
    if divergence == "tv":
        signs = undecided_signs(student[:, :width], teacher[:, :width], options["temperature"][:, None], 1e-5)
        # Twice 2: the largest row weight, and the factor in one_call.
        allowed = allowed + torch.nn.functional.pad(2 * 2 * signs, (0, PADDING))
    worst = [0.0, 0.0, 0.0]
    for gradient in ("forward", "backward"):
        got = one_call(student, teacher, divergence, options, backend, gradient)
        result = (
            part(got[0], want[0], 1e-5 + 1e-6 * want[0].abs() + steep),
            part(got[1], want[1], allowed),
            max(
                part(got[2][s], want[2][s], 1e-4 + 1e-5 * want[2][s].abs() + steep_statistic.get(s, 0))
                for s in STATISTICS
            ),
        )
        worst = [max(a, b) for a, b in zip(worst, result, strict=True)]
    return tuple(worst)


def close_errors(divergence: str, shape: tuple[int, int], device: str, backend: str):
    """Small divergences in fp32, from close logits and from high temperatures: a row's loss may be off by 3e-6 of
    itself, and its gradient by 1e-5 of its largest element.
    """
    rows, width = shape
    drawn = drawn_on(device, width)
    student, noise = (torch.randn(rows, width, **drawn) for _ in range(2))
    size, temperature = torch.tensor([[0.1, 1.0], [1e-3, 1.0], [1.0, 16.0], [1.0, 100.0], [1.0, 1e4]], device=device).T
    size, temperature = (x.repeat(rows // 5) for x in (size, temperature))
    teacher = student + size[:, None] * noise
    options = {"temperature": temperature, "reduction": "none"}
    want = one_call(student.double(), teacher.double(), divergence, options, "reference", "auto", ())
    largest = want[1].abs().amax(-1, keepdim=True)
    if divergence == "tv":  # its slope has a jump where the log-ratio is 0
        lq, lp = ((x.double() / options["temperature"][:, None]).log_softmax(-1) for x in (student, teacher))
        largest = torch.where((lq - lp).abs() < 1e-4 * (lq - lp).std(-1, keepdim=True), torch.inf, largest)
    worst = [0.0, 0.0]
    for gradient in ("forward", "backward"):
        loss, found, _ = one_call(student, teacher, divergence, options, backend, gradient, ())
        off = part(loss, want[0], 3e-6 * want[0]), part(found, want[1], 1e-5 * largest)
        worst = [max(pair) for pair in zip(worst, off, strict=True)]
    return tuple(worst)


def head_errors(dtype: torch.dtype, shape: tuple[int, int, int], device: str, backend: str, logits_dtype=None):
    """Heads with a bias, scale and cap, in chunks: errors of the loss and of all gradients, in norm, as fractions of
    eager PyTorch's errors in the same dtype. (With fp32 logits the rounding of the gradient alone is allowed.)
    """
    rows, classes, width = shape
    drawn = drawn_on(device, width)

    def normal(*shape):
        return torch.randn(*shape, **drawn).to(dtype)

    tensors = [
        normal(rows, width),
        normal(classes, width) / width**0.5,
        normal(classes),
        normal(rows, width),
        normal(classes, width) / width**0.5,
    ]
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
            eager_error = 0 if logits_dtype else 1.5 * (z - y).norm()
            error = part((x - y).norm(), torch.zeros(()), eager_error + 2 * rounding * y.norm())
            worst[min(i, 1)] = max(worst[min(i, 1)], error)
    return tuple(worst)


def topk_errors(tail: str, dtype: torch.dtype, shape: tuple[int, int], device: str, backend: str):
    """Errors of the loss and gradient against a sparse teacher, and of its extraction, as fractions of the
    tolerance."""
    rows, width = shape
    drawn = drawn_on(device, width)
    student, whole = ((3 * torch.randn(rows, width + PADDING, **drawn)).to(dtype) for _ in range(2))
    student[4::5], whole[4::5] = torch.nan, torch.nan
    mask = (torch.arange(rows) % 5 != 4).to(device)
    k = min(TOPK_ENTRIES, width)
    options = {"mask": mask, "vocab_size": width}
    want = topk_log_probs(whole.double(), k, backend="reference", temperature=2.0, **options)
    got = topk_log_probs(whole, k, backend=backend, temperature=2.0, **options)
    extraction = max(
        part(x, y, 1e-5 + 1e-6 * y.abs())
        for x, y in ((got.log_probs, want.log_probs), (got.tail_log_prob, want.tail_log_prob))
    )
    teacher = SparseLogProbs(
        want.indices, want.log_probs.float(), tail_log_prob=want.tail_log_prob.float(), source_temperature=2.0
    ).with_tail(tail)
    labels = torch.randint(0, width, (rows,), **drawn)
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
        result = one_call(student, backend, gradient)
        errors = part(result[0], right[0], 1e-5 + 1e-6 * right[0].abs()), part(result[1], right[1], allowed)
        worst = [max(a, b) for a, b in zip(worst, errors, strict=True)]
    return (*worst, extraction)


def class_ot_errors(gradient: str, dtype: torch.dtype, shape: tuple[int, int], device: str):
    """Errors of loss and gradient of transport between classes, as fractions of the tolerance. torch computes its
    products."""
    rows, classes = shape
    drawn = drawn_on(device, classes)
    student, teacher = ((2 * torch.randn(rows, classes, **drawn)).to(dtype) for _ in range(2))
    student[4::5], teacher[4::5] = torch.nan, torch.nan
    student[1::5, 2] = -torch.inf
    labels = torch.where(torch.arange(rows) % 3 == 2, -100, torch.arange(rows) % classes).to(device)
    options = {"mask": (torch.arange(rows) % 5 != 4).to(device), "exclude_labels": labels, "reduction": "none"}
    options |= {"temperature": 2.0, "epsilon": 0.2, "gradient": gradient}
    cost = torch.rand(classes, classes, **drawn)

    def one_call(student, teacher, cost, backend):
        student = student.detach().requires_grad_()
        loss = fused_class_ot(student, teacher, cost, backend=backend, **options)
        (2 * loss).sum().backward()
        return loss.detach(), student.grad

    want = one_call(student.double(), teacher.double(), cost.double(), "reference")
    got = one_call(student, teacher, cost, "auto")
    # The reference's softmax gives a masked class the derivative 0 * -inf, which is NaN.
    right = want[1].nan_to_num(0)
    allowed = tolerance(dtype) * right.abs().amax(-1, keepdim=True) + 4e-7
    return part(got[0], want[0], 1e-5 + 1e-6 * want[0].abs()), part(got[1], right, allowed)


def uld_errors(dtype: torch.dtype, shape: tuple[int, int], device: str, backend: str):
    """Errors of loss and gradient between two vocabularies, as fractions of the tolerance."""
    rows, width = shape
    drawn = drawn_on(device, width)
    widths = width, width // 2 + 1
    student, teacher = ((3 * torch.randn(rows, classes + PADDING, **drawn)).to(dtype) for classes in widths)
    student[4::5], teacher[4::5] = torch.nan, torch.nan
    if width > 2:
        student[1::5, 2] = -torch.inf
    temperature = torch.tensor([0.7, 1.0, 1.0, 2.0, 1.0], device=device).repeat(rows // 5)
    options = {
        "mask": (torch.arange(rows) % 5 != 4).to(device),
        "reduction": "none",
        "student_vocab_size": widths[0],
        "teacher_vocab_size": widths[1],
    }

    def one_call(student, teacher, temperature, backend, gradient):
        student = student.detach().requires_grad_()
        loss = fused_uld(student, teacher, temperature=temperature, backend=backend, gradient=gradient, **options)
        (2 * loss).sum().backward()
        return loss.detach(), student.grad

    right = one_call(student.double(), teacher.double(), temperature.double(), "reference", "auto")
    allowed = tolerance(dtype) * right[1].abs().amax(-1, keepdim=True) + 4e-6
    column = temperature[:, None]
    signs = undecided_ranks(student[:, : widths[0]], teacher[:, : widths[1]], column, 1e-5) / column
    allowed = allowed + torch.nn.functional.pad(2 * signs, (0, PADDING))
    worst = [0.0, 0.0]
    for gradient in ("forward", "backward"):
        result = one_call(student, teacher, temperature, backend, gradient)
        errors = part(result[0], right[0], 1e-5), part(result[1], right[1], allowed)
        worst = [max(a, b) for a, b in zip(worst, errors, strict=True)]
    return tuple(worst)


def sinkhorn_kd_errors(cost: str, dtype: torch.dtype, shape: tuple[int, int, int], device: str, backend: str):
    """Errors of SinKD between clouds [clouds, rows, classes], every fifth row dropped, as fractions of the
    tolerance."""
    drawn = drawn_on(device, shape[2])
    student, teacher = ((2 * torch.randn(shape, **drawn)).to(dtype) for _ in range(2))
    student[:, 4::5], teacher[:, 4::5] = torch.nan, torch.nan
    mask = (torch.arange(shape[1]) % 5 != 4).expand(shape[:2]).to(device)

    def one_call(student, teacher, backend):
        student = student.detach().requires_grad_()
        loss = fused_sinkhorn_kd(student, teacher, cost=cost, mask=mask, reduction="none", backend=backend)
        (2 * loss).sum().backward()
        return loss.detach(), student.grad

    right, result = one_call(student.double(), teacher.double(), "reference"), one_call(student, teacher, backend)
    allowed = tolerance(dtype) * right[1].abs().amax((1, 2), keepdim=True) + 4e-6
    loss = part(result[0], right[0], 1e-5 * right[0].abs() + 1e-6 * shape[1])
    return loss, part(result[1], right[1], allowed)


def sinkhorn_errors(gradient: str, epsilon: float, shape: tuple[int, int, int], device: str, backend: str):
    """Errors of the values of problems [problems, n, m] with points without mass, and of their derivatives with respect
    to the costs, as fractions of the tolerance. Twenty rounds carry the rounding of cost / epsilon along.
    """
    drawn = drawn_on(device, shape[2])
    cost = torch.rand(shape, **drawn)
    a, b = (torch.rand(shape[0], n, **drawn) + 0.1 for n in shape[1:])
    a[:, 1], b[:, 2] = 0, 0
    a, b = (x / x.sum(1, keepdim=True) for x in (a, b))

    def one_call(cost, a, b, backend):
        cost = cost.detach().requires_grad_()
        value = fused_sinkhorn(cost, a, b, epsilon=epsilon, iterations=20, gradient=gradient, backend=backend).value
        (2 * value).sum().backward()
        return value.detach(), cost.grad

    right = one_call(cost.double(), a.double(), b.double(), "reference")
    result = one_call(cost, a, b, backend)
    rounding = 1e-6 * (4 + 1 / epsilon)
    allowed = 4 * rounding * right[1].abs().amax((1, 2), keepdim=True)
    return part(result[0], right[0], rounding * right[0].abs()), part(result[1], right[1], allowed)


class Check(NamedTuple):
    """One comparison with the reference: its errors as fractions of the allowed errors; 1 or more is wrong."""

    family: str
    case: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    errors: tuple[float, ...]
    third: str = "statistics"  # the name of a third error; the first two are of loss and gradient

    @property
    def largest(self) -> float:
        return max(self.errors)

    @property
    def is_wrong(self) -> bool:
        return self.largest >= 1

    def __str__(self):
        named = zip(("loss", "gradient", self.third), self.errors, strict=False)
        errors = "".join(f"  {name} {shown(error):>7}" for name, error in named)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case:17} {dtype:9} {self.shape[0]:5} x {self.shape[1]:<7}{errors}" + "  WRONG" * self.is_wrong


def shown(error: float) -> str:
    return f"{error:.2f}" if error < 1000 else f"{error:.1e}"


def checks(backend: str, device: str) -> Iterator[Check]:
    """The checks of a backend's kernels, family by family."""
    on_gpu = device != "cpu"
    shapes = GPU_SHAPES if on_gpu else INTERPRETED_SHAPES if backend == "triton" else SHAPES
    for divergence, dtype, shape in itertools.product(CATALOGUE, DTYPES, shapes):
        yield Check("rows", divergence, dtype, shape, errors(divergence, dtype, shape, device, backend))
    rows, width = shapes[min(1, len(shapes) - 1)]
    for divergence in CATALOGUE:
        shape = rows // 5 * 5, width
        found = close_errors(divergence, shape, device, backend)
        yield Check("rows", f"{divergence}, small"[:17], torch.float32, shape, found)
    for dtype in DTYPES:
        for logits_dtype in (None,) if dtype == torch.float32 else (None, torch.float32):
            shape = GPU_HEAD_SHAPE if on_gpu else HEAD_SHAPE
            name = "head, fp32 logits" if logits_dtype else "head"
            yield Check("heads", name, dtype, shape, head_errors(dtype, shape, device, backend, logits_dtype))
    for tail, dtype, shape in itertools.product(TAILS, DTYPES, shapes):
        found = topk_errors(tail, dtype, shape, device, backend)
        yield Check("top k", f"top k, {tail}", dtype, shape, found, "extraction")
    for dtype, shape in itertools.product(DTYPES, shapes):
        yield Check("uld", "uld", dtype, shape, uld_errors(dtype, shape, device, backend))
    for cost, dtype in itertools.product(transport.COSTS, DTYPES):
        shape = GPU_CLOUD_SHAPE if on_gpu else CLOUD_SHAPE
        found = sinkhorn_kd_errors(cost, dtype, shape, device, backend)
        yield Check("sinkd", f"sinkd, {cost}", dtype, shape[1:], found)
    for gradient, epsilon in itertools.product(transport.GRADIENTS, (0.1, 0.01)):
        shape = GPU_PROBLEM_SHAPE if on_gpu else PROBLEM_SHAPE
        found = sinkhorn_errors(gradient, epsilon, shape, device, backend)
        yield Check("sinkhorn", f"{gradient} at {epsilon}", torch.float32, shape[1:], found)


def class_ot_checks(device: str) -> Iterator[Check]:
    shape = CLASS_OT_SHAPE if device == "cpu" else GPU_CLASS_OT_SHAPE
    for gradient, dtype in itertools.product(class_ot.GRADIENTS, DTYPES):
        yield Check("class ot", f"ot, {gradient}", dtype, shape, class_ot_errors(gradient, dtype, shape, device))


def report(backend: str, found: Iterator[Check], verbose: bool) -> bool:
    """Prints a line for each family, and its wrong checks (all checks if `verbose`); returns whether all are right."""
    right = True
    for family, members in itertools.groupby(found, lambda check: check.family):
        largest, count, wrong = None, 0, 0
        for check in members:
            count, wrong = count + 1, wrong + check.is_wrong
            largest = check if largest is None or check.largest > largest.largest else largest
            if verbose or check.is_wrong:
                print(f"{backend:8} {check}")
        of_case = f"{shown(largest.largest)} ({largest.case}, {str(largest.dtype).removeprefix('torch.')})"
        print(f"{backend:8} {family:9} {count:4} checks, largest error {of_case}" + f"  WRONG: {wrong}" * (wrong > 0))
        right &= not wrong
    return right


def check(device: str, verbose: bool = False, named: Collection[str] = ()) -> bool:
    """Checks the backends `named`, which must serve on the device; without names, all that serve."""
    x = torch.empty(1, 1, device=device)
    served, missing = [], []
    for name in named or KERNELS:
        reason = backends.refuse(name, x, x)
        print(f"{name:10} " + ("checked below" if reason is None else f"not checked: {reason}"))
        (missing if reason else served).append(name)
    if not served:
        print(f"none of {', '.join(named)} serves on {device}" if named else "only the reference serves here", end="")
        print(": nothing was checked")
        return False
    print(f"\nerrors on {device}, as fractions of the allowed error (1.00 fails)")
    right = report("torch", class_ot_checks(device), verbose)
    for backend in served:
        right &= report(backend, checks(backend, device), verbose)
    print("\nall right" if right else "\nWRONG: see above")
    if named and missing:
        print(f"WRONG: no kernel of {', '.join(missing)} was checked")
    return right and not (named and missing)


def main():
    parser = argparse.ArgumentParser(prog="python -m kdkernels.selftest", description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"where to run (default here: {default})")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=KERNELS,
        default=[],
        metavar="NAME",
        help=f"the backends to check, of {', '.join(KERNELS)}; each must serve (default: all that serve)",
    )
    parser.add_argument("--verbose", action="store_true", help="print every check, not the wrong ones alone")
    arguments = parser.parse_args()
    sys.exit(0 if check(arguments.device, arguments.verbose, arguments.backend) else 1)


if __name__ == "__main__":
    main()
