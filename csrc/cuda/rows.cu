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
//     staged      (Hopper and later) the slices of student and teacher are copied to shared memory, by bulk copies that
//                 run while the row before is worked on where two rows fit; every sweep reads them there. In bf16 a
//                 row moves 6 bytes a column with gradient and 4 without: each logit is read from memory once.
//     streaming   every sweep reads global memory, to and fro, with so few rows in flight that the second and third
//                 find the row in the L2 cache. For older chips, for rows that are too long for a cluster, and where
//                 there is one sweep only.
//
// The grid is what the chip holds at once, and a team takes every n-th row. Log-probabilities are
// (x - max) / temperature - log sum: differences first, so that a large common offset of the logits costs no digits.
//
// Computed for an H100, and not yet measured. Of shared memory a block may have 232,448 bytes:
//
//     columns     bf16: blocks x threads, bytes        fp32
//      32,000      2 x 512   128,640  two rows          4 x 512   128,640  two rows
//     128,256      8 x 512   128,896  two rows         16 x 512   128,896  two rows
//     151,936      8 x 512   152,576  two rows         16 x 512   152,576  two rows
//     262,144     16 x 512   131,712  two rows         16 x 512   131,712  one row
//
// so that a multiprocessor holds one block, of 16 warps and up to 128 registers a thread. In bf16, copying at 3 TB/s
// moves 5.0e11 column pairs a second with their gradients; 132 multiprocessors at 1.7 GHz issue 57 instructions for a
// pair in that time, 7.2 of them of the special-function unit. The compiled sweeps take (sm_90a, with gradient, no
// label term, no statistics):
//
//     kl 41 and 4.3      reverse_kl 47 and 4.3      mixed_kl 54 and 4.3      tv 57 and 6.3      hellinger 58 and 7.3
//     alpha 66 and 8.3   skew_kl 72 and 9.3         js 74 and 8.3            skew_reverse_kl 81 and 10.3
//
// The last four are bound by the issue of instructions at 86, 77, 77 and 70 % of the copy, so that a polynomial exp2 on
// the other pipes, which takes more instructions, would not help them.
#include <cuda_runtime.h>
#include <float.h>
#include <math.h>
#include <stdint.h>

#include "device.h"
#include "groups.h"
#include "launch.h"
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

constexpr int kStreamingThreads = 256;  // of a block that shares a multiprocessor with another; else kMaxThreads

// How a call is launched: made on the host, from sizes alone.
struct Plan : Launch {
  bool staged;
  int stages;  // rows that a block's shared memory holds, where they are staged
  int slice;   // columns of a block, a multiple of kGroup
  bool student_bulk, teacher_bulk;  // whether rows are aligned as bulk copies need it
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
  int student_first, teacher_first;  // first column that holds the maximum, or the number of columns

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

// What the options say of a row: loaded long before it is looked at.
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
  // A division of 32 bits where that will do: one of 64 takes a hundred instructions.
  const int64_t outer = call.rows <= UINT32_MAX ? (uint32_t)row / (uint32_t)call.inner : row / call.inner;
  const int64_t offset = outer * x.outer_stride + (row - outer * call.inner) * x.inner_stride;
  return (const char*)x.data + offset * bytes_of(x.dtype);
}

// In exponents of 2, which is what a probability needs; a divergence that never looks at its logarithm pays for none.
struct Normalizer {
  float max, log_sum, scale, log2_sum;

  __device__ Normalizer(float max, float log_sum, Tempering at)
      : max(max), log_sum(log_sum), scale(at.scale), log2_sum(log_sum * kLog2e) {}
  __device__ float log2_prob(float logit) const { return (logit - max) * scale - log2_sum; }
};

// This block's slice of the row's gradient: soft * (psi - q * sum psi) + hard * (softmax(s) - one_hot(label)), where
// the factors hold the row's scale.
struct GradientSlice {
  bool wanted;
  char* data;
  Dtype dtype;
  int columns, label;
  bool aligned;
  float soft, hard, slope_sum, student_max, unit_log_sum;

  __device__ void store(int column, const float (&s)[kGroup], const float (&q)[kGroup], float (&slope)[kGroup]) const {
    for (int i = 0; i < kGroup; ++i) slope[i] = soft == 0 ? 0 : soft * (slope[i] - q[i] * slope_sum);
    if (hard != 0) {
      for (int i = 0; i < kGroup; ++i) {
        float unit_q = exp_of(s[i] - student_max - unit_log_sum);
        slope[i] += hard * (column + i == label ? unit_q - 1 : unit_q);
      }
    }
    store_group(data, dtype, aligned, column, columns, slope);
  }
};

