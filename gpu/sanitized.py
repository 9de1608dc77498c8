"""Runs the smoke's cases in few rows under a tool of NVIDIA's compute-sanitizer, which checks our kernels alone."""

import subprocess
import sys
from pathlib import Path

import cases
from steps import SKIPPED
from tools import PLACES, found, pass_on

NAMES = "kns=3kdk4cuda"  # every kernel of namespace kdk::cuda has this in its mangled name
# memcheck reports failed calls of CUDA too: those of a plan that asks whether a card has room are no faults, and the
# others raise. The tools count the mbarriers that the compiler reports; these are more.
OPTIONS = {
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": ["--num-cuda-barriers", "4"],
    "synccheck": ["--num-cuda-barriers", "4"],
}
NOT_SUPPORTED = r"Device not supported|is not supported|Unable to find injection library"


def main(words: list[str] | None = None) -> int:
    options = cases.parser(__doc__)
    options.add_argument("--tool", choices=OPTIONS, required=True)
    given = options.parse_args(words)
    sanitizer = found("compute-sanitizer")
    if sanitizer is None:
        print(f"compute-sanitizer was found neither on PATH nor in {', '.join(PLACES)}")
        return SKIPPED
    smoke = Path(__file__).with_name("smoke.py")
    named = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, errors="replace").stdout
    filtered = "--kernel-name" if "--kernel-name" in named else "--kernel-regex"  # the older name
    command = [sanitizer, "--tool", given.tool, filtered, NAMES, "--error-exitcode", "1", "--print-limit", "50"]
    command += OPTIONS[given.tool]
    command += [sys.executable, str(smoke), "--backend", given.backend, "--device", given.device]
    command += ["--size", "few" if given.device == "cuda" else "tiny"]
    code, refusal, _ = pass_on(command, NOT_SUPPORTED)
    if refusal:
        print(f"compute-sanitizer does not check here: {refusal}")
        return SKIPPED
    return code


if __name__ == "__main__":
    sys.exit(main())
