"""The calls whose results same_bits.py hashes: targets, inputs, and a function of each kind of call.

A call draws its inputs, and returns the tensors that are hashed. It uses public functions alone.
"""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

import kdkernels
from kdkernels import LinearLogits, LossOutput, SparseLogProbs

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = {
    "fp32": (FP32, FP32), "bf16": (BF16, BF16), "fp16": (FP16, FP16), "fp32,bf16": (FP32, BF16),
    "bf16,fp32": (BF16, FP32), "fp64": (FP64, FP64), "bf16,fp64": (BF16, FP64),
}  # fmt: skip
STATISTICS = (
    "divergence", "cross_entropy", "tv", "student_entropy", "teacher_entropy", "student_max_log_prob",
    "teacher_max_log_prob", "student_label_log_prob", "teacher_label_log_prob", "student_lse", "teacher_lse",
    "student_top1", "teacher_top1",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A backend, and the sizes that suit its speed."""

    backend: str
    chip: str | None = None
    fp64: bool = False
    thorough: bool = True
    vocab: int = 331
    leading: tuple[int, ...] = (2, 3)
    transport: bool = True

    def dtypes(self) -> list[str]:
        return [name for name in DTYPES if self.fp64 or "fp64" not in name]

    def crossed(self, *axes) -> list[tuple]:
        """All combinations; of a target that is not thorough so few that each value of each axis occurs."""
        axes = [list(axis) for axis in axes]
        if self.thorough:
            return list(itertools.product(*axes))
        longest = max(map(len, axes))
        return [tuple(axis[(i + i // len(axis)) % len(axis)] for axis in axes) for i in range(longest)]


TARGETS = {
    "reference": Target("reference", fp64=True),
    "cpu": Target("cpu", fp64=True),
    # Clusters, which hold all of a row: staged, or halves where both sides have one dtype of 16 bits.
    "cuda-small": Target("cuda", "small", transport=False),
    # Rows that no cluster holds.
    "cuda-streaming": Target("cuda", "streaming", transport=False),
    "cuda-wide": Target("cuda", "wide"),
    # No clusters.
    "cuda-a100": Target("cuda", "a100"),
    "triton": Target("triton", thorough=False, vocab=129, leading=(3,)),
}


class Draw:
    """Tensors out of a generator that the name of the case seeds: a case does not depend on the others that run."""

    def __init__(self, name: str):
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape: int, dtype=FP32, scale: float = 1.0):
        return (scale * torch.randn(*shape, generator=self.generator, dtype=FP64)).to(dtype)

    def uniform(self, *shape: int, dtype=FP32):
        return torch.rand(*shape, generator=self.generator, dtype=FP64).to(dtype)

    def classes(self, high: int, *shape: int):
        return torch.randint(high, shape, generator=self.generator)

    def chosen(self, share: float, *shape: int):
        return self.uniform(*shape) < share


# ---- options of rows: a function draws a tensor of the leading shape


def mask(draw: Draw, leading, vocab: int):
    return draw.chosen(0.7, *leading)


def labels(draw: Draw, leading, vocab: int):
    ignored = draw.chosen(0.2, *leading)
    return torch.where(ignored, -100, draw.classes(vocab, *leading))


def per_row(low: float, high: float) -> Callable:
    return lambda draw, leading, vocab: low + (high - low) * draw.uniform(*leading)


def weights(draw: Draw, leading, vocab: int):
    return torch.where(draw.chosen(0.3, *leading), 0, draw.uniform(*leading))


ROW_OPTIONS = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "upstream": {"upstream": 1.7},
    "temperature": {"temperature": 2.5},
    "temperature-0d": {"temperature": torch.tensor(0.7)},
    "temperature-row": {"temperature": per_row(0.5, 3)},
    "squared": {"temperature": 2.5, "temperature_squared": True},
    "squared-row": {"temperature": per_row(0.5, 3), "temperature_squared": True},
    "mask": {"mask": mask},
    "mask-none": {"mask": mask, "reduction": "none"},
    "mask-of-all": {"mask": lambda draw, leading, vocab: torch.zeros(leading, dtype=torch.bool)},
    "weight": {"row_weight": weights},
    "normalizer": {"row_weight": weights, "normalizer": 7},
    "normalizer-tensor": {"mask": mask, "normalizer": torch.tensor([5.0])},
    "labels": {"labels": labels},
    "hard": {"labels": labels, "hard_weight": 0.3},
    "hard-0d": {"labels": labels, "hard_weight": torch.tensor(0.6)},
    "hard-row": {"labels": labels, "hard_weight": per_row(0, 1), "reduction": "none"},
    "hard-1": {"labels": labels, "hard_weight": 1.0},
    "hard-squared": {"labels": labels, "hard_weight": 0.3, "temperature": 3.0, "temperature_squared": True},
    "ignore-index": {"labels": lambda draw, leading, vocab: draw.classes(3, *leading), "ignore_index": 1},
    "all": {
        "mask": mask, "row_weight": weights, "labels": labels, "hard_weight": per_row(0, 1), "normalizer": 3.5,
        "temperature": per_row(0.5, 3), "temperature_squared": True, "upstream": -0.3,
    },
    "cap": {"loss_cap": 0.9},
    "cap-row": {"loss_cap": per_row(0.1, 3), "labels": labels, "hard_weight": 0.3, "reduction": "none"},
}  # fmt: skip


# ---- values of rows: what is written into the logits


def infinite(student, teacher):
    for x, start in ((student, 1), (teacher, 2)):
        x[..., start::5] = -torch.inf
    student.view(-1, student.shape[-1])[-1] = -torch.inf


def infinite_teacher(student, teacher):
    teacher[..., 2::5] = -torch.inf


def nan_rows(student, teacher):
    student.view(-1, student.shape[-1])[0, 3] = torch.nan
    teacher.view(-1, teacher.shape[-1])[1, 4] = torch.inf


def ties(student, teacher):
    for x in (student, teacher):
        x.copy_(x.round().clamp(-2, 2))


def equal(student, teacher):
    teacher[..., : student.shape[-1]] = student[..., : teacher.shape[-1]]


VALUES = {f.__name__: f for f in (infinite, infinite_teacher, nan_rows, ties, equal)} | {
    "large": lambda student, teacher: [x.mul_(40).add_(300) for x in (student, teacher)]
}
# The leading shape, and the view of the logits that the loss takes.
VIEWS = {
    "slice": ((2, 4), lambda x: x[:, :-1]),
    "unaligned": ((5,), lambda x: x[:, 3:-2]),
    "transposed": ((3, 2), lambda x: x.transpose(0, 1)),
    "permuted": ((2, 3, 2, 2), lambda x: x.permute(2, 0, 3, 1, 4)),
    "every-other": ((6,), lambda x: x[::2]),
    "expanded": ((1,), lambda x: x.expand(3, -1)),
    "one-row": ((), lambda x: x),
    "no-rows": ((0, 3), lambda x: x),
}


# ---- the calls: each returns the tensors that are hashed


def outcome(found, leaves, upstream: float = 1.0) -> list:
    """The loss, its statistics, and the gradients of the leaves."""
    loss, statistics = (found.loss, found.statistics) if isinstance(found, LossOutput) else (found, {})
    return [loss, *(statistics[name] for name in statistics), *gradients(loss, leaves, upstream)]


def gradients(value, leaves, upstream: float = 1.0) -> tuple:
    if not leaves:
        return ()
    factor = (
        upstream * torch.arange(1, value.numel() + 1, dtype=value.dtype).view(value.shape) if value.dim() else upstream
    )
    return torch.autograd.grad((value * factor).sum(), leaves)


def drawn(draw: Draw, options: dict, leading, vocab: int) -> dict:
    return {name: x(draw, leading, vocab) if callable(x) else x for name, x in options.items()}


def dense(draw, target, loss=kdkernels.fused_divergence, dtypes="fp32", leading=None, classes=None, padding=None,
          write=None, view=None, compiler=None, upstream=1.0, wanted=True, **options) -> list:  # fmt: skip
    """A loss of two tensors of logits. `classes` and `padding` are of both sides; padding is NaN."""
    leading = target.leading if leading is None else leading
    classes = classes or (target.vocab, target.vocab)
    sides = [draw.normal(*leading, n, dtype=x, scale=3) for n, x in zip(classes, DTYPES[dtypes], strict=True)]
    if write:
        write(*sides)
    if padding:
        sides = [torch.nn.functional.pad(x, (0, n), value=torch.nan) for x, n in zip(sides, padding, strict=True)]
    student, teacher = sides[0].requires_grad_(wanted), sides[1]
    taken = (view(student), view(teacher)) if view else (student, teacher)
    options = drawn(draw, options, taken[0].shape[:-1], classes[0])
    if compiler:
        torch.compiler.reset()
        loss = torch.compile(loss, fullgraph=True, backend=compiler)
    return outcome(loss(*taken, backend=target.backend, **options), [student] if wanted else [], upstream)


def sparse_teacher(draw, leading, vocab, tail, entries=6, dtype=FP32, index=torch.int32, given=False, padded=False,
                   repeated=False, source=1.0) -> SparseLogProbs:  # fmt: skip
    """Entries of a teacher; `given` says whether the probability of the others is."""
    whole = draw.normal(*leading, vocab, dtype=FP64, scale=2).log_softmax(-1)
    log_probs, indices = whole.topk(min(entries, vocab), dim=-1)
    others = whole.scatter(-1, indices, -torch.inf)
    if padded:
        padding = torch.zeros_like(indices, dtype=torch.bool)
        padding[..., -1] = padding[..., 1] = True
        padding.view(-1, entries)[0] = True
        others = torch.where(whole.new_zeros(whole.shape).scatter(-1, indices, padding.double()) > 0, whole, others)
        indices[..., -1] = -1
        indices.view(-1, entries)[0] = -1
        log_probs[..., 1] = -torch.inf
    others = others.logsumexp(-1).to(FP32)
    indices, log_probs = indices.to(index), log_probs.to(dtype)
    if repeated:
        indices[..., 2] = indices[..., 0]
    return SparseLogProbs(
        indices, log_probs, tail=tail, tail_log_prob=others if given else None, source_temperature=source
    )


def head(draw, leading, vocab, dtype=FP32, bias=False, width=24, wanted=(), **options) -> tuple:
    """A head, and its tensors that get a gradient."""
    parts = {"hidden": draw.normal(*leading, width, dtype=dtype), "weight": draw.normal(vocab, width, dtype=dtype)}
    if bias:
        parts["bias"] = draw.normal(vocab, dtype=dtype)
    leaves = [x.requires_grad_() for name, x in parts.items() if name in wanted]
    return LinearLogits(**parts, **options), leaves


def chunked(draw, target, student="head", teacher="head", dtypes="fp32", parts=None, sparse=None, budget=2**28,
            autocast=False, wanted=("hidden", "weight", "bias"), upstream=1.0, loss=kdkernels.fused_divergence,
            leading=None, vocab=None, **options) -> list:  # fmt: skip
    """A loss of which a side is a head (of `parts`), or the teacher sparse. Rows are made within the budget."""
    leading, vocab = target.leading if leading is None else leading, vocab or target.vocab
    sides, leaves = [], []
    for kind, dtype, own in ((student, DTYPES[dtypes][0], wanted), (teacher, DTYPES[dtypes][1], ())):
        if kind == "head":
            side, its = head(draw, leading, vocab, dtype, wanted=own, **(parts or {}))
        elif kind == "sparse":
            side, its = sparse_teacher(draw, leading, vocab, **sparse), []
        else:
            side = draw.normal(*leading, vocab, dtype=dtype, scale=3).requires_grad_(bool(own))
            its = [side] if own else []
        sides.append(side)
        leaves += its
    options = drawn(draw, options, leading, vocab)
    with kdkernels.chunk_budget(budget), torch.autocast("cpu", BF16, enabled=autocast):
        found = loss(*sides, backend=target.backend, **options)
    return outcome(found, leaves, upstream)


def sinkhorn(draw, target, n=7, m=5, dtype=FP32, masses=True, massless=False, forbidden=False, wanted=True,
             **options) -> list:  # fmt: skip
    """Two problems: the value and all else that is found, then the derivatives."""
    cost = 0.5 + draw.uniform(2, n, m, dtype=dtype)
    if forbidden:
        banned = draw.chosen(0.3, 2, n, m)
        banned[:, 0, :] = banned[:, :, 0] = False
        cost[banned] = torch.inf
    a, b = (0.2 + draw.uniform(2, size) for size in (n, m))
    if massless:
        a[:, 1:3], b[:, -2:] = 0, 0
    given = [x / x.sum(-1, keepdim=True) for x in (a, b)] if masses else []
    leaves = [x.requires_grad_() for x in (cost, *given)] if wanted else []
    found = kdkernels.fused_sinkhorn(
        cost, *given, backend=target.backend, **{"epsilon": 0.1, "iterations": 5, **options}
    )
    others = (found.f, found.g, found.error, found.iterations, found.converged, found.plan)
    return [found.value, *others, *gradients(found.value, leaves)]


def sinkhorn_divergence(draw, target, dtype=FP32, **options) -> list:
    x, y = draw.normal(2, 5, 3, dtype=dtype).requires_grad_(), draw.normal(2, 4, 3, dtype=dtype)
    costs = [(p[:, :, None] - q[:, None]).square().sum(-1) for p, q in ((x, y), (x, x), (y, y))]
    options = {"epsilon": 0.5, "iterations": 6, **options}
    found = kdkernels.fused_sinkhorn_divergence(*costs, backend=target.backend, **options)
    return [found, *gradients(found, [x])]


def extracted(draw, target, function=kdkernels.topk_log_probs, dtype=FP32, of_head=None, write=None, seed=None,
              budget=2**28, vocab=None, padding=0, **options) -> list:  # fmt: skip
    """A sparse teacher out of logits, or out of a head."""
    vocab, leading = vocab or target.vocab, target.leading
    if of_head is None:
        logits = draw.normal(*leading, vocab, dtype=dtype, scale=3)
        if write:
            write(logits, logits.clone())
        logits = torch.nn.functional.pad(logits, (0, padding), value=torch.nan)
    else:
        logits, _ = head(draw, leading, vocab, dtype, **of_head)
    options = drawn(draw, options, leading, vocab)
    if function is kdkernels.topk_log_probs:
        options["backend"] = target.backend
    else:
        options["generator"] = torch.Generator().manual_seed(seed)
    with kdkernels.chunk_budget(budget):
        found = function(logits, **options)
    return [found.indices, found.log_probs, found.tail_log_prob, torch.tensor(found.source_temperature, dtype=FP64)]
