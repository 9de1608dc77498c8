// The two domains of Sinkhorn's iterations on a CPU: the twin of csrc/cuda/sinkhorn_domains.h. Included by sinkhorn.cpp
// inside a namespace per instruction set.
//
//     Scalings     the vectors of a round are exp((f - min C) / epsilon) and exp(g / epsilon); the matrix
//                  exp((min C - C) / epsilon) is stored once, and a half step is a product of that matrix and a vector
//     Logarithms   the vectors of a round are f / epsilon and g / epsilon, and a half step is a log-sum-exp of each row
//                  or column

// scalings: the largest (max C - min C) / epsilon in the domain of scalings. Scalings, and their products with entries
// of the matrix, lie within exp(+-2 scalings).
// least, most: an exponential is 0 below the exponent `least`, and an exponent is clamped at `most`. Relative to a term
// of exponent 0 the terms below `least` do not count, and their products would be subnormal: a hundred cycles each.
// tiny: the logarithm of a smaller mass would move the exponents of its terms below `least`.
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
  int64_t rounds;           // stored rounds: all for derivatives, else the last two
  T* matrix;                // [n, padded m]
  T *f, *g;                 // [rounds]: the vectors of a round
  T *base, *sum;            // [rounds]: maximum and sum of each column's log-sum-exp
  T *of_rows, *of_columns, *alpha_f, *alpha_g, *row, *before, *exponents, *exponents_with_mass, *share;
  T *log_a, *log_b;         // 0 for a point without mass

  Scratch(const SinkhornCall& call, Arena& arena) : rounds(call.unrolled ? call.iterations + 2 : 2) {
    const int64_t n = padded(call.n), m = padded(call.m);
    auto take = [&](int64_t count) { return arena.take<T>(count); };
    matrix = take(call.n * m);
    f = take(rounds * n), g = take(rounds * m), base = take(rounds * m), sum = take(rounds * m);
    of_rows = take(n), alpha_f = take(n), log_a = take(n);
    of_columns = take(m), alpha_g = take(m), row = take(m), before = take(m);
    log_b = take(m), exponents = take(m), exponents_with_mass = take(m), share = take(m);
  }
};

// A problem, and the vectors of its rounds.
template <class T> struct Data {
  const SinkhornCall& call;
  const int64_t problem, n, m;
  const T *cost, *a, *b;
  const T epsilon, inverse;
  Scratch<T>& scratch;
  T least;        // min C: sums that would cancel otherwise take C - min C
  T sum_a, sum_b;
  bool scalings;  // the domain

  Data(const SinkhornCall& call, int64_t problem, Scratch<T>& scratch)
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
    // Masses of a smaller or larger sum have scalings that leave the range.
    scalings = (greatest - least) * inverse <= Range<T>::scalings && sum_a >= T(1e-6) && sum_a <= T(1e9);
  }

  static T total(const T* x, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += x[i];
    return (T)sum;
  }
  T* f(int64_t round) const { return scratch.f + round % scratch.rounds * padded(n); }
  T* g(int64_t round) const { return scratch.g + round % scratch.rounds * padded(m); }
  T* base(int64_t round) const { return scratch.base + round % scratch.rounds * padded(m); }
  T* sum(int64_t round) const { return scratch.sum + round % scratch.rounds * padded(m); }
};

// Both domains have the same members:
//
//     first                      an element of g's vector for the potential 0
//     row_step, column_step      (1) and (2), for the vectors of a round
//     ratio                      exp((f - next f) / epsilon), from elements of the vectors
//     potential_f, potential_g   f and g, from elements of the vectors
//     weights                    row i of w in (R2): f and g of the round
//     weights_between            row i of w in (R3): f of the round, g before it; after begin_weights_between(round)

template <class T> struct Scalings : Data<T> {
  static constexpr T first = 1;
  using Data<T>::n, Data<T>::m, Data<T>::cost, Data<T>::a, Data<T>::b, Data<T>::epsilon, Data<T>::inverse;
  using Data<T>::scratch, Data<T>::least;

  explicit Scalings(const Data<T>& data) : Data<T>(data) {
    for (int64_t i = 0; i < n; ++i) {
      T* out = scratch.matrix + i * padded(m);
      const T *in = cost + i * m, base = least, factor = inverse;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) out[j] = exp_of_nonpositive((base - in[j]) * factor);
    }
  }
  void row_step(int64_t round) const {
    const T* g = this->g(round - 1);
    T *f = this->f(round), *x = scratch.row;
    for (int64_t j = 0; j < m; ++j) x[j] = b[j] * g[j];
    product(scratch.matrix, n, m, x, f);
    for (int64_t i = 0; i < n; ++i) f[i] = 1 / f[i];
  }
  void column_step(int64_t round) const {
    const T* f = this->f(round);
    T *g = this->g(round), *y = scratch.of_rows;
    for (int64_t i = 0; i < n; ++i) y[i] = a[i] * f[i];
    transposed_product(scratch.matrix, n, m, y, g);
    for (int64_t j = 0; j < m; ++j) g[j] = 1 / g[j];
  }
  static T ratio(T f, T next) { return f / next; }
  T potential_f(T f) const { return epsilon * ::log(f) + least; }
  T potential_g(T g) const { return epsilon * ::log(g); }

  void weights(int64_t i, int64_t round, T* w) const { products(i, this->f(round)[i], this->g(round), w); }
  void begin_weights_between(int64_t) const {}
  void weights_between(int64_t i, int64_t round, T* w) const {
    products(i, this->f(round)[i], this->g(round - 1), w);
  }
  void products(int64_t i, T of_row, const T* g, T* w) const {
    const T* in = scratch.matrix + i * padded(m);
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) w[j] = of_row * in[j] * g[j];
  }
};

