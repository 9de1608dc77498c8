"""Heads: a loss and all gradients from hidden states, beside the matrix products that it cannot do without.

Those are four of 2 N H V operations: the logits of both sides, and the gradients of hidden states and weight. The floor
is the time of these alone, in the chunks of rows that kdkernels makes, into memory that is there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from contenders import eager_loss, installed, reason, trl_loss
from report import MiB
from timing import interleaved, ratio

from kdkernels import LinearLogits, fused_kl
from kdkernels.backends import linear

HeadLoss = Callable[[LinearLogits, LinearLogits], torch.Tensor]
PRODUCTS = "products alone"
LIGER, LIGER_MATCHED, TRL_HEAD = "Liger, its defaults", "Liger, kl alone", "TRL, from hidden states"
# Other losses than kl: no answers to compare. Liger's default is half a JS and half a cross-entropy.
NOT_KL = (LIGER,)


@dataclass(frozen=True)
class Plan:
    rows: int
    width: int
    vocabulary: int
    chunk_rows: int  # what the default budget makes of this shape
    checked_rows: int
    rounds: int
    slow: tuple[str, ...] = ()  # measured on `slow_rows`
    slow_rows: int = 1024
    memory_rows: tuple[int, ...] = ()  # of kdkernels
    eager_memory_rows: tuple[int, ...] = ()
    over_products: float = 1.25  # targets: at most so many times the products
    over_eager: float | None = None  # at least so many times faster
    over_liger: float | None = None


CPU = Plan(4096, 576, 49_152, 1024, 256, 5, (TRL_HEAD,), memory_rows=(1024, 2048, 4096, 8192, 16_384, 32_768),
           eager_memory_rows=(1024, 2048, 4096), over_eager=2.4, over_liger=1.6)  # fmt: skip
CPU_QUICK = Plan(1024, 576, 49_152, 1024, 64, 2, (TRL_HEAD,), 256, (1024, 2048), (1024,))
GPU = Plan(8192, 4096, 128_256, 512, 512, 20, memory_rows=(1024, 4096, 8192, 16_384, 32_768),
           eager_memory_rows=(1024, 4096), over_products=1 / 0.85)  # fmt: skip


def synthetic_heads(rows: int, width: int, vocabulary: int, dtype=torch.bfloat16, device="cpu"):
    """Student and teacher, whose logits have the scale 2 and agree in part."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    hidden, weight = normal(rows, width), 2 * normal(vocabulary, width) / width**0.5
    teacher = LinearLogits(hidden.to(dtype), weight.to(dtype))
    hidden, weight = hidden + 0.3 * normal(rows, width), weight + 0.6 * normal(vocabulary, width) / width**0.5
    return LinearLogits(hidden.to(dtype), weight.to(dtype)), teacher


# ---- what is compared


def eager_logits(head: LinearLogits) -> torch.Tensor:
    return F.linear(head.hidden, head.weight)


def on_logits(loss) -> HeadLoss:
    def from_heads(student, teacher):
        with torch.no_grad():
            teacher_logits = eager_logits(teacher)
        return loss(eager_logits(student), teacher_logits)

    return from_heads


def liger_loss(**options) -> HeadLoss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(**options)

    def loss(student, teacher):
        labels = torch.zeros(len(student.hidden), dtype=torch.int64, device=student.device)
        return criterion(student.hidden, student.weight, teacher.hidden, teacher.weight, labels)

    return loss


def trl_head_loss() -> HeadLoss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student, teacher):  # beta 0: forward KL, of each token
        of_tokens = ChunkedDivergenceFunction.apply(
            student.hidden, student.weight, None, teacher.hidden, teacher.weight, None, 0.0
        )
        return of_tokens[0].mean()

    return loss


def fla_loss() -> HeadLoss:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return lambda student, teacher: fused_kl_div_loss(student.hidden, teacher.hidden, student.weight, teacher.weight)


