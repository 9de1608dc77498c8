// Sparse teachers on a CPU: the extraction of a teacher's k largest classes, and the sort of a teacher's entries.
//
// An extraction sweeps a row once. Each block's columns form kGroups groups. The sweep keeps each group's maximum, and
// each group's sum of exponentials relative to the block's maximum. Two groups make a joined group. The k-th largest
// maximum of the joined groups is the threshold: at least k logits reach the threshold, and the logits above the
// threshold lie in fewer than k joined groups. The extraction then visits only the groups that reach the threshold. It
// collects the logits that reach the threshold and sums the exponentials of the others, so the mass below the threshold
// is a sum, never a difference.
//
// setup.py compiles this file once for each instruction set, into a namespace of the instruction set's name. The file
// calls no std:: template.
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
#include "row.h"

// ---- the sort of a teacher's entries

constexpr int kDigit = 9;  // the bits that one pass sorts by: 262,144 classes take two passes

// The upper half is an entry's class, the lower half the entry's place in its row.
typedef int64_t Key;
inline Key key_of(int64_t index, int64_t place) { return index << 32 | place; }
inline int32_t index_of(Key key) { return (int32_t)(key >> 32); }
inline int32_t place_of(Key key) { return (int32_t)key; }

// Sorts a few elements into `sorted`. The place of an element is the number of elements before it. This takes n^2
// comparisons, but no branch that a processor could mispredict.
template <class X, class Before> void place_by_rank(const X* x, int n, X* sorted, Before before) {
  for (int i = 0; i < n; ++i) {
    const X one = x[i];
    int place = 0;
#pragma omp simd reduction(+ : place)
    for (int j = 0; j < n; ++j) place += before(x[j], one);
    sorted[place] = one;
  }
}

// Sorts the keys in ascending order. Returns the array that holds the result: `keys` or `other`. A radix sort, from the
// lowest digit of the index up, sorts more than a few keys.
inline Key* sorted_keys(Key* keys, Key* other, int64_t n, int64_t columns) {
  constexpr int few = 128;
  if (n <= few) {
    place_by_rank(keys, (int)n, other, [](Key a, Key b) { return a < b; });
    return other;
  }
  for (int shift = 0; columns >> shift; shift += kDigit) {
    int32_t starts[(1 << kDigit) + 1] = {0};
    const int32_t mask = (1 << kDigit) - 1;
    for (int64_t i = 0; i < n; ++i) ++starts[(index_of(keys[i]) >> shift & mask) + 1];
    for (int digit = 0; digit < mask; ++digit) starts[digit + 1] += starts[digit];
    for (int64_t i = 0; i < n; ++i) other[starts[index_of(keys[i]) >> shift & mask]++] = keys[i];
    Key* sorted = other;
    other = keys;
    keys = sorted;
  }
  return keys;
}

template <class T> void sort_row(const SortEntriesCall& call, int64_t row, Key* keys, Key* other) {
  const Dtype dtype = call.given_log_probs.dtype;
  const int64_t first = row * call.entries, bytes = bytes_of(dtype);
  const char* given = (const char*)call.given_log_probs + first * bytes;
  T* log_probs = (T*)call.log_probs + first;
  auto log_prob = [&](int64_t k) {
    T buffer[1];
    return *widen(given + k * bytes, dtype, 1, buffer);
  };
  int64_t count = 0;
  bool outside = false, ascending = true, repeated = false;
  for (int64_t k = 0; k < call.entries && per_row<T>(call.row_scale, row) != 0; ++k) {
    int64_t index = call.given_indices.wide ? ((const int64_t*)call.given_indices)[first + k]
                                            : ((const int32_t*)call.given_indices)[first + k];
    if (index < 0 || log_prob(k) == T(-INFINITY)) continue;
    if (index >= call.columns) {
      outside = true;
      continue;
    }
    keys[count] = key_of(index, k);
    ascending &= count == 0 || keys[count - 1] < keys[count];
    ++count;
  }
  if (!ascending) keys = sorted_keys(keys, other, count, call.columns);
  for (int64_t i = 0; i < count; ++i) {
    call.indices[first + i] = index_of(keys[i]);
    log_probs[i] = log_prob(place_of(keys[i]));
    repeated |= i > 0 && index_of(keys[i]) == index_of(keys[i - 1]);
  }
  for (int64_t i = count; i < call.entries; ++i) {
    call.indices[first + i] = (int32_t)call.columns;
    log_probs[i] = -INFINITY;
  }
  call.outside[row] = outside;
  call.repeated[row] = repeated;
}

int64_t sort_entries_bytes(const SortEntriesCall& call) noexcept {
  return call.run.threads * 2 * call.entries * sizeof(Key);
}

