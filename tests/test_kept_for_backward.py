"""A call's tensors and settings that backward needs: backward finds them as they were when the call was made."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from truth import BACKENDS, device_of

import kdkernels
from kdkernels import (
    LinearLogits,
    fused_class_ot,
    fused_divergence,
    fused_kl,
    fused_sinkhorn,
    fused_sinkhorn_divergence,
    fused_sinkhorn_kd,
    fused_uld,
)
from kdkernels.families import options, sinkhorn

TEMPERATURE = 2.0
CUDA_CHIP = "wide"  # which has room for pairs of rows
each_backend = pytest.mark.parametrize("backend", BACKENDS)

# ---- teachers that inference mode made, which torch does not save for backward


def dense(device):
    return torch.randn(4, 50, device=device).half()


def head(device):
    hidden, weight, bias = (torch.randn(*shape, device=device).half() for shape in ((4, 6), (50, 6), (50,)))
    return LinearLogits(hidden, weight, bias=bias)


def sparse(device):
    return kdkernels.topk_log_probs(dense(device), 5, temperature=TEMPERATURE)


def cloned(teacher):
    if isinstance(teacher, torch.Tensor):
        return teacher.clone()
    return replace(teacher, **{name: x.clone() for name, x in vars(teacher).items() if isinstance(x, torch.Tensor)})


def js_of_heads(student, teacher, **options):
    return fused_divergence(student, teacher, "js", **options)


# (the loss, the student, the teacher)
LOSSES = {
    "fused_kl": (fused_kl, dense, dense),
    "two heads": (js_of_heads, head, head),
    "a head's logits": (js_of_heads, dense, head),
    "a head with a sparse teacher": (fused_kl, head, sparse),
    "a sparse teacher": (fused_kl, dense, sparse),
    "fused_uld": (fused_uld, dense, dense),
}


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gradient", ["auto", "backward", "forward"])
@pytest.mark.parametrize("name", LOSSES)
def test_an_fp16_student_learns_from_a_teacher_of_inference_mode(name, gradient, reduction, backend):
    loss, make_student, make_teacher = LOSSES[name]
    if make_student is head and gradient == "forward" and reduction == "none":
        pytest.skip("a head's gradient of single rows is found in backward")
    with torch.inference_mode():
        teacher = make_teacher(device_of(backend))
    student, found = make_student(device_of(backend)), []
    for its in (teacher, cloned(teacher)):
        leaves = [x.clone().requires_grad_() for x in ([student] if make_student is dense else vars(student).values())
                  if isinstance(x, torch.Tensor)]  # fmt: skip
        trained = leaves[0] if make_student is dense else LinearLogits(leaves[0], leaves[1], bias=leaves[2])
        out = loss(trained, its, temperature=TEMPERATURE, gradient=gradient, reduction=reduction, backend=backend)
        found.append(torch.autograd.grad(out, leaves, torch.rand_like(out).fill_(3.0)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want) and want.any()


def row_options(device):
    """Options of four rows, as tensors."""
    given = {
        "temperature": 1 + torch.rand(4),
        "mask": torch.tensor([True, True, False, True]),
        "row_weight": 1 + torch.rand(4),
        "labels": torch.randint(0, 50, (4,)),
        "hard_weight": torch.rand(4).clamp(0.1, 0.9),
    }
    return {name: x.to(device) for name, x in given.items()}


def with_options(device):
    more = {"loss_cap": 100 + torch.rand(4, device=device), "normalizer": torch.tensor(3.0, device=device)}
    return {"teacher": dense(device), **row_options(device), **more}


def with_options_of_uld(device):
    return {"teacher": dense(device), **row_options(device)}


def frozen_head(device):
    made = head(device)
    return {"weight": made.weight.float(), "bias": made.bias.float(), "teacher": dense(device), **row_options(device)}


def of_frozen_head(student, weight, bias, **given):
    return fused_kl(LinearLogits(student.float(), weight, bias), **given)


def class_costs(device):
    given = row_options(device)
    given["exclude_labels"] = given.pop("labels")
    del given["hard_weight"]
    cost, epsilon = torch.rand(50, 50, device=device), torch.tensor(0.5, device=device)
    return {"teacher": dense(device), "class_cost": cost, "epsilon": epsilon, **given}


def masses(device):
    a, b = torch.rand(4, device=device), torch.rand(50, device=device)
    epsilon, tolerance = (torch.tensor(x, device=device) for x in (1.0, 1e-3))
    return {"a": a / a.sum(), "b": b / b.sum(), "epsilon": epsilon, "tolerance": tolerance}


def sinkhorn_value(student, **given):
    return fused_sinkhorn(student, iterations=5, **given).value


def clouds(device):
    temperature, epsilon = (torch.tensor(x, device=device) for x in (1.5, 0.2))
    mask = torch.tensor([True, True, False, True], device=device)
    return {"teacher": dense(device), "temperature": temperature, "epsilon": epsilon, "mask": mask}


def three_costs(device):
    given = masses(device)
    del given["tolerance"]
    return {"cost_xx": torch.rand(4, 4, device=device), "cost_yy": torch.rand(50, 50, device=device), **given}


# (the loss of a student [4, 50] or [4, 6], the tensors that inference mode makes)
OTHERS = {
    "options of rows": (fused_kl, with_options),
    "uld and a label term": (fused_uld, with_options_of_uld),
    "a frozen head": (of_frozen_head, frozen_head),
    "fused_class_ot": (fused_class_ot, class_costs),
    "fused_sinkhorn": (sinkhorn_value, masses),
    "fused_sinkhorn, unrolled": (partial(sinkhorn_value, gradient="unrolled"), masses),
    "fused_sinkhorn_divergence": (partial(fused_sinkhorn_divergence, iterations=3), three_costs),
    "fused_sinkhorn_kd": (partial(fused_sinkhorn_kd, iterations=3), clouds),
    "fused_sinkhorn_kd, implicit": (partial(fused_sinkhorn_kd, gradient="implicit", cost="dot", iterations=3), clouds),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])  # no other backend saves other tensors than "cpu"
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("name", OTHERS)
def test_inference_mode_makes_everything_but_the_student(name, dtype, backend):
    loss, make = OTHERS[name]
    with torch.inference_mode():
        given = make(device_of(backend))
    student = torch.randn(4, 6 if name == "a frozen head" else 50, device=device_of(backend), dtype=dtype)
    found = []
    for its in (given, {key: x.clone() for key, x in given.items()}):
        leaf = student.clone().requires_grad_()
        found.append(torch.autograd.grad(loss(leaf, backend=backend, **its), leaf)[0])
    assert torch.equal(*found) and found[0].any()


# ---- the chunk budget


@pytest.fixture
def budgets(monkeypatch):
    """The budgets that chunks of transport are cut by, in the order of the cuts, and how many chunks each gave."""
    seen = []

    def recorded(count, bytes_each, budget):
        found = list(options.slices(count, bytes_each, budget))
        seen.append((budget, len(found)))
        return iter(found)

    monkeypatch.setattr(sinkhorn, "slices", recorded)
    return seen


@pytest.mark.parametrize("cost", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_products_in_backward_take_the_budget_of_the_call(backend, cost, budgets):
    student, teacher = (torch.randn(2, 3, 40, device=device_of(backend)) for _ in range(2))
    student.requires_grad_()

    def loss():
        return fused_sinkhorn_kd(student, teacher, cost=cost, backend=backend)

    (want,) = torch.autograd.grad(loss(), student)
    budgets.clear()
    with kdkernels.chunk_budget(3 * 4 * 6 * 15):  # three fp32 tensors of six rows and 15 columns
        of_call = loss()
    assert budgets == [(1080, 3)]
    with kdkernels.chunk_budget(1 << 40):
        (found,) = torch.autograd.grad(of_call, student)
    assert budgets == [(1080, 3), (1080, 3)], "the costs in the call, and the gradient in backward"
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["problems", "clouds"])
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_implicit_gradients_take_the_budget_of_the_call(backend, kind, budgets):
    """On these backends the formula runs in torch, some problems at a time."""
    given = torch.rand(5, 4, 4, device=device_of(backend)).requires_grad_()

    def loss():
        if kind == "problems":
            return fused_sinkhorn(given, epsilon=0.1, iterations=5, gradient="implicit", backend=backend).value.sum()
        return fused_sinkhorn_kd(given, 2 - given.detach(), iterations=5, gradient="implicit", backend=backend)

    (want,) = torch.autograd.grad(loss(), given)
    budgets.clear()
    with kdkernels.chunk_budget(2 * 64 * 16):  # two problems
        of_call = loss()
    with kdkernels.chunk_budget(1 << 40):
        (found,) = torch.autograd.grad(of_call, given)
    assert budgets == [(2048, 3)]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)
