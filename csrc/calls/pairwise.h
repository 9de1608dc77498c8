// Calls of the pairwise kernels: costs between the rows of two clouds of logits, and their gradient.
#pragma once
#include "types.h"

namespace kdk {

enum class PairCost : int { l1 = 0, l2 = 1 };

// Costs between the rows of a student's and a teacher's cloud; each cloud has n rows of logits. With p_i and q_j the
// softmaxes at the temperature, p_iv = exp((s_iv - max_i) / temperature - log_sum_i),
//
//     l1    C_ij = sum_v |p_iv - q_jv|              d C_ij / d p_iv = sign(p_iv - q_jv), 0 where they are equal
//     l2    C_ij = sqrt(sum_v (p_iv - q_jv)^2)      d C_ij / d p_iv = (p_iv - q_jv) / C_ij, 0 where C_ij is 0
//
// and the moments E_ij = sum_v p_iv d C_ij / d p_iv. A pair with a dropped row has cost and moment 0.
struct PairCostsCall {
  PairCost kind;
  int64_t clouds, rows;      // n; row i of cloud c is (c, i) of the logits
  int64_t columns;           // classes that count
  Logits student, teacher;
  Numbers row_mass;          // [clouds, n]; 0: the row is dropped on both sides, and never read
  PerRow temperature;        // one number for all rows: its stride is 0
  Numbers floats;            // [4, clouds, n]: student_max, student_log_sum, teacher_max, teacher_log_sum
  Numbers costs;             // [clouds, n, n]
  Numbers moments;           // [clouds, n, n] or null
  KDK_FIELDS(kind, clouds, rows, columns, student, teacher, row_mass, temperature, floats, costs, moments)
  Execution run;
};

// The gradient of the student's logits for a loss whose derivative with respect to the costs is known:
//
//     g_iv = sum_j W_ij sign(p_iv - q_jv)  (l1),  sum_j W_ij (p_iv - q_jv)  (l2; the caller divides W by the costs)
//     gradient_iv = (p_iv / temperature) (g_iv - dot_i)
//
// where dot_i = sum_v p_iv g_iv. A dropped row's gradient is 0.
struct PairGradientCall {
  PairCost kind;
  int64_t clouds, rows;
  int64_t columns;
  int64_t gradient_columns;  // width of the gradient; zeros past `columns`
  Logits student, teacher;
  Numbers row_mass;          // [clouds, n]
  PerRow temperature;
  Numbers floats;            // [4, clouds, n]
  Numbers weights;           // W [clouds, n, n]
  Numbers dot;               // [clouds, n]
  Stored gradient;           // [clouds, n, gradient_columns] in the student's dtype
  KDK_FIELDS(kind, clouds, rows, columns, gradient_columns, student, teacher, row_mass, temperature, floats, weights,
             dot, gradient)
  Execution run;
};

}  // namespace kdk
