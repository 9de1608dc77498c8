// What only a GPU has, in small functions: shared memory, special-function instructions, 16-bit floats, and what
// Hopper brought (thread-block clusters, bulk copies). Everything else in csrc/cuda is C++ that a host compiler takes
// too: tests/cuda_model/cuda_runtime.h defines KDK_CUDA_DEVICE_H and these same functions in plain C++, and so runs the
// kernels, unchanged, on a CPU. A function that is added here needs its twin there.
//
// Before sm_90 a cluster is one block, and there are no bulk copies: the launcher plans for neither.
#ifndef KDK_CUDA_DEVICE_H
#define KDK_CUDA_DEVICE_H

#include <cuda_runtime.h>
#include <stdint.h>

namespace kdk {
namespace cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KDK_HOPPER
#endif

// The dynamic shared memory of this block, aligned to 128 bytes: the only shared memory there is.
inline __device__ char* shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

// ---- global memory. T has 1, 2, 4, 8 or 16 bytes, and the address is a multiple of that.

template <class T> inline __device__ T load(const T* from) { return *from; }
template <class T> inline __device__ void store(T* to, T value) { *to = value; }
// The same for what is not read again soon: its lines are the first to leave a cache.
template <class T> inline __device__ void store_streaming(T* to, T value) { __stcs(to, value); }

// *sum += x, in shared memory; what was there before.
inline __device__ int add_shared(int* sum, int x) { return atomicAdd(sum, x); }

// ---- special functions, each one instruction

// 2^x within 2 ulp; results below 2^-126 are 0.
inline __device__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x) within 2^-22 (absolute, between 1/2 and 2) or 2^-22.6 (relative); below 2^-126 it is -inf.
inline __device__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x within 1 ulp; below 2^-126 it is infinite.
inline __device__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- 16-bit floats, two in a word, the first in its lower half. Rounding is to nearest even; NaN stays NaN.

inline __device__ float2 floats_of_bf16x2(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
inline __device__ uint32_t bf16x2_of_floats(float first, float second) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
  return x;
}
inline __device__ float2 floats_of_f16x2(uint32_t x) {
  float2 y;
  asm("{.reg .b16 first, second; mov.b32 {first, second}, %2; cvt.f32.f16 %0, first; cvt.f32.f16 %1, second;}"
      : "=f"(y.x), "=f"(y.y)
      : "r"(x));
  return y;
}
inline __device__ uint32_t f16x2_of_floats(float first, float second) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
  return x;
}

// ---- clusters: blocks that are on the chip together and reach each other's shared memory

// All threads of all blocks of the cluster arrive before any leaves; what they wrote to shared memory is seen by all.
// Where a cluster is one block, this is __syncthreads.
inline __device__ void cluster_sync(int blocks) {
#if defined(KDK_HOPPER)
  if (blocks > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// Where block `rank` of the cluster keeps what this block keeps at `mine` in its shared memory.
template <class T> inline __device__ const T* map_shared_rank(const T* mine, int rank) {
#if defined(KDK_HOPPER)
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return (const T*)theirs;
#else
  return mine;
#endif
}

// ---- bulk copies from global to shared memory, and the barrier in shared memory that counts their bytes

inline __device__ uint32_t shared_address(const void* shared) { return (uint32_t)__cvta_generic_to_shared(shared); }

// By one thread; the others may use the barrier after the next __syncthreads.
inline __device__ void bulk_barrier_init(uint64_t* barrier) {
#if defined(KDK_HOPPER)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
               :: "r"(shared_address(barrier))
               : "memory");
#endif
}
// By the thread that then copies so many bytes; one phase of the barrier.
inline __device__ void bulk_barrier_expect(uint64_t* barrier, uint32_t bytes) {
#if defined(KDK_HOPPER)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
// Until the phase of this parity (0, 1, 0, ... for the first, second, third use) has all its bytes.
inline __device__ void bulk_barrier_wait(uint64_t* barrier, uint32_t parity) {
#if defined(KDK_HOPPER)
  asm volatile(
      "{.reg .pred arrived;\n"
      "again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 arrived, [%0], %1;\n"
      "@!arrived bra again;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
// Bulk copies that are issued after the next barrier come after what this thread has read and written so far.
inline __device__ void bulk_fence() {
#if defined(KDK_HOPPER)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Both addresses and the number of bytes are multiples of 16.
inline __device__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
#if defined(KDK_HOPPER)
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// The same bytes to the L2 cache; a hint.
inline __device__ void bulk_prefetch(const void* global, uint32_t bytes) {
#if defined(KDK_HOPPER)
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(bytes));
#endif
}

}  // namespace cuda
}  // namespace kdk

#endif
