"""The measurements on a GPU: how much of the copy bandwidth each loss reaches, and what others reach.

The floor of a loss with its gradient is three tensors of the logits' size (student and teacher read, gradient
written: 6 bytes a column in bf16), that of a loss alone is two. A step that moves just these at the rate of a plain
copy, which is measured before every step, is at 100 %.

Heads, top-k teachers, optimal transport and ULD have no such floor. They are timed by the clock, with the device waited
for, beside what others run; heads and transport between classes also beside their matrix products alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import class_ot
import heads
import topk
import torch
import transport
import uld
from benchmark import DTYPES, VOCABULARY, Benchmark
from contenders import CATALOGUE, NOT_COMPARED, available_backends, kdkernels_loss, label, operator, peers, reason
from data import real_or_synthetic, synthetic_heads, synthetic_logits
from head_contenders import Leaves, head_losses
from timing import Timing, free_bytes, peak_extra_bytes, queued, ratio, synchronize, training_steps

from kdkernels.backends import NAMES, refuse

# What a step does, and how many tensors of the logits' size it has to move. The operator is the kernels alone, without
# what a call does around them.
WITH_GRADIENT, OPERATOR, FORWARD = "loss and gradient", "operator alone", "forward"
MOVED = {WITH_GRADIENT: 3, OPERATOR: 3, FORWARD: 2}
# Percent of the copy bandwidth that an H100 should reach in bf16, at the plan's main_rows.
TARGETS = {
    WITH_GRADIENT: dict.fromkeys(CATALOGUE, 60)
    | dict.fromkeys(("mixed_kl", "tv", "hellinger"), 75)
    | dict.fromkeys(("kl", "reverse_kl"), 85),
    FORWARD: {"kl": 90},
}
GiB = 2**30


@dataclass(frozen=True)
class Plan:
    """What is measured. `main_rows` is the number of rows at which all but kl is."""

    vocabularies: tuple[int, ...]
    rows: tuple[int, ...]
    main_rows: int
    main_vocabularies: tuple[int, ...]  # of the divergences; the last is the contenders'
    dtypes: tuple[str, ...]
    contended: tuple[str, ...]  # the divergences at which others are measured
    clouds: tuple[tuple[int, int], ...]  # rows and classes of SinKD; in a sweep one of the two is the first cloud's
    swept_classes: tuple[int, ...]
    swept_rows: tuple[int, ...]
    problems: int  # in a batch, each 64 x 64
    images: tuple[int, int]  # their number and classes, of transport between classes
    checked_rows: int = 300  # more than a card works on at once, so that the second row of a block is checked too
    copied: int = GiB  # takes far longer than the host needs to queue a step, and more than fits a cache
    seconds: float = 0.12  # for each step of a case
    rounds: tuple[int, int] = (10, 100)
    of_heads: heads.Plan = heads.GPU


FULL = Plan(
    vocabularies=(32_768, 50_257, 128_256, VOCABULARY, 262_144),
    rows=(1024, 4096, 16_384),
    main_rows=4096,
    main_vocabularies=(32_768, VOCABULARY),
    dtypes=("bfloat16", "float32"),
    contended=("kl", "js"),
    clouds=((64, 32_000), (64, 128_000)),
    swept_classes=(8_000, 16_000, 64_000),
    swept_rows=(16, 32, 128),
    problems=4096,
    images=class_ot.SHAPE,
)
QUICK = Plan(
    vocabularies=(32_768, VOCABULARY),
    rows=(4096,),
    main_rows=4096,
    main_vocabularies=(VOCABULARY,),
    dtypes=("bfloat16",),
    contended=("kl",),
    clouds=((64, 32_000),),
    swept_classes=(8_000,),
    swept_rows=(16,),
    problems=1024,
    images=class_ot.QUICK,
    seconds=0.05,
)


def ours(backend: str) -> str:
    return f"kdkernels ({backend})"


def dtype_name(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


class GpuBenchmark(Benchmark):
    import_repeats = 3

    def __init__(self, quick: bool, rounds: int | None, screen, output: Path, plan: Plan | None = None, device="cuda"):
        super().__init__(device, quick, rounds or (3 if quick else 15), screen, output)
        self.plan = plan or (QUICK if quick else FULL)
        probe = torch.zeros(1, 1, device=device)
        refused = {ours(name): why for name in NAMES if name != "cpu" and (why := refuse(name, probe, probe))}
        self.backends = [name for name in available_backends(device) if name != "reference"]
        if not self.backends:
            raise RuntimeError(f"no kernels serve on {device}: {refused}")
        self.leave_out(refused)
        self.baseline = ours(self.results.machine["backend"])
        self.judged = "H100" in self.results.machine["device"]
        self.note_on_targets = "" if self.judged else " (they are an H100's: no verdict on this card)"
        source = torch.rand(self.plan.copied // 4, device=device)  # random: a copy of zeros may be faster
        written = torch.empty_like(source)
        self.copy = lambda: written.copy_(source)
        self.results.remark(
            f"Before each step {self.plan.copied / GiB:.3g} GiB are copied: the floor of that repetition, which also "
            "takes the step's inputs out of the cache."
        )

    def phases(self):
        def of_dtype(dtype):
            return [
                (f"kl over V and N, {dtype}", lambda: self.grid(dtype)),
                (f"divergences, {dtype}", lambda: self.divergences(dtype)),
            ]

        first, *others = self.plan.dtypes
        return [
            ("answers", self.answers),
            *of_dtype(first),
            *((f"contenders, {name}", lambda name=name: self.contenders(name)) for name in self.plan.contended),
            *(phase for dtype in others for phase in of_dtype(dtype)),
            ("heads", self.heads),
            ("top-k teachers", self.topk),
            ("optimal transport", self.transport),
            ("transport between classes", self.class_ot),
            ("universal logit distillation", self.uld),
            ("small call", self.small_call),
            ("import", self.import_time),
        ]

    def draw(self, path: Path) -> None:
        from figure import draw_gpu

        draw_gpu(self.results, path, self.baseline, self.plan.main_rows, self.plan.main_vocabularies[-1])

    def answers(self) -> None:
        """At every vocabulary that is timed, and on real logits where they can be had."""
        rows = self.plan.checked_rows
        *real, source = real_or_synthetic(rows)
        self.results.remark(f"Logits of V = {real[0].shape[-1]:,}: {source}. All others are synthetic.")
        synthetic = [synthetic_logits(rows, v, torch.float32, self.device) for v in self.plan.vocabularies]
        self.check_answers([tuple(real), *synthetic])

    def grid(self, dtype: str) -> None:
        """kl on every backend over the vocabularies and rows."""

        def measure_kl(student, teacher):
            self.judge("kl", self.measure("grid", "kl", {}, student, teacher), student)

        for vocabulary in self.plan.vocabularies:
            for rows in self.plan.rows:
                self.where_it_fits(rows, vocabulary, dtype, measure_kl)

    def divergences(self, dtype: str) -> None:
        """Every divergence on every backend."""

        def measure_all(student, teacher):
            for divergence in CATALOGUE:
                timings = self.measure("divergences", divergence, {}, student, teacher)
                if divergence != "kl":  # which the grid has judged
                    self.judge(divergence, timings, student)

        for vocabulary in self.plan.main_vocabularies:
            self.where_it_fits(self.plan.main_rows, vocabulary, dtype, measure_all)

    def contenders(self, divergence: str) -> None:
        """What a user would otherwise run, in the same rounds; for kl also the memory of each."""

        def measure_others(student, teacher):
            others, skipped = peers(divergence, self.device)
            if self.quick and others.pop("torch.compile", None):
                skipped["torch.compile"] = "--quick"
            self.leave_out(skipped | NOT_COMPARED)
            timings = self.measure("contenders", divergence, others, student, teacher)
            if divergence == "kl":
                self.memory([name for name, work in timings if work == WITH_GRADIENT], others, student, teacher)

        for dtype in self.plan.dtypes:
            self.where_it_fits(self.plan.main_rows, self.plan.main_vocabularies[-1], dtype, measure_others)

    def memory(self, names: list[str], others: dict, student, teacher) -> None:
        losses = {ours(name): kdkernels_loss("kl", name) for name in self.backends} | others
        steps, drop_gradient = training_steps({name: losses[name] for name in names}, student, teacher)
        peaks = {name: peak_extra_bytes(steps[name], drop_gradient, self.device) for name in names}
        self.record_memory(peaks, self.baseline, dtype_name(student), len(student))

    def topk(self) -> None:
        """kl against the top k of a teacher, and its extraction."""
        for dtype in self.plan.dtypes:
            shape = self.plan.main_rows, self.plan.main_vocabularies[-1]
            student, teacher = synthetic_logits(*shape, DTYPES[dtype], self.device)
            topk.measure(self, student, teacher, self.plan.rounds[0])

    def transport(self) -> None:
        """SinKD over rows and vocabulary, and batches of Sinkhorn problems; peak memory."""
        plan, rounds = self.plan, self.plan.rounds[0]
        rows, classes = plan.clouds[0]
        transport.measure_sinkd(self, plan.clouds, rounds)
        transport.sweep_sinkd(self, transport.OVER_V, [(rows, swept) for swept in plan.swept_classes], rounds)
        transport.sweep_sinkd(self, transport.OVER_B, [(swept, classes) for swept in plan.swept_rows], rounds)
        transport.measure_problems(self, plan.problems, rounds)

        def peak_bytes(name: str) -> int:
            return peak_extra_bytes(*transport.memory_step(name, rows, classes, self.device), self.device)

        transport.measure_memory(self, rows, classes, peak_bytes)

    def class_ot(self) -> None:
        """Optimal transport between the classes of images, and its peak memory."""
        batch = class_ot.Batch(*self.plan.images, self.device)
        class_ot.measure(self, batch, self.plan.rounds[0])

        def peak_bytes(name: str) -> int:
            return peak_extra_bytes(batch.step(class_ot.LOSSES[name]), batch.drop_gradient, self.device)

        class_ot.measure_memory(self, *self.plan.images, peak_bytes)

    def uld(self) -> None:
        """Between two vocabularies."""
        for dtype in self.plan.dtypes:
            rows, classes = min(self.plan.main_rows, 512), self.plan.main_vocabularies[-1]
            logits = uld.logits(rows, classes, classes - classes // 8, DTYPES[dtype], self.device)
            uld.measure(self, *logits, self.plan.rounds[0])

    def heads(self) -> None:
        """kl from hidden states beside its matrix products; the memory of each, and as the rows grow."""
        plan = self.plan.of_heads
        heads.measure(self, plan, *synthetic_heads(plan.rows, plan.width, plan.vocabulary, device=self.device))
        losses, _ = head_losses(self.device, not self.quick)

        def peak_bytes(name: str, rows: int) -> int:
            leaves = Leaves(*synthetic_heads(rows, plan.width, plan.vocabulary, device=self.device))
            return peak_extra_bytes(leaves.step(losses[name]), leaves.drop_gradients, self.device)

        heads.measure_memory(self, plan, peak_bytes)

    def where_it_fits(self, rows: int, vocabulary: int, dtype: str, use: Callable) -> None:
        """`use(student, teacher)`, if there is room for them, the gradient, and a tenth more for fragments."""
        needed = 1.1 * 3 * rows * vocabulary * DTYPES[dtype].itemsize
        free = free_bytes(self.device)
        if needed > free:
            shape = f"{dtype} [{rows:,}, {vocabulary:,}]"
            self.leave_out({shape: f"it takes {needed / GiB:.1f} GiB, and {free / GiB:.1f} are free"})
        else:
            use(*synthetic_logits(rows, vocabulary, DTYPES[dtype], self.device))

    def measure(self, case: str, divergence: str, others: dict, student, teacher) -> dict[tuple[str, str], Timing]:
        """Time every backend (with and without its surroundings, and without gradient) and the losses of `others`."""
        shape = f"{label(divergence)} {dtype_name(student)} [{student.shape[0]:,}, {student.shape[1]:,}]"
        advance = self.screen.task(f"{case}: {shape}", total=1)
        leaf = student.detach().requires_grad_()

        def drop_gradient():
            leaf.grad = None

        steps = self.usable(self.steps(divergence, others, leaf, teacher), shape, drop_gradient)
        if not steps:
            return {}
        sample = queued(steps, self.copy, 3, self.device, drop_gradient)
        round_seconds = sum(timing.median + timing.copy_median for timing in sample.values())
        least, most = self.plan.rounds
        rounds = min(max(int(self.plan.seconds * len(steps) / round_seconds), least), most)
        timings = queued(steps, self.copy, rounds, self.device, drop_gradient)
        for (name, work), timing in timings.items():
            self.record(case, divergence, student, name, work, timing, timings.get((self.baseline, work)))
        advance()
        return timings

    def steps(self, divergence: str, others: dict, leaf, teacher) -> dict[tuple[str, str], Callable[[], object]]:
        """By contender and work."""

        def with_gradient(loss):
            return lambda: loss(leaf, teacher).backward()

        steps = {}
        for backend in self.backends:
            loss = kdkernels_loss(divergence, backend)
            steps[ours(backend), WITH_GRADIENT] = with_gradient(loss)
            steps[ours(backend), OPERATOR] = operator(divergence, backend, leaf, teacher)
            steps[ours(backend), FORWARD] = torch.no_grad()(lambda loss=loss: loss(leaf, teacher))
        return steps | {(name, WITH_GRADIENT): with_gradient(loss) for name, loss in others.items()}

    def usable(self, steps: dict, shape: str, drop_gradient) -> dict:
        """The steps that run, after two runs each: compilation and the first allocations are not what is measured.

        One that raises is left out, and fails the run if it is ours.
        """
        running = {}
        for (name, work), step in steps.items():
            try:
                for _ in range(2):
                    drop_gradient()
                    step()
                    synchronize(self.device)
                running[name, work] = step
            except Exception as error:
                what, why = f"{name}, {work}, {shape}", reason(error)
                self.leave_out({what: why})
                if name.startswith("kdkernels"):
                    self.results.failures.append(f"{what}: {why}")
            drop_gradient()
        return running

    def record(self, case, divergence, student, name, work, timing: Timing, baseline: Timing | None) -> None:
        moved = MOVED[work] * student.nbytes
        self.results.add(
            case,
            name,
            divergence=label(divergence),
            dtype=dtype_name(student),
            N=student.shape[0],
            V=student.shape[1],
            work=work,
            median_ms=1e3 * timing.median,
            spread_percent=100 * timing.spread,
            ratio_to_kdkernels=ratio(timing.seconds, baseline.seconds) if baseline else None,
            GB_per_s=1e-9 * moved / timing.median,
            copy_GB_per_s=1e-9 * 2 * self.plan.copied / timing.copy_median,
            percent_of_floor=100 * timing.over_copy(moved, self.plan.copied),
            host_bound_percent=100 * timing.host_bound,
        )

    def judge(self, divergence: str, timings: dict, student) -> None:
        """The targets of what a user calls; what the kernels alone reach stands beside them."""
        rows, vocabulary = student.shape
        if student.dtype != torch.bfloat16 or rows != self.plan.main_rows:
            return
        reached = {
            work: 100 * timing.over_copy(MOVED[work] * student.nbytes, self.plan.copied)
            for (name, work), timing in timings.items()
            if name == self.baseline
        }
        for work, limits in TARGETS.items():
            limit = limits.get(divergence)
            if limit is None or work not in reached:
                continue
            what = f"{label(divergence)} bfloat16 [{rows:,}, {vocabulary:,}], {work}"
            if work == WITH_GRADIENT and OPERATOR in reached:
                what += f" ({OPERATOR}: {reached[OPERATOR]:.3g} %)"
            self.target(what, reached[work], limit, at_least=True, unit="% of copy")
