// The parts of a kernel that works on rows in teams: a row's options and its address, a block's slice of the row's
// columns, and the copy of a slice to shared memory. A Call is a RowsCall or a TopkRowsCall.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "device.h"
#include "groups.h"
#include "plan.h"
#include "table.h"
#include "team.h"

namespace kdk {
namespace cuda {

inline __device__ float per_row(const PerRow& x, int64_t row) { return load((const float*)x.data + row * x.stride); }

struct LoadOne {
  template <class T> __device__ T operator()(const T* from) const { return load(from); }
};

// The factors in a row's gradient: `soft` of the divergence, `hard` of the label term.
struct Factors {
  float soft, hard;
};

// The options of a row, and the formulas of the row's loss and of the factors of the row's gradient. A row past the
// last counts as skipped.
struct RowTerms : RowValues<float> {
  template <class Call> __device__ RowTerms(const Call& call, int64_t row) {
    if (row < call.rows) read(call.options, row, LoadOne());
  }
  template <class Call> __device__ bool swept(const Call& call) const { return !skipped() && !bad(call.columns); }

  // cross_entropy is the cross-entropy with the label, at temperature 1.
  __device__ float loss(const RowOptions& options, float phi, float cross_entropy) const {
    const float loss = uncapped(options, phi, cross_entropy);
    return scale * (capped(loss) ? loss_cap : loss);
  }
  // The loss before the cap and the row's scale.
  __device__ float uncapped(const RowOptions& options, float phi, float cross_entropy) const {
    const float factor = options.temperature_squared ? temperature * temperature : 1;
    float loss = weighted(1 - hard_weight, factor * phi);
    if (hard_weight != 0) loss += hard_weight * cross_entropy;
    return loss;
  }
  // A scale may be infinite or NaN, so a hard weight of 0 is a case of its own: such a row has no label term, and
  // 0 * scale would be NaN.
  __device__ Factors factors(const RowOptions& options, float inverse_temperature) const {
    return {scale * (1 - hard_weight) * (options.temperature_squared ? temperature : inverse_temperature),
            hard_weight == 0 ? 0 : scale * hard_weight};
  }
  // The factors if options.gradient_needs_loss().
  __device__ Factors factors(const RowOptions& options, float inverse_temperature, float phi,
                             float cross_entropy) const {
    if (capped(uncapped(options, phi, cross_entropy))) return {0, 0};
    return factors(options, inverse_temperature);
  }
};

template <class Call> inline __device__ const char* row_start(const Logits& x, const Call& call, int64_t row) {
  // A division takes a hundred instructions, so a call with one outer row avoids it.
  const int64_t outer = call.inner == call.rows ? 0 : row / call.inner;
  const int64_t offset = outer * x.outer_stride + (row - outer * call.inner) * x.inner_stride;
  return (const char*)x.data + offset * bytes_of(x.dtype);
}

template <class Call>
inline __device__ void write_column(Numbers matrix, const Call& call, int64_t row, const float* values, int count) {
  for (int i = 0; i < count; ++i) store((float*)matrix + i * call.rows + row, values[i]);
}

// One thread writes the statistics of a row. student_first and teacher_first are the first columns that hold the
// maximum of the logits that are not NaN. A column past the last means that no column holds the maximum.
template <class Call>
inline __device__ void write_statistics(const Call& call, int64_t row, const RowStatistics<float>& x,
                                        int64_t student_first, int64_t teacher_first) {
  const Words<RowStatistics<float>> values(x);
  for (int i = 0; i < kRowStatistics; ++i)
    store((float*)call.statistics + i * call.rows + row, __uint_as_float(values.words[i]));
  store(call.top1 + row, student_first < call.columns ? student_first : 0);
  store(call.top1 + call.rows + row, teacher_first < call.columns ? teacher_first : 0);
}
// Replaces the divergence among the statistics of a row.
template <class Call> inline __device__ void write_divergence(const Call& call, int64_t row, float divergence) {
  const int64_t place = offsetof(RowStatistics<float>, divergence) / sizeof(float);
  store((float*)call.statistics + place * call.rows + row, divergence);
}
template <class Call> inline __device__ void fill_statistics(const Call& call, int64_t row, float value) {
  for (int i = 0; i < kRowStatistics; ++i) store((float*)call.statistics + i * call.rows + row, value);
  store(call.top1 + row, (int64_t)0), store(call.top1 + call.rows + row, (int64_t)0);
}

// The whole team fills the columns from `first` on.
template <class Call>
inline __device__ void fill_gradient(const Call& call, const Team& team, int64_t row, int64_t first, float value) {
  if (first == call.gradient_columns) return;
  const Dtype dtype = call.student.dtype;
  char* data = (char*)call.gradient + row * call.gradient_columns * bytes_of(dtype);
  // Position 0 is the last column, at or before the first one, whose address is a multiple of 16 bytes.
  const int shift = columns_in((uint64_t)(data + first * bytes_of(dtype)) % 16, dtype);
  data += (first - shift) * bytes_of(dtype);
  const int end = (int)(call.gradient_columns - first) + shift;
  float values[kGroup];
  for (int i = 0; i < kGroup; ++i) values[i] = value;
  for (int64_t i = ((int64_t)team.rank * blockDim.x + threadIdx.x) * kGroup; i < end;
       i += (int64_t)team.blocks * blockDim.x * kGroup)
    store_group<false>(data, dtype, i >= shift && i + kGroup <= end, (int)i, shift, end, values);
}

// Calls sweep(row, its options) for the team's rows that is_close(row) finds among the rows with a result. A team looks
// for them among 32 of its rows at a time: most calls have none.
template <class Call, class IsClose, class Sweep>
inline __device__ void each_close_row(const Call& call, const Plan& plan, IsClose is_close, Sweep sweep) {
  const int64_t teams = plan.teams;
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = blockIdx.x / plan.blocks; first < call.rows; first += kWarp * teams) {
    const int64_t mine = first + lane * teams;
    const bool close = mine < call.rows && RowTerms(call, mine).swept(call) && is_close(mine);
    const uint32_t rows = __ballot_sync(0xffffffffu, close);
    for (int i = 0; i < kWarp; ++i) {
      if (!(rows >> i & 1)) continue;
      const int64_t row = first + i * teams;
      sweep(row, RowTerms(call, row));
    }
  }
}

// The begin and the end of a block's slice of a row.
struct Cut {
  int begin, end;    // the positions of the slice that hold columns
  int first_column;  // the column of position 0, which is negative if the row is shifted
  bool aligned;

