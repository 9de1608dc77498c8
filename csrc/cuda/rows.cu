// The row sweeps of the dense family on an NVIDIA GPU: the twin of csrc/cpu/rows.cpp.
//
// A team works on a row. The team is the blocks of a thread-block cluster; each block has a slice of the columns, and
// each thread of a block has groups of 8 columns. Up to three sweeps run over the row. The team merges after each of
// the first two sweeps, always in the same order:
//
//     floats      running maxima, and the sums of exponentials relative to them            -> max, log sum
//     sums        p, q from the log-probabilities, the divergence's value and slope        -> sum phi, sum psi
//     gradient    scale / temperature * (psi - q * sum psi), and the label term            -> gradient
//
// If the first sweep finds sum psi (kl, reverse_kl, mixed_kl: see slope_sum_of), one sweep does the work of the last
// two.
//
// A row is close if its divergence comes out small, or if its temperature is high. Such a row keeps its logits and gets
// a finite shift, and a second kernel (rows_close.h) finds its sums and its gradient by the close lines of
// csrc/divergences.h.
//
// The plan of a call chooses between two ways to run the sweeps:
//
//     staged      (Hopper and later) a bulk copy brings the slices of student and teacher to shared memory, and every
//                 sweep reads them there. The kernel reads each logit from memory once: in bf16 a row moves 6 bytes a
//                 column with a gradient and 4 without. If there is room, two or three blocks share a multiprocessor:
//                 one block works while another waits for its row, its cluster or its merge.
//     streaming   every sweep reads global memory. Sweeps alternate in direction, and the grid has as few rows in
//                 flight as keep the chip busy, so the second and third sweep find columns in the L2 cache. Older chips
//                 stream, and so do rows that are too long for a cluster and calls that have one sweep only.
//
// The gradient may overwrite the student's logits. A thread writes only columns that the thread itself has read, in the
// last sweep that needs them. The label's logit is the exception, since another thread may own its column: the kernel
// reads it before the first merge.
//
// The grid is the number of blocks that the chip holds at once, and a team takes every n-th row. A row may begin at an
// address that is no multiple of 16 bytes. If student and teacher have the same shift, the groups still begin at
// multiples of 16 bytes, and the threads copy the columns before and after the groups one by one. Log-probabilities are
// (x - max) / temperature - log sum. The difference comes first, so a large common offset of the logits costs no
// digits.
//
// The following numbers are computed for an H100, and not yet measured. A block may have 232,448 bytes of the shared
// memory, each of two blocks 115,712, and each of three blocks 76,800:
//
//     columns     bf16: blocks of a cluster, bytes        fp32
//      32,000      2   64,448  three on a multiprocessor   4   64,448  three
//     128,256      8   64,960  three                      16   65,344  three
//     151,936      8   76,800  three                      16   77,312  two
//     262,144     16   66,880  three                      16  132,672  one
//
// A block has 256 threads; 128 in the first two rows of fp32, and 512 in the last. Launch bounds leave a thread at most
// 80 registers in bf16 and 128 otherwise. A copy at 3 TB/s moves 5.0e11 column pairs a second in bf16 with their
// gradients. In that time 132 multiprocessors at 1.7 GHz issue 57 instructions for a pair, 7.2 of them of the
// special-function unit. kl needs fewer of both. js, alpha and the skews need more of one or of both, which then bounds
// them; a polynomial exp2 on the other pipes would need more instructions. (cuobjdump --dump-sass shows the loops of a
// build.)
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include "device.h"
#include "groups.h"
#include "launch.h"
#include "plan.h"
#include "row.h"
#include "rows_close.h"
#include "rows_partials.h"
#include "rows_results.h"
#include "table.h"
#include "team.h"

