"""The responses of inference servers become teachers. Row t must hold the distribution that the logits at t predict."""

import json
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdkernels import fused_kl
from kdkernels.teachers.servers import ServedTopK, stack, topk_from_sglang, topk_from_vllm

NAN, INF = math.nan, math.inf

# ---- the servers' own structures


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)


class LogprobsTensors(NamedTuple):
    logprob_token_ids: torch.Tensor
    logprobs: torch.Tensor
    selected_token_ranks: torch.Tensor
    cu_num_generated_tokens: list[int] | None = None


# ---- one sequence, "The capital of France is Paris", scored with K = 3, in every form

TOKENS = [785, 6722, 315, 9625, 374, 12095]

DICTS = [
    None,
    {
        6722: Logprob(-6.28125, 53, " capital"),  # the prompt's token is not in the top three
        1124: Logprob(-2.875, 1, " following"),
        220: Logprob(-3.0625, 2, " "),
        2701: Logprob(-3.28125, 3, " given"),
    },
    {
        315: Logprob(-0.58203125, 1, " of"),
        3283: Logprob(-2.140625, 2, " city"),
        374: Logprob(-3.765625, 3, " is"),
    },
    {
        9625: Logprob(-3.53125, 2, " France"),  # rank 2: the prompt's token comes first, whatever its rank
        279: Logprob(-1.0390625, 1, " the"),
        5616: Logprob(-3.96875, 3, " China"),
    },
    {
        374: Logprob(-2.84375, 4, " is"),
        13: Logprob(-2.09375, 1, "."),
        58883: Logprob(-2.34375, 2, " ____"),
        11: Logprob(-2.40625, 3, ","),
    },
    {
        12095: Logprob(-0.73046875, 1, " Paris"),
        2130: Logprob(-2.734375, 2, " __"),
        32671: Logprob(-3.046875, 3, " ____"),
    },
]

JSON = json.loads("""
[null,
 {"6722": {"logprob": -6.28125, "rank": 53, "decoded_token": " capital"},
  "1124": {"logprob": -2.875, "rank": 1, "decoded_token": " following"},
  "220": {"logprob": -3.0625, "rank": 2, "decoded_token": " "},
  "2701": {"logprob": -3.28125, "rank": 3, "decoded_token": " given"}},
 {"315": {"logprob": -0.58203125, "rank": 1, "decoded_token": " of"},
  "3283": {"logprob": -2.140625, "rank": 2, "decoded_token": " city"},
  "374": {"logprob": -3.765625, "rank": 3, "decoded_token": " is"}},
 {"9625": {"logprob": -3.53125, "rank": 2, "decoded_token": " France"},
  "279": {"logprob": -1.0390625, "rank": 1, "decoded_token": " the"},
  "5616": {"logprob": -3.96875, "rank": 3, "decoded_token": " China"}},
 {"374": {"logprob": -2.84375, "rank": 4, "decoded_token": " is"},
  "13": {"logprob": -2.09375, "rank": 1, "decoded_token": "."},
  "58883": {"logprob": -2.34375, "rank": 2, "decoded_token": " ____"},
  "11": {"logprob": -2.40625, "rank": 3, "decoded_token": ","}},
 {"12095": {"logprob": -0.73046875, "rank": 1, "decoded_token": " Paris"},
  "2130": {"logprob": -2.734375, "rank": 2, "decoded_token": " __"},
  "32671": {"logprob": -3.046875, "rank": 3, "decoded_token": " ____"}}]
""")

NUMBERS = [
    None,
    {6722: -6.28125, 1124: -2.875, 220: -3.0625, 2701: -3.28125},
    {315: -0.58203125, 3283: -2.140625, 374: -3.765625},
    {9625: -3.53125, 279: -1.0390625, 5616: -3.96875},
    {374: -2.84375, 13: -2.09375, 58883: -2.34375, 11: -2.40625},
    {12095: -0.73046875, 2130: -2.734375, 32671: -3.046875},
]

# K + 1 columns per row: the prompt's token, then the top three, which may repeat it.
IDS = [
    [6722, 1124, 220, 2701],
    [315, 315, 3283, 374],
    [9625, 279, 9625, 5616],
    [374, 13, 58883, 11],
    [12095, 12095, 2130, 32671],
]
LOG_PROBS = [
    [-6.28125, -2.875, -3.0625, -3.28125],
    [-0.58203125, -0.58203125, -2.140625, -3.765625],
    [-3.53125, -1.0390625, -3.53125, -3.96875],
    [-2.84375, -2.09375, -2.34375, -2.40625],
    [-0.73046875, -0.73046875, -2.734375, -3.046875],
]
RANKS = [53, 1, 2, 4, 1]

TENSORS = LogprobsTensors(torch.tensor(IDS, dtype=torch.int32), torch.tensor(LOG_PROBS), torch.tensor(RANKS).int())

FLAT = FlatLogprobs(
    start_indices=[0, 0, 4, 8, 12, 16],
    end_indices=[0, 4, 8, 12, 16, 20],
    token_ids=[x for row in IDS for x in row],
    logprobs=[x for row in LOG_PROBS for x in row],
    ranks=[x for rank in RANKS for x in (rank, 1, 2, 3)],
    decoded_tokens=[None] * 20,
)

INPUT_TOP_LOGPROBS = [
    None,
    [[-2.875, 1124, None], [-3.0625, 220, None], [-3.28125, 2701, None]],
    [[-0.58203125, 315, None], [-2.140625, 3283, None], [-3.765625, 374, None]],
    [[-1.0390625, 279, None], [-3.53125, 9625, None], [-3.96875, 5616, None]],
    [[-2.09375, 13, None], [-2.34375, 58883, None], [-2.40625, 11, None]],
    [[-0.73046875, 12095, None], [-2.734375, 2130, None], [-3.046875, 32671, None]],
]
INPUT_TOKEN_LOGPROBS = [
    [None, 785, None],
    [-6.28125, 6722, None],
    [-0.58203125, 315, None],
    [-3.53125, 9625, None],
    [-2.84375, 374, None],
    [-0.73046875, 12095, None],
]

