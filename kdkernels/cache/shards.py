"""The files of a cache of teachers: shards, the manifest that names them, and the writer's lock.

A file appears whole or not at all: it is written under a temporary name, flushed to the disk and renamed. Then the
manifest, replaced as a whole, names the shard. So every file that the manifest names exists, whenever the writer is
killed. A file that it does not name is a leftover. docs/cache.md describes the format.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from .. import callers
from ..distributions import HAVE_TAIL_MASS, TAILS
from . import packing

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None

FORMAT, VERSION = "kdkernels top-k cache", 3
MANIFEST, LOCK = "manifest.json", "writer.lock"
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
# The optional columns of a cache, one number for each token: the names of the dtype on disk, in safetensors and numpy.
COLUMNS = {"labels": ("I32", np.int32), "mask": ("BOOL", np.bool_), "document_ids": ("I32", np.int32)}
_LEFTOVER = re.compile(rf"{_SHARD.pattern}(\.partial)?|manifest\.json\.partial")


def check_int(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}; got {value}")


@dataclass(frozen=True)
class Settings:
    """The settings that all rows of a cache share; see `kdkernels.cache.CacheWriter`."""

    vocab_size: int
    k: int
    length: int
    temperature: float = 1.0
    tail: str = "bucket"
    tokenizer_hash: str | None = None
    teacher: str | None = None
    samples: int = 0
    columns: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.columns, str) or not isinstance(self.columns, Iterable):
            raise TypeError(f"columns: expected some of {', '.join(COLUMNS)} in a tuple; got {self.columns!r}")
        given = tuple(self.columns)
        if any(name not in tuple(COLUMNS) for name in given) or len(set(given)) < len(given):
            raise ValueError(f"columns: expected some of {', '.join(COLUMNS)}; got {', '.join(map(str, given))}")
        object.__setattr__(self, "columns", given)
        object.__setattr__(self, "columns", tuple(name for name in COLUMNS if name in self.columns))
        for name, least in (("vocab_size", 1), ("k", 1), ("length", 1), ("samples", 0)):
            check_int(name, getattr(self, name), least)
        if self.vocab_size > 2**31:
            raise ValueError(f"vocab_size: expected at most 2**31, the range of int32 indices; got {self.vocab_size}")
        if self.k > self.vocab_size:
            raise ValueError(f"k: expected at most vocab_size, {self.vocab_size}; got {self.k}")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, (int, float)):
            raise TypeError(f"temperature: expected a number; got {type(self.temperature).__name__}")
        if not 0 < self.temperature <= sys.float_info.max:
            raise ValueError(f"temperature: expected finite and > 0; got {self.temperature}")
        object.__setattr__(self, "temperature", float(self.temperature))
        if self.tail not in TAILS:
            raise ValueError(f"tail: expected one of {', '.join(TAILS)}; got {self.tail!r}")
        if self.samples > self.k:
            raise ValueError(f"samples: expected at most k, {self.k}; got {self.samples}")
        if self.samples and self.tail != "truncate":
            raise ValueError(f"samples: expected 0 with tail {self.tail!r}; got {self.samples}, which needs 'truncate'")
        for name in ("tokenizer_hash", "teacher"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name}: expected a str or None; got {type(getattr(self, name)).__name__}")

    @property
    def index_bytes(self) -> int:
        """Bytes of a row's packed indices."""
        return packing.row_bytes(self.vocab_size, self.k)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's teacher: packed indices, fp16 log-probabilities and, for some tails, the tail's in
        fp16."""
        return self.index_bytes + 2 * self.k + 2 * self.has_tail_mass

    @property
    def other_bytes(self) -> int:
        """Bytes of a token besides its teacher: its id and the columns."""
        return 4 + sum(np.dtype(COLUMNS[name][1]).itemsize for name in self.columns)

    @property
    def has_tail_mass(self) -> bool:
        return self.tail in HAVE_TAIL_MASS

    def layout(self, sequences: int) -> dict[str, tuple[str, list[int]]]:
        """The dtype (by its name in safetensors) and shape of each tensor of a shard."""
        leading = [sequences, self.length]
        tensors = {
            "input_ids": ("I32", leading),
            "indices": ("U8", [*leading, self.index_bytes]),
            "log_probs": ("F16", [*leading, self.k]),
        }
        if self.has_tail_mass:
            tensors["tail_log_prob"] = ("F16", leading)
        return tensors | {name: (COLUMNS[name][0], leading) for name in self.columns}

    def differences(self, other: "Settings") -> str:
        """The settings that differ from those of `other`, with both values; empty if all are equal."""
        mine, others = asdict(self), asdict(other)
        return ", ".join(f"{name} {mine[name]} and not {others[name]}" for name in mine if mine[name] != others[name])


@dataclass(frozen=True)
class Shard:
    """The manifest's entry for a shard's file."""

    name: str
    sequences: int
    bytes: int
    sha256: str

    def __post_init__(self):
        # The directory and the name make the path, so the name must not lead out of the directory.
        if not (isinstance(self.name, str) and _SHARD.fullmatch(self.name)):
            raise ValueError(f"name of a shard: expected {_SHARD.pattern}; got {self.name!r}")
        if not (isinstance(self.sequences, int) and isinstance(self.bytes, int) and self.sequences > 0):
            raise ValueError(f"{self.name}: expected sequences > 0 and bytes; got {self.sequences}, {self.bytes}")


def read_manifest(directory: Path) -> tuple[Settings, list[Shard]] | None:
    """The settings and shards of the manifest; None if the directory has no manifest.

    Raises:
        ValueError: for a damaged manifest, or one of another version.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    version = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if version != (FORMAT, VERSION):
        raise ValueError(
            f"{path}: expected a {FORMAT} of version {VERSION}; got {version}; write the cache again, into an empty "
            "directory"
        )
    if (digest := manifest_digest(manifest)) != manifest.get("sha256"):
        raise ValueError(
            f"{path} is damaged, or was edited: expected entries of the SHA-256 {manifest.get('sha256')!r}, which the "
            f"file names; got {digest}; restore the file from a copy, or write the cache again, into an empty directory"
        )
    try:
        names = {field.name for field in fields(Settings)}
        if set(manifest["settings"]) != names:
            raise ValueError(f"expected the settings {sorted(names)}; got {sorted(manifest['settings'])}")
        return Settings(**manifest["settings"]), [Shard(**shard) for shard in manifest["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_manifest(directory: Path, settings: Settings, shards: list[Shard]) -> None:
    manifest = {"format": FORMAT, "version": VERSION, "settings": asdict(settings)}
    manifest["shards"] = [asdict(shard) for shard in shards]
    manifest["sha256"] = manifest_digest(manifest)
    _write_whole(directory / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def manifest_digest(manifest: dict) -> str:
    """SHA-256 of all entries but "sha256" itself. White space and the order of the entries do not count."""
    entries = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def write_shard(directory: Path, number: int, tensors: dict[str, np.ndarray]) -> Shard:
    """Writes the shard of that number. The caller then names it in the manifest."""
    # One metadata entry: the order of several can change, and equal rows must give equal bytes.
    data = safetensors.numpy.save(tensors, metadata={"format": f"{FORMAT} {VERSION}"})
    name = f"shard-{number:05d}.safetensors"
    _write_whole(directory / name, data)
    return Shard(name, len(tensors["input_ids"]), len(data), hashlib.sha256(data).hexdigest())


class ShardReader:
    """A shard whose file was compared with the manifest; maps the file when it is first read.

    Before each read it compares the file's size and times with those at the last comparison. If they differ, the file
    is compared with the manifest again, so a file that was truncated, replaced or deleted since then raises.
    """

    def __init__(self, directory: Path, shard: Shard, settings: Settings, *, checksum: bool):
        self.path = directory / shard.name
        self._compared = (directory, shard, settings, checksum)
        self._compare()

    def read(self, rows: slice, names=None) -> dict[str, np.ndarray]:
        """The named tensors of these sequences, or all tensors.

        Raises:
            ValueError: with the file's path, for a file that cannot be read or differs from the manifest.
        """
        try:
            if _identity(self.path) != self._identity:
                self._compare()
            if self._file is None:
                self._file = _open(self.path)
            return {name: self._file.get_slice(name)[rows] for name in names or self._compared[2].layout(1)}
        except FileNotFoundError:
            raise ValueError(_lacks(self.path, self._compared[1])) from None
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error

    def _compare(self) -> None:
        directory, shard, settings, checksum = self._compared
        self._file = self._identity = None
        before = _identity(self.path) if self.path.exists() else None  # so a change during the comparison shows later
        check_shard(directory, shard, settings, checksum=checksum)
        self._identity = before

    def __getstate__(self):
        return self.__dict__ | {"_file": None}  # a map cannot be pickled


def check_shard(directory: Path, shard: Shard, settings: Settings, *, checksum: bool) -> None:
    """Compares a file with the manifest: its size, its header and, with `checksum`, its SHA-256.

    Raises:
        ValueError: with the file's path, what was expected and what came.
    """
    path = directory / shard.name
    try:
        if (size := path.stat().st_size) != shard.bytes:
            raise ValueError(f"{path} is damaged: expected {shard.bytes:,} bytes, as {MANIFEST} says; got {size:,}")
        with _open(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
            layout = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
        digest = _sha256(path) if checksum else shard.sha256
    except FileNotFoundError:
        raise ValueError(_lacks(path, shard)) from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: expected a safetensors header; got {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if layout != (expected := settings.layout(shard.sequences)):
        raise ValueError(f"{path} is damaged: expected the tensors {expected}; got {layout}")
    if digest != shard.sha256:
        raise ValueError(f"{path} is damaged: expected SHA-256 {shard.sha256}, as {MANIFEST} says; got {digest}")


def remove_leftovers(directory: Path, shards: list[Shard]) -> None:
    """Removes the leftovers of a killed writer: temporary files, and shards that the manifest does not name."""
    named = {shard.name for shard in shards}
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.name not in named:
            path.unlink()


def has_shards(directory: Path) -> bool:
    return directory.is_dir() and any(_SHARD.fullmatch(path.name) for path in directory.iterdir())


def lock(directory: Path):
    """The open file that holds the lock of the directory's writer; `unlock`, or the end of the process, frees the lock.

    Raises:
        RuntimeError: if another writer holds the lock.
    """
    file = open(directory / LOCK, "ab")  # noqa: SIM115, kept open
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(f"{directory}: another writer is at work; expected one at a time") from None
    except OSError as error:  # some network file systems have no locks
        callers.warn(f"{directory} cannot be locked ({error}); make sure that no other writer uses it", UserWarning)
    return file


def unlock(file, process: int) -> None:
    """Frees the lock that this process took, also if a forked child still has the file open, and closes the file."""
    if fcntl is not None and not file.closed and os.getpid() == process:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a directory cannot be opened
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while data := file.read(2**20):
            digest.update(data)
        return digest.hexdigest()


def _open(path: Path):
    """The memory-mapped file: get_slice(name)[a:b] reads only those rows, as numpy arrays."""
    return safetensors.safe_open(path, framework="numpy")


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, truncated or replaced."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _lacks(path: Path, shard: Shard) -> str:
    return f"{path}: expected {shard.bytes:,} bytes, as {MANIFEST} says; got no such file"
