// The CUDA row kernels; rows.cu says what they do. Every error of CUDA is a std::runtime_error that names the call.
#pragma once
#include <string>

#include "../rows_call.h"

namespace kdk {
namespace cuda {

// Enqueues the sweeps of the call on the stream (a cudaStream_t) of the device; `workspace` and `threads` are not used.
// A kept row with a label, temperature or hard weight that no loss has becomes NaN: to raise would synchronise.
void rows(const RowsCall& call, int device, void* stream);
// x[r, :] *= factor[r], rows whose factor is 1 left alone.
void scale_rows(void* x, Dtype dtype, int64_t rows, int64_t columns, PerRow factor, int device, void* stream);
// Why the CUDA kernels, of every family, cannot run on the device (no driver, one too old, an architecture that was not
// built), or "".
std::string refusal(int device);

}  // namespace cuda
}  // namespace kdk
