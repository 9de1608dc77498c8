"""Shifts labels and masks of tokens to the rows that predict them: `next_token_labels`, `next_token_mask`."""

import torch
from torch import Tensor

from . import options

_STARTS = ("position_ids", "document_ids", "cu_seqlens")


def next_token_labels(
    labels: Tensor,
    *,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Shifts token ids [..., T] so that row t has token t + 1 as its label; a document's last row gets `ignore_index`.

    With these labels a loss takes logits [..., T, V] whole: no slice of the logits, and no copy in backward. Labels
    that a collator has shifted already (transformers' shift_labels) are not shifted again. Under context parallelism,
    shift before the sequence is cut.

    A sequence is one document, unless one of three arguments says where documents of a packed sequence begin:

    Args:
        labels: int64 [..., T], the token ids, with `ignore_index` for prompt and padding.
        position_ids: int32 or int64, shape of the labels: a document begins at a position that is not the one before
            plus 1, which is transformers' rule for masks of packed sequences. Positions of left padding must not count
            up to the first token's.
        document_ids: int32 or int64, shape of the labels: a document begins where the number changes.
        cu_seqlens: int32 or int64 [documents + 1], for one flat sequence [T] or [1, T]: 0 and the end of each document,
            as flash attention takes them.

    Raises:
        TypeError, ValueError: for arguments that do not fit; for position_ids [3, B, T] of a vision-language model,
            which repeat and jump inside a document: pass document_ids.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor; got {type(labels).__name__}")
    if labels.dim() == 0 or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 of shape [..., T]; got {labels.dtype} of {list(labels.shape)}")
    options.check_type("ignore_index", ignore_index, int)
    given = (position_ids, document_ids, cu_seqlens)
    return _shifted(labels, ignore_index, "labels", dict(zip(_STARTS, given, strict=True)))


def next_token_mask(
    mask: Tensor,
    *,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Shifts a mask of tokens [..., T] so that row t is kept if token t + 1 is; a document's last row is dropped.

    A loss masks rows, and row t predicts token t + 1. A mask of tokens, such as attention_mask & completion_mask, is
    one row late: it drops the row that predicts the first token of the completion, and keeps the row after its last.

    Args:
        mask: bool [..., T].
        position_ids, document_ids, cu_seqlens: the documents of a packed sequence, as in `next_token_labels`.

    Raises:
        TypeError, ValueError: as `next_token_labels`.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = f"{mask.dtype}; pass mask.bool()" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor; got {came}")
    if mask.dim() == 0:
        raise ValueError("mask: expected shape [..., T]; got a 0-d tensor")
    return _shifted(mask, False, "mask", dict(zip(_STARTS, (position_ids, document_ids, cu_seqlens), strict=True)))


def _shifted(tokens: Tensor, nothing: int | bool, name: str, starts: dict[str, Tensor | None]) -> Tensor:
    """Tokens [..., T] shifted by one; `nothing` stands in the last row, and where the next token begins a document."""
    starts = {key: x for key, x in starts.items() if x is not None}
    if len(starts) > 1:
        raise ValueError(f"expected at most one of {', '.join(_STARTS)}; got {' and '.join(starts)}")
    shifted = torch.cat([tokens[..., 1:], torch.full_like(tokens[..., :1], nothing)], dim=-1)
    for key, x in starts.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{key}: expected a tensor; got {type(x).__name__}")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{key}: expected int32 or int64; got {x.dtype}")
        if x.device != tokens.device:
            raise ValueError(f"{key}: expected on the device of {name} {tokens.device}; got {x.device}")
        ends = _ends_of(x, tokens, name) if key == "cu_seqlens" else _ends(key, x, tokens, name)
        shifted = shifted.masked_fill(ends, nothing)
    return shifted


def _ends(key: str, x: Tensor, tokens: Tensor, name: str) -> Tensor:
    """Whether a row is the last of its document, from a number per token."""
    if x.shape != tokens.shape:
        hint = ""
        if key == "position_ids" and x.dim() == tokens.dim() + 1:
            hint = "; several positions per token (a vision-language model's) do not show documents: pass document_ids"
        raise ValueError(f"{key}: expected the shape {list(tokens.shape)} of {name}; got {list(x.shape)}{hint}")
    step = 1 if key == "position_ids" else 0
    return torch.nn.functional.pad(x[..., 1:] != x[..., :-1] + step, (0, 1))


def _ends_of(cu_seqlens: Tensor, tokens: Tensor, name: str) -> Tensor:
    """Whether a row is the last of its document, from the documents' ends in a flat sequence."""
    length = tokens.shape[-1]
    if tokens.numel() != length:
        raise ValueError(f"cu_seqlens: expected {name} of one flat sequence, [T] or [1, T]; got {list(tokens.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected shape [documents + 1]; got {list(cu_seqlens.shape)}")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = (int(x) for x in cu_seqlens.aminmax())
        if least < 0 or most > length:
            raise ValueError(f"cu_seqlens: expected from 0 to {length}, the length of {name}; got {least} to {most}")
    starts = torch.zeros(length + 1, dtype=torch.bool, device=tokens.device)
    return starts.index_fill(0, cu_seqlens.long(), True)[1:].view(tokens.shape)
