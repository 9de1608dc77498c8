// Sinkhorn's iterations on a CPU: a thread works on a problem at a time. calls/sinkhorn.h has the formulas.
//
// Where costs differ little beside epsilon, exp(-C / epsilon) is made once, and a half step is a product of that matrix
// and a vector of scalings exp(f / epsilon), exp(g / epsilon). Elsewhere these would overflow: there the potentials are
// kept as they are, and a half step is a log-sum-exp of each row or column. Both keep the same vectors of each round,
// from which the reverse sweep makes w_ij = exp((f_i + g_j - C_ij) / epsilon) again, row by row.
//
// This file is compiled once per instruction set into a namespace of that name; it calls no std:: template.
#if defined(__F16C__)
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "../calls/kernels.h"

namespace kdk {
namespace KDK_ISA {

#include "elementary.h"
#include "storage.h"
#include "sweeps.h"

// scalings: (max C - min C) / epsilon up to which they are kept: they, and their products with the matrix's entries,
// are within exp(+-2 scalings). least, most: exponents that are told from 0, and from infinity. Beside a term of
// exponent 0 those below the least do not count, and their products would be subnormal: a hundred cycles each. tiny: a
// mass whose logarithm would leave the exponents of its terms below the least.
template <class T> struct Range;
template <> struct Range<float> {
  static constexpr float scalings = 30, least = -60, most = 88, tiny = 1e-13f;
};
template <> struct Range<double> {
  static constexpr double scalings = 300, least = -600, most = 700, tiny = 1e-130;
};

inline int64_t padded(int64_t numbers) { return (numbers + 15) / 16 * 16; }  // rows begin on cache lines

// x = sum_j matrix_ij vector_j, four rows at a time.
template <class T> void product(const T* matrix, int64_t n, int64_t m, const T* vector, T* x) {
  const int64_t stride = padded(m);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const T *k0 = matrix + i * stride, *k1 = k0 + stride, *k2 = k1 + stride, *k3 = k2 + stride;
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < m; ++j)
      s0 += k0[j] * vector[j], s1 += k1[j] * vector[j], s2 += k2[j] * vector[j], s3 += k3[j] * vector[j];
    x[i] = s0, x[i + 1] = s1, x[i + 2] = s2, x[i + 3] = s3;
  }
  for (; i < n; ++i) {
    T s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = 0; j < m; ++j) s += matrix[i * stride + j] * vector[j];
    x[i] = s;
  }
}

// x_j = sum_i matrix_ij vector_i, four rows at a time.
template <class T> void transposed_product(const T* matrix, int64_t n, int64_t m, const T* vector, T* x) {
  const int64_t stride = padded(m);
  for (int64_t j = 0; j < m; ++j) x[j] = 0;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const T *k0 = matrix + i * stride, *k1 = k0 + stride, *k2 = k1 + stride, *k3 = k2 + stride;
    const T v0 = vector[i], v1 = vector[i + 1], v2 = vector[i + 2], v3 = vector[i + 3];
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) x[j] += (k0[j] * v0 + k1[j] * v1) + (k2[j] * v2 + k3[j] * v3);
  }
  for (; i < n; ++i) {
    const T v = vector[i];
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) x[j] += matrix[i * stride + j] * v;
  }
}

template <class T> struct Scratch {
  T* matrix;             // [n, padded m]
  T *f, *g, *base, *sum; // of each round that is kept; what a column's log-sum-exp was made of: its maximum, its sum
  int64_t kept;          // rounds: all where derivatives are wanted, else the last two
  T *of_rows, *of_columns, *alpha_f, *alpha_g, *row, *before, *exponents, *exponents_with_mass, *share;
  T *log_a, *log_b;  // 0 for a point without mass

  static int64_t rounds(int64_t iterations, bool unrolled) { return unrolled ? iterations + 2 : 2; }
  Scratch(const SinkhornCall& call, Arena& arena) : kept(rounds(call.iterations, call.unrolled)) {
    const int64_t n = padded(call.n), m = padded(call.m);
    auto take = [&](int64_t count) { return arena.take<T>(count); };
    matrix = take(call.n * m);
    f = take(kept * n), g = take(kept * m), base = take(kept * m), sum = take(kept * m);
    of_rows = take(n), alpha_f = take(n), log_a = take(n);
    of_columns = take(m), alpha_g = take(m), row = take(m), before = take(m);
    log_b = take(m), exponents = take(m), exponents_with_mass = take(m), share = take(m);
  }
};

