// Calls of the top-k kernels: the loss against a sparse teacher, the extraction of a sparse teacher, and the sort of a
// sparse teacher's entries.
#pragma once
#include "rows.h"

namespace kdk {

// The loss of rows of student logits against the entries of a sparse teacher. One more class, the bucket R, stands for
// all classes that no entry names. lq is the log-softmax of the row at the row's temperature, and lq_R is the
// log-sum-exp of lq over the bucket's classes:
//
//     loss          sum over entries phi(lp, lq) + phi(lp_R, lq_R)
//     psi           of each entry and of the bucket; Psi is their sum
//     gradient      (psi - q Psi) / temperature of an entry, (psi_R - q_R Psi) (q / q_R) / temperature of the others;
//                   q / q_R is the softmax over the others, which is exact however small q_R is
//
// A close row (csrc/divergences.h) has phi and psi by the close lines.
//
// support_only: the loss has no bucket, and the student's log-probabilities are renormalised over the entries. The
// gradient of the other classes is 0. The row scale, the hard weight and the label's cross-entropy (over all classes,
// at temperature 1) are those of RowsCall.
struct TopkRowsCall {
  Divergence divergence;
  bool support_only;
  int64_t rows, inner;         // row r of the call is row (r / inner, r % inner) of the logits
  int64_t columns;             // the classes that count
  int64_t gradient_columns;    // the width of the gradient, which is 0 from `columns` on
  int64_t entries;             // K
  Logits student;
  const int32_t* indices;      // [rows, K], ascending, without duplicates; indices from `columns` on are no entries
  Numbers log_probs;           // [rows, K]; the log-probability of an entry is finite or NaN
  Numbers tail_log_prob;       // [rows]; -inf: the bucket has no mass
  Numbers log_probs_rounding;  // [rows, K] or null: what fp32 does not hold of log_probs; the close lines add it
  Numbers tail_rounding;       // [rows] or null: the same of tail_log_prob
  RowOptions options;
  Numbers parameters;          // of the divergence
  double close_below;          // as in RowsCall
  double close_temperature;
  Numbers slack;               // [1] or null: c, if phi has c (p - q) more in rows of close_temperature or a higher one
  Numbers loss;                // [rows]
  // [kRowStatistics, rows] or null. tv and the teacher's entropy are over the entries and the bucket (support_only:
  // over the entries). The student's statistics are over all classes. teacher_label_log_prob is the bucket's
  // log-probability if no entry is the label. teacher_max_log_prob is the largest log-probability of the entries.
  // teacher_lse is the log of the teacher's whole mass.
  Numbers statistics;
  int64_t* top1;               // [2, rows] if the call has statistics: the student's top class, the teacher's top entry
  Stored gradient;             // as in RowsCall, or null
  KDK_FIELDS(divergence, support_only, rows, inner, columns, gradient_columns, entries, student, indices, log_probs,
             tail_log_prob, log_probs_rounding, tail_rounding, options, parameters, close_below, close_temperature,
             slack, loss, statistics, top1, gradient)
  Execution run;

  // Whether a row has the close lines, from its divergence by the lines for all rows.
  template <class T> KDK_EVERYWHERE bool is_close(T phi, T temperature) const {
    return close_below > 0 && (phi < (T)close_below || temperature >= (T)close_temperature);
  }
};

// The k largest log-probabilities of each row at the row's temperature, and the log-sum-exp of the other classes. The
// log-probabilities descend. Among equal log-probabilities the smaller index comes first.
struct TopkCall {
  int64_t rows, inner, columns, k;
  Logits logits;
  PerRow row_scale;            // 0: the kernel skips the row; indices are -1, log-probabilities -inf, the tail 0
  PerRow temperature;
  int32_t* indices;            // [rows, k]; -1 if the log-probability is -inf
  Numbers log_probs;           // [rows, k]
  Numbers tail_log_prob;       // [rows]
  KDK_FIELDS(rows, inner, columns, k, logits, row_scale, temperature, indices, log_probs, tail_log_prob)
  Execution run;
};

// Sorts a teacher's classes and log-probabilities into the entries of a TopkRowsCall. These classes are no entries: a
// negative class, a class with log-probability -inf, a class past the last one (which `outside` reports), and all
// classes of a row whose scale is 0.
struct SortEntriesCall {
  int64_t rows, entries, columns;
  Classes given_indices;       // [rows, K]
  Stored given_log_probs;      // [rows, K]
  PerRow row_scale;
  int32_t* indices;            // [rows, K], ascending; `columns` fills the places past the last entry
  Numbers log_probs;           // [rows, K]; -inf fills the places past the last entry
  bool* outside;               // [rows]: the row has a class past the last one
  bool* repeated;              // [rows]: the row names a class twice
  KDK_FIELDS(rows, entries, columns, given_indices, given_log_probs, row_scale, indices, log_probs, outside, repeated)
  Execution run;
};

}  // namespace kdk
