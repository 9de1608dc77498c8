// Sinkhorn's iterations on an NVIDIA GPU: the twin of csrc/cpu/sinkhorn.cpp. calls/sinkhorn.h has the formulas and
// their numbers.
//
// A block works on one problem after the other, each from its costs to its derivatives. Threads read costs along rows,
// where they are neighbours in memory: each lane of a warp has a part of a row's sum, and each warp has a part of a
// column's sum. A problem is solved in one of two domains (sinkhorn_domains.h): in scalings where the costs span at
// most 30 epsilon and no pair is forbidden, elsewhere in logarithms. Within 30 epsilon no scaling leaves fp32: all u
// lie within e^30 of each other, and so do all v.
//
// Both domains add min C to f at the end. Masses are in units of the largest power of two below their sum. Sums of P C
// and their derivatives take C - min C instead of C, and min C sum b is added at the end: the columns of P add up to b.
//
// Unrolled, the history stores the steps of all rounds. The reverse sweep computes the sums of (R2) and (R3) for each
// round, from the terms of each step divided by the step's sum. The history stores alpha_f and alpha_g too. grad_C is
// computed at the end, each element once, as the sum over the rounds: no [n, m] is written more than once.
//
// Matrix and history are in shared memory where they fit (n = m = 160 with 20 rounds, on an H100), else in the
// workspace, which a chip's L2 cache holds.
//
// Computed for an H100, and not yet measured: n = m = 64 takes 256 threads, 16 products and 12 shuffles a lane in a row
// step and 16 products in a column step. Their latency and three barriers bound a round, at about 0.4 us. With the
// matrix in the workspace, the rate at which one multiprocessor reads the L2 cache bounds a half step: one large
// problem alone leaves the chip idle.
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include "device.h"
#include "launch.h"
#include "sinkhorn_data.h"
#include "sinkhorn_domains.h"
#include "table.h"
#include "team.h"

namespace kdk {
namespace cuda {

constexpr float kGuard = 80 * kLog2e;  // the largest exponent of a point without mass, which no sum bounds
constexpr int kRowsAtOnce = 4;         // rows of a warp

struct SinkhornPlan : Launch {
  InShared in_shared;
  int64_t workspace;  // floats of a block
};

// ---- sums along rows and columns

template <class X> inline __device__ X from_lane_across(const X& x, int bits) {
  Words<X> moved(x);
  for (int i = 0; i < moved.count; ++i) moved.words[i] = __shfl_xor_sync(0xffffffffu, moved.words[i], bits);
  return moved.value();
}

// Chooses word by word: a choice between addresses would put both structs into memory.
template <class X> inline __device__ X either(bool first, const X& a, const X& b) {
  Words<X> chosen(b);
  const Words<X> other(a);
  for (int i = 0; i < chosen.count; ++i) chosen.words[i] = first ? other.words[i] : chosen.words[i];
  return chosen.value();
}

// Merges four partial results of each lane. Lanes 8 i to 8 i + 7 return the merge of all lanes' result i. Each of the
// first two exchanges halves the number of results of a lane.
template <class X> inline __device__ X merge_four(const X (&x)[kRowsAtOnce]) {
  const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
  X a = either(upper, x[2], x[0]), b = either(upper, x[3], x[1]);
  a.merge(from_lane_across(either(upper, x[0], x[2]), 16));
  b.merge(from_lane_across(either(upper, x[1], x[3]), 16));
  X mine = either(odd, b, a);
  mine.merge(from_lane_across(either(odd, a, b), 8));
  for (int by = 4; by; by /= 2) mine.merge(from_lane_across(mine, by));
  return mine;
}

// For each row i: each(x, i, j) adds column j to an X; one thread calls result(i, x) with the merge over all columns.
// All threads of the block call reduce_rows.
template <class X, class Each, class Result>
inline __device__ void reduce_rows(int n, int m, Each each, Result result) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int first = warp * kRowsAtOnce; first < n; first += warps * kRowsAtOnce) {
    X x[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) x[r] = X::none();
#pragma unroll 2
    for (int j = lane; j < m; j += kWarp)
      for (int r = 0; r < kRowsAtOnce; ++r) each(x[r], first + r < n ? first + r : n - 1, j);
    const X mine = merge_four(x);
    const int i = first + lane / 8;
    if (lane % 8 == 0 && i < n) result(i, mine);
  }
}