def head_losses(device: str, chunk_rows: int | None, peers: bool = True) -> tuple[dict[str, HeadLoss], dict[str, str]]:
    """kl from hidden states by everyone who is here, and why others are not."""
    losses = {"kdkernels": partial(fused_kl, chunk_rows=chunk_rows), "eager": on_logits(eager_loss("kl"))}
    skipped = {}
    for name, module, factory in (
        (LIGER, "liger_kernel", liger_loss),
        # A JS whose beta is 0 is the forward KL there.
        (LIGER_MATCHED, "liger_kernel", lambda: liger_loss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)),
        (TRL_HEAD, "trl", trl_head_loss),
        ("TRL, on logits", "trl", lambda: on_logits(trl_loss("kl"))),
        ("fla", "fla", fla_loss),
    ):
        if not peers:
            skipped[name] = "--quick"
        elif not installed(module):
            skipped[name] = f"{module} is not installed"
        elif name == "fla" and device == "cpu":
            skipped[name] = "its kernels are Triton and need a GPU"
        else:
            try:
                losses[name] = factory()
            except Exception as error:  # of another package's import
                skipped[name] = reason(error)
    return losses, skipped


class Leaves:
    """Hidden states and weight that get gradients, and steps over them."""

    def __init__(self, student: LinearLogits, teacher: LinearLogits):
        self.student = LinearLogits(*(x.detach().clone().requires_grad_() for x in (student.hidden, student.weight)))
        self.teacher = teacher

    def drop_gradients(self) -> None:
        self.student.hidden.grad = self.student.weight.grad = None

    def step(self, loss: HeadLoss) -> Callable[[], None]:
        return lambda: loss(self.student, self.teacher).backward()

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.student.hidden.grad, self.student.weight.grad

    def products(self, chunk_rows: int) -> Callable[[], None]:
        """The four matrix products of each chunk, and nothing else."""
        hidden, weight = self.student.hidden.detach(), self.student.weight.detach()
        teacher = self.teacher
        shape = min(chunk_rows, len(hidden)), len(weight)
        student_logits, teacher_logits = (torch.zeros(shape, dtype=x.dtype, device=x.device) for x in (hidden, weight))
        of_hidden, of_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

        def run():
            for first in range(0, len(hidden), chunk_rows):
                rows = slice(first, first + chunk_rows)
                n = len(hidden[rows])
                torch.mm(hidden[rows], weight.t(), out=student_logits[:n])
                torch.mm(teacher.hidden[rows], teacher.weight.t(), out=teacher_logits[:n])
                torch.mm(student_logits[:n], weight, out=of_hidden[rows])
                torch.mm(student_logits[:n].t(), hidden[rows], out=of_weight)

        return run


# ---- the measurements


def rows_of(head: LinearLogits, count: int) -> LinearLogits:
    return LinearLogits(head.hidden[:count], head.weight)


