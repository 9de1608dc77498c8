"""What the measurement of a CPU (cpu.py) and of a GPU (gpu.py) have in common."""

import os
import platform
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import report
import torch
import torch.nn.functional as F
from answers import check
from contenders import CATALOGUE, TRL_DIVERGENCES, available_backends, installed, label
from data import synthetic_logits
from report import Results, Target
from timing import interleaved, ratio

import kdkernels
from kdkernels.backends import select
from kdkernels.info import version

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY = 151_936  # Qwen 2.5 and 3


def describe_machine(device: str) -> dict[str, object]:
    name = platform.processor() or platform.machine()
    probe = torch.zeros(1, 1, device=device)
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    versions = {"cuda": torch.version.cuda, "triton": version("triton")} if device == "cuda" else {}
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **versions,
        "kdkernels": kdkernels.__version__,
        "backend": select("auto", probe, probe),
        "load": round(os.getloadavg()[0], 2),
    }


class Benchmark(ABC):
    """Runs the phases of a subclass. What a phase measured is shown, and in the CSV, when the phase ends."""

    # Targets beside what is measured here; None shows the number alone.
    small_call_limit: float | None = None
    import_limit: float | None = None
    import_repeats = 7
    judged = True  # whether the targets are meant for this machine
    is_of_cpu = False  # whether limits that were set for a CPU are
    note_on_targets = ""

    def __init__(self, device: str, quick: bool, rounds: int, screen, output: Path):
        self.device = device
        self.quick = quick
        self.rounds = rounds
        self.screen = screen
        self.results = Results(describe_machine(device))
        name = ("quick_" if quick else "") + device + "_" + report.slug(self.results.machine["device"])
        self.path = output / name

    @abstractmethod
    def phases(self) -> list[tuple[str, Callable[[], None]]]:
        """Names and measurements, in their order."""

    @abstractmethod
    def draw(self, path: Path) -> None:
        """The figure of what was measured."""

    def run(self) -> None:
        start = time.perf_counter()
        for name, phase in self.phases():
            phase_start = time.perf_counter()
            rows, answers = len(self.results.rows), len(self.results.answers)
            try:
                phase()
            finally:
                self.results.write(self.path.with_suffix(".csv"))
                report.print_timings(self.screen, self.results.rows[rows:])
                if self.results.answers[answers:]:
                    report.print_answers(self.screen, self.results.answers[answers:])
                now = time.perf_counter()
                self.screen.print(f"{name}: {now - phase_start:.0f} s, {now - start:.0f} s in all")

    def target(self, what: str, value: float, limit: float | None, **options) -> None:
        self.results.targets.append(Target(what, value, limit, **{"judged": self.judged, **options}))

    def cpu_target(self, what: str, value: float, limit: float, **options) -> None:
        """A target with a limit that was set for a CPU: elsewhere the number stands alone."""
        self.target(what, value, limit if self.is_of_cpu else None, **options)

    def leave_out(self, skipped: dict[str, str]) -> None:
        for name, why in skipped.items():
            self.results.remark(f"{name} is left out: {why}.")

    def check_answers(self, logits: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Loss and gradient of every backend on pairs of student and teacher logits [N, V], in both dtypes."""
        backends = available_backends(self.device)
        advance = self.screen.task(
            f"answers of {', '.join(backends)}", total=len(logits) * len(DTYPES) * len(CATALOGUE)
        )
        for dtype in DTYPES.values():
            for pair in logits:
                student, teacher = (x.to(self.device, dtype) for x in pair)
                for divergence in CATALOGUE:
                    with_trl = not self.quick and installed("trl") and divergence in TRL_DIVERGENCES
                    self.record_answers(check(divergence, student, teacher, backends, with_trl), len(student))
                    advance()

    def record_answers(self, answers, rows: int) -> None:
        self.results.answers += answers
        for answer in answers:
            self.results.add(
                "answers",
                answer.contender,
                divergence=label(answer.divergence),
                dtype=answer.dtype,
                N=rows,
                V=answer.vocabulary,
                loss_error=answer.loss_error,
                gradient_error=answer.gradient_error,
            )
            if answer.wrong:
                self.results.failures.append(answer.why_wrong())

    def record_memory(self, peaks: dict[str, int], baseline: str, dtype: str, rows: int) -> None:
        """Peaks beyond the inputs of one kl with gradient, by contender."""
        for name, peak in peaks.items():
            self.results.add(
                "memory",
                name,
                divergence="kl",
                dtype=dtype,
                N=rows,
                V=VOCABULARY,
                ratio_to_kdkernels=peak / peaks[baseline] if peaks.get(baseline) else None,
                peak_extra_MiB=peak / report.MiB,
            )

    def small_call(self) -> None:
        """The price of a call: one forward on logits that cost nothing."""
        student, teacher = synthetic_logits(8, 1000, torch.float32, self.device)
        calls = 50

        def repeat(call):
            return lambda: [call() for _ in range(calls)] and None

        def eager():
            F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")

        steps = {"kdkernels": repeat(lambda: kdkernels.fused_kl(student, teacher)), "F.kl_div": repeat(eager)}
        seconds = interleaved(steps, 5 * self.rounds, self.device)
        for name in steps:
            self.results.add(
                "small call, forward",
                name,
                divergence="kl",
                dtype="float32",
                N=8,
                V=1000,
                median_ms=1e3 * statistics.median(seconds[name]) / calls,
                ratio_to_kdkernels=ratio(seconds[name], seconds["kdkernels"]),
            )
        over = ratio(seconds["kdkernels"], seconds["F.kl_div"])
        what = "one forward call on [8, 1000]: over F.kl_div with its log_softmaxes"
        self.target(what, over, self.small_call_limit)

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
        self.results.add("import beyond torch", "kdkernels", median_ms=1e3 * median)
        self.target("import kdkernels beyond import torch", median, self.import_limit, unit="s")
