"""Teachers from inference servers: turns the log-probabilities of a scored prompt into the teacher of a loss.

vLLM and SGLang score a sequence that is sent as a prompt (the answer included). For each token they return its
log-probability and those of the k most probable tokens at its position. Two properties of that format do not fit a
loss. First, the server's row i describes token i, which the logits at position i - 1 predict. Here row t of every
result belongs to the logits at position t, so it is the server's row t + 1. Second, the server's rows have k or k + 1
entries, may repeat a token, or may be missing. Here a row holds each token once, the largest first; a missing entry has
index -1 and log-probability -inf.

The functions recognise the servers' structures by their attributes, and import neither server. They check values, which
costs a synchronisation if the server's tensors are on a GPU.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..distributions import SparseLogProbs

# vLLM's HTTP server writes -inf, which JSON lacks, as this number (its clamp_prompt_logprobs).
_VLLM_MINUS_INFINITY = -9999.0
# A log-probability may round to just above 0.
_ABOVE_ZERO = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class ServedTopK:
    """A teacher from a server, aligned with the student's logits: row t predicts the token at t + 1.

    ::

        served = topk_from_vllm(output.prompt_logprobs)
        loss = kdkernels.fused_kl(student_logits, served.teacher, mask=served.valid & completion_mask)

    Attributes:
        teacher: log-probabilities [T, K] of the teacher's most probable tokens; T is the number of the prompt's tokens.
            On the CPU, or on the device of the server's tensors.
        token_log_prob: [T] fp32, the teacher's log-probability of the next token. NaN if the server does not give it;
            -inf if the teacher's probability is 0.
        valid: bool [T], the loss's `mask`: False if the row has no entries, and in the last row, whose next token is
            not part of the prompt. (Without the mask, the mean of a "bucket" teacher counts such rows as 0.)
    """

    teacher: SparseLogProbs
    token_log_prob: Tensor
    valid: Tensor

    def to(self, device: torch.device | str) -> "ServedTopK":
        """The same teacher on another device."""
        tail_log_prob = self.teacher.tail_log_prob
        teacher = dataclasses.replace(
            self.teacher,
            indices=self.teacher.indices.to(device),
            log_probs=self.teacher.log_probs.to(device),
            tail_log_prob=None if tail_log_prob is None else tail_log_prob.to(device),
        )
        return ServedTopK(teacher, self.token_log_prob.to(device), self.valid.to(device))


def topk_from_vllm(
    prompt_logprobs,
    *,
    tail: str = "bucket",
    k: int | None = None,
    source_temperature: float = 1.0,
    prompt_token_ids: Sequence[int] | Tensor | None = None,
) -> ServedTopK:
    """The prompt log-probabilities of one vLLM request as a top-k teacher.

    `SamplingParams(prompt_logprobs=K)` requests them; K is at most the engine's max_logprobs, 20 by default. A row
    holds the prompt's own token and the K most probable tokens. If the own token is not one of the K, the row has K + 1
    entries; the result keeps the extra entry, since its mass is known. vLLM has three forms:

    - `RequestOutput.prompt_logprobs`, or `prompt_logprobs` in the answer of the OpenAI-compatible server: a list of
      T rows, None for the first token, then {token id: Logprob}, the own token first. The ids may be strings, as in
      JSON; a Logprob may be an object with .logprob, a dict with "logprob", or a number.
    - `FlatLogprobs` (`SamplingParams(flat_logprobs=True)`): the same T rows in parallel columns; row i is
      [start_indices[i], end_indices[i]) of token_ids and logprobs.
    - `LogprobsTensors` (`ModelRunnerOutput.prompt_logprobs_dict`): logprob_token_ids and logprobs [T - 1, K + 1], the
      own token in column 0. The engine has no row for the first token, so row i describes token i + 1.

    Rows of generated tokens (`CompletionOutput.logprobs`) describe their own tokens too, and may follow the prompt's
    rows in one list. Without the prompt's rows, they lack the first token's None, and are refused.

    Args:
        prompt_logprobs: one sequence in one of these forms; log-probabilities. See `stack` for batches.
        tail: how the loss treats the mass outside the entries: see `SparseLogProbs`.
        k: keeps the k largest entries of a row, and makes the result k wide. None: as wide as the widest row.
        source_temperature: the temperature of the log-probabilities. vLLM does not apply the request's temperature to
            prompt log-probabilities, so it is 1 unless the engine was changed.
        prompt_token_ids: the T scored tokens (`RequestOutput.prompt_token_ids`). With them, a row without its token
            raises, and the token is found even if the row lost its order (JSON with sorted keys).

    Returns:
        A `ServedTopK` of T rows, log-probabilities fp32, indices int32. Equal log-probabilities stand in the order of
        their ids. A row that is None or empty is not valid.

    Raises:
        TypeError: for another structure.
        ValueError: for a first row that is not None, NaN, a log-probability above 0 (the engine's logprobs_mode asks
            for logits), an id below 0, columns of different lengths, or a token that its row does not hold.

    Source: vLLM's vllm/logprobs.py (Logprob, FlatLogprobs), vllm/v1/outputs.py (LogprobsTensors).
    """
    if hasattr(prompt_logprobs, "logprob_token_ids"):
        indices, log_probs = _rows_of_tensors(prompt_logprobs)
    elif hasattr(prompt_logprobs, "start_indices"):
        indices, log_probs = _rows_of_flat(prompt_logprobs)
    else:
        indices, log_probs = _rows_of_dicts(prompt_logprobs)
    token_log_prob = torch.where(indices[:, 0] >= 0, log_probs[:, 0], torch.nan)
    if prompt_token_ids is not None:
        holds_token, token_log_prob = _look_up(prompt_token_ids, indices, log_probs)
        _refuse_rows(
            ~holds_token & (indices >= 0).any(-1),
            "prompt_token_ids: {row} does not hold that token; the rows are shifted, or belong to another prompt",
        )
    _check_values("prompt_logprobs", indices, log_probs)
    return _served(indices, log_probs, token_log_prob, tail, k, source_temperature)


def topk_from_sglang(
    input_top_logprobs,
    input_token_logprobs=None,
    *,
    tail: str = "bucket",
    k: int | None = None,
    source_temperature: float = 1.0,
    start: int = 0,
    prompt_token_ids: Sequence[int] | Tensor | None = None,
) -> ServedTopK:
    """The input log-probabilities of one SGLang request as a top-k teacher.

    `{"return_logprob": True, "top_logprobs_num": K, "logprob_start_len": 0}` requests them; without logprob_start_len
    SGLang returns only those of its output. Each row describes one token, from token logprob_start_len on; the first
    row is None.

    Args:
        input_top_logprobs: meta_info["input_top_logprobs"] of one sequence: rows of [logprob, token id, text or None],
            the most probable first, any number of entries; a row may be None or empty. See `stack` for batches.
        input_token_logprobs: meta_info["input_token_logprobs"]: [logprob or None, token id, text or None] for the same
            rows. It gives token_log_prob, and one more entry if the token is not among the most probable, as in vLLM's
            rows. (SGLang writes 0 for ids past the vocabulary, such as an image's tokens: mask these.)
        tail: how the loss treats the mass outside the entries: see `SparseLogProbs`.
        k: keeps the k largest entries of a row, and makes the result k wide. None: as wide as the widest row.
        source_temperature: the temperature of the log-probabilities. SGLang does not apply the request's temperature to
            input log-probabilities, so it is 1 unless the server was changed.
        start: the request's logprob_start_len. The rows of tokens up to it are not valid.
        prompt_token_ids: the T scored tokens. Without input_token_logprobs, token_log_prob is looked up among the
            entries (NaN if the token is not there). With input_token_logprobs, ids that differ raise.

    Returns:
        A `ServedTopK` of T = start + rows, log-probabilities fp32, indices int32. Equal log-probabilities stand in the
        order of their ids. A row that is None or empty is not valid.

    Raises:
        TypeError: for another structure.
        ValueError: for a row of token 0 that is not None, two lists of different lengths, NaN, a log-probability above
            0, an id below 0, or tokens that differ from prompt_token_ids.

    Source: SGLang's python/sglang/srt/managers/tokenizer_manager.py (detokenize_top_logprobs_tokens).
    """
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"start: expected the request's logprob_start_len, 0 or more; got {start!r}")
    indices, log_probs = _rows_of_lists(input_top_logprobs, start)
    token_log_prob = torch.full(indices.shape[:1], torch.nan)
    if input_token_logprobs is not None:
        tokens, token_log_prob = _columns_of_tokens(input_token_logprobs, len(input_top_logprobs), start)
        if prompt_token_ids is not None:
            expected = _following_tokens(prompt_token_ids, indices)
            _refuse_rows(
                (tokens >= 0) & (tokens != expected),
                "input_token_logprobs: {row} has another token than prompt_token_ids; the rows are shifted, or belong "
                "to another prompt",
            )
        # The scored token goes last in its row: if it is in the top k too, the top k's entry comes first and is kept.
        # A row without a top k stays empty.
        known = ~token_log_prob.isnan() & (indices >= 0).any(-1)
        indices = torch.cat([indices, torch.where(known, tokens, -1)[:, None]], -1)
        log_probs = torch.cat([log_probs, torch.where(known, token_log_prob, -torch.inf)[:, None]], -1)
    elif prompt_token_ids is not None:
        _, token_log_prob = _look_up(prompt_token_ids, indices, log_probs)
    _check_values("input_top_logprobs", indices, log_probs)
    return _served(indices, log_probs, token_log_prob, tail, k, source_temperature)


def stack(served: Sequence[ServedTopK], *, length: int | None = None) -> ServedTopK:
    """Makes one batch of sequences of different lengths and widths.

    Args:
        served: B results of [T_b] rows each, with one tail and source_temperature and on one device.
        length: the T of the batch, if the student's is longer than the longest sequence (pad_to_multiple_of).

    Returns:
        A `ServedTopK` with rows [B, T]; T is the longest sequence's length, or `length`. Rows after a sequence's end
        are not valid: their entries are padding, and their token_log_prob is NaN.

    Raises:
        ValueError: for no results, stacked results, different tails or source temperatures, or a sequence longer than
            `length`.
    """
    if not served:
        raise ValueError("served: expected one result or more; got none")
    teachers = [each.teacher for each in served]
    if any(each.valid.dim() != 1 or each.teacher.tail_log_prob is not None for each in served):
        raise ValueError("served: expected results of topk_from_vllm or topk_from_sglang, of one sequence each")
    kinds = {(teacher.tail, teacher.source_temperature) for teacher in teachers}
    if len(kinds) > 1:
        raise ValueError(f"served: expected one tail and source_temperature; got {sorted(kinds)}")
    longest = max(each.valid.shape[0] for each in served)
    width = max(teacher.indices.shape[-1] for teacher in teachers)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"length: expected at least the longest sequence's {longest}; got {length}")

    def padded(tensors: list[Tensor], value) -> Tensor:
        rows = [(0, length - x.shape[0]) for x in tensors]
        entries = [(0, width - x.shape[1]) if x.dim() == 2 else () for x in tensors]
        return torch.stack([pad(x, (*e, *r), value=value) for x, e, r in zip(tensors, entries, rows, strict=True)])

    teacher = dataclasses.replace(
        teachers[0],
        indices=padded([teacher.indices for teacher in teachers], -1),
        log_probs=padded([teacher.log_probs for teacher in teachers], -torch.inf),
    )
    token_log_prob = padded([each.token_log_prob for each in served], torch.nan)
    return ServedTopK(teacher, token_log_prob, padded([each.valid for each in served], False))


# Below, rows are [T - 1, W], one for each token after the first: row i describes token i + 1, so it is position i.


def _rows_of_tensors(tensors) -> tuple[Tensor, Tensor]:
    indices, log_probs = torch.as_tensor(tensors.logprob_token_ids), torch.as_tensor(tensors.logprobs)
    if indices.is_floating_point() or not log_probs.is_floating_point():
        raise TypeError(
            f"prompt_logprobs: expected logprob_token_ids of integers and logprobs of floats; got {indices.dtype} and "
            f"{log_probs.dtype}"
        )
    if indices.dim() != 2 or indices.shape != log_probs.shape or indices.shape[1] == 0:
        raise ValueError(
            "prompt_logprobs: expected logprob_token_ids and logprobs of one shape [T - 1, K + 1]; got "
            f"{list(indices.shape)} and {list(log_probs.shape)}"
        )
    return indices.long(), log_probs.float()


def _rows_of_flat(flat) -> tuple[Tensor, Tensor]:
    starts, ends, ids, values = (
        _column(flat, name, dtype)
        for name, dtype in (
            ("start_indices", torch.int64),
            ("end_indices", torch.int64),
            ("token_ids", torch.int64),
            ("logprobs", torch.float32),
        )
    )
    if starts.shape != ends.shape or ids.shape != values.shape or starts.dim() != 1 or ids.dim() != 1:
        raise ValueError(
            "prompt_logprobs: expected start_indices and end_indices of one length, token_ids and logprobs of one "
            f"length; got {[list(x.shape) for x in (starts, ends, ids, values)]}"
        )
    _refuse_none("prompt_logprobs", len(starts))
    if (starts < 0).any() or (ends < starts).any() or (ends > len(ids)).any():
        raise ValueError(f"prompt_logprobs: expected 0 <= start_indices <= end_indices <= {len(ids)}, the entries")
    _refuse_first_row("prompt_logprobs", ends[0] > starts[0])
    return _dense(ids, values, starts[1:], (ends - starts)[1:])


def _rows_of_dicts(prompt_logprobs) -> tuple[Tensor, Tensor]:
    if not isinstance(prompt_logprobs, (list, tuple)):
        raise TypeError(
            "prompt_logprobs: expected vLLM's list of dicts, its FlatLogprobs or its LogprobsTensors; got "
            f"{type(prompt_logprobs).__name__}; a request needs SamplingParams(prompt_logprobs=k)"
        )
    _refuse_none("prompt_logprobs", len(prompt_logprobs))
    ids: list[int] = []
    values: list[float] = []
    ends = []
    for row, entries in enumerate(prompt_logprobs):
        if isinstance(entries, Mapping):
            try:
                for token_id, logprob in entries.items():
                    ids.append(int(token_id))
                    values.append(_number(logprob))
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise TypeError(
                    f"prompt_logprobs: row {row}: expected token ids with a Logprob, a dict with 'logprob' or a "
                    f"number; got {_shown(entries)}"
                ) from error
        elif entries is not None:
            raise TypeError(
                f"prompt_logprobs: row {row}: expected None or a dict of one sequence's rows; got {_shown(entries)}; "
                "topk_from_sglang takes SGLang's lists"
            )
        ends.append(len(ids))
    _refuse_first_row("prompt_logprobs", ends[0] > 0)
    indices, log_probs = _dense_to(ends, ids, values)
    return indices, log_probs.masked_fill(log_probs == _VLLM_MINUS_INFINITY, -torch.inf)


def _rows_of_lists(input_top_logprobs, start: int) -> tuple[Tensor, Tensor]:
    _refuse_not_a_list("input_top_logprobs", input_top_logprobs)
    _refuse_none("input_top_logprobs", len(input_top_logprobs), "; a request needs logprob_start_len=0")
    ids: list[int] = []
    values: list[float] = []
    ends = [0] * start
    for row, entries in enumerate(input_top_logprobs):
        if isinstance(entries, (list, tuple)):
            try:
                for logprob, token_id, *_ in entries:
                    values.append(float(logprob))
                    ids.append(operator.index(token_id))
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"input_top_logprobs: row {row}: expected entries [logprob, token id, text]; got {_shown(entries)}"
                ) from error
        elif entries is not None:
            hint = "; topk_from_vllm takes vLLM's dicts" if isinstance(entries, Mapping) else ""
            raise TypeError(f"input_top_logprobs: row {row}: expected None or a list; got {_shown(entries)}{hint}")
        ends.append(len(ids))
    _refuse_first_row("input_top_logprobs", ends[0] > 0, "; rows from a later token need start=logprob_start_len")
    return _dense_to(ends, ids, values)


def _columns_of_tokens(input_token_logprobs, rows: int, start: int) -> tuple[Tensor, Tensor]:
    """The ids (-1 if there is no row) and log-probabilities (NaN if unknown) of the tokens after the first."""
    _refuse_not_a_list("input_token_logprobs", input_token_logprobs)
    if len(input_token_logprobs) != rows:
        raise ValueError(
            f"input_token_logprobs: expected the {rows} rows of input_top_logprobs; got {len(input_token_logprobs)}"
        )
    ids, values = [-1] * start, [torch.nan] * start
    for row, entry in enumerate(input_token_logprobs):
        try:
            logprob, token_id, *_ = entry
            ids.append(operator.index(token_id))
            values.append(torch.nan if logprob is None else float(logprob))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"input_token_logprobs: row {row}: expected [logprob or None, token id, text]; got {_shown(entry)}"
            ) from error
        if logprob is not None and values[-1] != values[-1]:
            raise ValueError(f"input_token_logprobs: the row of token {start + row} has NaN")
    return torch.tensor(ids[1:], dtype=torch.int64), torch.tensor(values[1:], dtype=torch.float32)


def _column(flat, name: str, dtype: torch.dtype) -> Tensor:
    try:
        return torch.as_tensor(getattr(flat, name), dtype=dtype)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"prompt_logprobs: expected numbers in {name} of a FlatLogprobs: {error}") from error


def _number(logprob) -> float:
    if isinstance(logprob, Mapping):
        logprob = logprob["logprob"]
    elif not isinstance(logprob, (float, int)):
        logprob = logprob.logprob
    return float(logprob)


def _dense_to(ends: list[int], ids: list[int], values: list[float]) -> tuple[Tensor, Tensor]:
    """Rows from columns without gaps; row i ends at ends[i]. Drops the first token's row."""
    bounds = torch.tensor(ends, dtype=torch.int64)
    try:
        columns = torch.tensor(ids, dtype=torch.int64), torch.tensor(values, dtype=torch.float32)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"expected token ids below 2^31; got {max(ids)}") from error
    return _dense(*columns, bounds[:-1], bounds.diff())


