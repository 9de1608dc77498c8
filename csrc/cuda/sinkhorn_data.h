// A problem of the Sinkhorn kernel: its units, and where its matrix and the history of its rounds lie.
#pragma once
#include <math.h>
#include <stdint.h>

#include "../calls/sinkhorn.h"
#include "device.h"
#include "sinkhorn_domains.h"

namespace kdk {
namespace cuda {

constexpr float kLargestSpan = 30;  // of the costs, in epsilons, in the domain of scalings
constexpr float kLeastMass = 0x1p-100f, kMostMass = 0x1p100f;  // sums of masses that a power of two brings near 1

// The data in shared memory besides the vectors of the points. The workspace has the rest.
enum class InShared { matrix_and_history, matrix, nothing };

// The matrix of a problem: costs as the domain stores them.
template <InShared in_shared> struct Matrix {
  float* data;

  __device__ float get(int at) const { return in_shared == InShared::nothing ? load(data + at) : data[at]; }
  __device__ void set(int at, float x) const {
    if (in_shared == InShared::nothing) store(data + at, x);
    else data[at] = x;
  }
};

// The history of the rows' steps [rounds] and of the columns' steps [rounds + 1], which begin with g = 0. A step has
// three numbers, and alpha, the derivative with respect to its potential.
template <InShared in_shared> struct History {
  static constexpr int kOfStep = 4, kAlpha = 3;
  float* data;
  int n, m;
  int64_t rounds;

  static __host__ __device__ int64_t floats(int64_t n, int64_t m, int64_t rounds) {
    return kOfStep * (rounds * n + (rounds + 1) * m);
  }
  __device__ int64_t row(int what, int64_t t, int i) const { return (what * rounds + t) * n + i; }
  __device__ int64_t column(int what, int64_t t, int j) const {
    return kOfStep * rounds * n + (what * (rounds + 1) + t) * m + j;
  }
  __device__ float get(int64_t at) const {
    return in_shared == InShared::matrix_and_history ? data[at] : load(data + at);
  }
  __device__ void set(int64_t at, float x) const {
    if (in_shared == InShared::matrix_and_history) data[at] = x;
    else store(data + at, x);
  }
  // at(what) is the index of number `what` of a step: row(what, t, i) or column(what, t, j).
  template <class Domain, class At> __device__ void set_step(const Step& x, At at) const {
    set(at(0), x.potential);
    if (Domain::kNormalizes) set(at(1), x.base), set(at(2), x.inverse);
  }
  template <class Domain, class At> __device__ Step step(At at) const {
    if (!Domain::kNormalizes) return {get(at(0)), 0, 1};
    return {get(at(0)), get(at(1)), get(at(2))};
  }
  template <class Domain> __device__ void set_row(int64_t t, int i, const Step& x) const {
    set_step<Domain>(x, [&](int what) { return row(what, t, i); });
  }
  template <class Domain> __device__ void set_column(int64_t t, int j, const Step& x) const {
    set_step<Domain>(x, [&](int what) { return column(what, t, j); });
  }
  template <class Domain> __device__ Step row_step(int64_t t, int i) const {
    return step<Domain>([&](int what) { return row(what, t, i); });
  }
  template <class Domain> __device__ Step column_step(int64_t t, int j) const {
    return step<Domain>([&](int what) { return column(what, t, j); });
  }
};

// Facts about the costs and masses of a problem: from one thread's costs, then merged.
struct Facts {
  float least, largest;  // finite costs
  float mass_a, mass_b;
  int forbidden, wrong;  // a pair is forbidden; a cost is NaN or -inf

  static __device__ Facts none() { return {INFINITY, -INFINITY, 0, 0, 0, 0}; }
  __device__ void add(float cost) {
    if (cost == INFINITY) {
      forbidden = 1;
    } else if (cost > -INFINITY) {
      least = fminf(least, cost), largest = fmaxf(largest, cost);
    } else {
      wrong = 1;
    }
  }
  __device__ void merge(const Facts& below) {
    least = fminf(least, below.least), largest = fmaxf(largest, below.largest);
    mass_a += below.mass_a, mass_b += below.mass_b;
    forbidden |= below.forbidden, wrong |= below.wrong;
  }
};

// The units and the domain of a problem.
struct Units {
  float epsilon, tolerance;
  float offset;            // min C; NaN makes the problem NaN
  float exponents;         // log2(e) / epsilon: from costs to exponents of 2
  float mass;              // the unit of masses, a power of two
  float mass_a, mass_b;    // sum a and sum b, not in units
  bool scalings;           // the domain

  __device__ Units(const SinkhornCall& call, const Facts& facts)
      : epsilon(load((const float*)call.epsilon)), tolerance(load((const float*)call.tolerance)), mass(1),
        mass_a(facts.mass_a), mass_b(facts.mass_b) {
    const bool wrong = facts.wrong || !(mass_a >= 0) || !(mass_b >= 0) || !(epsilon > 0);
    offset = wrong ? NAN : facts.least < INFINITY ? facts.least : 0;
    exponents = kLog2e / epsilon;
    const bool ordinary = mass_a >= kLeastMass && mass_a <= kMostMass && mass_b >= kLeastMass && mass_b <= kMostMass;
    if (ordinary) mass = __uint_as_float(__float_as_uint(mass_a) & 0x7f800000u);
    scalings = ordinary && !wrong && !facts.forbidden && facts.largest - facts.least <= kLargestSpan * epsilon;
  }
  __device__ float exponent(float cost) const { return (offset - cost) * exponents; }
  // The caller's potentials f and g, from the logarithms of potentials.
  __device__ float f(float log2_potential) const {
    return log2_potential == -INFINITY ? 0 : offset + (log2_potential - log2f(mass)) * (epsilon * kLn2);
  }
  __device__ float g(float log2_potential) const {
    return log2_potential == -INFINITY ? 0 : log2_potential * (epsilon * kLn2);
  }
};

// P C; 0 for a forbidden pair.
inline __device__ float cost_of_plan(float plan, float cost) { return cost == INFINITY ? 0 : plan * cost; }

}  // namespace cuda
}  // namespace kdk