template <class T> struct Problem {
  const SinkhornCall& call;
  const int64_t problem, n, m;
  const T *cost, *a, *b;
  const T epsilon, inverse;
  Scratch<T>& scratch;
  bool scalings;  // the vectors of a round are exp(f / epsilon), exp(g / epsilon) and not f / epsilon, g / epsilon
  T least;        // of the costs: what they are relative to, in all that would cancel otherwise
  T sum_a, sum_b;

  Problem(const SinkhornCall& call, int64_t problem, Scratch<T>& scratch)
      : call(call),
        problem(problem),
        n(call.n),
        m(call.m),
        cost((const T*)call.cost + problem * n * m),
        a((const T*)call.a + problem * n),
        b((const T*)call.b + problem * m),
        epsilon(*(const T*)call.epsilon),
        inverse(1 / epsilon),
        scratch(scratch),
        sum_a(total(a, n)),
        sum_b(total(b, m)) {
    const T greatest = block_max(cost, n * m);
    least = INFINITY;
#pragma omp simd reduction(min : least)
    for (int64_t i = 0; i < n * m; ++i) least = cost[i] < least ? cost[i] : least;
    if (!(least < INFINITY && least > -INFINITY)) least = 0;
    // Masses of any sum, but not so small or large that scalings of them leave the range.
    scalings = (greatest - least) * inverse <= Range<T>::scalings && sum_a >= T(1e-6) && sum_a <= T(1e9);
    if (!scalings) {
      for (int64_t i = 0; i < n; ++i) scratch.log_a[i] = a[i] == 0 ? T(0) : ::log(a[i]);
      for (int64_t j = 0; j < m; ++j) scratch.log_b[j] = b[j] == 0 ? T(0) : ::log(b[j]);
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      T* out = scratch.matrix + i * padded(m);
      const T *in = cost + i * m, base = least, factor = inverse;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) out[j] = exp_of_nonpositive((base - in[j]) * factor);
    }
  }

  static T total(const T* x, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += x[i];
    return (T)sum;
  }
  T* f(int64_t round) const { return scratch.f + round % scratch.kept * padded(n); }
  T* g(int64_t round) const { return scratch.g + round % scratch.kept * padded(m); }
  T* base(int64_t round) const { return scratch.base + round % scratch.kept * padded(m); }
  T* sum(int64_t round) const { return scratch.sum + round % scratch.kept * padded(m); }

  // ---- rounds

  // A point without a partner that has mass: nowhere to go.
  static T without_partner(T mass) { return mass == 0 ? T(0) : T(NAN); }

  void row_step(const T* g, T* f) const {
    T* x = scratch.row;
    if (scalings) {
      for (int64_t j = 0; j < m; ++j) x[j] = b[j] * g[j];
      product(scratch.matrix, n, m, x, f);
      for (int64_t i = 0; i < n; ++i) f[i] = 1 / f[i];
      return;
    }
    start_terms(g);
    for (int64_t i = 0; i < n; ++i) {
      T base;
      const T sum = row_terms(i, scratch.before, &base);
      f[i] = sum == 0 ? without_partner(a[i]) : -(base + ::log(sum));
    }
  }
  // Potentials and logarithms of masses: the exponents of terms; -inf for a point without mass.
  static void with_mass(const T* potentials, const T* mass, const T* log_mass, int64_t count, T* x) {
    for (int64_t i = 0; i < count; ++i) x[i] = mass[i] == 0 ? T(-INFINITY) : potentials[i] + log_mass[i];
  }
  static bool is_tiny(T mass) { return mass < Range<T>::tiny; }  // or 0

  // For rows' sums over columns with potentials g. A tiny mass is left out of its term's exponent, and is a factor of
  // the term in sums: the term itself stays a number for the derivative with respect to the mass.
  void start_terms(const T* g) const {
    with_mass(g, b, scratch.log_b, m, scratch.exponents_with_mass);
    for (int64_t j = 0; j < m; ++j) {
      scratch.exponents[j] = is_tiny(b[j]) ? g[j] : scratch.exponents_with_mass[j];
      scratch.share[j] = is_tiny(b[j]) ? b[j] : T(1);
    }
  }
  // The terms b_j exp(g_j - C_ij / epsilon - base) of a row's sum (of tiny masses without b_j), base the largest
  // exponent of a point with mass; returns the sum.
  T row_terms(int64_t i, T* terms, T* base) const {
    const T *in = cost + i * m, *x = scratch.exponents, *share = scratch.share;
    const T* x_with_mass = scratch.exponents_with_mass;
    const T factor = inverse, least = Range<T>::least, most = Range<T>::most;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) terms[j] = x_with_mass[j] - in[j] * factor;
    const T max = block_max(terms, m), shift = max == T(-INFINITY) ? T(0) : max;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < m; ++j) {
      T exponent = x[j] - in[j] * factor - shift;
      T e = exp_of_nonpositive(exponent > most ? most : exponent);  // which serves up to there
      e = exponent < least ? T(0) : e;
      terms[j] = e;
      sum += share[j] * e;
    }
    *base = shift;
    return sum;
  }
  void column_step(int64_t round) const {
    const T* f = this->f(round);
    T *g = this->g(round), *y = scratch.of_rows;
    if (scalings) {
      for (int64_t i = 0; i < n; ++i) y[i] = a[i] * f[i];
      transposed_product(scratch.matrix, n, m, y, g);
      for (int64_t j = 0; j < m; ++j) g[j] = 1 / g[j];
      return;
    }
    with_mass(f, a, scratch.log_a, n, y);
    T *base = this->base(round), *sum = this->sum(round);
    for (int64_t j = 0; j < m; ++j) base[j] = -INFINITY, sum[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T *in = cost + i * m, of_row = y[i], factor = inverse;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        T score = of_row - in[j] * factor;
        base[j] = score > base[j] ? score : base[j];
      }
    }
    for (int64_t j = 0; j < m; ++j) base[j] = base[j] == T(-INFINITY) ? T(0) : base[j];
    for (int64_t i = 0; i < n; ++i) {
      const T *in = cost + i * m, of_row = y[i], factor = inverse, least = Range<T>::least;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        T exponent = of_row - in[j] * factor - base[j], e = exp_of_nonpositive(exponent);
        sum[j] += exponent < least ? T(0) : e;
      }
    }
    for (int64_t j = 0; j < m; ++j) g[j] = sum[j] == 0 ? without_partner(b[j]) : -(base[j] + ::log(sum[j]));
  }
  // Of a round's plan, from the f that the next round would have: a row's sum is a f / next f.
  T error(const T* f, const T* next) const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (a[i] == 0) continue;
      T ratio = scalings ? f[i] / next[i] : (T)::exp((double)f[i] - next[i]);
      total += ::fabs(a[i] * ratio - a[i]);
    }
    return sum_a == 0 ? T(0) : (T)(total / sum_a);
  }

  void solve() {
    const T tolerance = *(const T*)call.tolerance;
    for (int64_t j = 0; j < m; ++j) g(0)[j] = scalings ? 1 : 0;
    int64_t done = 0;
    T error = 0;
    for (;; ++done) {
      row_step(g(done), f(done + 1));
      if (done > 0) error = this->error(f(done), f(done + 1));
      if (done == call.iterations || (done > 0 && tolerance > 0 && error <= tolerance)) break;
      column_step(done + 1);
    }
    ((T*)call.error)[problem] = error;
    call.done[problem] = (int32_t)done;
    write_potentials(f(done), g(done));
    if (call.unrolled)
      unroll(done);
    else
      ((T*)call.value)[problem] = call.entropic ? entropic_value() : transport_value(done);
  }
  void write_potentials(const T* f, const T* g) const {
    T *of_rows = (T*)call.f + problem * n, *of_columns = (T*)call.g + problem * m;
    for (int64_t i = 0; i < n; ++i) of_rows[i] = scalings ? epsilon * ::log(f[i]) + least : epsilon * f[i];
    for (int64_t j = 0; j < m; ++j) of_columns[j] = epsilon * (scalings ? ::log(g[j]) : g[j]);
  }
  T entropic_value() const {
    const T *f = (const T*)call.f + problem * n, *g = (const T*)call.g + problem * m;
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += a[i] * f[i];
    for (int64_t j = 0; j < m; ++j) total += b[j] * g[j];
    return (T)(total - epsilon * ((double)sum_b - (double)sum_a * sum_b));
  }
  // Row i of w_ij = exp((f_i + g_j - C_ij) / epsilon) after a round. A logarithm in fp32 is rounded relative to its
  // size, that of C / epsilon, which every round would pass on: the terms of a column's sum, over that sum, are not.
  void weights(int64_t i, int64_t round, T* w) const {
    if (scalings) {
      const T *in = scratch.matrix + i * padded(m), *g = this->g(round), of_row = f(round)[i];
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) w[j] = of_row * in[j] * g[j];
      return;
    }
    const T *in = cost + i * m, *base = this->base(round), *sum = this->sum(round);
    const T of_row = f(round)[i] + (is_tiny(a[i]) ? T(0) : scratch.log_a[i]);
    const T over_mass = is_tiny(a[i]) ? T(1) : 1 / a[i];
    const T factor = inverse, least = Range<T>::least, most = Range<T>::most;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
      T exponent = of_row - in[j] * factor - base[j];
      T e = exp_of_nonpositive(exponent > most ? most : exponent);
      w[j] = exponent < least || sum[j] == 0 ? T(0) : e * over_mass / sum[j];
    }
  }
  // The same between a round's two steps, of its f and the g of before, which start_terms has seen.
  void weights_between(int64_t i, int64_t round, T* w) const {
    if (scalings) {
      const T *in = scratch.matrix + i * padded(m), *g = this->g(round - 1), of_row = f(round)[i];
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) w[j] = of_row * in[j] * g[j];
      return;
    }
    T base;
    const T sum = row_terms(i, w, &base), over_sum = sum == 0 ? without_partner(a[i]) : 1 / sum;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) w[j] = w[j] * over_sum / (is_tiny(b[j]) ? T(1) : b[j]);
  }
  static T over(T cost, T least) { return cost == T(INFINITY) ? T(0) : cost - least; }

  // The columns' sums of P are b, so that sum P C = sum P (C - least) + least sum b.
  T transport_value(int64_t round) const {
    T* w = scratch.row;
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      weights(i, round, w);
      const T *in = cost + i * m, from = least;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < m; ++j) sum += b[j] * w[j] * over(in[j], from);
      total += a[i] * sum;
    }
    return (T)(total + (double)least * sum_b);
  }

  // ---- derivatives of the value as these rounds found it

  void unroll(int64_t done) {
    T *grad_a = (T*)call.grad_a + problem * n, *grad_b = (T*)call.grad_b + problem * m;
    T *alpha_f = scratch.alpha_f, *alpha_g = scratch.alpha_g;
    ((T*)call.value)[problem] =
        call.entropic ? start_entropic(grad_a, grad_b) : start_transport(done, grad_a, grad_b);
    for (int64_t round = done; round > 0; --round) {
      T* sums = scratch.of_columns;
      for (int64_t j = 0; j < m; ++j) sums[j] = 0;
      if (!scalings) start_terms(g(round - 1));
      for (int64_t i = 0; i < n; ++i) unroll_row(i, round, grad_a, sums);
      for (int64_t j = 0; j < m; ++j) {
        grad_b[j] -= sums[j];
        alpha_g[j] = -b[j] * sums[j];
      }
      for (int64_t i = 0; i < n; ++i) alpha_f[i] = 0;
    }
  }
  // A round's column step, then its row step, in row i.
  void unroll_row(int64_t i, int64_t round, T* grad_a, T* sums) const {
    T *w = scratch.row, *before = scratch.before, *alpha_g = scratch.alpha_g;
    T* grad_cost = (T*)call.grad_cost + (problem * n + i) * m;
    weights(i, round, w);
    weights_between(i, round, before);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < m; ++j) sum += w[j] * alpha_g[j];
    grad_a[i] -= sum;
    const T alpha = scratch.alpha_f[i] - a[i] * sum, of_column = a[i] * inverse, of_row = alpha * inverse;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
      grad_cost[j] += of_column * w[j] * alpha_g[j] + of_row * b[j] * before[j];
      sums[j] += before[j] * alpha;
    }
  }
  T start_entropic(T* grad_a, T* grad_b) const {
    const T *f = (const T*)call.f + problem * n, *g = (const T*)call.g + problem * m;
    for (int64_t i = 0; i < n; ++i) grad_a[i] = f[i] + epsilon * sum_b, scratch.alpha_f[i] = epsilon * a[i];
    for (int64_t j = 0; j < m; ++j) grad_b[j] = g[j] - epsilon + epsilon * sum_a, scratch.alpha_g[j] = epsilon * b[j];
    memset((T*)call.grad_cost + problem * n * m, 0, n * m * sizeof(T));
    return entropic_value();
  }
  T start_transport(int64_t round, T* grad_a, T* grad_b) const {
    T* w = scratch.row;
    double total = 0;
    for (int64_t j = 0; j < m; ++j) grad_b[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      weights(i, round, w);
      const T *in = cost + i * m, of_row = a[i], factor = inverse, from = least;
      T *grad_cost = (T*)call.grad_cost + (problem * n + i) * m, sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < m; ++j) {
        T spent = w[j] * over(in[j], from), mass = of_row * b[j];
        sum += b[j] * spent;
        grad_b[j] += of_row * spent;
        grad_cost[j] = mass * (w[j] - spent * factor);
      }
      grad_a[i] = sum;
      scratch.alpha_f[i] = a[i] * sum;
      total += a[i] * sum;
    }
    for (int64_t j = 0; j < m; ++j) {
      scratch.alpha_g[j] = b[j] * grad_b[j];
      grad_b[j] += least;
    }
    return (T)(total + (double)least * sum_b);
  }
};

