"""Reads the rows of a server's answer into tensors, and finds the rows that no loss may use.

Rows are [T - 1, W], one for each token after the first: row i describes token i + 1. A row is wrong if one of its
entries has no token id or no log-probability, if it repeats a token id, or if its probabilities sum to more than 1 by
more than rounding. A wrong row becomes padding. An entry with a null is absent.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import callers

# vLLM's HTTP server writes -inf, which JSON lacks, as this number (its clamp_prompt_logprobs).
_VLLM_MINUS_INFINITY = -9999.0
# A log-probability in fp32 may round to just above 0, and the sum of a row to just above 1.
ROUNDING = 1e-3
# The significant bits of the 16-bit dtypes, the coarsest first.
_BITS = {torch.bfloat16: 8, torch.float16: 11}
_LARGEST_ID = torch.iinfo(torch.int32).max


class ServedRows(NamedTuple):
    """The rows as the server gave them.

    `scored` is the column of the scored token where the server adds it to the top k, which may hold it too; None if
    there is no such column. `wrong` has an error for each row of the tensors that is known to be wrong.
    """

    name: str  # the caller's argument
    first: int  # the token that the server's row 0 describes
    indices: Tensor  # int64 [R, W]; -1 for padding
    log_probs: Tensor  # fp32 [R, W]; -inf for padding, NaN for null
    scored: int | None
    wrong: dict[int, Exception]

    def error(self, row: int, expected: str, got: str, kind: type[Exception] = ValueError) -> Exception:
        return _error(self.name, self.first, row + 1, f"expected {expected}; got {got}", kind)


# ---- vLLM's three forms


def rows_of_dicts(prompt_logprobs) -> ServedRows:
    if not isinstance(prompt_logprobs, (list, tuple)):
        raise TypeError(
            "prompt_logprobs: expected vLLM's list of dicts, its FlatLogprobs or its LogprobsTensors; got "
            f"{type(prompt_logprobs).__name__}; a request needs SamplingParams(prompt_logprobs=k)"
        )

    def entries(row) -> Iterable:
        if row is None or isinstance(row, Mapping):
            return () if row is None else row.items()
        raise TypeError(
            f"expected None or a dict of one sequence's rows; got {_start_of(row)}; topk_from_sglang takes SGLang's "
            "lists"
        )

    def read(entry) -> tuple[int, float]:
        token_id, given = entry
        try:
            log_prob = given["logprob"] if isinstance(given, Mapping) else getattr(given, "logprob", given)
        except KeyError:
            raise TypeError("expected a Logprob, a dict with 'logprob' or a number for a token id") from None
        return _checked(token_id, log_prob, texts=True)

    rows = _rows_of_entries("prompt_logprobs", prompt_logprobs, entries, read, lambda entry: repr(dict([entry])))
    minus_infinity = rows.log_probs == _VLLM_MINUS_INFINITY
    return rows._replace(log_probs=rows.log_probs.masked_fill(minus_infinity, -torch.inf))


def rows_of_flat(flat) -> ServedRows:
    names = ("start_indices", "end_indices", "token_ids", "logprobs")
    starts, ends, ids, log_probs = columns = [_as_list(getattr(flat, name, None), name) for name in names]
    if len(starts) != len(ends) or len(ids) != len(log_probs):
        raise ValueError(
            "prompt_logprobs: expected start_indices and end_indices of one length, token_ids and logprobs of one "
            f"length; got {[[len(column)] for column in columns]}"
        )
    for name, column in zip(names[:2], (starts, ends), strict=True):
        for value in column:
            if (number := _integer(value)) is None or not 0 <= number <= len(ids):
                raise (TypeError if number is None else ValueError)(
                    f"prompt_logprobs: {name}: expected integers, 0 <= start_indices <= end_indices <= {len(ids)}, the "
                    f"entries; got {value!r}"
                )
    bounds = [(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
    for start, end in bounds:
        if start > end:
            raise ValueError(
                f"prompt_logprobs: expected 0 <= start_indices <= end_indices <= {len(ids)}, the entries; got a row "
                f"from {start} to {end}"
            )
    rows = [list(zip(ids[start:end], log_probs[start:end], strict=True)) for start, end in bounds]
    return _rows_of_pairs(rows, first=0)


def rows_of_tensors(tensors) -> ServedRows:
    given_ids, given_log_probs = tensors.logprob_token_ids, tensors.logprobs
    if isinstance(given_ids, (list, tuple)) and isinstance(given_log_probs, (list, tuple)):
        if len(given_ids) != len(given_log_probs):
            raise ValueError(
                "prompt_logprobs: expected logprob_token_ids and logprobs of one length; got "
                f"{len(given_ids)} and {len(given_log_probs)} rows"
            )

        def pairs(row) -> Iterable:
            for part in row:
                if not isinstance(part, (list, tuple)):
                    raise TypeError(f"expected lists of token ids and log-probabilities; got {_start_of(part)}")
            if len(row[0]) != len(row[1]):
                raise ValueError(f"expected a log-probability for each token id; got {len(row[1])} for {len(row[0])}")
            return zip(*row, strict=True)

        rows = _rows_of_pairs(list(zip(given_ids, given_log_probs, strict=True)), first=1, entries=pairs)
        return _without_unfilled(rows, tensors)
    indices, log_probs = torch.as_tensor(given_ids), torch.as_tensor(given_log_probs)
    if not _is_integer(indices.dtype) or not log_probs.is_floating_point():
        raise TypeError(
            f"prompt_logprobs: expected logprob_token_ids of integers and logprobs of floats; got {indices.dtype} and "
            f"{log_probs.dtype}"
        )
    if indices.dim() != 2 or indices.shape != log_probs.shape or indices.shape[1] == 0:
        raise ValueError(
            "prompt_logprobs: expected logprob_token_ids and logprobs of one shape [T - 1, K + 1]; got "
            f"{list(indices.shape)} and {list(log_probs.shape)}"
        )
    rows = ServedRows("prompt_logprobs", 1, indices.long(), log_probs.float(), 0, {})
    indices, log_probs = rows.indices, rows.log_probs
    outside = ((indices < 0) | (indices > _LARGEST_ID)) & (log_probs > -torch.inf)
    bad = log_probs.isnan() | (log_probs > ROUNDING) | outside
    for row in _numbers_of(bad.any(-1)):
        column = int(bad[row].int().argmax())
        pair = indices[row, column].item(), log_probs[row, column].item()
        try:
            _checked(*pair)
        except ValueError as error:
            rows.wrong[row] = _error(rows.name, rows.first, row + 1, f"{error}; got {_shown_pair(pair)}", ValueError)
    return _without_unfilled(rows, tensors)


def _without_unfilled(rows: ServedRows, tensors) -> ServedRows:
    """The rows, with those that the engine has not filled among the wrong ones.

    An engine fills the rows of a prompt in parts. A row that it has not filled may be 0 throughout. The row of a
    certain token 0 may be 0 throughout too, but its rank is 1.
    """
    unfilled = ((rows.indices == 0) & (rows.log_probs == 0)).all(-1)
    ranks = getattr(tensors, "selected_token_ranks", None)
    if ranks is not None and len(ranks) == len(unfilled):
        unfilled &= torch.as_tensor(ranks, device=unfilled.device) < 1
    for row in _numbers_of(unfilled):
        rows.wrong[row] = rows.error(
            row, "token ids and their log-probabilities", "zeros alone: the row was not filled"
        )
    return rows


# ---- SGLang's lists


def rows_of_lists(name: str, given, start: int) -> ServedRows:
    """The rows of input_top_logprobs."""
    _refuse_not_a_list(name, given)

    def entries(row) -> Iterable:
        if row is None or isinstance(row, (list, tuple)):
            return () if row is None else row
        hint = "; topk_from_vllm takes vLLM's dicts" if isinstance(row, Mapping) else ""
        raise TypeError(f"expected None or a list; got {_start_of(row)}{hint}")

    hints = ("; a request needs logprob_start_len=0", "; rows from a later token need start=logprob_start_len")
    return _rows_of_entries(name, given, entries, _list_entry, repr, first=start, hints=hints)


def rows_of_tokens(name: str, given, start: int, rows: int) -> ServedRows:
    """The rows of input_token_logprobs, as many as `rows`: one entry each."""
    _refuse_not_a_list(name, given)
    if len(given) != rows:
        raise ValueError(f"{name}: expected the {rows} rows of input_top_logprobs; got {len(given)}")
    return _rows_of_entries(name, given, lambda entry: (entry,), _list_entry, repr, first=start, predicts_first=True)


def _list_entry(entry) -> tuple[int, float]:
    if entry is None:
        return -1, math.nan
    try:
        log_prob, token_id, *_ = entry
    except (TypeError, ValueError):
        raise TypeError("expected entries [logprob, token id, text]") from None
    if token_id is None:
        return -1, math.nan
    return _checked(token_id, log_prob)


# ---- common to all forms


def without_wrong_rows(rows: ServedRows, strict: bool) -> ServedRows:
    """The rows with padding in place of the wrong ones.

    Raises the first wrong row's error if `strict`, or if no other row has entries. Else warns of it.
    """
    indices, there = rows.indices, rows.log_probs > -torch.inf  # NaN, which stands for null, is not there
    others, log_probs = torch.where(there, indices, -1), torch.where(there, rows.log_probs, -torch.inf)
    if rows.scored is not None:
        scored = others[:, rows.scored].clone()
        others[:, rows.scored] = -1
        copies = (scored >= 0)[:, None] & (others == scored[:, None])
        # The first entry of a token is kept, and the mass counts the kept entries alone.
        if rows.scored == 0:
            log_probs = torch.where(copies, -torch.inf, log_probs)
        else:
            log_probs[:, rows.scored] = torch.where(copies.any(-1), -torch.inf, log_probs[:, rows.scored])
    ordered = others.sort(-1).values
    repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    wrong = dict(rows.wrong)
    for row in _numbers_of(repeats.any(-1)):
        token_id = int(ordered[row, 1:][repeats[row]][0])
        at = there[row] & (indices[row] == token_id)
        got = f"token id {token_id} with the log-probabilities {rows.log_probs[row, at].tolist()}"
        wrong.setdefault(row, rows.error(row, "each token id once (the scored token's once more)", got))
    mass = log_probs.exp().sum(-1)
    for row in _numbers_of((log_probs - _rounding_of(log_probs)).exp().sum(-1) > 1 + ROUNDING):
        wrong.setdefault(row, rows.error(row, "probabilities with a sum of at most 1", f"a sum of {mass[row]:.6g}"))
    if not wrong:
        return rows
    is_wrong = torch.zeros(len(indices), dtype=torch.bool, device=indices.device)
    is_wrong[list(wrong)] = True
    error = wrong[min(wrong)]
    if strict or not there[~is_wrong].any():
        raise error
    callers.warn(
        f"{len(wrong)} of {len(indices)} rows are wrong, and not valid in the result. The first: {error}",
    )
    return rows._replace(
        indices=indices.masked_fill(is_wrong[:, None], -1),
        log_probs=rows.log_probs.masked_fill(is_wrong[:, None], -torch.inf),
        wrong=wrong,
    )


def _rounding_of(log_probs: Tensor) -> Tensor:
    """How far each log-probability may lie above the number that it was before a server stored it in 16 bits.

    A number x in [2^e, 2^(e+1)) of b significant bits is off by up to 2^(e - b), which is at most 2^-b |x|: b is 8 for
    bf16. So the true probabilities are at least exp(x - 2^(e - b)), and a row is wrong only if these sum to more than
    1. To first order the sum of a right row of K entries is at most 1 + sum p 2^-b |log p| <= 1 + 2^-b log K, K >= 3:
    1.012 for 20 entries of bf16. An answer is in 16 bits if every one of its numbers is one of that dtype. The rounding
    is 0 in fp32.
    """
    finite = torch.where(log_probs.isinf(), 0, log_probs)
    for dtype, bits in _BITS.items():
        if torch.equal(finite.to(dtype).float(), finite):
            exponent = torch.frexp(finite).exponent - 1
            return torch.where(finite == 0, 0, torch.ldexp(torch.ones_like(finite), exponent - bits))
    return torch.zeros_like(finite)


def following_tokens(prompt_token_ids, indices: Tensor) -> Tensor:
    """The scored tokens after the first."""
    if isinstance(prompt_token_ids, (list, tuple)):
        for given in prompt_token_ids:
            if _integer(given) is None:
                raise TypeError(f"prompt_token_ids: expected integers; got {given!r}")
    tokens = torch.as_tensor(prompt_token_ids, device=indices.device)
    if tokens.shape != (indices.shape[0] + 1,):
        raise ValueError(
            f"prompt_token_ids: expected the {indices.shape[0] + 1} tokens of the rows; got shape {list(tokens.shape)}"
        )
    if not _is_integer(tokens.dtype):
        raise TypeError(f"prompt_token_ids: expected integers; got {tokens.dtype}")
    if ((tokens < 0) | (tokens > _LARGEST_ID)).any():  # -1 would match padding
        token = int(((tokens < 0) | (tokens > _LARGEST_ID)).int().argmax())
        raise ValueError(f"prompt_token_ids: expected ids from 0 to 2^31 - 1; got {int(tokens[token])} (token {token})")
    return tokens[1:]


def _refuse_not_a_list(name: str, given):
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected SGLang's list of rows; got {type(given).__name__}")


def _rows_of_entries(
    name: str,
    rows,
    entries: Callable,
    read: Callable,
    show: Callable,
    *,
    first: int = 0,
    predicts_first: bool = False,
    hints: tuple[str, str] = ("", ""),
) -> ServedRows:
    """Rows from lists. `entries` gives the entries of a row, and `read` an entry's token id and log-probability; both
    raise for a wrong row. `show` gives an entry's text for errors. `predicts_first`: token 0 may have a row, which is
    left out."""
    if not rows:
        raise ValueError(f"{name}: expected a row for each token; got none{hints[0]}")
    ids: list[int] = []
    values: list[float] = []
    wrong: dict[int, Exception] = {}
    ends = [0] * first
    for token, row in enumerate(rows, first):
        begin, got = len(ids), ""
        try:
            for entry in entries(row):
                try:
                    token_id, log_prob = read(entry)
                except (TypeError, ValueError):
                    got = f"; got {show(entry)}"
                    raise
                ids.append(token_id)
                values.append(log_prob)
        except (TypeError, ValueError) as error:
            del ids[begin:], values[begin:]
            kind = TypeError if isinstance(error, TypeError) else ValueError
            error = _error(name, first, token, f"{error}{got}", kind)
            if token == 0:  # an answer that begins with another row has another form
                raise error from None
            wrong[token - 1] = error
        ends.append(len(ids))
    if ends[0] > 0 and not predicts_first:
        raise ValueError(
            f"{name}: row 0: expected None or no entries, as nothing predicts the first token; got entries{hints[1]}"
        )
    bounds = torch.tensor(ends, dtype=torch.int64)
    columns = torch.tensor(ids, dtype=torch.int64), torch.tensor(values, dtype=torch.float32)
    return ServedRows(name, first, *_dense(*columns, bounds[:-1], bounds.diff()), None, wrong)


def _dense(ids: Tensor, values: Tensor, starts: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, W] from flat columns, padded with index -1 and -inf; row i is [starts[i], starts[i] + widths[i])."""
    slots = torch.arange(max(1, int(widths.max())) if len(widths) else 1, device=widths.device)
    beyond = len(ids)  # the position of one padding entry after the last entry
    places = torch.where(slots < widths[:, None], starts[:, None] + slots, beyond)
    return pad(ids, (0, 1), value=-1)[places], pad(values, (0, 1), value=-torch.inf)[places]


