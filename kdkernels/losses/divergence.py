"""The public functions: what a training loop calls."""

import torch
from torch import Tensor

from .. import backends
from ..autograd import CHUNKED_ROWS, ROWS, run
from ..distributions import LinearLogits, SparseLogProbs
from ..divergences import Divergence
from ..families.linear import ChunkedRows, Chunking, LogitsSource, product_dtype
from ..families.rows import ROW_STATISTICS, ROW_TOP1, Rows
from ..families.topk import Sparse
from . import options
from .options import LossOutput


def fused_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogProbs,
    divergence: str | Divergence = "kl",
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
    vocab_size: int | None = None,
    statistics: tuple[str, ...] = (),
    gradient: str = "auto",
    chunk_rows: int | None = None,
    compact_rows: bool | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | LossOutput:
    """A divergence between softmax(teacher / T) and softmax(student / T), row by row, with its gradient.

    With p the teacher's and q the student's distribution of a row, D(p, q) the divergence, y the label, T the
    temperature, lambda the hard weight and w the row weight::

        row loss = w * ((1 - lambda) * D(p, q) * (T**2 if temperature_squared else 1)
                        + lambda * -log softmax(student)[y])

    "mean" is the sum of the row losses over the number of kept rows (or `normalizer`). Rows that are not kept are
    neither read nor counted, and may hold anything. Without kept rows: 0, with zero gradients.

    Args:
        student: logits [..., V], unnormalised; fp32, bf16, fp16 or fp64. Leading dimensions are free, and the last has
            stride 1; slices such as ``logits[:, :-1]`` are taken without a copy. Gets the gradient. Or a
            `LinearLogits`, whose hidden states, weight and bias get theirs, and whose logits are never stored.
        teacher: logits [..., V] of the same leading shape, or a `LinearLogits`; the dtype may differ. Or a
            `SparseLogProbs` of that leading shape: the top k of a teacher, or samples. Must not require grad.
        divergence: a name of the catalogue (kl, reverse_kl, mixed_kl, js, skew_kl, skew_reverse_kl, tv, hellinger,
            alpha, chi_square) or a `Divergence` with its parameter.
        temperature: T > 0, a number, a 0-d tensor or one per row. Divides both sides' logits, not the label term's.
        temperature_squared: multiplies the divergence by T**2, which keeps the gradient's scale as T grows
            (Hinton et al. 2015). False: the divergence as it is, whose gradient shrinks as 1/T.
        mask: bool, leading shape; False rows are dropped.
        row_weight: real, leading shape; multiplies a row's loss and does not change the count. A row of weight 0 is
            skipped as a masked one is, and is counted.
        labels: int64, leading shape, already shifted by the caller (`next_token_labels`). Rows labelled
            `ignore_index` are dropped, also when hard_weight is 0.
        ignore_index: the label of rows to drop.
        hard_weight: lambda in [0, 1], a number, a 0-d tensor or one per row; needs labels.
        reduction: "mean", "sum" or "none" (row losses in the leading shape, 0 where dropped).
        normalizer: with "mean" only, replaces the count of kept rows: a number or a tensor of one element, of any
            shape, dtype and device. "mean" is otherwise local to this call and rank. Pass the number of tokens of the
            global batch for gradient accumulation and data parallelism (transformers' ``num_items_in_batch``; NeMo-RL's
            global valid tokens); use reduction="sum" where the trainer divides (Megatron); for a mean of sequence
            means pass ``row_weight = 1 / length`` of the row's sequence and ``normalizer = sequences``. The value in
            a tensor is not checked.
        vocab_size: classes that count; columns past it are padding in either tensor, and the widths may differ. Their
            gradient is 0. Widths that differ without it raise.
        statistics: names of row statistics wanted from the same sweeps, detached, in the leading shape, 0 on dropped
            rows: divergence (D alone), cross_entropy (of the label, at temperature 1), tv, student_entropy,
            teacher_entropy, student_max_log_prob, teacher_max_log_prob, student_label_log_prob,
            teacher_label_log_prob, student_lse, teacher_lse (of logits / T) in the loss's dtype (but the
            cross-entropy all at temperature T), and student_top1, teacher_top1 (int64, the first of equals). With a
            `SparseLogProbs` the student's are of all classes; tv and teacher_entropy are of what is compared (in
            "bucket" the entries and one class more); teacher_top1 and teacher_max_log_prob of the entries;
            teacher_label_log_prob is the tail's, as a whole, where no entry is the label; teacher_lse is the log of the
            teacher's mass. "uniform" has those of the whole teacher that it stands for.
        gradient: "forward" finds the gradient in the call that finds the loss, and keeps one tensor of the student's
            shape; "backward" keeps only row sums and the inputs, and sweeps again in backward. "auto" is "backward"
            for reduction="none" and for fp16 students (whose small gradients would be lost before a loss scaler
            sees them), else "forward". Without grad no gradient is found. "forward" rounds to the
            student's dtype a second time where the loss is multiplied by something before backward. With a
            `LinearLogits` "forward" finds all gradients then; "backward" keeps the inputs and does the products again,
            which reduction="none" needs for a student's head.
        chunk_rows: of `LinearLogits`: how many rows' logits are made at a time. None: as many as `chunk_budget` holds.
        compact_rows: of `LinearLogits`: whether dropped rows are left out of the products. On a GPU that takes a
            synchronisation to count them. None: on a CPU.
        logits_dtype: of `LinearLogits`: torch.float32 makes fp32 logits of 16-bit hidden states and weights. None: the
            dtype of the factors, to which logits are rounded as a model's own are. Rounding logits is most of the
            gradient's error then; fp32 costs twice the memory a row, and on a CPU several times the time.
        backend: "auto" or one of "cpu" (C++), "cuda" (CUDA C++, NVIDIA GPUs), "triton" (GPUs), "reference" (plain
            PyTorch, twice differentiable).

    Returns:
        The loss in fp32 (fp64 when a side is fp64); `LossOutput` when statistics are asked for. The gradient has the
        student's dtype (of a head's parts each its own); between logits and gradient all arithmetic is fp32 (fp64). In
        fp32 the loss of a row is right to 1e-6 of itself and 4 units in the last place of its log-sum-exp.
        `Divergence.magnification` multiplies the latter; it is large for alpha near 0 and 1. The terms of a steep
        divergence (`Divergence.is_steep`: alpha outside (0, 1), chi_square) are exponentials of the log-ratio: its
        rounding is relative to the loss, and they overflow where fp64 does not.

    Infinite logits: -inf is probability 0, and 0 log 0 = 0: a class that is -inf on both sides contributes nothing.
    Where only the teacher is -inf and the student has mass, reverse_kl, mixed_kl (weight < 1) and alpha (alpha < 0) are
    +inf, and the row's gradient is NaN. Where only the student is -inf and the teacher has mass, kl and mixed_kl
    (weight > 0) are +inf with the finite gradient of their formula; alpha (alpha > 1) and chi_square are +inf with a
    NaN gradient. All others are finite there. NaN, +inf, and a row of -inf alone make that row's loss and gradient NaN,
    no other's. A divergence of weight 0, at hard_weight = 1, is dropped by the kernels whatever it is.

    Raises:
        TypeError, ValueError: for arguments that do not fit, saying what was expected and what came. Labels out of
            range, temperatures <= 0 and hard weights outside [0, 1] in a tensor, and entries of a `SparseLogProbs` that
            do not fit, raise on a CPU; on a GPU they make their row NaN, unless `kdkernels.checks(True)` asks for the
            synchronisation.
        RuntimeError: when the backend that was asked for cannot serve the call, with the reason; in backward, for
            second derivatives outside backend="reference"; under torch.func's transforms likewise, and under
            forward-mode AD everywhere.

    Sources of the divergences: `kdkernels.divergences.CATALOGUE`.
    """
    if not isinstance(divergence, Divergence):
        divergence = Divergence(divergence)
    vocab_size = options.check_logits(student, teacher, vocab_size)
    options.check_choice("gradient", gradient, options.GRADIENTS)
    options.check_statistics(statistics, labels)
    given = options.GivenRowOptions(
        temperature, temperature_squared, mask, row_weight, labels, ignore_index, hard_weight, reduction, normalizer
    )
    rows = options.resolve(student, teacher, given)
    heads = options.HeadOptions(chunk_rows, compact_rows, logits_dtype)
    chunking = options.resolve_chunking(heads, student=student, teacher=teacher)
    if isinstance(teacher, SparseLogProbs):
        options.check_tail(divergence, teacher)
        chunking = chunking or options.whole_rows()
    backend = backends.select(backend, student, teacher)
    # A divergence without a parameter is given a number that it does not read.
    parameter = 1.0 if divergence.parameter is None else divergence.parameter
    parameters = options.number(parameter, student.device, rows.row_scale.dtype)

    loss_terms = (rows, divergence.name, parameters, vocab_size, bool(statistics))
    if chunking is None:
        family, dtype = ROWS, student.dtype
        problem = Rows(*options.as_outer_inner(student, teacher), *loss_terms)
    else:
        family, dtype = CHUNKED_ROWS, _gradient_dtype(student, chunking)
        problem = ChunkedRows(*_sources(student, teacher, chunking, rows.row_scale.dtype), *loss_terms, chunking)
    if gradient == "forward" and reduction == "none" and isinstance(student, LinearLogits):
        raise ValueError(
            "gradient='forward' finds one gradient of the weight, which reduction='none' would scale row by row; "
            "expected gradient='backward' or 'auto'"
        )
    mode = options.gradient_mode(gradient, reduction, dtype)
    loss, row_statistics, top1 = run(family, problem, backend, mode, reduce=reduction != "none")

    leading = student.shape[:-1]
    loss = loss.reshape(leading) if reduction == "none" else loss
    if not statistics:
        return loss
    return LossOutput(loss, {name: _statistic(name, row_statistics, top1, leading) for name in statistics})


