"""A visit to a GPU: runs the steps of steps.py, kills what exceeds its time limit, and keeps what each step printed.

    python gpu/visit.py --output DIR [--program visit|sanitize] [--limit SECONDS] [--only STEP ...]
                        [--backend cuda|triton|cpu] [--device cuda|cpu]

After every step DIR holds its log, summary.md and summary.json of all steps, and results.tar.gz of the whole folder.
docs/gpu.md describes them. The exit code is 1 if a step failed or was killed. Needs Python alone.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import steps
from steps import ROOT, SKIPPED, Command, Step, Target

PASSED, FAILED, KILLED, SKIP, NOT_REACHED = "passed", "failed", "killed", "skipped", "not reached"
RUNNING, TO_BE_READ = "running", "to be read"
ARCHIVE = "results.tar.gz"


@dataclass
class Outcome:
    """The outcome of a step, or of one of its commands."""

    name: str
    limit: float
    outcome: str = NOT_REACHED
    seconds: float = 0.0
    reason: str = ""
    log: str = ""
    note: str = ""

    @property
    def is_bad(self) -> bool:
        return self.outcome in (FAILED, KILLED)


def last_line(log: Path) -> str:
    """The last line of a log that is not empty: the case that a hanging command was in, or the reason of a failure."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 4096, 0))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")


