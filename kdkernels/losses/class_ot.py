"""Optimal transport between classes: distillation with a cost for every pair of classes."""

from typing import NoReturn

import torch
from torch import Tensor

from .. import backends
from ..autograd import CLASS_OT, run
from ..families.budget import current_budget
from ..families.class_ot import GRADIENTS, NO_LABEL, ClassOT, widest_dtype
from ..families.options import compute_dtype
from . import options
from .signatures import check_keywords, shows_keywords


@shows_keywords()
def fused_class_ot(
    student: Tensor,
    teacher: Tensor,
    class_cost: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    epsilon: float | Tensor = 0.05,
    iterations: int = 10,
    gradient: str = "unrolled",
    exclude_labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: int | float | Tensor | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """The cost of moving softmax(student / T) to softmax(teacher / T), where moving mass from class c to class d costs
    M[c, d]: Wasserstein distillation of logits, by Sinkhorn's iterations.

    Let a be the student's distribution of a row, b the teacher's, T the temperature and w the row weight::

        K = exp(-(M - min M) / epsilon),   u = 1 / V
        v = b / (K^T u),   u = a / (K v)               `iterations` times: columns first
        P = diag(u) K diag(v)
        row loss = w * <P, M> = w * sum_cd P[c, d] M[c, d]

    The row sums of P are a. Its column sums are b once the iterations have converged; a smaller epsilon relative to the
    costs needs more iterations. Then <P, M> is at least the smallest cost of any plan, and tends to it as epsilon goes
    to 0. Equal distributions have neither loss 0 nor gradient 0: at epsilon > 0 the plan spreads mass. "mean" is the
    sum of the row losses over the number of kept rows (or over `normalizer`).

    One K serves all rows, so each half of an iteration is one matrix product. Memory is two matrices [V, V] and some
    vectors [V] for each row of a chunk (`kdkernels.chunk_budget`); the unrolled gradient takes 2 * iterations more
    vectors. The loss stores nothing of size [rows, V, V].

    Args:
        student: logits [..., V], unnormalised; fp32, bf16, fp16 or fp64. Any leading dimensions; the last dimension has
            stride 1. Gets the gradient. A `LinearLogits` is refused.
        teacher: logits [..., V] of the same shape; the dtype may differ. Must not require grad. A `LinearLogits` or a
            `SparseLogProbs` is refused.
        class_cost: M [V, V]: rows are the student's classes, columns the teacher's. Any sign, not necessarily
            symmetric; one of the dtypes above, on the same device. Must not require grad.
        temperature: T > 0, a number, a 0-d tensor or one per row. Divides both sides' logits. No factor of T multiplies
            the loss, so its gradient shrinks as T grows.
        epsilon: > 0, a number or a 0-d tensor, in the unit of the costs: the plan spreads mass over classes whose costs
            differ by less than epsilon.
        iterations: the number of iterations, from 1; each has both halves.
        gradient: chooses the derivative with respect to the student's logits, (a_c / T) (x_c - sum a x). "unrolled": x
            is the exact derivative of these iterations' loss with respect to a. "implicit": x is the derivative of the
            converged plan's loss, taken at the plan that the iterations reached. At most 200 steps of conjugate
            gradients solve for x (on a CPU with a RuntimeWarning if they do not suffice). That needs no memory per
            iteration, and is right if the iterations have converged. "envelope": x is epsilon log(u / a), the
            derivative of the entropic cost <P, M> + epsilon KL(P || a b^T) at the converged plan. It costs no extra
            work. The loss is <P, M> in all three modes.
        exclude_labels: int64, leading shape: one class per row, which both softmaxes leave out; for example the label,
            if another loss distills it. The loss does not read the class's logits. `ignore_index`: no class is left
            out.
        ignore_index: the value in `exclude_labels` for rows that keep all classes.
        mask: bool, leading shape; the loss drops rows that are False. It does not count them, and they may hold
            anything.
        row_weight: real, leading shape; multiplies a row's loss and does not change the count.
        reduction: "mean", "sum" or "none" (row losses in the leading shape, 0 for dropped rows).
        normalizer: with "mean" only, replaces the count of kept rows: a number or a tensor of one element. Without it,
            "mean" is local to this call and rank.
        backend: "auto", or a backend's name; the backend must be able to serve the tensors. torch computes the products
            for every backend. "reference" computes the formulas on plans [rows, V, V], and its "unrolled" gradient is
            twice differentiable. "auto" never takes the formulas of "reference".

    Returns:
        The loss in fp32, or in fp64 if student, teacher or class_cost is fp64. All arithmetic is in that dtype; on a
        CPU it is in fp64 if (max M - min M) / epsilon is above 80. Neither autocast nor a lower precision setting of
        matrix products changes the result. The gradient has the student's dtype.

    A logit of -inf is probability 0: the class has no mass, and gradient 0. NaN, +inf, or a row of -inf alone make that
    row's loss and gradient NaN, and no other row's.

    Raises:
        TypeError, ValueError: for arguments that do not fit. The message says what was expected and what came. On a CPU
            the loss checks values: labels out of range, temperatures <= 0 in a tensor, costs that are not finite, and
            costs with a range of more than 600 epsilon (the message names the smallest epsilon that works). On a GPU
            such a value makes its row NaN (bad costs: all rows), and so does a range of more than 80 epsilon unless
            class_cost is fp64. `kdkernels.checks(True)` makes a GPU raise too, for a synchronisation, and switch to
            fp64 like a CPU. A device without fp64 takes a range of at most 80 epsilon.
        RuntimeError: if the backend cannot serve the call; in backward, for second derivatives; under torch.func's
            transforms and forward-mode AD.

    Source: arXiv:2412.08139, WKD-L (its code adds 1e-8 to both denominators, which takes mass from the plan).
    """
    check_keywords(fused_class_ot, unknown)
    _check(student, teacher, class_cost)
    epsilon = options.positive_number("epsilon", epsilon, student.device, widest_dtype(student.device))
    options.check_int("iterations", iterations, 1)
    options.check_choice("gradient", gradient, GRADIENTS)
    dtype = torch.float64 if class_cost.dtype == torch.float64 else compute_dtype(student, teacher)
    given = options.GivenRowOptions(
        temperature=temperature, mask=mask, row_weight=row_weight, reduction=reduction, normalizer=normalizer
    )
    rows = options.resolve(student, teacher, given, dtype)
    excluded = _excluded(exclude_labels, ignore_index, student)
    definition, backend = backend == "reference", backends.select(backend, student, teacher)
    problem = ClassOT(
        *options.as_outer_inner(student, teacher),
        class_cost,
        rows.row_scale,
        excluded,
        rows.temperature,
        epsilon,
        iterations,
        gradient,
        current_budget(student.device),
    )
    # torch computes the operator's products, so the operator serves "auto" even if no backend has kernels.
    reduce = reduction != "none"
    (loss,) = run(CLASS_OT, problem, backend, "forward", reduce=reduce, definition=definition)
    return loss if reduce else loss.reshape(student.shape[:-1])


def _check(student: Tensor, teacher: Tensor, class_cost: Tensor):
    """Raises unless student and teacher are logits of one vocabulary, and class_cost has its costs."""
    for name, x in {"student": student, "teacher": teacher}.items():
        options.check_is_tensor(name, x)
        options.check_stored_or_head(name, x)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student and teacher: expected one vocabulary, that of class_cost; got {student.shape[-1]} "
            f"classes and {teacher.shape[-1]}"
        )
    classes = options.check_logits(student, teacher, None)
    options.check_dense("class_cost", class_cost)
    if class_cost.shape != (classes, classes):
        raise ValueError(
            f"class_cost: expected the costs [V, V] of {classes} classes; got shape {list(class_cost.shape)}"
        )
    if class_cost.device != student.device:
        raise ValueError(f"class_cost: expected on the logits' device {student.device}; got {class_cost.device}")
    if class_cost.requires_grad:
        raise ValueError(
            "class_cost requires grad, but the loss has no gradient with respect to it; pass class_cost.detach()"
        )


def _excluded(exclude_labels: Tensor | None, ignore_index: int, student: Tensor) -> Tensor | None:
    """The excluded classes [rows], with NO_LABEL for ignore_index; None if no class is excluded."""
    if exclude_labels is None:
        return None
    options.check_per_row("exclude_labels", exclude_labels, student.shape[:-1], student.device, torch.int64)
    options.check_type("ignore_index", ignore_index, int)
    if student.shape[-1] < 2:
        raise ValueError("exclude_labels: expected a vocabulary of at least 2 classes; got 1")
    labels = exclude_labels.reshape(-1)
    return torch.where(labels == ignore_index, NO_LABEL, labels)
