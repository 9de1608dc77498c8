"""Optimal transport between classes: distillation that knows which classes are alike."""

import torch
from torch import Tensor

from .. import backends
from ..autograd import CLASS_OT, run
from ..families.class_ot import GRADIENTS, NO_LABEL, ClassOT
from ..families.linear import current_budget
from ..families.options import compute_dtype
from . import options


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
) -> Tensor:
    """The cost of moving softmax(student / T) to softmax(teacher / T) where moving mass from class c to
    class d costs M[c, d]: Wasserstein distillation of logits, by Sinkhorn's iterations.

    With a the student's distribution, b the teacher's, T the temperature and w the row weight::

        K = exp(-(M - min M) / epsilon),   u = 1 / V
        v = b / (K^T u),   u = a / (K v)               `iterations` times: columns first
        P = diag(u) K diag(v)
        row loss = w * <P, M> = w * sum_cd P[c, d] M[c, d]

    The row sums of P are a; its column sums are b once the iterations have converged, which they need more of the
    smaller epsilon is beside the costs. <P, M> is then at least the least cost of any plan, and tends to it as epsilon
    goes to 0. Equal distributions do not have loss 0, nor gradient 0: at epsilon > 0 the plan spreads mass. "mean" is
    the sum of the row losses over the number of kept rows (or `normalizer`).

    One K serves all rows, so that every half of an iteration is one matrix product, and memory is that of two matrices
    [V, V] and, of the rows of a chunk (`kdkernels.chunk_budget`), some vectors [V]: 2 * iterations of them more for the
    unrolled gradient. Nothing of [rows, V, V] is made.

    Args:
        student: logits [..., V], unnormalised; fp32, bf16, fp16 or fp64. Leading dimensions are free, and the last has
            stride 1. Gets the gradient.
        teacher: logits [..., V] of the same shape; the dtype may differ. Must not require grad.
        class_cost: M [V, V], its rows the student's classes and its columns the teacher's: of any sign, not necessarily
            symmetric, in one of these dtypes, on the same device. Must not require grad.
        temperature: T > 0, a number, a 0-d tensor or one per row. Divides both sides' logits; the loss is not
            multiplied by anything, and its gradient shrinks as T grows.
        epsilon: > 0, a number or a 0-d tensor, in the unit of the costs: a plan is blurred over classes whose costs
            differ by less.
        iterations: of both halves, from 1.
        gradient: of what, with respect to the student's logits: (a_c / T) (x_c - sum a x), with x in "unrolled" the
            exact derivative of the loss of these iterations with respect to a; in "implicit" that of the converged
            plan's loss, solved for at the plan that is there by at most 200 steps of conjugate gradients (on a CPU
            with a RuntimeWarning where they do not suffice), which takes no memory by iteration and is right where the
            iterations have converged; in "envelope" epsilon log(u / a), which is the derivative of the entropic cost
            <P, M> + epsilon KL(P || a b^T) at the converged plan, for the price of none (the loss is <P, M> all the
            same).
        exclude_labels: int64, leading shape: a class that is left out of both softmaxes of its row, as the label is
            where the distillation of it is a loss of its own. Its logits are not read. `ignore_index`: nothing is left
            out.
        ignore_index: the value in `exclude_labels` of rows that keep all classes.
        mask: bool, leading shape; False rows are dropped: not counted, and they may hold anything.
        row_weight: real, leading shape; multiplies a row's loss and does not change the count.
        reduction: "mean", "sum" or "none" (row losses in the leading shape, 0 where dropped).
        normalizer: with "mean" only, replaces the count of kept rows: a number or a tensor of one element. "mean" is
            local to this call and rank otherwise.
        backend: "auto", or a backend's name, which must be able to serve the tensors; the products are torch's in all
            but "reference": the formulas on plans [rows, V, V], of which "unrolled" is twice differentiable. "auto" is
            never that.

    Returns:
        The loss in fp32, or in fp64 where student, teacher or class_cost is fp64; all arithmetic is in that dtype, and
        on a CPU in fp64 where (max M - min M) / epsilon is past 80. Autocast and a lower precision of matrix products
        that is allowed elsewhere change nothing. The gradient has the student's dtype.

    A logit of -inf is probability 0, which carries no mass, and has gradient 0. NaN, +inf and a row of -inf alone make
    that row's loss and gradient NaN, no other's.

    Raises:
        TypeError, ValueError: for arguments that do not fit, saying what was expected and what came. Values are looked
            at on a CPU: labels out of range, temperatures <= 0 in a tensor, costs that are not finite, and costs whose
            range is more than 600 epsilon, which names the least epsilon. On a GPU these make their row (the costs: all
            rows) NaN, and so does a range of more than 80 epsilon unless class_cost is fp64; `kdkernels.checks(True)`
            makes them raise there, for a synchronisation, and lets fp64 stand in.
        RuntimeError: when the backend cannot serve the call; in backward, for second derivatives; under torch.func's
            transforms and forward-mode AD.

    Source: arXiv:2412.08139, WKD-L (its code adds 1e-8 to both denominators, which takes mass from the plan).
    """
    _check(student, teacher, class_cost)
    epsilon = options.positive_number("epsilon", epsilon, student.device, torch.float64)
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
        *options.as_outer_inner(student, teacher), class_cost, rows.row_scale, excluded, rows.temperature, epsilon,
        iterations, gradient, current_budget(),
    )  # fmt: skip
    # The operator's products are torch's: it serves "auto" also where no backend has kernels.
    reduce = reduction != "none"
    (loss,) = run(CLASS_OT, problem, backend, "forward", reduce=reduce, definition=definition)
    return loss if reduce else loss.reshape(student.shape[:-1])


def _check(student: Tensor, teacher: Tensor, class_cost: Tensor):
    """Raises where these are no logits of one vocabulary with its costs."""
    for name, x in {"student": student, "teacher": teacher, "class_cost": class_cost}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor; got {type(x).__name__}")
    for name, x in {"student": student, "teacher": teacher}.items():
        options.check_stored_or_head(name, x)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student and teacher: expected one vocabulary, whose classes class_cost is of; got {student.shape[-1]} "
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
    """[rows], with NO_LABEL for ignore_index."""
    if exclude_labels is None:
        return None
    options.check_per_row("exclude_labels", exclude_labels, student.shape[:-1], student.device, torch.int64)
    options.check_type("ignore_index", ignore_index, int)
    if student.shape[-1] < 2:
        raise ValueError("exclude_labels: expected a vocabulary of at least 2 classes; got 1")
    labels = exclude_labels.reshape(-1)
    return torch.where(labels == ignore_index, NO_LABEL, labels)
