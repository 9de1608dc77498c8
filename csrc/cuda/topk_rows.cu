// The loss against a sparse teacher on an NVIDIA GPU: the twin of csrc/cpu/topk_rows.cpp.
//
// calls/topk.h has the formulas: K entries, and the bucket of all other classes (the others). A team works on a row, as
// in rows.cu. The team reads the row's logits once (staged) or once a sweep (streaming):
//
//     names       a bit in shared memory for each class that an entry names
//     masses      (max, sum of exponentials) of the others and of the entries, each relative to its own maximum
//     sums        the divergence's value and slope of each entry and of the bucket         -> sum phi, sum psi
//     gradient    of each entry, and of the others (psi_R - q_R sum psi) times their softmax among themselves
//
// The kernel leaves the gradient of a close row to a second kernel, which finds the row's masses in fp64 and its sums by
// the close lines of csrc/divergences.h. A byte of the workspace for each row says whether the row is close.
//
// Only masses and gradient are sweeps over all classes. Neither depends on the divergence, so one kernel serves all
// divergences, and branches by divergence only where it works on entries. The bucket's mass is never 1 - the entries'
// mass: the bucket has a sum of its own, and the gradient of the others is relative to that sum. Both are thus exact
// even if a confident student leaves 1e-60 to the bucket.
//
// The gradient may overwrite the logits. Only one thread reads the logit of an entry's class, and the same thread then
// writes the entry's gradient. The sweep over the others skips the classes that entries name, whether logits or
// gradients are in their places. The kernel reads the label's logit before the first merge.
//
// A perfect kernel reads each logit once and writes each gradient once: 4 bytes a column in bf16, 2 without a gradient,
// and 8 bytes an entry. The following numbers are computed for an H100, and not yet measured. 152k columns in bf16 with
// their gradients are 608 KB, which take 0.18 us a row at 3.35 TB/s. In that time 132 multiprocessors at 1.7 GHz issue
// 34 instructions a column, 4.3 of them of the special-function unit. The inner loops of the two sweeps together take
// two special functions a column. (cuobjdump --dump-sass shows the loops of a build.)
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include "device.h"
#include "entries.h"
#include "groups.h"
#include "launch.h"
#include "mass.h"
#include "plan.h"
#include "row.h"
#include "table.h"
#include "team.h"
#include "topk_partials.h"
#include "wide_mass.h"

namespace kdk {
namespace cuda {

// ---- the sweeps

template <Way way>
inline __device__ Mass mass_of_others(const Slice& student, const Names& names, Tempering at) {
  Mass x = Mass::none();
  const Groups groups(student.end);
  for (int position = groups.first; groups.has(position); position += groups.step) {
    float s[kGroup];
    load_others<way>(student, names, position, s);
    x.add(s, at);
  }
  return x;
}

template <Way way>
inline __device__ void add_statistics_of_others(EntryStatistics& x, const Slice& student, const Names& names,
                                                Normalizer norm, int first_column) {
  const Groups groups(student.end);
  for (int position = groups.first; groups.has(position); position += groups.step) {
    float s[kGroup];
    load_others<way>(student, names, position, s);
    for (int i = 0; i < kGroup; ++i) {
      const float lq = norm.log_prob(s[i]);
      x.student_entropy -= weighted(exp_of(lq), lq);
      if (s[i] == norm.max && student.holds(position + i))
        x.student_first = min(x.student_first, first_column + position + i);
    }
  }
}

// The numbers that a thread needs to write gradients. The gradient of an entry with slope psi and probability q is
//     soft * (psi - q * slope_sum) + hard * (softmax(s) - one_hot(label))
// The gradient of the others has soft * (psi_R - q_R * slope_sum) * q / q_R as its first term. The factors soft and
// hard include the row's scale.
struct TopkGradient {
  char* row;  // of the gradient
  Dtype dtype;
  float soft, hard, slope_sum;
  float of_others, others_base;  // of_others * exp((s - others_base) / temperature) is the first term of the others
  float max, unit_log_sum;
  int label;
  bool reads_others;  // if false, all of the others have the gradient of_others: 0, or NaN

  __device__ float softened(float slope, float q) const { return soft == 0 ? 0 : soft * (slope - q * slope_sum); }
  __device__ float hard_of(float logit, int column) const {
    const float q = exp_of(logit - max - unit_log_sum);
    return hard * (column == label ? q - 1 : q);
  }

