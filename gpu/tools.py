"""Other programs: where they are, and their output passed on line by line."""

import glob
import re
import shutil
import subprocess

PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")  # where NVIDIA's packages put programs


def found(program: str) -> str | None:
    """The program on PATH, or in the last of PLACES that has it."""
    there = [path for place in PLACES for path in sorted(glob.glob(f"{place}/{program}"))]
    return shutil.which(program) or next((path for path in reversed(there) if shutil.which(path)), None)


def pass_on(command: list[str], refusals: str, counted: str = "") -> tuple[int, str | None, int]:
    """Runs a command and prints its output as it comes.

    Returns the exit code, the first line that matches `refusals` (the program cannot work on this machine), and the
    number of lines with `counted`.
    """
    print(" ".join(command), flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    refusal, count = None, 0
    for line in process.stdout:
        print(line, end="", flush=True)
        count += bool(counted) and counted in line
        if refusal is None and re.search(refusals, line):
            refusal = line.strip()
    return process.wait(), refusal, count
