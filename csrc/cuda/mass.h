// A mass of classes: the partial result that the kernels of the top-k family share.
#pragma once
#include <math.h>

#include "groups.h"
#include "table.h"

namespace kdk {
namespace cuda {

// Of some classes, relative to their own maximum.
struct Mass {
  float max, sum;
  float unit_sum;  // at temperature 1

  static __device__ Mass none() { return {-INFINITY, 0, 0}; }
  __device__ void rebase(float larger, Tempering at) {
    sum *= at.exp(max - base_of(larger));
    if (at.unit) unit_sum *= exp_of(max - base_of(larger));
    max = larger;
  }
  __device__ void add(float logit, Tempering at) {
    if (logit > max) rebase(logit, at);
    sum += at.exp(logit - base_of(max));
    if (at.unit) unit_sum += exp_of(logit - base_of(max));
  }
  __device__ void add(const float (&logits)[kGroup], Tempering at) {
    float larger = max;
    for (int i = 0; i < kGroup; ++i) larger = fmaxf(larger, logits[i]);
    if (larger > max) rebase(larger, at);
    const float base = base_of(max);
    for (int i = 0; i < kGroup; ++i) sum += at.exp(logits[i] - base);
    if (at.unit)
      for (int i = 0; i < kGroup; ++i) unit_sum += exp_of(logits[i] - base);
  }
  // Relative to another base.
  __device__ float sum_from(float base, Tempering at) const { return sum * at.exp(max - base); }
};

// log of `part`'s share of a whole of which `beside` is the rest. Both sums are relative to the whole's maximum. Near 1
// the share's distance from 1 decides, which a difference of logarithms would lose; a tiny part is still its own sum.
inline __device__ float log_share(const Mass& part, float part_sum, float beside, const Normalizer& whole) {
  if (beside <= part_sum) return -log1pf(beside / part_sum);
  return (part.max - whole.max) * whole.inverse_temperature + logf(part.sum) - whole.log_sum;
}

}  // namespace cuda
}  // namespace kdk
