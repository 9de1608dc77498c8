"""Time and memory: interleaved rounds, the copy floor, and peak memory.

`interleaved` times steps by the clock, and on a GPU waits for the device. `queued` times each step and a copy just
before it, on a GPU by events in the device's queue.
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

    Each round runs every step once and starts with another step, so that a disturbance of the machine affects all steps
    alike. `before` runs untimed before each step. With `settled` each step also runs untimed just before it is timed,
    and finds memory and caches as it left them itself. Without it each step runs untimed once, and then mostly runs
    after the same other step.
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
    """A CUDA event's interface for the CPU, where a step is done when it returns."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1e3 * (end.seconds - self.seconds)


@dataclass(frozen=True)
class Timing:
    """One step's seconds in each repetition, and the seconds of the copy before it."""

    seconds: list[float]
    copy_seconds: list[float]
    host_bound: float  # the share of repetitions in which the device may have waited for the host

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The distance between the quartiles over the median."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median

    @property
    def copy_median(self) -> float:
        return statistics.median(self.copy_seconds)

    def over_copy(self, moved: int, copied: int) -> float:
        """The step's rate over the copy's: it moves `moved` bytes; the copy reads and writes `copied` bytes each."""
        pairs = zip(self.seconds, self.copy_seconds, strict=True)
        return statistics.median(moved / step * copy / (2 * copied) for step, copy in pairs)


Steps = dict[Hashable, Callable[[], object]]


def queued(steps: Steps, copy, rounds: int, device: str, before=lambda: None) -> dict[Hashable, Timing]:
    """Time every step in rounds as `interleaved` does, but between events in the device's queue.

    The host waits for the device only at the end. Each step is compared with the `copy` before it. The copy gives the
    host time to queue the step, and evicts the step's inputs from the cache. If the copy ended before the whole step
    was queued, the device may have waited, and the repetition counts as bound by the host.
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


def copying(x: torch.Tensor) -> Callable[[], object]:
    """A step that copies a tensor into memory that exists already."""
    written = x.clone()
    return lambda: written.copy_(x)


def floor_seconds(copy_seconds: list[float]) -> list[float]:
    """The time in each round in which this machine moves the bytes of a loss with its gradient.

    A loss with its gradient reads [N, V] twice and writes it once; a copy reads and writes it once.
    """
    return [1.5 * seconds for seconds in copy_seconds]


def ratio(seconds: list[float], baseline: list[float]) -> float:
    """The median over the rounds of the ratio in each round."""
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


def peak_extra_bytes(step: Callable[[], None], drop_gradient: Callable[[], None], device: str) -> int:
    """Peak memory of one step beyond its inputs. On a CPU, call it in a new process."""
    step()  # a first call sets up thread pools and compiled code, which are not the step's memory
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
