"""Teachers on disk, for offline distillation: the top k of each token, written once and read in every epoch.

    python -m kdkernels.cache write --model FOLDER --text FILE... --output DIRECTORY --k 64 [--samples 32]
    python -m kdkernels.cache write --model FOLDER --tokens FILE --output DIRECTORY    # input_ids, labels, mask, ...
    python -m kdkernels.cache info DIRECTORY      # the contents, and the bytes per token next to other formats
    python -m kdkernels.cache verify DIRECTORY    # compares every checksum

In Python, `write_teacher` runs a model over token ids, `CacheWriter` takes teachers from any source, and `TopKCache` is
a memory-mapped Dataset::

    cache = TopKCache(directory)
    for batch in torch.utils.data.DataLoader(cache, batch_size=8, shuffle=True, num_workers=2):
        logits = student(batch["input_ids"]).logits
        labels = kdkernels.next_token_labels(batch["input_ids"])  # or of batch["labels"], if the cache has them
        loss = kdkernels.fused_kl(logits, cache.teacher(batch), labels=labels, temperature=cache.settings.temperature)

Row t of the teacher is its output at token t: the prediction of token t + 1, which is also the label of row t from
`next_token_labels`. The last row predicts a token that is not in the sequence. Labels, a mask and document ids may be
stored beside the teacher. They belong to tokens and are not shifted: `next_token_labels` shifts labels.

The top k alone are a biased teacher: the student learns the total probability of the other classes and nothing more
about them, and falls behind in long runs. With `samples`, that many of the k entries are drawn from the classes past
the most probable ones (`sampled_log_probs`). This teacher is unbiased for kl: the expectation of a row's gradient is
the whole teacher's gradient. It is biased for the other divergences, for which the top k may be better; the loss warns
of it once.

A row holds packed indices (`kdkernels.cache.packing`), fp16 log-probabilities and an fp16 log-probability of the tail.
Rounding to fp16 changes a probability by at most 0.05 % from 1/7 up, and 0.4 % from 2e-7 up.

Shards are safetensors files, not Parquet: all rows have one size, so a mapped file gives a slice without decoding other
rows, and users of transformers already have the package. A writer that is killed loses only the sequences that no shard
held yet: at most a minute of work, or one batch. The next writer's `sequences` says where to continue, and each
sequence comes out as it would have without the kill. docs/cache.md describes the files and what they guarantee.
"""

import hashlib
import importlib
import itertools
import json
import operator
import os
import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

try:
    import numpy as np
    import safetensors.numpy  # noqa: F401
except ImportError as error:
    text = f"kdkernels.cache: {error}; pip install kdkernels[cache]"
    if sys.argv[:1] == ["-m"] and "kdkernels.cache" in sys.orig_argv:  # the command line imports this package first
        sys.exit(text)
    raise ImportError(text) from error

from ..distributions import HAVE_TAIL_MASS, LinearLogits, SparseLogProbs
from ..teachers.extract import sampled_log_probs, topk_log_probs
from . import packing, shards
from .writer import CacheWriter, check_column, check_ids, check_ignore_index, named_shards, path_of


