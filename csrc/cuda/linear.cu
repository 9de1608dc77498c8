// The element-wise kernels of a head on an NVIDIA GPU: the soft cap of logits and its gradient, in place, eight
// elements a thread a turn. The twin of csrc/cpu/linear.cpp, without the sum in fp32 of 16-bit products: a kernel of
// torch does it.
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include "device.h"
#include "groups.h"
#include "launch.h"

namespace kdk {
namespace cuda {

constexpr int kThreads = 256, kBlocksOfMultiprocessor = 6;

// Calls body(first, begin, end) for this thread's groups of a tensor's elements: a group has the elements from
// first + begin to first + end, and `first` is shifted so that a whole group lies at a multiple of 16 bytes.
template <class F> inline __device__ void each_group(int64_t count, int shift, F body) {
  const int64_t step = (int64_t)gridDim.x * kThreads * kGroup;
  int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kGroup - shift;
  for (; first < count; first += step)
    body(first, first < 0 ? shift : 0, count - first < kGroup ? (int)(count - first) : kGroup);
}

struct Cap {
  float cap, inverse;
};

// Where |x / cap| is small, cap * tanh(x / cap) is x to the last digit. A NaN keeps its bits.
inline __device__ float softcap_of(float x, Cap at) {
  const float ratio = x * at.inverse;
  return fabsf(ratio) >= 0x1p-12f ? at.cap * tanhf(ratio) : x;
}

// 1 - (x / cap)^2 = d (2 - d) with d = 1 - |x| / cap. d is exact near the cap, where the square would lose digits. The
// rounding of a capped logit to 16 bits may move the logit past the cap, where the slope is 0.
inline __device__ float softcap_gradient_of(float gradient, float x, Cap at) {
  float d = (at.cap - fabsf(x)) * at.inverse;
  d = d < 0 ? 0 : d;
  return gradient == 0 ? gradient : gradient * (d * (2 - d));  // 0 in skipped rows and padding: any logits
}

__global__ void __launch_bounds__(kThreads, kBlocksOfMultiprocessor)
    softcap_kernel(char* x, Dtype dtype, int64_t count, Cap cap) {
  each_group(count, columns_in((uint64_t)x % 16, dtype), [&](int64_t first, int begin, int end) {
    const Slice slice = {x + first * bytes_of(dtype), dtype, begin, end, true};
    float values[kGroup];
    widen<false>(load_group<false, false>(slice, 0), dtype, values);
    for (int i = 0; i < kGroup; ++i) values[i] = softcap_of(values[i], cap);
    store_group<false>(x + first * bytes_of(dtype), dtype, slice.whole(0), 0, begin, end, values);
  });
}

__global__ void __launch_bounds__(kThreads, kBlocksOfMultiprocessor)
    softcap_gradient_kernel(char* gradient, const char* logits, Dtype dtype, int64_t count, Cap cap) {
  const int shift = shift_of(gradient, dtype, logits, dtype);
  const bool aligned = shift >= 0;
  each_group(count, aligned ? shift : 0, [&](int64_t first, int begin, int end) {
    const int64_t offset = first * bytes_of(dtype);
    const Slice of_gradient = {gradient + offset, dtype, begin, end, aligned};
    const Slice of_logits = {logits + offset, dtype, begin, end, aligned};
    float values[kGroup], x[kGroup];
    load_pair<false, false>(of_gradient, of_logits, 0, values, x);
    for (int i = 0; i < kGroup; ++i) values[i] = softcap_gradient_of(values[i], x[i], cap);
    store_group<false>(gradient + offset, dtype, of_gradient.whole(0), 0, begin, end, values);
  });
}

// ---- the host

namespace {

// Launches a thread for each group, up to the number of threads that the chip holds at once.
template <class Kernel, class... Arguments>
void launch_elements(int64_t count, const Execution& run, Kernel kernel, Arguments... arguments) {
  if (count == 0) return;
  OnDevice guard(run.device);
  const int64_t blocks = (int64_t)kBlocksOfMultiprocessor * Chip(run.device, kernel).multiprocessors;
  const int64_t wanted = (count + kGroup - 1) / kGroup / kThreads + 1;  // one more group where the tensor is shifted
  launch(kernel, {1, kThreads, 0, (int)(wanted < blocks ? wanted : blocks)}, run, arguments...);
}

Cap cap_of(double cap) { return {(float)cap, (float)(1 / cap)}; }

}  // namespace

void softcap(const SoftcapCall& call) {
  launch_elements(call.count, call.run, softcap_kernel, (char*)call.logits, call.logits.dtype, call.count,
                  cap_of(call.cap));
}

void softcap_gradient(const SoftcapGradientCall& call) {
  launch_elements(call.count, call.run, softcap_gradient_kernel, (char*)call.gradient, (const char*)call.logits,
                  call.logits.dtype, call.count, cap_of(call.cap));
}

int64_t softcap_bytes(const SoftcapCall&) { return 0; }
int64_t softcap_gradient_bytes(const SoftcapGradientCall&) { return 0; }

void load_linear() {
  cudaFuncAttributes attributes;
  KDK_CHECK(cudaFuncGetAttributes, &attributes, softcap_kernel);
  KDK_CHECK(cudaFuncGetAttributes, &attributes, softcap_gradient_kernel);
}

}  // namespace cuda
}  // namespace kdk
