"""Compiles the CUDA kernels for every architecture of the default build, without a GPU, and checks ptxas's output.

No kernel may spill a register, use stack, or use shared memory that is not dynamic. Every divergence and every family
must have its kernels.

`python tests/test_cuda_compile.py` prints the table of registers. It exits with 1 if a kernel is wrong, or if an nvcc
exists and the installed module has no CUDA kernels.

The flags and the compilation are those of setup.py: ninja, which skips objects that are up to date and keeps ptxas's
output beside each object.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("kdkernels_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(specification)
specification.loader.exec_module(build)


# Kernels that are not instantiated per divergence.
OTHERS = (
    "close_rows_kernel", "scale_kernel", "softcap_kernel", "softcap_gradient_kernel", "topk_rows_kernel",
    "close_topk_rows_kernel", "topk_kernel", "pair_costs_kernel", "finish_pairs_kernel", "pair_gradient_kernel",
    "sinkhorn_kernel", "uld_kernel",
)  # fmt: skip


class Kernel(NamedTuple):
    arch: str  # sm_90a
    name: str  # mangled
    registers: int
    shared: int  # bytes of static shared memory


ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'\n"
    r"(?:(?!.*Compiling entry function).*\n)*?"
    r"ptxas info +: Used (\d+) registers(.*)\n"
)
# The lines of an entry, or of a function that was not inlined.
STACK = re.compile(
    r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
)


def compiled() -> str:
    """ptxas's output. Raises build.Unavailable if no nvcc exists, RuntimeError if the compilation fails."""
    cuda = build.find_cuda("")
    objects = build.cuda_objects(cuda)
    reason = build.run_ninja(build.cuda_lines(cuda), *objects)
    if reason:
        raise RuntimeError(reason)
    return "".join((build.native_folder() / f"{name}.log").read_text() for name in objects)


def kernels_of(log: str) -> list[Kernel]:
    found = []
    for name, arch, registers, rest in ENTRY.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(Kernel(arch, name, int(registers), int(shared[1]) if shared else 0))
    assert len(found) == log.count("Compiling entry function"), f"this test cannot read the output of ptxas:\n{log}"
    return found


def on_stack(log: str) -> list[tuple[str, ...]]:
    """(function, bytes of stack, of spill stores, of spill loads) for each function with a nonzero number."""
    found = STACK.findall(log)
    assert len(found) >= log.count("Compiling entry function"), f"this test cannot read the output of ptxas:\n{log}"
    return [use for use in found if any(int(n) for n in use[1:])]


def demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return dict(zip(names, names, strict=True))
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    # "void kdk::cuda::rows_kernel<kdk::cuda::Js<float>, (kdk::cuda::Way)1>(...)" becomes rows_kernel<Js<float>, 1>.
    short = [
        re.sub(r"^void |\([\w:]*(Way|PairCost|InShared)\)|kdk::(cuda::)?|\(.*", "", line) for line in lines.splitlines()
    ]
    return dict(zip(names, short, strict=True))


def faults(log: str) -> list[str]:
    from kdkernels import CATALOGUE

    kernels, stacks = kernels_of(log), on_stack(log)
    readable = demangled([k.name for k in kernels] + [name for name, *_ in stacks])
    wrong = [
        f"{readable[name]}: {stack} bytes of stack, {stores} of spill stores, {loads} of spill loads"
        for name, stack, stores, loads in stacks
    ]
    wrong += [
        f"{readable[k.name]} on {k.arch}: {k.shared} bytes of shared memory that is not dynamic"
        for k in kernels
        if k.shared
    ]
    for arch in dict.fromkeys(k.arch for k in kernels):
        for divergence in CATALOGUE:
            struct = "".join(part.capitalize() for part in divergence.split("_"))
            mangled = re.compile(rf"(?<!\d){len(struct)}{struct}I")
            if not any(k.arch == arch and mangled.search(k.name) for k in kernels):
                wrong.append(f"no kernel of {divergence} for {arch}")
        for name in OTHERS:
            if not any(k.arch == arch and f"{len(name)}{name}" in k.name for k in kernels):
                wrong.append(f"no {name} for {arch}")
    return wrong


def print_table(kernels: list[Kernel]):
    archs = list(dict.fromkeys(k.arch for k in kernels))
    registers = {(k.name, k.arch): k.registers for k in kernels}
    names = demangled(list(dict.fromkeys(k.name for k in kernels)))
    width = max(map(len, names.values()))
    print(f"{'registers a thread':{width}}" + "".join(f"{arch:>9}" for arch in archs))
    for mangled, name in sorted(names.items(), key=lambda item: item[1]):
        print(f"{name:{width}}" + "".join(f"{registers.get((mangled, arch), '-'):>9}" for arch in archs))


def check() -> list[str]:
    """Prints the table and returns the list of faults."""
    log = compiled()
    kernels = kernels_of(log)
    print_table(kernels)
    wrong = faults(log)
    print(*wrong, f"{len(kernels)} kernels, {len(wrong)} faults", sep="\n")
    return wrong