FORMS = {
    "vllm dicts": lambda **options: topk_from_vllm(DICTS, **options),
    "vllm json": lambda **options: topk_from_vllm(JSON, **options),
    "vllm numbers": lambda **options: topk_from_vllm(NUMBERS, **options),
    "vllm flat": lambda **options: topk_from_vllm(FLAT, **options),
    "vllm tensors": lambda **options: topk_from_vllm(TENSORS, **options),
    "sglang": lambda **options: topk_from_sglang(INPUT_TOP_LOGPROBS, INPUT_TOKEN_LOGPROBS, **options),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def same(got: ServedTopK, want: ServedTopK) -> bool:
    return (
        torch.equal(got.teacher.indices, want.teacher.indices)
        and torch.equal(got.teacher.log_probs, want.teacher.log_probs)
        and torch.equal(got.valid, want.valid)
        and torch.equal(got.token_log_prob.nan_to_num(7.0), want.token_log_prob.nan_to_num(7.0))
    )


@each_form
def test_a_recorded_sequence(form):
    served = form()
    assert served.teacher.indices.tolist() == [
        [1124, 220, 2701, 6722],
        [315, 3283, 374, -1],
        [279, 9625, 5616, -1],
        [13, 58883, 11, 374],
        [12095, 2130, 32671, -1],
        [-1, -1, -1, -1],
    ]
    assert served.teacher.log_probs.tolist() == [
        [-2.875, -3.0625, -3.28125, -6.28125],
        [-0.58203125, -2.140625, -3.765625, -INF],
        [-1.0390625, -3.53125, -3.96875, -INF],
        [-2.09375, -2.34375, -2.40625, -2.84375],
        [-0.73046875, -2.734375, -3.046875, -INF],
        [-INF, -INF, -INF, -INF],
    ]
    assert served.valid.tolist() == [True, True, True, True, True, False]
    assert served.token_log_prob[:-1].tolist() == [-6.28125, -0.58203125, -3.53125, -2.84375, -0.73046875]
    assert served.token_log_prob[-1].isnan()
    assert served.teacher.indices.dtype == torch.int32
    assert served.teacher.log_probs.dtype == served.token_log_prob.dtype == torch.float32
    assert (served.teacher.tail, served.teacher.source_temperature) == ("bucket", 1.0)


@each_form
def test_k_keeps_the_largest_and_fixes_the_width(form):
    served = form(k=3, tail="renormalize", source_temperature=0.5)
    assert served.teacher.indices.tolist() == [
        [1124, 220, 2701],
        [315, 3283, 374],
        [279, 9625, 5616],
        [13, 58883, 11],
        [12095, 2130, 32671],
        [-1, -1, -1],
    ]
    assert served.token_log_prob[0] == -6.28125, "token_log_prob must be known although the token is no entry"
    assert (served.teacher.tail, served.teacher.source_temperature) == ("renormalize", 0.5)
    wide = form(k=6)
    assert wide.teacher.indices.shape == wide.teacher.log_probs.shape == (6, 6)
    assert (wide.teacher.indices[:, 4:] == -1).all() and (wide.teacher.log_probs[:, 4:] == -INF).all()
    assert torch.equal(wide.teacher.indices[:, :4], form().teacher.indices)


# ---- the shift


class Scored(NamedTuple):
    """A sequence's logits as a server scores them."""

    tokens: torch.Tensor
    log_probs: torch.Tensor  # [T, V]
    top: torch.return_types.topk

    @classmethod
    def draw(cls, length, vocab, k, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(length, vocab, generator=generator)
        tokens = torch.randint(vocab, (length,), generator=generator)
        log_probs = logits.to(dtype).float().log_softmax(-1)
        return cls(tokens, log_probs, log_probs.topk(min(k, vocab), -1))

    def own(self, t: int) -> tuple[int, float]:
        """The token after position t, and its log-probability."""
        token = int(self.tokens[t + 1])
        return token, float(self.log_probs[t, token])

    def rows(self):
        """For each token after the first, yields the token itself and then the top k."""
        for t in range(len(self.tokens) - 1):
            top = zip(self.top.indices[t].tolist(), self.top.values[t].tolist(), strict=True)
            yield [self.own(t), *top]

    def vllm_dicts(self):
        return [None, *({token: Logprob(value) for token, value in row} for row in self.rows())]

    def vllm_json(self):
        rows = [None, *({str(token): {"logprob": value} for token, value in row} for row in self.rows())]
        return json.loads(json.dumps(rows))

    def vllm_flat(self):
        flat = FlatLogprobs(start_indices=[0], end_indices=[0])
        for row in self.rows():
            flat.start_indices.append(len(flat.token_ids))
            flat.token_ids += [token for token, _ in row]
            flat.logprobs += [value for _, value in row]
            flat.end_indices.append(len(flat.token_ids))
        return flat

    def vllm_tensors(self):
        ids = torch.cat([self.tokens[1:, None], self.top.indices[:-1]], -1)
        values = self.log_probs[:-1].gather(-1, ids)
        ranks = (self.log_probs[:-1] >= values[:, :1]).sum(-1)
        return LogprobsTensors(ids.int(), values, ranks.int())

    def sglang(self):
        top = [None, *([[value, token, None] for token, value in row[1:]] for row in self.rows())]
        own = [[None, int(self.tokens[0]), None], *([row[0][1], row[0][0], None] for row in self.rows())]
        return top, own


scored = st.builds(
    Scored.draw,
    length=st.integers(1, 7),
    vocab=st.integers(1, 40),
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),  # bf16 has ties
    seed=st.integers(0, 2**31),
)


@given(scored)
def test_row_t_is_of_the_logits_at_t(scored):
    length = len(scored.tokens)
    served = topk_from_vllm(scored.vllm_dicts())
    assert served.valid.tolist() == [True] * (length - 1) + [False]
    assert served.token_log_prob[-1].isnan()
    for t in range(length - 1):
        want = dict([scored.own(t), *zip(scored.top.indices[t].tolist(), scored.top.values[t].tolist(), strict=True)])
        entries = served.teacher.indices[t] >= 0
        indices, log_probs = served.teacher.indices[t][entries].tolist(), served.teacher.log_probs[t][entries].tolist()
        assert dict(zip(indices, log_probs, strict=True)) == want
        assert len(indices) == len(want), "a token appears twice"
        assert log_probs == sorted(log_probs, reverse=True) and not entries[len(want) :].any()
        assert (served.teacher.log_probs[t][~entries] == -INF).all()
        assert served.token_log_prob[t] == scored.log_probs[t, scored.tokens[t + 1]]


@given(scored, st.sampled_from([None, 1, 3, 20]), st.booleans())
def test_all_forms_agree(scored, k, with_tokens):
    options = {"k": k, "prompt_token_ids": scored.tokens.tolist() if with_tokens else None}
    want = topk_from_vllm(scored.vllm_dicts(), **options)
    for form in (scored.vllm_json(), scored.vllm_flat(), scored.vllm_tensors()):
        assert same(topk_from_vllm(form, **options), want)
    assert same(topk_from_sglang(*scored.sglang(), **options), want)


def test_the_servers_are_aligned_alike():
    """Both servers' rows must align with the same logits: a shift by one token would shift the loss."""
    logits, tokens = torch.randn(6, 20), torch.randint(20, (6,))
    log_probs = logits.log_softmax(-1)
    scored = Scored(tokens, log_probs, log_probs.topk(4, -1))
    for served in (topk_from_vllm(scored.vllm_dicts(), k=4), topk_from_sglang(*scored.sglang(), k=4)):
        teacher = served.teacher
        student = logits.log_softmax(-1).gather(-1, teacher.indices.clamp(min=0).long())
        assert torch.equal(student[served.valid], teacher.log_probs[served.valid])
        assert torch.equal(teacher.indices[:-1, 0].long(), logits.argmax(-1)[:-1])


# ---- rows that are short, missing, or repeat a token


def bucket_kl(student_logits, teacher):
    """KL over the entries plus one class for all other classes, row by row, in plain PyTorch."""
    losses = []
    for logits, indices, log_probs in zip(student_logits, teacher.indices, teacher.log_probs, strict=True):
        p, lq = log_probs.exp(), logits.log_softmax(-1)[indices.clamp(min=0).long()]
        q = torch.where(indices >= 0, lq, -INF).exp()
        rest_p, rest_q = 1 - p.sum(), 1 - q.sum()
        kept = indices >= 0
        losses.append((p[kept] * (log_probs[kept] - lq[kept])).sum() + rest_p * (rest_p.log() - rest_q.log()))
    return torch.stack(losses)


def test_short_rows_do_not_reach_the_loss_as_nan():
    """Rows with fewer than K entries must give a finite loss: padding with -inf and id 0 would give 0 · inf = NaN."""
    rows = [None, {3: -0.5, 5: -1.5, 2: -2.5}, {4: -0.25}, {}, None, {7: -1.0, 1: -1.25}, {6: -0.125}]
    served = topk_from_vllm(rows)
    assert served.teacher.indices.tolist() == [
        [3, 5, 2],
        [4, -1, -1],
        [-1, -1, -1],
        [-1, -1, -1],
        [7, 1, -1],
        [6, -1, -1],
        [-1, -1, -1],
    ]
    padding = served.teacher.indices == -1
    assert (served.teacher.log_probs[padding] == -INF).all() and served.teacher.log_probs[~padding].isfinite().all()
    assert served.valid.tolist() == [True, True, False, False, True, True, False]
    assert torch.equal(served.valid, ~padding.all(-1))
    assert served.token_log_prob.nan_to_num(9.0).tolist() == [-0.5, -0.25, 9.0, 9.0, -1.0, -0.125, 9.0]

    logits = torch.randn(7, 9, requires_grad=True)
    loss = bucket_kl(logits, served.teacher)[served.valid]
    assert loss.isfinite().all() and (loss >= 0).all()
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()
    ragged = [
        None,
        [[-0.5, 3, "a"], [-1.5, 5, "b"], [-2.5, 2, "c"]],
        [[-0.25, 4, "d"]],
        [],
        None,
        [[-1.0, 7, "e"], [-1.25, 1, "f"]],
        [[-0.125, 6, "g"]],
    ]
    assert torch.equal(topk_from_sglang(ragged).teacher.indices, served.teacher.indices)
    assert torch.equal(topk_from_sglang(ragged).valid, served.valid)


def test_entries_of_probability_zero_are_padding():
    rows = [None, {4: -0.5, 9: -INF, 2: -1.25}, {9: -INF, 3: -0.25}, {1: -INF, 2: -INF}]
    served = topk_from_vllm(rows)
    assert served.teacher.indices.tolist() == [[4, 2], [3, -1], [-1, -1], [-1, -1]]
    assert served.valid.tolist() == [True, True, False, False]
    assert served.token_log_prob.nan_to_num(9.0, neginf=-9.0).tolist() == [-0.5, -9.0, -9.0, 9.0]
    # JSON has no -inf; vLLM's server writes -9999.
    as_json = [None, *({str(i): {"logprob": max(x, -9999.0)} for i, x in row.items()} for row in rows[1:])]
    assert same(topk_from_vllm(as_json), served)


def test_the_scored_token_is_kept_once_wherever_it_stands():
    ids = torch.tensor([[7, 2, 3, 7, 8], [1, 2, 3, 4, 5]])
    log_probs = torch.tensor([[-2.0, -0.5, -1.5, -2.0, -3.5], [-3.0, -0.5, -2.0, -2.5, -3.5]])
    served = topk_from_vllm(LogprobsTensors(ids, log_probs, torch.ones(2)))
    assert served.teacher.indices.tolist() == [[2, 3, 7, 8, -1], [2, 3, 4, 1, 5], [-1] * 5]
    assert served.teacher.log_probs[0].exp().sum() < 1, "the repeated token's mass is counted twice"
    assert topk_from_sglang([None, [[-0.5, 7], [-1.5, 2]]], [[None, 1], [-0.5, 7]]).teacher.indices.tolist() == [
        [7, 2],
        [-1, -1],
    ]


def test_equal_log_probabilities_stand_in_the_order_of_their_ids():
    """Ties are sorted by token id, so that k keeps the same entries in every form."""
    served = topk_from_vllm([None, {8: -2.5, 5: -2.5, 9: -0.5, 2: -2.5}], k=3)
    assert served.teacher.indices[0].tolist() == [9, 2, 5]
    served = topk_from_sglang([None, [[-0.5, 9], [-2.5, 5], [-2.5, 2]]], [[None, 1], [-2.5, 8]], k=3)
    assert served.teacher.indices[0].tolist() == [9, 2, 5]


def test_a_prompt_of_one_token_has_no_valid_row():
    empty = FlatLogprobs(start_indices=[0], end_indices=[0])
    no_rows = LogprobsTensors(torch.empty(0, 4).int(), torch.empty(0, 4), torch.empty(0).int())
    for served in (
        topk_from_vllm([None]),
        topk_from_vllm(empty),
        topk_from_vllm(no_rows),
        topk_from_sglang([None], [[None, 5, None]]),
    ):
        assert served.teacher.indices.tolist() == [[-1]] and served.teacher.log_probs.tolist() == [[-INF]]
        assert served.valid.tolist() == [False] and served.token_log_prob.isnan().all()
        assert served.teacher.indices.dtype == torch.int32 and served.token_log_prob.dtype == torch.float32


def test_only_the_own_token():
    """A request with prompt_logprobs=0 returns only the prompt's tokens."""
    served = topk_from_vllm([None, {5: -0.5}, {6: -2.0}])
    assert served.teacher.indices.tolist() == [[5], [6], [-1]]
    assert served.token_log_prob[:2].tolist() == [-0.5, -2.0]


def test_generated_tokens_may_follow_those_of_the_prompt():
    both = topk_from_vllm(DICTS[:3] + DICTS[3:])
    assert same(both, topk_from_vllm(DICTS))
    with pytest.raises(ValueError, match="row 0: expected None or no entries, as nothing predicts the first token"):
        topk_from_vllm(DICTS[3:])


# ---- sglang's lists


def test_sglang_without_the_tokens_own_log_probabilities():
    served = topk_from_sglang(INPUT_TOP_LOGPROBS)
    assert served.teacher.indices.tolist()[0] == [1124, 220, 2701] and served.teacher.indices.shape == (6, 3)
    assert served.token_log_prob.isnan().all()
    assert served.valid.tolist() == [True] * 5 + [False]
    looked_up = topk_from_sglang(INPUT_TOP_LOGPROBS, prompt_token_ids=TOKENS)
    assert looked_up.token_log_prob.nan_to_num(9.0).tolist() == [9.0, -0.58203125, -3.53125, 9.0, -0.73046875, 9.0]
    assert torch.equal(looked_up.teacher.indices, served.teacher.indices)


def test_sglang_rows_from_a_later_token():
    """With logprob_start_len = 2 the rows belong to tokens 2 to 5, and the first row is None, as always."""
    top = [None, *INPUT_TOP_LOGPROBS[3:]]
    own = [[None, 315, None], *INPUT_TOKEN_LOGPROBS[3:]]
    served = topk_from_sglang(top, own, start=2)
    assert served.valid.tolist() == [False, False, True, True, True, False]
    assert served.token_log_prob.nan_to_num(9.0).tolist() == [9.0, 9.0, -3.53125, -2.84375, -0.73046875, 9.0]
    whole = topk_from_sglang(INPUT_TOP_LOGPROBS, INPUT_TOKEN_LOGPROBS)
    assert torch.equal(served.teacher.indices[2:], whole.teacher.indices[2:])
    assert torch.equal(served.teacher.log_probs[2:], whole.teacher.log_probs[2:])
    assert (served.teacher.indices[:2] == -1).all() and (served.teacher.log_probs[:2] == -INF).all()
    assert same(topk_from_sglang(top, own, start=2, prompt_token_ids=TOKENS), served)
    # If the row of token 2 exists, position 1 predicts it.
    first = topk_from_sglang(INPUT_TOP_LOGPROBS[2:], INPUT_TOKEN_LOGPROBS[2:], start=2)
    assert first.valid.tolist() == [False, True, True, True, True, False]
    assert same(topk_from_sglang(INPUT_TOP_LOGPROBS, INPUT_TOKEN_LOGPROBS, start=0), whole)


def test_sglang_rows_without_entries_stay_invalid():
    """A token's own log-probability alone does not make a top-k row."""
    served = topk_from_sglang([None, None, [[-0.5, 3]]], [[None, 9], [-4.0, 8], [None, 3]])
    assert served.valid.tolist() == [False, True, False]
    assert served.teacher.indices.tolist() == [[-1], [3], [-1]]
    assert served.token_log_prob.nan_to_num(9.0).tolist() == [-4.0, 9.0, 9.0]


def test_sglang_takes_the_entry_of_the_top_k_where_the_token_was_renamed():
    """SGLang writes id 0 for a token beyond the vocabulary; the top k's entry for id 0 takes precedence."""
    served = topk_from_sglang([None, [[-0.5, 0], [-1.5, 4]]], [[None, 9], [-7.0, 0]])
    assert served.teacher.log_probs[0].tolist() == [-0.5, -1.5]


# ---- checks against the prompt's tokens


@each_form
def test_tokens_that_were_scored_are_in_their_rows(form):
    assert same(form(prompt_token_ids=TOKENS), form())
    assert same(form(prompt_token_ids=torch.tensor(TOKENS)), form())
    with pytest.raises(ValueError, match=r"the row of token 1 .*the rows are shifted, or belong to another prompt"):
        form(prompt_token_ids=[*TOKENS[1:], 0])
    with pytest.raises(ValueError, match=r"prompt_token_ids: expected the 6 tokens of the rows; got shape \[5\]"):
        form(prompt_token_ids=TOKENS[:-1])


def test_tokens_are_found_where_the_order_was_lost():
    by_id = json.loads(json.dumps(JSON, sort_keys=True))
    assert same(topk_from_vllm(by_id, prompt_token_ids=TOKENS), topk_from_vllm(JSON))
    assert not same(topk_from_vllm(by_id), topk_from_vllm(JSON)), "the sort must move the prompt's token"


def test_rows_of_another_start_are_found_out():
    with pytest.raises(ValueError, match="the row of token 3 does not hold that token"):
        topk_from_vllm([*DICTS[:3], DICTS[4], DICTS[3], DICTS[5]], prompt_token_ids=TOKENS)


# ---- batches


def test_stack_pads_rows_and_entries():
    long, short = topk_from_vllm(DICTS), topk_from_sglang([None, [[-0.25, 4]], [[-0.5, 3], [-1.5, 5]]])
    batch = stack([long, short])
    assert batch.teacher.indices.shape == batch.teacher.log_probs.shape == (2, 6, 4)
    assert batch.valid.tolist() == [[True] * 5 + [False], [True, True, False, False, False, False]]
    assert torch.equal(batch.teacher.indices[0], long.teacher.indices)
    assert torch.equal(batch.teacher.log_probs[0], long.teacher.log_probs)
    assert batch.teacher.indices[1].tolist() == [[4, -1, -1, -1], [3, 5, -1, -1], *[[-1] * 4] * 4]
    assert batch.teacher.log_probs[1].tolist() == [
        [-0.25, -INF, -INF, -INF],
        [-0.5, -1.5, -INF, -INF],
        *[[-INF] * 4] * 4,
    ]
    assert torch.equal(batch.token_log_prob[0].nan_to_num(9.0), long.token_log_prob.nan_to_num(9.0))
    assert batch.token_log_prob[1].isnan().all()
    assert batch.teacher.indices.dtype == torch.int32 and batch.valid.dtype == torch.bool

    longer = stack([short, long], length=8)
    assert longer.valid.tolist() == [[True, True] + [False] * 6, [True] * 5 + [False] * 3]
    assert torch.equal(longer.teacher.indices[:, :6], batch.teacher.indices.flip(0))
    assert (longer.teacher.indices[:, 6:] == -1).all() and (longer.teacher.log_probs[:, 6:] == -INF).all()


def test_stack_keeps_the_tail_and_refuses_two():
    options = {"tail": "uniform", "source_temperature": 2.0}
    batch = stack([topk_from_vllm(DICTS, **options), topk_from_vllm(FLAT, **options)])
    assert (batch.teacher.tail, batch.teacher.source_temperature) == ("uniform", 2.0)
    for bad, expected in (
        ([], "served: expected one result or more; got none"),
        ([batch], "of one sequence each"),
        ([topk_from_vllm(DICTS), topk_from_vllm(DICTS, tail="support")], "expected one tail and source_temperature"),
    ):
        with pytest.raises(ValueError, match=expected):
            stack(bad)
    with pytest.raises(ValueError, match="length: expected at least the longest sequence's 6; got 5"):
        stack([topk_from_vllm(DICTS)], length=5)


def test_to_moves_all_of_it():
    moved = topk_from_vllm(DICTS, tail="support", source_temperature=2.0).to("meta")
    for x in (moved.teacher.indices, moved.teacher.log_probs, moved.token_log_prob, moved.valid):
        assert x.device.type == "meta"
    assert (moved.teacher.tail, moved.teacher.source_temperature) == ("support", 2.0)


# ---- tensors and arrays from engines


def test_tensors_of_inference_mode_do_not_get_into_the_graph():
    with torch.inference_mode():
        tensors = LogprobsTensors(*(x.clone() for x in TENSORS[:3]))
    served = topk_from_vllm(tensors)
    assert same(served, topk_from_vllm(DICTS))
    for x in (served.teacher.indices, served.teacher.log_probs, served.token_log_prob, served.valid):
        assert not x.is_inference()


def test_arrays_and_wider_dtypes():
    numpy = pytest.importorskip("numpy")
    arrays = LogprobsTensors(TENSORS.logprob_token_ids.long().numpy(), TENSORS.logprobs.double().numpy(), None)
    assert same(topk_from_vllm(arrays), topk_from_vllm(TENSORS))
    flat = FlatLogprobs(*(numpy.array(getattr(FLAT, name)) for name in ("start_indices", "end_indices")))
    flat.token_ids, flat.logprobs = numpy.array(FLAT.token_ids), numpy.array(FLAT.logprobs)
    assert same(topk_from_vllm(flat), topk_from_vllm(FLAT))


def test_what_was_passed_is_not_changed():
    tensors = LogprobsTensors(*(x.clone() for x in TENSORS[:3]))
    topk_from_vllm(tensors, k=2)
    assert all(torch.equal(x, y) for x, y in zip(tensors[:3], TENSORS[:3], strict=True))


# ---- rows that are wrong


BAD_ROWS = {
    "a float id": {3.7: -0.5, 5: -1.5},
    "a bool id": {True: -0.5, 5: -1.5},
    "an id with an underscore": {"1_0": -0.5, "5": -1.5},
    "an id of other digits": {"\u0663": -0.5},
    "an id with a space": {" 5": -0.5},
    "an id with a zero in front": {"05": -0.5},
    "no id": {None: -0.5},
    "a negative id": {-4: -0.5},
    "a bool log-probability": {5: False},
    "a text log-probability": {5: "-0.5"},
    "bytes for a log-probability": {5: b"-1"},
    "a complex log-probability": {5: -1j},
    "a log-probability beyond floats": {5: 10**400},
    "NaN": {5: NAN, 7: -0.5},
    "a logit": {5: 2.5, 7: -0.5},
    "one id twice": {5: -0.5, "5": -1.5},
    "mass 3.1": {token: math.log(3.1 / 4) for token in range(4)},
    "mass just above 1": {5: math.log(0.6), 7: math.log(0.4021)},
    "another kind of row": [[-0.5, 5]],
    "no row": 7,
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_one_wrong_row_is_not_valid_and_loses_no_other(row):
    rows = [*DICTS[:3], row, *DICTS[4:]]
    right = topk_from_vllm(DICTS)
    with pytest.warns(RuntimeWarning, match=r"1 of 5 rows are wrong, .*prompt_logprobs: row 3 \(token 3\): expected"):
        served = topk_from_vllm(rows)
    assert served.valid.tolist() == [True, True, False, True, True, False]
    assert (served.teacher.indices[2] == -1).all() and (served.teacher.log_probs[2] == -INF).all()
    assert served.token_log_prob[2].isnan()
    for t in (0, 1, 3, 4):
        assert torch.equal(served.teacher.indices[t], right.teacher.indices[t])
        assert torch.equal(served.teacher.log_probs[t], right.teacher.log_probs[t])
        assert served.token_log_prob[t] == right.token_log_prob[t]
    with pytest.raises((TypeError, ValueError), match=r"^prompt_logprobs: row 3 \(token 3\): expected .*; got "):
        topk_from_vllm(rows, strict=True)
    with pytest.raises((TypeError, ValueError), match=r"^prompt_logprobs: row 1 \(token 1\): expected .*; got "):
        topk_from_vllm([None, row])  # no right row is left


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ([[-0.5, 4], [-0.5, 4], [-1.5, 9], [-1.5, 9]], r"each token id once .*; got token id 4 with .*\[-0.5, -0.5\]"),
        ([[-0.5, 4, None], [-1.5, True, None]], r"a token id, an integer; got \[-1.5, True, None\]"),
        ([[-0.5, 4, None], [False, 5, None]], r"a log-probability, a number; got \[False, 5, None\]"),
        ([[-0.5, 4.0, "x" * 200]], f"got .-0.5, 4.0, '{'x' * 200}'.$"),  # the entry is shown whole
        ([[0.1 * -i, i] for i in range(4)], r"sum of at most 1; got a sum of 3\.4"),
    ],
)
def test_a_wrong_row_of_sglang_shows_its_entry(row, shown):
    top, own = [None, [[-0.5, 3]], row], [[None, 1], [-0.5, 3], [-4.0, 8]]
    for tokens in (None, own):
        with pytest.warns(RuntimeWarning, match=rf"input_top_logprobs: row 2 \(token 2\): expected .*{shown}"):
            assert topk_from_sglang(top, tokens).valid.tolist() == [True, False, False]
        with pytest.raises((TypeError, ValueError), match=rf"row 2 \(token 2\): expected .*{shown}"):
            topk_from_sglang(top, tokens, strict=True)
    with pytest.warns(RuntimeWarning, match=r"input_token_logprobs: row 1 .* got \[-0.5, True\]"):
        assert topk_from_sglang([None, [[-0.5, 3]], [[-0.5, 3]]], [None, [-0.5, True], [-0.5, 3]]).valid.tolist() == [
            False,
            True,
            False,
        ]


