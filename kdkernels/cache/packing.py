"""Packs rows of sorted class indices into few bits: Elias-Fano coding, in numpy, a whole batch at a time.

K sorted indices below V are split at bit l = floor(log2(V / K)). The low l bits of each index are stored as they are.
The high parts, at most (V - 1) >> l < 2K, are sorted too, so they are stored in unary: bit high_i + i is set for the
i-th index, and the other bits are 0. That takes ::

    K l + K + ((V - 1) >> l)    bits a row, l + 2 to l + 3 bits an index

for any indices. So all rows of one V and K have one size, and a slice of a file decodes without the rows before it.
Packing each index alone takes ceil(log2 V) bits; no coding takes less than log2 C(V, K) / K bits, half a bit below this
one.

A packed row [row_bytes] has three parts: the lowest 8 (l // 8) of the low bits as bytes, K bytes of each significance;
K bits of each remaining significance; and the unary bits. Indices may repeat.
"""

import numpy as np


def low_bits(vocab_size: int, k: int) -> int:
    """l: the number of bits of an index that are stored as they are. No other choice takes less room."""
    return (vocab_size // k).bit_length() - 1


def row_bits(vocab_size: int, k: int) -> int:
    """Bits of a row before padding to whole bytes."""
    return k * low_bits(vocab_size, k) + _unary_bits(vocab_size, k)


def row_bytes(vocab_size: int, k: int) -> int:
    return (row_bits(vocab_size, k) + 7) // 8


def pack(indices: np.ndarray, vocab_size: int) -> np.ndarray:
    """uint8 [N, row_bytes] from indices [N, K]. Each row must be ascending and within [0, vocab_size); neither is
    checked."""
    rows, k = indices.shape
    low = low_bits(vocab_size, k)
    whole, odd = divmod(low, 8)
    bits = np.zeros((rows, k * odd + _unary_bits(vocab_size, k)), np.uint8)
    for plane in range(odd):
        bits[:, k * plane : k * (plane + 1)] = indices >> (8 * whole + plane) & 1
    np.put_along_axis(bits, k * odd + np.arange(k) + (indices >> low), 1, axis=1)
    low_bytes = [(indices >> 8 * byte & 0xFF).astype(np.uint8) for byte in range(whole)]
    return np.concatenate([*low_bytes, np.packbits(bits, axis=1)], axis=1)


def unpack(packed: np.ndarray, vocab_size: int, k: int) -> np.ndarray:
    """int32 [N, K]: the indices that `pack` took.

    Raises:
        ValueError: for rows that `pack` did not make, if the number or place of their set bits shows it.
    """
    rows, low, unary = len(packed), low_bits(vocab_size, k), _unary_bits(vocab_size, k)
    whole, odd = divmod(low, 8)
    bits = np.unpackbits(packed[:, k * whole :], axis=1, count=k * odd + unary)

    set_bits = np.flatnonzero(np.ascontiguousarray(bits[:, k * odd :]).view(bool))
    row_starts = unary * np.arange(rows)[:, None]
    if len(set_bits) == rows * k:
        set_bits = set_bits.reshape(rows, k)
    if (
        set_bits.ndim == 1
        or (set_bits[:, 0] < row_starts[:, 0]).any()
        or (set_bits[:, -1] >= row_starts[:, 0] + unary).any()
    ):
        raise ValueError(f"packed indices are damaged: expected {k} set bits among the last {unary} of each row")

    indices = (set_bits - (row_starts + np.arange(k))).astype(np.int32) << low
    for byte in range(whole):
        indices |= packed[:, k * byte : k * (byte + 1)].astype(np.int32) << 8 * byte
    for plane in range(odd):
        indices |= bits[:, k * plane : k * (plane + 1)].astype(np.int32) << (8 * whole + plane)
    return indices


def sort_rows(indices: np.ndarray, log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts both [N, K] by ascending index, with the padding entries at the end.

    Padding has an index below 0 or a log-probability of -inf. It comes out with log-probability -inf and the row's
    largest other index (0 if the row has none), so that the row stays sorted.
    """
    padding = (indices < 0) | np.isneginf(log_probs)
    order = np.argsort(np.where(padding, np.int64(2**62), indices), axis=1, kind="stable")
    largest = np.where(padding, 0, indices).max(axis=1, keepdims=True)
    indices, log_probs = np.where(padding, largest, indices), np.where(padding, -np.inf, log_probs)
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(log_probs, order, axis=1)


def to_half(log_probs: np.ndarray) -> np.ndarray:
    """Rounds to the nearest fp16. A finite value stays finite (at least -65,504), and -inf stays -inf."""
    return np.where(np.isneginf(log_probs), -np.inf, np.maximum(log_probs, -65504)).astype(np.float16)


def _unary_bits(vocab_size: int, k: int) -> int:
    return k + (vocab_size - 1 >> low_bits(vocab_size, k))
