// Loads and stores of a row of logits of any storage type, in groups of eight columns: 16 bytes of 16-bit logits.
#pragma once
#include <math.h>
#include <stdint.h>

#include "../calls/rows.h"
#include "device.h"

namespace kdk {
namespace cuda {

constexpr int kGroup = 8;

inline __host__ __device__ int bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
inline __device__ int columns_in(int bytes, Dtype dtype) { return bytes >> (dtype == Dtype::f32 ? 2 : 1); }

// A block's slice of a row, in global memory or copied to shared memory. The slice's columns are at the positions from
// `begin` to `end`. Position 0 lies at a multiple of 16 bytes if the slice is aligned. In shared memory all other
// positions of a group hold -inf.
struct Slice {
  const char* data;
  Dtype dtype;
  int begin, end;
  bool aligned;

  __device__ bool whole(int position) const { return aligned && position >= begin && position + kGroup <= end; }
  __device__ bool holds(int position) const { return position >= begin && position < end; }
};

// The number of columns by which the groups of a row are shifted, so that they lie at multiples of 16 bytes in both
// tensors; -1 if no shift does that.
inline __device__ int shift_of(const char* a, Dtype a_dtype, const char* b, Dtype b_dtype) {
  const bool a_wide = a_dtype == Dtype::f32, b_wide = b_dtype == Dtype::f32;
  const int a_shift = columns_in((uint64_t)a % 16, a_dtype), b_shift = columns_in((uint64_t)b % 16, b_dtype);
  if (a_wide == b_wide) return a_shift == b_shift ? a_shift : -1;
  const int narrow = a_wide ? b_shift : a_shift, wide = a_wide ? a_shift : b_shift;
  return narrow % 4 == wide ? narrow : -1;
}

// The bits of eight logits in memory. Logits of 16 bits take the first four words.
struct Raw {
  uint32_t words[kGroup];
};

inline __device__ uint32_t minus_infinity(Dtype dtype) {
  return dtype == Dtype::f32 ? 0xff800000u : dtype == Dtype::bf16 ? 0xff80u : 0xfc00u;
}
// The bits of a logit in global memory.
inline __device__ uint32_t load_bits(const char* row, Dtype dtype, int position) {
  return dtype == Dtype::f32 ? load((const uint32_t*)row + position) : load((const uint16_t*)row + position);
}

template <bool staged> inline __device__ void load_16_bytes(const char* from, uint32_t* words) {
  const uint4 four = staged ? *(const uint4*)from : load((const uint4*)from);
  words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
}

// The group at a position, with -inf where the slice has no column. `halves`: the dtype is known to have 16 bits.
template <bool staged, bool halves> inline __device__ Raw load_group(const Slice& x, int position) {
  Raw raw = {};
  const bool wide = !halves && x.dtype == Dtype::f32;
  if (staged || x.whole(position)) {
    const char* from = x.data + (int64_t)position * (wide ? 4 : 2);
    load_16_bytes<staged>(from, raw.words);
    if (wide) load_16_bytes<staged>(from + 16, raw.words + 4);
  } else {
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t bits = x.holds(position + i) ? load_bits(x.data, x.dtype, position + i) : minus_infinity(x.dtype);
      if (wide) raw.words[i] = bits;
      else raw.words[i / 2] |= bits << (i % 2 * 16);
    }
  }
  return raw;
}

template <bool halves> inline __device__ void widen(const Raw& raw, Dtype dtype, float (&out)[kGroup]) {
  if (!halves && dtype == Dtype::f32) {
    for (int i = 0; i < kGroup; ++i) out[i] = __uint_as_float(raw.words[i]);
  } else if (dtype == Dtype::bf16) {
    for (int i = 0; i < kGroup; i += 2) {
      const float2 two = floats_of_bf16x2(raw.words[i / 2]);
      out[i] = two.x, out[i + 1] = two.y;
    }
  } else {
    for (int i = 0; i < kGroup; i += 2) {
      const float2 two = floats_of_f16x2(raw.words[i / 2]);
      out[i] = two.x, out[i + 1] = two.y;
    }
  }
}

// Both sides of a group. Both loads are issued before the first use of either.
template <bool staged, bool halves>
inline __device__ void load_pair(const Slice& a, const Slice& b, int position, float (&x)[kGroup], float (&y)[kGroup]) {
  const Raw raw_a = load_group<staged, halves>(a, position), raw_b = load_group<staged, halves>(b, position);
  widen<halves>(raw_a, a.dtype, x);
  widen<halves>(raw_b, halves ? a.dtype : b.dtype, y);
}

inline __device__ float load_logit(const char* row, Dtype dtype, int64_t column) {
  const uint32_t bits = load_bits(row + column * bytes_of(dtype), dtype, 0);
  if (dtype == Dtype::f32) return __uint_as_float(bits);
  return dtype == Dtype::bf16 ? floats_of_bf16x2(bits).x : floats_of_f16x2(bits).x;
}

inline __device__ void store_logit(char* row, Dtype dtype, int64_t column, float x) {
  char* to = row + column * bytes_of(dtype);
  if (dtype == Dtype::f32) store((float*)to, x);
  else store((uint16_t*)to, (uint16_t)(dtype == Dtype::bf16 ? bf16x2_of_floats(x, 0) : f16x2_of_floats(x, 0)));
}

// Stores a group. `whole`: it has all eight columns, at a multiple of 16 bytes; else only columns from `begin` to `end`
// are stored.
template <bool halves>
inline __device__ void store_group(char* data, Dtype dtype, bool whole, int position, int begin, int end,
                                   const float (&x)[kGroup]) {
  char* to = data + (int64_t)position * (halves ? 2 : bytes_of(dtype));
  if (!halves && dtype == Dtype::f32) {
    if (whole) {
      for (int i = 0; i < kGroup; i += 4)
        store_streaming((float4*)to + i / 4, make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
    } else {
      for (int i = 0; i < kGroup; ++i)
        if (position + i >= begin && position + i < end) store((float*)to + i, x[i]);
    }
    return;
  }
  uint32_t words[kGroup / 2];
  if (dtype == Dtype::bf16) {
    for (int i = 0; i < kGroup / 2; ++i) words[i] = bf16x2_of_floats(x[2 * i], x[2 * i + 1]);
  } else {
    for (int i = 0; i < kGroup / 2; ++i) words[i] = f16x2_of_floats(x[2 * i], x[2 * i + 1]);
  }
  if (whole) {
    store_streaming((uint4*)to, make_uint4(words[0], words[1], words[2], words[3]));
  } else {
    for (int i = 0; i < kGroup; ++i)
      if (position + i >= begin && position + i < end)
        store((uint16_t*)to + i, (uint16_t)(words[i / 2] >> (i % 2 * 16)));
  }
}

// This thread's groups of a slice: `for (int i = groups.first; groups.has(i); i += groups.step)`.
struct Groups {
  int first, step, end;

  __device__ Groups(int end, bool backwards = false)
      : first(threadIdx.x * kGroup), step(blockDim.x * kGroup), end(end) {
    if (backwards) {
      first += first < end ? (end - 1 - first) / step * step : 0;
      step = -step;
    }
  }
  __device__ bool has(int position) const { return position >= 0 && position < end; }
};

}  // namespace cuda
}  // namespace kdk
