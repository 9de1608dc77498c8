"""The hash of the sources at the border between Python and the kernels.

setup.py compiles the hash into kdkernels._native, and runs this file alone, so the file imports nothing of the package.
"""

import hashlib
from pathlib import Path


def border_hash(csrc: Path) -> str:
    """A hash of all that decides how Python calls the kernels. `csrc` is the folder of the sources."""
    sources = [csrc / name for name in ("bindings.cpp", "divergences.h", "cuda/bindings.h")]
    sources += sorted((csrc / "calls").glob("*.h"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
