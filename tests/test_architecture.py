"""The layout's rules: imports go one way, the four tables agree, the import is cheap, and the commands work."""

import ast
import contextlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kdkernels
from kdkernels import CATALOGUE, Divergence, backends, fused_divergence
from kdkernels.backends import native
from kdkernels.backends.reference import table as reference
from kdkernels.families import class_ot
from kdkernels.families import linear as chunks
from kdkernels.families import sinkhorn as transport
from kdkernels.families.kernels import Kernels

PACKAGE = Path(kdkernels.__file__).parent
ROOT = Path(__file__).parent.parent

# The layers of the package, lowest first. A module imports from lower layers and from its own folder.
FLOORS = (
    ("callers", "checks", "forks", "sources"),
    ("heads",),
    ("_native", "distributions", "divergences"),
    ("families",),
    ("backends",),
    ("ops",),
    ("autograd",),
    ("losses",),
    ("teachers", "nn"),
    ("cache",),
    ("info", "selftest"),
)
# The package itself imports from every layer except the commands and the cache. Only the commands import the package,
# for its version.
FACE = "kdkernels"
# These modules import a backend only when a call needs it, inside a function.
LAZY = ("backends", "info")


def module_name(path: Path) -> str:
    parts = ("kdkernels", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(name: str) -> int:
    """The index of a module's layer in FLOORS."""
    part = name.split(".")[1]
    found = [number for number, parts in enumerate(FLOORS) if part in parts]
    assert found, f"{name} belongs to no layer"
    return found[0]


def backend(name: str) -> str | None:
    """The backend that a module belongs to, or None."""
    parts = name.split(".")
    return parts[2] if parts[1] == "backends" and len(parts) > 2 else None


def imported(path: Path):
    """(module, whether inside a function) for every import of this package."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    lazy = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("kdkernels") for alias in node.names), f"{path}: import relatively"
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
        source = f"{base}.{node.module}" if node.module else base
        for alias in node.names:
            full = f"{source}.{alias.name}"
            yield (full if full in MODULES else source), node in lazy


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")} | {"kdkernels._native": None}


@pytest.mark.parametrize("name", sorted(name for name, path in MODULES.items() if path and name != FACE))
def test_imports_go_down(name):
    for target, lazy in imported(MODULES[name]):
        if target == FACE:
            assert name.split(".")[1] in FLOORS[-1], f"{name} imports the package itself"
            continue
        same_folder = name.split(".")[1] == target.split(".")[1]
        if not (lazy and name.split(".")[1] in LAZY):
            assert same_folder or floor(target) < floor(name), f"{name} imports {target}"
        if backend(name) and backend(target):
            assert backend(name) == backend(target), f"{name} imports another backend: {target}"


def test_the_face_imports_no_command_and_no_cache():
    for target, _ in imported(MODULES[FACE]):
        assert target.split(".")[1] not in (*FLOORS[-1], *FLOORS[-2]), f"the package itself imports {target}"


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_a_backend_has_the_functions_of_the_interface(backend):
    """Each function must have the interface's parameters, in the same order."""
    kernels = backends.kernels(backend)
    wanted = {name: f for name, f in vars(Kernels).items() if not name.startswith("_") and callable(f)}
    assert wanted
    for name, f in wanted.items():
        parameters = [p for p in inspect.signature(f).parameters if p != "self"]
        assert list(inspect.signature(getattr(kernels, name)).parameters) == parameters, name


def test_the_four_tables_agree():
    pytest.importorskip("triton")
    from kdkernels.backends.triton import table

    names = list(CATALOGUE)
    assert list(reference.TABLE) == names
    assert list(table.TABLE) == names
    if native._native is not None:
        assert list(native._native.divergences) == names


def test_every_divergence_has_formula_and_source():
    for name, entry in CATALOGUE.items():
        assert entry.formula and entry.source, name
        assert (entry.parameter is None) == (entry.default is None), name


def infinite_at(words: str) -> dict[str, tuple]:
    """By name, of "kl and mixed_kl (weight > 0)": (parameter, comparison, bound), or ()."""
    pattern = re.compile(r"(\w+)(?: \((\w+) ([<>]) (\S+)\))?")
    found = [pattern.fullmatch(part) for part in re.split(", | and ", words.strip())]
    assert all(found), words
    return {part[1]: part.groups()[1:] if part[2] else () for part in found}


def is_infinite_at(condition: tuple | None, divergence: Divergence) -> bool:
    """Whether a condition of `infinite_at` holds: always if empty, never if there is none."""
    if not condition:
        return condition is not None
    parameter, comparison, bound = condition
    assert CATALOGUE[divergence.name].parameter == parameter
    return divergence.parameter < float(bound) if comparison == "<" else divergence.parameter > float(bound)


def some_of_each() -> list[Divergence]:
    """Every divergence at its examples, and at some numbers that its parameter may be."""
    found = [example for name in CATALOGUE for example in Divergence.examples(name)]
    for name, entry in CATALOGUE.items():
        for value in (-1.5, -0.01, 0.0, 0.01, 0.5, 0.99, 1.0, 1.01, 2.5) if entry.parameter else ():
            with contextlib.suppress(ValueError):
                found.append(Divergence(name, **{entry.parameter: value}))
    return found


def test_the_readme_lists_the_catalogue():
    readme = (ROOT / "README.md").read_text()
    _, _, *lines = readme[readme.index("| name | value of a row |") :].split("\n\n")[0].split("\n")
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert [name for name, *_ in cells] == [f'`"{name}"`' for name in CATALOGUE]
    for (name, entry), (_, formula, parameter, infinite) in zip(CATALOGUE.items(), cells, strict=True):
        assert entry.formula.endswith(formula.replace("\\|", "|")), name
        assert bool(parameter) == bool(entry.parameter), name
        if entry.parameter:
            assert parameter.startswith(f"`{entry.parameter}` ") and parameter.endswith(f" default {entry.default:g}")
        sides = infinite_at(infinite.replace("the ", "")) if infinite else {}
        for divergence in some_of_each():
            if divergence.name == name:
                assert is_infinite_at(sides.get("teacher"), divergence) == divergence.is_infinite_without_teacher
                assert is_infinite_at(sides.get("student"), divergence) == divergence.is_infinite_without_student


def test_the_docstring_of_fused_divergence_lists_the_catalogue():
    text = " ".join(fused_divergence.__doc__.split())
    assert re.search(r"divergence: a name of the catalogue \((.*?)\)", text)[1].split(", ") == list(CATALOGUE)
    alone = re.search(r"with student mass: (.*?) are \+inf, and the row's gradient is NaN", text)[1]
    finite, nan = re.search(
        r"with teacher mass: (.*?) are \+inf with the finite gradient of their formula; (.*?) are \+inf with a NaN",
        text,
    ).groups()
    without_teacher, finite, nan = map(infinite_at, (alone, finite, nan))
    for divergence in some_of_each():
        name = divergence.name
        assert is_infinite_at(without_teacher.get(name), divergence) == divergence.is_infinite_without_teacher
        is_infinite = is_infinite_at((finite | nan).get(name), divergence)
        assert is_infinite == divergence.is_infinite_without_student, divergence
        assert not is_infinite or divergence.is_steep == (name in nan), divergence


def test_importing_loads_no_triton_and_no_numpy_of_ours():
    code = "import torch, sys; before = set(sys.modules); import kdkernels; print(sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [m for m in ast.literal_eval(out.stdout) if not m.startswith("kdkernels")]
    assert not [m for m in loaded if m.split(".")[0] in ("triton", "numpy", "pandas", "transformers")], loaded


def test_info_says_what_is_here():
    out = subprocess.run([sys.executable, "-m", "kdkernels.info"], capture_output=True, text=True, check=True).stdout
    for part in ("kdkernels", torch.__version__, "reference on cpu  available"):
        assert part in out
    assert ("cpu on cpu        available" in out) == (native._native is not None)


def test_info_without_the_native_module(monkeypatch):
    from kdkernels import info

    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "missing_because", "ModuleNotFoundError: No module named 'kdkernels._native'")
    record = {"native_missing_because": "the compiler failed: g++ not found"}
    monkeypatch.setattr(native, "build_record", lambda: record)
    report = info.report()
    assert "No module named" in report and "g++ not found" in report and "auto on cpu" in report
    assert report.splitlines()[-1 if not torch.cuda.is_available() else -2].endswith("reference")


