"""The definition: every divergence and the row loop in plain PyTorch.

Differentiable by autograd (twice), in fp64 too, on any device, with every [rows, vocabulary] temporary that the kernels
exist to avoid. The other backends' slopes are tested against the derivatives that autograd takes of the values here.
"""

import torch
from torch import Tensor

from . import ROW_STATISTICS, ROW_TOP1, bad_rows, bad_values_raise, check_values, compute_dtype
from .uld import mean_of_runs


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x with 0 * log 0 = 0: where the weight is 0 the term, and its derivative, is dropped."""
    return weight * torch.where(weight == 0, 0, x)


def log_mixture(lp: Tensor, lq: Tensor, weight: Tensor) -> Tensor:
    """log(weight * p + (1 - weight) * q)."""
    lp, lq = lp + torch.log(weight), lq + torch.log1p(-weight)
    both = torch.isneginf(lp) & torch.isneginf(lq)  # logaddexp has no derivative there
    mixture = torch.logaddexp(torch.where(both, 0, lp), torch.where(both, 0, lq))
    return torch.where(both, -torch.inf, mixture)


# The table: value(lp, lq, p, q, parameter) of one class, the teacher's and the student's log-probability and their
# exponentials. Free up to c * (p - q), which is used to make every value vanish at p = q.


def kl(lp, lq, p, q, _):
    return weighted(p, lp - lq) - p + q


def reverse_kl(lp, lq, p, q, _):
    return weighted(q, lq - lp) - q + p


def mixed_kl(lp, lq, p, q, weight):
    return weighted(weight * p, lp - lq) + weighted((1 - weight) * q, lq - lp) + (2 * weight - 1) * (q - p)


def js(lp, lq, p, q, beta):
    lm = log_mixture(lp, lq, beta)
    return weighted(beta * p, lp - lm) + weighted((1 - beta) * q, lq - lm)


def skew_kl(lp, lq, p, q, alpha):
    return weighted(p, lp - log_mixture(lp, lq, alpha)) + (1 - alpha) * (q - p)


def skew_reverse_kl(lp, lq, p, q, alpha):
    return weighted(q, lq - log_mixture(lq, lp, alpha)) + (1 - alpha) * (p - q)


def tv(lp, lq, p, q, _):
    difference = p - q  # whose sign is a constant: 0 at 0, and NaN for NaN, where that of abs is 0
    sign = torch.where(difference == 0, 0, difference / difference.abs()).detach()
    return 0.5 * difference * sign


def hellinger(lp, lq, p, q, _):
    return 0.5 * (torch.exp(0.5 * lp) - torch.exp(0.5 * lq)) ** 2


def alpha(lp, lq, p, q, alpha):
    nowhere = torch.isneginf(lp) & torch.isneginf(lq)
    exponent = alpha * torch.where(nowhere, 0, lp) + (1 - alpha) * torch.where(nowhere, 0, lq)
    power = torch.where(nowhere, 0, torch.exp(exponent))
    return (power - alpha * p - (1 - alpha) * q) / (alpha * (alpha - 1))


TABLE = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "mixed_kl": mixed_kl,
    "js": js,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tv": tv,
    "hellinger": hellinger,
    "alpha": alpha,
}


class _WholeRowOrNaN(torch.autograd.Function):
    """Identity whose gradient is NaN in every class of a row where the sum over the row is not finite.

    An infinite slope (reverse_kl where the teacher has no mass) leaves a row without a gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_probs):
        return log_probs.view_as(log_probs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        finite = torch.isfinite(gradient.sum(-1, keepdim=True))
        return torch.where(finite, gradient, torch.nan)


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None,
    row_scale: Tensor, vocab_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """softcap * tanh(scale * (hidden weight^T + bias) / softcap) in `dtype`, of [outer, inner, H]: the definition.

    Of the first `vocab_size` classes; the weights of others may be anything.
    """
    kept = (row_scale != 0).view(hidden.shape[:-1])[..., None]
    hidden = torch.where(kept, hidden.to(dtype), 0)  # a skipped row may hold anything
    weight, bias = (x if x is None else x[:vocab_size].to(dtype) for x in (weight, bias))
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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
    statistics: bool,
):
    """Per-row losses [rows], statistics and top-1 as `ops.rows` returns them."""
    dtype, kept = compute_dtype(student, teacher), row_scale != 0
    bad = _bad_rows(row_scale, labels, temperature, hard_weight, vocab_size)
    s, t = (_kept_logits(x, kept, vocab_size, dtype) for x in (student, teacher))
    student_tempered, teacher_tempered = s / temperature[:, None], t / temperature[:, None]
    lq = _WholeRowOrNaN.apply(torch.log_softmax(student_tempered, -1))
    lp = torch.log_softmax(teacher_tempered, -1)
    p, q = lp.exp(), lq.exp()

    row_divergence = TABLE[divergence](lp, lq, p, q, parameters[0]).sum(-1)
    index = None if labels is None else torch.where(kept & ~bad["labels"], labels, 0)[:, None]
    cross_entropy = _cross_entropy(s, index)
    loss = _row_loss(row_divergence, cross_entropy, row_scale, temperature, hard_weight, temperature_squared, bad)
    if not statistics:
        return loss, None, None

    def label_log_prob(log_probs):
        return log_probs.gather(-1, index)[:, 0] if labels is not None else torch.zeros_like(loss)

    values = {
        "divergence": row_divergence,
        "cross_entropy": cross_entropy,
        "tv": 0.5 * (p - q).abs().sum(-1),
        "student_entropy": -weighted(q, lq).sum(-1),
        "teacher_entropy": -weighted(p, lp).sum(-1),
        "student_max_log_prob": lq.max(-1).values,
        "teacher_max_log_prob": lp.max(-1).values,
        "student_label_log_prob": label_log_prob(lq),
        "teacher_label_log_prob": label_log_prob(lp),
        "student_lse": student_tempered.logsumexp(-1),
        "teacher_lse": teacher_tempered.logsumexp(-1),
    }
    top1 = {"student_top1": s.argmax(-1), "teacher_top1": t.argmax(-1)}
    return loss, *_stacked(values, top1, kept)


