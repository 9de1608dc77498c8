// Universal Logit Distillation on a CPU: the sorted probabilities of two vocabularies are compared rank by rank.
//
// Softmax keeps the order, so the kernel sorts the logits, by the bits of their storage type. It counts logits of 16
// bits: a histogram over the 65,536 values gives runs of equal logits, and one exponential serves a run. It sorts the
// keys of wider logits, ten to twelve bits a pass. The exponentials of the ranks follow, and one loop over the ranks
// finds the loss and the signs.
//
// Sorting moves no class indices. A class finds its sign by its logit. For 16 bits, a table holds the gradient of each
// value. For wider logits, the changes of sign cut the sorted keys into segments, which are few where the two curves
// cross seldom; a table indexed by the key's upper 16 bits gives the candidate segments, nearly always one.
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
#include "row.h"

// ---- keys: the bits of a number, changed so that a larger number has a smaller key

// Flips all bits but the first of a positive number. It is its own inverse.
inline uint16_t flipped(uint16_t bits) { return bits >> 15 ? bits : (uint16_t)(bits ^ 0x7fff); }
inline uint32_t flipped(uint32_t bits) { return bits ^ (~(uint32_t)((int32_t)bits >> 31) & 0x7fffffffu); }
inline uint64_t flipped(uint64_t bits) { return bits ^ (~(uint64_t)((int64_t)bits >> 63) & 0x7fffffffffffffffu); }