class TopKCache(torch.utils.data.Dataset):
    """The sequences of a cache and their teachers, read from memory-mapped files.

    An item is a dict of plain tensors, which the default collate function batches: input_ids int64 [T], indices int32
    [T, K], ascending, log_probs fp16 [T, K] (-inf in the unused entries of a row) and, with tail "bucket" or "uniform",
    tail_log_prob fp16 [T]; and the columns that `settings.columns` names: labels int64 [T], mask bool [T], document_ids
    int64 [T]. `teacher` makes the distribution of a batch of items. Each worker process maps the files again.

    Reading an item raises ValueError, with the file's path, if the file was truncated, replaced, changed or deleted
    since this object compared it with the manifest. A file that is truncated during a read kills the process
    (docs/cache.md).

    Args:
        directory: the directory of a `CacheWriter`, finished or still writing. The dataset has the shards that the
            manifest names when this object is made.
        verify: whether to compare the checksums too, which reads all of the files once, and again each file that
            changes later.

    Raises:
        ValueError: if there is no cache, or a cache of another version; for a damaged shard, with its path.
    """

    def __init__(self, directory: str | os.PathLike, *, verify: bool = True):
        self.directory = path_of(directory)
        self.settings, self.shards = manifest_of(self.directory)
        self._readers = [
            shards.ShardReader(self.directory, shard, self.settings, checksum=verify) for shard in self.shards
        ]
        self._ends = list(itertools.accumulate(shard.sequences for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[operator.index(index)]
        number = bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        reader, settings = self._readers[number], self.settings
        item = {name: array[0] for name, array in reader.read(slice(row, row + 1)).items()}
        for name in ("input_ids", "labels", "document_ids"):
            if name in item:
                item[name] = item[name].astype(np.int64)
        try:
            item["indices"] = packing.unpack(item["indices"], settings.vocab_size, settings.k)
        except ValueError as error:  # opened without verify
            raise ValueError(f"{reader.path}, sequence {row}: {error}") from error
        return {name: torch.from_numpy(np.require(array, requirements="W")) for name, array in item.items()}

    def teacher(self, batch: dict[str, Tensor], tail: str | None = None) -> SparseLogProbs:
        """The teacher's distribution for a batch of items, on the batch's device, for the losses.

        `tail` is the cache's own tail unless given. If the cache has the tail's log-probability, the probabilities of a
        row are scaled, in fp32, so that they and the tail sum to 1: rounding to fp16 had changed the sum by about 1e-4.

        Raises:
            ValueError: for a tail that needs its log-probability, if the cache has none; for a tail other than
                "truncate", if entries are drawn.
        """
        tail = self.settings.tail if tail is None else tail
        if self.settings.samples and tail != "truncate":
            raise ValueError(f"tail: expected 'truncate' for a teacher with drawn entries; got {tail!r}")
        log_probs, tail_log_prob = batch["log_probs"].float(), batch.get("tail_log_prob")
        if tail in HAVE_TAIL_MASS and tail_log_prob is None:
            raise ValueError(f"tail: {tail!r} needs the tail's log-prob, which {self.settings.tail!r} did not keep")
        if tail_log_prob is not None:
            mass = torch.cat([log_probs, tail_log_prob.float()[..., None]], dim=-1).logsumexp(-1)
            mass = torch.where(mass.isfinite(), mass, 0)  # a row without mass
            log_probs, tail_log_prob = log_probs - mass[..., None], tail_log_prob.float() - mass
        return SparseLogProbs(
            batch["indices"],
            log_probs,
            tail=tail,
            tail_log_prob=tail_log_prob if tail in HAVE_TAIL_MASS else None,
            source_temperature=self.settings.temperature,
            drawn=self.settings.samples > 0,
        )


@torch.no_grad()
def write_teacher(
    model: torch.nn.Module | Callable[[], torch.nn.Module],
    blocks: Tensor,
    directory: str | os.PathLike,
    *,
    k: int,
    samples: int = 0,
    temperature: float = 1.0,
    batch: int = 4,
    vocab_size: int | None = None,
    tokenizer_hash: str | None = None,
    teacher: str | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    ignore_index: int = -100,
    sequences_per_shard: int | None = None,
    progress: bool = True,
) -> TopKCache:
    """Writes the top k of a model over token ids, with a progress bar; continues a cache that an earlier call began.

    If `LinearLogits.from_module` can read the model, and gives the model's own logits on the first tokens, the logits
    come from hidden states and are never stored whole. Otherwise they are the model's own.

    Args:
        model: a causal language model of transformers, or a module with the same call and result; or a function that
            loads it. The function is called after the settings and the text were compared with those of an existing
            cache, and only if sequences are missing.
        blocks: int64 [sequences, T].
        samples: how many of the k entries are drawn from the classes past the k - samples most probable. The cache then
            has the tail "truncate", an unbiased teacher for kl; divergences that are infinite without teacher mass
            refuse it. The seed of each sequence is its number: the drawn entries depend neither on the run nor on
            the batch that wrote them, but for the rounding of the model's logits.
        directory, k, temperature, tokenizer_hash, teacher: see `CacheWriter`.
        batch: sequences per forward.
        vocab_size: the number of classes that count, if the model's logits are padded; None: all.
        labels, mask, document_ids: what the cache stores for each token besides, [sequences, T]: see `CacheWriter`. The
            model does not see them.
        ignore_index: the label of tokens without one: see `CacheWriter`.
        sequences_per_shard: rounded up to whole batches, so that a resumed run has the same batches and, on the same
            machine, gives the same bits. None: about 64 MiB or 60 seconds, in whole batches.

    Raises:
        TypeError, ValueError, RuntimeError: those of `CacheWriter`; and if the sequences on disk are not the first ones
            of `blocks`, with the same labels, mask and document ids. Ids and labels are checked before the first
            sequence is written, and, as far as their range is known without the model, before the model is loaded.
    """
    if not isinstance(model, torch.nn.Module) and not callable(model):
        raise TypeError(
            f"model: expected a torch.nn.Module, or a function that loads one; got {type(model).__name__}; "
            "transformers.AutoModelForCausalLM.from_pretrained loads a model by its name"
        )
    if not isinstance(blocks, Tensor):
        raise TypeError(f"blocks: expected a tensor, int64 [sequences, T]; got {type(blocks).__name__}")
    if blocks.dim() != 2 or blocks.dtype != torch.int64 or blocks.numel() == 0:
        raise ValueError(f"blocks: expected int64 [sequences, T]; got {blocks.dtype} of {list(blocks.shape)}")
    shards.check_int("batch", batch, 1)
    check_ignore_index(ignore_index)
    if sequences_per_shard is not None:
        shards.check_int("sequences_per_shard", sequences_per_shard, 1)
        sequences_per_shard = -(-sequences_per_shard // batch) * batch
    tqdm = import_extra("tqdm").tqdm
    columns = {"labels": labels, "mask": mask, "document_ids": document_ids}
    columns = {name: column for name, column in columns.items() if column is not None}
    settings = {
        "k": k,
        "length": blocks.shape[1],
        "temperature": temperature,
        "tokenizer_hash": tokenizer_hash,
        "teacher": teacher,
        "samples": samples,
        "tail": "truncate" if samples else "bucket",
        "columns": tuple(columns),
    }
    tokens = {"input_ids": blocks} | columns
    named = _compare(path_of(directory), tokens, vocab_size, settings, ignore_index)
    if not isinstance(model, torch.nn.Module):
        if sum(shard.sequences for shard in named) == len(blocks):
            return TopKCache(directory, verify=False)
        model = model()
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model: expected a function that returns a torch.nn.Module; got {type(model).__name__}")
    if (parameter := next(model.parameters(), None)) is None:
        raise ValueError(f"model: expected a module with parameters, which say its device; got {type(model).__name__}")
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if isinstance(embedding, torch.nn.Embedding):  # the model itself would raise without a number, or kill a GPU
        check_ids("blocks", blocks, embedding.num_embeddings)
    device = parameter.device
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        logits_of, width = _logits_of(model, blocks[:1, :8].to(device))
        if vocab_size is not None and vocab_size > width:  # raises before the writer makes a file
            raise ValueError(f"vocab_size: expected at most {width}, the classes of the model; got {vocab_size}")
        settings["vocab_size"] = width if vocab_size is None else vocab_size
        _check_tokens(tokens, settings["vocab_size"], ignore_index)
        with CacheWriter(
            directory, **settings, ignore_index=ignore_index, sequences_per_shard=sequences_per_shard
        ) as writer:
            if writer.shards != named:  # another writer has added shards since the comparison
                _check_text(writer.directory, tokens, writer.settings, writer.shards)
            done = writer.sequences * blocks.shape[1]
            bar = tqdm(
                total=blocks.numel(), initial=done, desc="teacher", unit="token", unit_scale=True, disable=not progress
            )
            with bar:
                for first in range(writer.sequences, len(blocks), batch):
                    ids, *others = (x[first : first + batch] for x in tokens.values())
                    logits = logits_of(ids.to(device))
                    found = _teacher_of(logits, writer.settings, first)
                    writer.append(ids, found, **dict(zip(columns, others, strict=True)))
                    bar.update(ids.numel())
    finally:
        for module in were_training:
            module.training = True
    return TopKCache(directory, verify=False)


def _compare(
    directory: Path, tokens: dict[str, Tensor], vocab_size: int | None, settings: dict, ignore_index: int
) -> list[shards.Shard]:
    """The shards that the directory has already. Raises unless they fit the settings and the text. A vocab_size of None
    fits any."""
    existing = shards.read_manifest(directory)
    if vocab_size is None:  # the model's, which is not known yet
        vocab_size = 2**31 if existing is None else existing[0].vocab_size
    expected = shards.Settings(vocab_size=vocab_size, **settings)
    named = named_shards(directory, expected) or []
    _check_tokens(tokens, expected.vocab_size, ignore_index)
    _check_text(directory, tokens, expected, named)
    return named


def _check_tokens(tokens: dict[str, Tensor], vocab_size: int, ignore_index: int) -> None:
    """Raises for ids, labels, a mask or document ids that the cache of these tokens could not store."""
    for name, column in tokens.items():
        if name == "input_ids":
            check_ids("blocks", column, vocab_size)
        else:
            check_column(name, column, tokens["input_ids"], vocab_size, ignore_index)


def _teacher_of(logits: Tensor | LinearLogits, settings: shards.Settings, first: int) -> SparseLogProbs:
    """The stored teacher of the logits [B, T, V] of some sequences; `first` is the number of the first sequence."""
    k, samples, temperature = settings.k, settings.samples, settings.temperature
    if not samples:
        return topk_log_probs(logits, k, temperature=temperature, vocab_size=settings.vocab_size)
    sequences = [
        sampled_log_probs(
            replace(logits, hidden=logits.hidden[i]) if isinstance(logits, LinearLogits) else logits[i],
            samples,
            exact=k - samples,
            temperature=temperature,
            proposal_temperature=temperature,
            generator=torch.Generator(logits.device).manual_seed(first + i),
            vocab_size=settings.vocab_size,
        )
        for i in range(logits.shape[0])
    ]
    indices, log_probs = (torch.stack([getattr(x, name) for x in sequences]) for name in ("indices", "log_probs"))
    return SparseLogProbs(indices, log_probs, tail="truncate", source_temperature=temperature)


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of a tokenizer's vocabulary with its ids, and of its special tokens. Equal hashes: the same ids."""
    special = sorted(map(str, tokenizer.all_special_tokens))
    vocabulary = sorted((token, int(index)) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([vocabulary, special]).encode()).hexdigest()


def report(directory: str | os.PathLike) -> str:
    """A cache's contents, and its bytes per token next to other formats."""
    settings, named = manifest_of(Path(directory))
    sequences = sum(shard.sequences for shard in named)
    tokens, size = sequences * settings.length, sum(shard.bytes for shard in named)
    bits = packing.row_bits(settings.vocab_size, settings.k) / settings.k
    by_itself = (settings.vocab_size - 1).bit_length()
    tail = " + 2 of the tail" if settings.has_tail_mass else ""
    megatron = 5 * settings.k
    kept = f"top {settings.k - settings.samples}"
    if settings.samples:
        kept += f" and {settings.samples} draws of the rest"
    beside = "".join(f", {name}" for name in settings.columns)
    limit = "" if settings.vocab_size <= 131_072 else "; this vocabulary is past its limit"
    lines = {
        "cache": f"{directory}: {sequences:,} sequences of {settings.length:,} tokens in {len(named)} shard(s)",
        "teacher": f"{settings.teacher or 'not named'}; {kept} of {settings.vocab_size:,} classes, "
        f"temperature {settings.temperature:g}, tail {settings.tail}",
        "tokenizer": settings.tokenizer_hash or "not named",
        "bytes a token": f"{settings.row_bytes} = {settings.index_bytes} of indices + {2 * settings.k} of fp16 "
        f"log-probs{tail}; {settings.other_bytes} more for the token id{beside}",
        "bits an index": f"{bits:.2f} ({by_itself} if each index were packed alone)",
        "on disk": f"{size:,} bytes" + (f", {size / tokens:.1f} a token" if tokens else ""),
        "DistillKit": "344 bytes a token at k = 128, 127 at k = 50 (18 bits an index; most log-probs by a polynomial)",
        "Megatron-LM": f"{megatron} bytes a token at this k (40 bits an entry, before compression, no tail; "
        f"vocabularies up to 131,072{limit})",
    }
    return "\n".join(f"{name:13}  {value}" for name, value in lines.items())


def manifest_of(directory: Path) -> tuple[shards.Settings, list[shards.Shard]]:
    if (manifest := shards.read_manifest(directory)) is None:
        raise ValueError(f"{directory}: expected a cache of teachers; got a directory without {shards.MANIFEST}")
    return manifest


def _logits_of(model, sample: Tensor):
    """The function from ids [B, T] to logits, and the logits' width. The function gives a `LinearLogits` if that gives
    the model's own logits.
    """

    def whole(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    def head(ids: Tensor) -> LinearLogits:
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        return LinearLogits.from_module(hidden, model.get_output_embeddings(), model.config)

    logits = whole(sample)
    try:
        made = head(sample)
    except (AttributeError, TypeError, ValueError):
        return whole, logits.shape[-1]
    if made.hidden.dtype != made.weight.dtype and not torch.is_autocast_enabled(made.device.type):
        return whole, logits.shape[-1]  # the model casts in its own forward
    product = made.scale * torch.nn.functional.linear(made.hidden, made.weight, made.bias)
    if made.softcap is not None:
        product = made.softcap * torch.tanh(product / made.softcap)
    # A model may do more to its logits than its config says.
    same = product.shape == logits.shape and (product - logits).abs().max() <= 0.02 * logits.abs().max()
    return (head if same else whole), logits.shape[-1]


def _check_text(
    directory: Path, tokens: dict[str, Tensor], settings: shards.Settings, named: list[shards.Shard]
) -> None:
    """Raises unless the sequences on disk are the first ones of `tokens`: the ids and the columns."""
    count, first = sum(shard.sequences for shard in named), 0
    if count > len(tokens["input_ids"]):
        raise ValueError(f"{directory}: expected at most the text's {len(tokens['input_ids'])} sequences; got {count}")
    for shard in named:
        last = first + shard.sequences
        stored = shards.ShardReader(directory, shard, settings, checksum=False).read(slice(None), tokens)
        for name, array in stored.items():
            differ = (array != tokens[name][first:last].cpu().numpy()).any(axis=1)
            if differ.any():
                raise ValueError(
                    f"{directory} holds {'another text' if name == 'input_ids' else f'other {name}'}: expected the "
                    f"first {count} sequences of this one; sequence {first + int(differ.argmax())} differs"
                )
        first = last


def import_extra(package: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"kdkernels.cache: {error}; pip install kdkernels[cache]") from error
