// The mass of some classes: a partial result that topk.cu and topk_rows.cu share.
#pragma once
#include <math.h>

#include "groups.h"
#include "table.h"

namespace kdk {
namespace cuda {

// The sums of exponentials of some classes, relative to the classes' own maximum.
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
  // The sum relative to another base.
  __device__ float sum_from(float base, Tempering at) const { return sum * at.exp(max - base); }
};

// The log of `part`'s share of a whole. `beside` is the sum of the rest of the whole. part_sum and `beside` are
// relative to the whole's maximum. Near 1 the formula uses the share's distance from 1, which a difference of
// logarithms would lose. A small share uses the part's own sum, however tiny the part is.
inline __device__ float log_share(const Mass& part, float part_sum, float beside, const Normalizer& whole) {
  if (beside <= part_sum) return -log1pf(beside / part_sum);
  return (part.max - whole.max) * whole.inverse_temperature + logf(part.sum) - whole.log_sum;
}

}  // namespace cuda
}  // namespace kdk
