"""The losses between two distributions over one vocabulary: `fused_divergence`, `fused_kl`, `fused_js`."""

import functools
from typing import NoReturn

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack  # torch requires it; Python 3.10's typing has no Unpack

from .. import backends, callers
from ..autograd import CHUNKED_ROWS, ROWS, run
from ..distributions import LinearLogits, SparseLogProbs
from ..divergences import Divergence
from ..families.linear import ChunkedRows, Chunking, LogitsSource
from ..families.rows import ROW_STATISTICS, ROW_TOP1, Rows
from ..families.topk import Sparse
from . import head_options, options
from .options import LossOutput
from .signatures import check_keywords, shows_keywords


class DivergenceOptions(TypedDict, total=False):
    """The keywords of `fused_divergence`, by which editors complete the calls of functions that pass them on."""

    temperature: float | Tensor
    temperature_squared: bool
    mask: Tensor | None
    row_weight: Tensor | None
    labels: Tensor | None
    ignore_index: int
    hard_weight: float | Tensor
    loss_cap: float | Tensor | None
    reduction: str
    normalizer: int | float | Tensor | None
    vocab_size: int | None
    statistics: tuple[str, ...]
    gradient: str
    chunk_rows: int | None
    compact_rows: bool | None
    logits_dtype: torch.dtype | None
    backend: str


