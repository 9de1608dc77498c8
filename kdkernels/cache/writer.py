"""Writes a cache of teachers: checks and packs sequences, and puts them into shards; see `kdkernels.cache`."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..distributions import SparseLogProbs
from . import packing, shards

# A shard of the default size ends at whichever comes first, so that a killed writer loses at most a minute of work.
SHARD_BYTES = 64 * 2**20  # approximate
SHARD_SECONDS = 60


class CacheWriter:
    """Writes sequences and their teachers into a directory, or continues where an earlier writer stopped.

    >>> with CacheWriter(directory, vocab_size=49_152, k=64, length=1024) as writer:
    ...     for ids in blocks[writer.sequences :].split(4):
    ...         writer.append(ids, kdkernels.topk_log_probs(model(ids).logits, 64))

    Appended sequences are on disk once their shard is full, or after `close`. If an exception leaves the with-block,
    the sequences that no shard holds are not written; the next writer's `sequences` says where to continue. A shard of
    the default size ends with the `append` that fills 64 MiB, or with the last one that fits into 60 seconds since the
    shard before it, if the next takes as long as this one. So a kill loses at most a minute of the teacher's work, or
    one batch if a batch takes longer.

    Args:
        directory: made if it does not exist.
        vocab_size: V, the number of classes that the teacher's indices can name.
        k: K, the number of entries that a row has room for.
        length: T, the number of tokens of each sequence.
        temperature: the teacher's `source_temperature`.
        tail: the teachers' `tail`. "bucket" and "uniform" keep the tail's log-probability, and readers may ask for any
            other tail; the other tails keep none.
        tokenizer_hash: the hash of the tokenizer that made the ids (`tokenizer_hash`), for readers to compare.
        teacher: a name for the model, stored for readers too.
        samples: how many of the K entries are drawn (`sampled_log_probs`), with tail "truncate"; stored for readers
            too.
        columns: what each sequence has besides, one number a token: some of "labels" (below V, or ignore_index for
            tokens without one), "mask" (bool) and "document_ids" (int32's range). The cache stores them as they are,
            without a shift.
        ignore_index: the label of tokens without one. The cache does not store it: the loss needs the same number.
        sequences_per_shard: fixes the shards, so that the same sequences give the same files. None: about 64 MiB or 60
            seconds, as above; the sequences are the same, but how many of them a file has depends on the time.

    Raises:
        TypeError, ValueError: for arguments that do not fit. These errors, and the next ones, change no file.
        ValueError: for a directory with a cache of other settings (the message names those that differ), a damaged
            cache, or shards without a manifest.
        NotADirectoryError: if the directory is a file.
        RuntimeError: if another writer uses the directory.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        vocab_size: int,
        k: int,
        length: int,
        temperature: float = 1.0,
        tail: str = "bucket",
        tokenizer_hash: str | None = None,
        teacher: str | None = None,
        samples: int = 0,
        columns: Iterable[str] = (),
        ignore_index: int = -100,
        sequences_per_shard: int | None = None,
    ):
        self.directory = path_of(directory)
        self.settings = shards.Settings(
            vocab_size, k, length, temperature, tail, tokenizer_hash, teacher, samples, columns
        )
        self._sized_by_time = sequences_per_shard is None
        if sequences_per_shard is None:
            sequences_per_shard = default_sequences_per_shard(self.settings)
        shards.check_int("sequences_per_shard", sequences_per_shard, 1)
        check_ignore_index(ignore_index)
        self.sequences_per_shard, self.ignore_index = sequences_per_shard, ignore_index
        self._pending: list[dict[str, np.ndarray]] = []  # one dict per sequence
        self._last_shard = self._last_append = time.monotonic()

        named_shards(self.directory, self.settings)  # raises before the writer makes a file
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock, self._process = shards.lock(self.directory), os.getpid()
        try:
            # Again: another writer may have added shards before the lock.
            self.shards = named_shards(self.directory, self.settings)
            if self.shards is None:
                self.shards = []
                shards.write_manifest(self.directory, self.settings, self.shards)
            shards.remove_leftovers(self.directory, self.shards)
        except BaseException:
            shards.unlock(self._lock, self._process)
            raise

    @property
    def sequences(self) -> int:
        """The number of sequences: those on disk, and those appended since."""
        return sum(shard.sequences for shard in self.shards) + len(self._pending)

    def append(self, input_ids: Tensor, teacher: SparseLogProbs, **columns: Tensor) -> None:
        """Adds sequences with their teachers.

        Args:
            input_ids: integers [B, T].
            teacher: [B, T, up to K]; row t is the teacher's prediction of token t + 1. This function sorts each row by
                index and pads it to K entries.
            columns: the columns of the settings, each [B, T]: labels and document_ids int64 or int32, mask bool.

        Raises:
            TypeError, ValueError: for arguments that do not fit the settings; for indices out of range or repeated
                (samples may repeat), NaN, and, with a tail_log_prob, rows whose mass is not 1. Then none of the
                sequences is added. The message has the number that the sequence would have in the cache.
        """
        if self._lock.closed:
            raise ValueError(f"{self.directory}: expected an open writer; this one was closed")
        self._pending += pack_sequences(
            input_ids, teacher, columns, self.settings, first=self.sequences, ignore_index=self.ignore_index
        )
        if not self._sized_by_time:
            while len(self._pending) >= self.sequences_per_shard:
                self._write_shard(self.sequences_per_shard)
            return
        now = time.monotonic()
        at_next_append = now - self._last_shard + now - self._last_append
        if len(self._pending) >= self.sequences_per_shard or at_next_append > SHARD_SECONDS:
            self._write_shard(len(self._pending))
        self._last_append = now

    def close(self) -> None:
        """Writes the sequences that no shard holds yet, and frees the lock for another writer."""
        try:
            if self._pending and not self._lock.closed:
                self._write_shard(len(self._pending))
        finally:
            shards.unlock(self._lock, self._process)

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if error_type is not None:
            shards.unlock(self._lock, self._process)
        self.close()

    def _write_shard(self, sequences: int) -> None:
        tensors = {name: np.stack([one[name] for one in self._pending[:sequences]]) for name in self._pending[0]}
        named = [*self.shards, shards.write_shard(self.directory, len(self.shards), tensors)]
        shards.write_manifest(self.directory, self.settings, named)
        self.shards = named
        del self._pending[:sequences]
        self._last_shard = time.monotonic()