def _rows_of_pairs(rows: list, first: int, entries: Callable = iter) -> ServedRows:
    """Rows of (token id, log-probability), the scored token's first."""

    def read(pair) -> tuple[int, float]:
        return _checked(*pair)

    return _rows_of_entries("prompt_logprobs", rows, entries, read, _shown_pair, first=first)._replace(scored=0)


def _shown_pair(pair) -> str:
    return f"token id {pair[0]!r} with log-probability {pair[1]!r}"


def _checked(token_id, log_prob, texts: bool = False) -> tuple[int, float]:
    """An entry's token id and log-probability, NaN for null. `texts`: the id may be written as a text, as in JSON."""
    if type(token_id) is int and type(log_prob) is float and log_prob <= 0 <= token_id <= _LARGEST_ID:
        return token_id, log_prob
    number = _integer(token_id, texts)
    if number is None:
        raise TypeError("expected a token id, an integer")
    inside = 0 <= number <= _LARGEST_ID
    if log_prob is None:
        return (number if inside else -1), math.nan
    value = _float(log_prob)
    if value is None:
        raise TypeError("expected a log-probability, a number")
    if math.isnan(value):
        raise ValueError("expected a log-probability or null")
    if value > ROUNDING:
        raise ValueError("expected a log-probability, 0 or less (no logit and no probability)")
    if not inside and value > -math.inf:
        raise ValueError("expected a token id from 0 to 2^31 - 1")
    return (number if inside else -1), value


