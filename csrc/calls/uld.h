// Calls of the kernels of Universal Logit Distillation (arXiv:2402.12030).
//
// p and q are the softmaxes of a student's and a teacher's row at the row's temperature. The two vocabularies differ.
// Both p and q are sorted in descending order, and are 0 past their last class:
//
//     loss          l = sum over ranks |p_k - q_k|
//     sign          s of a class = sign(p_k - q_k) at its rank k; classes with equal logits share the mean over their
//                   ranks
//     gradient      p (s - sum over classes p s) / temperature
//
// A NaN, a +inf, or nothing but -inf in the row of either side makes the row's results NaN.
#pragma once
#include "types.h"

namespace kdk {

struct UldCall {
  int64_t rows, inner;       // row r is (r / inner, r % inner)
  int64_t student_columns, teacher_columns;  // classes that count
  int64_t gradient_columns;  // width of the gradient, which is 0 past `student_columns`
  Logits student, teacher;
  PerRow row_scale;          // of loss and gradient; 0: skip the row before any load
  PerRow temperature;
  Numbers loss;              // [rows]
  Numbers divergence;        // [rows]: the loss without its scale
  Stored gradient;           // [rows, gradient_columns] in the student's dtype, or null
  KDK_FIELDS(rows, inner, student_columns, teacher_columns, gradient_columns, student, teacher, row_scale, temperature,
             loss, divergence, gradient)
  Execution run;
};

// The same loss for rows that are sorted in descending order. A NaN stands before or after all numbers.
struct RankedUldCall {
  int64_t rows, student_columns, teacher_columns, gradient_columns;
  Stored student, teacher;   // [rows, columns]
  const int64_t* indices;    // [rows, student_columns]: the class of each rank; with a gradient
  int32_t* sums_of_signs;    // [rows, student_columns + 1], scratch: the sum of signs before each rank; with a gradient
  PerRow row_scale, temperature;
  Numbers loss, divergence;  // [rows]
  Stored gradient;           // or null
  KDK_FIELDS(rows, student_columns, teacher_columns, gradient_columns, student, teacher, indices, sums_of_signs,
             row_scale, temperature, loss, divergence, gradient)
  Execution run;
};

}  // namespace kdk
