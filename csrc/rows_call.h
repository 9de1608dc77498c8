// One call of a row kernel: pointers, strides and sizes, nothing of torch. bindings.cpp fills it, the kernels
// take it.
#pragma once
#include <cstdint>

namespace kdk {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// A [outer, inner, columns] view of logits: two free row strides (in elements), the last dimension has stride 1.
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t outer_stride, inner_stride;
};

// Which sweeps to run. `rows` is floats | sums, with gradient when it is wanted; a sweep that is not run is read.
enum Sweep : int { kFloats = 1, kSums = 2, kGradient = 4 };

// Per-row numbers are in the compute type: double when a side is fp64, else float. A scalar has stride 0.
struct PerRow {
  const void* data;
  int64_t stride;
};

constexpr int kRowFloats = 5;       // student_max, student_log_sum, teacher_max, teacher_log_sum, unit_log_sum
constexpr int kRowSums = 2;         // sum phi, sum psi
constexpr int kRowStatistics = 11;  // in the order of ROW_STATISTICS in kdkernels/backends/__init__.py

struct RowsCall {
  int sweeps;
  int divergence;            // index into KDK_DIVERGENCES
  int64_t rows, inner;       // row r is (r / inner, r % inner)
  int64_t columns;           // classes that count
  int64_t gradient_columns;  // width of the gradient; zeros past `columns`
  Logits student, teacher;
  PerRow row_scale;          // 0: skip the row before any load
  PerRow temperature;
  PerRow hard_weight;        // data may be null: no label term
  const int64_t* labels;     // may be null
  const void* parameters;    // of the divergence
  bool temperature_squared;
  bool unit_log_sum;         // find unit_log_sum (the label term and the cross-entropy statistic need it)
  void* floats;              // [kRowFloats, rows]
  void* sums;                // [kRowSums, rows]
  void* loss;                // [rows], with both floats and sums
  void* statistics;          // [kRowStatistics, rows] or null
  int64_t* top1;             // [2, rows] with statistics
  void* gradient;            // [rows, gradient_columns] in the student's dtype, contiguous; it may lie where the
                             // student's logits do, which then are contiguous too
  void* workspace;
  int threads;
};

}  // namespace kdk
