// Costs between the rows of a student's and a teacher's cloud of logits, and their gradient, on an NVIDIA GPU: the twin
// of csrc/cpu/pairwise.cpp. calls/pairwise.h has the formulas. No matrix unit computes |p - q|, so the kernels are the
// loops of a matrix product with another operation inside, in fp32.
//
// ---- Costs. A block takes a square of pairs of a cloud and a range of columns. A range has at most 4,096 columns, the
// length of a running sum.
//
//     stage       a few columns of the square's student and teacher rows, as probabilities, in shared memory: one
//                 exponential an element and square; the loads of the next logits are in flight meanwhile
//     sum         4 x 4 pairs a thread: for each column eight numbers from shared memory, and for l1 32 operations,
//                 68 with moments
//     write       the sums of the range, to the workspace [ranges, clouds, n, n]
//
// A second kernel adds the ranges in a fixed order, takes the root for l2, and writes 0 for dropped rows.
//
// ---- Gradient. A block takes a tile of student rows by columns, 4 x 4 elements a thread, which stay in registers. All
// teacher rows of the cloud and the weights of the pairs pass through shared memory. The softmax's own derivative needs
// one sum, `dot`, which the moments gave. Each student logit is read once and each gradient is written once.
//
// Two equal logits in rows with equal floats have the same probability to the last bit, so that the sign is 0 there.
//
// Computed for an H100, and not yet measured: at n = 64 and 128k columns the costs of l1 take 32 us of fp32 operations,
// 67 us with moments, and the gradient 48 us, where the logits in bf16 are 10 us of memory.
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include "device.h"
#include "groups.h"
#include "launch.h"
#include "table.h"

namespace kdk {
namespace cuda {

constexpr int kQuad = 4;               // rows or columns of a thread
constexpr int64_t kRunningSum = 4096;  // terms

// ---- rows as probabilities

// A row of logits as its softmax at the temperature. A dropped row, or a row past the last, is 0 and never read.
struct Probabilities {
  const char* row;
  Dtype dtype;
  bool there;
  float max, scale, log2_sum;

  template <class Call>
  __device__ Probabilities(const Call& call, const Logits& logits, const float* floats, int64_t cloud, int64_t number)
      : row(nullptr), dtype(logits.dtype), there(false), max(0), scale(0), log2_sum(0) {
    const int64_t at = cloud * call.rows + number;
    if (number >= call.rows || load((const float*)call.row_mass + at) == 0) return;
    there = true;
    row = (const char*)logits.data +
          (cloud * logits.outer_stride + number * logits.inner_stride) * bytes_of(dtype);
    const float temperature = load((const float*)call.temperature.data);
    max = load(floats + at);
    scale = temperature > 0 ? kLog2e / temperature : NAN;
    log2_sum = load(floats + call.clouds * call.rows + at) * kLog2e;
  }

