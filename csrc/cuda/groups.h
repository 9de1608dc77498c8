// A row of logits as threads take it: eight columns at a time, 16 bytes of 16-bit logits, in any storage type.
#pragma once
#include <math.h>
#include <stdint.h>

#include "../rows_call.h"
#include "device.h"

namespace kdk {
namespace cuda {

constexpr int kGroup = 8;

inline __device__ int bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline __device__ float2 floats_of_halves(uint32_t word, Dtype dtype) {
  return dtype == Dtype::bf16 ? floats_of_bf16x2(word) : floats_of_f16x2(word);
}
inline __device__ uint32_t halves_of_floats(float first, float second, Dtype dtype) {
  return dtype == Dtype::bf16 ? bf16x2_of_floats(first, second) : f16x2_of_floats(first, second);
}

// A logit in global memory.
inline __device__ float load_logit(const char* at, Dtype dtype) {
  if (dtype == Dtype::f32) return load((const float*)at);
  return floats_of_halves(load((const uint16_t*)at), dtype).x;
}

// A block's slice of a row of logits: in shared memory (filled up to whole groups with -inf), or in global memory.
struct Slice {
  const char* data;
  Dtype dtype;
  int columns;
  bool aligned;  // of global memory: to 16 bytes
};

template <bool staged> inline __device__ uint4 load_16_bytes(const char* from) {
  return staged ? *(const uint4*)from : load((const uint4*)from);
}

// Past the end of the slice logits are -inf, which contributes nothing to any sum.
template <bool staged> inline __device__ void load_group(const Slice& x, int column, float (&out)[kGroup]) {
  const char* from = x.data + (int64_t)column * bytes_of(x.dtype);
  if (!staged && (!x.aligned || column + kGroup > x.columns)) {
    for (int i = 0; i < kGroup; ++i)
      out[i] = column + i < x.columns ? load_logit(from + i * bytes_of(x.dtype), x.dtype) : -INFINITY;
  } else if (x.dtype == Dtype::f32) {
    uint4 low = load_16_bytes<staged>(from), high = load_16_bytes<staged>(from + 16);
    uint32_t words[kGroup] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    for (int i = 0; i < kGroup; ++i) out[i] = __uint_as_float(words[i]);
  } else {
    uint4 halves = load_16_bytes<staged>(from);
    uint32_t words[kGroup / 2] = {halves.x, halves.y, halves.z, halves.w};
    for (int i = 0; i < kGroup / 2; ++i) {
      float2 two = floats_of_halves(words[i], x.dtype);
      out[2 * i] = two.x, out[2 * i + 1] = two.y;
    }
  }
}

inline __device__ void store_group(char* row, Dtype dtype, bool aligned, int column, int columns,
                                   const float (&x)[kGroup]) {
  char* to = row + (int64_t)column * bytes_of(dtype);
  if (dtype == Dtype::f32) {
    if (aligned && column + kGroup <= columns) {
      for (int i = 0; i < kGroup; i += 4)
        store((float4*)to + i / 4, make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
    } else {
      for (int i = 0; i < kGroup; ++i)
        if (column + i < columns) store((float*)to + i, x[i]);
    }
    return;
  }
  uint32_t words[kGroup / 2];
  for (int i = 0; i < kGroup / 2; ++i) words[i] = halves_of_floats(x[2 * i], x[2 * i + 1], dtype);
  if (aligned && column + kGroup <= columns) {
    store((uint4*)to, make_uint4(words[0], words[1], words[2], words[3]));
  } else {
    for (int i = 0; i < kGroup; ++i)
      if (column + i < columns) store((uint16_t*)to + i, (uint16_t)(words[i / 2] >> (i % 2 * 16)));
  }
}

// The groups of a slice that are this thread's, forwards or backwards: group(0), group(1), ...
struct Groups {
  int count;
  bool backwards;

  __device__ Groups(int columns, bool backwards) : backwards(backwards) {
    int groups = (columns + kGroup - 1) / kGroup;
    count = (groups - (int)threadIdx.x + (int)blockDim.x - 1) / (int)blockDim.x;
  }
  __device__ int column(int i) const {
    return ((int)threadIdx.x + (backwards ? count - 1 - i : i) * (int)blockDim.x) * kGroup;
  }
};

}  // namespace cuda
}  // namespace kdk
