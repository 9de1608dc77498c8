"""Which backend serves a call, and why another does not.

A backend is a module with `refuse(student, teacher) -> str | None` (why it cannot serve these tensors) and one function
per operator of its families (see ops.py). Nothing here imports a backend before it is needed.
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
ORDER = ("cpu", "triton", "reference")
NAMES = (*ORDER, "cuda")

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(student: torch.Tensor, teacher: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic, the loss and every per-row number: fp64 when a side is fp64, else fp32."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def refuse(name: str, student: torch.Tensor, teacher: torch.Tensor) -> str | None:
    """Why backend `name` cannot serve these tensors, or None."""
    if name == "reference":
        return None
    if name == "cpu":
        from . import native

        return native.refuse(student, teacher)
    if name == "triton":
        from . import triton

        return triton.refuse(student, teacher)
    if name == "cuda":
        return "this version has no CUDA C++ kernels; on a GPU, triton serves"
    raise ValueError(f"unknown backend {name!r}; expected 'auto' or one of {', '.join(map(repr, NAMES))}")


def select(name: str, student: torch.Tensor, teacher: torch.Tensor) -> str:
    """The backend that serves this call: `name` itself, or for "auto" the first that does not refuse."""
    if name == "auto":
        for candidate in ORDER:
            interpreted = candidate == "triton" and student.device.type == "cpu"  # slower than the reference
            if not interpreted and refuse(candidate, student, teacher) is None:
                return candidate
    reason = refuse(name, student, teacher)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve this call: {reason}")
    return name


def kernels(name: str):
    """The module whose functions implement the operators for a backend."""
    if name == "cpu":
        from . import native

        return native
    if name == "triton":
        from .triton import rows

        return rows
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
        "temperature": f"finite and > 0 in {temperature.dtype}",
        "hard_weight": "from 0 to 1",
    }
    for name, bad in bad_rows(row_scale, labels, temperature, hard_weight, vocab_size).items():
        if bad.any():
            row = int(bad.nonzero()[0])
            got = given[name].expand_as(row_scale)[row].item()
            raise ValueError(f"{name}: expected {expected[name]}; got {got} in row {row}")