def _integer(given, texts: bool = False) -> int | None:
    """The integer that `given` is, or writes in digits alone if `texts`; else None. A bool is none."""
    if type(given) is int:
        return given
    try:
        if isinstance(given, str):
            number = int(given) if texts else None
            return number if str(number) == given else None
        return None if _is_bool(given) else operator.index(given)
    except (TypeError, ValueError):
        return None


def _float(given) -> float | None:
    if type(given) is float:
        return given
    if _is_bool(given) or isinstance(given, (str, bytes, bytearray)):
        return None
    try:
        return float(given)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return None


def _is_bool(given) -> bool:
    return isinstance(given, bool) or str(getattr(given, "dtype", "")).endswith("bool")


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _as_list(column, name: str) -> list:
    if hasattr(column, "tolist"):
        column = column.tolist()
    if not isinstance(column, (list, tuple)):
        raise TypeError(f"prompt_logprobs: expected a list in {name} of a FlatLogprobs; got {type(column).__name__}")
    return list(column)


def _numbers_of(rows: Tensor) -> list[int]:
    """The numbers of the rows that are True."""
    return rows.nonzero()[:, 0].tolist()


def _error(name: str, first: int, token: int, text: str, kind: type[Exception]) -> Exception:
    return kind(f"{name}: row {token - first} (token {token}): {text}")


def _start_of(row) -> str:
    """A row of another kind: its repr, which may be as long as a batch, up to 80 characters."""
    text = repr(row)
    return text if len(text) <= 80 else f"{text[:77]}..."