@shows_keywords()
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
    loss_cap: float | Tensor | None = None,
    reduction: str = "mean",
    normalizer: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    statistics: tuple[str, ...] = (),
    gradient: str = "auto",
    chunk_rows: int | None = None,
    compact_rows: bool | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | LossOutput:
    """A divergence between softmax(teacher / T) and softmax(student / T) for each row, with its gradient.

    Let p be the teacher's and q the student's distribution of a row, D(p, q) the divergence, y the label, T the
    temperature, lambda the hard weight and w the row weight::

        row loss = w * ((1 - lambda) * D(p, q) * (T**2 if temperature_squared else 1)
                        + lambda * -log softmax(student)[y])

    "mean" is the sum of the row losses over the number of kept rows (or over `normalizer`). The loss neither reads nor
    counts the other rows, which may hold anything. Without kept rows the loss is 0, with zero gradients.

    Args:
        student: logits [..., V], unnormalised; fp32, bf16, fp16 or fp64. Any leading dimensions; the last dimension has
            stride 1. Slices such as ``logits[:, :-1]`` need no copy. Gets the gradient. Or a `LinearLogits`: its hidden
            states, weight and bias get gradients, and its logits are never stored. Log-probabilities are logits too, on
            either side: pass them without exp(), and pass probabilities as log(). The student's gradient is then still
            that of logits, through this call's softmax: q - p for kl at T = 1, where `F.kl_div` gives the
            log-probabilities -p. If a log_softmax made them, its input gets the same gradient from both.
        teacher: logits [..., V] of the same leading shape, or a `LinearLogits`; the dtype may differ. Or a
            `SparseLogProbs` of that leading shape: the top k of a teacher, or samples. Must not require grad.
        divergence: a name of the catalogue (kl, reverse_kl, mixed_kl, js, skew_kl, skew_reverse_kl, tv, hellinger,
            alpha, chi_square) or a `Divergence` with its parameter.
        temperature: T > 0, a number, a 0-d tensor or one per row. Divides both sides' logits, but not the logits of the
            label term.
        temperature_squared: multiplies the divergence by T**2, which keeps the gradient's scale as T grows
            (Hinton et al. 2015). False: the divergence as it is; its gradient shrinks as 1/T.
        mask: bool, leading shape; the loss drops rows that are False. Row t predicts token t + 1: `next_token_mask`
            shifts a mask of tokens.
        row_weight: real, leading shape; multiplies a row's loss and does not change the count. The loss skips a row of
            weight 0 like a masked row, but counts it.
        labels: int64, leading shape; the caller shifts them (`next_token_labels`). The loss drops rows labelled
            `ignore_index`, even if hard_weight is 0.
        ignore_index: the label of dropped rows.
        hard_weight: lambda in [0, 1], a number, a 0-d tensor or one per row; needs labels.
        loss_cap: c > 0, a number, a 0-d tensor or one per row. A row loss counts as w * min(L, c); L is the whole
            factor of w above. A row with L > c has no gradient. NaN stays NaN. Statistics are not capped. The tail
            "truncate" of a `SparseLogProbs` does not take it. None: no cap.
        reduction: "mean", "sum" or "none" (row losses in the leading shape, 0 for dropped rows).
        normalizer: with "mean" only, replaces the count of kept rows: a number or a tensor of one element, of any
            shape, dtype and device. Without it, "mean" is local to this call and rank. `global_normalizer` makes the
            one for several ranks and for gradient accumulation; README.md has the one of each trainer. Use
            reduction="sum" if the trainer divides (Megatron). For a mean of sequence means pass ``row_weight = 1 /
            length`` of the row's sequence and ``normalizer = sequences``. A number 0 raises on a CPU if a row is kept;
            the value in a tensor is not checked.
        vocab_size: the number of classes that count. Columns past it are padding in either tensor, and have gradient 0.
            The two widths may differ with vocab_size; without it, different widths raise.
        statistics: names of row statistics, computed by the same sweeps: detached, in the leading shape, 0 for dropped
            rows. In the loss's dtype: divergence (D alone), cross_entropy (of the label, at temperature 1), tv,
            student_entropy, teacher_entropy, student_max_log_prob, teacher_max_log_prob, student_label_log_prob,
            teacher_label_log_prob, student_lse, teacher_lse (log-sum-exp of logits / T), kept. All but cross_entropy
            are at temperature T. kept is 1 for each row that "mean" counts, so its sum is the number of kept rows: mask
            and labels drop rows, and so does a `SparseLogProbs` without entries in the row (not under "bucket"). In
            int64: student_top1, teacher_top1 (the smallest index among equals). With a `SparseLogProbs`, the student's
            statistics cover all classes. tv and teacher_entropy cover the compared distributions (under "bucket" the
            entries and one more class). teacher_top1 and teacher_max_log_prob cover the entries. teacher_label_log_prob
            is the tail's whole log-probability if no entry is the label. teacher_lse is the log of the teacher's mass.
            "uniform" has the statistics of the whole teacher that it represents.
        gradient: "forward" computes the gradient together with the loss, and keeps one tensor of the student's shape;
            "backward" keeps only row sums and the inputs, and sweeps again in backward. "auto" is "backward" for
            reduction="none", and if a gradient is in fp16 (whose small gradients would become 0 before a loss scaler
            sees them): that of a tensor that requires grad, or of the logits of a head; else "forward". A call without
            grad computes no gradient. "forward" rounds the gradient to the student's dtype a second time if a factor
            multiplies the loss before backward. With a `LinearLogits`, "forward" computes all gradients together with
            the loss; "backward" keeps the inputs and repeats the products, which reduction="none" needs for a student's
            head.
        chunk_rows: for `LinearLogits`: the number of rows whose logits exist at a time. None: as many as `chunk_budget`
            holds.
        compact_rows: for `LinearLogits`: whether the products leave out dropped rows. On a GPU that takes a
            synchronisation to count the rows. None: True on a CPU, else False.
        logits_dtype: for `LinearLogits`: torch.float32 makes fp32 logits from 16-bit hidden states and weights. Outside
            autocast hidden states and weight may then have different dtypes, fp64 excepted: their products are in fp32,
            and each gradient has its own tensor's dtype. None: the dtype of the factors, to which a model rounds its
            own logits too. Rounding the logits then causes most of the gradient's error; fp32 costs twice the memory
            per row, and on a CPU several times the time.
        backend: "auto" or one of "cpu" (C++), "cuda" (CUDA C++, NVIDIA GPUs), "triton" (GPUs), "reference" (plain
            PyTorch, twice differentiable).

    Returns:
        The loss in fp32 (fp64 if a side is fp64), or a `LossOutput` if `statistics` names any. The gradient has the
        student's dtype (for a head, the dtype of each tensor); between logits and gradient all arithmetic is fp32
        (fp64). In fp32, the error of a row's loss is at most 1e-6 of the loss plus 4 units in the last place of its
        log-sum-exp. `Divergence.magnification` multiplies the latter; it is large for alpha near 0 and 1. A small
        divergence of stored logits, and one at a temperature of 16 or more, is off by about 3e-6 of itself, and its
        gradient by as much of the row's largest element, before rounding to the student's dtype; docs/architecture.md
        ("Numbers") has the exceptions. Such a row is swept a second time: on a CPU it takes two to four and a half
        times as long, against a `SparseLogProbs` twice as long.
        The terms of a steep divergence (`Divergence.is_steep`: alpha outside (0, 1), chi_square) are exponentials of
        the log-ratio: their rounding is relative to the loss, and they overflow in fp32 before they do in fp64.

    Infinite logits: -inf is probability 0, and 0 log 0 = 0. A class that is -inf on both sides contributes nothing. A
    class that is -inf for the teacher only, with student mass: reverse_kl, mixed_kl (weight < 1) and alpha (alpha < 0)
    are +inf, and the row's gradient is NaN. A class that is -inf for the student only, with teacher mass: kl and
    mixed_kl (weight > 0) are +inf with the finite gradient of their formula; alpha (alpha > 1) and chi_square are +inf
    with a NaN gradient. All other divergences are finite there. NaN, +inf, or a row of -inf alone make that row's loss
    and gradient NaN, and no other row's. The kernels drop a divergence of weight 0 (hard_weight = 1), whatever its
    value is.

    Raises:
        TypeError, ValueError: for arguments that do not fit. The message says what was expected and what came. Labels
            out of range, temperatures and loss caps <= 0, hard weights outside [0, 1] in a tensor, and bad entries of a
            `SparseLogProbs`, raise on a CPU. On a GPU such a value makes its row NaN, unless `kdkernels.checks(True)`
            asks for the synchronisation.
        RuntimeError: if the requested backend cannot serve the call, with the reason; in backward, for second
            derivatives outside backend="reference"; under torch.func's transforms outside backend="reference"; under
            forward-mode AD with every backend.

    Sources of the divergences: `kdkernels.divergences.CATALOGUE`.
    """
    check_keywords(fused_divergence, unknown)
    if not isinstance(divergence, Divergence):
        divergence = Divergence(divergence)
    vocab_size = options.check_logits(student, teacher, vocab_size)
    options.check_choice("gradient", gradient, options.GRADIENTS)
    options.check_statistics(statistics, labels)
    given = options.GivenRowOptions(
        temperature,
        temperature_squared,
        mask,
        row_weight,
        labels,
        ignore_index,
        hard_weight,
        reduction,
        normalizer,
        loss_cap,
    )
    rows = options.resolve(student, teacher, given)
    heads = head_options.HeadOptions(chunk_rows, compact_rows, logits_dtype)
    chunking = head_options.resolve_chunking(heads, student=student, teacher=teacher)
    if isinstance(teacher, SparseLogProbs):
        options.check_tail(divergence, teacher, rows)
        if teacher.drawn and not divergence.is_linear_in_teacher and not torch.compiler.is_compiling():
            _warn_of_draws(divergence.name)
        chunking = chunking or head_options.whole_rows(student.device)
    backend = backends.select(backend, student, teacher)
    # A divergence without a parameter is given a number that it does not read.
    if divergence.parameter is None and not isinstance(temperature, Tensor):
        parameters = rows.temperature
    else:
        parameter = 1.0 if divergence.parameter is None else divergence.parameter
        parameters = options.number(parameter, student.device, rows.row_scale.dtype)

    loss_terms = (rows, divergence.name, parameters, vocab_size, any(name != "kept" for name in statistics))
    if chunking is None:
        family, dtypes = ROWS, [student.dtype]
        problem = Rows(*options.as_outer_inner(student, teacher), *loss_terms)
    else:
        sources = _sources(student, teacher, chunking, rows.row_scale.dtype)
        family, dtypes = CHUNKED_ROWS, head_options.gradient_dtypes(sources[0], chunking)
        problem = ChunkedRows(*sources, *loss_terms, chunking)
    if gradient == "forward" and reduction == "none" and isinstance(student, LinearLogits):
        raise ValueError(
            "gradient='forward' computes one gradient of the weight, but reduction='none' needs to scale it for each "
            "row; expected gradient='backward' or 'auto'"
        )
    mode = options.gradient_mode(gradient, reduction, dtypes)
    loss, row_statistics, top1 = run(family, problem, backend, mode, reduce=reduction != "none")

    leading = student.shape[:-1]
    loss = loss.reshape(leading) if reduction == "none" else loss
    if not statistics:
        return loss
    found = {name: _statistic(name, row_statistics, top1, leading) for name in statistics if name != "kept"}
    if "kept" in statistics:
        found["kept"] = options.kept_statistic(given, teacher, loss)
    return LossOutput(loss, {name: found[name] for name in statistics})


