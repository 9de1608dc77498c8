"""torch's demands on an operator: compile, opcheck, autocast, checkpointing, saved tensors, hooks, FakeTensors."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from truth import BACKENDS, DIVERGENCES, device_of, opcheck, run

import kdkernels
from kdkernels import Divergence, fused_divergence, fused_js, fused_kl, ops
from kdkernels.backends import native
from kdkernels.families.options import RowOptions
from kdkernels.families.rows import Rows
from kdkernels.sources import version_of_operators

each_backend = pytest.mark.parametrize("backend", BACKENDS)
kernel_backends = pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def annealed_step(student, teacher, temperature, beta, mask, labels, hard_weight, normalizer, gradient):
    out = fused_js(
        student, teacher, beta=beta, temperature=temperature, mask=mask, labels=labels, hard_weight=hard_weight,
        normalizer=normalizer, gradient=gradient, statistics=("tv", "student_top1"), backend="cpu",
    )  # fmt: skip
    return out.loss, out.statistics["tv"]


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_compiles_whole_and_twice_at_most(gradient):
    """Ten annealed temperatures, betas, hard weights, normalizers and token counts must compile at most twice."""
    counter = CompileCounter()
    compiled = torch.compile(annealed_step, fullgraph=True, backend=counter)
    for i in range(10):
        rows = 7 + 2 * i
        student, teacher = torch.randn(rows, 50, requires_grad=True), torch.randn(rows, 50)
        mask, labels = torch.rand(rows) > 0.3, torch.randint(0, 50, (rows,))
        compiled(student, teacher, 1.0 + 0.1 * i, 0.1 + 0.05 * i, mask, labels, 0.1 + 0.01 * i, 10.0 + i, gradient)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_compiled_gradients_are_the_eager_ones(gradient):
    """The graph continues on both sides of the loss, and the loss is multiplied by a factor."""
    head = torch.randn(16, 60)

    def step(hidden, teacher, scale):
        loss = fused_divergence(hidden @ head, teacher, "skew_kl", gradient=gradient, backend="cpu")
        return loss * scale + hidden.square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    for rows in (5, 9, 12):
        hidden, teacher = torch.randn(rows, 16, requires_grad=True), torch.randn(rows, 60)
        (want,) = torch.autograd.grad(step(hidden, teacher, 2.5), hidden)
        (got,) = torch.autograd.grad(compiled(hidden, teacher, 2.5), hidden)
        torch.testing.assert_close(got, want)


def test_a_compiled_graph_names_the_version_of_its_operators(tmp_path):
    """Inductor's cache on disk keeps a graph under the text of its code. A graph of a version whose `rows` returned two
    row sums was found there by a version whose `rows` returns three, and its call raised: "expected size 3==2"."""
    codes = []
    compiled = torch.compile(fused_kl, fullgraph=True, backend=lambda graph, _: codes.append(graph.code) or graph)
    with torch.no_grad():
        compiled(torch.randn(3, 50), torch.randn(3, 50), backend="cpu")
    (code,) = codes
    assert f"torch.ops.kdkernels.rows.{ops.VERSION}(" in code
    for name in torch.ops.kdkernels:
        assert getattr(torch.ops.kdkernels, name).overloads() == [ops.VERSION], name

    package, copy = Path(kdkernels.__file__).parent, tmp_path / "kdkernels"
    (copy / "families").mkdir(parents=True)
    for source in (package / "ops.py", *(package / "families").glob("*.py")):
        place = copy / source.relative_to(package)
        place.write_bytes(source.read_bytes().replace(b"\n", b"\r\n"))
    (copy / "families" / ".#rows.py").symlink_to("nowhere")
    assert version_of_operators(copy) == ops.VERSION, "git may convert line endings, and an editor leaves dot files"
    rows = copy / "families" / "rows.py"
    rows.write_bytes(rows.read_bytes().replace(b'"shift")', b'"shift", "more")'))
    assert version_of_operators(copy) not in (ops.VERSION, "frozen")
    rows.unlink()
    rows.mkdir()
    assert version_of_operators(copy) == "frozen"


def test_compiles_modules_without_grad_and_reference():
    module = kdkernels.nn.Divergence("kl", temperature=2.0)
    student, teacher = torch.randn(4, 30, requires_grad=True), torch.randn(4, 30)
    for backend in ("cpu", "reference"):
        compiled = torch.compile(lambda s, t, b=backend: module(s, t, backend=b), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(student, teacher), module(student, teacher))
        with torch.no_grad():
            torch.testing.assert_close(compiled(student, teacher), module(student, teacher))


def operator_arguments(backend):
    device = device_of(backend)
    student, teacher = torch.randn(2, 3, 40, device=device), torch.randn(2, 3, 44, device=device).bfloat16()
    row_scale = torch.rand(6, device=device)
    labels = torch.randint(0, 40, (6,), device=device)
    temperature, hard_weight, parameters = (torch.full((1,), x, device=device) for x in (1.5, 0.3, 0.4))
    options = RowOptions(row_scale, temperature, labels=labels, hard_weight=hard_weight)
    problem = Rows(student, teacher, options, "js", parameters, 40, True)
    without = Rows(
        student, teacher, RowOptions(row_scale, temperature, temperature_squared=True), "kl", parameters, 40, False
    )
    floats = ops.row_floats(problem, backend)
    sums, _, _ = ops.row_sums(problem, floats, backend)
    return {
        "rows": (ops.rows, (problem, [True], backend)),
        "rows without": (ops.rows, (without, [False], backend)),
        "row_floats": (ops.row_floats, (problem, backend)),
        "row_sums": (ops.row_sums, (problem, floats, backend)),
        "row_gradient": (ops.row_gradient, (problem, floats, sums, backend)),
        "scale": (ops.scale, (student.clone(), row_scale, backend)),
        "scale_": (ops.scale_, (student.clone(), row_scale, backend)),
    }


@kernel_backends
@pytest.mark.parametrize("name", ["rows", "rows without", "row_floats", "row_sums", "row_gradient", "scale", "scale_"])
def test_opcheck(backend, name):
    operator, arguments = operator_arguments(backend)[name]
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, and NaN fills would differ
    opcheck(operator, *arguments)


@kernel_backends
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_the_three_sweeps_make_the_fused_one(backend, divergence):
    """The sequence row_floats, row_sums, row_gradient must give the results of `rows`."""
    device = device_of(backend)
    student, teacher = torch.randn(2, 3, 300, device=device), torch.randn(2, 3, 300, device=device)
    row_scale = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.5], device=device)
    labels = torch.randint(0, 300, (6,), device=device)
    temperature, hard_weight = torch.full((1,), 1.3, device=device), torch.full((1,), 0.2, device=device)
    parameters = torch.full((1,), divergence.parameter or 1.0, device=device)
    options = RowOptions(row_scale, temperature, labels=labels, hard_weight=hard_weight)
    problem = Rows(student, teacher, options, divergence.name, parameters, 300, True)
    _, gradient, floats, sums, statistics, top1 = ops.rows(problem, [True], backend)
    alone = ops.row_floats(problem, backend)
    torch.testing.assert_close(alone, floats)
    again, statistics_again, top1_again = ops.row_sums(problem, floats, backend)
    close = {"rtol": 1e-4, "atol": 2e-6}
    torch.testing.assert_close(again, sums, **close)
    torch.testing.assert_close(statistics_again, statistics, **close)
    assert torch.equal(top1_again, top1)
    gradient_again = ops.row_gradient(problem, floats, sums, backend)
    torch.testing.assert_close(gradient_again, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_gradcheck(divergence, backend, gradient):
    torch.manual_seed(3)
    student, teacher = torch.randn(3, 7, dtype=torch.float64, requires_grad=True), torch.randn(3, 7).double()
    labels, temperature = torch.tensor([1, -100, 3]), torch.tensor([0.7, 1.0, 2.0], dtype=torch.float64)
    options = {"labels": labels, "temperature": temperature, "backend": backend, "gradient": gradient}
    for more in ({"hard_weight": 0.3}, {"reduction": "none", "temperature_squared": True}, {"reduction": "sum"}):
        torch.autograd.gradcheck(
            lambda s, more=more: fused_divergence(s, teacher, divergence, **options, **more), student
        )


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_reference_is_twice_differentiable(divergence):
    student, teacher = torch.randn(2, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 6).double()
    torch.autograd.gradgradcheck(
        lambda s: fused_divergence(s, teacher, divergence, temperature=1.5, backend="reference"), student
    )


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend, dtype):
    device = device_of(backend)
    student, teacher = torch.randn(3, 200, device=device), torch.randn(3, 200, device=device)
    plain = run(student, teacher, "js", reduction="mean", backend=backend)
    with torch.autocast(device, dtype=dtype):
        cast = run(student, teacher, "js", reduction="mean", backend=backend)
    assert cast.loss.dtype == torch.float32 and cast.gradient.dtype == torch.float32
    assert torch.equal(cast.loss, plain.loss) and torch.equal(cast.gradient, plain.gradient)


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant):
    device = device_of(backend)
    hidden = torch.randn(4, 8, device=device, requires_grad=True)
    head, teacher = torch.randn(8, 100, device=device), torch.randn(4, 100, device=device)

    def loss(x):
        return fused_kl(x @ head, teacher, backend=backend)

    (want,) = torch.autograd.grad(loss(hidden), hidden)
    checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    torch.testing.assert_close(hidden.grad, want)


@kernel_backends
def test_saved_tensors_pass_through_hooks(backend):
    """save_for_backward must hold everything kept for backward: one gradient, or the inputs and numbers per row."""
    device = device_of(backend)
    student, teacher = torch.randn(5, 64, device=device, requires_grad=True), torch.randn(5, 64, device=device)
    for gradient, large in (("forward", 1), ("backward", 2)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.clone()) or x, lambda x: x):
            loss = fused_kl(student, teacher, gradient=gradient, backend=backend)
        assert sum(x.numel() >= 5 * 64 for x in saved) == large
        loss.backward()


@kernel_backends
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_batched_gradients(backend, gradient):
    device = device_of(backend)
    student, teacher = torch.randn(3, 20, device=device), torch.randn(3, 20, device=device)

    def rows(x):
        return fused_js(x, teacher, reduction="none", gradient=gradient, backend=backend)

    one_by_one = torch.autograd.functional.jacobian(rows, student)
    torch.testing.assert_close(torch.autograd.functional.jacobian(rows, student, vectorize=True), one_by_one)


def test_a_plain_backward_scales_nothing_on_a_cpu(monkeypatch):
    student, teacher = torch.randn(3, 50, requires_grad=True), torch.randn(3, 50)
    scaled = []
    monkeypatch.setattr(ops, "scale_", lambda rows, factor, backend: scaled.append(factor))
    fused_kl(student, teacher, backend="cpu").backward()
    assert not scaled and student.grad.any()
    (2 * fused_kl(student, teacher, backend="cpu")).backward()
    assert [factor.tolist() for factor in scaled] == [[2.0] * 3]


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_a_loss_without_a_gradient_gives_none(gradient):
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    student, teacher = torch.randn(3, 50, requires_grad=True), torch.randn(3, 50)
    Nothing.apply(fused_kl(student, teacher, gradient=gradient, backend="cpu")).backward()
    assert student.grad is None


@kernel_backends
def test_missing_derivatives_raise(backend):
    """Forward-mode AD and torch.func must raise: an operator without a derivative silently gives a tangent of 0."""
    device = device_of(backend)
    student, teacher = torch.randn(3, 20, device=device), torch.randn(3, 20, device=device)

    def loss(x, y=teacher):
        return fused_kl(x, y, backend=backend)

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, teacher)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            loss(dual)
        assert loss(student).isfinite()
    for transformed in (
        lambda: torch.func.jvp(loss, (student,), (teacher,)),
        lambda: torch.func.grad(loss)(student),
        lambda: torch.vmap(loss)(student, teacher),
    ):
        with pytest.raises(RuntimeError, match='backend="reference"'):
            transformed()


def test_reference_goes_through_torch_func():
    student, teacher = torch.randn(3, 4, 20).double(), torch.randn(3, 4, 20).double()

    def loss(x, y=teacher[0]):
        return fused_js(x, y, backend="reference")

    leaf = student[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(student[0]), want)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(loss, (student[0],), (student[1],))
    torch.testing.assert_close(torch.vmap(loss)(student, teacher)[0], loss(student[0]))


@kernel_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_inference_mode_made_can_be_the_teacher(backend, reduction):
    device = device_of(backend)
    with torch.inference_mode():
        teacher, labels = torch.randn(4, 50, device=device), torch.randint(0, 50, (4,), device=device)
        temperature = torch.tensor(2.0, device=device)
    options = {"labels": labels, "temperature": temperature, "hard_weight": 0.5, "backend": backend}
    student = torch.randn(4, 50, device=device)
    got = run(student, teacher, "js", reduction=reduction, **options)
    want = run(student, teacher.clone(), "js", reduction=reduction, **options)
    torch.testing.assert_close(got.gradient, want.gradient)


@kernel_backends
def test_no_graph_and_no_gradient_without_grad(backend):
    device = device_of(backend)
    student, teacher = torch.randn(5, 64, device=device, requires_grad=True), torch.randn(5, 64, device=device)
    with torch.no_grad():
        assert not fused_kl(student, teacher, backend=backend).requires_grad
    assert not fused_kl(student.detach(), teacher, backend=backend).requires_grad
    with torch.inference_mode():
        assert fused_kl(student.detach(), teacher, backend=backend).isfinite()


@pytest.mark.parametrize("gradient", ["forward", "backward"])
@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_memory_is_the_gradient_and_a_few_rows(gradient, divergence, monkeypatch):
    """The only allocation of size [N, V] is the gradient, in either mode. Without grad nothing of that size exists."""
    rows, vocab = 64, 20_000
    torch.use_deterministic_algorithms(False)
    student, teacher = torch.randn(rows, vocab, requires_grad=True), torch.randn(rows, vocab)

    def allocated(call):
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        return [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0]

    one = rows * vocab * 4
    with monkeypatch.context() as patch:
        workspaces = []
        patch.setattr(
            native, "_cpu_bytes", lambda size: workspaces.append(size) or torch.empty(size, dtype=torch.uint8)
        )
        fused_divergence(student[:1], teacher[:1], divergence)
    few_rows = max(workspaces)
    assert few_rows < 64 + torch.get_num_threads() * 3 * 4 * vocab
    sizes = allocated(lambda: fused_divergence(student, teacher, divergence, gradient=gradient).backward())
    assert sizes.count(one) == 1
    assert all(size <= few_rows for size in sizes if size != one)
    with torch.no_grad():
        assert all(size <= few_rows for size in allocated(lambda: fused_divergence(student, teacher, divergence)))


def test_no_value_is_read_on_the_way():
    """Forward and backward run under FakeTensors, which cannot read a value, so no call synchronises with a device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        student, teacher = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 64)
        labels, mask = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
        for gradient in ("forward", "backward"):
            out = fused_divergence(
                student, teacher, Divergence("js", beta=0.3), labels=labels, mask=mask, hard_weight=torch.rand(2, 5),
                temperature=torch.rand(2, 5), row_weight=torch.rand(2, 5), normalizer=torch.tensor(3),
                statistics=("tv", "teacher_top1"), gradient=gradient, backend="cpu",
            )  # fmt: skip
            out.loss.backward()
            assert student.grad.shape == student.shape and out.statistics["tv"].shape == (2, 5)


