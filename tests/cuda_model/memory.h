// The memory of the CUDA model (cuda_runtime.h): bulk copies to shared memory, and the ranges of allowed global memory.
#pragma once

#include "watch.h"

namespace kdk::model {

// ---- bulk copies

// A barrier's word in shared memory is an index of its state, so that the model does not find an overwritten barrier.
constexpr uint64_t kBulkBarrier = 0x6b42756c6b000000ull;

inline size_t shared_offset(const void* address, size_t bytes, size_t alignment, const char* what) {
  uintptr_t offset = (uintptr_t)address - (uintptr_t)machine.current->block->shared;
  if (offset > machine.shared_bytes || bytes > machine.shared_bytes - offset)
    fail(std::string(what) + " is not in the shared memory of its block");
  if (offset % alignment) fail(std::string(what) + " is not aligned to " + std::to_string(alignment) + " bytes");
  return offset;
}

// The state of the barrier at this place of a block's shared memory, or null if the word is no barrier. `word` is in the
// shared memory of the running thread's block.
inline BulkBarrier* find_bulk_barrier(const uint64_t* word, Block& block) {
  if (machine.devices[machine.current_device].major < 9) fail("uses a bulk barrier, which came with sm_90");
  const size_t offset = shared_offset(word, 8, 8, "uses a bulk barrier that");
  const uint64_t index = *(const uint64_t*)(block.shared + offset) - kBulkBarrier;
  return index < block.bulk_barriers.size() ? &block.bulk_barriers[index] : nullptr;
}
inline BulkBarrier& bulk_barrier(const uint64_t* word, Block& block = *machine.current->block) {
  BulkBarrier* barrier = find_bulk_barrier(word, block);
  if (!barrier) fail("uses a bulk barrier that is not initialised yet, or was overwritten");
  return *barrier;
}

inline void end_phase_if_complete(BulkBarrier& barrier) {
  if (!barrier.expecting || barrier.to_arrive) return;
  barrier.phase ^= 1;
  barrier.expecting = false;
  for (Fiber* fiber : barrier.waiting) wake(fiber);
  barrier.waiting.clear();
}

// Completes one of the copies under way.
inline void end_copy() {
  std::swap(machine.copies[random_below((int)machine.copies.size())], machine.copies.back());
  BulkCopy copy = machine.copies.back();
  machine.copies.pop_back();
  if (copy.block->ended == block_threads()) fail("lets a copy arrive in the shared memory of a block that has ended");
  memcpy(copy.to, copy.from ? copy.from : copy.value, copy.bytes);
  copy.barrier->to_arrive -= copy.bytes;
  end_phase_if_complete(*copy.barrier);
}

// ---- global memory

struct Range {
  uintptr_t first, last;
};

// Allowed ranges. Overlapping ranges become one range; touching ranges do not, because an access must lie in one range.
struct Ranges {
  std::vector<Range> sorted;
  bool dirty = false;
  size_t recent = 0;

  void add(uintptr_t address, size_t bytes) {
    if (bytes) sorted.push_back({address, address + bytes});
    dirty = true;
  }
  void clear() { *this = Ranges(); }
  void sort() {
    std::sort(sorted.begin(), sorted.end(), [](Range a, Range b) { return a.first < b.first; });
    size_t kept = 0;
    for (Range range : sorted) {
      if (kept && range.first < sorted[kept - 1].last)
        sorted[kept - 1].last = std::max(sorted[kept - 1].last, range.last);
      else
        sorted[kept++] = range;
    }
    sorted.resize(kept);
    recent = 0;
    dirty = false;
  }
  bool contains(uintptr_t first, uintptr_t last) {
    if (dirty) sort();
    auto inside = [&](size_t i) { return i < sorted.size() && first >= sorted[i].first && last <= sorted[i].last; };
    if (inside(recent)) return true;
    auto begins_after = [](uintptr_t x, Range r) { return x < r.first; };
    auto after = std::upper_bound(sorted.begin(), sorted.end(), first, begins_after);
    recent = after == sorted.begin() ? 0 : after - sorted.begin() - 1;
    return inside(recent);
  }
  std::string nearest(uintptr_t first, uintptr_t last) const {
    const Range* best = nullptr;
    auto before = [&](Range r) { return r.first >= last ? r.first - last : 0; };
    auto after = [&](Range r) { return first >= r.last ? first - r.last : 0; };
    for (const Range& r : sorted)
      if (!best || before(r) + after(r) < before(*best) + after(*best)) best = &r;
    if (!best) return "there is none";
    return "the nearest is [" + hex(best->first) + ", " + hex(best->last) + "), which begins " +
           std::to_string(before(*best)) + " bytes after it or ends " + std::to_string(after(*best)) + " before it";
  }
};
inline Ranges readable, writable;

inline void check_global(const void* address, size_t bytes, size_t alignment, bool write) {
  const uintptr_t first = (uintptr_t)address;
  auto access = [&] { return (write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at " + hex(first); };
  if (first % alignment) fail(access() + ", which is not a multiple of " + std::to_string(alignment));
  if (readable.sorted.empty() && writable.sorted.empty()) return;
  Ranges& ranges = write ? writable : readable;
  if (!ranges.contains(first, first + bytes))
    fail(access() + ", outside the " + (write ? "writable" : "readable") + " memory: " +
         ranges.nearest(first, first + bytes));
}

}  // namespace kdk::model
