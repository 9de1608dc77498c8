// THE TABLE: every divergence as two pointwise functions of one class.
//
//     value(lp, lq, p, q)   phi, the class's share of the row's loss   L = sum phi
//     slope(lp, lq, p, q)   psi = d phi / d lq                         dL/ds = (psi - q * sum psi) / temperature
//
// lp, lq are the log-probabilities of teacher and student, p = exp(lp), q = exp(lq). phi is free up to c * (q - p)
// and psi up to c * q, since both cancel in the row; that freedom makes every term here vanish at p = q, which keeps
// its digits when the distributions are close. No loop, mask, softmax or device in this file, so that any C++ or CUDA
// compiler can take these lines. The includer provides KDK_HD and, as is cheap on its processor, exp_of(x), log_of(x),
// root_of(x, log x), the square root from either, and ratio(x, m) = x / m, which is 0 where m has underflowed together
// with x. It includes this file inside its own namespace (once per instruction set, so that no template is shared).
//
// To add a divergence: a struct, a line in KDK_DIVERGENCES, and its twins in kdkernels/divergences.py,
// kdkernels/backends/reference/table.py and kdkernels/backends/triton/table.py.

// 0 * log 0 = 0: a term of probability exactly 0 is dropped before the product. (NaN == 0 is false, so NaN stays.)
template <class T> KDK_HD T weighted(T weight, T x) { return weight == T(0) ? T(0) : weight * x; }

// weight * p + (1 - weight) * q, from the side of larger weight: exactly p where p = q, whatever weight rounds to.
template <class T> KDK_HD T mixture(T weight, T p, T q) {
  T difference = p - q;
  return weight < T(0.5) ? q + weight * difference : p - (1 - weight) * difference;
}

// KL(p || q) = sum p log(p / q)
template <class T> struct Kl {
  KDK_HD explicit Kl(const T*) {}
  KDK_HD T value(T lp, T lq, T p, T q) const { return weighted(p, lp - lq) - p + q; }
  KDK_HD T slope(T, T, T p, T q) const { return q - p; }
};

// KL(q || p) = sum q log(q / p)
template <class T> struct ReverseKl {
  KDK_HD explicit ReverseKl(const T*) {}
  KDK_HD T value(T lp, T lq, T p, T q) const { return weighted(q, lq - lp) - q + p; }
  KDK_HD T slope(T lp, T lq, T, T q) const { return weighted(q, lq - lp); }
  KDK_HD T slope_sum(T mean_log_ratio) const { return mean_log_ratio; }
};

// weight * KL(p || q) + (1 - weight) * KL(q || p)
template <class T> struct MixedKl {
  T weight;
  KDK_HD explicit MixedKl(const T* parameters) : weight(parameters[0]) {}
  KDK_HD T value(T lp, T lq, T p, T q) const {
    return weighted(weight * p, lp - lq) + weighted((1 - weight) * q, lq - lp) + (2 * weight - 1) * (q - p);
  }
  KDK_HD T slope(T lp, T lq, T p, T q) const { return weight * (q - p) + weighted((1 - weight) * q, lq - lp); }
  KDK_HD T slope_sum(T mean_log_ratio) const { return weighted(1 - weight, mean_log_ratio); }
};

// beta * KL(p || m) + (1 - beta) * KL(q || m),  m = beta * p + (1 - beta) * q
template <class T> struct Js {
  T beta;
  KDK_HD explicit Js(const T* parameters) : beta(parameters[0]) {}
  KDK_HD T value(T lp, T lq, T p, T q) const {
    T lm = log_of(mixture(beta, p, q));
    return weighted(beta * p, lp - lm) + weighted((1 - beta) * q, lq - lm);
  }
  KDK_HD T slope(T, T lq, T p, T q) const { return weighted((1 - beta) * q, lq - log_of(mixture(beta, p, q))); }
};

// KL(p || m),  m = alpha * p + (1 - alpha) * q
template <class T> struct SkewKl {
  T alpha;
  KDK_HD explicit SkewKl(const T* parameters) : alpha(parameters[0]) {}
  KDK_HD T value(T lp, T, T p, T q) const {
    return weighted(p, lp - log_of(mixture(alpha, p, q))) + (1 - alpha) * (q - p);
  }
  KDK_HD T slope(T, T, T p, T q) const {
    return (1 - alpha) * (1 - alpha) * (q - p) * ratio(q, mixture(alpha, p, q));
  }
};

// KL(q || m),  m = (1 - alpha) * p + alpha * q
template <class T> struct SkewReverseKl {
  T alpha;
  KDK_HD explicit SkewReverseKl(const T* parameters) : alpha(parameters[0]) {}
  KDK_HD T value(T, T lq, T p, T q) const {
    return weighted(q, lq - log_of(mixture(alpha, q, p))) + (1 - alpha) * (p - q);
  }
  KDK_HD T slope(T, T lq, T p, T q) const {
    T m = mixture(alpha, q, p);
    return weighted(q, lq - log_of(m)) + alpha * (1 - alpha) * (p - q) * ratio(q, m);
  }
};

