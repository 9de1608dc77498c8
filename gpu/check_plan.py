"""The check of the plan in KDKERNELS_PLAN: kl and js in every dtype, rows at 16 bytes and shifted rows, against fp64.

Each plan has a process, so that a plan that hangs ends alone.
"""

import os
import sys

import cases
import torch
from plans import NO_PLAN, VARIABLE, shapes
from steps import SKIPPED


def check(plan: str, backend: str, device: str) -> int:
    checked = cases.Cases(device, refusal=VARIABLE)
    for dtype in cases.DTYPES:
        for rows, columns in shapes(plan, device == "cpu"):
            for is_shifted in (False, True):
                student, teacher = cases.drawn(rows, columns, dtype, device, is_shifted)
                for divergence in ("kl", "js"):
                    name = f"{plan}: {divergence} {cases.name_of(dtype)} [{rows}, {columns}]{', shifted' * is_shifted}"
                    checked.run(name, cases.against_reference, student, teacher, divergence, backend)
    if checked.refusals and not checked.count:
        print(checked.refusals[0])
        return SKIPPED
    return checked.conclude()


def check_that_nonsense_is_refused(backend: str, device: str) -> int:
    try:
        cases.loss_and_gradient(*cases.drawn(3, 50, torch.float32, device), "kl", backend)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return 0 if VARIABLE in str(error) else 1
    print(f"{VARIABLE}={NO_PLAN} had no effect, so this build takes no plan")
    return 1


def main(words: list[str] | None = None) -> int:
    arguments = cases.parser(__doc__).parse_args(words)
    plan = os.environ[VARIABLE]
    with cases.serving(arguments.backend, arguments.device):
        if plan == NO_PLAN:
            return check_that_nonsense_is_refused(arguments.backend, arguments.device)
        return check(plan, arguments.backend, arguments.device)


if __name__ == "__main__":
    sys.exit(main())
