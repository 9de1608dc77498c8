// The extraction of a sparse teacher on an NVIDIA GPU: the twin of csrc/cpu/topk.cpp.
//
// One block finds the k largest classes of a row. A class is a word of 64 bits: the upper half is the order of the
// class's logit, the lower half the complement of the column. No two words are equal, and the larger word comes first
// in the result.
//
//     maxima      the maximum of each of many groups of columns
//     threshold   a word that at least k maxima reach, and few more; the search goes bit by bit
//     collect     the words that reach the threshold, in no order; (max, sum of exponentials) of all other classes
//     sort        the collected words; the words past the k-th go back to the rest, in their order
//
// If more words reach the threshold than shared memory has room for, or if k is too large for the groups, the kernel
// seeks the threshold among all columns, with a sweep for each bit. The kernel reads logits twice, the second time from
// the L2 cache if the rows in flight fit the cache. A perfect kernel reads 2 bytes a column in bf16: 304 KB or 0.09 us
// a row of 152k columns on an H100 at 3.35 TB/s (computed, and not yet measured).
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include "device.h"
#include "groups.h"
#include "launch.h"
#include "mass.h"
#include "plan.h"
#include "row.h"
#include "table.h"
#include "team.h"

namespace kdk {
namespace cuda {

// ---- a class as a word

// Maps numbers to unsigned integers of the same order; 0 and -0 are the same. No class below the smallest finite number
// is ever among the k largest: such a logit is -inf or NaN.
inline __device__ uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline __device__ float number_of(uint32_t order) {
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}
constexpr uint32_t kSmallestOrder = 0x00800000u;  // the order of -FLT_MAX

// The larger logit has the larger word. Among equal logits the smaller class has the larger word.
struct WordsOfClasses {
  int column_bits;  // 2^column_bits is at least the number of columns

  __device__ uint64_t word_of(float logit, int column) const {
    return (uint64_t)order_of(logit) << 32 | ((1u << column_bits) - 1 - (uint32_t)column);
  }
  __device__ int column_of(uint64_t word) const { return (int)((1u << column_bits) - 1 - (uint32_t)word); }
  __device__ float logit_of(uint64_t word) const { return number_of((uint32_t)(word >> 32)); }

  // The largest word that at least k of some words reach. The search goes bit by bit, and stops at the first word that
  // at most `most` words reach. count(word) returns the number of words that reach `word`. The result is 1, which all
  // words reach, if fewer than k words exist.
  template <class Count> __device__ uint64_t threshold(Dtype dtype, int64_t k, int64_t most, Count count) const {
    // The last bits of a 16-bit logit's order are all equal.
    const int unused = dtype == Dtype::f32 ? 0 : dtype == Dtype::bf16 ? 16 : 13;
    uint64_t word = 0;
    for (int bit = 63; bit >= 0; --bit) {
      if (bit == 31 + unused) {
        if (!(word >> 63)) word |= (uint64_t)((1u << unused) - 1) << 32;  // a negative logit has these bits set
        bit = 31;
      }
      if (bit == 31) bit = column_bits - 1;
      if (bit < 0) break;
      const uint64_t larger = word | (uint64_t)1 << bit;
      const int64_t reached_by = count(larger);
      if (reached_by < k) continue;
      word = larger;
      if (reached_by <= most) break;
    }
    return word ? word : 1;
  }
};

// A lower bound for the logits of all classes that reach the word. Most logits are below the bound, so the kernel makes
// no words of them.
inline __device__ float floor_of(uint64_t word) {
  const uint32_t order = (uint32_t)(word >> 32);
  return number_of(order < kSmallestOrder ? kSmallestOrder : order);
}

// ---- a row's words

constexpr int kMaximaOfThread = kGroup;
constexpr int kThreadsOfRow = kMaxThreads;

struct TopkPlan : Launch {
  int room;             // the words that shared memory has room for
  int maxima;           // the maxima of a thread; 0: k is too large for the maxima
  WordsOfClasses words;
};

struct LogitRow {
  Slice slice;  // the whole row
  int shift;

