"""The first minutes on a GPU: the self-test, and a CUDA backend that is missing or passed over."""

import pytest
import torch

from kdkernels import selftest

# ---- the self-test


@pytest.fixture
def small_checks(monkeypatch):
    monkeypatch.setattr(selftest, "SHAPES", ((5, 1), (5, 20)))
    monkeypatch.setattr(selftest, "CATALOGUE", {"kl": None})
    monkeypatch.setattr(selftest, "TAILS", ("bucket",))
    monkeypatch.setattr(selftest, "DTYPES", (torch.float32,))


def test_the_device_draws_the_inputs_of_the_selftest(small_checks, monkeypatch):
    """The CPU of a GPU machine would take a minute to draw them."""
    drawn = []
    for name in ("randn", "rand", "randint"):
        draw = getattr(torch, name)

        def recorded(*shape, draw=draw, **options):
            drawn.append((options["device"], options["generator"].device.type))
            return draw(*shape, **options)

        monkeypatch.setattr(torch, name, recorded)
    assert selftest.check("cpu", named=["cpu"])
    assert len(drawn) > 30 and set(drawn) == {("cpu", "cpu")}


def test_the_selftest_fails_if_a_backend_that_was_named_does_not_serve(small_checks, capsys):
    assert not selftest.check("cpu", named=["cpu", "cuda"])
    printed = capsys.readouterr().out
    assert "cuda       not checked: it takes tensors" in printed or "cuda       not checked: the native" in printed
    assert "all right" in printed and "WRONG: no kernel of cuda was checked" in printed
    assert not selftest.check("cpu", named=["cuda"])
    assert "none of cuda serves on cpu: nothing was checked" in capsys.readouterr().out


def test_the_selftest_knows_no_other_backend(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["selftest", "--backend", "reference"])
    with pytest.raises(SystemExit):
        selftest.main()
    assert "cpu, cuda, triton" in " ".join(capsys.readouterr().err.replace("'", "").split())
