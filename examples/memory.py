"""Peak memory of this process in resident pages, as the system counts them; no other package is needed."""

import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Reset the peak. Only Linux can: it does so when 5 is written to this file."""
    if CLEAR.exists():
        CLEAR.write_text("5")


def resident_bytes() -> int:
    """Resident memory now, or the peak if the system does not report the current value."""
    return _kilobytes("VmRSS") * 1024 if STATUS.exists() else peak_resident_bytes()


def peak_resident_bytes() -> int:
    # On Linux a child's ru_maxrss starts at its parent's peak, so VmHWM is read there.
    if STATUS.exists():
        return _kilobytes("VmHWM") * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _kilobytes(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])