// Sweep 1.
template <class D, bool staged>
inline __device__ Floats floats_of(const Slice& student, const Slice& teacher, Tempering at) {
  Floats x = Floats::none();
  Groups groups(student.columns, false);
  for (int g = 0; g < groups.count; ++g) {
    float s[kGroup], t[kGroup];
    load_group<staged>(student, groups.column(g), s);
    load_group<staged>(teacher, groups.column(g), t);
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
template <class D, bool staged>
inline __device__ Sums sums_of(const D& divergence, const Slice& student, const Slice& teacher,
                               Normalizer student_norm, Normalizer teacher_norm, bool known,
                               const GradientSlice& gradient, int first_column, bool want_statistics,
                               Statistics& statistics) {
  Sums x = Sums::none();
  Groups groups(student.columns, true);
  for (int g = 0; g < groups.count; ++g) {
    float s[kGroup], t[kGroup], q[kGroup], slope[kGroup];
    const int column = groups.column(g);
    load_group<staged>(student, column, s);
    load_group<staged>(teacher, column, t);
    for (int i = 0; i < kGroup; ++i) {
      float log2_q = student_norm.log2_prob(s[i]), log2_p = teacher_norm.log2_prob(t[i]);
      float lq = log2_q * kLn2, lp = log2_p * kLn2, p = exp2_approx(log2_p);
      q[i] = exp2_approx(log2_q);
      slope[i] = divergence.slope(lp, lq, p, q[i]);
      x.phi += divergence.value(lp, lq, p, q[i]);
      if (!known) x.psi += slope[i];
      if (want_statistics) {
        statistics.tv += 0.5f * fabsf(p - q[i]);
        statistics.student_entropy -= weighted(q[i], lq);
        statistics.teacher_entropy -= weighted(p, lp);
        const int c = first_column + column + i;
        if (s[i] == student_norm.max) statistics.student_first = min(statistics.student_first, c);
        if (t[i] == teacher_norm.max) statistics.teacher_first = min(statistics.teacher_first, c);
      }
    }
    if (known && gradient.wanted) gradient.store(column, s, q, slope);
  }
  return x;
}

// Sweep 3.
template <class D, bool staged>
inline __device__ void write_gradient(const D& divergence, const Slice& student, const Slice& teacher,
                                      Normalizer student_norm, Normalizer teacher_norm,
                                      const GradientSlice& gradient) {
  Groups groups(student.columns, false);
  for (int g = 0; g < groups.count; ++g) {
    float s[kGroup], t[kGroup], q[kGroup], slope[kGroup];
    const int column = groups.column(g);
    load_group<staged>(student, column, s);
    load_group<staged>(teacher, column, t);
    for (int i = 0; i < kGroup; ++i) {
      float log2_q = student_norm.log2_prob(s[i]), log2_p = teacher_norm.log2_prob(t[i]);
      q[i] = exp2_approx(log2_q);
      slope[i] = divergence.slope(log2_p * kLn2, log2_q * kLn2, exp2_approx(log2_p), q[i]);
    }
    gradient.store(column, s, q, slope);
  }
}

inline __device__ void write_column(void* matrix, const RowsCall& call, int64_t row, const float* values, int count) {
  for (int i = 0; i < count; ++i) store((float*)matrix + i * call.rows + row, values[i]);
}

// All of the team fills the columns from `first` on.
inline __device__ void fill_gradient(const RowsCall& call, const Team& team, int64_t row, int64_t first, float value) {
  if (first == call.gradient_columns) return;
  const int64_t threads = (int64_t)team.blocks * blockDim.x, bytes = bytes_of(call.student.dtype);
  char* data = (char*)call.gradient + row * call.gradient_columns * bytes;
  const bool aligned = (uint64_t)data % 16 == 0;
  float values[kGroup];
  for (int i = 0; i < kGroup; ++i) values[i] = value;
  // Up to a whole group the first columns are stored one by one.
  int64_t start = (first + kGroup - 1) / kGroup * kGroup;
  start = start < call.gradient_columns ? start : call.gradient_columns;
  if (team.first_thread())
    store_group(data + first * bytes, call.student.dtype, false, 0, (int)(start - first), values);
  int64_t mine = start + ((int64_t)team.rank * blockDim.x + threadIdx.x) * kGroup;
  for (int64_t c = mine; c < call.gradient_columns; c += threads * kGroup)
    store_group(data + c * bytes, call.student.dtype, aligned, 0,
                (int)(call.gradient_columns - c < kGroup ? call.gradient_columns - c : kGroup), values);
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
  float unit_log_sum;

  __device__ float label_logit(const Logits& x) const {
    return load_logit(row_start(x, call, row) + numbers.label * bytes_of(x.dtype), x.dtype);
  }
  // With the label, at temperature 1.
  __device__ float cross_entropy() const {
    return call.labels ? unit_log_sum + (student.max - label_logit(call.student)) : 0;
  }
  __device__ void write_loss(float phi) const {
    float factor = call.temperature_squared ? numbers.temperature * numbers.temperature : 1;
    float loss = weighted(1 - numbers.hard_weight, factor * phi);
    if (numbers.hard_weight != 0) loss += numbers.hard_weight * cross_entropy();
    store((float*)call.loss + row, numbers.scale * loss);
  }
  __device__ void write_statistics(float phi, const Statistics& x) const {
    float student_label = call.labels ? student.log2_prob(label_logit(call.student)) * kLn2 : 0;
    float teacher_label = call.labels ? teacher.log2_prob(label_logit(call.teacher)) * kLn2 : 0;
    float values[kRowStatistics] = {phi,
                                    cross_entropy(),
                                    x.tv,
                                    x.student_entropy,
                                    x.teacher_entropy,
                                    -student.log_sum,
                                    -teacher.log_sum,
                                    student_label,
                                    teacher_label,
                                    student.max / numbers.temperature + student.log_sum,
                                    teacher.max / numbers.temperature + teacher.log_sum};
    write_column(call.statistics, call, row, values, kRowStatistics);
    // Of what is not NaN; 0 where nothing is.
    store(call.top1 + row, (int64_t)(x.student_first < call.columns ? x.student_first : 0));
    store(call.top1 + call.rows + row, (int64_t)(x.teacher_first < call.columns ? x.teacher_first : 0));
  }
};

template <class D, bool staged>
inline __device__ void sweep_row(const RowsCall& call, Team& team, int64_t row, const RowNumbers& numbers,
                                 int first_column, const Slice& student, const Slice& teacher) {
  const Tempering at(numbers.temperature, call.unit_log_sum);
  const bool knows = slope_sum_of<D> != SlopeSum::swept && (call.sweeps & kFloats);

  float floats[kRowFloats];  // student_max, student_log_sum, teacher_max, teacher_log_sum, unit_log_sum
  float log_ratio = 0;       // E_q[lq - lp]
  if (call.sweeps & kFloats) {
    Floats x = team.merged(floats_of<D, staged>(student, teacher, at), at);
    // A row of -inf alone has no distribution: NaN, as log_softmax.
    floats[0] = x.student_max, floats[1] = x.student_sum == 0 ? NAN : logf(x.student_sum);
    floats[2] = x.teacher_max, floats[3] = x.teacher_sum == 0 ? NAN : logf(x.teacher_sum);
    floats[4] = !call.unit_log_sum ? 0 : at.unit ? logf(x.unit_sum) : floats[1];
    log_ratio = x.log_ratio / x.student_sum * at.inverse_temperature + (floats[3] - floats[1]);
    if (team.first_thread()) write_column(call.floats, call, row, floats, kRowFloats);
  } else {
    for (int i = 0; i < kRowFloats; ++i) floats[i] = load((const float*)call.floats + i * call.rows + row);
  }
  if (!(call.sweeps & (kSums | kGradient))) return;

  const D divergence((const float*)call.parameters);
  const Normalizer student_norm(floats[0], floats[1], at), teacher_norm(floats[2], floats[3], at);

  GradientSlice gradient;
  gradient.wanted = call.sweeps & kGradient;
  gradient.data = (char*)call.gradient + (row * call.gradient_columns + first_column) * bytes_of(call.student.dtype);
  gradient.dtype = call.student.dtype;
  gradient.columns = student.columns;
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
    Sums sums = sums_of<D, staged>(divergence, student, teacher, student_norm, teacher_norm, knows, gradient,
                                   first_column, call.statistics != nullptr, statistics);
    sums = team.merged(sums, at);
    if (knows) sums.psi = known_psi;
    if (call.statistics) statistics = team.merged(statistics, at);
    if (team.first_thread()) {
      const float values[kRowSums] = {sums.phi, sums.psi};
      write_column(call.sums, call, row, values, kRowSums);
      const Outcome outcome = {call, row, numbers, student_norm, teacher_norm, floats[4]};
      if (call.loss) outcome.write_loss(sums.phi);
      if (call.statistics) outcome.write_statistics(sums.phi, statistics);
    }
    gradient.slope_sum = finite_or_nan(sums.psi);
  } else {
    gradient.slope_sum = finite_or_nan(load((const float*)call.sums + call.rows + row));
  }
  if (!(call.sweeps & kGradient)) return;
  if (!(knows && (call.sweeps & kSums)))
    write_gradient<D, staged>(divergence, student, teacher, student_norm, teacher_norm, gradient);
  fill_gradient(call, team, row, call.columns, 0);
}

// ---- staging: a block's slices of a row on their way to shared memory

struct Staging {
  const RowsCall& call;
  const Plan& plan;
  Board& board;
  const int first_column, columns;
  uint32_t parities;  // a bit for each stage: of the next wait for it

  __device__ Staging(const RowsCall& call, const Plan& plan, Board& board, int first_column, int columns)
      : call(call), plan(plan), board(board), first_column(first_column), columns(columns), parities(0) {
    if (threadIdx.x == 0)
      for (int stage = 0; stage < plan.stages; ++stage) bulk_barrier_init(&board.arrived[stage]);
    __syncthreads();
  }

  __device__ char* student_at(int stage) const {
    const int column_bytes = bytes_of(call.student.dtype) + bytes_of(call.teacher.dtype);
    return (char*)(&board + 1) + stage * plan.slice * column_bytes;
  }
  __device__ char* teacher_at(int stage) const { return student_at(stage) + plan.slice * bytes_of(call.student.dtype); }

  __device__ uint32_t bulk_bytes(const Logits& x, bool bulk) const {
    return bulk ? columns * bytes_of(x.dtype) / 16 * 16 : 0;
  }
  __device__ uint32_t bulk_bytes() const {
    return bulk_bytes(call.student, plan.student_bulk) + bulk_bytes(call.teacher, plan.teacher_bulk);
  }

  // No thread uses the stage any more.
  __device__ void begin(int64_t row, const RowNumbers& numbers, int stage) {
    if (!numbers.swept(call)) return;
    if (threadIdx.x == 0 && bulk_bytes()) bulk_barrier_expect(&board.arrived[stage], bulk_bytes());
    copy(call.student, plan.student_bulk, row, student_at(stage), stage);
    copy(call.teacher, plan.teacher_bulk, row, teacher_at(stage), stage);
  }

  // In bulk what is aligned; the rest, up to a whole group, column by column.
  __device__ void copy(const Logits& x, bool bulk, int64_t row, char* to, int stage) {
    const int bytes = bytes_of(x.dtype), whole = bulk_bytes(x, bulk);
    const char* from = row_start(x, call, row) + (int64_t)first_column * bytes;
    if (threadIdx.x == 0 && whole) bulk_copy(to, from, whole, &board.arrived[stage]);
    const int end = (columns + kGroup - 1) / kGroup * kGroup;
    for (int c = whole / bytes + threadIdx.x; c < end; c += blockDim.x) {
      if (x.dtype == Dtype::f32)
        ((float*)to)[c] = c < columns ? load((const float*)from + c) : -INFINITY;
      else
        ((uint16_t*)to)[c] = c < columns ? load((const uint16_t*)from + c) : x.dtype == Dtype::bf16 ? 0xff80 : 0xfc00;
    }
  }

  __device__ void wait(int stage) {
    if (bulk_bytes()) {
      bulk_barrier_wait(&board.arrived[stage], parities >> stage & 1);
      parities ^= 1 << stage;
    }
    __syncthreads();
  }
};

// ---- the kernels

template <class D, bool staged>
__global__ void __launch_bounds__(staged ? kMaxThreads : kStreamingThreads, staged ? 1 : 2)
    rows_kernel(const __grid_constant__ RowsCall call, const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (staged) return;  // never planned
#endif
  Team team(plan.blocks);
  const int64_t teams = gridDim.x / plan.blocks;
  const int64_t first_column = (int64_t)team.rank * plan.slice;
  const int64_t left = call.columns - first_column;
  const int columns = left < 0 ? 0 : left < plan.slice ? (int)left : plan.slice;

  if constexpr (staged) {
    Staging staging(call, plan, team.board, (int)first_column, columns);
    int64_t row = blockIdx.x / plan.blocks;
    RowNumbers numbers(call, row), next(call, row + teams);
    staging.begin(row, numbers, 0);
    if (plan.stages == 2) staging.begin(row + teams, next, 1);
    for (int stage = 0; row < call.rows; row += teams) {
      // The row that will be staged where this one is.
      const int64_t row_after = row + plan.stages * teams;
      const RowNumbers after(call, row_after);
      if (numbers.swept(call)) {
        staging.wait(stage);
        const Slice student = {staging.student_at(stage), call.student.dtype, columns, true};
        const Slice teacher = {staging.teacher_at(stage), call.teacher.dtype, columns, true};
        sweep_row<D, true>(call, team, row, numbers, (int)first_column, student, teacher);
        __syncthreads();  // all have read the stage
      } else {
        fill_row(call, team, row, numbers.skipped() ? 0 : NAN);
      }
      staging.begin(row_after, after, stage);
      stage ^= plan.stages - 1;
      numbers = plan.stages == 2 ? next : after;
      next = after;
    }
  } else {
    for (int64_t row = blockIdx.x / plan.blocks; row < call.rows; row += teams) {
      const RowNumbers numbers(call, row);
      if (!numbers.swept(call)) {
        fill_row(call, team, row, numbers.skipped() ? 0 : NAN);
        continue;
      }
      auto slice = [&](const Logits& x) {
        const char* data = row_start(x, call, row) + first_column * bytes_of(x.dtype);
        return Slice{data, x.dtype, columns, (uint64_t)data % 16 == 0};
      };
      sweep_row<D, false>(call, team, row, numbers, (int)first_column, slice(call.student), slice(call.teacher));
    }
  }
  if (team.blocks > 1) cluster_sync(team.blocks);  // no block leaves while another may read its shared memory
}

__global__ void __launch_bounds__(kStreamingThreads)
    scale_kernel(char* x, Dtype dtype, int64_t rows, int64_t columns, const __grid_constant__ PerRow factor) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float f = per_row(factor, row);
    if (f == 1) continue;
    char* data = x + row * columns * bytes_of(dtype);
    const Slice slice = {data, dtype, (int)columns, (uint64_t)data % 16 == 0};
    Groups groups(slice.columns, false);
    for (int g = 0; g < groups.count; ++g) {
      float values[kGroup];
      load_group<false>(slice, groups.column(g), values);
      for (int i = 0; i < kGroup; ++i) values[i] *= f;
      store_group(data, dtype, slice.aligned, groups.column(g), slice.columns, values);
    }
  }
}

