"""Known defects of other libraries' losses on heads: one test for each, here or in test_linear.py.

test_linear.py covers products for frozen parts, gradients of weights summed in bf16, logits rounded to bf16 (and an
oracle with the same rounding), and memory that grows with the tokens.
"""

import pytest
import torch
from truth import BACKENDS, device_of

from kdkernels import LinearLogits, fused_divergence, fused_js, fused_kl

each_backend = pytest.mark.parametrize("backend", BACKENDS)
kernel_backends = pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
each_gradient = pytest.mark.parametrize("gradient", ["forward", "backward"])


def head(*leading, vocab=40, width=6, backend="cpu", dtype=torch.float32, trains=False, **options):
    device = device_of(backend)
    hidden, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((*leading, width), (vocab, width)))
    return LinearLogits(hidden.requires_grad_(trains), weight.requires_grad_(trains), **options)


@each_backend
@each_gradient
def test_second_backward_does_not_scale_twice(backend, gradient):
    """Each backward over a retained graph scales by its own grad_output.

    Another library scaled twice: grad_output = 2 gave four times the gradient the second time.
    """
    student, teacher = head(4, backend=backend, trains=True), head(4, backend=backend)
    loss = fused_js(student, teacher, gradient=gradient, backend=backend)
    leaves, two = (student.hidden, student.weight), torch.full_like(loss, 2.0)
    first, second, half = (
        [x.clone() for x in torch.autograd.grad(loss, leaves, g, retain_graph=True)] for g in (two, two, two / 2)
    )
    last = torch.autograd.grad(loss, leaves, two)
    for a, b, c, d in zip(first, second, half, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, d)
        torch.testing.assert_close(2 * c, a)


@each_backend
def test_vocabulary_masked_in_the_teacher_is_finite(backend):
    """A teacher's bias of -inf, a server's mask, leaves loss and gradients finite; JS was NaN in another library."""
    student = head(4, backend=backend, trains=True)
    bias = torch.zeros(40, device=student.device)
    bias[7:] = -torch.inf
    teacher = head(4, backend=backend, bias=bias, scale=0.7)
    for divergence in ("kl", "js", "skew_kl", "tv"):
        loss = fused_divergence(student, teacher, divergence, backend=backend)
        gradients = torch.autograd.grad(loss, (student.hidden, student.weight))
        assert all(x.isfinite().all() for x in (loss, *gradients)), divergence


@each_backend
def test_widths_that_differ_are_not_silent(backend):
    """Sides of different widths raise.

    Other libraries read the teacher with the student's stride, or returned finite numbers.
    """
    with pytest.raises(ValueError, match=r"40 classes and teacher 48.*vocab_size"):
        fused_kl(head(4, backend=backend), head(4, vocab=48, backend=backend), backend=backend)


@each_backend
@each_gradient
def test_padding_classes_have_no_mass(backend, gradient):
    """Identical models have loss 0 when the student has padding classes.

    Another library padded the student with zero logits, and the KL of identical models was above 0.
    """
    student = head(4, vocab=48, backend=backend, trains=True)
    teacher = LinearLogits(student.hidden.detach(), student.weight.detach()[:40].clone())
    loss = fused_kl(student, teacher, vocab_size=40, gradient=gradient, backend=backend)
    loss.backward()
    assert loss.abs() < 1e-6 and student.hidden.grad.abs().max() < 1e-6
    assert student.weight.grad.shape == (48, 6) and not student.weight.grad[40:].any()


@kernel_backends
def test_three_dimensions_are_chunked_by_rows(backend, monkeypatch):
    """[B, T, H] is chunked by rows; another library chunked along B, so one sequence was one chunk."""
    rows, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda add, a, b, **o: rows.append(a.shape[0]) or addmm(add, a, b, **o))
    student, teacher = head(1, 30, backend=backend), head(1, 30, backend=backend)
    got = fused_kl(student, teacher, chunk_rows=7, backend=backend)
    assert max(rows) == 7 and sum(rows) == 60
    want = fused_kl(LinearLogits(student.hidden[0], student.weight), LinearLogits(teacher.hidden[0], teacher.weight))
    torch.testing.assert_close(got, want)


