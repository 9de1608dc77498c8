"""Installation where something is missing, damaged, old or foreign: setup.py, the compiled module's loading, the info.

setup.py's functions run in this process. tests/test_install.py has the real installations.
"""

import importlib.machinery
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from test_cuda_compile import build

import kdkernels
from kdkernels import info
from kdkernels.backends import native
from kdkernels.backends.native import module as loading
from kdkernels.sources import border_hash

ROOT = Path(__file__).parent.parent
GBK = rb"\264\355\316\363"  # "error" in GBK, as printf writes the bytes: not UTF-8


# ---- setup.py: each missing or broken tool is a reason


def script(path: Path, *lines: bytes) -> str:
    path.write_bytes(b"\n".join([b"#!/bin/sh", *lines, b""]))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def reason_of(tmp_path, monkeypatch):
    """The reason that a build of the CPU kernels fails for, given the environment."""
    monkeypatch.delenv("KDKERNELS_NO_NATIVE", raising=False)
    monkeypatch.setattr(build, "native_folder", lambda: tmp_path)

    def reason(**environment) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return build.build_module(tmp_path / "_native.so", None)

    return reason


@pytest.mark.parametrize("found", [None, SimpleNamespace()], ids=["nothing", "an empty folder"])
def test_without_pybind11_the_reason_names_it(reason_of, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "pybind11", found)
    assert reason_of() == "pybind11 is not installed here (pip install pybind11)"


def test_an_empty_folder_named_ninja_is_no_ninja(monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace())
    assert build.ninja_command() == ["ninja"]


def test_without_ninja_the_reason_names_it(reason_of, monkeypatch):
    monkeypatch.setattr(build, "ninja_command", lambda: ["/nowhere/ninja"])
    assert reason_of() == "ninja is not installed here (pip install ninja)"


@pytest.mark.parametrize(
    ("says", "line"),
    [
        (rb"printf '" + GBK + rb"\n'", r"\xb4\xed\xce\xf3"),
        ("echo 'In Datei, eingebunden von hier'; echo '  a.cpp:3: Fehler: geht nicht, ähm'".encode(), "In Datei"),
        (b"echo 'Fehler: geht nicht'", "Fehler: geht nicht"),
        (b"echo warning: no; echo 'a.cpp:3: error: no such type' >&2; echo later", "a.cpp:3: error: no such type"),
        (b"echo error of the job before; kill -9 $$", "error of the job before"),
        (b"true", "it printed nothing"),
    ],
)
def test_the_reason_is_the_compilers_own_line(reason_of, tmp_path, says, line):
    reason = reason_of(CXX=script(tmp_path / "error g++", says, b"exit 1").replace(" ", r"\ "))
    assert reason.startswith(f"the compiler failed: {line}")
    assert "ninja" not in reason


def test_a_compiler_that_is_not_there_is_named(reason_of):
    assert re.fullmatch("the compiler failed: .*/nowhere/g\\+\\+.*not found", reason_of(CXX="/nowhere/g++"))
    assert "KDKERNELS_NO_NATIVE=1 was set" in reason_of(KDKERNELS_NO_NATIVE="1")


def test_the_compiler_is_asked_for_english(reason_of, tmp_path):
    line = b'case "$LC_ALL" in C) echo "error: English";; *) echo Deutsch;; esac; exit 1'
    assert reason_of(CXX=script(tmp_path / "g++", line), LC_ALL="de_DE.UTF-8") == "the compiler failed: error: English"


def test_ninjas_own_failure_is_a_reason(reason_of, tmp_path):
    (tmp_path / ".ninja_log").mkdir()
    assert re.match("ninja failed: ninja: .*build log", reason_of(CXX="true"))


def test_a_folder_in_the_place_of_ninjas_file_is_a_reason(reason_of, tmp_path):
    (tmp_path / "build.ninja").mkdir()
    assert re.match(r"the file that ninja reads could not be written \(.*build.ninja", reason_of(CXX="true"))


