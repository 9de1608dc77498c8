// The features of a GPU that C++ lacks, in small functions: shared memory, special-function instructions, 16-bit
// floats, and the features of Hopper (thread-block clusters, bulk copies). A host compiler takes the rest of csrc/cuda
// too: tests/cuda_model/cuda_runtime.h defines KDK_CUDA_DEVICE_H and these same functions in plain C++, and so runs the
// unchanged kernels on a CPU. Every function here needs a twin there.
//
// Before sm_90 a cluster is one block and bulk copies do not exist: the launcher plans for neither.
#ifndef KDK_CUDA_DEVICE_H
#define KDK_CUDA_DEVICE_H

#include <cuda_runtime.h>
#include <stdint.h>

namespace kdk {
namespace cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KDK_HOPPER
#endif

// The dynamic shared memory of this block, aligned to 128 bytes. Kernels use no other shared memory.
inline __device__ char* shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

// ---- global memory. T has 1, 2, 4, 8 or 16 bytes, and the address is a multiple of that.

template <class T> inline __device__ T load(const T* from) { return *from; }
template <class T> inline __device__ void store(T* to, T value) { *to = value; }
// Stores a value that is not read again soon: its lines are the first to leave a cache.
template <class T> inline __device__ void store_streaming(T* to, T value) { __stcs(to, value); }

// *sum += x, in shared memory. Returns the value of *sum before.
inline __device__ int add_shared(int* sum, int x) { return atomicAdd(sum, x); }

// ---- special functions, one instruction each

// 2^x within 2 ulp. Results below 2^-126 are 0.
inline __device__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x) within 2^-22 (absolute, for x between 1/2 and 2) or 2^-22.6 (relative, elsewhere). -inf for x below 2^-126.
inline __device__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x within 1 ulp. Infinite for |x| below 2^-126.
inline __device__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- 16-bit floats, two in a word, the first in the lower half. Rounding is to nearest even; a NaN stays a NaN.

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

// ---- clusters: blocks that run at the same time and reach each other's shared memory

// Waits until all threads of all blocks of the cluster have come. Blocks see each other's initialised barriers after
// that, and no other memory. In a cluster of one block this is __syncthreads.
inline __device__ void cluster_sync(int blocks) {
#if defined(KDK_HOPPER)
  if (blocks > 1) {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// ---- copies that run on by themselves, and the barrier in shared memory that counts their bytes

inline __device__ uint32_t shared_address(const void* shared) { return (uint32_t)__cvta_generic_to_shared(shared); }

// One thread calls this, and then bulk_barrier_init_fence. The block's threads may use the barrier after the next
// __syncthreads, and the threads of its cluster after the next cluster_sync.
inline __device__ void bulk_barrier_init(uint64_t* barrier) {
#if defined(KDK_HOPPER)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(barrier)) : "memory");
#endif
}
// Orders the barriers that this thread initialised before bulk copies that use them.
inline __device__ void bulk_barrier_init_fence() {
#if defined(KDK_HOPPER)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// Begins a phase of the barrier, for this many bytes. The thread that copies the bytes calls this before it copies.
// Bytes that other blocks store may come before the call.
inline __device__ void bulk_barrier_expect(uint64_t* barrier, uint32_t bytes) {
#if defined(KDK_HOPPER)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
// Waits until the phase of this parity (0, 1, 0, ... for the first, second, third use) has all its bytes. The block's
// scope is enough for bytes that other blocks store too: an acquire of the cluster's scope drops the first-level cache.
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
// Orders this thread's reads and writes so far before bulk copies that are issued after the next barrier.
inline __device__ void bulk_fence() {
#if defined(KDK_HOPPER)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Starts a copy. Both addresses and the number of bytes are multiples of 16.
inline __device__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
#if defined(KDK_HOPPER)
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// Stores 16 bytes to block `rank`'s shared memory, at the address that corresponds to `to` in this block's. They count at
// the barrier there that corresponds to `barrier`. Only threads that have waited for that barrier may read them.
inline __device__ void store_to_block(int rank, void* to, uint4 value, uint64_t* barrier) {
#if defined(KDK_HOPPER)
  uint32_t address, counter;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(counter)
      : "memory");
#endif
}

// A hint to copy the bytes to the L2 cache.
inline __device__ void bulk_prefetch(const void* global, uint32_t bytes) {
#if defined(KDK_HOPPER)
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(bytes));
#endif
}

}  // namespace cuda
}  // namespace kdk

#endif
