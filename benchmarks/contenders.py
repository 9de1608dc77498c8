"""What is compared: each contender is a function (student logits, teacher logits) -> mean loss."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import kdkernels.backends

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import eager

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Every divergence with the parameters it is measured at: its defaults.
CATALOGUE: dict[str, dict[str, float]] = {
    name: {entry.parameter: entry.default} if entry.parameter else {} for name, entry in kdkernels.CATALOGUE.items()
}
TRL_DIVERGENCES = ("kl", "reverse_kl", "js")
LIGER_DIVERGENCES = ("kl", "js")


def available_backends(device: str) -> list[str]:
    """The backends that serve tensors there. On a CPU not Triton: it would be its interpreter."""
    probe = torch.zeros(1, 1, device=device)
    return [
        name
        for name in kdkernels.backends.NAMES
        if kdkernels.backends.refuse(name, probe, probe) is None and (name != "triton" or device != "cpu")
    ]


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


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def peers(divergence: str, device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """Every other loss that can be run here on this divergence, and for each one that cannot, why."""
    losses: dict[str, Loss] = {"eager": eager_loss(divergence), "torch.compile": compiled_loss(divergence)}
    skipped: dict[str, str] = {}
    for name, module, factory, divergences in (
        ("TRL", "trl", trl_loss, TRL_DIVERGENCES),
        ("Liger", "liger_kernel", liger_loss, LIGER_DIVERGENCES),
    ):
        if divergence not in divergences:
            skipped[name] = f"has no {divergence}"
        elif not installed(module):
            skipped[name] = f"{module} is not installed"
        elif name == "Liger" and device == "cpu":
            skipped[name] = "its kernels are Triton and need a GPU"
        else:
            losses[name] = factory(divergence)
    return losses, skipped