namespace kdk {
namespace cuda {

// ---- the sweeps

// Sweep 1.
template <class D, Way way>
inline __device__ Floats floats_of(const Slice& student, const Slice& teacher, Tempering at) {
  Floats x = Floats::none();
  const Groups groups(student.end);
  for (int position = groups.first; groups.has(position); position += groups.step) {
    float s[kGroup], t[kGroup];
    load_pair<way != Way::streaming, way == Way::halves>(student, teacher, position, s, t);
    float student_max = x.student_max, teacher_max = x.teacher_max;
    for (int i = 0; i < kGroup; ++i) student_max = fmaxf(student_max, s[i]), teacher_max = fmaxf(teacher_max, t[i]);
    if (student_max > x.student_max || teacher_max > x.teacher_max) x.rebase(student_max, teacher_max, at);
    float student_base = base_of(student_max), teacher_base = base_of(teacher_max);
    for (int i = 0; i < kGroup; ++i) {
      float ds = s[i] - student_base, dt = t[i] - teacher_base;
      float e = at.exp(ds);
      x.student_sum += e;
      x.teacher_sum += at.exp(dt);
      if (slope_sum_of<D> == SlopeSum::from_log_ratio) x.log_ratio += weighted(e, ds - dt);
    }
    if (at.unit)
      for (int i = 0; i < kGroup; ++i) x.unit_sum += exp_of(s[i] - student_base);
  }
  return x;
}

// Sweep 2. If `known`, gradient.slope_sum is sum psi already, and the sweep also writes the gradient.
template <class D, Way way>
inline __device__ Sums sums_of(const D& divergence, const Slice& student, const Slice& teacher,
                               Normalizer student_norm, Normalizer teacher_norm, bool known,
                               const GradientSlice& gradient) {
  Sums x = Sums::none();
  const Groups groups(student.end, way == Way::streaming);
  for (int position = groups.first; groups.has(position); position += groups.step) {
    float s[kGroup], t[kGroup], q[kGroup], slope[kGroup];
    load_pair<way != Way::streaming, way == Way::halves>(student, teacher, position, s, t);
    for (int i = 0; i < kGroup; ++i) {
      float lq = student_norm.log_prob(s[i]), lp = teacher_norm.log_prob(t[i]), p = exp_of(lp);
      q[i] = exp_of(lq);
      slope[i] = divergence.slope(lp, lq, p, q[i]);
      x.phi += divergence.value(lp, lq, p, q[i]);
      if (!known) x.psi += slope[i];
    }
    if (known && gradient.wanted) gradient.store<way == Way::halves>(position, s, q, slope);
  }
  return x;
}

// The statistics have a sweep of their own, so they cost the other sweeps no registers. If the row is staged, the
// sweep reads nothing from global memory.
template <Way way>
inline __device__ Statistics statistics_of(const Slice& student, const Slice& teacher, Normalizer student_norm,
                                           Normalizer teacher_norm, int first_column) {
  Statistics x = Statistics::none();
  const Groups groups(student.end);
  for (int position = groups.first; groups.has(position); position += groups.step) {
    float s[kGroup], t[kGroup];
    load_pair<way != Way::streaming, way == Way::halves>(student, teacher, position, s, t);
    for (int i = 0; i < kGroup; ++i) {
      float lq = student_norm.log_prob(s[i]), lp = teacher_norm.log_prob(t[i]), q = exp_of(lq), p = exp_of(lp);
      x.tv += 0.5f * fabsf(p - q);
      x.student_entropy -= weighted(q, lq);
      x.teacher_entropy -= weighted(p, lp);
      const int column = first_column + position + i;
      if (!student.holds(position + i)) continue;
      if (s[i] == student_norm.max) x.student_first = min(x.student_first, column);
      if (t[i] == teacher_norm.max) x.teacher_first = min(x.teacher_first, column);
    }
  }
  return x;
}

// Sweep 3.
template <class D, Way way>
inline __device__ void write_gradient(const D& divergence, const Slice& student, const Slice& teacher,
                                      Normalizer student_norm, Normalizer teacher_norm,
                                      const GradientSlice& gradient) {
  const Groups groups(student.end);
  for (int position = groups.first; groups.has(position); position += groups.step) {
    float s[kGroup], t[kGroup], q[kGroup], slope[kGroup];
    load_pair<way != Way::streaming, way == Way::halves>(student, teacher, position, s, t);
    for (int i = 0; i < kGroup; ++i) {
      float lq = student_norm.log_prob(s[i]), lp = teacher_norm.log_prob(t[i]);
      q[i] = exp_of(lq);
      slope[i] = divergence.slope(lp, lq, exp_of(lp), q[i]);
    }
    gradient.store<way == Way::halves>(position, s, q, slope);
  }
}


// A skipped row is 0 everywhere; a row with a bad value is NaN.
inline __device__ void fill_row(const RowsCall& call, const Team& team, int64_t row, float value) {
  if (call.sweeps & kGradient) fill_gradient(call, team, row, 0, value);
  if (!team.first_thread()) return;
  float values[kRowFloats];
  for (int i = 0; i < kRowFloats; ++i) values[i] = value;
  if (call.sweeps & kFloats) write_column(call.floats, call, row, values, kRowFloats);
  if (call.sweeps & kSums) write_column(call.sums, call, row, values, kRowSums);
  if (call.loss) store((float*)call.loss + row, value);
  if (call.statistics) fill_statistics(call, row, value);
}

template <class D, Way way>
inline __device__ void sweep_row(const RowsCall& call, Team& team, int64_t row, const RowTerms& numbers,
                                 int first_column, const Slice& student, const Slice& teacher) {
  const Tempering at(numbers.temperature, call.needs_unit_log_sum);
  // Whether the factors of the gradient wait for the loss, which the kernel finds together with sum psi.
  const bool waits = call.options.gradient_needs_loss() && (call.sweeps & kGradient);
  const bool knows = slope_sum_of<D> != SlopeSum::swept && (call.sweeps & kFloats) && !waits;

  // The gradient may overwrite the logits, and any block of the team may overwrite the label's logit. Each block stores
  // the label's logit before the first merge, because no thread leaves the merge before all blocks have come to it.
  const bool stores_label = call.options.labels && ((call.sweeps & kSums) || waits) && threadIdx.x == 0;
  float label_logit = 0;
  if (stores_label) label_logit = load_logit(row_start(call.student, call, row), call.student.dtype, numbers.label);

  float floats[kRowFloats];  // student_max, student_log_sum, teacher_max, teacher_log_sum, unit_log_sum
  float log_ratio = 0;       // E_q[lq - lp]
  if (call.sweeps & kFloats) {
    const Floats mine = floats_of<D, way>(student, teacher, at);
    if (stores_label) team.board.label_logit = label_logit;
    Floats x = team.merged(mine, at);
    // A row of -inf alone has no distribution. Its log sum is NaN, as in log_softmax.
    floats[0] = x.student_max, floats[1] = x.student_sum == 0 ? NAN : logf(x.student_sum);
    floats[2] = x.teacher_max, floats[3] = x.teacher_sum == 0 ? NAN : logf(x.teacher_sum);
    floats[4] = !call.needs_unit_log_sum ? 0 : at.unit ? logf(x.unit_sum) : floats[1];
    log_ratio = x.log_ratio / x.student_sum * at.inverse_temperature + (floats[3] - floats[1]);
    if (team.first_thread()) write_column(call.floats, call, row, floats, kRowFloats);
  } else {
    for (int i = 0; i < kRowFloats; ++i) floats[i] = load((const float*)call.floats + i * call.rows + row);
    if (stores_label) team.board.label_logit = label_logit;
  }
  if (!(call.sweeps & (kSums | kGradient))) return;

  const D divergence((const float*)call.parameters);
  const Normalizer student_norm = {floats[0], floats[1], at.inverse_temperature};
  const Normalizer teacher_norm = {floats[2], floats[3], at.inverse_temperature};

  GradientSlice gradient;
  gradient.data = (char*)call.gradient + (row * call.gradient_columns + first_column) * bytes_of(call.student.dtype);
  gradient.dtype = call.student.dtype;
  gradient.begin = student.begin, gradient.end = student.end;
  gradient.label = (int)numbers.label - first_column;
  gradient.aligned = (uint64_t)gradient.data % 16 == 0;
  gradient.set(numbers.factors(call.options, at.inverse_temperature));
  gradient.student_max = floats[0], gradient.unit_log_sum = floats[4];
  // An infinite slope makes the whole row's gradient NaN.
  auto finite_or_nan = [](float x) { return fabsf(x) < INFINITY ? x : NAN; };
  float phi = 0, shift = INFINITY;

  // Whether the sweep for the sums writes the gradient too. A gradient that overwrites the logits is written there only
  // if the row is surely not close. Its divergence is at least sum psi, and twice the square of the total variation,
  // which is at least the difference of the largest probabilities.
  bool at_once = knows && (call.sweeps & kGradient) && (call.sweeps & kSums);
  if (call.sweeps & kSums) {
    float known_psi = 0;
    if constexpr (slope_sum_of<D> == SlopeSum::from_log_ratio) known_psi = divergence.slope_sum(log_ratio);
    gradient.slope_sum = finite_or_nan(known_psi);
    if (at_once && is_in_place(call)) {
      const float far = 1.01f * (float)call.close_below, gap = exp_of(-floats[1]) - exp_of(-floats[3]);
      at_once = numbers.temperature < (float)call.close_temperature && (known_psi > far || 2 * gap * gap > far);
    }
    gradient.wanted = at_once;
    Statistics statistics = Statistics::none();
    if (call.statistics)
      statistics = team.merged(statistics_of<way>(student, teacher, student_norm, teacher_norm, first_column), at);
    Sums sums = team.merged(
        sums_of<D, way>(divergence, student, teacher, student_norm, teacher_norm, knows, gradient), at);
    if (knows) {
      sums.psi = known_psi;
      // A class without mass of the teacher may count in the first sweep, and may underflow in the second.
      if (isinf(known_psi)) sums.phi = INFINITY;
    }
    if (call.close_below > 0 &&
        (sums.phi < (float)call.close_below || numbers.temperature >= (float)call.close_temperature))
      shift = LogRatio<float>::first_shift(floats[0], floats[1], floats[2], floats[3], at.inverse_temperature);
    if (team.first_thread()) {
      const float values[kRowSums] = {sums.phi, sums.psi, shift < INFINITY ? shift : INFINITY};
      write_column(call.sums, call, row, values, kRowSums);
      // Read again, from the first-level cache, so that the sweeps keep fewer numbers in registers.
      const RowTerms again(call, row);
      const Outcome outcome = {call, row, again, student_norm, teacher_norm, floats[4], team.board.label_logit};
      if (call.loss) outcome.write_loss(sums.phi);
      if (call.statistics) outcome.write_statistics(sums.phi, statistics);
    }
    gradient.slope_sum = finite_or_nan(sums.psi);
    phi = sums.phi;
  } else {
    if (waits) phi = load((const float*)call.sums + row);
    gradient.slope_sum = finite_or_nan(load((const float*)call.sums + call.rows + row));
    shift = load((const float*)call.sums + 2 * call.rows + row);
  }
  if (!(call.sweeps & kGradient)) return;
  if (waits) {
    __syncthreads();  // the label's logit is stored
    if (call.options.labels) label_logit = team.board.label_logit;
    const RowTerms again(call, row);
    gradient.set(again.factors(call.options, at.inverse_temperature, phi, floats[4] + (floats[0] - label_logit)));
    __syncthreads();  // the next row's label comes after all threads have read this one's
  }
  if (!at_once && !(shift < INFINITY))
    write_gradient<D, way>(divergence, student, teacher, student_norm, teacher_norm, gradient);
  fill_gradient(call, team, row, call.columns, 0);
}

// ---- the kernels

template <class D, Way way>
__global__ void __launch_bounds__(threads_held(way), 1)
    rows_kernel(const __grid_constant__ RowsCall call, const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (way != Way::streaming) return;  // no plan has this way on these chips
#endif
  Team team(plan);
  const int64_t teams = plan.teams;
  auto each_row = [&](auto sweep) {
    for (int64_t row = blockIdx.x / plan.blocks; row < call.rows; row += teams) {
      const RowTerms numbers(call, row);
      if (numbers.swept(call))
        sweep(row, numbers, RowCut(call, plan, team, row));
      else
        fill_row(call, team, row, numbers.skipped() ? 0 : NAN);
    }
  };
  if constexpr (way == Way::streaming) {
    each_row([&](int64_t row, const RowTerms& numbers, const RowCut& cut) {
      sweep_row<D, way>(call, team, row, numbers, cut.first_column, cut.slice(cut.student, call.student.dtype),
                        cut.slice(cut.teacher, call.teacher.dtype));
    });
  } else {
    Staging staging(call.student.dtype, plan, team.board);
    each_row([&](int64_t row, const RowTerms& numbers, const RowCut& cut) {
      staging.stage(cut.slice(cut.student, call.student.dtype), cut.slice(cut.teacher, call.teacher.dtype));
      // The next row arrives in the L2 cache while the team works on this row.
      if (threadIdx.x == 0 && RowTerms(call, row + teams).swept(call)) {
        const RowCut after(call, plan, team, row + teams);
        staging.prefetch(after.slice(after.student, call.student.dtype));
        staging.prefetch(after.slice(after.teacher, call.teacher.dtype));
      }
      const Slice student = {staging.student, call.student.dtype, cut.begin, cut.end, true};
      const Slice teacher = {staging.teacher, call.teacher.dtype, cut.begin, cut.end, true};
      sweep_row<D, way>(call, team, row, numbers, cut.first_column, student, teacher);
      bulk_fence();
      __syncthreads();  // all threads have read the staged row
    });
  }
}

__global__ void __launch_bounds__(kMaxThreads)
    scale_kernel(char* x, Dtype dtype, int64_t rows, int64_t columns, const __grid_constant__ PerRow factor) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float f = per_row(factor, row);
    if (f == 1) continue;
    char* data = x + row * columns * bytes_of(dtype);
    const int shift = columns_in((uint64_t)data % 16, dtype);
    data -= shift * bytes_of(dtype);
    const Slice slice = {data, dtype, shift, (int)columns + shift, true};
    const Groups groups(slice.end);
    for (int position = groups.first; groups.has(position); position += groups.step) {
      float values[kGroup];
      widen<false>(load_group<false, false>(slice, position), dtype, values);
      for (int i = 0; i < kGroup; ++i) values[i] *= f;
      store_group<false>(data, dtype, slice.whole(position), position, slice.begin, slice.end, values);
    }
  }
}

