"""The dense losses on a GPU: the share of the copy bandwidth that each loss reaches, ours and others'.

The floor of a loss with its gradient is three tensors of the logits' size (student and teacher read, gradient written:
6 bytes a column in bf16). The floor of a loss alone is two. Each step is preceded by a measured copy; a step that moves
only its floor, at the copy's rate, is at 100 %.

The other families have no such floor. Their files time them by the clock, waiting for the device, and compare them with
the code that others run; heads and transport between classes are also compared with their matrix products.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmark import DTYPES, VOCABULARY, Benchmark
from data import real_or_synthetic, synthetic_logits
from family import OURS, Family, Problem, Shape, reason, synthetic_problem, weigh
from rows import (
    CATALOGUE,
    COMPILED,
    NOT_COMPARED,
    available_backends,
    family,
    kdkernels_loss,
    label,
    operator,
    refusals,
    with_backend,
)
from timing import Timing, free_bytes, peak_extra_bytes, queued, ratio, synchronize

# The work of a step, and how many tensors of the logits' size it has to move. The operator is the kernels alone,
# without the work of the public function around them.
WITH_GRADIENT, OPERATOR, FORWARD = "loss and gradient", "operator alone", "forward"
MOVED = {WITH_GRADIENT: 3, OPERATOR: 3, FORWARD: 2}
# Percent of the copy bandwidth that bf16 should reach, by the card, at the plan's main_rows. The numbers are computed,
# not measured: from the instructions and exponentials of a class, against what the card issues while it copies 6 bytes;
# on an A100 from the bytes of three sweeps. For cards other than the H100, only kl and js are computed.
TARGETS = {
    "H100": {
        WITH_GRADIENT: dict.fromkeys(CATALOGUE, 60)
        | dict.fromkeys(("mixed_kl", "tv", "hellinger"), 75)
        | {"kl": 85, "reverse_kl": 85, "js": 68},
        FORWARD: {"kl": 90},
    },
    "H200": {WITH_GRADIENT: {"kl": 70, "js": 45}},
    "B200": {WITH_GRADIENT: {"kl": 55, "js": 35}},
    "A100": {WITH_GRADIENT: {"kl": 55, "js": 38}},
}
GiB = 2**30


@dataclass(frozen=True)
class Plan:
    """The shapes of the dense losses. Only kl runs at other numbers of rows than `main_rows`."""

    vocabularies: tuple[int, ...]
    rows: tuple[int, ...]
    main_rows: int
    main_vocabularies: tuple[int, ...]  # for the divergences; the last one is for the contenders
    dtypes: tuple[str, ...]
    contended: tuple[str, ...]  # the divergences at which contenders are measured
    checked_rows: int = 300  # more than a GPU works on at once, so that the second row of a block is checked too
    # Bytes, halved until eight times as many are free. 4 GiB take an H200 2 ms, which is longer than the host needs to
    # queue a step, and fill more than a cache.
    copied: int = 4 * GiB
    seconds: float = 0.12  # for each step of a case
    rounds: tuple[int, int] = (10, 100)  # at least and at most


FULL = Plan(
    vocabularies=(32_768, 50_257, 128_256, VOCABULARY, 262_144),
    rows=(1024, 4096, 16_384),
    main_rows=4096,
    main_vocabularies=(32_768, VOCABULARY),
    dtypes=("bfloat16", "float32"),
    contended=("kl", "js"),
)
QUICK = dataclasses.replace(
    FULL, vocabularies=(32_768, VOCABULARY), rows=(4096,), main_vocabularies=(VOCABULARY,), dtypes=("bfloat16",),
    contended=("kl",), seconds=0.05,
)  # fmt: skip


class GpuBenchmark(Benchmark):
    import_repeats = 3

    def __init__(
        self, quick: bool, rounds: int | None, screen, output: Path, plan: Plan | None = None, device="cuda", plans=None
    ):
        super().__init__(device, quick, rounds, screen, output, plans)
        self.plan = plan or (QUICK if quick else FULL)
        self.backends = [name for name in available_backends(device) if name != "reference"]
        if not self.backends:
            raise RuntimeError(f"expected a backend that serves on {device}; all refuse: {refusals(device)}")
        self.leave_out(refusals(device))
        self.baseline = with_backend(self.results.machine["backend"])
        card = next((card for card in TARGETS if card in self.results.machine["device"]), None)
        self.judged, self.targets = card is not None, TARGETS[card or "H100"]
        self.note_on_targets = (
            f" (computed for the {card or 'H100'}, not measured{'' if card else ': no verdict here'})"
        )
        self.copied = self.plan.copied
        while 8 * self.copied > free_bytes(device):
            self.copied //= 2
        source = torch.rand(self.copied // 4, device=device)  # random: a copy of zeros may be faster
        written = torch.empty_like(source)
        self.copy = lambda: written.copy_(source)
        self.results.remark(
            f"Before each step {self.copied / GiB:.3g} GiB are copied. The copy's rate is the floor of that "
            "repetition, and the copy evicts the step's inputs from the cache."
        )

    def capped(self, rounds: int) -> int:
        return rounds

    def peak_bytes(self, family: Family, contender: str, shape: Shape) -> int:
        problem = family.problem(shape, self.device)
        return peak_extra_bytes(problem.step(family.losses[contender]), problem.drop_gradients, self.device)

    def dense_phases(self):
        def phases_of(dtype):
            return [
                (f"kl over V and N, {dtype}", lambda: self.grid(dtype)),
                (f"divergences, {dtype}", lambda: self.divergences(dtype)),
            ]

        first, *others = self.plan.dtypes
        return [
            ("answers", self.answers),
            *phases_of(first),
            *((f"contenders, {name}", lambda name=name: self.contenders(name)) for name in self.plan.contended),
            *(phase for dtype in others for phase in phases_of(dtype)),
        ]

    def draw(self, path: Path) -> None:
        from figure import draw_gpu

        draw_gpu(self.results, path, self.baseline, self.plan.main_rows, self.plan.main_vocabularies[-1])

    def answers(self) -> None:
        """Check at every timed vocabulary, and on real logits if the packages are installed."""
        rows = self.plan.checked_rows
        *real, source = real_or_synthetic(rows)
        self.results.remark(f"Logits of V = {real[0].shape[-1]:,}: {source}. All others are synthetic.")
        synthetic = [synthetic_logits(rows, v, torch.float32, self.device) for v in self.plan.vocabularies]
        self.check_answers([tuple(real), *synthetic])

    def grid(self, dtype: str) -> None:
        """kl on every backend over the vocabularies and rows."""

        def measure_kl(problem):
            self.judge("kl", self.measure("grid", "kl", {}, problem), problem.shape)

        for vocabulary in self.plan.vocabularies:
            for rows in self.plan.rows:
                self.where_it_fits(Shape(rows, vocabulary, dtype), measure_kl)

    def divergences(self, dtype: str) -> None:
        """Every divergence on every backend."""

        def measure_all(problem):
            for divergence in CATALOGUE:
                timings = self.measure("divergences", divergence, {}, problem)
                if divergence != "kl":  # the grid judges kl
                    self.judge(divergence, timings, problem.shape)

        for vocabulary in self.plan.main_vocabularies:
            self.where_it_fits(Shape(self.plan.main_rows, vocabulary, dtype), measure_all)

    def contenders(self, divergence: str) -> None:
        """kdkernels and the other implementations in the same rounds; for kl also the memory of each."""

        def measure_others(problem):
            everyone = family(self.device, True, divergence)
            others = {name: loss for name, loss in everyone.losses.items() if name != OURS}
            if self.quick and others.pop(COMPILED, None):
                everyone.skipped[COMPILED] = "--quick"
            self.leave_out(everyone.skipped | NOT_COMPARED)
            timings = self.measure("contenders", divergence, others, problem)
            if divergence == "kl":
                ours = {with_backend(name): kdkernels_loss("kl", name) for name in self.backends}
                everyone = dataclasses.replace(everyone, losses=ours | others)
                wanted = [(name, problem.shape) for name, work in timings if work == WITH_GRADIENT]
                weigh(self, everyone, "memory", wanted, self.baseline)

        for dtype in self.plan.dtypes:
            self.where_it_fits(Shape(self.plan.main_rows, self.plan.main_vocabularies[-1], dtype), measure_others)

    def where_it_fits(self, shape: Shape, use: Callable[[Problem], None]) -> None:
        """Call `use` with a problem, if its tensors, the gradient and a tenth more for fragmentation fit in memory."""
        needed = 1.1 * 3 * shape.rows * shape.classes * DTYPES[shape.dtype].itemsize
        free = free_bytes(self.device)
        if needed > free:
            self.leave_out({str(shape): f"it needs {needed / GiB:.1f} GiB, and {free / GiB:.1f} GiB are free"})
        else:
            use(synthetic_problem(shape, self.device))

    def measure(self, case: str, divergence: str, others: dict, problem: Problem) -> dict[tuple[str, str], Timing]:
        """Time every backend (public function, operator alone, forward) and the losses of `others`."""
        what = f"{label(divergence)} {problem.shape}"
        advance = self.screen.task(f"{case}: {what}", total=1)
        drop = problem.drop_gradients
        steps = self.usable(self.steps(divergence, others, problem), what, drop)
        if not steps:
            return {}
        sample = queued(steps, self.copy, 3, self.device, drop)
        round_seconds = sum(timing.median + timing.copy_median for timing in sample.values())
        fewest, most = self.plan.rounds
        rounds = min(max(int(self.plan.seconds * len(steps) / round_seconds), fewest), most)
        timings = queued(steps, self.copy, rounds, self.device, drop)
        moved = moved_bytes(problem.shape)
        for (name, work), timing in timings.items():
            columns = {"divergence": label(divergence), **problem.shape.columns(), "work": work}
            self.record(case, name, columns, timing, timings.get((self.baseline, work)), moved[work])
        advance()
        return timings

    def steps(self, divergence: str, others: dict, problem: Problem) -> dict[tuple[str, str], Callable[[], object]]:
        """By contender and work."""
        student, (teacher,) = problem.student, problem.others
        steps = {}
        for backend in self.backends:
            loss, name = kdkernels_loss(divergence, backend), with_backend(backend)
            steps[name, WITH_GRADIENT] = problem.step(loss)
            steps[name, OPERATOR] = operator(divergence, backend, student, teacher)
            steps[name, FORWARD] = torch.no_grad()(lambda loss=loss: loss(student, teacher))
        return steps | {(name, WITH_GRADIENT): problem.step(loss) for name, loss in others.items()}

    def usable(self, steps: dict, what: str, drop_gradients) -> dict:
        """The steps that run. Each runs twice, so that compilation and first allocations are not timed.

        A step that raises is left out; a step of kdkernels that raises fails the run.
        """
        running = {}
        for (name, work), step in steps.items():
            try:
                for _ in range(2):
                    drop_gradients()
                    step()
                    synchronize(self.device)
                running[name, work] = step
            except Exception as error:
                failed, why = f"{name}, {work}, {what}", reason(error)
                self.leave_out({failed: why})
                if name.startswith(OURS):
                    self.results.failures.append(f"{failed}: {why}")
            drop_gradients()
        return running

    def record(self, case, name, columns, timing: Timing, baseline: Timing | None, moved: int) -> None:
        self.results.add(
            case,
            name,
            **columns,
            median_ms=1e3 * timing.median,
            spread_percent=100 * timing.spread,
            ratio_to_kdkernels=ratio(timing.seconds, baseline.seconds) if baseline else None,
            GB_per_s=1e-9 * moved / timing.median,
            copy_GB_per_s=1e-9 * 2 * self.copied / timing.copy_median,
            percent_of_floor=100 * timing.over_copy(moved, self.copied),
            host_bound_percent=100 * timing.host_bound,
        )

    def judge(self, divergence: str, timings: dict, shape: Shape) -> None:
        """Add the targets of the public function; the operator's share stands in the text of each."""
        if shape.dtype != "bfloat16" or shape.rows != self.plan.main_rows:
            return
        moved = moved_bytes(shape)
        reached = {
            work: 100 * timing.over_copy(moved[work], self.copied)
            for (name, work), timing in timings.items()
            if name == self.baseline
        }
        for work, limits in self.targets.items():
            limit = limits.get(divergence)
            if limit is None or work not in reached:
                continue
            what = f"{label(divergence)} {shape}, {work}"
            if work == WITH_GRADIENT and OPERATOR in reached:
                what += f" ({OPERATOR}: {reached[OPERATOR]:.3g} %)"
            self.target(what, reached[work], limit, at_least=True, unit="% of copy")


def moved_bytes(shape: Shape) -> dict[str, int]:
    """By kind of work: the bytes that it has to move."""
    size = shape.rows * shape.classes * DTYPES[shape.dtype].itemsize
    return {work: tensors * size for work, tensors in MOVED.items()}