  __device__ LogitRow(const char* row, Dtype dtype, int64_t columns)
      : shift(columns_in((uint64_t)row % 16, dtype)) {
    slice = {row - shift * bytes_of(dtype), dtype, shift, (int)columns + shift, true};
  }
  // Calls body(logits, column of the first) for this thread's groups. Two loads are in flight at a time.
  template <class Body> __device__ void each_group(bool backwards, Body body) const {
    const Groups groups(slice.end, backwards);
    for (int position = groups.first; groups.has(position); position += 2 * groups.step) {
      const int after = position + groups.step;
      const Raw raw = load_group<false, false>(slice, position);
      Raw raw_after = {};
      if (groups.has(after)) raw_after = load_group<false, false>(slice, after);
      float x[kGroup];
      widen<false>(raw, slice.dtype, x);
      body(x, position - shift);
      if (!groups.has(after)) continue;
      widen<false>(raw_after, slice.dtype, x);
      body(x, after - shift);
    }
  }
};

struct Count {
  int count;

  static __device__ Count none() { return {0}; }
  __device__ void merge(const Count& below) {
    count += below.count;
  }
};

// The collected words. They are in shared memory, or in the results of the row if shared memory has no room for k
// words.
struct Collection {
  uint64_t* shared;
  int32_t* indices;
  float* log_probs;
  bool in_shared;
  WordsOfClasses words;

  __device__ uint64_t get(int i) const {
    return in_shared ? shared[i] : words.word_of(load(log_probs + i), load(indices + i));
  }
  __device__ void set(int i, uint64_t word) const {
    if (in_shared) {
      shared[i] = word;
    } else {
      store(log_probs + i, words.logit_of(word));
      store(indices + i, words.column_of(word));
    }
  }
  // Sorts the larger words to the front. All threads of the block call sort(), and the block synchronises before and
  // after it. The network is bitonic, and each of its steps takes the larger word to the front. Words past the last
  // would thus stay in place, so the network leaves them out.
  __device__ void sort(int count) const {
    for (int size = 2; size < 2 * count; size *= 2) {
      for (int stride = size / 2; stride; stride /= 2) {
        for (int pair = threadIdx.x; pair < round_up_to(count, size) / 2; pair += blockDim.x) {
          const int low = pair / stride * 2 * stride + pair % stride;
          const int high = 2 * stride == size ? low - pair % stride + size - 1 - pair % stride : low + stride;
          if (high >= count) continue;
          const uint64_t a = get(low), b = get(high);
          if (a < b) set(low, b), set(high, a);
        }
        __syncthreads();
      }
    }
  }
  static __device__ int round_up_to(int x, int to) { return (x + to - 1) / to * to; }
};

// The parts of a row's log-sum-exp.
struct Shares {
  Mass rest;
  float chosen;  // the sum of exponentials of the k largest, relative to the largest

  static __device__ Shares none() { return {Mass::none(), 0}; }
  __device__ void share(Tempering at) {
    rest.rebase(warp_max(rest.max), at);
  }
  __device__ void merge(const Shares& below) {
    rest.sum += below.rest.sum, chosen += below.chosen;
  }
};

// A word that the k largest classes reach, and few others: a word that is about the k-th among the maxima of the
// groups.
inline __device__ uint64_t threshold_of_maxima(const LogitRow& row, int k, const TopkPlan& plan) {
  float largest[kMaximaOfThread];
  int first[kMaximaOfThread];  // the first column of the group in which the thread found the maximum
  for (int i = 0; i < kMaximaOfThread; ++i) largest[i] = -INFINITY, first[i] = 0;
  row.each_group(false, [&](const float (&x)[kGroup], int column) {
    for (int i = 0; i < kGroup; ++i)
      if (x[i] > largest[i]) largest[i] = x[i], first[i] = column;
  });
  uint64_t words[kMaximaOfThread];
  for (int i = 0; i < kMaximaOfThread; ++i)
    words[i] = largest[i] > -INFINITY ? plan.words.word_of(largest[i], first[i] + i) : 0;
#pragma unroll
  for (int half = kMaximaOfThread / 2; half; half /= 2)
    if (plan.maxima <= half)
      for (int i = 0; i < half; ++i) words[i] = words[i] > words[i + half] ? words[i] : words[i + half];
  return plan.words.threshold(row.slice.dtype, k, k + k / 4 + 16, [&](uint64_t word) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kMaximaOfThread; ++i)
      if (i < plan.maxima) count += __syncthreads_count(words[i] >= word);
    return count;
  });
}

