"""Times of the kernels beside a copy: dense losses, extraction of a top k, and the loss against it.

A step is timed by CUDA events, in rounds that start with another step each, after a copy that evicts its inputs from
the cache. 100 % of the copy is the copy's rate over the bytes that the step has to move: logits read once, and the
gradient written once. `operator` is the kernels alone; `call` is the public function with backward. A share of the
rounds that is bound by the host means that the device may have waited for Python.
"""

import csv
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import cases
import torch

sys.path.append(str(cases.ROOT / "benchmarks"))
from data import synthetic_logits
from rows import operator
from timing import queued

import kdkernels
from kdkernels.backends import kernels
from kdkernels.families.options import RowOptions
from kdkernels.families.rows import Rows
from kdkernels.families.topk import Entries, TopkRows, sorted_entries

GiB = 2**30
VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
DIVERGENCES = ("kl", "js", "reverse_kl", "mixed_kl", "skew_kl", "tv", "hellinger", "alpha")
CALLED = ("kl", "js")  # timed as a call and without a gradient too
DTYPES = ("bfloat16", "float32")
ENTRIES = 64
PART_OF_MEMORY = 0.5


@dataclass
class Time:
    """A row of the CSV."""

    dtype: str
    N: int
    V: int
    case: str
    work: str
    ms: float
    GB_per_s: float
    copy_GB_per_s: float
    percent_of_copy: float
    host_bound_percent: float


def rows_that_fit(rows: int, columns: int, itemsize: int, memory: int) -> int:
    """As many rows, or as many as student, teacher, two gradients and what a call adds leave room for."""
    return max(min(rows, int(PART_OF_MEMORY * memory) // (6 * columns * itemsize)), 1)


def measured(student: torch.Tensor, teacher: torch.Tensor, backend: str, divergences) -> dict:
    """The steps by (case, work), each with the number of tensors of the logits' size that it moves."""
    rows, columns = student.shape
    one = torch.ones(1, device=student.device)
    scale = torch.full((rows,), 1 / rows, device=student.device)
    leaf = student.detach().requires_grad_()
    found = {}

    def call(divergence, teacher):
        return lambda: torch.autograd.grad(kdkernels.fused_divergence(leaf, teacher, divergence, backend=backend), leaf)

    for divergence in divergences:
        found[divergence, "operator"] = operator(divergence, backend, student, teacher), 3
        if divergence in CALLED:
            problem = Rows(
                student[:, None], teacher[:, None], RowOptions(scale, one), divergence, one / 2, columns, False
            )
            found[divergence, "loss alone"] = lambda problem=problem: kernels(backend).rows(problem, False), 2
            found[divergence, "call"] = call(divergence, teacher), 3
    k = min(ENTRIES, columns)
    sparse = kdkernels.topk_log_probs(teacher, k, backend=backend)
    indices, log_probs, _, _ = sorted_entries(sparse.indices, sparse.log_probs, scale, columns)
    entries = Entries(indices, log_probs, sparse.tail_log_prob)
    against = TopkRows(student[:, None], entries, RowOptions(scale, one), "kl", one, columns, False, False)
    top = f"top {k}"
    found[top, "operator"] = lambda: kernels(backend).topk(teacher[:, None], scale, one, k, columns), 1
    found[top, "call"] = lambda: kdkernels.topk_log_probs(teacher, k, backend=backend), 1
    found[f"kl against a {top}", "operator"] = lambda: kernels(backend).topk_rows(against, True), 2
    found[f"kl against a {top}", "call"] = call("kl", sparse), 2
    return found


def times(found: dict, student: torch.Tensor, copy, copied: int, rounds: int) -> list[Time]:
    rows, columns = student.shape
    for step, _ in found.values():
        step()  # compiles, loads and allocates
    timings = queued({name: step for name, (step, _) in found.items()}, copy, rounds, student.device.type)
    listed = []
    for (case, work), timing in timings.items():
        moved = found[case, work][1] * student.nbytes
        copy_rate, over = 2e-9 * copied / timing.copy_median, 100 * timing.over_copy(moved, copied)
        rate, host = 1e-9 * moved / timing.median, 100 * timing.host_bound
        dtype = str(student.dtype).removeprefix("torch.")
        listed.append(Time(dtype, rows, columns, case, work, 1e3 * timing.median, rate, copy_rate, over, host))
    return listed


def line(case, work, dtype, shape, ms, rate, copy_rate, share, host) -> str:
    return f"{case:20} {work:10} {dtype:8} {shape:16} {ms:>8} {rate:>6} {copy_rate:>6} {share:>9} {host:>6}"


def main() -> int:
    options = cases.parser(__doc__)
    options.add_argument("--output", type=Path, help="the folder for kernel_times.csv")
    options.add_argument("--vocabularies", type=int, nargs="+")
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    options.add_argument("--divergences", nargs="+", choices=list(kdkernels.CATALOGUE), default=DIVERGENCES)
    options.add_argument("--rows", type=int, help="at most (default 4096)")
    options.add_argument("--rounds", type=int)
    given = options.parse_args()
    on_gpu = given.device == "cuda"
    memory = torch.cuda.mem_get_info()[0] if on_gpu else GiB
    copied = min(4 * GiB, memory // 10) if on_gpu else 2**20
    source = torch.rand(copied // 4, device=given.device)  # random: a copy of zeros may be faster
    written = torch.empty_like(source)
    print(f"beside a copy of {copied / GiB:.3g} GiB")
    print(line("case", "work", "dtype", "[N, V]", "ms", "GB/s", "copy", "% of copy", "host %"), flush=True)
    with cases.serving(given.backend, given.device), open_csv(given.output) as file:
        table = csv.DictWriter(file, [field.name for field in fields(Time)])
        table.writeheader()
        for dtype in given.dtypes:
            for columns in given.vocabularies or (VOCABULARIES if on_gpu else (1000,)):
                most = given.rows or (4096 if on_gpu else 16)
                rows = rows_that_fit(most, columns, getattr(torch, dtype).itemsize, memory)
                student, teacher = synthetic_logits(rows, columns, getattr(torch, dtype), given.device)
                found = measured(student, teacher, given.backend, given.divergences)
                rounds = given.rounds or (11 if on_gpu else 3)
                for time in times(found, student, lambda: written.copy_(source), copied, rounds):
                    table.writerow(vars(time))
                    numbers = f"{time.ms:.3f}", *(f"{x:.0f}" for x in (time.GB_per_s, time.copy_GB_per_s))
                    shares = f"{time.percent_of_copy:.1f}", f"{time.host_bound_percent:.0f}"
                    print(line(time.case, time.work, dtype, f"[{time.N}, {time.V}]", *numbers, *shares))
                sys.stdout.flush()
                file.flush()
                del student, teacher, found
    return 0


def open_csv(folder: Path | None):
    if folder is None:
        return open("/dev/null", "w")
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "kernel_times.csv").open("w", newline="")


if __name__ == "__main__":
    sys.exit(main())