def check(benchmark, plan: Plan, losses: dict[str, HeadLoss], student: LinearLogits, teacher: LinearLogits) -> None:
    """Loss and gradients against fp64 from the hidden states, in norm. kdkernels must be as near as eager PyTorch."""
    student, teacher = rows_of(student, plan.checked_rows), rows_of(teacher, plan.checked_rows)

    def found(loss, dtype):
        leaves = Leaves(*(LinearLogits(x.hidden.to(dtype), x.weight.to(dtype)) for x in (student, teacher)))
        value = loss(leaves.student, leaves.teacher)
        value.backward()
        return value.double().item(), *(x.double() for x in leaves.gradients())

    # In several chunks, as the full number of rows has.
    ours = partial(fused_kl, chunk_rows=-(-plan.checked_rows // 3))
    losses = losses | {"kdkernels": ours, "kdkernels, fp32 logits": partial(ours, logits_dtype=torch.float32)}
    truth = found(partial(fused_kl, backend="reference"), torch.float64)
    errors = {}
    for name, loss in losses.items():
        if name in NOT_KL:
            continue
        value, *gradients = found(loss, student.dtype)
        worst = max(((x - y).norm() / y.norm()).item() for x, y in zip(gradients, truth[1:], strict=True))
        errors[name] = abs(value / truth[0] - 1), worst
        benchmark.results.add(
            "heads: errors against fp64 from the hidden states, in norm", name, divergence="kl",
            dtype=str(student.dtype).removeprefix("torch."), N=plan.checked_rows, H=student.hidden.shape[1],
            V=len(student.weight), loss_error=errors[name][0], gradient_error=worst,
        )  # fmt: skip
    (loss_error, gradient_error), (of_eager, gradient_of_eager) = errors["kdkernels"], errors["eager"]
    benchmark.target("heads: gradient error over eager's", gradient_error / gradient_of_eager, 1.0)
    if not (loss_error <= 2 * of_eager + 1e-4 and gradient_error <= 1.02 * gradient_of_eager):
        benchmark.results.failures.append(
            f"kdkernels kl from hidden states: errors {loss_error:.1e} / {gradient_error:.1e}, "
            f"eager's {of_eager:.1e} / {gradient_of_eager:.1e}"
        )


def measure(benchmark, plan: Plan, student: LinearLogits, teacher: LinearLogits) -> None:
    """Check the answers, then time everyone in the same rounds."""
    losses, skipped = head_losses(benchmark.device, None, not benchmark.quick)
    losses = usable(benchmark, losses, skipped, student, teacher)
    benchmark.leave_out({f"{name} (heads)": why for name, why in skipped.items()})
    if "kdkernels" not in losses:
        return
    check(benchmark, plan, losses, student, teacher)
    slow = {name: losses.pop(name) for name in plan.slow if name in losses}

    seconds = timed(benchmark, plan, plan.rows, plan.rounds, losses, student, teacher)
    ours = seconds["kdkernels"]
    what = f"kl from hidden states, {len(student.hidden):,} rows"
    benchmark.target(f"{what}: over its matrix products", ratio(ours, seconds[PRODUCTS]), plan.over_products)
    for name, limit in (("eager", plan.over_eager), (LIGER, plan.over_liger), (LIGER_MATCHED, plan.over_liger)):
        if name in seconds:
            benchmark.target(f"{what}: faster than {name}", ratio(seconds[name], ours), limit, at_least=True)
    if slow:
        losses = {"kdkernels": losses["kdkernels"]} | slow
        timed(benchmark, plan, plan.slow_rows, 2, losses, student, teacher)


def usable(benchmark, losses, skipped: dict[str, str], student, teacher) -> dict[str, HeadLoss]:
    """Those that run, after a first run on few rows; why another does not goes to `skipped`, or fails the run."""
    running = {}
    for name, loss in losses.items():
        try:
            Leaves(rows_of(student, 8), rows_of(teacher, 8)).step(loss)()
            running[name] = loss
        except Exception as error:
            skipped[name] = reason(error)
            if name == "kdkernels":
                benchmark.results.failures.append(f"kdkernels, heads: {skipped[name]}")
    return running


def timed(benchmark, plan: Plan, rows: int, rounds: int, losses, student, teacher) -> dict[str, list[float]]:
    leaves = Leaves(rows_of(student, rows), rows_of(teacher, rows))
    steps = {name: leaves.step(loss) for name, loss in losses.items()} | {PRODUCTS: leaves.products(plan.chunk_rows)}
    advance = benchmark.screen.task(f"heads: kl from {rows:,} hidden states", total=rounds)
    seconds = interleaved(steps, rounds, benchmark.device, before=leaves.drop_gradients, after_round=advance)
    for name in steps:
        benchmark.results.add(
            "heads", name, divergence="kl", dtype=str(student.dtype).removeprefix("torch."), N=rows,
            H=student.hidden.shape[1], V=len(student.weight), median_ms=1e3 * sorted(seconds[name])[rounds // 2],
            ratio_to_kdkernels=ratio(seconds[name], seconds["kdkernels"]),
            over_products=ratio(seconds[name], seconds[PRODUCTS]),
        )  # fmt: skip
    return seconds


def measure_memory(benchmark, plan: Plan, names, peak_bytes: Callable[[str, int], int]) -> None:
    """The peak beyond the inputs of one step: of `names` on the plan's rows, and as the rows grow."""
    if "kdkernels" not in names:
        return
    wanted = [(name, plan.slow_rows if name in plan.slow else plan.rows) for name in names]
    wanted += [("kdkernels", rows) for rows in plan.memory_rows] + [("eager", rows) for rows in plan.eager_memory_rows]
    advance = benchmark.screen.task("heads: memory", total=len(wanted))
    for name, rows in dict.fromkeys(wanted):
        peak = peak_bytes(name, rows)
        most = allowed_bytes(plan, rows) if name == "kdkernels" else None
        benchmark.results.add("heads: memory", name, divergence="kl", dtype="bfloat16", N=rows, H=plan.width,
                              V=plan.vocabulary, peak_extra_MiB=peak / MiB,
                              allowed_MiB=most / MiB if most else None)  # fmt: skip
        if most and rows == plan.rows:
            benchmark.target("kl from hidden states: peak over dWeight in fp32 + dHidden + budget", peak / most, 1.0)
        advance()


def allowed_bytes(plan: Plan, rows: int) -> int:
    """The weight's gradient in fp32, that of the hidden states in bf16, and the budget."""
    return 4 * plan.vocabulary * plan.width + 2 * rows * plan.width + linear.current_budget()
