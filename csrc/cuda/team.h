// A team: the threads that work on one row. A team is a thread-block cluster, of one block if the row is short or the
// chip has no clusters. A team merges partial results in a fixed order, so that no result depends on timing.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "device.h"
#include "launch.h"

namespace kdk {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;  // of a block
constexpr int kMaxBlocks = 16;    // of a cluster; 8 where the device does not allow more

// The words of a struct of floats, doubles and ints. Shuffles and slots move words.
template <class X> struct Words {
  static constexpr int count = sizeof(X) / 4;
  uint32_t words[count];

  Words() = default;
  __device__ explicit Words(const X& x) { memcpy(words, &x, sizeof(X)); }
  __device__ X value() const {
    X x;
    memcpy(&x, words, sizeof(X));
    return x;
  }
};

template <class X> inline __device__ X from_lane_below(const X& x, int by) {
  Words<X> moved(x);
  for (int i = 0; i < moved.count; ++i) moved.words[i] = __shfl_down_sync(0xffffffffu, moved.words[i], by);
  return moved.value();
}
// Calls x.share(options), if X has it, in all lanes of a warp before they merge.
template <class X, class... Options>
inline __device__ auto share_in_warp(int, X& x, const Options&... options) -> decltype(x.share(options...)) {
  x.share(options...);
}
template <class X, class... Options> inline __device__ void share_in_warp(long, X&, const Options&...) {}

// Returns, in lane 0, the merge of the x of all lanes.
template <class X, class... Options> inline __device__ X merged_in_warp(X x, const Options&... options) {
  share_in_warp(0, x, options...);
  for (int by = kWarp / 2; by; by /= 2) x.merge(from_lane_below(x, by));
  return x;
}

inline __device__ float warp_max(float x) {
  for (int by = kWarp / 2; by; by /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, by));
  return x;
}

// A partial result, or the merge of some. Eight words are enough for each X.
struct alignas(16) Slot {
  uint32_t words[8];

  template <class X> __device__ void put(const X& x) {
    static_assert(sizeof(X) <= sizeof(Slot), "a partial result fits its slot");
    const Words<X> from(x);
    for (int i = 0; i < from.count; ++i) words[i] = from.words[i];
  }
  template <class X> __device__ X get() const {
    Words<X> to;
    for (int i = 0; i < to.count; ++i) to.words[i] = words[i];
    return to.value();
  }
};

// The head of a block's shared memory. A kernel's own data follows it. At the end stand a slot for each warp and, in a
// cluster, two slots for each of its blocks.
struct alignas(16) Board {
  Slot of_team;
  uint64_t arrived;   // barrier for bulk copies
  uint64_t met[2];    // barriers for the partial results of the cluster's blocks
  float label_logit;  // of the student. The block's first thread stores it; the sweeps have a register more.

  __device__ char* data() { return (char*)(this + 1); }
};
inline __host__ __device__ int bytes_of_slots(int threads, int blocks) {
  return (threads / kWarp + (blocks > 1 ? 2 * blocks : 0)) * (int)sizeof(Slot);
}
// The bytes of shared memory of a block whose kernel has `data` bytes of its own.
inline int64_t shared_with_board(int threads, int blocks, int64_t data) {
  return sizeof(Board) + (data + 15) / 16 * 16 + bytes_of_slots(threads, blocks);
}

struct Team {
  Board& board;
  const Launch& launch;
  const int blocks, rank;
  int merges;  // of the cluster, so far

  // All threads of the team call this.
  __device__ Team(const Launch& launch)
      : board(*(Board*)shared_memory()),
        launch(launch),
        blocks(launch.blocks),
        rank(blockIdx.x % launch.blocks),
        merges(0) {
    if (blocks == 1) return;
    if (threadIdx.x == 0) {
      for (uint64_t& barrier : board.met) bulk_barrier_init(&barrier);
      bulk_barrier_init_fence();
    }
    cluster_sync(blocks);
  }

  __device__ bool first_thread() const { return rank == 0 && threadIdx.x == 0; }

  __device__ Slot* slots_of_warps() const {
    return (Slot*)(shared_memory() + launch.shared - bytes_of_slots(launch.threads, blocks));
  }

  // Returns, in every thread, the merge of every thread's x. An X is a struct of floats, doubles and ints with
  // merge(other) and with none(), the neutral element. It may have share(options), which moves x to a base that the
  // whole warp shares.
  template <class X, class... Options> __device__ X merged(const X& mine, const Options&... options) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = launch.threads / kWarp;
    X x = merged_in_warp(mine, options...);
    if (lane == 0) slots_of_warps()[warp].put(x);
    __syncthreads();
    if (warp == 0) {
      x = merged_in_warp(lane < warps ? slots_of_warps()[lane].get<X>() : X::none(), options...);
      if (blocks > 1) {
        const Slot* of_blocks = exchanged(x);
        x = merged_in_warp(lane < blocks ? of_blocks[lane].get<X>() : X::none(), options...);
      }
      if (lane == 0) board.of_team.put(x);
    }
    __syncthreads();
    return board.of_team.get<X>();
  }

  // The first warp sends its first lane's x to every block of the cluster. Returns the slots of all blocks, which are
  // complete. Slots and barriers alternate: a fast block may send its next x before this block has all of these, but
  // not the one after, which waits for this block's next x.
  template <class X> __device__ const Slot* exchanged(const X& x) {
    constexpr int kParts = (sizeof(X) + 15) / 16;
    const int lane = threadIdx.x, turn = merges % 2, parity = merges / 2 % 2;
    Slot* slots = slots_of_warps() + launch.threads / kWarp + turn * blocks;
    uint64_t* barrier = &board.met[turn];
    ++merges;

    const Words<X> from(x);
    uint32_t words[4 * kParts] = {};
    for (int i = 0; i < from.count; ++i) words[i] = __shfl_sync(0xffffffffu, from.words[i], 0);
    if (lane == 0) bulk_barrier_expect(barrier, blocks * kParts * 16);
    if (lane < blocks)
      for (int i = 0; i < kParts; ++i)
        store_to_block(lane, slots[rank].words + 4 * i,
                       make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]), barrier);
    bulk_barrier_wait(barrier, parity);
    return slots;
  }
};

}  // namespace cuda
}  // namespace kdk