// ---- derivatives by formulas of the plan

// P; or, implicit, P (1 - (C - x - y) / epsilon), x and y, which solve
//
//     [diag(r) P; P^T diag(c)] [x; y] = [(P C) 1; (P C)^T 1],        r = P 1, c = P^T 1
//
// In y that is A y = c y - P^T (P y / r), by conjugate gradients preconditioned with diag(c), in double: rounding is
// divided by the distance of a Sinkhorn round's second eigenvalue from 1. A is singular for y = 1 only, to which the
// right side is orthogonal.
template <class T> struct PlanGradient {
  const PlanGradientCall& call;
  const int64_t problem, n, m;
  const T *cost, *a, *b, *f, *g;
  const T epsilon;
  double *shares, *x, *y, *c, *rhs, *residual, *direction, *image, *preconditioned;  // shares: b_j w_ij

  static int64_t numbers(int64_t n, int64_t m) { return n * padded(m) + padded(n) + 7 * padded(m); }

  PlanGradient(const PlanGradientCall& call, int64_t problem, double* scratch)
      : call(call),
        problem(problem),
        n(call.n),
        m(call.m),
        cost((const T*)call.cost + problem * n * m),
        a((const T*)call.a + problem * n),
        b((const T*)call.b + problem * m),
        f((const T*)call.f + problem * n),
        g((const T*)call.g + problem * m),
        epsilon(*(const T*)call.epsilon),
        shares(scratch),
        x(shares + n * padded(m)),
        y(x + padded(n)) {
    double** of_columns[] = {&c, &rhs, &residual, &direction, &image, &preconditioned};
    double* next = y + padded(m);
    for (double** vector : of_columns) *vector = next, next += padded(m);
  }
  // Of numbers of the columns, weighted by a row's shares; 0 for a row that has none.
  double mean(int64_t i, const double* of_columns) const {
    const double* in = shares + i * padded(m);
    double sum = 0, total = 0;
#pragma omp simd reduction(+ : sum, total)
    for (int64_t j = 0; j < m; ++j) sum += in[j] * of_columns[j], total += in[j];
    return total == 0 ? 0 : sum / total;
  }
  static double finite(T cost) { return cost == T(INFINITY) ? 0 : (double)cost; }

  T* out(const Numbers& numbers, int64_t width) const { return (T*)numbers + problem * width; }

  void weights(int64_t i, T* w) const {
    const T *in = cost + i * m, of_row = f[i], factor = 1 / epsilon, most = Range<T>::most;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
      T exponent = (of_row + g[j] - in[j]) * factor;
      w[j] = exp_of_nonpositive(exponent > most ? most : exponent);
    }
  }
  void envelope() const {
    for (int64_t i = 0; i < n; ++i) {
      T *w = out(call.grad_cost, n * m) + i * m, mass = a[i];
      weights(i, w);
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) w[j] = mass * b[j] * w[j];
    }
    memcpy(out(call.grad_a, n), f, n * sizeof(T));
    memcpy(out(call.grad_b, m), g, m * sizeof(T));
  }

  // image = A direction
  void apply() const {
    for (int64_t j = 0; j < m; ++j) image[j] = c[j] * direction[j];
    for (int64_t i = 0; i < n; ++i) {
      const double *in = shares + i * padded(m), factor = a[i] * mean(i, direction);
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) image[j] -= factor * in[j];
    }
  }
  double dot(const double* u, const double* v) const {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < m; ++j) sum += u[j] * v[j];
    return sum;
  }
  // The residual without its part along y = 1, which rounding brings, over c.
  double precondition() const {
    double sum = 0, mass = 0;
    for (int64_t j = 0; j < m; ++j) sum += residual[j], mass += c[j];
    const double shift = mass == 0 ? 0 : sum / mass;
    for (int64_t j = 0; j < m; ++j) {
      residual[j] -= c[j] * shift;
      preconditioned[j] = c[j] == 0 ? 0 : residual[j] / c[j];
    }
    return dot(residual, preconditioned);
  }
  void find_y() const {
    memcpy(residual, rhs, m * sizeof(double));
    memset(y, 0, m * sizeof(double));
    double norm = precondition();
    const double enough = norm * 1e-26;  // of squares
    memcpy(direction, preconditioned, m * sizeof(double));
    for (int64_t step = 0; step < 2 * m + 20 && norm > enough; ++step) {
      apply();
      const double curvature = dot(direction, image);
      if (!(curvature > 0)) break;
      const double length = norm / curvature;
      for (int64_t j = 0; j < m; ++j) y[j] += length * direction[j], residual[j] -= length * image[j];
      const double before = norm;
      norm = precondition();
      for (int64_t j = 0; j < m; ++j) direction[j] = preconditioned[j] + norm / before * direction[j];
    }
  }
  void implicit() {
    T* w = out(call.grad_cost, n * m);  // its first row holds a row of weights, until it is written
    for (int64_t j = 0; j < m; ++j) c[j] = rhs[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      double* in = shares + i * padded(m);
      const T* costs = cost + i * m;
      weights(i, w);
      double sum = 0, total = 0;
#pragma omp simd reduction(+ : sum, total)
      for (int64_t j = 0; j < m; ++j) {
        in[j] = (double)b[j] * w[j];
        sum += in[j] * finite(costs[j]), total += in[j];
      }
      x[i] = total == 0 ? 0 : sum / total;  // where y is 0
      const double mass = a[i], of_row = x[i];
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        c[j] += mass * in[j];
        rhs[j] += mass * in[j] * (finite(costs[j]) - of_row);
      }
    }
    find_y();
    for (int64_t i = 0; i < n; ++i) x[i] -= mean(i, y);
    find_y_without_mass(w);
    T *grad_cost = out(call.grad_cost, n * m), *grad_a = out(call.grad_a, n), *grad_b = out(call.grad_b, m);
    for (int64_t i = 0; i < n; ++i) {
      const double *in = shares + i * padded(m), mass = a[i], factor = 1 / (double)epsilon, of_row = x[i];
      const T* costs = cost + i * m;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j)
        grad_cost[i * m + j] = (T)(mass * in[j] * (1 - (finite(costs[j]) - of_row - y[j]) * factor));
      grad_a[i] = (T)of_row;
    }
    for (int64_t j = 0; j < m; ++j) grad_b[j] = (T)y[j];
  }
  // What the rows that would send it mass give it.
  void find_y_without_mass(T* w) const {
    bool any = false;
    for (int64_t j = 0; j < m; ++j) any |= b[j] == 0;
    if (!any) return;
    double *sum = image, *total = direction;
    for (int64_t j = 0; j < m; ++j) sum[j] = total[j] = 0;
    for (int64_t i = 0; i < n; ++i) {
      weights(i, w);
      for (int64_t j = 0; j < m; ++j) {
        sum[j] += (double)a[i] * w[j] * (finite(cost[i * m + j]) - x[i]);
        total[j] += (double)a[i] * w[j];
      }
    }
    for (int64_t j = 0; j < m; ++j)
      if (b[j] == 0) y[j] = total[j] == 0 ? 0 : sum[j] / total[j];
  }
};