def topk_rows(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail_log_prob: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    parameters: Tensor,
    divergence: str,
    vocab_size: int,
    temperature_squared: bool,
    conditional: bool,
    statistics: bool,
):
    """The same against the entries of a sparse teacher (backends/topk.py, csrc/calls/topk.h)."""
    kept = row_scale != 0
    bad = _bad_rows(row_scale, labels, temperature, hard_weight, vocab_size)
    s = _kept_logits(student, kept, vocab_size, row_scale.dtype)
    tempered = _WholeRowOrNaN.apply(s / temperature[:, None])
    lse, lq_of_all = tempered.logsumexp(-1), torch.log_softmax(tempered, -1)

    there, lp = indices < vocab_size, log_probs
    # Of the entries alone where these are all that is compared: the other classes are not read.
    source = tempered if conditional else lq_of_all
    lq = torch.where(there, source.gather(-1, torch.where(there, indices, 0).long()), -torch.inf)
    if conditional:
        lq = torch.where(there, lq - _log_sum_exp(lq)[:, None], -torch.inf)
    else:
        named = torch.zeros(s.shape[0], vocab_size + 1, dtype=torch.bool, device=s.device)
        named = named.scatter(-1, torch.where(there, indices, vocab_size).long(), True)[:, :vocab_size]
        lp = torch.cat([lp, tail_log_prob[:, None]], -1)
        # -inf where no other class has mass, with the derivative of -lse.
        lq = torch.cat([lq, (_log_sum_exp(torch.where(named, -torch.inf, tempered)) - lse)[:, None]], -1)
    p, q = lp.exp(), lq.exp()

    row_divergence = TABLE[divergence](lp, lq, p, q, parameters[0]).sum(-1)
    index = None if labels is None else torch.where(kept & ~bad["labels"], labels, 0)[:, None]
    cross_entropy = _cross_entropy(s, index)
    loss = _row_loss(row_divergence, cross_entropy, row_scale, temperature, hard_weight, temperature_squared, bad)
    if not statistics:
        return loss, None, None

    zero = torch.zeros_like(loss)
    q_of_all, student_label, teacher_label = lq_of_all.exp(), zero, zero
    if labels is not None:
        student_label = lq_of_all.gather(-1, index)[:, 0]
        is_label = there & (indices == index)
        of_entries = torch.where(is_label, log_probs, -torch.inf).amax(-1)
        teacher_label = torch.where(is_label.any(-1), of_entries, tail_log_prob)
    values = {
        "divergence": row_divergence,
        "cross_entropy": cross_entropy,
        "tv": 0.5 * (p - q).abs().sum(-1),
        "student_entropy": -weighted(q_of_all, lq_of_all).sum(-1),
        "teacher_entropy": -weighted(p, lp).sum(-1),
        "student_max_log_prob": lq_of_all.max(-1).values,
        "teacher_max_log_prob": log_probs.max(-1).values,
        "student_label_log_prob": student_label,
        "teacher_label_log_prob": teacher_label,
        "student_lse": lse,
        "teacher_lse": lp.logsumexp(-1),
    }
    teacher_top1 = indices.gather(-1, log_probs.argmax(-1, keepdim=True))[:, 0].long()
    top1 = {"student_top1": s.argmax(-1), "teacher_top1": torch.where(there.any(-1), teacher_top1, 0)}
    return loss, *_stacked(values, top1, kept)


