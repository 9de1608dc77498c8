// THE TABLE: every divergence as two pointwise functions of one class.
//
//     value(lp, lq, p, q)   phi, the class's share of the row's loss   L = sum phi
//     slope(lp, lq, p, q)   psi = d phi / d lq                         dL/ds = (psi - q * sum psi) / temperature
//
// lp, lq are the log-probabilities of teacher and student, p = exp(lp), q = exp(lq). phi is free up to c * (q - p)
// and psi up to c * q, since both cancel in the row; that freedom makes every term here vanish at p = q, which keeps
// its digits when the distributions are close. But lp and lq are rounded, so that a sum of phi is off by about 1e-7. A
// row whose divergence is small has a second set of lines, which take the log-ratio d itself, found from differences of
// logits, or in fp64, so that their error is relative to the term:
//
//     close_value(d, p, q), close_slope(d, p, q)     phi and psi for |d| < 2,  d = lq - lp
//
// They are optional: without them, and with `close_below` 0 in the catalogue, all rows have the first set.
//
// No loop, mask, softmax or device in this file, so that any C++ or CUDA compiler can take these lines. The includer
// provides KDK_HD and, as is cheap on its processor, exp_of(x), log_of(x), root_of(x, log x), the square root from
// either, and ratio(x, m) = x / m, which is 0 where m has underflowed together with x. It includes this file inside its
// own namespace (once per instruction set, so that no template is shared).
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

// ---- functions of the close lines, to full precision for small arguments. T is float.

// exp(x) - 1 - x
template <class T> KDK_HD T excess(T x) {
  T series = T(1.0 / 40320);
  series = series * x + T(1.0 / 5040);
  series = series * x + T(1.0 / 720);
  series = series * x + T(1.0 / 120);
  series = series * x + T(1.0 / 24);
  series = series * x + T(1.0 / 6);
  series = series * x + T(0.5);
  T near = x * x * series, far = exp_of(x) - 1 - x;
  return (x < T(0.5)) & (x > T(-0.5)) ? near : far;
}
// exp(x) - 1
template <class T> KDK_HD T expm1_of(T x) {
  T near = x + excess(x), far = exp_of(x) - 1;
  return (x < T(0.5)) & (x > T(-0.5)) ? near : far;
}
// x - log(1 + x) for x > -1, with the minimax polynomial of log_of in csrc/cpu/elementary.h.
template <class T> KDK_HD T excess_of_log1p(T x) {
  T y = T(-7.634506375e-2);
  y = y * x + T(1.276158839e-1);
  y = y * x - T(1.316018403e-1);
  y = y * x + T(1.420175582e-1);
  y = y * x - T(1.662335694e-1);
  y = y * x + T(2.000122666e-1);
  y = y * x - T(2.500081956e-1);
  y = y * x + T(3.333333135e-1);
  T near = x * x * (T(0.5) - x * y), far = x - log_of(1 + x);
  return (x < T(0.4)) & (x > T(-0.29)) ? near : far;
}
// log(1 + x) for x > -1
template <class T> KDK_HD T log1p_of(T x) {
  T near = x - excess_of_log1p(x), far = log_of(1 + x);
  return (x < T(0.4)) & (x > T(-0.29)) ? near : far;
}

// ---- the entries

// KL(p || q) = sum p log(p / q)
template <class T> struct Kl {
  KDK_HD explicit Kl(const T*) {}
  KDK_HD T value(T lp, T lq, T p, T q) const { return weighted(p, lp - lq) - p + q; }
  KDK_HD T slope(T, T, T p, T q) const { return q - p; }
  KDK_HD T close_value(T d, T p, T) const { return p * excess(d); }
  KDK_HD T close_slope(T d, T p, T) const { return p * expm1_of(d); }
};

