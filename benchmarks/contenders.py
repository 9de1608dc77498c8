"""What is compared: each contender is a function (student logits, teacher logits) -> mean loss."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import kdkernels.backends
import kdkernels.ops

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import eager

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Every divergence with the parameters it is measured at: its defaults.
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
# Packages of fused losses whose work is another: there is no fair comparison.
NOT_COMPARED = {
    "cut-cross-entropy": "it computes a cross-entropy with labels, from hidden states: no teacher's distribution",
    "fla-core": "its fused_kl_div_loss starts from hidden states of both sides: it is measured among the heads",
}


def available_backends(device: str) -> list[str]:
    """The backends that serve tensors there. On a CPU not those for a GPU: it would be an interpreter or a model."""
    probe = torch.zeros(1, 1, device=device)
    names = kdkernels.backends.NAMES if device != "cpu" else ("cpu", "reference")
    return [name for name in names if kdkernels.backends.refuse(name, probe, probe) is None]


def label(divergence: str) -> str:
    """`alpha(alpha=0.5)`, `kl`."""
    parameters = ", ".join(f"{key}={value}" for key, value in CATALOGUE[divergence].items())
    return f"{divergence}({parameters})" if parameters else divergence


def kdkernels_loss(divergence: str, backend: str = "auto", **options) -> Loss:
    entry = kdkernels.Divergence(divergence, **CATALOGUE[divergence])
    return lambda student, teacher: kdkernels.fused_divergence(student, teacher, entry, backend=backend, **options)


def eager_loss(divergence: str) -> Loss:
    return partial(eager.divergence_loss, name=divergence, **CATALOGUE[divergence])


def compiled_loss(divergence: str) -> Loss:
    # A function of its own for each shape and dtype measured, so that none is slowed by a guard of another.
    torch.compiler.reset()
    return torch.compile(eager_loss(divergence), dynamic=False)


def trl_loss(divergence: str, **options) -> Loss:
    """TRL's generalised JSD: beta 0 is forward KL, 1 reverse KL. It computes in the dtype of the logits."""
    from trl.experimental.gkd import GKDTrainer

    beta = {"kl": 0, "reverse_kl": 1}.get(divergence, CATALOGUE["js"]["beta"])
    # With 2-d logits its default reduction "batchmean" divides by the rows.
    return lambda student, teacher: GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, **options)


def liger_loss(divergence: str) -> Loss:
    """Liger's dense losses take log-probabilities, so the two log-softmaxes stay outside the kernel."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    if divergence == "kl":
        criterion = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        criterion = LigerJSD(beta=CATALOGUE["js"]["beta"])
    return lambda student, teacher: criterion(student.float().log_softmax(-1), teacher.float().log_softmax(-1))


def speculators_loss(divergence: str) -> Loss:
    """One loss for every row of [batch, sequence, vocabulary] logits; its js has the weight 0.5."""
    from speculators.losses import fused

    loss = getattr(fused, SPECULATORS_LOSSES[divergence])
    return lambda student, teacher: loss(student[None], teacher[None]).mean()


def operator(divergence: str, backend: str, student: torch.Tensor, teacher: torch.Tensor) -> Callable[[], object]:
    """The kernels of a loss with gradient alone: the operator behind a call, without what surrounds it."""
    count, vocabulary = student.shape
    ones = torch.ones(1, device=student.device)
    row_scale = torch.full((count,), 1 / count, device=student.device)
    parameter = ones * next(iter(CATALOGUE[divergence].values()), 1.0)
    logits = student.detach()[:, None], teacher[:, None]
    flags = False, True, False  # temperature_squared, gradient, statistics
    return lambda: kdkernels.ops.rows(
        *logits, row_scale, None, ones, None, parameter, divergence, vocabulary, *flags, backend
    )


def reason(error: Exception) -> str:
    """The first line of what was raised."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:200]}"


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def peers(divergence: str, device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """Every other loss that can be run here on this divergence, and for each one that cannot, why."""
    losses: dict[str, Loss] = {"eager": eager_loss(divergence), "torch.compile": compiled_loss(divergence)}
    skipped: dict[str, str] = {}
    for name, module, factory, divergences in (
        ("TRL", "trl", trl_loss, TRL_DIVERGENCES),
        ("Liger", "liger_kernel", liger_loss, LIGER_DIVERGENCES),
        ("speculators", "speculators", speculators_loss, SPECULATORS_LOSSES),
    ):
        if divergence not in divergences:
            skipped[name] = f"has no {divergence}"
        elif not installed(module):
            skipped[name] = f"{module} is not installed"
        elif name != "TRL" and device == "cpu":
            skipped[name] = "its kernels are Triton and need a GPU"
        else:
            try:
                losses[name] = factory(divergence)
            except Exception as error:  # of another package's import
                skipped[name] = reason(error)
    return losses, skipped