// ---- the host: the plan, the launch

namespace {

using Kernel = void (*)(const RowsCall, const Plan);

Kernel kernel_of(int divergence, bool staged) {
  int index = 0;
  if (divergence < 0) divergence = 0;  // row floats are the same for all
#define KDK_CASE(key, Struct) \
  if (divergence == index++) return staged ? rows_kernel<Struct<float>, true> : rows_kernel<Struct<float>, false>;
  KDK_DIVERGENCES(KDK_CASE)
#undef KDK_CASE
  throw std::runtime_error("no divergence of number " + std::to_string(divergence));
}

bool knows_slope_sum(int divergence) {
  int index = 0;
#define KDK_CASE(key, Struct) \
  if (divergence == index++) return slope_sum_of<Struct<float>> != SlopeSum::swept;
  KDK_DIVERGENCES(KDK_CASE)
#undef KDK_CASE
  return false;
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Enough threads that each has at most two groups of the slice, as far as there are so many.
int threads_for(int slice, int most) {
  int threads = 64;
  while (threads < most && slice > 2 * kGroup * threads) threads *= 2;
  return threads;
}

bool bulk(const Logits& x, const RowsCall& call) {
  int bytes = x.dtype == Dtype::f32 ? 4 : 2;
  // The stride of a dimension of size 1 may be anything.
  const int64_t outer = call.rows == call.inner ? 0 : x.outer_stride, inner = call.inner == 1 ? 0 : x.inner_stride;
  return (uint64_t)x.data % 16 == 0 && outer * bytes % 16 == 0 && inner * bytes % 16 == 0;
}

Plan plan(const RowsCall& call, Kernel staged_kernel, Kernel streaming_kernel, const Chip& chip, int device) {
  const int64_t column_bytes = (call.student.dtype == Dtype::f32 ? 4 : 2) + (call.teacher.dtype == Dtype::f32 ? 4 : 2);
  int sweeps = !!(call.sweeps & kFloats) + !!(call.sweeps & kSums) + !!(call.sweeps & kGradient);
  if (call.sweeps == (kFloats | kSums | kGradient) && knows_slope_sum(call.divergence)) sweeps = 2;
  Plan plan = {};
  auto cut = [&](int blocks) {
    plan.blocks = blocks;
    plan.slice = (int)round_up((call.columns + blocks - 1) / blocks, kGroup);
    plan.threads = threads_for(plan.slice, plan.staged ? kMaxThreads : kStreamingThreads);
  };
  auto fill_chip = [&](int64_t teams) { plan.grid = (int)(teams < call.rows ? teams : call.rows) * plan.blocks; };

  // The smallest cluster that holds two rows, so that the next is copied while one is worked on; else one row.
  plan.staged = true;
  plan.student_bulk = bulk(call.student, call), plan.teacher_bulk = bulk(call.teacher, call);
  for (int stages = 2; stages >= 1 && chip.major >= 9 && sweeps > 1; --stages) {
    for (int blocks = 1; blocks <= kMaxBlocks; blocks *= 2) {
      cut(blocks);
      plan.stages = stages;
      int64_t shared = sizeof(Board) + stages * plan.slice * column_bytes;
      if (shared > chip.shared) continue;
      plan.shared = (int)shared;
      int teams = teams_at_once(staged_kernel, plan, chip, device);
      if (teams == 0) continue;
      fill_chip(teams);
      return plan;
    }
  }

  // So few rows in flight that another sweep finds them in three quarters of the L2 cache, but half the chip at work.
  plan.staged = false;
  plan.stages = 0;
  plan.shared = sizeof(Board);
  const int64_t fit = (int64_t)(0.75 * chip.l2) / (call.columns * column_bytes);
  int64_t teams = 0;
  for (int blocks = 1; blocks <= 8; blocks *= 2) {
    Plan smaller = plan;
    cut(blocks);
    int64_t at_once = teams_at_once(streaming_kernel, plan, chip, device);
    if (at_once == 0) {
      plan = smaller;
      break;
    }
    teams = at_once;
    if (sweeps == 1 || chip.major < 9 || at_once <= fit) break;
  }
  if (teams == 0)
    throw std::runtime_error("the device has no room for a block of " + std::to_string(plan.threads) + " threads");
  if (sweeps > 1) {
    int64_t least = chip.multiprocessors / (2 * plan.blocks);
    int64_t limit = fit > least ? fit : least;
    teams = teams < limit ? teams : limit < 1 ? 1 : limit;
  }
  fill_chip(teams);
  return plan;
}

Plan plan_for(const RowsCall& call, int device) {
  return plan(call, kernel_of(call.divergence, true), kernel_of(call.divergence, false), Chip(device), device);
}

}  // namespace

void rows(const RowsCall& call, int device, void* stream) {
  if (call.rows == 0) return;
  OnDevice guard(device);
  const Plan plan = plan_for(call, device);
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config(plan, &cluster, (cudaStream_t)stream);
  KDK_CHECK(cudaLaunchKernelEx, &config, kernel_of(call.divergence, plan.staged), call, plan);
}

void scale_rows(void* x, Dtype dtype, int64_t rows, int64_t columns, PerRow factor, int device, void* stream) {
  if (rows == 0 || columns == 0) return;
  OnDevice guard(device);
  const int64_t blocks = 8 * Chip(device).multiprocessors;
  Plan plan = {};
  plan.blocks = 1;
  plan.grid = (int)(rows < blocks ? rows : blocks);
  plan.threads = threads_for((int)columns, kStreamingThreads);
  const cudaLaunchConfig_t config = launch_config(plan, nullptr, (cudaStream_t)stream);
  KDK_CHECK(cudaLaunchKernelEx, &config, scale_kernel, (char*)x, dtype, rows, columns, factor);
}

std::string refusal(int device) {
  try {
    int devices = 0;
    KDK_CHECK(cudaGetDeviceCount, &devices);
    OnDevice guard(device);
    cudaFuncAttributes attributes;
    KDK_CHECK(cudaFuncGetAttributes, &attributes, kernel_of(0, false));
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

std::string plan_of(const RowsCall& call, int device) {
  OnDevice guard(device);
  const Plan x = plan_for(call, device);
  return std::string(x.staged ? "staged" : "streaming") + ", clusters of " + std::to_string(x.blocks) + ", " +
         std::to_string(x.threads) + " threads, " + std::to_string(x.stages) + " rows in " + std::to_string(x.shared) +
         " bytes of shared memory, " + std::to_string(x.grid) + " blocks";
}

}  // namespace cuda
}  // namespace kdk
