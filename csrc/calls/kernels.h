// THE LIST of kernels: name, call, and the devices that have the kernel. The list generates the declarations below, the
// table of an instruction set's kernels, and the functions of the Python module (cpu_NAME and cuda_NAME).
//
// A kernel `name` is two functions of one call: name(call) runs the kernel, and name_bytes(call) returns the bytes of
// workspace that the kernel needs. cpu/*.cpp and cuda/*.cu define the functions.
#pragma once
#include <string>

#include "linear.h"
#include "pairwise.h"
#include "rows.h"
#include "sinkhorn.h"
#include "topk.h"
#include "uld.h"

#define KDK_KERNELS(BOTH, CPU, CUDA)          \
  BOTH(rows, RowsCall)                        \
  BOTH(scale_rows, ScaleRowsCall)             \
  BOTH(softcap, SoftcapCall)                  \
  BOTH(softcap_gradient, SoftcapGradientCall) \
  CPU(accumulate, AccumulateCall)             \
  BOTH(topk_rows, TopkRowsCall)               \
  BOTH(topk, TopkCall)                        \
  CPU(sort_entries, SortEntriesCall)          \
  BOTH(pair_costs, PairCostsCall)             \
  BOTH(pair_gradient, PairGradientCall)       \
  BOTH(sinkhorn, SinkhornCall)                \
  CPU(plan_gradient, PlanGradientCall)        \
  CPU(uld, UldCall)                           \
  CUDA(ranked_uld, RankedUldCall)

#define KDK_NO_KERNEL(name, Call)
#define KDK_CPU_KERNELS(X) KDK_KERNELS(X, X, KDK_NO_KERNEL)
#define KDK_CUDA_KERNELS(X) KDK_KERNELS(X, KDK_NO_KERNEL, X)

namespace kdk {

#define KDK_DECLARE(name, Call)          \
  void name(const Call& call) noexcept; \
  int64_t name##_bytes(const Call& call) noexcept;
namespace baseline {
KDK_CPU_KERNELS(KDK_DECLARE)
}
namespace avx2 {
KDK_CPU_KERNELS(KDK_DECLARE)
}
namespace avx512 {
KDK_CPU_KERNELS(KDK_DECLARE)
}
#undef KDK_DECLARE

// A CUDA kernel is enqueued on its call's stream, and computes in fp32 alone. A kept row with an invalid label,
// temperature or hard weight becomes NaN, because raising an error would synchronise. Every error of CUDA is a
// std::runtime_error that names the failed call.
namespace cuda {
#define KDK_DECLARE(name, Call) \
  void name(const Call& call);  \
  int64_t name##_bytes(const Call& call);
KDK_CUDA_KERNELS(KDK_DECLARE)
#undef KDK_DECLARE

// The reason why the CUDA kernels of some family cannot run on the device (no driver, a driver that is too old, an
// architecture that was not built), or "".
std::string refusal(int device);
}  // namespace cuda

}  // namespace kdk
