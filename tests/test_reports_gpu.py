"""The first minutes on a GPU: the self-test, and a CUDA backend that is missing or passed over."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import emulated
import pytest
import torch
from test_sinkhorn_cuda import workspace_bytes, zeros

from kdkernels import backends, fused_kl, selftest
from kdkernels.backends import native

ROOT = Path(__file__).parent.parent

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


# ---- CUDA kernels that are missing


@pytest.mark.parametrize(
    ("nvcc_does", "required", "failure"),
    [
        (
            "echo 'rows.cu(3): error: no such thing'; exit 1",
            "1",
            "the compiler failed: rows.cu(3): error: no such thing",
        ),
        ("echo 'rows.cu(3): error: no such thing'; exit 1", "", None),
        ("exit 0", "1", None),
        (None, "1", "KDKERNELS_NVCC=/nowhere/nvcc is not a program"),
    ],
)
def test_a_build_that_requires_cuda_fails_without(tmp_path, nvcc_does, required, failure):
    """The compiler of the CPU kernels is `true`, so nothing is linked."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    border = Path("kdkernels", "sources.py")
    (tmp_path / border.parent).mkdir(parents=True)
    for name in (border, "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    nvcc = Path("/nowhere/nvcc")
    if nvcc_does is not None:
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(f'#!/bin/sh\ncase "$*" in *-MMD*) {nvcc_does};; *) echo V13.0;; esac\n')
        nvcc.chmod(0o755)
    environment = {"CXX": "true", "KDKERNELS_NVCC": str(nvcc), "KDKERNELS_REQUIRE_CUDA": required}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "KDKERNELS_NO_CUDA": "", "KDKERNELS_CUDA_ARCHS": "", **environment},
    )  # fmt: skip
    assert (done.returncode != 0) == (failure is not None), done.stderr
    assert (tmp_path / "kdkernels" / "_build.json").exists() == (failure is None)
    if failure:
        last = done.stderr.splitlines()[-1]
        assert last == f"error: KDKERNELS_REQUIRE_CUDA=1, and there are no CUDA kernels: {failure}"
    elif nvcc_does != "exit 0":
        assert "installing without CUDA kernels: the compiler failed" in done.stderr


# ---- CUDA kernels that are passed over

OLD_DRIVER = "cudaGetDeviceCount: CUDA driver version is insufficient for CUDA runtime version"


@pytest.fixture
def gpu_tensor(monkeypatch):
    """Makes stand-ins for tensors of an NVIDIA GPU. Its driver is older than the CUDA of the kernels."""
    monkeypatch.setattr(torch.version, "hip", None)
    module = ModuleType("kernels")
    module.cuda_refusal = lambda device: OLD_DRIVER
    monkeypatch.setattr(native.cuda, "module", module)
    monkeypatch.setattr(native.cuda, "device_type", "cuda")
    native._warned_of_device.cache_clear()
    yield lambda dtype=torch.float32: SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype)
    native._warned_of_device.cache_clear()


def warnings_of(*calls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return [str(warning.message) for warning in caught]


def test_auto_says_once_why_a_gpu_goes_without_the_cuda_kernels(gpu_tensor):
    x = gpu_tensor()

    def auto():
        assert backends.select("auto", x, x) in ("triton", "reference")

    (said,) = warnings_of(auto, auto)
    assert said.startswith(f"kdkernels passes over its CUDA kernels on this GPU: {OLD_DRIVER}.")


def test_auto_does_not_warn_of_what_no_driver_could_change(gpu_tensor, monkeypatch):
    x, on_cpu = gpu_tensor(torch.float64), torch.empty(1, 1)
    named = gpu_tensor()
    calls = [
        lambda: backends.select("auto", x, x),  # fp64
        lambda: backends.select("auto", on_cpu, on_cpu),
        lambda: backends.select("reference", named, named),
    ]
    assert warnings_of(*calls) == []
    monkeypatch.setattr(native.cuda, "module", None)
    monkeypatch.setattr(native, "cuda_missing_because", "KDKERNELS_NO_CUDA=1 was set at installation")
    assert warnings_of(lambda: backends.select("auto", named, named)) == []


# ---- a card with 99 KiB of shared memory a block, and clusters of at most 8 blocks (sm_120)

SMALL_CARD = {
    "major": 12, "multiprocessors": 170, "max_cluster": 8, "l2_bytes": 96 << 20,
    "shared_memory_per_block": 99 << 10, "shared_memory_per_multiprocessor": 100 << 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_card():
    if emulated.missing_because:
        pytest.skip(emulated.missing_because)
    return emulated.cuda_model().configure_device(**SMALL_CARD)


@pytest.mark.parametrize(
    ("vocab", "dtype", "cluster", "staged"),
    [(32_000, torch.bfloat16, 4, True), (151_936, torch.bfloat16, 8, True), (151_936, torch.float32, 8, False)],
)
def test_plans_ask_a_card_for_its_shared_memory_and_clusters(small_card, vocab, dtype, cluster, staged):
    x = torch.zeros(1, vocab, dtype=dtype)
    with emulated.serving(device=small_card) as model:
        model.clear_launches()
        assert fused_kl(x, x, backend="cuda") == 0
        launch = model.launches()[0]
    assert launch["cluster"] == cluster and (launch["shared"] > 2048) == staged
    assert launch["shared"] <= SMALL_CARD["shared_memory_per_block"]


def test_problems_of_more_points_than_a_card_holds_are_refused(small_card, gpu_tensor, monkeypatch):
    """Else "auto" would choose CUDA kernels that raise."""
    properties = SimpleNamespace(shared_memory_per_block_optin=SMALL_CARD["shared_memory_per_block"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with monkeypatch.context() as patch:
        patch.setattr(native.cuda.module, "cuda_refusal", lambda device: "")
        native._asked_once.cache_clear()
        x = gpu_tensor()
        assert backends.refuse("cuda", x, x, 1254) is None
        assert backends.refuse("cuda", x, x, 1255) == "this device's shared memory holds 1254 points a side; got 1255"
        assert warnings_of(lambda: backends.select("auto", x, x, 1255)) == []
    native._asked_once.cache_clear()
    with emulated.serving(device=small_card):
        workspace_bytes(zeros(1254, 1254, 1, problems=1), unrolled=False)
        with pytest.raises(RuntimeError, match="1300 points take"):
            workspace_bytes(zeros(1300, 1300, 1, problems=1), unrolled=False)
