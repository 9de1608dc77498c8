"""Dropped rows may hold anything in every argument: the call equals that without these rows, and is 0 in them."""

import math
from functools import partial

import pytest
import torch
from truth import BACKENDS, device_of

from kdkernels import (
    LinearLogits,
    SparseLogProbs,
    fused_class_ot,
    fused_divergence,
    fused_sinkhorn_kd,
    fused_uld,
    sampled_log_probs,
    topk_log_probs,
)
from kdkernels.losses.options import STATISTICS

CUDA_CHIP = "wide"  # which has room for pairs of rows
ROWS, CLASSES, WIDTH, TEMPERATURE = 7, 12, 3, 2.0
DROPPED = torch.tensor([True, False, True, True, False, False, True])
# Each dropped row holds another value that no kept row may hold.
NUMBERS = torch.tensor([math.nan, math.inf, -math.inf, -3.0])
LABELS = torch.tensor([-7, 2**63 - 1, -(2**63), CLASSES])
INDICES = torch.tensor([2**31 - 1, -(2**31), -2, CLASSES], dtype=torch.int32)
MODES = ({"gradient": "forward"}, {"gradient": "backward", "reduction": "none"})
# The chunk loop runs the same kernels in both modes, and the kernels of a GPU are slow on a CPU.
MODES_OF_CHUNKS = {"cpu": MODES, "reference": MODES, "cuda": MODES[1:], "triton": MODES[1:]}
TAILS = ("bucket", "bucket with its tail", "renormalize", "support", "uniform", "truncate")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor [rows, ...] whose dropped rows hold what no kept row may hold."""
    values = {torch.int64: LABELS, torch.int32: INDICES}.get(x.dtype, NUMBERS)
    x = x.clone()
    x[DROPPED] = values.to(x.device, x.dtype).view(-1, *(1,) * (x.dim() - 1)).expand_as(x[DROPPED])
    return x


class Rows:
    """The arguments of a call that have a value per row, by name; `shared` are those that all rows share.

    The student's tensors get gradients: those whose names begin with "student".
    """

    def __init__(self, shared=None, **per_row):
        self.per_row, self.shared = per_row, shared or {}

    def without_dropped(self) -> dict[str, torch.Tensor]:
        return {name: x[~DROPPED].clone() for name, x in self.per_row.items()} | self._shared()

    def poisoned(self) -> dict[str, torch.Tensor]:
        return {name: poisoned(x) for name, x in self.per_row.items()} | self._shared()

    def _shared(self):
        return {name: x.clone() for name, x in self.shared.items()}


def normal(*shape, backend):
    return torch.randn(*shape, device=device_of(backend))


def row_options(backend, **given):
    """Per-row options. Those of the kept rows have no effect but their own."""
    device = device_of(backend)
    options = {
        "temperature": torch.full((ROWS,), TEMPERATURE),
        "row_weight": 1 + torch.rand(ROWS),
        "hard_weight": torch.rand(ROWS),
        "labels": torch.randint(0, CLASSES, (ROWS,)),
        "loss_cap": 1 + 9 * torch.rand(ROWS),
        **given,
    }
    return {name: x.to(device) for name, x in options.items() if x is not None}


def stored(backend):
    return {name: normal(ROWS, CLASSES, backend=backend) for name in ("student", "teacher")}


def compare(call, rows: Rows):
    """`call` takes the arguments and the mask, and returns the loss (per row, or a number) and the results per row."""
    device = next(iter(rows.per_row.values())).device
    found = []
    for given, mask in ((rows.poisoned(), ~DROPPED), (rows.without_dropped(), ~DROPPED[~DROPPED])):
        leaves = {name: x.requires_grad_() for name, x in given.items() if name.startswith("student")}
        loss, results = call(mask=mask.to(device), **given)
        upstream = torch.ones_like(loss)
        if loss.dim():
            results = {**results, "loss": loss.detach()}
        if loss.shape == (ROWS,):  # the gradient of a dropped row's loss may be anything too
            upstream = poisoned(upstream)
        gradients = torch.autograd.grad(loss, list(leaves.values()), upstream)
        found.append((loss.detach(), results, dict(zip(leaves, gradients, strict=True))))
    (loss, results, gradients), (want, wanted, right) = found
    kept = (~DROPPED).to(device)
    if not loss.dim():
        torch.testing.assert_close(loss, want)
    for name, x in results.items():
        torch.testing.assert_close(x[kept], wanted[name], msg=lambda text, name=name: f"{name}: {text}")
        assert not x[~kept].any(), name
    for name, x in gradients.items():
        per_row = name in rows.per_row
        assert right[name].any(), name
        torch.testing.assert_close(x[kept] if per_row else x, right[name], rtol=1e-5, atol=1e-7, msg=f"of {name}")
        assert not per_row or not x[~kept].any(), name


# ---- one vocabulary


def divergence(name="js", **options):
    """The loss of rows as a call for `compare`, with all statistics."""

    def call(student, teacher, **given):
        out = fused_divergence(student, teacher, name, statistics=STATISTICS, **options, **given)
        return out.loss, out.statistics

    return call


@each_backend
def test_of_logits(backend):
    rows = Rows(**stored(backend), **row_options(backend))
    for mode in MODES:
        compare(divergence(temperature_squared=True, backend=backend, **mode), rows)


@pytest.mark.parametrize(
    "backend, compact_rows",
    [("cpu", None), ("cpu", True), ("cpu", False), ("cuda", True), ("cuda", False), ("triton", False),
     ("reference", None)],
)  # fmt: skip
def test_of_heads(backend, compact_rows):
    per_row = {f"{side}_hidden": normal(ROWS, WIDTH, backend=backend) for side in ("student", "teacher")}
    shared = {f"{side}_weight": normal(CLASSES, WIDTH, backend=backend) for side in ("student", "teacher")}
    shared["student_bias"] = normal(CLASSES, backend=backend)

    def call(mode, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, **given):
        student = LinearLogits(student_hidden, student_weight, student_bias, softcap=3.0)
        loss = divergence(compact_rows=compact_rows, chunk_rows=3, backend=backend, **mode)
        return loss(student, LinearLogits(teacher_hidden, teacher_weight), **given)

    for mode in MODES_OF_CHUNKS[backend]:
        compare(partial(call, mode), Rows(shared, **per_row, **row_options(backend)))


@pytest.mark.parametrize(
    "backend, tail",
    [(backend, tail) for backend in BACKENDS for tail in TAILS if backend != "triton" or tail in ("bucket", "support")],
)
def test_of_sparse_teachers(backend, tail):
    made = topk_log_probs(normal(ROWS, CLASSES, backend=backend), 4, temperature=TEMPERATURE)
    per_row = {"student": normal(ROWS, CLASSES, backend=backend), "indices": made.indices, "log_probs": made.log_probs}
    if tail == "bucket with its tail":
        per_row["tail_log_prob"] = made.tail_log_prob
    options = row_options(backend, **({"loss_cap": None} if tail == "truncate" else {}))

    def call(mode, student, indices, log_probs, tail_log_prob=None, **given):
        teacher = SparseLogProbs(
            indices, log_probs, tail=tail.split()[0], tail_log_prob=tail_log_prob, source_temperature=TEMPERATURE
        )
        return divergence("kl", temperature_squared=True, backend=backend, **mode)(student, teacher, **given)

    for mode in MODES_OF_CHUNKS[backend]:
        compare(partial(call, mode), Rows(**per_row, **options))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("option", ["hard_weight", "temperature"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_option_of_a_dropped_row_stays_out_of_a_truncated_teacher(backend, option, value):
    """The offset of tail="truncate" was the product of a dropped row's options, and 0 times NaN is NaN."""
    teacher = sampled_log_probs(normal(2, CLASSES, backend=backend), 6, exact=2)
    student = normal(2, CLASSES, backend=backend)
    kept = {"hard_weight": 0.5, "temperature": 1.0}
    options = {
        "labels": torch.tensor([1, 2], device=student.device),
        "mask": torch.tensor([True, False], device=student.device),
        "temperature_squared": True,
        "statistics": ("divergence",),
        "backend": backend,
    }
    want = fused_divergence(student, teacher, "kl", **kept, **options)
    kept[option] = torch.tensor([kept[option], value], device=student.device)
    got = fused_divergence(student, teacher, "kl", **kept, **options)
    assert got.loss.isfinite() and got.loss == want.loss
    assert torch.equal(got.statistics["divergence"], want.statistics["divergence"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])  # a kernel sees the same row scale as with a mask
