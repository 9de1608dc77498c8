// A team: the threads that work on one row. A team is a thread-block cluster, of one block if the row is short or the
// chip has no clusters. A team merges partial results in a fixed order, so that no result depends on timing.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "device.h"

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

// The header of a block's shared memory. A kernel's own data follows it.
struct alignas(128) Board {
  Slot of_warp[kMaxThreads / kWarp];
  Slot of_block[2];   // read by the other blocks; they alternate, so that a fast block overwrites nothing
  Slot of_team;
  uint64_t arrived;   // barrier for bulk copies
  float label_logit;  // of the student; stored by the first thread for itself, which frees a register in the sweeps
};

struct Team {
  Board& board;
  const int blocks, rank;
  int turn;

  __device__ Team(int blocks) : board(*(Board*)shared_memory()), blocks(blocks), rank(blockIdx.x % blocks), turn(0) {}

  __device__ bool first_thread() const { return rank == 0 && threadIdx.x == 0; }

  // Returns, in every thread, the merge of every thread's x. An X is a struct of floats, doubles and ints with merge(other)
  // and with none(), the neutral element. It may have share(options), which moves x to a base that the whole warp shares.
  template <class X, class... Options> __device__ X merged(const X& mine, const Options&... options) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    X x = merged_in_warp(mine, options...);
    if (lane == 0) board.of_warp[warp].put(x);
    __syncthreads();
    Slot& whole = blocks == 1 ? board.of_team : board.of_block[turn];
    if (warp == 0) {
      x = merged_in_warp(lane < warps ? board.of_warp[lane].get<X>() : X::none(), options...);
      if (lane == 0) whole.put(x);
    }
    if (blocks > 1) {
      cluster_sync(blocks);
      if (warp == 0) {
        x = merged_in_warp(lane < blocks ? map_shared_rank(&whole, lane)->get<X>() : X::none(), options...);
        if (lane == 0) board.of_team.put(x);
      }
      turn ^= 1;
    }
    __syncthreads();
    return board.of_team.get<X>();
  }
};

}  // namespace cuda
}  // namespace kdk
