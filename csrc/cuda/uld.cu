// Universal Logit Distillation on a GPU: sorted rows are compared rank by rank. A block works on a row, which stays in
// the L2 cache meanwhile. Each warp of the block works on one stretch of the ranks, in four passes:
//
//     sums       the sums of exponentials of both sides
//     loss       the sums of |p - q| and of p times the sign, and the sum of the signs of each stretch
//     signs      the sum of the signs before each rank, from the stretches before and, by ballots, the ranks before
//     gradient   for the class of each rank; the two ends of a run of equal logits give the sum of its signs
//
// Each pass computes the probabilities again, which takes less time than to store and load them.
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include <stdexcept>

#include "launch.h"
#include "row.h"
#include "table.h"

namespace kdk {
namespace cuda {

constexpr int kUldThreads = 512, kUldWarps = kUldThreads / kWarp;

// One side of a row.
struct Ranks {
  const char* row;
  Dtype dtype;
  int columns;
  float max, factor;  // 1 / sum of exponentials
  Tempering at;

  __device__ Ranks(const Stored& ranked, int64_t row, int64_t columns, Tempering at)
      : row((const char*)ranked + row * columns * bytes_of(ranked.dtype)),
        dtype(ranked.dtype),
        columns((int)columns),
        factor(1),
        at(at) {
    max = logit(0);
  }
  __device__ float logit(int rank) const { return load_logit(row, dtype, rank); }
  __device__ float probability_of(float logit) const { return at.exp(logit - max) * factor; }
  // 0 past the last rank.
  __device__ float probability(int rank) const { return rank < columns ? probability_of(logit(rank)) : 0; }
  // The first rank from `low` on whose logit is less than x, or equal with `or_equal`; `high` if no rank before it is.
  __device__ int first_below(float x, bool or_equal, int low, int high) const {
    while (low < high) {
      const int middle = (low + high) / 2;
      const float found = logit(middle);
      if (found < x || (or_equal && found == x)) high = middle;
      else low = middle + 1;
    }
    return high;
  }
};

struct TwoSums {
  float a, b;

  static __device__ TwoSums none() { return {0, 0}; }
  __device__ void merge(const TwoSums& below) {
    a += below.a, b += below.b;
  }
};

inline __device__ int sign_of(float p, float q) { return (p > q) - (p < q); }

// Returns, in lane 0, the sum of x over the lanes of this warp.
inline __device__ int sum_across_warp(int x) {
  for (int by = kWarp / 2; by; by /= 2) x += __shfl_down_sync(0xffffffffu, x, by);
  return x;
}

// This warp's stretch of the ranks of the wider side.
struct Stretch {
  int begin, end;