def path_of(directory) -> Path:
    """The absolute path of a cache's directory, which need not exist."""
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: expected a path; got {type(directory).__name__}")
    path = Path(directory).absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(
            f"directory: expected a directory, or a path where one can be made; got {path}, a file"
        )
    return path


def named_shards(directory: Path, expected: shards.Settings) -> list[shards.Shard] | None:
    """The manifest's shards; None without a manifest. Raises for other settings, or if a shard's file does not fit."""
    if (manifest := shards.read_manifest(directory)) is None:
        if shards.has_shards(directory):
            raise ValueError(f"{directory} has shards but no {shards.MANIFEST}; expected both, or neither")
        return None
    settings, named = manifest
    if differences := settings.differences(expected):
        raise ValueError(f"{directory} holds a cache of other settings: {differences}")
    for shard in named:
        shards.check_shard(directory, shard, settings, checksum=False)
    return named


def default_sequences_per_shard(settings: shards.Settings) -> int:
    """As many sequences as fit `SHARD_BYTES`, and at least one."""
    return max(1, SHARD_BYTES // (settings.length * (settings.row_bytes + settings.other_bytes)))


def pack_sequences(
    input_ids: Tensor,
    teacher: SparseLogProbs,
    columns: dict[str, Tensor],
    settings: shards.Settings,
    *,
    first: int,
    ignore_index: int,
) -> list[dict[str, np.ndarray]]:
    """The tensors of each sequence as a shard stores them; raises as `CacheWriter.append` says. `first` is the number
    of the first sequence."""
    _check_shapes(input_ids, teacher, settings)
    if set(columns) != set(settings.columns):
        raise ValueError(
            f"columns: expected {', '.join(settings.columns) or 'none'}, as this cache has; got "
            f"{', '.join(columns) or 'none'}"
        )
    if len(input_ids) == 0:
        return []
    entries, leading = teacher.indices.shape[-1], tuple(input_ids.shape)
    missing = ((0, 0), (0, settings.k - entries))
    indices, log_probs = packing.sort_rows(
        np.pad(_as_numpy(teacher.indices).reshape(-1, entries), missing, constant_values=-1),
        np.pad(_as_numpy(teacher.log_probs.float()).reshape(-1, entries), missing, constant_values=-np.inf),
    )
    ids = _as_numpy(input_ids)
    tail = _as_numpy(teacher.tail_log_prob.float()) if settings.has_tail_mass else None
    check_ids("input_ids", input_ids, settings.vocab_size, first)
    _check_entries(indices.reshape(*leading, -1), log_probs.reshape(*leading, -1), tail, teacher, settings, first)
    tensors = {
        "input_ids": ids.astype(np.int32),
        "indices": packing.pack(indices, settings.vocab_size).reshape(*leading, -1),
        "log_probs": packing.to_half(log_probs).reshape(*leading, -1),
    }
    if tail is not None:
        tensors["tail_log_prob"] = packing.to_half(tail)
    for name in settings.columns:
        check_column(name, columns[name], input_ids, settings.vocab_size, ignore_index, first)
        tensors[name] = _as_numpy(columns[name]).astype(shards.COLUMNS[name][1])
    return [{name: array[i] for name, array in tensors.items()} for i in range(len(ids))]


def check_ids(name: str, ids: Tensor, vocab_size: int, first: int = 0) -> None:
    values = _as_numpy(ids)
    _refuse(name, f"expected within [0, {vocab_size})", values, (values < 0) | (values >= vocab_size), first)


def check_ignore_index(ignore_index: int) -> None:
    """A cache stores labels as int32."""
    shards.check_int("ignore_index", ignore_index, -(2**31))
    if ignore_index >= 2**31:
        raise ValueError(f"ignore_index: expected within int32's range; got {ignore_index}")


def check_column(
    name: str, column: Tensor, input_ids: Tensor, vocab_size: int, ignore_index: int, first: int = 0
) -> None:
    """Raises for another shape than the ids', another dtype, and values that do not fit. `first` is the number of the
    first sequence."""
    dtypes = (torch.bool,) if name == "mask" else (torch.int64, torch.int32)
    if not isinstance(column, Tensor) or column.dtype not in dtypes:
        got = column.dtype if isinstance(column, Tensor) else type(column).__name__
        hint = "; pass mask.bool()" if name == "mask" and isinstance(column, Tensor) else ""
        expected = "a bool tensor" if name == "mask" else "an int64 or int32 tensor"
        raise TypeError(f"{name}: expected {expected}; got {got}{hint}")
    if column.shape != input_ids.shape:
        raise ValueError(f"{name}: expected the shape {list(input_ids.shape)} of the ids; got {list(column.shape)}")
    values, limits = _as_numpy(column), np.iinfo(np.int32)
    if name == "labels":
        outside = ((values < 0) | (values >= vocab_size)) & (values != ignore_index)
        _refuse(name, f"expected within [0, {vocab_size}), or ignore_index, {ignore_index}", values, outside, first)
    if name == "document_ids":
        outside = (values < limits.min) | (values > limits.max)
        _refuse(name, "expected within int32's range", values, outside, first)


def _as_numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _check_shapes(input_ids: Tensor, teacher: SparseLogProbs, settings: shards.Settings) -> None:
    length, k = settings.length, settings.k
    if not isinstance(teacher, SparseLogProbs):
        raise TypeError(
            f"teacher: expected SparseLogProbs, which topk_log_probs makes from logits; got {type(teacher).__name__}"
        )
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids: expected an int64 or int32 tensor; got {got}")
    if input_ids.dim() != 2 or input_ids.shape[1] != length:
        raise ValueError(f"input_ids: expected shape [B, {length}]; got {list(input_ids.shape)}")
    shape = teacher.indices.shape
    if shape[:-1] != input_ids.shape or shape[-1] > k:
        raise ValueError(
            f"teacher: expected shape [{len(input_ids)}, {length}, at most {k}], as the ids have; got {list(shape)}"
        )
    if teacher.tail != settings.tail:
        raise ValueError(f"teacher: expected tail {settings.tail!r}, the tail of this cache; got {teacher.tail!r}")
    if settings.has_tail_mass and teacher.tail_log_prob is None:
        raise ValueError(
            f"teacher: expected a tail_log_prob with tail {settings.tail!r}, as topk_log_probs gives it; got None"
        )
    if teacher.source_temperature != settings.temperature:
        raise ValueError(
            f"teacher: expected source_temperature {settings.temperature}, the temperature of this cache; got "
            f"{teacher.source_temperature}"
        )
    if teacher.drawn and not settings.samples:
        raise ValueError(
            "samples: expected the number of drawn entries for a teacher of sampled_log_probs, so that readers know of "
            "them; got 0"
        )


def _check_entries(
    indices: np.ndarray,
    log_probs: np.ndarray,
    tail: np.ndarray | None,
    teacher: SparseLogProbs,
    settings: shards.Settings,
    first: int,
) -> None:
    """Raises for values that the loss would refuse later: sorted entries [B, T, K], whose padding is -inf, and tails
    [B, T]."""
    outside = indices >= settings.vocab_size
    _refuse("teacher.indices", f"expected below vocab_size, {settings.vocab_size}", indices, outside, first)
    there = ~np.isneginf(log_probs)
    if settings.tail != "truncate":
        repeated = (indices[..., 1:] == indices[..., :-1]) & there[..., 1:]
        _refuse(
            "teacher.indices",
            "expected each class once in a row (only tail 'truncate' takes repeats)",
            indices[..., 1:],
            repeated,
            first,
        )
    if tail is None:
        largest = np.finfo(np.float16).max
        _refuse("teacher.log_probs", f"expected at most {largest}", log_probs, ~(log_probs <= largest), first)
        return
    # Rounding may put a log-softmax slightly above 0.
    tolerance = 1e-3 if teacher.log_probs.dtype in (torch.float32, torch.float64) else 0.1
    for name, values in (("teacher.log_probs", log_probs), ("teacher.tail_log_prob", tail)):
        _refuse(name, "expected log-probabilities, at most 0", values, ~(values <= tolerance), first)
    # `TopKCache.teacher` scales the mass to 1 again after fp16 rounding, which would hide a wrong mass here.
    mass = np.exp(log_probs, dtype=np.float64).sum(axis=-1) + np.exp(tail, dtype=np.float64)
    wrong = (abs(mass - 1) > tolerance) & there.any(axis=-1)
    _refuse("teacher", "expected a mass of 1 in log_probs and tail_log_prob together", mass, wrong, first)


def _refuse(name: str, expected: str, values: np.ndarray, bad: np.ndarray, first: int) -> None:
    """Raises for the first bad value. `first` is the number of the first sequence of the values [B, T, ...]."""
    if bad.any():
        at = np.unravel_index(np.argmax(bad), bad.shape)
        raise ValueError(f"{name}: {expected}; got {values[at]} in sequence {first + at[0]}, row {at[1]}")
