// The CPU kernels of the top-k family, built once per instruction set; topk.cpp says what they do.
#pragma once
#include "../topk_call.h"

#define KDK_CPU_TOPK(isa)                                                                          \
  namespace isa {                                                                                  \
  void topk_rows(const TopkRowsCall& call) noexcept;                                               \
  int64_t topk_rows_workspace_bytes(int64_t columns, int64_t entries, bool fp64, int threads) noexcept; \
  void sort_entries(const SortEntriesCall& call) noexcept;                                         \
  int64_t sort_entries_workspace_bytes(int64_t entries, int threads) noexcept;                     \
  void topk(const TopkCall& call) noexcept;                                                        \
  int64_t topk_workspace_bytes(int64_t columns, int64_t k, bool fp64, int threads) noexcept;       \
  }

namespace kdk {
KDK_CPU_TOPK(baseline)
KDK_CPU_TOPK(avx2)
KDK_CPU_TOPK(avx512)
}  // namespace kdk
#undef KDK_CPU_TOPK