template <class T> void all_plan_gradients(const PlanGradientCall& call) {
  double* scratch = (double*)(((uintptr_t)call.run.workspace + 63) / 64 * 64);
  const int64_t numbers = PlanGradient<T>::numbers(call.n, call.m);
  const int threads = threads_for(call.problems * call.n * call.m, call.run.threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t p = 0; p < call.problems; ++p) {
    PlanGradient<T> gradient(call, p, scratch + omp_get_thread_num() * numbers);
    if (call.implicit)
      gradient.implicit();
    else
      gradient.envelope();
  }
}

void plan_gradient(const PlanGradientCall& call) noexcept {
  by_type(call.run.fp64, [&](auto type) { all_plan_gradients<decltype(type)>(call); });
}
int64_t plan_gradient_bytes(const PlanGradientCall& call) noexcept {
  return 64 + call.run.threads * PlanGradient<double>::numbers(call.n, call.m) * 8;
}

// ---- calls

template <class T> void all_problems(const SinkhornCall& call) {
  const int threads = threads_for(call.problems * call.n * call.m * call.iterations, call.run.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<T> scratch = scratch_of<Scratch<T>>(call, omp_get_thread_num());
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < call.problems; ++p) Problem<T>(call, p, scratch).solve();
  }
}

void sinkhorn(const SinkhornCall& call) noexcept {
  by_type(call.run.fp64, [&](auto type) { all_problems<decltype(type)>(call); });
}

int64_t sinkhorn_bytes(const SinkhornCall& call) noexcept {
  return by_type(call.run.fp64, [&](auto type) { return workspace_bytes<Scratch<decltype(type)>>(call); });
}

}  // namespace KDK_ISA
}  // namespace kdk