# ---- the kernels


def test_kernels_compile_without_a_stack():
    try:
        assert check() == []
    except build.Unavailable as reason:
        pytest.skip(str(reason))


def disassembler() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton"):
        folder = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which("cuobjdump", path=str(folder))
    return found


@functools.cache
def machine_code() -> dict[str, str]:
    """The disassembly of each object of the default build. Skips the test if a tool is missing."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump")
    try:
        compiled()
        objects = build.cuda_objects(build.find_cuda(""))
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])}
    found = {}
    for name in objects:
        command = [tool, "--dump-sass", str(build.native_folder() / name)]
        found[name] = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return found


def test_no_load_takes_memory_for_constant():
    """Gradients may overwrite logits, so no load may use the constant path, as const __restrict__ or __ldg would: the
    compiler could move such a load after the gradient's store.
    """
    for name, sass in machine_code().items():
        loads = re.findall(r"LDG[.\w]*", sass)
        assert bool(loads) == ("Function :" in sass), name  # refusal.cu has no kernel
        assert not [load for load in loads if "CONSTANT" in load], name


def test_no_merge_waits_for_the_whole_gpu():
    """A merge of a cluster exchanges some bytes of shared memory. A fence of the GPU's scope would wait until the
    gradient's stores reach the L2 cache, and an invalidation would drop the first-level cache. Only the start of a
    kernel has a cluster barrier, which invalidates once.
    """
    kernels = {}
    for sass in machine_code().values():
        for part in sass.split("Function : ")[1:]:
            arch = sass[: sass.index(part)].rsplit("arch = ", 1)[1].split()[0]
            kernels[arch, part.split()[0]] = part
    assert {arch for arch, _ in kernels} >= {"sm_80", "sm_90a", "sm_100"}
    merging = 0
    for kernel, sass in kernels.items():
        assert not re.search(r"MEMBAR\.\w+\.(GPU|SYS|VC)", sass), kernel
        barriers = len(re.findall("UCGABAR_WAIT", sass))
        assert len(re.findall(r"CCTL\.IVALL", sass)) <= barriers <= 1, kernel
        merging += barriers
        assert bool(barriers) == ("STAS" in sass), kernel
    assert merging >= 2 * 32, "the row kernels of every divergence, on two architectures with clusters"


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4rows2KlI' for 'sm_80'
ptxas info    : Function properties for _Z4rows2KlI
    {stack} bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for logarithm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, {stack} bytes cumulative stack size, 16 bytes smem
ptxas info    : Compile time = 297.184 ms
"""


def test_the_words_of_ptxas_are_understood():
    log = LOG.format(stack=8) + LOG.format(stack=0).replace("sm_80", "sm_90a").replace("Used 80", "Used 90")
    assert kernels_of(log) == [Kernel("sm_80", "_Z4rows2KlI", 80, 16), Kernel("sm_90a", "_Z4rows2KlI", 90, 16)]
    assert on_stack(log) == [("_Z4rows2KlI", "8", "4", "0"), ("_Z4rows2KlI", "0", "4", "0")]
    wrong = "\n".join(faults(log))
    assert "8 bytes of stack" in wrong and "not dynamic" in wrong
    assert "no kernel of js for sm_90a" in wrong and "no kernel of kl" not in wrong
    assert "no softcap_kernel for sm_80" in wrong and "no topk_rows_kernel for sm_90a" in wrong
    with pytest.raises(AssertionError, match="cannot read"):  # the output of two ptxas processes that write at once
        kernels_of(log.replace("ptxas info    : Used 80 registers", ""))


# ---- the module


def module_without() -> str | None:
    """The reason why the installed module has no CUDA kernels, or None."""
    from kdkernels.backends import native

    return native.missing_because or native.cuda_missing_because


@pytest.fixture
def module() -> str:
    reason = module_without()
    if reason:
        pytest.skip(f"no CUDA kernels in the module: {reason}")
    from kdkernels import _native

    return _native.__file__


@pytest.mark.skipif(sys.platform != "linux", reason="needs ldd")
def test_module_needs_no_cuda_library(module):
    """The module must load without a driver. Its CUDA runtime is private: another runtime, such as torch's, can neither
    replace it nor use it.
    """
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert not re.search("cuda|cudart|nvidia", needed), needed
    if shutil.which("nm"):
        symbols = subprocess.run(["nm", "--dynamic", module], capture_output=True, text=True, check=True).stdout
        assert "PyInit__native" in symbols
        assert not re.search(r" _*cu(da)?[A-Z]\w+", symbols)


def test_device_without_a_driver_is_refused_in_words(module):
    import torch

    from kdkernels import _native

    if torch.cuda.is_available():
        assert _native.cuda_refusal(0) == ""
        return
    assert "cudaGetDevice" in _native.cuda_refusal(0)
    with pytest.raises(RuntimeError, match="cudaGetDevice"):
        _native.cuda_scale_rows({"rows": 1, "columns": 1, "x": torch.ones(1), "factor": torch.ones(1)}, None, 0, 0)
    with pytest.raises(RuntimeError, match="cudaGetDevice"):
        _native.cuda_softcap({"count": 1, "logits": torch.ones(1), "cap": 1.0}, None, 0, 0)


