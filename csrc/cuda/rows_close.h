// The kernel of close rows: the sums and the gradients of the rows to which rows_kernel gave a finite shift, by the close
// lines of csrc/divergences.h. It reads rows from global memory. One kernel serves all divergences.
#pragma once
#include <math.h>
#include <stdint.h>

#include "groups.h"
#include "row.h"
#include "rows_results.h"
#include "table.h"
#include "team.h"

namespace kdk {
namespace cuda {

struct CloseSums {
  float phi, psi, excess;

  static __device__ CloseSums none() { return {0, 0, 0}; }
  __device__ void merge(const CloseSums& below) {
    phi += below.phi, psi += below.psi, excess += below.excess;
  }
};

// A block's slices of a close row.
struct CloseRow {
  const Slice student, teacher;
  const Normalizer student_norm, teacher_norm;

  // Calls of_class(i, q, terms) for each class of this thread's groups, then of_group(position, s).
  template <class D, class OfClass, class OfGroup>
  __device__ void each_group(const D& divergence, float shift, OfClass of_class, OfGroup of_group) const {
    const LogRatio<float> log_ratio(student_norm.max, teacher_norm.max, student_norm.inverse_temperature, shift);
    const Groups groups(student.end);
    for (int position = groups.first; groups.has(position); position += groups.step) {
      float s[kGroup], t[kGroup];
      load_pair<false, false>(student, teacher, position, s, t);
#pragma unroll  // an index that the compiler does not know puts the group on the stack
      for (int i = 0; i < kGroup; ++i) {
        const float lq = student_norm.log_prob(s[i]), lp = teacher_norm.log_prob(t[i]), q = exp_of(lq);
        of_class(i, q, close_terms(divergence, log_ratio(s[i], t[i]), lp, lq, exp_of(lp), q));
      }
      of_group(position, s);
    }
  }
  template <class D> __device__ CloseSums sums(const D& divergence, float shift) const {
    CloseSums x = CloseSums::none();
    auto add = [&](int, float, CloseTerms<float> terms) { x.merge({terms.phi, terms.psi, terms.excess}); };
    each_group(divergence, shift, add, [](int, const auto&) {});
    return x;
  }
  template <class D> __device__ void write(const D& divergence, float shift, const GradientSlice& gradient) const {
    float q[kGroup], slope[kGroup];
    auto keep = [&](int i, float q_of_class, CloseTerms<float> terms) { q[i] = q_of_class, slope[i] = terms.psi; };
    each_group(divergence, shift, keep,
               [&](int position, const auto& s) { gradient.store<false>(position, s, q, slope); });
  }
};

inline __device__ void sweep_close_row(const RowsCall& call, Team& team, int64_t row, const RowTerms& numbers,
                                       const RowCut& cut) {
  float floats[kRowFloats], sums[kRowSums];
  for (int i = 0; i < kRowFloats; ++i) floats[i] = load((const float*)call.floats + i * call.rows + row);
  for (int i = 0; i < kRowSums; ++i) sums[i] = load((const float*)call.sums + i * call.rows + row);
  float shift = sums[2];
  const float inverse_temperature = 1 / numbers.temperature;
  const CloseRow slices = {cut.slice(cut.student, call.student.dtype), cut.slice(cut.teacher, call.teacher.dtype),
                           {floats[0], floats[1], inverse_temperature}, {floats[2], floats[3], inverse_temperature}};
  // The gradient may overwrite the label's logit, but only after all blocks have come to the first merge.
  if (call.options.labels && threadIdx.x == 0)
    team.board.label_logit = load_logit(cut.student, call.student.dtype, numbers.label);
  __syncthreads();
  const Outcome outcome = {call, row, numbers, slices.student_norm, slices.teacher_norm, floats[4],
                           team.board.label_logit};

  if (call.sweeps & kSums) {
    bool again = false;
    CloseSums found = CloseSums::none();
    with_divergence((int)call.divergence, (const float*)call.parameters, [&](auto divergence) {
      found = slices.sums(divergence, shift);
      again = has_kink<decltype(divergence)>;
    });
    found = team.merged(found);
    if (again) {
      shift += log1p_of(found.excess);
      with_divergence((int)call.divergence, (const float*)call.parameters, [&](auto divergence) {
        if constexpr (has_kink<decltype(divergence)>) found = slices.sums(divergence, shift);
      });
      found = team.merged(found);
    }
    sums[0] = close_sum(found.phi, found.psi, log1p_of(found.excess)), sums[1] = found.psi, sums[2] = shift;
    if (team.first_thread()) {
      write_column(call.sums, call, row, sums, kRowSums);
      if (call.loss) outcome.write_loss(sums[0]);
      if (call.statistics) write_divergence(call, row, sums[0]);
    }
  }
  if (!(call.sweeps & kGradient)) return;
  GradientSlice gradient(call, row, numbers, cut, floats);
  gradient.set(call.options.gradient_needs_loss()
                   ? numbers.factors(call.options, inverse_temperature, sums[0], outcome.cross_entropy())
                   : numbers.factors(call.options, inverse_temperature));
  gradient.slope_sum = fabsf(sums[1]) < INFINITY ? sums[1] : NAN;
  with_divergence((int)call.divergence, (const float*)call.parameters,
                  [&](auto divergence) { slices.write(divergence, shift, gradient); });
}

// One block on a multiprocessor is enough: without that number, the compiler spills registers on sm_100.
__global__ void __launch_bounds__(kMaxThreads, 1)
    close_rows_kernel(const __grid_constant__ RowsCall call, const __grid_constant__ Plan plan) {
  Team team(plan);
  each_close_row(
      call, plan, [&](int64_t row) { return load((const float*)call.sums + 2 * call.rows + row) < INFINITY; },
      [&](int64_t row, const RowTerms& numbers) {
        const RowCut cut(call, plan, team, row);
        sweep_close_row(call, team, row, numbers, cut);
        __syncthreads();  // all threads have read the label's logit
      });
}

}  // namespace cuda
}  // namespace kdk
