"""Heads: kl with the gradients of hidden states and weight, compared with the matrix products that it needs.

The products are four, of 2 N H V operations each: the logits of both sides, and the gradients of the hidden states and
of the weight. The floor is the time of the four alone, in kdkernels' chunks of rows, into memory that exists already.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from data import real_or_synthetic_heads, synthetic_heads
from family import OURS, Family, Loss, Problem, Shape, check, errors_by, norm_error, reason, time_steps, weigh
from rows import add_peers, eager_loss, trl_loss
from timing import ratio

from kdkernels import LinearLogits, fused_kl
from kdkernels.families import linear as chunks
from kdkernels.families.budget import current_budget

CASE, IN_TURN, MEMORY = "heads", "heads: each after another", "heads: memory"
ERRORS = "heads: errors against fp64 from the hidden states, in norm"
ERROR_COLUMNS = ("loss_error", "hidden_gradient_error", "weight_gradient_error")
EAGER, PRODUCTS, FP32_LOGITS = "eager", "products alone", f"{OURS}, fp32 logits"
LIGER, LIGER_KL, TRL_HEAD, TRL_LOGITS, FLA = "Liger", "Liger, kl alone", "TRL, head", "TRL, logits", "fla"
# Losses other than kl. Liger's default is half a JS and half a cross-entropy.
OTHER_LOSSES = {LIGER: "js/2 + ce/2"}
# A gradient's error may exceed eager PyTorch's by this factor, because sums run in another order.
CHANCE = 1.02
# The norm of the error of a sum whose products are each rounded to bf16; eager PyTorch rounds only the sum.
ROUNDING = 2.0**-9


@dataclass(frozen=True)
class Plan:
    rows: int
    width: int
    vocabulary: int
    checked_rows: int
    rounds: int
    chunk_rows: int | None = None  # of the products; None: as many as the loss takes
    real: bool = False  # hidden states and heads of a language model, where its packages are installed
    slow: tuple[str, ...] = ()  # contenders that are timed once, on `slow_rows`
    slow_rows: int = 1024
    memory_rows: tuple[int, ...] = ()  # for kdkernels' memory over the rows
    eager_memory_rows: tuple[int, ...] = ()
    over_products: float | None = None  # targets: at most this multiple of the products' time,
    percent_of_products: float | None = None  # or at least this percentage of their speed;
    over_eager: float | None = None  # at least this many times faster than eager
    over_liger: float | None = None

    def shape(self, rows: int) -> Shape:
        return Shape(rows, self.vocabulary, "bfloat16", self.width)


CPU = Plan(
    rows=4096,
    width=576,  # SmolLM2-135M
    vocabulary=49_152,
    checked_rows=1024,
    rounds=3,
    real=True,
    slow=(TRL_HEAD,),
    memory_rows=(1024, 2048, 8192, 32_768),
    eager_memory_rows=(1024, 2048),
    over_products=1.25,
    over_eager=2.4,
    over_liger=1.6,
)
CPU_QUICK = replace(CPU, rows=1024, checked_rows=64, rounds=2, memory_rows=(2048,), eager_memory_rows=())
GPU = Plan(
    rows=8192,
    width=4096,  # Llama 3 8B
    vocabulary=128_256,
    checked_rows=512,
    rounds=20,
    memory_rows=(1024, 4096, 16_384, 32_768),
    eager_memory_rows=(1024, 4096, 16_384),
    percent_of_products=85,
)
PLANS = {"cpu": CPU, "cpu quick": CPU_QUICK, "cuda": GPU, "cuda quick": GPU}


# ---- contenders: functions of (student, teacher), both LinearLogits


def on_logits(loss: Loss) -> Loss:
    """A loss on the logits of both sides, all stored."""

    def head_loss(student, teacher):
        with torch.no_grad():
            teacher_logits = F.linear(teacher.hidden, teacher.weight)
        return loss(F.linear(student.hidden, student.weight), teacher_logits)

    return head_loss


def exact_loss(student: LinearLogits, teacher: LinearLogits) -> torch.Tensor:
    """kl by its definition, in the dtype of the hidden states: the truth in fp64."""
    log_q, log_p = (F.linear(x.hidden, x.weight).log_softmax(-1) for x in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def liger_loss(**options) -> Loss:
    """Liger's chunked JSD in chunks of 1,024 rows, with torch.compile; its beta 0 is the forward KL.

    The labels of its cross-entropy are all 0: their values do not change the cost.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(**options)

    def loss(student, teacher):
        labels = torch.zeros(len(student.hidden), dtype=torch.int64, device=student.device)
        return criterion(student.hidden, student.weight, teacher.hidden, teacher.weight, labels)

    return loss