def test_a_null_means_that_the_entry_is_absent():
    served = topk_from_sglang([None, [[None, 5, None], [-0.1, 7, None]], [None, [-0.5, 3], [-1.0, None]]])
    assert served.teacher.indices.tolist() == [[7], [3], [-1]] and served.valid.tolist() == [True, True, False]
    rows = [None, {"5": {"logprob": None}, "7": {"logprob": -0.1}}, {"3": -0.5, "4": None}, {"3": Logprob(None)}]
    for tokens in (None, [1, 5, 3, 3]):
        served = topk_from_vllm(rows, prompt_token_ids=tokens)
        assert served.teacher.indices.tolist() == [[7], [3], [-1], [-1]]
        assert served.valid.tolist() == [True, True, False, False]
        assert served.token_log_prob.nan_to_num(9.0).tolist() == [9.0, -0.5, 9.0, 9.0]
    flat = FlatLogprobs([0, 0, 2], [0, 2, 4], [5, 7, 3, 3], [None, -0.5, None, -0.25])
    assert topk_from_vllm(flat).teacher.indices.tolist() == [[7], [3], [-1]]
    served = topk_from_sglang([None, [[None, 5]], [[None, 3], [-0.5, 4]]], [None, [-0.5, 5], [-1.5, 3]])
    assert served.teacher.indices.tolist() == [[-1, -1], [4, 3], [-1, -1]]
    assert served.token_log_prob[:2].tolist() == [-0.5, -1.5]