// ---- the host: the plan, the launch

namespace {

using Kernel = void (*)(const RowsCall, const Plan);

struct KernelsOfDivergence {
  Kernel streaming, staged, halves;
  bool knows_slope_sum;
};
#define KDK_KERNELS_OF(key, Struct)                                                             \
  {rows_kernel<Struct<float>, Way::streaming>, rows_kernel<Struct<float>, Way::staged>,         \
   rows_kernel<Struct<float>, Way::halves>, slope_sum_of<Struct<float>> != SlopeSum::swept},
const KernelsOfDivergence kKernelsOf[] = {KDK_DIVERGENCES(KDK_KERNELS_OF)};
#undef KDK_KERNELS_OF

// A call that finds only row floats has no divergence. Any divergence's kernel serves it, because row floats do not
// depend on the divergence.
const KernelsOfDivergence& kernels_of(Divergence divergence) {
  return kKernelsOf[divergence == Divergence::none ? 0 : (int)divergence];
}
Kernel kernel_of(Divergence divergence, Way way) {
  const KernelsOfDivergence& kernels = kernels_of(divergence);
  return way == Way::halves ? kernels.halves : way == Way::staged ? kernels.staged : kernels.streaming;
}

// The number of times that a call reads the logits.
int sweeps_of(const RowsCall& call) {
  const int sweeps = !!(call.sweeps & kFloats) + !!(call.sweeps & kSums) + !!(call.sweeps & kGradient);
  const bool at_once = kernels_of(call.divergence).knows_slope_sum && !call.options.gradient_needs_loss();
  return sweeps == 3 && at_once ? 2 : sweeps;
}

Shape shape_of(const RowsCall& call) {
  const Dtype student = call.student.dtype, teacher = call.teacher.dtype;
  Shape shape = {};
  shape.rows = call.rows, shape.columns = call.columns;
  shape.sweeps = sweeps_of(call);
  shape.column_bytes = bytes_of(student) + bytes_of(teacher);
  shape.aligned = rows_are_aligned(call.student) && rows_are_aligned(call.teacher);
  shape.halves = student == teacher && student != Dtype::f32;
  return shape;
}

}  // namespace

