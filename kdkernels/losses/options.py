"""The row options: checks the caller's arguments and turns them into the few tensors that every kernel takes.

Mask, labels, row weights, reduction and normalizer fold into one row_scale, on the device and without synchronisation.
This module reads no tensor's values, except on a CPU: of a 0-d temperature, epsilon or tolerance, and of the kept rows
for a normalizer of 0. The operators read values on a CPU, where that costs no synchronisation.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_size
from ..distributions import LinearLogits, SparseLogProbs
from ..divergences import Divergence
from ..families.options import STORAGE_DTYPES, RowOptions, bad_values_raise, compute_dtype
from ..families.rows import ROW_STATISTICS, ROW_TOP1

REDUCTIONS = ("mean", "sum", "none")
GRADIENTS = ("auto", "forward", "backward")
STATISTICS = (*ROW_STATISTICS, *ROW_TOP1, "kept")
NEED_LABELS = ("cross_entropy", "student_label_log_prob", "teacher_label_log_prob")


@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss, and the requested row statistics by name; each statistic has the logits' leading shape."""

    loss: Tensor
    statistics: dict[str, Tensor]


def check_is_tensor(name: str, x):
    """Raises unless a side is a tensor, for a loss that takes neither a `LinearLogits` nor a `SparseLogProbs`."""
    if isinstance(x, Tensor):
        return
    kind = type(x).__name__
    hint = ""
    if isinstance(x, (LinearLogits, SparseLogProbs)):
        hint = f"; fused_divergence, fused_kl and fused_js take a {kind}"
        hint += " as the teacher" if isinstance(x, SparseLogProbs) else ""
    raise TypeError(f"{name}: expected a tensor of logits; got {kind}{hint}")


def check_logits(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | SparseLogProbs, vocab_size: int | None
) -> int:
    """Raises for a student or teacher that no backend takes; returns the number of classes that count."""
    if isinstance(student, SparseLogProbs):
        raise TypeError("student: expected a tensor of logits or a LinearLogits; a SparseLogProbs is a teacher")
    sides = {"student": student} if isinstance(teacher, SparseLogProbs) else {"student": student, "teacher": teacher}
    for name, x in sides.items():
        if not isinstance(x, (Tensor, LinearLogits)):
            or_sparse = ", a LinearLogits or a SparseLogProbs" if name == "teacher" else " or a LinearLogits"
            raise TypeError(f"{name}: expected a tensor of logits{or_sparse}; got {type(x).__name__}")
        check_stored_or_head(name, x)
    check_pair(student, teacher)
    vocab_size = check_vocab_size(vocab_size, {name: x.shape[-1] for name, x in sides.items()})
    sparse = isinstance(teacher, SparseLogProbs)
    if sparse and teacher.tail != "truncate" and teacher.shape[-1] > vocab_size:  # only "truncate" takes repeats
        raise ValueError(
            f"teacher: expected at most {vocab_size} entries a row, the vocabulary; got {teacher.shape[-1]}"
        )
    return vocab_size