def test_rows_of_tensors_that_were_not_filled_are_not_valid():
    for width in (1, 2, 4):
        zeros = torch.zeros(3, width)
        ids = torch.cat([zeros.int(), TENSORS.logprob_token_ids[3:, :width]])
        tensors = LogprobsTensors(ids, torch.cat([zeros, TENSORS.logprobs[3:, :width]]), None)
        if width < 3:  # the rank tells the row of a certain token 0
            ranks = torch.tensor([1, 1, 1, 4, 1])
            assert topk_from_vllm(tensors._replace(selected_token_ranks=ranks), strict=True).valid[:5].all()
            tensors = tensors._replace(selected_token_ranks=ranks * torch.tensor([0, 0, 0, 1, 1]))
        for tokens in (None, TOKENS):
            with pytest.warns(RuntimeWarning, match=r"3 of 5 rows.* row 0 \(token 1\): .* got zeros alone"):
                served = topk_from_vllm(tensors, prompt_token_ids=tokens)
            assert served.valid.tolist() == [False, False, False, True, True, False]
            assert served.token_log_prob[:3].isnan().all() and served.token_log_prob[4] == -0.73046875
        with pytest.raises(ValueError, match=r"row 0 \(token 1\)"):
            topk_from_vllm(tensors, strict=True)


