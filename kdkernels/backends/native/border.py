"""The hash of the sources at the border between Python and the kernels.

setup.py compiles the hash into kdkernels._native, and runs this file alone, so the file imports nothing of the package.
"""

import hashlib
from pathlib import Path


def border_hash(csrc: Path) -> str:
    """A hash of all that decides how Python calls the kernels. `csrc` is the folder of the sources.

    Line endings do not count, since git may convert them. Neither do dot files, which an editor may leave.
    """
    sources = [csrc / name for name in ("bindings.cpp", "divergences.h", "cuda/bindings.h")]
    sources += sorted(path for path in (csrc / "calls").glob("*.h") if not path.name.startswith("."))
    text = b"".join(source.read_bytes() for source in sources).replace(b"\r\n", b"\n")
    return hashlib.sha256(text).hexdigest()[:16]
