"""What is compared from hidden states: each contender is a function (student, teacher) of LinearLogits -> mean loss."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from contenders import eager_loss, installed, reason, trl_loss

from kdkernels import LinearLogits, fused_kl

HeadLoss = Callable[[LinearLogits, LinearLogits], torch.Tensor]

OURS, EAGER, PRODUCTS = "kdkernels", "eager", "products alone"
LIGER, LIGER_KL, TRL_HEAD, TRL_LOGITS, FLA = "Liger", "Liger, kl alone", "TRL, head", "TRL, logits", "fla"
# Other losses than kl. Liger's has halves of a JS and of a cross-entropy, unless it is told otherwise.
OTHER_LOSSES = {LIGER: "js/2 + ce/2"}


def on_logits(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> HeadLoss:
    """The whole logits of both sides, and a loss of them."""

    def of_heads(student, teacher):
        with torch.no_grad():
            teacher_logits = F.linear(teacher.hidden, teacher.weight)
        return loss(F.linear(student.hidden, student.weight), teacher_logits)

    return of_heads


def exact_loss(student: LinearLogits, teacher: LinearLogits) -> torch.Tensor:
    """kl in the dtype of the hidden states, from its definition: the truth in fp64."""
    log_q, log_p = (F.linear(x.hidden, x.weight).log_softmax(-1) for x in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def liger_loss(**options) -> HeadLoss:
    """Liger's chunked JSD, in chunks of 1,024 rows, compiled by torch.compile; a JSD of beta 0 is the forward KL there.

    The labels of its cross-entropy are there for its cost alone: which they are does not change that.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(**options)

    def loss(student, teacher):
        labels = torch.zeros(len(student.hidden), dtype=torch.int64, device=student.device)
        return criterion(student.hidden, student.weight, teacher.hidden, teacher.weight, labels)

    return loss


def trl_head_loss() -> HeadLoss:
    """TRL's divergence in tiles of tokens and vocabulary, of each token; beta 0 is the forward KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student, teacher):
        sides = (student.hidden, student.weight, None, teacher.hidden, teacher.weight, None)
        divergence, _entropy = ChunkedDivergenceFunction.apply(*sides, 0.0)
        return divergence.mean()

    return loss


def fla_loss() -> HeadLoss:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return lambda student, teacher: fused_kl_div_loss(student.hidden, teacher.hidden, student.weight, teacher.weight)


def head_losses(device: str, with_peers: bool = True) -> tuple[dict[str, HeadLoss], dict[str, str]]:
    """Everyone who is here, and for each who is not, why."""
    losses: dict[str, HeadLoss] = {OURS: fused_kl, EAGER: on_logits(eager_loss("kl"))}
    skipped: dict[str, str] = {}
    for name, module, factory in (
        (LIGER_KL, "liger_kernel", partial(liger_loss, weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)),
        (LIGER, "liger_kernel", liger_loss),
        (TRL_HEAD, "trl", trl_head_loss),
        (TRL_LOGITS, "trl", lambda: on_logits(trl_loss("kl"))),
        (FLA, "fla", fla_loss),
    ):
        if not with_peers:
            skipped[name] = "--quick"
        elif not installed(module):
            skipped[name] = f"{module} is not installed"
        elif name == FLA and device == "cpu":
            skipped[name] = "its kernels are Triton and need a GPU"
        else:
            try:
                losses[name] = factory()
            except Exception as error:  # of another package's import
                skipped[name] = reason(error)
    return losses, skipped


class Leaves:
    """A student whose hidden states and weight get gradients, a teacher, and steps over them."""

    def __init__(self, student: LinearLogits, teacher: LinearLogits):
        self.student = LinearLogits(*(x.detach().clone().requires_grad_() for x in (student.hidden, student.weight)))
        self.teacher = teacher

    def drop_gradients(self) -> None:
        self.student.hidden.grad = self.student.weight.grad = None

    def step(self, loss: HeadLoss) -> Callable[[], None]:
        return lambda: loss(self.student, self.teacher).backward()

    def products(self, chunk_rows: int) -> Callable[[], None]:
        """The four matrix products of each chunk and nothing else, into memory that is there."""
        student, teacher = self.student.detach(), self.teacher
        shape = min(chunk_rows, len(student.hidden)), len(student.weight)
        student_logits, teacher_logits = (
            torch.zeros(shape, dtype=x.dtype, device=x.device) for x in (student, teacher)
        )
        of_hidden, of_weight = torch.zeros_like(student.hidden), torch.zeros_like(student.weight)

        def run():
            chunks = (x.split(chunk_rows) for x in (student.hidden, teacher.hidden, of_hidden))
            for hidden, teacher_hidden, of_chunk in zip(*chunks, strict=True):
                # The student's logits stand for their gradient, which has their size.
                gradient = torch.mm(hidden, student.weight.t(), out=student_logits[: len(hidden)])
                torch.mm(teacher_hidden, teacher.weight.t(), out=teacher_logits[: len(hidden)])
                torch.mm(gradient, student.weight, out=of_chunk)
                torch.mm(gradient.t(), hidden, out=of_weight)

        return run