def check_pair(student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | SparseLogProbs):
    """Raises if student and teacher have different leading shapes or devices, or if the teacher requires grad."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher must agree in all dimensions but the last; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device; got {student.device} and {teacher.device}")
    if teacher.requires_grad:
        raise ValueError(
            "teacher requires grad, but the loss has no gradient with respect to it; pass teacher.detach()"
        )


def check_vocab_size(vocab_size: int | None, widths: dict[str, int]) -> int:
    """The number of classes that count, for logits of these widths."""
    first, *others = widths.values()
    if vocab_size is None:
        if any(width != first for width in others):
            (name, width), (other, other_width) = widths.items()
            raise ValueError(
                f"{name} has {width} classes and {other} {other_width}; if the rest is padding, "
                "pass vocab_size=<classes that both have>"
            )
        vocab_size = first
    check_type("vocab_size", vocab_size, int)
    if vocab_size < 1 or any(vocab_size > width for width in widths.values()):
        classes = " and ".join(f"{width} of the {name}" for name, width in widths.items())
        raise ValueError(f"vocab_size: expected from 1 to the logits' classes, {classes}; got {vocab_size}")
    return vocab_size


def check_dense(name: str, x: Tensor):
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(x).__name__}")
    _check_dtype(name, x)
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor; got layout {x.layout}")


def _check_dtype(name: str, x: Tensor | LinearLogits):
    if x.dtype not in STORAGE_DTYPES:
        raise TypeError(f"{name}: expected dtype {_one_of(STORAGE_DTYPES)}; got {x.dtype}")


def check_has_data(name: str, x: Tensor | LinearLogits):
    if x.device.type == "meta":
        raise ValueError(
            f"{name}: expected a tensor with data; got one on the device meta, which holds shapes alone (offloading, "
            "or a model made under torch.device('meta'), leaves such tensors); load it to a device first"
        )


def check_stored_or_head(name: str, x: Tensor | LinearLogits):
    if not isinstance(x, Tensor):
        _check_dtype(name, x)
        check_has_data(name, x)
        return
    check_dense(name, x)
    check_has_data(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected logits of shape [..., vocabulary]; got a 0-d tensor")
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        raise ValueError(
            f"{name}: expected a last dimension of stride 1; got strides {list(x.stride())}; pass {name}.contiguous()"
        )


def check_tail(divergence: Divergence, teacher: SparseLogProbs, rows: RowOptions):
    """Raises if the divergence is infinite for every student, since the tail gives some classes no teacher mass, and
    for a loss cap with the tail "truncate", whose offset is added after the kernel has capped the loss."""
    if rows.loss_cap is not None and teacher.tail == "truncate":
        raise ValueError("loss_cap: expected None for tail='truncate'; got a cap; the other tails take it")
    if divergence.is_infinite_without_teacher and teacher.tail in ("renormalize", "truncate"):
        raise ValueError(
            f"{divergence} is infinite for a teacher without mass in some class; tail={teacher.tail!r} gives no mass "
            "to classes that the teacher does not name; 'bucket', 'support' and 'uniform' take every divergence"
        )


def gradient_mode(gradient: str, reduction: str, dtypes: list[torch.dtype]) -> str:
    """The mode for `gradient`, from the dtypes of the gradients. "auto" is "backward" for losses per row, since scaling
    a kept gradient rounds it once more, and for fp16, in which a small gradient would become 0 before a loss scaler
    sees it; else "forward".
    """
    if gradient != "auto":
        return gradient
    return "backward" if reduction == "none" or torch.float16 in dtypes else "forward"


def check_choice(name: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        raise ValueError(f"{name}: expected {_one_of(choices)}; got {value!r}")


def check_type(name: str, value, expected: type):
    """Raises unless the value has the type. A traced int is an int; a bool is no int."""
    known = (int, torch.SymInt) if expected is int else expected
    if not isinstance(value, known) or (expected is int and isinstance(value, bool)):
        raise TypeError(f"{name}: expected {expected.__name__}; got {type(value).__name__}")
    check_size(name, value)


def check_int(name: str, value, least: int):
    check_type(name, value, int)
    if value < least:
        raise ValueError(f"{name}: expected at least {least}; got {value}")


def check_statistics(statistics: tuple[str, ...], labels: Tensor | None, known: tuple[str, ...] = STATISTICS):
    if not isinstance(statistics, (tuple, list)):
        hint = f", as in ({statistics!r},)" if isinstance(statistics, str) else ""
        raise TypeError(f"statistics: expected a tuple of names{hint}; got {type(statistics).__name__}")
    for name in statistics:
        if name not in known:
            raise ValueError(f"statistics: unknown name {name!r}; known: {', '.join(known)}")
        if name in NEED_LABELS and labels is None:
            raise ValueError(f"statistics: {name!r} needs labels; got labels=None")


def as_outer_inner(*logits: Tensor) -> list[Tensor]:
    """Logits [..., V] of one leading shape as [outer, inner, V]: views if the leading dimensions collapse to two, else
    copies."""
    leading = logits[0].shape[:-1]
    if len(leading) == 1:
        return [x.unsqueeze(1) for x in logits]
    # Cuts the leading dimensions in two so that as few tensors as possible need a copy.
    cut, fewest = 1, 3
    for candidate in range(1, max(len(leading), 2)):
        copies = sum(not (_collapses(x, 0, candidate) and _collapses(x, candidate, len(leading))) for x in logits)
        if copies < fewest:
            cut, fewest = candidate, copies
    outer, inner = leading[:cut].numel(), leading[cut:].numel()
    return [x.reshape(outer, inner, x.shape[-1]) for x in logits]


def _collapses(x: Tensor, first: int, last: int) -> bool:
    """Whether dimensions first .. last - 1 form one with a single stride."""
    return all(x.stride(d) == x.stride(d + 1) * x.shape[d + 1] for d in range(first, last - 1))


class GivenRowOptions(NamedTuple):
    """The row options of a loss, as the caller gave them."""

    temperature: float | Tensor = 1.0
    temperature_squared: bool = False
    mask: Tensor | None = None
    row_weight: Tensor | None = None
    labels: Tensor | None = None
    ignore_index: int = -100
    hard_weight: float | Tensor = 0.0
    reduction: str = "mean"
    normalizer: int | float | Tensor | None = None
    loss_cap: float | Tensor | None = None


def resolve(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogProbs,
    given: GivenRowOptions,
    dtype: torch.dtype | None = None,
) -> RowOptions:
    """The options of each row. `dtype` is the dtype of the per-row numbers; None: student and teacher decide it."""
    leading, device = student.shape[:-1], student.device
    dtype = dtype or compute_dtype(student, teacher)
    check_reduction(given.reduction)
    check_type("temperature_squared", given.temperature_squared, bool)

    if given.mask is not None:
        check_per_row("mask", given.mask, leading, device, torch.bool)
    labels = given.labels
    if labels is not None:
        check_per_row("labels", labels, leading, device, torch.int64)
        check_type("ignore_index", given.ignore_index, int)
        labels = labels.reshape(-1).contiguous()
    if given.row_weight is not None:
        check_per_row("row_weight", given.row_weight, leading, device)

    temperature = _number_or_per_row("temperature", given.temperature, check_temperature, leading, device, dtype)
    hard_weight = given.hard_weight
    if not isinstance(hard_weight, Tensor):
        _check_number("hard_weight", hard_weight)
    if isinstance(hard_weight, Tensor) or hard_weight != 0:
        if labels is None:
            raise ValueError(f"hard_weight needs labels; got hard_weight={_shown(hard_weight)} and labels=None")
        hard_weight = _number_or_per_row("hard_weight", hard_weight, _check_fraction, leading, device, dtype)
    else:
        hard_weight = None

    loss_cap = None
    if given.loss_cap is not None:
        loss_cap = _number_or_per_row("loss_cap", given.loss_cap, _check_cap, leading, device, dtype)

    row_scale = resolve_row_scale(leading.numel(), device, dtype, _kept_rows(given, teacher), given)
    return RowOptions(
        row_scale,
        temperature,
        labels=labels,
        hard_weight=hard_weight,
        temperature_squared=given.temperature_squared,
        loss_cap=loss_cap,
    )


def _kept_rows(given: GivenRowOptions, teacher: Tensor | LinearLogits | SparseLogProbs) -> Tensor | None:
    """[rows] bool: the rows that no option drops and whose teacher is known; None if the call can drop no row."""
    keep = None if given.mask is None else given.mask.reshape(-1)
    if isinstance(teacher, SparseLogProbs) and teacher.tail != "bucket":
        named = ((teacher.indices >= 0) & ~torch.isneginf(teacher.log_probs)).any(-1).reshape(-1)
        keep = named if keep is None else keep & named
    if given.labels is not None:
        labelled = given.labels.reshape(-1) != given.ignore_index
        keep = labelled if keep is None else keep & labelled
    return keep


def kept_statistic(given: GivenRowOptions, teacher: Tensor | LinearLogits | SparseLogProbs, loss: Tensor) -> Tensor:
    """The statistic "kept": 1 for a kept row, else 0, in the loss's dtype and the leading shape."""
    keep, leading = _kept_rows(given, teacher), teacher.shape[:-1]
    if keep is None:
        return torch.ones(leading, dtype=loss.dtype, device=loss.device)
    return keep.reshape(leading).to(loss.dtype)


