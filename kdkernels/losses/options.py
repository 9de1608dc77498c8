"""The row options: checks what the caller passed and turns it into the few tensors that every kernel takes.

Mask, labels, row weights, reduction and normalizer fold, on the device and without synchronisation, into one row_scale.
Nothing here reads a value of a tensor: that is left to the operators, which on a CPU can afford it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions import LinearLogits, SparseLogProbs, gathered, is_sharded
from ..divergences import Divergence
from ..families.linear import Side, product_dtype
from ..families.options import STORAGE_DTYPES, RowOptions, compute_dtype
from ..families.rows import ROW_STATISTICS, ROW_TOP1

REDUCTIONS = ("mean", "sum", "none")
GRADIENTS = ("auto", "forward", "backward")
STATISTICS = (*ROW_STATISTICS, *ROW_TOP1)
NEED_LABELS = ("cross_entropy", "student_label_log_prob", "teacher_label_log_prob")


@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss and the row statistics that were asked for, by name; each has the logits' leading shape."""

    loss: Tensor
    statistics: dict[str, Tensor]


def check_logits(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | SparseLogProbs, vocab_size: int | None
) -> int:
    """Raises on a student or teacher that no backend takes; returns the number of classes that count."""
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
    if sparse and teacher.tail != "truncate" and teacher.shape[-1] > vocab_size:  # where none may be there twice
        raise ValueError(
            f"teacher: expected at most {vocab_size} entries a row, the vocabulary; got {teacher.shape[-1]}"
        )
    return vocab_size


def check_pair(student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | SparseLogProbs):
    """Raises where they are not of the same rows, or the teacher wants a gradient."""
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
    """The number of classes that count, of logits of these widths."""
    first, *others = widths.values()
    if vocab_size is None:
        if any(width != first for width in others):
            (one, its), (other, others_width) = widths.items()
            raise ValueError(
                f"{one} has {its} classes and {other} {others_width}; where the rest is padding, "
                "pass vocab_size=<classes that both have>"
            )
        vocab_size = first
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size: expected an int or None; got {type(vocab_size).__name__}")
    if vocab_size < 1 or any(vocab_size > width for width in widths.values()):
        classes = " and ".join(f"{width} of the {name}" for name, width in widths.items())
        raise ValueError(f"vocab_size: expected from 1 to the classes that are there; got {vocab_size}, with {classes}")
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


def check_stored_or_head(name: str, x: Tensor | LinearLogits):
    if not isinstance(x, Tensor):
        _check_dtype(name, x)
        return
    check_dense(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected logits of shape [..., vocabulary]; got a 0-d tensor")
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        raise ValueError(
            f"{name}: expected a last dimension of stride 1; got strides {list(x.stride())}; pass {name}.contiguous()"
        )


def check_tail(divergence: Divergence, teacher: SparseLogProbs):
    """Raises where a divergence is infinite whatever the student is."""
    if divergence.is_infinite_without_mass and teacher.tail in ("renormalize", "truncate"):
        raise ValueError(
            f"{divergence} is infinite where the teacher has no mass, which tail={teacher.tail!r} gives the "
            "classes that are not named; 'bucket', 'support' and 'uniform' take every divergence"
        )


class HeadOptions(NamedTuple):
    """How the logits of heads are made; None and 0 leave it to the operator."""

    autocast_dtype: torch.dtype | None
    logits_dtype: torch.dtype | None
    chunk_rows: int
    compact_rows: bool


def resolve_heads(*, chunk_rows, compact_rows, logits_dtype, **sides) -> HeadOptions | None:
    """None where no side, by its name in the call, is a head."""
    heads = {name: x for name, x in sides.items() if isinstance(x, LinearLogits)}
    given = {"chunk_rows": chunk_rows, "compact_rows": compact_rows, "logits_dtype": logits_dtype}
    for name, value in given.items():
        if value is not None and not heads:
            raise ValueError(f"{name} is of LinearLogits; got {name}={value} without one")
    if not heads:
        return None
    if chunk_rows is not None:
        if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, (int, torch.SymInt)):
            raise TypeError(f"chunk_rows: expected an int or None; got {type(chunk_rows).__name__}")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows: expected at least 1; got {chunk_rows}")
    if compact_rows is not None:
        check_type("compact_rows", compact_rows, bool)
    if logits_dtype not in (None, torch.float32):
        raise TypeError(f"logits_dtype: expected torch.float32 or None (as the products' factors); got {logits_dtype}")
    device = next(iter(heads.values())).device.type
    autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    for name, x in heads.items():
        # Autocast casts all but fp64; what is sharded is cast as it is gathered.
        cast = autocast_dtype is not None and torch.float64 not in (x.hidden.dtype, x.weight.dtype)
        cast = cast or is_sharded(x.weight)
        if x.hidden.dtype != x.weight.dtype and not cast:
            raise TypeError(
                f"{name}: expected hidden and weight of one dtype outside autocast; "
                f"got {x.hidden.dtype} and {x.weight.dtype}"
            )
    compact_rows = device == "cpu" if compact_rows is None else compact_rows
    return HeadOptions(autocast_dtype, logits_dtype, chunk_rows or 0, compact_rows)


