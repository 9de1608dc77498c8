// Sinkhorn's iterations on an NVIDIA GPU. sinkhorn.cu says how. Every error of CUDA is a std::runtime_error that names
// the call.
#pragma once
#include "../transport_call.h"

namespace kdk {
namespace cuda {

// Enqueued on the stream (a cudaStream_t) of the device; not for fp64; `threads` is not used. A problem that holds a
// NaN, or whose epsilon no problem has, is NaN. A std::runtime_error where the n + m points of a problem do not fit the
// shared memory of a block: on an H100, above some 5,700.
void sinkhorn(const SinkhornCall& call, int device, void* stream);
int64_t sinkhorn_workspace_bytes(int64_t problems, int64_t n, int64_t m, int64_t iterations, bool fp64, bool unrolled,
                                 int device);
// Raises where the current device cannot run these kernels; loads them.
void load_sinkhorn();

}  // namespace cuda
}  // namespace kdk
