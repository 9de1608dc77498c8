// The reason why a device cannot run the CUDA kernels.
#include <string>

#include "launch.h"

namespace kdk {
namespace cuda {

// Loads every kernel now and none later, because a CUDA graph may capture the first call.
std::string refusal(int device) {
  try {
    int devices = 0;
    KDK_CHECK(cudaGetDeviceCount, &devices);
    OnDevice guard(device);
    load_rows();
    load_linear();
    load_pairwise();
    load_sinkhorn();
    load_topk();
    load_topk_rows();
    load_uld();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace cuda
}  // namespace kdk
