"""Rows that are left out of a head's products: the loss and its gradients are those with all rows."""

import pytest
import torch
from truth import BACKENDS, device_of

from kdkernels import LinearLogits, fused_kl, topk_log_probs

ROWS, CLASSES, WIDTH = 23, 40, 8


@pytest.mark.parametrize("teacher_kind", ["logits", "head", "bucket", "support", "uniform"])
@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_fp32_hidden_states_under_autocast(backend, gradient, teacher_kind):
    """The products are in bf16, and the gradient of the hidden states is in fp32 again."""
    device = device_of(backend)

    def normal(*shape):
        return torch.randn(*shape, device=device)

    mask = torch.arange(ROWS, device=device) % 3 != 1
    hidden, weight, bias = normal(ROWS, WIDTH), normal(CLASSES, WIDTH), normal(CLASSES)
    hidden[~mask] = torch.nan
    logits = normal(ROWS, CLASSES)
    if teacher_kind == "head":
        teacher = LinearLogits(normal(ROWS, WIDTH), normal(CLASSES, WIDTH))
    else:
        teacher = logits if teacher_kind == "logits" else topk_log_probs(logits, 6).with_tail(teacher_kind)

    found = []
    for compact_rows in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        student = LinearLogits(leaves[0], leaves[1], bias=leaves[2])
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = fused_kl(
                student, teacher, mask=mask, gradient=gradient, chunk_rows=7, compact_rows=compact_rows,
                backend=backend,
            )  # fmt: skip
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    (loss, *gradients), (want, *right) = found
    torch.testing.assert_close(loss, want, rtol=2.0**-8, atol=0)
    for got, wanted in zip(gradients, right, strict=True):
        assert got.dtype == torch.float32 and wanted.any()
        torch.testing.assert_close(got, wanted, rtol=2.0**-7, atol=2.0**-8 * wanted.abs().max().item())
    assert gradients[0][mask].any(-1).all() and not gradients[0][~mask].any()
