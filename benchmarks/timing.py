"""Time and memory: rounds in turn, the copy floor, and the peak of a process.

A step is timed by the clock, on a GPU with the device waited for (`interleaved`), or against a copy just before it, on
a GPU by events in the queue (`queued`).
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import memory


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def rotated(names: list, by: int) -> list:
    return names[by % len(names) :] + names[: by % len(names)]


def interleaved(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    before=lambda: None,
    after_round=None,
    settled: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every step in every round: {name: [seconds of round 0, ...]}.

    Each round runs every step once and starts with another one, so that a disturbance of the machine meets
    all of them alike. `before` runs untimed before each step. `settled`:
    each step runs untimed just before it is timed, and so finds the memory and the caches as its own last step left
    them. Otherwise each runs untimed once, and then mostly after the same other.
    """
    names = list(steps)
    for name in [] if settled else names:
        before()
        steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in rotated(names, i):
            if settled:
                before()
                steps[name]()
            before()
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
        if after_round is not None:
            after_round()
    return seconds


class HostEvent:
    """What a CUDA event is on a GPU, for steps that are done when they return."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1e3 * (end.seconds - self.seconds)


@dataclass(frozen=True)
class Timing:
    """Of one step: the seconds of each repetition and of the copy before it."""

    seconds: list[float]
    copy_seconds: list[float]
    host_bound: float  # part of the repetitions in which the device may have waited for the host

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Between the quartiles, as a part of the median."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median

    @property
    def copy_median(self) -> float:
        return statistics.median(self.copy_seconds)

    def over_copy(self, moved: int, copied: int) -> float:
        """Bytes a second of a step that moves so many, over those of a copy, which reads and writes its bytes."""
        pairs = zip(self.seconds, self.copy_seconds, strict=True)
        return statistics.median(moved / step * copy / (2 * copied) for step, copy in pairs)


Steps = dict[Hashable, Callable[[], object]]


def queued(steps: Steps, copy, rounds: int, device: str, before=lambda: None) -> dict[Hashable, Timing]:
    """Time every step in rounds as `interleaved` does, but between events in the device's queue.

    Nothing waits for the device until the end. The `copy` before each step is what the step is held against; it gives
    the host time to queue the step, and takes the step's inputs out of the cache. Where the copy had ended before all
    of the step was queued, the device may have waited, and the repetition counts as bound by the host.
    """
    event = HostEvent if device == "cpu" else partial(torch.cuda.Event, enable_timing=True)
    events = {name: [] for name in steps}
    late = dict.fromkeys(steps, 0)
    for i in range(rounds):
        for name in rotated(list(steps), i):
            before()
            first, copied, done = event(), event(), event()
            first.record()
            copy()
            copied.record()
            steps[name]()
            done.record()
            late[name] += copied.query()
            events[name].append((first, copied, done))
    synchronize(device)
    return {
        name: Timing(
            [copied.elapsed_time(done) / 1e3 for _, copied, done in events[name]],
            [first.elapsed_time(copied) / 1e3 for first, copied, _ in events[name]],
            late[name] / rounds,
        )
        for name in steps
    }


def training_steps(losses: dict[str, Callable], student: torch.Tensor, teacher: torch.Tensor):
    """Steps for `interleaved`: loss and gradient of each contender on one student leaf, and a copy to find
    the floor.

    The last gradient is dropped before the clock starts: a step allocates its own, as in training, and pays
    for none that another contender left behind.
    """
    leaf = student.detach().requires_grad_()

    def drop_gradient():
        leaf.grad = None

    def step(loss):
        return lambda: loss(leaf, teacher).backward()

    written = teacher.clone()  # memory that is there already
    steps = {name: step(loss) for name, loss in losses.items()}
    steps["copy"] = lambda: written.copy_(teacher)
    return steps, drop_gradient


def floor_seconds(copy_seconds: list[float]) -> list[float]:
    """The time in which this machine moves the bytes of a loss with gradient, in every round.

    They are two reads and one write of [N, V]; a copy, one read and one write, moves two thirds of them.
    """
    return [1.5 * seconds for seconds in copy_seconds]


def ratio(seconds: list[float], baseline: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


def peak_extra_bytes(step: Callable[[], None], drop_gradient: Callable[[], None], device: str) -> int:
    """What one step holds at its worst moment beyond its inputs. On a CPU: in a process of its own."""
    step()  # what a first call sets up (thread pools, compiled code) is not the step's memory
    drop_gradient()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - resident
    memory.reset_peak()
    resident = memory.resident_bytes()
    step()
    return max(0, memory.peak_resident_bytes() - resident)


def free_bytes(device: str) -> int:
    if device == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
