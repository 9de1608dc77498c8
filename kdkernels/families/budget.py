"""The memory that a call may take for what it makes in chunks: the logits of a head, products, sorted logits."""

import torch

_budget = None  # bytes; None: the default of the device


class chunk_budget:
    """Sets the bytes that a call's chunk buffers may take if `chunk_rows` is None.

    Unless set, they are 256 MiB on a CPU; on a GPU 1 GiB, or 2 % of its memory if that is more. A GPU adds each chunk's
    part to the weight's gradient in its memory, which takes longer than the chunk's products if a chunk has few rows.

    ``kdkernels.chunk_budget(2**30)`` sets it from then on; ``with kdkernels.chunk_budget(2**30):`` sets it for a block.
    Raises TypeError for a value that is no int, ValueError below 1 and from 2**63 on.
    """

    def __init__(self, bytes: int):
        global _budget
        if isinstance(bytes, bool) or not isinstance(bytes, int):
            raise TypeError(f"chunk_budget: expected an int (bytes); got {type(bytes).__name__}")
        if not 1 <= bytes < 2**63:
            raise ValueError(f"chunk_budget: expected from 1 byte to 2**63 - 1; got {bytes}")
        self._before, self._bytes = _budget, bytes
        _budget = bytes

    def __enter__(self):
        global _budget
        _budget = self._bytes  # again, for an object that enters a second block
        return self

    def __exit__(self, *_):
        global _budget
        _budget = self._before


def current_budget(device: torch.device) -> int:
    if _budget is not None:
        return _budget
    return _default_budget_of_gpu(device.index or 0) if device.type == "cuda" else 256 << 20


def _default_budget_of_gpu(index: int) -> int:
    return max(1 << 30, torch.cuda.get_device_properties(index).total_memory // 50)


# While a compiler traces a call, it runs this function and takes the answer as a constant.
_default_budget_of_gpu._dynamo_marked_constant = True


def rows_per_step(device: torch.device) -> int:
    """A chunk has a multiple of these rows, if the budget holds them: rows of a tile of the products."""
    return 128 if device.type == "cuda" else 64
