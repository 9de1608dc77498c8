// The loss of a row against the entries of a sparse teacher, on a CPU.
//
// The first sweep reads a row of logits once. It copies a block of kBlock columns and sets the classes that entries
// name to -inf in the copy, so the block's maximum and exponentials are over the other classes (the bucket) alone. The
// exponentials stay in the workspace. The sums over the entries and the bucket need K + 1 log-probabilities only. The
// second sweep scales the exponentials into the gradient of the other classes, and writes the entries' gradients in
// their places.
//
// A row in fp32 whose divergence comes out small, or whose temperature is high, has the close lines of the table. Another
// sweep of the logits finds the others' sum of exponentials in fp64, and the sums over the entries are found again.
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

#define KDK_HD inline

namespace kdk {
namespace KDK_ISA {

#include "elementary.h"
#include "storage.h"
#include "sweeps.h"
#include "../divergences.h"
#include "row.h"

// exp((max - larger) * beta), and 0 if both maxima are -inf.
template <class T> T relative(T max, T larger, T beta) {
  return max == T(-INFINITY) ? T(0) : exp_of_nonpositive((max - larger) * beta);
}
// Takes a sum of exponentials from one maximum to a larger one. If the maximum is -inf, the sum is 0 or NaN and stays.
template <class T> T moved(T sum, T max, T larger, T beta) {
  return max == T(-INFINITY) ? sum : sum * relative(max, larger, beta);
}

template <class T> struct BlockSums {
  T max, sum, unit_sum;    // of the classes that no entry names; unit_sum is the sum at temperature 1
  T sum_of_distance;       // sum exp(d) d with d = (logit - max) / temperature; the entropy needs it
  double wide_sum;         // of a close row: the sum in fp64, relative to the maximum of all classes
};

template <class T> struct RowScratch {
  T* e;                    // the exponentials of a row, each relative to its block's maximum
  BlockSums<T>* blocks;
  T *logits, *lp, *lq, *q, *psi;  // of the entries; the bucket comes last
  T* d;                           // log q - log p of a close row
  int32_t* first_entry;           // of each block, and of the end past the last block

  RowScratch(const TopkRowsCall& call, Arena& arena) {
    const int64_t blocks_of_row = blocks_of(call.columns), entries = call.entries + 1;
    e = arena.take<T>(blocks_of_row * kBlock);
    blocks = arena.take<BlockSums<T>>(blocks_of_row);
    logits = arena.take<T>(entries);
    lp = arena.take<T>(entries), lq = arena.take<T>(entries);
    q = arena.take<T>(entries), psi = arena.take<T>(entries), d = arena.take<T>(entries);
    first_entry = arena.take<int32_t>(blocks_of_row + 1);
  }
};

template <class T> struct EntrySums {
  T phi, psi, tv, entropy;
};

// The sums over n classes. The function keeps q and psi of each class.
template <class T, class D>
__attribute__((noinline)) void entry_sums(const D& divergence, const T* lp_of, const T* lq_of, int64_t n, T* q_of,
                                          T* psi_of, EntrySums<T>* sums) {
  T phi = 0, psi = 0, tv = 0, entropy = 0;
#pragma omp simd reduction(+ : phi, psi, tv, entropy)
  for (int64_t i = 0; i < n; ++i) {
    T lp = lp_of[i], lq = lq_of[i], p = exp_of(lp), q = exp_of(lq), slope = divergence.slope(lp, lq, p, q);
    phi += divergence.value(lp, lq, p, q);
    psi += slope;
    tv += p > q ? p - q : q - p;
    entropy -= weighted(p, lp);
    q_of[i] = q;
    psi_of[i] = slope;
  }
  *sums = {phi, psi, T(0.5) * tv, entropy};
}

// phi and psi by the close lines, phi without the slack.
template <class T, class D>
__attribute__((noinline)) void close_entry_sums(const D& divergence, T slack, const T* lp_of, const T* lq_of,
                                                const T* d_of, int64_t n, T* psi_of, EntrySums<T>* sums) {
  T phi = 0, psi = 0;
#pragma omp simd reduction(+ : phi, psi)
  for (int64_t i = 0; i < n; ++i) {
    T lp = lp_of[i], lq = lq_of[i];
    CloseTerms<T> x = close_terms(divergence, d_of[i], lp, lq, exp_of(lp), exp_of(lq));
    phi += without_slack(slack, x);
    psi += x.psi;
    psi_of[i] = x.psi;
  }
  sums->phi = phi;
  sums->psi = psi;
}

template <class T> struct TopkRow {
  const TopkRowsCall& call;
  const int64_t row;
  const LogitRow<T> student;
  const GradientRow<T> gradient;
  const RowTerms<T> terms;
  const T beta;  // 1 / temperature
  const int32_t* indices;
  int64_t entries;                   // the number of entries of this row
  // bucket_ is over the other classes, entries_ over the entries; each sum is of exponentials relative to the maximum
  // beside it. max, log_sum and, at temperature 1, unit_log_sum are over all classes.
  T bucket_max, entries_max, max;
  double bucket_sum, entries_sum, log_sum, unit_log_sum, entropy;
  EntrySums<T> sums;
  bool close;  // whether the row has the close lines
  Factors<T> factors;

  TopkRow(const TopkRowsCall& call, int64_t row)
      : call(call),
        row(row),
        student(call.student, row, call.inner, call.columns),
        gradient(call.gradient, call.student.dtype, row, call.gradient_columns),
        terms(call.options, row),
        beta(terms.inverse_temperature),
        indices(call.indices + row * call.entries),
        entries(0) {
    if (terms.scale != 0) entries = entries_below(call.columns);
  }

  // The number of entries whose class is below a column.
  int64_t entries_below(int64_t column) const {
    int64_t low = 0, high = call.entries;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (indices[middle] < column) low = middle + 1;
      else high = middle;
    }
    return low;
  }
  bool needs_unit_sum() const { return terms.has_label_term() || (call.statistics && call.options.labels); }
  bool sweeps_logits() const { return !call.support_only || terms.has_label_term() || call.statistics; }

