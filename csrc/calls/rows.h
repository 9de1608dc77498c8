// Calls of the dense row kernels: a divergence between the softmaxes of a student's and a teacher's rows of logits.
#pragma once
#include <math.h>

#include "types.h"

namespace kdk {

// The sweeps that a call runs. A loss needs kFloats | kSums. A gradient needs kGradient too. If a call leaves a sweep
// out, the kernel reads that sweep's results from the tensors that an earlier call wrote.
enum Sweep : int { kFloats = 1, kSums = 2, kGradient = 4 };

constexpr int kRowFloats = 5;       // student_max, student_log_sum, teacher_max, teacher_log_sum, unit_log_sum
constexpr int kRowSums = 3;         // sum phi, sum psi, shift (of a close row: see csrc/divergences.h; else INFINITY)

// The statistics of a row. The members are in the order of ROW_STATISTICS in kdkernels/families/rows.py.
template <class T> struct RowStatistics {
  T divergence, cross_entropy, tv, student_entropy, teacher_entropy, student_max_log_prob, teacher_max_log_prob,
      student_label_log_prob, teacher_label_log_prob, student_lse, teacher_lse;
};
constexpr int kRowStatistics = sizeof(RowStatistics<float>) / sizeof(float);

// The options of each row.
struct RowOptions {
  PerRow row_scale;       // 0: the kernel skips the row and loads nothing of it
  const int64_t* labels;  // [rows], may be null
  PerRow temperature;
  PerRow hard_weight;     // data may be null: no label term
  bool temperature_squared;
  PerRow loss_cap;        // data may be null: no cap
  KDK_FIELDS(row_scale, labels, temperature, hard_weight, temperature_squared, loss_cap)

  // Whether the factors of a row's gradient depend on the row's loss. If so, no sweep writes a gradient before the
  // loss.
  KDK_EVERYWHERE bool gradient_needs_loss() const { return loss_cap.data != nullptr; }
};

// The options of one row, in the compute type. Kernels read them, and so does the check of values before a CPU kernel.
// The default values are those of a skipped row.
template <class T> struct RowValues {
  T scale = 0, temperature = 1, hard_weight = 0, loss_cap = INFINITY;
  int64_t label = 0;

  // load(pointer) reads the memory that the pointer points to.
  template <class Load> KDK_IN_KERNEL void read(const RowOptions& options, int64_t row, Load load) {
    auto per_row = [&](const PerRow& x) { return load((const T*)x.data + row * x.stride); };
    scale = per_row(options.row_scale);
    temperature = per_row(options.temperature);
    if (options.hard_weight.data) hard_weight = per_row(options.hard_weight);
    if (options.loss_cap.data) loss_cap = per_row(options.loss_cap);
    if (options.labels) label = load(options.labels + row);
  }
  // Whether the cap replaces the row's loss; the row's gradient is 0 then. `loss` is the loss before the scale. A NaN
  // loss stays NaN, and so does the loss of a row with a NaN scale.
  KDK_IN_KERNEL bool capped(T loss) const { return loss > loss_cap && scale == scale; }
  KDK_IN_KERNEL bool skipped() const { return scale == 0; }
  // Whether these values are invalid: `bad_rows` in kdkernels/families/options.py. A skipped row may have any values.
  KDK_IN_KERNEL bool bad(int64_t columns) const {
    return !(temperature > 0 && temperature < INFINITY && 1 / temperature < INFINITY && hard_weight >= 0 &&
             hard_weight <= 1 && label >= 0 && label < columns && loss_cap > 0);
  }
};

struct RowsCall {
  int sweeps;
  Divergence divergence;     // none if the call finds only floats
  int64_t rows, inner;       // row r of the call is row (r / inner, r % inner) of the logits
  int64_t columns;           // the classes that count
  int64_t gradient_columns;  // the width of the gradient, which is 0 from `columns` on
  Logits student, teacher;
  RowOptions options;
  Numbers parameters;        // of the divergence
  double close_below;        // a row whose divergence is below has the close lines; 0: no row has them
  double close_temperature;  // and so has a row of this temperature or a higher one
  bool needs_unit_log_sum;   // the label term and the cross-entropy statistic need the row float unit_log_sum
  Numbers floats;            // [kRowFloats, rows]
  Numbers sums;              // [kRowSums, rows]
  Numbers loss;              // [rows]; only a call that sweeps both floats and sums writes the loss
  Numbers statistics;        // [kRowStatistics, rows] or null
  int64_t* top1;             // [2, rows] if the call has statistics
  Stored gradient;           // [rows, gradient_columns] in the student's dtype; the gradient may overwrite the
                             // student's logits, which are contiguous then
  KDK_FIELDS(sweeps, divergence, rows, inner, columns, gradient_columns, student, teacher, options, parameters,
             close_below, close_temperature, needs_unit_log_sum, floats, sums, loss, statistics, top1, gradient)
  Execution run;
};

// x[r, :] *= factor[r]. The kernel does not touch a row whose factor is 1.
struct ScaleRowsCall {
  int64_t rows, columns;
  Stored x;
  PerRow factor;
  KDK_FIELDS(rows, columns, x, factor)
  Execution run;
};

}  // namespace kdk