  __device__ Stretch(int ranks) {
    const int groups = (ranks + kWarp - 1) / kWarp, of_warp = (groups + kUldWarps - 1) / kUldWarps;
    begin = (int)threadIdx.x / kWarp * of_warp * kWarp;
    end = begin + of_warp * kWarp < ranks ? begin + of_warp * kWarp : ranks;
  }
};

inline __device__ void write_row(const RankedUldCall& call, int64_t row, float loss, float divergence) {
  if (threadIdx.x) return;
  store((float*)call.loss + row, loss);
  store((float*)call.divergence + row, divergence);
}

// Fills the gradient's columns from `first` to before `end`. All threads of the block call it.
inline __device__ void fill(const RankedUldCall& call, int64_t row, int64_t first, int64_t end, float value) {
  if (!call.gradient) return;
  char* data = (char*)call.gradient + row * call.gradient_columns * bytes_of(call.student.dtype);
  for (int64_t i = first + threadIdx.x; i < end; i += kUldThreads) store_logit(data, call.student.dtype, i, value);
}

inline __device__ void sweep_row(const RankedUldCall& call, Team& team, int* of_warp, int64_t row, float scale,
                                 float temperature) {
  const Tempering at(temperature, false);
  Ranks student(call.student, row, call.student_columns, at);
  Ranks teacher(call.teacher, row, call.teacher_columns, at);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Stretch stretch(student.columns > teacher.columns ? student.columns : teacher.columns);

  TwoSums sums = TwoSums::none();
  for (int rank = stretch.begin + lane; rank < stretch.end; rank += kWarp)
    sums.a += student.probability(rank), sums.b += teacher.probability(rank);
  sums = team.merged(sums);
  student.factor = 1 / sums.a, teacher.factor = 1 / sums.b;

  TwoSums found = TwoSums::none();  // the loss, and the sum of p times its sign
  int signs = 0;
  for (int rank = stretch.begin + lane; rank < stretch.end; rank += kWarp) {
    const float p = student.probability(rank), q = teacher.probability(rank);
    const int sign = sign_of(p, q);
    found.a += fabsf(p - q);
    found.b += p * sign;
    signs += rank < student.columns ? sign : 0;
  }
  found = team.merged(found);
  write_row(call, row, scale * found.a, found.a);
  if (!call.gradient) return;
  const float signed_mass = found.a == found.a ? found.b : NAN;  // a teacher of NaN makes signs 0, not NaN

  signs = sum_across_warp(signs);
  if (lane == 0) of_warp[warp] = signs;
  __syncthreads();
  int before = 0;
  for (int i = 0; i < warp; ++i) before += of_warp[i];
  int32_t* sums_of_signs = call.sums_of_signs + row * (call.student_columns + 1);
  for (int first = stretch.begin; first < stretch.end; first += kWarp) {
    const int rank = first + lane;
    const bool inside = rank < student.columns;
    const int sign = inside ? sign_of(student.probability(rank), teacher.probability(rank)) : 0;
    const uint32_t plus = __ballot_sync(0xffffffffu, sign > 0), minus = __ballot_sync(0xffffffffu, sign < 0);
    const uint32_t lower = (1u << lane) - 1;
    if (inside) store(sums_of_signs + rank, before + __popc(plus & lower) - __popc(minus & lower));
    before += __popc(plus) - __popc(minus);
    if (rank == student.columns - 1) store(sums_of_signs + student.columns, before);
  }
  __syncthreads();  // all sums of signs are stored, and all threads have read of_warp

  char* gradient = (char*)call.gradient + row * call.gradient_columns * bytes_of(student.dtype);
  const int64_t* indices = call.indices + row * call.student_columns;
  const float slope = scale * at.inverse_temperature;
  for (int rank = threadIdx.x; rank < student.columns; rank += kUldThreads) {
    const float x = student.logit(rank);
    int begin = rank, end = rank + 1;
    if (rank > 0 && student.logit(rank - 1) == x) begin = student.first_below(x, true, 0, rank);
    if (end < student.columns && student.logit(end) == x) end = student.first_below(x, false, end, student.columns);
    const float mean_sign = (float)(load(sums_of_signs + end) - load(sums_of_signs + begin)) / (float)(end - begin);
    const float value = slope * student.probability_of(x) * (mean_sign - signed_mass);
    store_logit(gradient, student.dtype, load(indices + rank), value);
  }
  fill(call, row, call.student_columns, call.gradient_columns, 0);
}

__global__ void __launch_bounds__(kUldThreads, 2) uld_kernel(
    const __grid_constant__ RankedUldCall call, const __grid_constant__ Launch launch) {
  Team team(launch);
  int* of_warp = (int*)team.board.data();
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const float scale = per_row(call.row_scale, row), temperature = per_row(call.temperature, row);
    if (scale != 0 && temperature > 0 && temperature < INFINITY && 1 / temperature < INFINITY) {
      sweep_row(call, team, of_warp, row, scale, temperature);
    } else {
      const float value = scale == 0 ? 0 : NAN;
      write_row(call, row, value, value);
      fill(call, row, 0, call.student_columns, value);
      fill(call, row, call.student_columns, call.gradient_columns, 0);
    }
  }
}

// ---- the host

void ranked_uld(const RankedUldCall& call) {
  if (call.rows == 0) return;
  const int device = call.run.device;
  OnDevice guard(device);
  Launch planned = {1, kUldThreads, (int)shared_with_board(kUldThreads, 1, kUldWarps * sizeof(int)), 0};
  const int64_t teams = teams_at_once(uld_kernel, planned, Chip(device, uld_kernel), device);
  require_room(teams > 0);
  planned.grid = (int)(teams < call.rows ? teams : call.rows);
  launch(uld_kernel, planned, call.run, call, planned);
}

int64_t ranked_uld_bytes(const RankedUldCall&) { return 0; }

void load_uld() {
  cudaFuncAttributes attributes;
  KDK_CHECK(cudaFuncGetAttributes, &attributes, uld_kernel);
}

}  // namespace cuda
}  // namespace kdk
