// The two domains of Sinkhorn's iterations on an NVIDIA GPU: the twin of csrc/cpu/sinkhorn_domains.h. calls/sinkhorn.h
// has the formulas and their numbers.
//
//     Scalings     K = exp(-(C - min C) / epsilon) is stored, the potentials are u = exp((f - min C) / epsilon) and
//                  v = exp(g / epsilon), and a half step is a matrix-vector product
//     Logarithms   -(C - min C) / epsilon is stored, the potentials are (f - min C) / epsilon and g / epsilon, and a
//                  half step is a log-sum-exp relative to its maximum; all in powers of 2
#pragma once
#include <math.h>

#include "device.h"
#include "table.h"

namespace kdk {
namespace cuda {

struct Sum {
  float sum;

  static __device__ Sum none() { return {0}; }
  __device__ void merge(const Sum& other) { sum += other.sum; }
};

// log2 of a sum of powers of 2, relative to the largest. A NaN exponent makes `sum` NaN.
struct LogSum {
  float max, sum;

  static __device__ LogSum none() { return {-INFINITY, 0}; }
  __device__ void add(float exponent) {
    if (exponent == -INFINITY) return;
    const float smaller = exp2_approx(-fabsf(exponent - max));
    sum = exponent > max ? fmaf(sum, smaller, 1) : sum + smaller;
    max = fmaxf(max, exponent);
  }
  __device__ void merge(const LogSum& other) {
    const float larger = fmaxf(max, other.max), base = base_of(larger);
    sum = sum * exp2_approx(max - base) + other.sum * exp2_approx(other.max - base);
    max = larger;
  }
};

// A half step's result for a point: the potential, and the divisor of each term of the step's sum. The terms, divided
// so, add up to 1 to the last digits; exponentials of the rounded potential do not. Derivatives that nearly cancel need
// this.
struct Step {
  float potential;
  float base, inverse;  // term / sum = 2^(exponent - base) * inverse
};

// factor(mass) is the mass in the domain. share(x, stored, step, limit) is the term of a point with the potential x,
// which may include the mass, divided by the step's sum.
struct Scalings {
  static constexpr bool kNormalizes = false;  // steps have only a potential
  using Total = Sum;

  static __device__ Step first() { return {1, 0, 1}; }  // of the potential 0
  static __device__ float stored(float exponent) { return exp2_approx(exponent); }
  static __device__ float factor(float mass) { return mass; }
  static __device__ float weighted(float potential, float factor) { return potential * factor; }
  static __device__ void add(Total& total, float stored, float weighted) {
    total.sum = fmaf(stored, weighted, total.sum);
  }
  static __device__ Step step(const Total& total, float) { return {1 / total.sum, 0, 1}; }
  static __device__ float log2_of(float potential) { return log2f(potential); }
  static __device__ float ratio(float before, float after) { return before / after; }
  static __device__ float share(float x, float stored, const Step& step, float) { return x * step.potential * stored; }
  // A round's share of (R2) and (R3) in grad_C. row and column_before are weighted. of_rounds finishes the sum of
  // rounds.
  static __device__ float of_round(float row, const Step& row_step, float alpha_f, float column_before,
                                   const Step& column_step, float alpha_g, float) {
    return fmaf(row, column_step.potential * alpha_g, row_step.potential * alpha_f * column_before);
  }
  static __device__ float of_rounds(float sum, float stored) { return sum * stored; }
};

struct Logarithms {
  static constexpr bool kNormalizes = true;
  using Total = LogSum;

  static __device__ Step first() { return {0, 0, 1}; }
  static __device__ float stored(float exponent) { return exponent; }
  static __device__ float factor(float mass) { return log2f(mass); }
  static __device__ float weighted(float potential, float factor) { return potential + factor; }
  static __device__ void add(Total& total, float stored, float weighted) { total.add(stored + weighted); }
  // -inf stands for the potential 0 of a point without partner, so that the point has no part in any sum.
  static __device__ Step step(const Total& total, float own_mass) {
    if (total.sum == 0) return own_mass == 0 ? Step{-INFINITY, INFINITY, 1} : Step{NAN, NAN, NAN};
    return {-(total.max + log2f(total.sum)), total.max, 1 / total.sum};
  }
  static __device__ float log2_of(float potential) { return potential; }
  static __device__ float ratio(float before, float after) { return exp2_approx(before - after); }
  static __device__ float share(float x, float stored, const Step& step, float limit) {
    const float exponent = (stored + x) - step.base;
    return exp2_approx(exponent > limit ? limit : exponent) * step.inverse;
  }
  static __device__ float of_round(float row, const Step& row_step, float alpha_f, float column_before,
                                   const Step& column_step, float alpha_g, float stored) {
    return fmaf(share(row, stored, column_step, INFINITY), alpha_g,
                share(column_before, stored, row_step, INFINITY) * alpha_f);
  }
  static __device__ float of_rounds(float sum, float) { return sum; }
};

}  // namespace cuda
}  // namespace kdk
