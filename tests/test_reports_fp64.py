"""A device without fp64, as an Apple GPU: no loss makes an fp64 tensor on it.

The device is modelled: a tensor of `OnDevice` says that it lies on "mps", keeps its data on the CPU, and refuses what
such a device refuses.
"""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import kdkernels
from kdkernels import LinearLogits, autograd, families, losses, ops
from kdkernels.families import options as row_options
from kdkernels.families.options import fp64_device

DEVICE = torch.device("mps:0")
# The operations that may take tensors of two devices.
CROSSING = ("aten::copy_", "aten::_to_copy", "aten::index_put_", "aten::index")


class OnDevice(Tensor):
    """A tensor on the modelled device. torch takes it for a meta tensor, which needs no device in this machine."""

    device = property(lambda self: DEVICE)

    @staticmethod
    def __new__(cls, data: Tensor):
        strides = {"strides": data.stride(), "storage_offset": data.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device="meta", **strides)

    def __init__(self, data: Tensor):
        self.data_on_cpu = data

    def __repr__(self):
        return f"OnDevice({self.data_on_cpu!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run_on_device(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Also runs the operations that make tensors from nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run_on_device(function, args, kwargs or {})


def run_on_device(function, args, kwargs):
    """Runs an operation on the CPU, and refuses the results and the mixtures that the device refuses."""
    assert function.namespace != "kdkernels", f"{function}: the model cannot see the steps of an operator"
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    here = {id(x.data_on_cpu): x for x in given if isinstance(x, OnDevice)}
    target = kwargs.get("device")
    on_device = bool(here) if target is None else torch.device(target).type in ("mps", "meta")
    if on_device and target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if here and function._schema.name not in CROSSING:
        elsewhere = [x for x in given if not isinstance(x, OnDevice) and x.dim()]
        assert not elsewhere, f"{function}: expected tensors on one device; got some on mps and some on the CPU"
    args, kwargs = tree_map(lambda x: x.data_on_cpu if isinstance(x, OnDevice) else x, (args, kwargs))
    out = function(*args, **kwargs)

    def placed(x):
        if not isinstance(x, Tensor) or not on_device:
            return x
        if x.dtype == torch.float64:
            raise TypeError(f"{function}: the device has no float64")
        return here.get(id(x)) if id(x) in here else OnDevice(x)

    return tree_map(placed, out)


@contextlib.contextmanager
def modelled_device(monkeypatch):
    """Also calls the implementation of the one operator that serves every device, since the model sees no operator."""

    def class_ot(*values):
        problem = ops.class_ot.fields.unflatten(values[:-2])
        return families.class_ot.class_ot(problem, values[-2])

    family = autograd.Family("class_ot", ops.Operator(class_ot, ops.class_ot.fields), gradients=1)
    monkeypatch.setattr(losses.class_ot, "CLASS_OT", family)
    with Device():
        yield


def moved(x):
    return OnDevice(x.detach().clone()) if isinstance(x, Tensor) else x


def on_cpu(x):
    return x.data_on_cpu if isinstance(x, OnDevice) else x


ROWS, CLASSES = 5, 9


def normal(*shape):
    return torch.randn(*shape)


def sparse(tail, **options):
    def call(student, indices, log_probs, tail_log_prob, **given):
        tail_mass = tail_log_prob if options.get("has_tail") else None
        teacher = kdkernels.SparseLogProbs(indices, log_probs, tail=tail, tail_log_prob=tail_mass)
        return kdkernels.fused_kl(student, teacher, **given)

    return call, {"student": normal(ROWS, CLASSES), **top_k()}


def top_k():
    made = kdkernels.topk_log_probs(normal(ROWS, CLASSES), 3)
    return {name: getattr(made, name) for name in ("indices", "log_probs", "tail_log_prob")}


def pair():
    return {"student": normal(ROWS, CLASSES), "teacher": normal(ROWS, CLASSES)}


def per_row():
    return {
        "temperature": 1 + torch.rand(ROWS),
        "labels": torch.randint(0, CLASSES, (ROWS,)),
        "hard_weight": torch.rand(ROWS),
        "row_weight": torch.rand(ROWS),
        "mask": torch.arange(ROWS) != 1,
    }


def head(student, weight, bias, **given):
    teacher = LinearLogits(student.detach().flip(0), weight.detach())
    return kdkernels.fused_js(LinearLogits(student, weight, bias), teacher, **given)


