"""The steps of a visit to a GPU, the most telling first, each with its time limit.

The limits of all steps add up to less than the visit's own limit, so that a step is skipped only under a lower limit of
the visit. A step that takes the rest also gets the seconds that the steps before it left over.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from plans import NO_PLAN, VARIABLE, plans

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 530  # seconds of a whole visit
SKIPPED = 77  # a command's exit code for "this cannot run here"; the last line of its output has the reason
ALL = ("cuda", "triton", "cpu", "model")


@dataclass(frozen=True)
class Target:
    """The backend under test, and the device of its tensors. ("cuda", "cpu") is the execution model in tests/."""

    backend: str
    device: str
    output: Path

    @property
    def kind(self) -> str:
        return "model" if (self.backend, self.device) == ("cuda", "cpu") else self.backend

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--backend", self.backend, "--device", self.device)


@dataclass(frozen=True)
class Command:
    arguments: tuple[str, ...]
    label: str = ""  # of a command among several
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    name: str
    limit: int  # seconds
    commands: tuple[Command, ...]  # side by side if there are several
    each: int | None = None  # seconds of one command among several
    kinds: tuple[str, ...] = ALL  # the kinds of Target that have this step
    is_gate: bool = False  # a failure ends the visit
    takes_rest: bool = False
    is_judged: bool = True  # False: a failure is for a person to judge, and does not fail the visit
    shown: int = 3  # lines of its output that the screen shows
    note: str = ""


def python(*arguments, **environment: str) -> Command:
    return Command((sys.executable, *map(str, arguments)), environment=environment)


def script(name: str, target: Target, *arguments, **environment: str) -> Command:
    return python(HERE / name, *target.arguments, *arguments, **environment)


def plan_commands(target: Target) -> tuple[Command, ...]:
    """A process for each plan, so that a plan that hangs or fails ends alone."""
    chosen = plans()[:: 1 if target.device == "cuda" else 10]  # the model is slow
    arguments = script("check_plan.py", target).arguments
    return tuple(
        Command(arguments, plan.replace(",", "-"), {VARIABLE: plan, "OMP_NUM_THREADS": "1"})
        for plan in (NO_PLAN, *chosen)
    )


def preparation(target: Target) -> list[Step]:
    """Versions, the build for the card, and the check that the backend under test serves."""
    return [
        Step("versions", 10, (script("versions.py", target),), shown=20),
        Step("build", 125, (script("build_kernels.py", target),), kinds=("cuda", "model"), is_gate=True),
        Step("backend", 15, (script("serving.py", target),), is_gate=True, shown=20),
    ]


def selftest(target: Target) -> Command:
    return python("-m", "kdkernels.selftest", *target.arguments)


def visit(target: Target) -> list[Step]:
    """The steps of `make gpu`: 510 seconds at most."""
    on_gpu = ("cuda", "triton")
    benchmark = (ROOT / "benchmarks" / "run.py", "--quick", "--device", target.device)
    return [
        *preparation(target),
        Step("smoke", 60, (script("smoke.py", target),)),
        Step("plans", 50, plan_commands(target), each=25, kinds=("cuda", "model")),
        Step("kernel-times", 35, (script("kernel_times.py", target, "--output", target.output),), shown=90),
        Step("head-times", 25, (script("head_times.py", target, "--output", target.output),), shown=20),
        Step("ncu", 45, (script("profiled.py", target),), kinds=("cuda",), shown=1),
        Step("selftest", 60, (selftest(target),), kinds=("cuda", "triton", "cpu"), shown=12),
        Step(
            "gpu-tests", 40, (script("marked_tests.py", target, CUBLAS_WORKSPACE_CONFIG=":4096:8"),), kinds=on_gpu
        ),  # up to torch 2.9, deterministic algorithms need that configuration
        Step(
            "benchmark",
            45,
            (python(*benchmark, "--output", target.output / "benchmark"),),
            kinds=("cuda", "triton", "cpu"),
            takes_rest=True,
            shown=40,
        ),
    ]


def sanitize(target: Target) -> list[Step]:
    """The steps of `make gpu-sanitize`."""
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a tensor's end is the end of an allocation

    def checked(tool: str) -> tuple[Command, ...]:
        return (script("sanitized.py", target, "--tool", tool, **uncached),)

    unknown = (
        "By its manual racecheck knows the barriers of a block, cp.async, and blocks of a cluster that start late or "
        "end early. The manual names neither bulk copies nor stores to another block's shared memory that complete at "
        "an mbarrier. So an alarm of racecheck or synccheck about staged rows or about the merges of a cluster is a "
        "place to read, not a verdict."
    )
    return [
        *preparation(target),
        Step("memcheck", 110, checked("memcheck"), kinds=("cuda", "model")),
        Step("racecheck", 60, checked("racecheck"), kinds=("cuda", "model"), is_judged=False, note=unknown),
        Step("synccheck", 40, checked("synccheck"), kinds=("cuda", "model"), is_judged=False, note=unknown),
        Step(
            "triton-selftest",
            110,
            (selftest(Target("triton", target.device, target.output)),),
            kinds=("cuda", "triton"),
            takes_rest=True,
            shown=12,
            note="It compiles some 500 kernels, which takes one thread 5 to 10 minutes: `python -m kdkernels.selftest "
            "--device cuda --backend triton` runs it without a limit.",
        ),
    ]


PROGRAMS = {"visit": visit, "sanitize": sanitize}


def environment(command: Command) -> dict[str, str]:
    """The variables of a command: this checkout's package, unbuffered output, no download."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ours = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **ours, **command.environment}
