"""Heads whose tensors have different dtypes: every combination is right, or refused with the dtypes that would serve.

Hidden states, weight and bias in fp32, bf16, fp16 and fp64, autocast, `logits_dtype`, dropped rows with and without
`compact_rows`, and the gradient modes.
"""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from truth import BACKENDS, device_of

from kdkernels import LinearLogits, cache, fused_divergence, fused_kl, sampled_log_probs, topk_log_probs

ROWS, CLASSES, WIDTH = 6, 11, 4
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (FP32, BF16, FP16, FP64)
KEPT = torch.tensor([True, False, True, True, False, True])
COMPACT = (None, True, False)
# The error of a loss or gradient, relative to its norm: of factors, logits and results that are rounded to the dtype.
TOLERANCE = {FP64: 1e-12, FP32: 2e-6, FP16: 2.0**-8, BF16: 2.0**-5}
# For gradient="auto": a loss scale makes up for the normalizer. Between the two, fp16 gradients would be 0.
NORMALIZER, LOSS_SCALE = 1e8, 2.0**27

cases = pytest.mark.parametrize(
    "autocast, logits_dtype",
    list(itertools.product((None, BF16, FP16), (None, FP32))),
    ids=lambda x: str(x).split(".")[-1],
)


def product_dtype(hidden, weight, autocast, logits_dtype):
    """The dtype of a head's factors; else the refusal."""
    if hidden != weight and FP64 in (hidden, weight):
        return "expected fp64 in both hidden and weight, or in neither; got "
    if FP64 in (hidden, weight):
        return FP64
    if autocast is not None:
        return autocast
    if hidden == weight:
        return hidden
    if logits_dtype is None:
        return "expected hidden and weight of one dtype outside autocast, or logits_dtype=torch.float32; got "
    return FP32


def autocasting(dtype, device="cpu"):
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def tensors(hidden, weight, device="cpu"):
    """Hidden states with NaN in the dropped rows, weight and bias."""
    shapes = ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    made = [
        torch.randn(*shape).to(device, dtype) for shape, dtype in zip(shapes, (hidden, weight, weight), strict=True)
    ]
    made[0][~KEPT] = torch.nan
    return made


def logits_of(made, dtype):
    """The kept rows' logits in fp64, from factors that are rounded to the products' dtype."""
    hidden, weight, bias = (x.to(dtype).double() for x in made)
    return hidden[KEPT] @ weight.t() + bias


def close(got, want, dtypes, what):
    error, size = (got.double().cpu() - want).norm(), want.norm()
    allowed = max(TOLERANCE[dtype] for dtype in dtypes)
    assert size > 0 and error <= allowed * size, f"{what}: error {error / size:.2e}, allowed {allowed:.2e}"


def check_losses(made, teacher, dtype, backend="cpu", compact_rows=COMPACT, **options):
    """Compares the losses and gradients of each mode with those of fp64 logits. `dtype`: of the factors."""
    device = made[0].device
    leaves = [x.to(dtype, copy=True).double().cpu().requires_grad_() for x in made]
    logits = leaves[0][KEPT] @ leaves[1].t() + leaves[2]
    want = fused_kl(logits, logits_of([x.cpu() for x in teacher], dtype), backend="reference")
    wanted = torch.autograd.grad(want, leaves)
    for compact, gradient in itertools.product(compact_rows, ("forward", "backward", "auto")):
        leaves = [x.clone().requires_grad_() for x in made]
        normalizer, scale = (NORMALIZER, LOSS_SCALE) if gradient == "auto" else (KEPT.sum().item(), 1.0)
        loss = fused_kl(
            LinearLogits(leaves[0], leaves[1], leaves[2]), LinearLogits(*teacher), mask=KEPT.to(device),
            normalizer=normalizer, gradient=gradient, compact_rows=compact, backend=backend, **options,
        )  # fmt: skip
        (loss * scale).backward()
        what, factor = f"compact_rows={compact}, gradient={gradient}", normalizer / KEPT.sum()
        close(loss.detach() * factor, want.detach(), [dtype], f"loss, {what}")
        for name, x, right in zip(("hidden", "weight", "bias"), leaves, wanted, strict=True):
            assert x.grad.dtype == x.dtype
            close(x.grad.double() / scale * factor, right, [dtype, x.dtype], f"gradient of {name}, {what}")
        assert not leaves[0].grad[~KEPT].any(), what


@cases
def test_of_heads_of_all_dtypes(autocast, logits_dtype):
    for hidden, weight in itertools.product(DTYPES, DTYPES):
        made, teacher = tensors(hidden, weight), tensors(hidden, weight)
        dtype, head = product_dtype(hidden, weight, autocast, logits_dtype), LinearLogits(*made)
        with autocasting(autocast):
            if isinstance(dtype, str):
                stored = torch.randn(ROWS, CLASSES, dtype=torch.promote_types(hidden, weight))
                for call in (
                    lambda head, **options: fused_kl(head, stored, **options),  # noqa: B023
                    lambda head, **options: fused_kl(stored, head, **options),  # noqa: B023
                    lambda head, **options: topk_log_probs(head, 3, **options),
                    lambda head, **options: sampled_log_probs(head, 3, **options),
                ):
                    with pytest.raises(TypeError, match=f"{dtype}{hidden} and {weight}"):
                        call(head, logits_dtype=logits_dtype)
                continue
            check_losses(made, teacher, dtype, logits_dtype=logits_dtype)