// The threshold among all columns, with a sweep for each bit. It is exact, unless the search stops early at `most`.
inline __device__ uint64_t threshold_of_row(const LogitRow& row, int k, int most, const TopkPlan& plan, Team& team) {
  return plan.words.threshold(row.slice.dtype, k, most, [&](uint64_t word) {
    const float floor = floor_of(word);
    Count mine = Count::none();
    row.each_group(false, [&](const float (&x)[kGroup], int column) {
      for (int i = 0; i < kGroup; ++i)
        if (x[i] >= floor && plan.words.word_of(x[i], column + i) >= word) ++mine.count;
    });
    return team.merged(mine).count;
  });
}

// Collects the words that reach `word`, up to `room` of them. Returns the mass of the other classes among this thread's
// columns.
inline __device__ Mass collect(const LogitRow& row, uint64_t word, const Collection& into, int room, int* count,
                               Tempering at) {
  const float floor = floor_of(word);
  Mass rest = Mass::none();
  row.each_group(true, [&](float (&x)[kGroup], int column) {
    bool reached = false;
    for (int i = 0; i < kGroup; ++i) reached |= x[i] >= floor;
    if (reached) {
      for (int i = 0; i < kGroup; ++i) {
        if (!(x[i] >= floor)) continue;
        const uint64_t candidate = into.words.word_of(x[i], column + i);
        if (candidate < word) continue;
        const int place = add_shared(count, 1);
        if (place < room) into.set(place, candidate);
        x[i] = -INFINITY;
      }
    }
    rest.add(x, at);
  });
  return rest;
}

inline __device__ void topk_of_row(const TopkCall& call, const TopkPlan& plan, Team& team, int64_t row,
                                   float temperature) {
  const int k = (int)call.k;
  int* count = (int*)team.board.data();
  const Collection found = {(uint64_t*)(count + 2), call.indices + row * k, (float*)call.log_probs + row * k,
                            k <= plan.room, plan.words};
  const int room = found.in_shared ? plan.room : k;
  const LogitRow logits(row_start(call.logits, call, row), call.logits.dtype, call.columns);
  const Tempering at(temperature, false);

  // All threads read the count of an earlier row before that row's merge, and the collection before this barrier.
  auto collected = [&](uint64_t word) {
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
    const Mass rest = collect(logits, word, found, room, count, at);
    __syncthreads();
    return rest;
  };
  const bool all = k == call.columns;
  uint64_t word = all ? 1 : plan.maxima ? threshold_of_maxima(logits, k, plan)
                                        : threshold_of_row(logits, k, room, plan, team);
  Shares mine = {collected(word), 0};
  if (*count > room) {
    word = threshold_of_row(logits, k, room, plan, team);
    mine.rest = collected(word);
  }
  const int have = *count, chosen = have < k ? have : k;
  found.sort(have);

  const float max = have ? found.words.logit_of(found.get(0)) : -INFINITY, base = base_of(max);
  for (int i = threadIdx.x; i < have; i += blockDim.x) {
    const float logit = found.words.logit_of(found.get(i));
    if (i < k) mine.chosen += at.exp(logit - base);
    else mine.rest.add(logit, at);
  }
  const Shares shares = team.merged(mine, at);
  const float rest_sum = shares.rest.sum_from(base, at), sum = shares.chosen + rest_sum;
  const Normalizer all_of_row = {max, sum == 0 ? NAN : logf(sum), at.inverse_temperature};
  const bool is_nan = all_of_row.log_sum != all_of_row.log_sum;
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    const uint64_t mine = i < chosen ? found.get(i) : 0;
    const float log_prob = is_nan ? NAN : i < chosen ? all_of_row.log_prob(found.words.logit_of(mine)) : -INFINITY;
    store(found.log_probs + i, log_prob);
    store(found.indices + i, is_nan ? i : log_prob == -INFINITY ? -1 : found.words.column_of(mine));
  }
  if (threadIdx.x) return;
  const float tail = is_nan ? NAN
                     : shares.rest.sum == 0
                         ? -INFINITY
                         : log_share(shares.rest, rest_sum, shares.chosen, all_of_row);
  store((float*)call.tail_log_prob + row, tail);
}

