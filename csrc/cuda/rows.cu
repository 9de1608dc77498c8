// The row sweeps of the dense family on an NVIDIA GPU: the twin of csrc/cpu/rows.cpp.
//
// A row is worked on by a team: the blocks of a thread-block cluster, each on its slice of the columns, and in a block
// every thread on groups of 8 columns. Up to three sweeps over the row, the team merging after each of the first two,
// always in the same order:
//
//     floats      running maxima, and the sums of exponentials relative to them            -> max, log sum
//     sums        p, q from the log-probabilities, the divergence's value and slope        -> sum phi, sum psi
//     gradient    scale / temperature * (psi - q * sum psi), and the label term            -> gradient
//
// Where sum psi is known after the first (kl, reverse_kl, mixed_kl: see slope_sum_of), the last two are one.
//
// The same sweeps run in two ways, which the plan of a call chooses between:
//
//     staged      (Hopper and later) the slices of student and teacher are copied to shared memory in bulk, and every
//                 sweep reads them there. In bf16 a row moves 6 bytes a column with gradient and 4 without: each logit
//                 is read from memory once. Two or three blocks share a multiprocessor where they have room: one works
//                 while another waits for its row, its cluster or its merge.
//     streaming   every sweep reads global memory, to and fro, with as few rows in flight as keep the chip busy, so
//                 that the second and third find what they can in the L2 cache. For older chips, for rows that are too
//                 long for a cluster, and where there is one sweep only.
//
// The gradient may take the place of the student's logits: a thread writes the columns that it has read, in the sweep
// that needs them last, and what needs another's (the label's logit) is read before the first merge.
//
// The grid is what the chip holds at once, and a team takes every n-th row. Rows that do not begin at a multiple of 16
// bytes are worked on in groups that do, if student and teacher agree on it; the columns before and after are copied
// one by one. Log-probabilities are (x - max) / temperature - log sum: differences first, so that a large common offset
// of the logits costs no digits.
//
// Computed for an H100, and not yet measured. Of its shared memory a block may have 232,448 bytes, each of two 115,712,
// each of three 76,800:
//
//     columns     bf16: blocks of a cluster, bytes        fp32
//      32,000      2   64,640  three on a multiprocessor   4   64,640  two
//     128,256      8   64,768  three                      16   64,768  two
//     151,936      8   76,608  three                      16   76,608  two
//     262,144     16   66,176  three                      16  131,712  one
//
// of 256 threads (128 in the first two of fp32) with at most 80 registers each in bf16 and 119 else. Copying at 3 TB/s
// moves 5.0e11 column pairs a second in bf16 with their gradients; 132 multiprocessors at 1.7 GHz issue 57 instructions
// for a pair in that time, 7.2 of them of the special-function unit. The inner loops take (sm_90a, bf16, with gradient,
// no label term, no statistics):
//
//     kl 39 and 4    reverse_kl 43 and 4    mixed_kl 51 and 4    hellinger 51 and 7    tv 57 and 6
//     alpha 66 and 8    js 69 and 8    skew_kl 69 and 9    skew_reverse_kl 79 and 10
//
// so that the last four are bound to 86, 83, 80 and 72 % of the copy: alpha and js by the issue of instructions, which
// a polynomial exp2 on the other pipes would need more of, the skews by special functions as much.
#include <cuda_runtime.h>
#include <float.h>
#include <math.h>
#include <stdint.h>

#include "device.h"
#include "groups.h"
#include "launch.h"
#include "linear.h"
#include "rows.h"
#include "team.h"