def check_reduction(reduction: str):
    if reduction == "batchmean":
        raise ValueError(
            "reduction: expected 'mean', 'sum' or 'none'; got 'batchmean', but the shape does not say how large the "
            "batch is; 'mean' divides by the number of kept rows, and normalizer replaces that number"
        )
    check_choice("reduction", reduction, REDUCTIONS)


def resolve_row_scale(rows: int, device, dtype, keep: Tensor | None, given: GivenRowOptions) -> Tensor:
    """where(keep, weight / denominator, 0) as [rows]."""
    if given.normalizer is not None:
        if given.reduction != "mean":
            raise ValueError(f"normalizer goes with reduction='mean' only; got reduction={given.reduction!r}")
        denominator = _normalizer(given.normalizer, device, dtype)
    elif given.reduction == "mean":
        denominator = rows if keep is None else keep.sum()
    else:
        denominator = 1
    if given.row_weight is not None:
        weight = given.row_weight.reshape(-1).to(dtype)
        scale = torch.where(weight == 0, 0, weight / denominator)  # skipped even if the denominator is 0
    elif isinstance(denominator, int) and not torch.compiler.is_compiling():
        scale = torch.full((rows,), 1 / max(denominator, 1), dtype=dtype, device=device)
    else:
        scale = torch.ones(rows, dtype=dtype, device=device) / denominator
    scale = scale if keep is None else torch.where(keep, scale, 0)
    if isinstance(given.normalizer, (int, float)) and given.normalizer == 0 and bad_values_raise(device):
        kept = int((scale != 0).sum())
        if kept:
            raise ValueError(f"normalizer: expected > 0, since this call keeps rows; got 0, and {kept} kept rows")
    return scale


