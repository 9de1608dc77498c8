// Runs a grid in the CUDA model (cuda_runtime.h): one cluster after the other, in a random order.
#pragma once

#include "memory.h"

namespace kdk::model {

constexpr size_t kCanary = 1024;  // bytes before and after a block's shared memory

inline size_t shared_stride() { return (machine.shared_bytes + 2 * kCanary + 127) / 128 * 128; }

inline void check_canaries(const Block& block) {
  for (size_t i = 0; i < kCanary; ++i)
    for (const char* at : {block.shared - 1 - i, block.shared + machine.shared_bytes + i})
      if (*at != (char)0xff)
        fail("ends a block that overran its shared memory of " + std::to_string(machine.shared_bytes) +
             " bytes: a write at " + std::to_string(at - block.shared));
}

inline void end_block(Block& block) {
  check_canaries(block);
  for (const BulkCopy& copy : machine.copies)
    if (copy.block == &block) fail("ends its block while a bulk copy is under way");
  memset(block.shared, 0xff, machine.shared_bytes);
}

inline void end_thread() {
  Fiber* self = machine.current;
  Block& block = *self->block;
  Warp& warp = block.warps[self->thread / 32];
  if (block.at_barrier || machine.at_barrier)
    fail("ends while " + std::to_string(block.at_barrier + machine.at_barrier) + " threads wait at a barrier for it");
  for (int i = 0; i < 32; ++i)
    if ((warp.waiting >> i & 1) && (warp.lanes[i].mask >> (self->thread % 32) & 1))
      fail("ends while lane " + std::to_string(i) + " waits in a warp exchange for it");
  warp.ended |= 1u << (self->thread % 32);
  ++machine.ended;
  if (++block.ended == block_threads()) end_block(block);
  if (machine.ended < machine.threads) return sleep(Wait::the_end, Place());
  if (_setjmp(self->context) == 0) _longjmp(machine.host, 2);
}

// The loop of a fiber. When its thread has ended, the fiber sleeps until it gets another thread.
inline void run_threads() {
  for (;;) {
    machine.kernel(machine.arguments);
    end_thread();
  }
}

inline void start_block(Block& block, int number, int rank) {
  block.number = number;
  block.rank = rank;
  block.index = dim3(number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y);
  block.shared = machine.shared.data() + rank * shared_stride() + kCanary;
  block.shared += -(uintptr_t)block.shared % 128;
  block.first = &machine.fibers[rank * block_threads()];
  block.warps.resize((block_threads() + 31) / 32);
  for (int i = 0; i < block_threads(); ++i) {
    Fiber& fiber = block.first[i];
    const unsigned row = i / blockDim.x;
    fiber.block = &block;
    fiber.thread = i;
    fiber.number = number_in_launch(number, i);
    fiber.fence = fiber.fence_before = 0;
    fiber.index = dim3(i % blockDim.x, row % blockDim.y, row / blockDim.y);
    fiber.wait = Wait::nothing;
    block.warps[i / 32].present |= 1u << (i % 32);
  }
}

// Draws priorities, each with a share for the block, a share for the warp and a share for the thread. The weights of
// the shares are random too.
inline void draw_priorities() {
  const uint64_t block_weight = (uint64_t[]){0, 1, 64}[random_below(3)];
  const uint64_t warp_weight = (uint64_t[]){0, 1, 16}[random_below(3)];
  const uint64_t salt = random_bits();
  std::vector<std::pair<uint64_t, Fiber*>> keys;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber* fiber = &machine.fibers[i];
    const uint64_t block = fiber->block->rank, warp = block * 32 + fiber->thread / 32;
    keys.emplace_back(block_weight * (scrambled(salt ^ block << 20) >> 40) +
                          warp_weight * (scrambled(salt ^ warp << 30) >> 40) + (random_bits() >> 40),
                      fiber);
  }
  std::sort(keys.begin(), keys.end());
  machine.order.resize(machine.threads);
  for (int i = 0; i < machine.threads; ++i) set_priority(keys[i].second, i);
  machine.redraw = (uint32_t[]){0, 1u << 22, 1u << 26, 1u << 29}[random_below(4)];
  machine.arrive = (uint32_t[]){0, 1u << 20, 1u << 24, 1u << 29, UINT32_MAX}[random_below(5)];
}

// Returns false if a thread failed.
inline bool run_cluster(int number) {
  machine.blocks.assign(machine.cluster, Block());
  machine.copies.clear();
  machine.ended = machine.at_barrier = 0;
  machine.started = machine.synchronised = ++machine.now;
  std::fill(machine.shared.begin(), machine.shared.end(), (char)0xff);
  for (int rank = 0; rank < machine.cluster; ++rank)
    start_block(machine.blocks[rank], number * machine.cluster + rank, rank);
  if (kWatched) watch_cluster(machine.blocks[0].shared, shared_stride());
  machine.runnable.reset(machine.threads);
  draw_priorities();
  const int outcome = _setjmp(machine.host);
  if (outcome == 0) enter(machine.order[0]);
  machine.current = nullptr;
  if (kWatched) watch_cluster(nullptr, 0);
  return outcome == 2;
}

inline void run_grid() {
  const int clusters = gridDim.x * gridDim.y * gridDim.z / machine.cluster;
  machine.threads = machine.cluster * block_threads();
  machine.fibers.reserve(16 * 1024);
  if ((int)machine.fibers.size() < machine.threads) machine.fibers.resize(machine.threads);
  machine.shared.resize(machine.cluster * shared_stride() + 128);
  machine.launched = ++machine.now;
  std::vector<int> numbers(clusters);
  for (int i = 0; i < clusters; ++i) {
    numbers[i] = i;
    std::swap(numbers[i], numbers[random_below(i + 1)]);
  }
  for (int number : numbers) {
    if (run_cluster(number)) continue;
    for (Fiber& fiber : machine.fibers) fiber.entered = false;
    throw std::runtime_error("CUDA model: " + machine.error);
  }
}

}  // namespace kdk::model
