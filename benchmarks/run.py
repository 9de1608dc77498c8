"""Measure kdkernels on this machine: `python benchmarks/run.py [--quick] [--device cuda] [--output DIR]`.

It checks the answers against fp64 on real logits. It times a loss with its gradient, compared with the code that people
use otherwise, and how the time grows with rows and vocabulary. It measures memory, a small call and the import. It
writes tables, and files to DIR: a CSV, the targets with the remarks as text, and a figure. All but the figure needs
only torch. Exit code 1 means that an answer of kdkernels is wrong or that one of its kernels raised. A missed target is
printed and does not change the exit code.
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
from screen import PlainScreen, screen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, smaller shapes, no torch.compile")
    parser.add_argument(
        "--rounds", type=int, help="rounds of the main case on a CPU and of small calls (default 15; with --quick 3)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path(__file__).resolve().parent / "results",
        help="the folder of all files that are written",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return arguments


def conclude(benchmark: Benchmark) -> int:
    """Print and write targets, machine, remarks and failures, also after an interrupted run; return the exit code."""
    results = benchmark.results
    benchmark.path.parent.mkdir(parents=True, exist_ok=True)
    with benchmark.path.with_suffix(".txt").open("w") as file:
        for shown in (PlainScreen(file), benchmark.screen):
            report.print_targets(shown, results.targets, benchmark.note_on_targets)
            shown.print(", ".join(f"{key}: {value}" for key, value in results.machine.items()))
            for line in (*results.remarks, *(f"WRONG {failure}" for failure in results.failures)):
                shown.print(line)
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
        shown.print(f"{benchmark.path.with_suffix('.csv')}, .txt, {figure}; {time.perf_counter() - started:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