def _normalizer(normalizer, device, dtype):
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: expected one element; got shape {list(normalizer.shape)}")
        _check_real("normalizer", normalizer)
        _refuse_gradient("normalizer", normalizer)
        return _to_device(normalizer.detach().reshape(()), device, dtype)
    _check_number("normalizer", normalizer)
    if not 0 <= normalizer < float("inf"):
        raise ValueError(f"normalizer: expected finite and not negative; got {normalizer}")
    # A normalizer of 0 means that no rank keeps a row; row_scale is 0 then, whatever the division by 0 gives.
    return torch.ones((), dtype=dtype, device=device) * normalizer


def _number_or_per_row(name: str, value, check, leading, device, dtype) -> Tensor:
    """A number, a 0-d tensor or one per row, as [1] or [rows]. `check` is for a number."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            _check_real(name, value)
            _refuse_gradient(name, value)
            return _to_device(value.detach().reshape(1), device, dtype)
        check_per_row(name, value, leading, device)
        return _to_device(value.detach().reshape(-1).contiguous(), device, dtype)
    check(name, value)
    return number(value, device, dtype)


def number(value: float, device, dtype) -> Tensor:
    """A number as [1]. A compiler would compile a torch.full anew for each value."""
    if torch.compiler.is_compiling():
        return torch.ones(1, dtype=dtype, device=device) * value
    return torch.full((1,), value, dtype=dtype, device=device)


def positive_number(name: str, value: float | Tensor, device, dtype) -> Tensor:
    """A number or a 0-d tensor, as [1]. Also checks the value of a tensor on a CPU."""
    if not isinstance(value, Tensor):
        _check_positive(name, value, dtype)
        return number(value, device, dtype)
    if value.dim() != 0:
        raise ValueError(f"{name}: expected a number or a 0-d tensor; got shape {list(value.shape)}")
    _check_real(name, value)
    _refuse_gradient(name, value)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_positive(name, value.item(), dtype)
    return _to_device(value.detach().reshape(1), device, dtype)


def _check_positive(name: str, value, dtype: torch.dtype):
    """Raises unless the number is positive, also after rounding to the dtype."""
    check_temperature(name, value)
    if value < torch.finfo(dtype).tiny:
        raise ValueError(
            f"{name}: expected at least {torch.finfo(dtype).tiny}, the smallest normal {dtype}; got {value}"
        )


def check_temperature(name: str, value):
    """Raises unless the temperature is a positive, finite number; a tensor is refused."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number; got {_shown(value)}")
    _check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected finite and > 0; got {value}")


def _check_fraction(name: str, value):
    _check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected from 0 to 1; got {value}")


def _check_cap(name: str, value):
    _check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name}: expected > 0; got {value}")


def check_per_row(name: str, x, leading, device, dtype: torch.dtype | None = None):
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(x).__name__}")
    if dtype is not None and x.dtype != dtype:
        cast = {torch.bool: "bool", torch.int64: "long"}[dtype]
        raise TypeError(f"{name}: expected dtype {dtype}; got {x.dtype}; pass {name}.{cast}()")
    if dtype is None:
        _check_real(name, x)
    if x.shape != leading:
        raise ValueError(f"{name}: expected the logits' leading shape {list(leading)}; got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected on the logits' device {device}; got {x.device}")
    _refuse_gradient(name, x)


def _check_real(name: str, x: Tensor):
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers; got {x.dtype}")


def _to_device(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Moves the tensor to the device and dtype, without waiting if the target is a GPU."""
    return x.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")


def _refuse_gradient(name: str, x: Tensor):
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but the loss has no gradient with respect to it; pass it detached")


def _check_number(name: str, value):
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number or a tensor; got {type(value).__name__}")
    check_size(name, value)


def _shown(value) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _one_of(choices) -> str:
    return " or ".join(repr(c) if isinstance(c, str) else str(c) for c in choices)