namespace kdk {
namespace cuda {

#define KDK_HD inline __device__
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
inline __device__ float exp_of(float x) { return exp2_approx(x * kLog2e); }
// The instructions take a subnormal for 0. The logarithm's -inf would meet a weight that is not 0, the reciprocal's
// infinity a 0: x vanishes there together with m.
inline __device__ float log_of(float x) { return log2_approx(x < FLT_MIN ? FLT_MIN : x) * kLn2; }
inline __device__ float ratio(float x, float m) { return m < FLT_MIN ? 0 : x * reciprocal_approx(m); }
inline __device__ float root_of(float, float log_x) { return exp2_approx(log_x * (0.5f * kLog2e)); }
#include "../divergences.h"

// The kernels of a divergence. `halves` is `staged` where both sides have the same 16-bit dtype, as in most training:
// it takes fewer instructions.
enum class Way { halves, staged, streaming };
constexpr int threads_of(Way way) { return way == Way::streaming ? kMaxThreads : 256; }  // at most, of a block
constexpr int blocks_of(Way way) { return way == Way::halves ? 3 : way == Way::staged ? 2 : 1; }  // a multiprocessor's

// How a call is launched: made on the host, from sizes alone.
struct Plan : Launch {
  Way way;
  int slice;  // columns of a block, a multiple of kGroup
};

// ---- partial results, and how they merge across a warp: lane 0 has the whole

// What exponentials are taken relative to: 0 while all that was seen is -inf.
inline __device__ float base_of(float max) { return max == -INFINITY ? 0.0f : max; }

struct Tempering {
  float inverse_temperature;
  float scale;  // of logits in exponents of 2
  bool unit;    // whether the sum at temperature 1 is wanted, and another

  __device__ Tempering(float temperature, bool want_unit)
      : inverse_temperature(1 / temperature),
        scale(inverse_temperature * kLog2e),
        unit(want_unit && temperature != 1) {}
  __device__ float exp(float x) const { return exp2_approx(x * scale); }  // of x / temperature
};

struct Floats {
  float student_max, student_sum, teacher_max, teacher_sum;
  float unit_sum;   // of the student at temperature 1
  float log_ratio;  // sum of e * ((s - student base) - (t - teacher base)), e the student's exponential

  static __device__ Floats none() { return {-INFINITY, 0, -INFINITY, 0, 0, 0}; }

  // The same relative to new maxima, which are not smaller. An infinite sum whose exponentials have decayed to 0 is
  // dropped with them.
  __device__ void rebase(float new_student_max, float new_teacher_max, Tempering at) {
    float student_base = base_of(new_student_max), teacher_base = base_of(new_teacher_max);
    float decay = at.exp(student_max - student_base);
    float shift = (base_of(student_max) - student_base) - (base_of(teacher_max) - teacher_base);
    log_ratio = weighted(decay, log_ratio + student_sum * shift);
    student_sum *= decay;
    teacher_sum *= at.exp(teacher_max - teacher_base);
    if (at.unit) unit_sum *= exp_of(student_max - student_base);
    student_max = new_student_max, teacher_max = new_teacher_max;
  }
  __device__ Floats across_warp(Tempering at) const {
    Floats x = *this;
    x.rebase(warp_max(student_max), warp_max(teacher_max), at);
    for (int by = kWarp / 2; by; by /= 2) {
      Floats below = from_lane_below(x, by);
      x.student_sum += below.student_sum, x.teacher_sum += below.teacher_sum;
      x.unit_sum += below.unit_sum, x.log_ratio += below.log_ratio;
    }
    return x;
  }
};

struct Sums {
  float phi, psi;

  static __device__ Sums none() { return {0, 0}; }
  __device__ Sums across_warp(Tempering) const {
    Sums x = *this;
    for (int by = kWarp / 2; by; by /= 2) {
      Sums below = from_lane_below(x, by);
      x.phi += below.phi, x.psi += below.psi;
    }
    return x;
  }
};

struct Statistics {
  float tv, student_entropy, teacher_entropy;
  int student_first, teacher_first;  // first column that holds the maximum; INT32_MAX: none does

  static __device__ Statistics none() { return {0, 0, 0, INT32_MAX, INT32_MAX}; }
  __device__ Statistics across_warp(Tempering) const {
    Statistics x = *this;
    for (int by = kWarp / 2; by; by /= 2) {
      Statistics below = from_lane_below(x, by);
      x.tv += below.tv, x.student_entropy += below.student_entropy, x.teacher_entropy += below.teacher_entropy;
      x.student_first = min(x.student_first, below.student_first);
      x.teacher_first = min(x.teacher_first, below.teacher_first);
    }
    return x;
  }
};

// ---- a row

inline __device__ float per_row(const PerRow& x, int64_t row) { return load((const float*)x.data + row * x.stride); }

// What the options say of a row; nothing of one past the last, which is skipped.
struct RowNumbers {
  float scale, temperature, hard_weight;
  int64_t label;

