"""The driver of a visit to a GPU (gpu/): time limits, skips and summaries, on commands of a second or less, and the
scripts on a CPU.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kdkernels
from kdkernels import backends
from kdkernels.backends import native

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
import build_kernels
import cases
import check_plan
import head_times
import kernel_times
import marked_tests
import plans
import profiled
import sanitized
import serving
import smoke
import steps
import versions
import visit
from steps import Command, Step, Target

ROOT = Path(__file__).parent.parent
needs_module = pytest.mark.skipif(native._native is None, reason=f"no native module: {native.missing_because}")
TARGETS = [("cuda", "cuda"), ("triton", "cuda"), ("cpu", "cpu"), ("cuda", "cpu")]
ON_CPU = ["--device", "cpu", "--backend", "cpu"]


def shell(text: str, label: str = "") -> Command:
    return Command(("sh", "-c", text), label)


def one(name: str, text: str, limit: float = 10, **options) -> Step:
    return Step(name, limit, (shell(text),), **options)


def visited(folder: Path, *program: Step, limit: float = 500, **options):
    """The visit, and the outcomes in its summary.json by the step's name."""
    done = visit.Visit(list(program), Target("cpu", "cpu", folder), limit, **options)
    right = done.run()
    summary = json.loads((folder / "summary.json").read_text())
    outcomes = {step["name"]: SimpleNamespace(**step) for step in summary["steps"]}
    assert list(outcomes) == [step.name for step in program], "the summary has every step"
    assert right == (not any(step.outcome in ("failed", "killed") for step in outcomes.values()))
    table = (folder / "summary.md").read_text()
    assert all(f"| {name} |" in table and step.reason in table for name, step in outcomes.items())
    return summary, outcomes


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(path: Path) -> bool:
    """Whether the process whose number a command wrote to the file has ended, or ends within two seconds."""
    pid, end = int(path.read_text()), time.monotonic() + 2
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


# ---- the driver


def test_a_step_and_its_children_are_killed_at_its_limit_and_the_next_step_runs(tmp_path):
    hanging = f"sleep 60 & echo $! > {tmp_path}/child; echo case 6; printf 'case 7 ...'; sleep 60"
    _, outcomes = visited(tmp_path / "out", one("hangs", hanging, 0.5), one("next", "echo here"))
    assert (outcomes["hangs"].outcome, outcomes["next"].outcome) == ("killed", "passed")
    assert outcomes["hangs"].reason.endswith("in: case 7 ..."), outcomes["hangs"].reason
    assert 0.5 <= outcomes["hangs"].seconds < 5 and gone(tmp_path / "child")
    assert (tmp_path / "out" / "next.log").read_text() == "here\n"
    with tarfile.open(tmp_path / "out" / visit.ARCHIVE) as archive:
        assert {"hangs.log", "next.log", "summary.md", "summary.json"} == set(archive.getnames())


def test_what_a_step_leaves_running_is_killed_too(tmp_path):
    text = f"sleep 60 & echo $! > {tmp_path}/child"
    _, outcomes = visited(tmp_path / "out", one("leaves", text))
    assert outcomes["leaves"].outcome == "passed" and gone(tmp_path / "child")


def test_a_failed_gate_ends_the_visit_and_another_failure_does_not(tmp_path):
    fails = "echo no compiler; exit 3"
    _, outcomes = visited(tmp_path / "a", one("build", fails, is_gate=True), one("smoke", "true"), one("tests", "true"))
    assert outcomes["build"].reason == "exit code 3: no compiler"
    assert all(outcomes[name].outcome == "skipped" for name in ("smoke", "tests"))
    assert outcomes["smoke"].reason == "the step 'build' failed"
    _, outcomes = visited(tmp_path / "b", one("build", fails), one("smoke", "true"))
    assert (outcomes["build"].outcome, outcomes["smoke"].outcome) == ("failed", "passed")


