// The row sweeps of the dense family on a CPU.
//
// A row consists of blocks of kBlock columns. Three sweeps run over the blocks. A merge in a fixed order follows each
// of the first two sweeps, so no result depends on the number of threads:
//
//     floats      block maximum, exponentials relative to it (kept in the workspace), their sum  -> max, log sum
//     sums        p, q from those exponentials, the divergence's value and slope (psi kept)      -> sum phi, sum psi
//     gradient    scale / temperature * (psi - q * sum psi), and the label term                  -> gradient
//
// Loss and gradient thus take each logit's exponential once. The label term at another temperature takes it again, and
// so does a gradient in a call of its own. With m the block's maximum, log-probabilities are
// (x - m) / temperature + ((m - max) / temperature - log sum). The difference comes first, so a large common offset of
// the logits costs no digits. kl, whose sum psi is 0, could write its gradient in the second sweep. That was slower:
// the page faults of a fresh gradient clear pages through the caches, and evict the row that the sweep reads.
//
// A row in fp32 whose divergence comes out small is swept for its sums once more, by the close lines of the table. The
// first time has no use then, but for the statistics. A row of a high temperature has the close lines at once.
//
// The gradient may overwrite the student's logits. The statistics, the label's logit and the first column of the
// maximum need a whole row of logits, so the kernel finds them before the third sweep. The third sweep reads a block
// before it writes the block.
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

// A call would keep a loop from being packed.
#define KDK_HD inline __attribute__((always_inline))

