// The CUDA kernels as functions of a Python module: of kdkernels._native, and of the one that the tests compile
// with a host compiler. Every argument is a number: pointers to the device's memory, sizes, the device's index, the
// stream.
#pragma once
#include "../arguments.h"
#include "../topk_arguments.h"
#include "../uld_arguments.h"
#include "../transport_arguments.h"
#include "linear.h"
#include "pairwise.h"
#include "rows.h"
#include "sinkhorn.h"
#include "topk.h"
#include "uld.h"

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
  m.def("cuda_uld", taking_ranked_uld_call(+[](const RankedUldCall& call, int device, uintptr_t stream) {
          cuda::uld(call, device, (void*)stream);
        }));
  // Between the call's arguments and the device, the workspace.
  m.def("cuda_pair_costs", taking_pair_costs_call(+[](const PairCostsCall& given, uintptr_t workspace, int device,
                                                      uintptr_t stream) {
          PairCostsCall call = given;
          call.workspace = (void*)workspace;
          cuda::pair_costs(call, device, (void*)stream);
        }));
  m.def("cuda_pair_gradient", taking_pair_gradient_call(+[](const PairGradientCall& given, uintptr_t workspace,
                                                            int device, uintptr_t stream) {
          PairGradientCall call = given;
          call.workspace = (void*)workspace;
          cuda::pair_gradient(call, device, (void*)stream);
        }));
  m.def("cuda_sinkhorn", taking_sinkhorn_call(+[](const SinkhornCall& given, uintptr_t workspace, int device,
                                                  uintptr_t stream) {
          SinkhornCall call = given;
          call.workspace = (void*)workspace;
          cuda::sinkhorn(call, device, (void*)stream);
        }));
  m.def("cuda_pair_costs_workspace_bytes", &cuda::pair_costs_workspace_bytes);
  m.def("cuda_pair_gradient_workspace_bytes", &cuda::pair_gradient_workspace_bytes);
  m.def("cuda_sinkhorn_workspace_bytes", &cuda::sinkhorn_workspace_bytes);
  m.def("cuda_refusal", &cuda::refusal, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace kdk
