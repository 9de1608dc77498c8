"""Measure kdkernels on this machine: `python benchmarks/run.py [--quick] [--device cuda] [--output DIR]`.

It checks the answers against fp64 on real logits. It times a loss with its gradient, compared with the code that people
use otherwise, and how the time grows with rows and vocabulary. It measures memory, a small call and the import. It
writes tables, a CSV and a figure; all but the figure needs only torch. Exit code 1 means that an answer of
kdkernels is wrong or that one of its kernels raised. A missed target is printed and does not change the exit code.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars would break this progress display

import report
import torch
from benchmark import Benchmark
from rows import installed
from screen import screen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, smaller shapes, no torch.compile")
    parser.add_argument(
        "--rounds", type=int, help="rounds of the main case on a CPU and of small calls (default 15; with --quick 3)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return arguments


def conclude(benchmark: Benchmark) -> int:
    """Print targets, machine, remarks and failures, also after an interrupted run; return the exit code."""
    show, results = benchmark.screen.print, benchmark.results
    report.print_targets(benchmark.screen, results.targets, benchmark.note_on_targets)
    show(", ".join(f"{key}: {value}" for key, value in results.machine.items()))
    for remark in results.remarks:
        show(remark)
    for failure in results.failures:
        show(f"WRONG {failure}")
    return 1 if results.failures else 0


def draw(benchmark: Benchmark) -> str:
    """Draw the figure; return the ending of its file, or the reason that none was drawn."""
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
