"""Builds kdkernels._native (csrc/) through ninja, without torch; installs without it where there is no compiler.

What was built, or why not, is written to kdkernels/_build.json, which `python -m kdkernels.info` prints.
"""

import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -fno-trapping-math lets g++ vectorise selects. Never -ffast-math: it flushes denormals for the whole process, drops
# NaN, and its -fassociative-math deletes the rounding trick of exp.
CPU_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-trapping-math -fno-math-errno -fopenmp -Wall"
ISA_FLAGS = {"baseline": ""}
if X86:
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"


def escaped(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(module: Path) -> str:
    """One compilation of cpu/rows.cpp per instruction set, the bindings, and the link."""
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    includes = f"-I'{pybind11.get_include()}' -I'{sysconfig.get_paths()['include']}'"
    define = "-DKDK_X86" if X86 else ""
    lines = [
        f"cxx = {compiler}",
        "rule compile",
        f"  command = $cxx {CPU_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        "  command = $cxx -shared -fopenmp $in -o $out",
        f"build bindings.o: compile {escaped(CSRC / 'bindings.cpp')}",
        f"  flags = {includes} {define}",
    ]
    for isa, flags in ISA_FLAGS.items():
        lines += [
            f"build rows_{isa}.o: compile {escaped(CSRC / 'cpu' / 'rows.cpp')}",
            f"  flags = {flags} -DKDK_ISA={isa}",
        ]
    objects = " ".join(["bindings.o"] + [f"rows_{isa}.o" for isa in ISA_FLAGS])
    lines += [f"build {escaped(module)}: link {objects}", f"default {escaped(module)}", ""]
    return "\n".join(lines)


def ninja_command() -> list[str]:
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        return ["ninja"]


class BuildNative(build_ext):
    def run(self):
        module = Path(self.get_ext_fullpath("kdkernels._native")).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        build = {"python": sys.version.split()[0], "machine": platform.machine(), "cpu_isas": list(ISA_FLAGS)}
        reason = self.compile_native(module)
        if reason:
            print(f"kdkernels: installing without native kernels: {reason}", file=sys.stderr)
            module.unlink(missing_ok=True)
            build["cpu_isas"] = []
        build["native_missing_because"] = reason
        (module.parent / "_build.json").write_text(json.dumps(build, indent=2) + "\n")

    def compile_native(self, module: Path) -> str | None:
        """Returns why there is no module, or None."""
        if os.environ.get("KDKERNELS_NO_NATIVE") == "1":
            return "KDKERNELS_NO_NATIVE=1 was set when it was installed"
        folder = Path(self.build_temp).resolve() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(module))
        try:
            done = subprocess.run([*ninja_command(), "-C", str(folder)], capture_output=True, text=True)
        except OSError as error:
            return f"ninja could not be started ({error})"
        if done.returncode == 0:
            return None
        print(done.stdout + done.stderr, file=sys.stderr)
        lines = [line for line in done.stdout.splitlines() if "error" in line or "not found" in line]
        return f"the compiler failed: {(lines or done.stdout.splitlines()[-1:] or ['no output'])[0].strip()}"


setup(ext_modules=[Extension("kdkernels._native", [])], cmdclass={"build_ext": BuildNative})
