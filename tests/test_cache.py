"""Teachers on disk: reading returns the written data, also after kills; errors name the damaged file."""

import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import stat
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

pytest.importorskip("numpy")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
import numpy as np

import kdkernels
from kdkernels import CATALOGUE, Divergence, SparseLogProbs, cache
from kdkernels.cache import CacheWriter, TopKCache, shards
from kdkernels.cache import writer as writer_module
from kdkernels.cache.__main__ import main
from kdkernels.losses import divergence as divergence_module

SETTINGS = {"vocab_size": 300, "k": 5, "length": 4}
LENGTH = SETTINGS["length"]


def top_k(logits, k, temperature=1.0):
    log_probs = (logits.float() / temperature).log_softmax(-1)
    values, indices = log_probs.topk(k)
    tail_log_prob = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return SparseLogProbs(indices.int(), values, tail_log_prob=tail_log_prob, source_temperature=temperature)


def sequences_of(numbers, vocab_size=300, k=5, length=4):
    """Ids and teacher of the sequences with these numbers; a number is the sequence's seed."""
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    ids = torch.stack([torch.randint(vocab_size, (length,), generator=generator) for generator in generators])
    logits = torch.stack([3 * torch.randn(length, vocab_size, generator=generator) for generator in generators])
    return ids, top_k(logits, k)


IDS, TEACHER = sequences_of(range(2))
LEAST = IDS.min()


def write(directory, sequences, sequences_per_shard=3, batch=2):
    """Writes the sequences that the directory lacks."""
    with CacheWriter(directory, **SETTINGS, sequences_per_shard=sequences_per_shard) as writer:
        for first in range(writer.sequences, sequences, batch):
            writer.append(*sequences_of(range(first, min(first + batch, sequences))))


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != shards.LOCK}


def copy_without_last_shard(directory, copy):
    """A copy of the directory as a writer leaves it that was killed before its manifest named the last shard."""
    shutil.copytree(directory, copy)
    settings, named = shards.read_manifest(copy)
    shards.write_manifest(copy, settings, named[:-1])


@st.composite
def recipes(draw):
    vocab_size = draw(st.one_of(st.integers(1, 80), st.integers(81, 5000)))
    return {
        "vocab_size": vocab_size,
        "k": draw(st.integers(1, min(vocab_size, 40))),
        "length": draw(st.integers(1, 9)),
        "batches": draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)),
        "sequences_per_shard": draw(st.integers(1, 4)),
        "temperature": draw(st.sampled_from([1.0, 2.5])),
        "padded": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "tail": draw(st.sampled_from(["bucket", "truncate", "uniform", "support"])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(max_examples=30)
@given(recipe=recipes())
def test_reading_returns_the_written_data(tmp_path_factory, recipe):
    directory = tmp_path_factory.mktemp("cache")
    torch.manual_seed(recipe["seed"])
    vocab_size, k, length, tail = (recipe[name] for name in ("vocab_size", "k", "length", "tail"))
    written = []
    with CacheWriter(
        directory, vocab_size=vocab_size, k=k, length=length, temperature=recipe["temperature"], tail=tail,
        sequences_per_shard=recipe["sequences_per_shard"],
    ) as writer:  # fmt: skip
        for batch in recipe["batches"]:
            ids = torch.randint(vocab_size, (batch, length))
            teacher = top_k(4 * torch.randn(batch, length, vocab_size), k, recipe["temperature"])
            dropped = torch.rand(teacher.shape) < recipe["padded"]
            # The tail receives the mass of dropped entries.
            lost = torch.where(dropped, teacher.log_probs, -torch.inf).logsumexp(-1)
            indices = torch.where(dropped & (torch.rand(teacher.shape) < 0.5), -1, teacher.indices)
            log_probs = torch.where(dropped & (indices >= 0), -torch.inf, teacher.log_probs)
            tail_log_prob = torch.logaddexp(teacher.tail_log_prob, lost) if tail in ("bucket", "uniform") else None
            teacher = SparseLogProbs(
                indices, log_probs, tail=tail, tail_log_prob=tail_log_prob, source_temperature=recipe["temperature"]
            )
            writer.append(ids, teacher)
            written += [(ids[i], indices[i], log_probs[i], i, tail_log_prob) for i in range(batch)]
        assert writer.sequences == len(written)

    found = TopKCache(directory)
    assert len(found) == len(written)
    for number, (ids, indices, log_probs, i, tail_log_prob) in enumerate(written):
        item = found[number - len(written)]
        assert torch.equal(item["input_ids"], ids) and item["input_ids"].dtype == torch.int64
        assert item["indices"].dtype == torch.int32 and item["log_probs"].dtype == torch.float16
        assert item["indices"].shape == item["log_probs"].shape == (length, k)
        assert (item["indices"].diff(dim=-1) >= 0).all()
        dense, want = (torch.full((length, vocab_size), -torch.inf, dtype=torch.float16) for _ in range(2))
        for row in range(length):
            for into, at, values in ((dense, item["indices"], item["log_probs"]), (want, indices, log_probs.half())):
                there = (at[row] >= 0) & ~torch.isneginf(values[row])
                into[row, at[row][there].long()] = values[row][there]
        assert torch.equal(dense, want)
        assert ("tail_log_prob" in item) == (tail_log_prob is not None)
        if tail_log_prob is not None:
            assert torch.equal(item["tail_log_prob"], tail_log_prob[i].half())
    with pytest.raises(IndexError):
        found[len(written)]
    shutil.rmtree(directory)


def test_a_batch_becomes_the_teacher(tmp_path):
    ids, written = sequences_of(range(7))
    options = SETTINGS | {"temperature": 2.0}
    written = SparseLogProbs(
        written.indices, written.log_probs, tail_log_prob=written.tail_log_prob, source_temperature=2.0
    )
    with CacheWriter(tmp_path, **options) as writer:
        writer.append(ids, written)
    found = TopKCache(tmp_path)
    batch = default_collate([found[i] for i in (3, 0, 6)])
    teacher = found.teacher(batch)
    assert (teacher.tail, teacher.source_temperature, teacher.dtype) == ("bucket", 2.0, torch.float32)
    mass = teacher.log_probs.double().exp().sum(-1) + teacher.tail_log_prob.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)
    # The tolerance covers rounding to fp16 (at most 2^-8 in this range) and the scaling to a mass of 1.
    want = torch.full((7, LENGTH, 300), -torch.inf).scatter(-1, written.indices.long(), written.log_probs)[[3, 0, 6]]
    got = want.new_full(want.shape, -torch.inf).scatter(-1, teacher.indices.long(), teacher.log_probs)
    torch.testing.assert_close(got, want, atol=5e-3, rtol=0)
    torch.testing.assert_close(teacher.tail_log_prob, written.tail_log_prob[[3, 0, 6]], atol=5e-3, rtol=0)
    for tail in ("support", "truncate"):
        other = found.teacher(batch, tail)
        assert (other.tail, other.tail_log_prob) == (tail, None) and torch.equal(other.log_probs, teacher.log_probs)


