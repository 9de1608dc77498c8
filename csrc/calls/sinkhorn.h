// Calls of the Sinkhorn kernels: iterations, and derivatives from converged potentials.
#pragma once
#include "types.h"

namespace kdk {

// Sinkhorn's iterations for problems [n, m] with masses a and b and costs C. A round starts from g = 0 or from the g of
// the round before, and finds rows first:
//
//     f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)
//     g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon)
//
//     P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)
//     error = sum_i |sum_j P_ij - a_i| / sum a
//     value = sum P C,  or, entropic,  <a, f> + <b, g> - epsilon (sum b - sum a sum b)
//
// The rounds end when the error is at the tolerance or below it (a tolerance of 0 ends none). C = inf forbids a pair,
// and the pair's P C is 0. A point without mass has a potential, and takes no part in sums. A point that has no partner
// with mass has potential 0 if it has no mass itself, else NaN.
//
// unrolled: the derivatives of the value as these rounds find it. Potentials in fp32 are rounded relative to their
// size, which is that of C / epsilon. Where that size is large, a kernel takes the terms of a step's sum over the sum
// itself for a_i w_ij and b_j w_ij. A kernel subtracts the minimum of C from C: this changes sum P C by the minimum times
// sum b, and grad_b by the minimum.
//
// With w_ij = exp((f_i + g_j - C_ij) / epsilon), from last to first round, alpha_f and alpha_g the derivatives with
// respect to f / epsilon and g / epsilon of that round,
//
//     columns  s_i = sum_j w_ij alpha_g_j  (w of f and g of the round):            grad_a_i -= s_i, alpha_f_i -= a_i s_i,
//              grad_C_ij += a_i w_ij alpha_g_j / epsilon
//     rows     s_j = sum_i w_ij alpha_f_i  (w of its f and the g of before it):    grad_b_j -= s_j, alpha_g_j = -b_j s_j,
//              grad_C_ij += b_j w_ij alpha_f_i / epsilon;                            and alpha_f = 0 before it
//
// from, for sum P C: alpha_f_i = sum_j P_ij C_ij, alpha_g_j = sum_i P_ij C_ij, grad_a_i = alpha_f_i / a_i,
// grad_b_j = alpha_g_j / b_j (as sums without that mass), grad_C_ij = P_ij - P_ij C_ij / epsilon; and entropic:
// alpha_f = epsilon a, alpha_g = epsilon b, grad_a = f + epsilon sum b, grad_b = g - epsilon + epsilon sum a, grad_C = 0.
struct SinkhornCall {
  int64_t problems, n, m;
  int64_t iterations;
  bool entropic, unrolled;
  Numbers cost;              // [problems, n, m]
  Numbers a;                 // [problems, n]
  Numbers b;                 // [problems, m]
  Numbers epsilon;           // one number
  Numbers tolerance;         // one number
  Numbers value;             // [problems]
  Numbers f;                 // [problems, n]
  Numbers g;                 // [problems, m]
  Numbers error;             // [problems]
  int32_t* done;             // [problems]: rounds
  Numbers grad_cost;           // [problems, n, m], with unrolled
  Numbers grad_a;              // [problems, n], with unrolled
  Numbers grad_b;              // [problems, m], with unrolled
  KDK_FIELDS(problems, n, m, iterations, entropic, unrolled, cost, a, b, epsilon, tolerance, value, f, g, error, done,
             grad_cost, grad_a, grad_b)
  Execution run;
};

// Derivatives of a problem's value by formulas of the plan P that its potentials give. Of the entropic value with the
// plan held fixed they are P, f and g. implicit: the derivatives of sum P C where the rounds have converged
// (backends/transport.py).
struct PlanGradientCall {
  int64_t problems, n, m;
  bool implicit;
  Numbers cost;              // [problems, n, m]
  Numbers a;                 // [problems, n]
  Numbers b;                 // [problems, m]
  Numbers f;                 // [problems, n]
  Numbers g;                 // [problems, m]
  Numbers epsilon;           // one number
  Numbers grad_cost;           // [problems, n, m]
  Numbers grad_a;              // [problems, n]
  Numbers grad_b;              // [problems, m]
  KDK_FIELDS(problems, n, m, implicit, cost, a, b, f, g, epsilon, grad_cost, grad_a, grad_b)
  Execution run;
};

}  // namespace kdk
