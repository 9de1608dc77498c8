"""Profiles five kernels with ncu: kl and js in bf16, kl in fp32, the extraction of a top k, the loss against it.

Without `--alone` it starts ncu on itself; with `--alone` it launches each kernel once.
"""

import sys

import cases
import torch
from steps import SKIPPED
from tools import PLACES, found, pass_on

import kdkernels

SECTIONS = ("SpeedOfLight", "WarpStateStats", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis")
KERNELS = "regex:^(rows_kernel|topk_kernel|topk_rows_kernel)$"
COUNT = 5
SHAPE = (2048, 151_936)
# ncu's output where the driver or the machine does not let it read the counters.
NOT_PERMITTED = r"ERR_NVGPUCTRPERM|Failed to initialize the profiler|LibraryNotLoaded|not supported on"


def launch(backend: str, device: str) -> None:
    for dtype, divergences in ((torch.bfloat16, ("kl", "js")), (torch.float32, ("kl",))):
        student, teacher = cases.drawn(*SHAPE, dtype, device)
        student.requires_grad_()
        for divergence in divergences:
            kdkernels.fused_divergence(student, teacher, divergence, backend=backend)
            cases.synchronize(device)
    student, teacher = cases.drawn(*SHAPE, torch.bfloat16, device)
    sparse = kdkernels.topk_log_probs(teacher, 64, backend=backend)
    kdkernels.fused_kl(student.requires_grad_(), sparse, backend=backend)
    cases.synchronize(device)


def main(words: list[str] | None = None) -> int:
    options = cases.parser(__doc__)
    options.add_argument("--alone", action="store_true", help="launch the kernels, without ncu")
    given = options.parse_args(words)
    if given.alone:
        launch(given.backend, given.device)
        return 0
    ncu = found("ncu")
    if ncu is None:
        print(f"ncu was found neither on PATH nor in {', '.join(PLACES)}")
        return SKIPPED
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = [ncu, "--clock-control", "none", "--kernel-name", KERNELS, "--launch-count", str(COUNT), *sections]
    command += [sys.executable, __file__, "--alone", "--backend", given.backend, "--device", given.device]
    code, refusal, profiled = pass_on(command, NOT_PERMITTED, "Section: GPU Speed Of Light")
    if refusal:
        print(f"ncu may not profile here: {refusal}")
        return SKIPPED
    print(f"profiled {profiled} of {COUNT} kernels")
    return code or int(profiled != COUNT)


if __name__ == "__main__":
    sys.exit(main())