def test_wrong_rows_of_tensors_and_of_columns():
    """The forms agree about the rows that are wrong."""
    ids, log_probs = TENSORS.logprob_token_ids.tolist(), TENSORS.logprobs.tolist()
    ids[0], log_probs[1][2], log_probs[2], ids[3][3] = [4, 4, 9, 9], NAN, [-0.1, -0.2, -0.3, -0.4], -11
    tensors = LogprobsTensors(torch.tensor(ids), torch.tensor(log_probs), None)
    flat = flat_with(token_ids=[x for row in ids for x in row], logprobs=[x for row in log_probs for x in row])
    for form, first in ((tensors, 0), (LogprobsTensors(ids, log_probs, None), 0), (flat, 1)):
        with pytest.warns(RuntimeWarning, match=rf"4 of 5 rows are wrong.* row {first} \(token 1\): .*token id 9 with"):
            served = topk_from_vllm(form)
        assert served.valid.tolist() == [False] * 4 + [True, False]
        assert torch.equal(served.teacher.indices[4, :3], topk_from_vllm(TENSORS).teacher.indices[4, :3])
    for bad in ([785, 3.7], [785, True], ["785"] * 2, torch.ones(2), torch.ones(2).bool()):
        with pytest.raises(TypeError, match="prompt_token_ids: expected integers; got"):
            topk_from_vllm([None, {1: -0.5}], prompt_token_ids=bad)
    for name in ("start_indices", "end_indices"):
        with pytest.raises(TypeError, match=f"{name}: expected integers.*got 0.5"):
            topk_from_vllm(flat_with(**{name: [0.5] * 6}))
    with pytest.raises(TypeError, match="logprob_token_ids of integers"):
        topk_from_vllm(TENSORS._replace(logprob_token_ids=TENSORS.logprob_token_ids.bool()))