  __device__ RowNumbers(const RowsCall& call, int64_t row) : scale(0), temperature(1), hard_weight(0), label(0) {
    if (row >= call.rows) return;
    scale = per_row(call.row_scale, row);
    temperature = per_row(call.temperature, row);
    if (call.hard_weight.data) hard_weight = per_row(call.hard_weight, row);
    if (call.labels) label = load(call.labels + row);
  }
  __device__ bool skipped() const { return scale == 0; }
  __device__ bool swept(const RowsCall& call) const {
    return !skipped() && temperature > 0 && temperature < INFINITY && 1 / temperature < INFINITY && hard_weight >= 0 &&
           hard_weight <= 1 && label >= 0 && label < call.columns;
  }
};

inline __device__ const char* row_start(const Logits& x, const RowsCall& call, int64_t row) {
  // A division takes a hundred instructions.
  const int64_t outer = call.inner == call.rows ? 0 : row / call.inner;
  const int64_t offset = outer * x.outer_stride + (row - outer * call.inner) * x.inner_stride;
  return (const char*)x.data + offset * bytes_of(x.dtype);
}

struct Normalizer {
  float max, log_sum, inverse_temperature;
  __device__ float log_prob(float logit) const { return (logit - max) * inverse_temperature - log_sum; }
};

// This block's slice of the row's gradient: soft * (psi - q * sum psi) + hard * (softmax(s) - one_hot(label)), where
// the factors hold the row's scale. Positions are those of the logits' slices.
struct GradientSlice {
  bool wanted, aligned;
  char* data;
  Dtype dtype;
  int begin, end, label;
  float soft, hard, slope_sum, student_max, unit_log_sum;

  template <bool halves>
  __device__ void store(int position, const float (&s)[kGroup], const float (&q)[kGroup],
                        float (&slope)[kGroup]) const {
    for (int i = 0; i < kGroup; ++i) slope[i] = soft == 0 ? 0 : soft * (slope[i] - q[i] * slope_sum);
    if (hard != 0) {
      for (int i = 0; i < kGroup; ++i) {
        float unit_q = exp_of(s[i] - student_max - unit_log_sum);
        slope[i] += hard * (position + i == label ? unit_q - 1 : unit_q);
      }
    }
    const bool whole = aligned && position >= begin && position + kGroup <= end;
    store_group<halves>(data, dtype, whole, position, begin, end, slope);
  }
};

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

// Sweep 2; and, where sum psi is known (`known`), the gradient.
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

// A sweep of its own, so that the others keep to their registers: in shared memory it costs no bytes.
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

inline __device__ void write_column(void* matrix, const RowsCall& call, int64_t row, const float* values, int count) {
  for (int i = 0; i < count; ++i) store((float*)matrix + i * call.rows + row, values[i]);
}

// All of the team fills the columns from `first` on.
inline __device__ void fill_gradient(const RowsCall& call, const Team& team, int64_t row, int64_t first, float value) {
  if (first == call.gradient_columns) return;
  const Dtype dtype = call.student.dtype;
  char* data = (char*)call.gradient + row * call.gradient_columns * bytes_of(dtype);
  // Position 0 is the column at or before the first that lies at a multiple of 16 bytes.
  const int shift = columns_in((uint64_t)(data + first * bytes_of(dtype)) % 16, dtype);
  data += (first - shift) * bytes_of(dtype);
  const int end = (int)(call.gradient_columns - first) + shift;
  float values[kGroup];
  for (int i = 0; i < kGroup; ++i) values[i] = value;
  for (int64_t i = ((int64_t)team.rank * blockDim.x + threadIdx.x) * kGroup; i < end;
       i += (int64_t)team.blocks * blockDim.x * kGroup)
    store_group<false>(data, dtype, i >= shift && i + kGroup <= end, (int)i, shift, end, values);
}

// A skipped row is 0 everywhere; a row with a bad value is NaN.
inline __device__ void fill_row(const RowsCall& call, const Team& team, int64_t row, float value) {
  if (call.sweeps & kGradient) fill_gradient(call, team, row, 0, value);
  if (!team.first_thread()) return;
  float values[kRowStatistics];
  for (int i = 0; i < kRowStatistics; ++i) values[i] = value;
  if (call.sweeps & kFloats) write_column(call.floats, call, row, values, kRowFloats);
  if (call.sweeps & kSums) write_column(call.sums, call, row, values, kRowSums);
  if (call.loss) store((float*)call.loss + row, value);
  if (call.statistics) {
    write_column(call.statistics, call, row, values, kRowStatistics);
    store(call.top1 + row, (int64_t)0), store(call.top1 + call.rows + row, (int64_t)0);
  }
}

// The loss and the statistics of a row, by one thread.
struct Outcome {
  const RowsCall& call;
  int64_t row;
  const RowNumbers& numbers;
  Normalizer student, teacher;
  float unit_log_sum, label_logit;  // label_logit: the student's

