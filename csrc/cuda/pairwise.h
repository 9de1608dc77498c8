// SinKD's costs between two clouds of logits on an NVIDIA GPU, and back to the student's logits. pairwise.cu says how.
// Every error of CUDA is a std::runtime_error that names the call.
#pragma once
#include "../transport_call.h"

namespace kdk {
namespace cuda {

// Enqueued on the stream (a cudaStream_t) of the device; not for fp64; `threads` is not used. A temperature that no row
// has makes every kept pair NaN: to raise would synchronise.
void pair_costs(const PairCostsCall& call, int device, void* stream);
int64_t pair_costs_workspace_bytes(int64_t clouds, int64_t rows, int64_t columns, bool fp64, int device);
void pair_gradient(const PairGradientCall& call, int device, void* stream);
int64_t pair_gradient_workspace_bytes(int64_t clouds, int64_t rows, int64_t columns, bool fp64, int device);
// Raises where the current device cannot run these kernels; loads them.
void load_pairwise();

}  // namespace cuda
}  // namespace kdk
