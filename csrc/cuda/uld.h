// Universal Logit Distillation on an NVIDIA GPU, of rows that are sorted; uld.cu says how. Every error of CUDA is a
// std::runtime_error that names the call.
#pragma once
#include "../uld_call.h"

namespace kdk {
namespace cuda {

// Enqueued on the stream (a cudaStream_t) of the device; not for fp64. A kept row with a temperature that no loss has
// becomes NaN: to raise would synchronise.
void uld(const RankedUldCall& call, int device, void* stream);
// Raises where the current device cannot run these kernels; loads them.
void load_uld();

}  // namespace cuda
}  // namespace kdk
