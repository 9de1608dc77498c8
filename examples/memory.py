"""The most memory that this process held, as the system counts it (resident pages), without another package."""

import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Linux forgets the peak when 5 is written here; elsewhere the peak of the whole process stays."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def resident_bytes() -> int:
    """Now; where the system does not say, the peak."""
    return _kilobytes("VmRSS") * 1024 if STATUS.exists() else peak_resident_bytes()


def peak_resident_bytes() -> int:
    # Not ru_maxrss on Linux: a child starts there with the peak of its parent.
    if STATUS.exists():
        return _kilobytes("VmHWM") * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _kilobytes(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])
