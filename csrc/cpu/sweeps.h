// The parts of sweeps over rows of logits: maxima and exponentials of a block of columns, and the threads of a row.
// Included inside a namespace per instruction set, after storage.h: the namespaces may share no code.

// maxima[j] is the maximum of the columns i with i % kMaxima == j, without NaN. kMaxima accumulators are enough that no
// comparison waits for the comparison before it.
constexpr int kMaxima = 4 * kLanes;
template <class T> void lane_maxima(const T* x, int n, T* maxima) {
  T max[kMaxima];  // cannot alias x, so that it stays in registers
  for (int j = 0; j < kMaxima; ++j) max[j] = -INFINITY;
  int i = 0;
  for (; i + kMaxima <= n; i += kMaxima) {
#pragma omp simd
    for (int j = 0; j < kMaxima; ++j) max[j] = x[i + j] > max[j] ? x[i + j] : max[j];
  }
  for (; i < n; ++i) max[i % kMaxima] = x[i] > max[i % kMaxima] ? x[i] : max[i % kMaxima];
  memcpy(maxima, max, sizeof max);
}

template <class T> T block_max(const T* x, int n) {
  alignas(64) T maxima[kMaxima];
  lane_maxima(x, n, maxima);
  T max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int j = 0; j < kMaxima; ++j) max = maxima[j] > max ? maxima[j] : max;
  return max;
}

// exp((x - max) * inverse_temperature) of n columns. Writes the exponentials to e if `keep`, and adds column i to
// sums[i % kMaxima]. `next`: address of the same columns in the next block; `element`: bytes of a column there.
template <bool keep, class T>
void lane_exponentials(const T* x, int n, T max, T inverse_temperature, T* e, T* sums, const void* next,
                       int64_t element) {
  (void)next, (void)element;
  for (int j = 0; j < kMaxima; ++j) sums[j] = 0;
  auto add = [=](int i, int j) {
    T v = exp_of_nonpositive((x[i + j] - max) * inverse_temperature);
    if (keep) e[i + j] = v;
    sums[j] += v;
  };
  int i = 0;
  for (; i + kMaxima <= n; i += kMaxima) {
#pragma omp simd
    for (int j = 0; j < kMaxima; ++j) add(i, j);
  }
  for (int j = 0; i + j < n; ++j) add(i, j);
}

#if defined(__AVX512F__)
// lane_exponentials with AVX-512's own instructions. It prefetches the next block while this block computes: a hardware
// prefetcher stops at the end of a page, and a block of 16-bit logits is half a page.
template <bool keep>
void lane_exponentials(const float* x, int n, float max, float inverse_temperature, float* e, float* sums,
                       const void* next, int64_t element) {
  const __m512 shift = _mm512_set1_ps(max);
  const Exponent factor(inverse_temperature);
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int64_t byte = i * element; byte < (i + 64) * element; byte += 64)
      __builtin_prefetch((const char*)next + byte, 0, 2);
    __m512 v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm512_sub_ps(_mm512_loadu_ps(x + i + 16 * j), shift);
    exps_of_nonpositive(v, factor);
    for (int j = 0; j < 4; ++j) {
      if (keep) _mm512_storeu_ps(e + i + 16 * j, v[j]);
      sum[j] = _mm512_add_ps(sum[j], v[j]);
    }
  }
  for (int j = 0; j < 4; ++j) _mm512_store_ps(sums + 16 * j, sum[j]);
  for (; i < n; i += 16, sums += 16) {
    __mmask16 inside = n - i >= 16 ? 0xffff : (1 << (n - i)) - 1;
    __m512 v[1] = {_mm512_sub_ps(_mm512_maskz_loadu_ps(inside, x + i), shift)};
    exps_of_nonpositive(v, factor);
    if (keep) _mm512_mask_storeu_ps(e + i, inside, v[0]);
    _mm512_store_ps(sums, _mm512_mask_add_ps(_mm512_load_ps(sums), inside, _mm512_load_ps(sums), v[0]));
  }
}

inline float sum_of_lanes(const float* sums) {
  auto of = [sums](int j) { return _mm512_load_ps(sums + 16 * j); };
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(of(0), of(1)), _mm512_add_ps(of(2), of(3))));
}
#endif

template <class T> T sum_of_lanes(const T* sums) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < kMaxima; ++j) sum += sums[j];
  return sum;
}
// lane_exponentials, and the sum of all exponentials.
template <bool keep, class T>
T exponentials(const T* x, int n, T max, T inverse_temperature, T* e, const void* next, int64_t element) {
  alignas(64) T sums[kMaxima];
  lane_exponentials<keep>(x, n, max, inverse_temperature, e, sums, next, element);
  return sum_of_lanes(sums);
}

// The threads that work on a row: one thread, or all threads of a parallel region, which share the row's blocks.
struct OneThread {
  template <class F> static void blocks(int64_t n, F body) {
    for (int64_t b = 0; b < n; ++b) body(b);
  }
  template <class F> static void once(F body) { body(); }
};
struct AllThreads {
  template <class F> static void blocks(int64_t n, F body) {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < n; ++b) body(b);
  }
  template <class F> static void once(F body) {
#pragma omp single
    body();
  }
};

template <class T> T per_row(const PerRow& x, int64_t row) { return ((const T*)x.data)[row * x.stride]; }

// Neighbouring rows that a thread takes at a time: enough to fill huge pages, because two threads that first write to
// one page would both clear it; but at most half of a thread's share of the rows.
inline int64_t rows_of_a_turn(int64_t rows, int64_t row_bytes, int threads) {
  int64_t most = (rows + 2 * threads - 1) / (2 * threads), wanted = (8 << 20) / (row_bytes + 1) + 1;
  return wanted < most ? wanted : most < 1 ? 1 : most;
}
