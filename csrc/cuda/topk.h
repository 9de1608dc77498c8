// Sparse teachers on an NVIDIA GPU: the loss against one, and how one is taken from logits. topk.cu says how. Every
// error of CUDA is a std::runtime_error that names the call.
#pragma once
#include "../topk_call.h"

namespace kdk {
namespace cuda {

// Enqueued on the stream (a cudaStream_t) of the device; not for fp64; `workspace` and `threads` are not used.
// A kept row with a label, temperature or hard weight that no loss has becomes NaN: to raise would synchronise.
void topk_rows(const TopkRowsCall& call, int device, void* stream);
// A row that holds a NaN, or whose temperature no row has, is NaN with the classes from 0 on.
void topk(const TopkCall& call, int device, void* stream);
// Raises where the current device cannot run these kernels; loads them.
void load_topk();

}  // namespace cuda
}  // namespace kdk