def trl_head_loss() -> Loss:
    """TRL's divergence of each token, in tiles of tokens and vocabulary; its beta 0 is the forward KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student, teacher):
        sides = (student.hidden, student.weight, None, teacher.hidden, teacher.weight, None)
        divergence, _entropy = ChunkedDivergenceFunction.apply(*sides, 0.0)
        return divergence.mean()

    return loss


def fla_loss() -> Loss:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return lambda student, teacher: fused_kl_div_loss(student.hidden, teacher.hidden, student.weight, teacher.weight)


def allowed_errors(problems, truths, errors) -> tuple[float, float, float]:
    """kdkernels must be as accurate as eager PyTorch. The loss is a mean of losses with the rounding of bf16 logits."""
    loss, hidden, weight = errors[EAGER].judged
    return 2 * loss + 1e-4, CHANCE * hidden, CHANCE * math.hypot(weight, ROUNDING)


def family(device: str = "cpu", with_peers: bool = True) -> Family:
    losses: dict[str, Loss] = {OURS: fused_kl, EAGER: on_logits(eager_loss("kl"))}
    peers = (
        (LIGER_KL, "liger_kernel", lambda: liger_loss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)),
        (LIGER, "liger_kernel", lambda: liger_loss()),
        (TRL_HEAD, "trl", trl_head_loss),
        (TRL_LOGITS, "trl", lambda: on_logits(trl_loss("kl"))),
        (FLA, "fla", fla_loss),
    )
    skipped = {} if with_peers else {name: "--quick" for name, *_ in peers}
    add_peers(losses, skipped, peers if with_peers else (), device, needs_gpu=(FLA,))
    errors = errors_by(norm_error, *ERROR_COLUMNS)
    return Family(
        "linear", losses, exact_loss, errors, allowed_errors, "kl",
        problem=problem, other_losses=OTHER_LOSSES, skipped=skipped,
    )  # fmt: skip


def problem(shape: Shape, device: str) -> Problem:
    return Problem(*synthetic_heads(shape.rows, shape.width, shape.classes, device=device))


def chunk_rows(problem: Problem) -> int:
    """The rows of the loss's chunks, whose buffers are the logits and the hidden states of both sides in bf16."""
    hidden, weight = problem.student.hidden, problem.student.weight
    device = hidden.device
    slab = 0 if chunks.adds_fp32(device) else min(chunks._slab_bytes(device), weight.nbytes)
    buffers = SimpleNamespace(row_bytes=2 * 2 * (len(weight) + hidden.shape[1]), fixed_bytes=slab)
    chunking = chunks.Chunking(None, None, 0, current_budget(device), False)
    return chunks._chunk_size(len(hidden), chunking, [buffers], device)


def products(problem: Problem, chunk_rows: int) -> Callable[[], None]:
    """The four matrix products of each chunk and nothing else, into memory that exists already."""
    student, (teacher,) = problem.student.detach(), problem.others
    shape = min(chunk_rows, len(student.hidden)), len(student.weight)
    student_logits, teacher_logits = (torch.zeros(shape, dtype=x.dtype, device=x.device) for x in (student, teacher))
    hidden_gradient, weight_gradient = torch.zeros_like(student.hidden), torch.zeros_like(student.weight)

    def run():
        chunks = (x.split(chunk_rows) for x in (student.hidden, teacher.hidden, hidden_gradient))
        for hidden, teacher_hidden, gradient_chunk in zip(*chunks, strict=True):
            # The student's logits stand in for their gradient, which has the same size.
            logits_gradient = torch.mm(hidden, student.weight.t(), out=student_logits[: len(hidden)])
            torch.mm(teacher_hidden, teacher.weight.t(), out=teacher_logits[: len(hidden)])
            torch.mm(logits_gradient, student.weight, out=gradient_chunk)
            torch.mm(logits_gradient.t(), hidden, out=weight_gradient)

    return run


# ---- what is measured


def measure(benchmark, plan: Plan) -> None:
    """Check the answers; time everyone in the same rounds, in two ways; then measure memory.

    First each step runs just after itself, as in a loop that does nothing else. Then each runs after another contender,
    and finds the memory as that contender left it, which matters to steps that need much memory.
    """
    kl = family(benchmark.device, not benchmark.quick)
    sizes = plan.rows, plan.width, plan.vocabulary
    if plan.real:
        *heads, source = real_or_synthetic_heads(*sizes)
        benchmark.results.remark(f"Hidden states and heads: {source}.")
    else:
        heads = synthetic_heads(*sizes, device=benchmark.device)
    losses = check_gradients(benchmark, plan, kl, heads)
    kl = replace(kl, losses={name: loss for name, loss in losses.items() if name not in plan.slow})
    if OURS in losses:
        torch.compiler.reset()  # so that code is compiled for the timed shapes alone
        time_heads(benchmark, plan, kl, heads, {name: losses[name] for name in plan.slow if name in losses})
    benchmark.leave_out({f"{name} (heads)": why for name, why in kl.skipped.items()})
    measure_memory(benchmark, plan, replace(kl, losses=losses))


def first_rows(heads, count: int) -> Problem:
    return Problem(*(LinearLogits(x.hidden[:count], x.weight) for x in heads))


