// How a call is launched: the way of its kernels, one of three, and the number of blocks in a cluster. The host makes
// the plan from sizes alone.
#pragma once
#include <limits.h>
#include <stdint.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../calls/rows.h"
#include "groups.h"
#include "launch.h"
#include "team.h"

namespace kdk {
namespace cuda {

// The threads that a multiprocessor holds of a kernel: as many as the registers of its way allow.
constexpr int threads_held(Way way) { return way == Way::halves ? 768 : 512; }
// The threads of a block that shares its multiprocessor with another. A block alone may have kMaxThreads.
constexpr int kThreadsOfTwo = 256;
// Every card with clusters allows this many blocks.
constexpr int kMaxStreamingBlocks = 8;

struct Plan : Launch {
  int slice;  // columns of a block, a multiple of kGroup
  int teams;  // of the launch
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The number of threads for which each has at most `groups` groups of the slice; at most `most`.
inline int threads_for(int64_t slice, int groups, int most) {
  int threads = kWarp;
  while (threads < most && slice > groups * kGroup * threads) threads *= 2;
  return threads;
}

inline bool rows_are_aligned(const Logits& x) {
  const int bytes = bytes_of(x.dtype);
  return (uint64_t)x.data % 16 == 0 && x.outer_stride * bytes % 16 == 0 && x.inner_stride * bytes % 16 == 0;
}

// Gives the views a single row stride if one is enough, so that no row is found by a division. Returns the new `inner`,
// which is `rows` then.
template <class... Views> inline int64_t collapse(int64_t rows, int64_t inner, Views&... views) {
  if (inner == 1) {
    inner = rows;
    ((views.inner_stride = views.outer_stride), ...);
  } else if (((views.outer_stride == inner * views.inner_stride) && ...)) {
    inner = rows;
  }
  if (inner == rows) ((views.outer_stride = 0), ...);
  return inner;
}

// The sizes of a call, from which its plan is made.
struct Shape {
  int64_t rows, columns;
  int sweeps;        // the number of times that the logits are read
  int column_bytes;  // bytes of one column in all tensors that are read
  int column_bits;   // bits of shared memory for each column of a block's slice, besides the staged logits
  bool aligned;      // every row begins at a multiple of 16 bytes
  bool halves;
};

// The threads of a block. Around its loops a row costs a thread as much time as two groups inside. A thread that reads
// global memory should still wait for few groups, and so should a thread of a block that is alone on its multiprocessor.
inline int threads_of(Way way, int64_t slice, bool is_alone) {
  if (way == Way::streaming) return threads_for(slice, 2, kMaxThreads);
  return is_alone ? threads_for(slice, 4, kMaxThreads) : threads_for(slice, 8, kThreadsOfTwo);
}

// A plan for clusters of `blocks` blocks, without the number of clusters. `threads` is 0 for those of threads_of.
inline Plan cut(const Shape& shape, Way way, int blocks, bool is_alone, int threads = 0) {
  const int64_t positions = shape.columns + (shape.aligned ? 0 : kGroup - 1);  // a row that is not aligned is shifted
  Plan plan = {};
  plan.way = way;
  plan.blocks = blocks;
  plan.slice = (int)round_up((positions + blocks - 1) / blocks, kGroup);
  plan.threads = threads ? threads : threads_of(way, plan.slice, is_alone);
  const int64_t staged = way == Way::streaming ? 0 : (int64_t)plan.slice * shape.column_bytes;
  const int64_t shared = shared_with_board(plan.threads, blocks, staged + (int64_t)plan.slice * shape.column_bits / 8);
  plan.shared = (int)(shared < INT_MAX ? shared : INT_MAX);
  return plan;
}

inline Plan with_teams(Plan plan, const Shape& shape, int64_t teams) {
  plan.teams = (int)(teams < shape.rows ? teams : shape.rows);
  plan.grid = plan.teams * plan.blocks;
  return plan;
}

// Limits the teams, each of which works on a row, if rows are read more than once: to as many as have their rows in the
// L2 cache, where later sweeps find them, but not to fewer than keep the chip busy.
inline int64_t limited_teams(int64_t teams, const Shape& shape, const Chip& chip, int blocks, int64_t fit) {
  if (shape.sweeps < 2) return teams;
  const int64_t busy = chip.multiprocessors / blocks, limit = fit > busy ? fit : busy;
  return teams < limit ? teams : limit < 1 ? 1 : limit;
}
inline int64_t rows_in_cache(const Shape& shape, const Chip& chip) {
  return (int64_t)(0.75 * chip.l2) / (shape.columns * shape.column_bytes);
}

// Takes the smallest cluster that lets a multiprocessor hold two blocks, so that one block works while the other waits
// for its row or its cluster; else the smallest cluster that fits. Prefers clusters that fill most of the chip. Returns
// a plan without blocks if no cluster holds the row.
template <class KernelOf> Plan plan_staged(const Shape& shape, const Chip& chip, int device, KernelOf kernel_of) {
  const Way way = shape.halves ? Way::halves : Way::staged;
  for (int occupancy : {2, 1, 0}) {
    for (int blocks = 1; blocks <= kMaxBlocks; blocks *= 2) {
      const Plan plan = cut(shape, way, blocks, occupancy < 2);
      if (plan.shared > chip.shared_of(occupancy)) continue;
      const int teams = teams_at_once(kernel_of(way), plan, chip, device);
      if (teams > 0 && teams * blocks >= 0.75 * occupancy * chip.multiprocessors) return with_teams(plan, shape, teams);
    }
  }
  return {};
}

// Takes larger clusters, if the chip has clusters, until the rows of all clusters fill at most three quarters of the L2
// cache.
template <class KernelOf> Plan plan_streaming(const Shape& shape, const Chip& chip, int device, KernelOf kernel_of) {
  const int64_t fit = rows_in_cache(shape, chip);
  Plan plan = {};
  int64_t teams = 0;
  for (int blocks = 1; blocks <= kMaxStreamingBlocks; blocks *= 2) {
    if (blocks > 1 && !chip.clusters) break;
    const Plan larger = cut(shape, Way::streaming, blocks, false);
    if (larger.shared > chip.shared) continue;
    const int64_t at_once = teams_at_once(kernel_of(Way::streaming), larger, chip, device);
    if (at_once == 0) break;
    plan = larger, teams = at_once;
    if (shape.sweeps < 2 || at_once <= fit) break;
  }
  require_room(teams > 0);
  return with_teams(plan, shape, limited_teams(teams, shape, chip, plan.blocks, fit));
}

// The plan that KDKERNELS_PLAN asks for, "way,blocks,threads" as in "staged,4,256", so that plans can be compared without
// a rebuild. Each call reads it.
struct Forced {
  std::string text;
  Way way = Way::streaming;
  int blocks = 0, threads = 0;  // blocks is 0 if nothing is asked for