class Running:
    """A command that runs in a process group of its own."""

    def __init__(self, command: Command, log: Path, seconds: float):
        self.label, self.log, self.limit = command.label, log, seconds
        self.start = time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command.arguments, cwd=ROOT, env=steps.environment(command), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def is_done(self) -> bool:
        return self.process.poll() is not None or self.seconds > self.limit

    def kill(self) -> None:
        """Kills what still runs of the command's process group, also what the command left behind."""
        self.code, self.took = self.process.poll(), self.seconds
        self.said = last_line(self.log)  # before the group can print about its end
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def outcome(self) -> Outcome:
        """The outcome of a killed command. Waits for its end, which the driver of a GPU may delay."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        if self.code is None:
            outcome, reason = KILLED, f"at its limit of {self.limit:.0f} s, in: {self.said}"
        elif self.code == 0:
            outcome, reason = PASSED, ""
        elif self.code == SKIPPED:
            outcome, reason = SKIP, self.said
        else:
            outcome, reason = FAILED, f"exit code {self.code}: {self.said}"
        return Outcome(self.label, round(self.limit, 1), outcome, round(self.took, 1), reason, self.log.name)


def run_commands(step: Step, seconds: float, folder: Path) -> list[Outcome]:
    """Runs a step's commands within the seconds, at a time as many as three quarters of the processors."""
    end = time.monotonic() + seconds
    several = len(step.commands) > 1
    waiting, running, outcomes = list(step.commands), [], []
    at_once = max((os.cpu_count() or 1) * 3 // 4, 1)
    try:
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < at_once and time.monotonic() < end:
                command = waiting.pop(0)
                log = folder / (f"{step.name}/{command.label}.log" if several else f"{step.name}.log")
                log.parent.mkdir(parents=True, exist_ok=True)
                left = end - time.monotonic()
                running.append(Running(command, log, left if step.each is None else min(step.each, left)))
            done = [one for one in running if one.is_done()]
            for one in done:
                one.kill()
            for one in done:
                running.remove(one)
                outcomes.append(one.outcome())
            time.sleep(0.02)
    finally:
        for one in running:  # this process was interrupted
            one.kill()
    return outcomes + [Outcome(command.label, step.each or 0) for command in waiting]


def stretched(program: list[Step], factor: float) -> list[Step]:
    return [
        dataclasses.replace(step, limit=step.limit * factor, each=step.each and step.each * factor) for step in program
    ]


def merged(step: Step, outcomes: list[Outcome]) -> tuple[str, str]:
    """The outcome of a step and its reason, from those of its commands."""
    if len(outcomes) == 1:
        return outcomes[0].outcome, outcomes[0].reason
    count = {kind: sum(one.outcome == kind for one in outcomes) for kind in (PASSED, FAILED, KILLED, SKIP, NOT_REACHED)}
    counted = ", ".join(f"{number} {kind}" for kind, number in count.items() if number)
    bad = "; ".join(f"{one.name} {one.outcome}: {one.reason}" for one in outcomes if one.is_bad)
    kinds = [kind for kind in (FAILED, KILLED, NOT_REACHED, PASSED, SKIP) if count[kind]]
    kind = KILLED if kinds[0] == NOT_REACHED else kinds[0]
    return kind, counted + (f"; {bad}" if bad else "")


class Visit:
    """A limit over the default stretches every step's limit alike; under it, steps that no longer fit are skipped."""

    def __init__(self, program: list[Step], target: Target, limit: float, only: list[str] | None = None):
        self.program, self.target, self.limit = stretched(program, max(limit / steps.LIMIT, 1)), target, limit
        self.only = only or [step.name for step in program]
        self.started = time.monotonic()
        self.outcomes = [Outcome(step.name, step.limit, note=step.note) for step in self.program]
        self.parts: dict[str, list[Outcome]] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.limit - self.seconds

    def run(self) -> bool:
        """Whether no step failed."""
        self.target.output.mkdir(parents=True, exist_ok=True)
        closed_by = ""
        for step, outcome in zip(self.program, self.outcomes, strict=True):
            if skipped := self.reason_to_skip(step, closed_by):
                outcome.outcome, outcome.reason = SKIP, skipped
            else:
                self.run_step(step, outcome)
                closed_by = step.name if step.is_gate and outcome.is_bad else closed_by
            self.report(step, outcome)
        return not any(outcome.is_bad for outcome in self.outcomes)

    def reason_to_skip(self, step: Step, closed_by: str) -> str:
        if closed_by:
            return f"the step {closed_by!r} failed"
        if step.name not in self.only:
            return "it was not asked for"
        if self.target.kind not in step.kinds:
            return f"it is for {' and '.join(step.kinds)}; the target is {self.target.kind}"
        if self.left < step.limit:
            return f"it may take {step.limit:.0f} s, and {max(self.left, 0):.0f} s of {self.limit:.0f} s are left"
        return ""

    def run_step(self, step: Step, outcome: Outcome) -> None:
        print(f"== {step.name}", flush=True)
        start = time.monotonic()
        outcome.limit = round(max(step.limit, self.left) if step.takes_rest else step.limit, 1)
        outcome.outcome = RUNNING
        self.write()  # a visit that is killed from outside leaves the name of its step
        parts = run_commands(step, outcome.limit, self.target.output)
        outcome.seconds = round(time.monotonic() - start, 1)
        outcome.outcome, outcome.reason = merged(step, parts)
        if outcome.outcome == FAILED and not step.is_judged:
            outcome.outcome = TO_BE_READ
        if len(parts) > 1:
            outcome.log = f"{step.name}/"
            self.parts[step.name] = parts
        else:
            outcome.log = parts[0].log

    def report(self, step: Step, outcome: Outcome) -> None:
        log = self.target.output / outcome.log
        if outcome.log and log.is_file():
            lines = log.read_text(errors="replace").rstrip().split("\n")
            print(*(f"   {line}" for line in lines[-max(step.shown, 15 * outcome.is_bad) :]), sep="\n")
        because = f": {outcome.reason}" if outcome.reason else ""
        print(f"== {step.name}: {outcome.outcome}, {outcome.seconds:.0f} s{because}", flush=True)
        self.write()

    def write(self) -> None:
        """Writes the summaries, each whole or not at all, and packs the folder."""
        folder = self.target.output
        summary = {
            "backend": self.target.backend,
            "device": self.target.device,
            "limit": self.limit,
            "seconds": round(self.seconds, 1),
            "steps": [asdict(outcome) for outcome in self.outcomes],
            "parts": {name: [asdict(part) for part in parts] for name, parts in self.parts.items()},
        }
        replace(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        replace(folder / "summary.md", self.table())
        unfinished = folder / f".{ARCHIVE}"
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in sorted(folder.iterdir()):
                if path.name not in (ARCHIVE, unfinished.name):
                    archive.add(path, path.name)
        unfinished.replace(folder / ARCHIVE)

    def table(self) -> str:
        target = f"Backend {self.target.backend} on {self.target.device}"
        lines = [
            f"{target}: {self.seconds:.0f} s of at most {self.limit:.0f} s.",
            "",
            "| step | seconds | limit | outcome | log |",
            "|---|---|---|---|---|",
        ]
        for one in self.outcomes:
            what = f"{one.outcome}: {one.reason}" if one.reason else one.outcome
            what = what.replace("|", "\\|")
            lines.append(f"| {one.name} | {one.seconds:.1f} | {one.limit:.0f} | {what} | {one.log} |")
        notes = dict.fromkeys(one.note for one in self.outcomes if one.note)
        return "\n".join([*lines, *(f"\n{note}" for note in notes), ""])


def replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    unfinished.replace(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder for all results")
    parser.add_argument("--program", choices=steps.PROGRAMS, default="visit")
    parser.add_argument("--limit", type=float, default=steps.LIMIT, help="seconds of all steps (default %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", choices=["cuda", "triton", "cpu"], help="default: cuda, and cpu on a CPU")
    return parser.parse_args()


def end(*_) -> None:
    """The handler of SIGTERM: an exception, so that run_commands kills the running step."""
    sys.exit(1)


def main() -> int:
    arguments = parse()
    backend = arguments.backend or arguments.device
    target = Target(backend, arguments.device, arguments.output.resolve())
    program = steps.PROGRAMS[arguments.program](target)
    unknown = set(arguments.only or ()) - {step.name for step in program}
    if unknown:
        names = ", ".join(step.name for step in program)
        sys.exit(f"--only: expected steps of {arguments.program}: {names}; got {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, end)
    visit = Visit(program, target, arguments.limit, arguments.only)
    right = visit.run()
    print(visit.table())
    print(target.output / ARCHIVE)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
