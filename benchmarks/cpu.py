"""The dense losses on a CPU, each measurement a method, in the order in which they run."""

import dataclasses
from pathlib import Path

from benchmark import DTYPES, VOCABULARY, Benchmark
from data import real_or_synthetic
from family import COPY, FLOOR, OURS, Family, Problem, Shape, reason, record_times, synthetic_problem, time_steps, weigh
from isolated import in_own_process
from rows import CATALOGUE, COMPILED, EAGER, TRL, TRL_DIVERGENCES, eager, family, installed, kdkernels_loss, label
from timing import copying, ratio

MAIN_CASE = f"V = {VOCABULARY:,}, synthetic"
# All but kl and its relatives, which are as fast.
GATED_DIVERGENCES = tuple(name for name in CATALOGUE if name not in ("kl", "reverse_kl", "mixed_kl"))
# By dtype: at least this many times faster than eager and than torch.compile, at most this multiple of the copy floor.
TARGETS = {"float32": (10, 4.5, 2.0), "bfloat16": (18, 6, 3.0)}


class CpuBenchmark(Benchmark):
    is_on_cpu = True
    small_call_limit = 3.0
    import_limit = 0.2

    def __init__(self, quick: bool, rounds: int | None, screen, output: Path, plans=None):
        super().__init__("cpu", quick, rounds, screen, output, plans)
        self.rows = 128 if quick else 256
        self.note_on_targets = " (they are meant for the full run, on more rows)" if quick else ""

    def capped(self, rounds: int) -> int:
        return min(self.rounds, rounds)

    def peak_bytes(self, family: Family, contender: str, shape: Shape) -> int:
        return in_own_process("memory", family.name, [contender], shape)

    def dense_phases(self):
        return [
            ("answers and real logits", self.answers_and_real_logits),
            ("main case", lambda: [self.main_case(dtype) for dtype in DTYPES]),
            ("divergences", lambda: [self.divergences(dtype) for dtype in DTYPES]),
            ("sweep V", lambda: self.sweep("V", [(self.rows // 2, v) for v in (32_768, 65_536, 131_072, 262_144)])),
            ("sweep N", lambda: self.sweep("N", [(self.rows * factor // 4, 65_536) for factor in (1, 2, 4, 8)])),
            ("memory", self.memory),
        ]

    def draw(self, path: Path) -> None:
        from figure import draw_cpu

        draw_cpu(self.results, path, MAIN_CASE)

    def measure(self, case: str, family: Family, problem: Problem, rounds: int, **recorded) -> dict[str, list[float]]:
        """Time every contender's loss with its gradient, and a copy of the teacher's logits, in the same rounds."""
        recorded = {"unlisted": (COPY,), "over": {"ratio_to_kdkernels": OURS, "over_floor": FLOOR}} | recorded
        steps = {name: problem.step(loss) for name, loss in family.losses.items()}
        steps[COPY] = copying(problem.others[0])
        options = {"before": problem.drop_gradients, **recorded}
        return time_steps(self, family, case, problem.shape, steps, rounds, **options)

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
            wanted = [OURS] + [EAGER] * (divergence in eager.DIVERGENCES)
            wanted += [TRL] * (not self.quick and installed("trl") and divergence in TRL_DIVERGENCES)
            measured = family("cpu", TRL in wanted, divergence)
            measured = with_losses(measured, {name: measured.losses[name] for name in wanted})
            self.measure(case, measured, Problem(student, teacher), self.capped(5))

    def main_case(self, dtype: str) -> None:
        """kl at the vocabulary of a current model, and every other implementation that can run here."""
        problem = synthetic_problem(Shape(self.rows, VOCABULARY, dtype), "cpu")
        kl = family("cpu")
        losses, skipped = kl.losses, kl.skipped
        if self.quick:
            for name in (COMPILED, TRL):
                if losses.pop(name, None):
                    skipped[name] = "--quick"
        if COMPILED in losses and (why := self.why_not_compiled(losses[COMPILED], problem)):
            del losses[COMPILED]
            skipped[COMPILED] = why
        self.leave_out(skipped)
        seconds = self.measure(MAIN_CASE, kl, problem, self.rounds)

        over_eager, over_compile, over_floor = TARGETS[dtype]
        ours = seconds[OURS]
        self.target(f"kl {dtype}: faster than eager", ratio(seconds[EAGER], ours), over_eager, at_least=True)
        if not self.quick:
            self.target(
                f"kl {dtype}: faster than eager with huge pages", self.eager_with_huge_pages(problem.shape), None
            )
        if COMPILED in seconds:
            compiled = ratio(seconds[COMPILED], ours)
            self.target(f"kl {dtype}: faster than torch.compile", compiled, over_compile, at_least=True)
        self.target(f"kl {dtype}: over the copy floor", ratio(ours, seconds[FLOOR]), over_floor)

    def why_not_compiled(self, compiled, problem: Problem) -> str | None:
        """torch.compile needs a compiler on the machine; any error of it is a reason to leave it out."""
        advance = self.screen.task("torch.compile: compilation", total=1)
        try:
            problem.step(compiled)()
        except Exception as error:
            return reason(error)
        finally:
            problem.drop_gradients()
            advance()

    def eager_with_huge_pages(self, shape: Shape) -> float:
        """Eager PyTorch with its switch for huge pages. A new process runs it, because the switch is read at start."""
        case, names = f"{MAIN_CASE}, THP_MEM_ALLOC_ENABLE=1", [OURS, EAGER]
        advance = self.screen.task(f"{case}: kl {shape}", total=1)
        switch = {"THP_MEM_ALLOC_ENABLE": "1"}
        seconds = in_own_process("rounds", "rows", names, shape, self.capped(9), switch)
        advance()
        over = {"ratio_to_kdkernels": OURS, "over_floor": FLOOR}
        record_times(self, family("cpu", False), case, shape, seconds, over=over, unlisted=(COPY,))
        return ratio(seconds[EAGER], seconds[OURS])

    def divergences(self, dtype: str) -> None:
        """Every divergence of kdkernels in the same rounds, compared with kl."""
        problem = synthetic_problem(Shape(self.rows, VOCABULARY, dtype), "cpu")
        all_of_them = with_losses(family("cpu", False), {label(name): kdkernels_loss(name) for name in CATALOGUE})
        over = {"over_kl": "kl", "over_floor": FLOOR}
        seconds = self.measure("divergences", all_of_them, problem, self.rounds, over=over, contender=OURS)
        for divergence in map(label, GATED_DIVERGENCES):
            self.target(f"{divergence} {dtype}: over kl", ratio(seconds[divergence], seconds["kl"]), 1.6)

    def sweep(self, axis: str, shapes: list[tuple[int, int]]) -> None:
        for rows, vocabulary in shapes:
            problem = synthetic_problem(Shape(rows, vocabulary, "bfloat16"), "cpu")
            self.measure(f"sweep {axis}", family("cpu", False), problem, self.capped(7))

    def memory(self) -> None:
        """Peak memory beyond the inputs of one loss with its gradient, each in its own process."""
        compiled = [COMPILED] * any(row["contender"] == COMPILED for row in self.results.rows)
        names = [OURS, EAGER] + ([] if self.quick else compiled + [TRL] * installed("trl"))
        for dtype in ["bfloat16"] if self.quick else DTYPES:
            shape = Shape(self.rows, VOCABULARY, dtype)
            weigh(self, family("cpu", False), "memory", [(name, shape) for name in names])


def with_losses(family: Family, losses: dict) -> Family:
    return dataclasses.replace(family, losses=losses)
