// Calls of the kernels of Universal Logit Distillation (arXiv:2402.12030): pointers, strides and sizes, nothing of
// torch. uld_arguments.h fills them, the kernels take them.
//
// With p and q the softmaxes of a student's and a teacher's row at the row's temperature, of different vocabularies,
// both sorted in descending order, and 0 past their last:
//
//     loss          l = sum over ranks |p_k - q_k|
//     sign          s of a class: sign(p_k - q_k) of its rank k; the mean over the ranks of all classes of its logit
//     gradient      p (s - sum over classes p s) / temperature
//
// NaN, +inf and a row of -inf alone, on either side, make the row NaN.
#pragma once
#include "rows_call.h"

namespace kdk {

struct UldCall {
  bool fp64;                 // the compute type is double, else float
  int64_t rows, inner;       // row r is (r / inner, r % inner)
  int64_t student_columns, teacher_columns;  // classes that count
  int64_t gradient_columns;  // width of the gradient; zeros past `student_columns`
  Logits student, teacher;
  PerRow row_scale;          // of loss and gradient; 0: skip the row before any load
  PerRow temperature;
  void* loss;                // [rows]
  void* divergence;          // [rows]: the loss without its scale
  void* gradient;            // [rows, gradient_columns] in the student's dtype, contiguous, or null
  void* workspace;
  int threads;
};

// The same of rows that are sorted: contiguous [rows, columns], in descending order, a NaN before or after all numbers.
struct RankedUldCall {
  int64_t rows, student_columns, teacher_columns, gradient_columns;
  const void *student, *teacher;
  Dtype student_dtype, teacher_dtype;
  const int64_t* indices;    // [rows, student_columns]: the class of each rank; with a gradient
  int32_t* sums_of_signs;    // [rows, student_columns + 1], scratch: of the signs before each rank; with a gradient
  PerRow row_scale, temperature;
  void *loss, *divergence;   // [rows]
  void* gradient;            // or null
};

}  // namespace kdk