_KEYWORDS = frozenset(DivergenceOptions.__annotations__)


@shows_keywords(fused_divergence)
def fused_kl(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogProbs,
    **options: Unpack[DivergenceOptions],
) -> Tensor | LossOutput:
    """KL(p‖q) = Σ p log(p/q), p = softmax(teacher / T), q = softmax(student / T): Hinton's distillation loss.

    The gradient with respect to the student's logits is (q − p) / T (times T**2 with temperature_squared=True).
    `fused_divergence` documents the options, shapes, returned values and errors. Source: arXiv:1503.02531.
    """
    check_keywords(fused_kl, options, _KEYWORDS)
    return fused_divergence(student, teacher, "kl", **options)


@shows_keywords(fused_divergence)
def fused_js(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | SparseLogProbs,
    *,
    beta: float = 0.5,
    **options: Unpack[DivergenceOptions],
) -> Tensor | LossOutput:
    """Generalised Jensen-Shannon divergence β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q (GKD, arXiv:2306.13649, Eq. 1).

    p is the teacher's and q the student's distribution. 0 < beta < 1: at 0 and 1 the divergence is 0 everywhere, so
    these values raise. A trainer whose beta may be 0 or 1 passes `Divergence.gkd(beta)` to `fused_divergence`: kl at 0,
    reverse_kl at 1. `fused_divergence` documents the options, shapes, returned values and errors.
    """
    check_keywords(fused_js, options, _KEYWORDS)
    return fused_divergence(student, teacher, Divergence("js", beta=beta), **options)


