// THE TABLE (csrc/divergences.h) on a GPU, and the base and the temperature of log-probabilities.
#pragma once
#include <float.h>
#include <math.h>

#include "device.h"

namespace kdk {
namespace cuda {

#define KDK_HD inline __device__
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
inline __device__ float exp_of(float x) { return exp2_approx(x * kLog2e); }
// The instructions treat a subnormal as 0. Without the bound, the logarithm's -inf would meet a weight that is not 0,
// and the reciprocal's infinity would meet a 0, because x vanishes together with m.
inline __device__ float log_of(float x) { return log2_approx(x < FLT_MIN ? FLT_MIN : x) * kLn2; }
inline __device__ float ratio(float x, float m) { return m < FLT_MIN ? 0 : x * reciprocal_approx(m); }
inline __device__ float root_of(float, float log_x) { return exp2_approx(log_x * (0.5f * kLog2e)); }
#include "../divergences.h"

// The base of exponentials: the maximum, or 0 if the maximum is -inf.
inline __device__ float base_of(float max) { return max == -INFINITY ? 0.0f : max; }

struct Tempering {
  float inverse_temperature;
  float scale;  // from logits to exponents of 2
  bool unit;    // a second sum, at temperature 1, is wanted

  __device__ Tempering(float temperature, bool want_unit)
      : inverse_temperature(1 / temperature),
        scale(inverse_temperature * kLog2e),
        unit(want_unit && temperature != 1) {}
  __device__ float exp(float x) const { return exp2_approx(x * scale); }  // exp(x / temperature)
};

struct Normalizer {
  float max, log_sum, inverse_temperature;
  __device__ float log_prob(float logit) const { return (logit - max) * inverse_temperature - log_sum; }
};

}  // namespace cuda
}  // namespace kdk
