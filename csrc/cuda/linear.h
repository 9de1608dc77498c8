// What an NVIDIA GPU does for heads around the row sweeps; linear.cu says what that is. Every error of CUDA is a
// std::runtime_error that names the call.
#pragma once
#include "../rows_call.h"

namespace kdk {
namespace cuda {

// Enqueued on the stream (a cudaStream_t) of the device; not for fp64.
// x[i] = cap * tanh(x[i] / cap)
void softcap(void* x, Dtype dtype, int64_t count, double cap, int device, void* stream);
// gradient[i] *= 1 - (logits[i] / cap)^2, logits being capped; a gradient of 0 stays 0.
void softcap_gradient(void* gradient, const void* logits, Dtype dtype, int64_t count, double cap, int device,
                      void* stream);
// Raises where the current device cannot run these kernels; loads them.
void load_linear();

}  // namespace cuda
}  // namespace kdk
