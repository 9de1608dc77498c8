"""Builds kdkernels._native (csrc/) with ninja, without torch: the CPU kernels, and the CUDA kernels if nvcc is found.

Without nvcc the module has no CUDA kernels. Without a compiler, ninja or pybind11 the package installs without the
module. setup.py writes the result, or the reason for a failure, to kdkernels/_build.json, which
`python -m kdkernels.info` prints.

    KDKERNELS_CUDA_ARCHS   the architectures, default "80 90a 100+PTX 120"; +PTX serves later ones
    KDKERNELS_NVCC         the nvcc to use; else $CUDA_HOME/bin/nvcc, the one on PATH, or /usr/local/cuda/bin/nvcc
    KDKERNELS_NO_CUDA=1    no CUDA kernels        KDKERNELS_NO_NATIVE=1    no module at all
    KDKERNELS_REQUIRE_CUDA=1   the build fails, with the reason, where the CUDA kernels cannot be built
    CXX                    the C++ compiler (g++)
"""

import atexit
import contextlib
import functools
import itertools
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# Earlier releases build no wheel by themselves; before 61 they do not read the metadata of pyproject.toml either.
OLDEST_SETUPTOOLS = (70, 1)
# Each has a file of its name in csrc/cpu and csrc/cuda. csrc/calls has a file for each too, but topk_rows is in topk.h.
FAMILIES = ("rows", "linear", "topk", "topk_rows", "pairwise", "sinkhorn", "uld")
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -fno-trapping-math lets g++ vectorise selects. Never -ffast-math: it flushes denormals for the whole process, drops
# NaN, and its -fassociative-math deletes the rounding trick of exp.
CPU_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-trapping-math -fno-math-errno -fopenmp -Wall"
ISA_FLAGS = {"baseline": ""}
if X86:
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"

# -prec-div=false: division within 2 ulp, in a fraction of the instructions. -Xptxas -v: prints each kernel's registers
# and spills; tests/test_cuda_compile.py reads them from the log next to the object.
CUDA_FLAGS = "-std=c++17 -O3 --threads 0 -prec-div=false -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
# A chip runs code for its own number and for lower ones of the same ten: 86 and 89 run 80, 103 runs 100, 121 runs 120.
# Chips of other tens get the PTX of 100, which their driver compiles. nvcc knows 100 and 120 from 12.8 on.
CUDA_ARCHS = ("80", "90a", "100+PTX", "120")
# If nvcc does not know 100, later chips get this PTX.
OLDER_PTX = "90+PTX"
# Links the CUDA runtime into the module and exports none of its names: torch may have loaded another runtime.
CUDA_LIBRARIES = "-lcudart_static -lrt -lpthread -ldl -Wl,--exclude-libs,libcudart_static.a"


class Unavailable(Exception):
    """Why the CUDA kernels, or the whole module, cannot be built here."""


class Cuda(NamedTuple):
    nvcc: str
    version: str
    libraries: list[str]  # folders
    archs: list[str]
    left_out: list[str]  # of the default architectures


# ---- folders and programs


@functools.cache
def writable(folder: Path) -> Path:
    """The folder, which is made if need be; a temporary folder if this one cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        temporary = Path(tempfile.mkdtemp(prefix="kdkernels-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return temporary


def native_folder() -> Path:
    """The folder of the object files: one per Python, for every command. In a temporary folder, the default of an
    editable installation, everything would be compiled again.
    """
    return writable(writable(ROOT / "build") / f"native-{sys.implementation.cache_tag}-{platform.machine()}")


@contextlib.contextmanager
def locked(folder: Path):
    """Waits while another installation from this tree uses the folder. Without locks (Windows, some network file
    systems) it waits for nobody."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(stack.enter_context(open(folder / "lock", "ab")), fcntl.LOCK_EX)
        yield


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Runs a program, in English if the program heeds the locale. The output is text in the encoding of file names."""
    return subprocess.run(
        command, env={**os.environ, "LC_ALL": "C", "NINJA_STATUS": "[%f/%t] "}, capture_output=True,
        encoding=sys.getfilesystemencoding(), errors="surrogateescape",
    )  # fmt: skip


def readable(text: str) -> str:
    """Text in the encoding of file names, made printable: as UTF-8, with a backslash for each byte that is not."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def most_telling(lines: list[str]) -> str:
    """The first line that speaks of an error, in English; else the first line that is not empty. Readable."""
    lines = [readable(line.strip()) for line in lines if line.strip()]
    telling = [line for line in lines if re.search(r"\b(error|fatal)\b|not found|cannot find", line, re.IGNORECASE)]
    return (telling or lines or ["it printed nothing"])[0][:400]