def test_the_mass_is_that_of_the_kept_entry_of_the_scored_token():
    """vLLM's scored entry comes first and is kept; in SGLang's rows the top k's entry is."""
    ids, log_probs = [[7, 7, 3], [7, 7, 3]], [[-5.0, -0.01, -0.5], [-0.01, -5.0, -0.5]]
    tensors = LogprobsTensors(torch.tensor(ids), torch.tensor(log_probs), None)
    for form in (tensors, LogprobsTensors(ids, log_probs, None)):
        with pytest.warns(
            RuntimeWarning, match=r"1 of 2 rows.* row 1 \(token 2\): .*a sum of at most 1; got a sum of 1.59"
        ):
            served = topk_from_vllm(form)
        assert served.valid.tolist() == [True, False, False]
        assert served.teacher.indices[0].tolist()[:2] == [3, 7] and served.teacher.log_probs[0, 1] == -5.0


def test_a_wrong_row_of_lists_does_not_lose_the_prompt():
    ids, log_probs = [[5, 6], [5], None, [0, 0], [5, 6]], [[-0.1, -3.0], [-0.1, -2.0], [-1.0], [0.0, 0.0], [-0.2, -2.5]]
    with pytest.warns(RuntimeWarning, match=r"3 of 5 rows.* row 1 \(token 2\): .*for each token id; got 2 for 1"):
        served = topk_from_vllm(LogprobsTensors(ids, log_probs, None))
    assert served.valid.tolist() == [True, False, False, False, True, False]
    with pytest.raises(ValueError, match="of one length; got 5 and 4 rows"):
        topk_from_vllm(LogprobsTensors(ids, log_probs[:4], None))


