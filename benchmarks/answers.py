"""Are the answers right? Loss and gradient of every backend against fp64, before anything is timed.

The truth is the reference backend on the same logits in fp64. A backend passes when its error is at most
that of eager PyTorch on the same tensors plus TOLERANCE. Errors are the largest over the rows (loss) or
elements (gradient), relative to the largest row or element. The reference in a lower precision is plain
PyTorch too, and TRL a peer: both are shown and not judged.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from contenders import CATALOGUE, Loss, eager, kdkernels_loss, trl_loss

TOLERANCE = 2e-6
TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True)
class Answer:
    divergence: str
    dtype: str
    contender: str
    loss_error: float
    gradient_error: float
    allowed: tuple[float, float] | None  # (loss, gradient); None for a contender that is only shown

    @property
    def wrong(self) -> bool:
        if self.allowed is None:
            return False
        return self.loss_error > self.allowed[0] or self.gradient_error > self.allowed[1]


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    error = ((value.double() - truth).abs().max() / truth.abs().max()).item()
    return math.inf if math.isnan(error) else error


def gradient(loss: Loss, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    leaf = student.detach().requires_grad_()
    loss(leaf, teacher).backward()
    return leaf.grad


def errors_of(row_losses: Loss, mean_loss: Loss, student, teacher, truth) -> tuple[float, float]:
    with torch.no_grad():
        rows = row_losses(student, teacher)
    return relative_error(rows, truth[0]), relative_error(gradient(mean_loss, student, teacher), truth[1])


def contenders_at(divergence: str, temperature: float, backends: list[str], with_trl: bool):
    """(loss of every row, mean loss) of each contender."""
    pairs: dict[str, tuple[Loss, Loss]] = {}
    if divergence in eager.DIVERGENCES:
        options = dict(CATALOGUE[divergence], name=divergence, temperature=temperature)
        pairs["eager"] = partial(eager.row_divergences, **options), partial(eager.divergence_loss, **options)
    for backend in backends:
        ours = partial(kdkernels_loss, divergence, backend, temperature=temperature)
        pairs[f"kdkernels ({backend})"] = ours(reduction="none"), ours()
    if with_trl:
        elementwise = trl_loss(divergence, temperature=temperature, reduction="none")
        rows = lambda student, teacher: elementwise(student, teacher).float().sum(-1)  # noqa: E731
        pairs["TRL"] = rows, trl_loss(divergence, temperature=temperature)
    return pairs


def check(divergence: str, student, teacher, backends: list[str], with_trl: bool) -> list[Answer]:
    """The worst errors over the temperatures on logits [N, V], of every contender."""
    dtype = str(student.dtype).removeprefix("torch.")
    wide = student.double(), teacher.double()
    worst: dict[str, tuple[float, float]] = {}
    for temperature in TEMPERATURES:
        exact = partial(kdkernels_loss, divergence, "reference", temperature=temperature)
        truth = exact(reduction="none")(*wide), gradient(exact(), *wide)
        for name, pair in contenders_at(divergence, temperature, backends, with_trl).items():
            errors = errors_of(*pair, student, teacher, truth)
            worst[name] = tuple(map(max, errors, worst.get(name, (0.0, 0.0))))

    allowed = tuple(error + TOLERANCE for error in worst.get("eager", (0.0, 0.0)))
    shown_only = ("eager", "kdkernels (reference)", "TRL")
    return [
        Answer(divergence, dtype, name, *errors, None if name in shown_only else allowed)
        for name, errors in worst.items()
    ]
