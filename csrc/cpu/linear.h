// What the CPU does for heads around the row sweeps, built once per instruction set; linear.cpp says what that is.
#pragma once
#include "../rows_call.h"

#define KDK_CPU_LINEAR(isa)                                                                               \
  namespace isa {                                                                                         \
  /* x[i] = cap * tanh(x[i] / cap) */                                                                     \
  void softcap(void* x, Dtype dtype, int64_t count, double cap, int threads) noexcept;                    \
  /* gradient[i] *= 1 - (logits[i] / cap)^2, logits being capped; a gradient of 0 stays 0 */              \
  void softcap_gradient(void* gradient, const void* logits, Dtype dtype, int64_t count, double cap,       \
                        int threads) noexcept;                                                            \
  /* total[i] += part[i] */                                                                               \
  void accumulate(float* total, const void* part, Dtype dtype, int64_t count, int threads) noexcept;      \
  }

namespace kdk {
KDK_CPU_LINEAR(baseline)
KDK_CPU_LINEAR(avx2)
KDK_CPU_LINEAR(avx512)
}  // namespace kdk
#undef KDK_CPU_LINEAR
