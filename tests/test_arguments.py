"""Bad input raises an error that names the expected and the given value; the call changes no argument."""

import pytest
import torch
from truth import BACKENDS, DEVICE, device_of

import kdkernels
from kdkernels import Divergence, fused_divergence, fused_js, fused_kl

ROWS, VOCAB = 4, 11


def logits(*shape, dtype=torch.float32, **options):
    return torch.randn(*(shape or (ROWS, VOCAB))).to(dtype).requires_grad_(options.get("grad", False))


def per_row(grad=False):
    return torch.rand(ROWS).requires_grad_(grad)


LABELS = torch.zeros(ROWS, dtype=torch.int64)


def class_ot(student, teacher):
    return kdkernels.fused_class_ot(student, teacher, torch.zeros(VOCAB, VOCAB))


# call, exception, parts of the exception's message
BAD = {
    "not a tensor": (lambda: fused_kl([1.0, 2.0], logits()), TypeError, ["student", "tensor", "list"]),
    "0-d": (lambda: fused_kl(torch.tensor(1.0), torch.tensor(1.0)), ValueError, ["student", "[..., vocabulary]"]),
    "0 classes": (lambda: fused_kl(logits(3, 0), logits(3, 0)), ValueError, ["vocab_size", "from 1", "got 0"]),
    "integer logits": (lambda: fused_kl(torch.ones(2, 3, dtype=torch.int64), logits(2, 3)), TypeError, ["int64"]),
    "sparse": (lambda: fused_kl(logits().to_sparse(), logits()), TypeError, ["dense", "sparse"]),
    "shapes": (lambda: fused_kl(logits(2, 5), logits(3, 5)), ValueError, ["[2, 5]", "[3, 5]"]),
    "leading shapes": (lambda: fused_kl(logits(2, 3, 5), logits(6, 5)), ValueError, ["[2, 3, 5]", "[6, 5]"]),
    "widths": (lambda: fused_kl(logits(2, 5), logits(2, 6)), ValueError, ["5", "6", "vocab_size"]),
    "vocab_size too large": (lambda: fused_kl(logits(2, 5), logits(2, 6), vocab_size=6), ValueError, ["6", "5"]),
    "vocab_size 0": (lambda: fused_kl(logits(), logits(), vocab_size=0), ValueError, ["vocab_size", "got 0"]),
    "vocab_size float": (lambda: fused_kl(logits(), logits(), vocab_size=3.0), TypeError, ["vocab_size", "float"]),
    "stride": (lambda: fused_kl(logits(5, 4).t(), logits(4, 5)), ValueError, ["stride 1", "[1, 4]", "contiguous"]),
    "stride of the teacher": (lambda: fused_kl(logits(4, 5), logits(5, 4).t()), ValueError, ["teacher", "stride 1"]),
    "teacher requires grad": (lambda: fused_kl(logits(), logits(grad=True)), ValueError, ["teacher", ".detach()"]),
    "temperature 0": (lambda: fused_kl(logits(), logits(), temperature=0.0), ValueError, ["> 0", "got 0.0"]),
    "temperature negative": (lambda: fused_kl(logits(), logits(), temperature=-1), ValueError, ["> 0", "got -1"]),
    "temperature nan": (lambda: fused_kl(logits(), logits(), temperature=float("nan")), ValueError, ["finite", "nan"]),
    "temperature inf": (lambda: fused_kl(logits(), logits(), temperature=float("inf")), ValueError, ["finite", "inf"]),
    "temperature str": (lambda: fused_kl(logits(), logits(), temperature="2"), TypeError, ["temperature", "str"]),
    "temperature shape": (
        lambda: fused_kl(logits(), logits(), temperature=torch.ones(ROWS, 1)),
        ValueError,
        ["temperature", "[4]", "[4, 1]"],
    ),
    "temperature grad": (
        lambda: fused_kl(logits(), logits(), temperature=torch.ones((), requires_grad=True)),
        ValueError,
        ["temperature requires grad"],
    ),
    "beta 0": (lambda: fused_js(logits(), logits(), beta=0.0), ValueError, ["(0, 1)", "kl", "gkd"]),
    "beta 1": (lambda: fused_js(logits(), logits(), beta=1.0), ValueError, ["(0, 1)", "reverse_kl", "gkd"]),
    "beta nan": (lambda: fused_js(logits(), logits(), beta=float("nan")), ValueError, ["(0, 1)", "nan"]),
    "beta tensor": (lambda: fused_js(logits(), logits(), beta=torch.tensor(0.5)), TypeError, ["beta", "Tensor"]),
    "alpha 1": (lambda: Divergence("alpha", alpha=1.0), ValueError, ["0.001 from 0 and 1", "got 1.0", "kl"]),
    "alpha inf": (lambda: Divergence("alpha", alpha=float("inf")), ValueError, ["finite", "inf"]),
    "weight 1.5": (lambda: Divergence("mixed_kl", weight=1.5), ValueError, ["[0, 1]", "1.5"]),
    "parameter of another divergence": (lambda: Divergence("js", alpha=0.5), ValueError, ["'beta'", "'alpha'"]),
    "parameter of kl": (lambda: Divergence("kl", beta=0.5), ValueError, ["no parameter", "'beta'"]),
    "unknown divergence": (
        lambda: fused_divergence(logits(), logits(), "revers_kl"),
        ValueError,
        ["revers_kl", "did you mean 'reverse_kl'", "hellinger"],
    ),
    "divergence not a name": (lambda: fused_divergence(logits(), logits(), 3), ValueError, ["unknown", "3"]),
    "hard_weight without labels": (lambda: fused_kl(logits(), logits(), hard_weight=0.5), ValueError, ["needs labels"]),
    "hard_weight 2": (lambda: fused_kl(logits(), logits(), hard_weight=2, labels=LABELS), ValueError, ["0 to 1", "2"]),
    "hard_weight grad": (
        lambda: fused_kl(logits(), logits(), hard_weight=per_row(True), labels=LABELS),
        ValueError,
        ["hard_weight requires grad"],
    ),
    "hard_weight bool": (lambda: fused_kl(logits(), logits(), hard_weight=False), TypeError, ["hard_weight", "bool"]),
    "ignore_index": (
        lambda: fused_kl(logits(), logits(), labels=LABELS, ignore_index=None),
        TypeError,
        ["ignore_index", "int", "NoneType"],
    ),
    "temperature_squared": (
        lambda: fused_kl(logits(), logits(), temperature_squared=2.0),
        TypeError,
        ["temperature_squared", "bool", "float"],
    ),
    "temperature complex": (
        lambda: fused_kl(logits(), logits(), temperature=torch.tensor(2j)),
        TypeError,
        ["complex64"],
    ),
    "normalizer bool": (lambda: fused_kl(logits(), logits(), normalizer=torch.tensor(True)), TypeError, ["bool"]),
    "alpha near 1": (lambda: Divergence("alpha", alpha=1.0001), ValueError, ["0.001 from", "1.0001"]),
    "labels dtype": (lambda: fused_kl(logits(), logits(), labels=LABELS.int()), TypeError, ["int64", "int32"]),
    "labels shape": (lambda: fused_kl(logits(), logits(), labels=LABELS[:2]), ValueError, ["labels", "[4]", "[2]"]),
    "mask dtype": (lambda: fused_kl(logits(), logits(), mask=LABELS), TypeError, ["mask", "bool", "int64"]),
    "mask shape": (lambda: fused_kl(logits(), logits(), mask=LABELS[:1].bool()), ValueError, ["mask", "[4]", "[1]"]),
    "mask list": (lambda: fused_kl(logits(), logits(), mask=[True] * 4), TypeError, ["mask", "list"]),
    "row_weight grad": (lambda: fused_kl(logits(), logits(), row_weight=per_row(True)), ValueError, ["row_weight"]),
    "row_weight number": (lambda: fused_kl(logits(), logits(), row_weight=2.0), TypeError, ["row_weight", "float"]),
    "batchmean": (lambda: fused_kl(logits(), logits(), reduction="batchmean"), ValueError, ["batchmean", "'mean'"]),
    "reduction": (lambda: fused_kl(logits(), logits(), reduction="avg"), ValueError, ["'mean'", "'none'", "'avg'"]),
    "normalizer and sum": (
        lambda: fused_kl(logits(), logits(), reduction="sum", normalizer=3),
        ValueError,
        ["normalizer", "'mean'", "'sum'"],
    ),
    "normalizer and none": (
        lambda: fused_kl(logits(), logits(), reduction="none", normalizer=3),
        ValueError,
        ["normalizer", "'none'"],
    ),
    "normalizer [2]": (lambda: fused_kl(logits(), logits(), normalizer=torch.ones(2)), ValueError, ["one", "[2]"]),
    "normalizer grad": (
        lambda: fused_kl(logits(), logits(), normalizer=torch.ones((), requires_grad=True)),
        ValueError,
        ["normalizer requires grad"],
    ),
    "normalizer 10**45": (lambda: fused_kl(logits(), logits(), normalizer=10**45), ValueError, ["normalizer", "int64"]),
    "normalizer 1e45": (lambda: fused_kl(logits(), logits(), normalizer=1e45), ValueError, ["normalizer", "1e+45"]),
    "rows 10**45": (lambda: kdkernels.global_normalizer(10**45), ValueError, ["rows", "int64", "1000", "..."]),
    "rows 1e45": (lambda: kdkernels.global_normalizer([1e45]), ValueError, ["rows", "fp32", "1e+45"]),
    "reduce_rows 10**45": (lambda: kdkernels.reduce_rows(torch.ones(3), normalizer=10**45), ValueError, ["normalizer"]),
    "temperature 10**400": (
        lambda: fused_kl(logits(), logits(), temperature=10**400),
        ValueError,
        ["temperature", "int64"],
    ),
    "top k, temperature 1e45": (
        lambda: kdkernels.topk_log_probs(logits(), 2, temperature=1e45),
        ValueError,
        ["temperature"],
    ),
    "loss_cap 1e45": (lambda: fused_kl(logits(), logits(), loss_cap=1e45), ValueError, ["loss_cap", "fp32"]),
    "alpha 10**45": (lambda: Divergence("alpha", alpha=10**45), ValueError, ["alpha: alpha", "int64"]),
    "epsilon 1e45": (lambda: kdkernels.fused_sinkhorn(torch.rand(1, 2, 2), epsilon=1e45), ValueError, ["epsilon"]),
    "scale 10**400": (
        lambda: kdkernels.LinearLogits(torch.ones(2, 3), torch.ones(5, 3), scale=10**400),
        ValueError,
        ["scale", "int64"],
    ),
    "ignore_index 10**45": (
        lambda: fused_kl(logits(), logits(), labels=torch.zeros(4, dtype=torch.int64), ignore_index=10**45),
        ValueError,
        ["ignore_index", "int64"],
    ),
    "normalizer negative": (lambda: fused_kl(logits(), logits(), normalizer=-2), ValueError, ["negative", "-2"]),
    "statistics unknown": (lambda: fused_kl(logits(), logits(), statistics=("kl",)), ValueError, ["'kl'", "entropy"]),
    "statistics a str": (lambda: fused_kl(logits(), logits(), statistics="tv"), TypeError, ["('tv',)", "str"]),
    "statistics without labels": (
        lambda: fused_kl(logits(), logits(), statistics=("cross_entropy",)),
        ValueError,
        ["cross_entropy", "labels"],
    ),
    "gradient": (lambda: fused_kl(logits(), logits(), gradient="both"), ValueError, ["'forward'", "'both'"]),
    "backend unknown": (
        lambda: fused_kl(logits(), logits(), backend="gpu"),
        ValueError,
        ["'gpu'", "'cpu'", "'triton'"],
    ),
    "backend cuda": (lambda: fused_kl(logits(), logits(), backend="cuda"), RuntimeError, ["'cuda'", "cannot serve"]),
    "triton and fp64": (
        lambda: fused_kl(logits().double(), logits(), backend="triton"),
        RuntimeError,
        ["'triton'", "fp64"],
    ),
    "module option": (lambda: kdkernels.nn.Divergence("kl", temprature=2.0), TypeError, ["temprature", "temperature"]),
    "module divergence": (lambda: kdkernels.nn.Divergence("hellingr"), ValueError, ["did you mean 'hellinger'"]),
    "next_token_labels": (lambda: kdkernels.next_token_labels(torch.ones(3)), ValueError, ["int64", "float32"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    if "triton" in name:
        pytest.importorskip("triton")
    call, exception, holds = BAD[name]
    with pytest.raises(exception) as raised:
        call()
    assert type(raised.value) is exception
    for part in holds:
        assert part in str(raised.value), f"{part!r} not in: {raised.value}"


@pytest.mark.parametrize("loss", [kdkernels.fused_sinkhorn_kd, kdkernels.fused_uld, class_ot])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_losses_that_take_logits_alone_say_so(loss, side):
    head = kdkernels.LinearLogits(torch.randn(ROWS, 3), torch.randn(VOCAB, 3))
    sparse = kdkernels.SparseLogProbs(LABELS[:, None], logits(ROWS, 1))
    sides = {"student": logits(), "teacher": logits()}
    for bad, kind in ((head, "LinearLogits"), (sparse, "SparseLogProbs")):
        with pytest.raises(TypeError, match=rf"^{side}: expected a tensor of logits; got {kind}; .* take a {kind}"):
            loss(**(sides | {side: bad}))
    with pytest.raises(TypeError, match=rf"^{side}: expected a tensor of logits; got list$"):
        loss(**(sides | {side: [1.0]}))


def test_devices_that_differ():
    with pytest.raises(ValueError, match="one device; got cpu and meta"):
        fused_kl(logits(), kdkernels.SparseLogProbs(LABELS[:, None].to("meta"), logits(ROWS, 1).to("meta")))
    with pytest.raises(ValueError, match=r"mask.*device"):
        fused_kl(logits(), logits(), mask=torch.ones(ROWS, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [VOCAB, -1, -101, 2**40])
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_label_out_of_range(backend, bad, hard_weight):
    """The error names the label and its row; masked rows may have any label."""
    labels = torch.tensor([3, -100, bad, 0])
    student = logits(grad=True)
    call = {"labels": labels, "hard_weight": hard_weight, "backend": backend}
    with pytest.raises(ValueError, match=rf"labels: expected 0 <= label < {VOCAB}.*got {bad} in row 2"):
        fused_kl(student, logits(), **call)
    assert student.grad is None
    assert fused_kl(student, logits(), mask=labels.ne(bad), **call).isfinite()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_temperature_in_a_tensor(bad, backend):
    for temperature, row in ((torch.tensor(bad), 0), (torch.tensor([1.0, 1.0, bad, 1.0]), 2)):
        with pytest.raises(ValueError, match=rf"temperature: expected finite and > 0.*; got {bad} in row {row}"):
            fused_kl(logits(), logits(), temperature=temperature, backend=backend)


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_hard_weight_in_a_tensor(bad, backend):
    with pytest.raises(ValueError, match=rf"hard_weight: expected from 0 to 1; got {bad}.* in row 1"):
        fused_kl(logits(), logits(), labels=LABELS, hard_weight=torch.tensor([0.5, bad, 0, 0]), backend=backend)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_an_unchecked_bad_value_makes_its_row_nan(backend):
    device = device_of(backend)
    student, teacher = logits().to(device).requires_grad_(), logits().to(device)
    labels = torch.tensor([3, VOCAB, 2**40, -7], device=device)
    temperature = torch.tensor([0.0, 1.0, 1.0, 1.0], device=device)
    loss = fused_kl(student, teacher, labels=labels, hard_weight=0.5, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, True, True]
    loss.sum().backward()
    assert student.grad[1:].isnan().all() and student.grad[0].isfinite().all()
    loss = fused_kl(student, teacher, temperature=temperature, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [True, False, False, False]
    hard_weight = torch.tensor([0.5, 0.5, 1.5, 0.5], device=device)
    loss = fused_kl(student, teacher, labels=labels % 5, hard_weight=hard_weight, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("backend", ["triton", "cuda", "cpu"])
def test_checks_make_a_bad_value_raise_everywhere(backend):
    """kdkernels.checks(True) makes every backend check values, also if the check costs a synchronisation."""
    device = device_of(backend)
    student, teacher = logits().to(device), logits().to(device)
    labels = torch.tensor([3, 4, VOCAB, 1], device=device)
    before = kdkernels.checks(True)
    try:
        with pytest.raises(ValueError, match=f"got {VOCAB} in row 2"):
            fused_kl(student, teacher, labels=labels, backend=backend)
        with pytest.raises(ValueError, match=r"temperature.*got 0.0 in row 0"):
            fused_kl(student, teacher, temperature=torch.zeros((), device=device), backend=backend)
    finally:
        kdkernels.checks(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_that_cannot_serve_says_why(backend, monkeypatch):
    from kdkernels.backends import native, triton

    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "missing_because", "ModuleNotFoundError: gone")
    monkeypatch.setattr(native.cuda, "module", None)
    monkeypatch.setattr(triton, "_INTERPRETED", False)
    if backend == "reference" or (backend == "triton" and DEVICE == "cuda"):
        assert fused_kl(logits(), logits(), backend="reference").isfinite()
        return
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot serve this call: .*(gone|GPU)"):
        fused_kl(logits(), logits(), backend=backend)
    assert fused_kl(logits(), logits()).isfinite(), "auto: expected the next backend that can serve the call"
