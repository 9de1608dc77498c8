// The runtime of the CUDA model (cuda_runtime.h): the runtime's functions that csrc/cuda calls.
#pragma once

#include "grid.h"

// ---- errors

#define KDK_CUDA_ERRORS(X)                                                                       \
  X(cudaSuccess, 0, "no error")                                                                  \
  X(cudaErrorInvalidValue, 1, "invalid argument")                                                \
  X(cudaErrorMemoryAllocation, 2, "out of memory")                                               \
  X(cudaErrorInitializationError, 3, "initialization error")                                     \
  X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                          \
  X(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version") \
  X(cudaErrorDevicesUnavailable, 46, "CUDA-capable device(s) is/are busy or unavailable")        \
  X(cudaErrorInvalidDeviceFunction, 98, "invalid device function")                               \
  X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                \
  X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                       \
  X(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution on the device") \
  X(cudaErrorUnsupportedPtxVersion, 222, "the provided PTX was compiled with an unsupported toolchain.") \
  X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                              \
  X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                    \
  X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch")               \
  X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                   \
  X(cudaErrorNotSupported, 801, "operation not supported")                                       \
  X(cudaErrorInvalidClusterSize, 912, "cluster misconfiguration")                                \
  X(cudaErrorUnknown, 999, "unknown error")
#define KDK_ERROR(name, number, text) name = number,
enum cudaError_t { KDK_CUDA_ERRORS(KDK_ERROR) };
#undef KDK_ERROR

inline const char* cudaGetErrorName(cudaError_t error) {
#define KDK_ERROR(name, number, text) if (error == number) return #name;
  KDK_CUDA_ERRORS(KDK_ERROR)
#undef KDK_ERROR
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) {
#define KDK_ERROR(name, number, text) if (error == number) return text;
  KDK_CUDA_ERRORS(KDK_ERROR)
#undef KDK_ERROR
  return "unrecognized error code";
}
inline cudaError_t cudaPeekAtLastError() { return (cudaError_t)kdk::model::machine.last_error; }
inline cudaError_t cudaGetLastError() { return (cudaError_t)std::exchange(kdk::model::machine.last_error, 0); }

namespace kdk::model {
// Returns the error that a test set for the call, else `error`.
inline cudaError_t answer(const char* call, cudaError_t error) {
  auto failing = machine.failing.find(call);
  if (failing != machine.failing.end()) error = (cudaError_t)failing->second;
  if (error != cudaSuccess) machine.last_error = error;
  return error;
}
inline const Device& current_device() { return machine.devices[machine.current_device]; }
inline KernelAttributes& attributes_of(const void* kernel) { return machine.kernels[{machine.current_device, kernel}]; }
}  // namespace kdk::model

// ---- devices

inline cudaError_t cudaGetDeviceCount(int* count) {
  cudaError_t error = kdk::model::answer(__func__, cudaSuccess);
  *count = error == cudaSuccess ? (int)kdk::model::machine.devices.size() : 0;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = kdk::model::machine.current_device;
  return kdk::model::answer(__func__, cudaSuccess);
}
inline cudaError_t cudaSetDevice(int device) {
  const bool exists = device >= 0 && device < (int)kdk::model::machine.devices.size();
  cudaError_t error = kdk::model::answer(__func__, exists ? cudaSuccess : cudaErrorInvalidDevice);
  if (error == cudaSuccess) kdk::model::machine.current_device = device;
  return error;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return kdk::model::answer(__func__, cudaSuccess);
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return kdk::model::answer(__func__, cudaSuccess);
}

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38, cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106, cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  auto& devices = kdk::model::machine.devices;
  if (device < 0 || device >= (int)devices.size()) return kdk::model::answer(__func__, cudaErrorInvalidDevice);
  const kdk::model::Device& it = devices[device];
  const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrMaxThreadsPerBlock, 1024}, {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10}, {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMultiProcessorCount, it.multiprocessors}, {cudaDevAttrL2CacheSize, it.l2_bytes},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}, {cudaDevAttrComputeCapabilityMajor, it.major},
      {cudaDevAttrComputeCapabilityMinor, it.minor},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, it.shared_memory_per_multiprocessor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, it.shared_memory_per_block},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32}, {cudaDevAttrReservedSharedMemoryPerBlock, 1024},
      {cudaDevAttrClusterLaunch, it.major >= 9},
  };
  *value = values.at(attribute);
  return kdk::model::answer(__func__, cudaSuccess);
}

