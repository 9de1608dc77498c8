// What Python hands to the top-k kernels: shared by the modules that bind them.
#pragma once
#include "arguments.h"
#include "topk_call.h"

namespace kdk {

// As taking_rows_call (arguments.h), for a TopkRowsCall.
template <class Result, class... Own> auto taking_topk_rows_call(Result (*run)(const TopkRowsCall&, Own...)) {
  return [run](int divergence, bool conditional, bool fp64,
               std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> sizes, const LogitsArgument& student,
               uintptr_t indices, uintptr_t log_probs, uintptr_t tail_log_prob, const PerRowArgument& row_scale,
               const PerRowArgument& temperature, const PerRowArgument& hard_weight, uintptr_t labels,
               uintptr_t parameters, bool temperature_squared, uintptr_t loss, uintptr_t statistics, uintptr_t top1,
               uintptr_t gradient, Own... own) {
    TopkRowsCall call{};
    call.divergence = divergence;
    call.conditional = conditional;
    call.fp64 = fp64;
    std::tie(call.rows, call.inner, call.columns, call.gradient_columns, call.entries) = sizes;
    call.student = logits(student);
    call.indices = (const int32_t*)indices;
    call.log_probs = (const void*)log_probs;
    call.tail_log_prob = (const void*)tail_log_prob;
    call.row_scale = per_row(row_scale);
    call.temperature = per_row(temperature);
    call.hard_weight = per_row(hard_weight);
    call.labels = (const int64_t*)labels;
    call.parameters = (const void*)parameters;
    call.temperature_squared = temperature_squared;
    call.loss = (void*)loss;
    call.statistics = (void*)statistics;
    call.top1 = (int64_t*)top1;
    call.gradient = (void*)gradient;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

// The same for a SortEntriesCall.
template <class Result, class... Own> auto taking_sort_entries_call(Result (*run)(const SortEntriesCall&, Own...)) {
  return [run](std::tuple<int64_t, int64_t, int64_t> sizes, uintptr_t given_indices, bool wide,
               uintptr_t given_log_probs, int dtype, bool fp64, const PerRowArgument& row_scale, uintptr_t indices,
               uintptr_t log_probs, uintptr_t outside, uintptr_t repeated, Own... own) {
    SortEntriesCall call{};
    std::tie(call.rows, call.entries, call.columns) = sizes;
    call.given_indices = (const void*)given_indices;
    call.wide = wide;
    call.given_log_probs = (const void*)given_log_probs;
    call.dtype = (Dtype)dtype;
    call.fp64 = fp64;
    call.row_scale = per_row(row_scale);
    call.indices = (int32_t*)indices;
    call.log_probs = (void*)log_probs;
    call.outside = (bool*)outside;
    call.repeated = (bool*)repeated;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

// The same for a TopkCall.
template <class Result, class... Own> auto taking_topk_call(Result (*run)(const TopkCall&, Own...)) {
  return [run](std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, const LogitsArgument& of,
               const PerRowArgument& row_scale, const PerRowArgument& temperature, uintptr_t indices,
               uintptr_t log_probs, uintptr_t tail_log_prob, Own... own) {
    TopkCall call{};
    std::tie(call.rows, call.inner, call.columns, call.k) = sizes;
    call.logits = logits(of);
    call.row_scale = per_row(row_scale);
    call.temperature = per_row(temperature);
    call.indices = (int32_t*)indices;
    call.log_probs = (void*)log_probs;
    call.tail_log_prob = (void*)tail_log_prob;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

}  // namespace kdk
