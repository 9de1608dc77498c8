"""The CUDA model finds the faults that it is meant to find.

Correct kernels pass under every seed. A kernel without one of its barriers, bounds or waits fails. Without these tests,
a kernel that passes under the model would prove nothing.
"""

import math
import re
import time

import emulated
import pytest
import torch
from emulated import MODEL, ROOT

pytestmark = pytest.mark.skipif(emulated.missing_because is not None, reason=str(emulated.missing_because))

SEEDS = 20
WARP, BLOCK, CLUSTER = 32, 128, 512  # threads; see faults.cu

# fault -> (group whose values rotate by one, the model's error or None for a wrong result, the least number of seeds)
FAULTS = {
    "block_barrier": (BLOCK, None, 18),
    "warp_barrier": (WARP, None, 18),
    "cluster_barrier": (CLUSTER, "not initialised yet", 12),
    "arrival_not_awaited": (CLUSTER, "a block that has ended|while a bulk copy is under way", 12),
    "divergent_barrier": (BLOCK, "at the block barrier|wait at a barrier", 20),
    "two_barriers": (BLOCK, r"block barrier of faults.cu:\d+, others at that of faults.cu:\d+", 20),
    "deadlock": (BLOCK, r"deadlock.*64 threads at the block barrier.*64 threads in a warp exchange", 20),
    "shuffle_outside_mask": (WARP, "lane 30 reads lane 31, which is not in the mask 0x7fffffff", 20),
    "shuffle_without_a_lane": (WARP, "waits in a warp exchange for it|which are not there any more", 20),
    "shuffle_by_kind": (WARP, "another lane in one of another kind", 20),
    "slot_reused": (BLOCK, None, 18),
    "unwritten": (BLOCK, None, 20),
    "shared_overrun": (BLOCK, "overran its shared memory of 512 bytes: a write at 512", 20),
    "read_past_the_end": (WARP, r"reads 4 bytes at .* outside the readable memory.* ends 0 before it", 20),
    "write_to_input": (WARP, "writes 4 bytes at .* outside the writable memory", 20),
    "misaligned": (BLOCK, "reads 16 bytes at .* not a multiple of 16", 20),
    "not_awaited": (BLOCK, None, 12),
    "buffer_in_use": (BLOCK, None, 18),
    "too_many_bytes": (BLOCK, "more bytes than the bulk barrier expects", 20),
    "too_few_bytes": (BLOCK, "deadlock.*at a bulk barrier", 20),
    "no_barrier_after_init": (BLOCK, "not initialised yet", 18),
    "left_under_way": (BLOCK, "while a bulk copy is under way", 20),
    "misaligned_copy": (BLOCK, "reads 512 bytes at .* not a multiple of 16", 20),
    "initialised_twice": (BLOCK, "initialises a bulk barrier twice", 20),
}


# Faults that the watched build finds under every seed. The plain build finds two_cluster_barriers and init_not_fenced
# too, and those of FAULTS under some seeds; it finds no other.
UNORDERED = "and no barrier stands between"
WATCHED_FAULTS = {
    "two_cluster_barriers": (CLUSTER, r"cluster barrier of faults.cu:\d+, others at that of faults.cu:\d+"),
    "two_calls_of_a_barrier": (BLOCK, r"block barrier of faults.cu:\d+, to which other calls led others"),
    "block_barrier": (BLOCK, UNORDERED),
    "warp_barrier": (WARP, UNORDERED),
    "cluster_barrier": (CLUSTER, UNORDERED + "|not initialised yet"),
    "slot_reused": (BLOCK, UNORDERED),
    "buffer_in_use": (BLOCK, UNORDERED + "|without a bulk_fence and a barrier since"),
    "no_barrier_after_init": (BLOCK, UNORDERED + "|not initialised yet"),
    "shuffle_for_a_barrier": (WARP, UNORDERED),
    "block_through_global": (BLOCK, None),
    "cluster_through_global": (CLUSTER, None),
    "neighbour_rewritten": (WARP, r"(reads|writes) byte .*another cluster of this launch"),
    "neighbour_read": (WARP, r"(reads|writes) byte .*another cluster of this launch"),
    "written_twice": (WARP, r"writes byte .* of global memory, which thread 0 of block \d wrote, " + UNORDERED),
    "init_not_fenced": (BLOCK, "to a bulk barrier that no bulk_barrier_init_fence followed"),
    "not_fenced": (BLOCK, "touched, without a bulk_fence and a barrier since"),
    "fenced_after_the_barrier": (BLOCK, "touched, without a bulk_fence and a barrier since"),
    "written_before": (BLOCK, "touched, without a bulk_fence and a barrier since"),
}


@pytest.fixture(scope="module")
def faults():
    return emulated.faults()