def check_gradients(benchmark, plan: Plan, kl: Family, heads) -> dict[str, Loss]:
    """Compare loss and gradients of kl with fp64 in 4 chunks. Returns the losses that may be timed."""
    in_chunks = partial(kl.losses[OURS], chunk_rows=-(-plan.checked_rows // 4))
    kdkernels_losses = {OURS: in_chunks, FP32_LOGITS: partial(in_chunks, logits_dtype=torch.float32)}
    others = {name: loss for name, loss in kl.losses.items() if name not in OTHER_LOSSES}
    checked = replace(kl, losses=others | kdkernels_losses)
    errors, wrong = check(benchmark, checked, first_rows(heads, plan.checked_rows), ERRORS)
    kl.skipped.update({name: why for name, why in wrong.items() if name not in kdkernels_losses})
    if OURS in errors:
        for column, tensor in zip(ERROR_COLUMNS[1:], ("hidden states", "weight"), strict=True):
            part = errors[OURS].columns[column] / errors[EAGER].columns[column]
            what = f"kl from {plan.checked_rows:,} hidden states in 4 chunks: error of the gradient of {tensor}"
            benchmark.target(f"{what} over eager's", part, 1.0)
    wrong = {OURS if name in kdkernels_losses else name for name in wrong}
    return {name: loss for name, loss in kl.losses.items() if name not in wrong}


def time_heads(benchmark, plan: Plan, kl: Family, heads, slow: dict[str, Loss]) -> None:
    settled = time_rows(benchmark, CASE, plan, kl, first_rows(heads, plan.rows), plan.rounds)
    in_turn = time_rows(benchmark, IN_TURN, plan, kl, first_rows(heads, plan.rows), plan.rounds)
    if slow:
        benchmark.results.remark(f"{', '.join(slow)}: timed once, on {plan.slow_rows:,} rows.")
        few = replace(kl, losses={OURS: kl.losses[OURS]} | slow)
        time_rows(benchmark, CASE, plan, few, first_rows(heads, plan.slow_rows), 1)
    for how, seconds in (("", settled), (", each after another", in_turn)):
        if seconds:
            set_targets(benchmark, plan, f"kl from {plan.rows:,} hidden states{how}:", seconds)
    if LIGER in settled:
        benchmark.results.remark(
            f"{LIGER}: LigerFusedLinearJSDLoss with its defaults, half a JS and half a cross-entropy; {LIGER_KL}: with "
            "weight_hard_loss=0, weight_soft_loss=1, beta=0, which is kl. Both with its torch.compile."
        )


def time_rows(benchmark, case: str, plan: Plan, kl: Family, problem: Problem, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender that runs, and of the products. A contender that raises goes to `kl.skipped`."""
    steps, shape = {PRODUCTS: products(problem, plan.chunk_rows or chunk_rows(problem))}, problem.shape
    for name, loss in kl.losses.items():
        problem.drop_gradients()
        try:
            problem.step(loss)()  # compiles, and allocates for the first time
            steps[name] = problem.step(loss)
        except Exception as error:
            kl.skipped[f"{name}, {shape.rows:,} rows"] = reason(error)
            if name == OURS:
                benchmark.results.failures.append(f"{name}, heads, {shape.rows:,} rows: {reason(error)}")
    steps[PRODUCTS]()
    if OURS not in steps:
        return {}
    over = {"ratio_to_kdkernels": OURS, "over_products": PRODUCTS}
    options = {"before": problem.drop_gradients, "settled": case == CASE, "over": over}
    return time_steps(benchmark, kl, case, shape, steps, rounds, **options)


def set_targets(benchmark, plan: Plan, what: str, seconds: dict[str, list[float]]) -> None:
    ours = seconds[OURS]
    benchmark.target(f"{what} over the matrix products alone", ratio(ours, seconds[PRODUCTS]), plan.over_products)
    if plan.percent_of_products:
        percent = 100 * ratio(seconds[PRODUCTS], ours)
        benchmark.target(f"{what} speed", percent, plan.percent_of_products, at_least=True, unit="% of the products'")
    for name, limit in ((EAGER, plan.over_eager), (LIGER, plan.over_liger), (LIGER_KL, plan.over_liger)):
        if name in seconds:
            benchmark.target(f"{what} faster than {name}", ratio(seconds[name], ours), limit, at_least=True)


def measure_memory(benchmark, plan: Plan, kl: Family) -> None:
    """Peak memory of every contender that was timed, and of kdkernels and eager PyTorch over the rows."""
    timed = [(row["contender"], row["N"]) for row in benchmark.results.select(CASE)]
    if (OURS, plan.rows) not in timed:
        return
    wanted = [pair for pair in timed if pair[0] != PRODUCTS]
    wanted += [(OURS, rows) for rows in plan.memory_rows] + [(EAGER, rows) for rows in plan.eager_memory_rows]
    wanted = [(name, plan.shape(rows)) for name, rows in wanted]
    if parts := weigh(
        benchmark, kl, MEMORY, wanted, allowed=partial(allowed_bytes, device=torch.device(benchmark.device))
    ):
        what = "kl from hidden states, any number of rows: peak memory over dWeight in fp32 + dHidden + chunk budget"
        benchmark.target(what, max(parts), 1.0)


def allowed_bytes(shape: Shape, device: torch.device) -> int:
    """The weight's gradient in fp32, the hidden states' gradient in bf16, and the chunks' budget."""
    return 4 * shape.classes * shape.width + 2 * shape.rows * shape.width + current_budget(device)