// The same for columns. A warp takes 32 columns, and only a part of the rows if some warps would have no columns. Parts
// are merged in order. `parts` has room for one X for each thread, and for one X for each column.
template <class X, class Each, class Result>
inline __device__ void reduce_columns(int n, int m, X* parts, Each each, Result result) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int strips = (m + kWarp - 1) / kWarp, count = strips < warps ? warps / strips : 1;
  const int rows = (n + count - 1) / count;
  for (int unit = warp; unit < strips * count; unit += warps) {
    const int j = unit % strips * kWarp + lane, part = unit / strips;
    if (j >= m) continue;
    const int end = (part + 1) * rows < n ? (part + 1) * rows : n;
    X x = X::none();
#pragma unroll 8
    for (int i = part * rows; i < end; ++i) each(x, i, j);
    parts[part * m + j] = x;
  }
  __syncthreads();  // all parts are there
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    X x = parts[j];
    for (int part = 1; part < count; ++part) x.merge(parts[part * m + j]);
    result(j, x);
  }
}

// ---- points

// The points of one side, in shared memory. Masses are in the problem's units.
struct Points {
  static constexpr int kVectors = 9;
  int count;
  float *mass, *factor, *potential, *weighted, *next, *base, *inverse, *alpha, *grad_mass;

  __device__ Points(float* memory, int count)
      : count(count), mass(memory), factor(mass + count), potential(factor + count), weighted(potential + count),
        next(weighted + count), base(next + count), inverse(base + count), alpha(inverse + count),
        grad_mass(alpha + count) {}
  __device__ Step step(int i) const { return {potential[i], base[i], inverse[i]}; }
  // The point's potential with its mass; without it if the mass is 0, because the point has derivatives too. No sum
  // bounds the exponents of these.
  __device__ float own(int i) const { return mass[i] == 0 ? potential[i] : weighted[i]; }
  __device__ float limit(int i) const { return mass[i] == 0 ? kGuard : INFINITY; }
  // x, which was computed from own(i), divided by the mass.
  __device__ float without_mass(int i, float x) const { return mass[i] == 0 ? x : x / mass[i]; }
  __device__ float with_mass(int i, float x) const { return mass[i] == 0 ? 0 : x; }
};

// ---- a problem

