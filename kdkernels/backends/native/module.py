"""Loads the compiled module, kdkernels._native, or says why the package goes without the module."""

import importlib
import importlib.util
import json
import os
import platform
import struct
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from ...sources import border_hash

PACKAGE = Path(__file__).parents[2]
CSRC = PACKAGE.parent / "csrc"  # beside the package in a checkout, and nowhere else
NAME = "kdkernels._native"


def build_record() -> dict:
    """The record that setup.py wrote when it built the package."""
    path = PACKAGE / "_build.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"native_missing_because": "no build has run here"}
    except (OSError, ValueError) as error:
        return {"native_missing_because": f"the record of the build cannot be read: {path}: {error}"}
    return record if isinstance(record, dict) else {"native_missing_because": f"{path} is no record of a build"}


def find() -> ModuleSpec | None:
    """The place of the compiled module, which may be stale; None if no module beside the package is for this Python.

    An editable installation of another checkout offers that checkout's module.
    """
    try:
        found = importlib.util.find_spec(NAME)
    except ValueError:  # another object stands under the name in sys.modules
        return None
    return found if found and found.origin and Path(found.origin).parent == PACKAGE else None


def load() -> tuple[ModuleType | None, str | None]:
    """The module, or the reason why the package goes without the module."""
    found = find()
    if found is None:
        return None, _not_built()
    try:
        if _is_cut_off(Path(found.origin)):
            return None, f"{found.origin} is cut off; rebuild it: reinstall kdkernels"
        module = importlib.import_module(NAME)
    except Exception as error:  # a missing OpenMP runtime, a forced instruction set, a module of another machine
        if os.environ.get("KDKERNELS_CPU_ISA") and "KDKERNELS_CPU_ISA" in str(error):
            return None, str(error)  # no fault of the module
        return None, f"{type(error).__name__}: {error} (if the module is damaged, rebuild it: reinstall kdkernels)"
    border = _expected_border()
    if border is None or getattr(module, "border", None) != border:
        return None, f"{found.origin} was built from other sources than this package; rebuild it: reinstall kdkernels"
    return module, None


def _not_built() -> str:
    record = build_record()
    reason = record.get("native_missing_because")
    if not (PACKAGE / "_build.json").exists() and (PACKAGE.parent / "setup.py").exists():
        return (
            f"{PACKAGE.parent} is a source tree in which no build has run; run Python in another folder to use an "
            "installed kdkernels, or `pip install -e .` there"
        )
    if reason:
        return f"they were not built: {reason}; reinstall kdkernels when that is mended"
    if (folder := PACKAGE / NAME.rpartition(".")[2]).is_dir():
        return f"{folder} is a folder in the place of the module; remove the folder and reinstall kdkernels"
    built = f"Python {record.get('python')} on {record.get('machine')}"
    here = f"Python {sys.version.split()[0]} on {platform.machine()}"
    # A module serves each release of its minor version.
    if (str(record.get("python")).split(".")[:2], record.get("machine")) == (
        sys.version.split()[0].split(".")[:2],
        platform.machine(),
    ):
        return f"they were built, but no module for {here} is in {PACKAGE} now; rebuild it: reinstall kdkernels"
    return f"they were built for {built}, and none are here for {here}; rebuild them: reinstall kdkernels"


def _expected_border() -> str | None:
    """The hash that the module must have: of the sources in a checkout, else the hash that the build recorded."""
    try:
        return border_hash(CSRC)
    except OSError:
        return build_record().get("border")


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file ends before one of its segments does. A process that loads such a file may die of SIGBUS."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:  # of 64 bits, little-endian
            return False
        table, entry_size, entries = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
        file.seek(table)
        headers = file.read(entry_size * entries)
    if len(headers) < entry_size * entries:
        return True
    segments = [struct.unpack_from("<8xQ16xQ", headers, entry_size * i) for i in range(entries)]
    return any(offset + size > os.path.getsize(path) for offset, size in segments)