# ---- nvcc and its architectures


def find_nvcc() -> str:
    named = os.environ.get("KDKERNELS_NVCC")
    if named:
        if shutil.which(named) is None:
            raise Unavailable(f"KDKERNELS_NVCC={named} is not a program")
        return named
    home = os.environ.get("CUDA_HOME")
    for nvcc in ([f"{home}/bin/nvcc"] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        if shutil.which(nvcc):
            return nvcc
    raise Unavailable("nvcc was not found in $CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin")


def gencode(arch: str) -> str:
    """90a: code for that chip; 100+PTX: code for that chip, and PTX that a driver compiles for later chips."""
    number = arch.removesuffix("+PTX")
    code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def dry_run(nvcc: str, arch: str) -> str | None:
    """nvcc's commands to compile for an architecture, or None if it does not know the architecture. (--list-gpu-code
    leaves out variants such as 90a.)"""
    command = [nvcc, "--dryrun", gencode(arch), "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    done = run(command)
    return done.stdout + done.stderr if done.returncode == 0 else None


def known_archs(nvcc: str) -> str:
    return " ".join(line.removeprefix("sm_") for line in run([nvcc, "--list-gpu-code"]).stdout.split())


def find_archs(nvcc: str, asked: list[str]) -> tuple[list[str], list[str]]:
    """The architectures to build, and the default architectures that this nvcc does not know."""
    if not asked:
        archs = [arch for arch in CUDA_ARCHS if dry_run(nvcc, arch)]
        left_out = [arch for arch in CUDA_ARCHS if arch not in archs]
        if not any(arch.endswith("+PTX") for arch in archs) and dry_run(nvcc, OLDER_PTX):
            archs.append(OLDER_PTX)
        if not archs:
            raise Unavailable(f"{nvcc} knows none of {' '.join(CUDA_ARCHS)}; it knows {known_archs(nvcc)}")
        return archs, left_out
    for arch in asked:
        if not re.fullmatch(r"\d+[af]?(\+PTX)?", arch) or not dry_run(nvcc, arch):
            raise ValueError(
                f"KDKERNELS_CUDA_ARCHS: expected architectures that nvcc knows, such as {' '.join(CUDA_ARCHS)!r}; got "
                f"{arch!r}; {nvcc} knows {known_archs(nvcc)} (and, from 90 on, the variant a of each, such as 90a)"
            )
    return list(dict.fromkeys(asked)), []


def find_cuda(archs: str) -> Cuda:
    """The CUDA build's tools, for architectures in the form of KDKERNELS_CUDA_ARCHS; "" means the default."""
    if os.environ.get("KDKERNELS_NO_CUDA") == "1":
        raise Unavailable("KDKERNELS_NO_CUDA=1 was set at installation")
    nvcc = find_nvcc()
    try:
        done = run([nvcc, "--version"])
    except OSError as error:
        raise Unavailable(f"{nvcc} could not be started ({error})") from error
    if done.returncode:
        raise Unavailable(f"{nvcc} --version failed: {most_telling((done.stderr + done.stdout).splitlines())}")
    version = done.stdout
    to_build, left_out = find_archs(nvcc, re.findall(r"[^;,\s]+", archs))
    folders = re.search(r"^#\$ LIBRARIES=(.*)$", dry_run(nvcc, to_build[0]), re.MULTILINE)
    libraries = [part.removeprefix("-L") for part in shlex.split(folders[1])] if folders else []
    number = re.search(r"V([\d.]+)", version)
    return Cuda(nvcc, number[1] if number else readable(version.strip()), libraries, to_build, left_out)


# ---- the file that ninja reads


def escaped(path: Path) -> str:
    """A path, escaped for ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def in_command(word: str | Path) -> str:
    """A word of a command, escaped for ninja and the shell."""
    return shlex.quote(str(word)).replace("$", "$$")


def cuda_objects(cuda: Cuda) -> dict[str, Path]:
    """The object files of the CUDA kernels, and their sources."""
    names = (*FAMILIES, "refusal")
    return {f"{name}_cuda_{'_'.join(cuda.archs)}.o": CSRC / "cuda" / f"{name}.cu" for name in names}


def cuda_lines(cuda: Cuda) -> list[str]:
    """One compilation of each cuda/*.cu for all architectures; the compiler's output stays in a log next to the
    object."""
    compiler = os.environ.get("CXX", "")
    host = f"-ccbin {in_command(compiler)}" if compiler and not compiler.split()[1:] else ""  # nvcc takes no more
    codes = " ".join(in_command(gencode(arch)) for arch in cuda.archs)
    return [
        f"nvcc = {in_command(cuda.nvcc)}",
        "rule compile_cuda",
        f"  command = $nvcc {CUDA_FLAGS} {host} {codes} -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || "
        "(cat $out.log; exit 1)",
        "  depfile = $out.d",
        *(f"build {name} | {name}.log: compile_cuda {escaped(source)}" for name, source in cuda_objects(cuda).items()),
    ]


def pybind11_folder() -> str:
    """The folder of pybind11's headers."""
    try:
        import pybind11

        return pybind11.get_include()
    except (ImportError, AttributeError) as error:  # AttributeError: an empty folder of that name is a package too
        raise Unavailable("pybind11 is not installed here (pip install pybind11)") from error


def border() -> str:
    """The hash of the sources at the border between Python and the kernels."""
    return runpy.run_path(str(ROOT / "kdkernels" / "sources.py"))["border_hash"](CSRC)


def module_lines(module: Path, cuda: Cuda | None) -> list[str]:
    """One compilation of each cpu/*.cpp per instruction set, the bindings, and the link."""
    compiler = os.environ.get("CXX", "g++")
    includes = [f"-I{folder}" for folder in (pybind11_folder(), sysconfig.get_paths()["include"])]
    defines = [f'-DKDK_BORDER="{border()}"', *["-DKDK_X86"] * X86, *["-DKDK_CUDA"] * (cuda is not None)]
    libraries = [f"-L{in_command(folder)}" for folder in cuda.libraries] + [CUDA_LIBRARIES] if cuda else []
    lines = [
        f"cxx = {compiler}",
        "rule compile",
        f"  command = $cxx {CPU_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -shared -fopenmp $in {' '.join(libraries)} -o $out",
        f"build bindings.o: compile {escaped(CSRC / 'bindings.cpp')}",
        f"  flags = {' '.join(map(in_command, includes + defines))}",
    ]
    objects = ["bindings.o", *(cuda_objects(cuda) if cuda else {})]
    for family in FAMILIES:
        for isa, flags in ISA_FLAGS.items():
            objects.append(f"{family}_{isa}.o")
            lines += [
                f"build {objects[-1]}: compile {escaped(CSRC / 'cpu' / f'{family}.cpp')}",
                f"  flags = {flags} -DKDK_ISA={isa}",
            ]
    return [*lines, f"build {escaped(module)}: link {' '.join(objects)}", f"default {escaped(module)}"]


def ninja_command() -> list[str]:
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except (ImportError, AttributeError):  # AttributeError: an empty folder of that name
        return ["ninja"]


def run_ninja(lines: list[str], *targets: str) -> str | None:
    """Runs ninja. Returns the reason of a failure, or None."""
    folder = native_folder()
    file = folder / "build.ninja"
    try:
        with locked(folder):
            try:
                file.write_bytes(os.fsencode("\n".join([*lines, ""])))
            except OSError as error:
                return f"the file that ninja reads could not be written ({readable(str(error))})"
            done = run([*ninja_command(), "-C", str(folder), *targets])
    except FileNotFoundError:
        return "ninja is not installed here (pip install ninja)"
    except OSError as error:
        return f"ninja could not be started ({error})"
    if done.returncode == 0:
        return None
    print(readable(done.stdout + done.stderr), file=sys.stderr)
    return reason_in(done.stdout.splitlines(), done.stderr.splitlines())


def reason_in(output: list[str], errors: list[str]) -> str:
    """The reason of a failure, from the lines that ninja printed: FAILED, the command, and the command's own output."""
    failed = [number for number, line in enumerate(output) if line.startswith("FAILED:")]
    if not failed:
        return f"ninja failed: {most_telling(errors + output)}"
    own = itertools.takewhile(lambda line: not re.match(r"\[\d+/\d+\] |ninja: ", line), output[failed[0] + 2 :])
    return f"the compiler failed: {most_telling(list(own))}"


# ---- the command


def build_module(module: Path, cuda: Cuda | None) -> str | None:
    """Builds the module. Returns the reason of a failure, or None."""
    if os.environ.get("KDKERNELS_NO_NATIVE") == "1":
        return "KDKERNELS_NO_NATIVE=1 was set at installation"
    try:
        return run_ninja(module_lines(module, cuda) + (cuda_lines(cuda) if cuda else []))
    except Unavailable as missing:
        return str(missing)


class BuildNative(build_ext):
    def run(self):
        module = Path(self.get_ext_fullpath("kdkernels._native")).resolve()
        build = {
            "python": sys.version.split()[0], "machine": platform.machine(), "border": border(),
            "cpu_isas": list(ISA_FLAGS),
        }  # fmt: skip
        cuda, cuda_reason, required = None, None, os.environ.get("KDKERNELS_REQUIRE_CUDA") == "1"
        try:
            cuda = find_cuda(os.environ.get("KDKERNELS_CUDA_ARCHS", ""))
        except Unavailable as missing:
            cuda_reason = str(missing)

        reason = build_module(module, cuda)
        if reason and cuda:
            cuda, cuda_reason = None, reason
            reason = reason if required else build_module(module, None)
        if required and cuda is None:
            raise CompileError(f"KDKERNELS_REQUIRE_CUDA=1, and there are no CUDA kernels: {readable(cuda_reason)}")
        if reason:
            print(f"kdkernels: installing without native kernels: {readable(reason)}", file=sys.stderr)
            build["cpu_isas"] = []
            cuda, cuda_reason = None, reason
        elif cuda is None:
            print(f"kdkernels: installing without CUDA kernels: {readable(cuda_reason)}", file=sys.stderr)
        build["native_missing_because"] = reason and readable(reason)
        build["cuda_missing_because"] = cuda_reason and readable(cuda_reason)
        if cuda:
            build |= {"nvcc": cuda.version, "cuda_archs": cuda.archs, "cuda_archs_left_out": cuda.left_out}
        try:
            module.parent.mkdir(parents=True, exist_ok=True)
            if reason and not module.is_dir():
                module.unlink(missing_ok=True)
            (module.parent / "_build.json").write_text(json.dumps(build, indent=2) + "\n")
        except OSError as error:
            print(f"kdkernels: {readable(str(error))}: the record of this build is lost", file=sys.stderr)


def check_setuptools(found: str) -> None:
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST_SETUPTOOLS:
        oldest = ".".join(map(str, OLDEST_SETUPTOOLS))
        sys.exit(
            f"kdkernels: expected setuptools {oldest} or later to build with; got {found}. Remedy: "
            f'pip install "setuptools>={oldest}", or install without --no-build-isolation'
        )


def folder_options() -> dict[str, dict[str, str]]:
    """Options of setuptools that move its own files out of a source tree that cannot be written."""
    options = {}
    if (build := writable(ROOT / "build")) != ROOT / "build":
        options["build"] = {"build_base": str(build)}
    if (metadata := writable(ROOT)) != ROOT:
        options["egg_info"] = {"egg_base": str(metadata)}
    return options


if __name__ == "__main__":
    check_setuptools(__version__)
    setup(
        # In pyproject.toml, setuptools before 77 takes another form of license than later ones.
        license="Apache-2.0",
        ext_modules=[Extension("kdkernels._native", [])],
        cmdclass={"build_ext": BuildNative},
        options=folder_options(),
    )