template <class Domain, InShared in_shared> struct Problem {
  const SinkhornCall& call;
  const Units& units;
  Team& team;
  Points rows, columns;
  Matrix<in_shared> matrix;
  History<in_shared> history;
  void* parts;
  const float* cost;

  __device__ float stored(int i, int j) const { return matrix.get(i * columns.count + j); }
  __device__ float cost_at(int i, int j) const {  // C - min C
    return load(cost + (int64_t)i * columns.count + j) - units.offset;
  }
  template <class X, class Each, class Result> __device__ void each_row(Each each, Result result) const {
    reduce_rows<X>(rows.count, columns.count, each, result);
  }
  template <class X, class Each, class Result> __device__ void each_column(Each each, Result result) const {
    reduce_columns(rows.count, columns.count, (X*)parts, each, result);
  }
  template <class Body> static __device__ void each_point(const Points& points, Body body) {
    for (int i = threadIdx.x; i < points.count; i += blockDim.x) body(i);
  }
  static __device__ void set(const Points& points, int i, const Step& step) {
    points.potential[i] = step.potential;
    points.weighted[i] = Domain::weighted(step.potential, points.factor[i]);
    if (Domain::kNormalizes) points.base[i] = step.base, points.inverse[i] = step.inverse;
  }

  __device__ void begin() {
    for (int at = threadIdx.x; at < rows.count * columns.count; at += blockDim.x) {
      const float x = in_shared == InShared::nothing ? load(cost + at) : matrix.get(at);
      matrix.set(at, Domain::stored(units.exponent(x)));
    }
    each_point(rows, [&](int i) {
      rows.mass[i] *= 1 / units.mass;
      rows.factor[i] = Domain::factor(rows.mass[i]);
    });
    each_point(columns, [&](int j) {
      columns.mass[j] *= 1 / units.mass;
      columns.factor[j] = Domain::factor(columns.mass[j]);
      set(columns, j, Domain::first());
      if (call.unrolled) history.template set_column<Domain>(0, j, Domain::first());
    });
    __syncthreads();
  }

  // (1): computes the next f. Returns this thread's part of (3), sum_i |a_i exp((f_i - next f_i) / epsilon) - a_i|, for
  // the present f.
  __device__ float row_step(int64_t round) {
    float off = 0;
    each_row<typename Domain::Total>(
        [&](auto& total, int i, int j) { Domain::add(total, stored(i, j), columns.weighted[j]); },
        [&](int i, const auto& total) {
          const Step step = Domain::step(total, rows.mass[i]);
          if (round > 0 && rows.mass[i] != 0)
            off += rows.mass[i] * fabsf(Domain::ratio(rows.potential[i], step.potential) - 1);
          rows.next[i] = step.potential;
          rows.weighted[i] = Domain::weighted(step.potential, rows.factor[i]);
          if (call.unrolled && round < call.iterations) history.template set_row<Domain>(round, i, step);
        });
    return off;
  }
  // (2)
  __device__ void column_step(int64_t round) {
    each_column<typename Domain::Total>(
        [&](auto& total, int i, int j) { Domain::add(total, stored(i, j), rows.weighted[i]); },
        [&](int j, const auto& total) {
          const Step step = Domain::step(total, columns.mass[j]);
          set(columns, j, step);
          if (call.unrolled) history.template set_column<Domain>(round + 1, j, step);
        });
    __syncthreads();
  }

  // Returns the number of rounds and sets the error.
  __device__ int64_t iterate(float* error) {
    for (int64_t round = 0;; ++round) {
      float off = row_step(round);
      if (round == call.iterations || (round > 0 && units.tolerance > 0)) {
        off = team.merged(Sum{off}).sum;
        *error = units.mass_a == 0 ? 0 : off * units.mass / units.mass_a;
        if (round == call.iterations || *error <= units.tolerance) {  // the potentials stay those of the last round
          each_point(rows, [&](int i) { rows.weighted[i] = Domain::weighted(rows.potential[i], rows.factor[i]); });
          __syncthreads();
          return round;
        }
      } else {
        __syncthreads();
      }
      float* const before = rows.potential;
      rows.potential = rows.next, rows.next = before;
      column_step(round);
    }
  }

  // a_i w_ij, from a term of (2) and its sum, so that each column adds up to 1. of_column_own leaves a_i out if it is
  // 0.
  __device__ float of_column(int i, int j) const {
    return Domain::share(rows.weighted[i], stored(i, j), columns.step(j), INFINITY);
  }
  __device__ float of_column_own(int i, int j) const {
    return Domain::share(rows.own(i), stored(i, j), columns.step(j), rows.limit(i));
  }
  // b_j w_ij, from a term of (1) and its sum, for g before the round; without b_j if that is 0.
  __device__ float of_row_own(int i, int j) const {
    return Domain::share(columns.own(j), stored(i, j), rows.step(i), columns.limit(j));
  }

  // rows.next = sum_j P_ij C_ij, without a_i if that is 0; columns.next = sum_i P_ij C_ij / b_j.
  __device__ void sum_costs() const {
    each_row<Sum>(
        [&](Sum& x, int i, int j) { x.sum += columns.mass[j] * cost_of_plan(of_column_own(i, j), cost_at(i, j)); },
        [&](int i, const Sum& x) { rows.next[i] = x.sum; });
    if (call.unrolled)
      each_column<Sum>([&](Sum& x, int i, int j) { x.sum += cost_of_plan(of_column(i, j), cost_at(i, j)); },
                       [&](int j, const Sum& x) { columns.next[j] = x.sum; });
    __syncthreads();
  }

  __device__ float f_of(int i) const { return units.f(Domain::log2_of(rows.potential[i])); }
  __device__ float g_of(int j) const { return units.g(Domain::log2_of(columns.potential[j])); }

  // (4)
  __device__ float value() {
    Sum mine = Sum::none();
    if (!call.entropic) {
      each_point(rows, [&](int i) { mine.sum += rows.with_mass(i, rows.next[i]); });
      return units.mass * team.merged(mine).sum + units.offset * units.mass_b;
    }
    each_point(rows, [&](int i) { mine.sum += rows.mass[i] * f_of(i); });
    each_point(columns, [&](int j) { mine.sum += columns.mass[j] * g_of(j); });
    return units.mass * team.merged(mine).sum - units.epsilon * (units.mass_b - units.mass_a * units.mass_b);
  }

  __device__ void write(int64_t problem, float value, float error, int64_t rounds) const {
    each_point(rows, [&](int i) { store((float*)call.f + problem * rows.count + i, f_of(i)); });
    each_point(columns, [&](int j) { store((float*)call.g + problem * columns.count + j, g_of(j)); });
    if (threadIdx.x) return;
    store((float*)call.value + problem, value);
    store((float*)call.error + problem, error);
    store(call.done + problem, (int32_t)rounds);
  }

  // ---- the derivatives, with masses in units, so that the derivatives of the costs are in units too

  // (R1), without grad_C.
  __device__ void begin_reverse() const {
    each_point(rows, [&](int i) {
      rows.alpha[i] = call.entropic ? units.epsilon * rows.mass[i] : rows.with_mass(i, rows.next[i]);
      rows.grad_mass[i] = call.entropic ? f_of(i) + units.epsilon * units.mass_b : rows.without_mass(i, rows.next[i]);
    });
    each_point(columns, [&](int j) {
      columns.alpha[j] = columns.mass[j] * (call.entropic ? units.epsilon : columns.next[j]);
      const float smallest = columns.potential[j] == -INFINITY ? 0 : units.offset;  // no partner, no cost
      columns.grad_mass[j] = call.entropic ? g_of(j) + units.epsilon * (units.mass_a - 1) : columns.next[j] + smallest;
    });
    __syncthreads();
  }

  // (R2) and (R3), without grad_C.
  __device__ void reverse_round(int64_t round, bool last) const {
    each_point(rows, [&](int i) { set(rows, i, history.template row_step<Domain>(round, i)); });
    each_point(columns, [&](int j) {
      set(columns, j, history.template column_step<Domain>(round + 1, j));
      history.set(history.column(history.kAlpha, round + 1, j), columns.alpha[j]);
    });
    __syncthreads();
    each_row<Sum>([&](Sum& x, int i, int j) { x.sum += of_column_own(i, j) * columns.alpha[j]; },
                  [&](int i, const Sum& x) {
                    rows.grad_mass[i] -= rows.without_mass(i, x.sum);
                    rows.alpha[i] = (last ? rows.alpha[i] : 0) - rows.with_mass(i, x.sum);
                    history.set(history.row(history.kAlpha, round, i), rows.alpha[i]);
                  });
    __syncthreads();
    each_point(columns, [&](int j) { set(columns, j, history.template column_step<Domain>(round, j)); });
    __syncthreads();
    each_column<Sum>([&](Sum& x, int i, int j) { x.sum += of_row_own(i, j) * rows.alpha[i]; },
                     [&](int j, const Sum& x) {
                       columns.grad_mass[j] -= columns.without_mass(j, x.sum);
                       columns.alpha[j] = -columns.with_mass(j, x.sum);
                     });
    __syncthreads();
  }

  // grad_C: (R1)'s P - P C / epsilon, or 0, and (R2) and (R3) of all rounds:
  // sum over the rounds of (a_i w_ij alpha_g_j + b_j w_ij alpha_f_i) / epsilon.
  __device__ void write_grad_cost(float* grad_cost, int64_t rounds) const {
    each_point(rows, [&](int i) { set(rows, i, history.template row_step<Domain>(rounds - 1, i)); });
    each_point(columns, [&](int j) { set(columns, j, history.template column_step<Domain>(rounds, j)); });
    __syncthreads();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const float per_epsilon = 1 / units.epsilon;
    for (int first = warp * kRowsAtOnce; first < rows.count; first += warps * kRowsAtOnce)
      for (int j = lane; j < columns.count; j += kWarp) {
        float x[kRowsAtOnce], sum[kRowsAtOnce] = {};
        int row[kRowsAtOnce];
        for (int r = 0; r < kRowsAtOnce; ++r) {
          row[r] = first + r < rows.count ? first + r : rows.count - 1;
          x[r] = stored(row[r], j);
        }
        float before = history.get(history.column(0, 0, j));
#pragma unroll 1
        for (int64_t t = 0; t < rounds; ++t) {
          const Step column = history.template column_step<Domain>(t + 1, j);
          const float alpha_g = history.get(history.column(history.kAlpha, t + 1, j));
          const float column_before = Domain::weighted(before, columns.factor[j]);
          for (int r = 0; r < kRowsAtOnce; ++r) {
            const Step step = history.template row_step<Domain>(t, row[r]);
            const float alpha_f = history.get(history.row(history.kAlpha, t, row[r]));
            sum[r] += Domain::of_round(Domain::weighted(step.potential, rows.factor[row[r]]), step, alpha_f,
                                       column_before, column, alpha_g, x[r]);
          }
          before = column.potential;
        }
        for (int r = 0; r < kRowsAtOnce; ++r) {
          if (first + r >= rows.count) break;
          float of_pair = Domain::of_rounds(sum[r], x[r]) * per_epsilon;
          if (!call.entropic) {
            const float plan = columns.mass[j] * of_column(row[r], j);
            of_pair += plan - cost_of_plan(plan, cost_at(row[r], j)) * per_epsilon;
          }
          store(grad_cost + (int64_t)row[r] * columns.count + j, units.mass * of_pair);
        }
      }
  }

  __device__ void reverse(int64_t problem, int64_t rounds) const {
    begin_reverse();
    for (int64_t round = rounds - 1; round >= 0; --round) reverse_round(round, round == rounds - 1);
    each_point(rows, [&](int i) { store((float*)call.grad_a + problem * rows.count + i, rows.grad_mass[i]); });
    each_point(columns, [&](int j) { store((float*)call.grad_b + problem * columns.count + j, columns.grad_mass[j]); });
    write_grad_cost((float*)call.grad_cost + problem * rows.count * columns.count, rounds);
  }

  __device__ void solve(int64_t problem) {
    begin();
    float error = 0;
    const int64_t rounds = iterate(&error);
    if (!call.entropic) sum_costs();
    const float found = value();
    write(problem, found, error, rounds);
    if (call.unrolled) reverse(problem, rounds);
  }
};