def _dense(ids: Tensor, values: Tensor, starts: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, W] from flat columns, padded with index -1 and -inf; row i is [starts[i], starts[i] + widths[i])."""
    slots = torch.arange(max(1, int(widths.max())) if len(widths) else 1, device=widths.device)
    beyond = len(ids)  # the position of one padding entry after the last entry
    places = torch.where(slots < widths[:, None], starts[:, None] + slots, beyond)
    return pad(ids, (0, 1), value=-1)[places], pad(values, (0, 1), value=-torch.inf)[places]


def _following_tokens(prompt_token_ids, indices: Tensor) -> Tensor:
    tokens = torch.as_tensor(prompt_token_ids, device=indices.device)
    if tokens.shape != (indices.shape[0] + 1,):
        raise ValueError(
            f"prompt_token_ids: expected the {indices.shape[0] + 1} tokens of the rows; got shape {list(tokens.shape)}"
        )
    return tokens[1:]


def _look_up(prompt_token_ids, indices: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row holds the token that it describes, and that token's log-probability, else NaN."""
    matches = indices == _following_tokens(prompt_token_ids, indices)[:, None]
    holds_token = matches.any(-1)
    entry = matches.int().argmax(-1, keepdim=True)
    return holds_token, torch.where(holds_token, log_probs.gather(-1, entry)[:, 0], torch.nan)


