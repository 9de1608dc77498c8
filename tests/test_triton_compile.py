"""Compiles the Triton kernels ahead of time, without a GPU, and checks that no kernel spills a tile to the stack.

`python tests/test_triton_compile.py` prints the table of registers and exits with 1 if a kernel spills. The test runs
this command with --fewer, which compiles about half of the kernels, in a separate process, because conftest.py sets
TRITON_INTERPRET=1, under which nothing compiles.

The launchers select the kernels to compile. A launcher is called with tensors of the meta device, and a recorder keeps
the types, tile and warps of its launch, for a vocabulary of 151,936. `cases` lists the covered combinations. The tests
do not cover other widths (their tiles are no larger), logits that are not aligned to 16 bytes, or execution.
"""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 151_936
PROCESSES = 2
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
MAIN_TARGET = "sm_90"
FEW = ("kl", "js", "alpha")
# The operators with all options, which take the most registers.
WITH_GRADIENT = (
    "rows, label, gradient, statistics",
    "rows, label, gradient, statistics, its result",
    "topk_rows, label, conditional, gradient, statistics",
    "pairwise_costs, l1, moments",
    "pairwise_gradient, l1",
    "uld, gradient",
    "uld, gradient, its result",
)
# Points per side: one size that stays in registers, and two sizes with different tiles. Odd sizes have unaligned rows.
SINKHORN_POINTS = (63, 128, 1023)
SINKHORN_OPTIONS = ("", ", unrolled", ", entropic, unrolled")
# Operators that compile to the same kernel for every divergence.
ONCE = (
    "row_floats",
    "scale_",
    "softcap_",
    "softcap_gradient_",
    "topk",
    "topk of many",
    "topk of one",
    "topk_rows of one",
    *(f"pairwise_costs, {cost}{moments}" for cost in ("l1", "l2") for moments in ("", ", moments")),
    "pairwise_gradient, l1",
    "pairwise_gradient, l2",
    *(f"sinkhorn of {points}{options}" for points in SINKHORN_POINTS for options in SINKHORN_OPTIONS),
    "uld",
    "uld, gradient",
)
# The operators whose kernel of close rows is compiled too, as "its result".
OF_CLOSE_ROWS = (
    "rows, gradient", "rows, label, gradient, statistics", "topk_rows, label, gradient, statistics",
    "topk_rows, conditional, gradient",
)  # fmt: skip
ENTRIES = 64

# ptxas may put a few scalars on the stack if this lets one more block run at a time. A tile that does not fit the
# registers takes hundreds of bytes.
MAX_STACK = 32


class Case(NamedTuple):
    target: str
    divergence: str
    student: str
    teacher: str
    once: bool  # the operators of ONCE that are not in WITH_GRADIENT
    options: bool  # every choice of options


class Measured(NamedTuple):
    case: Case
    operator: str
    registers: int
    stack: int


def test_kernels_compile_without_spilling_a_tile():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--fewer"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def cases(fewer: bool) -> list[Case]:
    """Every divergence with gradient and all options, for every target. A few divergences compile all other operators
    too, on the main target and on AMD's, and other dtypes on all targets.

    Fewer: the targets besides those two have the few divergences alone. On those two, kl alone compiles the operators
    that are the same for every divergence; on the main target alone, kl alone compiles all choices of options. Other
    dtypes have kl and alpha, whose powers take the most registers.
    """
    from kdkernels.divergences import CATALOGUE

    found = []
    for target in TARGETS:
        full = target in (MAIN_TARGET, "gfx942")
        for divergence in CATALOGUE if full or not fewer else FEW:
            everything = full and divergence in FEW
            options = everything and (not fewer or (divergence == "kl" and target == MAIN_TARGET))
            found.append(Case(target, divergence, "bfloat16", "bfloat16", everything, options))
        other_dtypes = [("float32", "float32")]
        if target == MAIN_TARGET:
            other_dtypes += [("bfloat16", "float32"), ("float16", "float16")]
        few = ("kl", "alpha") if fewer else FEW
        found += [Case(target, divergence, *dtypes, False, False) for divergence in few for dtypes in other_dtypes]
    return found