def divergences(student, teacher, **given):
    return sum(kdkernels.fused_divergence(student, teacher, name, **given) for name in kdkernels.CATALOGUE)


def statistics(student, teacher, **given):
    out = kdkernels.fused_kl(student, teacher, statistics=losses.options.STATISTICS, **given)
    return out.loss, *out.statistics.values()


def transport(**options):
    def call(student, a, b, **given):
        out = kdkernels.fused_sinkhorn(
            student, a, b, epsilon=0.1, iterations=3, plan=True, tolerance=1e-3, **options, **given
        )
        return out.value.sum(), out.f, out.g, out.error, out.iterations, out.converged, out.plan

    return call, {"student": torch.rand(2, 3, 4), "a": torch.full((2, 3), 1 / 3), "b": torch.full((2, 4), 0.25)}


def of_classes(**options):
    def call(student, teacher, class_cost, **given):
        return kdkernels.fused_class_ot(student, teacher, class_cost, epsilon=0.1, iterations=2, **options, **given)

    given = {name: x for name, x in per_row().items() if name not in ("labels", "hard_weight")}
    excluded = {"exclude_labels": torch.randint(0, CLASSES, (ROWS,))}
    return call, {**pair(), "class_cost": torch.rand(CLASSES, CLASSES), **given, **excluded}


def rows_transport(**options):
    def call(student, teacher, **given):
        return kdkernels.fused_sinkhorn_kd(student, teacher, iterations=2, **options, **given)

    return call, pair()


def clouds(student, own, theirs, **given):
    return kdkernels.fused_sinkhorn_divergence(student, own, theirs, epsilon=0.1, iterations=2, **given)


def entries(made):
    return made.indices, made.log_probs, made.tail_log_prob


# (the call, its tensors): the call returns the loss and detached results, or results alone.
CALLS = {
    "every divergence": lambda: (divergences, {**pair(), **per_row()}),
    "statistics": lambda: (statistics, {**pair(), **per_row()}),
    "a loss cap": lambda: (kdkernels.fused_kl, {**pair(), "loss_cap": torch.rand(ROWS)}),
    "a normalizer": lambda: (kdkernels.fused_js, {**pair(), "normalizer": torch.tensor(7.0)}),
    "heads": lambda: (
        head,
        {"student": normal(ROWS, 4), "weight": normal(CLASSES, 4), "bias": normal(CLASSES), **per_row()},
    ),
    "bucket": lambda: sparse("bucket"),
    "bucket with its tail": lambda: sparse("bucket", has_tail=True),
    "renormalize": lambda: sparse("renormalize"),
    "support": lambda: sparse("support"),
    "uniform": lambda: sparse("uniform"),
    "uniform with its tail": lambda: sparse("uniform", has_tail=True),
    "truncate": lambda: sparse("truncate"),
    "uld": lambda: (kdkernels.fused_uld, {**pair(), **per_row()}),
    "uld of the top k": lambda: (
        lambda student, teacher, **given: kdkernels.fused_uld(student, teacher, topk=3, **given),
        {"student": normal(ROWS, CLASSES), "teacher": normal(ROWS, 7)},
    ),
    **{
        f"sinkhorn, {gradient}, {value}": lambda gradient=gradient, value=value: transport(
            gradient=gradient, value=value
        )
        for gradient in families.sinkhorn.GRADIENTS
        for value in ("transport", "entropic")
    },
    "the Sinkhorn divergence": lambda: (
        clouds,
        {"student": torch.rand(3, 4), "own": torch.rand(3, 3), "theirs": torch.rand(4, 4)},
    ),
    **{
        f"sinkhorn_kd, {gradient}": lambda gradient=gradient: rows_transport(gradient=gradient)
        for gradient in families.sinkhorn.GRADIENTS
    },
    **{
        f"class_ot, {gradient}, {backend}": lambda gradient=gradient: of_classes(gradient=gradient)
        for gradient in families.class_ot.GRADIENTS
        for backend in ("auto", "reference")
    },
    "topk_log_probs": lambda: (
        lambda x, **given: entries(kdkernels.topk_log_probs(x, 3, **given)),
        {"x": normal(ROWS, CLASSES)},
    ),
    "sampled_log_probs": lambda: (
        lambda x, **given: entries(kdkernels.sampled_log_probs(x, 1, exact=CLASSES, **given)),
        {"x": normal(ROWS, CLASSES)},
    ),
}