def test_builds_of_one_tree_take_turns(reason_of, tmp_path):
    """They have one folder of objects. A thread stands for the other installation, whose lock is of another file."""
    fcntl = pytest.importorskip("fcntl")
    build_it = threading.Thread(target=lambda: reason_of(CXX="true"))
    with open(tmp_path / "lock", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        build_it.start()
        build_it.join(0.3)
        assert build_it.is_alive() and not (tmp_path / "build.ninja").exists()
    build_it.join(30)
    assert not build_it.is_alive() and (tmp_path / "build.ninja").exists()


def test_a_source_distribution_has_sources_alone(tmp_path):
    """Not a developer's record of a build, module or editor's files, also where an earlier list of files names them."""
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    package, calls = tmp_path / "kdkernels", tmp_path / "csrc" / "calls"
    left = ["_build.json", "_native.so", ".#ops.py"]
    for path in [calls / "rows.h", calls / ".#rows.h", package / "__init__.py", *(package / name for name in left)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "kdkernels.egg-info").mkdir()
    (tmp_path / "kdkernels.egg-info" / "SOURCES.txt").write_text("".join(f"kdkernels/{name}\n" for name in left))
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tmp_path, capture_output=True, check=True)
    with tarfile.open(next((tmp_path / "dist").iterdir())) as archive:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert {"setup.py", "csrc/calls/rows.h", "kdkernels/__init__.py", "CHANGELOG.md"} <= names
    assert not any(name.endswith(("_build.json", ".so")) or Path(name).name.startswith(".") for name in names)


def test_an_nvcc_that_fails_in_another_encoding_is_quoted(monkeypatch, tmp_path):
    monkeypatch.delenv("KDKERNELS_NO_CUDA", raising=False)
    nvcc = script(tmp_path / "nvcc", rb"printf '" + GBK + rb"\n' >&2; exit 1")
    monkeypatch.setenv("KDKERNELS_NVCC", nvcc)
    with pytest.raises(build.Unavailable) as refused:
        build.find_cuda("")
    assert str(refused.value) == rf"{nvcc} --version failed: \xb4\xed\xce\xf3"


def test_builds_where_python_takes_file_names_for_ascii(tmp_path):
    folder = tmp_path / "jörg"
    border = Path("kdkernels", "sources.py")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / border.parent).mkdir(parents=True)
    for name in (border, "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    cxx = script(folder / "g++", "echo 'Fehler: geht nicht, ähm'; exit 1".encode())
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, capture_output=True,
        env={**os.environ, **locale, "CXX": cxx, "KDKERNELS_NO_CUDA": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "kdkernels" / "_build.json").read_text())
    assert record["native_missing_because"] == "the compiler failed: Fehler: geht nicht, ähm"


def test_a_folder_that_cannot_be_made_is_replaced(tmp_path, monkeypatch):
    assert build.writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "a" / "file").touch()
    for folder in (tmp_path / "a" / "file", tmp_path / "a" / "file" / "native"):
        assert build.writable(folder).is_dir() and tmp_path not in build.writable(folder).parents
    monkeypatch.setattr(build, "ROOT", tmp_path / "a")
    assert build.folder_options() == {}
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "build").touch()
    monkeypatch.setattr(build, "ROOT", tmp_path / "c")
    assert Path(build.folder_options()["build"]["build_base"]).is_dir()
    assert build.native_folder().is_dir()
    monkeypatch.setattr(build, "ROOT", tmp_path / "a" / "file")  # nothing can be written, as in a read-only tree
    assert Path(build.folder_options()["egg_info"]["egg_base"]).is_dir()


@pytest.mark.parametrize("found", ["59.6.0", "65.5", "70.0.0"])
def test_an_older_setuptools_is_refused_in_a_line(found):
    with pytest.raises(SystemExit) as refused:
        build.check_setuptools(found)
    assert f"setuptools 70.1 or later to build with; got {found}. Remedy: pip install" in str(refused.value)
    for newer in ("70.1.0", "70.3.0.post1", "76", "84.2.1"):
        build.check_setuptools(newer)


def test_pyproject_is_valid_for_every_setuptools():
    """Before 77, setuptools refuses a license expression and license files in [project]."""
    project = (ROOT / "pyproject.toml").read_text().split("[project]")[1].split("\n[")[0]
    assert 'dynamic = ["license"]' in project and not re.search(r"^license", project, re.MULTILINE)


