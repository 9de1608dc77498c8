"""First contact: every family against the reference in fp64, then the same bits while another stream is busy.

The plans are the ones that the kernels choose; check_plan.py forces others.
"""

import sys
from dataclasses import dataclass

import cases
import torch
from cases import Cases, name_of

import kdkernels
from kdkernels import CATALOGUE, selftest
from kdkernels.distributions import TAILS
from kdkernels.families import class_ot
from kdkernels.families import sinkhorn as transport


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    dtypes: tuple[torch.dtype, ...]
    columns: tuple[int, ...]  # of kl and js
    rows: tuple[int, int]  # the least and the most for kl and js; between them as many as give `elements` logits
    elements: int
    divergences: tuple[int, int]  # [rows, columns] with all row options; these rows and a family's are a multiple of 5
    family: tuple[int, int]  # [rows, columns]
    entries: tuple[int, ...]
    head: tuple[int, int, int]  # [rows, columns, width]
    clouds: tuple[int, int, int]
    problems: tuple[int, int, int]
    classes: tuple[int, int]  # [rows, classes] of class_ot
    bits: tuple[int, int]  # [rows, columns]
    runs: int


# One class, fewer than a warp has threads, odd and aligned widths, clusters of 1 to 16 blocks; more rows than a GPU
# works on at once.
FULL = Sizes(
    cases.DTYPES, (1, 37, 1000, 5001, 32_768, 50_257, 128_256, 151_936, 262_144), (400, 9000), 2**26, (1000, 5001),
    (500, 32_001), (1, 64, 700), (600, 32_001, 128), (3, 100, 32_001), (300, 64, 70), (20, 200), (2048, 151_936), 30,
)  # fmt: skip
# The same plans in few rows, for a tool that makes kernels a hundred times slower.
FEW = Sizes(
    cases.DTYPES, (1, 37, 1000, 50_257, 151_936), (5, 5), 1, (5, 1001), (5, 5001), (1, 64), (30, 1001, 64),
    (2, 10, 501), (3, 9, 12), (10, 50), (5, 50_257), 2,
)  # fmt: skip
# Triton compiles a kernel for each divergence, dtype and kind of width, one to three seconds each.
TRITON = Sizes(
    (torch.bfloat16,), (1000, 50_257), (400, 9000), 2**26, (1000, 5001), (500, 32_001), (64,), (600, 32_001, 128),
    (3, 100, 32_001), (300, 64, 70), (20, 200), (2048, 151_936), 30,
)  # fmt: skip
TINY = Sizes(
    cases.DTYPES, (1, 37, 1000), (3, 3), 1, (5, 301), (5, 301), (1, 64), (30, 101, 16), (2, 10, 101), (3, 9, 12),
    (10, 50), (4, 501), 3,
)  # fmt: skip
SIZES = {"full": FULL, "few": FEW, "triton": TRITON, "tiny": TINY}