void sort_entries(const SortEntriesCall& call) noexcept {
  int threads = threads_for(call.rows * call.entries, call.run.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Key* keys = (Key*)call.run.workspace + omp_get_thread_num() * 2 * call.entries;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < call.rows; ++r) {
      if (call.run.fp64)
        sort_row<double>(call, r, keys, keys + call.entries);
      else
        sort_row<float>(call, r, keys, keys + call.entries);
    }
  }
}

// ---- extraction

constexpr int kGroups = kMaxima;          // the groups of a block: column i belongs to group i % kGroups
constexpr int kGroup = kBlock / kGroups;  // the columns of a group
constexpr int kJoined = kGroups / 2;      // the joined groups of a block; the threshold comes from their maxima
static_assert(kGroups <= 64 && kGroup <= 64, "each has a bit in 64");

template <class T> struct Candidate {
  T value;
  int32_t index;
  // Larger values come first. Among equal values the smaller index comes first.
  bool before(const Candidate& other) const {
    return (value > other.value) | ((value == other.value) & (index < other.index));
  }
};

// Sorts by `before`, with a heap whose root is the last of the order.
template <class T> void heap_sort(Candidate<T>* x, int64_t n) {
  auto sift_down = [x](int64_t at, int64_t n) {
    Candidate<T> moved = x[at];
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
      if (child + 1 < n && x[child].before(x[child + 1])) ++child;
      if (!moved.before(x[child])) break;
      x[at] = x[child];
    }
    x[at] = moved;
  };
  for (int64_t at = n / 2; at-- > 0;) sift_down(at, n);
  for (int64_t end = n; end-- > 1;) {
    Candidate<T> last = x[end];
    x[end] = x[0];
    x[0] = last;
    sift_down(0, end);
  }
}

// Sorts by `before`: a few candidates by rank, more with the heap, since each is the quicker way for its number.
template <class T> void sort(Candidate<T>* x, int64_t n) {
  constexpr int few = 512;
  if (n > few) return heap_sort(x, n);
  Candidate<T> sorted[few];
  place_by_rank(x, (int)n, sorted, [](const Candidate<T>& a, const Candidate<T>& b) { return a.before(b); });
  memcpy(x, sorted, n * sizeof(Candidate<T>));
}