def test_cpu_tensors_are_refused(module):
    import torch

    import kdkernels

    x = torch.randn(2, 5)
    with pytest.raises(
        RuntimeError, match="backend 'cuda' cannot serve this call: it takes tensors on one cuda device"
    ):
        kdkernels.fused_kl(x, x, backend="cuda")


# ---- setup.py: the choice of nvcc and of architectures


def fake_nvcc(path: Path, knows: str) -> str:
    """A program that answers like an nvcc that knows the architectures `knows`, and fails to compile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '  *--version*) echo "Cuda compilation tools, release 12.4, V12.4.131"; exit 0;;\n'
        f'  *--list-gpu-code*) for a in {knows}; do echo "sm_$a"; done; exit 0;;\n'
        f"  *--dryrun*) for a in {knows}; do\n"
        '    case "$*" in *compute_$a,*) echo \'#$ LIBRARIES=  "-L/opt/a b/lib"\'; exit 0;; esac; done;;\n'
        "esac\n"
        'echo "nvcc fatal   : this one only pretends" >&2; exit 1\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def environment(monkeypatch):
    for name in ("KDKERNELS_NVCC", "KDKERNELS_NO_CUDA", "KDKERNELS_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_which_nvcc(environment, tmp_path):
    on_path, at_home, named = (fake_nvcc(tmp_path / folder / "nvcc", "80") for folder in ("a", "home/bin", "b"))
    environment.setenv("PATH", str(Path(on_path).parent))
    assert shutil.which(build.find_nvcc()) == on_path
    environment.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == at_home
    environment.setenv("KDKERNELS_NVCC", named)
    assert build.find_nvcc() == named
    environment.setenv("KDKERNELS_NVCC", "/nowhere/nvcc")
    with pytest.raises(build.Unavailable, match="KDKERNELS_NVCC=/nowhere/nvcc"):
        build.find_cuda("")
    environment.setenv("KDKERNELS_NO_CUDA", "1")
    with pytest.raises(build.Unavailable, match="KDKERNELS_NO_CUDA=1"):
        build.find_cuda("")


NVCC_12 = "50 52 53 60 61 62 70 72 75 80 86 87 89"


@pytest.mark.parametrize(
    ("knows", "built", "left_out"),
    [
        (f"{NVCC_12} 90 90a", ["80", "90a", "90+PTX"], ["100+PTX", "120"]),
        (f"{NVCC_12} 90 90a 100 100a 101 101a 120 120a", ["80", "90a", "100+PTX", "120"], []),
        (f"{NVCC_12} 90 90a 100 100a 100f 101 103 120 120a 120f 121", ["80", "90a", "100+PTX", "120"], []),
        ("75 80 86 87 88 89 90 90a 100 100a 110 103 120 120a 121", ["80", "90a", "100+PTX", "120"], []),
        ("75 80", ["80"], ["90a", "100+PTX", "120"]),
    ],
    ids=["12.4", "12.8", "12.9", "13.0", "11.0"],
)
def test_an_older_nvcc_builds_what_it_knows(environment, tmp_path, knows, built, left_out):
    environment.setenv("KDKERNELS_NVCC", fake_nvcc(tmp_path / "nvcc", knows))
    cuda = build.find_cuda("")
    assert (cuda.archs, cuda.left_out, cuda.version) == (built, left_out, "12.4.131")
    assert cuda.libraries == ["/opt/a b/lib"]


def test_architectures_are_taken_as_named(environment, tmp_path):
    environment.setenv("KDKERNELS_NVCC", fake_nvcc(tmp_path / "nvcc", "80 90 90a"))
    assert build.find_cuda("80;90a+PTX, 90 80").archs == ["80", "90a+PTX", "90"]
    for unknown in ("100", "sm_80", "8.0"):
        with pytest.raises(ValueError, match=f"KDKERNELS_CUDA_ARCHS.*got '{unknown}'.* knows 80 90 90a"):
            build.find_cuda(f"80 {unknown}")
    environment.setenv("KDKERNELS_NVCC", fake_nvcc(tmp_path / "nvcc", "50"))
    with pytest.raises(build.Unavailable, match="it knows 50"):
        build.find_cuda("")


def main() -> int:
    sys.path.insert(0, str(ROOT))
    try:
        build.find_nvcc()
    except build.Unavailable as reason:
        print(f"nothing compiled: {reason}")
        return 0
    try:
        wrong = check()
    except (build.Unavailable, RuntimeError) as reason:
        wrong = [str(reason)]
        print(reason)
    if module_without():
        wrong.append(f"the installed module has no CUDA kernels: {module_without()}")
        print(wrong[-1])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
