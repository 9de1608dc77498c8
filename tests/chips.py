"""The modelled chips on which the CUDA kernels are tested.

The chips are small: a few hundred classes already need a cluster or exceed the shared memory, and a few rows already
exceed the blocks that the chip runs at once.
"""

import contextlib
import functools

import emulated


def small(blocks: int, shared: int, **attributes: int) -> dict[str, int]:
    """A chip with `blocks` multiprocessors; each runs one block, with `shared` bytes of shared memory."""
    return {
        "multiprocessors": blocks,
        "shared_memory_per_block": shared,
        "shared_memory_per_multiprocessor": shared + 1024,  # the system reserves 1 KiB for every block
        **attributes,
    }


CHIPS = {
    "h100": {},
    # A row of a few hundred classes takes a cluster of 2 to 16 blocks.
    "small": small(16, 2048),
    # Only one cluster fits on the chip, so it processes all rows one after the other.
    "single": small(2, 4096, max_cluster=2),
    # A block of several warps holds a row of some thousand classes.
    "wide": small(3, 40_000),
    # The largest cluster has 8 blocks, not 16.
    "portable": small(9, 1536, max_cluster=8),
    # Rows too long for every cluster are read from memory, by clusters.
    "streaming": small(12, 1200, l2_bytes=20_000),
    # A chip without clusters.
    "a100": small(3, 160_000, major=8, l2_bytes=50_000),
}


_watched = False


@contextlib.contextmanager
def watched():
    """The chips run the watched build of the kernels (emulated.py) meanwhile."""
    global _watched
    _watched = True
    try:
        yield
    finally:
        _watched = False


@functools.cache
def device_of(name: str, watched: bool = False) -> int:
    return emulated.cuda_model(watched).configure_device(**CHIPS[name]) if name != "h100" else 0


def on(name: str, seed: int = 0):
    """Makes the backend "cuda" serve CPU tensors on the chip `name`; the seed determines the order of the threads."""
    return emulated.serving(emulated.cuda_model(_watched), device_of(name, _watched), seed)


def on_any(seed: int):
    return on(list(CHIPS)[seed % len(CHIPS)], seed)