def test_a_step_that_no_longer_fits_is_skipped_and_a_shorter_one_still_runs(tmp_path):
    long, short = one("long", "true", 7), one("short", "true", 1)
    rest = one("rest", "true", 1, takes_rest=True)
    _, outcomes = visited(tmp_path, long, short, rest, limit=5)
    assert re.fullmatch(r"it may take 7 s, and [45] s of 5 s are left", outcomes["long"].reason)
    assert (outcomes["short"].outcome, outcomes["rest"].outcome) == ("passed", "passed")
    assert outcomes["short"].limit == 1 and 4 < outcomes["rest"].limit <= 5


def test_a_larger_limit_stretches_each_step(tmp_path):
    parts = Step("parts", 4, (shell("true", "a"), shell("true", "b")), each=3)
    summary, outcomes = visited(tmp_path, one("step", "true", 10), parts, limit=2 * steps.LIMIT)
    assert outcomes["step"].limit == 20 and outcomes["parts"].limit == 8
    assert [part["limit"] for part in summary["parts"]["parts"]] == [6, 6]


def test_a_command_says_by_its_exit_code_that_it_cannot_run_here(tmp_path):
    _, outcomes = visited(tmp_path, one("ncu", f"echo looking; echo ncu was not found; exit {steps.SKIPPED}"))
    assert (outcomes["ncu"].outcome, outcomes["ncu"].reason) == ("skipped", "ncu was not found")


def test_commands_side_by_side_have_limits_and_outcomes_of_their_own(tmp_path):
    commands = (
        shell("echo right", "a"),
        shell(f"sleep 60 & echo $! > {tmp_path}/child; echo case 3; sleep 60", "b"),
        shell(f"echo no room; exit {steps.SKIPPED}", "c"),
        shell("echo WRONG; exit 1", "d"),
    )
    summary, outcomes = visited(tmp_path / "out", Step("plans", 20, commands, each=0.5), one("next", "true"))
    parts = {part["name"]: part["outcome"] for part in summary["parts"]["plans"]}
    assert parts == {"a": "passed", "b": "killed", "c": "skipped", "d": "failed"}
    reason = outcomes["plans"].reason
    assert reason.startswith("1 passed, 1 failed, 1 killed, 1 skipped; ")
    assert "b killed: at its limit of 0 s, in: case 3" in reason and "d failed: exit code 1: WRONG" in reason
    assert (outcomes["plans"].outcome, outcomes["next"].outcome) == ("failed", "passed")
    assert gone(tmp_path / "child") and (tmp_path / "out" / "plans" / "a.log").read_text() == "right\n"


def test_commands_that_the_limit_leaves_no_time_for_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    commands = (shell("sleep 60", "a"), shell("true", "b"))
    summary, outcomes = visited(tmp_path, Step("plans", 0.3, commands, each=5))
    parts = {part["name"]: part["outcome"] for part in summary["parts"]["plans"]}
    assert parts == {"a": "killed", "b": "not reached"} and outcomes["plans"].outcome == "killed"


def test_a_step_that_is_not_judged_fails_nothing(tmp_path):
    _, outcomes = visited(tmp_path, one("racecheck", "exit 1", is_judged=False, note="read it"))
    assert outcomes["racecheck"].outcome == "to be read"
    assert "\nread it\n" in (tmp_path / "summary.md").read_text()


def test_steps_that_the_target_has_not_or_nobody_asked_for_are_skipped(tmp_path):
    program = one("a", "true"), one("b", "true", kinds=("cuda",)), one("c", "true")
    _, outcomes = visited(tmp_path, *program, only=["a", "b"])
    assert [step.outcome for step in outcomes.values()] == ["passed", "skipped", "skipped"]
    assert outcomes["b"].reason == "it is for cuda; the target is cpu"