  template <Way way>
  __device__ void write_others(const Slice& student, const Names& names, int first_column, Tempering at) const {
    char* data = row + (int64_t)first_column * bytes_of(dtype);
    const bool aligned = (uint64_t)data % 16 == 0;
    const Groups groups(student.end, way == Way::streaming);
    for (int position = groups.first; groups.has(position); position += groups.step) {
      float x[kGroup];
      uint32_t named;
      if (reads_others) {
        float s[kGroup];
        named = load_others<way>(student, names, position, s);
        for (int i = 0; i < kGroup; ++i) x[i] = of_others * at.exp(s[i] - others_base);
        if (hard != 0)
          for (int i = 0; i < kGroup; ++i) x[i] += hard_of(s[i], first_column + position + i);
      } else {
        named = names.of_group(position);
        for (int i = 0; i < kGroup; ++i) x[i] = of_others;
      }
      if (!named) {
        const bool full = aligned && position >= student.begin && position + kGroup <= student.end;
        store_group<way == Way::halves>(data, dtype, full, position, student.begin, student.end, x);
      } else {
        for (int i = 0; i < kGroup; ++i)
          if (!(named >> i & 1) && student.holds(position + i)) store_logit(data, dtype, position + i, x[i]);
      }
    }
  }
};

// ---- a row

// A skipped row is 0 everywhere; a row with a bad value is NaN.
inline __device__ void fill_row(const TopkRowsCall& call, const Team& team, int64_t row, float value) {
  if (call.gradient) fill_gradient(call, team, row, 0, value);
  if (!team.first_thread()) return;
  store((float*)call.loss + row, value);
  if (call.statistics) fill_statistics(call, row, value);
}

// Whether the call needs the label's cross-entropy, and whether the call needs the logits of the others.
inline __host__ __device__ bool wants_label(const TopkRowsCall& call) {
  return call.options.labels && (call.options.hard_weight.data || call.statistics);
}
inline __host__ __device__ bool wants_others(const TopkRowsCall& call) {
  return !call.support_only || call.options.hard_weight.data || call.statistics;
}

// One thread writes the loss and the statistics of a row.
struct TopkOutcome {
  const TopkRowsCall& call;
  int64_t row;
  const RowTerms& numbers;
  Normalizer student;               // of all classes
  float unit_log_sum, label_logit;  // label_logit: the student's logit of the label

