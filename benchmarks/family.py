"""One record for a family of losses, and the one way to check, time and weigh its contenders on every device.

A contender is a loss function `loss(student, *others)`. Each file of a family has the family's name. It defines the
record `FAMILY`, or `family(device, with_peers)` if the record depends on the device; `PLANS`, the shapes and rounds for
each device; and `measure(benchmark, plan)`. Answers are checked against fp64 before anything is timed.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from data import synthetic_logits
from report import MiB
from timing import floor_seconds, interleaved, ratio

from kdkernels import LinearLogits, SparseLogProbs

OURS, COPY, FLOOR = "kdkernels", "copy", "floor"
Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of a problem, as the CSV names it: N, H (heads only) and V."""

    rows: int
    classes: int
    dtype: str = "float32"
    width: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def columns(self) -> dict[str, object]:
        width = {} if self.width is None else {"H": self.width}
        return {"dtype": self.dtype, "N": self.rows, **width, "V": self.classes}

    def __str__(self) -> str:
        return f"{self.dtype} [{self.rows:,}, {self.classes:,}]"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mapped(x, change: Callable[[torch.Tensor], torch.Tensor]):
    """`x` with every floating-point tensor in it changed; labels, indices and numbers stay."""
    if isinstance(x, LinearLogits):
        return LinearLogits(change(x.hidden), change(x.weight))
    if isinstance(x, SparseLogProbs):
        return SparseLogProbs(x.indices, change(x.log_probs), tail_log_prob=change(x.tail_log_prob))
    return change(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


class Problem:
    """A loss's inputs: the student, whose tensors receive gradients, and the other inputs, which receive none."""

    def __init__(self, student: torch.Tensor | LinearLogits, *others):
        self.student = mapped(student, lambda x: x.detach().requires_grad_())
        self.others = others

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        x = self.student
        return (x.hidden, x.weight) if isinstance(x, LinearLogits) else (x,)

    @property
    def shape(self) -> Shape:
        x = self.student
        if isinstance(x, LinearLogits):
            return Shape(len(x.hidden), len(x.weight), name_of(x.hidden.dtype), x.hidden.shape[1])
        return Shape(x.shape[0], x.shape[1], name_of(x.dtype))

    def double(self) -> "Problem":
        return Problem(*(mapped(x, torch.Tensor.double) for x in (self.student, *self.others)))

    def drop_gradients(self) -> None:
        for x in self.leaves:
            x.grad = None

    def step(self, loss: Loss) -> Callable[[], None]:
        return lambda: loss(self.student, *self.others).backward()


def synthetic_problem(shape: Shape, device: str) -> Problem:
    """Synthetic logits of a student and a teacher."""
    return Problem(*synthetic_logits(shape.rows, shape.classes, shape.torch_dtype, device))


def loss_and_gradients(loss: Loss, problem: Problem) -> list[torch.Tensor]:
    """The loss and the gradient of each of the student's tensors, in fp64."""
    value = loss(problem.student, *problem.others)
    return [x.detach().double() for x in (value, *torch.autograd.grad(value, problem.leaves))]


class Errors(NamedTuple):
    """Errors of one answer: those that the CSV shows, and those that the limits judge."""

    columns: dict[str, float]
    judged: tuple[float, ...]


def largest_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error over the largest element; NaN counts as infinite."""
    return _finite_or_inf((value - truth).abs().max() / truth.abs().max())


def norm_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the error over the norm of the truth; NaN counts as infinite."""
    return _finite_or_inf((value - truth).norm() / truth.norm())


def _finite_or_inf(error: torch.Tensor) -> float:
    return math.inf if math.isnan(error.item()) else error.item()


def errors_by(distance: Callable[..., float], *columns: str) -> Callable[..., Errors]:
    """Measures each part of an answer by `distance`, shows it in its column, and judges it."""

    def errors(answer, truth, problem) -> Errors:
        parts = tuple(distance(x, y) for x, y in zip(answer, truth, strict=True))
        return Errors(dict(zip(columns, parts, strict=True)), parts)

    return errors


def limit_by_dtype(**limits: float) -> Callable[..., float]:
    """One limit for every judged error, by the dtype of the student."""
    return lambda problems, truths, errors: limits[problems[0].shape.dtype]


@dataclass(frozen=True)
class Family:
    """One loss family, as the benchmarks see it."""

    name: str  # of the family's file
    losses: dict[str, Loss]  # by contender; the name of kdkernels' begins with "kdkernels"
    truth: Loss  # evaluated on the problem in fp64
    errors: Callable[..., Errors]  # of (answer, truth, problem)
    allowed: Callable[..., float | tuple[float, ...]]  # of (problems, truths, errors by contender): a limit each
    divergence: str | None = None
    checked: tuple[str, ...] = ()  # the contenders whose answers are checked; empty: all of them
    answer: Callable[[Loss, Problem], list[torch.Tensor]] = loss_and_gradients
    problem: Callable[[Shape, str], Problem] = synthetic_problem  # for the memory of a contender on a device
    other_losses: dict[str, str] = field(default_factory=dict)  # by contender: its divergence where it differs
    skipped: dict[str, str] = field(default_factory=dict)  # by contender that is left out: the reason

    def columns(self, contender: str, shape: Shape) -> dict[str, object]:
        divergence = self.other_losses.get(contender, self.divergence)
        return ({} if divergence is None else {"divergence": divergence}) | shape.columns()


def is_judged(contender: str) -> bool:
    """Only kdkernels' kernels can fail a run: the reference backend is plain PyTorch."""
    return contender.startswith(OURS) and contender != f"{OURS} (reference)"


def reason(error: Exception) -> str:
    """The error's type and the first line of its text."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:200]}"


class Checked(NamedTuple):
    errors: dict[str, Errors]  # by contender that returned an answer
    wrong: dict[str, str]  # by contender that raised, or whose error is over its limit: the reason


def check(benchmark, family: Family, problems: Problem | Iterable[Problem], case: str) -> Checked:
    """Compare every checked contender's answer with fp64; with several problems the largest errors count.

    A contender of kdkernels that raises, or is over its limit, fails the run. Another that raises is left out; eager
    PyTorch may not raise, because limits may depend on its errors.
    """
    problems = [problems] if isinstance(problems, Problem) else list(problems)
    shape = problems[0].shape
    truths = [family.answer(family.truth, problem.double()) for problem in problems]
    errors, wrong = {}, {}
    for name in family.checked or family.losses:
        try:
            answers = [family.answer(family.losses[name], problem) for problem in problems]
        except Exception as error:
            if name.startswith("eager"):
                raise
            wrong[name] = reason(error)
            continue
        each = [family.errors(*triple) for triple in zip(answers, truths, problems, strict=True)]
        columns = {column: max(e.columns[column] for e in each) for column in each[0].columns}
        errors[name] = Errors(columns, tuple(map(max, *(e.judged for e in each))) if each[1:] else each[0].judged)
        benchmark.results.add(case, name, **family.columns(name, shape), **columns)

    allowed = family.allowed(problems, truths, errors) if errors else ()
    for name in filter(is_judged, errors):
        judged = errors[name].judged
        limits = allowed if isinstance(allowed, tuple) else (allowed,) * len(judged)
        if not all(error <= limit for error, limit in zip(judged, limits, strict=True)):
            texts = (" / ".join(f"{x:.1e}" for x in numbers) for numbers in (judged, limits))
            wrong[name] = "errors {}, allowed {}".format(*texts)
            benchmark.results.mark_wrong(case, name, shape)
    for name in filter(is_judged, wrong):
        what = " ".join(filter(None, (family.divergence, str(shape))))
        benchmark.results.failures.append(f"{name}, {case} ({what}): {wrong[name]}")
    return Checked(errors, wrong)


def time_steps(benchmark, family, case, shape, steps, rounds, *, before, settled=False, **recorded):
    """Time steps in the same rounds (see `timing.interleaved`), record a row for each, and return their seconds."""
    advance = benchmark.screen.task(f"{case}: {family.divergence or family.name} {shape}", total=rounds)
    seconds = interleaved(steps, rounds, benchmark.device, before, advance, settled)
    return record_times(benchmark, family, case, shape, seconds, **recorded)


def record_times(benchmark, family, case, shape, seconds, *, over, unlisted=(), calls=1, contender=None):
    """Add a row for each step's seconds: their median, and their ratio in each round to those of other steps.

    `over` maps a column to the step that its ratio divides by. A step that copies the logits gives FLOOR too.
    `unlisted` steps get no row. A step repeats its work `calls` times. With `contender` all rows are of this contender,
    and the step's name is the divergence. Returns the seconds, with FLOOR.
    """
    steps = [name for name in seconds if name not in unlisted]
    if COPY in seconds:
        seconds = seconds | {FLOOR: floor_seconds(seconds[COPY])}
    for name in steps:
        columns = family.columns(name, shape)
        columns |= {} if contender is None else {"divergence": name}
        ratios = {column: ratio(seconds[name], seconds[baseline]) for column, baseline in over.items()}
        median_ms = 1e3 * statistics.median(seconds[name]) / calls
        benchmark.results.add(case, contender or name, **columns, median_ms=median_ms, **ratios)
    return seconds


def time_losses(benchmark, family: Family, case: str, problem: Problem, rounds: int, over=None, **more_steps):
    """Time loss and gradient of every contender on one problem, and further steps, in the same rounds."""
    steps = {name: problem.step(loss) for name, loss in family.losses.items()} | more_steps
    over = {"ratio_to_kdkernels": OURS} | (over or {})
    options = {"before": problem.drop_gradients, "over": over}
    return time_steps(benchmark, family, case, problem.shape, steps, rounds, **options)


def weigh(benchmark, family: Family, case: str, wanted, baseline: str = OURS, allowed=None) -> list[float]:
    """Record peak memory beyond the inputs of one loss with gradient, for each (contender, shape) in `wanted`.

    The baseline is measured first; the others are compared with it at the same shape. `allowed` maps a shape to bytes:
    then the baseline's rows get that limit, and the shares of it that they take are returned. A contender without room
    is left out.
    """
    wanted = list(dict.fromkeys(wanted))
    wanted = [pair for pair in wanted if pair[0] == baseline] + [pair for pair in wanted if pair[0] != baseline]
    advance = benchmark.screen.task(case, total=len(wanted))
    baseline_peaks, parts = {}, []
    for name, shape in wanted:
        try:
            peak = benchmark.peak_bytes(family, name, shape)
        except RuntimeError as error:  # without room, or a process that was killed for lack of it
            if name == baseline and not isinstance(error, torch.OutOfMemoryError):
                raise
            benchmark.leave_out({f"{name}, {shape} ({case})": reason(error)})
            continue
        finally:
            advance()
        columns = {}
        if name == baseline:
            baseline_peaks[shape] = peak
            if allowed is not None:
                parts.append(peak / allowed(shape))
                columns["allowed_MiB"] = allowed(shape) / MiB
        if baseline_peaks.get(shape):
            columns["ratio_to_kdkernels"] = peak / baseline_peaks[shape]
        benchmark.results.add(case, name, **family.columns(name, shape), peak_extra_MiB=peak / MiB, **columns)
    return parts
