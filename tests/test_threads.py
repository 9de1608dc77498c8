"""The number of threads of a CPU call: never more than the processors, and one in a forked child."""

import json
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch

from kdkernels.backends import native
from kdkernels.backends.native import threads
from kdkernels.backends.native.threads import count_threads, quota_of_control_groups

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's affinity and /proc")
needs_module = pytest.mark.skipif(native._native is None, reason=f"no native module: {native.missing_because}")


# ---- the count


@pytest.fixture
def torch_has(monkeypatch):
    """Sets the number of torch's threads, for a process that has not warned yet and whose group has no quota."""
    monkeypatch.setattr(threads, "_warned", False)
    monkeypatch.setattr(threads, "_QUOTA", math.inf)
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_torch_decides_up_to_the_number_of_processors(torch_has, count):
    torch_has(count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_threads(lambda: 4) == count


@pytest.mark.parametrize(("processors", "quota", "available"), [(4, math.inf, 4), (8, 2, 2)])
def test_more_threads_than_processors_are_one_and_warn_once(torch_has, monkeypatch, processors, quota, available):
    monkeypatch.setattr(threads, "_QUOTA", quota)
    torch_has(5)
    with pytest.warns(RuntimeWarning, match=rf"has 5 threads.*has {available} .*set_num_threads\({available}\)"):
        assert count_threads(lambda: processors) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_threads(lambda: processors) == 1
    torch_has(available)
    assert count_threads(lambda: processors) == available


def test_a_forked_child_has_one_thread_and_no_warning(torch_has):
    torch_has(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_threads(lambda: 0) == 1


# (the lines of /proc/self/cgroup, the files of the hierarchies, the processors)
GROUPS = {
    "version 2": ("0::/", {"cpu.max": "150000 100000"}, 2),
    "version 2 without a quota": ("0::/", {"cpu.max": "max 100000"}, math.inf),
    "version 2, the quota of an outer group": (
        "0::/slice/job",
        {"slice/job/cpu.max": "800000 100000", "slice/cpu.max": "300000 100000", "cpu.max": "max 100000"},
        3,
    ),
    "version 1": (
        "4:memory:/\n3:cpu,cpuacct:/job:1",
        {"cpu/job:1/cpu.cfs_quota_us": "50000", "cpu/job:1/cpu.cfs_period_us": "100000"},
        1,
    ),
    "version 1 without a quota": (
        "3:cpu:/",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        math.inf,
    ),
    "a container that sees the host's path": (
        "3:cpuacct,cpu:/docker/abc\n0::/",
        {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
        4,
    ),
    "a group that is not ours": ("0::/job", {"job2/cpu.max": "100000 100000"}, math.inf),
    "cpuset is not cpu": (
        "3:cpuset:/",
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
        math.inf,
    ),
    "another format": ("nonsense\n0::/\n\n", {"cpu.max": "a b c"}, math.inf),
    "a period of 0": ("0::/", {"cpu.max": "100000 0"}, math.inf),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_quota_of_the_control_groups(name, tmp_path):
    lines, files, expected = GROUPS[name]
    (tmp_path / "cgroup").write_text(lines)
    for file, text in files.items():
        path = tmp_path / "root" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert quota_of_control_groups(tmp_path / "cgroup", tmp_path / "root") == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert quota_of_control_groups(tmp_path / "absent", tmp_path) == math.inf


# ---- the process


def printed_by(code: str, timeout: float = 120) -> dict:
    """The JSON object that the code prints in a Python of its own, which has one thread before the code runs."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "2"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


ON_ONE_PROCESSOR = """
import json, os, warnings
import torch, kdkernels

all_processors = os.sched_getaffinity(0)
student, teacher = torch.randn(8, 20_000, requires_grad=True), torch.randn(8, 20_000)

def started(threads):
    "The threads that a call with gradient starts, and its warnings."
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.autograd.grad(kdkernels.fused_kl(student, teacher), student)
    return len(os.listdir("/proc/self/task")) - before, [str(x.message) for x in seen]

os.sched_setaffinity(0, {min(all_processors)})
found = [started(16), started(9), started(1)]
os.sched_setaffinity(0, all_processors)
found.append(started(2))
print(json.dumps({"found": found, "processors": len(all_processors)}))
"""


@needs_linux
@needs_module
def test_a_call_on_one_processor_starts_no_thread():
    """The affinity and torch's number are those of the call, though both change after the first call."""
    told = printed_by(ON_ONE_PROCESSOR)
    crowded, still_crowded, alone, wide = told["found"]
    assert crowded[0] == 0 and len(crowded[1]) == 1 and "torch.set_num_threads(1)" in crowded[1][0]
    assert still_crowded == alone == [0, []]
    assert wide == ([1, []] if told["processors"] >= 2 and threads._QUOTA >= 2 else [0, []])


FORKED = """
import ctypes, hashlib, json, os, select, signal
import torch, kdkernels
from kdkernels import backends
from kdkernels.backends import native

def loss_and_gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]

student, other = (torch.randn(6, 20_000, requires_grad=True) for _ in range(2))
teacher, short = torch.randn(6, 20_000), torch.randn(6, 15_000)
labels = torch.randint(0, 20_000, (6,))
cost = torch.rand(4, 32, 32, requires_grad=True)
flat, sloped, total, part = torch.randn(50_000), torch.randn(50_000), torch.randn(50_000), torch.randn(50_000).half()
kernels = backends.kernels("cpu")

def head():
    kernels.softcap_(flat, 30.0)
    kernels.softcap_gradient_(sloped, flat, 30.0)
    kernels.accumulate_(total, part)
    kernels.scale_(sloped.view(5, 10_000), torch.full((5,), 3.0))
    return flat, sloped, total

def kl(gradient):
    loss = kdkernels.fused_kl(student, teacher, labels=labels, hard_weight=0.3, gradient=gradient)
    return loss_and_gradients(2 * loss, student)

def sinkhorn(gradient):
    found = kdkernels.fused_sinkhorn(cost, epsilon=0.1, iterations=20, gradient=gradient)
    return loss_and_gradients(found.value.sum(), cost)

FAMILIES = {
    "kl": lambda: kl("forward"),
    "kl in backward": lambda: kl("backward"),
    "head": head,
    "topk_log_probs": lambda: kdkernels.topk_log_probs(teacher, 64).log_probs[None],
    "sinkhorn": lambda: sinkhorn("unrolled"),
    "sinkhorn implicit": lambda: sinkhorn("implicit"),
    "sinkhorn_kd": lambda: loss_and_gradients(kdkernels.fused_sinkhorn_kd(student, teacher), student),
    "uld": lambda: loss_and_gradients(kdkernels.fused_uld(student, short), student),
}

def digest(call):
    bytes_of = lambda x: ctypes.string_at(x.data_ptr(), x.nbytes)
    return hashlib.sha256(b"".join(map(bytes_of, call()))).hexdigest()

def in_child(text):
    "The text that the function returns in a forked child, or None if the child does not end in time."
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, str(text()).encode())
        except Exception as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    answer = os.read(reading, 1000).decode() if select.select([reading], [], [], 15)[0] else None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return answer

alone = len(os.listdir("/proc/self/task")) == 1
told = {"alone": alone, "processors alone": in_child(native.processors)}
torch.set_num_threads(2)
torch.randn(1 << 17).exp()  # torch starts a thread
inputs = [x.clone() for x in (flat, sloped, total)]
wanted = {name: digest(call) for name, call in FAMILIES.items()}
for x, y in zip((flat, sloped, total), inputs):
    x.copy_(y)
told["threads"] = len(os.listdir("/proc/self/task"))
told["processors"] = in_child(native.processors)
told["children"] = {name: [wanted[name], in_child(lambda: digest(call))] for name, call in FAMILIES.items()}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told_by_children():
    return printed_by(FORKED)


@needs_linux
@needs_module
@pytest.mark.parametrize(
    "family",
    [
        "kl",
        "kl in backward",
        "head",
        "topk_log_probs",
        "sinkhorn",
        "sinkhorn implicit",
        "sinkhorn_kd",
        "uld",
    ],
)
def test_a_child_of_a_parent_with_threads_finds_the_parents_bits(told_by_children, family):
    assert told_by_children["threads"] > 1
    in_parent, in_child = told_by_children["children"][family]
    assert in_child is not None, "the child hangs"
    assert in_child == in_parent


FORKED_BEFORE_A_LOSS = """
import json, os, select, signal
import torch, kdkernels

torch.set_num_threads(2)
student, teacher = torch.randn(8, 20_000, requires_grad=True), torch.randn(8, 20_000)
torch.randn(1 << 18).exp()  # torch starts a thread
reading, writing = os.pipe()
child = os.fork()
if not child:
    loss = kdkernels.fused_kl(student, teacher)
    loss.backward()
    os.write(writing, str(loss.item()).encode())
    os._exit(0)
answer = os.read(reading, 1000).decode() if select.select([reading], [], [], 15)[0] else None
os.kill(child, signal.SIGKILL)
print(json.dumps({"in_child": answer, "in_parent": str(kdkernels.fused_kl(student, teacher).item())}))
"""


@needs_linux
@needs_module
def test_a_child_of_a_parent_without_a_loss_starts_no_threads():
    """The parent has not loaded the native module when it forks."""
    told = printed_by(FORKED_BEFORE_A_LOSS)
    assert told["in_child"] is not None, "the child hangs"
    assert told["in_child"] == told["in_parent"]


@needs_linux
@needs_module
def test_a_child_keeps_its_processors_if_its_parent_had_no_other_thread(told_by_children):
    assert told_by_children["processors"] == "0"
    assert not told_by_children["alone"] or int(told_by_children["processors alone"]) > 0
