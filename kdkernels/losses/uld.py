"""Universal Logit Distillation: a loss between vocabularies of different size."""

import torch
from torch import Tensor

from .. import backends, ops
from ..autograd import Rows, Uld, refuse_transforms, uld_rows
from ..backends.reference import rows as reference_rows
from ..backends.reference import uld as reference
from ..families import linear as chunks
from ..families.options import RowOptions, compute_dtype
from . import options
from .options import LossOutput

STATISTICS = ("divergence", "error_bound")


def fused_uld(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    temperature_squared: bool = False,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    hard_weight: float | Tensor = 0.0,
    reduction: str = "mean",
    normalizer: int | float | Tensor | None = None,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    topk: int | None = None,
    statistics: tuple[str, ...] = (),
    gradient: str = "auto",
    backend: str = "auto",
) -> Tensor | LossOutput:
    """Universal Logit Distillation: the distance between the sorted probabilities of two vocabularies.

    With p = softmax(student / T) and q = softmax(teacher / T) of a row, both sorted in descending order and padded with
    zeros to the larger vocabulary, p_k and q_k the k-th largest::

        ULD = sum over k of |p_k - q_k|                                    from 0 to 2
        row loss = w * ((1 - lambda) * ULD * (T**2 if temperature_squared else 1)
                        + lambda * -log softmax(student)[y])

    which is the Wasserstein distance of the two where every class is as far from every other: no class of one
    vocabulary needs a counterpart in the other. The gradient with respect to a logit, s its class's sign::

        p_v / T * (s_v - sum over w of p_w s_w),     s_v = sign(p_k - q_k) of the rank k of class v, sign(0) = 0

    Ties: classes with equal logits share some ranks, and each takes the mean of these ranks' signs. That is a
    subgradient, and does not depend on the order among equals: a permutation of the classes permutes the gradient.

    Args:
        student: logits [..., Vs], fp32, bf16, fp16 or fp64. Leading dimensions are free, and the last has stride 1;
            slices such as ``logits[:, :-1]`` are taken without a copy. Gets the gradient.
        teacher: logits [..., Vt] of the same leading shape; the dtype may differ. Must not require grad. Where the
            tokenizers cut a text differently, it is the caller who decides which position of the teacher stands beside
            which of the student.
        temperature, temperature_squared, mask, row_weight, reduction, normalizer: as in `fused_divergence`.
        labels, ignore_index, hard_weight: as there; labels are classes of the student, and lambda's term is the
            student's cross-entropy at temperature 1.
        student_vocab_size, teacher_vocab_size: classes of each side that count; columns past them are padding, whose
            gradient is 0. None: all.
        topk: K, from 1 to the larger vocabulary: only the K largest probabilities of each side are compared. They are
            exact, of the softmax over the whole vocabulary. ULD without the other ranks is off by at most what both
            sides have there, which the statistic "error_bound" says; the gradient is that of the K ranks' sum (s = 0 in
            other classes; of equal logits at the boundary those of the smaller index are among the K). None: all ranks.
        statistics: names out of "divergence" (ULD, or that of K ranks) and "error_bound" (0 without topk): detached, in
            the leading shape, in the loss's dtype; 0 on rows that are dropped or have no weight (row_weight or
            1 - lambda 0).
        gradient: as in `fused_divergence`: "forward" keeps the gradient that it finds with the loss, "backward" keeps
            the inputs and compares them again.
        backend: "auto" or one of "cpu" (C++), "cuda" (CUDA C++, NVIDIA GPUs), "triton" (GPUs), "reference" (plain
            PyTorch, twice differentiable).

    Memory beside the gradient: on a CPU, for each thread, 25 bytes (fp64: 49) a class of the larger vocabulary and
    1.3 MB (1.6); on a GPU what sorts some rows at a time within `kdkernels.chunk_budget`.

    Returns:
        The loss in fp32 (fp64 when a side is fp64); `LossOutput` when statistics are asked for. The gradient has the
        student's dtype; between logits and gradient all arithmetic is fp32 (fp64), where a sign that the rounding of p
        and q decides may be either.

    Infinite logits: -inf is probability 0. NaN, +inf, and a row of -inf alone, on either side, make that row's loss and
    gradient NaN, no other's.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_divergence`.

    Source: arXiv:2402.12030 (ULD loss, for any pair of tokenizers); ties and topk are this package's.
    """
    sizes = _check_logits(student, teacher, student_vocab_size, teacher_vocab_size)
    options.check_choice("gradient", gradient, options.GRADIENTS)
    options.check_type("temperature_squared", temperature_squared, bool)
    _check_statistics(statistics)
    if topk is not None:
        options.check_type("topk", topk, int)
        if not 1 <= topk <= max(sizes):
            raise ValueError(f"topk: expected from 1 to {max(sizes)}, the larger vocabulary; got {topk}")
    row = options.resolve(
        student, teacher, temperature=temperature, mask=mask, row_weight=row_weight, labels=labels,
        ignore_index=ignore_index, hard_weight=hard_weight, reduction=reduction, normalizer=normalizer,
    )  # fmt: skip
    backend = backends.select(backend, student, teacher)
    if backend != "reference":
        refuse_transforms(student, backend)
    want_gradient = torch.is_grad_enabled() and student.requires_grad
    if gradient == "auto":
        # A teacher made in inference mode cannot be saved for backward.
        per_row = reduction == "none" and (torch.compiler.is_compiling() or not teacher.is_inference())
        gradient = "backward" if per_row or student.dtype == torch.float16 else "forward"
    mode = gradient if want_gradient else None

    views = options.as_outer_inner(student, teacher)
    row_loss, *found = _row_losses(*views, _scale_of_uld(row, temperature_squared), row.temperature, sizes, topk, mode,
                                   backend)  # fmt: skip
    if row.hard_weight is not None:
        row_loss = row_loss + _label_losses(views[0], row, sizes[0], mode, backend)

    leading = student.shape[:-1]
    loss = row_loss.reshape(leading) if reduction == "none" else row_loss.sum()
    if not statistics:
        return loss
    values = dict(zip(STATISTICS, found, strict=True))
    return LossOutput(loss, {name: values[name].reshape(leading) for name in statistics})