inline uint32_t bits_of(float x) { return float_to_bits(x); }
inline uint64_t bits_of(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
inline void from_bits(uint32_t bits, float* x) { *x = bits_to_float(bits); }
inline void from_bits(uint64_t bits, double* x) { memcpy(x, &bits, 8); }

template <class Element> struct KeyOf;
template <> struct KeyOf<float> { using type = uint32_t; };
template <> struct KeyOf<double> { using type = uint64_t; };

template <class Element> inline typename KeyOf<Element>::type key_of(Element x) {
  return flipped(bits_of(x + Element(0)));  // -0 + 0 is 0
}

constexpr int kBuckets = 65536;  // by the upper 16 bits of a key

template <class Key> int bucket_of(Key key) { return (int)(key >> (8 * sizeof(Key) - 16)); }

inline int64_t wider(const UldCall& call) {
  return call.student_columns > call.teacher_columns ? call.student_columns : call.teacher_columns;
}

// The memory of a thread. `counts` is 0 between rows.
template <class T> struct Scratch {
  uint64_t* keys[3];        // keys by rank; two arrays alternate while a side is sorted
  T *p, *q;                 // by rank: exponentials relative to the first rank; then probabilities
  T* mean_sign;             // by segment or run
  T* of_bucket;             // by bucket: the sign of all its classes, or kMixed
  int32_t* segment;         // by bucket: the segment at the bucket's first key
  int32_t *counts, *ends;   // by 16-bit value; by run: the rank where it ends
  uint16_t *values, *table; // by run: the bits of its logits; by the bits of a logit: the gradient
  int8_t* signs;            // by rank

  static constexpr int64_t kTable = kBuckets + 64;

  Scratch(const UldCall& call, Arena& arena) {
    const int64_t columns = wider(call), key_bytes = rounded_up(columns * sizeof(T));
    auto numbers = [&] { return (T*)arena.take<char>(key_bytes); };
    for (auto& x : keys) x = (uint64_t*)numbers();
    p = numbers(), q = numbers(), mean_sign = numbers();
    of_bucket = arena.take<T>(kTable);
    segment = arena.take<int32_t>(kTable);
    counts = arena.take<int32_t>(kTable), ends = arena.take<int32_t>(kTable);
    values = arena.take<uint16_t>(kTable), table = arena.take<uint16_t>(kTable);
    signs = arena.take<int8_t>(columns);
  }
};

constexpr float kMixed = 2;

// The sorted logits of a side.
template <class T> struct Ranked {
  T max, last;           // the first and the last logit
  double sum;            // of exponentials relative to the first logit
  int64_t runs;          // of logits of 16 bits
  const uint64_t* keys;  // sorted, of wider logits

  bool is_distribution() const { return max - max == 0 && last == last; }
};

// ---- sorting

// The bits of a key that each pass sorts by. Most logits share a few values of the upper bits, which are sign, exponent
// and little more. Increments of one counter wait for each other, so the last pass takes the widest digit.
template <class Key> struct Digits;
template <> struct Digits<uint32_t> {
  static constexpr int passes = 3, shift[] = {0, 10, 20, 32};
};
template <> struct Digits<uint64_t> {
  static constexpr int passes = 6, shift[] = {0, 10, 20, 30, 40, 52, 64};
};
constexpr int kDigitValues = 4096;  // of the widest digit

template <class Key, int pass> int digit_of(Key key) {
  using D = Digits<Key>;
  return (int)(key >> D::shift[pass]) & ((1 << (D::shift[pass + 1] - D::shift[pass])) - 1);
}

// Sorts by the digits from this pass on. Returns the array that holds the sorted keys.
template <class Key, int pass> Key* sorted_from(Key* keys, Key* other, int64_t n, int32_t (*counts)[kDigitValues]) {
  if constexpr (pass < Digits<Key>::passes) {
    int32_t* place = counts[pass];
    if (place[digit_of<Key, pass>(keys[0])] == n)  // all have the same digit
      return sorted_from<Key, pass + 1>(keys, other, n, counts);
    int32_t before = 0;
    for (int digit = 0; digit < kDigitValues; ++digit) {
      int32_t count = place[digit];
      place[digit] = before;
      before += count;
    }
    for (int64_t i = 0; i < n; ++i) {
      Key key = keys[i];
      other[place[digit_of<Key, pass>(key)]++] = key;
    }
    return sorted_from<Key, pass + 1>(other, keys, n, counts);
  }
  return keys;
}

template <class Key, int pass> void count_digits(Key key, int32_t (*counts)[kDigitValues]) {
  if constexpr (pass < Digits<Key>::passes) {
    ++counts[pass][digit_of<Key, pass>(key)];
    count_digits<Key, pass + 1>(key, counts);
  }
}

// Sorts by the digits from the lowest up. Returns the array that holds the sorted keys.
template <class Key> Key* sorted(Key* keys, Key* other, int64_t n) {
  int32_t counts[Digits<Key>::passes][kDigitValues];
  memset(counts, 0, sizeof counts);
  for (int64_t i = 0; i < n; ++i) count_digits<Key, 0>(keys[i], counts);
  return sorted_from<Key, 0>(keys, other, n, counts);
}

template <class T, class Element>
Ranked<T> rank_wide(const Element* x, int64_t n, T inverse_temperature, uint64_t* first, uint64_t* second, T* e) {
  using Key = typename KeyOf<Element>::type;
  Key* keys = (Key*)first;
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(x[i]);
  keys = sorted(keys, (Key*)second, n);
  auto logit = [keys](int64_t i) {
    Element x;
    from_bits(flipped(keys[i]), &x);
    return (T)x;
  };
  Ranked<T> found = {logit(0), logit(n - 1), 0, 0, (const uint64_t*)keys};
  if (!found.is_distribution()) return found;
  alignas(64) T buffer[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int width = n - start < kBlock ? (int)(n - start) : kBlock;
    for (int i = 0; i < width; ++i) buffer[i] = logit(start + i);
    found.sum +=
        exponentials<true>(buffer, width, found.max, inverse_temperature, e + start, keys + start, sizeof(Key));
  }
  return found;
}

// Counts logits of 16 bits. Writes the runs to scratch.values and scratch.ends.
template <class T>
Ranked<T> rank_halves(const uint16_t* x, Dtype dtype, int64_t n, T inverse_temperature, Scratch<T>& scratch, T* e) {
  int32_t* counts = scratch.counts;
  for (int64_t i = 0; i < n; ++i) ++counts[x[i]];
  counts[0] += counts[0x8000], counts[0x8000] = 0;  // -0 is 0
  Ranked<T> found = {};
  int32_t end = 0;
  // In the order of keys: the bits of positive numbers downwards, then the bits of negative numbers upwards.
  auto take_run = [&](int bits) {
    if (counts[bits] == 0) return;
    end += counts[bits];
    counts[bits] = 0;
    scratch.values[found.runs] = (uint16_t)bits;
    scratch.ends[found.runs++] = end;
  };
  constexpr int stretch = 16;
  auto empty = [counts](int first) {
    int32_t any = 0;
    for (int i = 0; i < stretch; ++i) any |= counts[first + i];
    return any == 0;
  };
  for (int first = 0x8000 - stretch; first >= 0; first -= stretch)
    if (!empty(first))
      for (int i = stretch - 1; i >= 0; --i) take_run(first + i);
  for (int first = 0x8000; first < 0x10000; first += stretch)
    if (!empty(first))
      for (int i = 0; i < stretch; ++i) take_run(first + i);

  alignas(64) T buffer[kBlock], of_run[kBlock];
  found.max = *widen(scratch.values, dtype, 1, buffer);
  found.last = *widen(scratch.values + found.runs - 1, dtype, 1, buffer);
  if (!found.is_distribution()) return found;
  int32_t begin = 0;
  for (int64_t start = 0; start < found.runs; start += kBlock) {
    const int width = found.runs - start < kBlock ? (int)(found.runs - start) : kBlock;
    const T* logits = widen(scratch.values + start, dtype, width, buffer);
    exponentials<true>(logits, width, found.max, inverse_temperature, of_run, scratch.values + start, 2);
    for (int i = 0; i < width; ++i) {
      const int32_t run_end = scratch.ends[start + i];
      const T value = of_run[i];
      for (int32_t rank = begin; rank < run_end; ++rank) e[rank] = value;
      found.sum += (double)value * (run_end - begin);
      begin = run_end;
    }
  }
  return found;
}

// ---- sums over the ranks

struct Sums {
  double loss, signed_mass;  // sum |p - q|, sum p sign(p - q)
};

// Turns the exponentials into probabilities, and finds the signs. Both sides have `n` ranks here.
template <class T>
__attribute__((noinline)) Sums compare(T* p_of, T student_factor, T* q_of, T teacher_factor, int64_t n, int8_t* signs) {
  Sums sums = {0, 0};
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = n - start < kBlock ? n : start + kBlock;
    T loss = 0, mass = 0;
#pragma omp simd reduction(+ : loss, mass)
    for (int64_t i = start; i < end; ++i) {
      T p = p_of[i] * student_factor, q = q_of[i] * teacher_factor;
      p_of[i] = p;
      T larger = p > q ? p : T(0), smaller = p < q ? p : T(0);
      loss += p > q ? p - q : q - p;
      mass += larger - smaller;
    }
#pragma omp simd
    for (int64_t i = start; i < end; ++i) {
      T p = p_of[i], q = q_of[i] * teacher_factor;
      signs[i] = (int8_t)((p > q) - (p < q));
    }
    sums.loss += loss, sums.signed_mass += mass;
  }
  return sums;
}