def test_info_says_what_the_cuda_kernels_are(monkeypatch):
    from kdkernels import info

    record = {"nvcc": "12.4.131", "cuda_archs": ["80", "90a", "90+PTX"], "cuda_archs_left_out": ["100+PTX"]}
    monkeypatch.setattr(native, "build_record", lambda: record)
    monkeypatch.setattr(native, "missing_because", None)
    monkeypatch.setattr(native, "_native", SimpleNamespace(cpu_isa="baseline"))
    monkeypatch.setattr(native, "cuda_missing_because", None)
    line = dict(info.native_lines())["cuda kernels"]
    for part in ("80, 90a, 90+PTX", "nvcc 12.4.131", "not for 100+PTX"):
        assert part in line
    monkeypatch.setattr(native, "cuda_missing_because", "nvcc was not found on PATH")
    assert dict(info.native_lines())["cuda kernels"] == "not built: nvcc was not found on PATH"


def test_selftest_passes_and_can_fail(monkeypatch, capsys):
    from kdkernels import selftest

    monkeypatch.setattr(selftest, "SHAPES", ((5, 1), (5, 1000)))
    monkeypatch.setattr(selftest, "INTERPRETED_SHAPES", ((5, 7),))
    monkeypatch.setattr(selftest, "CATALOGUE", {"kl": None, "js": None})
    monkeypatch.setattr(selftest, "TAILS", ("bucket",))
    monkeypatch.setattr(selftest, "DTYPES", (torch.float32,))
    monkeypatch.setattr(transport, "COSTS", ("l1", "dot"))
    monkeypatch.setattr(transport, "GRADIENTS", ("unrolled",))
    assert selftest.check("cpu")
    assert "all right" in capsys.readouterr().out
    named = ["cpu"]  # the interpreter of Triton takes most of the time
    right, unrolled = reference.TABLE["js"], class_ot._unrolled
    with monkeypatch.context() as patch:
        patch.setitem(reference.TABLE, "js", lambda *args: 1.001 * right(*args))
        patch.setattr(class_ot, "_unrolled", lambda *args: 1.001 * unrolled(*args))
        assert not selftest.check("cpu", named=named)
        wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
        assert any(" js " in line for line in wrong) and any("ot, unrolled" in line for line in wrong)
    project = chunks._project
    monkeypatch.setattr(chunks, "_project", lambda hidden, *others: project(1.1 * hidden, *others))
    assert not selftest.check("cpu", named=named)
    assert all("WRONG" in line for line in capsys.readouterr().out.splitlines() if " head" in line)


def test_build_record_is_there():
    build = json.loads((PACKAGE / "_build.json").read_text())
    assert {"native_missing_because", "cuda_missing_because"} <= set(build)


def test_exports():
    for name in kdkernels.__all__:
        assert hasattr(kdkernels, name)
    assert f'version = "{kdkernels.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_module_is_the_function():
    student, teacher = torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    mask = torch.rand(2, 3) > 0.3
    module = kdkernels.nn.Divergence(kdkernels.Divergence("js", beta=0.2), temperature=2.0, reduction="sum")
    want = kdkernels.fused_js(student, teacher, beta=0.2, temperature=2.0, reduction="sum", mask=mask)
    assert torch.equal(module(student, teacher, mask=mask), want)
    assert torch.equal(module(student, teacher, mask=mask, reduction="none").sum(), want)
    assert "beta=0.2" in repr(module) and "temperature=2.0" in repr(module)
    assert kdkernels.nn.Divergence.gkd(0).divergence == kdkernels.Divergence("kl")


@pytest.mark.parametrize("name", backends.NAMES)
def test_refusals_are_sentences(name):
    x = torch.randn(1, 2, device="meta")
    reason = backends.refuse(name, x, x)
    assert reason is None if name == "reference" else len(reason) > 20
