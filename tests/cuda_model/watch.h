// The watch of the CUDA model (cuda_runtime.h): for each byte, the threads that touched it last, and whether a barrier
// or a fence stands between one touch and the next. The order in which the threads happened to run does not matter, so
// a missing barrier is an error under every seed. watch.cpp has the functions.
//
// Only a watched build (emulated.py) has a watch. There the kernels call a function before each read and each write,
// and at the begin and the end of each function (-fsanitize=thread, with functions of watch.cpp in place of the
// library's), because kernels touch shared memory by plain pointers. A touch takes tens of nanoseconds.
//
// ---- Barriers
//
// All threads come to a barrier by the same calls: a merge that lanes of one warp call in two places has two barriers.
//
// ---- Shared memory
//
// Two threads touch a byte, and one of them writes: a barrier must stand between. Threads of a block meet at block
// barriers, lanes of a warp at __syncwarp too, threads of a cluster at cluster barriers. A shuffle orders nothing.
//
// A bulk copy overwrites a byte: each thread that touched the byte must have called bulk_fence since, and a barrier
// must stand between that call and the copy. If several lanes of a warp read the byte, the watch remembers two.
//
// A store to another block overwrites bytes: the watch forgets who touched them. It knows no order by the barrier that
// counts the store. A thread that does not wait finds 0xff there under some seeds, in the plain build too.
//
// ---- Global memory, within a launch
//
// Two clusters touch a byte: neither may write it. Nothing orders two clusters.
//
// Two threads of a cluster write a byte: they are of one block, with a block barrier between. A cluster barrier orders
// shared memory alone.
//
// A thread reads a byte that another thread of its cluster wrote without such a barrier between: the byte is 0xff, of a
// NaN, because a first-level cache may have an older byte. That is no error, because a kernel may read a group of
// columns of which it ignores some. If the read comes first, it gets the byte from before; other seeds let the write
// come first.
#pragma once

#include "machine.h"

namespace kdk::model {

#ifdef KDK_WATCHED
constexpr bool kWatched = true;
#else
constexpr bool kWatched = false;
#endif

inline uint32_t number_in_launch(int block, int thread) { return (uint32_t)block * 1024 + thread + 1; }

// The last barrier that orders the block's shared memory.
inline Time last_barrier(const Block& block) { return std::max(block.synchronised, machine.synchronised); }

// The running cluster has its blocks' shared memory here, `stride` bytes after each other. A null pointer: none runs.
void watch_cluster(const char* shared, size_t stride);

// A thread has loaded this value: makes those bytes of the value 0xff that another thread wrote.
void watch_load(const void* from, void* value, size_t bytes);
void watch_store(const void* to, size_t bytes);
void watch_copy(const void* shared, const void* global, size_t bytes);
void watch_store_to_block(const void* to, size_t bytes);

}  // namespace kdk::model