  explicit Forced(const char* value) : text(value ? value : "") {
    if (text.empty()) return;
    char name[16] = {}, more = 0;
    const int read = std::sscanf(text.c_str(), "%15[a-z],%d,%d%c", name, &blocks, &threads, &more);
    int found = 0;
    while (found < 3 && std::string(name) != kWays[found]) ++found;
    const bool powers = blocks > 0 && !(blocks & (blocks - 1)) && threads > 0 && !(threads & (threads - 1));
    if (read != 3 || found == 3 || !powers || blocks > kMaxBlocks || threads < kWarp || threads > kMaxThreads)
      fail("expected WAY,BLOCKS,THREADS: halves, staged or streaming; the blocks of a cluster, a power of 2 up to 16; "
           "the threads of a block, a power of 2 from 32 to 512");
    if ((Way)found == Way::streaming && blocks > kMaxStreamingBlocks) fail("streaming takes clusters of up to 8 blocks");
    way = (Way)found;
  }
  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error("KDKERNELS_PLAN=" + text + ": " + why);
  }
};

template <class KernelOf>
Plan plan_forced(const Forced& forced, const Shape& shape, const Chip& chip, int device, KernelOf kernel_of) {
  if (forced.way == Way::halves && !shape.halves) forced.fail("the logits of this call are not of one 16-bit dtype");
  if ((forced.way != Way::streaming || forced.blocks > 1) && !chip.clusters)
    forced.fail("these kernels have no clusters and no bulk copies on this device");
  const Plan plan = cut(shape, forced.way, forced.blocks, false, forced.threads);
  const int64_t teams = plan.shared > chip.shared ? 0 : teams_at_once(kernel_of(forced.way), plan, chip, device);
  if (teams == 0)
    forced.fail("the device has no room for a cluster: a block takes " + std::to_string(plan.shared) +
                " bytes of shared memory, and may have " + std::to_string(chip.shared));
  if (forced.way != Way::streaming) return with_teams(plan, shape, teams);
  return with_teams(plan, shape, limited_teams(teams, shape, chip, plan.blocks, rows_in_cache(shape, chip)));
}

// kernel_of(way) returns the kernel of a way.
template <class KernelOf> Plan plan(const Shape& shape, const Chip& chip, int device, KernelOf kernel_of) {
  if (const Forced forced(std::getenv("KDKERNELS_PLAN")); forced.blocks)
    return plan_forced(forced, shape, chip, device, kernel_of);
  if (chip.clusters && shape.sweeps > 1) {
    const Plan staged = plan_staged(shape, chip, device, kernel_of);
    if (staged.blocks) return staged;
  }
  return plan_streaming(shape, chip, device, kernel_of);
}

}  // namespace cuda
}  // namespace kdk
