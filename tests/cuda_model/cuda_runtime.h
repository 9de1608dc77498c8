// An execution model of CUDA on a CPU: with this header a host compiler takes csrc/cuda/*.cu unchanged, and the kernels
// run without a GPU. The model is made to find errors:
//
//   - Every thread of every block of a cluster is a fiber, and all fibers share one thread of the operating system. A
//     fiber runs until it waits (block barrier, cluster barrier, warp exchange, bulk barrier); then the runnable fiber
//     of the highest priority runs. A seed draws the priorities, with a share for the block and a share for the warp,
//     and redraws some of them at times, so that some threads, warps or blocks run far ahead of others: a missing
//     barrier shows as a wrong result under most seeds. The model reports threads that wait for each other for ever,
//     and the places where they wait.
//   - Shared memory is NaN when a block starts and when it has ended. The bytes around it must not change.
//   - A bulk copy makes its destination NaN at once, and its bytes arrive some time later.
//   - load, store and bulk_copy may touch only allowed memory, at aligned addresses.
//   - exp2_approx, log2_approx and reciprocal_approx are as wrong as the instructions may be.
//   - Devices may have any size, and any call of the runtime can be made to fail.
//
// A watched build (watch.h) finds more, under every seed: accesses that no barrier orders, bytes that two clusters
// share (clusters run one after the other), reads of global memory that need not see what another thread wrote, and
// bulk copies over bytes that no fence hands to them. Its host compiler fuses products and sums, as a GPU's does.
//
// The model does not find: other reordering by a GPU's compiler and memory system, such as a load that is still under
// way at a cluster barrier; errors that depend on registers or on the host's asynchrony.
//
// machine.h, watch.h, memory.h and grid.h are the machine, runtime.h has the host's functions, and this header the
// kernel's.
#pragma once
#define KDK_CUDA_DEVICE_H  // csrc/cuda/device.h: this header has the twins of its functions

#include "runtime.h"

// ---- the language

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ __inline__ __attribute__((always_inline))

#define KDK_VECTORS(type, name)                                                     \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                          \
  struct alignas(16) name##4 { type x, y, z, w; };                                  \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                  \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
using uint = unsigned;
KDK_VECTORS(float, float)
KDK_VECTORS(int, int)
KDK_VECTORS(unsigned, uint)

#define threadIdx (::kdk::model::machine.current->index)
#define blockIdx (::kdk::model::machine.current->block->index)

// ---- the functions of kernels: barriers, warp exchanges, numbers

inline void __syncthreads(kdk::model::Place place = {}) { kdk::model::block_barrier(0, place); }
inline int __syncthreads_count(int predicate, kdk::model::Place place = {}) {
  return kdk::model::block_barrier(predicate, place);
}
inline int __syncthreads_or(int predicate, kdk::model::Place place = {}) {
  return kdk::model::block_barrier(predicate, place) > 0;
}
inline int __syncthreads_and(int predicate, kdk::model::Place place = {}) {
  return kdk::model::block_barrier(predicate, place) == kdk::model::block_threads();
}

namespace kdk::model {
inline int lane() { return machine.current->thread % 32; }

template <class T> T shuffle(Exchange what, uint32_t mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(what, mask, bits, source, place);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
inline uint32_t vote(uint32_t mask, int predicate, Place place) {
  return (uint32_t)exchange(Exchange::vote, mask, predicate != 0, lane(), place);
}
}  // namespace kdk::model

inline void __syncwarp(uint32_t mask = 0xffffffffu, kdk::model::Place place = {}) {
  kdk::model::exchange(kdk::model::Exchange::sync, mask, 0, kdk::model::lane(), place);
}
template <class T> T __shfl_sync(uint32_t mask, T value, int source, int width = 32, kdk::model::Place place = {}) {
  const int first = kdk::model::lane() / width * width;
  return kdk::model::shuffle(kdk::model::Exchange::indexed, mask, value, first + (source & (width - 1)), place);
}
template <class T> T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, kdk::model::Place place = {}) {
  const int lane = kdk::model::lane(), source = lane % width < (int)by ? lane : lane - (int)by;
  return kdk::model::shuffle(kdk::model::Exchange::up, mask, value, source, place);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, kdk::model::Place place = {}) {
  const int lane = kdk::model::lane(), source = lane % width + (int)by >= width ? lane : lane + (int)by;
  return kdk::model::shuffle(kdk::model::Exchange::down, mask, value, source, place);
}
template <class T> T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, kdk::model::Place place = {}) {
  const int lane = kdk::model::lane(), source = (lane ^ bits) / width > lane / width ? lane : lane ^ bits;
  return kdk::model::shuffle(kdk::model::Exchange::butterfly, mask, value, source, place);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, kdk::model::Place place = {}) {
  return kdk::model::vote(mask, predicate, place);
}
inline int __any_sync(uint32_t mask, int predicate, kdk::model::Place place = {}) {
  return kdk::model::vote(mask, predicate, place) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, kdk::model::Place place = {}) {
  return kdk::model::vote(mask, predicate, place) == mask;
}