@pytest.mark.parametrize("tail", ["bucket", "uniform", "support", "renormalize", "truncate"])
def test_a_cached_teacher_gives_the_written_teacher_s_loss(tmp_path, tail):
    """A cached teacher gives the written teacher's loss, up to rounding to fp16.

    A teacher with a tail is scaled to a mass of 1 after rounding. Its loss has an error of second order.
    """
    ids, written = sequences_of(range(6))
    with CacheWriter(tmp_path, **SETTINGS) as writer:
        writer.append(ids, written)
    found = TopKCache(tmp_path)
    teacher = found.teacher(default_collate([found[i] for i in range(6)]), tail)
    student = torch.randn(6, LENGTH, 300, requires_grad=True)
    losses = [kdkernels.fused_kl(student, side) for side in (written.with_tail(tail), teacher)]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-2)
    if tail == "bucket":
        dense = torch.full((6, LENGTH, 300), -20.0).scatter(-1, teacher.indices.long(), teacher.log_probs)
        rest = (dense == -20.0).sum(-1, keepdim=True)
        same = torch.where(dense == -20.0, written.tail_log_prob[..., None] - rest.log(), dense)
        # p = q up to rounding. An error of first order would give a loss of 1e-4.
        assert kdkernels.fused_kl(same, teacher).item() < 2e-6


def test_a_row_without_entries_stays_one(tmp_path):
    """A row without entries, as topk_log_probs returns it for a masked row, comes back without entries."""
    ids, _ = sequences_of(range(1))
    nothing = torch.full((1, LENGTH, 2), -1)
    empty = SparseLogProbs(nothing, torch.zeros(nothing.shape), tail_log_prob=torch.zeros(1, LENGTH))
    with CacheWriter(tmp_path, **SETTINGS) as writer:
        writer.append(ids, empty)
    found = TopKCache(tmp_path)
    teacher = found.teacher(default_collate([found[0]]))
    assert (teacher.indices == 0).all() and torch.isneginf(teacher.log_probs).all()
    assert (teacher.tail_log_prob == 0).all()


def test_samples_may_repeat_and_have_no_tail(tmp_path):
    ids, _ = sequences_of(range(1))
    indices = torch.tensor([7, 7, 2, 7]).expand(1, LENGTH, 4)
    log_probs = torch.tensor([-1.0, -1.0, -2.0, 0.5]).expand(1, LENGTH, 4)  # a sample's weight may exceed 1
    with CacheWriter(tmp_path, **SETTINGS, tail="truncate") as writer:
        writer.append(ids, SparseLogProbs(indices, log_probs, tail="truncate"))
    found = TopKCache(tmp_path)
    teacher = found.teacher(default_collate([found[0]]))
    assert teacher.tail == "truncate" and teacher.tail_log_prob is None
    assert teacher.indices[0, 0].tolist() == [2, 7, 7, 7, 7]
    assert teacher.log_probs[0, 0].tolist() == [-2.0, -1.0, -1.0, 0.5, -np.inf]
    with pytest.raises(ValueError, match="'bucket' needs the tail's log-prob, which 'truncate' did not keep"):
        found.teacher(default_collate([found[0]]), "bucket")


def test_workers_read_the_same(tmp_path):
    write(tmp_path, 8)
    found = TopKCache(tmp_path)
    want = [found[i] for i in range(8)]  # opens the memory maps before workers copy the cache
    copy = pickle.loads(pickle.dumps(found))
    assert all(torch.equal(copy[5][name], want[5][name]) for name in want[5])
    for start in ("fork",) if "fork" in multiprocessing.get_all_start_methods() else ():
        loader = DataLoader(found, batch_size=3, num_workers=2, multiprocessing_context=start)
        batches = list(loader)
        for name in want[0]:
            assert torch.equal(torch.cat([batch[name] for batch in batches]), torch.stack([x[name] for x in want]))


def counted_operations(monkeypatch, last, act):
    """Calls `act` at disk operation number `last`; fsync counts once, a rename twice (before and after)."""
    count = iter(range(10**6))

    def step():
        if next(count) == last:
            act()

    def around(function, after):
        def wrapped(*arguments):
            step()
            result = function(*arguments)
            if after:
                step()
            return result

        return wrapped

    monkeypatch.setattr(shards.os, "fsync", around(os.fsync, False))
    monkeypatch.setattr(shards.os, "replace", around(os.replace, True))


def test_files_are_flushed_before_they_have_a_name(tmp_path, monkeypatch):
    """Each file is flushed before its rename, the folder after it. Only a power failure shows a missing flush."""
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append(target.name)
        replace(source, target)

    monkeypatch.setattr(shards.os, "fsync", recorded_fsync)
    monkeypatch.setattr(shards.os, "replace", recorded_replace)
    write(tmp_path, 5)
    folder = ["folder"] if os.name == "posix" else []
    names = [shards.MANIFEST, "shard-00000.safetensors", shards.MANIFEST, "shard-00001.safetensors", shards.MANIFEST]
    assert events == [event for name in names for event in ("file", name, *folder)]


def forked(function, *arguments):
    def in_one_thread():
        torch.set_num_threads(1)  # a fork has no OpenMP threads, and a wait for them never ends
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=in_one_thread)
    process.start()
    return process


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs os.fork")


@needs_fork
def test_a_kill_at_any_operation_loses_and_repeats_nothing(tmp_path):
    write(tmp_path / "whole", 7)
    want = contents(tmp_path / "whole")
    assert len(want) == 4  # three shards, the last one shorter, and the manifest

    def killed_at(operation, directory):
        with pytest.MonkeyPatch.context() as monkeypatch:
            counted_operations(monkeypatch, operation, lambda: os.kill(os.getpid(), signal.SIGKILL))
            write(directory, 7)

    stages = set()
    for operation in range(1000):
        directory = tmp_path / str(operation)
        process = forked(killed_at, operation, directory)
        process.join()
        stages.add(frozenset(contents(directory)))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        write(directory, 7)
        assert contents(directory) == want, f"killed at operation {operation}"
    # The manifest at the start and three shards with their manifests: four operations each.
    assert operation == 28 and len(stages) > 8


@needs_fork
def test_kills_at_random_times(tmp_path):
    write(tmp_path / "whole", 60)
    kills = 0
    # Shortest delays first: after a writer has finished its work, later writers have nothing to do.
    for delay in sorted(random.Random(0).choices([0.0, 0.01, 0.02, 0.04], k=25)):
        process = forked(write, tmp_path / "killed", 60)
        deadline = time.monotonic() + 20
        while not (tmp_path / "killed" / shards.LOCK).exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > 1
    write(tmp_path / "killed", 60)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_shard_that_the_manifest_does_not_name_is_written_again(tmp_path, monkeypatch):
    write(tmp_path / "whole", 6)

    def killed(*_):
        raise KeyboardInterrupt

    write(tmp_path / "killed", 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_manifest", killed)
        write(tmp_path / "killed", 6)
    assert "shard-00001.safetensors" in contents(tmp_path / "killed")
    (tmp_path / "killed" / "notes.txt").write_text("not ours")
    assert len(TopKCache(tmp_path / "killed")) == 3
    with CacheWriter(tmp_path / "killed", **SETTINGS) as writer:
        assert writer.sequences == 3
        assert "shard-00001.safetensors" not in contents(tmp_path / "killed")
    write(tmp_path / "killed", 6)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") | {"notes.txt": b"not ours"}


def test_an_exception_writes_no_half_shard_and_frees_the_directory(tmp_path):
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, **SETTINGS, sequences_per_shard=3) as writer:
        writer.append(*sequences_of(range(5)))
        assert writer.sequences == 5
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="expected an open writer"):
        writer.append(*sequences_of([5]))
    with CacheWriter(tmp_path, **SETTINGS) as writer:
        assert writer.sequences == 3


