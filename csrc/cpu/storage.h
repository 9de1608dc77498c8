// Loads and stores: any storage type as the compute type T, a block of columns at a time. Included inside a namespace
// per instruction set, after elementary.h: nothing here may be shared between them.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Columns that are gone through together: few enough that a few buffers fit the first-level cache, and so many that the
// next block arrives while this one computes.
constexpr int kBlock = 128 * kLanes;
constexpr int64_t kSerialWork = 32768;  // logits under which starting threads costs more than it brings

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

inline const float* widen(const void* from, Dtype dtype, int n, float* buffer) {
  if (dtype == Dtype::f32) return (const float*)from;
  const uint16_t* half = (const uint16_t*)from;
  if (dtype == Dtype::bf16) {
    for (int i = 0; i < n; ++i) buffer[i] = bf16_to_float(half[i]);
  } else {
    f16_to_floats(half, buffer, n);
  }
  return buffer;
}

inline const double* widen(const void* from, Dtype dtype, int n, double* buffer) {
  if (dtype == Dtype::f64) return (const double*)from;
  float narrow[kBlock];
  const float* x = widen(from, dtype, n, narrow);
  for (int i = 0; i < n; ++i) buffer[i] = x[i];
  return buffer;
}

inline void narrow(const float* from, void* to, Dtype dtype, int n) {
  if (dtype == Dtype::f32) {
    memcpy(to, from, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    uint16_t* half = (uint16_t*)to;
    for (int i = 0; i < n; ++i) half[i] = float_to_bf16(from[i]);
  } else {
    floats_to_f16(from, (uint16_t*)to, n);
  }
}

inline void narrow(const double* from, void* to, Dtype dtype, int n) {
  if (dtype == Dtype::f64) {
    memcpy(to, from, n * sizeof(double));
    return;
  }
  float single[kBlock];
  for (int i = 0; i < n; ++i) single[i] = (float)from[i];
  narrow(single, to, dtype, n);
}
