// Costs between the rows of two clouds of logits on a CPU, and their gradient. calls/pairwise.h has the formulas.
//
// A kernel walks the vocabulary in tiles of columns. It computes the probabilities of all rows of both clouds in a tile
// once, and the probabilities stay in a cache while every pair of rows meets. No difference is stored. The cost of a
// tile is a sum of a few dozen terms a lane.
//
// Threads share the tiles. For costs, the tiles form slices; the number of slices depends on sizes alone, and the sums
// of slices are added in order, so that results do not depend on the number of threads. For large clouds, whose slices
// would take too much memory, there are fewer slices than threads, and the threads share the rows of the student
// instead.
//
// This file is compiled once per instruction set into a namespace of that name; it calls no std:: template.
#if defined(__F16C__)
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "../calls/kernels.h"

namespace kdk {
namespace KDK_ISA {

#include "elementary.h"
#include "storage.h"
#include "sweeps.h"

// A vector that fills one register.
template <class T> struct Vector;
template <> struct Vector<float> {
  typedef float type __attribute__((vector_size(4 * kLanes)));
  typedef int32_t bits __attribute__((vector_size(4 * kLanes)));
  static constexpr int lanes = kLanes;
  static constexpr int32_t sign = (int32_t)0x80000000;
};
template <> struct Vector<double> {
  typedef double type __attribute__((vector_size(4 * kLanes)));
  typedef int64_t bits __attribute__((vector_size(4 * kLanes)));
  static constexpr int lanes = kLanes / 2;
  static constexpr int64_t sign = (int64_t)1 << 63;
};

template <class T> inline typename Vector<T>::type load(const T* from) {
  typename Vector<T>::type x;
  memcpy(&x, from, sizeof(x));
  return x;
}
template <class T> inline void store(T* to, typename Vector<T>::type x) { memcpy(to, &x, sizeof(x)); }
template <class T> inline typename Vector<T>::type every(T x) { return x - (typename Vector<T>::type){}; }

template <class T> inline typename Vector<T>::type magnitude(typename Vector<T>::type x) {
  typedef typename Vector<T>::bits Bits;
  return (typename Vector<T>::type)((Bits)x & ~(Vector<T>::sign - (Bits){}));
}
// sum + sign(difference) x, where sign(0) = 0.
template <class T>
inline typename Vector<T>::type add_signed(typename Vector<T>::type sum, typename Vector<T>::type difference,
                                           typename Vector<T>::type x) {
  typedef typename Vector<T>::bits Bits;
  Bits found = ((Bits)difference & (Vector<T>::sign - (Bits){})) ^ (Bits)x;
  return sum + (typename Vector<T>::type)(difference != 0 ? found : (Bits){});
}
#if defined(__AVX512F__)
// The same with one instruction for the sign. The hexadecimal digits of its table, from the lowest digit up, give the
// results for a quiet NaN, a signalling NaN, 0, 1, -inf, inf, negative numbers and positive numbers: the NaN, the NaN,
// 0, 1, -1, 1, -1, 1.
template <>
inline Vector<float>::type add_signed<float>(Vector<float>::type sum, Vector<float>::type difference,
                                             Vector<float>::type x) {
  const __m512 d = (__m512)difference;
  return sum + (Vector<float>::type)_mm512_fixupimm_ps(d, d, _mm512_set1_epi32((int)0xa9a9a822u), 0) * x;
}
#endif

constexpr int kRows = 4;                    // rows of the student that meet a row of the teacher at a time
constexpr int64_t kTileBytes = 1 << 19;     // bytes of each side's probabilities

inline int64_t rounded_rows(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

// Columns of a tile: an even number of registers, because the gradient takes two registers at a time.
template <class T> int64_t tile_columns(int64_t rows) {
  constexpr int64_t least = 2 * Vector<T>::lanes;
  int64_t fits = kTileBytes / (int64_t)sizeof(T) / rows / least * least;
  return fits < 4 * least ? 4 * least : fits > kBlock ? kBlock : fits;
}

template <class T> T* aligned(void* workspace) { return (T*)(((uintptr_t)workspace + 63) / 64 * 64); }

// A cloud, and its probabilities in a tile of columns: the common part of both kernels.
template <class T, class Call> struct Cloud {
  const Call& call;
  const int64_t cloud, rows, width;
  T *p, *q;  // [rounded rows, width]
  T temperature;

  // Numbers in the scratch memory.
  static int64_t numbers(int64_t rows) { return 2 * rounded_rows(rows) * tile_columns<T>(rows); }

  Cloud(const Call& call, int64_t cloud, T* scratch)
      : call(call),
        cloud(cloud),
        rows(call.rows),
        width(tile_columns<T>(call.rows)),
        p(scratch),
        q(scratch + rounded_rows(call.rows) * width),
        temperature(per_row<T>(call.temperature, 0)) {
    if (!(temperature > 0)) temperature = NAN;
  }
  template <class X> T of_row(const X& numbers, int64_t row) const { return ((const T*)numbers)[cloud * rows + row]; }
  bool is_kept(int64_t row) const { return of_row(call.row_mass, row) != 0; }
  int64_t columns_of(int64_t tile) const {
    int64_t left = call.columns - tile * width;
    return left < width ? left : width;
  }

  // Fills row `of_both`, which counts the student's rows and then the teacher's. Dropped rows, rows that round up, and
  // columns past the last are 0.
  void fill(int64_t tile, int64_t of_both) const {
    const bool is_teacher = of_both >= rounded_rows(rows);
    const int64_t row = is_teacher ? of_both - rounded_rows(rows) : of_both;
    T* out = (is_teacher ? q : p) + row * width;
    const int64_t columns = row < rows && is_kept(row) ? columns_of(tile) : 0;
    if (columns) {
      const Logits& x = is_teacher ? call.teacher : call.student;
      const int64_t start = cloud * x.outer_stride + row * x.inner_stride + tile * width;
      const int64_t stride = call.clouds * rows;  // from max to log_sum in `floats`
      const T* floats = (const T*)call.floats + (is_teacher ? 2 : 0) * stride;
      const T max = of_row(floats, row), log_sum = of_row(floats + stride, row), inverse_temperature = 1 / temperature;
      alignas(64) T buffer[kBlock];
      const T* in = widen((const char*)x.data + start * bytes_of(x.dtype), x.dtype, (int)columns, buffer);
#pragma omp simd
      for (int64_t v = 0; v < columns; ++v) {
        T log_prob = (in[v] - max) * inverse_temperature - log_sum;
        out[v] = exp_of_nonpositive(log_prob > 0 ? T(0) : log_prob);  // rounding may bring it above 0
      }
    }
    for (int64_t v = columns; v < width; ++v) out[v] = 0;
  }
  template <class Team> void fill_tile(int64_t tile) const {
    Team::blocks(2 * rounded_rows(rows), [&](int64_t of_both) { fill(tile, of_both); });
  }
};

// ---- costs

// The number of slices of a cloud's tiles: enough to keep some threads busy, few enough for a few megabytes of sums.
inline int64_t slices_of(int64_t clouds, int64_t rows, int64_t tiles) {
  const int64_t all = rounded_rows(rows), fit = (4 << 20) / (8 * all * all) + 1, wanted = 16 / clouds + 1;
  int64_t slices = fit < wanted ? fit : wanted;
  return slices < tiles ? slices : tiles;
}

template <class T> struct Costs : Cloud<T, PairCostsCall> {
  typedef Cloud<T, PairCostsCall> Base;
  typedef typename Vector<T>::type V;
  using Base::call, Base::cloud, Base::rows, Base::width, Base::p, Base::q;
  T *sums, *moments;  // [rounded rows, rounded rows], of a slice

  static int64_t sums_of(int64_t rows) { return 2 * rounded_rows(rows) * rounded_rows(rows); }

  Costs(const PairCostsCall& call, int64_t cloud, T* scratch, T* sums)
      : Base(call, cloud, scratch), sums(sums), moments(sums + sums_of(call.rows) / 2) {}

  // Adds the sums of kRows rows of the student and two rows of the teacher.
  template <PairCost kind, bool with_moments> void meet(int64_t i, int64_t j) const {
    V sum[kRows][2] = {}, moment[kRows][2] = {};
    const T *students = p + i * width, *teachers = q + j * width;
    for (int64_t v = 0; v < width; v += Vector<T>::lanes) {
      const V q0 = load(teachers + v), q1 = load(teachers + width + v);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V of_student = load(students + r * width + v);
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          const V difference = of_student - (c ? q1 : q0);
          sum[r][c] += kind == PairCost::l1 ? magnitude<T>(difference) : difference * difference;
          if (with_moments)
            moment[r][c] = kind == PairCost::l1 ? add_signed<T>(moment[r][c], difference, of_student)
                                                : moment[r][c] + difference * of_student;
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < 2; ++c) {
        const int64_t pair = (i + r) * rounded_rows(rows) + j + c;
        sums[pair] += total(sum[r][c]);
        if (with_moments) moments[pair] += total(moment[r][c]);
      }
  }
  static T total(V x) {
    T sum = 0;
    for (int lane = 0; lane < Vector<T>::lanes; ++lane) sum += x[lane];
    return sum;
  }
  void meet(int64_t i, int64_t j) const {
    const bool with_moments(call.moments);
    if (call.kind == PairCost::l1)
      with_moments ? meet<PairCost::l1, true>(i, j) : meet<PairCost::l1, false>(i, j);
    else
      with_moments ? meet<PairCost::l2, true>(i, j) : meet<PairCost::l2, false>(i, j);
  }
  template <class Team> void add_tiles(int64_t first, int64_t end) const {
    const int64_t all = rounded_rows(rows);
    Team::blocks(all / kRows, [&](int64_t block) {
      memset(sums + block * kRows * all, 0, kRows * all * sizeof(T));
      memset(moments + block * kRows * all, 0, kRows * all * sizeof(T));
    });
    for (int64_t tile = first; tile < end; ++tile) {
      this->template fill_tile<Team>(tile);
      Team::blocks(all / kRows, [&](int64_t block) {
        for (int64_t j = 0; j < all; j += 2) meet(block * kRows, j);
      });
    }
  }
  // Writes row i of the cloud's costs and moments: adds the sums of all slices. This object has those of slice 0.
  void write(int64_t i, int64_t slices) const {
    const int64_t all = rounded_rows(rows);
    const bool is_root = call.kind == PairCost::l2;
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t to = (cloud * rows + i) * rows + j;
      const bool is_there = this->is_kept(i) && this->is_kept(j);
      T sum = 0, moment = 0;
      for (int64_t slice = 0; is_there && slice < slices; ++slice) {
        const int64_t from = slice * sums_of(rows) + i * all + j;
        sum += sums[from];
        if (call.moments) moment += moments[from];
      }
      const T cost = is_root ? (T)::sqrt(sum) : sum;
      ((T*)call.costs)[to] = cost;
      if (call.moments) ((T*)call.moments)[to] = is_root && cost != 0 ? moment / cost : moment;
    }
  }
};

template <class T> int64_t costs_numbers(const PairCostsCall& call) {
  const int64_t tiles = (call.columns + tile_columns<T>(call.rows) - 1) / tile_columns<T>(call.rows);
  return call.run.threads * Cloud<T, PairCostsCall>::numbers(call.rows) +
         call.clouds * slices_of(call.clouds, call.rows, tiles) * Costs<T>::sums_of(call.rows);
}

template <class T> void all_costs(const PairCostsCall& call) {
  const int64_t tiles = (call.columns + tile_columns<T>(call.rows) - 1) / tile_columns<T>(call.rows);
  const int64_t slices = slices_of(call.clouds, call.rows, tiles);
  const int64_t of_scratch = Cloud<T, PairCostsCall>::numbers(call.rows);
  const int threads = threads_for(call.clouds * call.rows * call.columns, call.run.threads);
  T* scratch = aligned<T>(call.run.workspace);
  T* sums = scratch + call.run.threads * of_scratch;
  auto costs = [&](int64_t part, int thread) {
    return Costs<T>(call, part / slices, scratch + thread * of_scratch, sums + part * Costs<T>::sums_of(call.rows));
  };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (call.clouds * slices >= threads) {
#pragma omp for schedule(dynamic)
      for (int64_t part = 0; part < call.clouds * slices; ++part) {
        const int64_t slice = part % slices;
        costs(part, omp_get_thread_num())
            .template add_tiles<OneThread>(tiles * slice / slices, tiles * (slice + 1) / slices);
      }
    } else {
      for (int64_t part = 0; part < call.clouds * slices; ++part) {
        const int64_t slice = part % slices;
        costs(part, 0).template add_tiles<AllThreads>(tiles * slice / slices, tiles * (slice + 1) / slices);
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.clouds * call.rows; ++row)
      costs(row / call.rows * slices, 0).write(row % call.rows, slices);
  }
}

// ---- gradient

template <class T> struct Gradient : Cloud<T, PairGradientCall> {
  typedef Cloud<T, PairGradientCall> Base;
  typedef typename Vector<T>::type V;
  using Base::call, Base::cloud, Base::rows, Base::width, Base::p, Base::q;

  Gradient(const PairGradientCall& call, int64_t cloud, T* scratch) : Base(call, cloud, scratch) {}

  // g of kRows rows in two registers of columns: the sum over all teacher rows of W_ij times the derivative.
  template <PairCost kind> void meet_all(int64_t i, int64_t v, T* const* g) const {
    V sum[kRows][2] = {}, of_student[kRows][2];
    const T* weights[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      weights[r] = (const T*)call.weights + (cloud * rows + (i + r < rows ? i + r : i)) * rows;
      for (int c = 0; c < 2; ++c) of_student[r][c] = load(p + (i + r) * width + v + c * Vector<T>::lanes);
    }
    for (int64_t j = 0; j < rows; ++j) {
      const T* teacher = q + j * width + v;
      const V of_teacher[2] = {load(teacher), load(teacher + Vector<T>::lanes)};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V weight = every(weights[r][j]);
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          const V difference = of_student[r][c] - of_teacher[c];
          sum[r][c] =
              kind == PairCost::l1 ? add_signed<T>(sum[r][c], difference, weight) : sum[r][c] + difference * weight;
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < 2; ++c) store(g[r] + v + c * Vector<T>::lanes, sum[r][c]);
  }
  void write(int64_t tile, int64_t block) const {
    alignas(64) T buffers[kRows][kBlock];
    T* g[kRows];
    for (int r = 0; r < kRows; ++r) g[r] = buffers[r];
    const int64_t i = block * kRows, columns = this->columns_of(tile);
    bool any = false;
    for (int r = 0; r < kRows; ++r) any |= i + r < rows && this->is_kept(i + r);
    for (int64_t v = 0; any && v < columns; v += 2 * Vector<T>::lanes) {
      if (call.kind == PairCost::l1)
        meet_all<PairCost::l1>(i, v, g);
      else
        meet_all<PairCost::l2>(i, v, g);
    }
    for (int r = 0; r < kRows && i + r < rows; ++r) {
      const int64_t bytes = bytes_of(call.student.dtype);
      char* to = (char*)call.gradient + ((cloud * rows + i + r) * call.gradient_columns + tile * width) * bytes;
      if (!this->is_kept(i + r)) {
        memset(to, 0, columns * bytes);
        continue;
      }
      const T *of_row = p + (i + r) * width, dot = this->of_row(call.dot, i + r);
      const T inverse_temperature = 1 / this->temperature;
      T* out = g[r];
#pragma omp simd
      for (int64_t v = 0; v < columns; ++v) out[v] = of_row[v] * inverse_temperature * (out[v] - dot);
      narrow(out, to, call.student.dtype, (int)columns);
    }
  }
  void write_padding(int64_t i) const {
    const int64_t bytes = bytes_of(call.student.dtype), width = call.gradient_columns - call.columns;
    char* to = (char*)call.gradient + ((cloud * rows + i) * call.gradient_columns + call.columns) * bytes;
    memset(to, 0, width * bytes);
  }
};

template <class T> void all_gradients(const PairGradientCall& call) {
  const int64_t blocks = rounded_rows(call.rows) / kRows;
  const int64_t tiles = (call.columns + tile_columns<T>(call.rows) - 1) / tile_columns<T>(call.rows);
  const int threads = threads_for(call.clouds * call.rows * call.columns, call.run.threads);
  T* scratch = aligned<T>(call.run.workspace);
  auto gradient = [&](int64_t cloud) {
    return Gradient<T>(call, cloud, scratch + omp_get_thread_num() * Gradient<T>::numbers(call.rows));
  };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic) nowait
    for (int64_t part = 0; part < call.clouds * tiles; ++part) {
      const Gradient<T> of_cloud = gradient(part / tiles);
      of_cloud.template fill_tile<OneThread>(part % tiles);
      for (int64_t block = 0; block < blocks; ++block) of_cloud.write(part % tiles, block);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.clouds * call.rows; ++row)
      gradient(row / call.rows).write_padding(row % call.rows);
  }
}

// ---- calls

void pair_costs(const PairCostsCall& call) noexcept {
  by_type(call.run.fp64, [&](auto type) { all_costs<decltype(type)>(call); });
}
int64_t pair_costs_bytes(const PairCostsCall& call) noexcept {
  return 64 + (call.run.fp64 ? 8 * costs_numbers<double>(call) : 4 * costs_numbers<float>(call));
}

void pair_gradient(const PairGradientCall& call) noexcept {
  by_type(call.run.fp64, [&](auto type) { all_gradients<decltype(type)>(call); });
}
int64_t pair_gradient_bytes(const PairGradientCall& call) noexcept {
  const int64_t bytes =
      call.run.fp64 ? 8 * Gradient<double>::numbers(call.rows) : 4 * Gradient<float>::numbers(call.rows);
  return 64 + call.run.threads * bytes;
}

}  // namespace KDK_ISA
}  // namespace kdk