def test_the_requirement_accepts_torch_of_vendors():
    line = re.search(r'^dependencies = \["(torch.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    specifier = Requirement(line).specifier
    vendors = ["2.9.0a0+nv25.09", "2.9.0.dev20250801+cu128", "2.10.0.dev2025", "2.10.0a0+git1234"]
    for version in [*vendors, "2.9.0", "2.9.1", "2.13.0+cpu"]:
        assert specifier.contains(version, prereleases=True), version  # as pip asks about an installed package
    for version in ("2.8.0", "2.8.1+cu126", "2.8.0a0+nv25.05"):
        assert not specifier.contains(version, prereleases=True), version
    assert list(specifier.filter(["2.9.1", "2.14.0rc1"])) == ["2.9.1"], "pip would fetch a pre-release"


# ---- the compiled module


def placed(monkeypatch, path: Path, module: ModuleType | None = None) -> None:
    """Lets the loader find the file, and import the module from it."""
    monkeypatch.setattr(loading, "find", lambda: importlib.machinery.ModuleSpec("_native", None, origin=str(path)))
    monkeypatch.setitem(sys.modules, loading.NAME, module)


@pytest.mark.parametrize("border", [None, "0123456789abcdef"], ids=["foreign", "stale"])
def test_a_module_of_other_sources_is_refused(monkeypatch, tmp_path, border):
    module, path = ModuleType("_native"), tmp_path / "_native.so"
    path.touch()
    if border:
        module.border = border
    placed(monkeypatch, path, module)
    for csrc in (loading.CSRC, tmp_path):  # in a checkout; without csrc/, as installed
        monkeypatch.setattr(loading, "CSRC", csrc)
        found, reason = loading.load()
        assert found is None and f"{path} was built from other sources" in reason and "rebuild" in reason


def test_an_object_in_the_place_of_the_module_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, loading.NAME, ModuleType("_native"))  # its __spec__ is None
    module, reason = loading.load()
    assert module is None and "rebuild" in reason


def test_a_module_of_another_checkout_is_not_taken(monkeypatch, tmp_path):
    """An editable installation finds its own module for every copy of the package that has none."""
    (tmp_path / "kdkernels").mkdir()
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(loading, "PACKAGE", tmp_path / "kdkernels")
    module, reason = loading.load()
    assert module is None and loading.find() is None
    assert f"{tmp_path} is a source tree in which no build has run" in reason and "pip install -e ." in reason


def test_the_recorded_border_serves_without_the_sources(monkeypatch, tmp_path):
    module = ModuleType("_native")
    module.border = "0123456789abcdef"
    (tmp_path / "_native.so").touch()
    placed(monkeypatch, tmp_path / "_native.so", module)
    monkeypatch.setattr(loading, "PACKAGE", tmp_path)
    monkeypatch.setattr(loading, "CSRC", tmp_path)
    assert loading.load()[0] is None, "without a record nobody knows the module"
    (tmp_path / "_build.json").write_text(json.dumps({"border": module.border}))
    assert loading.load() == (module, None)


def test_the_border_is_of_every_call(tmp_path):
    copy = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    seen = {border_hash(copy)}
    assert seen == {border_hash(ROOT / "csrc")}
    headers = sorted((copy / "calls").glob("*.h"))
    assert len(headers) > 5
    for path in [*headers, copy / "divergences.h", copy / "bindings.cpp", copy / "cuda" / "bindings.h"]:
        path.write_text(path.read_text() + "// changed\n")
        seen.add(border_hash(copy))
    assert len(seen) == len(headers) + 4


def test_line_endings_and_an_editors_files_are_no_other_sources(tmp_path):
    copy = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for path in [*(copy / "calls").glob("*.h"), copy / "bindings.cpp"]:
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (copy / "calls" / ".#rows.h").symlink_to("nobody@nowhere.1")  # as Emacs locks a file
    (copy / "calls" / "._rows.h").write_bytes(b"\0")
    assert border_hash(copy) == border_hash(ROOT / "csrc")


@pytest.mark.skipif(native._native is None, reason=f"no native module: {native.missing_because}")
@pytest.mark.skipif(sys.platform != "linux", reason="an ELF file")
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.9])
def test_a_module_that_is_cut_off_is_not_loaded(monkeypatch, tmp_path, kept):
    """The loader of the system maps such a file, and the process dies of SIGBUS."""
    whole = Path(native._native.__file__).read_bytes()
    path = tmp_path / "_native.so"
    path.write_bytes(whole[: int(kept * len(whole))])
    placed(monkeypatch, path)  # an import would raise
    module, reason = loading.load()
    assert module is None and "rebuild" in reason
    assert "cut off" in reason
    path.write_bytes(whole)
    assert not loading._is_cut_off(path)


@pytest.mark.parametrize("record", [b"\xff\xfe", b"{", b"[]", b""])
def test_a_damaged_record_is_a_reason(monkeypatch, tmp_path, record):
    (tmp_path / "_build.json").write_bytes(record)
    monkeypatch.setattr(loading, "PACKAGE", tmp_path)
    assert str(tmp_path) in loading.build_record()["native_missing_because"]


