// Calls of the transport kernels: costs between the rows of two clouds of logits, and Sinkhorn iterations. Pointers,
// strides and sizes, nothing of torch. transport_arguments.h fills them, the kernels take them.
#pragma once
#include "rows_call.h"

namespace kdk {

enum class PairCost : int { l1 = 0, l2 = 1 };

// Costs between the rows of a student's and a teacher's cloud, of n rows of logits each. With p_i and q_j the softmaxes
// at the temperature, p_iv = exp((s_iv - max_i) / temperature - log_sum_i),
//
//     l1    C_ij = sum_v |p_iv - q_jv|              d C_ij / d p_iv = sign(p_iv - q_jv), 0 where they are equal
//     l2    C_ij = sqrt(sum_v (p_iv - q_jv)^2)      d C_ij / d p_iv = (p_iv - q_jv) / C_ij, 0 where C_ij is
//
// and the moments E_ij = sum_v p_iv d C_ij / d p_iv. A pair with a dropped row has cost and moment 0.
struct PairCostsCall {
  PairCost kind;
  bool fp64;                 // the compute type is double, else float
  int64_t clouds, rows;      // n; row i of cloud c is (c, i) of the logits
  int64_t columns;           // classes that count
  Logits student, teacher;
  const void* kept;          // [clouds, n] in the compute type; 0: the row is dropped on both sides, and never read
  PerRow temperature;        // one for all: its stride is 0
  const void* floats;        // [4, clouds, n]: student_max, student_log_sum, teacher_max, teacher_log_sum
  void* costs;               // [clouds, n, n]
  void* moments;             // [clouds, n, n] or null
  void* workspace;
  int threads;
};

// The gradient of the student's logits, of a loss whose derivative with respect to the costs is known:
//
//     g_iv = sum_j W_ij sign(p_iv - q_jv)  (l1),  sum_j W_ij (p_iv - q_jv)  (l2: W is already over the cost)
//     gradient_iv = (p_iv / temperature) (g_iv - dot_i)
//
// where dot_i = sum_v p_iv g_iv. A dropped row's gradient is 0.
struct PairGradientCall {
  PairCost kind;
  bool fp64;
  int64_t clouds, rows;
  int64_t columns;
  int64_t gradient_columns;  // width of the gradient; zeros past `columns`
  Logits student, teacher;
  const void* kept;          // [clouds, n]
  PerRow temperature;
  const void* floats;        // [4, clouds, n]
  const void* weights;       // W [clouds, n, n]
  const void* dot;           // [clouds, n]
  void* gradient;            // [clouds, n, gradient_columns] in the student's dtype, contiguous
  void* workspace;
  int threads;
};

// Sinkhorn's iterations of problems [n, m], of masses a and b and costs C. From g = 0, in each round, rows first,
//
//     f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)
//     g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon)
//
//     P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)
//     error = sum_i |sum_j P_ij - a_i| / sum a
//     value = sum P C,  or, entropic,  <a, f> + <b, g> - epsilon (sum b - sum a sum b)
//
// A round does not begin where the error is at the tolerance or below (0: no tolerance). C = inf forbids a pair, and
// its P C is 0. A point without mass has a potential, and no part in sums; one for which no partner with mass is left
// has potential 0 where it has no mass itself, else NaN.
//
// unrolled: the derivatives of the value as these rounds find it. Potentials in fp32 are rounded relative to their
// size, that of C / epsilon: where that is large a kernel takes a_i w_ij and b_j w_ij for the terms of a step's sum over
// that sum. And it takes C less its minimum, which changes sum P C by that times sum b, and of_b by that.
//
// With w_ij = exp((f_i + g_j - C_ij) / epsilon), from last to first round, alpha_f and alpha_g the derivatives with
// respect to f / epsilon and g / epsilon of that round,
//
//     columns  s_i = sum_j w_ij alpha_g_j  (w of f and g of the round):            of_a_i -= s_i, alpha_f_i -= a_i s_i,
//              of_C_ij += a_i w_ij alpha_g_j / epsilon
//     rows     s_j = sum_i w_ij alpha_f_i  (w of its f and the g of before it):    of_b_j -= s_j, alpha_g_j = -b_j s_j,
//              of_C_ij += b_j w_ij alpha_f_i / epsilon;                            and alpha_f = 0 before it
//
// from, for sum P C: alpha_f_i = sum_j P_ij C_ij, alpha_g_j = sum_i P_ij C_ij, of_a_i = alpha_f_i / a_i,
// of_b_j = alpha_g_j / b_j (as sums without that mass), of_C_ij = P_ij - P_ij C_ij / epsilon; and entropic:
// alpha_f = epsilon a, alpha_g = epsilon b, of_a = f + epsilon sum b, of_b = g - epsilon + epsilon sum a, of_C = 0.
struct SinkhornCall {
  int64_t problems, n, m;
  int64_t iterations;
  bool fp64, entropic, unrolled;
  const void* cost;          // [problems, n, m] in the compute type
  const void* a;             // [problems, n]
  const void* b;             // [problems, m]
  const void* epsilon;       // one number
  const void* tolerance;     // one number
  void* value;               // [problems]
  void* f;                   // [problems, n]
  void* g;                   // [problems, m]
  void* error;               // [problems]
  int32_t* done;             // [problems]: rounds
  void* of_cost;             // [problems, n, m], with unrolled
  void* of_a;                // [problems, n], with unrolled
  void* of_b;                // [problems, m], with unrolled
  void* workspace;
  int threads;
};

// Derivatives of a problem's value by formulas of the plan that its potentials give: of the entropic value with the
// plan held fixed, P, f and g; or, implicit, of sum P C where the rounds have converged (backends/transport.py).
struct PlanGradientCall {
  int64_t problems, n, m;
  bool fp64, implicit;
  const void* cost;          // [problems, n, m]
  const void* a;             // [problems, n]
  const void* b;             // [problems, m]
  const void* f;             // [problems, n]
  const void* g;             // [problems, m]
  const void* epsilon;       // one number
  void* of_cost;             // [problems, n, m]
  void* of_a;                // [problems, n]
  void* of_b;                // [problems, m]
  void* workspace;
  int threads;
};

}  // namespace kdk