  // `shift` is the number of columns by which the row is shifted; -1 if the row is not aligned.
  __device__ Cut(int64_t columns, int shift, const Plan& plan, const Team& team) {
    aligned = shift >= 0;
    shift = aligned ? shift : 0;
    const int64_t left = columns + shift - (int64_t)team.rank * plan.slice;
    begin = team.rank == 0 ? shift : 0;
    end = left < 0 ? 0 : left < plan.slice ? (int)left : plan.slice;
    first_column = team.rank * plan.slice - shift;
  }
  __device__ Slice slice(const char* row, Dtype dtype) const {
    return {row + (int64_t)first_column * bytes_of(dtype), dtype, begin, end, aligned};
  }
};

// The slice of one tensor, or the slices of two tensors, in shared memory. The slices follow the board, one behind the
// other.
struct Staging {
  Board& board;
  char *student, *teacher;  // in shared memory
  uint32_t parity;          // the parity of the next wait

  __device__ Staging(Dtype student_dtype, const Plan& plan, Board& board)
      : board(board),
        student(board.data()),
        teacher(student + plan.slice * bytes_of(student_dtype)),
        parity(0) {
    if (threadIdx.x == 0) {
      bulk_barrier_init(&board.arrived);
      bulk_barrier_init_fence();
    }
    __syncthreads();
  }

  // A bulk copy moves the groups that begin at a multiple of 16 bytes. The threads copy the columns before and after
  // these groups one by one.
  static __device__ int bulk_begin(const Slice& from) { return from.begin > 0 ? kGroup : 0; }
  static __device__ int bulk_bytes(const Slice& from) {
    const int columns = from.end - bulk_begin(from);
    return from.aligned && columns > 0 ? columns * bytes_of(from.dtype) / 16 * 16 : 0;
  }

  // Call stage() when no thread uses the staged row any more. stage() returns when the new row is staged.
  __device__ void stage(const Slice& student_row) {
    expect(bulk_bytes(student_row));
    copy(student_row, student);
    wait(bulk_bytes(student_row));
  }
  __device__ void stage(const Slice& student_row, const Slice& teacher_row) {
    const int bytes = bulk_bytes(student_row) + bulk_bytes(teacher_row);
    expect(bytes);
    copy(student_row, student);
    copy(teacher_row, teacher);
    wait(bytes);
  }
  __device__ void expect(int bytes) {
    if (threadIdx.x == 0 && bytes) bulk_barrier_expect(&board.arrived, bytes);
  }
  __device__ void wait(int bytes) {
    if (bytes) {
      bulk_barrier_wait(&board.arrived, parity);
      parity ^= 1;
    }
    __syncthreads();
  }

  // One thread calls this.
  static __device__ void prefetch(const Slice& from) {
    const int bytes = bulk_bytes(from);
    if (bytes) bulk_prefetch(from.data + bulk_begin(from) * bytes_of(from.dtype), bytes);
  }

  __device__ void copy(const Slice& from, char* to) {
    const int bytes = bytes_of(from.dtype), in_bulk = bulk_bytes(from);
    const int first = in_bulk ? bulk_begin(from) : 0, last = first + columns_in(in_bulk, from.dtype);
    if (threadIdx.x == 0 && in_bulk) bulk_copy(to + first * bytes, from.data + first * bytes, in_bulk, &board.arrived);
    const int end = (from.end + kGroup - 1) / kGroup * kGroup;
    for (int i = threadIdx.x; i < first; i += blockDim.x) copy_one(from, to, i);
#pragma unroll 4
    for (int i = last + threadIdx.x; i < end; i += blockDim.x) copy_one(from, to, i);
  }
  static __device__ void copy_one(const Slice& from, char* to, int i) {
    const uint32_t bits = from.holds(i) ? load_bits(from.data, from.dtype, i) : minus_infinity(from.dtype);
    if (from.dtype == Dtype::f32)
      ((uint32_t*)to)[i] = bits;
    else
      ((uint16_t*)to)[i] = (uint16_t)bits;
  }
};

}  // namespace cuda
}  // namespace kdk
