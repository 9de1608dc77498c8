"""The chips that the CUDA kernels are tested on, in the execution model: so small that tests of a few hundred classes
meet clusters, rows too long for shared memory, and more rows than the chip holds at once."""

import functools

import emulated


def small(blocks: int, shared: int, **attributes: int) -> dict[str, int]:
    """A chip that holds so many blocks, one on a multiprocessor, each with so much shared memory."""
    return {
        "multiprocessors": blocks,
        "shared_memory_per_block": shared,
        "shared_memory_per_multiprocessor": shared + 1024,  # which the system takes of every block
        **attributes,
    }


CHIPS = {
    "h100": {},
    # A row of a few hundred classes takes a cluster of 2 to 16 blocks.
    "small": small(16, 2048),
    # A cluster alone on the chip: it works on all rows, one after the other.
    "single": small(2, 4096, max_cluster=2),
    # Rows of some thousand classes to a block, of several warps.
    "wide": small(3, 40_000),
    # No cluster of 16.
    "portable": small(9, 1536, max_cluster=8),
    # Rows that no cluster holds are read from memory, by clusters.
    "streaming": small(12, 800, l2_bytes=20_000),
    # Before clusters.
    "a100": small(3, 160_000, major=8, l2_bytes=50_000),
}


@functools.cache
def device_of(name: str) -> int:
    return emulated.cuda_model().configure_device(**CHIPS[name]) if name != "h100" else 0


def on(name: str, seed: int = 0):
    """The backend "cuda" serves CPU tensors: on the chip of that name, threads running in the order of the seed."""
    return emulated.serving(device=device_of(name), seed=seed)


def on_any(seed: int):
    return on(list(CHIPS)[seed % len(CHIPS)], seed)