  void find_entries(RowScratch<T>& scratch) const {
    int k = 0;
    for (int64_t b = 0; b <= student.blocks; ++b) {
      while (k < entries && indices[k] < b * kBlock) ++k;
      scratch.first_entry[b] = k;
    }
  }
  // A block's logits with -inf in the places of entries. It moves the logits of entries to the scratch.
  const T* load_others(int64_t b, RowScratch<T>& scratch, T* buffer) const {
    const T* x = student.load(b, buffer);
    const int first = scratch.first_entry[b], last = scratch.first_entry[b + 1];
    if (first < last && x != buffer) memcpy(buffer, x, student.width(b) * sizeof(T)), x = buffer;
    for (int k = first; k < last; ++k) {
      T& logit = buffer[indices[k] - b * kBlock];
      scratch.logits[k] = logit;
      logit = -INFINITY;
    }
    return x;
  }
  // Sweep 1 of a block.
  void block_sums(int64_t b, RowScratch<T>& scratch) const {
    alignas(64) T buffer[kBlock];
    const int n = student.width(b);
    const T* x = load_others(b, scratch, buffer);
    BlockSums<T>& out = scratch.blocks[b];
    T* e = gradient.exponentials(student, scratch.e) + b * kBlock;
    out.max = block_max(x, n);
    out.sum = student.template block_exponentials<true>(b, x, finite(out.max), beta, e);
    out.unit_sum = out.sum;
    if (terms.temperature != 1 && needs_unit_sum())
      out.unit_sum = student.template block_exponentials<false>(b, x, finite(out.max), T(1), (T*)0);
    if (call.statistics) {
      T sum = 0, base = finite(out.max);
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < n; ++i) sum += weighted(e[i], (x[i] - base) * beta);
      out.sum_of_distance = sum;
    }
  }
  // The sweep of a close row.
  void block_wide_sum(int64_t b, RowScratch<T>& scratch) const {
    alignas(64) T buffer[kBlock];
    const int n = student.width(b);
    const T* x = load_others(b, scratch, buffer);
    scratch.blocks[b].wide_sum = wide_sum(x, n, max);
  }
  // The sum of exponentials in fp64.
  double wide_sum(const T* x, int64_t n, T base) const {
    const double from = finite(base), wide_beta = 1 / (double)terms.temperature;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += wide_exp_of_nonpositive((x[i] - from) * wide_beta);
    return sum;
  }

