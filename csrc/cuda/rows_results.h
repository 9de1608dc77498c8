// The results of a row of logits: its gradient, its loss, its statistics. And the slices of student and teacher.
#pragma once
#include <math.h>
#include <stdint.h>

#include "groups.h"
#include "row.h"
#include "rows_partials.h"
#include "table.h"

namespace kdk {
namespace cuda {

// Whether the gradient overwrites the student's logits.
inline __device__ bool is_in_place(const RowsCall& call) { return call.gradient.data == call.student.data; }

// This block's slice of the row's gradient: soft * (psi - q * sum psi) + hard * (softmax(s) - one_hot(label)). The
// factors include the row's scale. The positions are those of the logits' slices.
struct GradientSlice {
  bool wanted, aligned;
  char* data;
  Dtype dtype;
  int begin, end, label;
  float soft, hard, slope_sum, student_max, unit_log_sum;

  GradientSlice() = default;
  __device__ GradientSlice(const RowsCall& call, int64_t row, const RowTerms& numbers, const Cut& cut,
                           const float* floats)
      : wanted(true),
        data((char*)call.gradient +
             (row * call.gradient_columns + cut.first_column) * bytes_of(call.student.dtype)),
        dtype(call.student.dtype),
        begin(cut.begin),
        end(cut.end),
        label((int)numbers.label - cut.first_column),
        student_max(floats[0]),
        unit_log_sum(floats[4]) {
    aligned = (uint64_t)data % 16 == 0;
  }
  __device__ void set(Factors factors) { soft = factors.soft, hard = factors.hard; }
  template <bool halves>
  __device__ void store(int position, const float (&s)[kGroup], const float (&q)[kGroup],
                        float (&slope)[kGroup]) const {
    for (int i = 0; i < kGroup; ++i) slope[i] = soft == 0 ? 0 : soft * (slope[i] - q[i] * slope_sum);
    if (hard != 0) {
      for (int i = 0; i < kGroup; ++i) {
        float unit_q = exp_of(s[i] - student_max - unit_log_sum);
        slope[i] += hard * (position + i == label ? unit_q - 1 : unit_q);
      }
    }
    const bool whole = aligned && position >= begin && position + kGroup <= end;
    store_group<halves>(data, dtype, whole, position, begin, end, slope);
  }
};

// One thread writes the loss and the statistics of a row.
struct Outcome {
  const RowsCall& call;
  int64_t row;
  const RowTerms& numbers;
  Normalizer student, teacher;
  float unit_log_sum, label_logit;  // label_logit: the student's logit of the label

  // The cross-entropy with the label, at temperature 1.
  __device__ float cross_entropy() const {
    return call.options.labels ? unit_log_sum + (student.max - label_logit) : 0;
  }
  __device__ void write_loss(float phi) const {
    store((float*)call.loss + row, numbers.loss(call.options, phi, cross_entropy()));
  }
  __device__ void write_statistics(float phi, const Statistics& found) const {
    RowStatistics<float> x = {};
    x.divergence = phi;
    x.cross_entropy = cross_entropy();
    x.tv = found.tv;
    x.student_entropy = found.student_entropy, x.teacher_entropy = found.teacher_entropy;
    x.student_max_log_prob = -student.log_sum, x.teacher_max_log_prob = -teacher.log_sum;
    if (call.options.labels) {
      const char* teacher_row = row_start(call.teacher, call, row);
      x.student_label_log_prob = student.log_prob(label_logit);
      x.teacher_label_log_prob = teacher.log_prob(load_logit(teacher_row, call.teacher.dtype, numbers.label));
    }
    x.student_lse = student.max * student.inverse_temperature + student.log_sum;
    x.teacher_lse = teacher.max * teacher.inverse_temperature + teacher.log_sum;
    cuda::write_statistics(call, row, x, found.student_first, found.teacher_first);
  }
};

// The begin and the end of a block's slices of a row, which student and teacher share.
struct RowCut : Cut {
  const char *student, *teacher;  // the row in global memory

  __device__ RowCut(const RowsCall& call, const Plan& plan, const Team& team, const char* student, const char* teacher)
      : Cut(call.columns, shift_of(student, call.student.dtype, teacher, call.teacher.dtype), plan, team),
        student(student),
        teacher(teacher) {}
  __device__ RowCut(const RowsCall& call, const Plan& plan, const Team& team, int64_t row)
      : RowCut(call, plan, team, row_start(call.student, call, row), row_start(call.teacher, call, row)) {}
};

}  // namespace cuda
}  // namespace kdk