namespace kdk::model {
template <class To, class From> To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "the bits of one are the bits of the other");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace kdk::model

inline float __uint_as_float(uint32_t x) { return kdk::model::bits_of<float>(x); }
inline float __int_as_float(int32_t x) { return kdk::model::bits_of<float>(x); }
inline uint32_t __float_as_uint(float x) { return kdk::model::bits_of<uint32_t>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int32_t __float_as_int(float x) { return kdk::model::bits_of<int32_t>(x); }

// For floating-point numbers these are fmin and fmax, which return the other number for a NaN.
template <class A, class B> std::common_type_t<A, B> min(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return std::fmin(a, b);
  else return std::min<std::common_type_t<A, B>>(a, b);
}
template <class A, class B> std::common_type_t<A, B> max(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return std::fmax(a, b);
  else return std::max<std::common_type_t<A, B>>(a, b);
}

// ---- csrc/cuda/device.h

namespace kdk::cuda {

inline char* shared_memory() { return model::machine.current->block->shared; }
inline uint32_t shared_address(const void* shared) { return (uint32_t)((const char*)shared - shared_memory()); }

template <class T> T load(const T* from) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "1, 2, 4, 8 or 16 bytes");
  model::check_global(from, sizeof(T), sizeof(T), false);
  T value = *from;
  if constexpr (model::kWatched) model::watch_load(from, &value, sizeof(T));
  return value;
}
template <class T> void store(T* to, T value) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "1, 2, 4, 8 or 16 bytes");
  model::check_global(to, sizeof(T), sizeof(T), true);
  if constexpr (model::kWatched) model::watch_store(to, sizeof(T));
  *to = value;
}
template <class T> void store_streaming(T* to, T value) { store(to, value); }

inline int add_shared(int* sum, int x) {
  model::shared_offset(sum, sizeof(int), sizeof(int), "adds to what");
  return __atomic_fetch_add(sum, x, __ATOMIC_RELAXED);
}

// A number in [-1, 1] that depends on x alone.
inline double wrongness(float x) { return (int32_t)(model::scrambled(__float_as_uint(x)) >> 32) * 0x1p-31; }

// A float within `ulps` of the exact value; rounding takes half a ulp of these. Subnormal results are 0.
inline float inexact(double exact, double ulps, float x) {
  if (exact == 0 || std::isinf(exact)) return (float)exact;
  const float y = (float)(exact + (ulps - 0.5) * wrongness(x) * std::ldexp(1.0, std::ilogb(exact) - 23));
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;
}
inline float exp2_approx(float x) {
  if (x != x) return __uint_as_float(0x7fffffffu);
  return std::fabs(x) < 0x1p-126f ? 1 : inexact(std::exp2((double)x), 2, x);
}
inline float reciprocal_approx(float x) {
  if (x != x) return __uint_as_float(0x7fffffffu);
  return std::fabs(x) < 0x1p-126f ? std::copysign(INFINITY, x) : inexact(1.0 / x, 1, x);
}
inline float log2_approx(float x) {
  if (std::fabs(x) < 0x1p-126f) return -INFINITY;
  if (x != x || x < 0) return __uint_as_float(0x7fffffffu);
  const double exact = std::log2((double)x);
  if (x == 1 || x == INFINITY) return (float)exact;
  const double bound = x > 0.5f && x < 2 ? 0x1p-22 - 0x1p-25 : (std::exp2(-22.6) - 0x1p-24) * std::fabs(exact);
  return (float)(exact + bound * wrongness(x));
}

// The conversions of csrc/cpu/elementary.h, except that a NaN becomes 0x7fff.
inline uint32_t bf16_of_float(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline uint32_t f16_of_float(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u);
  return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}
