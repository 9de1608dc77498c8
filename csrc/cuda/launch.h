// Launches from the host: errors, the properties of the chip, the number of teams that it holds at once.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../calls/kernels.h"
#include "recording.h"

namespace kdk {
namespace cuda {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error of a failed launch, so that the next call does not return it
  std::string advice = "another backend (triton, reference) does not use these kernels";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    advice = "KDKERNELS_CUDA_ARCHS, set before the installation, names the architectures to build; " + advice;
  if (error == cudaErrorInsufficientDriver)
    advice = "there is no driver, or it is older than the CUDA that these kernels were built with: update it, or build "
             "with an older nvcc (KDKERNELS_NVCC); " + advice;
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                           "); " + advice);
}
#define KDK_CHECK(call, ...) check(call(__VA_ARGS__), #call)

// load_FAMILY loads the family's kernels, and raises if the current device cannot run them.
void load_rows();
void load_linear();
void load_topk();
void load_topk_rows();
void load_pairwise();
void load_sinkhorn();
void load_uld();

// Makes a device current, and restores the current device when it is destroyed.
struct OnDevice {
  int before;
  explicit OnDevice(int device) {
    KDK_CHECK(cudaGetDevice, &before);
    KDK_CHECK(cudaSetDevice, device);
  }
  ~OnDevice() { cudaSetDevice(before); }
};

struct Chip {
  int multiprocessors, shared, shared_of_multiprocessor, l2;
  bool clusters;  // false too for kernels that a driver compiled from PTX for older chips

  template <class Kernel> Chip(int device, Kernel kernel) {
    auto ask = [&](cudaDeviceAttr attribute, int* value) {
      KDK_CHECK(cudaDeviceGetAttribute, value, attribute, device);
    };
    ask(cudaDevAttrMultiProcessorCount, &multiprocessors);
    ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared);
    ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared_of_multiprocessor);
    ask(cudaDevAttrL2CacheSize, &l2);
    cudaFuncAttributes attributes;
    KDK_CHECK(cudaFuncGetAttributes, &attributes, kernel);
    clusters = attributes.ptxVersion >= 90;
  }

  // Bytes of shared memory for each of `blocks` blocks on a multiprocessor. The system reserves some bytes of each
  // block.
  int shared_of(int blocks) const {
    return blocks < 2 ? shared : shared_of_multiprocessor / blocks - (shared_of_multiprocessor - shared);
  }
};

// How a kernel reads its rows. staged: clusters copy rows to shared memory. halves: the same for logits of one 16-bit
// dtype, as in most training, with fewer instructions. streaming: from global memory.
enum class Way { halves, staged, streaming };
constexpr const char* kWays[] = {"halves", "staged", "streaming"};

struct Launch {
  int blocks;   // of a cluster
  int threads;  // of a block
  int shared;   // bytes of a block
  int grid;     // blocks of the launch
  Way way = Way::streaming;
};

inline cudaLaunchConfig_t launch_config(const Launch& launch, cudaLaunchAttribute* cluster, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.grid);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared;
  config.stream = stream;
  if (launch.blocks > 1) {
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim.x = launch.blocks, cluster->val.clusterDim.y = 1, cluster->val.clusterDim.z = 1;
    config.attrs = cluster;
    config.numAttrs = 1;
  }
  return config;
}

// Enqueues a kernel on the call's stream of the current device.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, const Launch& plan, const Execution& run, const Arguments&... arguments) {
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config(plan, &cluster, (cudaStream_t)run.stream);
  KDK_CHECK(cudaLaunchKernelEx, &config, kernel, arguments...);
  recording.add(run.kernel, kWays[(int)plan.way], plan.blocks, plan.threads, plan.shared, plan.grid);
}

inline void require_room(bool has_room) {
  if (!has_room) throw std::runtime_error("the device has no room for a block of these kernels");
}

// The number of teams of a launch that the device holds at once; 0 if it cannot hold one. The answers are stored.
template <class Kernel> int teams_at_once(Kernel kernel, const Launch& launch, const Chip& chip, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int, int, int>, int> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto key = std::make_tuple(kernel, device, launch.blocks, launch.threads, launch.shared);
  auto found = known.find(key);
  if (found != known.end()) return found->second;

  KDK_CHECK(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, chip.shared);
  if (launch.shared > 8 << 10)  // it holds rows; kernels that read rows from memory gain more from a first-level cache
    KDK_CHECK(cudaFuncSetAttribute, kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
              cudaSharedmemCarveoutMaxShared);
  int teams = 0;
  if (launch.blocks == 1) {
    KDK_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &teams, kernel, launch.threads, (size_t)launch.shared);
    teams *= chip.multiprocessors;
  } else {
    const bool portable = launch.blocks <= 8;
    if (!portable) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    Launch one = launch;
    one.grid = launch.blocks;
    cudaLaunchAttribute cluster;
    cudaLaunchConfig_t config = launch_config(one, &cluster, nullptr);
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&teams, kernel, &config);
    if (error == cudaErrorInvalidClusterSize || error == cudaErrorNotSupported ||
        (error == cudaErrorInvalidValue && !portable)) {
      cudaGetLastError();  // the device does not allow that size
      teams = 0;
    } else {
      check(error, "cudaOccupancyMaxActiveClusters");
    }
  }
  known[key] = teams;
  return teams;
}

}  // namespace cuda
}  // namespace kdk
