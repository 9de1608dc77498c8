// Universal Logit Distillation on a CPU, built once per instruction set; uld.cpp says how.
#pragma once
#include "../uld_call.h"

#define KDK_CPU_ULD(isa)                                                                                  \
  namespace isa {                                                                                         \
  void uld(const UldCall& call) noexcept;                                                                 \
  /* columns: of the wider side */                                                                        \
  int64_t uld_workspace_bytes(int64_t columns, bool fp64, int threads) noexcept;                          \
  }

namespace kdk {
KDK_CPU_ULD(baseline)
KDK_CPU_ULD(avx2)
KDK_CPU_ULD(avx512)
}  // namespace kdk
#undef KDK_CPU_ULD