@dataclass(frozen=True)
class Smoke:
    checked: Cases
    backend: str
    device: str
    sizes: Sizes

    def run(self) -> int:
        self.dense()
        self.divergences()
        for dtype in self.sizes.dtypes:
            self.sparse_teachers(dtype)
            self.heads(dtype)
            self.transport(dtype)
        self.problems()
        self.same_bits()
        return self.checked.conclude()

    def dense(self) -> None:
        """kl and js at every width, of rows at multiples of 16 bytes and of shifted rows."""
        least, most = self.sizes.rows
        for dtype in self.sizes.dtypes:
            for columns in self.sizes.columns:
                rows = min(max(self.sizes.elements // columns, least), most)
                for is_shifted in (False, True):
                    student, teacher = cases.drawn(rows, columns, dtype, self.device, is_shifted)
                    for divergence in ("kl", "js"):
                        name = f"{divergence} {name_of(dtype)} [{rows}, {columns}]{', shifted' * is_shifted}"
                        compare = cases.against_reference
                        self.checked.run(name, compare, student, teacher, divergence, self.backend)

    def divergences(self) -> None:
        shape, where = self.sizes.divergences, (self.device, self.backend)
        for dtype in self.sizes.dtypes:
            for divergence in CATALOGUE if self.backend != "triton" else ("kl", "js"):
                name = f"{divergence} {name_of(dtype)} {list(shape)}, all row options"
                self.checked.run(name, selftest.errors, divergence, dtype, shape, *where)

    def sparse_teachers(self, dtype: torch.dtype) -> None:
        shape, where = self.sizes.family, (self.device, self.backend)
        for k in self.sizes.entries:
            self.checked.run(f"top {k} {name_of(dtype)} {list(shape)}", extraction_errors, shape, dtype, k, *where)
        for tail in TAILS:
            name = f"top-k loss, {tail} {name_of(dtype)} {list(shape)}"
            self.checked.run(name, selftest.topk_errors, tail, dtype, shape, *where)

    def heads(self, dtype: torch.dtype) -> None:
        shape, where = self.sizes.head, (self.device, self.backend)
        name = f"head {name_of(dtype)} {list(shape)}"
        self.checked.run(name, selftest.head_errors, dtype, shape, *where)
        if dtype != torch.float32:
            self.checked.run(f"{name}, fp32 logits", selftest.head_errors, dtype, shape, *where, torch.float32)

    def transport(self, dtype: torch.dtype) -> None:
        sizes, where = self.sizes, (self.device, self.backend)
        name = f"uld {name_of(dtype)} {list(sizes.family)}"
        self.checked.run(name, selftest.uld_errors, dtype, sizes.family, *where)
        for cost in transport.COSTS:
            name = f"SinKD, {cost} {name_of(dtype)} {list(sizes.clouds)}"
            self.checked.run(name, selftest.sinkhorn_kd_errors, cost, dtype, sizes.clouds, *where)

    def problems(self) -> None:
        sizes, where = self.sizes, (self.device, self.backend)
        for gradient in transport.GRADIENTS:
            name = f"Sinkhorn, {gradient} {list(sizes.problems)}"
            self.checked.run(name, selftest.sinkhorn_errors, gradient, 0.1, sizes.problems, *where)
        for gradient in class_ot.GRADIENTS:
            name = f"class_ot, {gradient} {list(sizes.classes)}"
            errors = selftest.class_ot_errors
            self.checked.run(name, errors, gradient, torch.float32, sizes.classes, self.device)

    def same_bits(self) -> None:
        """A race shows as other bits."""
        rows, columns = self.sizes.bits
        traffic = Traffic(self.device)
        for dtype in self.sizes.dtypes:
            for call, run in calls(*cases.drawn(rows, columns, dtype, self.device), self.backend).items():
                name = f"{call} {name_of(dtype)} [{rows}, {columns}]: the same bits in {self.sizes.runs} runs"
                self.checked.run(name, differing_runs, run, self.sizes.runs, traffic)


def extraction_errors(shape, dtype: torch.dtype, k: int, device: str, backend: str) -> tuple[float, ...]:
    """The errors of the k log-probabilities and of the tail's, and the errors as log-probabilities of the classes that
    the extraction names.
    """
    _, logits = cases.drawn(*shape, dtype, device)
    got = kdkernels.topk_log_probs(logits, k, backend=backend)
    want = kdkernels.topk_log_probs(logits.double(), k, backend="reference")
    named = logits.double().log_softmax(-1).gather(-1, got.indices.long())
    pairs = (got.log_probs, want.log_probs), (got.tail_log_prob, want.tail_log_prob), (named, want.log_probs)
    return tuple(selftest.part(x, y, 1e-5 + 1e-6 * y.abs()) for x, y in pairs)


def calls(student: torch.Tensor, teacher: torch.Tensor, backend: str):
    """Calls by name. A call returns tensors, which must have the same bits in every run."""
    sparse = kdkernels.topk_log_probs(teacher, 64, backend=backend)

    def extraction():
        found = kdkernels.topk_log_probs(teacher, 64, backend=backend)
        return found.indices, found.log_probs, found.tail_log_prob

    def loss(teacher, divergence, gradient):
        return lambda: cases.loss_and_gradient(student, teacher, divergence, backend, gradient=gradient)

    return {
        "kl": loss(teacher, "kl", "forward"),
        "js": loss(teacher, "js", "forward"),
        "js, backward": loss(teacher, "js", "backward"),
        "top 64": extraction,
        "top-k loss": loss(sparse, "kl", "forward"),
    }


class Traffic:
    """Copies and products on another stream, so that memory and multiprocessors are busy with something else."""

    def __init__(self, device: str):
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        if self.stream:
            self.source = torch.rand(2**26, device=device)
            self.copied = torch.empty_like(self.source)
            self.factor = torch.randn(2048, 2048, dtype=torch.bfloat16, device=device)

    def start(self, run: int) -> None:
        if self.stream:
            with torch.cuda.stream(self.stream):
                for _ in range(1 + run % 5):
                    self.copied.copy_(self.source)
                    torch.mm(self.factor, self.factor)


def differing_runs(call, runs: int, traffic: Traffic) -> tuple[float]:
    """The number of runs whose results differ from the first run's."""
    first, differing = call(), 0
    for run in range(runs):
        traffic.start(run)
        again = call()
        differing += not all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    return (float(differing),)


def main(words: list[str] | None = None) -> int:
    options = cases.parser(__doc__)
    options.add_argument("--size", choices=SIZES, help="default: full; triton for that backend; tiny on a CPU")
    given = options.parse_args(words)
    default = "tiny" if given.device == "cpu" else "triton" if given.backend == "triton" else "full"
    with cases.serving(given.backend, given.device):
        return Smoke(Cases(given.device), given.backend, given.device, SIZES[given.size or default]).run()


if __name__ == "__main__":
    sys.exit(main())
