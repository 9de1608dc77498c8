// The partial results of a row against a sparse teacher, and their merge across a warp, whose result is in lane 0.
#pragma once
#include <math.h>
#include <stdint.h>

#include "mass.h"
#include "rows_partials.h"
#include "table.h"
#include "team.h"

namespace kdk {
namespace cuda {

struct Masses {
  Mass others, entries;
  float teacher_max, teacher_sum;  // of the teacher's log-probabilities; the statistics need them

  static __device__ Masses none() { return {Mass::none(), Mass::none(), -INFINITY, 0}; }
  __device__ void rebase_teacher(float larger) {
    teacher_sum *= exp_of(teacher_max - base_of(larger));
    teacher_max = larger;
  }
  __device__ void add_teacher(float log_prob) {
    if (log_prob > teacher_max) rebase_teacher(log_prob);
    teacher_sum += exp_of(log_prob - base_of(teacher_max));
  }
  __device__ void share(Tempering at) {
    others.rebase(warp_max(others.max), at);
    entries.rebase(warp_max(entries.max), at);
    rebase_teacher(warp_max(teacher_max));
  }
  __device__ void merge(const Masses& below) {
    others.sum += below.others.sum, others.unit_sum += below.others.unit_sum;
    entries.sum += below.entries.sum, entries.unit_sum += below.entries.unit_sum;
    teacher_sum += below.teacher_sum;
  }
};

// The statistics over the entries; the student's are over all classes.
struct EntryStatistics : Statistics {
  int label_entry;  // the entry that is the label; INT32_MAX: no entry is the label

  static __device__ EntryStatistics none() { return {Statistics::none(), INT32_MAX}; }
  __device__ void merge(const EntryStatistics& below) {
    Statistics::merge(below);
    label_entry = min(label_entry, below.label_entry);
  }
};

}  // namespace cuda
}  // namespace kdk
