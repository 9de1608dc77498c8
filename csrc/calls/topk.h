// Calls of the top-k kernels: the loss against a sparse teacher, the extraction of one, and the sorting of its entries.
#pragma once
#include "rows.h"

namespace kdk {

// The loss of rows of student logits against the entries of a sparse teacher. One more class, the bucket R, stands for
// all classes that no entry names. With lq the log-softmax of the row at its temperature, and lq_R the log-sum-exp of lq
// over the bucket's classes:
//
//     loss          sum over entries phi(lp, lq) + phi(lp_R, lq_R)
//     psi           of each entry and of the bucket; Psi is their sum
//     gradient      (psi - q Psi) / temperature of an entry, (psi_R - q_R Psi) (q / q_R) / temperature of the others,
//                   where q / q_R is the softmax over the others: exact however small q_R is
//
// support_only: the entries alone, with the student's log-probabilities renormalised over them; the gradient of the
// others is 0. Row scale, hard weight and the label's cross-entropy (over all classes, at temperature 1) are as in
// RowsCall.
struct TopkRowsCall {
  Divergence divergence;
  bool support_only;
  int64_t rows, inner;         // row r is (r / inner, r % inner)
  int64_t columns;             // classes that count
  int64_t gradient_columns;    // width of the gradient; zeros past `columns`
  int64_t entries;             // K
  Logits student;
  const int32_t* indices;      // [rows, K], ascending, none twice; those from `columns` on are no entries
  Numbers log_probs;           // [rows, K]; finite or NaN where there is an entry
  Numbers tail_log_prob;       // [rows]; -inf: no mass
  RowOptions options;
  Numbers parameters;          // of the divergence
  Numbers loss;                // [rows]
  // [kRowStatistics, rows] or null. tv and the teacher's entropy are of the entries and the bucket (support_only: of the
  // entries), the student's are of all classes. teacher_label_log_prob is the bucket's where no entry is the label,
  // teacher_max_log_prob the largest of the entries, teacher_lse the log of the teacher's whole mass.
  Numbers statistics;
  int64_t* top1;               // [2, rows] with statistics: the student's, and the teacher's among the entries
  Stored gradient;             // as in RowsCall, or null
  KDK_FIELDS(divergence, support_only, rows, inner, columns, gradient_columns, entries, student, indices, log_probs,
             tail_log_prob, options, parameters, loss, statistics, top1, gradient)
  Execution run;
};

// The k largest log-probabilities of each row at its temperature, descending, the smaller index first among equals, and
// the log-sum-exp of the rest.
struct TopkCall {
  int64_t rows, inner, columns, k;
  Logits logits;
  PerRow row_scale;            // 0: the row is not read; its indices are -1, its log-probabilities -inf, its tail 0
  PerRow temperature;
  int32_t* indices;            // [rows, k]; -1 where the log-probability is -inf
  Numbers log_probs;           // [rows, k]
  Numbers tail_log_prob;       // [rows]
  KDK_FIELDS(rows, inner, columns, k, logits, row_scale, temperature, indices, log_probs, tail_log_prob)
  Execution run;
};

// Sorts a teacher's classes and log-probabilities into entries as a TopkRowsCall takes them. These are no entries: a
// negative class, a class with log-probability -inf, a class past the last one (which is reported in `outside`), and
// all classes of a row whose scale is 0.
struct SortEntriesCall {
  int64_t rows, entries, columns;
  Classes given_indices;       // [rows, K]
  Stored given_log_probs;      // [rows, K]
  PerRow row_scale;
  int32_t* indices;            // [rows, K], ascending; `columns` for what is no entry
  Numbers log_probs;           // [rows, K]; -inf for what is no entry
  bool* outside;               // [rows]: a class was past the last one
  bool* repeated;              // [rows]: a class stands there twice
  KDK_FIELDS(rows, entries, columns, given_indices, given_log_probs, row_scale, indices, log_probs, outside, repeated)
  Execution run;
};

}  // namespace kdk