def is_rotated(out: list[float], group: int) -> bool:
    return out == [float(i - i % group + (i + 1) % group) for i in range(len(out))]


def outcomes(faults, fault: str, broken: bool, group: int, message: str | None, seeds: int = SEEDS) -> list[bool]:
    """For each seed, whether the model finds the fault: a wrong result, or an error with this message."""
    found = []
    for seed in range(seeds):
        faults.set_seed(seed)
        try:
            found.append(not is_rotated(faults.run(fault, broken), group))
        except RuntimeError as error:
            assert str(error).startswith("CUDA model: block "), error
            assert message is None or re.search(message, str(error)), error
            found.append(True)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_right_kernel_passes(faults, fault):
    assert not any(outcomes(faults, fault, False, FAULTS[fault][0], None))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(faults, fault):
    group, message, at_least = FAULTS[fault]
    found = sum(outcomes(faults, fault, True, group, message))
    print(f"{fault}: found under {found} of {SEEDS} seeds")
    assert found >= at_least


def test_right_kernels_pass_under_the_watch():
    for fault in FAULTS | WATCHED_FAULTS:
        group = (FAULTS | WATCHED_FAULTS)[fault][0]
        assert not any(outcomes(emulated.faults(watched=True), fault, False, group, None, seeds=5)), fault


@pytest.mark.parametrize("fault", WATCHED_FAULTS)
def test_the_watch_finds_a_fault_under_every_seed(fault):
    group, message = WATCHED_FAULTS[fault]
    found = outcomes(emulated.faults(watched=True), fault, True, group, message)
    assert all(found), f"found under {sum(found)} of {SEEDS} seeds"


def test_a_seed_is_a_schedule(faults):
    def outcome(seed):
        faults.set_seed(seed)
        return str(faults.run("block_barrier", True))  # a text of numbers and NaN, so that NaN equals NaN

    assert [outcome(seed) for seed in range(5)] == [outcome(seed) for seed in range(5)]
    assert len({outcome(seed) for seed in range(5)}) == 5


def test_votes_and_widths(faults):
    for seed in range(SEEDS):
        faults.set_seed(seed)
        out = torch.tensor(faults.votes(64)).view(2, 32, 9)
        for lane in range(32):
            first, place = lane // 8 * 8, lane % 8
            assert out[:, lane].tolist() == 2 * [[
                sum(1 << i for i in range(0, 32, 3)), 2,
                lane - 3 if place >= 3 else lane, lane + 3 if place < 5 else lane,
                lane if (lane ^ 12) // 8 > lane // 8 else lane ^ 12, first + 3, 2, 1, 3 if lane < 16 else 19,
            ]]  # fmt: skip


def test_switches_are_cheap(faults):
    """Clusters of 16 blocks of 512 threads, as for the largest rows. A row takes some hundred switches per thread."""
    before, start = faults.switches(), time.process_time()
    faults.many_switches(16, 512, 10)
    nanoseconds = (time.process_time() - start) / (faults.switches() - before) * 1e9
    print(f"{nanoseconds:.0f} ns per switch")
    assert nanoseconds < 2000


# ---- numbers


@pytest.mark.skipif(not emulated.contracts(), reason="the processor has no fused multiply-add")
def test_the_watched_build_fuses_products_and_sums(faults):
    x = 1 + 2.0**-12  # x * x ends with 2^-24, which a float near 1 has no room for
    assert faults.product_and_sum(x, x, -(1 + 2.0**-11)) == 0
    assert emulated.faults(watched=True).product_and_sum(x, x, -(1 + 2.0**-11)) == 2.0**-24


