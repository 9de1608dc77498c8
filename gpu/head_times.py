"""Heads by rows of a chunk: the rate of each product, and the loss with its gradients at several chunk budgets.

The products of a chunk: logits = X Wᵀ, dX = dL W, and dW += dLᵀ X, which reads and writes an fp32 [V, H] sum.
"""

import csv
import statistics
import sys
from pathlib import Path

import cases
import torch

sys.path.append(str(cases.ROOT / "benchmarks"))
from data import synthetic_heads
from timing import interleaved

import kdkernels
from kdkernels import LinearLogits, chunk_budget

MiB = 2**20
# [rows, width, classes]; the first takes some 15 GiB.
SHAPE, SMALL, TINY = (8192, 4096, 151_936), (8192, 1024, 65_536), (64, 32, 600)
ROWS, TINY_ROWS = (384, 512, 768, 1024, 1536, 2048, 4096), (16, 32)
BUDGETS, TINY_BUDGETS = (128, 256, 512, 1024, 2048, 4096), (1, 2)  # MiB
COLUMNS = ("what", "rows", "budget_MiB", "ms", "TFLOP_per_s")


class Table:
    """Prints each row and keeps it in head_times.csv."""

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / "head_times.csv"
        self.rows: list[dict] = []

    def add(self, what: str, rows: int, seconds: float, flop: float, budget: int | str = "") -> None:
        rate = flop / seconds * 1e-12
        self.rows.append(dict(zip(COLUMNS, (what, rows, budget, 1e3 * seconds, rate), strict=True)))
        place = f"budget {budget} MiB" if budget else f"{rows} rows"
        print(f"{what:24} {place:16} {1e3 * seconds:9.3f} ms {rate:8.1f} TFLOP/s", flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)


def products(hidden: torch.Tensor, weight: torch.Tensor, rows: int, total: torch.Tensor) -> dict:
    """The products of a chunk of that many rows, by name."""
    x, logits = hidden[:rows], hidden.new_empty(rows, len(weight))
    torch.mm(x, weight.t(), out=logits)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)

    def added():
        torch.addmm(total, logits.t(), x, out_dtype=torch.float32, beta=1, alpha=1, out=total)

    def two_kernels():
        total.add_(torch.mm(logits.t(), x, out_dtype=torch.float32))

    return {
        "logits": lambda: torch.mm(x, weight.t(), out=logits),
        "dX": lambda: torch.mm(logits, weight, out=grad_x),
        "dW in 16 bits": lambda: torch.mm(logits.t(), x, out=grad_weight),
        "dW += in fp32": added,
        "dW in fp32, then +=": two_kernels,
    }


def usable(steps: dict, device: str) -> dict:
    """The steps that run; prints why another does not."""
    running = {}
    for name, step in steps.items():
        try:
            step()
            cases.synchronize(device)
            running[name] = step
        except (RuntimeError, TypeError, ValueError) as error:  # an older torch, a CPU, no room
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
    return running


def timed(steps: dict, device: str, rounds: int) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in interleaved(steps, rounds, device).items()}


def shape_that_fits() -> tuple[int, int, int]:
    return SHAPE if torch.cuda.mem_get_info()[0] > 20_000 * MiB else SMALL


def main(words: list[str] | None = None) -> int:
    options = cases.parser(__doc__)
    options.add_argument("--output", type=Path, help="the folder for head_times.csv")
    given = options.parse_args(words)
    on_gpu, device = given.device == "cuda", given.device
    count, width, classes = shape_that_fits() if on_gpu else TINY
    student, teacher = synthetic_heads(count, width, classes, torch.bfloat16, device)
    print(f"[{count}, {width}] x [{classes}, {width}] in bf16, torch {torch.__version__}")
    table, flop = Table(given.output), 2 * width * classes
    total = torch.zeros(classes, width, device=device)
    for rows in ROWS if on_gpu else TINY_ROWS:
        steps = usable(products(student.hidden, student.weight, rows, total), device)
        for name, seconds in timed(steps, device, 5 if on_gpu else 2).items():
            table.add(name, rows, seconds, flop * rows)
    del total
    leaves = [x.detach().requires_grad_() for x in (student.hidden, student.weight)]

    def loss(budget: int):
        def step():
            with chunk_budget(budget * MiB):
                torch.autograd.grad(kdkernels.fused_kl(LinearLogits(*leaves), teacher, backend=given.backend), leaves)

        return step

    with cases.serving(given.backend, device):
        steps = usable({budget: loss(budget) for budget in (BUDGETS if on_gpu else TINY_BUDGETS)}, device)
        for budget, seconds in timed(steps, device, 3 if on_gpu else 2).items():
            table.add("kl and its gradients", count, seconds, 4 * flop * count, budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