def _check_logits(student, teacher, student_vocab_size, teacher_vocab_size) -> tuple[int, int]:
    """Raises on what no backend takes; returns the numbers of classes that count."""
    sizes = []
    for name, x, size in (("student", student, student_vocab_size), ("teacher", teacher, teacher_vocab_size)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor of logits; got {type(x).__name__}")
        options.check_stored_or_head(name, x)
        size = x.shape[-1] if size is None else size
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name}_vocab_size: expected an int or None; got {type(size).__name__}")
        if not 1 <= size <= x.shape[-1]:
            raise ValueError(
                f"{name}_vocab_size: expected from 1 to the classes that are there; got {size}, "
                f"with {x.shape[-1]} of the {name}"
            )
        sizes.append(size)
    options.check_pair(student, teacher)
    return tuple(sizes)


def _check_statistics(statistics):
    if not isinstance(statistics, (tuple, list)):
        hint = f", as in ({statistics!r},)" if isinstance(statistics, str) else ""
        raise TypeError(f"statistics: expected a tuple of names{hint}; got {type(statistics).__name__}")
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"statistics: unknown name {name!r}; known: {', '.join(STATISTICS)}")


def _scale_of_uld(row: RowOptions, temperature_squared: bool) -> Tensor:
    """The row scale of the term of ULD alone; 0 where the row has none."""
    factor = 1 if row.hard_weight is None else 1 - row.hard_weight
    if temperature_squared:
        factor = factor * row.temperature**2
    # Options of a row that is dropped may be anything.
    return torch.where(row.row_scale == 0, 0, row.row_scale * factor)


def _row_losses(student, teacher, row_scale, temperature, sizes, topk, mode: str | None, backend: str):
    """Row losses [rows] (a node of the autograd graph where a gradient is wanted), divergences and error bounds."""
    tensors = (student, teacher, row_scale, temperature)
    if backend == "reference":
        with torch.autocast(student.device.type, enabled=False):
            return reference.uld(*tensors, *sizes, topk)
    budget = chunks.current_budget()
    if mode is None:
        loss, _, *found = uld_rows(*tensors, *sizes, topk, budget, backend, gradient=False)
        return loss, *found
    return Uld.apply(*tensors, *sizes, topk, mode, budget, backend)


def _label_losses(student: Tensor, row: RowOptions, vocab_size: int, mode: str | None, backend: str) -> Tensor:
    """lambda times the cross-entropy at temperature 1: rows whose divergence has weight 0, and is dropped."""
    dtype = compute_dtype(student, student)
    in_range = (row.hard_weight >= 0) & (row.hard_weight <= 1)
    scale = torch.where(row.row_scale == 0, 0, row.row_scale * row.hard_weight).to(dtype)
    temperature, parameters = (torch.ones(1, dtype=dtype, device=student.device) for _ in range(2))
    # A weight that no loss has raises there, or makes its row NaN.
    all_of_it = torch.where(in_range, 1, row.hard_weight).to(dtype)
    tensors = (student, student.detach(), scale, row.labels, temperature, all_of_it, parameters)
    static = ("kl", vocab_size, False)
    if backend == "reference":
        with torch.autocast(student.device.type, enabled=False):
            return reference_rows.rows(*tensors, *static, False)[0]
    if mode is None:
        return ops.rows(*tensors, *static, False, False, backend)[0]
    return Rows.apply(*tensors, *static, False, mode, backend)[0]
