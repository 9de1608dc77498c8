"""The number of threads of a CPU kernel's call."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ... import callers


def count_threads(processors: Callable[[], int]) -> int:
    """torch's number of threads, or 1 if torch has more threads than the process has processors.

    Threads that share a processor wait for each other at each barrier of a kernel. A number between 1 and torch's would
    be slow too: OpenMP keeps one team of threads, and ends the threads that a smaller region leaves out. torch's next
    operator then starts them again. That holds under a quota too, which throttles threads and does not make them share:
    two threads in a loop with a torch operator on four threads took 1.3 to 2.9 times the processor time of one thread.
    The number is found anew in each call, since torch's number and the affinity may change.

    Args:
        processors: the processors of the calling thread, or 0 in a process that must start no threads.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    available = min(processors(), _QUOTA)
    if threads <= available:
        return threads
    if available:  # else the process is a forked child
        _warn_once(threads, available)
    return 1


_warned = False


def _warn_once(threads: int, available: int) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    callers.warn(
        f"kdkernels runs its CPU kernels on one thread: torch has {threads} threads, but this process has {available} "
        f"processors (by its affinity and its control group); torch.set_num_threads({available}) uses them all",
    )


def quota_of_control_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """The processors that the quota of the process's control groups amounts to, rounded up; infinite without a quota.

    A group's quota holds for the groups inside it too. A container may see the path that its group has on the host,
    although the group itself is mounted at the root; the folders of that path are missing then.

    Args:
        groups: a file with a line "hierarchy:controllers:path" for each hierarchy; version 2 has no controllers.
        root: the folder of the hierarchies.
    """
    quotas = [math.inf]
    try:
        lines = os.fsdecode(groups.read_bytes()).splitlines()
    except OSError:  # another system than Linux
        lines = []
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            top, names = root, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            top, names = root / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        folder = top / path.lstrip("/")
        quotas += [_quota(group, names) for group in (folder, *folder.parents) if group.is_relative_to(top)]
    return min(quotas)


def _quota(group: Path, names: tuple[str, ...]) -> float:
    """A group's quota per period, rounded up. Version 2 writes "max" for no quota, and version 1 writes -1."""
    try:
        quota, period = (int(x) for name in names for x in (group / name).read_text().split())
    except (OSError, ValueError):
        return math.inf
    return math.ceil(quota / period) if quota > 0 and period > 0 else math.inf


_QUOTA = quota_of_control_groups()