  // With the label, at temperature 1.
  __device__ float cross_entropy() const { return call.labels ? unit_log_sum + (student.max - label_logit) : 0; }
  __device__ void write_loss(float phi) const {
    float factor = call.temperature_squared ? numbers.temperature * numbers.temperature : 1;
    float loss = weighted(1 - numbers.hard_weight, factor * phi);
    if (numbers.hard_weight != 0) loss += numbers.hard_weight * cross_entropy();
    store((float*)call.loss + row, numbers.scale * loss);
  }
  __device__ void write_statistics(float phi, const Statistics& x) const {
    float student_label = 0, teacher_label = 0;
    if (call.labels) {
      const char* teacher_row = row_start(call.teacher, call, row);
      student_label = student.log_prob(label_logit);
      teacher_label = teacher.log_prob(load_logit(teacher_row, call.teacher.dtype, numbers.label));
    }
    float values[kRowStatistics] = {phi,
                                    cross_entropy(),
                                    x.tv,
                                    x.student_entropy,
                                    x.teacher_entropy,
                                    -student.log_sum,
                                    -teacher.log_sum,
                                    student_label,
                                    teacher_label,
                                    student.max * student.inverse_temperature + student.log_sum,
                                    teacher.max * teacher.inverse_temperature + teacher.log_sum};
    write_column(call.statistics, call, row, values, kRowStatistics);
    // Of what is not NaN; 0 where nothing is.
    store(call.top1 + row, (int64_t)(x.student_first < call.columns ? x.student_first : 0));
    store(call.top1 + call.rows + row, (int64_t)(x.teacher_first < call.columns ? x.teacher_first : 0));
  }
};

template <class D, Way way>
inline __device__ void sweep_row(const RowsCall& call, Team& team, int64_t row, const RowNumbers& numbers,
                                 int first_column, const Slice& student, const Slice& teacher) {
  const Tempering at(numbers.temperature, call.unit_log_sum);
  const bool knows = slope_sum_of<D> != SlopeSum::swept && (call.sweeps & kFloats);

  // The gradient may take the place of the logits, and any block of the team that of the label: its logit is loaded
  // before the first merge, which no thread leaves before all have come to it.
  const bool labelled = call.labels && (call.sweeps & kSums) && team.first_thread();
  float label_logit = 0;
  if (labelled) label_logit = load_logit(row_start(call.student, call, row), call.student.dtype, numbers.label);

  float floats[kRowFloats];  // student_max, student_log_sum, teacher_max, teacher_log_sum, unit_log_sum
  float log_ratio = 0;       // E_q[lq - lp]
  if (call.sweeps & kFloats) {
    const Floats mine = floats_of<D, way>(student, teacher, at);
    if (labelled) team.board.label_logit = label_logit;
    Floats x = team.merged(mine, at);
    // A row of -inf alone has no distribution: NaN, as log_softmax.
    floats[0] = x.student_max, floats[1] = x.student_sum == 0 ? NAN : logf(x.student_sum);
    floats[2] = x.teacher_max, floats[3] = x.teacher_sum == 0 ? NAN : logf(x.teacher_sum);
    floats[4] = !call.unit_log_sum ? 0 : at.unit ? logf(x.unit_sum) : floats[1];
    log_ratio = x.log_ratio / x.student_sum * at.inverse_temperature + (floats[3] - floats[1]);
    if (team.first_thread()) write_column(call.floats, call, row, floats, kRowFloats);
  } else {
    for (int i = 0; i < kRowFloats; ++i) floats[i] = load((const float*)call.floats + i * call.rows + row);
    if (labelled) team.board.label_logit = label_logit;
  }
  if (!(call.sweeps & (kSums | kGradient))) return;

  const D divergence((const float*)call.parameters);
  const Normalizer student_norm = {floats[0], floats[1], at.inverse_temperature};
  const Normalizer teacher_norm = {floats[2], floats[3], at.inverse_temperature};

  GradientSlice gradient;
  gradient.wanted = call.sweeps & kGradient;
  gradient.data = (char*)call.gradient + (row * call.gradient_columns + first_column) * bytes_of(call.student.dtype);
  gradient.dtype = call.student.dtype;
  gradient.begin = student.begin, gradient.end = student.end;
  gradient.label = (int)numbers.label - first_column;
  gradient.aligned = (uint64_t)gradient.data % 16 == 0;
  gradient.soft = numbers.scale * (1 - numbers.hard_weight) *
                  (call.temperature_squared ? numbers.temperature : at.inverse_temperature);
  gradient.hard = numbers.scale * numbers.hard_weight;
  gradient.student_max = floats[0], gradient.unit_log_sum = floats[4];
  // An infinite slope leaves the whole row without a gradient.
  auto finite_or_nan = [](float x) { return fabsf(x) < INFINITY ? x : NAN; };

  if (call.sweeps & kSums) {
    float known_psi = 0;
    if constexpr (slope_sum_of<D> == SlopeSum::from_log_ratio) known_psi = divergence.slope_sum(log_ratio);
    gradient.slope_sum = finite_or_nan(known_psi);
    Statistics statistics = Statistics::none();
    if (call.statistics)
      statistics = team.merged(statistics_of<way>(student, teacher, student_norm, teacher_norm, first_column), at);
    Sums sums = team.merged(
        sums_of<D, way>(divergence, student, teacher, student_norm, teacher_norm, knows, gradient), at);
    if (knows) {
      sums.psi = known_psi;
      // A class without a teacher's mass may count in the first sweep, and have underflowed in the second.
      if (isinf(known_psi)) sums.phi = INFINITY;
    }
    if (team.first_thread()) {
      const float values[kRowSums] = {sums.phi, sums.psi};
      write_column(call.sums, call, row, values, kRowSums);
      const Outcome outcome = {call, row, numbers, student_norm, teacher_norm, floats[4], team.board.label_logit};
      if (call.loss) outcome.write_loss(sums.phi);
      if (call.statistics) outcome.write_statistics(sums.phi, statistics);
    }
    gradient.slope_sum = finite_or_nan(sums.psi);
  } else {
    gradient.slope_sum = finite_or_nan(load((const float*)call.sums + call.rows + row));
  }
  if (!(call.sweeps & kGradient)) return;
  if (!(knows && (call.sweeps & kSums)))
    write_gradient<D, way>(divergence, student, teacher, student_norm, teacher_norm, gradient);
  fill_gradient(call, team, row, call.columns, 0);
}

// ---- staging: a block's slices of a row on their way to shared memory

// Where a block's slices of a row begin and end.
struct Cut {
  const char *student, *teacher;  // the row in global memory
  int begin, end;                 // positions of the slices that hold columns
  int first_column;               // that of position 0; before the row's first where the row is shifted
  bool aligned;