def test_a_second_writer_is_refused(tmp_path):
    with CacheWriter(tmp_path, **SETTINGS) as writer:
        writer.append(*sequences_of(range(2)))
        with pytest.raises(RuntimeError, match=rf"{re.escape(str(tmp_path))}: another writer is at work"):
            CacheWriter(tmp_path, **SETTINGS)
    assert len(TopKCache(tmp_path)) == 2
    CacheWriter(tmp_path, **SETTINGS).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """As the worker of a DataLoader that feeds the writer."""
    reading, writing = os.pipe()
    with CacheWriter(tmp_path, **SETTINGS):
        child = os.fork()
        if not child:
            os.close(writing)
            os.read(reading, 1)  # until the parent ends or closes its side
            os._exit(0)
    try:
        CacheWriter(tmp_path, **SETTINGS).close()
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def test_a_directory_is_that_of_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with CacheWriter("cache", **SETTINGS) as writer:
        monkeypatch.chdir(tmp_path / "elsewhere")
        writer.append(*sequences_of(range(2)))
    assert len(TopKCache(tmp_path / "cache")) == 2


def test_a_shard_of_the_default_size_holds_a_minute_of_work_at_most(tmp_path, monkeypatch):
    """The clock is a mock: an append after each of the teacher's batches of 7, 25 and 100 seconds."""
    now = 0.0
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: now)
    for seconds, appends in ((7, 8), (25, 2), (100, 1)):
        with CacheWriter(tmp_path / str(seconds), **SETTINGS) as writer:
            for number in range(2 * appends + 1):
                now += seconds
                writer.append(*sequences_of([number, number]))
            sizes = [shard.sequences for shard in writer.shards]
        assert sizes == ([2 * appends] * 2 if appends > 1 else [2, 2, 2])
        assert len(TopKCache(tmp_path / str(seconds))) == 4 * appends + 2
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 4 * LENGTH * 21)  # a token takes 21 bytes
    with CacheWriter(tmp_path / "bytes", **SETTINGS) as writer:
        for number in range(6):
            writer.append(*sequences_of([number, number, number]))
        assert [shard.sequences for shard in writer.shards] == [6, 6, 6]  # whole appends
    with CacheWriter(tmp_path / "fixed", **SETTINGS, sequences_per_shard=5) as writer:
        for number in range(5):
            assert not writer.shards
            now += 1000
            writer.append(*sequences_of([number]))
        assert len(writer.shards) == 1


COLUMNS = {
    "labels": torch.tensor([[-100, -100, 299, 0], [1, 2, 3, -100]]),
    "mask": torch.tensor([[True, False, True, True], [False, False, True, False]]),
    "document_ids": torch.tensor([[0, 0, 1, 1], [-(2**31), 2**31 - 1, 5, 5]]),
}


@pytest.mark.parametrize("names", [(), ("mask",), ("document_ids", "labels", "mask")])
def test_columns_come_back(tmp_path, names):
    given = {name: COLUMNS[name] for name in names}
    with CacheWriter(tmp_path, **SETTINGS, columns=names) as writer:
        writer.append(IDS, TEACHER, **given)
        writer.append(IDS, TEACHER, **{name: x if name == "mask" else x.int() for name, x in given.items()})
    found = TopKCache(tmp_path)
    batch = default_collate([found[i] for i in range(4)])
    assert set(batch) == {"input_ids", "indices", "log_probs", "tail_log_prob", *names}
    for name in names:
        assert batch[name].dtype == COLUMNS[name].dtype and torch.equal(batch[name], COLUMNS[name].repeat(2, 1))
    assert kdkernels.fused_kl(torch.zeros(4, LENGTH, 300), found.teacher(batch)).isfinite()
    bytes_of = {"labels": 4, "mask": 1, "document_ids": 4}
    assert f"{4 + sum(bytes_of[x] for x in names)} more for the token id" in cache.report(tmp_path)
    with pytest.raises(ValueError, match="holds a cache of other settings: columns"):
        CacheWriter(tmp_path, **SETTINGS, columns=set(COLUMNS) - set(names))


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"mask": None}, ValueError, "columns: expected labels, mask, as this cache has; got labels"),
        ({"document_ids": IDS}, ValueError, "columns: expected labels, mask, .* got labels, mask, document_ids"),
        ({"labels": IDS.float()}, TypeError, "labels: expected an int64 or int32 tensor; got torch.float32"),
        ({"labels": IDS.tolist()}, TypeError, "labels: expected an int64 or int32 tensor; got list"),
        ({"mask": IDS}, TypeError, r"mask: expected a bool tensor; got torch.int64; pass mask.bool\(\)"),
        ({"labels": IDS[:, 1:]}, ValueError, r"labels: expected the shape \[2, 4\] of the ids; got \[2, 3\]"),
        ({"labels": IDS + 300}, ValueError, r"within \[0, 300\), or ignore_index, -1; got .* in sequence 2, row 0"),
        ({"labels": IDS - 2**40}, ValueError, "labels: expected .*; got -1.* in sequence 2, row 0"),
        ({"labels": IDS.where(IDS != LEAST, -100)}, ValueError, "labels: expected .* ignore_index, -1; got -100"),
    ],
)
def test_bad_columns_are_refused(tmp_path, changes, error, expected):
    given = {"labels": IDS.where(IDS != LEAST, -1), "mask": IDS > 5}
    with CacheWriter(tmp_path, **SETTINGS, columns=("labels", "mask"), ignore_index=-1) as writer:
        writer.append(IDS, TEACHER, **given)
        given = {name: column for name, column in (given | changes).items() if column is not None}
        with pytest.raises(error, match=expected):
            writer.append(IDS, TEACHER, **given)
        assert writer.sequences == 2
    with pytest.raises(ValueError, match="columns: expected some of labels, mask, document_ids; got attention"):
        CacheWriter(tmp_path / "new", **SETTINGS, columns=("attention",))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"k": 6}, "k 5 and not 6"),
        ({"vocab_size": 301, "length": 8}, "vocab_size 300 and not 301, length 4 and not 8"),
        ({"temperature": 2.0}, "temperature 1.0 and not 2.0"),
        ({"tail": "truncate"}, "tail bucket and not truncate"),
        ({"tokenizer_hash": "abc"}, "tokenizer_hash None and not abc"),
        ({"teacher": "another"}, "teacher None and not another"),
        ({"samples": 2, "tail": "truncate"}, "tail bucket and not truncate, samples 0 and not 2"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, other, named):
    write(tmp_path, 4)
    (tmp_path / "shard-00002.safetensors.partial").write_bytes(b"left")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds a cache of other settings: {re.escape(named)}$"):
        CacheWriter(tmp_path, **SETTINGS | other)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("other", "error", "expected"),
    [
        ({"vocab_size": 2**31 + 1}, ValueError, r"vocab_size: expected at most 2\*\*31.*got 2147483649"),
        ({"k": 301}, ValueError, "k: expected at most vocab_size, 300; got 301"),
        ({"k": 0}, ValueError, "k: expected at least 1; got 0"),
        ({"length": 2.0}, TypeError, "length: expected an int; got float"),
        ({"temperature": 0.0}, ValueError, "temperature: expected finite and > 0; got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature.*got nan"),
        ({"tail": "ghost"}, ValueError, "tail: expected one of bucket.*got 'ghost'"),
        ({"tokenizer_hash": 5}, TypeError, "tokenizer_hash: expected a str or None; got int"),
        ({"samples": -1}, ValueError, "samples: expected at least 0; got -1"),
        ({"samples": 6, "tail": "truncate"}, ValueError, "samples: expected at most k, 5; got 6"),
        ({"samples": 2}, ValueError, "samples: expected 0 with tail 'bucket'; got 2, which needs 'truncate'"),
        ({"sequences_per_shard": 0}, ValueError, "sequences_per_shard: expected at least 1; got 0"),
        ({"sequences_per_shard": 2.0}, TypeError, "sequences_per_shard: expected an int; got float"),
        ({"sequences_per_shard": True}, TypeError, "sequences_per_shard: expected an int; got bool"),
        ({"temperature": "1.5"}, TypeError, "temperature: expected a number; got str"),
        ({"temperature": True}, TypeError, "temperature: expected a number; got bool"),
        ({"temperature": 10**400}, ValueError, "temperature: expected finite and > 0; got 1000"),
        ({"columns": "labels"}, TypeError, "columns: expected some of labels, mask, .* in a tuple; got 'labels'"),
        ({"columns": None}, TypeError, "columns: expected some of labels, .* in a tuple; got None"),
        ({"columns": ([1],)}, ValueError, r"columns: expected some of labels, .*; got \[1\]"),
        ({"columns": ("mask", "mask")}, ValueError, "columns: expected some of labels, .*; got mask, mask"),
        ({"ignore_index": -100.0}, TypeError, "ignore_index: expected an int; got float"),
        ({"ignore_index": 2**31}, ValueError, "ignore_index: expected within int32's range; got 2147483648"),
    ],
)
def test_bad_settings_make_nothing(tmp_path, other, error, expected):
    with pytest.raises(error, match=expected):
        CacheWriter(tmp_path / "new", **SETTINGS | other)
    assert not (tmp_path / "new").exists()


