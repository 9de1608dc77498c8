"""Teachers from inference servers: turns the log-probabilities of a scored prompt into the teacher of a loss.

vLLM and SGLang score a sequence that is sent as a prompt (the answer included). For each token they return its
log-probability and those of the k most probable tokens at its position. Two properties of that format do not fit a
loss. First, the server's row i describes token i, which the logits at position i - 1 predict. Here row t of every
result belongs to the logits at position t, so it is the server's row t + 1. Second, the server's rows have k or k + 1
entries, may hold the scored token twice, or may be missing. Here a row holds each token once, the largest first; a
missing entry has index -1 and log-probability -inf. A null in an entry means that the entry is missing.

A row is wrong if an entry has no token id (an integer from 0 to 2^31 - 1; a bool, a float or a text is none, but vLLM's
JSON writes ids as texts), if a log-probability is no number, NaN or above 0, if a token other than the scored one
repeats, or if the probabilities sum to more than 1 by more than rounding. A wrong row is not valid in the result, and a
warning names the first. With `strict=True`, or if no right row is left, its error is raised.

Rounding is 0.001; if all numbers of the answer are numbers of bf16 or fp16, also half a unit in each one's last place:
a sum of at most 1.013 for 20 entries of bf16. The teacher of a right row with a sum above 1.001 is scaled to a sum of
1, which the losses demand; token_log_prob stays as served.

The functions recognise the servers' structures by their attributes, and import neither server. They check values, which
costs a synchronisation if the server's tensors are on a GPU.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..distributions import SparseLogProbs
from .served_rows import (
    ROUNDING,
    ServedRows,
    following_tokens,
    rows_of_dicts,
    rows_of_flat,
    rows_of_lists,
    rows_of_tensors,
    rows_of_tokens,
    without_wrong_rows,
)


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
        valid: bool [T], the loss's `mask`: False if the row has no entries or is wrong, and in the last row, whose next
            token is not part of the prompt. (Without the mask, the mean of a "bucket" teacher counts such rows as 0.)
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
    strict: bool = False,
) -> ServedTopK:
    """The prompt log-probabilities of one vLLM request as a top-k teacher.

    `SamplingParams(prompt_logprobs=K)` requests them; K is at most the engine's max_logprobs, 20 by default. A row
    holds the prompt's own token and the K most probable tokens. If the own token is not one of the K, the row has K + 1
    entries; the result keeps the extra entry, since its mass is known. vLLM has three forms:

    - `RequestOutput.prompt_logprobs`, or `prompt_logprobs` in the answer of the OpenAI-compatible server: a list of
      T rows, None for the first token, then {token id: Logprob}, the own token first. The ids may be strings, as in
      JSON; a Logprob may be an object with .logprob, a dict with "logprob", a number, or null.
    - `FlatLogprobs` (`SamplingParams(flat_logprobs=True)`): the same T rows in parallel columns; row i is
      [start_indices[i], end_indices[i]) of token_ids and logprobs.
    - `LogprobsTensors` (`ModelRunnerOutput.prompt_logprobs_dict`): logprob_token_ids and logprobs [T - 1, K + 1], the
      own token in column 0. The engine has no row for the first token, so row i describes token i + 1. A row whose
      ids and log-probabilities (and selected_token_ranks, if given) are all 0 was not filled, and is wrong.

    Rows of generated tokens (`CompletionOutput.logprobs`) describe their own tokens too, and may follow the prompt's
    rows in one list. Without the prompt's rows, they lack the first token's None, and are refused.

    Args:
        prompt_logprobs: one sequence in one of these forms; log-probabilities. See `stack` for batches.
        tail: how the loss treats the mass outside the entries: see `SparseLogProbs`.
        k: keeps the k largest entries of a row, and makes the result k wide. None: as wide as the widest row.
        source_temperature: the temperature of the log-probabilities. vLLM does not apply the request's temperature to
            prompt log-probabilities, so it is 1 unless the engine was changed.
        prompt_token_ids: the T scored tokens (`RequestOutput.prompt_token_ids`). With them, a row without its token
            raises, since it shows that the rows are shifted; and the token is found even if the row lost its order
            (JSON with sorted keys).
        strict: whether a wrong row raises. False: the row is not valid.

    Returns:
        A `ServedTopK` of T rows, log-probabilities fp32, indices int32. Equal log-probabilities stand in the order of
        their ids. A row that is None or empty is not valid.

    Raises:
        TypeError: for another structure.
        ValueError: for a first row that is not None, columns of different lengths, a token that its row does not hold,
            or prompt_token_ids that are no ids.
        TypeError, ValueError: for a wrong row, if `strict`, or if all rows with entries are wrong (log-probabilities
            above 0, for example: the engine's logprobs_mode asks for logits). The message has the row's number in
            prompt_logprobs, its token's, and the entry.

    Source: vLLM's vllm/logprobs.py (Logprob, FlatLogprobs), vllm/v1/outputs.py (LogprobsTensors).
    """
    if hasattr(prompt_logprobs, "logprob_token_ids"):
        rows = rows_of_tensors(prompt_logprobs)
    elif hasattr(prompt_logprobs, "start_indices"):
        rows = rows_of_flat(prompt_logprobs)
    else:
        rows = rows_of_dicts(prompt_logprobs)
    rows = without_wrong_rows(rows, strict)
    token_log_prob = torch.where(rows.indices[:, 0] >= 0, rows.log_probs[:, 0], torch.nan)
    if prompt_token_ids is not None:
        holds_token, token_log_prob = _look_up(prompt_token_ids, rows)
        _refuse_rows(
            ~holds_token & (rows.indices >= 0).any(-1),
            "prompt_token_ids: {row} does not hold that token; the rows are shifted, or belong to another prompt",
        )
    return _served(rows, token_log_prob, tail, k, source_temperature)


def topk_from_sglang(
    input_top_logprobs,
    input_token_logprobs=None,
    *,
    tail: str = "bucket",
    k: int | None = None,
    source_temperature: float = 1.0,
    start: int = 0,
    prompt_token_ids: Sequence[int] | Tensor | None = None,
    strict: bool = False,
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
        strict: whether a wrong row raises. False: the row is not valid.

    Returns:
        A `ServedTopK` of T = start + rows, log-probabilities fp32, indices int32. Equal log-probabilities stand in the
        order of their ids. A row that is None or empty is not valid.

    Raises:
        TypeError: for another structure.
        ValueError: for a row of token 0 that is not None, two lists of different lengths, or tokens that differ from
            prompt_token_ids, or prompt_token_ids that are no ids.
        TypeError, ValueError: for a wrong row, if `strict`, or if all rows with entries are wrong. The message has the
            row's number in the lists, its token's, and the entry.

    Source: SGLang's python/sglang/srt/managers/tokenizer_manager.py (detokenize_top_logprobs_tokens).
    """
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"start: expected the request's logprob_start_len, 0 or more; got {start!r}")
    rows = rows_of_lists("input_top_logprobs", input_top_logprobs, start)
    token_log_prob = torch.full(rows.indices.shape[:1], torch.nan)
    if input_token_logprobs is not None:
        tokens = rows_of_tokens("input_token_logprobs", input_token_logprobs, start, len(input_top_logprobs))
        ids, token_log_prob = tokens.indices[:, 0], tokens.log_probs[:, 0]
        token_log_prob = torch.where(ids >= 0, token_log_prob, torch.nan)
        if prompt_token_ids is not None:
            _refuse_rows(
                (ids >= 0) & (ids != following_tokens(prompt_token_ids, ids)),
                "input_token_logprobs: {row} has another token than prompt_token_ids; the rows are shifted, or belong "
                "to another prompt",
            )
        # The scored token goes last in its row: if it is in the top k too, the top k's entry comes first and is kept.
        # A row without a top k stays empty.
        known = ~token_log_prob.isnan() & (rows.log_probs > -torch.inf).any(-1)
        rows = rows._replace(
            indices=torch.cat([rows.indices, torch.where(known, ids, -1)[:, None]], -1),
            log_probs=torch.cat([rows.log_probs, torch.where(known, token_log_prob, -torch.inf)[:, None]], -1),
            scored=rows.indices.shape[1],
            wrong=tokens.wrong | rows.wrong,
        )
    rows = without_wrong_rows(rows, strict)
    if input_token_logprobs is None and prompt_token_ids is not None:
        _, token_log_prob = _look_up(prompt_token_ids, rows)
    return _served(rows, token_log_prob, tail, k, source_temperature)


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