@each_backend
def test_chunks_that_do_not_divide_the_rows(backend):
    """Any chunk size gives the same result; 20 tokens in 8 chunks crashed another library."""
    student, teacher = head(20, backend=backend, trains=True), head(20, backend=backend)
    found = []
    for chunk_rows in (None, 3, 19, 20, 21):
        loss = fused_kl(student, teacher, chunk_rows=chunk_rows, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, (student.hidden, student.weight))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@each_backend
@each_gradient
def test_all_ignored_has_a_graph_and_zero_gradients(backend, gradient):
    """The loss of ignored rows alone is 0 with a graph and zero gradients, also for a NaN grad_output.

    Other libraries gave NaN, a division by zero, or a loss without grad_fn.
    """
    student, teacher = head(4, backend=backend, trains=True), head(4, backend=backend)
    labels = torch.full((4,), -100, device=student.device)
    loss = fused_kl(student, teacher, labels=labels, gradient=gradient, backend=backend)
    assert loss == 0
    for factor in (1.0, torch.nan):
        gradients = torch.autograd.grad(loss, (student.hidden, student.weight), torch.full_like(loss, factor),
                                        retain_graph=True)  # fmt: skip
        if backend != "reference" or factor == 1.0:
            assert not any(x.any() for x in gradients)


@each_backend
@pytest.mark.parametrize("vocab", [1, 41, 47, 48])
def test_padding_lanes_are_not_capped_into_the_sum(backend, vocab):
    """Lanes past the vocabulary have no mass.

    Another library set them to -inf before the soft cap. The cap made them -cap, classes with mass.
    """
    student = head(3, vocab=vocab, backend=backend, softcap=0.5)
    got = fused_kl(student, head(3, vocab=vocab, backend=backend), statistics=("student_lse",), backend=backend)
    logits = (student.hidden.double() @ student.weight.double().t() / 0.5).tanh() * 0.5
    torch.testing.assert_close(got.statistics["student_lse"].double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


@kernel_backends
@each_gradient
def test_second_derivative_raises(backend, gradient):
    """A second derivative raises; another library's create_graph=True returned a gradient without a graph."""
    student, teacher = head(4, backend=backend, trains=True), head(4, backend=backend)
    loss = fused_kl(student, teacher, gradient=gradient, backend=backend)
    with pytest.raises(RuntimeError, match=r'second derivatives.*backend="reference"'):
        torch.autograd.grad(loss, student.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r'torch.func.*backend="reference"'):
        torch.func.grad(lambda w: fused_kl(LinearLogits(student.hidden, w), teacher, backend=backend))(student.weight)


@kernel_backends
def test_fp16_gradients_survive_until_the_loss_scale(backend):
    """fp16 gradients are scaled by the loss scaler before they are rounded.

    A gradient of a mean is about 1 / (N V), which is 0 in fp16.
    """
    rows, vocab = 64, 3000
    student = head(rows, vocab=vocab, backend=backend, dtype=torch.float16, trains=True)
    teacher = head(rows, vocab=vocab, backend=backend, dtype=torch.float16)
    scaler = 2.0**16
    loss = fused_kl(student, teacher, normalizer=1e5, backend=backend)
    got = torch.autograd.grad(loss * scaler, (student.hidden, student.weight))
    double = LinearLogits(*(x.detach().double().requires_grad_() for x in (student.hidden, student.weight)))
    want = torch.autograd.grad(
        scaler * fused_kl(double, LinearLogits(teacher.hidden.double(), teacher.weight.double()), normalizer=1e5,
                          backend="reference"), (double.hidden, double.weight))  # fmt: skip
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y).norm() < 0.02 * y.norm()


@kernel_backends
@each_gradient
def test_inputs_are_left_as_they_are(backend, gradient):
    """A loss changes no input; other libraries divided logits and hidden states in place, or overwrote them."""
    student, teacher = head(6, backend=backend, trains=True, softcap=3.0), head(6, backend=backend, scale=0.3)
    logits = torch.randn(6, 40, device=student.device, requires_grad=True)
    tensors = (student.hidden, student.weight, teacher.hidden, teacher.weight, logits)
    before = [x.detach().clone() for x in tensors]
    for s, t in ((student, teacher), (logits, teacher), (student, logits.detach())):
        fused_js(s, t, temperature=2.0, gradient=gradient, chunk_rows=4, backend=backend).backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
