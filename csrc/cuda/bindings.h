// The CUDA kernels as functions of a Python module. Two modules have these functions: kdkernels._native, and the module
// that the tests compile with a host compiler. bindings.cpp describes the arguments of the functions.
#pragma once
#include "../calls/fields.h"
#include "../calls/kernels.h"
#include "recording.h"

namespace kdk {

// The Python function cuda_NAME.
template <class Call>
void define_cuda(pybind11::module_& m, const char* name, void (*kernel)(const Call&), int64_t (*bytes)(const Call&)) {
  m.def(name, [=](const pybind11::dict& fields, const pybind11::object& allocate, int device, uintptr_t stream) {
    Call call{};
    FieldReader(name).read_call(fields.ptr(), call);
    if (call.run.fp64) throw std::runtime_error(std::string(name) + ": these kernels compute in fp32");
    call.run.kernel = name;
    call.run.device = device;
    call.run.stream = (void*)stream;
    const Workspace workspace(bytes(call), allocate);
    call.run.workspace = workspace.data;
    pybind11::gil_scoped_release release;
    kernel(call);
  });
}

inline void bind_cuda(pybind11::module_& m) {
  bind_fields(m);
#define KDK_DEFINE(name, Call) define_cuda(m, "cuda_" #name, &cuda::name, &cuda::name##_bytes);
  KDK_CUDA_KERNELS(KDK_DEFINE)
#undef KDK_DEFINE
  // Begins or ends a recording of launches. Returns those of the recording before, as dicts.
  m.def("record_launches", [](bool on) {
    pybind11::list all;
    for (const cuda::Recorded& one : cuda::recording.turn(on)) {
      pybind11::dict launch;
      launch["kernel"] = one.kernel, launch["way"] = one.way, launch["cluster"] = one.blocks;
      launch["threads"] = one.threads, launch["shared"] = one.shared, launch["grid"] = one.grid;
      all.append(launch);
    }
    return all;
  });
  m.def("cuda_refusal", &cuda::refusal, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace kdk
