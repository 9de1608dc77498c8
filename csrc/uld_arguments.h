// What Python hands to the kernels of Universal Logit Distillation: shared by the modules that bind them.
#pragma once
#include "arguments.h"
#include "uld_call.h"

namespace kdk {

// As taking_rows_call (arguments.h), for a UldCall.
template <class Result, class... Own> auto taking_uld_call(Result (*run)(const UldCall&, Own...)) {
  return [run](bool fp64, std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> sizes, const LogitsArgument& student,
               const LogitsArgument& teacher, const PerRowArgument& row_scale, const PerRowArgument& temperature,
               uintptr_t loss, uintptr_t divergence, uintptr_t gradient, Own... own) {
    UldCall call{};
    call.fp64 = fp64;
    std::tie(call.rows, call.inner, call.student_columns, call.teacher_columns, call.gradient_columns) = sizes;
    call.student = logits(student);
    call.teacher = logits(teacher);
    call.row_scale = per_row(row_scale);
    call.temperature = per_row(temperature);
    call.loss = (void*)loss;
    call.divergence = (void*)divergence;
    call.gradient = (void*)gradient;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

using RankedArgument = std::tuple<uintptr_t, int>;  // pointer, dtype

// The same for a RankedUldCall.
template <class Result, class... Own> auto taking_ranked_uld_call(Result (*run)(const RankedUldCall&, Own...)) {
  return [run](std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, const RankedArgument& student,
               const RankedArgument& teacher, uintptr_t indices, uintptr_t sums_of_signs,
               const PerRowArgument& row_scale, const PerRowArgument& temperature, uintptr_t loss,
               uintptr_t divergence, uintptr_t gradient, Own... own) {
    RankedUldCall call{};
    std::tie(call.rows, call.student_columns, call.teacher_columns, call.gradient_columns) = sizes;
    call.student = (const void*)std::get<0>(student), call.student_dtype = (Dtype)std::get<1>(student);
    call.teacher = (const void*)std::get<0>(teacher), call.teacher_dtype = (Dtype)std::get<1>(teacher);
    call.indices = (const int64_t*)indices;
    call.sums_of_signs = (int32_t*)sums_of_signs;
    call.row_scale = per_row(row_scale);
    call.temperature = per_row(temperature);
    call.loss = (void*)loss;
    call.divergence = (void*)divergence;
    call.gradient = (void*)gradient;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

}  // namespace kdk