def of_float32(function, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([function(value) for value in x.tolist()], dtype=torch.float64)


def test_exp2_is_within_two_ulps(faults):
    x = torch.cat([torch.randn(4000) * 8, torch.rand(2000) * 250 - 125])
    exact = torch.exp2(x.double())
    ulps = (of_float32(faults.exp2_approx, x) - exact).abs() / torch.exp2(exact.log2().floor() - 23)
    assert 1.8 < ulps.max() <= 2
    for x, y in [(0, 1), (1e-40, 1), (-1e-40, 1), (-126.5, 0), (-math.inf, 0), (128, math.inf), (math.inf, math.inf)]:
        assert faults.exp2_approx(x) == y
    assert math.isnan(faults.exp2_approx(math.nan))


def test_log2_is_within_its_bounds(faults):
    x = torch.cat([torch.rand(4000) * 1.5 + 0.5, torch.exp2(torch.rand(4000) * 250 - 125)])
    exact = torch.log2(x.double())
    near_one = (x > 0.5) & (x < 2)
    bound = torch.where(near_one, 2**-22, 2**-22.6 * exact.abs())
    used = (of_float32(faults.log2_approx, x) - exact).abs() / bound
    assert 0.9 < used[near_one].max() <= 1 and 0.75 < used[~near_one].max() <= 1
    for x, y in [(1, 0), (0, -math.inf), (-0.0, -math.inf), (1e-40, -math.inf), (math.inf, math.inf)]:
        assert faults.log2_approx(x) == y
    for x in (-1.0, -math.inf, math.nan):
        assert math.isnan(faults.log2_approx(x))


def test_reciprocal_is_within_one_ulp(faults):
    x = torch.randn(4000) * torch.exp2(torch.randn(4000) * 20)
    exact = 1 / x.double()
    ulps = (of_float32(faults.reciprocal_approx, x) - exact).abs() / torch.exp2(exact.abs().log2().floor() - 23)
    assert 0.9 < ulps.max() <= 1
    for x, y in [(0, math.inf), (-0.0, -math.inf), (1e-40, math.inf), (3e38, 0), (math.inf, 0)]:
        assert faults.reciprocal_approx(x) == y
    assert math.isnan(faults.reciprocal_approx(math.nan))


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_16_bit_floats(faults, dtype, name):
    widen, narrow = getattr(faults, f"floats_of_{name}x2"), getattr(faults, f"{name}x2_of_floats")
    words = torch.arange(2**16, dtype=torch.int32)
    floats = words.to(torch.int16).view(dtype).float()
    got = torch.tensor([widen(word | 0x3C000000) for word in words.tolist()])
    torch.testing.assert_close(got[:, 0], floats, rtol=0, atol=0, equal_nan=True)
    assert (got[:, 1] == widen(0x3C00)[0]).all()

    # Every number, the midpoint to the next number and its two neighbours; numbers beyond the largest; subnormals.
    bits = floats.view(torch.int32)
    half_ulp = 1 << (15 if dtype == torch.bfloat16 else 12)
    x = torch.cat([(bits + shift).view(torch.float32) for shift in (0, half_ulp - 1, half_ulp, half_ulp + 1)])
    x = torch.cat([x[::7], torch.randn(3000) * 2**-20, torch.tensor([65504, 65519.99, 65520, 3.4e38, math.inf])])
    want = x.to(dtype).view(torch.int16).int() & 0xFFFF
    want[x.isnan()] = 0x7FFF
    assert [narrow(value, -2.0) & 0xFFFF for value in x.tolist()] == want.tolist()
    assert narrow(0.0, -2.0) >> 16 == 0xC000


# ---- the runtime


def test_launches_that_a_device_refuses(faults):
    old = faults.configure_device(major=8, shared_memory_per_block=163 << 10)
    names = ("device", "blocks", "threads", "cluster", "shared", "allowed_shared", "non_portable")
    fits = dict(zip(names, (0, 32, 128, 1, 0, 48 << 10, False), strict=True))
    for changed, error in [
        ({}, "Success"),
        ({"threads": 1024}, "Success"),
        ({"threads": 1025}, "ErrorInvalidConfiguration"),
        ({"blocks": 0}, "ErrorInvalidConfiguration"),
        ({"shared": 48 << 10}, "Success"),
        ({"shared": (48 << 10) + 1}, "ErrorInvalidValue"),
        ({"shared": 227 << 10, "allowed_shared": 227 << 10}, "Success"),
        ({"allowed_shared": (227 << 10) + 1}, "ErrorInvalidValue"),
        ({"device": old, "allowed_shared": 227 << 10}, "ErrorInvalidValue"),
        ({"device": old, "allowed_shared": 163 << 10, "shared": 163 << 10}, "Success"),
        ({"cluster": 8}, "Success"),
        ({"cluster": 16}, "ErrorInvalidClusterSize"),
        ({"cluster": 16, "non_portable": True}, "Success"),
        ({"cluster": 16, "non_portable": True, "device": faults.configure_device(max_cluster=8)},
         "ErrorLaunchOutOfResources"),
        ({"cluster": 8, "blocks": 12}, "ErrorInvalidConfiguration"),
        ({"cluster": 2, "device": old}, "ErrorNotSupported"),
    ]:  # fmt: skip
        assert faults.launch_error(**{**fits, **changed}) == f"cuda{error}", changed


def test_every_function_of_device_h_has_a_twin():
    def names(path):
        return set(re.findall(r"^(?:template <class T> )?inline __device__ [\w* ]+?(\w+)\(", path.read_text(), re.M))

    wanted = names(ROOT / "csrc" / "cuda" / "device.h")
    assert {"shared_memory", "load", "exp2_approx", "store_to_block", "bulk_copy"} <= wanted
    header = (MODEL / "cuda_runtime.h").read_text()
    assert [name for name in wanted if not re.search(rf"\b{name}\(", header)] == []
