// Loads and stores: conversions between any storage type and the compute type T, a block of columns at a time; and the
// memory of threads. Included inside a namespace per instruction set, after elementary.h: the namespaces may share no
// code.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Columns per block: small enough for a few buffers in the first-level cache, large enough to hide the prefetch of the
// next block.
constexpr int kBlock = 128 * kLanes;
constexpr int64_t kSerialWork = 32768;  // for fewer logits, starting threads costs more time than it saves

// One thread for little work (a number of logits), else all threads. No number between: OpenMP would end the threads
// that the smaller region leaves out, and torch's next operator would start them again.
inline int threads_for(int64_t work, int threads) { return work < kSerialWork ? 1 : threads; }

// Calls body(T()) with the compute type T.
template <class Body> auto by_type(bool fp64, Body body) { return fp64 ? body(double()) : body(float()); }

inline int64_t rounded_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Hands out memory, from a base upwards. With base 0 an arena only counts: a Scratch that takes its memory from it then
// says how many bytes the Scratch needs.
struct Arena {
  uintptr_t base;
  int64_t used = 0;

  explicit Arena(uintptr_t base) : base(base) {}
  template <class T> T* take(int64_t count) {
    T* taken = (T*)(base + used);
    used += count * sizeof(T);
    return taken;
  }
  void align() { used = rounded_up(used); }
};

// A kernel's workspace has one region for each thread. Scratch(call, arena) takes the thread's memory from its region.
template <class Scratch, class Call> int64_t scratch_bytes(const Call& call) {
  Arena arena(0);
  Scratch counted(call, arena);
  return rounded_up(arena.used);
}
template <class Scratch, class Call> Scratch scratch_of(const Call& call, int region) {
  Arena arena(rounded_up((int64_t)call.run.workspace) + region * scratch_bytes<Scratch>(call));
  return Scratch(call, arena);
}
template <class Scratch, class Call> int64_t workspace_bytes(const Call& call) {
  return 64 + call.run.threads * scratch_bytes<Scratch>(call);
}

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