def test_a_visit_that_is_ended_kills_its_step_and_leaves_its_name(tmp_path):
    code = f"""
import signal, sys
sys.path.append({str(ROOT / "gpu")!r})
import visit
from pathlib import Path
from steps import Command, Step, Target
signal.signal(signal.SIGTERM, visit.end)
command = Command(("sh", "-c", "echo $$ > {tmp_path}/child; sleep 60"))
visit.Visit([Step("hangs", 50, (command,))], Target("cpu", "cpu", Path({str(tmp_path / "out")!r})), 60).run()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1 and gone(tmp_path / "child")
    (step,) = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert (step["name"], step["outcome"]) == ("hangs", "running")


# ---- the steps


@pytest.mark.parametrize("program", steps.PROGRAMS)
@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_the_limits_fit_into_the_visit(program, backend, device, tmp_path):
    target = Target(backend, device, tmp_path)
    listed = steps.PROGRAMS[program](target)
    assert sum(step.limit for step in listed) <= steps.LIMIT - 15, (
        "killing a step and packing the results take time too"
    )
    assert steps.LIMIT <= 9 * 60
    names = [step.name for step in listed]
    assert len(set(names)) == len(names) and not any(" " in name for name in names)
    assert [step.name for step in listed if step.is_gate] == ["build", "backend"]
    assert [step.name for step in listed if step.takes_rest] == names[-1:]
    for step in listed:
        assert step.commands and (step.each is None) == (len(step.commands) == 1)
        for command in step.commands:
            python, first, *_ = command.arguments
            assert python == sys.executable and (first == "-m" or Path(first).is_file())
            assert steps.environment(command)["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_the_page_lists_the_steps():
    page = (ROOT / "docs" / "gpu.md").read_text()
    target = Target("cuda", "cuda", Path())
    assert re.findall(r"^\| ([a-z-]+) \| ", page.split("## The steps")[1].split("## The results")[0], re.M)[1:] == [
        step.name for step in steps.visit(target)
    ]
    assert all(name in page for name in ("memcheck", "racecheck", "synccheck", "Triton's self-test"))
    assert str(steps.LIMIT) in page and all(f"`{way}`" in page for way in plans.LARGEST_CLUSTER)


def test_every_way_and_cluster_is_checked():
    team, launch = ((ROOT / "csrc" / "cuda" / name).read_text() for name in ("team.h", "launch.h"))
    most_blocks, most_threads = (int(re.search(rf"{name} = (\d+);", team)[1]) for name in ("kMaxBlocks", "kMaxThreads"))
    ways = re.search(r"enum class Way \{ (.*?) \}", launch)[1].split(", ")
    listed = [plan.split(",") for plan in plans.plans()]
    assert {way for way, _, _ in listed} == set(ways)
    assert max(int(blocks) for _, blocks, _ in listed) == most_blocks
    assert {int(blocks) for way, blocks, _ in listed if way == "staged"} == {1, 2, 4, 8, 16}
    assert max(int(threads) for *_, threads in listed) == most_threads
    assert len({tuple(plan) for plan in listed}) == len(listed)
    commands = steps.plan_commands(Target("cuda", "cuda", Path()))
    assert [command.environment[plans.VARIABLE] for command in commands] == [plans.NO_PLAN, *plans.plans()]
    for name in plans.plans():
        for rows, columns in plans.shapes(name, False):
            assert 1 <= columns <= plans.WIDEST and rows >= 32 and rows * columns <= 2**23


@pytest.mark.parametrize("has_torch", [True, False])
def test_make_runs_the_driver_and_installs_nothing_where_torch_is(has_torch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {'yes' if has_torch else ''}\n")
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "-n", "gpu-sanitize", f"PYTHON={python}", "OUT=/tmp/x y", "DEVICE=cpu"]
    shown = subprocess.run([*command, "STEPS=smoke plans"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    interpreter = python if has_torch else ".venv/bin/python"
    assert f'{interpreter} gpu/visit.py --program sanitize --output "/tmp/x y" --limit 530' in shown
    assert "--device cpu" in shown and "--only smoke plans" in shown
    assert not (has_torch and "pip install" in shown)


# ---- the scripts, on a CPU


@needs_module
def test_smoke_checks_every_family(capsys):
    sizes = smoke.Sizes(
        (torch.bfloat16,), (1, 37), (3, 3), 1, (5, 101), (5, 101), (3,), (30, 31, 8), (1, 5, 31), (2, 5, 6), (5, 20),
        (2, 101), 2,
    )  # fmt: skip
    assert smoke.Smoke(cases.Cases("cpu"), "cpu", "cpu", sizes).run() == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    families = ("js bf16 [3, 37], shifted", "alpha bf16", "top 3", "top-k loss, uniform", "head bf16", "fp32 logits")
    families += (
        "uld",
        "SinKD, dot",
        "Sinkhorn, implicit",
        "class_ot, unrolled",
        "js, backward bf16 [2, 101]: the same",
    )
    assert all(name in shown for name in families)
    assert "WRONG" not in shown and "RAISED" not in shown


@needs_module
def test_a_wrong_gradient_is_seen(monkeypatch, capsys):
    """One row of one element, wrong by two roundings."""
    right, checked = cases.loss_and_gradient, cases.Cases("cpu")

    def wrong(student, teacher, divergence, backend, **options):
        loss, gradient = right(student, teacher, divergence, backend, **options)
        if backend != "reference":
            gradient[6, 2] += 4 * 2.0**-8 * gradient[6].abs().max()
        return loss, gradient

    problem = *cases.drawn(7, 5, torch.bfloat16, "cpu", is_shifted=True), "kl", "cpu"
    checked.run("right", cases.against_reference, *problem)
    monkeypatch.setattr(cases, "loss_and_gradient", wrong)
    checked.run("wrong", cases.against_reference, *problem)
    assert checked.wrong == ["wrong"] and checked.conclude() == 1


def test_a_case_is_named_before_it_runs_and_judged_after(capsys):
    checked = cases.Cases("cpu", refusal="KDKERNELS_PLAN")

    def named():
        assert capsys.readouterr().out.endswith("  first ... ")
        return (0.5,)

    def raises(error):
        raise error

    checked.run("first", named)
    for value in (1.0, float("nan"), float("inf"), -1.0):
        checked.run(f"{value}", lambda value=value: (0.1, value))
    checked.run("raises", raises, ValueError("KDKERNELS_PLAN"))
    checked.run("refused", raises, RuntimeError("KDKERNELS_PLAN does not fit"))
    assert checked.wrong == ["1.0", "nan", "inf", "-1.0", "raises"] and checked.count == 6
    assert checked.refusals == ["KDKERNELS_PLAN does not fit"] and checked.conclude() == 1


def test_runs_with_other_bits_are_counted():
    results = iter([(torch.zeros(2),), (torch.zeros(2),), (torch.tensor([0.0, 1e-7]),), (torch.zeros(2),)])
    assert smoke.differing_runs(lambda: next(results), 3, smoke.Traffic("cpu")) == (1.0,)


def test_shifted_rows_begin_at_odd_elements():
    for columns in (8, 37):
        for x in cases.drawn(20, columns, torch.float16, "cpu", is_shifted=True):
            starts = {x[row].data_ptr() % 16 for row in range(20)}
            assert x.shape == (20, columns) and len(starts) == 8 and x[0].data_ptr() % 4 == 2
    assert cases.drawn(20, 8, torch.float16, "cpu")[0].is_contiguous()


@needs_module
def test_kernel_times_have_a_row_for_each_step(tmp_path, capsys):
    words = [*ON_CPU, "--output", str(tmp_path), "--divergences", "kl", "tv", "--dtypes", "float32"]
    assert kernel_times.main([*words, "--vocabularies", "96", "97", "--rows", "4"]) == 0
    head, *rows = (line.split(",") for line in (tmp_path / "kernel_times.csv").read_text().splitlines())
    listed = {(row[2], row[3], row[4]) for row in rows}
    works = [("kl", "operator"), ("kl", "loss alone"), ("kl", "call"), ("tv", "operator"), ("top 64", "operator")]
    works += [("top 64", "call"), ("kl against a top 64", "operator"), ("kl against a top 64", "call")]
    assert listed == {(columns, *work) for columns in ("96", "97") for work in works} and len(rows) == len(listed)
    numbers = [dict(zip(head, row, strict=True)) for row in rows]
    for row in numbers:  # kl with its gradient moves 3 tensors, the loss alone 2, the extraction 1
        tensors = {"operator": 3, "call": 3, "loss alone": 2}[row["work"]]
        tensors = {"top 64": 1, "kl against a top 64": 2}.get(row["case"], tensors)
        moved = tensors * 4 * 4 * int(row["V"])
        assert float(row["GB_per_s"]) == pytest.approx(1e-6 * moved / float(row["ms"]))
    assert "kl against a top 64" in capsys.readouterr().out


@needs_module
def test_a_step_that_raises_is_named_and_the_others_are_timed(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(kernel_times, "operator", lambda *_: broken)
    words = [*ON_CPU, "--output", str(tmp_path), "--divergences", "tv", "--dtypes", "float32", "--vocabularies", "96"]
    assert kernel_times.main(words) == 1
    shown = capsys.readouterr().out
    assert "RAISED tv operator float32 [16, 96]: RuntimeError: no room" in shown and "\ntop 64 " in shown


@needs_module
def test_head_times_list_products_and_budgets(tmp_path, monkeypatch, capsys):
    for name, value in {"TINY": (8, 4, 50), "TINY_ROWS": (3,), "TINY_BUDGETS": (1, 2)}.items():
        monkeypatch.setattr(head_times, name, value)
    assert head_times.main([*ON_CPU, "--output", str(tmp_path)]) == 0
    _, *rows = ((tmp_path / "head_times.csv").read_text()).splitlines()
    listed = [tuple(row.split(",")[:3]) for row in rows]
    assert {("logits", "3", ""), ("dX", "3", ""), ("dW in 16 bits", "3", "")} <= set(listed)
    assert {("kl and its gradients", "8", budget) for budget in "12"} <= set(listed)
    assert "dW += in fp32: NotImplementedError" in capsys.readouterr().out  # a CPU has no such product


@needs_module
@pytest.mark.parametrize("fits", [True, False])
def test_a_plan_is_checked_or_refused(fits, monkeypatch, capsys):
    monkeypatch.setenv(plans.VARIABLE, "staged,1,64")
    monkeypatch.setattr(check_plan, "shapes", lambda *_: [(2, 5)])
    if not fits:

        def refuses(*_, **__):
            raise RuntimeError("KDKERNELS_PLAN=staged,1,64 does not fit the card")

        monkeypatch.setattr(cases, "loss_and_gradient", refuses)
    assert check_plan.main(ON_CPU) == (0 if fits else steps.SKIPPED)
    shown = capsys.readouterr().out.rstrip().splitlines()
    assert shown[-1] == ("12 of 12 cases are right" if fits else "KDKERNELS_PLAN=staged,1,64 does not fit the card")


@needs_module
def test_a_build_that_ignores_the_plan_is_noticed(monkeypatch, capsys):
    """The CPU kernels have no plans."""
    monkeypatch.setenv(plans.VARIABLE, plans.NO_PLAN)
    assert check_plan.main(ON_CPU) == 1
    assert "had no effect" in capsys.readouterr().out


def test_a_build_without_cuda_kernels_fails(tmp_path, capsys):
    record = tmp_path / "_build.json"
    for built, code, said in (
        ({"cuda_archs": ["90a"], "nvcc": "13.0.48", "cuda_missing_because": None}, 0, "built for 90a by nvcc 13.0.48"),
        ({"cuda_missing_because": "nvcc was not found"}, 1, "nvcc was not found"),
        ({"native_missing_because": "ninja is not installed", "cuda_archs": ["90a"]}, 1, "ninja is not installed"),
        ({}, 1, "names no architecture"),
    ):
        record.write_text(json.dumps(built))
        assert build_kernels.check(record) == code
        assert said in capsys.readouterr().out


def test_a_machine_without_a_gpu_builds_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it builds"))
    assert build_kernels.build() == 1 and "finds none" in capsys.readouterr().out
    assert serving.reason_against("cuda", "cuda") == "torch finds no GPU"


def test_the_build_is_for_the_card_and_requires_cuda(monkeypatch):
    built = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(subprocess, "run", lambda *_, env, **__: built.append(env) or SimpleNamespace(returncode=1))
    monkeypatch.delenv("KDKERNELS_CUDA_ARCHS", raising=False)
    for capability in ((9, 0), (8, 6), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert build_kernels.build() == 1
    assert [env["KDKERNELS_CUDA_ARCHS"] for env in built] == ["90a", "86", "120"]
    assert {env["KDKERNELS_REQUIRE_CUDA"] for env in built} == {"1"}


def test_the_reason_that_the_backend_does_not_serve_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(backends, "refuse", lambda *_: "the driver is too old")
    assert serving.reason_against("cuda", "cuda") == "the backend 'cuda' refuses: the driver is too old"
    monkeypatch.setattr(backends, "refuse", lambda *_: None)
    monkeypatch.setattr(backends, "automatic", lambda *_: "triton")
    assert serving.reason_against("cuda", "cuda") == "'auto' is 'triton' there, although the backend 'cuda' serves"
    assert serving.reason_against("triton", "cuda") is None
    monkeypatch.setattr(backends, "automatic", lambda *_: "cuda")
    assert serving.reason_against("cuda", "cuda") is None


SPEED = "    Section: GPU Speed Of Light Throughput"
PROFILER = [
    (f"echo '{SPEED}'\n" * 5, 0, "profiled 5 of 5 kernels"),
    (f"echo '{SPEED}'\n" * 4, 1, "profiled 4 of 5 kernels"),
    ("echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1", steps.SKIPPED, "may not profile here: ==ERROR== ERR_NVGPUCTRPERM"),
    (None, steps.SKIPPED, "ncu was found neither on PATH"),
]
SANITIZER = [
    ("echo; exit 0", 0, ""),
    ("echo '========= Invalid write'; exit 1", 1, "Invalid write"),
    ("echo '========= Error: Device not supported'; exit 1", steps.SKIPPED, "does not check here"),
    (None, steps.SKIPPED, "compute-sanitizer was found neither"),
]
TOOLS = [*((profiled, [], *row) for row in PROFILER)]
TOOLS += [(sanitized, ["--tool", tool], *row) for row in SANITIZER for tool in ("memcheck", "racecheck")]


@pytest.mark.parametrize(("module", "words", "text", "code", "said"), TOOLS)
def test_a_tool_that_is_missing_or_not_permitted_is_skipped(
    module, words, text, code, said, tmp_path, monkeypatch, capfd
):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setattr(module, "found", lambda name: None if text is None else str(program))
    assert module.main([*words, "--device", "cuda"]) == code
    assert said in capfd.readouterr().out


def test_the_gpu_tests_of_the_backend_under_test_are_chosen(monkeypatch):
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0)
    )
    assert marked_tests.main(["--backend", "cuda"]) == marked_tests.main(["--backend", "triton"]) == 0
    chosen = [command[command.index("-k") + 1] for command in commands]
    assert chosen == ["not triton", "not cuda"]
    files = {Path(word).name for word in commands[0] if word.endswith(".py")}
    assert {"test_torch.py", "test_linear.py", "test_class_ot.py"} <= files and "test_rows.py" not in files


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(versions, "PROGRAMS", ("no-such-program --version", "sh -c true"))
    monkeypatch.setattr(versions, "NEEDED", {"no_such_package": "the build"})
    assert versions.main() == 0
    shown = capsys.readouterr().out
    assert "no-such-program: not found" in shown and "missing: no_such_package, for the build" in shown
    assert f"torch {torch.__version__.split('+')[0]}" in shown and kdkernels.__version__
