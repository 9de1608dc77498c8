"""Universal Logit Distillation: a loss between vocabularies of different sizes."""

from typing import NoReturn

import torch
from torch import Tensor

from .. import backends
from ..autograd import ROWS, ULD, run
from ..families.budget import current_budget
from ..families.options import RowOptions, compute_dtype
from ..families.rows import Rows
from ..families.uld import Uld
from . import options
from .options import LossOutput
from .signatures import check_keywords, shows_keywords

STATISTICS = ("divergence", "error_bound", "kept")


@shows_keywords()
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
    **unknown: NoReturn,
) -> Tensor | LossOutput:
    """Universal Logit Distillation: the distance between the sorted probabilities of two vocabularies.

    Let p = softmax(student / T) and q = softmax(teacher / T) of a row, both sorted in descending order and padded with
    zeros to the larger vocabulary, and p_k and q_k the k-th largest::

        ULD = sum over k of |p_k - q_k|                                    from 0 to 2
        row loss = w * ((1 - lambda) * ULD * (T**2 if temperature_squared else 1)
                        + lambda * -log softmax(student)[y])

    ULD is the Wasserstein distance between the two if any two classes are equally far apart: no class of one vocabulary
    needs a counterpart in the other. The gradient with respect to a logit, with s the sign of its class::

        p_v / T * (s_v - sum over w of p_w s_w),     s_v = sign(p_k - q_k) of the rank k of class v, sign(0) = 0

    Ties: classes with equal logits share some ranks, and each class gets the mean of these ranks' signs. That is a
    subgradient, and does not depend on the order of equal logits: a permutation of the classes permutes the gradient.

    With hard_weight, the label term is a second loss with a gradient of its own: two gradients of the logits' size are
    kept until autograd adds them. `fused_divergence` makes one gradient of both terms.

    Args:
        student: logits [..., Vs], fp32, bf16, fp16 or fp64. Any leading dimensions; the last dimension has stride 1.
            Slices such as ``logits[:, :-1]`` need no copy. Gets the gradient. A `LinearLogits` is refused.
        teacher: logits [..., Vt] of the same leading shape; the dtype may differ. Must not require grad. A
            `LinearLogits` or a `SparseLogProbs` is refused. If the tokenizers split a text differently, the caller
            decides which positions of teacher and student belong together.
        temperature, temperature_squared, mask, row_weight, reduction, normalizer: as in `fused_divergence`.
        labels, ignore_index, hard_weight: as in `fused_divergence`; labels are classes of the student, and lambda's
            term is the student's cross-entropy at temperature 1.
        student_vocab_size, teacher_vocab_size: the number of classes of each side that count. Columns past them are
            padding, with gradient 0. None: all.
        topk: K, from 1 to the larger vocabulary: compares only the K largest probabilities of each side. These are
            exact: the softmax covers the whole vocabulary. The error from leaving out the other ranks is at most the
            mass that both sides have there, which the statistic "error_bound" gives. The gradient is that of the K
            ranks' sum: s = 0 for other classes. Among equal logits at the boundary, the smaller indices belong to the
            K. None: all ranks.
        statistics: any of "divergence" (ULD, or the sum over K ranks), "error_bound" (0 without topk) and "kept" (as in
            `fused_divergence`): detached, in the leading shape, in the loss's dtype; 0 for dropped rows. The first two
            are 0 for rows without weight too (row_weight or 1 - lambda is 0).
        gradient: as in `fused_divergence`: "forward" computes the gradient together with the loss and keeps it,
            "backward" keeps the inputs and compares them again.
        backend: "auto" or one of "cpu" (C++), "cuda" (CUDA C++, NVIDIA GPUs), "triton" (GPUs), "reference" (plain
            PyTorch, twice differentiable).

    Memory besides the gradient: on a CPU, for each thread, 25 bytes (fp64: 49) per class of the larger vocabulary plus
    1.32 MB (1.6); on a GPU, the sort of some rows at a time, within `kdkernels.chunk_budget`. With topk: the K largest
    of each row and the probabilities of some rows, within the budget (on a CPU at most 2 MiB).

    Returns:
        The loss in fp32 (fp64 if a side is fp64), or a `LossOutput` if `statistics` names any. The gradient has the
        student's dtype; between logits and gradient all arithmetic is fp32 (fp64). If p and q agree up to rounding,
        their sign may be either.

    Infinite logits: -inf is probability 0. NaN, +inf, or a row of -inf alone, on either side, make that row's loss and
    gradient NaN, and no other row's.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_divergence`.

    Source: arXiv:2402.12030 (ULD loss, for any pair of tokenizers); ties and topk are this package's.
    """
    check_keywords(fused_uld, unknown)
    sizes = _check_logits(student, teacher, student_vocab_size, teacher_vocab_size)
    options.check_choice("gradient", gradient, options.GRADIENTS)
    options.check_statistics(statistics, labels, STATISTICS)
    if topk is not None:
        options.check_type("topk", topk, int)
        if not 1 <= topk <= max(sizes):
            raise ValueError(f"topk: expected from 1 to {max(sizes)}, the larger vocabulary; got {topk}")
    given = options.GivenRowOptions(
        temperature, temperature_squared, mask, row_weight, labels, ignore_index, hard_weight, reduction, normalizer
    )
    rows = options.resolve(student, teacher, given)
    backend = backends.select(backend, student, teacher)
    mode = options.gradient_mode(gradient, reduction, [student.dtype])

    views = options.as_outer_inner(student, teacher)
    problem = Uld(*views, _row_scale_of_uld(rows), rows.temperature, topk, *sizes, current_budget(student.device))
    row_loss, *detached = run(ULD, problem, backend, mode)
    if rows.hard_weight is not None:
        row_loss = row_loss + run(ROWS, _label_term(views[0], rows, sizes[0]), backend, mode)[0]

    leading = student.shape[:-1]
    loss = row_loss.reshape(leading) if reduction == "none" else row_loss.sum()
    if not statistics:
        return loss
    values = dict(zip(STATISTICS, (*detached, options.kept_statistic(given, teacher, loss)), strict=True))
    return LossOutput(loss, {name: values[name].reshape(leading) for name in statistics})


