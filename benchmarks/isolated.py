"""One measurement on the CPU in a process of its own, printed as JSON: cpu.py calls it.

A peak of memory belongs to a process, and so does an allocator that reads its settings when it starts.
"""

import argparse
import json
import os
import subprocess
import sys

import class_ot
import timing
import topk
import torch
import transport
from contenders import kdkernels_loss, peers
from data import synthetic_heads, synthetic_logits
from head_contenders import Leaves, head_losses


def in_own_process(measurement: str, *, environment: dict[str, str] | None = None, **options):
    """Run this file with `--option value ...` and return what it printed; a failure raises its last lines."""
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
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
    parser.add_argument(
        "measurement", choices=["memory", "head-memory", "topk-memory", "transport-memory", "class-ot-memory", "rounds"]
    )
    parser.add_argument("--contenders", help="names, separated by commas")
    parser.add_argument("--divergence", default="kl")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--width", type=int, help="of the hidden states of a head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=0)
    arguments = parser.parse_args()

    if arguments.measurement == "head-memory":
        losses, _ = head_losses("cpu")
        leaves = Leaves(*synthetic_heads(arguments.rows, arguments.width, arguments.vocabulary))
        step = leaves.step(losses[arguments.contenders])
        print(json.dumps(timing.peak_extra_bytes(step, leaves.drop_gradients, "cpu")))
        return
    if arguments.measurement == "topk-memory":
        dtype = getattr(torch, arguments.dtype)
        step = topk.memory_step(arguments.contenders, arguments.rows, arguments.vocabulary, dtype)
        print(json.dumps(timing.peak_extra_bytes(*step, "cpu")))
        return
    if arguments.measurement == "transport-memory":
        step = transport.memory_step(arguments.contenders, arguments.rows, arguments.vocabulary)
        print(json.dumps(timing.peak_extra_bytes(*step, "cpu")))
        return
    if arguments.measurement == "class-ot-memory":
        batch = class_ot.Batch(arguments.rows, arguments.vocabulary)
        step = batch.step(class_ot.LOSSES[arguments.contenders])
        print(json.dumps(timing.peak_extra_bytes(step, batch.drop_gradient, "cpu")))
        return
    names = arguments.contenders.split(",")
    losses = {"kdkernels": kdkernels_loss(arguments.divergence)}
    if set(names) - set(losses):
        losses |= peers(arguments.divergence, "cpu")[0]
    losses = {name: losses[name] for name in names}
    dtype = getattr(torch, arguments.dtype)
    student, teacher = synthetic_logits(arguments.rows, arguments.vocabulary, dtype)
    steps, drop_gradient = timing.training_steps(losses, student, teacher)
    if arguments.measurement == "memory":
        del steps["copy"]  # which holds memory
        result = timing.peak_extra_bytes(steps[names[0]], drop_gradient, "cpu")
    else:
        result = timing.interleaved(steps, arguments.rounds, "cpu", before=drop_gradient)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