class _WithSlope(torch.autograd.Function):
    """A loss [rows] whose gradient with respect to a [rows, V] is said to be `slope`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, loss, slope):
        return loss.view_as(loss)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "second derivatives: gradient='implicit' and 'envelope' have first derivatives only; "
                "'unrolled' is twice differentiable"
            )
        return grad_loss[:, None] * ctx.saved_tensors[0], None, None


def class_ot(
    student: Tensor,
    teacher: Tensor,
    class_cost: Tensor,
    row_scale: Tensor,
    exclude_labels: Tensor | None,
    temperature: Tensor,
    epsilon: Tensor,
    iterations: int,
    gradient: str,
    dtype: torch.dtype,
) -> Tensor:
    """Losses [rows] of `ops.class_ot`, by its formulas in `dtype`, with the plans [rows, V, V] of all rows.

    "unrolled" is left to autograd; the other gradients with respect to a, the student's distribution, are put in.
    """
    kept = row_scale != 0
    classes = student.shape[-1]
    tempered = torch.where(kept, temperature, 1)[:, None].to(dtype)
    s, t = (_kept_logits(x, kept, classes, dtype) / tempered for x in (student, teacher))
    u = torch.full_like(t, 1 / classes)
    if exclude_labels is not None:
        excluded = exclude_labels[:, None] == torch.arange(classes, device=student.device)
        s, t, u = s.masked_fill(excluded, -torch.inf), t.masked_fill(excluded, -torch.inf), u.masked_fill(excluded, 0)
    a, b = torch.softmax(s, -1), torch.softmax(t, -1)
    cost, epsilon = class_cost.to(dtype), epsilon.to(dtype)
    kernel = torch.exp(-(cost - cost.min()) / epsilon)
    for _ in range(iterations):
        v = b / (u[:, :, None] * kernel).sum(-2)
        row_sums = (kernel * v[:, None, :]).sum(-1)
        u = a / row_sums
    plan = u[:, :, None] * kernel * v[:, None, :]
    loss = (plan * cost).sum((-2, -1))
    if gradient == "envelope":
        loss = _WithSlope.apply(a, loss.detach(), -epsilon * torch.log(row_sums).detach())
    elif gradient == "implicit":
        loss = _WithSlope.apply(a, loss.detach(), _implicit_slope(plan.detach(), cost))
    return torch.where(kept, row_scale * loss, 0)


def _implicit_slope(plan: Tensor, cost: Tensor) -> Tensor:
    """x of [diag(P 1) P; P^T diag(P^T 1)] [x; y] = [(P * M) 1; (P * M)^T 1], up to a constant.

    Rows and columns are divided by the roots of their masses first, so that small ones keep their digits.
    """
    masses = torch.cat([plan.sum(-1), plan.sum(-2)], -1)
    over_roots = torch.where(masses > 0, masses.rsqrt(), 0)
    of_rows, of_columns = torch.diag_embed(plan.sum(-1)), torch.diag_embed(plan.sum(-2))
    system = torch.cat([torch.cat([of_rows, plan], -1), torch.cat([plan.mT, of_columns], -1)], -2)
    system = over_roots[:, :, None] * system * over_roots[:, None, :]
    costs = over_roots * torch.cat([(plan * cost).sum(-1), (plan * cost).sum(-2)], -1)
    inverse = torch.linalg.pinv(system.nan_to_num(0), hermitian=True)  # which raises on NaN
    found = over_roots * (inverse * costs[:, None, :]).sum(-1)
    return found[:, : cost.shape[0]] + 0 * plan.sum((-2, -1))[:, None]


def topk_log_probs(logits: Tensor, row_scale: Tensor, temperature: Tensor, k: int, vocab_size: int):
    """Indices, log-probabilities [rows, k] and the rest's [rows], as `ops.topk_log_probs` returns them."""
    kept = row_scale != 0
    x = _kept_logits(logits, kept, vocab_size, row_scale.dtype)
    log_probs = torch.log_softmax(x / temperature[:, None], -1)
    # Sorted as wholes: topk does not say which of equals comes first.
    values, indices = log_probs.sort(dim=-1, descending=True, stable=True)
    values, rest, indices = values[:, :k], values[:, k:], indices[:, :k]
    tail = rest.logsumexp(-1) if rest.shape[1] else torch.full_like(row_scale, -torch.inf)
    tail = torch.where(torch.isnan(log_probs).any(-1), torch.nan, tail)
    values = torch.where(kept[:, None], values, -torch.inf)
    indices = torch.where(torch.isneginf(values), -1, indices)
    return indices.to(torch.int32), values, torch.where(kept, tail, 0)


