// Calls of the dense row kernels: a divergence between the softmaxes of a student's and a teacher's rows of logits.
#pragma once
#include "types.h"

namespace kdk {

// The sweeps that a call runs. A loss needs kFloats | kSums, its gradient kGradient too. The results of a sweep that a
// call leaves out are read from where an earlier call wrote them.
enum Sweep : int { kFloats = 1, kSums = 2, kGradient = 4 };

constexpr int kRowFloats = 5;       // student_max, student_log_sum, teacher_max, teacher_log_sum, unit_log_sum
constexpr int kRowSums = 2;         // sum phi, sum psi

// The statistics of a row: the members are in the order of ROW_STATISTICS in kdkernels/backends/__init__.py.
template <class T> struct RowStatistics {
  T divergence, cross_entropy, tv, student_entropy, teacher_entropy, student_max_log_prob, teacher_max_log_prob,
      student_label_log_prob, teacher_label_log_prob, student_lse, teacher_lse;
};
constexpr int kRowStatistics = sizeof(RowStatistics<float>) / sizeof(float);

// The options of each row.
struct RowOptions {
  PerRow row_scale;       // 0: skip the row before any load
  const int64_t* labels;  // [rows], may be null
  PerRow temperature;
  PerRow hard_weight;     // data may be null: no label term
  bool temperature_squared;
  KDK_FIELDS(row_scale, labels, temperature, hard_weight, temperature_squared)
};

struct RowsCall {
  int sweeps;
  Divergence divergence;     // none where only floats are found
  int64_t rows, inner;       // row r is (r / inner, r % inner)
  int64_t columns;           // classes that count
  int64_t gradient_columns;  // width of the gradient; zeros past `columns`
  Logits student, teacher;
  RowOptions options;
  Numbers parameters;        // of the divergence
  bool unit_log_sum;         // find unit_log_sum (the label term and the cross-entropy statistic need it)
  Numbers floats;            // [kRowFloats, rows]
  Numbers sums;              // [kRowSums, rows]
  Numbers loss;              // [rows], with both floats and sums
  Numbers statistics;        // [kRowStatistics, rows] or null
  int64_t* top1;             // [2, rows] with statistics
  Stored gradient;           // [rows, gradient_columns] in the student's dtype; it may lie where the student's logits do,
                             // which then are contiguous too
  KDK_FIELDS(sweeps, divergence, rows, inner, columns, gradient_columns, student, teacher, options, parameters,
             unit_log_sum, floats, sums, loss, statistics, top1, gradient)
  Execution run;
};

// x[r, :] *= factor[r]; a row whose factor is 1 is left alone.
struct ScaleRowsCall {
  int64_t rows, columns;
  Stored x;
  PerRow factor;
  KDK_FIELDS(rows, columns, x, factor)
  Execution run;
};

}  // namespace kdk