@cases
def test_of_teachers_from_heads_of_all_dtypes(autocast, logits_dtype):
    for hidden, weight in itertools.product(DTYPES, DTYPES):
        dtype = product_dtype(hidden, weight, autocast, logits_dtype)
        if isinstance(dtype, str):
            continue
        made = tensors(hidden, weight)
        want = logits_of(made, dtype).log_softmax(-1)
        for compact in COMPACT:
            options = {"mask": KEPT, "compact_rows": compact, "logits_dtype": logits_dtype}
            with autocasting(autocast):
                whole = topk_log_probs(LinearLogits(*made), CLASSES, **options)
                drawn = sampled_log_probs(LinearLogits(*made), 1, exact=CLASSES, **options)
            for found in (whole, drawn):
                assert (found.indices[~KEPT] == -1).all() and found.log_probs[~KEPT].isneginf().all()
                indices, log_probs = (x[KEPT][:, :CLASSES] for x in (found.indices.long(), found.log_probs))
                assert log_probs.dtype == (FP64 if dtype == FP64 else FP32)
                got = torch.empty_like(want).scatter(-1, indices, log_probs.double())
                assert (got - want).abs().max() <= TOLERANCE[dtype] * 8


@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_of_products_in_fp32_on_each_backend(backend):
    made, teacher = (tensors(BF16, FP32, device=device_of(backend)) for _ in range(2))
    check_losses(made, teacher, FP32, backend, compact_rows=(None,), logits_dtype=FP32)


@pytest.mark.parametrize("dtypes", [(FP16, FP32), (FP32, FP16)], ids=["hidden", "weight"])
@pytest.mark.parametrize(
    "backend, trained",
    [*(("cpu", name) for name in ("hidden", "weight", "bias")), *((name, "all") for name in BACKENDS)],
)
def test_fp16_in_a_gradient_decides_that_backward_finds_it(backend, dtypes, trained):
    """Under bf16 autocast the factors are in bf16, and only the tensor itself says that its gradient is in fp16."""
    device = device_of(backend)
    made, teacher = tensors(*dtypes, device=device), torch.randn(ROWS, CLASSES, device=device)
    found = {}
    for gradient in ("auto", "backward"):
        leaves = [x.clone() for x in made]
        names = {"hidden": leaves[:1], "weight": leaves[1:2], "bias": leaves[2:], "all": leaves}
        for x in names[trained]:
            x.requires_grad_()
        with autocasting(BF16, device):
            loss = fused_divergence(
                LinearLogits(*leaves), teacher, "js", mask=KEPT.to(device), normalizer=NORMALIZER, gradient=gradient,
                backend=backend,
            )  # fmt: skip
        found[gradient] = torch.autograd.grad(loss * LOSS_SCALE, names[trained])
    for got, want in zip(*found.values(), strict=True):
        assert want.norm() > 1e-3
        torch.testing.assert_close(got, want, rtol=2.0**-6, atol=2.0**-8 * want.abs().max().item())


class Model(torch.nn.Module):
    """A mock of a causal model whose head has another dtype than its hidden states, which the model casts."""

    def __init__(self, dtype):
        super().__init__()
        self.embedding, self.lm_head = torch.nn.Embedding(CLASSES, WIDTH), torch.nn.Linear(WIDTH, CLASSES, dtype=dtype)
        self.config, self.calls = SimpleNamespace(), 0

    def base_model(self, ids, use_cache):
        return SimpleNamespace(last_hidden_state=self.embedding(ids))

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids, use_cache):
        self.calls += 1
        return SimpleNamespace(logits=self.lm_head(self.embedding(ids).to(self.lm_head.weight.dtype)))


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("autocast", [None, BF16, FP16])
def test_a_cache_of_a_model_whose_head_has_another_dtype(autocast, samples, tmp_path):
    """Under autocast the head's products are the model's; else the model makes the logits itself."""
    model, ids = Model(BF16), torch.randint(CLASSES, (3, 4))
    with autocasting(autocast):
        made = cache.write_teacher(model, ids, tmp_path / "cache", k=CLASSES, samples=samples, progress=False)
    assert model.calls == (2 if autocast is None else 1)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits.float().log_softmax(-1)
    for row in range(3):
        entries = made[row]
        named = entries["log_probs"].isfinite()
        indices = torch.where(named, entries["indices"].long(), 0)
        error = (entries["log_probs"].float() - want[row].gather(-1, indices))[named].abs()
        certain = named.sum() if not samples else 4 * (CLASSES - samples)
        assert (error < 0.05).sum() >= certain