  void merge(RowScratch<T>& scratch) {
    bucket_max = -INFINITY, entries_max = -INFINITY;
    const int64_t swept = sweeps_logits() ? student.blocks : 0;
    for (int64_t b = 0; b < swept; ++b)
      if (scratch.blocks[b].max > bucket_max) bucket_max = scratch.blocks[b].max;
    for (int64_t k = 0; k < entries; ++k)
      if (scratch.logits[k] > entries_max) entries_max = scratch.logits[k];
    max = bucket_max > entries_max ? bucket_max : entries_max;

    bucket_sum = 0;
    double unit_sum = 0;
    for (int64_t b = 0; b < swept; ++b) {
      const BlockSums<T>& block = scratch.blocks[b];
      bucket_sum += moved(block.sum, block.max, bucket_max, beta);
      if (needs_unit_sum()) unit_sum += moved(block.unit_sum, block.max, max, T(1));
    }
    entries_sum = sum_of_entries(scratch.logits, beta);
    log_sum = ::log(of_all(bucket_sum, bucket_max) + of_all(entries_sum, entries_max));
    if (needs_unit_sum())
      unit_log_sum = ::log(unit_sum + moved(sum_of_entries(scratch.logits, T(1)), entries_max, max, T(1)));
    if (call.support_only) {
      log_probs_of_entries(scratch, entries_max, ::log(entries_sum));
      find_sums(scratch, entries);
    } else {
      log_probs_of_entries(scratch, max, log_sum);
      scratch.lp[entries] = ((const T*)call.tail_log_prob)[row];
      scratch.lq[entries] = (T)bucket_log_prob();
      find_sums(scratch, entries + 1);
    }
    close = sizeof(T) == sizeof(float) && call.is_close(sums.phi, terms.temperature);
  }
  bool sweeps_again() const { return close && !call.support_only; }
  // Finds phi and psi of a close row again.
  void find_close_sums(RowScratch<T>& scratch) {
    if constexpr (sizeof(T) == sizeof(float)) {
      const bool slack = call.slack && terms.temperature >= (T)call.close_temperature;
      const T base = call.support_only ? entries_max : max;
      const double of_entries = wide_sum(scratch.logits, entries, base);
      double of_others = 0;
      if (!call.support_only)
        for (int64_t b = 0; b < student.blocks; ++b) of_others += scratch.blocks[b].wide_sum;
      const double of_all = of_others + of_entries;
      const CloseStudent close_student = {base, ::log(of_all), 1 / (double)terms.temperature};
      const T* rounding = call.log_probs_rounding ? (const T*)call.log_probs_rounding + row * call.entries : nullptr;
      for (int64_t k = 0; k < entries; ++k)
        scratch.d[k] = close_student.log_ratio(scratch.logits[k], scratch.lp[k], rounding ? rounding[k] : 0);
      int64_t classes = entries;
      if (!call.support_only) {
        const T tail_rounding = call.tail_rounding ? ((const T*)call.tail_rounding)[row] : 0;
        scratch.d[entries] = CloseStudent::log_ratio_of_bucket(of_others, of_all, scratch.lp[entries], tail_rounding);
        ++classes;
      }
      with_divergence((int)call.divergence, (const T*)call.parameters, [&](const auto& divergence) {
        close_entry_sums(divergence, slack ? *(const T*)call.slack : T(0), scratch.lp, scratch.lq, scratch.d, classes,
                         scratch.psi, &sums);
      });
    }
  }
  void finish(RowScratch<T>& scratch) {
    if (close) find_close_sums(scratch);
    if (call.statistics) {
      entropy = entropy_of_all(scratch);
      write_statistics(scratch);
    }
    ((T*)call.loss)[row] = terms.loss(sums.phi, [&] { return cross_entropy(); });
    // The factors come before the gradient, because the gradient may overwrite the logits that cross_entropy() reads.
    if (call.gradient) factors = terms.factors(sums.phi, [&] { return cross_entropy(); });
  }
  // Takes a sum of exponentials from a part's maximum to the maximum of all classes.
  double of_all(double sum, T part_max) const {
    return part_max == T(-INFINITY) ? sum : sum * ::exp(((double)part_max - max) * beta);
  }
  T sum_of_entries(const T* logits, T factor) const {
    T base = finite(entries_max), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < entries; ++k) sum += exp_of_nonpositive((logits[k] - base) * factor);
    return sum;
  }
  void log_probs_of_entries(RowScratch<T>& scratch, T from, double log_sum) const {
    const T* lp = (const T*)call.log_probs + row * call.entries;
    T shift = (T)log_sum;
#pragma omp simd
    for (int64_t k = 0; k < entries; ++k) {
      scratch.lp[k] = lp[k];
      scratch.lq[k] = (scratch.logits[k] - from) * beta - shift;
    }
  }
  // The log of the bucket's share. Near 1 the formula is log(1 - the entries' share), which keeps the digits of the
  // entries' share.
  double bucket_log_prob() const {
    if (bucket_max == T(-INFINITY) && bucket_sum == 0) return -INFINITY;
    double share = ::log(bucket_sum) + ((double)bucket_max - max) * beta - log_sum;
    return share > -0.5 ? ::log1p(-of_all(entries_sum, entries_max) * ::exp(-log_sum)) : share;
  }
  void find_sums(RowScratch<T>& scratch, int64_t classes) {
    with_divergence((int)call.divergence, (const T*)call.parameters, [&](const auto& divergence) {
      entry_sums(divergence, scratch.lp, scratch.lq, classes, scratch.q, scratch.psi, &sums);
    });
  }

  T cross_entropy() const { return (T)(unit_log_sum + (max - student.logit(call.options.labels[row]))); }
  // -sum q log q over all classes. In a block, log q is the distance from the block's maximum plus `shift`, which all
  // classes of the block share.
  double entropy_of_all(const RowScratch<T>& scratch) const {
    double sum = 0;
    for (int64_t b = 0; b < student.blocks; ++b) {
      const BlockSums<T>& block = scratch.blocks[b];
      double shift = (finite(block.max) - max) * beta - log_sum;
      sum += ::exp(shift) * (block.sum_of_distance + weighted((double)block.sum, shift));
    }
    for (int64_t k = 0; k < entries; ++k) {
      double lq = (scratch.logits[k] - max) * beta - log_sum;
      sum += weighted(::exp(lq), lq);
    }
    return -sum;
  }
  void write_statistics(const RowScratch<T>& scratch) const {
    const T tail = ((const T*)call.tail_log_prob)[row];
    RowStatistics<T> x = {};
    T largest = -INFINITY;
    int64_t teacher_top1 = 0;
    for (int64_t k = 0; k < entries; ++k)
      if (scratch.lp[k] > largest || (scratch.lp[k] != scratch.lp[k] && largest == largest))
        largest = scratch.lp[k], teacher_top1 = indices[k];
    double mass = call.support_only ? 0 : ::exp((double)tail);
    for (int64_t k = 0; k < entries; ++k) mass += ::exp((double)scratch.lp[k]);
    x.divergence = sums.phi;
    x.tv = sums.tv;
    x.student_entropy = (T)entropy, x.teacher_entropy = sums.entropy;
    x.student_max_log_prob = (T)-log_sum, x.teacher_max_log_prob = largest;
    x.student_lse = (T)(max * beta + log_sum), x.teacher_lse = (T)::log(mass);
    if (call.options.labels) {
      int64_t label = call.options.labels[row], at = entries_below(label);
      x.cross_entropy = cross_entropy();
      x.student_label_log_prob = (T)((student.logit(label) - max) * beta - log_sum);
      x.teacher_label_log_prob = at < entries && indices[at] == label ? scratch.lp[at] : tail;
    }
    KDK_ISA::write_statistics(call, row, x, student.argmax(max), teacher_top1);
  }

  // Sweep 2.
  struct Slopes {
    T soft, hard, unit_factor, sum, others;  // others: a bucket class's gradient over its softmax in the bucket
  };
  Slopes slopes(const RowScratch<T>& scratch) const {
    const T soft = factors.soft, hard = factors.hard;
    T sum = sums.psi - sums.psi == 0 ? sums.psi : T(NAN);  // an infinite slope makes the whole row's gradient NaN
    T others = call.support_only ? 0 * sum : scratch.psi[entries] - scratch.q[entries] * sum;
    return {soft, hard, (T)(hard * ::exp(-unit_log_sum)), sum, soft == 0 ? T(0) : soft * others};
  }
  void block_gradient(int64_t b, const RowScratch<T>& scratch, const Slopes& slopes) const {
    alignas(64) T student_buffer[kBlock], gradient_buffer[kBlock];
    const int n = student.width(b);
    T* out = gradient.block(b, gradient_buffer);
    const T* e = gradient.exponentials(student, scratch.e) + b * kBlock;
    T block_max = scratch.blocks[b].max;
    T share = bucket_sum == 0 ? T(0) : (T)(relative(block_max, bucket_max, beta) / bucket_sum);
    T factor = slopes.others == 0 ? T(0) : slopes.others * share;
    auto of_others = [=](int i) { return factor == 0 ? T(0) : factor * e[i]; };  // 0, not NaN, if the factor is 0
    if (slopes.hard == 0) {
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = of_others(i);
    } else {
      // `out` may overwrite these logits: the loop loads each logit before it stores the logit's gradient.
      const T* s = student.load(b, student_buffer);
      T base = max;
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = of_others(i) + slopes.unit_factor * exp_of_nonpositive(s[i] - base);
      int64_t label = call.options.labels[row] - b * kBlock;
      if (label >= 0 && label < n) out[label] -= slopes.hard;
    }
    for (int k = scratch.first_entry[b]; k < scratch.first_entry[b + 1]; ++k)
      out[indices[k] - b * kBlock] = entry_gradient(k, scratch, slopes);
    gradient.store(b, out, n);
  }
  T entry_gradient(int64_t k, const RowScratch<T>& scratch, const Slopes& slopes) const {
    T value = slopes.soft == 0 ? T(0) : slopes.soft * (scratch.psi[k] - scratch.q[k] * slopes.sum);
    if (slopes.hard == 0) return value;
    value += slopes.unit_factor * exp_of_nonpositive(scratch.logits[k] - max);
    return indices[k] == call.options.labels[row] ? value - slopes.hard : value;
  }
  // The gradient of a row whose logits no sweep reads: only entries have a gradient of their own.
  void gradient_of_entries(const RowScratch<T>& scratch, const Slopes& slopes) const {
    gradient.fill(0, call.columns, slopes.others);
    for (int64_t k = 0; k < entries; ++k) {
      T value = entry_gradient(k, scratch, slopes);
      narrow(&value, gradient.at(indices[k]), student.dtype, 1);
    }
  }
  void write_zeros() const {
    if (call.gradient) gradient.zero(0);
    ((T*)call.loss)[row] = 0;
    if (call.statistics) KDK_ISA::write_statistics(call, row, RowStatistics<T>{}, 0, 0);
  }

  template <class Team> void sweep(RowScratch<T>& scratch) {
    if (sweeps_logits()) {
      Team::once([&] { find_entries(scratch); });
      Team::blocks(student.blocks, [&](int64_t b) { block_sums(b, scratch); });
    } else
      Team::once([&] {
        for (int64_t k = 0; k < entries; ++k) scratch.logits[k] = student.logit(indices[k]);
      });
    Team::once([&] {
      merge(scratch);
      if (!sweeps_again()) finish(scratch);
    });
    if (sweeps_again()) {
      Team::blocks(student.blocks, [&](int64_t b) { block_wide_sum(b, scratch); });
      Team::once([&] { finish(scratch); });
    }
    if (!call.gradient) return;
    const Slopes found = slopes(scratch);
    if (sweeps_logits())
      Team::blocks(student.blocks, [&](int64_t b) { block_gradient(b, scratch, found); });
    else
      Team::once([&] { gradient_of_entries(scratch, found); });
    Team::once([&] { gradient.zero(call.columns); });
  }
};

void topk_rows(const TopkRowsCall& call) noexcept {
  by_type(call.run.fp64, [&](auto type) {
    using T = decltype(type);
    each_row<TopkRow<T>, RowScratch<T>>(call);
  });
}

int64_t topk_rows_bytes(const TopkRowsCall& call) noexcept {
  return by_type(call.run.fp64, [&](auto type) { return workspace_bytes<RowScratch<decltype(type)>>(call); });
}

}  // namespace KDK_ISA
}  // namespace kdk
