// exp, log, square root, ratio and tanh as straight-line code that a compiler turns into packed instructions, and the
// conversions of 16-bit floats. Included inside a namespace per instruction set: the namespaces may share no code.
//
// fp64 calls the C library, because callers use fp64 for exactness and not for speed.

static inline float bits_to_float(uint32_t bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; __builtin_memcpy(&bits, &x, 4); return bits; }

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, with exp(r) from a minimax polynomial of degree 6
// (relative error 3e-9, so that fp32 rounding dominates). Rounding adds and subtracts 1.5 * 2^23, which leaves n in the
// low bits of the sum. NaN passes through r.
static inline float exp_core(float x) {
  const float round_to_integer = 12582912.0f;
  float shifted = x * 1.44269504088896341f + round_to_integer;
  float n = shifted - round_to_integer;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float y = 1.381454058e-3f;
  y = y * r + 8.368745446e-3f;
  y = y * r + 4.166838899e-2f;
  y = y * r + 1.666652113e-1f;
  y = y * r + 4.999999404e-1f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  uint32_t exponent = (float_to_bits(shifted) + 127u) << 23;
  return y * bits_to_float(exponent);
}

// exp(x) for x <= 0, as in every exponential relative to a maximum. It is 0 for x < -87, which is just above the
// logarithm of the smallest normal number.
static inline float exp_of_nonpositive(float x) { return x < -87.0f ? 0.0f : exp_core(x); }
static inline double exp_of_nonpositive(double x) { return ::exp(x); }

// exp(x) for x <= 0 in fp64 within 2^-52 (1 + |x|) of itself, as packed instructions, for sums that need more digits than
// fp32 has. exp(r) is the series to degree 13. Rounding adds and subtracts 1.5 * 2^52. It is 0 for x < -700.
static inline double wide_exp_of_nonpositive(double x) {
  const double round_to_integer = 6755399441055744.0;
  double shifted = x * 1.44269504088896341 + round_to_integer;
  double n = shifted - round_to_integer;
  double r = x - n * 0.693147180559945309;
  double y = 1.0 / 6227020800;
  y = y * r + 1.0 / 479001600;
  y = y * r + 1.0 / 39916800;
  y = y * r + 1.0 / 3628800;
  y = y * r + 1.0 / 362880;
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;
  double power;
  __builtin_memcpy(&power, &bits, 8);
  return x < -700.0 ? 0.0 : y * power;
}

#if defined(__AVX512F__)
// exp(x inverse_temperature) with AVX-512's scalef, which no compiler finds, down through the subnormal numbers:
// exp(x inverse_temperature) = 2^n 2^f, where n + f = x factor, factor = inverse_temperature / ln 2 and |f| <= 1/2. The
// factor is stored as the sum of two floats, so that f is right to its last place however large n is. 2^f is a minimax
// polynomial of degree 6 (relative error 2e-9). Each step is done for several vectors before the next step, because the
// steps of one vector wait for each other.
struct Exponent {
  __m512 high, low;
  explicit Exponent(float inverse_temperature) {
    const double factor = inverse_temperature * 1.44269504088896341;
    high = _mm512_set1_ps((float)factor);
    low = _mm512_set1_ps((float)(factor - (float)factor));
  }
};
template <int count> inline void exps_of_nonpositive(__m512 (&x)[count], const Exponent& factor) {
  const __m512 round_to_integer = _mm512_set1_ps(12582912.0f);
  const float coefficients[] = {1.339887385e-3f, 9.618436918e-3f, 5.550332367e-2f, 2.402264774e-1f, 6.931471825e-1f,
                                1.0f};
  __m512 n[count], f[count], y[count];
  for (int i = 0; i < count; ++i) n[i] = _mm512_fmadd_ps(x[i], factor.high, round_to_integer);
  for (int i = 0; i < count; ++i) n[i] = _mm512_sub_ps(n[i], round_to_integer);
  for (int i = 0; i < count; ++i) f[i] = _mm512_fmsub_ps(x[i], factor.high, n[i]);
  for (int i = 0; i < count; ++i) f[i] = _mm512_fmadd_ps(x[i], factor.low, f[i]);
  for (int i = 0; i < count; ++i) y[i] = _mm512_set1_ps(1.535336196e-4f);
  for (float coefficient : coefficients)
    for (int i = 0; i < count; ++i) y[i] = _mm512_fmadd_ps(y[i], f[i], _mm512_set1_ps(coefficient));
  for (int i = 0; i < count; ++i) {
    // Results that round to 0 are set to 0, since an underflow takes a processor a hundred cycles. A NaN passes.
    const __mmask16 not_zero = _mm512_cmp_ps_mask(n[i], _mm512_set1_ps(-150.0f), _CMP_NLT_UQ);
    x[i] = _mm512_maskz_scalef_ps(not_zero, y[i], n[i]);
  }
}
#endif

