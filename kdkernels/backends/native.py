"""The CPU kernels of csrc/: loads the compiled module and turns tensors into pointers."""

import torch
from torch import Tensor

from . import ROW_FLOATS, ROW_STATISTICS, ROW_SUMS, ROW_TOP1, STORAGE_DTYPES, check_values, compute_dtype

try:
    from .. import _native

    missing_because = None
except Exception as error:  # a missing module, a missing OpenMP runtime, an instruction set that was forced
    _native = None
    missing_because = f"{type(error).__name__}: {error}"

_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_FLOATS, _SUMS, _GRADIENT = 1, 2, 4
_NO_ROW = (0, 0)


def refuse(student: Tensor, teacher: Tensor) -> str | None:
    if _native is None:
        return f"the native module is not there ({missing_because}); `python -m kdkernels.info` says more"
    if student.device.type != "cpu" or teacher.device.type != "cpu":
        return f"it takes CPU tensors; got student on {student.device} and teacher on {teacher.device}"
    return None


def rows(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    parameters: Tensor,
    divergence: str,
    vocab_size: int,
    temperature_squared: bool,
    gradient: bool,
    statistics: bool,
):
    dtype, count = compute_dtype(student, teacher), row_scale.numel()
    out = {
        "loss": torch.empty(count, dtype=dtype),
        "gradient": torch.empty(student.shape if gradient else 0, dtype=student.dtype),
        "floats": torch.empty(len(ROW_FLOATS), count, dtype=dtype),
        "sums": torch.empty(len(ROW_SUMS), count, dtype=dtype),
        **_statistics(dtype, count, statistics),
    }
    sweeps = _FLOATS | _SUMS | (_GRADIENT if gradient else 0)
    unit_log_sum = hard_weight is not None or (labels is not None and statistics)
    _call(sweeps, student, teacher, row_scale, labels, temperature, hard_weight, parameters, divergence, vocab_size,
          temperature_squared, unit_log_sum, out)  # fmt: skip
    return tuple(out.values())


def row_floats(student: Tensor, teacher: Tensor, row_scale: Tensor, temperature: Tensor, vocab_size: int):
    floats = torch.empty(len(ROW_FLOATS), row_scale.numel(), dtype=compute_dtype(student, teacher))
    _call(_FLOATS, student, teacher, row_scale, None, temperature, None, None, None, vocab_size, False, True,
          {"floats": floats})  # fmt: skip
    return floats


def row_sums(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    parameters: Tensor,
    floats: Tensor,
    divergence: str,
    vocab_size: int,
    statistics: bool,
):
    dtype, count = compute_dtype(student, teacher), row_scale.numel()
    sums = torch.empty(len(ROW_SUMS), count, dtype=dtype)
    out = _statistics(dtype, count, statistics)
    _call(_SUMS, student, teacher, row_scale, labels, temperature, None, parameters, divergence, vocab_size, False,
          False, {"floats": floats, "sums": sums, **out})  # fmt: skip
    return sums, *out.values()


def row_gradient(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    parameters: Tensor,
    floats: Tensor,
    sums: Tensor,
    divergence: str,
    vocab_size: int,
    temperature_squared: bool,
):
    gradient = torch.empty(student.shape, dtype=student.dtype)
    _call(_GRADIENT, student, teacher, row_scale, labels, temperature, hard_weight, parameters, divergence,
          vocab_size, temperature_squared, False, {"floats": floats, "sums": sums, "gradient": gradient})  # fmt: skip
    return gradient


def scale_(gradient: Tensor, factor: Tensor) -> None:
    assert factor.dtype == (torch.float64 if gradient.dtype == torch.float64 else torch.float32), factor.dtype
    columns = gradient.shape[-1]
    count = gradient.numel() // columns if columns else 0
    _native.scale_rows(gradient.data_ptr(), _DTYPE_CODE[gradient.dtype], count, columns, _per_row(factor),
                       torch.get_num_threads())  # fmt: skip


def _statistics(dtype: torch.dtype, count: int, wanted: bool) -> dict[str, Tensor]:
    return {
        "statistics": torch.empty(len(ROW_STATISTICS) if wanted else 0, count, dtype=dtype),
        "top1": torch.empty(len(ROW_TOP1) if wanted else 0, count, dtype=torch.int64),
    }


def _call(sweeps, student, teacher, row_scale, labels, temperature, hard_weight, parameters, divergence, vocab_size,
          temperature_squared, unit_log_sum, out):  # fmt: skip
    threads = torch.get_num_threads()
    fp64 = compute_dtype(student, teacher) == torch.float64
    for numbers in (row_scale, temperature, hard_weight, parameters):
        assert numbers is None or numbers.dtype == compute_dtype(student, teacher), numbers.dtype
    workspace = torch.empty(_native.workspace_bytes(vocab_size, fp64, threads), dtype=torch.uint8)
    statistics = out.get("statistics")
    found_bad_value = _native.rows(
        sweeps,
        -1 if divergence is None else _native.divergences.index(divergence),
        (row_scale.numel(), student.shape[1], vocab_size, student.shape[2]),
        _logits(student),
        _logits(teacher),
        _per_row(row_scale),
        _per_row(temperature),
        _NO_ROW if hard_weight is None else _per_row(hard_weight),
        0 if labels is None else labels.data_ptr(),
        0 if parameters is None else parameters.data_ptr(),
        temperature_squared,
        unit_log_sum,
        out["floats"].data_ptr(),
        out["sums"].data_ptr() if "sums" in out else 0,
        out["loss"].data_ptr() if "loss" in out else 0,
        statistics.data_ptr() if statistics is not None and statistics.shape[0] else 0,
        out["top1"].data_ptr() if "top1" in out else 0,
        out["gradient"].data_ptr() if sweeps & _GRADIENT else 0,
        workspace.data_ptr(),
        threads,
    )
    if found_bad_value:
        check_values(row_scale, labels, temperature, hard_weight, vocab_size)
        raise RuntimeError("the kernel found a value in a row option that the check of values does not")


def _logits(x: Tensor):
    return x.data_ptr(), _DTYPE_CODE[x.dtype], x.stride(0), x.stride(1)


def _per_row(x: Tensor):
    return x.data_ptr(), 0 if x.numel() == 1 else x.stride(0)


assert set(_DTYPE_CODE) == set(STORAGE_DTYPES)