def test_a_directory_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (5, None, b"bytes"):
        with pytest.raises(TypeError, match=f"directory: expected a path; got {type(path).__name__}"):
            CacheWriter(path, **SETTINGS)
    for opens in (lambda path: CacheWriter(path, **SETTINGS), TopKCache):
        with pytest.raises(NotADirectoryError, match=r"directory: expected a directory, .*; got .*file, a file"):
            opens(tmp_path / "file")


def changed(name, at, value):
    """TEACHER with one value changed."""
    tensors = {part: getattr(TEACHER, part).clone() for part in ("indices", "log_probs", "tail_log_prob")}
    tensors[name][at] = value
    return SparseLogProbs(
        tensors["indices"].to(torch.int64), tensors["log_probs"], tail_log_prob=tensors["tail_log_prob"]
    )


def ids_with(value):
    ids = IDS.clone()
    ids[1, 2] = value
    return ids


@pytest.mark.parametrize(
    ("ids", "teacher", "error", "expected"),
    [
        (IDS, TEACHER.log_probs, TypeError, "expected SparseLogProbs, which topk_log_probs makes.*got Tensor"),
        (IDS.float(), TEACHER, TypeError, "input_ids: expected an int64 or int32 tensor; got torch.float32"),
        (IDS[:, :3], TEACHER, ValueError, r"input_ids: expected shape \[B, 4\]; got \[2, 3\]"),
        (IDS[0], TEACHER, ValueError, r"input_ids: expected shape \[B, 4\]; got \[4\]"),
        (IDS[:1], TEACHER, ValueError, r"teacher: expected shape \[1, 4, at most 5\].*got \[2, 4, 5\]"),
        (IDS, sequences_of(range(2), k=6)[1], ValueError, r"\[2, 4, at most 5\].*got \[2, 4, 6\]"),
        (IDS, top_k(torch.randn(2, 4, 300), 5, 2.0), ValueError, "expected source_temperature 1.0.*got 2.0"),
        (IDS, TEACHER.with_tail("truncate"), ValueError, "expected tail 'bucket'.*got 'truncate'"),
        (IDS, SparseLogProbs(TEACHER.indices, TEACHER.log_probs), ValueError, "expected a tail_log_prob.*got None"),
        (IDS, changed("indices", (1, 2, 3), 300), ValueError, "below vocab_size, 300; got 300 in sequence 5, row 2"),
        (IDS, changed("indices", (1, 2, 3), TEACHER.indices[1, 2, 0]), ValueError, "once in a row.*sequence 5, row 2"),
        (IDS, changed("log_probs", (0, 3, 1), torch.nan), ValueError, "at most 0; got nan in sequence 4, row 3"),
        (
            IDS,
            changed("log_probs", (0, 3, 1), 7.5),
            ValueError,
            "log_probs: expected.*at most 0; got 7.5 in sequence 4",
        ),
        (IDS, changed("tail_log_prob", (1, 0), torch.nan), ValueError, "tail_log_prob: .*got nan in sequence 5, row 0"),
        (IDS, changed("tail_log_prob", (1, 0), 0.0), ValueError, "a mass of 1.*got 1.* in sequence 5, row 0"),
        (ids_with(-100), TEACHER, ValueError, r"input_ids: expected within \[0, 300\); got -100 in sequence 5, row 2"),
        (ids_with(300), TEACHER, ValueError, "input_ids.*got 300 in sequence 5, row 2"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_teachers_are_refused_before_anything_is_written(tmp_path, ids, teacher, error, expected):
    write(tmp_path, 4)
    before = contents(tmp_path)
    with CacheWriter(tmp_path, **SETTINGS, sequences_per_shard=1) as writer:
        with pytest.raises(error, match=expected):
            writer.append(ids, teacher)
        assert writer.sequences == 4
    assert contents(tmp_path) == before


SHARD = "shard-00001.safetensors"


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :] if at >= 0 else flip(data, len(data) + at)


@pytest.mark.parametrize(
    ("damage", "expected", "without_checksum"),
    [
        (lambda data: flip(data, -1), "expected SHA-256 [0-9a-f]{64}, as manifest.json says; got [0-9a-f]{64}", False),
        (lambda data: flip(data, -100), "expected SHA-256", False),
        (lambda data: flip(data, 12), "expected a safetensors header|expected the tensors", True),
        (lambda data: flip(data, 0), "expected a safetensors header", True),
        (lambda data: data[:-1], r"expected [\d,]+ bytes, as manifest.json says; got [\d,]+", True),
        (lambda data: data + b"0", r"expected [\d,]+ bytes", True),
        (lambda data: None, "got no such file", True),
        (lambda data: data.replace(b'"F16"', b'"I16"'), "expected the tensors .*'F16'.*; got .*'I16'", True),
    ],
    ids=("last byte", "middle byte", "header", "header size", "truncated", "longer", "missing", "other dtypes"),
)
def test_a_damaged_shard_is_named(tmp_path, capsys, damage, expected, without_checksum):
    write(tmp_path, 7)
    path = tmp_path / SHARD
    data = damage(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)

    message = f"{re.escape(str(path))}.*({expected})"
    with pytest.raises(ValueError, match=message):
        TopKCache(tmp_path)
    with pytest.raises(ValueError, match=message) if without_checksum else contextlib.nullcontext():
        TopKCache(tmp_path, verify=False)
    with pytest.raises(ValueError, match=message) if without_checksum else contextlib.nullcontext():
        CacheWriter(tmp_path, **SETTINGS).close()  # a writer refuses the directory too
    assert main(["verify", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["shard-00000.safetensors", "all"], [SHARD, "DAMAGED:"], ["shard-00002.safetensors", "all"]
    ]  # fmt: skip
    assert lines[3] == "2 of 3 shards are all right"


def write_in_place(path, data):
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()


def replace(path, data):
    path.with_suffix(".new").write_bytes(data)
    os.replace(path.with_suffix(".new"), path)


LATER = {
    "deleted": lambda path, data, other: path.unlink(),
    "a directory": lambda path, data, other: (path.unlink(), path.mkdir()),
    "empty": lambda path, data, other: write_in_place(path, b""),
    "truncated": lambda path, data, other: write_in_place(path, data[: len(data) // 2]),
    "truncated in the header": lambda path, data, other: write_in_place(path, data[:20]),
    "garbage in the header": lambda path, data, other: write_in_place(path, flip(data, 0)),
    "garbage for a header": lambda path, data, other: write_in_place(path, os.urandom(200) + data[200:]),
    "garbage in the data": lambda path, data, other: write_in_place(path, flip(data, -1)),
    "replaced": lambda path, data, other: replace(path, other),
    "other dtypes": lambda path, data, other: write_in_place(path, data.replace(b'"F16"', b'"I16"')),
    "other shapes": lambda path, data, other: write_in_place(path, data.replace(b"[3,4,5]", b"[3,5,4]")),
}


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("damage", LATER.values(), ids=LATER)
def test_a_shard_that_is_damaged_after_opening_is_named(tmp_path, damage, read_before):
    write(tmp_path, 7)
    path = tmp_path / SHARD
    other, data = (tmp_path / "shard-00000.safetensors").read_bytes(), path.read_bytes()
    os.utime(path, ns=(0, 0))  # a write at once would not change the time of the last one
    found = TopKCache(tmp_path)
    if read_before:
        found[4]
    damage(path, data, other)
    for number in (3, 4, 3):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            found[number]
    assert torch.equal(found[6]["input_ids"], sequences_of([6])[0][0])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        pickle.loads(pickle.dumps(found))[5]  # as a worker process reads it
    shutil.rmtree(path) if path.is_dir() else None
    replace(path, data)  # restored: read again
    assert torch.equal(found[4]["input_ids"], sequences_of([4])[0][0])


def test_damaged_indices_are_named_where_they_are_read(tmp_path):
    write(tmp_path, 3)
    path = tmp_path / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    packed = safetensors.numpy.load_file(path)["indices"]
    at = data.index(packed[1].tobytes())
    data[at : at + packed[1].size] = bytes(packed[1].size)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, sequence 1: packed indices are damaged"):
        TopKCache(tmp_path, verify=False)[1]


def edited(manifest, **changes):
    """The manifest with other settings, or with a changed first shard."""
    settings = {name: changes.get(name, value) for name, value in manifest["settings"].items()}
    shard = {name: changes.get(name, value) for name, value in manifest["shards"][0].items()}
    return manifest | {"settings": settings, "shards": [shard, *manifest["shards"][1:]]}


def refused(directory, manifest, expected):
    path = directory / shards.MANIFEST
    path.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    before = contents(directory)
    for opened in (
        lambda: TopKCache(directory, verify=False),
        lambda: CacheWriter(directory, **SETTINGS),
        lambda: cache.report(directory),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{expected}"):
            opened()
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda manifest: manifest | {"version": 2},
            "expected a kdkernels top-k cache of version 3; got .*2.; write the",
        ),
        (lambda manifest: [], "expected a kdkernels top-k cache of version 3; got None"),
        (lambda manifest: manifest | {"shards": [{"name": "a"}]}, "is damaged.*sequences"),
        (lambda manifest: manifest | {"settings": {}}, "is damaged: expected the settings"),
        (lambda manifest: edited(manifest, k=0), "is damaged: k: expected at least 1"),
        (lambda manifest: edited(manifest, name="../shard-00000.safetensors"), "is damaged: name of a shard.*got '../"),
        (lambda manifest: edited(manifest, columns=["label"]), "is damaged: columns: expected some of labels, mask"),
        (lambda manifest: json.dumps(manifest)[:-9], "is damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, damage, expected):
    """Values that no cache has are refused although the checksum is theirs."""
    write(tmp_path, 3)
    damaged = damage(json.loads((tmp_path / shards.MANIFEST).read_text()))
    if isinstance(damaged, dict):
        damaged["sha256"] = shards.manifest_digest(damaged)
    refused(tmp_path, damaged, expected)


def test_edits_of_the_manifest_are_refused(tmp_path):
    write(tmp_path, 7)
    manifest = json.loads((tmp_path / shards.MANIFEST).read_text())
    named = manifest["shards"]
    edits = [
        manifest | {"shards": [*named, named[0]]},
        manifest | {"shards": named[::-1]},
        manifest | {"shards": named[:2]},
        manifest | {"note": "mine"},
        manifest | {"sha256": None},
        {name: value for name, value in manifest.items() if name != "sha256"},
        edited(manifest, sequences=2),
        edited(manifest, sha256="0" * 64),
    ]
    values = {"tail": "uniform", "temperature": 2.0, "teacher": "mine", "tokenizer_hash": "a", "length": 2, "k": 4}
    edits += [edited(manifest, **{name: value}) for name, value in {**values, "vocab_size": 301}.items()]
    for edit in edits:
        refused(tmp_path, edit, "damaged, or was edited: .*SHA-256.*write the cache again, into an empty directory")
    (tmp_path / shards.MANIFEST).write_text(json.dumps(dict(reversed(manifest.items()))))  # the same entries
    assert len(TopKCache(tmp_path)) == 7


def test_a_lost_manifest_costs_no_shard(tmp_path):
    write(tmp_path, 3)
    (tmp_path / shards.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"has shards but no manifest.json"):
        CacheWriter(tmp_path, **SETTINGS)
    assert (tmp_path / "shard-00000.safetensors").exists()
    with pytest.raises(ValueError, match=r"expected a cache of teachers; got a directory without manifest\.json"):
        TopKCache(tmp_path)


class Tokenizer(SimpleNamespace):
    def get_vocab(self):
        return self.vocabulary


def test_tokenizers_are_told_apart():
    one = Tokenizer(vocabulary={"a": 0, "b": 1, "é\ud800": 2}, all_special_tokens=["b", "a"])
    hashed = cache.tokenizer_hash(one)
    assert re.fullmatch("[0-9a-f]{64}", hashed)
    same = Tokenizer(vocabulary={"é\ud800": 2, "b": 1, "a": 0}, all_special_tokens=["a", "b"])
    assert cache.tokenizer_hash(same) == hashed
    for other in (
        Tokenizer(vocabulary={"a": 1, "b": 0, "é\ud800": 2}, all_special_tokens=["a", "b"]),
        Tokenizer(vocabulary={"a": 0, "b": 1}, all_special_tokens=["a", "b"]),
        Tokenizer(vocabulary=one.vocabulary, all_special_tokens=["a"]),
    ):
        assert cache.tokenizer_hash(other) != hashed


class Model(torch.nn.Module):
    """A mock of transformers' causal models. `factor` scales the logits, and the config does not state it."""

    def __init__(self, vocab_size=50, factor=1.0):
        super().__init__()
        self.base_model = Backbone(vocab_size)
        self.lm_head = torch.nn.Linear(8, vocab_size)
        self.config = SimpleNamespace(logit_scale=0.5)
        self.factor, self.calls = factor, 0

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids, use_cache=True):
        assert not self.training and not torch.is_grad_enabled() and not use_cache
        self.calls += 1
        hidden = self.base_model(ids, use_cache).last_hidden_state
        return SimpleNamespace(logits=0.5 * self.factor * self.lm_head(hidden))


class Backbone(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embedding, self.calls = torch.nn.Embedding(vocab_size, 8), 0

    def forward(self, ids, use_cache):
        self.calls += 1
        return SimpleNamespace(last_hidden_state=4 * torch.tanh(self.embedding(ids).cumsum(1)))


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_model_is_written_and_resumed(tmp_path, capsys, factor):
    model, blocks = Model(factor=factor), torch.randint(50, (7, 6))
    options = {"k": 4, "temperature": 1.5, "batch": 2, "sequences_per_shard": 3}
    found = cache.write_teacher(model.train(), blocks, tmp_path / "whole", **options)
    assert model.training and "teacher: 100%" in capsys.readouterr().err
    # The first tokens are computed by head and by model. A head with equal logits serves the rest.
    assert model.calls == (1 if factor == 1 else 5) and model.base_model.calls == 6
    assert [shard.sequences for shard in found.shards] == [4, 3]  # a shard holds whole batches
    with torch.no_grad():
        want = top_k(model.eval()(blocks, use_cache=False).logits, 4, 1.5)
    batch = default_collate([found[i] for i in range(7)])
    teacher = found.teacher(batch)
    assert torch.equal(batch["input_ids"], blocks) and teacher.source_temperature == 1.5
    assert torch.equal(teacher.indices, want.indices.sort(-1).values)
    torch.testing.assert_close(teacher.tail_log_prob, want.tail_log_prob, atol=5e-3, rtol=0)

    cache.write_teacher(model, blocks[:5], tmp_path / "part", **options, progress=False)
    assert not capsys.readouterr().err
    copy_without_last_shard(tmp_path / "whole", tmp_path / "killed")
    model.base_model.calls = 0
    cache.write_teacher(model, blocks, tmp_path / "killed", **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and model.base_model.calls <= 4
    before = model.base_model.calls
    cache.write_teacher(model, blocks, tmp_path / "killed", **options)  # all is written: two checks of 8 tokens
    assert model.base_model.calls == before + 2 and contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for text, expected in (
        (blocks[:3], "at most the text's 3 sequences; got 7"),
        (blocks + 1, "sequence 0 differs"),
    ):
        with pytest.raises(ValueError, match=expected):
            cache.write_teacher(model, text % 50, tmp_path / "whole", **options)


def test_a_sampled_teacher_is_unbiased_and_written_alike_after_a_kill(tmp_path):
    """Over many sequences with equal ids, the mean gradient equals the dense teacher's within 5 standard errors.

    A writer that was killed, or resumed at another batch size, writes the same data.
    """
    model, blocks = Model(), torch.randint(50, (1, 3)).expand(600, 3).contiguous()
    options = {"k": 4, "temperature": 1.5, "batch": 20, "sequences_per_shard": 300, "progress": False}
    with torch.no_grad():
        whole = model.eval()(blocks[:1], use_cache=False).logits
    student = torch.randn(1, 3, 50)

    def gradients(teacher):
        leaf = student.expand(*teacher.shape[:-1], 50).clone().requires_grad_()
        kdkernels.fused_kl(leaf, teacher, temperature=1.5, reduction="sum").backward()
        return leaf.grad

    def gradients_from(name, **kept):
        cached = cache.write_teacher(model, blocks, tmp_path / name, **options, **kept)
        return gradients(cached.teacher(default_collate([cached[i] for i in range(600)])))

    want, sampled = gradients(whole)[0], gradients_from("sampled", samples=2)
    drawn = TopKCache(tmp_path / "sampled")
    with pytest.raises(ValueError, match="expected 'truncate' for a teacher with drawn entries; got 'support'"):
        drawn.teacher(default_collate([drawn[0]]), tail="support")
    error = (sampled.mean(0) - want).abs()
    assert (error < 5 * sampled.std(0) / 600**0.5 + 1e-4).all()  # 1e-4: fp16's error of a mass of 1
    assert error.norm() < 0.3 * (gradients_from("top")[0] - want).norm()
    assert "top 2 and 2 draws of the rest of 50 classes" in cache.report(tmp_path / "sampled")

    copy_without_last_shard(tmp_path / "sampled", tmp_path / "killed")
    cache.write_teacher(model, blocks, tmp_path / "killed", **options, samples=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "sampled")
    cache.write_teacher(model, blocks[:50], tmp_path / "begun", **options | {"batch": 7}, samples=2)
    begun = cache.write_teacher(model, blocks, tmp_path / "begun", **options, samples=2)
    for number in (0, 49, 50, 599):
        assert all(torch.equal(begun[number][name], x) for name, x in drawn[number].items())
    with pytest.raises(ValueError, match="samples 2 and not 3"):
        cache.write_teacher(model, blocks, tmp_path / "sampled", **options, samples=3)


def test_settings_are_compared_before_a_model_is_loaded(tmp_path):
    blocks, mask = torch.randint(50, (5, 6)), torch.rand(5, 6) > 0.5
    options = {"k": 4, "batch": 2, "progress": False}

    def no_model():
        raise AssertionError("the model was loaded")

    for bad, expected in (({"k": 0}, "k: expected at least 1"), ({"mask": mask[:3]}, "mask: expected the shape")):
        with pytest.raises(ValueError, match=expected):
            cache.write_teacher(no_model, blocks, tmp_path / "new", **options | bad)
    assert not (tmp_path / "new").exists()
    cache.write_teacher(Model, blocks[:3], tmp_path, **options, mask=mask[:3])
    for bad, text, expected in (
        ({"k": 5}, blocks, "holds a cache of other settings: k 4 and not 5$"),
        ({"vocab_size": 49}, blocks, "vocab_size 50 and not 49$"),
        ({"mask": None}, blocks, "columns .* and not"),
        ({}, blocks.flip(0), "holds another text.*sequence 0 differs"),
        ({"mask": mask ^ (torch.arange(5) == 2)[:, None]}, blocks, "holds other mask.*sequence 2 differs"),
        ({"mask": mask[:2]}, blocks[:2], "at most the text's 2 sequences; got 3"),
    ):
        with pytest.raises(ValueError, match=expected):
            cache.write_teacher(no_model, text, tmp_path, **options | {"mask": mask} | bad)
    found = cache.write_teacher(no_model, blocks[:3], tmp_path, **options, mask=mask[:3])  # nothing is missing
    assert len(found) == 3
    found = cache.write_teacher(Model, blocks, tmp_path, **options, mask=mask)
    assert torch.equal(torch.stack([found[i]["mask"] for i in range(5)]), mask)


@pytest.mark.parametrize("vocab_size", [None, 50], ids=["of the model", "given"])
def test_ids_and_labels_are_checked_before_a_sequence_is_written(tmp_path, vocab_size):
    """Sequence 4 is in the third batch. If the caller names the vocabulary, the model is not even loaded."""
    blocks = torch.randint(50, (5, 6))
    loaded = []

    def load():
        loaded.append(1)
        return Model()

    def changed(value):
        return torch.where(torch.arange(30).view(5, 6) == 27, value, blocks)

    for options, ids, expected in (
        ({}, changed(50), r"blocks: expected within \[0, 50\); got 50 in sequence 4, row 3"),
        ({}, changed(-1), r"blocks: expected within \[0, .*; got -1 in sequence 4, row 3"),
        ({"labels": changed(50)}, blocks, "labels: .* ignore_index, -100; got 50 in sequence 4, row 3"),
        ({"labels": changed(-1)}, blocks, "labels: .* ignore_index, -100; got -1 in sequence 4, row 3"),
        ({"labels": changed(-100), "ignore_index": -1}, blocks, "ignore_index, -1; got -100 in sequence 4, row 3"),
    ):
        with pytest.raises(ValueError, match=expected):
            cache.write_teacher(load, ids, tmp_path / "new", k=4, batch=2, vocab_size=vocab_size, **options)
    assert not (tmp_path / "new").exists() and (vocab_size is None or not loaded)
    labels = changed(-1)
    found = cache.write_teacher(Model, blocks, tmp_path, k=4, labels=labels, ignore_index=-1, progress=False)
    assert torch.equal(torch.stack([found[i]["labels"] for i in range(5)]), labels)


def test_an_embedding_without_an_id_is_named_before_the_model_runs(tmp_path):
    class Padded(Model):
        def get_input_embeddings(self):
            return self.base_model.embedding

    with pytest.raises(ValueError, match=r"blocks: expected within \[0, 50\); got 50 in sequence 0, row 0"):
        cache.write_teacher(Padded(), torch.full((1, 3), 50), tmp_path / "new", k=4)


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        (
            {"model": "a/name"},
            TypeError,
            "model: expected a torch.nn.Module, or a function.*got str; .*from_pretrained",
        ),
        ({"model": lambda: None}, TypeError, "model: expected a function that returns a torch.nn.Module; got NoneType"),
        ({"model": torch.nn.ReLU()}, ValueError, "model: expected a module with parameters.*got ReLU"),
        ({"blocks": [[1]]}, TypeError, "blocks: expected a tensor, int64 .*; got list"),
        ({"batch": 2.0}, TypeError, "batch: expected an int; got float"),
        ({"sequences_per_shard": 0}, ValueError, "sequences_per_shard: expected at least 1; got 0"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an int; got NoneType"),
        ({"ignore_index": 2**32}, ValueError, "ignore_index: expected within int32's range; got 4294967296"),
        ({"temperature": None}, TypeError, "temperature: expected a number; got NoneType"),
        ({"directory": None}, TypeError, "directory: expected a path; got NoneType"),
    ],
)
def test_bad_arguments_of_write_teacher_are_named(tmp_path, changes, error, expected):
    arguments = {
        "model": Model(),
        "blocks": torch.zeros(1, 2, dtype=torch.int64),
        "directory": tmp_path / "new",
        "k": 4,
    }
    with pytest.raises(error, match=expected):
        cache.write_teacher(**arguments | changes)
    assert not (tmp_path / "new").exists()


def test_draws_warn_once_of_divergences_that_they_bias(tmp_path):
    found = cache.write_teacher(Model(), torch.randint(50, (2, 3)), tmp_path, k=4, samples=2, progress=False)
    drawn = found.teacher(default_collate([found[0], found[1]]))
    logits = torch.randn(2, 3, 50)
    top = kdkernels.topk_log_probs(torch.randn(2, 3, 50), 4).with_tail("truncate")
    for teacher in (drawn, kdkernels.sampled_log_probs(torch.randn(2, 3, 50), 4)):
        divergence_module._warn_of_draws.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                kdkernels.fused_kl(logits, teacher)
                kdkernels.fused_divergence(logits, teacher, kdkernels.Divergence("mixed_kl", weight=1.0))
                kdkernels.fused_divergence(logits, top, "js")
            assert not caught
            for _ in range(2):
                kdkernels.fused_js(logits, teacher)
                kdkernels.fused_divergence(logits, teacher, "tv")
        begin = "the teacher's entries were drawn at random, which biases "
        assert [str(each.message)[: len(begin) + 2] for each in caught] == [begin + "js", begin + "tv"]
        assert all(each.filename == __file__ for each in caught)
    with (
        CacheWriter(tmp_path / "new", vocab_size=50, k=4, length=3, tail="truncate") as writer,
        pytest.raises(ValueError, match="samples: expected the number of drawn entries"),
    ):
        writer.append(torch.zeros(2, 3, dtype=torch.int64), drawn)


@pytest.mark.parametrize("divergence", [d for name in CATALOGUE for d in Divergence.examples(name)], ids=str)
def test_the_catalogue_says_whether_draws_bias_a_divergence(divergence):
    """The mean gradient over some teachers is the gradient of the mean teacher if the gradient is linear in it."""
    student = torch.randn(1, 6, dtype=torch.float64)
    p = (3 * torch.randn(8, 6, dtype=torch.float64)).softmax(-1)

    def gradient(teacher):
        leaf = student.expand_as(teacher).clone().requires_grad_()
        kdkernels.fused_divergence(leaf, teacher.log(), divergence, reduction="sum").backward()
        return leaf.grad.mean(0)

    is_linear = torch.allclose(gradient(p), gradient(p.mean(0, keepdim=True)), rtol=0, atol=1e-12)
    assert is_linear == divergence.is_linear_in_teacher


def test_padded_logits_are_left_out(tmp_path):
    model = Model()
    with torch.no_grad():
        model.lm_head.bias[45:] = 100
    with pytest.raises(ValueError, match="at most 50, the classes of the model; got 51"):
        cache.write_teacher(model, torch.randint(45, (2, 6)), tmp_path, k=4, vocab_size=51, progress=False)
    found = cache.write_teacher(model, torch.randint(45, (2, 6)), tmp_path, k=4, vocab_size=45, progress=False)
    assert found.settings.vocab_size == 45 and found[0]["indices"].max() < 45


def test_the_command_writes_a_model_of_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    words = ["<eos>", *(f"w{i}" for i in range(1, 60))]
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    for name, text in (("a.txt", "w1 w2 w3 w4 w5"), ("b.txt", "w7 w8 w9 w10 w11 w12")):
        (tmp_path / name).write_text(text)
    capsys.readouterr()
    arguments = ["write", "--model", tmp_path / "tiny", "--text", tmp_path / "a.txt", tmp_path / "b.txt"]
    arguments += ["--output", tmp_path / "cache", "--k", 8, "--length", 4, "--dtype", "float32", "--device", "cpu"]
    assert main([str(argument) for argument in arguments]) == 0
    out = capsys.readouterr().out
    found = TopKCache(tmp_path / "cache")
    assert found.settings.teacher == "tiny float32"
    assert found.settings.tokenizer_hash == cache.tokenizer_hash(tokenizer)
    batch = default_collate([found[i] for i in range(len(found))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 0, 7, 8], [9, 10, 11, 12]]
    with torch.no_grad():
        want = top_k(model.eval()(batch["input_ids"]).logits, 8)
    assert torch.equal(batch["indices"], want.indices.sort(-1).values)

    # 8 indices of 2 low bits and 1 unary bit, and 59 >> 2 more unary bits: 38 bits, 5 bytes a row.
    for part in ("3 sequences of 4 tokens", "23 = 5 of indices + 16", "4.75 (6 if each", "344", "127", "40 bytes a"):
        assert part in out, out
    assert main(["info", str(tmp_path / "cache")]) == 0 and capsys.readouterr().out == out
    assert main(["verify", str(tmp_path / "cache")]) == 0
    drawn = [*arguments, "--samples", 3, "--output", tmp_path / "drawn"]
    assert main([str(argument) for argument in drawn]) == 0
    assert "top 5 and 3 draws of the rest of 60 classes" in capsys.readouterr().out
    assert TopKCache(tmp_path / "drawn").settings.tail == "truncate"
    with pytest.raises(SystemExit, match=r"expected at least 50 tokens, one sequence; got 13"):
        main([str(argument) for argument in [*arguments, "--length", 50]])
    with pytest.raises(SystemExit, match=r"holds a cache of other settings: k 8 and not 9$"):
        main([str(argument) for argument in [*arguments, "--k", 9]])
    with pytest.raises(SystemExit, match="nowhere: expected a cache of teachers"):
        main(["verify", str(tmp_path / "nowhere")])


class Letters(Tokenizer):
    eos_token_id = 0

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(letter) - 96 for letter in text])


def test_the_command_stores_columns_and_loads_the_model_last(tmp_path, monkeypatch, capsys):
    """A mock of transformers: letters are tokens."""
    loaded = []

    def load(name, dtype):
        loaded.append(dtype)
        return Model()

    tokenizer = Letters(vocabulary={"a": 1}, all_special_tokens=[])
    mock = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: tokenizer),
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=load),
    )
    monkeypatch.setitem(sys.modules, "transformers", mock)
    for name, text in (("a.txt", "abcdefg"), ("b.txt", "hijklm")):
        (tmp_path / name).write_text(text)

    def run(*more, source=("--text", tmp_path / "a.txt", tmp_path / "b.txt"), output="text"):
        arguments = ["write", "--model", "letters", *source, "--output", tmp_path / output, "--k", 8, "--length", 4]
        return main([str(argument) for argument in [*arguments, "--dtype", "float32", "--device", "cpu", *more]])

    assert run("--document-ids") == 0 and loaded == [torch.float32]
    found = TopKCache(tmp_path / "text")
    assert [found[i]["input_ids"].tolist() for i in range(3)] == [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 10, 11]]
    assert [found[i]["document_ids"].tolist() for i in range(3)] == [[0] * 4, [0] * 4, [1] * 4]
    assert "8 more for the token id, document_ids" in capsys.readouterr().out
    for more, expected in (
        (["--document-ids", "--k", 9], "holds a cache of other settings: k 8 and not 9$"),
        ([], r"holds a cache of other settings: columns \('document_ids',\) and not \(\)$"),
    ):
        with pytest.raises(SystemExit, match=expected):
            run(*more)
    assert run("--document-ids") == 0 and len(loaded) == 1  # nothing is missing

    ids = torch.randint(50, (2, 6))
    tokens = {"input_ids": ids, "labels": torch.where(ids > 20, ids, -100), "mask": ids > 20}
    source = ("--tokens", tmp_path / "tokens.safetensors")
    safetensors.torch.save_file(tokens, source[1])
    assert run(source=source, output="tokens") == 0
    found = TopKCache(tmp_path / "tokens")
    for name, column in tokens.items():
        assert torch.equal(torch.stack([found[i][name] for i in range(2)]), column)
    safetensors.torch.save_file({"ids": ids}, source[1])
    with pytest.raises(SystemExit, match=r"tokens.safetensors: expected input_ids and, .*; got ids$"):
        run(source=source)
    source[1].write_bytes(b"?")
    with pytest.raises(SystemExit, match=r"tokens.safetensors: expected a safetensors file; got"):
        run(source=source)
    for more, expected in (
        (("--document-ids",), "--document-ids: expected --text"),
        (("--length", "0"), "--length: expected at least 1; got 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*more, source=source)
        assert ended.value.code == 2 and expected in capsys.readouterr().err
    other = {"input_ids": ids, "labels": torch.full_like(ids, -1)}
    safetensors.torch.save_file(other, source[1])
    with pytest.raises(SystemExit, match=r"labels: .* ignore_index, -100; got -1 in sequence 0, row 0$"):
        run(source=source, output="other")
    assert run("--ignore-index", "-1", source=source, output="other") == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("CUDA error: out of memory\n\n  Compile with `TORCH_USE_CUDA_DSA`"),
            "memory Compile with `TORCH_",
        ),
        (
            ImportError("\nLlama needs the library sentencepiece.\nRun `pip install sentencepiece`"),
            "Llama needs .*Run `",
        ),
        (OSError("no file\nnamed config.json"), "no file named config.json"),
        (MemoryError(), None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_command_ends_an_error_in_one_line(tmp_path, monkeypatch, error, line):
    """A MemoryError is none that the user could mend by other arguments: its traceback stays."""

    def fails(name):
        raise error

    mock = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=fails))
    monkeypatch.setitem(sys.modules, "transformers", mock)
    arguments = ["write", "--model", "m", "--text", "t", "--output", str(tmp_path / "new"), "--device"]
    with pytest.raises(SystemExit if line else MemoryError) as ended:
        main([*arguments, "cpu"])
    if line:
        assert re.fullmatch(f"kdkernels.cache: .*{line}.*", ended.value.code)  # sys.exit prints it, and returns 1
        with pytest.raises(SystemExit, match=r"kdkernels.cache: --device nonsense: Expected one of cpu"):
            main([*arguments, "nonsense"])
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "cpu"])
        assert re.fullmatch(r"kdkernels\.cache: .*transformers.*; pip install kdkernels\[cache\]", ended.value.code)