def test_a_row_of_a_mass_of_1_up_to_rounding_is_right():
    mass = torch.tensor([0.25, 0.5, 0.25]) * (1 + 9e-4)
    assert topk_from_vllm([None, dict(enumerate(mass.log().tolist()))], strict=True).valid.tolist() == [True, False]


@pytest.mark.parametrize(("dtype", "entries", "mass"), [(torch.bfloat16, 19, 1.0069), (torch.float16, 1000, 1.0015)])
def test_a_mass_above_1_by_the_rounding_of_16_bits_is_right(dtype, entries, mass):
    """The rows name every class, so their mass is 1 before rounding; that of the uniform row 0 becomes `mass`."""
    exact = (torch.linspace(0, 8, 300)[:, None] * torch.randn(300, entries)).log_softmax(-1)
    log_probs = exact.to(dtype).float()
    assert abs(log_probs[0].exp().sum() - mass) < 1e-4
    ids = torch.arange(entries).expand_as(log_probs)
    served = topk_from_vllm(LogprobsTensors(ids, log_probs, None), strict=True)
    assert served.valid[:-1].all() and torch.equal(served.token_log_prob[:-1], log_probs[:, 0])
    assert (served.teacher.log_probs.exp().sum(-1) < 1 + 1.001e-3).all()
    assert fused_kl(torch.randn(301, entries), served.teacher, mask=served.valid).isfinite()

    def valid(log_probs):
        with pytest.warns(RuntimeWarning, match="expected probabilities with a sum of at most 1; got a sum of 1.0"):
            return topk_from_vllm([None, {0: -0.5}, *(dict(enumerate(row)) for row in log_probs.tolist())]).valid

    tall = (exact + math.log(1.05))[exact.max(-1).values < -0.1]
    for wrong in (tall.to(dtype).float(), log_probs[:1] + 1e-5):  # no rounding; no numbers of 16 bits
        assert valid(wrong).tolist() == [True, *[False] * len(wrong), False]
    assert len(tall) > 50


@pytest.mark.parametrize("token", [-1, 2**31])
def test_a_prompt_token_that_is_no_id_is_named(token):
    """-1 stands for padding in a row, and is no token."""
    rows = [None, {5: -0.5, 6: -1.5}, {6: -2.0}]
    with pytest.raises(
        ValueError, match=rf"prompt_token_ids: expected ids from 0 to 2\^31 - 1; got {token} \(token 2\)"
    ):
        topk_from_vllm(rows, prompt_token_ids=[4, 5, token])
    lists = [None, [[-0.5, 5, None]], [[-2.0, 6, None]]]
    with pytest.raises(ValueError, match="prompt_token_ids: expected ids"):
        topk_from_sglang(lists, prompt_token_ids=[4, 5, token])


# ---- invalid input


def flat_with(**columns):
    return FlatLogprobs(**{**vars(FLAT), **columns})


