// Calls of the top-k kernels: a loss against a sparse teacher, and the extraction of one. Pointers, strides and sizes,
// nothing of torch. topk_arguments.h fills them, the kernels take them.
#pragma once
#include "rows_call.h"

namespace kdk {

// The loss of rows of student logits against the entries of a sparse teacher and one class more for all others, the
// bucket R. With lq the log-softmax of the row at its temperature, and lq_R the log-sum-exp of lq over the classes that
// no entry names:
//
//     loss          sum over entries phi(lp, lq) + phi(lp_R, lq_R)
//     psi           of each entry and of the bucket; Psi their sum
//     gradient      (psi - q Psi) / temperature of an entry, (psi_R - q_R Psi) (q / q_R) / temperature of the others,
//                   where q / q_R is the softmax over the others: exact however small q_R is
//
// conditional: the entries alone, of which the student's log-probabilities are renormalised; the others' gradient is 0.
// Row scale, hard weight and the label's cross-entropy (over all classes, at temperature 1) are as in RowsCall.
struct TopkRowsCall {
  int divergence;              // index into KDK_DIVERGENCES
  bool conditional;
  bool fp64;                   // the compute type is double, else float
  int64_t rows, inner;         // row r is (r / inner, r % inner)
  int64_t columns;             // classes that count
  int64_t gradient_columns;    // width of the gradient; zeros past `columns`
  int64_t entries;             // K
  Logits student;
  const int32_t* indices;      // [rows, K], ascending, none twice; those from `columns` on are no entries
  const void* log_probs;       // [rows, K] in the compute type; finite or NaN where there is an entry
  const void* tail_log_prob;   // [rows]; -inf: no mass
  PerRow row_scale;            // 0: skip the row before any load
  PerRow temperature;
  PerRow hard_weight;          // data may be null: no label term
  const int64_t* labels;       // may be null
  const void* parameters;      // of the divergence
  bool temperature_squared;
  void* loss;                  // [rows]
  // [kRowStatistics, rows] or null. tv and the teacher's entropy are of the entries and the bucket (conditional: of the
  // entries), the student's are of all classes; teacher_label_log_prob is the bucket's where no entry is the label,
  // teacher_max_log_prob the largest of the entries, teacher_lse the log of the teacher's whole mass.
  void* statistics;
  int64_t* top1;               // [2, rows] with statistics: the student's, and the teacher's among the entries
  void* gradient;              // [rows, gradient_columns] in the student's dtype, contiguous, or null; it may lie where
                               // the student's logits do, which then are contiguous too
  void* workspace;
  int threads;
};

// The k largest log-probabilities of each row, descending, the smaller index first among equals, and the log-sum-exp of
// the rest: at the row's temperature.
struct TopkCall {
  int64_t rows, inner, columns, k;
  Logits logits;
  PerRow row_scale;            // 0: the row is not read; its indices are -1, its log-probabilities -inf, its tail 0
  PerRow temperature;
  int32_t* indices;            // [rows, k]; -1 where the log-probability is -inf
  void* log_probs;             // [rows, k] in the compute type
  void* tail_log_prob;         // [rows]
  void* workspace;
  int threads;
};

// What a teacher gave becomes entries as a TopkRowsCall takes them. An index that is negative, one whose
// log-probability is -inf, and all of a row whose scale is 0, are no entries; nor is one past the last class, of which
// the caller is told.
struct SortEntriesCall {
  int64_t rows, entries, columns;
  const void* given_indices;   // [rows, K] int64 (`wide`) or int32
  bool wide;
  const void* given_log_probs; // [rows, K]
  Dtype dtype;
  bool fp64;                   // the compute type is double, else float
  PerRow row_scale;
  int32_t* indices;            // [rows, K], ascending; `columns` for what is no entry
  void* log_probs;             // [rows, K] in the compute type, -inf for what is no entry
  bool* outside;               // [rows]: whether an index was past the last class
  bool* repeated;              // [rows]: whether a class is there twice
  void* workspace;
  int threads;
};

}  // namespace kdk
