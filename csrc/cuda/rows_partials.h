// The partial results of the row sweeps, and their merge across a warp, whose result is in lane 0.
#pragma once
#include <math.h>
#include <stdint.h>

#include "table.h"
#include "team.h"

namespace kdk {
namespace cuda {

struct Floats {
  float student_max, student_sum, teacher_max, teacher_sum;
  float unit_sum;   // of the student, at temperature 1
  float log_ratio;  // sum of e * ((s - student base) - (t - teacher base)), e the student's exponential

  static __device__ Floats none() { return {-INFINITY, 0, -INFINITY, 0, 0, 0}; }

  // Takes the sums to new maxima, which are not smaller. `weighted` drops an infinite log_ratio if the exponentials
  // decay to 0.
  __device__ void rebase(float new_student_max, float new_teacher_max, Tempering at) {
    float student_base = base_of(new_student_max), teacher_base = base_of(new_teacher_max);
    float decay = at.exp(student_max - student_base);
    float shift = (base_of(student_max) - student_base) - (base_of(teacher_max) - teacher_base);
    log_ratio = weighted(decay, log_ratio + student_sum * shift);
    student_sum *= decay;
    teacher_sum *= at.exp(teacher_max - teacher_base);
    if (at.unit) unit_sum *= exp_of(student_max - student_base);
    student_max = new_student_max, teacher_max = new_teacher_max;
  }
  __device__ void share(Tempering at) {
    rebase(warp_max(student_max), warp_max(teacher_max), at);
  }
  __device__ void merge(const Floats& below) {
    student_sum += below.student_sum, teacher_sum += below.teacher_sum;
    unit_sum += below.unit_sum, log_ratio += below.log_ratio;
  }
};

struct Sums {
  float phi, psi;

  static __device__ Sums none() { return {0, 0}; }
  __device__ void merge(const Sums& below) {
    phi += below.phi, psi += below.psi;
  }
};

struct Statistics {
  float tv, student_entropy, teacher_entropy;
  int student_first, teacher_first;  // the first column that holds the maximum; INT32_MAX: no column holds it

  static __device__ Statistics none() { return {0, 0, 0, INT32_MAX, INT32_MAX}; }
  __device__ void merge(const Statistics& below) {
    tv += below.tv, student_entropy += below.student_entropy, teacher_entropy += below.teacher_entropy;
    student_first = min(student_first, below.student_first);
    teacher_first = min(teacher_first, below.teacher_first);
  }
};

}  // namespace cuda
}  // namespace kdk