__global__ void __launch_bounds__(kThreadsOfRow, 2)
    topk_kernel(const __grid_constant__ TopkCall call, const __grid_constant__ TopkPlan plan) {
  Team team(plan);
  for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
    const float scale = per_row(call.row_scale, row), temperature = per_row(call.temperature, row);
    if (scale != 0 && temperature > 0 && temperature < INFINITY && 1 / temperature < INFINITY) {
      topk_of_row(call, plan, team, row, temperature);
      continue;
    }
    for (int64_t i = threadIdx.x; i < call.k; i += blockDim.x) {
      store(call.indices + row * call.k + i, scale == 0 ? -1 : (int)i);
      store((float*)call.log_probs + row * call.k + i, scale == 0 ? -INFINITY : NAN);
    }
    if (threadIdx.x == 0) store((float*)call.tail_log_prob + row, scale == 0 ? 0 : NAN);
  }
}

// ---- the host

namespace {

// The plan has twice as many maxima as k, so few more than k words reach the threshold. If it can, shared memory has
// room for 2 k words.
TopkPlan plan_topk(const TopkCall& call, const Chip& chip) {
  Shape shape = {};
  shape.rows = call.rows, shape.columns = call.columns, shape.sweeps = 2;
  shape.column_bytes = bytes_of(call.logits.dtype);
  shape.aligned = rows_are_aligned(call.logits);
  TopkPlan plan = {};
  plan.blocks = 1;
  plan.threads = threads_for(call.columns, 2, kThreadsOfRow);
  while (call.columns > (int64_t)1 << plan.words.column_bits) ++plan.words.column_bits;
  for (plan.maxima = 1; plan.maxima <= kMaximaOfThread && plan.maxima * plan.threads < 2 * call.k;) plan.maxima *= 2;
  if (plan.maxima > kMaximaOfThread) plan.maxima = 0;
  plan.room = 512;
  while (plan.room < 2 * call.k && plan.room < 4096) plan.room *= 2;
  auto shared = [&] { return shared_with_board(plan.threads, 1, (1 + plan.room) * (int64_t)sizeof(uint64_t)); };
  while (plan.room > 1 && shared() > chip.shared) plan.room /= 2;
  plan.shared = (int)shared();
  const int64_t at_once = teams_at_once(topk_kernel, plan, chip, call.run.device);
  require_room(at_once > 0);
  const int64_t teams = limited_teams(at_once, shape, chip, 1, rows_in_cache(shape, chip));
  plan.grid = (int)(teams < call.rows ? teams : call.rows);
  return plan;
}

}  // namespace

// The results of a row with a NaN or an invalid temperature are NaN, with the classes from 0 on.
void topk(const TopkCall& original) {
  if (original.rows == 0) return;
  TopkCall call = original;
  call.inner = collapse(call.rows, call.inner, call.logits);
  OnDevice guard(call.run.device);
  const TopkPlan planned = plan_topk(call, Chip(call.run.device, topk_kernel));
  launch(topk_kernel, planned, call.run, call, planned);
}

int64_t topk_bytes(const TopkCall&) { return 0; }

void load_topk() {
  cudaFuncAttributes attributes;
  KDK_CHECK(cudaFuncGetAttributes, &attributes, topk_kernel);
}

}  // namespace cuda
}  // namespace kdk
