"""Hashes of the package's sources: they tell whether a native module, or a compiled graph, was made from these sources.

setup.py runs this file alone, so the file imports nothing of the package.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def hash_of(files: Iterable[Path]) -> str:
    """A hash of the files' texts. Line endings do not count, since git may convert them."""
    text = b"".join(file.read_bytes() for file in files).replace(b"\r\n", b"\n")
    return hashlib.sha256(text).hexdigest()[:16]


def in_folder(folder: Path, suffix: str) -> list[Path]:
    """The folder's sources in order, without the dot files that an editor may leave."""
    return sorted(folder.glob(f"[!.]*{suffix}"))


def border_hash(csrc: Path) -> str:
    """A hash of all that decides how Python calls the kernels. `csrc` is the folder of the C++ sources."""
    files = [csrc / name for name in ("bindings.cpp", "divergences.h", "cuda/bindings.h")]
    return hash_of([*files, *in_folder(csrc / "calls", ".h")])


def version_of_operators(package: Path) -> str:
    """The overload of every operator: a hash of the sources that decide the operators' arguments and results.

    The compiler's caches on disk know an operator by its name and overload alone. A graph that an earlier version of
    the package left there has other overloads, so no call finds it, whatever its operators returned.
    """
    try:
        return "v" + hash_of([package / "ops.py", *in_folder(package / "families", ".py")])
    except OSError:  # an application that is frozen into one file has no sources
        return "frozen"