// sum |p - q| / 2, slope 0 where p = q
template <class T> struct Tv {
  KDK_HD explicit Tv(const T*) {}
  KDK_HD T value(T, T, T p, T q) const { return T(0.5) * (p > q ? p - q : q - p); }
  KDK_HD T slope(T, T, T p, T q) const {
    T signed_q = q > p ? q : -q;
    return q == p ? T(0) : T(0.5) * signed_q + (p - p);  // p - p is NaN where p is
  }
};

// sum (sqrt p - sqrt q)^2 / 2
template <class T> struct Hellinger {
  KDK_HD explicit Hellinger(const T*) {}
  KDK_HD T value(T lp, T lq, T p, T q) const {
    T difference = root_of(p, lp) - root_of(q, lq);
    return T(0.5) * difference * difference;
  }
  KDK_HD T slope(T lp, T lq, T p, T q) const {
    T root = root_of(q, lq);
    return T(0.5) * root * (root - root_of(p, lp));
  }
};

// (sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1)).  The power is taken in log space: p and q may both have
// underflowed where it has not.
template <class T> struct Alpha {
  T alpha, value_scale, slope_scale;
  KDK_HD explicit Alpha(const T* parameters)
      : alpha(parameters[0]), value_scale(1 / (alpha * (alpha - 1))), slope_scale(1 / alpha) {}
  KDK_HD T power(T lp, T lq, T p) const {
    T d = lp - lq;
    T exponent = d == T(INFINITY) ? (alpha - 1) * d : lq + alpha * d;  // d is +inf where lq alone is -inf
    T power = exp_of(exponent);
    return lp == lq ? p : power;
  }
  KDK_HD T value(T lp, T lq, T p, T q) const {
    T d = p - q, r = power(lp, lq, p);
    return (alpha < T(0.5) ? r - q - alpha * d : r - p + (1 - alpha) * d) * value_scale;
  }
  KDK_HD T slope(T lp, T lq, T p, T q) const { return (q - power(lp, lq, p)) * slope_scale; }
};

// sum (p - q)^2 / q.  Where q may have underflowed, p^2 / q is found in log space: it may be of any size.
template <class T> struct ChiSquare {
  KDK_HD explicit ChiSquare(const T*) {}
  KDK_HD bool is_normal(T lq) const { return lq > T(-87); }  // of q in fp32, and so in fp64
  KDK_HD T power(T lp, T lq, T p) const {
    T power = exp_of(lp + (lp - lq));
    return lp == lq ? p : power;  // also where both are -inf
  }
  KDK_HD T value(T lp, T lq, T p, T q) const {
    T d = p - q, direct = d * ratio(d, q);
    T far = power(lp, lq, p) - p - d;
    return is_normal(lq) ? direct : far;
  }
  KDK_HD T slope(T lp, T lq, T p, T q) const {
    T direct = (q - p) * ratio(p + q, q);
    T far = q - power(lp, lq, p);
    return is_normal(lq) ? direct : far;
  }
};

// Where sum psi follows without a sweep of its own: it is 0, or a function slope_sum of E_q[lq - lp], which the sweep
// for the normalisers can carry along. Optional: a divergence that is not named here has its slopes summed.
enum class SlopeSum { swept, zero, from_log_ratio };
template <class D> constexpr SlopeSum slope_sum_of = SlopeSum::swept;
template <class T> constexpr SlopeSum slope_sum_of<Kl<T>> = SlopeSum::zero;
template <class T> constexpr SlopeSum slope_sum_of<ReverseKl<T>> = SlopeSum::from_log_ratio;
template <class T> constexpr SlopeSum slope_sum_of<MixedKl<T>> = SlopeSum::from_log_ratio;

// The list: name in kdkernels/divergences.py, struct.
#define KDK_DIVERGENCES(X) \
  X(kl, Kl)                \
  X(reverse_kl, ReverseKl) \
  X(mixed_kl, MixedKl)     \
  X(js, Js)                \
  X(skew_kl, SkewKl)       \
  X(skew_reverse_kl, SkewReverseKl) \
  X(tv, Tv)                \
  X(hellinger, Hellinger)  \
  X(alpha, Alpha)          \
  X(chi_square, ChiSquare)

// Calls body with the divergence of that index.
template <class T, class Body> KDK_HD void with_divergence(int index, const T* parameters, Body body) {
  int number = 0;
#define KDK_CASE(key, Struct) \
  if (index == number++) return body(Struct<T>(parameters));
  KDK_DIVERGENCES(KDK_CASE)
#undef KDK_CASE
}