@pytest.mark.parametrize(
    ("given", "error", "expected"),
    [
        (None, TypeError, r"expected vLLM's list of dicts.*got NoneType; a request needs SamplingParams\(prompt_logp"),
        ({1: -0.5}, TypeError, "got dict"),
        ([], ValueError, "prompt_logprobs: expected a row for each token; got none"),
        (INPUT_TOP_LOGPROBS, TypeError, r"row 1 .*got \[\[.*topk_from_sglang takes SGLang's"),
        ([DICTS, DICTS], TypeError, r"row 0 \(token 0\): expected None or a dict of one sequence's rows; got \[None"),
        (DICTS[1:], ValueError, "row 0: expected None or no entries, as nothing predicts the first token; got entries"),
        ([None, {"Paris": -0.5}], TypeError, r"row 1 .*: expected a token id, an integer; got \{'Paris': -0.5\}"),
        ([None, {5: {"rank": 1}}], TypeError, r"row 1 .*: .*got \{5: \{'rank': 1\}\}"),
        ([None, {5: [-0.5]}], TypeError, r"row 1 .*: .*got \{5: \[-0.5\]\}"),
        ([None, {5: -0.5}, {6: NAN, 7: -0.5}], ValueError, r"row 2 \(token 2\): .*null; got \{6: nan\}"),
        (
            [None, {5: -0.5}, {6: 0.25}],
            ValueError,
            r"row 2 .*: expected a log-probability, 0 or less .*; got \{6: 0.25\}",
        ),
        ([None, {5: INF}], ValueError, "expected a log-probability, 0 or less"),
        ([None, {-5: -0.5}], ValueError, r"row 1 .*: expected a token id from 0 to 2\^31 - 1; got \{-5: -0.5\}"),
        ([None, {2**31: -0.5}], ValueError, r"row 1 .*: expected a token id from 0"),
        ([None, {2**70: -0.5}], ValueError, "expected a token id from 0 .*got .1180591620717411303424: -0.5"),
        (flat_with(start_indices=[]), ValueError, r"of one length; got \[\[0\], \[6\], \[20\], \[20\]\]"),
        (flat_with(logprobs=[-0.5]), ValueError, r"of one length; got \[\[6\], \[6\], \[20\], \[1\]\]"),
        (flat_with(end_indices=[0, 4, 8, 12, 16, 21]), ValueError, "<= end_indices <= 20, the entries"),
        (flat_with(end_indices=[0, 4, 3, 12, 16, 20]), ValueError, "start_indices <= end_indices"),
        (flat_with(end_indices=[4, 4, 8, 12, 16, 20]), ValueError, "row 0: expected None or no entries"),
        (flat_with(start_indices=[], end_indices=[]), ValueError, "expected a row for each token; got none"),
        (flat_with(logprobs=["-1"] * 20), TypeError, "log-probability, a number; got token id 6722 with .* '-1'"),
        (flat_with(logprobs=-0.5), TypeError, "expected a list in logprobs of a FlatLogprobs; got float"),
        (
            flat_with(logprobs=[NAN] * 20),
            ValueError,
            r"row 1 .*: expected a log-probability or null; got token id 6722 .* nan",
        ),
        (TENSORS._replace(logprobs=TENSORS.logprobs[:, 1:]), ValueError, r"got \[5, 4\] and \[5, 3\]"),
        (TENSORS._replace(logprobs=TENSORS.logprobs.int()), TypeError, "logprobs of floats; got torch.int32 and"),
        (TENSORS._replace(logprob_token_ids=TENSORS.logprobs), TypeError, "logprob_token_ids of integers"),
        (LogprobsTensors(torch.ones(4).int(), torch.zeros(4), None), ValueError, r"\[T - 1, K \+ 1\]; got \[4\]"),
        (LogprobsTensors(torch.ones(4, 0).int(), torch.zeros(4, 0), None), ValueError, r"got \[4, 0\]"),
        (TENSORS._replace(logprobs=-TENSORS.logprobs), ValueError, "expected a log-probability, 0 or less"),
        (
            TENSORS._replace(logprob_token_ids=-TENSORS.logprob_token_ids),
            ValueError,
            r"row 0 \(token 1\): .*; got token id -6722 with",
        ),
    ],
)
def test_vllm_refuses(given, error, expected):
    with pytest.raises(error, match=expected):
        topk_from_vllm(given, strict=True)


@pytest.mark.parametrize(
    ("top", "own", "options", "error", "expected"),
    [
        (None, None, {}, TypeError, "input_top_logprobs: expected SGLang's list of rows; got NoneType"),
        ([], None, {}, ValueError, "expected a row for each token; got none; a request needs logprob_start_len=0"),
        (DICTS, None, {}, TypeError, r"row 1 .*: .* or a list; got {6722.*topk_from_vllm takes vLLM's"),
        (INPUT_TOP_LOGPROBS[1:], None, {}, ValueError, "row 0: .*rows from a later token need start=logprob_start_len"),
        ([None, [[-0.5, "4"]]], None, {}, TypeError, r"row 1 .*: expected a token id, an integer; got \[-0.5, '4'\]"),
        ([None, [[-0.5]]], None, {}, TypeError, r"row 1 .*: expected entries"),
        ([None, [-0.5, 4]], None, {}, TypeError, r"row 1 .*: expected entries \[logprob, token id, text\]; got -0.5"),
        (
            [None, [[-0.5, 4, None]], [[NAN, 5, None]]],
            None,
            {},
            ValueError,
            r"input_top_logprobs: row 2 .* null; got \[nan, 5, None\]",
        ),
        ([None, [[NAN, 5]]], None, {"start": 3}, ValueError, r"row 1 \(token 4\): expected a log-probability or null"),
        ([None, [[0.5, 4]]], None, {}, ValueError, r"row 1 .*: expected a log-probability, 0 or less"),
        ([None, [[-0.5, -4]]], None, {}, ValueError, r"row 1 .*: expected a token id"),
        ([None, [[-0.5, 4]]], {}, {}, TypeError, "input_token_logprobs: expected SGLang's list of rows; got dict"),
        ([None, [[-0.5, 4]]], [[None, 3]], {}, ValueError, "expected the 2 rows of input_top_logprobs; got 1"),
        ([None, [[-0.5, 4]]], [[None, 3], 7], {}, TypeError, r"input_token_logprobs: row 1 .*: expected .*got 7"),
        ([None, [[-0.5, 4]]], [[None, 3], ["x", 4]], {}, TypeError, r"input_token_logprobs: row 1 .*got \['x', 4\]"),
        (
            [None, [[-0.5, 4]]],
            [[None, 3], [NAN, 4]],
            {},
            ValueError,
            r"input_token_logprobs: row 1 .*null; got \[nan, 4\]",
        ),
        (
            [None, [[-0.5, 4]]],
            [[None, 3], [0.5, 6]],
            {},
            ValueError,
            r"row 1 .*: expected a log-probability, 0 or less",
        ),
        ([None], None, {"start": -1}, ValueError, "start: expected the request's logprob_start_len, 0 or more; got -1"),
        ([None], None, {"start": None}, ValueError, "start: .*got None"),
    ],
)
def test_sglang_refuses(top, own, options, error, expected):
    with pytest.raises(error, match=expected):
        topk_from_sglang(top, own, **options, strict=True)


@each_form
def test_options_that_are_refused(form):
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k: expected an integer of 1 or more, or None"):
            form(k=k)
    with pytest.raises(ValueError, match="tail"):
        form(tail="ghost")


def test_a_log_probability_may_round_to_above_zero():
    assert topk_from_vllm([None, {5: 1e-6}]).valid.tolist() == [True, False]
