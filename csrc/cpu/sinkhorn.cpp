// Sinkhorn's iterations on a CPU: a thread works on a problem at a time. calls/sinkhorn.h has the formulas and their
// numbers.
//
// A problem is solved in one of two domains (sinkhorn_domains.h): in scalings where costs differ little relative to
// epsilon, and elsewhere in logarithms, because scalings would overflow. The reverse sweep computes
// w_ij = exp((f_i + g_j - C_ij) / epsilon) again, row by row, from the stored vectors of each round.
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
#include "sinkhorn_domains.h"
#include "plan_gradient.h"

// ---- one problem

template <class T, template <class> class Domain> struct Problem : Domain<T> {
  using Data<T>::call, Data<T>::problem, Data<T>::n, Data<T>::m, Data<T>::cost, Data<T>::a, Data<T>::b;
  using Data<T>::epsilon, Data<T>::inverse, Data<T>::scratch, Data<T>::least, Data<T>::sum_a, Data<T>::sum_b;
  using Data<T>::f, Data<T>::g, Domain<T>::weights;

  explicit Problem(const Data<T>& data) : Domain<T>(data) {}

  // The rounds: (1) and (2) until (3) ends them. (3) needs the f of the next round.
  void solve() {
    const T tolerance = *(const T*)call.tolerance;
    for (int64_t j = 0; j < m; ++j) g(0)[j] = Domain<T>::first;
    int64_t done = 0;
    T error = 0;
    for (;; ++done) {
      this->row_step(done + 1);
      if (done > 0) error = this->error(f(done), f(done + 1));
      if (done == call.iterations || (done > 0 && tolerance > 0 && error <= tolerance)) break;
      this->column_step(done + 1);
    }
    ((T*)call.error)[problem] = error;
    call.done[problem] = (int32_t)done;
    write_potentials(f(done), g(done));
    if (call.unrolled)
      unroll(done);
    else
      ((T*)call.value)[problem] = call.entropic ? entropic_value() : transport_value(done);
  }
  // (3)
  T error(const T* f, const T* next) const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i)
      if (a[i] != 0) total += ::fabs(a[i] * Domain<T>::ratio(f[i], next[i]) - a[i]);
    return sum_a == 0 ? T(0) : (T)(total / sum_a);
  }
  void write_potentials(const T* f, const T* g) const {
    T *of_rows = (T*)call.f + problem * n, *of_columns = (T*)call.g + problem * m;
    for (int64_t i = 0; i < n; ++i) of_rows[i] = this->potential_f(f[i]);
    for (int64_t j = 0; j < m; ++j) of_columns[j] = this->potential_g(g[j]);
  }
  // (4)
  T entropic_value() const {
    const T *f = (const T*)call.f + problem * n, *g = (const T*)call.g + problem * m;
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += a[i] * f[i];
    for (int64_t j = 0; j < m; ++j) total += b[j] * g[j];
    return (T)(total - epsilon * ((double)sum_b - (double)sum_a * sum_b));
  }
  static T over(T cost, T least) { return cost == T(INFINITY) ? T(0) : cost - least; }

  // (4): the columns of P add up to b, so that sum P C = sum P (C - least) + least sum b.
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

  // ---- the derivatives of the value: (R1), then (R2) and (R3) of each round

  void unroll(int64_t done) {
    T *grad_a = (T*)call.grad_a + problem * n, *grad_b = (T*)call.grad_b + problem * m;
    T *alpha_f = scratch.alpha_f, *alpha_g = scratch.alpha_g;
    ((T*)call.value)[problem] =
        call.entropic ? start_entropic(grad_a, grad_b) : start_transport(done, grad_a, grad_b);
    for (int64_t round = done; round > 0; --round) {
      T* sums = scratch.of_columns;
      for (int64_t j = 0; j < m; ++j) sums[j] = 0;
      this->begin_weights_between(round);
      for (int64_t i = 0; i < n; ++i) unroll_row(i, round, grad_a, sums);
      for (int64_t j = 0; j < m; ++j) {
        grad_b[j] -= sums[j];
        alpha_g[j] = -b[j] * sums[j];
      }
      for (int64_t i = 0; i < n; ++i) alpha_f[i] = 0;
    }
  }
  // (R2), then (R3), in row i; adds the row's part of (R3)'s s_j to sums.
  void unroll_row(int64_t i, int64_t round, T* grad_a, T* sums) const {
    T *w = scratch.row, *before = scratch.before, *alpha_g = scratch.alpha_g;
    T* grad_cost = (T*)call.grad_cost + (problem * n + i) * m;
    weights(i, round, w);
    this->weights_between(i, round, before);
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
  // (R1); both return the value.
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

// ---- calls

template <class T> void all_problems(const SinkhornCall& call) {
  const int threads = threads_for(call.problems * call.n * call.m * call.iterations, call.run.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<T> scratch = scratch_of<Scratch<T>>(call, omp_get_thread_num());
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < call.problems; ++p) {
      const Data<T> data(call, p, scratch);
      if (data.scalings)
        Problem<T, Scalings>(data).solve();
      else
        Problem<T, Logarithms>(data).solve();
    }
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
