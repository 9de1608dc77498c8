// What Python hands to the transport kernels: shared by the modules that bind them.
#pragma once
#include "arguments.h"
#include "transport_call.h"

namespace kdk {

// As taking_rows_call (arguments.h), for a PairCostsCall.
template <class Result, class... Own> auto taking_pair_costs_call(Result (*run)(const PairCostsCall&, Own...)) {
  return [run](int kind, bool fp64, std::tuple<int64_t, int64_t, int64_t> sizes, const LogitsArgument& student,
               const LogitsArgument& teacher, uintptr_t kept, const PerRowArgument& temperature, uintptr_t floats,
               uintptr_t costs, uintptr_t moments, Own... own) {
    PairCostsCall call{};
    call.kind = (PairCost)kind;
    call.fp64 = fp64;
    std::tie(call.clouds, call.rows, call.columns) = sizes;
    call.student = logits(student);
    call.teacher = logits(teacher);
    call.kept = (const void*)kept;
    call.temperature = per_row(temperature);
    call.floats = (const void*)floats;
    call.costs = (void*)costs;
    call.moments = (void*)moments;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

// The same for a PairGradientCall.
template <class Result, class... Own> auto taking_pair_gradient_call(Result (*run)(const PairGradientCall&, Own...)) {
  return [run](int kind, bool fp64, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes,
               const LogitsArgument& student, const LogitsArgument& teacher, uintptr_t kept,
               const PerRowArgument& temperature, uintptr_t floats, uintptr_t weights, uintptr_t dot,
               uintptr_t gradient, Own... own) {
    PairGradientCall call{};
    call.kind = (PairCost)kind;
    call.fp64 = fp64;
    std::tie(call.clouds, call.rows, call.columns, call.gradient_columns) = sizes;
    call.student = logits(student);
    call.teacher = logits(teacher);
    call.kept = (const void*)kept;
    call.temperature = per_row(temperature);
    call.floats = (const void*)floats;
    call.weights = (const void*)weights;
    call.dot = (const void*)dot;
    call.gradient = (void*)gradient;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

// The same for a SinkhornCall.
template <class Result, class... Own> auto taking_sinkhorn_call(Result (*run)(const SinkhornCall&, Own...)) {
  return [run](bool fp64, bool entropic, bool unrolled, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes,
               uintptr_t cost, uintptr_t a, uintptr_t b, uintptr_t epsilon, uintptr_t tolerance, uintptr_t value,
               uintptr_t f, uintptr_t g, uintptr_t error, uintptr_t done, uintptr_t of_cost, uintptr_t of_a,
               uintptr_t of_b, Own... own) {
    SinkhornCall call{};
    call.fp64 = fp64;
    call.entropic = entropic;
    call.unrolled = unrolled;
    std::tie(call.problems, call.n, call.m, call.iterations) = sizes;
    call.cost = (const void*)cost;
    call.a = (const void*)a;
    call.b = (const void*)b;
    call.epsilon = (const void*)epsilon;
    call.tolerance = (const void*)tolerance;
    call.value = (void*)value;
    call.f = (void*)f;
    call.g = (void*)g;
    call.error = (void*)error;
    call.done = (int32_t*)done;
    call.of_cost = (void*)of_cost;
    call.of_a = (void*)of_a;
    call.of_b = (void*)of_b;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

// The same for a PlanGradientCall.
template <class Result, class... Own> auto taking_plan_gradient_call(Result (*run)(const PlanGradientCall&, Own...)) {
  return [run](bool fp64, bool implicit, std::tuple<int64_t, int64_t, int64_t> sizes, uintptr_t cost, uintptr_t a,
               uintptr_t b, uintptr_t f, uintptr_t g, uintptr_t epsilon, uintptr_t of_cost, uintptr_t of_a,
               uintptr_t of_b, Own... own) {
    PlanGradientCall call{};
    call.fp64 = fp64;
    call.implicit = implicit;
    std::tie(call.problems, call.n, call.m) = sizes;
    call.cost = (const void*)cost;
    call.a = (const void*)a;
    call.b = (const void*)b;
    call.f = (const void*)f;
    call.g = (const void*)g;
    call.epsilon = (const void*)epsilon;
    call.of_cost = (void*)of_cost;
    call.of_a = (void*)of_a;
    call.of_b = (void*)of_b;

    pybind11::gil_scoped_release release;
    return run(call, own...);
  };
}

}  // namespace kdk
