// The element-wise kernels of a head on a CPU: the soft cap of logits, its gradient, and the sum in fp32 of products
// that were rounded to 16 bits. Each kernel works in place, in one pass over the memory.
//
// This file is compiled once per instruction set into a namespace of that name; it calls no std:: template.
#if defined(__F16C__)
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "../calls/kernels.h"

namespace kdk {
namespace KDK_ISA {

#include "elementary.h"
#include "storage.h"

// Calls body(first element, number of elements) for each block. The threads share the blocks.
template <class F> void each_block(int64_t count, int threads, F body) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= kSerialWork && threads > 1)
  for (int64_t first = 0; first < count; first += kBlock)
    body(first, count - first < kBlock ? (int)(count - first) : kBlock);
}

// ---- the inner loops. `from` may equal `to`. They are not inlined: a test looks for packed instructions in them.

// Where |x / cap| is small, cap * tanh(x / cap) is x to the last digit. A NaN keeps its bits.
template <class T> __attribute__((noinline)) void cap_block(const T* from, T* to, int n, T cap) {
  const T small = T(sizeof(T) == 4 ? 0x1p-12 : 0x1p-27);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    T x = from[i], ratio = x / cap, capped = cap * tanh_of(ratio);
    to[i] = ratio >= small || ratio <= -small ? capped : x;
  }
}

// 1 - (x / cap)^2 = d (2 - d) with d = 1 - |x| / cap. d is exact near the cap, where the square would lose digits. The
// rounding of a capped logit to 16 bits may move the logit past the cap, where the slope is 0.
template <class T>
__attribute__((noinline)) void cap_gradient_block(const T* gradient, const T* logits, T* to, int n, T cap) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    T g = gradient[i], x = logits[i], d = (cap - (x < 0 ? -x : x)) / cap;
    d = d < 0 ? T(0) : d;
    T product = g * (d * (2 - d));
    to[i] = g == 0 ? g : product;  // g is 0 in a skipped row and in padding, where logits may be anything
  }
}

// ---- all elements

template <class T> void cap_all(const SoftcapCall& call) {
  const Dtype dtype = call.logits.dtype;
  const T cap = (T)call.cap;
  each_block(call.count, call.run.threads, [=](int64_t first, int n) {
    alignas(64) T buffer[kBlock];
    void* at = (char*)call.logits + first * bytes_of(dtype);
    cap_block(widen(at, dtype, n, buffer), buffer, n, cap);
    narrow(buffer, at, dtype, n);
  });
}

template <class T> void cap_gradient_all(const SoftcapGradientCall& call) {
  const Dtype dtype = call.logits.dtype;
  const T cap = (T)call.cap;
  each_block(call.count, call.run.threads, [=](int64_t first, int n) {
    alignas(64) T buffer[kBlock], logits_buffer[kBlock];
    void* at = (char*)call.gradient + first * bytes_of(dtype);
    const T* x = widen((const char*)call.logits + first * bytes_of(dtype), dtype, n, logits_buffer);
    cap_gradient_block(widen(at, dtype, n, buffer), x, buffer, n, cap);
    narrow(buffer, at, dtype, n);
  });
}

void softcap(const SoftcapCall& call) noexcept {
  by_type(call.logits.dtype == Dtype::f64, [&](auto type) { cap_all<decltype(type)>(call); });
}

void softcap_gradient(const SoftcapGradientCall& call) noexcept {
  by_type(call.logits.dtype == Dtype::f64, [&](auto type) { cap_gradient_all<decltype(type)>(call); });
}

void accumulate(const AccumulateCall& call) noexcept {
  const Stored part = call.part;
  float* total = (float*)call.total;
  each_block(call.count, call.run.threads, [=](int64_t first, int n) {
    alignas(64) float buffer[kBlock];
    const float* x = widen((const char*)part + first * bytes_of(part.dtype), part.dtype, n, buffer);
    for (int i = 0; i < n; ++i) total[first + i] += x[i];
  });
}

int64_t softcap_bytes(const SoftcapCall&) noexcept { return 0; }
int64_t softcap_gradient_bytes(const SoftcapGradientCall&) noexcept { return 0; }
int64_t accumulate_bytes(const AccumulateCall&) noexcept { return 0; }

}  // namespace KDK_ISA
}  // namespace kdk