def test_missing_dependencies_are_named(monkeypatch):
    for module in ("safetensors", "numpy"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.setitem(sys.modules, "safetensors.numpy", None)
            patch.delitem(sys.modules, "kdkernels.cache")
            with pytest.raises(ImportError, match=r"kdkernels\.cache: .*pip install kdkernels\[cache\]"):
                importlib.import_module("kdkernels.cache")
            # `python -m kdkernels.cache` imports the package before its __main__.
            patch.setattr(sys, "argv", ["-m", "info", "."])
            with pytest.raises(ImportError):
                importlib.import_module("kdkernels.cache")
            patch.setattr(sys, "orig_argv", ["python", "-m", "kdkernels.cache", "info", "."])
            with pytest.raises(SystemExit, match=rf"^kdkernels\.cache: .*{module}.*; pip install kdkernels\[cache\]$"):
                importlib.import_module("kdkernels.cache")
    with monkeypatch.context() as patch, pytest.raises(ImportError, match=r"pip install kdkernels\[cache\]"):
        patch.setitem(sys.modules, "tqdm", None)
        cache.write_teacher(Model(), torch.zeros(1, 1, dtype=torch.int64), "nowhere", k=1)


def test_the_example_names_a_missing_package(monkeypatch):
    examples = Path(__file__).resolve().parents[1] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"This example needs: pip install matplotlib$"):
        runpy.run_path(str(examples / "distill_smollm2.py"))
    assert "nowhere" in importlib.import_module("smollm2").missing_packages("nowhere")


def test_the_package_does_not_import_the_cache():
    assert "cache" not in kdkernels.__all__
    assert "kdkernels.cache" not in {getattr(value, "__name__", None) for value in vars(kdkernels.nn).values()}