def _look_up(prompt_token_ids, rows: ServedRows) -> tuple[Tensor, Tensor]:
    """Whether each row holds the token that it describes, and that token's log-probability, else NaN."""
    matches = rows.indices == following_tokens(prompt_token_ids, rows.indices)[:, None]
    holds_token = matches.any(-1)
    entry = matches.int().argmax(-1, keepdim=True)
    return holds_token, torch.where(holds_token, rows.log_probs.gather(-1, entry)[:, 0], torch.nan)


def _served(
    rows: ServedRows, token_log_prob: Tensor, tail: str, k: int | None, source_temperature: float
) -> ServedTopK:
    """The teacher: each token once, the largest first, `k` of them; and the last position, which has no row."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k: expected an integer of 1 or more, or None; got {k!r}")
    there = rows.log_probs > -torch.inf  # not for NaN, which stands for null
    indices, order = torch.where(there, rows.indices, -1).sort(dim=-1, stable=True)
    log_probs = torch.where(there, rows.log_probs, -torch.inf).gather(-1, order)
    repeated = pad(indices[:, 1:] == indices[:, :-1], (1, 0), value=False)
    log_probs = log_probs.masked_fill(repeated, -torch.inf)
    # In a right row such a sum is the rounding of 16 bits.
    mass = log_probs.logsumexp(-1, keepdim=True)
    log_probs = torch.where(mass > math.log1p(ROUNDING), log_probs - mass, log_probs)
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
    if rows.wrong:
        token_log_prob = token_log_prob.index_fill(
            0, torch.tensor(list(rows.wrong), device=token_log_prob.device), torch.nan
        )
    valid = pad(filled.any(-1), (0, 1), value=False)
    return ServedTopK(teacher, pad(token_log_prob, (0, 1), value=torch.nan), valid)


def _refuse_rows(bad: Tensor, message: str):
    if bad.any():
        raise ValueError(message.format(row=f"the row of token {int(bad.int().argmax()) + 1}"))
