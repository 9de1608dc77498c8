"""One measurement on the CPU in its own process, printed as JSON; the benchmark on a CPU calls this file.

A process has one memory peak, and its allocator reads its settings when it starts.
"""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys

from family import COPY, OURS, Shape
from timing import copying, interleaved, peak_extra_bytes


def in_own_process(measurement: str, family: str, contenders: list[str], shape: Shape, rounds=0, environment=None):
    """Run this file and return what it printed. A failure raises RuntimeError with the last lines of its errors."""
    options = dataclasses.asdict(shape) | {"family": family, "contenders": "|".join(contenders), "rounds": rounds}
    arguments = [text for key, value in options.items() if value is not None for text in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, __file__, measurement, *arguments],
        env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{measurement} {options} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurement", choices=["memory", "rounds"])
    parser.add_argument("--family", required=True, help="the name of the family's file")
    parser.add_argument("--contenders", required=True, help="names, separated by |; memory takes one")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--width", type=int, help="of hidden states")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=0)
    options = parser.parse_args()

    names = options.contenders.split("|")
    module = importlib.import_module(options.family)
    family = module.FAMILY if hasattr(module, "FAMILY") else module.family("cpu", with_peers=names != [OURS])
    problem = family.problem(Shape(options.rows, options.classes, options.dtype, options.width), "cpu")
    steps = {name: problem.step(family.losses[name]) for name in names}
    if options.measurement == "memory":
        result = peak_extra_bytes(steps[names[0]], problem.drop_gradients, "cpu")
    else:
        steps[COPY] = copying(problem.others[0])
        result = interleaved(steps, options.rounds, "cpu", before=problem.drop_gradients)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
