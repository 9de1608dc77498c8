// Derivatives of Sinkhorn problems by formulas of the plan: (P1) and (P2) of calls/sinkhorn.h. Included by sinkhorn.cpp
// inside a namespace per instruction set.

// (P1) envelope: P, f and g. (P2) implicit: P (1 - (C - x - y) / epsilon), x and y. The system of (P2), with x taken
// out, is
//
//     A y = c y - P^T (P y / r) = (P C)^T 1 - P^T ((P C) 1 / r)
//
// It is solved by conjugate gradients preconditioned with diag(c), in double, because rounding is divided by the
// distance of a Sinkhorn round's second eigenvalue from 1. A is singular for y = 1 alone, and the right side is
// orthogonal to y = 1.
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
  // The mean of numbers of the columns, weighted by the shares of row i; 0 for a row without shares.
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
  // (P1)
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

  // image = A direction.
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
  // Removes the residual's part along y = 1, which rounding adds, and divides the residual by c.
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
    const double enough = norm * 1e-26;  // a norm is a sum of squares
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
  // (P2)
  void implicit() {
    T* w = out(call.grad_cost, n * m);  // the first row of grad_cost holds a row of weights until it is written
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
      x[i] = total == 0 ? 0 : sum / total;  // x for y = 0
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
  // Column j without mass: y_j is the mean of C_ij - x_i over the rows, weighted by the mass that they would send it.
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
