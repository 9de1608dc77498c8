// The CPU kernels of the sinkhorn family, built once per instruction set; sinkhorn.cpp says what they do.
#pragma once
#include "../transport_call.h"

#define KDK_CPU_SINKHORN(isa)                                                                                   \
  namespace isa {                                                                                               \
  void sinkhorn(const SinkhornCall& call) noexcept;                                                             \
  int64_t sinkhorn_workspace_bytes(int64_t problems, int64_t n, int64_t m, int64_t iterations, bool fp64,       \
                                   bool unrolled, int threads) noexcept;                                        \
  void plan_gradient(const PlanGradientCall& call) noexcept;                                                    \
  int64_t plan_gradient_workspace_bytes(int64_t n, int64_t m, int threads) noexcept;                            \
  }

namespace kdk {
KDK_CPU_SINKHORN(baseline)
KDK_CPU_SINKHORN(avx2)
KDK_CPU_SINKHORN(avx512)
}  // namespace kdk
#undef KDK_CPU_SINKHORN
