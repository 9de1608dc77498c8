"""Teachers on disk: reading returns the written data, also after kills; errors name the damaged file."""

import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

pytest.importorskip("numpy")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
import numpy as np

import kdkernels
from kdkernels import SparseLogProbs, cache
from kdkernels.cache import CacheWriter, TopKCache, shards
from kdkernels.cache.__main__ import main

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
    manifest = json.loads((copy / shards.MANIFEST).read_text())
    manifest["shards"].pop()
    (copy / shards.MANIFEST).write_text(json.dumps(manifest))


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
    ],
)
def test_bad_settings_make_nothing(tmp_path, other, error, expected):
    with pytest.raises(error, match=expected):
        CacheWriter(tmp_path / "new", **SETTINGS | other)
    assert not (tmp_path / "new").exists()


IDS, TEACHER = sequences_of(range(2))


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
        (IDS, changed("indices", (1, 2, 3), 300), ValueError, "below vocab_size, 300; got 300 in sequence 1, row 2"),
        (IDS, changed("indices", (1, 2, 3), TEACHER.indices[1, 2, 0]), ValueError, "once in a row.*sequence 1, row 2"),
        (IDS, changed("log_probs", (0, 3, 1), torch.nan), ValueError, "at most 0; got nan in sequence 0, row 3"),
        (
            IDS,
            changed("log_probs", (0, 3, 1), 7.5),
            ValueError,
            "log_probs: expected.*at most 0; got 7.5 in sequence 0",
        ),
        (IDS, changed("tail_log_prob", (1, 0), torch.nan), ValueError, "tail_log_prob: .*got nan in sequence 1, row 0"),
        (IDS, changed("tail_log_prob", (1, 0), 0.0), ValueError, "a mass of 1.*got 1.* in sequence 1, row 0"),
        (ids_with(-100), TEACHER, ValueError, r"input_ids: expected within \[0, 300\); got -100 in sequence 1, row 2"),
        (ids_with(300), TEACHER, ValueError, "input_ids.*got 300 in sequence 1, row 2"),
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


def test_damaged_indices_are_named_where_they_are_read(tmp_path):
    write(tmp_path, 3)
    path = tmp_path / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    with shards.open_shard(path) as file:
        packed = file.get_tensor("indices")
    at = data.index(packed[1].tobytes())
    data[at : at + packed[1].size] = bytes(packed[1].size)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, sequence 1: packed indices are damaged"):
        TopKCache(tmp_path, verify=False)[1]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda manifest: manifest | {"version": 1}, "expected a kdkernels top-k cache of version 2; got .*1"),
        (lambda manifest: [], "expected a kdkernels top-k cache of version 2; got None"),
        (lambda manifest: manifest | {"shards": [{"name": "a"}]}, "is damaged.*sequences"),
        (lambda manifest: manifest | {"settings": {}}, "is damaged: expected the settings"),
        (
            lambda manifest: manifest | {"settings": manifest["settings"] | {"k": 0}},
            "is damaged: k: expected at least 1",
        ),
        (
            lambda manifest: manifest | {"shards": [manifest["shards"][0] | {"name": "../shard-00000.safetensors"}]},
            "is damaged: name of a shard.*got '../shard",
        ),
        (None, "is damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, damage, expected):
    write(tmp_path, 3)
    path = tmp_path / shards.MANIFEST
    text = path.read_text()
    path.write_text(text[:-9] if damage is None else json.dumps(damage(json.loads(text))))
    before = contents(tmp_path)
    for opened in (lambda: TopKCache(tmp_path), lambda: CacheWriter(tmp_path, **SETTINGS)):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{expected}"):
            opened()
    assert contents(tmp_path) == before


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


def test_missing_dependencies_are_named(monkeypatch):
    for module in ("safetensors", "numpy"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.setitem(sys.modules, "safetensors.numpy", None)
            patch.delitem(sys.modules, "kdkernels.cache")
            with pytest.raises(ImportError, match=r"kdkernels\.cache: .*pip install kdkernels\[cache\]"):
                importlib.import_module("kdkernels.cache")
    with monkeypatch.context() as patch, pytest.raises(ImportError, match=r"pip install kdkernels\[cache\]"):
        patch.setitem(sys.modules, "tqdm", None)
        cache.write_teacher(Model(), torch.zeros(1, 1, dtype=torch.int64), "nowhere", k=1)


def test_the_package_does_not_import_the_cache():
    assert "cache" not in kdkernels.__all__
    assert "kdkernels.cache" not in {getattr(value, "__name__", None) for value in vars(kdkernels.nn).values()}
