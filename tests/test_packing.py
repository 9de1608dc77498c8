"""Elias-Fano rows: unpack inverts pack, and sizes follow the formula."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("numpy")
pytest.importorskip("safetensors")
import numpy as np

from kdkernels.cache import packing

VOCABULARIES = st.one_of(st.integers(1, 80), st.integers(81, 300_000), st.sampled_from([2**16, 2**31 - 1, 2**31]))


@given(
    vocab_size=VOCABULARIES, k=st.integers(1, 200), rows=st.integers(0, 5), repeat=st.booleans(), seed=st.integers(0)
)
@example(vocab_size=1, k=1, rows=2, repeat=False, seed=0)
@example(vocab_size=100, k=100, rows=2, repeat=False, seed=0)
@example(vocab_size=2**31, k=1, rows=3, repeat=True, seed=0)
def test_unpack_inverts_pack(vocab_size, k, rows, repeat, seed):
    k = min(k, vocab_size)
    generator = np.random.default_rng(seed)
    if repeat or vocab_size > 300_000:
        indices = generator.integers(0, vocab_size, (rows, k))
    else:
        indices = np.array([generator.choice(vocab_size, k, replace=False) for _ in range(rows)]).reshape(rows, k)
    indices = np.sort(indices, axis=1).astype(np.int32)
    # The range's ends need the most bits, so a row too short fails on them.
    indices[:1], indices[1:2] = 0, vocab_size - 1
    packed = packing.pack(indices, vocab_size)
    assert packed.dtype == np.uint8 and packed.shape == (rows, packing.row_bytes(vocab_size, k))
    unpacked = packing.unpack(packed, vocab_size, k)
    assert unpacked.dtype == np.int32
    np.testing.assert_array_equal(unpacked, indices)


@given(vocab_size=VOCABULARIES, k=st.integers(1, 200))
def test_no_other_split_takes_less(vocab_size, k):
    k = min(k, vocab_size)
    least = min(k * low + k + (vocab_size - 1 >> low) for low in range(32))
    assert packing.row_bits(vocab_size, k) == least


@pytest.mark.parametrize(("vocab_size", "k"), [(49_152, 64), (128_256, 128), (151_936, 50), (262_144, 64)])
def test_bits_per_index_are_near_the_lower_bound(vocab_size, k):
    bits = packing.row_bits(vocab_size, k) / k
    by_itself = (vocab_size - 1).bit_length()
    subsets = math.lgamma(vocab_size + 1) - math.lgamma(k + 1) - math.lgamma(vocab_size - k + 1)
    must = subsets / math.log(2) / k
    assert must < bits < must + 0.65 and bits < by_itself - 4


def test_damaged_rows_are_refused():
    bits = np.unpackbits(packing.pack(np.arange(0, 1000, 10, dtype=np.int32)[None].repeat(2, 0), 1000), axis=1)
    set_bit = 300 + np.flatnonzero(bits[0, 300:524])[-1]  # the unary bits follow 3 low bits per index
    unset_bit = 300 + np.flatnonzero(bits[1, 300:524] == 0)[0]
    for row, bit in (((0, 0), (set_bit, unset_bit)), ((0, 1), (set_bit, unset_bit))):
        # First case: one bit less. Second case: the total is right, but each row is wrong.
        damaged = bits.copy()
        damaged[row[0], bit[0]] = 0
        damaged[row[1], bit[1]] = row[1]
        with pytest.raises(ValueError, match="expected 100 set bits among the last 224 of each row"):
            packing.unpack(np.packbits(damaged, axis=1), 1000, 100)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rows_are_sorted_with_their_padding_last(dtype):
    indices = np.array([[7, -1, 3, 5], [-1, -5, 9, -1], [4, 4, 2, 2**31 - 1]], dtype)
    log_probs = np.array([[-1.0, -2.0, -3.0, -np.inf], [0.0, 0.0, -np.inf, np.nan], [-1.0, -2.0, -4.0, -np.inf]])
    found = packing.sort_rows(indices, log_probs)
    np.testing.assert_array_equal(found[0], [[3, 7, 7, 7], [0, 0, 0, 0], [2, 4, 4, 4]])
    inf = -np.inf
    np.testing.assert_array_equal(found[1], [[-3.0, -1.0, inf, inf], [inf] * 4, [-4.0, -1.0, -2.0, inf]])


def test_halves_stay_finite():
    with np.errstate(all="raise"):
        found = packing.to_half(np.array([-np.inf, -1e30, -65_519.0, -65_504.0, -1.0, -1e-3, 0.0], np.float32))
    np.testing.assert_array_equal(found[:5], np.array([-np.inf, -65_504, -65_504, -65_504, -1], np.float16))
    assert found.dtype == np.float16 and found[5] == np.float16(-1e-3) and found[6] == 0