def fused_kl(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | SparseLogProbs, **row_options
) -> Tensor | LossOutput:
    """KL(p‖q) = Σ p log(p/q), p = softmax(teacher / T), q = softmax(student / T): Hinton's distillation loss.

    The gradient with respect to the student's logits is (q − p) / T (times T**2 with temperature_squared=True).
    Row options, shapes, what is returned and raised: `fused_divergence`. Source: arXiv:1503.02531.
    """
    return fused_divergence(student, teacher, "kl", **row_options)


def fused_js(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogProbs,
    *,
    beta: float = 0.5,
    **row_options,
) -> Tensor | LossOutput:
    """Generalised Jensen-Shannon divergence β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q (GKD, arXiv:2306.13649, Eq. 1).

    p is the teacher's and q the student's distribution. 0 < beta < 1: at 0 and 1 the divergence vanishes, so they
    raise; `Divergence.gkd(beta)` has kl and reverse_kl there. Row options, shapes, what is returned and raised:
    `fused_divergence`.
    """
    return fused_divergence(student, teacher, Divergence("js", beta=beta), **row_options)


def next_token_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Shifts token ids [..., T] so that row t is labelled with token t + 1; the last row gets `ignore_index`.

    With these, logits [..., T, V] are taken whole: no slice of the logits, and no copy in its backward.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor; got {type(labels).__name__}")
    if labels.dim() == 0 or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 of shape [..., T]; got {labels.dtype} of {list(labels.shape)}")
    last = torch.full_like(labels[..., :1], ignore_index)
    return torch.cat([labels[..., 1:], last], dim=-1)


