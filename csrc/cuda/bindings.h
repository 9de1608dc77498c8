// The CUDA kernels as functions of a Python module: of kdkernels._native, and of the one that the tests compile
// with a host compiler. Every argument is a number: pointers to the device's memory, sizes, the device's index, the
// stream.
#pragma once
#include "../arguments.h"
#include "../topk_arguments.h"
#include "linear.h"
#include "rows.h"
#include "topk.h"

namespace kdk {

inline void bind_cuda(pybind11::module_& m) {
  m.attr("divergences") = divergence_names();
  m.def("cuda_rows", taking_rows_call(+[](const RowsCall& call, int device, uintptr_t stream) {
          cuda::rows(call, device, (void*)stream);
        }));
  m.def("cuda_scale_rows", [](uintptr_t x, int dtype, int64_t rows, int64_t columns, const PerRowArgument& factor,
                              int device, uintptr_t stream) {
    pybind11::gil_scoped_release release;
    cuda::scale_rows((void*)x, (Dtype)dtype, rows, columns, per_row(factor), device, (void*)stream);
  });
  m.def("cuda_softcap", [](uintptr_t x, int dtype, int64_t count, double cap, int device, uintptr_t stream) {
    pybind11::gil_scoped_release release;
    cuda::softcap((void*)x, (Dtype)dtype, count, cap, device, (void*)stream);
  });
  m.def("cuda_softcap_gradient", [](uintptr_t gradient, uintptr_t logits, int dtype, int64_t count, double cap,
                                    int device, uintptr_t stream) {
    pybind11::gil_scoped_release release;
    cuda::softcap_gradient((void*)gradient, (const void*)logits, (Dtype)dtype, count, cap, device, (void*)stream);
  });
  m.def("cuda_topk_rows", taking_topk_rows_call(+[](const TopkRowsCall& call, int device, uintptr_t stream) {
          cuda::topk_rows(call, device, (void*)stream);
        }));
  m.def("cuda_topk", taking_topk_call(+[](const TopkCall& call, int device, uintptr_t stream) {
          cuda::topk(call, device, (void*)stream);
        }));
  m.def("cuda_refusal", &cuda::refusal, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace kdk