def _check_logits(student, teacher, student_vocab_size, teacher_vocab_size) -> tuple[int, int]:
    """Raises for logits that no backend takes; returns the number of classes of each side that count."""
    sizes = []
    for name, x, size in (("student", student, student_vocab_size), ("teacher", teacher, teacher_vocab_size)):
        options.check_is_tensor(name, x)
        options.check_stored_or_head(name, x)
        size = x.shape[-1] if size is None else size
        options.check_type(f"{name}_vocab_size", size, int)
        if not 1 <= size <= x.shape[-1]:
            raise ValueError(f"{name}_vocab_size: expected from 1 to the {name}'s {x.shape[-1]} classes; got {size}")
        sizes.append(size)
    options.check_pair(student, teacher)
    return tuple(sizes)


def _row_scale_of_uld(rows: RowOptions) -> Tensor:
    """The row scale of the ULD term alone; 0 for a row without that term."""
    factor = 1 if rows.hard_weight is None else 1 - rows.hard_weight
    if rows.temperature_squared:
        factor = factor * rows.temperature**2
    # A dropped row may have any options.
    return torch.where(rows.row_scale == 0, 0, rows.row_scale * factor)


def _label_term(student: Tensor, rows: RowOptions, vocab_size: int) -> Rows:
    """lambda times the cross-entropy at temperature 1: rows with hard weight 1, so that the divergence has weight 0."""
    dtype = compute_dtype(student, student)
    in_range = (rows.hard_weight >= 0) & (rows.hard_weight <= 1)
    row_scale = torch.where(rows.row_scale == 0, 0, rows.row_scale * rows.hard_weight).to(dtype)
    ones = torch.ones(1, dtype=dtype, device=student.device)
    # A weight outside [0, 1] stays unchanged: the operator raises for it, or makes its row NaN.
    hard_weight = torch.where(in_range, 1, rows.hard_weight).to(dtype)
    label_options = RowOptions(row_scale, ones, labels=rows.labels, hard_weight=hard_weight)
    return Rows(student, student.detach(), label_options, "kl", ones, vocab_size, False)