def _gradient_dtype(student: Tensor | LinearLogits, chunking: Chunking) -> torch.dtype:
    """The dtype of the logits' gradient."""
    return product_dtype(student.dtype, chunking.autocast_dtype) if isinstance(student, LinearLogits) else student.dtype


def _sources(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | SparseLogProbs, chunking: Chunking, dtype
) -> tuple[LogitsSource, LogitsSource | None, Sparse | None]:
    """The student's logits, and the teacher's logits or entries, as the chunk loop takes them."""
    student = options.source_of(student, chunking)
    if not isinstance(teacher, SparseLogProbs):
        teacher = options.source_of(teacher, chunking)
        data = options.as_outer_inner(student.data, teacher.data)
        return student._replace(data=data[0]), teacher._replace(data=data[1]), None
    entries = teacher.shape[-1]
    tail_log_prob = None if teacher.tail_log_prob is None else teacher.tail_log_prob.reshape(-1)
    source_temperature = options.number(teacher.source_temperature, teacher.device, dtype)
    sparse = Sparse(
        teacher.log_probs.reshape(-1, entries), teacher.indices.reshape(-1, entries), tail_log_prob,
        source_temperature, teacher.tail,
    )  # fmt: skip
    return student._replace(data=options.as_outer_inner(student.data)[0]), None, sparse


def _statistic(name: str, row_statistics: Tensor, top1: Tensor, leading: torch.Size) -> Tensor:
    if name in ROW_STATISTICS:
        return row_statistics[ROW_STATISTICS.index(name)].reshape(leading)
    return top1[ROW_TOP1.index(name)].reshape(leading)
