// Weak definitions of all kernels, for a module that is linked without some of them. A kernel that is linked replaces its
// definition here; a call of another kernel is an error.
#include <stdexcept>

#include "../../csrc/calls/kernels.h"
#include "../../csrc/cuda/launch.h"

namespace kdk::cuda {

#define KDK_ABSENT(name, Call)                                                                       \
  __attribute__((weak)) void name(const Call&) { throw std::runtime_error(#name " is not linked"); } \
  __attribute__((weak)) int64_t name##_bytes(const Call&) { return 0; }
KDK_CUDA_KERNELS(KDK_ABSENT)

__attribute__((weak)) void load_rows() {}
__attribute__((weak)) void load_linear() {}
__attribute__((weak)) void load_pairwise() {}
__attribute__((weak)) void load_sinkhorn() {}
__attribute__((weak)) void load_topk() {}
__attribute__((weak)) void load_topk_rows() {}
__attribute__((weak)) void load_uld() {}

}  // namespace kdk::cuda
