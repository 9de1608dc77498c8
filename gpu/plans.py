"""The plans of the dense losses' kernels that a visit checks: values of KDKERNELS_PLAN, "way,cluster,threads"."""

VARIABLE = "KDKERNELS_PLAN"
NO_PLAN = "nonsense,0,0"  # a call must refuse it: else the variable has no effect, and no plan is checked
# csrc/cuda/plan.h: a cluster is a power of two of blocks, a block a power of two of threads from a warp on, and a
# thread has at most 8 groups of 8 columns of a staged row. The card refuses the plans for which it has no room.
LARGEST_CLUSTER = {"halves": 16, "staged": 16, "streaming": 8}
THREADS = (256, 512, 64)
COLUMNS_OF_THREAD = 64
WIDEST = 151_936


def plans() -> list[str]:
    """The most usual blocks first."""
    return [
        f"{way},{2**power},{threads}"
        for threads in THREADS
        for way, largest in LARGEST_CLUSTER.items()
        for power in range(largest.bit_length())
    ]


def shapes(plan: str, is_small: bool) -> list[tuple[int, int]]:
    """(rows, columns): fewer columns than a cluster has threads, the plan's own width, and an odd one below it.

    There are more rows than a GPU works on at once, so that teams take a second row.
    """
    _, cluster, threads = plan.split(",")
    if is_small:
        return [(2, 37), (3, int(cluster) * int(threads) // 4 + 5)]
    widest = min(COLUMNS_OF_THREAD * int(cluster) * int(threads), WIDEST)
    return [(min(2**23 // columns, 9000), columns) for columns in (37, widest // 2 + 13, widest)]