namespace kdk {
namespace KDK_ISA {

#include "elementary.h"
#include "storage.h"
#include "sweeps.h"
#include "../divergences.h"
#include "row.h"

// ---- the inner loops, each over one block

// Turns a block's logits and exponentials into probabilities: log q = (s - max) / temperature + shift, and
// q = e * factor with factor = exp(shift). Both use the same rounded shift, so q is the exponential of log q.
template <class T> struct Normalizer {
  T max, shift, factor, inverse_temperature;
  inline T log_prob(T logit) const { return (logit - max) * inverse_temperature + shift; }
};

template <class T> struct BlockSums {
  T phi, psi, excess, tv, student_entropy, teacher_entropy;
};

// The sums of phi and psi. with_slope leaves q in student_e and psi in teacher_e. The function is not inlined: a
// profile shows its symbol, and a test checks that its loop has packed instructions.
template <class T, class D, bool with_slope>
__attribute__((noinline)) void divergence_sums(const D& divergence, const T* student, const T* teacher, int n,
                                               Normalizer<T> student_norm, Normalizer<T> teacher_norm, T* student_e,
                                               T* teacher_e, BlockSums<T>* sums) {
  T phi = 0, psi = 0;
#pragma omp simd reduction(+ : phi, psi)
  for (int i = 0; i < n; ++i) {
    T lp = teacher_norm.log_prob(teacher[i]), lq = student_norm.log_prob(student[i]);
    T p = teacher_e[i] * teacher_norm.factor, q = student_e[i] * student_norm.factor;
    phi += divergence.value(lp, lq, p, q);
    T slope = divergence.slope(lp, lq, p, q);
    psi += slope;
    if (with_slope) {
      student_e[i] = q;
      teacher_e[i] = slope;
    }
  }
  sums->phi = phi;
  sums->psi = psi;
}

// The same for a close row, and the sum of p (exp(d) - 1).
template <class T, class D, bool with_slope>
__attribute__((noinline)) void close_sums(const D& divergence, const T* student, const T* teacher, int n,
                                          Normalizer<T> student_norm, Normalizer<T> teacher_norm, LogRatio<T> log_ratio,
                                          T* student_e, T* teacher_e, BlockSums<T>* sums) {
  T phi = 0, psi = 0, excess = 0;
#pragma omp simd reduction(+ : phi, psi, excess)
  for (int i = 0; i < n; ++i) {
    T lp = teacher_norm.log_prob(teacher[i]), lq = student_norm.log_prob(student[i]);
    T p = teacher_e[i] * teacher_norm.factor, q = student_e[i] * student_norm.factor;
    CloseTerms<T> x = close_terms(divergence, log_ratio(student[i], teacher[i]), lp, lq, p, q);
    phi += x.phi;
    psi += x.psi;
    excess += x.excess;
    if (with_slope) {
      student_e[i] = q;
      teacher_e[i] = x.psi;
    }
  }
  sums->phi = phi;
  sums->psi = psi;
  sums->excess = excess;
}

// The statistics that are sums over the classes.
template <class T>
void block_statistics(const T* student, const T* teacher, int n, Normalizer<T> student_norm,
                      Normalizer<T> teacher_norm, const T* student_e, const T* teacher_e, BlockSums<T>* sums) {
  T tv = 0, student_entropy = 0, teacher_entropy = 0;
#pragma omp simd reduction(+ : tv, student_entropy, teacher_entropy)
  for (int i = 0; i < n; ++i) {
    T p = teacher_e[i] * teacher_norm.factor, q = student_e[i] * student_norm.factor;
    tv += p > q ? p - q : q - p;
    student_entropy -= weighted(q, student_norm.log_prob(student[i]));
    teacher_entropy -= weighted(p, teacher_norm.log_prob(teacher[i]));
  }
  sums->tv = T(0.5) * tv;
  sums->student_entropy = student_entropy;
  sums->teacher_entropy = teacher_entropy;
}

// ---- one row

template <class T> struct BlockFloats {
  T student_max, student_sum, teacher_max, teacher_sum, unit_sum;
};

// A region of the workspace: the row's exponentials (later q and psi), and the partial results of the row's blocks.
template <class T> struct Scratch {
  T *student_e, *teacher_e;
  BlockFloats<T>* floats;
  BlockSums<T>* sums;

  Scratch(const RowsCall& call, Arena& arena) {
    const int64_t blocks = blocks_of(call.columns);
    student_e = arena.take<T>(blocks * kBlock), teacher_e = arena.take<T>(blocks * kBlock);
    floats = arena.take<BlockFloats<T>>(blocks), sums = arena.take<BlockSums<T>>(blocks);
  }
};

template <class T> struct Row {
  const RowsCall& call;
  const int64_t row;
  const LogitRow<T> student, teacher;
  const GradientRow<T> gradient;
  const RowTerms<T> terms;
  T student_max, student_log_sum, teacher_max, teacher_log_sum, unit_log_sum, phi, psi;
  T shift;            // of a close row, else infinite
  bool again, exact;  // whether the sums are to be found again; whether the shift is corrected
  T tv, student_entropy, teacher_entropy;
  Factors<T> factors;

  Row(const RowsCall& call, int64_t row)
      : call(call),
        row(row),
        student(call.student, row, call.inner, call.columns),
        teacher(call.teacher, row, call.inner, call.columns),
        gradient(call.gradient, call.student.dtype, row, call.gradient_columns),
        terms(call.options, row) {}

  // Sweep 1.
  void block_floats(int64_t b, Scratch<T>& scratch) const {
    alignas(64) T buffer[kBlock];
    BlockFloats<T>& out = scratch.floats[b];
    const T beta = terms.inverse_temperature, *s = student.load(b, buffer);
    out.student_max = block_max(s, student.width(b));
    const T base = finite(out.student_max);
    out.student_sum = student.template block_exponentials<true>(b, s, base, beta, student_e(scratch) + b * kBlock);
    if (call.needs_unit_log_sum)
      out.unit_sum = terms.temperature == 1 ? out.student_sum
                                      : student.template block_exponentials<false>(b, s, base, T(1), (T*)0);
    const T* t = teacher.load(b, buffer);
    out.teacher_max = block_max(t, teacher.width(b));
    out.teacher_sum = teacher.template block_exponentials<true>(b, t, finite(out.teacher_max), beta,
                                                                scratch.teacher_e + b * kBlock);
  }
  T* student_e(const Scratch<T>& scratch) const { return gradient.exponentials(student, scratch.student_e); }

  // Merges the (max, sum exp) pairs: log sum_b sum_b exp(max_b - max). A row of -inf alone gives 0/0: NaN, as in
  // log_softmax.
  T merged(T BlockFloats<T>::*block_max, T BlockFloats<T>::*block_sum, T beta, const Scratch<T>& scratch,
           T* max) const {
    *max = -INFINITY;
    for (int64_t b = 0; b < student.blocks; ++b)
      if (scratch.floats[b].*block_max > *max) *max = scratch.floats[b].*block_max;
    double sum = 0;
    for (int64_t b = 0; b < student.blocks; ++b)
      sum += scratch.floats[b].*block_sum * exp_of_nonpositive((scratch.floats[b].*block_max - *max) * beta);
    return (T)::log(sum);
  }
  void merge_floats(const Scratch<T>& scratch) {
    typedef BlockFloats<T> B;
    student_log_sum = merged(&B::student_max, &B::student_sum, terms.inverse_temperature, scratch, &student_max);
    teacher_log_sum = merged(&B::teacher_max, &B::teacher_sum, terms.inverse_temperature, scratch, &teacher_max);
    unit_log_sum = 0;
    if (call.needs_unit_log_sum) unit_log_sum = merged(&B::student_max, &B::unit_sum, 1, scratch, &student_max);
    T* out = (T*)call.floats + row;
    T values[kRowFloats] = {student_max, student_log_sum, teacher_max, teacher_log_sum, unit_log_sum};
    for (int i = 0; i < kRowFloats; ++i) out[i * call.rows] = values[i];
  }
  void read_floats() {
    const T* in = (const T*)call.floats + row;
    student_max = in[0], student_log_sum = in[call.rows];
    teacher_max = in[2 * call.rows], teacher_log_sum = in[3 * call.rows];
    unit_log_sum = in[4 * call.rows];
  }

  // The exponentials are relative to `base`.
  Normalizer<T> normalizer(T max, T log_sum, T base) const {
    T shift = (base - max) * terms.inverse_temperature - log_sum;
    return {base, shift, exp_of(shift), terms.inverse_temperature};
  }

  // Sweep 2. If `kept` is not null, sweep 1 left the block's exponentials in student_e and teacher_e; else this
  // function computes them there. with_slope replaces the exponentials with q and psi.
  template <bool with_slope>
  void block_sums(int64_t b, const BlockFloats<T>* kept, T* student_e, T* teacher_e, BlockSums<T>* out,
                  bool with_statistics) const {
    alignas(64) T student_buffer[kBlock], teacher_buffer[kBlock];
    const int n = student.width(b);
    const T *s = student.load(b, student_buffer), *t = teacher.load(b, teacher_buffer);
    T student_base = student_max, teacher_base = teacher_max;
    if (kept) {
      // The exponentials of a block of -inf alone are 0 relative to any base. The base is then the row's maximum.
      if (kept->student_max != T(-INFINITY)) student_base = kept->student_max;
      if (kept->teacher_max != T(-INFINITY)) teacher_base = kept->teacher_max;
    } else {
      student.template block_exponentials<true>(b, s, student_max, terms.inverse_temperature, student_e);
      teacher.template block_exponentials<true>(b, t, teacher_max, terms.inverse_temperature, teacher_e);
    }
    Normalizer<T> student_norm = normalizer(student_max, student_log_sum, student_base);
    Normalizer<T> teacher_norm = normalizer(teacher_max, teacher_log_sum, teacher_base);
    if (with_statistics) block_statistics(s, t, n, student_norm, teacher_norm, student_e, teacher_e, out);
    with_divergence((int)call.divergence, (const T*)call.parameters, [&](auto divergence) {
      if constexpr (sizeof(T) == sizeof(float)) {
        if (is_close()) {
          LogRatio<T> log_ratio(student_max, teacher_max, terms.inverse_temperature, shift);
          return close_sums<T, decltype(divergence), with_slope>(divergence, s, t, n, student_norm, teacher_norm,
                                                                 log_ratio, student_e, teacher_e, out);
        }
      }
      divergence_sums<T, decltype(divergence), with_slope>(divergence, s, t, n, student_norm, teacher_norm, student_e,
                                                           teacher_e, out);
    });
  }
  T total(T BlockSums<T>::*field, const Scratch<T>& scratch) const {
    double sum = 0;
    for (int64_t b = 0; b < student.blocks; ++b) sum += scratch.sums[b].*field;
    return (T)sum;
  }
  // Whether the row has the close lines. A row with NaN has not.
  bool is_close() const { return shift < T(INFINITY); }
  T first_shift() const {
    return LogRatio<T>::first_shift(student_max, student_log_sum, teacher_max, teacher_log_sum,
                                    terms.inverse_temperature);
  }
  void begin_sums() {
    const bool close = call.close_below > 0 && terms.temperature >= (T)call.close_temperature;
    shift = close ? first_shift() : T(INFINITY);
    exact = false;
  }
  // Decides whether the row is close, from its divergence by the lines for all rows, and whether its shift is exact
  // enough. If `again`, the sums are of no use.
  void merge_sums(const Scratch<T>& scratch) {
    typedef BlockSums<T> B;
    phi = total(&B::phi, scratch);
    psi = total(&B::psi, scratch);
    again = false;
    if (is_close()) {
      const T epsilon = (T)::log1p((double)total(&B::excess, scratch));
      with_divergence((int)call.divergence, (const T*)call.parameters,
                      [&](auto divergence) { again = has_kink<decltype(divergence)> && !exact; });
      if (again) shift += epsilon, exact = true;
      phi = close_sum(phi, psi, epsilon);
    } else if (phi < (T)call.close_below) {
      shift = first_shift();
      again = is_close();
    }
    if (!again) write_sums(scratch);
  }
  void write_sums(const Scratch<T>& scratch) {
    typedef BlockSums<T> B;
    T values[kRowSums] = {phi, psi, is_close() ? shift : T(INFINITY)};
    for (int i = 0; i < kRowSums; ++i) ((T*)call.sums)[i * call.rows + row] = values[i];
    if (call.statistics) {
      tv = total(&B::tv, scratch);
      student_entropy = total(&B::student_entropy, scratch);
      teacher_entropy = total(&B::teacher_entropy, scratch);
      write_statistics();
    }
    if (call.loss) ((T*)call.loss)[row] = terms.loss(phi, [&] { return cross_entropy(); });
    find_factors();
  }
  void read_sums() {
    const T* in = (const T*)call.sums + row;
    phi = in[0], psi = in[call.rows], shift = in[2 * call.rows];
    find_factors();
  }
  // The factors come before the gradient, because the gradient may overwrite the logits that cross_entropy() reads.
  void find_factors() {
    if (call.sweeps & kGradient) factors = terms.factors(phi, [&] { return cross_entropy(); });
  }

  // The cross-entropy with the label, at temperature 1.
  T cross_entropy() const { return unit_log_sum + (student_max - student.logit(call.options.labels[row])); }
  void write_statistics() const {
    RowStatistics<T> x = {};
    x.divergence = phi;
    x.tv = tv;
    x.student_entropy = student_entropy, x.teacher_entropy = teacher_entropy;
    x.student_max_log_prob = -student_log_sum, x.teacher_max_log_prob = -teacher_log_sum;
    x.student_lse = student_max * terms.inverse_temperature + student_log_sum;
    x.teacher_lse = teacher_max * terms.inverse_temperature + teacher_log_sum;
    if (call.options.labels) {
      int64_t label = call.options.labels[row];
      x.cross_entropy = cross_entropy();
      Normalizer<T> student_norm = normalizer(student_max, student_log_sum, student_max);
      Normalizer<T> teacher_norm = normalizer(teacher_max, teacher_log_sum, teacher_max);
      x.student_label_log_prob = student_norm.log_prob(student.logit(label));
      x.teacher_label_log_prob = teacher_norm.log_prob(teacher.logit(label));
    }
    KDK_ISA::write_statistics(call, row, x, student.argmax(student_max), teacher.argmax(teacher_max));
  }

  // Sweep 3 of a block, from q and psi of the block's classes.
  void block_gradient(int64_t b, const T* q, const T* psi_of_class) const {
    alignas(64) T student_buffer[kBlock], gradient_buffer[kBlock];
    const int n = student.width(b);
    T* out = gradient.block(b, gradient_buffer);

    const T soft = factors.soft, hard = factors.hard;
    T slope_sum = psi - psi == 0 ? psi : T(NAN);  // an infinite slope makes the whole row's gradient NaN
    auto soft_term = [=](int i) { return soft == 0 ? T(0) : soft * (psi_of_class[i] - q[i] * slope_sum); };
    if (hard == 0) {
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = soft_term(i);
    } else {
      // `out` may overwrite these logits: the loop loads each logit before it stores the logit's gradient.
      const T* s = student.load(b, student_buffer);
      T unit_factor = hard * (T)::exp(-(double)unit_log_sum);
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = soft_term(i) + unit_factor * exp_of_nonpositive(s[i] - student_max);
      int64_t label = call.options.labels[row] - b * kBlock;
      if (label >= 0 && label < n) out[label] -= hard;
    }
    gradient.store(b, out, n);
  }

  void write_zeros() const {
    if (call.gradient) gradient.zero(0);
    T* outputs[] = {(T*)call.floats, (T*)call.sums, (T*)call.loss};
    int counts[] = {call.sweeps & kFloats ? kRowFloats : 0, call.sweeps & kSums ? kRowSums : 0, call.loss ? 1 : 0};
    for (int k = 0; k < 3; ++k)
      for (int i = 0; i < counts[k]; ++i) outputs[k][i * call.rows + row] = 0;
    if (call.statistics) KDK_ISA::write_statistics(call, row, RowStatistics<T>{}, 0, 0);
  }
  template <class Team> void sweep(Scratch<T>& scratch) {
    const bool find_floats = call.sweeps & kFloats, find_sums = call.sweeps & kSums;
    if (find_floats) {
      Team::blocks(student.blocks, [&](int64_t b) { block_floats(b, scratch); });
      Team::once([&] { merge_floats(scratch), begin_sums(); });
    } else {
      Team::once([&] { read_floats(), begin_sums(); });
    }
    for (bool first = true; find_sums && (first || again); first = false) {
      Team::blocks(student.blocks, [&](int64_t b) {
        // With a gradient, the first time leaves q and psi in the place of the exponentials.
        const BlockFloats<T>* kept = find_floats && (first || !call.gradient) ? &scratch.floats[b] : nullptr;
        T *student_e = this->student_e(scratch) + b * kBlock, *teacher_e = scratch.teacher_e + b * kBlock;
        const bool with_statistics = call.statistics && first;
        if (call.gradient)
          block_sums<true>(b, kept, student_e, teacher_e, &scratch.sums[b], with_statistics);
        else
          block_sums<false>(b, kept, student_e, teacher_e, &scratch.sums[b], with_statistics);
      });
      Team::once([&] { merge_sums(scratch); });
    }
    if (!(call.sweeps & kGradient)) return;
    if (find_sums) {
      Team::blocks(student.blocks, [&](int64_t b) {
        block_gradient(b, student_e(scratch) + b * kBlock, scratch.teacher_e + b * kBlock);
      });
    } else {
      Team::once([&] { read_sums(); });
      Team::blocks(student.blocks, [&](int64_t b) {
        alignas(64) T q[kBlock], psi_of_class[kBlock];
        BlockSums<T> unused;
        block_sums<true>(b, nullptr, q, psi_of_class, &unused, false);
        block_gradient(b, q, psi_of_class);
      });
    }
    Team::once([&] { gradient.zero(call.columns); });
  }
};

// ---- all rows

void rows(const RowsCall& call) noexcept {
  by_type(call.run.fp64, [&](auto type) {
    using T = decltype(type);
    each_row<Row<T>, Scratch<T>>(call);
  });
}

int64_t rows_bytes(const RowsCall& call) noexcept {
  return by_type(call.run.fp64, [&](auto type) { return workspace_bytes<Scratch<decltype(type)>>(call); });
}

template <class T> void scale_all(const ScaleRowsCall& call) {
  const int64_t rows = call.rows, columns = call.columns;
  const Dtype dtype = call.x.dtype;
  int64_t first = 0;  // the first row whose factor is not 1; most backward passes have no such row
  while (first < rows && per_row<T>(call.factor, first) == 1) first += call.factor.stride ? 1 : rows;
  if (first == rows) return;
#pragma omp parallel for schedule(dynamic) num_threads(call.run.threads) \
    if (rows * columns >= kSerialWork && call.run.threads > 1)
  for (int64_t r = first; r < rows; ++r) {
    T f = per_row<T>(call.factor, r);
    if (f == 1) continue;
    for (int64_t c = 0; c < columns; c += kBlock) {
      alignas(64) T buffer[kBlock];
      int n = columns - c < kBlock ? (int)(columns - c) : kBlock;
      void* block = (char*)call.x + (r * columns + c) * bytes_of(dtype);
      const T* in = widen(block, dtype, n, buffer);
      for (int i = 0; i < n; ++i) buffer[i] = in[i] * f;
      narrow(buffer, block, dtype, n);
    }
  }
}

void scale_rows(const ScaleRowsCall& call) noexcept {
  by_type(call.run.fp64, [&](auto type) { scale_all<decltype(type)>(call); });
}

int64_t scale_rows_bytes(const ScaleRowsCall&) noexcept { return 0; }

}  // namespace KDK_ISA
}  // namespace kdk