# Whether values are checked decides how entries are merged, and whether class_ot chooses its dtype.
UNCHECKED = ("bucket", "uniform", "truncate", "support", "class_ot")


@pytest.mark.parametrize(
    "name, checked",
    [*((name, True) for name in CALLS), *((name, False) for name in CALLS if name.split(",")[0] in UNCHECKED)],
)
def test_no_fp64_on_a_device_without_it(name, checked, monkeypatch):
    """The results are those of the CPU in the same dtype: the device's fp64 steps run there."""
    call, given = CALLS[name]()
    backend = {} if "auto" in name else {"backend": "reference"}
    monkeypatch.setattr(families.class_ot, "CONJUGATE_STEPS", CLASSES + 1)  # a device takes all of them
    before = kdkernels.checks(checked)
    try:
        want = results(call, given, backend)
        with modelled_device(monkeypatch):
            got = results(call, {name: moved(x) for name, x in given.items()}, backend)
    finally:
        kdkernels.checks(before)
    assert len(got) == len(want) > 0
    for x, y in zip(got, want, strict=True):
        assert x is None or isinstance(x, OnDevice), type(x)
        torch.testing.assert_close(on_cpu(x), y)


def results(call, given, backend):
    """The results of a call, and the gradients of the student, a weight and a bias."""
    trained = [x.requires_grad_() for name, x in given.items() if name in ("student", "weight", "bias")]
    out = call(**given, **backend)
    out = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(out[0], trained) if trained else ()
    return [x if x is None else x.detach() for x in (*out, *gradients)]


def test_the_model_refuses_fp64():
    x = OnDevice(torch.randn(3))
    with Device(), pytest.raises(TypeError, match="no float64"):
        x.double()
    with Device(), pytest.raises(TypeError, match="no float64"):
        torch.zeros(2, dtype=torch.float64, device=DEVICE)
    with Device(), pytest.raises(AssertionError, match="one device"):
        x + torch.ones(3)
    with Device():
        assert type(x.to(fp64_device(x.device)).double()) is Tensor
        assert torch.equal(on_cpu(torch.ones(2, device=DEVICE)), torch.ones(2))


def test_drawn_samples_on_a_device_without_fp64(monkeypatch):
    """The CPU draws them, from a seed of the device's generator: they follow the distribution, and differ by call."""
    logits = torch.randn(2, CLASSES)
    with modelled_device(monkeypatch):
        first, second = (kdkernels.sampled_log_probs(OnDevice(logits), 20_000) for _ in range(2))
    assert not torch.equal(on_cpu(first.log_probs), on_cpu(second.log_probs))
    p = logits.softmax(-1)
    for made in (first, second):
        indices, log_probs = on_cpu(made.indices)[:, :CLASSES].long(), on_cpu(made.log_probs)[:, :CLASSES]
        found = torch.zeros_like(p).scatter_add(-1, indices.clamp(min=0), log_probs.exp())
        assert ((found - p).abs() < 6 * (p / 20_000).sqrt()).all()


def test_a_range_of_costs_that_only_fp64_holds_is_refused(monkeypatch):
    cost = 100 * torch.rand(CLASSES, CLASSES)
    cost[0, 0], cost[1, 1] = 0, 100
    tensors = [OnDevice(x) for x in (*pair().values(), cost)]
    before = kdkernels.checks(True)
    try:
        with modelled_device(monkeypatch), pytest.raises(ValueError, match=r"at least 1.25, .* fp32 holds"):
            kdkernels.fused_class_ot(*tensors, epsilon=1.0)
        with modelled_device(monkeypatch):
            assert on_cpu(kdkernels.fused_class_ot(*tensors, epsilon=1.3)).isfinite()
    finally:
        kdkernels.checks(before)


@pytest.mark.parametrize("name, has", [("cpu", True), ("cuda", True), ("mps", False), ("xpu", False)])
def test_devices_that_have_fp64(name, has, monkeypatch):
    class Properties:
        has_fp64 = has

    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties)
    assert row_options.has_fp64(torch.device(name)) is has
    assert fp64_device(torch.device(name)).type == (name if has else "cpu")