def side_of(x: Tensor | LinearLogits, heads: HeadOptions) -> Side:
    """Its tensors, a sharded weight gathered; the data as they came, [..., columns]."""
    if isinstance(x, Tensor):
        return Side(x, None, None, 1.0, None)
    dtype = product_dtype(x.hidden.dtype, heads.autocast_dtype)
    bias = None if x.bias is None else gathered(x.bias, dtype)
    return Side(x.hidden, gathered(x.weight, dtype), bias, x.scale, x.softcap)


def check_choice(name: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        raise ValueError(f"{name}: expected {_one_of(choices)}; got {value!r}")


def check_type(name: str, value, expected: type):
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise TypeError(f"{name}: expected {expected.__name__}; got {type(value).__name__}")


def check_iterations(iterations: int):
    if isinstance(iterations, bool) or not isinstance(iterations, (int, torch.SymInt)):
        raise TypeError(f"iterations: expected an int; got {type(iterations).__name__}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1; got {iterations}")


def check_statistics(statistics: tuple[str, ...], labels: Tensor | None):
    if not isinstance(statistics, (tuple, list)):
        hint = f", as in ({statistics!r},)" if isinstance(statistics, str) else ""
        raise TypeError(f"statistics: expected a tuple of names{hint}; got {type(statistics).__name__}")
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"statistics: unknown name {name!r}; known: {', '.join(STATISTICS)}")
        if name in NEED_LABELS and labels is None:
            raise ValueError(f"statistics: {name!r} needs labels; got labels=None")


def as_outer_inner(*logits: Tensor) -> list[Tensor]:
    """Logits [..., V] of one leading shape as [outer, inner, V]: views where the leading dimensions collapse to two,
    else copies."""
    leading = logits[0].shape[:-1]
    # Where to cut the leading dimensions in two, so that as few tensors as possible need a copy.
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


def resolve(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogProbs,
    *,
    temperature,
    mask: Tensor | None,
    row_weight: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    hard_weight,
    reduction: str,
    normalizer,
    dtype: torch.dtype | None = None,
) -> RowOptions:
    """`dtype`: of the row numbers, where more than student and teacher decide it."""
    leading, device = student.shape[:-1], student.device
    dtype = dtype or compute_dtype(student, teacher)
    check_choice_of_reduction(reduction)

    if mask is not None:
        check_per_row("mask", mask, leading, device, torch.bool)
    if labels is not None:
        check_per_row("labels", labels, leading, device, torch.int64)
        check_type("ignore_index", ignore_index, int)
        labels = savable(labels.reshape(-1).contiguous())
    if row_weight is not None:
        check_per_row("row_weight", row_weight, leading, device)

    temperature = _number_or_per_row("temperature", temperature, leading, device, dtype)
    if not isinstance(hard_weight, Tensor):
        _check_number("hard_weight", hard_weight)
    if isinstance(hard_weight, Tensor) or hard_weight != 0:
        if labels is None:
            raise ValueError(f"hard_weight needs labels; got hard_weight={_shown(hard_weight)} and labels=None")
        hard_weight = _number_or_per_row("hard_weight", hard_weight, leading, device, dtype)
    else:
        hard_weight = None

    keep = None if mask is None else mask.reshape(-1)
    if isinstance(teacher, SparseLogProbs) and teacher.tail != "bucket":
        named = ((teacher.indices >= 0) & ~torch.isneginf(teacher.log_probs)).any(-1).reshape(-1)
        keep = named if keep is None else keep & named
    row_scale = _row_scale(
        leading.numel(), device, dtype, keep, labels, ignore_index, row_weight, reduction, normalizer
    )
    return RowOptions(row_scale, labels, temperature, hard_weight)


