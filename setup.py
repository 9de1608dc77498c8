"""Builds kdkernels._native (csrc/) with ninja, without torch: the CPU kernels, and the CUDA kernels if nvcc is found.

Without nvcc the module has no CUDA kernels; without a compiler the package installs without the module. setup.py writes
the result, or the reason for a failure, to kdkernels/_build.json, which `python -m kdkernels.info` prints.

    KDKERNELS_CUDA_ARCHS   the architectures, default "80 90a 100+PTX"; +PTX serves later ones
    KDKERNELS_NVCC         the nvcc to use; else $CUDA_HOME/bin/nvcc, the one on PATH, or /usr/local/cuda/bin/nvcc
    KDKERNELS_NO_CUDA=1    no CUDA kernels        KDKERNELS_NO_NATIVE=1    no module at all
    CXX                    the C++ compiler (g++)
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# One build folder per Python, for every command. In a temporary folder, its default, an editable installation would
# compile everything again.
FOLDER = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{platform.machine()}"
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
CUDA_ARCHS = ("80", "90a", "100+PTX")
# If nvcc does not know the last of CUDA_ARCHS, later chips get this PTX.
OLDER_PTX = "90+PTX"
# Links the CUDA runtime into the module and exports none of its names: torch may have loaded another runtime.
CUDA_LIBRARIES = "-lcudart_static -lrt -lpthread -ldl -Wl,--exclude-libs,libcudart_static.a"


class Unavailable(Exception):
    """Why the CUDA kernels cannot be built here."""


class Cuda(NamedTuple):
    nvcc: str
    version: str
    libraries: list[str]  # folders
    archs: list[str]
    left_out: list[str]  # of the default architectures


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
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode == 0 else None


def known_archs(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    return " ".join(line.removeprefix("sm_") for line in done.stdout.split())


def find_archs(nvcc: str, asked: list[str]) -> tuple[list[str], list[str]]:
    """The architectures to build, and the default architectures that this nvcc does not know."""
    if not asked:
        archs = [arch for arch in CUDA_ARCHS if dry_run(nvcc, arch)]
        left_out = [arch for arch in CUDA_ARCHS if arch not in archs]
        if CUDA_ARCHS[-1] in left_out and dry_run(nvcc, OLDER_PTX):
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
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{nvcc} could not be started ({error})") from error
    to_build, left_out = find_archs(nvcc, re.findall(r"[^;,\s]+", archs))
    folders = re.search(r"^#\$ LIBRARIES=(.*)$", dry_run(nvcc, to_build[0]), re.MULTILINE)
    libraries = [part.removeprefix("-L") for part in shlex.split(folders[1])] if folders else []
    number = re.search(r"V([\d.]+)", version)
    return Cuda(nvcc, number[1] if number else version.strip(), libraries, to_build, left_out)


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


def module_lines(module: Path, cuda: Cuda | None) -> list[str]:
    """One compilation of each cpu/*.cpp per instruction set, the bindings, and the link."""
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    includes = f"-I'{pybind11.get_include()}' -I'{sysconfig.get_paths()['include']}'"
    define = "-DKDK_X86 " * X86 + "-DKDK_CUDA" * (cuda is not None)
    libraries = [f"-L{in_command(folder)}" for folder in cuda.libraries] + [CUDA_LIBRARIES] if cuda else []
    lines = [
        f"cxx = {compiler}",
        "rule compile",
        f"  command = $cxx {CPU_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -shared -fopenmp $in {' '.join(libraries)} -o $out",
        f"build bindings.o: compile {escaped(CSRC / 'bindings.cpp')}",
        f"  flags = {includes} {define}",
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
    except ImportError:
        return ["ninja"]


def run_ninja(lines: list[str], *targets: str) -> str | None:
    """Runs ninja. Returns the reason of a failure, or None."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "build.ninja").write_text("\n".join([*lines, ""]))
    try:
        done = subprocess.run([*ninja_command(), "-C", str(FOLDER), *targets], capture_output=True, text=True)
    except OSError as error:
        return f"ninja could not be started ({error})"
    if done.returncode == 0:
        return None
    print(done.stdout + done.stderr, file=sys.stderr)
    lines = [line for line in done.stdout.splitlines() if re.search(r"\b(error|fatal)\b|not found|cannot find", line)]
    return f"the compiler failed: {(lines or done.stdout.splitlines()[-1:] or ['no output'])[0].strip()}"


# ---- the command


class BuildNative(build_ext):
    def run(self):
        module = Path(self.get_ext_fullpath("kdkernels._native")).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        build = {"python": sys.version.split()[0], "machine": platform.machine(), "cpu_isas": list(ISA_FLAGS)}
        cuda, cuda_reason = None, None
        try:
            cuda = find_cuda(os.environ.get("KDKERNELS_CUDA_ARCHS", ""))
        except Unavailable as missing:
            cuda_reason = str(missing)

        if os.environ.get("KDKERNELS_NO_NATIVE") == "1":
            reason = "KDKERNELS_NO_NATIVE=1 was set at installation"
        else:
            reason = run_ninja(module_lines(module, cuda) + (cuda_lines(cuda) if cuda else []))
            if reason and cuda:
                cuda, cuda_reason = None, reason
                reason = run_ninja(module_lines(module, None))
        if reason:
            print(f"kdkernels: installing without native kernels: {reason}", file=sys.stderr)
            module.unlink(missing_ok=True)
            build["cpu_isas"] = []
            cuda, cuda_reason = None, reason
        elif cuda is None:
            print(f"kdkernels: installing without CUDA kernels: {cuda_reason}", file=sys.stderr)
        build["native_missing_because"] = reason
        build["cuda_missing_because"] = cuda_reason
        if cuda:
            build |= {"nvcc": cuda.version, "cuda_archs": cuda.archs, "cuda_archs_left_out": cuda.left_out}
        (module.parent / "_build.json").write_text(json.dumps(build, indent=2) + "\n")


if __name__ == "__main__":
    setup(ext_modules=[Extension("kdkernels._native", [])], cmdclass={"build_ext": BuildNative})