@pytest.mark.parametrize("dropped_by", ["ignored labels", "weights of 0"])
def test_rows_that_labels_or_weights_drop(backend, dropped_by):
    """A row of weight 0 is skipped like a masked row, but counts in a mean."""
    options = row_options(backend, labels=torch.randint(0, CLASSES, (ROWS,)))
    name = "labels" if dropped_by == "ignored labels" else "row_weight"
    keeps = options.pop(name)

    def call(mask, **given):
        given[name] = keeps.clone()
        if mask.shape[0] == ROWS:
            given[name][~mask] = -100 if name == "labels" else 0
        else:
            given[name] = keeps[~DROPPED.to(keeps.device)]
        loss, results = divergence(reduction="sum", backend=backend)(**given)
        return loss, {key: x for key, x in results.items() if key != "kept" or name == "labels"}

    compare(call, Rows(**stored(backend), **options))


# ---- the other losses


@pytest.mark.parametrize("backend, topk", [*((backend, None) for backend in BACKENDS), ("cpu", 4), ("reference", 4)])
def test_of_two_vocabularies(backend, topk):
    options = row_options(backend, loss_cap=None)
    rows = Rows(student=normal(ROWS, CLASSES, backend=backend), teacher=normal(ROWS, 9, backend=backend), **options)

    def call(mode, student, teacher, **given):
        out = fused_uld(
            student, teacher, topk=topk, statistics=("divergence", "error_bound"), temperature_squared=True,
            backend=backend, **mode, **given,
        )  # fmt: skip
        return out.loss, out.statistics

    for mode in MODES_OF_CHUNKS[backend]:
        compare(partial(call, mode), rows)