  __device__ Cut(const RowsCall& call, const Plan& plan, const Team& team, int64_t row)
      : student(row_start(call.student, call, row)), teacher(row_start(call.teacher, call, row)) {
    int shift = shift_of(student, call.student.dtype, teacher, call.teacher.dtype);
    aligned = shift >= 0;
    shift = aligned ? shift : 0;
    const int64_t left = call.columns + shift - (int64_t)team.rank * plan.slice;
    begin = team.rank == 0 ? shift : 0;
    end = left < 0 ? 0 : left < plan.slice ? (int)left : plan.slice;
    first_column = team.rank * plan.slice - shift;
  }
  __device__ Slice slice(const char* row, Dtype dtype) const {
    return {row + (int64_t)first_column * bytes_of(dtype), dtype, begin, end, aligned};
  }
};

struct Staging {
  Board& board;
  char *student, *teacher;  // in shared memory
  uint32_t parity;          // of the next wait

  __device__ Staging(const RowsCall& call, const Plan& plan, Board& board)
      : board(board),
        student((char*)(&board + 1)),
        teacher(student + plan.slice * bytes_of(call.student.dtype)),
        parity(0) {
    if (threadIdx.x == 0) bulk_barrier_init(&board.arrived);
    __syncthreads();
  }

  // The groups that begin at a multiple of 16 bytes are copied in bulk, the columns before and after one by one.
  static __device__ int bulk_begin(const Slice& from) { return from.begin > 0 ? kGroup : 0; }
  static __device__ int bulk_bytes(const Slice& from) {
    const int columns = from.end - bulk_begin(from);
    return from.aligned && columns > 0 ? columns * bytes_of(from.dtype) / 16 * 16 : 0;
  }