inline double mean_of(const int8_t* signs, int64_t begin, int64_t end) {
  int32_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += signs[i];
  return (double)sum / (double)(end - begin);
}

// ---- one row

template <class T> struct UldRow {
  const UldCall& call;
  const int64_t row;
  const T scale, inverse_temperature;
  const GradientRow<T> gradient;
  Scratch<T>& scratch;
  T max, student_factor, slope, signed_mass;  // slope: row scale / temperature

  UldRow(const UldCall& call, int64_t row, Scratch<T>& scratch)
      : call(call),
        row(row),
        scale(per_row<T>(call.row_scale, row)),
        inverse_temperature(1 / per_row<T>(call.temperature, row)),
        gradient(call.gradient, call.student.dtype, row, call.gradient_columns),
        scratch(scratch) {}

  Ranked<T> ranked(const Logits& x, int64_t columns, uint64_t* first, uint64_t* second, T* e) const {
    const char* data = start_of(x, row, call.inner);
    if (x.dtype == Dtype::f64) return rank_wide<T>((const double*)data, columns, inverse_temperature, first, second, e);
    if (x.dtype == Dtype::f32) return rank_wide<T>((const float*)data, columns, inverse_temperature, first, second, e);
    return rank_halves<T>((const uint16_t*)data, x.dtype, columns, inverse_temperature, scratch, e);
  }

  void sweep() {
    // The teacher comes first, so that the runs and keys in scratch are the student's afterwards.
    const Ranked<T> teacher = ranked(call.teacher, call.teacher_columns, scratch.keys[0], scratch.keys[1], scratch.q);
    const Ranked<T> student = ranked(call.student, call.student_columns, scratch.keys[0], scratch.keys[1], scratch.p);
    if (!student.is_distribution() || !teacher.is_distribution()) return write(T(NAN), T(NAN));

    const int64_t columns = call.student_columns, others = call.teacher_columns;
    const int64_t ranks = columns > others ? columns : others;
    memset(scratch.p + columns, 0, (ranks - columns) * sizeof(T));
    memset(scratch.q + others, 0, (ranks - others) * sizeof(T));
    student_factor = (T)(1 / student.sum);
    const Sums sums =
        compare(scratch.p, student_factor, scratch.q, (T)(1 / teacher.sum), ranks, scratch.signs);
    ((T*)call.loss)[row] = scale * (T)sums.loss;
    ((T*)call.divergence)[row] = (T)sums.loss;
    if (!call.gradient) return;
    max = student.max, slope = scale * inverse_temperature, signed_mass = (T)sums.signed_mass;
    if (call.student.dtype == Dtype::f64)
      gradient_of_wide<double>(student);
    else if (call.student.dtype == Dtype::f32)
      gradient_of_wide<float>(student);
    else
      gradient_of_halves(student);
    gradient.zero(columns);
  }

  void gradient_of_halves(const Ranked<T>& student) const {
    alignas(64) T buffer[kBlock];
    alignas(64) uint16_t narrowed[kBlock];
    uint16_t* table = scratch.table;
    int64_t begin = 0;
    for (int64_t start = 0; start < student.runs; start += kBlock) {
      const int width = student.runs - start < kBlock ? (int)(student.runs - start) : kBlock;
      for (int i = 0; i < width; ++i) {
        const int64_t end = scratch.ends[start + i];
        buffer[i] = slope * scratch.p[begin] * ((T)mean_of(scratch.signs, begin, end) - signed_mass);
        begin = end;
      }
      narrow(buffer, narrowed, call.student.dtype, width);
      for (int i = 0; i < width; ++i) table[scratch.values[start + i]] = narrowed[i];
    }
    table[0x8000] = table[0];
    const uint16_t* x = (const uint16_t*)start_of(call.student, row, call.inner);
    uint16_t* out = (uint16_t*)gradient.data;
    for (int64_t i = 0; i < call.student_columns; ++i) out[i] = table[x[i]];
  }

  // A segment is a range of keys with one sign, or a run of equal logits with several signs.
  template <class Key> struct Segments {
    Key* first;        // the first key of each segment
    T* mean_sign;
    int64_t count;

    void add(Key key, T sign) {
      first[count] = key;
      mean_sign[count++] = sign;
    }
  };

  template <class Key> Segments<Key> segments_of(const Key* keys, Key* first) const {
    const int8_t* signs = scratch.signs;
    const int64_t n = call.student_columns;
    Segments<Key> found = {first, scratch.mean_sign, 0};
    int64_t begin = 0;  // of the segment
    while (begin < n) {
      int64_t end = begin + 1;
      const int8_t sign = signs[begin];
      const uint64_t eight = 0x0101010101010101u * (uint8_t)sign;
      for (uint64_t next; end + 8 <= n; end += 8) {
        memcpy(&next, signs + end, 8);
        if (next != eight) break;
      }
      while (end < n && signs[end] == sign) ++end;
      if (end == n || keys[end] != keys[end - 1]) {
        found.add(keys[begin], sign);
        begin = end;
        continue;
      }
      int64_t run = end - 1, run_end = end + 1;  // the run of equal logits in which the sign changes
      while (run > begin && keys[run - 1] == keys[run]) --run;
      while (run_end < n && keys[run_end] == keys[run]) ++run_end;
      if (run > begin) found.add(keys[begin], sign);
      found.add(keys[run], (T)mean_of(signs, run, run_end));
      begin = run_end;
    }
    return found;
  }

  // Finds the candidate segments of each bucket: from the segment at the bucket's first key to the segment at the next
  // bucket's first key.
  template <class Key> void tabulate(const Segments<Key>& segments, Key last) const {
    int bucket = bucket_of(segments.first[0]);
    const int end = bucket_of(last) + 1;
    const int first = bucket;
    for (int64_t i = 0; i < segments.count; ++i) {
      const int until = i + 1 < segments.count ? bucket_of(segments.first[i + 1]) : end;
      for (; bucket <= until; ++bucket) scratch.segment[bucket] = (int32_t)i;
    }
    for (int b = first; b < end; ++b) {
      const int32_t from = scratch.segment[b];
      scratch.of_bucket[b] = from == scratch.segment[b + 1] ? segments.mean_sign[from] : T(kMixed);
    }
  }

  template <class Key> T sign_of(Key key, const Segments<Key>& segments) const {
    int32_t low = scratch.segment[bucket_of(key)], high = scratch.segment[bucket_of(key) + 1];
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (segments.first[middle] <= key) low = middle;
      else high = middle - 1;
    }
    return segments.mean_sign[low];
  }

  template <class Element> void gradient_of_wide(const Ranked<T>& student) const {
    using Key = typename KeyOf<Element>::type;
    const Key* keys = (const Key*)student.keys;
    const Segments<Key> segments = segments_of(keys, (Key*)scratch.keys[2]);
    tabulate(segments, keys[call.student_columns - 1]);
    const Element* logits = (const Element*)start_of(call.student, row, call.inner);
    alignas(64) T buffer[kBlock], e[kBlock], sign[kBlock];
    Key key[kBlock];
    const T factor = slope * student_factor;
    for (int64_t start = 0; start < call.student_columns; start += kBlock) {
      const int width = call.student_columns - start < kBlock ? (int)(call.student_columns - start) : kBlock;
      const Element* x = logits + start;
      exponentials<true>(widen(x, call.student.dtype, width, buffer), width, max, inverse_temperature, e, x + width,
                         sizeof(Element));
      for (int i = 0; i < width; ++i) key[i] = key_of(x[i]);
      int mixed = 0;
      for (int i = 0; i < width; ++i) {
        sign[i] = scratch.of_bucket[bucket_of(key[i])];
        mixed |= sign[i] == T(kMixed);
      }
      if (mixed)
        for (int i = 0; i < width; ++i)
          if (sign[i] == T(kMixed)) sign[i] = sign_of(key[i], segments);
#pragma omp simd
      for (int i = 0; i < width; ++i) e[i] = factor * e[i] * (sign[i] - signed_mass);
      narrow(e, gradient.at(start), call.student.dtype, width);
    }
  }

  void write(T loss, T slope) const {
    ((T*)call.loss)[row] = ((T*)call.divergence)[row] = loss;
    if (!call.gradient) return;
    gradient.fill(0, call.student_columns, slope);
    gradient.zero(call.student_columns);
  }
};

template <class T> void all_rows(const UldCall& call) {
  const int threads = threads_for(call.rows * wider(call), call.run.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<T> scratch = scratch_of<Scratch<T>>(call, omp_get_thread_num());
    bool has_counts = false;  // a thread without a row needs none
    const int64_t turn = rows_of_a_turn(call.rows, call.gradient ? call.gradient_columns * sizeof(T) : 0, threads);
#pragma omp for schedule(dynamic, turn)
    for (int64_t r = 0; r < call.rows; ++r) {
      UldRow<T> row(call, r, scratch);
      if (row.scale == 0) {
        row.write(0, 0);
        continue;
      }
      if (!has_counts) {
        memset(scratch.counts, 0, scratch.kTable * sizeof(int32_t));
        has_counts = true;
      }
      row.sweep();
    }
  }
}

void uld(const UldCall& call) noexcept {
  by_type(call.run.fp64, [&](auto type) { all_rows<decltype(type)>(call); });
}

int64_t uld_bytes(const UldCall& call) noexcept {
  return by_type(call.run.fp64, [&](auto type) { return workspace_bytes<Scratch<decltype(type)>>(call); });
}

}  // namespace KDK_ISA
}  // namespace kdk