  // The cross-entropy with the label, at temperature 1.
  __device__ float cross_entropy() const {
    return call.options.labels ? unit_log_sum + (student.max - label_logit) : 0;
  }
  __device__ void write_loss(float phi) const {
    store((float*)call.loss + row, numbers.loss(call.options, phi, cross_entropy()));
  }
  // `found` is over the entries; the student's members of `found` are over all classes. lp and lq are the bucket's.
  __device__ void write_statistics(float phi, EntryStatistics found, const Masses& masses, float lp, float lq) const {
    const float p = exp_of(lp), q = exp_of(lq);
    // `teacher` adds the bucket's mass to the entries' mass. All log-probabilities may be far below 0.
    Masses teacher = masses;
    if (!call.support_only) {
      found.tv += 0.5f * fabsf(p - q);
      found.teacher_entropy -= weighted(p, lp);
      teacher.add_teacher(lp);
    }
    RowStatistics<float> x = {};
    x.divergence = phi;
    x.cross_entropy = cross_entropy();
    x.tv = found.tv;
    x.student_entropy = found.student_entropy, x.teacher_entropy = found.teacher_entropy;
    x.student_max_log_prob = -student.log_sum;
    x.teacher_max_log_prob = masses.teacher_max + (masses.teacher_sum == masses.teacher_sum ? 0 : NAN);
    if (call.options.labels) {
      x.student_label_log_prob = student.log_prob(label_logit);
      const bool named = found.label_entry != INT32_MAX;
      const Numbers& from = named ? call.log_probs : call.tail_log_prob;
      x.teacher_label_log_prob = load((const float*)from + (named ? row * call.entries + found.label_entry : row));
    }
    x.student_lse = student.max * student.inverse_temperature + student.log_sum;
    x.teacher_lse = base_of(teacher.teacher_max) + logf(teacher.teacher_sum);
    cuda::write_statistics(call, row, x, found.student_first, found.teacher_first);
  }
};

// close: the row has the close lines. The first kernel has written its statistics, but for the divergence.
template <Way way, bool close>
inline __device__ void sweep_topk_row(const TopkRowsCall& call, Team& team, int64_t row, const RowTerms& numbers,
                                      const char* logits, int first_column, const Slice& student, const Names& names) {
  const Dtype dtype = call.student.dtype;
  const bool labelled = wants_label(call), unit = call.options.hard_weight.data || labelled;
  const Tempering at(numbers.temperature, unit);
  const float* log_probs = (const float*)call.log_probs + row * call.entries;
  // The gradient may overwrite the logits. Each block stores the label's logit before the first merge, because no thread
  // leaves the merge before all blocks have come to it.
  if (labelled && threadIdx.x == 0) team.board.label_logit = load_logit(logits, dtype, numbers.label);
  // Whether the factors of the gradient wait for the loss.
  const bool waits = call.options.gradient_needs_loss() && call.gradient;

  Masses mine = Masses::none();
  if (wants_others(call)) mine.others = mass_of_others<way>(student, names, at);
  each_entry(call, team, row, [&](int64_t k, int column) {
    mine.entries.add(load_logit(logits, dtype, column), at);
    if (call.statistics) mine.add_teacher(load(log_probs + k));
  });
  const Masses masses = team.merged(mine, at);

  // A row of -inf alone has no distribution. Its log sum is NaN, as in log_softmax.
  const float max = fmaxf(masses.others.max, masses.entries.max), base = base_of(max);
  const float others_sum = masses.others.sum_from(base, at), entries_sum = masses.entries.sum_from(base, at);
  const float sum = others_sum + entries_sum;
  const Normalizer all = {max, sum == 0 ? NAN : logf(sum), at.inverse_temperature};
  float unit_log_sum = unit ? all.log_sum : 0;
  if (at.unit)
    unit_log_sum = logf(masses.others.unit_sum * exp_of(masses.others.max - base) +
                        masses.entries.unit_sum * exp_of(masses.entries.max - base));
  Normalizer norm = all;  // makes the log-probabilities that the divergence takes
  float bucket_lp = -INFINITY, bucket_lq = -INFINITY;
  if (call.support_only) {
    norm.max = masses.entries.max;
    norm.log_sum = masses.entries.sum == 0 ? NAN : logf(masses.entries.sum);
  } else {
    bucket_lp = load((const float*)call.tail_log_prob + row);
    bucket_lq = log_share(masses.others, others_sum, entries_sum, all);
  }
  const float bucket_q = exp_of(bucket_lq);

  EntryStatistics statistics = EntryStatistics::none();
  if (call.statistics && !close) {
    add_statistics_of_others<way>(statistics, student, names, all, first_column);
    each_entry(call, team, row, [&](int64_t k, int column) {
      const float logit = load_logit(logits, dtype, column), of_all = all.log_prob(logit);
      const float lp = load(log_probs + k), p = exp_of(lp);
      statistics.tv += 0.5f * fabsf(p - exp_of(norm.log_prob(logit)));
      statistics.student_entropy -= weighted(exp_of(of_all), of_all);
      statistics.teacher_entropy -= weighted(p, lp);
      if (logit == max) statistics.student_first = min(statistics.student_first, column);
      if (lp == masses.teacher_max) statistics.teacher_first = min(statistics.teacher_first, column);
      if (call.options.labels && column == numbers.label) statistics.label_entry = (int)k;
    });
    statistics = team.merged(statistics);
  }

  Sums sums = Sums::none();
  float bucket_phi = 0, bucket_psi = 0;
  SparseCloseRow close_row(call, row, logits, norm.max, numbers.temperature);
  WideMasses wide = WideMasses::none();
  float slack = 0;
  if constexpr (close) {
    wide = team.merged(close_row.masses<way>(team, student, names));
    close_row.student.log_sum = log(wide.all());
    slack = close_row.slack(numbers.temperature);
  }
  with_divergence((int)call.divergence, (const float*)call.parameters, [&](auto divergence) {
    each_entry(call, team, row, [&](int64_t k, int column) {
      const float logit = load_logit(logits, dtype, column), lp = load(log_probs + k), lq = norm.log_prob(logit);
      if constexpr (close) {
        const CloseTerms<float> x = close_row.of_entry(divergence, k, logit, lq, exp_of(lq));
        sums.phi += without_slack(slack, x), sums.psi += x.psi;
        return;
      }
      const float p = exp_of(lp), q = exp_of(lq);
      sums.phi += divergence.value(lp, lq, p, q);
      sums.psi += divergence.slope(lp, lq, p, q);
    });
    if (call.support_only) return;
    if constexpr (close) {
      const CloseTerms<float> x = close_row.of_bucket(divergence, wide, bucket_lp, bucket_lq);
      bucket_phi = without_slack(slack, x), bucket_psi = x.psi;
      return;
    }
    const float bucket_p = exp_of(bucket_lp);
    bucket_phi = divergence.value(bucket_lp, bucket_lq, bucket_p, bucket_q);
    bucket_psi = divergence.slope(bucket_lp, bucket_lq, bucket_p, bucket_q);
  });
  sums = team.merged(sums);
  sums.phi += bucket_phi, sums.psi += bucket_psi;
  const bool is_close = close || call.is_close(sums.phi, numbers.temperature);
  if (team.first_thread()) {
    const TopkOutcome outcome = {call, row, numbers, all, unit_log_sum, team.board.label_logit};
    outcome.write_loss(sums.phi);
    if constexpr (close) {
      if (call.statistics) write_divergence(call, row, sums.phi);
    } else {
      if (call.statistics) outcome.write_statistics(sums.phi, statistics, masses, bucket_lp, bucket_lq);
      if (call.close_below > 0) store((uint8_t*)call.run.workspace + row, (uint8_t)is_close);
    }
  }
  if (!call.gradient || (is_close && !close)) return;

  TopkGradient gradient;
  gradient.row = (char*)call.gradient + row * call.gradient_columns * bytes_of(dtype);
  gradient.dtype = dtype;
  const float cross_entropy = labelled ? unit_log_sum + (max - team.board.label_logit) : 0;
  const Factors factors = waits ? numbers.factors(call.options, at.inverse_temperature, sums.phi, cross_entropy)
                                : numbers.factors(call.options, at.inverse_temperature);
  gradient.soft = factors.soft, gradient.hard = factors.hard;
  // An infinite slope makes the whole row's gradient NaN.
  gradient.slope_sum = fabsf(sums.psi) < INFINITY ? sums.psi : NAN;
  gradient.max = max, gradient.unit_log_sum = unit_log_sum, gradient.label = (int)numbers.label;
  gradient.others_base = base_of(masses.others.max);
  gradient.of_others = gradient.softened(bucket_psi, call.support_only ? 0 : bucket_q);
  // If the others have no mass, all of their logits are -inf, or there are no others.
  if (!call.support_only) gradient.of_others *= masses.others.sum == 0 ? 0 : 1 / masses.others.sum;
  gradient.reads_others = !call.support_only || gradient.hard != 0;

  with_divergence((int)call.divergence, (const float*)call.parameters, [&](auto divergence) {
    each_entry(call, team, row, [&](int64_t k, int column) {
      const float logit = load_logit(logits, dtype, column);
      const float lp = load(log_probs + k), lq = norm.log_prob(logit), q = exp_of(lq);
      float slope = divergence.slope(lp, lq, exp_of(lp), q);
      if constexpr (close) slope = close_row.of_entry(divergence, k, logit, lq, q).psi;
      const float soft_part = gradient.softened(slope, q);
      const float hard_part = gradient.hard == 0 ? 0 : gradient.hard_of(logit, column);
      store_logit(gradient.row, dtype, column, soft_part + hard_part);
    });
  });
  gradient.write_others<way>(student, names, first_column, at);
  fill_gradient(call, team, row, call.columns, 0);
}

// ---- the kernels

// Without a gradient a streaming kernel reads a row once, from memory. Two blocks share a multiprocessor, so that they
// wait for memory together.
template <Way way>
__global__ void __launch_bounds__(way == Way::streaming ? 2 * kMaxThreads : threads_held(way), 1)
    topk_rows_kernel(const __grid_constant__ TopkRowsCall call, const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (way != Way::streaming) return;  // no plan has this way on these chips
#endif
  Team team(plan);
  const Dtype dtype = call.student.dtype;
  const int64_t teams = plan.teams;
  const int staged_bytes = way == Way::streaming ? 0 : plan.slice * bytes_of(dtype);
  Names names(team.board.data() + staged_bytes, plan);
  auto cut_of = [&](const char* logits) {
    return Cut(call.columns, shift_of(logits, dtype, logits, dtype), plan, team);
  };
  auto each_row = [&](auto sweep) {
    for (int64_t row = blockIdx.x / team.blocks; row < call.rows; row += teams) {
      const RowTerms numbers(call, row);
      if (numbers.swept(call)) {
        const char* logits = row_start(call.student, call, row);
        const Cut cut = cut_of(logits);
        names.set(call, row, cut);
        sweep(row, numbers, logits, cut);
        __syncthreads();  // all threads have read the names
      } else {
        fill_row(call, team, row, numbers.skipped() ? 0 : NAN);
      }
    }
  };
  if constexpr (way == Way::streaming) {
    each_row([&](int64_t row, const RowTerms& numbers, const char* logits, const Cut& cut) {
      __syncthreads();  // the names are complete
      sweep_topk_row<way, false>(call, team, row, numbers, logits, cut.first_column, cut.slice(logits, dtype), names);
    });
  } else {
    Staging staging(dtype, plan, team.board);
    each_row([&](int64_t row, const RowTerms& numbers, const char* logits, const Cut& cut) {
      staging.stage(cut.slice(logits, dtype));  // stage() synchronises, so the names are complete too
      // The next row arrives in the L2 cache while the team works on this row.
      if (threadIdx.x == 0 && RowTerms(call, row + teams).swept(call)) {
        const char* after = row_start(call.student, call, row + teams);
        staging.prefetch(cut_of(after).slice(after, dtype));
      }
      const Slice student = {staging.student, dtype, cut.begin, cut.end, true};
      sweep_topk_row<way, false>(call, team, row, numbers, logits, cut.first_column, student, names);
      bulk_fence();
    });
  }
}

// It finds the close rows again.
__global__ void __launch_bounds__(kMaxThreads, 1)
    close_topk_rows_kernel(const __grid_constant__ TopkRowsCall call, const __grid_constant__ Plan plan) {
  Team team(plan);
  Names names(team.board.data(), plan);
  const Dtype dtype = call.student.dtype;
  each_close_row(
      call, plan, [&](int64_t row) { return load((const uint8_t*)call.run.workspace + row) != 0; },
      [&](int64_t row, const RowTerms& numbers) {
        const char* logits = row_start(call.student, call, row);
        const Cut cut(call.columns, shift_of(logits, dtype, logits, dtype), plan, team);
        names.set(call, row, cut);
        __syncthreads();  // the names are complete
        sweep_topk_row<Way::streaming, true>(call, team, row, numbers, logits, cut.first_column,
                                             cut.slice(logits, dtype), names);
        __syncthreads();  // before the next row's names
      });
}

// ---- the host

namespace {

using TopkRowsKernel = void (*)(const TopkRowsCall, const Plan);

TopkRowsKernel topk_rows_kernel_of(Way way) {
  return way == Way::halves   ? topk_rows_kernel<Way::halves>
         : way == Way::staged ? topk_rows_kernel<Way::staged>
                              : topk_rows_kernel<Way::streaming>;
}

Shape shape_of(const TopkRowsCall& call) {
  Shape shape = {};
  shape.rows = call.rows, shape.columns = call.columns;
  const bool gradient = call.gradient.data && (!call.support_only || call.options.hard_weight.data);
  shape.sweeps = wants_others(call) ? 1 + !!call.statistics + gradient : 0;
  shape.column_bytes = bytes_of(call.student.dtype);
  shape.column_bits = 1;
  shape.aligned = rows_are_aligned(call.student);
  shape.halves = call.student.dtype != Dtype::f32;
  return shape;
}

}  // namespace

void topk_rows(const TopkRowsCall& original) {
  if (original.rows == 0) return;
  TopkRowsCall call = original;
  call.inner = collapse(call.rows, call.inner, call.student);
  const int device = call.run.device;
  OnDevice guard(device);
  const Plan planned = plan(shape_of(call), Chip(device, topk_rows_kernel<Way::streaming>), device,
                            topk_rows_kernel_of);
  launch(topk_rows_kernel_of(planned.way), planned, call.run, call, planned);

  if (call.close_below == 0) return;
  Shape close = shape_of(call);
  close.sweeps = close.sweeps ? 2 : 0;
  const Plan again = plan_streaming(close, Chip(device, close_topk_rows_kernel), device,
                                    [](Way) { return close_topk_rows_kernel; });
  launch(close_topk_rows_kernel, again, call.run, call, again);
}

int64_t topk_rows_bytes(const TopkRowsCall& call) { return call.close_below == 0 ? 0 : call.rows; }

void load_topk_rows() {
  cudaFuncAttributes attributes;
  for (Way way : {Way::streaming, Way::staged, Way::halves})
    KDK_CHECK(cudaFuncGetAttributes, &attributes, topk_rows_kernel_of(way));
  KDK_CHECK(cudaFuncGetAttributes, &attributes, close_topk_rows_kernel);
}

}  // namespace cuda
}  // namespace kdk