// Reads costs and masses. The costs stay in shared memory if it holds the matrix.
template <InShared in_shared>
inline __device__ Facts read_problem(const SinkhornCall& call, int64_t problem, const float* cost, const Points& rows,
                                     const Points& columns, const Matrix<in_shared>& matrix, Team& team) {
  Facts mine = Facts::none();
  for (int at = threadIdx.x; at < rows.count * columns.count; at += blockDim.x) {
    const float x = load(cost + at);
    if (in_shared != InShared::nothing) matrix.set(at, x);
    mine.add(x);
  }
  for (int i = threadIdx.x; i < rows.count; i += blockDim.x)
    mine.mass_a += rows.mass[i] = load((const float*)call.a + problem * rows.count + i);
  for (int j = threadIdx.x; j < columns.count; j += blockDim.x)
    mine.mass_b += columns.mass[j] = load((const float*)call.b + problem * columns.count + j);
  return team.merged(mine);
}

template <InShared in_shared>
__global__ void __launch_bounds__(kMaxThreads)
    sinkhorn_kernel(const __grid_constant__ SinkhornCall call, const __grid_constant__ SinkhornPlan plan) {
  Team team(plan);
  const int n = (int)call.n, m = (int)call.m;
  char* memory = team.board.data();
  void* const parts = memory;
  float* vectors = (float*)memory + 2 * (blockDim.x > m ? (int)blockDim.x : m);
  const Points rows(vectors, n), columns(vectors + Points::kVectors * n, m);
  vectors += Points::kVectors * (n + m);
  float* const workspace = (float*)call.run.workspace + blockIdx.x * plan.workspace;
  const Matrix<in_shared> matrix = {in_shared == InShared::nothing ? workspace : vectors};
  const History<in_shared> history = {
      in_shared == InShared::matrix_and_history ? vectors + n * m
      : in_shared == InShared::matrix           ? workspace
                                                : workspace + n * m,
      n, m, call.iterations};

  for (int64_t problem = blockIdx.x; problem < call.problems; problem += gridDim.x) {
    const float* cost = (const float*)call.cost + problem * n * m;
    const Units units(call, read_problem(call, problem, cost, rows, columns, matrix, team));
    if (units.scalings)
      Problem<Scalings, in_shared>{call, units, team, rows, columns, matrix, history, parts, cost}.solve(problem);
    else
      Problem<Logarithms, in_shared>{call, units, team, rows, columns, matrix, history, parts, cost}.solve(problem);
    __syncthreads();  // all have read what the next problem overwrites
  }
}