def uld(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    temperature: Tensor,
    student_vocab_size: int,
    teacher_vocab_size: int,
    topk: int | None,
):
    """Universal Logit Distillation (csrc/calls/uld.h): losses, divergences and error bounds [rows].

    The loss is linear in the sorted probabilities where no two of them change places; its slopes are the signs of their
    differences, of equal logits the mean.
    """
    dtype, kept = compute_dtype(student, teacher), row_scale != 0
    bad = _bad_rows(row_scale, None, temperature, None, student_vocab_size)
    s = _kept_logits(student, kept, student_vocab_size, dtype)
    t = _kept_logits(teacher, kept, teacher_vocab_size, dtype)
    sorted_logits, order = s.detach().sort(dim=-1, descending=True, stable=True)
    p = torch.softmax(s / temperature[:, None], -1).gather(-1, order)
    q = torch.softmax(t / temperature[:, None], -1).detach().sort(dim=-1, descending=True).values
    ranks = max(student_vocab_size, teacher_vocab_size) if topk is None else topk
    error_bound = p[:, ranks:].detach().sum(-1) + q[:, ranks:].sum(-1)
    p, q, sorted_logits = p[:, :ranks], q[:, :ranks], sorted_logits[:, :ranks]
    p = torch.nn.functional.pad(p, (0, ranks - p.shape[1]))
    q = torch.nn.functional.pad(q, (0, ranks - q.shape[1]))

    difference = (p - q).detach()
    # 0 at 0, and NaN for NaN, where torch.sign has 0.
    sign = torch.where(difference == 0, 0, difference / difference.abs())
    divergence = difference.abs().sum(-1)
    count = sorted_logits.shape[1]
    slopes = p[:, :count] * mean_of_runs(sign[:, :count], sorted_logits)
    # Its value is that of the divergence, its derivative that of the slopes.
    loss = slopes.sum(-1)
    loss = divergence + (loss - loss.detach())
    divergence, error_bound = (torch.where(kept, x, 0) for x in (divergence, error_bound))
    return _row_loss(loss, None, row_scale, temperature, None, False, bad), divergence, error_bound


def _bad_rows(row_scale, labels, temperature, hard_weight, vocab_size) -> dict[str, Tensor]:
    """`bad_rows`; where values are checked, those raise."""
    if bad_values_raise(row_scale.device):
        check_values(row_scale, labels, temperature, hard_weight, vocab_size)
    return bad_rows(row_scale, labels, temperature, hard_weight, vocab_size)


def _kept_logits(x: Tensor, kept: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """[rows, vocab_size]. A skipped row may hold anything: zeros take its place, so that nothing of it reaches a
    gradient."""
    return torch.where(kept[:, None], x[..., :vocab_size].reshape(kept.shape[0], vocab_size).to(dtype), 0)


def _log_sum_exp(x: Tensor) -> Tensor:
    """Over the last dimension, -inf with a gradient of 0 where all is -inf."""
    nothing = torch.isneginf(x).all(-1)
    return torch.where(nothing, -torch.inf, torch.where(nothing[:, None], 0, x).logsumexp(-1))


def _cross_entropy(logits: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return logits.new_zeros(logits.shape[0])
    return -torch.log_softmax(logits, -1).gather(-1, index)[:, 0]


def _row_loss(divergence, cross_entropy, row_scale, temperature, hard_weight, temperature_squared, bad) -> Tensor:
    loss = divergence * temperature**2 if temperature_squared else divergence
    if hard_weight is not None:
        loss = weighted(1 - hard_weight, loss) + weighted(hard_weight, cross_entropy)
    for rows_of_it in bad.values():
        loss = loss * torch.where(rows_of_it, torch.nan, 1)
    return torch.where(row_scale != 0, row_scale * loss, 0)


def _stacked(values: dict[str, Tensor], top1: dict[str, Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.where(kept, torch.stack([values[name] for name in ROW_STATISTICS]), 0).detach(),
        torch.where(kept, torch.stack([top1[name] for name in ROW_TOP1]), 0),
    )
