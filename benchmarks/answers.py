"""Are the answers right? Loss and gradient of every backend against fp64, before anything is timed.

The truth is the reference backend on the same logits in fp64. A backend passes when its error is at most that of eager
PyTorch on the same tensors plus TOLERANCE, and for the loss what `cancellation` says. Errors are the largest over the
rows (loss) or elements (gradient), relative to the largest row or element. The reference in a lower precision is plain
PyTorch too, and TRL a peer: both are shown and not judged. A backend that raises is wrong.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from contenders import CATALOGUE, Loss, eager, kdkernels_loss, reason, trl_loss

# A GPU sums eager PyTorch's terms in trees, so that little of what is allowed comes from there, and its exponential is
# the hardware's: good to some 1e-6 at 15 nats below the maximum.
TOLERANCE = {"cpu": 2e-6, "cuda": 1e-5}
TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True)
class Answer:
    divergence: str
    dtype: str
    vocabulary: int
    contender: str
    loss_error: float
    gradient_error: float
    allowed: tuple[float, float] | None  # (loss, gradient); None for a contender that is only shown
    raised: str = ""

    @property
    def wrong(self) -> bool:
        if self.allowed is None:
            return False
        return self.loss_error > self.allowed[0] or self.gradient_error > self.allowed[1]

    def cell(self) -> str:
        return f"{self.loss_error:.1e} / {self.gradient_error:.1e}" + " WRONG" * self.wrong

    def why_wrong(self) -> str:
        """For an answer that is: what came and what was allowed."""
        allowed = "{:.1e} / {:.1e}".format(*self.allowed)
        came = self.raised or f"errors {self.loss_error:.1e} / {self.gradient_error:.1e}, allowed {allowed}"
        return f"{self.contender} {self.divergence} {self.dtype} V = {self.vocabulary:,}: {came}"


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    error = ((value.double() - truth).abs().max() / truth.abs().max()).item()
    return math.inf if math.isnan(error) else error


def gradient(loss: Loss, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    leaf = student.detach().requires_grad_()
    loss(leaf, teacher).backward()
    return leaf.grad


def undecided(divergence: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Where rounding decides the gradient: tv's jumps at p = q."""
    if divergence != "tv":
        return torch.zeros((), dtype=torch.bool, device=student.device)
    log_ratio = (student / temperature).log_softmax(-1) - (teacher / temperature).log_softmax(-1)
    return log_ratio.abs() < 1e-5


def cancellation(student: torch.Tensor, teacher: torch.Tensor, row_truth: torch.Tensor) -> float:
    """What fp32 log-sum-exps leave of a loss that is small beside them: 4 units in the last place of the largest."""
    largest = max(x.logsumexp(-1).abs().max().item() for x in (student, teacher))
    return 4 * torch.finfo(torch.float32).eps * largest / row_truth.abs().max().item()


def errors_of(row_losses: Loss, mean_loss: Loss, student, teacher, truth) -> tuple[float, float]:
    row_truth, gradient_truth, left_out = truth
    with torch.no_grad():
        rows = row_losses(student, teacher)
    found = torch.where(left_out, gradient_truth, gradient(mean_loss, student, teacher).double())
    return relative_error(rows, row_truth), relative_error(found, gradient_truth)


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
    wide = student.double(), teacher.double()
    worst: dict[str, tuple[float, float]] = {}
    raised: dict[str, str] = {}
    cancelled = 0.0
    for temperature in TEMPERATURES:
        exact = partial(kdkernels_loss, divergence, "reference", temperature=temperature)
        truth = (
            exact(reduction="none")(*wide),
            gradient(exact(), *wide),
            undecided(divergence, *wide, temperature),
        )
        cancelled = max(cancelled, cancellation(*wide, truth[0]))
        for name, pair in contenders_at(divergence, temperature, backends, with_trl).items():
            try:
                errors = errors_of(*pair, student, teacher, truth)
            except Exception as error:
                if name == "eager":  # without it nothing is known of what is allowed
                    raise
                errors, raised[name] = (math.inf, math.inf), reason(error)
            worst[name] = tuple(map(max, errors, worst.get(name, (0.0, 0.0))))

    loss, gradients = (error + TOLERANCE[student.device.type] for error in worst.get("eager", (0.0, 0.0)))
    allowed = loss + cancelled, gradients
    shown_only = ("eager", "kdkernels (reference)", "TRL")
    dtype = str(student.dtype).removeprefix("torch.")
    return [
        Answer(
            divergence,
            dtype,
            student.shape[-1],
            name,
            *errors,
            None if name in shown_only else allowed,
            raised.get(name, ""),
        )
        for name, errors in worst.items()
    ]
