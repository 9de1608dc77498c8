// What sweeps over rows of logits are made of: maxima and exponentials of a block of columns, and who works on a row.
// Included inside a namespace per instruction set, after storage.h: nothing here may be shared between them.

// The maxima of n columns, of which column i goes to maxima[i % kMaxima]. NaN is passed over. So many accumulators that
// no comparison waits for the one before it.
constexpr int kMaxima = 4 * kLanes;
template <class T> void lane_maxima(const T* x, int n, T* maxima) {
  for (int j = 0; j < kMaxima; ++j) maxima[j] = -INFINITY;
  int i = 0;
  for (; i + kMaxima <= n; i += kMaxima) {
#pragma omp simd
    for (int j = 0; j < kMaxima; ++j) maxima[j] = x[i + j] > maxima[j] ? x[i + j] : maxima[j];
  }
  for (; i < n; ++i) maxima[i % kMaxima] = x[i] > maxima[i % kMaxima] ? x[i] : maxima[i % kMaxima];
}

template <class T> T block_max(const T* x, int n) {
  alignas(64) T maxima[kMaxima];
  lane_maxima(x, n, maxima);
  T max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int j = 0; j < kMaxima; ++j) max = maxima[j] > max ? maxima[j] : max;
  return max;
}

// Sum of exp((x - max) * inverse_temperature); each is written to e, where that is wanted. `next` is where the same
// columns of the next block lie in memory.
template <bool keep, class T>
T exponentials(const T* x, int n, T max, T inverse_temperature, T* e, const void* next, int64_t element) {
  (void)next, (void)element;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    T v = exp_of_nonpositive((x[i] - max) * inverse_temperature);
    if (keep) e[i] = v;
    sum += v;
  }
  return sum;
}

#if defined(__AVX512F__)
// With the exp made of AVX-512's own instructions. The next block is fetched while this one computes: a hardware
// prefetcher stops at a page, and a block of 16-bit logits is half of one.
template <bool keep>
float exponentials(const float* x, int n, float max, float inverse_temperature, float* e, const void* next,
                   int64_t element) {
  const __m512 shift = _mm512_set1_ps(max), beta = _mm512_set1_ps(inverse_temperature);
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  auto exp_of_stretch = [&](__m512 logits) {
    return exp_of_nonpositive(_mm512_mul_ps(_mm512_sub_ps(logits, shift), beta));
  };
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int64_t byte = i * element; byte < (i + 32) * element; byte += 64)
      __builtin_prefetch((const char*)next + byte, 0, 2);
    __m512 first = exp_of_stretch(_mm512_loadu_ps(x + i)), second = exp_of_stretch(_mm512_loadu_ps(x + i + 16));
    if (keep) _mm512_storeu_ps(e + i, first), _mm512_storeu_ps(e + i + 16, second);
    even = _mm512_add_ps(even, first), odd = _mm512_add_ps(odd, second);
  }
  for (; i < n; i += 16) {
    __mmask16 inside = n - i >= 16 ? 0xffff : (1 << (n - i)) - 1;
    __m512 last = exp_of_stretch(_mm512_maskz_loadu_ps(inside, x + i));
    if (keep) _mm512_mask_storeu_ps(e + i, inside, last);
    even = _mm512_mask_add_ps(even, inside, even, last);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}
#endif

// Who works on a row: one thread, or all threads of a region block by block.
struct Alone {
  template <class F> static void blocks(int64_t n, F body) {
    for (int64_t b = 0; b < n; ++b) body(b);
  }
  template <class F> static void once(F body) { body(); }
};
struct Together {
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

// Neighbouring rows that a thread takes at a time: so many that they fill huge pages, since threads that first write to
// the same one would both clear it; but a few turns for each thread.
inline int64_t rows_of_a_turn(int64_t rows, int64_t row_bytes, int threads) {
  int64_t most = (rows + 2 * threads - 1) / (2 * threads), wanted = (16 << 20) / (row_bytes + 1) + 1;
  return wanted < most ? wanted : most < 1 ? 1 : most;
}
