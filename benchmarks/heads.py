"""Heads: kl with the gradients of hidden states and weight, beside the matrix products that it cannot do without.

Those are four of 2 N H V operations: the logits of both sides, and the gradients of hidden states and weight. The floor
is the time of these alone, in the chunks of rows that kdkernels makes, into memory that is there.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from contenders import reason
from head_contenders import (
    EAGER,
    LIGER,
    LIGER_KL,
    OTHER_LOSSES,
    OURS,
    PRODUCTS,
    TRL_HEAD,
    HeadLoss,
    Leaves,
    exact_loss,
    head_losses,
)
from report import MiB
from timing import interleaved, ratio

from kdkernels import LinearLogits
from kdkernels.families import linear as chunks

CASE, IN_TURN, MEMORY = "heads", "heads: each after another", "heads: memory"
ERRORS = "heads: errors against fp64 from the hidden states, in norm"
ERROR_COLUMNS = ("loss_error", "hidden_gradient_error", "weight_gradient_error")
# Of the error of eager PyTorch's gradients, what the order of sums makes of it.
CHANCE = 1.02
# In norm, of a sum of products that are each rounded to bf16, as eager PyTorch rounds only the whole.
ROUNDING = 2.0**-9


@dataclass(frozen=True)
class Plan:
    rows: int
    width: int
    vocabulary: int
    chunk_rows: int  # that the default budget gives
    checked_rows: int
    rounds: int
    slow: tuple[str, ...] = ()  # measured on `slow_rows`, once
    slow_rows: int = 1024
    memory_rows: tuple[int, ...] = ()  # of kdkernels
    eager_memory_rows: tuple[int, ...] = ()
    over_products: float | None = None  # targets: at most so many times the products' time,
    percent_of_products: float | None = None  # or at least so much of their speed;
    over_eager: float | None = None  # at least so many times faster
    over_liger: float | None = None


CPU = Plan(
    rows=4096,
    width=576,  # SmolLM2-135M
    vocabulary=49_152,
    chunk_rows=1024,
    checked_rows=1024,
    rounds=3,
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
    chunk_rows=448,
    checked_rows=512,
    rounds=20,
    memory_rows=(1024, 4096, 16_384, 32_768),
    eager_memory_rows=(1024, 4096, 16_384),
    percent_of_products=85,
)


def measure(benchmark, plan: Plan, student: LinearLogits, teacher: LinearLogits) -> None:
    """Check the answers, then time everyone in the same rounds, in two ways.

    Each just after itself, as in a loop that does nothing else, and in turn with the others: the memory that a step
    finds is then what another left, which matters to those who take much.
    """
    losses, skipped = head_losses(benchmark.device, not benchmark.quick)
    check(benchmark, plan, losses, skipped, student, teacher)
    if OURS not in losses:
        return
    torch.compiler.reset()  # what is compiled from here on is for the shapes that are timed, and for no other

    fast = {name: loss for name, loss in losses.items() if name not in plan.slow}
    seconds = timed(benchmark, CASE, plan, plan.rows, plan.rounds, fast, skipped, student, teacher)
    in_turn = timed(benchmark, IN_TURN, plan, plan.rows, plan.rounds, fast, skipped, student, teacher)
    if slow := {name: losses[name] for name in plan.slow if name in losses}:
        benchmark.results.remark(f"{', '.join(slow)}: timed once, on {plan.slow_rows:,} rows.")
        timed(benchmark, CASE, plan, plan.slow_rows, 1, {OURS: losses[OURS]} | slow, skipped, student, teacher)
    benchmark.leave_out({f"{name} (heads)": why for name, why in skipped.items()})
    if OURS not in seconds:
        return
    judge(benchmark, plan, f"kl from {plan.rows:,} hidden states:", seconds)
    judge(benchmark, plan, f"kl from {plan.rows:,} hidden states, each after another:", in_turn)
    if LIGER in seconds:
        benchmark.results.remark(
            f"{LIGER}: LigerFusedLinearJSDLoss as it comes, half a JS and half a cross-entropy; {LIGER_KL}: with "
            "weight_hard_loss=0, weight_soft_loss=1, beta=0, which is kl. Both with its torch.compile."
        )


def judge(benchmark, plan: Plan, what: str, seconds: dict[str, list[float]]) -> None:
    ours = seconds[OURS]
    benchmark.target(f"{what} over the matrix products alone", ratio(ours, seconds[PRODUCTS]), plan.over_products)
    if plan.percent_of_products:
        percent = 100 * ratio(seconds[PRODUCTS], ours)
        benchmark.target(f"{what} speed", percent, plan.percent_of_products, at_least=True, unit="% of the products'")
    for name, limit in ((EAGER, plan.over_eager), (LIGER, plan.over_liger), (LIGER_KL, plan.over_liger)):
        if name in seconds:
            benchmark.target(f"{what} faster than {name}", ratio(seconds[name], ours), limit, at_least=True)


def add(benchmark, case: str, name: str, plan: Plan, rows: int, **columns) -> None:
    shape = {"dtype": "bfloat16", "N": rows, "H": plan.width, "V": plan.vocabulary}
    benchmark.results.add(case, name, divergence=OTHER_LOSSES.get(name, "kl"), **shape, **columns)


def rows_of(head: LinearLogits, count: int) -> LinearLogits:
    return LinearLogits(head.hidden[:count], head.weight)


def loss_and_gradients(loss: HeadLoss, student: LinearLogits, teacher: LinearLogits) -> list[torch.Tensor]:
    """In fp64."""
    leaves = Leaves(student, teacher)
    value = loss(leaves.student, teacher)
    value.backward()
    return [x.double() for x in (value.detach(), leaves.student.hidden.grad, leaves.student.weight.grad)]


def check(benchmark, plan: Plan, losses: dict[str, HeadLoss], skipped: dict[str, str], student, teacher) -> None:
    """Loss and gradients of everyone against fp64. kdkernels must be as near as eager PyTorch.

    One that raises goes from `losses` to `skipped`. Where kdkernels raises or is wrong the run fails, and it is taken
    from `losses`: it is not timed.
    """
    student, teacher = rows_of(student, plan.checked_rows), rows_of(teacher, plan.checked_rows)
    wide = (LinearLogits(x.hidden.double(), x.weight.double()) for x in (student, teacher))
    truth = loss_and_gradients(exact_loss, *wide)
    # In several chunks, as the full number of rows has.
    in_chunks = partial(losses[OURS], chunk_rows=-(-plan.checked_rows // 4))
    fp32_logits = f"{OURS}, fp32 logits"
    checked = {**losses, OURS: in_chunks, fp32_logits: partial(in_chunks, logits_dtype=torch.float32)}
    advance = benchmark.screen.task("heads: answers", total=len(checked))
    errors: dict[str, list[float]] = {}
    for name, loss in checked.items():
        advance()
        if name in OTHER_LOSSES:
            continue
        try:
            found = loss_and_gradients(loss, student, teacher)
        except Exception as error:
            if name == EAGER:  # without it nothing is known of what is allowed
                raise
            losses.pop(name, None)
            skipped[name] = reason(error)
            if name.startswith(OURS):
                benchmark.results.failures.append(f"{name}, heads: {skipped[name]}")
            continue
        errors[name] = [((x - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True)]
        columns = dict(zip(ERROR_COLUMNS, errors[name], strict=True))
        add(benchmark, ERRORS, name, plan, plan.checked_rows, **columns)

    loss_error, hidden_error, weight_error = errors[EAGER]
    # The mean of losses that have each the rounding of bf16 logits.
    allowed = [2 * loss_error + 1e-4, CHANCE * hidden_error, CHANCE * math.hypot(weight_error, ROUNDING)]
    for name in (OURS, fp32_logits):
        # `not all`: an error that is NaN is above none.
        if name in errors and not all(error <= most for error, most in zip(errors[name], allowed, strict=True)):
            came, most = (" / ".join(f"{x:.1e}" for x in errors) for errors in (errors[name], allowed))
            benchmark.results.failures.append(f"{name}, heads: errors {came}, allowed {most}")
            losses.pop(OURS, None)
    if OURS in errors:
        _, *of_ours = errors[OURS]
        for what, of_one, of_eager in zip(
            ("hidden states", "weight"), of_ours, (hidden_error, weight_error), strict=True
        ):
            name = (
                f"kl from {plan.checked_rows:,} hidden states in 4 chunks: error of the gradient of {what} over eager's"
            )
            benchmark.target(name, of_one / of_eager, 1.0)


def timed(
    benchmark, case: str, plan: Plan, rows: int, rounds: int, losses, skipped, student, teacher
) -> dict[str, list[float]]:
    """Seconds of everyone who runs, and of the products, in the same rounds. Who does not run goes to `skipped`."""
    student, teacher = rows_of(student, rows), rows_of(teacher, rows)
    leaves = Leaves(student, teacher)
    advance = benchmark.screen.task(f"heads: kl from {rows:,} hidden states", total=rounds + 1)
    steps = {PRODUCTS: leaves.products(plan.chunk_rows)}
    for name, loss in losses.items():
        leaves.drop_gradients()
        try:
            leaves.step(loss)()  # compiles, and takes the memory
            steps[name] = leaves.step(loss)
        except Exception as error:
            skipped[f"{name}, {rows:,} rows"] = reason(error)
            if name == OURS:
                benchmark.results.failures.append(f"{name}, heads, {rows:,} rows: {reason(error)}")
    steps[PRODUCTS]()
    advance()
    if OURS not in steps:
        return {}
    seconds = interleaved(steps, rounds, benchmark.device, leaves.drop_gradients, advance, settled=case == CASE)
    for name in steps:
        add(
            benchmark,
            case,
            name,
            plan,
            rows,
            median_ms=1e3 * statistics.median(seconds[name]),
            ratio_to_kdkernels=ratio(seconds[name], seconds[OURS]),
            over_products=ratio(seconds[name], seconds[PRODUCTS]),
        )
    return seconds


def measure_memory(benchmark, plan: Plan, peak_bytes: Callable[[str, int], int]) -> None:
    """The peak beyond the inputs of one step: of everyone who was timed, and of some as the rows grow."""
    timed_at = [(row["contender"], row["N"]) for row in benchmark.results.select(CASE)]
    if (OURS, plan.rows) not in timed_at:
        return
    wanted = [(name, rows) for name, rows in timed_at if name != PRODUCTS]
    wanted += [(OURS, rows) for rows in plan.memory_rows] + [(EAGER, rows) for rows in plan.eager_memory_rows]
    wanted = list(dict.fromkeys(wanted))
    advance = benchmark.screen.task("heads: memory", total=len(wanted))
    over_allowed = []
    # Ours first: others are held against it.
    for name, rows in sorted(wanted, key=lambda pair: (pair[0] != OURS, wanted.index(pair))):
        try:
            peak = peak_bytes(name, rows)
        except RuntimeError as error:  # no memory, or a process that was killed for it
            if name == OURS and not isinstance(error, torch.OutOfMemoryError):
                raise
            benchmark.leave_out({f"{name}, {rows:,} rows (heads: memory)": reason(error)})
            continue
        finally:
            advance()
        columns = {"peak_extra_MiB": peak / MiB}
        if name == OURS:
            allowed = allowed_bytes(plan, rows)
            columns["allowed_MiB"] = allowed / MiB
            over_allowed.append(peak / allowed)
        of_ours = [row["peak_extra_MiB"] for row in benchmark.results.select(MEMORY, contender=OURS, N=rows)]
        if of_ours and of_ours[0]:
            columns["ratio_to_kdkernels"] = peak / MiB / of_ours[0]
        add(benchmark, MEMORY, name, plan, rows, **columns)
    if over_allowed:
        what = "kl from hidden states, any number of rows: peak memory over dWeight in fp32 + dHidden + chunk budget"
        benchmark.target(what, max(over_allowed), 1.0)


def allowed_bytes(plan: Plan, rows: int) -> int:
    """The weight's gradient in fp32, that of the hidden states in bf16, and the budget of the chunks."""
    return 4 * plan.vocabulary * plan.width + 2 * rows * plan.width + chunks.current_budget()
