"""Settings of every test: a CPU executes the Triton and CUDA kernels, and new memory is filled with NaN."""

import importlib.util
import os

import torch

if torch.cuda.is_available():
    # Up to torch 2.9, products raise in deterministic mode without it. torch reads it before the first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it at import
# A graph in the compiler's disk cache may have the shapes that an operator's results had before a change.
os.environ.update(TORCHINDUCTOR_FX_GRAPH_CACHE="0", TORCHINDUCTOR_AUTOGRAD_CACHE="0")

import chips
import emulated
import interpreter
import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from kdkernels.backends import native

# The suite draws the same examples in each run. With --fuzz, pytest's --hypothesis-seed alone determines them.
COMMON = {"deadline": None, "print_blob": True, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("kdkernels", derandomize=True, **COMMON)
settings.register_profile("fuzz", derandomize=False, **COMMON)
settings.load_profile("kdkernels")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter.patch_once()


def pytest_addoption(parser):
    parser.addoption("--fuzz", action="store_true", help="run the property tests alone, on examples drawn at random")


def pytest_configure(config):
    if config.getoption("fuzz"):
        settings.load_profile("fuzz")


# Tests that take minutes begin first, so that no process ends long after the others.
LONG = (
    "test_kernels_compile_without_spilling_a_tile", "test_suite_passes_on_every_instruction_set",
    "test_a_backend_has_the_functions_of_the_interface", "test_installs_where_the_cuda_kernels_do_not_compile",
)  # fmt: skip


def is_property(function) -> bool:
    """Whether hypothesis draws the arguments of the test, or of a function that the test decorates with @given."""
    return is_hypothesis_test(function) or "given" in function.__code__.co_names


def pytest_collection_modifyitems(config, items):
    if config.getoption("fuzz"):
        others = [item for item in items if not is_property(item.function)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if is_property(item.function)]
    items.sort(key=lambda item: item.originalname not in LONG)
    if importlib.util.find_spec("triton") is None:
        skip = pytest.mark.skip(reason="triton is not installed")
        for item in items:
            callspec = getattr(item, "callspec", None)
            if callspec is not None and "triton" in callspec.params.values():
                item.add_marker(skip)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty fills with NaN (integers: their maximum), so that an element that no kernel wrote is visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def cuda_kernels_on_a_cpu(request):
    """Without a GPU, tests of the backend "cuda" run the CUDA kernels in the execution model.

    The modelled chip is "small", unless the test module names another in CUDA_CHIP.
    """
    callspec = getattr(request.node, "callspec", None)
    if torch.cuda.is_available() or callspec is None or callspec.params.get("backend") != "cuda":
        yield
        return
    if emulated.missing_because:
        pytest.skip(emulated.missing_because)
    with chips.on(getattr(request.module, "CUDA_CHIP", "small")):
        yield


@pytest.fixture(autouse=True)
def kernels_take_the_threads_of_torch(monkeypatch):
    """A call has torch's number of threads, even on a machine with fewer processors. test_threads.py tests it."""
    monkeypatch.setattr(native, "count_threads", lambda processors: torch.get_num_threads())