inline float float_of_f16(uint32_t x) {
  const uint32_t magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
  if (magnitude > 0x0f800000u) return __uint_as_float(0x7fffffffu);
  if (magnitude == 0x0f800000u) return __uint_as_float(0x7f800000u | sign);
  return __uint_as_float(__float_as_uint(__uint_as_float(magnitude) * 0x1p112f) | sign);
}
inline float2 floats_of_bf16x2(uint32_t x) { return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)}; }
inline float2 floats_of_f16x2(uint32_t x) { return {float_of_f16(x & 0xffffu), float_of_f16(x >> 16)}; }
inline uint32_t bf16x2_of_floats(float first, float second) {
  return bf16_of_float(first) | bf16_of_float(second) << 16;
}
inline uint32_t f16x2_of_floats(float first, float second) { return f16_of_float(first) | f16_of_float(second) << 16; }

inline void cluster_sync(int blocks, model::Place place = {}) {
  if (blocks != model::machine.cluster) model::fail("takes its cluster for " + std::to_string(blocks) + " blocks");
  if (blocks > 1)
    model::cluster_barrier(place);
  else
    model::block_barrier(0, place);
}

inline void bulk_barrier_init(uint64_t* barrier) {
  model::Block& block = *model::machine.current->block;
  if (model::find_bulk_barrier(barrier, block)) model::fail("initialises a bulk barrier twice");
  auto& known = block.bulk_barriers;
  *barrier = model::kBulkBarrier + known.size();
  known.emplace_back().initialised_by = model::machine.current;
}
inline void bulk_barrier_init_fence() {
  for (model::BulkBarrier& barrier : model::machine.current->block->bulk_barriers)
    barrier.published |= barrier.initialised_by == model::machine.current;
}
inline void bulk_barrier_expect(uint64_t* barrier, uint32_t bytes) {
  model::BulkBarrier& it = model::bulk_barrier(barrier);
  if (it.expecting) model::fail("expects bytes at a bulk barrier whose phase has not ended");
  it.expecting = true;
  it.to_issue = bytes;
  it.to_arrive += bytes;  // bytes that other blocks store may have come before
  model::end_phase_if_complete(it);
}
inline void bulk_barrier_wait(uint64_t* barrier, uint32_t parity, model::Place place = {}) {
  model::BulkBarrier& it = model::bulk_barrier(barrier);
  if (parity > 1) model::fail("waits for a phase of parity " + std::to_string(parity));
  while (it.phase == parity) {
    it.waiting.push_back(model::machine.current);
    model::sleep(model::Wait::bulk_barrier, place);
  }
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  model::BulkBarrier& it = model::bulk_barrier(barrier);
  model::shared_offset(shared, bytes, 16, "the destination of a bulk copy");
  if (bytes == 0 || bytes % 16) model::fail("copies " + std::to_string(bytes) + " bytes, which is no multiple of 16");
  model::check_global(global, bytes, 16, false);
  if (!it.published) model::fail("copies to a bulk barrier that no bulk_barrier_init_fence followed");
  if (bytes > it.to_issue) model::fail("copies more bytes than the bulk barrier expects");
  it.to_issue -= bytes;
  if constexpr (model::kWatched) model::watch_copy(shared, global, bytes);
  memset(shared, 0xff, bytes);
  model::machine.copies.push_back({model::machine.current->block, (char*)shared, (const char*)global, bytes, &it, {}});
}
inline void store_to_block(int rank, void* to, uint4 value, uint64_t* barrier) {
  if (rank < 0 || rank >= model::machine.cluster) model::fail("stores to block " + std::to_string(rank));
  const size_t offset = model::shared_offset(to, 16, 16, "the destination of a store to another block");
  model::Block& block = model::machine.blocks[rank];
  if (block.ended == model::block_threads()) model::fail("stores to the shared memory of a block that has ended");
  model::BulkBarrier& it = model::bulk_barrier(barrier, block);
  if (!it.published) model::fail("stores to a bulk barrier that no bulk_barrier_init_fence followed");
  model::BulkCopy copy = {&block, block.shared + offset, nullptr, 16, &it, {}};
  memcpy(copy.value, &value, 16);
  if constexpr (model::kWatched) model::watch_store_to_block(copy.to, 16);
  memset(copy.to, 0xff, 16);
  model::machine.copies.push_back(copy);
}
inline void bulk_fence() {
  model::Fiber& self = *model::machine.current;
  if (self.fence < model::last_barrier(*self.block)) self.fence_before = self.fence;
  self.fence = ++model::machine.now;
}
inline void bulk_prefetch(const void* global, uint32_t bytes) {
  if (bytes == 0 || bytes % 16)
    model::fail("prefetches " + std::to_string(bytes) + " bytes, which is no multiple of 16");
  model::check_global(global, bytes, 16, false);
}

}  // namespace kdk::cuda
