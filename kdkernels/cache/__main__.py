"""The command line of `kdkernels.cache`: writes, describes or verifies a cache."""

import argparse
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from . import __doc__ as usage
from . import import_extra, manifest_of, report, shards, tokenizer_hash, write_teacher


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. The exit code is 1, with one line that says what is wrong, after an error that a user can
    mend, and if a shard is damaged."""
    options = _parse(arguments)
    try:
        if options.command == "write":
            _write(options)
        if options.command == "verify":
            return _verify(options.directory)
        print(report(options.directory))
    except (TypeError, ValueError, OSError, RuntimeError, ImportError) as error:
        text = " ".join(str(error).split()) or type(error).__name__  # transformers and torch write several lines
        sys.exit(f"kdkernels.cache: {text.removeprefix('kdkernels.cache: ')}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kdkernels.cache", description=usage.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="run a model over a text, or continue an earlier run")
    write.add_argument("--model", required=True, help="a name or folder that transformers loads")
    write.add_argument("--gguf-file", help="the GGUF file in the model's folder")
    source = write.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 files, in this order")
    source.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="a safetensors file of input_ids [sequences, T] int64 and, to be stored too, labels and document_ids "
        "(int64) and mask (bool) of that shape",
    )
    write.add_argument(
        "--ignore-index", type=int, default=-100, help="with --tokens: the label of tokens without one (default -100)"
    )
    write.add_argument(
        "--document-ids", action="store_true", help="with --text: store the number of each token's file too, from 0"
    )
    write.add_argument("--output", required=True, type=Path, metavar="DIRECTORY", dest="directory")
    write.add_argument("--k", type=int, default=64, help="classes kept for each token (default 64)")
    write.add_argument(
        "--samples",
        type=int,
        default=0,
        help="how many of the k are drawn from the other classes, which makes the teacher unbiased for kl (default 0)",
    )
    write.add_argument("--temperature", type=float, default=1.0)
    write.add_argument(
        "--length",
        type=int,
        default=1024,
        help="with --text: tokens of a sequence; tokens at the end that fill no sequence are left out (default 1024)",
    )
    write.add_argument("--batch", type=int, default=4, help="sequences per forward (default 4)")
    write.add_argument("--vocab-size", type=int, help="classes that count, if the model's logits are padded")
    write.add_argument(
        "--sequences-per-shard", type=int, help="default: a shard ends at 64 MiB, or after a minute of the model's work"
    )
    write.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    write.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, purpose in (("info", "describe a cache, with its bytes per token"), ("verify", "compare every checksum")):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("directory", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "write" and options.document_ids and not options.text:
        parser.error("--document-ids: expected --text; a file of --tokens has its own document_ids")
    if options.command == "write" and options.length < 1:
        parser.error(f"--length: expected at least 1; got {options.length}")
    return options


def _write(options: argparse.Namespace) -> None:
    _check_device(options.device)
    transformers = import_extra("transformers")
    loading = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, **loading)
    if options.tokens:
        columns = _tokens(options.tokens)
    else:
        columns = _blocks(tokenizer, options.text, options.length)
        if not options.document_ids:
            del columns["document_ids"]

    def model():
        if loading and hasattr(transformers, "GgufConfig"):  # newer versions can keep the weights packed
            loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
        dtype = getattr(torch, options.dtype)
        return transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **loading).to(
            options.device
        )

    write_teacher(
        model,
        columns.pop("input_ids"),
        options.directory,
        k=options.k,
        samples=options.samples,
        temperature=options.temperature,
        batch=options.batch,
        vocab_size=options.vocab_size,
        tokenizer_hash=tokenizer_hash(tokenizer),
        ignore_index=options.ignore_index,
        sequences_per_shard=options.sequences_per_shard,
        teacher=" ".join(filter(None, (Path(options.model).name, options.gguf_file, options.dtype))),
        **columns,
    )


def _check_device(name: str) -> None:
    """Raises before the text and the model are read."""
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # AssertionError: a torch without CUDA
        raise ValueError(f"--device {name}: {error}") from error


def _blocks(tokenizer, paths: list[Path], length: int) -> dict[str, Tensor]:
    """The files' tokens [sequences, length], one file after the other, with the end-of-text token between them, and the
    number of each token's file."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [tokenizer(path.read_text(encoding="utf-8")).input_ids + end for path in paths]
    ids = torch.cat([torch.tensor(text, dtype=torch.int64) for text in texts])
    files = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(text) for text in texts]))
    if len(ids) < length:
        raise ValueError(f"text: expected at least {length} tokens, one sequence; got {len(ids)}")
    whole = len(ids) // length * length
    return {"input_ids": ids[:whole].view(-1, length), "document_ids": files[:whole].view(-1, length)}


def _tokens(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of --tokens."""
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file; got {error}") from error
    if "input_ids" not in tensors or not set(tensors) <= {"input_ids", *shards.COLUMNS}:
        raise ValueError(
            f"{path}: expected input_ids and, if they are to be stored, {', '.join(shards.COLUMNS)}; got "
            f"{', '.join(sorted(tensors)) or 'no tensor'}"
        )
    return tensors


def _verify(directory: Path) -> int:
    """Prints a line for each shard; returns 1 if any is damaged."""
    settings, named = manifest_of(directory)
    damaged = 0
    for shard in named:
        try:
            shards.check_shard(directory, shard, settings, checksum=True)
            print(f"{shard.name}  all right")
        except ValueError as error:
            damaged += 1
            print(f"{shard.name}  DAMAGED: {error}")
    print(f"{len(named) - damaged} of {len(named)} shards are all right")
    return int(damaged > 0)


if __name__ == "__main__":
    sys.exit(main())
