// A sparse teacher's entries, and a bit for each class that an entry names.
#pragma once
#include <stdint.h>

#include "device.h"
#include "groups.h"
#include "plan.h"
#include "row.h"
#include "team.h"

namespace kdk {
namespace cuda {

// Whether an index is a class of the row. An index may be any number, and the kernel touches no memory outside the row.
inline __device__ bool is_class(int index, int64_t columns) { return index >= 0 && index < columns; }

// Calls body(k, column) for this thread's entries of the row. A thread has the same entries in each call.
template <class Body>
inline __device__ void each_entry(const TopkRowsCall& call, const Team& team, int64_t row, Body body) {
  const int32_t* indices = call.indices + row * call.entries;
  const int64_t step = (int64_t)team.blocks * blockDim.x;
  for (int64_t k = (int64_t)team.rank * blockDim.x + threadIdx.x; k < call.entries; k += step) {
    const int column = load(indices + k);
    if (is_class(column, call.columns)) body(k, column);
  }
}

// A bit for each column of a block's slice, and a byte for each group. A bit is set if an entry names the column's
// class. No two threads write to one word: indices ascend, and the thread of a word's first entry sets the bits of all
// entries of that word.
struct Names {
  uint32_t* words;
  int count;

  __device__ Names(char* memory, const Plan& plan)
      : words((uint32_t*)memory), count((plan.slice + kWarp - 1) / kWarp) {}

  // All threads of the block call set(). The block has to synchronise before it reads the words.
  __device__ void set(const TopkRowsCall& call, int64_t row, const Cut& cut) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
    __syncthreads();
    const int32_t* indices = call.indices + row * call.entries;
    auto position_of = [&](int64_t k) {
      const int column = load(indices + k), position = is_class(column, call.columns) ? column - cut.first_column : -1;
      return position >= cut.begin && position < cut.end ? position : -1;
    };
    for (int64_t k = threadIdx.x; k < call.entries; k += blockDim.x) {
      int position = position_of(k);
      if (position < 0) continue;
      const int word = position / kWarp, before = k > 0 ? position_of(k - 1) : -1;
      if (before >= 0 && before / kWarp == word) continue;
      uint32_t bits = 0;
      for (int64_t next = k; position >= 0 && position / kWarp == word;) {
        bits |= 1u << position % kWarp;
        position = ++next < call.entries ? position_of(next) : -1;
      }
      words[word] = bits;
    }
  }
  __device__ uint32_t of_group(int position) const { return ((const uint8_t*)words)[position / kGroup]; }
};

// Loads the group at a position, with -inf in place of the classes that entries name. Returns the group's names.
template <Way way>
inline __device__ uint32_t load_others(const Slice& student, const Names& names, int position, float (&s)[kGroup]) {
  widen<way == Way::halves>(load_group<way != Way::streaming, way == Way::halves>(student, position), student.dtype, s);
  const uint32_t named = names.of_group(position);
  if (named)
    for (int i = 0; i < kGroup; ++i) s[i] = named >> i & 1 ? -INFINITY : s[i];
  return named;
}

}  // namespace cuda
}  // namespace kdk
