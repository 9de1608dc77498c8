"""Dense losses: divergences between the rows of student and teacher logits [N, V], their contenders and their truth."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from family import OURS, Errors, Family, Loss, Problem, check, largest_error, reason

import kdkernels
import kdkernels.backends
import kdkernels.ops
from kdkernels.families.options import RowOptions
from kdkernels.families.rows import Rows
from kdkernels.selftest import undecided_signs

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import eager

EAGER, COMPILED, TRL = "eager", "torch.compile", "TRL"
ANSWERS = "answers"
# Every divergence with the parameters at which it is measured: its defaults.
CATALOGUE: dict[str, dict[str, float]] = {
    name: {entry.parameter: entry.default} if entry.parameter else {} for name, entry in kdkernels.CATALOGUE.items()
}
TRL_DIVERGENCES = ("kl", "reverse_kl", "js")
LIGER_DIVERGENCES = ("kl", "js")
SPECULATORS_LOSSES = {
    "kl": "fused_kl_div_loss",
    "reverse_kl": "fused_reverse_kl_div_loss",
    "js": "fused_js_div_loss",
    "tv": "fused_tv_loss",
}
# Packages with fused losses that do other work, so that no comparison is fair.
NOT_COMPARED = {
    "cut-cross-entropy": "it computes a cross-entropy with labels from hidden states, without a teacher's distribution",
    "fla-core": "its fused_kl_div_loss takes hidden states of both sides; the heads' measurement includes it",
}
# A backend may exceed eager PyTorch's error by this much. On a GPU eager PyTorch sums in trees and so has small errors
# itself, and the hardware's exponential is accurate to about 1e-6 at 15 nats below the maximum.
TOLERANCE = {"cpu": 2e-6, "cuda": 1e-5}
TEMPERATURES = (1.0, 2.0)
UNDECIDED = 1e-5  # log-ratios below this may have either sign after rounding


def available_backends(device: str) -> list[str]:
    """The backends that serve tensors on a device. A CPU lists no GPU backend: only an interpreter could run it."""
    probe = torch.zeros(1, 1, device=device)
    names = kdkernels.backends.NAMES if device != "cpu" else ("cpu", "reference")
    return [name for name in names if kdkernels.backends.refuse(name, probe, probe) is None]


def refusals(device: str) -> dict[str, str]:
    """By name of a GPU backend that cannot serve on the device: the reason."""
    probe = torch.zeros(1, 1, device=device)
    reasons = {name: kdkernels.backends.refuse(name, probe, probe) for name in kdkernels.backends.NAMES}
    return {with_backend(name): why for name, why in reasons.items() if name != "cpu" and why}


def automatic_backend(device: str) -> str:
    """The backend that "auto" selects on a device."""
    probe = torch.zeros(1, 1, device=device)
    return kdkernels.backends.select("auto", probe, probe)


def with_backend(backend: str) -> str:
    """The contender's name for kdkernels with one backend."""
    return f"{OURS} ({backend})"


def label(divergence: str) -> str:
    """The divergence with its parameters: `alpha(alpha=0.5)`, `kl`."""
    parameters = ", ".join(f"{key}={value}" for key, value in CATALOGUE[divergence].items())
    return f"{divergence}({parameters})" if parameters else divergence


def kdkernels_loss(divergence: str, backend: str = "auto", **options) -> Loss:
    entry = kdkernels.Divergence(divergence, **CATALOGUE[divergence])
    return lambda student, teacher: kdkernels.fused_divergence(student, teacher, entry, backend=backend, **options)


def eager_loss(divergence: str) -> Loss:
    return partial(eager.divergence_loss, name=divergence, **CATALOGUE[divergence])


def compiled_loss(divergence: str) -> Loss:
    # Without the reset and dynamic=False the guards of one shape and dtype would slow another.
    torch.compiler.reset()
    return torch.compile(eager_loss(divergence), dynamic=False)


