"""Times of the kernels beside a copy: dense losses, extraction of a top k, and the loss against it.

A step is timed by CUDA events, in rounds that start with another step each, after a copy that evicts its inputs from
the cache. 100 % of the copy is the copy's rate over the bytes that the step has to move: logits read once, and the
gradient written once. `operator` is the kernels alone; `call` is the public function with backward. A share of the
rounds that is bound by the host means that the device may have waited for Python.
"""

import csv
import itertools
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
CALLED = ("kl", "js")  # timed as a call and without a gradient too; alone with Triton, which compiles each divergence
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


def usable(found: dict, shape: str, device: str) -> tuple[dict, int]:
    """The steps that run, and the number of the others. The first run compiles, loads and allocates."""
    running, failed = {}, 0
    for name, (step, tensors) in found.items():
        try:
            step()
            cases.synchronize(device)
            running[name] = step, tensors
        except Exception as error:
            failed += 1
            print(f"RAISED {' '.join(name)} {shape}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return running, failed


def times(found: dict, student: torch.Tensor, copy, copied: int, rounds: int) -> list[Time]:
    if not found:
        return []
    rows, columns = student.shape
    timings = queued({name: step for name, (step, _) in found.items()}, copy, rounds, student.device.type)
    listed = []
    for (case, work), timing in timings.items():
        moved = found[case, work][1] * student.nbytes
        copy_rate, over = 2e-9 * copied / timing.copy_median, 100 * timing.over_copy(moved, copied)
        rate, host = 1e-9 * moved / timing.median, 100 * timing.host_bound
        dtype = str(student.dtype).removeprefix("torch.")
        listed.append(Time(dtype, rows, columns, case, work, 1e3 * timing.median, rate, copy_rate, over, host))
    return listed


class Table:
    """Prints the times, and writes them to kernel_times.csv in a folder as they come."""

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / "kernel_times.csv"
        self.times: list[Time] = []
        self.print("case", "work", "dtype", "[N, V]", "ms", "GB/s", "copy", "% of copy", "host %")

    def print(self, case, work, dtype, shape, ms, rate, copy_rate, share, host) -> None:
        numbers = f"{ms:>8} {rate:>6} {copy_rate:>6} {share:>9} {host:>6}"
        print(f"{case:20} {work:10} {dtype:8} {shape:16} {numbers}", flush=True)

    def add(self, times: list[Time]) -> None:
        self.times += times
        for x in times:
            rates = f"{x.ms:.3f}", f"{x.GB_per_s:.0f}", f"{x.copy_GB_per_s:.0f}"
            shares = f"{x.percent_of_copy:.1f}", f"{x.host_bound_percent:.0f}"
            self.print(x.case, x.work, x.dtype, f"[{x.N}, {x.V}]", *rates, *shares)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(Time)])
                writer.writeheader()
                writer.writerows(map(vars, self.times))


def parse(words: list[str] | None):
    options = cases.parser(__doc__)
    options.add_argument("--output", type=Path, help="the folder for kernel_times.csv")
    options.add_argument("--vocabularies", type=int, nargs="+")
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    options.add_argument("--divergences", nargs="+", choices=list(kdkernels.CATALOGUE))
    options.add_argument("--rows", type=int, help="at most")
    options.add_argument("--rounds", type=int)
    given = options.parse_args(words)
    on_gpu = given.device == "cuda"
    given.vocabularies = given.vocabularies or (VOCABULARIES if on_gpu else (1000,))
    given.divergences = given.divergences or (CALLED if given.backend == "triton" else DIVERGENCES)
    given.rows = given.rows or (4096 if on_gpu else 16)
    given.rounds = given.rounds or (11 if on_gpu else 3)
    return given


def main(words: list[str] | None = None) -> int:
    given = parse(words)
    memory = torch.cuda.mem_get_info()[0] if given.device == "cuda" else GiB
    copied = min(4 * GiB, memory // 10) if given.device == "cuda" else 2**20
    source = torch.rand(copied // 4, device=given.device)  # random: a copy of zeros may be faster
    written = torch.empty_like(source)
    print(f"beside a copy of {copied / GiB:.3g} GiB")
    table, failed = Table(given.output), 0
    with cases.serving(given.backend, given.device):
        for dtype, columns in itertools.product(given.dtypes, given.vocabularies):
            stored = getattr(torch, dtype)
            rows = rows_that_fit(given.rows, columns, stored.itemsize, memory)
            student, teacher = synthetic_logits(rows, columns, stored, given.device)
            steps = measured(student, teacher, given.backend, given.divergences)
            steps, raised = usable(steps, f"{dtype} [{rows}, {columns}]", given.device)
            table.add(times(steps, student, lambda: written.copy_(source), copied, given.rounds))
            failed += raised
            del student, teacher, steps
    if failed:
        print(f"{failed} steps raised")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