// ---- the host

namespace {

using SinkhornKernel = void (*)(const SinkhornCall, const SinkhornPlan);

SinkhornKernel sinkhorn_kernel_of(InShared in_shared) {
  return in_shared == InShared::matrix_and_history ? sinkhorn_kernel<InShared::matrix_and_history>
         : in_shared == InShared::matrix           ? sinkhorn_kernel<InShared::matrix>
                                                   : sinkhorn_kernel<InShared::nothing>;
}

// Takes a thread for about 16 pairs, so that small problems share a multiprocessor.
SinkhornPlan plan_sinkhorn(const SinkhornCall& call) {
  const int64_t n = call.n, m = call.m;
  const int device = call.run.device;
  const Chip chip(device, sinkhorn_kernel_of(InShared::nothing));
  SinkhornPlan plan = {};
  plan.blocks = 1;
  plan.threads = kWarp;
  while (plan.threads < kMaxThreads && n * m > 16 * plan.threads) plan.threads *= 2;
  const int64_t floats = Points::kVectors * (n + m) + 2 * (plan.threads > m ? plan.threads : m);
  auto bytes_with = [&](int64_t more) { return shared_with_board(plan.threads, 1, (floats + more) * sizeof(float)); };
  if (bytes_with(0) > chip.shared)
    throw std::runtime_error("sinkhorn: problems of " + std::to_string(n) + " and " + std::to_string(m) +
                             " points take " + std::to_string(bytes_with(0)) + " bytes of shared memory beside their " +
                             "costs, and a block of this device may have " + std::to_string(chip.shared) +
                             "; the backend reference takes any number");
  const int64_t matrix = n * m, history = call.unrolled ? History<InShared::nothing>::floats(n, m, call.iterations) : 0;
  auto fits = [&](int64_t more) { return bytes_with(more) <= chip.shared; };
  plan.in_shared = fits(matrix + history) ? InShared::matrix_and_history
                   : fits(matrix)         ? InShared::matrix
                                          : InShared::nothing;
  const int64_t shared = plan.in_shared == InShared::nothing  ? 0
                         : plan.in_shared == InShared::matrix ? matrix
                                                              : matrix + history;
  plan.shared = (int)bytes_with(shared);
  plan.workspace = matrix + history - shared;
  const int64_t at_once = teams_at_once(sinkhorn_kernel_of(plan.in_shared), plan, chip, device);
  require_room(at_once > 0);
  plan.grid = (int)(call.problems < at_once ? call.problems : at_once);
  return plan;
}

}  // namespace

int64_t sinkhorn_bytes(const SinkhornCall& call) {
  OnDevice guard(call.run.device);
  const SinkhornPlan plan = plan_sinkhorn(call);
  return plan.grid * plan.workspace * (int64_t)sizeof(float);
}

// Throws a std::runtime_error if the n + m points of a problem do not fit the shared memory of a block: on an H100,
// above about 5,700 points. A problem that holds a NaN, or has an epsilon <= 0, becomes NaN.
void sinkhorn(const SinkhornCall& call) {
  OnDevice guard(call.run.device);
  const SinkhornPlan plan = plan_sinkhorn(call);
  launch(sinkhorn_kernel_of(plan.in_shared), plan, call.run, call, plan);
}

void load_sinkhorn() {
  cudaFuncAttributes attributes;
  for (InShared in_shared : {InShared::matrix_and_history, InShared::matrix, InShared::nothing})
    KDK_CHECK(cudaFuncGetAttributes, &attributes, sinkhorn_kernel_of(in_shared));
}

}  // namespace cuda
}  // namespace kdk