  // The logits of eight columns, with -inf from `end` on.
  __device__ Raw load_logits(int64_t column, int64_t end) const {
    if (!there) return {};
    const char* from = row + column * bytes_of(dtype);
    const int64_t left = end - column;
    const int count = left < 0 ? 0 : left < kGroup ? (int)left : kGroup;
    return load_group<false, false>(Slice{from, dtype, 0, count, (uint64_t)from % 16 == 0}, 0);
  }
  __device__ void of_logits(const Raw& raw, float (&p)[kGroup]) const {
    widen<false>(raw, dtype, p);
    for (int i = 0; i < kGroup; ++i) p[i] = there ? exp2_approx(fmaf(p[i] - max, scale, -log2_sum)) : 0;
  }
};

template <class Call> inline __device__ Probabilities student_row(const Call& call, int64_t cloud, int64_t row) {
  return Probabilities(call, call.student, (const float*)call.floats, cloud, row);
}
template <class Call> inline __device__ Probabilities teacher_row(const Call& call, int64_t cloud, int64_t row) {
  return Probabilities(call, call.teacher, (const float*)call.floats + 2 * call.clouds * call.rows, cloud, row);
}

struct Quad {
  float x[kQuad];
  __device__ explicit Quad(const float* shared) {
    const float4 four = *(const float4*)shared;
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  }
};

// (1 + sign(d)) / 2 in one instruction, a saturating sum. sum x sign(d) = 2 sum x above(d) - sum x takes two
// instructions for each pair and one for all pairs of a row; it is exact where all d are 0.
inline __device__ float above(float d) { return fminf(fmaxf(fmaf(d, 0x1p126f, 0.5f), 0.0f), 1.0f); }

// ---- costs

struct PairCostsPlan : Launch {
  int64_t tiles;   // squares along a side of a cloud's pairs
  int64_t ranges;  // ranges of columns
  int64_t range;   // columns of a range
};

template <PairCost kind, bool moments> struct PairSums {
  float cost[kQuad][kQuad], slopes[kQuad][kQuad], mass[kQuad];

  __device__ PairSums() : cost{}, slopes{}, mass{} {}
  __device__ void add(const Quad& p, const Quad& q) {
    for (int i = 0; i < kQuad; ++i) {
      if (moments && kind == PairCost::l1) mass[i] += p.x[i];
      for (int j = 0; j < kQuad; ++j) {
        const float d = p.x[i] - q.x[j];
        cost[i][j] = kind == PairCost::l1 ? cost[i][j] + fabsf(d) : fmaf(d, d, cost[i][j]);
        if (moments) slopes[i][j] = fmaf(p.x[i], kind == PairCost::l1 ? above(d) : d, slopes[i][j]);
      }
    }
  }
  __device__ float moment(int i, int j) const {
    return kind == PairCost::l1 ? 2 * slopes[i][j] - mass[i] : slopes[i][j];
  }
};

// A square with `side` pairs a side has [columns][rows] of both clouds in shared memory: as many columns as give each
// thread one group of each cloud to stage.
constexpr __host__ __device__ int threads_of_square(int side) { return side * side / (kQuad * kQuad); }
constexpr __host__ __device__ int columns_of_square(int side) { return side / 2; }
constexpr __host__ __device__ int shared_of_square(int side) {
  return 2 * columns_of_square(side) * side * (int)sizeof(float);
}

// Writes one group of eight columns of a row. Neighbouring threads write two neighbouring groups of one row.
template <int side>
inline __device__ void stage(const Probabilities& from, const Raw& raw, int row, int group, float* to) {
  float p[kGroup];
  from.of_logits(raw, p);
  for (int i = 0; i < kGroup; ++i) to[(group * kGroup + i) * side + row] = p[i];
}

template <PairCost kind, bool moments, int side>
__global__ void __launch_bounds__(threads_of_square(side), 512 / threads_of_square(side))
    pair_costs_kernel(const __grid_constant__ PairCostsCall call, const __grid_constant__ PairCostsPlan plan) {
  constexpr int columns = columns_of_square(side);
  float* const p_columns = (float*)shared_memory();
  float* const q_columns = p_columns + columns * side;
  const int row = threadIdx.x / 2 % side, group = threadIdx.x / (2 * side) * 2 + threadIdx.x % 2;  // to stage
  const int first_p = threadIdx.x / (side / kQuad) * kQuad, first_q = threadIdx.x % (side / kQuad) * kQuad;
  const int64_t all = call.clouds * call.rows * call.rows, squares = plan.tiles * plan.tiles;
  float* const costs = (float*)call.run.workspace;

  const int64_t square = blockIdx.x % squares, range = blockIdx.x / squares % plan.ranges;
  const int64_t cloud = blockIdx.x / squares / plan.ranges;
  const int64_t p_row = square / plan.tiles * side, q_row = square % plan.tiles * side;
  const int64_t begin = range * plan.range;
  const int64_t end = begin + plan.range < call.columns ? begin + plan.range : call.columns;
  const Probabilities p_staged = student_row(call, cloud, p_row + row);
  const Probabilities q_staged = teacher_row(call, cloud, q_row + row);
  PairSums<kind, moments> sums;

  Raw p_raw = p_staged.load_logits(begin + group * kGroup, end);
  Raw q_raw = q_staged.load_logits(begin + group * kGroup, end);
  for (int64_t column = begin; column < end; column += columns) {
    stage<side>(p_staged, p_raw, row, group, p_columns);
    stage<side>(q_staged, q_raw, row, group, q_columns);
    __syncthreads();
    if (column + columns < end) {
      p_raw = p_staged.load_logits(column + columns + group * kGroup, end);
      q_raw = q_staged.load_logits(column + columns + group * kGroup, end);
    }
#pragma unroll 4
    for (int i = 0; i < columns; ++i)
      sums.add(Quad(p_columns + i * side + first_p), Quad(q_columns + i * side + first_q));
    __syncthreads();  // all have read the columns
  }

  for (int i = 0; i < kQuad; ++i)
    for (int j = 0; j < kQuad; ++j) {
      const int64_t student = p_row + first_p + i, teacher = q_row + first_q + j;
      if (student >= call.rows || teacher >= call.rows) continue;
      float* to = costs + range * all + (cloud * call.rows + student) * call.rows + teacher;
      store(to, sums.cost[i][j]);
      if (moments) store(to + plan.ranges * all, sums.moment(i, j));
    }
}

// A block has 32 pairs, one for each lane. Every warp adds its part of the ranges.
constexpr int kFinishedPairs = 32, kPartsOfRanges = 8;
constexpr int kSharedOfFinish = 2 * kFinishedPairs * kPartsOfRanges * (int)sizeof(float);

template <PairCost kind>
__global__ void __launch_bounds__(kFinishedPairs* kPartsOfRanges)
    finish_pairs_kernel(const __grid_constant__ PairCostsCall call, int64_t ranges) {
  const int lane = threadIdx.x % kFinishedPairs, part = threadIdx.x / kFinishedPairs;
  float* const costs = (float*)shared_memory();
  float* const moments = costs + kFinishedPairs * kPartsOfRanges;
  const int64_t all = call.clouds * call.rows * call.rows;
  const int64_t pair = (int64_t)blockIdx.x * kFinishedPairs + lane;
  const float* found = (const float*)call.run.workspace + pair;
  float cost = 0, moment = 0;
  if (pair < all) {
#pragma unroll 4
    for (int64_t range = part; range < ranges; range += kPartsOfRanges) {
      cost += load(found + range * all);
      if (call.moments) moment += load(found + (ranges + range) * all);
    }
  }
  costs[threadIdx.x] = cost, moments[threadIdx.x] = moment;
  __syncthreads();
  if (part == 0 && pair < all) {
    for (int i = 1; i < kPartsOfRanges; ++i) {
      cost += costs[i * kFinishedPairs + lane];
      moment += moments[i * kFinishedPairs + lane];
    }
    const int64_t student = pair / call.rows, teacher = student / call.rows * call.rows + pair % call.rows;
    const float* row_mass = (const float*)call.row_mass;
    const bool kept = load(row_mass + student) != 0 && load(row_mass + teacher) != 0;
    if (kind == PairCost::l2) {
      cost = sqrtf(cost);
      moment = cost == 0 ? 0 : moment / cost;
    }
    store((float*)call.costs + pair, kept ? cost : 0);
    if (call.moments) store((float*)call.moments + pair, kept ? moment : 0);
  }
}

// ---- gradient

constexpr int kThreadsOfGradient = 256;

// A tile with `rows` student rows: its columns, the number of teacher rows that are staged at a time, and the stride of
// a teacher's weights, which spreads them over the banks of shared memory.
constexpr __host__ __device__ int columns_of_tile(int rows) { return kThreadsOfGradient * kQuad * kQuad / rows; }
constexpr __host__ __device__ int teachers_of_tile(int rows) { return rows / 2; }
constexpr __host__ __device__ int stride_of_weights(int rows) { return rows + 4; }
constexpr __host__ __device__ int shared_of_tile(int rows) {
  return (rows * columns_of_tile(rows) + teachers_of_tile(rows) * (columns_of_tile(rows) + stride_of_weights(rows))) *
         (int)sizeof(float);
}

struct PairGradientPlan : Launch {
  int64_t row_tiles, column_tiles;
};

// sum_j W_ij sign(p_iv - q_jv) for l1, sum_j W_ij (p_iv - q_jv) for l2.
template <PairCost kind> struct SlopeSums {
  float slopes[kQuad][kQuad], weights[kQuad];

  __device__ SlopeSums() : slopes{}, weights{} {}
  __device__ void add(const Quad& weight, const float (&p)[kQuad][kQuad], const Quad& q) {
    for (int i = 0; i < kQuad; ++i) {
      if (kind == PairCost::l1) weights[i] += weight.x[i];
      for (int j = 0; j < kQuad; ++j) {
        const float d = p[i][j] - q.x[j];
        slopes[i][j] = fmaf(weight.x[i], kind == PairCost::l1 ? above(d) : d, slopes[i][j]);
      }
    }
  }
  __device__ float get(int i, int j) const {
    return kind == PairCost::l1 ? 2 * slopes[i][j] - weights[i] : slopes[i][j];
  }
};

inline __device__ void put_group(float* shared, const float (&x)[kGroup]) {
  for (int i = 0; i < kGroup; i += 4) *(float4*)(shared + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}

template <int rows> struct GradientTile {
  static constexpr int columns = columns_of_tile(rows), teachers = teachers_of_tile(rows);
  static constexpr int weights_stride = stride_of_weights(rows), groups = columns / kGroup;

  float* tile;     // [rows][columns]: probabilities, then the gradient
  float* q;        // [teachers][columns]
  float* weights;  // [teachers][rows], with stride weights_stride
  int64_t cloud, first_row, first_column;

  __device__ GradientTile(int64_t cloud, int64_t first_row, int64_t first_column)
      : tile((float*)shared_memory()), q(tile + rows * columns), weights(q + teachers * columns), cloud(cloud),
        first_row(first_row), first_column(first_column) {}

  // Calls body(row, position) for this thread's groups of the tile.
  template <class Body> __device__ void each_group(Body body) const {
    for (int i = threadIdx.x; i < rows * groups; i += kThreadsOfGradient) body(i / groups, i % groups * kGroup);
  }
  __device__ void stage_students(const PairGradientCall& call) const {
    each_group([&](int row, int position) {
      const Probabilities student = student_row(call, cloud, first_row + row);
      float p[kGroup];
      student.of_logits(student.load_logits(first_column + position, call.columns), p);
      put_group(tile + row * columns + position, p);
    });
  }
  // Each thread stages one group of a teacher row.
  __device__ Probabilities teacher(const PairGradientCall& call, int64_t first_teacher) const {
    return teacher_row(call, cloud, first_teacher + threadIdx.x / groups);
  }
  __device__ Raw load_teacher(const PairGradientCall& call, const Probabilities& from) const {
    return from.load_logits(first_column + threadIdx.x % groups * kGroup, call.columns);
  }
  __device__ void stage_teacher(const Probabilities& from, const Raw& raw) const {
    float x[kGroup];
    from.of_logits(raw, x);
    put_group(q + threadIdx.x * kGroup, x);
  }
  __device__ void stage_weights(const PairGradientCall& call, int64_t first_teacher) const {
    for (int i = threadIdx.x; i < rows * teachers; i += kThreadsOfGradient) {
      const int row = i / teachers, column = i % teachers;
      const int64_t student = first_row + row, teacher = first_teacher + column, start = cloud * call.rows;
      float weight = 0;
      if (student < call.rows && teacher < call.rows && load((const float*)call.row_mass + start + teacher) != 0)
        weight = load((const float*)call.weights + (start + student) * call.rows + teacher);
      weights[column * weights_stride + row] = weight;
    }
  }
  __device__ void write(const PairGradientCall& call) const {
    const Dtype dtype = call.student.dtype;
    each_group([&](int row, int position) {
      const int64_t student = first_row + row, column = first_column + position, left = call.gradient_columns - column;
      if (student >= call.rows || left <= 0) return;
      char* to = (char*)call.gradient +
                 ((cloud * call.rows + student) * call.gradient_columns + column) * bytes_of(dtype);
      const bool whole = left >= kGroup && (uint64_t)to % 16 == 0;
      float x[kGroup];
      for (int i = 0; i < kGroup; ++i) x[i] = tile[row * columns + position + i];
      store_group<false>(to, dtype, whole, 0, 0, left < kGroup ? (int)left : kGroup, x);
    });
  }
};

template <PairCost kind, int rows>
__global__ void __launch_bounds__(kThreadsOfGradient, 2)
    pair_gradient_kernel(const __grid_constant__ PairGradientCall call, const __grid_constant__ PairGradientPlan plan) {
  using Tile = GradientTile<rows>;
  const int first_row = threadIdx.x / (Tile::columns / kQuad) * kQuad;  // of this thread, in the tile
  const int first_column = threadIdx.x % (Tile::columns / kQuad) * kQuad;
  const Tile tile(blockIdx.x / plan.row_tiles / plan.column_tiles, blockIdx.x % plan.row_tiles * rows,
                  blockIdx.x / plan.row_tiles % plan.column_tiles * Tile::columns);
  float* const mine = tile.tile + first_row * Tile::columns + first_column;
  float p[kQuad][kQuad];
  SlopeSums<kind> sums;
  tile.stage_students(call);
  __syncthreads();
  for (int i = 0; i < kQuad; ++i)
    for (int j = 0; j < kQuad; ++j) p[i][j] = mine[i * Tile::columns + j];

  const int64_t teachers = tile.first_column < call.columns ? call.rows : 0;  // no teachers for padding alone
  Probabilities staged = tile.teacher(call, 0);
  Raw raw = tile.load_teacher(call, staged);
  for (int64_t teacher = 0; teacher < teachers; teacher += Tile::teachers) {
    tile.stage_teacher(staged, raw);
    tile.stage_weights(call, teacher);
    __syncthreads();
    if (teacher + Tile::teachers < teachers) {
      staged = tile.teacher(call, teacher + Tile::teachers);
      raw = tile.load_teacher(call, staged);
    }
#pragma unroll 2
    for (int k = 0; k < Tile::teachers; ++k) {
      const Quad q(tile.q + k * Tile::columns + first_column);
      const Quad weight(tile.weights + k * Tile::weights_stride + first_row);
      sums.add(weight, p, q);
    }
    __syncthreads();  // all have read the teachers
  }

  const float temperature = load((const float*)call.temperature.data);
  for (int i = 0; i < kQuad; ++i) {
    const int64_t row = tile.first_row + first_row + i, at = tile.cloud * call.rows + row;
    const bool kept = row < call.rows && load((const float*)call.row_mass + at) != 0;
    const float dot = kept ? load((const float*)call.dot + at) : 0;
    for (int j = 0; j < kQuad; ++j) {
      const bool counts = kept && tile.first_column + first_column + j < call.columns;
      mine[i * Tile::columns + j] = counts ? p[i][j] / temperature * (sums.get(i, j) - dot) : 0;
    }
  }
  __syncthreads();
  tile.write(call);
}

// ---- the host

namespace {

using PairCostsKernel = void (*)(const PairCostsCall, const PairCostsPlan);
using PairGradientKernel = void (*)(const PairGradientCall, const PairGradientPlan);

template <PairCost kind> PairCostsKernel pair_costs_kernel_of(bool moments, bool small) {
  if (moments) return small ? pair_costs_kernel<kind, true, 32> : pair_costs_kernel<kind, true, 64>;
  return small ? pair_costs_kernel<kind, false, 32> : pair_costs_kernel<kind, false, 64>;
}
PairCostsKernel pair_costs_kernel_of(PairCost kind, bool moments, bool small) {
  return kind == PairCost::l1 ? pair_costs_kernel_of<PairCost::l1>(moments, small)
                              : pair_costs_kernel_of<PairCost::l2>(moments, small);
}
template <PairCost kind> PairGradientKernel pair_gradient_kernel_of(int rows) {
  return rows == 16 ? pair_gradient_kernel<kind, 16>
                    : rows == 32 ? pair_gradient_kernel<kind, 32> : pair_gradient_kernel<kind, 64>;
}
PairGradientKernel pair_gradient_kernel_of(PairCost kind, int rows) {
  return kind == PairCost::l1 ? pair_gradient_kernel_of<PairCost::l1>(rows)
                              : pair_gradient_kernel_of<PairCost::l2>(rows);
}
using FinishPairsKernel = void (*)(const PairCostsCall, int64_t);
FinishPairsKernel finish_pairs_kernel_of(PairCost kind) {
  return kind == PairCost::l1 ? finish_pairs_kernel<PairCost::l1> : finish_pairs_kernel<PairCost::l2>;
}

int64_t parts_of(int64_t x, int64_t part) { return (x + part - 1) / part; }
int grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("the clouds take more blocks than a grid may have");
  return (int)blocks;
}

bool takes_small_squares(int64_t rows) { return rows <= 32; }

// Takes enough ranges to fill the chip, but no range so short that its start costs more than its columns.
PairCostsPlan plan_costs(const PairCostsCall& call) {
  const int64_t clouds = call.clouds, rows = call.rows, columns = call.columns;
  const bool small = takes_small_squares(rows);
  const int side = small ? 32 : 64;
  const PairCostsKernel kernel = pair_costs_kernel_of(PairCost::l1, true, small);  // each kernel has the same workspace
  const Chip chip(call.run.device, kernel);
  PairCostsPlan plan = {};
  plan.blocks = 1, plan.threads = threads_of_square(side), plan.shared = shared_of_square(side);
  require_room(plan.shared <= chip.shared);
  plan.tiles = parts_of(rows, side);
  const int64_t squares = clouds * plan.tiles * plan.tiles;
  const int64_t fill = teams_at_once(kernel, plan, chip, call.run.device) / squares;
  const int64_t least = parts_of(columns, kRunningSum), most = parts_of(columns, 4 * columns_of_square(side));
  plan.ranges = fill < least ? least : fill < most ? fill : most;
  plan.range = parts_of(parts_of(columns, plan.ranges), columns_of_square(side)) * columns_of_square(side);
  plan.ranges = parts_of(columns, plan.range);
  plan.grid = grid_of(squares * plan.ranges);
  return plan;
}

PairGradientPlan plan_gradient(const PairGradientCall& call, int rows) {
  PairGradientPlan plan = {};
  plan.blocks = 1, plan.threads = kThreadsOfGradient, plan.shared = shared_of_tile(rows);
  require_room(plan.shared <= Chip(call.run.device, pair_gradient_kernel_of(call.kind, rows)).shared);
  plan.row_tiles = parts_of(call.rows, rows);
  plan.column_tiles = parts_of(call.gradient_columns, columns_of_tile(rows));
  plan.grid = grid_of(call.clouds * plan.row_tiles * plan.column_tiles);
  return plan;
}

}  // namespace

int64_t pair_costs_bytes(const PairCostsCall& call) {
  OnDevice guard(call.run.device);
  return 2 * plan_costs(call).ranges * call.clouds * call.rows * call.rows * (int64_t)sizeof(float);
}

void pair_costs(const PairCostsCall& call) {
  OnDevice guard(call.run.device);
  const PairCostsPlan plan = plan_costs(call);
  launch(pair_costs_kernel_of(call.kind, !!call.moments, takes_small_squares(call.rows)), plan, call.run, call, plan);
  const int64_t blocks = parts_of(call.clouds * call.rows * call.rows, kFinishedPairs);
  const Launch finish = {1, kFinishedPairs * kPartsOfRanges, kSharedOfFinish, grid_of(blocks)};
  launch(finish_pairs_kernel_of(call.kind), finish, call.run, call, plan.ranges);
}

int64_t pair_gradient_bytes(const PairGradientCall&) { return 0; }

void pair_gradient(const PairGradientCall& call) {
  OnDevice guard(call.run.device);
  const int rows = call.rows <= 16 ? 16 : call.rows <= 32 ? 32 : 64;
  const PairGradientPlan plan = plan_gradient(call, rows);
  launch(pair_gradient_kernel_of(call.kind, rows), plan, call.run, call, plan);
}

void load_pairwise() {
  cudaFuncAttributes attributes;
  for (PairCost kind : {PairCost::l1, PairCost::l2}) {
    for (bool moments : {false, true})
      for (bool small : {false, true})
        KDK_CHECK(cudaFuncGetAttributes, &attributes, pair_costs_kernel_of(kind, moments, small));
    for (int rows : {16, 32, 64}) KDK_CHECK(cudaFuncGetAttributes, &attributes, pair_gradient_kernel_of(kind, rows));
    KDK_CHECK(cudaFuncGetAttributes, &attributes, finish_pairs_kernel_of(kind));
  }
}

}  // namespace cuda
}  // namespace kdk
