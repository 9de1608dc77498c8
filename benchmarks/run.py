"""Measure kdkernels on this machine: `python benchmarks/run.py [--quick] [--device cuda] [--output DIR]`.

In this order: are the answers right (against fp64, on real logits), how long do a loss and its gradient
take beside what people would otherwise run, how does the cost grow, what do a small call, an import and the
memory cost. Ends with tables, a CSV and a figure. Exit code 1 means a wrong answer; a missed target is
printed and no more.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # of transformers, which would break the progress shown here

import report
import torch
import torch.nn.functional as F
from answers import TOLERANCE, check
from contenders import (
    CATALOGUE,
    TRL_DIVERGENCES,
    available_backends,
    eager,
    eager_loss,
    installed,
    kdkernels_loss,
    label,
    peers,
    trl_loss,
)
from data import real_or_synthetic, synthetic_logits
from isolated import in_own_process
from report import Results, Target
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from timing import floor_seconds, interleaved, ratio, training_steps

import kdkernels
from kdkernels.backends import select

VOCABULARY = 151_936  # Qwen 2.5 and 3
MAIN_CASE = f"V = {VOCABULARY:,}, synthetic"
GATED_DIVERGENCES = ("js", "skew_kl", "skew_reverse_kl", "tv", "hellinger", "alpha")
# dtype: at least so many times faster than eager and torch.compile, at most so many times the copy floor
TARGETS = {"float32": (10, 4.5, 2.0), "bfloat16": (18, 6, 3.0)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="within a minute: fewer rows and rounds, no torch.compile or TRL"
    )
    parser.add_argument("--rounds", type=int, help="rounds of the main case (default 15, quick 3)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    return parser.parse_args()


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
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
        "backend": select("auto", probe, probe),
        "load": round(os.getloadavg()[0], 2),
    }


class Benchmark:
    """The measurements, each a method, in the order in which they run."""

    def __init__(self, arguments: argparse.Namespace, progress: Progress):
        self.device = arguments.device
        self.quick = arguments.quick
        self.rounds = arguments.rounds or (3 if self.quick else 15)
        on_gpu = self.device == "cuda"
        self.rows = 4096 if on_gpu else 128 if self.quick else 256
        self.progress = progress
        self.results = Results(describe_machine(self.device))

    def run(self) -> None:
        self.answers_and_real_logits()
        for dtype in DTYPES:
            self.main_case(dtype)
        for dtype in DTYPES:
            self.divergences(dtype)
        self.sweep("V", [(self.rows // 2, vocabulary) for vocabulary in (32_768, 65_536, 131_072, 262_144)])
        self.sweep("N", [(self.rows * factor // 4, 65_536) for factor in (1, 2, 4, 8)])
        self.memory()
        self.small_call()
        self.import_time()

    def measure(self, case, divergence, losses, student, teacher, rounds=None) -> dict[str, list[float]]:
        """Time the contenders in interleaved rounds and add a row for each; returns their seconds."""
        rounds = rounds or self.rounds
        dtype = str(student.dtype).removeprefix("torch.")
        shape = "x".join(map(str, student.shape))
        task = self.progress.add_task(f"{case}: {divergence} {dtype} {shape}", total=rounds)
        steps, drop_gradient = training_steps(losses, student, teacher)
        seconds = interleaved(
            steps, rounds, self.device, before=drop_gradient, after_round=lambda: self.progress.advance(task)
        )
        self.record(case, divergence, dtype, *student.shape, seconds)
        return seconds

    def record(self, case, divergence, dtype, rows, vocabulary, seconds) -> None:
        floor = floor_seconds(seconds["copy"])
        for name in seconds:
            if name == "copy":
                continue
            self.results.add(
                case,
                name,
                divergence=divergence,
                dtype=dtype,
                N=rows,
                V=vocabulary,
                median_ms=1e3 * statistics.median(seconds[name]),
                ratio_to_kdkernels=ratio(seconds[name], seconds["kdkernels"]),
                over_floor=ratio(seconds[name], floor),
            )

    def answers_and_real_logits(self) -> None:
        """Check every backend on a few rows, then time on all of them."""
        task = self.progress.add_task("real logits", total=1)
        student, teacher, source = real_or_synthetic(64 if self.quick else 512)
        student, teacher = student.to(self.device), teacher.to(self.device)
        self.results.remarks.append(f"Logits of the answers and of the case `real`: {source}.")
        self.progress.advance(task)

        backends = available_backends(self.device)
        checked = 8 if self.quick else 32
        task = self.progress.add_task(f"answers of {', '.join(backends)}", total=len(CATALOGUE) * len(DTYPES))
        for dtype in DTYPES.values():
            few = student[:checked].to(dtype), teacher[:checked].to(dtype)
            for divergence in CATALOGUE:
                with_trl = not self.quick and installed("trl") and divergence in TRL_DIVERGENCES
                found = check(divergence, *few, backends, with_trl)
                self.results.answers += found
                for answer in found:
                    self.results.add(
                        "answers",
                        answer.contender,
                        divergence=label(divergence),
                        dtype=answer.dtype,
                        N=checked,
                        V=few[0].shape[-1],
                        loss_error=answer.loss_error,
                        gradient_error=answer.gradient_error,
                    )
                self.progress.advance(task)

        case = "real" if source.startswith("SmolLM2") else "V = 49,152, synthetic"
        for divergence in ["kl", "js"] if self.quick else CATALOGUE:
            losses = {"kdkernels": kdkernels_loss(divergence)}
            if divergence in eager.DIVERGENCES:
                losses["eager"] = eager_loss(divergence)
            if not self.quick and installed("trl") and divergence in TRL_DIVERGENCES:
                losses["TRL"] = trl_loss(divergence)
            self.measure(case, label(divergence), losses, student, teacher, rounds=min(self.rounds, 5))

    def main_case(self, dtype: str) -> None:
        """kl at the vocabulary of a current model, beside everything else that can be run here."""
        student, teacher = synthetic_logits(self.rows, VOCABULARY, DTYPES[dtype], self.device)
        losses = {"kdkernels": kdkernels_loss("kl")}
        if self.device == "cuda":
            losses |= {f"kdkernels ({name})": kdkernels_loss("kl", name) for name in available_backends("cuda")}
        others, skipped = peers("kl", self.device)
        if self.quick:
            for name in ("torch.compile", "TRL"):
                if others.pop(name, None):
                    skipped[name] = "--quick"
        if "torch.compile" in others and (why := self.why_not_compiled(others["torch.compile"], student, teacher)):
            del others["torch.compile"]
            skipped["torch.compile"] = why
        losses |= others
        self.results.remarks += [
            remark
            for name, why in skipped.items()
            if (remark := f"{name} is left out: {why}.") not in self.results.remarks
        ]
        seconds = self.measure(MAIN_CASE, "kl", losses, student, teacher)

        over_eager, over_compile, over_floor = TARGETS[dtype]
        ours = seconds["kdkernels"]
        self.target(f"kl {dtype}: faster than eager", ratio(seconds["eager"], ours), over_eager, at_least=True)
        if self.device == "cpu" and not self.quick:
            thp = self.eager_with_huge_pages(dtype)
            self.target(f"kl {dtype}: faster than eager with huge pages", thp, None)
        if "torch.compile" in seconds:
            compiled = ratio(seconds["torch.compile"], ours)
            self.target(f"kl {dtype}: faster than torch.compile", compiled, over_compile, at_least=True)
        self.target(f"kl {dtype}: over the copy floor", ratio(ours, floor_seconds(seconds["copy"])), over_floor)

    def target(self, what: str, value: float, limit: float | None, **options) -> None:
        """Targets are set for a CPU; what a GPU should reach depends on which it is."""
        if self.device == "cpu":
            self.results.targets.append(Target(what, value, limit, **options))

    def why_not_compiled(self, compiled, student, teacher) -> str | None:
        """torch.compile needs a compiler on the machine; any failure of it is a reason to leave it out."""
        task = self.progress.add_task("torch.compile: compilation", total=1)
        try:
            compiled(student.detach().requires_grad_(), teacher).backward()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        finally:
            self.progress.advance(task)

    def eager_with_huge_pages(self, dtype: str) -> float:
        """PyTorch's own switch for huge pages, in a process of its own because it is read at the start."""
        case = f"{MAIN_CASE}, THP_MEM_ALLOC_ENABLE=1"
        rounds = min(self.rounds, 9)
        task = self.progress.add_task(f"{case}: kl {dtype}", total=1)
        seconds = in_own_process(
            "rounds",
            environment={"THP_MEM_ALLOC_ENABLE": "1"},
            contenders="kdkernels,eager",
            rows=self.rows,
            vocabulary=VOCABULARY,
            dtype=dtype,
            rounds=rounds,
        )
        self.progress.advance(task)
        self.record(case, "kl", dtype, self.rows, VOCABULARY, seconds)
        return ratio(seconds["eager"], seconds["kdkernels"])

    def divergences(self, dtype: str) -> None:
        """Every divergence of kdkernels in the same rounds, against kl."""
        student, teacher = synthetic_logits(self.rows, VOCABULARY, DTYPES[dtype], self.device)
        task = self.progress.add_task(f"divergences {dtype}", total=self.rounds)
        steps, drop_gradient = training_steps(
            {divergence: kdkernels_loss(divergence) for divergence in CATALOGUE}, student, teacher
        )
        seconds = interleaved(
            steps,
            self.rounds,
            self.device,
            before=drop_gradient,
            after_round=lambda: self.progress.advance(task),
        )
        floor = floor_seconds(seconds["copy"])
        for divergence in CATALOGUE:
            over_kl = ratio(seconds[divergence], seconds["kl"])
            self.results.add(
                "divergences",
                "kdkernels",
                divergence=label(divergence),
                dtype=dtype,
                N=self.rows,
                V=VOCABULARY,
                median_ms=1e3 * statistics.median(seconds[divergence]),
                over_kl=over_kl,
                over_floor=ratio(seconds[divergence], floor),
            )
            if divergence in GATED_DIVERGENCES:
                self.target(f"{label(divergence)} {dtype}: over kl", over_kl, 1.6)

    def sweep(self, axis: str, shapes: list[tuple[int, int]]) -> None:
        for rows, vocabulary in shapes:
            student, teacher = synthetic_logits(rows, vocabulary, torch.bfloat16, self.device)
            losses = {"kdkernels": kdkernels_loss("kl"), "eager": eager_loss("kl")}
            self.measure(f"sweep {axis}", "kl", losses, student, teacher, rounds=min(self.rounds, 7))

    def memory(self) -> None:
        """Peak beyond the inputs of one loss with gradient, each in a process of its own."""
        names = ["kdkernels", "eager"] + ([] if self.quick else ["torch.compile"] + ["TRL"] * installed("trl"))
        compiled = any(row["contender"] == "torch.compile" for row in self.results.rows)
        names = [name for name in names if name != "torch.compile" or compiled]
        dtypes = ["bfloat16"] if self.quick else list(DTYPES)
        task = self.progress.add_task("memory", total=len(names) * len(dtypes))
        for dtype in dtypes:
            peaks = {}
            for name in names:
                peaks[name] = in_own_process(
                    "memory",
                    contenders=name,
                    rows=self.rows,
                    vocabulary=VOCABULARY,
                    dtype=dtype,
                    device=self.device,
                )
                self.progress.advance(task)
            for name, peak in peaks.items():
                self.results.add(
                    "memory",
                    name,
                    divergence="kl",
                    dtype=dtype,
                    N=self.rows,
                    V=VOCABULARY,
                    ratio_to_kdkernels=peak / peaks["kdkernels"],
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
        self.target("one forward call on [8, 1000]: over F.kl_div with its log_softmaxes", over, 3.0)

    def import_time(self) -> None:
        code = "import torch, time; start = time.perf_counter(); import kdkernels\n"
        code += "print(time.perf_counter() - start)"
        repeats = 3 if self.quick else 7
        task = self.progress.add_task("import", total=repeats)
        seconds = []
        for _ in range(repeats):
            seconds.append(float(subprocess.check_output([sys.executable, "-c", code], text=True)))
            self.progress.advance(task)
        median = statistics.median(seconds)
        self.results.add("import beyond torch", "kdkernels", median_ms=1e3 * median)
        self.target("import kdkernels beyond import torch", median, 0.2, unit="s")


def main() -> int:
    arguments = parse()
    warnings.filterwarnings("ignore", category=FutureWarning)
    console = Console(width=None if sys.stdout.isatty() else 120)  # a log is not 80 columns wide
    started = time.perf_counter()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        benchmark = Benchmark(arguments, progress)
        benchmark.run()

    results = benchmark.results
    report.print_timings(console, results)
    report.print_answers(console, results.answers)
    report.print_targets(console, results.targets, quick=arguments.quick)
    console.print(", ".join(f"{key}: {value}" for key, value in results.machine.items()))
    for remark in results.remarks:
        console.print(remark)

    arguments.output.mkdir(parents=True, exist_ok=True)
    name = ("quick_" if arguments.quick else "") + arguments.device + "_" + report.slug(results.machine["device"])
    results.frame().to_csv(arguments.output / f"{name}.csv", index=False)
    report.draw(results, arguments.output / f"{name}.png", MAIN_CASE)
    console.print(f"{arguments.output / name}.csv and .png, after {time.perf_counter() - started:.0f} s")

    wrong = [answer for answer in results.answers if answer.wrong]
    for answer in wrong:
        allowed = " / ".join(f"{limit:.1e}" for limit in answer.allowed)
        console.print(
            f"[bold red]WRONG[/] {answer.contender} {answer.divergence} {answer.dtype}: "
            f"errors {answer.loss_error:.1e} / {answer.gradient_error:.1e}, "
            f"allowed {allowed} (eager in the same dtype + {TOLERANCE:g})"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