  // From when no thread uses what is staged any more, until all of the row is there.
  __device__ void stage(const Slice& student_row, const Slice& teacher_row) {
    const int bytes = bulk_bytes(student_row) + bulk_bytes(teacher_row);
    if (threadIdx.x == 0 && bytes) bulk_barrier_expect(&board.arrived, bytes);
    copy(student_row, student);
    copy(teacher_row, teacher);
    if (bytes) {
      bulk_barrier_wait(&board.arrived, parity);
      parity ^= 1;
    }
    __syncthreads();
  }

  // By one thread.
  static __device__ void prefetch(const Slice& from) {
    const int bytes = bulk_bytes(from);
    if (bytes) bulk_prefetch(from.data + bulk_begin(from) * bytes_of(from.dtype), bytes);
  }

  __device__ void copy(const Slice& from, char* to) {
    const int bytes = bytes_of(from.dtype), in_bulk = bulk_bytes(from);
    const int first = in_bulk ? bulk_begin(from) : 0, last = first + columns_in(in_bulk, from.dtype);
    if (threadIdx.x == 0 && in_bulk) bulk_copy(to + first * bytes, from.data + first * bytes, in_bulk, &board.arrived);
    const int end = (from.end + kGroup - 1) / kGroup * kGroup;
    for (int i = threadIdx.x; i < first; i += blockDim.x) copy_one(from, to, i);
#pragma unroll 4
    for (int i = last + threadIdx.x; i < end; i += blockDim.x) copy_one(from, to, i);
  }
  static __device__ void copy_one(const Slice& from, char* to, int i) {
    const uint32_t bits = from.holds(i) ? load_bits(from.data, from.dtype, i) : minus_infinity(from.dtype);
    if (from.dtype == Dtype::f32)
      ((uint32_t*)to)[i] = bits;
    else
      ((uint16_t*)to)[i] = (uint16_t)bits;
  }
};

// ---- the kernels

template <class D, Way way>
__global__ void __launch_bounds__(threads_of(way), blocks_of(way))
    rows_kernel(const __grid_constant__ RowsCall call, const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (way != Way::streaming) return;  // never planned
#endif
  Team team(plan.blocks);
  const int64_t teams = gridDim.x / plan.blocks;
  auto each_row = [&](auto sweep) {
    for (int64_t row = blockIdx.x / plan.blocks; row < call.rows; row += teams) {
      const RowNumbers numbers(call, row);
      if (numbers.swept(call))
        sweep(row, numbers, Cut(call, plan, team, row));
      else
        fill_row(call, team, row, numbers.skipped() ? 0 : NAN);
    }
  };
  if constexpr (way == Way::streaming) {
    each_row([&](int64_t row, const RowNumbers& numbers, const Cut& cut) {
      sweep_row<D, way>(call, team, row, numbers, cut.first_column, cut.slice(cut.student, call.student.dtype),
                        cut.slice(cut.teacher, call.teacher.dtype));
    });
  } else {
    Staging staging(call, plan, team.board);
    each_row([&](int64_t row, const RowNumbers& numbers, const Cut& cut) {
      staging.stage(cut.slice(cut.student, call.student.dtype), cut.slice(cut.teacher, call.teacher.dtype));
      // The row after comes from memory while this one is worked on.
      if (threadIdx.x == 0 && RowNumbers(call, row + teams).swept(call)) {
        const Cut after(call, plan, team, row + teams);
        staging.prefetch(after.slice(after.student, call.student.dtype));
        staging.prefetch(after.slice(after.teacher, call.teacher.dtype));
      }
      const Slice student = {staging.student, call.student.dtype, cut.begin, cut.end, true};
      const Slice teacher = {staging.teacher, call.teacher.dtype, cut.begin, cut.end, true};
      sweep_row<D, way>(call, team, row, numbers, cut.first_column, student, teacher);
      bulk_fence();
      __syncthreads();  // all have read what is staged
    });
  }
  if (team.blocks > 1) cluster_sync(team.blocks);  // no block leaves while another may read its shared memory
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

Kernel kernel_of(int divergence, Way way) {
  int index = 0;
  if (divergence < 0) divergence = 0;  // row floats are the same for all
#define KDK_CASE(key, Struct)                                                       \
  if (divergence == index++)                                                        \
    return way == Way::halves   ? rows_kernel<Struct<float>, Way::halves>           \
           : way == Way::staged ? rows_kernel<Struct<float>, Way::staged>           \
                                : rows_kernel<Struct<float>, Way::streaming>;
  KDK_DIVERGENCES(KDK_CASE)
#undef KDK_CASE
  throw std::runtime_error("no divergence of number " + std::to_string(divergence));
}

#define KDK_ONE(key, Struct) +1
constexpr int kDivergences = 0 KDK_DIVERGENCES(KDK_ONE);
#undef KDK_ONE

bool knows_slope_sum(int divergence) {
  int index = 0;
#define KDK_CASE(key, Struct) \
  if (divergence == index++) return slope_sum_of<Struct<float>> != SlopeSum::swept;
  KDK_DIVERGENCES(KDK_CASE)
#undef KDK_CASE
  return false;
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Enough threads that each has at most so many groups of the slice, as far as there are so many.
int threads_for(int64_t slice, int groups, int most) {
  int threads = kWarp;
  while (threads < most && slice > groups * kGroup * threads) threads *= 2;
  return threads;
}

bool rows_are_aligned(const Logits& x) {
  const int bytes = bytes_of(x.dtype);
  return (uint64_t)x.data % 16 == 0 && x.outer_stride * bytes % 16 == 0 && x.inner_stride * bytes % 16 == 0;
}

// One stride where one will do: then no row is found by a division.
void collapse(RowsCall& call) {
  Logits &a = call.student, &b = call.teacher;
  if (call.inner == 1) {
    call.inner = call.rows;
    a.inner_stride = a.outer_stride, b.inner_stride = b.outer_stride;
  } else if (a.outer_stride == call.inner * a.inner_stride && b.outer_stride == call.inner * b.inner_stride) {
    call.inner = call.rows;
  }
  if (call.inner == call.rows) a.outer_stride = b.outer_stride = 0;
}

int64_t column_bytes(const RowsCall& call) { return bytes_of(call.student.dtype) + bytes_of(call.teacher.dtype); }

// How often a call reads the logits.
int sweeps_of(const RowsCall& call) {
  const int sweeps = !!(call.sweeps & kFloats) + !!(call.sweeps & kSums) + !!(call.sweeps & kGradient);
  return sweeps == 3 && knows_slope_sum(call.divergence) ? 2 : sweeps;
}

// A plan for clusters of so many blocks, all but how many there are and what they keep in shared memory.
Plan cut(const RowsCall& call, Way way, int blocks) {
  const bool aligned = rows_are_aligned(call.student) && rows_are_aligned(call.teacher);
  const int64_t positions = call.columns + (aligned ? 0 : kGroup - 1);  // a row that is not aligned is shifted
  Plan plan = {};
  plan.way = way;
  plan.blocks = blocks;
  plan.slice = (int)round_up((positions + blocks - 1) / blocks, kGroup);
  // A row costs a thread as much around its loops as two groups in them; but one that reads memory had better wait for
  // few.
  plan.threads = threads_for(plan.slice, way == Way::streaming ? 2 : 8, threads_of(way));
  plan.shared = sizeof(Board);
  return plan;
}

Plan with_teams(Plan plan, const RowsCall& call, int64_t teams) {
  plan.grid = (int)(teams < call.rows ? teams : call.rows) * plan.blocks;
  return plan;
}

// The smallest cluster whose blocks leave room for another on the multiprocessor, which works while one waits for its
// row or its cluster; else the smallest that has room at all. And clusters that fill most of the chip, if there are.
// A plan without blocks where no cluster holds the row.
Plan plan_staged(const RowsCall& call, const Chip& chip, int device) {
  const Dtype dtype = call.student.dtype;
  const Way way = dtype == call.teacher.dtype && dtype != Dtype::f32 ? Way::halves : Way::staged;
  for (int occupancy : {2, 1, 0}) {
    for (int blocks = 1; blocks <= kMaxBlocks; blocks *= 2) {
      Plan plan = cut(call, way, blocks);
      const int64_t shared = plan.shared + plan.slice * column_bytes(call);
      if (shared > chip.shared_of(occupancy)) continue;
      plan.shared = (int)shared;
      const int teams = teams_at_once(kernel_of(call.divergence, way), plan, chip, device);
      if (teams > 0 && teams * blocks >= 0.75 * occupancy * chip.multiprocessors) return with_teams(plan, call, teams);
    }
  }
  return {};
}

// As few rows in flight as keep the chip busy, so that another sweep finds what it can of them in the L2 cache; by
// clusters, where there are any, so few that they fill no more than three quarters of it.
Plan plan_streaming(const RowsCall& call, const Chip& chip, int device) {
  const int64_t fit = (int64_t)(0.75 * chip.l2) / (call.columns * column_bytes(call));
  const bool again = sweeps_of(call) > 1;
  Plan plan = {};
  int64_t teams = 0;
  for (int blocks = 1; blocks <= 8; blocks *= 2) {
    const Plan larger = cut(call, Way::streaming, blocks);
    const int64_t at_once = teams_at_once(kernel_of(call.divergence, Way::streaming), larger, chip, device);
    if (at_once == 0) break;
    plan = larger, teams = at_once;
    if (!again || !chip.clusters || at_once <= fit) break;
  }
  if (teams == 0) throw std::runtime_error("the device has no room for a block of these kernels");
  if (again) {
    const int64_t busy = chip.multiprocessors / plan.blocks, limit = fit > busy ? fit : busy;
    teams = teams < limit ? teams : limit < 1 ? 1 : limit;
  }
  return with_teams(plan, call, teams);
}

Plan plan(const RowsCall& call, const Chip& chip, int device) {
  if (chip.clusters && sweeps_of(call) > 1) {
    const Plan staged = plan_staged(call, chip, device);
    if (staged.blocks) return staged;
  }
  return plan_streaming(call, chip, device);
}

}  // namespace

void rows(const RowsCall& original, int device, void* stream) {
  if (original.rows == 0) return;
  RowsCall call = original;
  collapse(call);
  OnDevice guard(device);
  const Plan launch = plan(call, Chip(device, scale_kernel), device);
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config(launch, &cluster, (cudaStream_t)stream);
  KDK_CHECK(cudaLaunchKernelEx, &config, kernel_of(call.divergence, launch.way), call, launch);
}

void scale_rows(void* x, Dtype dtype, int64_t rows, int64_t columns, PerRow factor, int device, void* stream) {
  if (rows == 0 || columns == 0) return;
  OnDevice guard(device);
  const int64_t blocks = 8 * Chip(device, scale_kernel).multiprocessors;
  const Launch launch = {1, threads_for(columns, 2, kMaxThreads), 0, (int)(rows < blocks ? rows : blocks)};
  const cudaLaunchConfig_t config = launch_config(launch, nullptr, (cudaStream_t)stream);
  KDK_CHECK(cudaLaunchKernelEx, &config, scale_kernel, (char*)x, dtype, rows, columns, factor);
}

std::string refusal(int device) {
  try {
    int devices = 0;
    KDK_CHECK(cudaGetDeviceCount, &devices);
    OnDevice guard(device);
    // Of every kernel, so that all are loaded: a CUDA graph may capture the first call.
    cudaFuncAttributes attributes;
    KDK_CHECK(cudaFuncGetAttributes, &attributes, scale_kernel);
    for (int divergence = 0; divergence < kDivergences; ++divergence)
      for (Way way : {Way::streaming, Way::staged, Way::halves})
        KDK_CHECK(cudaFuncGetAttributes, &attributes, kernel_of(divergence, way));
    load_linear();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace cuda
}  // namespace kdk
