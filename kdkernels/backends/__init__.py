"""Which backend serves a call, and why another does not.

A backend says why it cannot serve a call's tensors (`refuse`), and has one function per operator (`kernels`; see
ops.py). Nothing here imports a backend before it is needed.
"""

import os

import torch

# Statistics of a row, in the order of the [len, rows] tensor that every backend fills.
ROW_STATISTICS = (
    "divergence",
    "cross_entropy",
    "tv",
    "student_entropy",
    "teacher_entropy",
    "student_max_log_prob",
    "teacher_max_log_prob",
    "student_label_log_prob",
    "teacher_label_log_prob",
    "student_lse",
    "teacher_lse",
)
# Those that are class indices, in the order of the int64 [2, rows] tensor.
ROW_TOP1 = ("student_top1", "teacher_top1")
ROW_FLOATS = ("student_max", "student_log_sum", "teacher_max", "teacher_log_sum", "unit_log_sum")
ROW_SUMS = ("phi", "psi")

# Tried in this order by backend="auto".
ORDER = ("cpu", "cuda", "triton", "reference")
NAMES = ORDER
# Those that run GPU kernels: what runs them on a CPU (an interpreter, a model in the tests) is slower than the
# reference there, and serves only a call that names them.
_GPU = ("cuda", "triton")

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(student: torch.Tensor, teacher: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic, the loss and every per-row number: fp64 when a side is fp64, else fp32."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def refuse(name: str, student: torch.Tensor, teacher: torch.Tensor, points: int = 0) -> str | None:
    """Why backend `name` cannot serve these tensors, or None. `points`: of the larger side of a transport problem."""
    if name == "reference":
        return None
    if name in ("cpu", "cuda"):
        from . import native

        return native.refuse(name, student, teacher, points)
    if name == "triton":
        from . import triton

        return triton.refuse(student, teacher, points)
    raise ValueError(f"unknown backend {name!r}; expected 'auto' or one of {', '.join(map(repr, NAMES))}")


def select(name: str, student: torch.Tensor, teacher: torch.Tensor, points: int = 0) -> str:
    """The backend that serves this call: `name` itself, or for "auto" the first that does not refuse."""
    if name == "auto":
        for candidate in ORDER:
            modelled = candidate in _GPU and student.device.type == "cpu"
            if not modelled and refuse(candidate, student, teacher, points) is None:
                return candidate
    reason = refuse(name, student, teacher, points)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve this call: {reason}")
    return name


def kernels(name: str):
    """What has the functions that implement the operators for a backend."""
    if name in ("cpu", "cuda"):
        from . import native

        return native.KERNELS[name]
    if name == "triton":
        from .triton import kernels

        return kernels
    raise ValueError(f"backend {name!r} implements no operators")


# Whether values (labels, temperatures, hard weights) are checked also where that costs a synchronisation.
_checked = os.environ.get("KDKERNELS_CHECK") == "1"


def checks(enabled: bool) -> bool:
    """Whether a bad value in a tensor (a label out of range, a temperature <= 0, a hard weight) raises on a GPU too.

    On a CPU it always does. On a GPU it costs a synchronisation, so without this the row becomes NaN.
    KDKERNELS_CHECK=1 sets it from outside. Returns what was set before.
    """
    global _checked
    before, _checked = _checked, bool(enabled)
    return before


def values_are_checked() -> bool:
    return _checked


def is_transformed() -> bool:
    """Whether a compiler or torch.func traces the call, whose values cannot be read then."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def bad_values_raise(device: torch.device) -> bool:
    """On a CPU, and elsewhere where `checks` asks for it."""
    return (device.type == "cpu" or _checked) and not is_transformed()


def bad_rows(
    row_scale: torch.Tensor,
    labels: torch.Tensor | None,
    temperature: torch.Tensor,
    hard_weight: torch.Tensor | None,
    vocab_size: int,
) -> dict[str, torch.Tensor]:
    """Which kept rows have a value that no loss has: a bool tensor [rows] for each argument that is there."""
    kept = row_scale != 0
    bad = {"temperature": kept & ~((temperature > 0) & (temperature < torch.inf) & (1 / temperature < torch.inf))}
    if labels is not None:
        bad["labels"] = kept & ((labels < 0) | (labels >= vocab_size))
    if hard_weight is not None:
        bad["hard_weight"] = kept & ~((hard_weight >= 0) & (hard_weight <= 1))
    return bad


def check_values(
    row_scale: torch.Tensor,
    labels: torch.Tensor | None,
    temperature: torch.Tensor,
    hard_weight: torch.Tensor | None,
    vocab_size: int,
) -> None:
    """Raises ValueError for the first row of `bad_rows`. Reads values: a synchronisation on a GPU."""
    given = {"labels": labels, "temperature": temperature, "hard_weight": hard_weight}
    expected = {
        "labels": f"0 <= label < {vocab_size} (the vocabulary) or ignore_index",
        "temperature": f"finite and > 0 in {temperature.dtype}, as its inverse",
        "hard_weight": "from 0 to 1",
    }
    for name, bad in bad_rows(row_scale, labels, temperature, hard_weight, vocab_size).items():
        if bad.any():
            row = int(bad.nonzero()[0])
            got = given[name].expand_as(row_scale)[row].item()
            raise ValueError(f"{name}: expected {expected[name]}; got {got} in row {row}")
