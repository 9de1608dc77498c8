"""The CUDA kernels on a CPU: compiles csrc/cuda with a host compiler under the model in cuda_model/, and stands in for
the compiled module's CUDA functions.

    with emulated.serving(seed=3):
        kdkernels.fused_kl(student, teacher, backend="cuda")  # CPU tensors

What is compiled is kept under build/cuda_model, by a hash of everything that goes into it.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from kdkernels.backends import native
from kdkernels.families.rows import ROW_FLOATS, ROW_STATISTICS, ROW_SUMS, ROW_TOP1

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
MODEL = Path(__file__).parent / "cuda_model"
BINDINGS = MODEL / "module.cpp"
KEPT = ROOT / "build" / "cuda_model"

COMPILER = os.environ.get("CXX", "g++")
# Without -fvisibility=hidden two modules in one process would share a machine.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-x", "c++"]


def _missing() -> str | None:
    if sys.platform != "linux":
        return "the model is written for Linux"
    if shutil.which(COMPILER) is None:
        return f"there is no {COMPILER}"
    return None if importlib.util.find_spec("pybind11") else "there is no pybind11"


missing_because = _missing()


@functools.cache
def cuda_model() -> ModuleType:
    """The kernels of csrc/cuda and what controls the model: cuda_model/module.cpp, cuda_model/control.h."""
    return _module("cuda_model", *_kernels(), BINDINGS)


@functools.cache
def faults() -> ModuleType:
    """Kernels that can be made wrong: cuda_model/faults.cu."""
    return _module("faults", MODEL / "faults.cu")


def mutated(old: str, new: str) -> ModuleType:
    """`cuda_model` with `new` in place of `old`, which stands once in the files of csrc/cuda."""
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
    # What includes no changed line is what it was, and compiled already.
    kernels = [copy / path.relative_to(CSRC) if original in (path, *_headers()) else path for path in _kernels()]
    return _module("cuda_model", *kernels, BINDINGS)


def _kernels() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def _headers() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.h"))


def _module(name: str, *sources: Path) -> ModuleType:
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(_object, sources))
    key = _hash(name, *(object.name for object in objects))
    path = KEPT / key / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    _make(path, [COMPILER, "-shared", *map(str, objects)])
    # pybind11 makes one module of each full name, and the last part of it names the function that makes it.
    spec = importlib.util.spec_from_file_location(f"{key}.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _object(source: Path) -> Path:
    import pybind11

    includes = [f"-I{folder}" for folder in (MODEL, pybind11.get_include(), sysconfig.get_paths()["include"])]
    command = [COMPILER, *FLAGS, *includes, "-c", str(source)]
    headers = [path for folder in (CSRC, MODEL) for path in sorted(folder.rglob("*.h"))]
    texts = [path.read_text() for path in [source, *headers]]
    key = _hash(_compiler_version(), pybind11.__version__, *command, *texts)
    path = KEPT / key / f"{source.stem}-{key}.o"
    _make(path, command)
    return path


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _make(path: Path, command: list[str]) -> None:
    """Makes a file that is not there yet; several processes may want the same one."""

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


# ---- in place of the compiled module

_ELEMENT_BYTES = {code: dtype.itemsize for dtype, code in native._DTYPE_CODE.items()}


class Emulated:
    """The CUDA functions of the compiled module, on a device of the model, and whatever else the module has.

    Around each call exactly the memory that the call may touch is allowed: of a row that is skipped, no logits.
    """

    def __init__(self, module: ModuleType | None = None, device: int = 0):
        self.module = cuda_model() if module is None else module
        self.device = device

    def __getattr__(self, name):
        return getattr(self.module, name)

    def cuda_rows(self, *arguments) -> None:
        *call, _, stream = arguments
        with self._allowing(memory_of_rows(*call)):
            self.module.cuda_rows(*call, self.device, stream)

    def cuda_scale_rows(self, *arguments) -> None:
        *call, _, stream = arguments
        with self._allowing(memory_of_scale_rows(*call)):
            self.module.cuda_scale_rows(*call, self.device, stream)

    def cuda_softcap(self, *arguments) -> None:
        *call, _, stream = arguments
        with self._allowing(memory_of_softcap(*call)):
            self.module.cuda_softcap(*call, self.device, stream)

    def cuda_softcap_gradient(self, *arguments) -> None:
        *call, _, stream = arguments
        with self._allowing(memory_of_softcap_gradient(*call)):
            self.module.cuda_softcap_gradient(*call, self.device, stream)

    def cuda_topk_rows(self, *arguments) -> None:
        *call, _, stream = arguments
        with self._allowing(memory_of_topk_rows(*call)):
            self.module.cuda_topk_rows(*call, self.device, stream)

    def cuda_topk(self, *arguments) -> None:
        *call, _, stream = arguments
        with self._allowing(memory_of_topk(*call)):
            self.module.cuda_topk(*call, self.device, stream)

    def cuda_uld(self, *arguments) -> None:
        *call, _, stream = arguments
        with self._allowing(memory_of_uld(*call)):
            self.module.cuda_uld(*call, self.device, stream)

    def cuda_pair_costs(self, *arguments) -> None:
        *call, workspace, _, stream = arguments
        with self._allowing(memory_of_pair_costs(*call)):
            self._allow_workspace(workspace, self.cuda_pair_costs_workspace_bytes(*_pair_sizes(*call)))
            self.module.cuda_pair_costs(*call, workspace, self.device, stream)

    def cuda_pair_gradient(self, *arguments) -> None:
        *call, workspace, _, stream = arguments
        with self._allowing(memory_of_pair_gradient(*call)):
            self._allow_workspace(workspace, self.cuda_pair_gradient_workspace_bytes(*_pair_sizes(*call)))
            self.module.cuda_pair_gradient(*call, workspace, self.device, stream)

    def cuda_sinkhorn(self, *arguments) -> None:
        *call, workspace, _, stream = arguments
        fp64, _, unrolled, sizes = call[:4]
        with self._allowing(memory_of_sinkhorn(*call)):
            self._allow_workspace(workspace, self.cuda_sinkhorn_workspace_bytes(*sizes, fp64, unrolled))
            self.module.cuda_sinkhorn(*call, workspace, self.device, stream)

    def cuda_pair_costs_workspace_bytes(self, clouds, rows, columns, fp64, _device=None) -> int:
        return self.module.cuda_pair_costs_workspace_bytes(clouds, rows, columns, fp64, self.device)

    def cuda_pair_gradient_workspace_bytes(self, clouds, rows, columns, fp64, _device=None) -> int:
        return self.module.cuda_pair_gradient_workspace_bytes(clouds, rows, columns, fp64, self.device)

    def cuda_sinkhorn_workspace_bytes(self, problems, n, m, iterations, fp64, unrolled, _device=None) -> int:
        sizes = (problems, n, m, iterations, fp64, unrolled)
        return self.module.cuda_sinkhorn_workspace_bytes(*sizes, self.device)

    def cuda_refusal(self, _device: int) -> str:
        return self.module.cuda_refusal(self.device)

    def _allow_workspace(self, address: int, size: int) -> None:
        self.module.allow(address, size, True)

    @contextlib.contextmanager
    def _allowing(self, memory: Iterator[tuple[int, int, bool]]):
        self.module.clear_memory()
        for address, size, writable in memory:
            self.module.allow(address, size, writable)
        try:
            yield
        finally:
            self.module.clear_memory()


@contextlib.contextmanager
def serving(module: ModuleType | None = None, device: int = 0, seed: int = 0):
    """Lets the backend "cuda" serve CPU tensors, through the model."""
    emulation = Emulated(module, device)
    emulation.set_seed(seed)
    before = native.cuda.module, native.cuda.device_type
    native.cuda.module, native.cuda.device_type = emulation, "cpu"
    try:
        yield emulation
    finally:
        native.cuda.module, native.cuda.device_type = before


def memory_of_rows(sweeps, divergence, sizes, student, teacher, row_scale, temperature, hard_weight, labels, parameters,
                   temperature_squared, unit_log_sum, floats, sums, loss, statistics, top1, gradient):  # fmt: skip
    """(address, bytes, writable) of all that a call of cuda_rows may touch."""
    rows, inner, columns, gradient_columns = sizes
    element = _ELEMENT_BYTES[student[1]]
    number = 8 if 8 in (element, _ELEMENT_BYTES[teacher[1]]) else 4
    kept = [row for row, scale in enumerate(_numbers(row_scale, rows, number)) if scale != 0]
    for logits in (student, teacher):
        for address in _row_addresses(logits, kept, inner):
            yield address, columns * _ELEMENT_BYTES[logits[1]], False
    yield from _per_row_memory(rows, number, row_scale, temperature, hard_weight)
    yield labels, rows * 8, False
    yield parameters, number, False
    yield floats, len(ROW_FLOATS) * rows * number, bool(sweeps & native._FLOATS)
    yield sums, len(ROW_SUMS) * rows * number, bool(sweeps & native._SUMS)
    yield loss, rows * number, True
    yield statistics, len(ROW_STATISTICS) * rows * number, True
    yield top1, len(ROW_TOP1) * rows * 8, True
    yield gradient, rows * gradient_columns * element, True


def memory_of_topk_rows(divergence, conditional, fp64, sizes, student, indices, log_probs, tail_log_prob, row_scale,
                        temperature, hard_weight, labels, parameters, temperature_squared, loss, statistics, top1,
                        gradient):  # fmt: skip
    """As above, of cuda_topk_rows. Of a conditional row, where nothing asks for more, the logits of entries alone."""
    rows, inner, columns, gradient_columns, entries = sizes
    element, number = _ELEMENT_BYTES[student[1]], 8 if fp64 else 4
    kept = [row for row, scale in enumerate(_numbers(row_scale, rows, number)) if scale != 0]
    named = (ctypes.c_int32 * (rows * entries)).from_address(indices)
    whole = not conditional or hard_weight[0] or statistics
    for row, address in zip(kept, _row_addresses(student, kept, inner), strict=True):
        if whole:
            yield address, columns * element, False
            continue
        for column in named[row * entries : (row + 1) * entries]:
            if 0 <= column < columns:
                yield address + column * element, element, False
    for data, size in ((indices, 4), (log_probs, number)):
        for row in kept:
            yield data + row * entries * size, entries * size, False
    yield tail_log_prob, rows * number, False
    yield from _per_row_memory(rows, number, row_scale, temperature, hard_weight)
    yield labels, rows * 8, False
    yield parameters, number, False
    yield loss, rows * number, True
    yield statistics, len(ROW_STATISTICS) * rows * number, True
    yield top1, len(ROW_TOP1) * rows * 8, True
    yield gradient, rows * gradient_columns * element, True


def memory_of_topk(sizes, logits, row_scale, temperature, indices, log_probs, tail_log_prob):
    """As above, of cuda_topk."""
    rows, inner, columns, k = sizes
    element = _ELEMENT_BYTES[logits[1]]
    number = 8 if element == 8 else 4
    kept = [row for row, scale in enumerate(_numbers(row_scale, rows, number)) if scale != 0]
    for address in _row_addresses(logits, kept, inner):
        yield address, columns * element, False
    yield from _per_row_memory(rows, number, row_scale, temperature)
    yield indices, rows * k * 4, True
    yield log_probs, rows * k * number, True
    yield tail_log_prob, rows * number, True


def memory_of_uld(sizes, student, teacher, indices, sums_of_signs, row_scale, temperature, loss, divergence, gradient):
    """As above, of cuda_uld."""
    rows, student_columns, teacher_columns, gradient_columns = sizes
    for row, scale in enumerate(_numbers(row_scale, rows, 4)):
        if scale == 0:
            continue
        for (data, dtype), columns in ((student, student_columns), (teacher, teacher_columns)):
            size = columns * _ELEMENT_BYTES[dtype]
            yield data + row * size, size, False
        if gradient:
            yield indices + row * student_columns * 8, student_columns * 8, False
            yield sums_of_signs + row * (student_columns + 1) * 4, (student_columns + 1) * 4, True
    yield from _per_row_memory(rows, 4, row_scale, temperature)
    yield loss, rows * 4, True
    yield divergence, rows * 4, True
    yield gradient, rows * gradient_columns * _ELEMENT_BYTES[student[1]], True


def memory_of_pair_costs(kind, fp64, sizes, student, teacher, kept, temperature, floats, costs, moments):
    """As above, of cuda_pair_costs, without the workspace."""
    clouds, rows, columns = sizes
    yield from _clouds_memory(fp64, (clouds, rows, columns), student, teacher, kept, temperature, floats)
    number = 8 if fp64 else 4
    for found in (costs, moments):
        yield found, clouds * rows * rows * number, True


def memory_of_pair_gradient(kind, fp64, sizes, student, teacher, kept, temperature, floats, weights, dot, gradient):
    """As above, of cuda_pair_gradient, without the workspace."""
    clouds, rows, columns, gradient_columns = sizes
    yield from _clouds_memory(fp64, (clouds, rows, columns), student, teacher, kept, temperature, floats)
    number = 8 if fp64 else 4
    yield weights, clouds * rows * rows * number, False
    yield dot, clouds * rows * number, False
    yield gradient, clouds * rows * gradient_columns * _ELEMENT_BYTES[student[1]], True


def memory_of_sinkhorn(fp64, entropic, unrolled, sizes, cost, a, b, epsilon, tolerance, value, f, g, error, done,
                       of_cost, of_a, of_b):  # fmt: skip
    """As above, of cuda_sinkhorn, without the workspace."""
    problems, n, m, _ = sizes
    number = 8 if fp64 else 4
    for data, count in ((cost, problems * n * m), (a, problems * n), (b, problems * m), (epsilon, 1), (tolerance, 1)):
        yield data, count * number, False
    found = [(value, problems), (f, problems * n), (g, problems * m), (error, problems)]
    if unrolled:
        found += [(of_cost, problems * n * m), (of_a, problems * n), (of_b, problems * m)]
    for data, count in found:
        yield data, count * number, True
    yield done, problems * 4, True


def memory_of_scale_rows(x, dtype, rows, columns, factor):
    """As above, of cuda_scale_rows, which leaves rows of factor 1 alone."""
    element = _ELEMENT_BYTES[dtype]
    number = 8 if element == 8 else 4
    for row, by in enumerate(_numbers(factor, rows, number)):
        if by != 1:
            yield x + row * columns * element, columns * element, True
    data, stride = factor
    yield data, ((rows - 1) * stride + 1) * number, False


def memory_of_softcap(x, dtype, count, cap):
    yield x, count * _ELEMENT_BYTES[dtype], True


def memory_of_softcap_gradient(gradient, logits, dtype, count, cap):
    yield gradient, count * _ELEMENT_BYTES[dtype], True
    yield logits, count * _ELEMENT_BYTES[dtype], False


def _pair_sizes(kind, fp64, sizes, *others) -> tuple[int, int, int, bool]:
    return *sizes[:3], fp64


def _clouds_memory(fp64, sizes, student, teacher, kept, temperature, floats):
    """What both kernels of pairs read: the logits of rows that are kept, and numbers of all."""
    clouds, rows, columns = sizes
    number = 8 if fp64 else 4
    there = [row for row, keep in enumerate(_numbers((kept, 1), clouds * rows, number)) if keep != 0]
    for logits in (student, teacher):
        for address in _row_addresses(logits, there, rows):
            yield address, columns * _ELEMENT_BYTES[logits[1]], False
    yield kept, clouds * rows * number, False
    yield temperature[0], number, False
    yield floats, 4 * clouds * rows * number, False


def _row_addresses(logits: tuple[int, int, int, int], rows: list[int], inner: int) -> list[int]:
    data, dtype, outer_stride, inner_stride = logits
    offsets = [row // inner * outer_stride + row % inner * inner_stride for row in rows]
    return [data + offset * _ELEMENT_BYTES[dtype] for offset in offsets]


def _per_row_memory(rows: int, number: int, *given: tuple[int, int]) -> Iterator[tuple[int, int, bool]]:
    for data, stride in given:
        for row in range(rows if stride else 1):
            yield data + row * stride * number, number, False


def _numbers(per_row: tuple[int, int], rows: int, size: int) -> list[float]:
    data, stride = per_row
    kind = ctypes.c_double if size == 8 else ctypes.c_float
    return [kind.from_address(data + row * stride * size).value for row in range(rows)]