// exp(x) for any x; infinite for x > 88, where 2^n would need n = 128.
static inline float exp_of(float x) { return x > 88.0f ? INFINITY : exp_of_nonpositive(x); }
static inline double exp_of(double x) { return ::exp(x); }

// log(x) = e ln 2 + log(m), m in [sqrt(1/2), sqrt(2)), log(1 + f) = f - f^2 / 2 + f^3 y(f) with y a minimax polynomial
// of degree 7 (relative error 6e-9). For finite x >= 0. log(0) is -88, which callers multiply by a probability of 0. A
// NaN returns through x - x.
static inline float log_of(float x) {
  int32_t bits = (int32_t)float_to_bits(x);
  int32_t e = (bits - 0x3f3504f3) >> 23;
  float m = bits_to_float((uint32_t)bits - ((uint32_t)e << 23));
  float f = m - 1.0f;
  float y = -7.634506375e-2f;
  y = y * f + 1.276158839e-1f;
  y = y * f - 1.316018403e-1f;
  y = y * f + 1.420175582e-1f;
  y = y * f - 1.662335694e-1f;
  y = y * f + 2.000122666e-1f;
  y = y * f - 2.500081956e-1f;
  y = y * f + 3.333333135e-1f;
  float n = (float)e;
  float square = f * f;
  float low = y * f * square + n * -2.12194440e-4f - 0.5f * square;
  return n * 0.693359375f + (f + low) + (x - x);
}
static inline double log_of(double x) { return ::log(x); }

static inline float root_of(float x, float) { return __builtin_sqrtf(x); }
static inline double root_of(double x, double) { return __builtin_sqrt(x); }

static inline float ratio(float x, float m) { return m == 0 ? 0 : x / m; }
static inline double ratio(double x, double m) { return m == 0 ? 0 : x / m; }

// tanh(x) = x + x^3 y(x^2) for |x| < 0.625, with y a minimax polynomial of degree 5 (relative error 2e-9). Above that,
// tanh(x) = 1 - 2 / (exp(2 |x|) + 1) with the sign of x, which is +-1 for |x| >= 10. Within 1.4 ulp.
static inline float tanh_of(float x) {
  float magnitude = __builtin_fabsf(x), square = x * x;
  float y = 2.292744815e-3f;
  y = y * square - 8.343945257e-3f;
  y = y * square + 2.176891826e-2f;
  y = y * square - 5.395925790e-2f;
  y = y * square + 1.333330423e-1f;
  y = y * square - 3.333333433e-1f;
  float near_zero = x * square * y + x;
  float bounded = magnitude > 10.0f ? 10.0f : magnitude;  // a NaN stays one
  float far = __builtin_copysignf(1.0f - 2.0f / (exp_core(2.0f * bounded) + 1.0f), x);
  return magnitude < 0.625f ? near_zero : far;
}
static inline double tanh_of(double x) { return ::tanh(x); }

static inline float bf16_to_float(uint16_t x) { return bits_to_float((uint32_t)x << 16); }

// Rounds to nearest even. A NaN stays a NaN: its quiet bit is set, so that no payload rounds to infinity.
static inline uint16_t float_to_bf16(float x) {
  uint32_t bits = float_to_bits(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t quiet = (bits >> 16) | 0x40u;
  return (uint16_t)(x != x ? quiet : rounded);
}

#if defined(__F16C__)
static inline void f16_to_floats(const uint16_t* from, float* to, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i]);
}
static inline void floats_to_f16(const float* from, uint16_t* to, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#else
// The factor 2^112 turns a half's exponent into a float's, for subnormal numbers too.
static inline float f16_to_float(uint16_t x) {
  uint32_t magnitude = (uint32_t)(x & 0x7fffu) << 13;
  uint32_t sign = (uint32_t)(x & 0x8000u) << 16;
  float scaled = bits_to_float(magnitude) * 5.192296858534828e33f;
  uint32_t special = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u | magnitude : float_to_bits(scaled);
  return bits_to_float(special | sign);
}
static inline uint16_t float_to_f16(float x) {
  uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 aligns the units of a half's last place
    return (uint16_t)(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  uint32_t odd = (magnitude >> 13) & 1u;
  return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}
static inline void f16_to_floats(const uint16_t* from, float* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = f16_to_float(from[i]);
}
static inline void floats_to_f16(const float* from, uint16_t* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = float_to_f16(from[i]);
}
#endif