def _check_values(name: str, indices: Tensor, log_probs: Tensor):
    _refuse_rows(log_probs.isnan().any(-1), f"{name}: {{row}} has NaN")
    _refuse_rows(
        (log_probs > _ABOVE_ZERO).any(-1),
        f"{name}: {{row}}: expected log-probabilities, 0 or less; got more (logits, or probabilities?)",
    )
    outside = ((indices < 0) | (indices > torch.iinfo(torch.int32).max)) & (log_probs > -torch.inf)
    _refuse_rows(outside.any(-1), f"{name}: {{row}}: expected token ids from 0 to 2^31 - 1; got others")


def _served(
    indices: Tensor, log_probs: Tensor, token_log_prob: Tensor, tail: str, k: int | None, source_temperature: float
) -> ServedTopK:
    """The teacher: each token once, the largest first, `k` of them; and the last position, which has no row."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k: expected an integer of 1 or more, or None; got {k!r}")
    indices, order = indices.sort(dim=-1, stable=True)
    log_probs = log_probs.gather(-1, order)
    repeated = pad(indices[:, 1:] == indices[:, :-1], (1, 0), value=False)
    log_probs = log_probs.masked_fill(repeated, -torch.inf)
    # A stable sort again: entries of equal log-probability stay in the order of their ids, whatever the server's order.
    log_probs, order = log_probs.sort(dim=-1, descending=True, stable=True)
    filled = log_probs > -torch.inf
    indices = indices.gather(-1, order).masked_fill(~filled, -1).int()
    width = k
    if width is None:
        width = max(1, int(filled.sum(-1).max())) if len(filled) else 1
    room = (0, width - indices.shape[1], 0, 1)  # below 0 it cuts
    teacher = SparseLogProbs(
        pad(indices, room, value=-1),
        pad(log_probs, room, value=-torch.inf),
        tail=tail,
        source_temperature=source_temperature,
    )
    valid = pad(filled.any(-1), (0, 1), value=False)
    return ServedTopK(teacher, pad(token_log_prob, (0, 1), value=torch.nan), valid)


def _refuse_rows(bad: Tensor, message: str):
    if bad.any():
        raise ValueError(message.format(row=f"the row of token {int(bad.int().argmax()) + 1}"))


def _refuse_first_row(name: str, filled: bool | Tensor, hint: str = ""):
    if filled:
        raise ValueError(
            f"{name}: row 0: expected None or no entries, as nothing predicts the first token; got entries{hint}"
        )


def _refuse_none(name: str, rows: int, hint: str = ""):
    if rows == 0:
        raise ValueError(f"{name}: expected a row for each token; got none{hint}")


def _refuse_not_a_list(name: str, given):
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected SGLang's list of rows; got {type(given).__name__}")


def _shown(given) -> str:
    text = repr(given)
    return text if len(text) <= 80 else f"{text[:77]}..."