def check_choice_of_reduction(reduction: str):
    if reduction == "batchmean":
        raise ValueError(
            "reduction 'batchmean' depends on what is the batch; 'mean' divides by the number of kept rows, and "
            "normalizer replaces that number"
        )
    check_choice("reduction", reduction, REDUCTIONS)


def _row_scale(rows, device, dtype, keep, labels, ignore_index, row_weight, reduction, normalizer) -> Tensor:
    """where(keep, weight / denominator, 0) as [rows]."""
    if labels is not None:
        labelled = labels != ignore_index
        keep = labelled if keep is None else keep & labelled
    weight = torch.ones(rows, dtype=dtype, device=device)
    if row_weight is not None:
        weight = weight * row_weight.reshape(-1).to(dtype)

    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer goes with reduction='mean' only; got reduction={reduction!r}")
        denominator = _normalizer(normalizer, device, dtype)
    elif reduction == "mean":
        denominator = rows if keep is None else keep.sum()
    else:
        denominator = 1
    scale = weight / denominator
    if row_weight is not None:
        scale = torch.where(weight == 0, 0, scale)  # skipped also where the denominator is 0
    return scale if keep is None else torch.where(keep, scale, 0)


def _normalizer(normalizer, device, dtype):
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: expected one element; got shape {list(normalizer.shape)}")
        _check_real("normalizer", normalizer)
        _refuse_gradient("normalizer", normalizer)
        return _moved(normalizer.detach().reshape(()), device, dtype)
    _check_number("normalizer", normalizer)
    if not 0 <= normalizer < float("inf"):
        raise ValueError(f"normalizer: expected finite and not negative; got {normalizer}")
    # Division by a tensor: a normalizer of 0 is 0 rows, all of which row_scale sets to 0.
    return torch.ones((), dtype=dtype, device=device) * normalizer


def _number_or_per_row(name: str, value, leading, device, dtype) -> Tensor:
    if isinstance(value, Tensor):
        if value.dim() == 0:
            _check_real(name, value)
            _refuse_gradient(name, value)
            return _moved(value.detach().reshape(1), device, dtype)
        check_per_row(name, value, leading, device)
        return _moved(value.detach().reshape(-1).contiguous(), device, dtype)
    if name == "temperature":
        check_temperature(name, value)
    else:
        _check_number(name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected from 0 to 1; got {value}")
    return torch.ones(1, dtype=dtype, device=device) * value


def positive_number(name: str, value: float | Tensor, device, dtype) -> Tensor:
    """A number or a 0-d tensor, as [1]; of a tensor on a CPU the value is checked too."""
    if not isinstance(value, Tensor):
        _check_positive(name, value, dtype)
        return torch.ones(1, dtype=dtype, device=device) * value
    if value.dim() != 0:
        raise ValueError(f"{name}: expected a number or a 0-d tensor; got shape {list(value.shape)}")
    _check_real(name, value)
    _refuse_gradient(name, value)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_positive(name, value.item(), dtype)
    return _moved(value.detach().reshape(1), device, dtype)


def _check_positive(name: str, value, dtype: torch.dtype):
    """A number that is not 0 in the dtype either."""
    check_temperature(name, value)
    if value < torch.finfo(dtype).tiny:
        raise ValueError(f"{name}: expected at least {torch.finfo(dtype).tiny}, the least of {dtype}; got {value}")


def check_temperature(name: str, value):
    """Of a number, not of a tensor."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number; got {_shown(value)}")
    _check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected finite and > 0; got {value}")


def check_per_row(name: str, x, leading, device, dtype: torch.dtype | None = None):
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(x).__name__}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}; got {x.dtype}")
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


def _moved(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """To the device and dtype, without waiting where the target is a GPU. Never an inference tensor."""
    return savable(x.to(device=device, dtype=dtype, non_blocking=device.type != "cpu"))


def savable(x: Tensor) -> Tensor:
    """Itself; or a copy of what was made in inference mode, which cannot be saved for backward."""
    return x if torch.compiler.is_compiling() or not x.is_inference() else x.clone()


def _refuse_gradient(name: str, x: Tensor):
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but the loss has no gradient with respect to it; pass it detached")


def _check_number(name: str, value):
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number or a tensor; got {type(value).__name__}")


def _shown(value) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _one_of(choices) -> str:
    return " or ".join(repr(c) if isinstance(c, str) else str(c) for c in choices)