gpu_backends = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.mark.gpu
@gpu_backends
def test_no_synchronisation_on_a_gpu(backend):
    student, teacher = torch.randn(5, 640, device="cuda", requires_grad=True), torch.randn(5, 640, device="cuda")
    options = {"labels": torch.randint(0, 640, (5,), device="cuda"), "hard_weight": 0.5, "backend": backend}
    fused_js(student, teacher, temperature=2.0, **options).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gradient in ("forward", "backward"):
            fused_js(student, teacher, temperature=2.0, gradient=gradient, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu_backends
@pytest.mark.parametrize("vocab", [640, 100_000])
def test_streams_and_graphs_on_a_gpu(backend, vocab):
    """A call runs on a side stream. A CUDA graph captures a call and replays it on new values."""
    student = torch.randn(50, vocab, device="cuda", requires_grad=True)
    teacher = torch.randn(50, vocab, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            student.grad = None
            fused_kl(student, teacher, backend=backend).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    student.grad = None
    with torch.cuda.graph(graph):
        loss = fused_kl(student, teacher, backend=backend)
        loss.backward()
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    want = run(student, teacher, "kl", reduction="mean")
    torch.testing.assert_close(loss, want.loss)
    torch.testing.assert_close(student.grad, want.gradient)


@pytest.mark.gpu
@gpu_backends
def test_a_call_runs_on_the_device_of_its_tensors(backend):
    """The current device may be another; the call must not change it."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    student, teacher = torch.randn(50, 5000), torch.randn(50, 5000)
    want = run(student, teacher, "js", backend="cpu")
    for device in ("cuda:0", "cuda:1"):
        with torch.cuda.device(0):
            got = run(student.to(device), teacher.to(device), "js", backend=backend)
            assert torch.cuda.current_device() == 0
        torch.testing.assert_close(got.loss.cpu(), want.loss)
        torch.testing.assert_close(got.gradient.cpu(), want.gradient, rtol=1e-4, atol=1e-6)
