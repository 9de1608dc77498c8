// A row of logits and the row of its gradient, in blocks of columns, and the distribution of rows over threads. A
// source file includes this header inside the namespace of an instruction set, after sweeps.h: two instruction sets may
// not share any function of this header.

inline int64_t blocks_of(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

// The base that exponentials are relative to: the maximum, or 0 for a block of -inf alone.
template <class T> T finite(T max) { return max == T(-INFINITY) ? T(0) : max; }

inline const char* start_of(const Logits& x, int64_t row, int64_t inner) {
  return (const char*)x.data + (row / inner * x.outer_stride + row % inner * x.inner_stride) * bytes_of(x.dtype);
}

template <class T> struct LogitRow {
  const char* data;
  Dtype dtype;
  int64_t columns, blocks;

  LogitRow(const Logits& x, int64_t row, int64_t inner, int64_t columns)
      : data(start_of(x, row, inner)), dtype(x.dtype), columns(columns), blocks(blocks_of(columns)) {}

  int width(int64_t block) const {
    int64_t left = columns - block * kBlock;
    return left < kBlock ? (int)left : kBlock;
  }
  const char* at(int64_t column) const { return data + column * bytes_of(dtype); }
  const T* load(int64_t block, T* buffer) const { return widen(at(block * kBlock), dtype, width(block), buffer); }
  T logit(int64_t column) const {
    T buffer[1];
    return *widen(at(column), dtype, 1, buffer);
  }
  // The sum of the exponentials of a block's logits x, relative to a maximum. `keep`: the function also writes each
  // exponential to e. The function prefetches the next block meanwhile.
  template <bool keep> T block_exponentials(int64_t block, const T* x, T max, T beta, T* e) const {
    return exponentials<keep>(x, width(block), max, beta, e, at((block + 1) * kBlock), bytes_of(dtype));
  }
  // The first column that holds the maximum of the logits that are not NaN; 0 if all logits are NaN.
  int64_t argmax(T max) const {
    alignas(64) T buffer[kBlock];
    for (int64_t b = 0; b < blocks; ++b) {
      const T* x = load(b, buffer);
      if (block_max(x, width(b)) != max) continue;
      for (int i = 0; i < width(b); ++i)
        if (x[i] == max) return b * kBlock + i;
    }
    return 0;
  }
};

// A row of a gradient [rows, columns] in the dtype of the logits. `data` is null if the call has no gradient.
template <class T> struct GradientRow {
  char* data;
  Dtype dtype;
  int64_t columns;

  GradientRow(Stored gradient, Dtype dtype, int64_t row, int64_t columns)
      : data(gradient ? (char*)gradient + row * columns * bytes_of(dtype) : nullptr), dtype(dtype), columns(columns) {}

  bool is_computed_in_place() const { return bytes_of(dtype) == (int64_t)sizeof(T); }
  char* at(int64_t column) const { return data + column * bytes_of(dtype); }
  // block() is the memory in which a caller computes a block of the gradient: the row, or the buffer if the dtypes
  // differ. store() then narrows the buffer into the row.
  T* block(int64_t b, T* buffer) const { return is_computed_in_place() ? (T*)at(b * kBlock) : buffer; }
  void store(int64_t b, const T* x, int n) const {
    if (!is_computed_in_place()) narrow(x, at(b * kBlock), dtype, n);
  }
  // Writes one value to the columns from `from` up to `end`.
  void fill(int64_t from, int64_t end, T value) const {
    if (value == 0) {
      memset(at(from), 0, (end - from) * bytes_of(dtype));
      return;
    }
    for (int64_t i = from; i < end; ++i) narrow(&value, at(i), dtype, 1);
  }
  void zero(int64_t from) const { fill(from, columns, 0); }
  // The memory for the exponentials of the logits. The gradient's row serves if the gradient has their type: the page
  // faults of a fresh gradient then overlap with the exponentials' arithmetic. The scratch serves if the gradient
  // overwrites the logits, because a later sweep reads the logits again. The scratch also serves if the gradient's row
  // is not aligned as the scratch is, because the order of sums may depend on the alignment.
  T* exponentials(const LogitRow<T>& logits, T* scratch) const {
    const bool fits = data && data != logits.data && is_computed_in_place() && (uintptr_t)data % 64 == 0;
    return fits ? (T*)data : scratch;
  }
};

// The factors in a row's gradient: `soft` of the divergence, `hard` of the label term.
template <class T> struct Factors {
  T soft, hard;
};

// The options of a row, and the formulas of the row's loss and of the factors of the row's gradient.
template <class T> struct RowTerms : RowValues<T> {
  using RowValues<T>::scale, RowValues<T>::temperature, RowValues<T>::hard_weight;
  T inverse_temperature;
  bool temperature_squared, has_cap;

  RowTerms(const RowOptions& options, int64_t row)
      : temperature_squared(options.temperature_squared), has_cap(options.loss_cap.data) {
    this->read(options, row, [](const auto* from) { return *from; });
    inverse_temperature = 1 / temperature;
  }

  bool has_label_term() const { return hard_weight != 0; }
  // cross_entropy() is the cross-entropy with the label, at temperature 1. Only a row with a label term calls it.
  template <class F> T loss(T phi, F cross_entropy) const {
    const T loss = uncapped(phi, cross_entropy);
    return scale * (this->capped(loss) ? this->loss_cap : loss);
  }
  // The loss before the cap and the row's scale.
  template <class F> T uncapped(T phi, F cross_entropy) const {
    T factor = temperature_squared ? temperature * temperature : T(1);
    T loss = weighted(1 - hard_weight, factor * phi);
    if (has_label_term()) loss += hard_weight * cross_entropy();
    return loss;
  }
  // The factors for a row whose loss is loss(phi, cross_entropy). A scale may be infinite or NaN, so a hard weight of 0
  // is a case of its own: such a row has no label term, and 0 * scale would be NaN.
  template <class F> Factors<T> factors(T phi, F cross_entropy) const {
    if (has_cap && this->capped(uncapped(phi, cross_entropy))) return {0, 0};
    return {scale * (1 - hard_weight) * (temperature_squared ? temperature : inverse_temperature),
            has_label_term() ? scale * hard_weight : T(0)};
  }
};

// Writes the statistics and the top-1 classes of a row.
template <class T, class Call>
void write_statistics(const Call& call, int64_t row, const RowStatistics<T>& x, int64_t student, int64_t teacher) {
  T values[kRowStatistics];
  static_assert(sizeof values == sizeof x, "the statistics are numbers of the compute type");
  memcpy(values, &x, sizeof x);
  for (int i = 0; i < kRowStatistics; ++i) ((T*)call.statistics)[i * call.rows + row] = values[i];
  call.top1[row] = student;
  call.top1[call.rows + row] = teacher;
}

// Runs the rows of a call. If a call has many rows, each thread takes neighbouring rows in turns and works alone on
// each row. If a call has few rows, all threads work on one row, block by block. Row(call, r) has terms, write_zeros()
// for a scale of 0, and sweep<Team>(scratch). Scratch is the template argument of scratch_of.
template <class Row, class Scratch, class Call> void each_row(const Call& call) {
  const int threads = threads_for(call.rows * call.columns, call.run.threads);
  if (threads == 1 || call.rows >= 4 * threads) {
    const int64_t written = call.gradient ? call.gradient_columns * bytes_of(call.student.dtype) : 0;
    const int64_t turn = rows_of_a_turn(call.rows, written, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Scratch scratch = scratch_of<Scratch>(call, omp_get_thread_num());
#pragma omp for schedule(dynamic, turn)
      for (int64_t r = 0; r < call.rows; ++r) {
        Row row(call, r);
        if (row.terms.scale == 0)
          row.write_zeros();
        else
          row.template sweep<OneThread>(scratch);
      }
    }
    return;
  }
  for (int64_t r = 0; r < call.rows; ++r) {
    Row row(call, r);
    if (row.terms.scale == 0) {
      row.write_zeros();
      continue;
    }
#pragma omp parallel num_threads(threads)
    {
      Scratch scratch = scratch_of<Scratch>(call, 0);
      row.template sweep<AllThreads>(scratch);
    }
  }
}