// ---- kernels

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
enum cudaSharedCarveout {
  cudaSharedmemCarveoutDefault = -1, cudaSharedmemCarveoutMaxShared = 100,
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};
struct cudaLaunchAttributeValue { dim3 clusterDim; };
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  kdk::model::KernelAttributes& attributes = kdk::model::attributes_of((const void*)kernel);
  const bool shared = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  const bool possible = !shared || value <= kdk::model::current_device().shared_memory_per_block;
  cudaError_t error = kdk::model::answer(__func__, possible ? cudaSuccess : cudaErrorInvalidValue);
  if (error != cudaSuccess) return error;
  if (shared) attributes.dynamic_shared = value;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) attributes.non_portable_cluster = value;
  return cudaSuccess;
}
template <class Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, Kernel* kernel) {
  const kdk::model::Device& device = kdk::model::current_device();
  const int version = device.major * 10 + device.minor, ptx = device.ptx_version ? device.ptx_version : version;
  *out = {0, 0, 0, 1024, 32, ptx, version, kdk::model::attributes_of((const void*)kernel).dynamic_shared};
  return kdk::model::answer(__func__, cudaSuccess);
}

namespace kdk::model {
inline int cluster_of(const cudaLaunchConfig_t& config) {
  dim3 cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config.attrs[i].val.clusterDim;
  if (cluster.y != 1 || cluster.z != 1) fail("clusters lie along x only");
  return cluster.x;
}
inline cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const int64_t threads = (int64_t)block.x * block.y * block.z;
  const int cluster = cluster_of(config);
  const KernelAttributes& attributes = attributes_of(kernel);
  if (threads < 1 || threads > 1024 || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > (size_t)attributes.dynamic_shared) return cudaErrorInvalidValue;
  if (cluster == 1) return cudaSuccess;
  if (current_device().major < 9) return cudaErrorNotSupported;
  if (cluster < 1 || cluster > (attributes.non_portable_cluster ? 16 : 8)) return cudaErrorInvalidClusterSize;
  return grid.x % cluster ? cudaErrorInvalidConfiguration : cudaSuccess;
}
inline int blocks_per_multiprocessor(int threads, size_t shared) {
  const int by_shared = current_device().shared_memory_per_multiprocessor / (int)(shared + 1024);
  return (int)shared > current_device().shared_memory_per_block ? 0 : std::min({32, 2048 / threads, by_shared});
}
inline int active_clusters(const cudaLaunchConfig_t& config) {
  const dim3 block = config.blockDim;
  const int each = blocks_per_multiprocessor(block.x * block.y * block.z, config.dynamicSmemBytes);
  const int cluster = cluster_of(config);
  return cluster > current_device().max_cluster ? 0 : each * current_device().multiprocessors / cluster;
}
}  // namespace kdk::model

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads, size_t shared) {
  *blocks = kdk::model::blocks_per_multiprocessor(threads, shared);
  (void)kernel;
  return kdk::model::answer(__func__, cudaSuccess);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel, const cudaLaunchConfig_t* config) {
  *clusters = 0;
  cudaError_t error = kdk::model::answer(__func__, kdk::model::check_launch(*config, (const void*)kernel));
  if (error == cudaSuccess) *clusters = kdk::model::active_clusters(*config);
  return error;
}

// Runs the kernel to its end. A thread's error is a std::runtime_error, because CUDA has no error code for it.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace kdk::model;
  std::lock_guard<std::mutex> lock(machine.launching);
  cudaError_t error = check_launch(*config, (const void*)kernel);
  if (error == cudaSuccess && active_clusters(*config) == 0) error = cudaErrorLaunchOutOfResources;
  if ((error = answer(__func__, error)) != cudaSuccess) return error;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  machine.cluster = cluster_of(*config);
  machine.shared_bytes = config->dynamicSmemBytes;
  machine.launches.push_back({gridDim, blockDim, machine.cluster, machine.shared_bytes});
  std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  auto thread = [&] { std::apply(kernel, copies); };
  machine.kernel = [](void* thread_of_kernel) { (*(decltype(thread)*)thread_of_kernel)(); };
  machine.arguments = &thread;
  run_grid();
  return cudaSuccess;
}