// Maps floats to integers of the same order.
inline uint32_t ordered(float x) {
  uint32_t bits = float_to_bits(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline uint64_t ordered(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits >> 63 ? ~bits : bits | (uint64_t)1 << 63;
}
inline float unordered(uint32_t bits) { return bits_to_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits); }
inline double unordered(uint64_t bits) {
  bits = bits >> 63 ? bits & ~((uint64_t)1 << 63) : ~bits;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

// The k-th largest (k from 1 to n) of n keys. The search sets the result's bits from the highest down.
template <class Key> Key kth_largest(const Key* keys, int64_t n, int64_t k) {
  Key found = 0;
  for (Key bit = (Key)1 << (8 * sizeof(Key) - 1); bit; bit >>= 1) {
    const Key tried = found | bit;
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= tried;
    if (count >= k) found = tried;
  }
  return found;
}

// Bit i says whether number i of n (up to 64) reaches the threshold.
template <class T> uint64_t reaching(const T* x, int n, T threshold) {
  uint64_t bits = 0;
  for (int i = 0; i < n; ++i) bits |= (uint64_t)(x[i] >= threshold) << i;
  return bits;
}
#if defined(__AVX512F__)
inline uint64_t reaching(const float* x, int n, float threshold) {
  uint64_t bits = 0;
  for (int i = 0; i < n; i += 16) {
    const __mmask16 inside = n - i >= 16 ? 0xffff : (1 << (n - i)) - 1;
    const __m512 found = _mm512_maskz_loadu_ps(inside, x + i);
    bits |= (uint64_t)_mm512_mask_cmp_ps_mask(inside, found, _mm512_set1_ps(threshold), _CMP_GE_OQ) << i;
  }
  return bits;
}
#endif

template <class T> struct KeyOf;
template <> struct KeyOf<float> { typedef uint32_t type; };
template <> struct KeyOf<double> { typedef uint64_t type; };

template <class T> struct TopkScratch {
  typedef typename KeyOf<T>::type Key;
  T *maxima, *sums;            // of each group
  T* block_max;
  Key* keys;                   // the maxima of the joined groups, as integers of the same order
  Candidate<T>* candidates;

  static int64_t joined(int64_t columns) { return blocks_of(columns) * kJoined; }
  // The largest number of candidates. The logits above the threshold lie in fewer than k joined groups. Of the logits
  // that equal the threshold, the extraction keeps k, and all of the block in which it reaches k.
  static int64_t most(int64_t columns, int64_t k) {
    int64_t bound = k * (kBlock / kJoined + 1) + kBlock;
    return bound < columns ? bound : columns;
  }
  TopkScratch(const TopkCall& call, Arena& arena) {
    const int64_t blocks = blocks_of(call.columns);
    maxima = arena.take<T>(blocks * kGroups), sums = arena.take<T>(blocks * kGroups), block_max = arena.take<T>(blocks);
    arena.align();
    keys = arena.take<Key>(joined(call.columns));
    arena.align();
    candidates = arena.take<Candidate<T>>(most(call.columns, call.k));
  }
};

template <class T> struct Extraction {
  const TopkCall& call;
  const int64_t row;
  const LogitRow<T> x;
  const T beta;

  Extraction(const TopkCall& call, int64_t row)
      : call(call),
        row(row),
        x(call.logits, row, call.inner, call.columns),
        beta(1 / per_row<T>(call.temperature, row)) {}

  // The last block may not be full. A group without columns has the maximum -inf.
  void sweep(TopkScratch<T>& scratch) const {
    alignas(64) T buffer[kBlock];
    for (int64_t b = 0; b < x.blocks; ++b) {
      const T* logits = x.load(b, buffer);
      T *maxima = scratch.maxima + b * kGroups, *sums = scratch.sums + b * kGroups;
      auto* keys = scratch.keys + b * kJoined;
      lane_maxima(logits, x.width(b), maxima);
      T max = -INFINITY;
#pragma omp simd reduction(max : max)
      for (int g = 0; g < kJoined; ++g) {
        const T joined = maxima[g] > maxima[g + kJoined] ? maxima[g] : maxima[g + kJoined];
        keys[g] = ordered(joined);
        max = joined > max ? joined : max;
      }
      scratch.block_max[b] = max;
      lane_exponentials<false>(logits, x.width(b), finite(max), beta, (T*)0, sums, x.at((b + 1) * kBlock),
                               bytes_of(x.dtype));
    }
  }
  // At least k logits reach the threshold. The logits above the threshold lie in fewer than k joined groups.
  T threshold(const TopkScratch<T>& scratch) const {
    int64_t groups = scratch.joined(call.columns);
    return groups < call.k ? T(-INFINITY) : unordered(kth_largest(scratch.keys, groups, call.k));
  }

  // `candidates` counts the logits above the threshold and the kept logits that equal the threshold: the first k of
  // these, and perhaps more. `kept_equals` counts the latter, `equals` all logits that equal the threshold. `below` is
  // the sum of exponentials below the threshold, relative to `base`.
  struct Found {
    int64_t candidates, kept_equals, equals;
    double below;
    T base;
  };
  Found find(TopkScratch<T>& scratch, T threshold) const {
    Found found = {0, 0, 0, 0, finite(threshold)};
    for (int64_t b = 0; b < x.blocks; ++b) {
      T* sums = scratch.sums + b * kGroups;
      const T distance = (scratch.block_max[b] - found.base) * beta;
      uint64_t visited = reaching(scratch.maxima + b * kGroups, kGroups, threshold);
      // If the block's maximum is more than 10 above the threshold, the exponentials below the threshold have lost
      // digits. The extraction then visits all groups of the block.
      if (visited && !(distance <= 10)) visited = ~(uint64_t)0 >> (64 - kGroups);
      const bool keeps_equals = found.kept_equals < call.k;
      for (; visited; visited &= visited - 1) {
        const int group = __builtin_ctzll(visited);
        visit(b, group, threshold, keeps_equals, scratch, found);
        sums[group] = 0;
      }
      const T sum = sum_of_lanes(sums);
      found.below += sum == 0 ? T(0) : sum * exp_of(distance);
    }
    // Relative to a maximum up to 10 above the threshold, the exponentials of logits 77 below the threshold are lost.
    if (found.below < 1e-20) find_far_below(threshold, found);
    return found;
  }
  void visit(int64_t b, int group, T threshold, bool keeps_equals, TopkScratch<T>& scratch, Found& found) const {
    alignas(64) T logits[kGroup];
    int n = 0;
    for (int i = group; i < x.width(b); i += kGroups) logits[n++] = x.logit(b * kBlock + i);
    for (uint64_t reached = reaching(logits, n, threshold); reached; reached &= reached - 1) {
      const int i = __builtin_ctzll(reached);
      const bool equal = logits[i] == threshold;
      found.equals += equal;
      found.kept_equals += equal && keeps_equals;
      if (!equal || keeps_equals)
        scratch.candidates[found.candidates++] = {logits[i], (int32_t)(b * kBlock + group + i * kGroups)};
      logits[i] = -INFINITY;
    }
    found.below += exponentials<false>(logits, n, found.base, beta, (T*)0, (const void*)logits, 0);
  }
  // If all logits below the threshold are so far below that their exponentials are lost, this sums their exponentials
  // again, relative to their own maximum.
  void find_far_below(T threshold, Found& found) const {
    alignas(64) T buffer[kBlock], below[kBlock];
    auto each_block = [&](auto body) {
      for (int64_t b = 0; b < x.blocks; ++b) {
        const T* logits = x.load(b, buffer);
        for (int i = 0; i < x.width(b); ++i) below[i] = logits[i] < threshold ? logits[i] : T(-INFINITY);
        body(x.width(b));
      }
    };
    T max = -INFINITY;
    each_block([&](int n) {
      T of_block = block_max(below, n);
      max = of_block > max ? of_block : max;
    });
    found.base = finite(max);
    found.below = 0;
    each_block([&](int n) {
      found.below += exponentials<false>(below, n, found.base, beta, (T*)0, (const void*)below, 0);
    });
  }

  void extract(TopkScratch<T>& scratch) const {
    sweep(scratch);
    const T threshold = this->threshold(scratch);
    const Found found = find(scratch, threshold);
    if (found.candidates < call.k) return write_nan();  // fewer than k logits are not NaN
    const Candidate<T>* sorted = scratch.candidates;
    sort(scratch.candidates, found.candidates);

    // The rest has three parts: the logits below the threshold, the logits that equal the threshold and are past the
    // k-th, and the candidates above the threshold that are past the k-th. `rest` is their sum of exponentials,
    // relative to their maximum `rest_max`.
    const int64_t above = found.candidates - found.kept_equals;
    const int64_t equals = found.equals - (above < call.k ? call.k - above : 0);
    const double largest = sorted[0].value;
    double rest_max = found.below == 0 ? -INFINITY : found.base;
    if (equals > 0 && threshold > rest_max) rest_max = threshold;
    if (above > call.k) rest_max = sorted[call.k].value;
    auto relative_to = [&](double value, double base) { return value == -INFINITY ? 0 : ::exp((value - base) * beta); };
    double rest = found.below == 0 ? 0 : found.below * relative_to(found.base, rest_max);
    if (equals > 0) rest += equals * relative_to(threshold, rest_max);
    for (int64_t i = call.k; i < above; ++i) rest += relative_to(sorted[i].value, rest_max);
    double total = rest == 0 ? 0 : rest * relative_to(rest_max, largest);
    for (int64_t i = 0; i < call.k; ++i) total += relative_to(sorted[i].value, largest);
    const double log_total = largest < INFINITY ? ::log(total) : NAN;
    if (!(log_total > -INFINITY)) return write_nan();  // a row with a NaN, or a row of -inf alone, as in log_softmax
    const double log_rest = rest == 0 ? -INFINITY : ::log(rest) + (rest_max - largest) * beta;

    T* log_probs = (T*)call.log_probs + row * call.k;
    int32_t* indices = call.indices + row * call.k;
    for (int64_t i = 0; i < call.k; ++i) {
      const Candidate<T>& x = sorted[i];
      log_probs[i] = (T)((x.value - largest) * beta - log_total);
      indices[i] = log_probs[i] == T(-INFINITY) ? -1 : x.index;
    }
    ((T*)call.tail_log_prob)[row] = (T)(log_rest - log_total);
  }
  void write_nan() const {
    for (int64_t i = 0; i < call.k; ++i) {
      ((T*)call.log_probs)[row * call.k + i] = NAN;
      call.indices[row * call.k + i] = (int32_t)i;
    }
    ((T*)call.tail_log_prob)[row] = NAN;
  }
  void write_nothing() const {
    for (int64_t i = 0; i < call.k; ++i) {
      ((T*)call.log_probs)[row * call.k + i] = -INFINITY;
      call.indices[row * call.k + i] = -1;
    }
    ((T*)call.tail_log_prob)[row] = 0;
  }
};

template <class T> void all_extractions(const TopkCall& call) {
  const int threads = threads_for(call.rows * call.columns, call.run.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    TopkScratch<T> scratch = scratch_of<TopkScratch<T>>(call, omp_get_thread_num());
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < call.rows; ++r) {
      Extraction<T> row(call, r);
      if (per_row<T>(call.row_scale, r) == 0)
        row.write_nothing();
      else
        row.extract(scratch);
    }
  }
}

void topk(const TopkCall& call) noexcept {
  by_type(call.run.fp64, [&](auto type) { all_extractions<decltype(type)>(call); });
}

int64_t topk_bytes(const TopkCall& call) noexcept {
  return by_type(call.run.fp64, [&](auto type) { return workspace_bytes<TopkScratch<decltype(type)>>(call); });
}

}  // namespace KDK_ISA
}  // namespace kdk