void rows(const RowsCall& original) {
  if (original.rows == 0) return;
  RowsCall call = original;
  call.inner = collapse(call.rows, call.inner, call.student, call.teacher);
  const int device = call.run.device;
  OnDevice guard(device);
  const Plan planned = plan(shape_of(call), Chip(device, scale_kernel), device,
                            [&](Way way) { return kernel_of(call.divergence, way); });
  launch(kernel_of(call.divergence, planned.way), planned, call.run, call, planned);

  if (call.close_below == 0 || !(call.sweeps & (kSums | kGradient))) return;
  Shape close = shape_of(call);
  close.sweeps = 2;
  const Plan again = plan_streaming(close, Chip(device, close_rows_kernel), device,
                                    [](Way) { return close_rows_kernel; });
  launch(close_rows_kernel, again, call.run, call, again);
}

void scale_rows(const ScaleRowsCall& call) {
  const int64_t rows = call.rows, columns = call.columns;
  if (rows == 0 || columns == 0) return;
  OnDevice guard(call.run.device);
  const int64_t blocks = 8 * Chip(call.run.device, scale_kernel).multiprocessors;
  const Launch planned = {1, threads_for(columns, 2, kMaxThreads), 0, (int)(rows < blocks ? rows : blocks)};
  launch(scale_kernel, planned, call.run, (char*)call.x, call.x.dtype, rows, columns, call.factor);
}

int64_t rows_bytes(const RowsCall&) { return 0; }
int64_t scale_rows_bytes(const ScaleRowsCall&) { return 0; }

void load_rows() {
  cudaFuncAttributes attributes;
  KDK_CHECK(cudaFuncGetAttributes, &attributes, scale_kernel);
  KDK_CHECK(cudaFuncGetAttributes, &attributes, close_rows_kernel);
  for (const KernelsOfDivergence& kernels : kKernelsOf)
    for (Kernel kernel : {kernels.streaming, kernels.staged, kernels.halves})
      KDK_CHECK(cudaFuncGetAttributes, &attributes, kernel);
}

}  // namespace cuda
}  // namespace kdk