// A logarithm in fp32 is rounded relative to its size, which is the size of C / epsilon, and every round would pass the
// rounding on. The terms of a step's sum, divided by the sum, do not have this error, so that w is computed from them.
template <class T> struct Logarithms : Data<T> {
  static constexpr T first = 0;
  using Data<T>::n, Data<T>::m, Data<T>::cost, Data<T>::a, Data<T>::b, Data<T>::epsilon, Data<T>::inverse;
  using Data<T>::scratch;

  explicit Logarithms(const Data<T>& data) : Data<T>(data) {
    for (int64_t i = 0; i < n; ++i) scratch.log_a[i] = a[i] == 0 ? T(0) : ::log(a[i]);
    for (int64_t j = 0; j < m; ++j) scratch.log_b[j] = b[j] == 0 ? T(0) : ::log(b[j]);
  }

  // The potential of a point that has no partner with mass.
  static T without_partner(T mass) { return mass == 0 ? T(0) : T(NAN); }
  static bool is_tiny(T mass) { return mass < Range<T>::tiny; }  // or 0
  // The exponents of terms: potentials and logarithms of masses; -inf for a point without mass.
  static void with_mass(const T* potentials, const T* mass, const T* log_mass, int64_t count, T* x) {
    for (int64_t i = 0; i < count; ++i) x[i] = mass[i] == 0 ? T(-INFINITY) : potentials[i] + log_mass[i];
  }

  void row_step(int64_t round) const {
    T* f = this->f(round);
    begin_terms(this->g(round - 1));
    for (int64_t i = 0; i < n; ++i) {
      T base;
      const T sum = row_terms(i, scratch.before, &base);
      f[i] = sum == 0 ? without_partner(a[i]) : -(base + ::log(sum));
    }
  }
  // Prepares the sums of rows over columns with potentials g. A tiny mass is left out of its term's exponent, and is a
  // factor of the term in sums: the term itself stays a number for the derivative with respect to the mass.
  void begin_terms(const T* g) const {
    with_mass(g, b, scratch.log_b, m, scratch.exponents_with_mass);
    for (int64_t j = 0; j < m; ++j) {
      scratch.exponents[j] = is_tiny(b[j]) ? g[j] : scratch.exponents_with_mass[j];
      scratch.share[j] = is_tiny(b[j]) ? b[j] : T(1);
    }
  }
  // The terms b_j exp(g_j - C_ij / epsilon - base) of a row's sum, without b_j where it is tiny; base is the largest
  // exponent of a point with mass. Returns the sum.
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
      T e = exp_of_nonpositive(exponent > most ? most : exponent);  // right for exponents up to `most`
      e = exponent < least ? T(0) : e;
      terms[j] = e;
      sum += share[j] * e;
    }
    *base = shift;
    return sum;
  }
  void column_step(int64_t round) const {
    const T* f = this->f(round);
    T *g = this->g(round), *y = scratch.of_rows, *base = this->base(round), *sum = this->sum(round);
    with_mass(f, a, scratch.log_a, n, y);
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
  static T ratio(T f, T next) { return (T)::exp((double)f - next); }
  T potential_f(T f) const { return epsilon * f; }
  T potential_g(T g) const { return epsilon * g; }

  // From the terms of (2).
  void weights(int64_t i, int64_t round, T* w) const {
    const T *in = cost + i * m, *base = this->base(round), *sum = this->sum(round);
    const T of_row = this->f(round)[i] + (is_tiny(a[i]) ? T(0) : scratch.log_a[i]);
    const T over_mass = is_tiny(a[i]) ? T(1) : 1 / a[i];
    const T factor = inverse, least = Range<T>::least, most = Range<T>::most;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
      T exponent = of_row - in[j] * factor - base[j];
      T e = exp_of_nonpositive(exponent > most ? most : exponent);
      w[j] = exponent < least || sum[j] == 0 ? T(0) : e * over_mass / sum[j];
    }
  }
  // From the terms of (1).
  void begin_weights_between(int64_t round) const { begin_terms(this->g(round - 1)); }
  void weights_between(int64_t i, int64_t, T* w) const {
    T base;
    const T sum = row_terms(i, w, &base), over_sum = sum == 0 ? without_partner(a[i]) : 1 / sum;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) w[j] = w[j] * over_sum / (is_tiny(b[j]) ? T(1) : b[j]);
  }
};
