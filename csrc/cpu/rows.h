// The CPU row kernels, built once per instruction set; rows.cpp says what they do.
#pragma once
#include "../rows_call.h"

#define KDK_CPU_ROWS(isa)                                                                                \
  namespace isa {                                                                                        \
  /* Whether a kept row had a label, temperature or hard weight that no loss has; nothing is written then. */ \
  bool rows(const RowsCall& call) noexcept;                                                              \
  /* x[r, :] *= factor[r], rows whose factor is 1 left alone */                                          \
  void scale_rows(void* x, Dtype dtype, int64_t rows, int64_t columns, PerRow factor, int threads) noexcept; \
  int64_t workspace_bytes(int64_t columns, bool fp64, int threads) noexcept;                             \
  }

namespace kdk {
KDK_CPU_ROWS(baseline)
KDK_CPU_ROWS(avx2)
KDK_CPU_ROWS(avx512)
}  // namespace kdk
#undef KDK_CPU_ROWS