@pytest.mark.parametrize("backend", ["cpu", "reference"])  # torch's products serve every backend
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_of_transport_between_classes(backend, gradient):
    options = row_options(backend, loss_cap=None, hard_weight=None)
    options["exclude_labels"] = options.pop("labels")
    cost = torch.rand(CLASSES, CLASSES, device=device_of(backend))

    def call(**given):
        return fused_class_ot(
            **given, class_cost=cost, epsilon=0.5, gradient=gradient, reduction="none", backend=backend
        ), {}

    compare(call, Rows(**stored(backend), **options))


@each_backend
@pytest.mark.parametrize("cost", ["l1", "dot"])
def test_of_transport_between_rows(backend, cost):
    """Masked rows lie in the middle of the clouds, and one cloud has masked rows alone."""
    mask = torch.stack([~DROPPED, torch.zeros(ROWS, dtype=torch.bool)]).to(device_of(backend))
    student, teacher = (normal(2, ROWS, CLASSES, backend=backend) for _ in range(2))
    given = [torch.stack([poisoned(x[0]), torch.full_like(x[1], math.nan)]) for x in (student, teacher)]
    given[0].requires_grad_()
    options = {"cost": cost, "iterations": 2, "backend": backend}
    loss = fused_sinkhorn_kd(*given, mask=mask, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss, given[0], torch.tensor([1.0, math.nan], device=mask.device))

    alone = student[0][mask[0]].requires_grad_()
    want = fused_sinkhorn_kd(alone, teacher[0][mask[0]], **options)
    torch.testing.assert_close(loss, torch.stack([want, torch.zeros_like(want)]))
    torch.testing.assert_close(gradient[mask], torch.autograd.grad(want, alone)[0], rtol=1e-5, atol=1e-8)
    assert not gradient[~mask].any()


# ---- sparse teachers


@each_backend
@pytest.mark.parametrize("head", [False, True])
def test_of_extraction(backend, head):
    """Dropped rows become padding, and the entries of the other rows do not depend on them."""
    mask = (~DROPPED).to(device_of(backend))
    data = normal(ROWS, WIDTH if head else CLASSES, backend=backend)
    weight = normal(CLASSES, WIDTH, backend=backend)
    whole, alone = (LinearLogits(x, weight) if head else x for x in (poisoned(data), data[mask]))
    for extract in (
        lambda x, **options: topk_log_probs(x, 4, temperature=TEMPERATURE, backend=backend, **options),
        lambda x, **options: sampled_log_probs(x, 1, exact=CLASSES, backend=backend, **options),
    ):
        got, want = extract(whole, mask=mask), extract(alone)
        assert torch.equal(got.indices[mask], want.indices) and (got.indices[~mask] == -1).all()
        torch.testing.assert_close(got.log_probs[mask], want.log_probs)
        assert got.log_probs[~mask].isneginf().all()
        if got.tail_log_prob is not None:
            torch.testing.assert_close(got.tail_log_prob[mask], want.tail_log_prob)
            assert not got.tail_log_prob[~mask].any()


def test_draws_do_not_depend_on_masked_rows():
    logits = torch.randn(ROWS, CLASSES)
    found = []
    for value in (0.0, math.nan):
        given = torch.where(DROPPED[:, None], value, logits)
        found.append(sampled_log_probs(given, 5, mask=~DROPPED, generator=torch.Generator().manual_seed(3)))
    first, second = found
    assert torch.equal(first.indices, second.indices) and torch.equal(first.log_probs, second.log_probs)
