// The CPU kernels of the pairwise family, built once per instruction set; pairwise.cpp says what they do.
#pragma once
#include "../transport_call.h"

#define KDK_CPU_PAIRWISE(isa)                                                                                   \
  namespace isa {                                                                                               \
  void pair_costs(const PairCostsCall& call) noexcept;                                                          \
  int64_t pair_costs_workspace_bytes(int64_t clouds, int64_t rows, int64_t columns, bool fp64, int threads) noexcept; \
  void pair_gradient(const PairGradientCall& call) noexcept;                                                    \
  int64_t pair_gradient_workspace_bytes(int64_t clouds, int64_t rows, int64_t columns, bool fp64,               \
                                        int threads) noexcept;                                                  \
  }

namespace kdk {
KDK_CPU_PAIRWISE(baseline)
KDK_CPU_PAIRWISE(avx2)
KDK_CPU_PAIRWISE(avx512)
}  // namespace kdk
#undef KDK_CPU_PAIRWISE
