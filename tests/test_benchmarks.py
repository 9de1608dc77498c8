"""The benchmark's GPU plan, run on a CPU over tiny shapes, without the calls that need a GPU."""

import csv
import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import benchmark
import class_ot
import data
import family
import gpu
import linear
import pairwise
import rows
import run
import screen
import sinkhorn
import timing
import topk
import uld
from torch.utils.flop_counter import FlopCounterMode

import kdkernels
from kdkernels.backends import native
from kdkernels.families import linear as chunks

pytestmark = pytest.mark.skipif(native._native is None, reason=f"no native module: {native.missing_because}")

BENCHMARKS = Path(run.__file__).parent
TINY = gpu.Plan(
    vocabularies=(256, 257),
    rows=(3, 4),
    main_rows=4,
    main_vocabularies=(256, 257),
    dtypes=("bfloat16", "float32"),
    contended=("kl", "js"),
    checked_rows=5,
    copied=2**12,
    seconds=1e-4,
    rounds=(2, 3),
)
TINY_PLANS = {
    "linear": linear.Plan(
        rows=48,
        width=32,
        vocabulary=600,
        chunk_rows=16,
        checked_rows=40,
        rounds=3,
        slow=("TRL, head",),
        slow_rows=20,
        memory_rows=(96,),
        eager_memory_rows=(24,),
        over_products=1.25,
        percent_of_products=85,
    ),
    "topk": topk.Plan(4, 257, ("bfloat16", "float32"), 2),
    "pairwise": pairwise.Plan(6, (300, 200), (100,), (3, 5), 300, 2),
    "sinkhorn": sinkhorn.Plan(3, 2),
    "class_ot": class_ot.Plan(6, 40, 2),
    "uld": uld.Plan(4, 257, (225,), ("bfloat16", "float32"), 2),
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A GPU benchmark over TINY on the CPU, with synthetic logits and without compilation."""
    monkeypatch.setattr(
        gpu, "real_or_synthetic", lambda rows: (*data.synthetic_logits(rows, 300, torch.bfloat16), "drawn")
    )
    monkeypatch.setattr(rows, "compiled_loss", rows.eager_loss)
    monkeypatch.setattr(linear, "liger_loss", partial(linear.liger_loss, compiled=False))
    monkeypatch.setattr(gpu, "peak_extra_bytes", lambda *_: 1000)  # a CPU measures only the whole process's memory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for such small tensors, more threads would wait for each other
    try:
        yield gpu.GpuBenchmark(True, 2, screen.PlainScreen(), tmp_path, TINY, "cpu", TINY_PLANS)
    finally:
        torch.set_num_threads(threads)


def rows_of(benchmark):
    with benchmark.path.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def test_the_plan_runs_and_leaves_a_table_of_all_cases(tiny, capsys):
    tiny.quick = False  # measure every contender
    tiny.run()
    assert run.conclude(tiny) == 0, tiny.results.failures
    table = rows_of(tiny)

    grid = [row for row in table if row["case"] == "grid"]
    cells = {(row["V"], row["N"], row["dtype"], row["work"]) for row in grid}
    assert len(cells) == len(grid) == 2 * 2 * 2 * 3
    divergences = {(row["divergence"], row["V"], row["dtype"]) for row in table if row["case"] == "divergences"}
    assert len(divergences) == len(rows.CATALOGUE) * 2 * 2
    measured = {row["contender"] for row in table if row["case"] == "contenders"}
    assert {tiny.baseline, "eager", "torch.compile"} <= measured
    assert {row["contender"] for row in table if row["case"] == "memory"} >= {tiny.baseline, "eager"}
    assert {"answers", "small call, forward", "import beyond torch"} <= {row["case"] for row in table}
    cases = {
        pairwise.CASE,
        pairwise.OVER_V,
        pairwise.OVER_B,
        sinkhorn.CASE,
        class_ot.CASE,
        uld.CASE,
        topk.CASE,
        "heads",
    }
    assert cases <= {row["case"] for row in table}

    # A step at the copy's rate is at 100 %, so the columns must be consistent.
    for row in grid:
        over = float(row["GB_per_s"]) / float(row["copy_GB_per_s"])
        moved = gpu.MOVED[row["work"]] * int(row["N"]) * int(row["V"]) * (4 if row["dtype"] == "float32" else 2)
        assert float(row["GB_per_s"]) == pytest.approx(moved / float(row["median_ms"]) * 1e-6)
        assert 0 < float(row["percent_of_floor"]) < 1e4 * over

    shown = capsys.readouterr().out
    assert "kl over V and N, bfloat16:" in shown and "cut-cross-entropy is left out" in shown
    # Every divergence is judged at two vocabularies, and kl also without a gradient. This device gets no verdict.
    of_copy = [target for target in tiny.results.targets if target.limit and "copy" in target.unit]
    assert len(of_copy) == 2 * (len(rows.CATALOGUE) + 1)
    assert "PASS" not in shown and "MISS" not in shown


def test_heads_are_measured_beside_their_products(tiny, capsys):
    tiny.quick = False
    tiny.measure_family(linear)
    assert run.conclude(tiny) == 0, tiny.results.failures
    losses = linear.family("cpu").losses
    table = tiny.results.rows
    timed = {(row["contender"], row["N"]): row for row in table if row["case"] == "heads"}
    slow = {linear.TRL_HEAD} & set(losses)
    assert set(timed) == {(name, 48) for name in {*losses, linear.PRODUCTS} - slow} | (
        {(name, 20) for name in {linear.OURS, linear.PRODUCTS, *slow}} if slow else set()
    )
    for row in timed.values():
        assert (row["H"], row["V"]) == (32, 600) and row["median_ms"] > 0
    assert timed[linear.PRODUCTS, 48]["over_products"] == 1 and timed[linear.OURS, 48]["ratio_to_kdkernels"] == 1
    errors = {row["contender"]: row for row in table if row["case"] == linear.ERRORS}
    assert set(errors) == {*losses, "kdkernels, fp32 logits"} - {linear.LIGER}  # Liger computes another loss
    for column in linear.ERROR_COLUMNS[1:]:
        of_ours = errors[linear.OURS][column]
        assert errors["kdkernels, fp32 logits"][column] < of_ours <= 1.02 * errors[linear.EAGER][column] < 0.1
        assert all(row[column] < 0.1 for row in errors.values())  # all contenders have computed the gradient of kl
    memory = [(row["contender"], row["N"]) for row in table if row["case"] == "heads: memory"]
    assert {(linear.OURS, 96), (linear.EAGER, 24)} <= set(memory) and len(memory) == len(set(memory))
    assert set(timed) - set(memory) == {(linear.PRODUCTS, n) for name, n in timed if name == linear.PRODUCTS}
    assert "fla (heads) is left out:" in capsys.readouterr().out


def test_sparse_teachers_are_checked_and_timed(tiny, monkeypatch):
    tiny.measure_family(topk)
    assert run.conclude(tiny) == 0, tiny.results.failures
    errors = {(row["case"], row["contender"]): row for row in tiny.results.rows if "tail_gradient_error" in row}
    assert len(errors) == 4
    # The clamped 1 - sum loses the gradient of an over-confident student's tail.
    assert errors[topk.OVER_CONFIDENT, topk.OURS]["tail_gradient_error"] < 1e-2
    assert errors[topk.OVER_CONFIDENT, topk.EAGER]["tail_gradient_error"] > 0.5
    timed = [row["contender"] for row in tiny.results.rows if row["case"] == topk.CASE]
    assert len(timed) == 2 * 7 and timed.count("copy") == 2
    monkeypatch.setitem(topk.FAMILY.losses, topk.OURS, lambda *args: 1.01 * topk.ours(*args))
    tiny.measure_family(topk)
    assert run.conclude(tiny) == 1 and "top-k teacher" in tiny.results.failures[0]


def test_transport_between_classes_is_checked_and_timed(tiny, monkeypatch):
    tiny.measure_family(class_ot)
    assert run.conclude(tiny) == 0, tiny.results.failures
    assert [target.limit for target in tiny.results.targets] == [None]  # the target for a GPU has no limit on a CPU
    errors = {row["contender"]: row for row in tiny.results.rows if row["case"] == class_ot.ERRORS}
    of_ours, of_eager = errors[class_ot.OURS], errors[class_ot.EAGER]
    # The guard in eager's denominators removes mass from the plan.
    assert of_ours["loss_error"] < 1e-6 and 10 * of_ours["loss_error"] < of_eager["loss_error"] < 0.1
    assert of_ours["gradient_error"] < 2e-5 and of_eager["gradient_error"] < 0.1
    timed = {row["contender"] for row in tiny.results.rows if row["case"] == class_ot.CASE}
    assert timed == {*class_ot.LOSSES, class_ot.PRODUCTS}
    memory = [row["contender"] for row in tiny.results.rows if row["case"].endswith("memory")]
    assert memory == [class_ot.OURS, class_ot.EAGER]
    monkeypatch.setitem(class_ot.FAMILY.losses, class_ot.OURS, lambda *args: 1.01 * class_ot.ours(*args))
    tiny.measure_family(class_ot)
    assert run.conclude(tiny) == 1 and "transport" in tiny.results.failures[0]


def test_clouds_are_checked_and_timed(tiny, monkeypatch):
    tiny.measure_family(pairwise)
    assert run.conclude(tiny) == 0, tiny.results.failures
    assert [target.limit for target in tiny.results.targets] == 2 * [None]  # limits for a GPU do not apply to a CPU
    expected = {
        pairwise.CASE: [(6, 300), (6, 200)],
        pairwise.OVER_V: [(6, 100)],
        pairwise.OVER_B: [(3, 300), (5, 300)],
        f"{pairwise.CASE}: memory": [(6, 300)],
    }
    for case, shapes in expected.items():
        measured = [(row["contender"], row["N"], row["V"]) for row in tiny.results.rows if row["case"] == case]
        assert measured == [(name, *shape) for shape in shapes for name in pairwise.LOSSES]
    monkeypatch.setitem(pairwise.FAMILY.losses, pairwise.OURS, lambda *args: 1.01 * pairwise.ours(*args))
    tiny.measure_family(pairwise)
    assert run.conclude(tiny) == 1 and "SinKD" in tiny.results.failures[0]


def test_batches_of_problems_are_checked_and_timed(tiny, monkeypatch):
    tiny.measure_family(sinkhorn)
    assert run.conclude(tiny) == 0, tiny.results.failures
    assert [target.limit for target in tiny.results.targets] == 2 * [None]  # limits for a GPU do not apply to a CPU
    errors = {row["contender"]: row for row in tiny.results.rows if row["case"] == sinkhorn.ERRORS}
    assert set(errors) == {sinkhorn.OURS, sinkhorn.FROM_POINTS, *sinkhorn.LIBRARIES}
    assert all(row["loss_error"] < 1e-3 and row["N"] == 3 for row in errors.values())
    timed = {row["contender"] for row in tiny.results.rows if row["case"] == sinkhorn.CASE}
    assert timed == {*sinkhorn.LOSSES, *sinkhorn.LOSSES_FROM_POINTS}
    monkeypatch.setitem(sinkhorn.LOSSES, sinkhorn.OURS, lambda *args: 1.01 * sinkhorn.ours(*args))
    tiny.measure_family(sinkhorn)
    assert run.conclude(tiny) == 1 and "Sinkhorn" in tiny.results.failures[0]


def visible_class_ot(*values):
    """The operator of class transport without torch.library, which hides the matrix products from the counter."""
    *values, wanted, _ = values
    return kdkernels.families.class_ot.class_ot(kdkernels.families.class_ot.ClassOT(*values), wanted)


def test_the_products_are_those_of_the_transport(monkeypatch):
    transport = kdkernels.autograd.CLASS_OT
    visible = kdkernels.ops.Operator(visible_class_ot, transport.operator.fields)
    monkeypatch.setattr(transport, "operator", visible)
    monkeypatch.setattr(transport, "function", kdkernels.autograd._function(transport))
    images = class_ot.problem(family.Shape(6, 40))
    counted = {}
    for name, step in {"ours": images.step(class_ot.ours), "products": class_ot.products(images)}.items():
        with FlopCounterMode(display=False) as counter:
            step()
        counted[name] = counter.get_total_flops()
    assert counted["ours"] == counted["products"] == 4 * class_ot.ITERATIONS * 2 * 6 * 40 * 40


def test_universal_logit_distillation_is_checked_and_timed(tiny, monkeypatch):
    tiny.measure_family(uld)
    assert run.conclude(tiny) == 0, tiny.results.failures
    errors = [row for row in tiny.results.rows if row["case"] == uld.ERRORS]
    assert len(errors) == 4 and all(row["gradient_error"] < 1e-2 for row in errors)
    timed = [row["contender"] for row in tiny.results.rows if row["case"] == uld.CASE]
    assert timed == 2 * list(uld.LOSSES)
    monkeypatch.setitem(uld.FAMILY.losses, uld.OURS, lambda *args: 1.01 * uld.ours(*args))
    tiny.measure_family(uld)
    assert run.conclude(tiny) == 1 and "uld" in tiny.results.failures[0]


def test_the_products_are_those_of_the_loss():
    """Products of both sides' logits and of the hidden states' gradients, in chunks; the last chunk is short."""
    problem = family.Problem(*data.synthetic_heads(40, 8, 20, torch.float32))
    counted = FlopCounterMode(display=False)
    with counted:
        linear.products(problem, 16)()
    assert counted.get_total_flops() == 4 * 2 * 40 * 8 * 20


def test_the_products_have_the_chunks_of_the_loss(monkeypatch):
    sizes, allocate = [], chunks._HeadLogits.allocate
    monkeypatch.setattr(chunks._HeadLogits, "allocate", lambda x, n, **o: (sizes.append(n), allocate(x, n, **o))[1])
    problem = linear.problem(family.Shape(900, 1000, "bfloat16", 24), "cpu")
    with kdkernels.chunk_budget(2 << 20):
        problem.step(kdkernels.fused_kl)()
        assert sizes == [linear.chunk_rows(problem)] * 2
    assert 64 <= sizes[0] < 900


@pytest.mark.parametrize("fault", ["loss", "weight gradient", "raises"])
def test_a_wrong_answer_of_a_head_stops_the_run(tiny, monkeypatch, capsys, fault):
    def broken(student, teacher, **options):
        if fault == "raises":
            raise RuntimeError("cublas: no\nmore")
        if fault == "loss":
            return real(student, teacher, **options) + 0.1
        detached = kdkernels.LinearLogits(student.hidden, student.weight.detach())
        return real(detached, teacher, **options) + 0 * student.weight.sum()

    real = linear.fused_kl
    monkeypatch.setattr(linear, "fused_kl", broken)
    tiny.measure_family(linear)
    assert run.conclude(tiny) == 1
    assert not tiny.results.select("heads")  # wrong results are not timed
    shown = capsys.readouterr().out
    assert "WRONG kdkernels, heads: errors against fp64" in shown
    assert ("(kl bfloat16 [40, 600]): errors " in shown and ", allowed " in shown) == (fault != "raises")
    assert ("(kl bfloat16 [40, 600]): RuntimeError: cublas: no" in shown) == (fault == "raises")


def test_a_head_without_room_is_left_out(tiny, monkeypatch, capsys):
    def peak(step, drop_gradients, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "peak_extra_bytes", peak)
    tiny.measure_family(linear)
    assert run.conclude(tiny) == 0
    assert "eager, bfloat16 [48, 600] (heads: memory) is left out: OutOfMemoryError" in capsys.readouterr().out


def test_the_figure_draws_what_the_plan_measured(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    tiny.run()
    tiny.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_wrong_answer_and_a_kernel_that_raises_fail_the_run(tiny, monkeypatch, capsys):
    def raises(*_, **__):
        raise RuntimeError("cudaLaunchKernelExC: unspecified launch failure\nmore")

    real = rows.kdkernels_loss
    broken = lambda divergence, backend="auto", **options: (  # noqa: E731
        raises if divergence == "js" and backend != "reference" else real(divergence, backend, **options)
    )
    monkeypatch.setattr(rows, "kdkernels_loss", broken)
    monkeypatch.setattr(gpu, "kdkernels_loss", broken)
    tiny.run()
    assert run.conclude(tiny) == 1
    shown = capsys.readouterr().out
    assert f"WRONG {tiny.baseline}, answers (js(beta=0.5) float32 [5, 257]): RuntimeError: cudaLaunchKernelExC" in shown
    assert f"WRONG {tiny.baseline}, forward, js(beta=0.5) bfloat16 [4, 257]: RuntimeError" in shown
    # The other cases were still measured.
    assert any(row["case"] == "divergences" and row["divergence"] == "tv" for row in rows_of(tiny))


def test_a_run_that_is_cut_short_leaves_its_table(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "small_call", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.run()
    assert any(row["case"] == "memory" for row in rows_of(tiny))


def test_shapes_without_room_are_left_out_with_a_remark(tiny, monkeypatch):
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 3 * 1.1 * 4 * 256 * 2)  # bfloat16 [4, 256] just fits
    tiny.grid("bfloat16")
    assert {(row["N"], row["V"]) for row in tiny.results.rows} == {(3, 256), (4, 256), (3, 257)}
    assert any(remark.startswith("bfloat16 [4, 257] is left out: it needs") for remark in tiny.results.remarks)


@pytest.mark.parametrize(
    ("device", "limits"),
    [
        ("NVIDIA H100 80GB HBM3", (85, 90)),
        ("NVIDIA H200", (70,)),
        ("NVIDIA B200", (55,)),
        ("NVIDIA A100-SXM4-80GB", (55,)),
        ("NVIDIA L4", (85, 90)),
    ],
)
def test_targets_are_judged_on_the_card_they_are_for(tmp_path, monkeypatch, device, limits):
    describe = benchmark.describe_machine
    monkeypatch.setattr(benchmark, "describe_machine", lambda name: describe(name) | {"device": device})
    on_card = gpu.GpuBenchmark(True, 2, screen.PlainScreen(), tmp_path, TINY, "cpu", TINY_PLANS)
    on_card.grid("bfloat16")
    targets = on_card.results.targets[: len(limits)]
    assert tuple(target.limit for target in targets) == limits and "operator alone" in targets[0].what
    assert all((target.cells()[3] in ("PASS", "MISS")) == ("L4" not in device) for target in targets)
    assert "not measured" in on_card.note_on_targets and ("no verdict" in on_card.note_on_targets) == ("L4" in device)
    better, worse = (dataclasses.replace(targets[0], value=targets[0].limit + by).cells()[3] for by in (1, -1))
    assert (better, worse) == (("", "") if "L4" in device else ("PASS", "MISS"))


def test_a_card_copies_no_more_than_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 2**14)
    small = gpu.GpuBenchmark(True, 2, screen.PlainScreen(), tmp_path, TINY, "cpu", TINY_PLANS)
    assert small.copied == 2**11 < TINY.copied and small.copy().nbytes == 2**11
    assert gpu.FULL.copied == gpu.QUICK.copied == 2**32


class Queue:
    """A device with a clock that executes its queue in order, and only when the host waits."""

    def __init__(self):
        self.work, self.clock = [], 0.0

    def wait(self):
        for item in self.work:
            item()
        self.work.clear()

    def busy(self, seconds):
        return lambda: self.work.append(lambda: setattr(self, "clock", self.clock + seconds))

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, queue):
        self.queue, self.time = queue, None

    def record(self):
        self.queue.work.append(lambda: setattr(self, "time", self.queue.clock))

    def query(self):
        return self.time is not None

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def test_events_time_the_step_and_the_copy_apart(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "synchronize", queue.wait)
    waits = queue.busy(4.0)
    steps = {"quick": queue.busy(1.5), "waits": lambda: (waits(), queue.wait())}
    found = timing.queued(steps, queue.busy(1.0), 4, "cuda")
    # The step moves three tensors in 1.5 times the time in which the copy moves two: this is the floor.
    assert found["quick"].seconds == [1.5] * 4 and found["quick"].copy_seconds == [1.0] * 4
    assert found["quick"].over_copy(3 * 2**20, 2**20) == pytest.approx(1)
    assert found["waits"].median == 4 and found["waits"].spread == 0
    # A step that synchronises finds the copy complete.
    assert (found["quick"].host_bound, found["waits"].host_bound) == (0, 1)


def test_memory_of_a_step_on_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 7))
    assert timing.free_bytes("cuda") == 5


def test_torch_alone_is_enough(tmp_path):
    """Without optional packages: tables in plain text, the CSV, and a message in place of the figure."""
    code = f"""
import sys
for missing in (
    "rich", "pandas", "matplotlib", "psutil", "transformers", "trl", "liger_kernel", "numpy", "ot", "geomloss"
):
    sys.modules[missing] = None
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu, run, screen
from pathlib import Path
gpu.real_or_synthetic = lambda rows: (*gpu.synthetic_logits(rows, 300, gpu.torch.bfloat16), "drawn")
import class_ot, linear, pairwise, sinkhorn, topk, uld
plans = {{
    "linear": linear.Plan(rows=48, width=32, vocabulary=600, chunk_rows=16, checked_rows=40, rounds=2),
    "topk": topk.Plan(2, 256, ("bfloat16",), 2),
    "pairwise": pairwise.Plan(3, (40,), (20,), (2,), 40, 2),
    "sinkhorn": sinkhorn.Plan(2, 2),
    "class_ot": class_ot.Plan(4, 20, 2),
    "uld": uld.Plan(2, 256, (224,), ("bfloat16",), 2),
}}
plan = gpu.Plan((256,), (2,), 2, (256,), ("bfloat16",), ("kl",), 3, 4096, 1e-4, (2, 2))
gpu.peak_extra_bytes = lambda *arguments: 1000
benchmark = gpu.GpuBenchmark(True, 2, screen.screen(), Path({str(tmp_path)!r}), plan, "cpu", plans)
with benchmark.screen:
    benchmark.run()
    assert run.conclude(benchmark) == 0
    print(run.draw(benchmark))
"""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no figure: matplotlib is not installed" in done.stdout
    (written,) = tmp_path.glob("*.txt")
    assert written.read_text().strip() in done.stdout and "one forward call on [8, 1000]" in written.read_text()
    for name, module in sinkhorn.LIBRARIES.items():
        assert f"{name} is left out: {module} is not installed." in done.stdout
    assert "\ngrid\n" in done.stdout and list(tmp_path.glob("*.csv"))
