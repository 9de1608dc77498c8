"""The measurements on a CPU, each a method, in the order in which they run."""

import statistics
from pathlib import Path

import class_ot
import heads
import topk
import torch
import transport
import uld
from benchmark import DTYPES, VOCABULARY, Benchmark
from contenders import (
    CATALOGUE,
    TRL_DIVERGENCES,
    eager,
    eager_loss,
    installed,
    kdkernels_loss,
    label,
    peers,
    reason,
    trl_loss,
)
from data import real_or_synthetic, real_or_synthetic_heads, synthetic_logits
from isolated import in_own_process
from timing import floor_seconds, interleaved, ratio, training_steps

MAIN_CASE = f"V = {VOCABULARY:,}, synthetic"
GATED_DIVERGENCES = ("js", "skew_kl", "skew_reverse_kl", "tv", "hellinger", "alpha")
# dtype: at least so many times faster than eager and torch.compile, at most so many times the copy floor
TARGETS = {"float32": (10, 4.5, 2.0), "bfloat16": (18, 6, 3.0)}


class CpuBenchmark(Benchmark):
    is_of_cpu = True
    small_call_limit = 3.0
    import_limit = 0.2

    def __init__(self, quick: bool, rounds: int | None, screen, output: Path):
        super().__init__("cpu", quick, rounds or (3 if quick else 15), screen, output)
        self.rows = 128 if quick else 256
        self.note_on_targets = " (they are meant for the full run, on more rows)" if quick else ""

    def phases(self):
        return [
            ("answers and real logits", self.answers_and_real_logits),
            ("main case", lambda: [self.main_case(dtype) for dtype in DTYPES]),
            ("divergences", lambda: [self.divergences(dtype) for dtype in DTYPES]),
            ("sweep V", lambda: self.sweep("V", [(self.rows // 2, v) for v in (32_768, 65_536, 131_072, 262_144)])),
            ("sweep N", lambda: self.sweep("N", [(self.rows * factor // 4, 65_536) for factor in (1, 2, 4, 8)])),
            ("memory", self.memory),
            ("heads", self.heads),
            ("heads: memory", self.head_memory),
            ("top-k teachers", self.topk),
            ("optimal transport", self.transport),
            ("transport between classes", self.class_ot),
            ("universal logit distillation", self.uld),
            ("small call", self.small_call),
            ("import", self.import_time),
        ]

    def draw(self, path: Path) -> None:
        from figure import draw_cpu

        draw_cpu(self.results, path, MAIN_CASE)

    def measure(self, case, divergence, losses, student, teacher, rounds=None) -> dict[str, list[float]]:
        """Time the contenders in interleaved rounds and add a row for each; returns their seconds."""
        rounds = rounds or self.rounds
        dtype = str(student.dtype).removeprefix("torch.")
        shape = "x".join(map(str, student.shape))
        advance = self.screen.task(f"{case}: {divergence} {dtype} {shape}", total=rounds)
        steps, drop_gradient = training_steps(losses, student, teacher)
        seconds = interleaved(steps, rounds, "cpu", before=drop_gradient, after_round=advance)
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
        advance = self.screen.task("real logits", total=1)
        student, teacher, source = real_or_synthetic(64 if self.quick else 512)
        self.results.remark(f"Logits of the answers and of the case `real`: {source}.")
        advance()
        checked = 8 if self.quick else 32
        self.check_answers([(student[:checked], teacher[:checked])])

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
        student, teacher = synthetic_logits(self.rows, VOCABULARY, DTYPES[dtype])
        others, skipped = peers("kl", "cpu")
        if self.quick:
            for name in ("torch.compile", "TRL"):
                if others.pop(name, None):
                    skipped[name] = "--quick"
        if "torch.compile" in others and (why := self.why_not_compiled(others["torch.compile"], student, teacher)):
            del others["torch.compile"]
            skipped["torch.compile"] = why
        self.leave_out(skipped)
        seconds = self.measure(MAIN_CASE, "kl", {"kdkernels": kdkernels_loss("kl")} | others, student, teacher)

        over_eager, over_compile, over_floor = TARGETS[dtype]
        ours = seconds["kdkernels"]
        self.target(f"kl {dtype}: faster than eager", ratio(seconds["eager"], ours), over_eager, at_least=True)
        if not self.quick:
            thp = self.eager_with_huge_pages(dtype)
            self.target(f"kl {dtype}: faster than eager with huge pages", thp, None)
        if "torch.compile" in seconds:
            compiled = ratio(seconds["torch.compile"], ours)
            self.target(f"kl {dtype}: faster than torch.compile", compiled, over_compile, at_least=True)
        self.target(f"kl {dtype}: over the copy floor", ratio(ours, floor_seconds(seconds["copy"])), over_floor)

    def why_not_compiled(self, compiled, student, teacher) -> str | None:
        """torch.compile needs a compiler on the machine; any failure of it is a reason to leave it out."""
        advance = self.screen.task("torch.compile: compilation", total=1)
        try:
            compiled(student.detach().requires_grad_(), teacher).backward()
        except Exception as error:
            return reason(error)
        finally:
            advance()

    def eager_with_huge_pages(self, dtype: str) -> float:
        """PyTorch's own switch for huge pages, in a process of its own because it is read at the start."""
        case = f"{MAIN_CASE}, THP_MEM_ALLOC_ENABLE=1"
        advance = self.screen.task(f"{case}: kl {dtype}", total=1)
        seconds = in_own_process(
            "rounds",
            environment={"THP_MEM_ALLOC_ENABLE": "1"},
            contenders="kdkernels,eager",
            rows=self.rows,
            vocabulary=VOCABULARY,
            dtype=dtype,
            rounds=min(self.rounds, 9),
        )
        advance()
        self.record(case, "kl", dtype, self.rows, VOCABULARY, seconds)
        return ratio(seconds["eager"], seconds["kdkernels"])

    def divergences(self, dtype: str) -> None:
        """Every divergence of kdkernels in the same rounds, against kl."""
        student, teacher = synthetic_logits(self.rows, VOCABULARY, DTYPES[dtype])
        advance = self.screen.task(f"divergences {dtype}", total=self.rounds)
        losses = {divergence: kdkernels_loss(divergence) for divergence in CATALOGUE}
        steps, drop_gradient = training_steps(losses, student, teacher)
        seconds = interleaved(steps, self.rounds, "cpu", before=drop_gradient, after_round=advance)
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
            student, teacher = synthetic_logits(rows, vocabulary, torch.bfloat16)
            losses = {"kdkernels": kdkernels_loss("kl"), "eager": eager_loss("kl")}
            self.measure(f"sweep {axis}", "kl", losses, student, teacher, rounds=min(self.rounds, 7))

    def heads(self) -> None:
        """kl from hidden states, the logits never stored, beside its matrix products."""
        plan = heads.CPU_QUICK if self.quick else heads.CPU
        student, teacher, source = real_or_synthetic_heads(plan.rows, plan.width, plan.vocabulary)
        self.results.remark(f"Hidden states and heads: {source}.")
        heads.measure(self, plan, student, teacher)

    def head_memory(self) -> None:
        plan = heads.CPU_QUICK if self.quick else heads.CPU

        def peak_bytes(name: str, rows: int) -> int:
            shape = {"rows": rows, "width": plan.width, "vocabulary": plan.vocabulary}
            return in_own_process("head-memory", contenders=name, **shape)

        heads.measure_memory(self, plan, peak_bytes)

    def topk(self) -> None:
        """kl against the top k of a teacher, and its extraction, in both dtypes; peak memory."""
        rows = 64 if self.quick else 512
        student, teacher, _ = real_or_synthetic(rows)
        for dtype in DTYPES.values():
            topk.measure(self, student.to(dtype), teacher.to(dtype), min(self.rounds, 9))
        shape = {"rows": rows, "vocabulary": student.shape[1]}

        def peak_bytes(name: str) -> int:
            return in_own_process("topk-memory", contenders=name, dtype="float32", **shape)

        topk.measure_memory(self, **shape, peak_bytes=peak_bytes)

    def transport(self) -> None:
        """SinKD over rows and vocabulary, and batches of Sinkhorn problems; peak memory."""
        rounds = min(self.rounds, 5)
        rows, widths = (16, (4_000,)) if self.quick else (64, (32_000, 128_000))
        transport.measure_sinkd(self, [(rows, width) for width in widths], rounds)
        widths, heights = ((2_000, 4_000), (8, 16)) if self.quick else ((8_000, 16_000, 64_000), (16, 32, 128))
        transport.sweep_sinkd(self, transport.OVER_V, [(rows, width) for width in widths], rounds)
        transport.sweep_sinkd(self, transport.OVER_B, [(height, widths[1]) for height in heights], rounds)
        transport.measure_problems(self, 256 if self.quick else 4096, min(rounds, 3))
        shape = {"rows": rows, "vocabulary": 4_000 if self.quick else 32_000}

        def peak_bytes(name: str) -> int:
            return in_own_process("transport-memory", contenders=name, **shape)

        transport.measure_memory(self, **shape, peak_bytes=peak_bytes)

    def class_ot(self) -> None:
        """Optimal transport between the classes of images, and its peak memory."""
        shape = class_ot.QUICK if self.quick else class_ot.SHAPE
        class_ot.measure(self, class_ot.Batch(*shape), min(self.rounds, 3))  # of seconds each, in eager's case

        def peak_bytes(name: str) -> int:
            return in_own_process("class-ot-memory", contenders=name, rows=shape[0], vocabulary=shape[1])

        class_ot.measure_memory(self, *shape, peak_bytes=peak_bytes)

    def uld(self) -> None:
        """Between two vocabularies and between two of one size, in both dtypes."""
        for classes in (uld.TEACHER_CLASSES, VOCABULARY):
            for dtype in DTYPES.values():
                logits = uld.logits(4 if self.quick else 8, VOCABULARY, classes, dtype)
                uld.measure(self, *logits, min(self.rounds, 5))

    def memory(self) -> None:
        """Peak beyond the inputs of one loss with gradient, each in a process of its own."""
        names = ["kdkernels", "eager"] + ([] if self.quick else ["torch.compile"] + ["TRL"] * installed("trl"))
        compiled = any(row["contender"] == "torch.compile" for row in self.results.rows)
        names = [name for name in names if name != "torch.compile" or compiled]
        dtypes = ["bfloat16"] if self.quick else list(DTYPES)
        advance = self.screen.task("memory", total=len(names) * len(dtypes))
        for dtype in dtypes:
            peaks = {}
            for name in names:
                options = {"rows": self.rows, "vocabulary": VOCABULARY, "dtype": dtype}
                peaks[name] = in_own_process("memory", contenders=name, **options)
                advance()
            self.record_memory(peaks, "kdkernels", dtype, self.rows)