class Recorder:
    """Replaces a kernel and records the arguments of its launches."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def launches(divergence: str, student_dtype, teacher_dtype) -> dict:
    """{operator and options: (kernel, arguments, keyword arguments)}, as the launchers choose them."""
    import torch

    from kdkernels.backends.triton import linear, pairwise, sinkhorn, topk, topk_rows, uld
    from kdkernels.backends.triton import rows as launchers
    from kdkernels.families import sinkhorn as transport
    from kdkernels.families.options import RowOptions
    from kdkernels.families.rows import Rows, softmaxes
    from kdkernels.families.topk import Entries, TopkRows
    from kdkernels.families.uld import Uld

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    count = 4
    student = meta(1, count, VOCABULARY, dtype=student_dtype)
    teacher = meta(1, count, VOCABULARY, dtype=teacher_dtype)
    row_scale, temperature, parameters, floats, sums = meta(count), meta(1), meta(1), meta(5, count), meta(3, count)
    plain = RowOptions(row_scale, temperature)
    label = RowOptions(row_scale, meta(count), labels=meta(count, dtype=torch.int64), hard_weight=meta(count))
    one = meta(1, count, 1, dtype=student_dtype)
    entries = Entries(meta(count, ENTRIES, dtype=torch.int32), meta(count, ENTRIES), meta(count))
    of_one = TopkRows(one, entries, label, divergence, parameters, 1, True, False)
    of_uld = Uld(student, teacher, row_scale, temperature, None, VOCABULARY, VOCABULARY - 1, 1 << 28)

    calls = {
        "row_floats": lambda: launchers.row_floats(softmaxes(student, teacher, plain, VOCABULARY)),
        "scale_": lambda: launchers.scale_(student, row_scale),
        "softcap_": lambda: linear.softcap_(student, 30.0),
        "softcap_gradient_": lambda: linear.softcap_gradient_(student, student, 30.0),
        "topk": lambda: topk.topk(student, row_scale, temperature, ENTRIES, VOCABULARY),
        "topk of many": lambda: topk.topk(student, row_scale, temperature, 4096, VOCABULARY),
        "topk of one": lambda: topk.topk(one, row_scale, temperature, 1, 1),
        "topk_rows of one": lambda: topk_rows.topk_rows(of_one, True),
        "uld": lambda: uld.uld(of_uld, False),
        "uld, gradient": lambda: uld.uld(of_uld, True),
    }
    for options, row in (("", plain), (", label", label)):
        # partial binds the loop variables now.
        rows = Rows(student, teacher, row, divergence, parameters, VOCABULARY, False)
        calls["row_gradient" + options] = partial(launchers.row_gradient, rows, floats, sums)
        for statistics in (False, True):
            rows, with_statistics = rows._replace(statistics=statistics), ", statistics" * statistics
            calls["row_sums" + options + with_statistics] = partial(launchers.row_sums, rows, floats)
            for gradient in (False, True):
                name = "rows" + options + ", gradient" * gradient + with_statistics
                calls[name] = partial(launchers.rows, rows, gradient)
        for conditional, gradient, statistics in (
            (False, True, False),
            (False, True, True),
            (False, False, False),
            (True, True, False),
            (True, True, True),
        ):
            name = "topk_rows" + options + ", conditional" * conditional
            name += ", gradient" * gradient + ", statistics" * statistics
            against = TopkRows(student, entries, row, divergence, parameters, VOCABULARY, statistics, conditional)
            calls[name] = partial(topk_rows.topk_rows, against, gradient)

    cloud_floats, weights = meta(4, 1, count), meta(1, count, count)
    for cost in ("l1", "l2"):
        clouds = transport.Clouds(student, teacher, meta(1, count), temperature, cost, VOCABULARY)
        calls[f"pairwise_gradient, {cost}"] = partial(
            pairwise.pairwise_gradient, clouds, cloud_floats, weights, meta(1, count)
        )
        for moments in (False, True):
            name = f"pairwise_costs, {cost}" + ", moments" * moments
            calls[name] = partial(pairwise.pairwise_costs, clouds, cloud_floats, moments)
    for points in SINKHORN_POINTS:
        problem = transport.Sinkhorn(
            meta(count, points, points), meta(count, points), meta(count, points), temperature, meta(1), 20, False,
            "unrolled", 1 << 28,
        )  # fmt: skip
        for options in SINKHORN_OPTIONS:
            calls[f"sinkhorn of {points}{options}"] = partial(
                sinkhorn.sinkhorn, problem._replace(entropic="entropic" in options), "unrolled" in options
            )

    launched, found = [], {}
    kernels = [(launchers, name) for name in ("rows_kernel", "close_rows_kernel", "scale_kernel")]
    kernels += [(linear, name) for name in ("softcap_kernel", "softcap_gradient_kernel")]
    kernels += [(topk_rows, "topk_rows_kernel")]
    kernels += [(topk, name) for name in ("topk_kernel", "topk_result_kernel")]
    kernels += [(pairwise, f"pair_{name}_kernel") for name in ("costs", "costs_sum", "gradient")]
    kernels += [(sinkhorn, name) for name in ("sinkhorn_kernel", "tiled_sinkhorn_kernel")]
    kernels += [(uld, name) for name in ("uld_ranks_kernel", "uld_gradient_kernel")]
    originals = [(module, name, getattr(module, name)) for module, name in kernels]
    try:
        for module, name, kernel in originals:
            setattr(module, name, Recorder(kernel, launched))
        for operator, call in calls.items():
            launched.clear()
            call()
            assert launched and len(launched) <= 2, launched
            recorded = launched
            if operator.startswith(("rows", "topk_rows")) and operator not in OF_CLOSE_ROWS:
                recorded = launched[:1]
            found |= zip((operator, operator + ", its result"), recorded, strict=False)
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)
    return found


def source(kernel, args, kwargs):
    """A recorded launch as an ASTSource, specialised like the launch, and its compile options."""
    import torch
    from triton.compiler import ASTSource

    pointer = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {"num_warps": values.pop("num_warps")}
    constants, attributes = {}, {}

    def type_of(parameter, value, place: tuple[int, ...]):
        if isinstance(value, tuple):  # a tuple of tensors and None
            return type(value)(*(type_of(parameter, part, (*place, i)) for i, part in enumerate(value)))
        tensor = isinstance(value, torch.Tensor)
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            constants[place] = value
            return "constexpr"
        if tensor or (isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize):
            attributes[place] = [["tt.divisibility", 16]]
        if tensor:
            return pointer[value.dtype]
        return parameter.annotation_type or ("fp32" if isinstance(value, float) else "i32")

    signature = {p.name: type_of(p, values[p.name], (i,)) for i, p in enumerate(kernel.params)}
    return ASTSource(kernel, signature, constants, attributes), options


def compile_case(case: Case) -> list[Measured]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    measured = []
    dtypes = getattr(torch, case.student), getattr(torch, case.teacher)
    for operator, launch in launches(case.divergence, *dtypes).items():
        once = operator.removesuffix(", its result") in ONCE
        if operator not in WITH_GRADIENT and not (case.once if once else case.options):
            continue
        if once and case.divergence != "kl":
            continue
        ast, options = source(*launch)
        asm = triton.compile(ast, target=GPUTarget(*TARGETS[case.target]), options=options).asm
        usage = nvidia_usage(asm["cubin"]) if "cubin" in asm else amd_usage(asm["amdgcn"])
        measured.append(Measured(case, operator, *usage))
    return measured


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """The number of registers, and the bytes of stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def amd_usage(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]
    return int(registers), int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])


def print_table(measured: list[Measured]):
    """Prints a line per operator and options: the least and most registers of its kernels, for each target."""
    print(f"registers a thread, V = {VOCABULARY:,}{'':17}" + "".join(f"{target:>12}" for target in TARGETS))
    for operator in dict.fromkeys(m.operator for m in measured):
        line = f"{operator:48}"
        for target in TARGETS:
            used = [m.registers for m in measured if m.operator == operator and m.case.target == target]
            line += f"{f'{min(used)}-{max(used)}' if used else '-':>12}"
        print(line)


def main() -> int:
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        measured = [m for found in pool.imap(compile_case, cases("--fewer" in sys.argv[1:])) for m in found]
    print_table(measured)
    on_stack = sorted((m for m in measured if m.stack), key=lambda m: -m.stack)
    for m in on_stack:
        print(f"stack {m.stack}: {m.operator}, {' '.join(map(str, m.case[:4]))}")
    worst = max(m.stack for m in measured)
    print(f"{len(measured)} kernels, {len(on_stack)} with a stack, at most {worst} bytes ({MAX_STACK} pass)")
    return 1 if worst > MAX_STACK else 0


if __name__ == "__main__":
    sys.exit(main())