def trl_loss(divergence: str, **options) -> Loss:
    """TRL's generalised JSD, in the dtype of the logits: beta 0 is the forward KL, beta 1 the reverse KL."""
    from trl.experimental.gkd import GKDTrainer

    beta = {"kl": 0, "reverse_kl": 1}.get(divergence, CATALOGUE["js"]["beta"])
    # Its default reduction "batchmean" divides 2-d logits by their rows.
    return lambda student, teacher: GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, **options)


def liger_loss(divergence: str) -> Loss:
    """Liger's dense losses take log-probabilities: the two log-softmaxes run before its kernel."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    if divergence == "kl":
        criterion = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        criterion = LigerJSD(beta=CATALOGUE["js"]["beta"])
    return lambda student, teacher: criterion(student.float().log_softmax(-1), teacher.float().log_softmax(-1))


def speculators_loss(divergence: str) -> Loss:
    """A loss for each row of [batch, sequence, vocabulary] logits; its js has the weight 0.5."""
    from speculators.losses import fused

    loss = getattr(fused, SPECULATORS_LOSSES[divergence])
    return lambda student, teacher: loss(student[None], teacher[None]).mean()


def operator(divergence: str, backend: str, student: torch.Tensor, teacher: torch.Tensor) -> Callable[[], object]:
    """The operator of a loss with its gradient: the kernels, without the work of the public function."""
    count, vocabulary = student.shape
    ones = torch.ones(1, device=student.device)
    row_scale = torch.full((count,), 1 / count, device=student.device)
    parameter = ones * next(iter(CATALOGUE[divergence].values()), 1.0)
    logits = student.detach()[:, None], teacher[:, None]
    options = RowOptions(row_scale, ones)
    problem = Rows(*logits, options, divergence, parameter, vocabulary, statistics=False)
    return lambda: kdkernels.ops.rows(problem, [True], backend)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def add_peers(losses: dict, skipped: dict, peers, device: str, needs_gpu: tuple[str, ...]) -> None:
    """Add the loss of each (name, module, factory) in `peers` that can run here, and a reason for each other one."""
    for name, module, factory in peers:
        if not installed(module):
            skipped[name] = f"{module} is not installed"
        elif name in needs_gpu and device == "cpu":
            skipped[name] = "its kernels are Triton and need a GPU"
        else:
            try:
                losses[name] = factory()
            except Exception as error:  # raised by another package's import
                skipped[name] = reason(error)


def family(device: str = "cpu", with_peers: bool = True, divergence: str = "kl") -> Family:
    """kdkernels and every other implementation of the divergence that can run on the device."""
    losses = {OURS: kdkernels_loss(divergence), EAGER: eager_loss(divergence)}
    skipped = {}
    if with_peers:
        losses[COMPILED] = compiled_loss(divergence)
        offers = (
            (TRL, "trl", trl_loss, TRL_DIVERGENCES),
            ("Liger", "liger_kernel", liger_loss, LIGER_DIVERGENCES),
            ("speculators", "speculators", speculators_loss, SPECULATORS_LOSSES),
        )
        skipped = {name: f"it has no {divergence}" for name, *_, offered in offers if divergence not in offered}
        peers = [
            (name, module, partial(factory, divergence)) for name, module, factory, _ in offers if name not in skipped
        ]
        add_peers(losses, skipped, peers, device, needs_gpu=("Liger", "speculators"))
    truth = kdkernels_loss(divergence, "reference")
    errors, allowed = answer_errors(divergence), allowed_by(divergence)
    return Family("rows", losses, truth, errors, allowed, label(divergence), skipped=skipped)


# ---- answers: row losses and the gradient of their mean, of each backend, at two temperatures


def checked_family(divergence: str, device: str, with_trl: bool) -> Family:
    """Every backend, eager PyTorch and TRL. Each loss maps (temperature) to a loss of rows and a mean loss.

    A backend passes when its error is at most eager PyTorch's on the same tensors plus TOLERANCE, and plus
    `cancellation` for the loss. The reference is plain PyTorch and TRL a peer: both are shown and not judged.
    """
    losses = {}
    if divergence in eager.DIVERGENCES:
        options = dict(CATALOGUE[divergence], name=divergence)
        losses[EAGER] = lambda t: (
            partial(eager.row_divergences, temperature=t, **options),
            partial(eager.divergence_loss, temperature=t, **options),
        )
    for backend in available_backends(device):
        losses[with_backend(backend)] = partial(both_reductions, kdkernels_loss, divergence, backend)
    if with_trl:
        losses[TRL] = partial(trl_reductions, divergence)
    truth = partial(both_reductions, kdkernels_loss, divergence, "reference")
    errors = answer_errors(divergence)
    return Family(
        "rows", losses, truth, errors, allowed_by(divergence), label(divergence), answer=row_losses_and_gradient
    )


def both_reductions(factory, divergence: str, backend: str, temperature: float) -> tuple[Loss, Loss]:
    options = {"temperature": temperature}
    return factory(divergence, backend, reduction="none", **options), factory(divergence, backend, **options)


def trl_reductions(divergence: str, temperature: float) -> tuple[Loss, Loss]:
    elementwise = trl_loss(divergence, temperature=temperature, reduction="none")
    rows = lambda student, teacher: elementwise(student, teacher).float().sum(-1)  # noqa: E731
    return rows, trl_loss(divergence, temperature=temperature)


def row_losses_and_gradient(loss, problem: Problem) -> list[torch.Tensor]:
    teacher, temperature = problem.others
    row_loss, mean_loss = loss(temperature)
    with torch.no_grad():
        rows = row_loss(problem.student, teacher)
    (gradient,) = torch.autograd.grad(mean_loss(problem.student, teacher), problem.student)
    return [rows.double(), gradient.double()]


def answer_errors(divergence: str) -> Callable[..., Errors]:
    """Largest errors over rows and elements. The gradient of tv jumps at p = q: rounding's part is no error."""

    def errors(answer, truth, problem) -> Errors:
        off = answer[1] - truth[1]
        if divergence == "tv":
            teacher, temperature = problem.others
            slack = undecided_signs(problem.student.detach(), teacher, temperature, UNDECIDED)
            off = (off.abs() - slack / (len(teacher) * temperature)).clamp(min=0)
        loss = largest_error(answer[0], truth[0])
        gradient = largest_error(truth[1] + off, truth[1])
        return Errors({"loss_error": loss, "gradient_error": gradient}, (loss, gradient))

    return errors