@functools.cache  # it warns once for each divergence
def _warn_of_draws(name: str):
    callers.warn(
        f"the teacher's entries were drawn at random, which biases {name}: its gradient is not linear in the teacher; "
        "kl is unbiased, and topk_log_probs makes a teacher without draws",
    )


def _sources(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | SparseLogProbs, chunking: Chunking, dtype
) -> tuple[LogitsSource, LogitsSource | None, Sparse | None]:
    """The student's logits, and the teacher's logits or entries, as the chunk loop takes them."""
    student = head_options.source_of(student, chunking)
    if not isinstance(teacher, SparseLogProbs):
        teacher = head_options.source_of(teacher, chunking)
        data = options.as_outer_inner(student.data, teacher.data)
        return student._replace(data=data[0]), teacher._replace(data=data[1]), None
    entries = teacher.shape[-1]
    tail_log_prob = None if teacher.tail_log_prob is None else teacher.tail_log_prob.reshape(-1)
    source_temperature = options.number(teacher.source_temperature, teacher.device, dtype)
    sparse = Sparse(
        teacher.log_probs.reshape(-1, entries),
        teacher.indices.reshape(-1, entries),
        tail_log_prob,
        source_temperature,
        teacher.tail,
    )
    return student._replace(data=options.as_outer_inner(student.data)[0]), None, sparse


def _statistic(name: str, row_statistics: Tensor, top1: Tensor, leading: torch.Size) -> Tensor:
    if name in ROW_STATISTICS:
        return row_statistics[ROW_STATISTICS.index(name)].reshape(leading)
    return top1[ROW_TOP1.index(name)].reshape(leading)