// KL(q || p) = sum q log(q / p)
template <class T> struct ReverseKl {
  KDK_HD explicit ReverseKl(const T*) {}
  KDK_HD T value(T lp, T lq, T p, T q) const { return weighted(q, lq - lp) - q + p; }
  KDK_HD T slope(T lp, T lq, T, T q) const { return weighted(q, lq - lp); }
  KDK_HD T close_value(T d, T, T q) const { return q * excess(-d); }
  KDK_HD T close_slope(T d, T, T q) const { return q * d; }
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
  KDK_HD T close_value(T d, T p, T q) const { return weight * p * excess(d) + (1 - weight) * q * excess(-d); }
  KDK_HD T close_slope(T d, T p, T q) const { return weight * p * expm1_of(d) + (1 - weight) * q * d; }
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
  // m / p - 1 = (1 - beta) (exp(d) - 1),  m / q - 1 = beta (exp(-d) - 1)
  KDK_HD T close_value(T d, T p, T q) const {
    return beta * p * excess_of_log1p((1 - beta) * expm1_of(d)) +
           (1 - beta) * q * excess_of_log1p(beta * expm1_of(-d));
  }
  KDK_HD T close_slope(T d, T, T q) const { return (beta - 1) * q * log1p_of(beta * expm1_of(-d)); }
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
  // x = m / p - 1
  KDK_HD T close_value(T d, T p, T) const { return p * excess_of_log1p((1 - alpha) * expm1_of(d)); }
  KDK_HD T close_slope(T d, T, T q) const {
    T x = (1 - alpha) * expm1_of(d);
    return (1 - alpha) * q * ratio(x, 1 + x);
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
  // x = m / q - 1
  KDK_HD T close_value(T d, T, T q) const { return q * excess_of_log1p((1 - alpha) * expm1_of(-d)); }
  KDK_HD T close_slope(T d, T, T q) const {
    T x = (1 - alpha) * expm1_of(-d);
    return q * (alpha * ratio(x, 1 + x) - log1p_of(x));
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
  KDK_HD T close_value(T d, T p, T) const {
    T x = expm1_of(d);
    return T(0.5) * p * (x < 0 ? -x : x);
  }
  KDK_HD T close_slope(T d, T, T q) const { return d == 0 ? T(0) : d > 0 ? T(0.5) * q : T(-0.5) * q; }
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
  KDK_HD T close_value(T d, T p, T) const {
    T x = expm1_of(T(0.5) * d);
    return T(0.5) * p * x * x;
  }
  KDK_HD T close_slope(T d, T, T q) const { return T(-0.5) * q * expm1_of(T(-0.5) * d); }
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
  // The two forms are equal. The first cancels near alpha = 1, the second near alpha = 0.
  KDK_HD T close_value(T d, T p, T q) const {
    T of_student = q * (excess(-alpha * d) - alpha * excess(-d));
    T of_teacher = p * (excess((1 - alpha) * d) - (1 - alpha) * excess(d));
    return (alpha < T(0.5) ? of_student : of_teacher) * value_scale;
  }
  KDK_HD T close_slope(T d, T, T q) const { return -q * expm1_of(-alpha * d) * slope_scale; }
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
  KDK_HD T close_value(T d, T, T q) const {
    T x = expm1_of(-d);
    return q * x * x;
  }
  KDK_HD T close_slope(T d, T, T q) const { return -q * expm1_of(-2 * d); }
};

// Where sum psi follows without a sweep of its own: it is 0, or a function slope_sum of E_q[lq - lp], which the sweep
// for the normalisers can carry along. Optional: a divergence that is not named here has its slopes summed.
enum class SlopeSum { swept, zero, from_log_ratio };
template <class D> constexpr SlopeSum slope_sum_of = SlopeSum::swept;
template <class T> constexpr SlopeSum slope_sum_of<Kl<T>> = SlopeSum::zero;
template <class T> constexpr SlopeSum slope_sum_of<ReverseKl<T>> = SlopeSum::from_log_ratio;
template <class T> constexpr SlopeSum slope_sum_of<MixedKl<T>> = SlopeSum::from_log_ratio;

// Whether the value has a kink at p = q.
template <class D> constexpr bool has_kink = false;
template <class T> constexpr bool has_kink<Tv<T>> = true;

// ---- close rows
//
// The log-ratio is d = ((s - t) - (s_max - t_max)) / temperature - shift, in which shift is the difference of the
// log-sums. The rounding of the log-sums makes d wrong by one number in all classes, epsilon, which may be as large as d
// itself. The sum of p (exp(d) - 1), which would be 0, measures it. Since psi is the derivative of phi, and sum psi is
// about 0 at epsilon = 0, the value is sum phi - epsilon sum psi / 2, and psi - q sum psi needs no correction: both are
// off by epsilon relative to themselves. A value with a kink (tv) is not; its row is swept once for epsilon, and again
// with shift + epsilon.

// The log-ratio of a class.
template <class T> struct LogRatio {
  T offset, shift, inverse_temperature;

  // s_max - t_max is rounded; the rest of the difference goes into the shift.
  KDK_HD LogRatio(T s_max, T t_max, T inverse_temperature, T shift)
      : offset(s_max - t_max), shift(shift), inverse_temperature(inverse_temperature) {}
  // The shift of a row, before a correction.
  static KDK_HD T first_shift(T s_max, T s_log_sum, T t_max, T t_log_sum, T inverse_temperature) {
    return (s_log_sum - t_log_sum) + rest(s_max, t_max) * inverse_temperature;
  }
  // (a - b) minus the rounded a - b (Knuth).
  static KDK_HD T rest(T a, T b) {
    T difference = a - b, of_b = difference - a;
    return (a - (difference - of_b)) - (b + of_b);
  }
  // NaN if a logit is infinite.
  KDK_HD T operator()(T s, T t) const { return ((s - t - offset) + rest(s, t)) * inverse_temperature - shift; }
};

template <class> using Void = void;
template <class D, class = void> constexpr bool has_close_lines = false;
template <class D> constexpr bool has_close_lines<D, Void<decltype(&D::close_value)>> = true;

// phi, psi and p (exp(d) - 1) of one class of a close row. The lines for all rows serve where d is not near 0, and where
// a power of a large |alpha| overflows: they find it in log space.
template <class T> struct CloseTerms {
  T phi, psi, excess;
};
template <class T, class D> KDK_HD CloseTerms<T> close_terms(const D& divergence, T d, T lp, T lq, T p, T q) {
  const bool near = (d < T(2)) & (d > T(-2));
  T phi = divergence.value(lp, lq, p, q), psi = divergence.slope(lp, lq, p, q);
  if constexpr (has_close_lines<D>) {
    T close_phi = divergence.close_value(d, p, q), close_psi = divergence.close_slope(d, p, q);
    const T not_finite = (close_phi - close_phi) + (close_psi - close_psi);  // 0, or NaN
    const bool serves = near & (not_finite == 0);
    phi = serves ? close_phi : phi;
    psi = serves ? close_psi : psi;
  }
  T change = p * expm1_of(d), difference = q - p;
  return {phi, psi, near ? change : difference};
}
// The value of a row from the sum of phi. An infinite value stays.
template <class T> KDK_HD T close_sum(T phi, T psi, T epsilon) {
  T corrected = phi - T(0.5) * epsilon * psi;
  return phi < T(INFINITY) ? corrected : phi;
}

// ---- close rows of a sparse teacher
//
// The teacher's log-probabilities are given, and their mass need not be 1: no sum measures the rounding of the student's
// log-sum. And the bucket's log-ratio takes its own sum of exponentials, to more digits than fp32 has. So a close row
// finds the student's log-sums and the log-ratios in fp64, from the logits:
//
//     d = (s - s_max) / temperature - log_sum - lp                 of an entry
//     d = log(others / all) - lp_R                                 of the bucket, which is the class of all others
//
// others and all are sums of exponentials in fp64. The differences cancel, but 1e-15 is all that they are off then, and
// rounding d to fp32 is relative to d. The lines above take d, and their sums need no correction.

struct CloseStudent {
  double max, log_sum, inverse_temperature;

  // log_prob is the teacher's, and rounding the part of it that fp32 does not hold.
  KDK_HD float log_ratio(float logit, float log_prob, float rounding) const {
    return (float)((logit - max) * inverse_temperature - log_sum - log_prob - rounding);
  }
  // The sums are relative to the maximum of all classes. -inf if the bucket has no mass.
  static KDK_HD float log_ratio_of_bucket(double others, double all, float log_prob, float rounding) {
    return (float)(::log(others / all) - log_prob - rounding);
  }
};
// phi without c (q - p), which its line has more than the formula. In a class without teacher mass the rest of some
// formulas is 0, and only rounding would be left.
template <class T> KDK_HD T without_slack(T slack, const CloseTerms<T>& x) {
  const T rest = x.phi - slack * x.excess, size = rest < 0 ? -rest : rest, before = x.phi < 0 ? -x.phi : x.phi;
  return size < T(1e-6) * before ? T(0) : rest;
}

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
