// What Python hands to a row kernel, and the names that it may ask for: shared by the modules that bind the kernels.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "rows_call.h"

namespace kdk {

namespace table {  // for the names in it: no template of it is used, whose functions a kernel's file would provide
#pragma push_macro("KDK_HD")
#undef KDK_HD
#define KDK_HD inline
#include "divergences.h"
#pragma pop_macro("KDK_HD")
}  // namespace table

// The divergences in the order of their indices.
inline pybind11::tuple divergence_names() {
  std::vector<std::string> names;
#define KDK_NAME(key, Struct) names.push_back(#key);
  KDK_DIVERGENCES(KDK_NAME)
#undef KDK_NAME
  return pybind11::tuple(pybind11::cast(names));
}

using LogitsArgument = std::tuple<uintptr_t, int, int64_t, int64_t>;  // pointer, dtype, outer and inner stride
using PerRowArgument = std::tuple<uintptr_t, int64_t>;                // pointer, stride

inline Logits logits(const LogitsArgument& x) {
  return {(const void*)std::get<0>(x), (Dtype)std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}
inline PerRow per_row(const PerRowArgument& x) { return {(const void*)std::get<0>(x), std::get<1>(x)}; }

// A function of Python that takes the arguments of a RowsCall, one by one in the order below, then `Own`, and calls
// run(call, own...) without the GIL.
template <class Result, class... Own> auto taking_rows_call(Result (*run)(const RowsCall&, Own...)) {
  return [run](int sweeps, int divergence, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes,
               const LogitsArgument& student, const LogitsArgument& teacher, const PerRowArgument& row_scale,
               const PerRowArgument& temperature, const PerRowArgument& hard_weight, uintptr_t labels,
               uintptr_t parameters, bool temperature_squared, bool unit_log_sum, uintptr_t floats, uintptr_t sums,
               uintptr_t loss, uintptr_t statistics, uintptr_t top1, uintptr_t gradient, Own... own) {
    RowsCall call{};
    call.sweeps = sweeps;
    call.divergence = divergence;
    std::tie(call.rows, call.inner, call.columns, call.gradient_columns) = sizes;
    call.student = logits(student);
    call.teacher = logits(teacher);
    call.row_scale = per_row(row_scale);
    call.temperature = per_row(temperature);
    call.hard_weight = per_row(hard_weight);
    call.labels = (const int64_t*)labels;
    call.parameters = (const void*)parameters;
    call.temperature_squared = temperature_squared;
    call.unit_log_sum = unit_log_sum;
    call.floats = (void*)floats;
    call.sums = (void*)sums;
    call.loss = (void*)loss;
    call.statistics = (void*)statistics;
    call.top1 = (int64_t*)top1;
    call.gradient = (void*)gradient;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

}  // namespace kdk