def test_a_module_of_another_python_is_named(monkeypatch, tmp_path):
    (tmp_path / "_build.json").write_text('{"python": "3.9.1", "machine": "riscv", "native_missing_because": null}')
    monkeypatch.setattr(loading, "PACKAGE", tmp_path)
    monkeypatch.setattr(loading, "find", lambda: None)
    module, reason = loading.load()
    assert module is None and "built for Python 3.9.1 on riscv" in reason and sys.version.split()[0] in reason


def test_a_module_that_is_gone_is_named(monkeypatch, tmp_path):
    """A module serves each release of its minor version, so its record may name another release."""
    record = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}.99", "machine": platform.machine()}
    (tmp_path / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(loading, "PACKAGE", tmp_path)
    module, reason = loading.load()
    assert module is None and f"is in {tmp_path} now; rebuild it" in reason and ".99" not in reason
    for contents in ((), ("__init__.py",)):
        (tmp_path / "_native").mkdir(exist_ok=True)
        for name in contents:
            (tmp_path / "_native" / name).touch()
        assert f"{tmp_path / '_native'} is a folder in the place of the module; remove" in loading.load()[1]


# ---- the warning


@pytest.fixture
def without_module(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "missing_because", "they were not built: g++ was not found")
    native._warn.cache_clear()
    yield
    native._warn.cache_clear()


def warned(function) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in caught if "kdkernels" in str(each.message)]


def test_the_reference_by_default_warns_once(without_module):
    x = torch.randn(2, 5)
    assert warned(lambda: kdkernels.fused_kl(x, x, backend="reference")) == []
    assert warned(info.report) == []
    (message,) = warned(lambda: [kdkernels.fused_kl(x, x), kdkernels.fused_uld(x, x), kdkernels.fused_kl(x, x)])
    assert "g++ was not found" in message and "several times slower" in message and "kdkernels.info" in message


def test_the_reference_by_default_warns_while_it_is_compiled(without_module):
    x = torch.randn(2, 5)
    torch.compiler.reset()
    loss = torch.compile(lambda s: kdkernels.fused_kl(s, x), fullgraph=True, backend="eager")
    assert len(warned(lambda: [loss(x), loss(x + 1)])) == 1
    torch.compiler.reset()


def test_a_worker_of_a_data_loader_does_not_warn(without_module, monkeypatch):
    """A loader starts new workers in each epoch. Ranks that a launcher started are processes as any other, and warn."""
    x = torch.randn(2, 5)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0))
        assert warned(lambda: kdkernels.fused_kl(x, x)) == []
    assert len(warned(lambda: kdkernels.fused_kl(x, x))) == 1


def test_native_kernels_are_used_unwarned():
    native._warn.cache_clear()
    x = torch.randn(2, 5)
    assert native._native is None or warned(lambda: kdkernels.fused_kl(x, x)) == []


# ---- the info


def test_info_goes_on_where_a_part_fails(monkeypatch):
    def fails(*_):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "device_count", fails)
    monkeypatch.setattr(native, "_native", SimpleNamespace())  # without any function
    monkeypatch.setattr(native, "missing_because", None)
    monkeypatch.setattr(native.cuda, "refuse", fails)
    report = info.report()
    assert "gpu lines" in report and "failed: RuntimeError: no driver" in report
    assert re.search("native lines +failed: AttributeError: .*cpu_isa", report)
    assert re.search("cuda on cpu +failed: RuntimeError: no driver", report)
    assert re.search("reference on cpu +available", report)


STALE = """
import runpy, sys, warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
sys.modules["kdkernels._native"] = stale = ModuleType("kdkernels._native")  # imports, and lacks every function
stale.__spec__ = ModuleSpec("kdkernels._native", None, origin=sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, kdkernels
    for _ in range(2):
        s = torch.randn(2, 5, requires_grad=True)
        kdkernels.fused_kl(s, torch.randn(2, 5)).backward()
        assert s.grad.isfinite().all()
    print(*(each.message for each in caught if "kdkernels" in str(each.message)), sep="\\n")
runpy.run_module("kdkernels.info", run_name="__main__")
"""


def test_a_stale_module_warns_once_and_the_reference_serves():
    out = subprocess.run([sys.executable, "-c", STALE, __file__], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    message, *report = out.stdout.splitlines()
    assert "rebuild" in message and "kdkernels" in message
    assert re.search("cpu on cpu +the native module is missing .*rebuild", "\n".join(report))
    assert report[-1].endswith("reference")
