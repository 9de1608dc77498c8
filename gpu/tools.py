"""Other programs: where they are, and their output passed on line by line."""

import re
import shutil
import subprocess


def found(program: str) -> str | None:
    """The program on PATH, or where CUDA's toolkit usually lies."""
    return shutil.which(program) or shutil.which(f"/usr/local/cuda/bin/{program}")


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