def allowed_by(divergence: str) -> Callable[..., tuple[float, float]]:
    entry = kdkernels.Divergence(divergence, **CATALOGUE[divergence])
    return partial(allowed_errors, steepness=entry.magnification if entry.is_steep else 0.0)


def allowed_errors(problems, truths, errors, steepness: float) -> tuple[float, float]:
    """A steep divergence magnifies the rounding of log-probabilities, relative to its loss and gradient."""
    tolerance = TOLERANCE[problems[0].student.device.type] + steepness * max(map(lse_rounding, problems))
    # Without eager code as a measure, the gradient may be off by its rounding to the student's dtype.
    rounding = torch.finfo(problems[0].student.dtype).eps / 2
    loss, gradient = errors[EAGER].judged if EAGER in errors else (0.0, rounding)
    cancelled = max(map(cancellation, problems, truths))
    return loss + tolerance + cancelled, gradient + tolerance


def cancellation(problem: Problem, truth) -> float:
    """The error of fp32 log-sum-exps relative to a smaller loss."""
    return lse_rounding(problem) / truth[0].abs().max().item()


def lse_rounding(problem: Problem) -> float:
    """4 units in the last place of the largest log-sum-exp, in fp32."""
    logits = problem.student.detach(), problem.others[0]
    return 4 * torch.finfo(torch.float32).eps * max(x.double().logsumexp(-1).abs().max().item() for x in logits)


def check_answers(benchmark, divergence: str, student: torch.Tensor, teacher: torch.Tensor, with_trl: bool) -> None:
    problems = [Problem(student, teacher, temperature) for temperature in TEMPERATURES]
    check(benchmark, checked_family(divergence, benchmark.device, with_trl), problems, ANSWERS)
