// Calls of the Sinkhorn kernels: iterations, and derivatives from converged potentials.
#pragma once
#include "types.h"

namespace kdk {

// Sinkhorn's iterations for problems [n, m] with masses a and b and costs C. A round is step (1), then step (2). The
// first round starts from g = 0, and each later round from the g of the round before.
//
//     (1) rows     f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)
//     (2) columns  g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon)
//
//     plan         P_ij = a_i b_j w_ij,  w_ij = exp((f_i + g_j - C_ij) / epsilon)
//     (3) error    sum_i |sum_j P_ij - a_i| / sum a
//     (4) value    sum P C,  or, entropic,  <a, f> + <b, g> - epsilon (sum b - sum a sum b)
//
// After (2) the next round's (1) gives the row sums of P: sum_j P_ij = a_i exp((f_i - next f_i) / epsilon). The rounds
// end when the error is at the tolerance or below it; a tolerance of 0 ends no round. C = inf forbids a pair, and the
// pair's P C is 0. A point without mass has a potential, and takes no part in sums. A point that has no partner with
// mass has potential 0 if it has no mass itself, else NaN.
//
// unrolled: the derivatives of the value as these rounds find it, from the last round to the first. alpha_f and alpha_g
// are the derivatives with respect to f / epsilon and g / epsilon of the round.
//
//     (R1) start, for sum P C:   alpha_f_i = sum_j P_ij C_ij           grad_a_i = alpha_f_i / a_i, as a sum without a_i
//                                alpha_g_j = sum_i P_ij C_ij           grad_b_j = alpha_g_j / b_j, as a sum without b_j
//                                grad_C_ij = P_ij - P_ij C_ij / epsilon
//          start, entropic:      alpha_f = epsilon a                   grad_a = f + epsilon sum b
//                                alpha_g = epsilon b                   grad_b = g - epsilon + epsilon sum a
//                                grad_C = 0
//     (R2) columns               s_i = sum_j w_ij alpha_g_j            with w of f and g of the round
//                                grad_a_i -= s_i,  alpha_f_i -= a_i s_i
//                                grad_C_ij += a_i w_ij alpha_g_j / epsilon
//     (R3) rows                  s_j = sum_i w_ij alpha_f_i            with w of f of the round and g before the round
//                                grad_b_j -= s_j,  alpha_g_j = -b_j s_j
//                                grad_C_ij += b_j w_ij alpha_f_i / epsilon
//                                alpha_f = 0 for the round before
//
// Potentials in fp32 are rounded relative to their size, which is the size of C / epsilon. Where that size is large, a
// kernel takes a_i w_ij in (R2) and b_j w_ij in (R3) as the term of the step's sum, (2) or (1), divided by the sum. A
// kernel subtracts the minimum of C from C: this changes sum P C by the minimum times sum b, and grad_b by the minimum.
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
  int32_t* done;             // [problems]: the number of rounds
  Numbers grad_cost;         // [problems, n, m], with unrolled
  Numbers grad_a;            // [problems, n], with unrolled
  Numbers grad_b;            // [problems, m], with unrolled
  KDK_FIELDS(problems, n, m, iterations, entropic, unrolled, cost, a, b, epsilon, tolerance, value, f, g, error, done,
             grad_cost, grad_a, grad_b)
  Execution run;
};

// Derivatives of a problem's value by formulas of the plan P that its potentials give (kdkernels/families/sinkhorn.py):
//
//     (P1) envelope    grad_C = P, grad_a = f, grad_b = g: the entropic value, with the plan held fixed
//     (P2) implicit    grad_C = P (1 - (C - x - y) / epsilon), grad_a = x, grad_b = y: sum P C where the rounds have
//                      converged, with the solution x, y of
//
//                      [diag(r) P; P^T diag(c)] [x; y] = [(P C) 1; (P C)^T 1],        r = P 1, c = P^T 1
struct PlanGradientCall {
  int64_t problems, n, m;
  bool implicit;
  Numbers cost;              // [problems, n, m]
  Numbers a;                 // [problems, n]
  Numbers b;                 // [problems, m]
  Numbers f;                 // [problems, n]
  Numbers g;                 // [problems, m]
  Numbers epsilon;           // one number
  Numbers grad_cost;         // [problems, n, m]
  Numbers grad_a;            // [problems, n]
  Numbers grad_b;            // [problems, m]
  KDK_FIELDS(problems, n, m, implicit, cost, a, b, f, g, epsilon, grad_cost, grad_a, grad_b)
  Execution run;
};

}  // namespace kdk
