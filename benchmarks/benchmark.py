"""The parts of a run that every device shares: phases, answers, families, a small call, the import."""

import os
import platform
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import class_ot
import linear
import pairwise
import report
import rows
import sinkhorn
import topk
import torch
import torch.nn.functional as F
import uld
from data import synthetic_logits
from family import OURS, Family, Problem, Shape, time_steps
from report import Results, Target
from timing import ratio

import kdkernels
from kdkernels.info import version

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY = 151_936  # Qwen 2.5 and 3
# The families besides the dense losses, by the name of their phase, in the order in which they run.
FAMILIES = {
    "heads": linear,
    "top-k teachers": topk,
    "SinKD": pairwise,
    "Sinkhorn problems": sinkhorn,
    "transport between classes": class_ot,
    "universal logit distillation": uld,
}


def describe_machine(device: str) -> dict[str, object]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    versions = {"cuda": torch.version.cuda, "triton": version("triton")} if device == "cuda" else {}
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **versions,
        "kdkernels": kdkernels.__version__,
        "backend": rows.automatic_backend(device),
        "load": round(os.getloadavg()[0], 2),
    }


class Benchmark(ABC):
    """Runs the phases of a subclass. When a phase ends, its results are printed and written to the CSV."""

    # Limits of targets; None shows the number alone.
    small_call_limit: float | None = None
    import_limit: float | None = None
    import_repeats = 7
    judged = True  # whether the targets apply to this machine
    is_on_cpu = False  # whether limits for a CPU apply
    note_on_targets = ""

    def __init__(self, device: str, quick: bool, rounds: int | None, screen, output: Path, plans=None):
        """`plans` replaces a family's plan, by the name of its file."""
        self.device = device
        self.quick = quick
        self.rounds = rounds or (3 if quick else 15)
        self.screen = screen
        self.plans = plans or {}
        self.results = Results(describe_machine(device))
        name = ("quick_" if quick else "") + device + "_" + report.slug(self.results.machine["device"])
        self.path = output / name

    @abstractmethod
    def dense_phases(self) -> list[tuple[str, Callable[[], None]]]:
        """Names and measurements of the dense losses, in their order."""

    @abstractmethod
    def draw(self, path: Path) -> None:
        """Draw the figure of this run."""

    @abstractmethod
    def peak_bytes(self, family: Family, contender: str, shape: Shape) -> int:
        """Peak memory beyond the inputs of one loss with its gradient, on a synthetic problem of this shape."""

    @abstractmethod
    def capped(self, rounds: int) -> int:
        """The rounds to run of those that a family's plan asks for."""

    def phases(self) -> list[tuple[str, Callable[[], None]]]:
        families = [(name, lambda module=module: self.measure_family(module)) for name, module in FAMILIES.items()]
        return [*self.dense_phases(), *families, ("small call", self.small_call), ("import", self.import_time)]

    def measure_family(self, module) -> None:
        plan = module.PLANS[("cpu" if self.is_on_cpu else "cuda") + " quick" * self.quick]
        module.measure(self, self.plans.get(module.__name__, plan))

    def run(self) -> None:
        start = time.perf_counter()
        for name, phase in self.phases():
            phase_start = time.perf_counter()
            first = len(self.results.rows)
            try:
                phase()
            finally:
                self.results.write(self.path.with_suffix(".csv"))
                measured = self.results.rows[first:]
                report.print_timings(self.screen, measured)
                if answers := [row for row in measured if row["case"] == rows.ANSWERS]:
                    report.print_answers(self.screen, answers, self.results.wrong)
                now = time.perf_counter()
                self.screen.print(f"{name}: {now - phase_start:.0f} s, {now - start:.0f} s in all")

    def target(self, what: str, value: float, limit: float | None, **options) -> None:
        self.results.targets.append(Target(what, value, limit, **{"judged": self.judged, **options}))

    def cpu_target(self, what: str, value: float, limit: float, **options) -> None:
        """A target whose limit is for a CPU; on another device the number is shown alone."""
        self.target(what, value, limit if self.is_on_cpu else None, **options)

    def faster_target(self, what: str, seconds: dict, slow, fast, limit: float, **options) -> None:
        """The ratio of two steps' times; on a CPU at least `limit`."""
        self.cpu_target(what, ratio(seconds[slow], seconds[fast]), limit, at_least=True, **options)

    def leave_out(self, skipped: dict[str, str]) -> None:
        for name, why in skipped.items():
            self.results.remark(f"{name} is left out: {why}.")

    def check_answers(self, logits: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Check loss and gradient of every backend on pairs of student and teacher logits [N, V], in both dtypes."""
        total = len(logits) * len(DTYPES) * len(rows.CATALOGUE)
        advance = self.screen.task(f"answers of {', '.join(rows.available_backends(self.device))}", total=total)
        for dtype in DTYPES.values():
            for pair in logits:
                student, teacher = (x.to(self.device, dtype) for x in pair)
                for divergence in rows.CATALOGUE:
                    with_trl = not self.quick and rows.installed("trl") and divergence in rows.TRL_DIVERGENCES
                    rows.check_answers(self, divergence, student, teacher, with_trl)
                    advance()

    def small_call(self) -> None:
        """The overhead of a call: one forward on logits whose arithmetic costs almost nothing."""
        problem, calls = Problem(*synthetic_logits(8, 1000, torch.float32, self.device)), 50
        student, (teacher,) = problem.student.detach(), problem.others

        def repeat(call):
            return lambda: [call() for _ in range(calls)] and None

        def eager():
            F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")

        steps = {OURS: repeat(lambda: kdkernels.fused_kl(student, teacher)), "F.kl_div": repeat(eager)}
        seconds = time_steps(
            self, rows.family(self.device, with_peers=False), "small call, forward", problem.shape, steps,
            5 * self.rounds, before=problem.drop_gradients, over={"ratio_to_kdkernels": OURS}, calls=calls,
        )  # fmt: skip
        what = "one forward call on [8, 1000]: over F.kl_div with its log_softmaxes"
        self.target(what, ratio(seconds[OURS], seconds["F.kl_div"]), self.small_call_limit)

    def import_time(self) -> None:
        code = "import torch, time; start = time.perf_counter(); import kdkernels\n"
        code += "print(time.perf_counter() - start)"
        repeats = 3 if self.quick else self.import_repeats
        advance = self.screen.task("import", total=repeats)
        seconds = []
        for _ in range(repeats):
            seconds.append(float(subprocess.check_output([sys.executable, "-c", code], text=True)))
            advance()
        median = statistics.median(seconds)
        self.results.add("import beyond torch", OURS, median_ms=1e3 * median)
        self.target("import kdkernels beyond import torch", median, self.import_limit, unit="s")
