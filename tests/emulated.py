"""Runs the CUDA kernels on a CPU: a host compiler builds csrc/cuda with the model in cuda_model/.

The resulting module replaces the CUDA functions of the compiled module:

    with emulated.serving(seed=3):
        kdkernels.fused_kl(student, teacher, backend="cuda")  # CPU tensors

The model has two builds. The plain one runs most tests. The watched one sees each access to memory (cuda_model/watch.h)
and contracts products and sums to fused multiply-adds, as a GPU's compiler does; it takes several times as long.

build/cuda_model caches the compiled files, keyed by a hash of all their inputs.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from filelock import FileLock
from torch import Tensor

from kdkernels.backends import native
from kdkernels.backends.native.rows import FLOATS, SUMS

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
MODEL = Path(__file__).parent / "cuda_model"
BINDINGS = MODEL / "module.cpp"
ABSENT = MODEL / "absent.cpp"
WATCH = MODEL / "watch.cpp"
KEPT = ROOT / "build" / "cuda_model"

COMPILER = os.environ.get("CXX", "g++")
# -fvisibility=hidden keeps two modules in one process from sharing the state of the model.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-x", "c++"]
# -fsanitize=thread calls a function at each access; watch.cpp defines the functions, so its library is not linked. At
# -O1, g++ fuses products and sums with -fexpensive-optimizations alone. -fno-thread-jumps keeps g++ from making two
# calls of one.
WATCHED_KERNELS = [
    "-DKDK_WATCHED", "-fsanitize=thread", "-fno-thread-jumps", "-fexpensive-optimizations", "-ffp-contract=fast",
]  # fmt: skip


def _missing() -> str | None:
    if sys.platform != "linux":
        return "the model is written for Linux"
    if shutil.which(COMPILER) is None:
        return f"found no {COMPILER}"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


missing_because = _missing()


def contracts() -> bool:
    """Whether the processor has fused multiply-adds, so that the watched build may use them."""
    return platform.machine() != "x86_64" or " fma " in Path("/proc/cpuinfo").read_text()


@functools.cache
def cuda_model(watched: bool = False) -> ModuleType:
    """The kernels of csrc/cuda with the controls of the model: cuda_model/module.cpp, cuda_model/control.h."""
    return _module("cuda_model", *sorted((CSRC / "cuda").glob("*.cu")), BINDINGS, watched=watched)


@functools.cache
def faults(watched: bool = False) -> ModuleType:
    """Kernels with switchable faults: cuda_model/faults.cu."""
    return _module("faults", MODEL / "faults.cu", watched=watched)


def mutated(old: str, new: str, *families: str, watched: bool = False) -> ModuleType:
    """`cuda_model(watched)` with `new` in place of `old`, and with the kernels of these families alone.

    The files of csrc/cuda must contain `old` exactly once.
    """
    found = {path: path.read_text() for path in sorted((CSRC / "cuda").iterdir()) if old in path.read_text()}
    times = sum(text.count(old) for text in found.values())
    assert times == 1, f"expected {old!r} once in csrc/cuda, found it {times} times"
    ((original, text),) = found.items()
    folder = KEPT / _hash(str(original), old, new, *(path.read_text() for path in sorted(CSRC.rglob("*.*"))))
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "csrc"
    with FileLock(folder / "lock"):
        if not copy.exists():
            unfinished = folder / "unfinished"
            shutil.copytree(CSRC, unfinished, dirs_exist_ok=True)
            (unfinished / original.relative_to(CSRC)).write_text(text.replace(old, new))
            unfinished.rename(copy)
    sources = [CSRC / "cuda" / f"{name}.cu" for name in (*families, "refusal")]
    # A source that does not include the changed file is compiled from its original path, so that the cache serves it.
    sources = [copy / path.relative_to(CSRC) if original in _included(path) else path for path in sources]
    return _module("cuda_model", *sources, ABSENT, BINDINGS, watched=watched)


@functools.cache
def _included(path: Path) -> set[Path]:
    """The file, and every file of csrc that it includes, directly or not."""
    names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    found = [other for name in names if (other := Path(os.path.normpath(path.parent / name))).exists()]
    return {path}.union(*(_included(other) for other in found))


def _module(name: str, *sources: Path, watched: bool) -> ModuleType:
    if watched:
        sources = WATCH, *sources  # first, so that the linker takes inline functions that are not watched themselves
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(functools.partial(_object, watched=watched), sources))
    key = _hash(name, *(object.name for object in objects))
    path = KEPT / key / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    _make(path, [COMPILER, "-shared", *map(str, objects)])
    # pybind11 makes one module for each full name; the last part of the name selects the module's init function.
    spec = importlib.util.spec_from_file_location(f"{key}.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _object(source: Path, watched: bool) -> Path:
    import pybind11

    flags = list(FLAGS)
    if watched and source.suffix == ".cu":
        flags += WATCHED_KERNELS
        if platform.machine() == "x86_64" and contracts():
            flags.append("-mfma")
    includes = [f"-I{folder}" for folder in (MODEL, pybind11.get_include(), sysconfig.get_paths()["include"])]
    # A mutation runs few calls: its compilation takes longer than its run.
    level = "-O0" if KEPT in source.parents else "-O1"
    options = [level, *flags, *includes]
    command = [COMPILER, *options, *_precompiled(options, source), "-c", str(source)]
    headers = [path for folder in (CSRC, MODEL) for path in sorted(folder.rglob("*.h"))]
    texts = [path.read_text() for path in [source, *headers]]
    key = _hash(_compiler_version(), pybind11.__version__, *command, *texts)
    path = KEPT / key / f"{source.stem}-{key}.o"
    _make(path, command)
    return path


def _precompiled(options: list[str], source: Path) -> list[str]:
    """Options with which kernels take the model's headers precompiled. Reading them takes longer than a small kernel.

    A compiler that cannot use the file reads the headers.
    """
    if source.suffix != ".cu":
        return []
    texts = [path.read_text() for path in sorted(MODEL.glob("*.h"))]
    header = KEPT / _hash(_compiler_version(), *options, *texts) / "model.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(header.parent / "lock"):
        if not header.exists():
            _replace(header, lambda unfinished: unfinished.write_text("#include <cuda_runtime.h>\n"))
    _make(header.with_suffix(".h.gch"), [COMPILER, *options, "-c", "-x", "c++-header", str(header)])
    return ["-include", str(header)]


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _make(path: Path, command: list[str]) -> None:
    """Makes a file unless it exists. Several processes may ask for the same file."""

    def compile(unfinished: Path):
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:8000]}"

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / "lock"):
        if not path.exists():
            _replace(path, compile)


def _replace(path: Path, write) -> None:
    unfinished = path.with_name(f"unfinished-{path.name}")
    write(unfinished)
    unfinished.replace(path)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# ---- the replacement of the compiled module


class Emulated:
    """The CUDA functions of the compiled module on a modelled device, and the other functions of the module.

    During a call, the model allows access to exactly the memory that the call may touch: skipped rows' logits are not
    part of it.
    """

    def __init__(self, module: ModuleType | None = None, device: int = 0):
        self.module = cuda_model() if module is None else module
        self.device = device

    def __getattr__(self, name):
        found = getattr(self.module, name)
        return functools.partial(self._run, name, found) if name.startswith("cuda_") else found

    def cuda_refusal(self, _device: int) -> str:
        return self.module.cuda_refusal(self.device)

    def _run(self, name: str, function, fields: dict, allocate, _device: int, stream: int) -> None:
        def allowed_bytes(size: int) -> Tensor:
            workspace = allocate(size)
            self.module.allow(workspace.data_ptr(), size, True)
            return workspace

        self.module.clear_memory()
        for address, size, writable in memory_of(name.removeprefix("cuda_"), fields):
            self.module.allow(address, size, writable)
        try:
            function(fields, allowed_bytes, self.device, stream)
        finally:
            self.module.clear_memory()


@contextlib.contextmanager
def serving(module: ModuleType | None = None, device: int = 0, seed: int = 0):
    """Makes the backend "cuda" serve CPU tensors through the model."""
    emulation = Emulated(module, device)
    emulation.set_seed(seed)
    before = native.cuda.module, native.cuda.device_type
    native.cuda.module, native.cuda.device_type = emulation, "cpu"
    try:
        yield emulation
    finally:
        native.cuda.module, native.cuda.device_type = before


# ---- the memory that a call may touch

# Fields that a kernel always writes. `memory_of` adds the fields that only some calls write.
WRITTEN = {
    "rows": ("loss", "statistics", "top1", "gradient"),
    "scale_rows": ("x",),
    "softcap": ("logits",),
    "softcap_gradient": ("gradient",),
    "topk_rows": ("loss", "statistics", "top1", "gradient"),
    "topk": ("indices", "log_probs", "tail_log_prob"),
    "ranked_uld": ("sums_of_signs", "loss", "divergence", "gradient"),
    "pair_costs": ("costs", "moments"),
    "pair_gradient": ("gradient",),
    "sinkhorn": ("value", "f", "g", "error", "done", "grad_cost", "grad_a", "grad_b"),
}
# Fields that hold one row of columns per row of the call; a kernel may touch only the kept rows. The value is the name
# of the field with the number of columns in use, or None if all columns are in use.
OF_KEPT_ROWS = {
    "rows": {"student": "columns", "teacher": "columns"},
    "scale_rows": {"x": "columns"},
    "topk_rows": {"student": "columns", "indices": None, "log_probs": None, "log_probs_rounding": None},
    "topk": {"logits": "columns"},
    "ranked_uld": {"student": None, "teacher": None, "indices": None, "sums_of_signs": None},
    "pair_costs": {"student": "columns", "teacher": "columns"},
    "pair_gradient": {"student": "columns", "teacher": "columns"},
}


def memory_of(kernel: str, fields: dict) -> Iterator[tuple[int, int, bool]]:
    """(address, bytes, writable) for each range of memory that a call of cuda_`kernel` may touch."""
    fields = fields | (fields["options"]._asdict() if "options" in fields else {})
    written = set(WRITTEN[kernel])
    if kernel == "rows":
        written |= {name for name, sweep in (("floats", FLOATS), ("sums", SUMS)) if fields["sweeps"] & sweep}
    by_row = OF_KEPT_ROWS.get(kernel, {})
    for name, x in fields.items():
        if not isinstance(x, Tensor) or not x.numel():
            continue
        if name not in by_row:
            parts = [x]
        elif name == "student" and kernel == "topk_rows" and not _reads_all_logits(fields):
            parts = _logits_of_entries(fields)
        else:
            parts = [row[: fields[by_row[name]] if by_row[name] else None] for row in _kept_rows(kernel, fields, x)]
        for part in parts:
            for address, size in _ranges(part):
                yield address, size, name in written


def _kept_rows(kernel: str, fields: dict, x: Tensor) -> list[Tensor]:
    """The kept rows of x [..., columns]. scale_rows keeps the rows whose factor is not 1."""
    name = {"scale_rows": "factor", "pair_costs": "row_mass", "pair_gradient": "row_mass"}.get(kernel, "row_scale")
    kept = fields[name].flatten() != (1 if kernel == "scale_rows" else 0)
    rows = [x[index] for index in itertools.product(*map(range, x.shape[:-1]))]
    return [row for row, keep in zip(rows, kept.expand(len(rows)).tolist(), strict=True) if keep]


def _reads_all_logits(fields: dict) -> bool:
    return not fields["support_only"] or fields["hard_weight"] is not None or fields["statistics"].numel() > 0


def _logits_of_entries(fields: dict) -> Iterator[Tensor]:
    students = _kept_rows("topk_rows", fields, fields["student"])
    for student, classes in zip(students, _kept_rows("topk_rows", fields, fields["indices"]), strict=True):
        for column in classes.tolist():
            if 0 <= column < fields["columns"]:
                yield student[column]


def _ranges(x: Tensor) -> Iterator[tuple[int, int]]:
    """The memory of x: one range if x is contiguous, otherwise one range per element."""
    if x.is_contiguous():
        yield x.data_ptr(), x.nbytes
    elif x.dim() > 1:
        for part in x:
            yield from _ranges(part)
    else:
        for i in range(len(x)):
            yield x.data_ptr() + i * x.stride(0) * x.element_size(), x.element_size()
