// The masses of a close row of a sparse teacher, in fp64, and the log-ratios that follow from them: csrc/divergences.h.
#pragma once
#include <math.h>
#include <stdint.h>

#include "entries.h"
#include "groups.h"
#include "row.h"
#include "table.h"
#include "team.h"

namespace kdk {
namespace cuda {

// Sums of exponentials, relative to one maximum.
struct WideMasses {
  double others, entries;

  static __device__ WideMasses none() { return {0, 0}; }
  __device__ void merge(const WideMasses& below) {
    others += below.others, entries += below.entries;
  }
  __device__ double all() const { return others + entries; }
};

// A row, its entries, and the student's softmax over the classes that the loss compares.
struct SparseCloseRow {
  const TopkRowsCall& call;
  const int64_t row;
  const char* logits;
  CloseStudent student;

  __device__ SparseCloseRow(const TopkRowsCall& call, int64_t row, const char* logits, float max, float temperature)
      : call(call), row(row), logits(logits), student{base_of(max), 0, 1 / (double)temperature} {}

  __device__ double exponential(float logit) const { return exp((logit - student.max) * student.inverse_temperature); }
  // This thread's part.
  template <Way way>
  __device__ WideMasses masses(const Team& team, const Slice& slice, const Names& names) const {
    WideMasses x = WideMasses::none();
    if (!call.support_only) {
      const Groups groups(slice.end);
      for (int position = groups.first; groups.has(position); position += groups.step) {
        float s[kGroup];
        load_others<way>(slice, names, position, s);
#pragma unroll  // an index that the compiler does not know puts the group on the stack
        for (int i = 0; i < kGroup; ++i) x.others += exponential(s[i]);
      }
    }
    each_entry(call, team, row, [&](int64_t, int column) {
      x.entries += exponential(load_logit(logits, call.student.dtype, column));
    });
    return x;
  }
  // phi, psi and q - p of entry k, from the student's lq and q.
  template <class D>
  __device__ CloseTerms<float> of_entry(const D& divergence, int64_t k, float logit, float lq, float q) const {
    const int64_t at = row * call.entries + k;
    const float lp = load((const float*)call.log_probs + at);
    const float rounding = call.log_probs_rounding ? load((const float*)call.log_probs_rounding + at) : 0;
    return close_terms(divergence, student.log_ratio(logit, lp, rounding), lp, lq, exp_of(lp), q);
  }
  template <class D>
  __device__ CloseTerms<float> of_bucket(const D& divergence, const WideMasses& masses, float lp, float lq) const {
    const float rounding = call.tail_rounding ? load((const float*)call.tail_rounding + row) : 0;
    const float d = CloseStudent::log_ratio_of_bucket(masses.others, masses.all(), lp, rounding);
    return close_terms(divergence, d, lp, lq, exp_of(lp), exp_of(lq));
  }
  // c if phi has c (p - q) more.
  __device__ float slack(float temperature) const {
    return call.slack && temperature >= (float)call.close_temperature ? load((const float*)call.slack) : 0;
  }
};

}  // namespace cuda
}  // namespace kdk
