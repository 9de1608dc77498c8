"""Measure kdkernels on this machine: `python benchmarks/run.py [--quick] [--device cuda] [--output DIR]`.

In this order: are the answers right (against fp64, on real logits), how long do a loss and its gradient
take beside what people would otherwise run, how does the cost grow, what do a small call, an import and the
memory cost. Ends with tables, a CSV and a figure; on a GPU, torch alone is enough for all but the figure. Exit code 1
means a wrong answer, or on a GPU a kernel that raised; a missed target is printed and no more.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # of transformers, which would break the progress shown here

import report
import torch
from benchmark import Benchmark
from contenders import installed
from screen import screen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="in a minute: fewer cases and rounds, no torch.compile")
    parser.add_argument("--rounds", type=int, help="rounds of the CPU's main case and of small calls (15, quick 3)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return arguments


def conclude(benchmark: Benchmark) -> int:
    """Targets, machine, remarks and failures, also of a run that was cut short; returns the exit code."""
    show, results = benchmark.screen.print, benchmark.results
    report.print_targets(benchmark.screen, results.targets, benchmark.note_on_targets)
    show(", ".join(f"{key}: {value}" for key, value in results.machine.items()))
    for remark in results.remarks:
        show(remark)
    for failure in results.failures:
        show(f"WRONG {failure}")
    return 1 if results.failures else 0


def draw(benchmark: Benchmark) -> str:
    """The ending of the file that was drawn, or why none was."""
    if not installed("matplotlib"):
        return "no figure: matplotlib is not installed"
    benchmark.draw(benchmark.path.with_suffix(".png"))
    return "and .png"


def main() -> int:
    arguments = parse()
    warnings.filterwarnings("ignore", category=FutureWarning)
    started = time.perf_counter()
    with screen() as shown:
        if arguments.device == "cuda":
            from gpu import GpuBenchmark as Chosen
        else:
            from cpu import CpuBenchmark as Chosen
        benchmark = Chosen(arguments.quick, arguments.rounds, shown, arguments.output)
        try:
            benchmark.run()
        finally:
            code = conclude(benchmark)
        figure = draw(benchmark)
        shown.print(f"{benchmark.path.with_suffix('.csv')}, {figure}; {time.perf_counter() - started:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
