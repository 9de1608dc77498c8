// The Python module cuda_model: the CUDA kernels of csrc/, compiled for the model. It has the CUDA functions of
// kdkernels._native.
#include "control.h"

#include "../../csrc/cuda/bindings.h"

PYBIND11_MODULE(cuda_model, m) {
  kdk::bind_cuda(m);
  kdk::model::bind_control(m);
}
