// The Python module faults: kernels that are right, or wrong in one way if `broken`. The tests check that the model
// finds each fault.
//
// Every kernel computes out[i] = in[i rotated by one within its group], where a group is a warp, a block or a cluster.
// A fault shows as a wrong result or as an error of the model.
#include "control.h"

#include <pybind11/stl.h>

#include <set>

#include "../../csrc/cuda/device.h"

namespace kdk::cuda {

constexpr int kThreads = 128, kCluster = 4, kClusters = 2, kTiles = 4;
constexpr int kBlockTotal = kThreads * kTiles;  // elements of a block that works in tiles

__device__ inline int thread() { return (int)threadIdx.x; }
__device__ inline int element() { return (int)(blockIdx.x * kThreads + threadIdx.x); }
__device__ inline float* shared_floats() { return (float*)shared_memory(); }
__device__ inline int next_thread() { return (thread() + 1) % kThreads; }
__device__ inline int next_lane() { return thread() / 32 * 32 + (thread() + 1) % 32; }

// ---- barriers

__global__ void block_barrier(const float* in, float* out, bool broken) {
  shared_floats()[thread()] = load(in + element());
  if (!broken) __syncthreads();
  store(out + element(), shared_floats()[next_thread()]);
}

__global__ void warp_barrier(const float* in, float* out, bool broken) {
  shared_floats()[thread()] = load(in + element());
  if (!broken) __syncwarp();
  store(out + element(), shared_floats()[next_lane()]);
}

// The value that the next block of the cluster sends, and its barrier. They lie behind the block's elements.
struct Arriving {
  uint4 value;
  uint64_t barrier;
};
__device__ inline Arriving& arriving() { return *(Arriving*)(shared_floats() + kThreads); }

// The next element of the cluster. Each block sends its first element to the block before it. start() is to wait until
// the barriers of all blocks are initialised.
template <class Start> __device__ inline float next_of_cluster(float mine, Start start, bool waits) {
  shared_floats()[thread()] = mine;
  if (thread() == 0) {
    bulk_barrier_init(&arriving().barrier);
    bulk_barrier_init_fence();
  }
  start();
  if (thread() == 0) {
    bulk_barrier_expect(&arriving().barrier, 16);
    const uint4 value = {__float_as_uint(mine), 0, 0, 0};
    store_to_block((blockIdx.x + kCluster - 1) % kCluster, &arriving().value, value, &arriving().barrier);
  }
  __syncthreads();
  if (thread() + 1 < kThreads) return shared_floats()[next_thread()];
  if (waits) bulk_barrier_wait(&arriving().barrier, 0);
  return __uint_as_float(arriving().value.x);
}
__device__ inline void start_cluster() { cluster_sync(kCluster); }

__global__ void cluster_barrier(const float* in, float* out, bool broken) {
  const float x = load(in + element());
  store(out + element(), next_of_cluster(x, [&] { broken ? __syncthreads() : start_cluster(); }, true));
}

// A block that does not wait may also end before the value arrives.
__global__ void arrival_not_awaited(const float* in, float* out, bool broken) {
  store(out + element(), next_of_cluster(load(in + element()), start_cluster, !broken));
}

__global__ void divergent_barrier(const float* in, float* out, bool broken) {
  shared_floats()[thread()] = load(in + element());
  if (!broken || thread() < kThreads / 2) __syncthreads();
  store(out + element(), shared_floats()[next_thread()]);
}

__global__ void two_barriers(const float* in, float* out, bool broken) {
  shared_floats()[thread()] = load(in + element());
  if (!broken || thread() < kThreads / 2)
    __syncthreads();
  else
    __syncthreads();
  store(out + element(), shared_floats()[next_thread()]);
}

// The first lane of each warp waits at a barrier of its own.
__global__ void two_cluster_barriers(const float* in, float* out, bool broken) {
  auto start = [&] {
    if (!broken || thread() % 32)
      cluster_sync(kCluster);
    else
      cluster_sync(kCluster);
  };
  store(out + element(), next_of_cluster(load(in + element()), start, true));
}

// The same, where both barriers have one line.
__device__ inline void wait_for_block() { __syncthreads(); }
__global__ void two_calls_of_a_barrier(const float* in, float* out, bool broken) {
  shared_floats()[thread()] = load(in + element());
  if (!broken || thread() % 32)
    wait_for_block();
  else
    wait_for_block();
  store(out + element(), shared_floats()[next_thread()]);
}

// Half of a warp waits in an exchange for the other half, which waits at a barrier.
__global__ void deadlock(const float* in, float* out, bool broken) {
  shared_floats()[thread()] = load(in + element());
  if (!broken || thread() % 32 < 16) __syncwarp();
  __syncthreads();
  store(out + element(), shared_floats()[next_thread()]);
}

// ---- warp exchanges

// A shuffle waits for the other lanes, but orders no memory.
__global__ void shuffle_for_a_barrier(const float* in, float* out, bool broken) {
  shared_floats()[thread()] = load(in + element());
  if (broken)
    __shfl_sync(0xffffffffu, 0, 0);
  else
    __syncwarp();
  store(out + element(), shared_floats()[next_lane()]);
}

__global__ void shuffle_outside_mask(const float* in, float* out, bool broken) {
  float x = load(in + element());
  if (!broken || thread() % 32 < 31) x = __shfl_sync(broken ? 0x7fffffffu : 0xffffffffu, x, thread() + 1);
  store(out + element(), x);
}

__global__ void shuffle_without_a_lane(const float* in, float* out, bool broken) {
  float x = load(in + element());
  if (!broken || thread() % 32 < 31) x = __shfl_sync(0xffffffffu, x, thread() + 1);
  store(out + element(), x);
}

// All lanes shuffle, but in two kinds of shuffle.
__global__ void shuffle_by_kind(const float* in, float* out, bool broken) {
  const float x = load(in + element());
  float y;
  if (broken && thread() % 32 == 31)
    y = __shfl_up_sync(0xffffffffu, x, 31);
  else
    y = __shfl_sync(0xffffffffu, x, thread() + 1);
  store(out + element(), y);
}

// ---- shared memory

// A slot that is used again needs a barrier after the reads and a barrier after the writes.
__global__ void slot_reused(const float* in, float* out, bool broken) {
  for (int tile = 0; tile < kTiles; ++tile) {
    const int at = blockIdx.x * kBlockTotal + tile * kThreads;
    shared_floats()[thread()] = load(in + at + thread());
    __syncthreads();
    store(out + at + thread(), shared_floats()[next_thread()]);
    if (!broken) __syncthreads();
  }
}

__global__ void unwritten(const float* in, float* out, bool broken) {
  if (!broken || thread() % 32 != 7) shared_floats()[thread()] = load(in + element());
  __syncthreads();
  store(out + element(), shared_floats()[next_thread()]);
}

__global__ void shared_overrun(const float* in, float* out, bool broken) {
  shared_floats()[thread()] = load(in + element());
  if (broken && thread() == 0) shared_floats()[kThreads] = 0;
  __syncthreads();
  store(out + element(), shared_floats()[next_thread()]);
}

// ---- global memory

__global__ void read_past_the_end(const float* in, float* out, bool broken) {
  const int last = (int)(gridDim.x * kThreads) - 1;
  if (broken && element() == last) load(in + last + 1);
  store(out + element(), load(in + element() - thread() + next_lane()));
}

__global__ void write_to_input(const float* in, float* out, bool broken) {
  const float next = load(in + element() - thread() + next_lane());
  __syncwarp();
  store(out + element(), next);
  if (broken && element() == 40) store((float*)in + element(), next);
}

__global__ void misaligned(const float* in, float* out, bool broken) {
  if (thread() % 4 == 0) {
    const float4 four = load((const float4*)(in + element() + (broken && element() == 8)));
    ((float4*)shared_memory())[thread() / 4] = four;
  }
  __syncthreads();
  store(out + element(), shared_floats()[next_thread()]);
}

// Kernels find memory for elements between each other's behind `out`.
__device__ inline float* behind(float* out) { return out + gridDim.x * kThreads; }

// A block barrier orders global memory, a cluster barrier does not.
__global__ void block_through_global(const float* in, float* out, bool broken) {
  store(behind(out) + element(), load(in + element()));
  broken ? cluster_sync(kCluster) : __syncthreads();
  store(out + element(), load(behind(out) + element() - thread() + next_thread()));
}

__global__ void cluster_through_global(const float* in, float* out, bool broken) {
  const float x = load(in + element());
  store(behind(out) + element(), x);
  const float next = next_of_cluster(x, start_cluster, true);
  const int group = kCluster * kThreads, place = element() / group * group + (element() + 1) % group;
  store(out + element(), broken ? load(behind(out) + place) : next);
}

__device__ inline bool ends_a_cluster() { return (element() + 1) % (kCluster * kThreads) == 0; }

// The last thread of a cluster rewrites the neighbour's first element, as the store of a group of 16 bytes would that
// both share.
__global__ void neighbour_rewritten(const float* in, float* out, bool broken) {
  const float next = load(in + element() - thread() + next_lane());
  store(out + element(), next);
  float* const neighbour = out + (element() + 1) % (gridDim.x * kThreads);
  if (broken && ends_a_cluster()) store(neighbour, load(neighbour));
}

// It reads the neighbour's first element, and ignores it.
__global__ void neighbour_read(const float* in, float* out, bool broken) {
  float next = load(in + element() - thread() + next_lane());
  if (broken && ends_a_cluster()) next += load(out + (element() + 1) % (gridDim.x * kThreads)) == -1;
  store(out + element(), next);
}

// Two threads of two blocks of a cluster write one number.
__global__ void written_twice(const float* in, float* out, bool broken) {
  store(out + element(), load(in + element() - thread() + next_lane()));
  if (thread() == 0 && (broken || blockIdx.x % kCluster == 0)) store(behind(out) + blockIdx.x / kCluster, 1.0f);
}

// ---- bulk copies: a block's elements in tiles, two buffers, the next tile copied while one is read

struct Buffers {
  uint64_t arrived[2];
  alignas(128) float tiles[2][kThreads];
};

enum BulkFault {
  none,
  not_awaited,
  buffer_in_use,
  too_many_bytes,
  too_few_bytes,
  no_barrier_after_init,
  left_under_way,
  misaligned_copy,
  initialised_twice,
  init_not_fenced,
  not_fenced,
  fenced_after_the_barrier,
  written_before
};

__device__ inline void copy_tile(Buffers& buffers, const float* in, int tile, uint32_t expected) {
  if (thread() != 0 || tile >= kTiles) return;
  const int buffer = tile % 2;
  bulk_barrier_expect(&buffers.arrived[buffer], expected);
  bulk_copy(buffers.tiles[buffer], in + blockIdx.x * kBlockTotal + tile * kThreads, sizeof(buffers.tiles[buffer]),
            &buffers.arrived[buffer]);
}

__global__ void bulk(const float* in, float* out, BulkFault fault) {
  Buffers& buffers = *(Buffers*)shared_memory();
  if (thread() == (fault == no_barrier_after_init ? 64 : 0))
    for (int i = 0; i < 2; ++i) bulk_barrier_init(&buffers.arrived[i]);
  if (fault != init_not_fenced) bulk_barrier_init_fence();
  if (fault == written_before) buffers.tiles[1][thread()] = 0;
  if (fault == initialised_twice && thread() == 0) bulk_barrier_init(&buffers.arrived[1]);
  if (fault != no_barrier_after_init) __syncthreads();
  const uint32_t bytes = sizeof(buffers.tiles[0]);
  const uint32_t expected = fault == too_many_bytes ? bytes - 16 : fault == too_few_bytes ? bytes + 16 : bytes;
  if (fault == misaligned_copy && thread() == 0) bulk_copy(buffers.tiles[0], in + 1, bytes, &buffers.arrived[0]);
  for (int tile = 0; tile < 2; ++tile) copy_tile(buffers, in, tile, expected);
  for (int tile = 0; tile < kTiles; ++tile) {
    if (fault != not_awaited || tile != 1) bulk_barrier_wait(&buffers.arrived[tile % 2], tile / 2 % 2);
    store(out + blockIdx.x * kBlockTotal + tile * kThreads + thread(), buffers.tiles[tile % 2][next_thread()]);
    if (fault != not_fenced && fault != fenced_after_the_barrier) bulk_fence();
    if (fault != buffer_in_use) __syncthreads();
    if (fault == fenced_after_the_barrier) bulk_fence();
    copy_tile(buffers, in, tile + 2, expected);
  }
  if (fault == left_under_way) {
    __syncthreads();
    copy_tile(buffers, in, 0, expected);
  }
}

// ---- kernels without a fault, which test the model's functions

__global__ void no_work() {}

__global__ void many_switches(int rounds, int cluster) {
  for (int i = 0; i < rounds; ++i) {
    for (int by = 16; by; by /= 2) __shfl_xor_sync(0xffffffffu, i, by);
    if (i % 4 == 0) __syncthreads();
  }
  cluster_sync(cluster);
}

constexpr int kVotes = 9;

__global__ void votes_and_widths(uint32_t* out) {
  const int lane = thread() % 32;
  uint32_t* mine = out + thread() * kVotes;
  store(mine + 0, __ballot_sync(0xffffffffu, lane % 3 == 0));
  store(mine + 1, (uint32_t)(__any_sync(0xffffffffu, lane == 40) | __all_sync(0xffffffffu, lane < 32) << 1));
  store(mine + 2, (uint32_t)__shfl_up_sync(0xffffffffu, lane, 3, 8));
  store(mine + 3, (uint32_t)__shfl_down_sync(0xffffffffu, lane, 3, 8));
  store(mine + 4, (uint32_t)__shfl_xor_sync(0xffffffffu, lane, 12, 8));
  store(mine + 5, (uint32_t)__shfl_sync(0xffffffffu, lane, 19, 8));
  store(mine + 6, (uint32_t)__syncthreads_count(lane == 5));
  store(mine + 7, (uint32_t)(__syncthreads_or(thread() == 1) | __syncthreads_and(thread() > 1) << 1));
  if (lane < 16)
    store(mine + 8, (uint32_t)__shfl_sync(0x0000ffffu, lane, 3));
  else
    store(mine + 8, (uint32_t)__shfl_sync(0xffff0000u, lane, 19));
}

// ---- launches

struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parameters, class... Arguments>
void launch(int blocks, int threads, int cluster, size_t shared, void (*kernel)(Parameters...),
            Arguments... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw LaunchError(cudaGetErrorName(error));
}

// The kernels that call next_of_cluster.
const std::set<std::string> kExchanging = {"cluster_barrier", "arrival_not_awaited", "two_cluster_barriers",
                                           "cluster_through_global"};
#define KDK_FAULT(name) {#name, name}
const std::map<std::string, void (*)(const float*, float*, bool)> kernels = {
    KDK_FAULT(block_barrier), KDK_FAULT(warp_barrier), KDK_FAULT(cluster_barrier),
    KDK_FAULT(arrival_not_awaited), KDK_FAULT(divergent_barrier), KDK_FAULT(two_barriers), KDK_FAULT(deadlock),
    KDK_FAULT(shuffle_outside_mask), KDK_FAULT(shuffle_without_a_lane), KDK_FAULT(shuffle_by_kind),
    KDK_FAULT(slot_reused), KDK_FAULT(unwritten), KDK_FAULT(shared_overrun), KDK_FAULT(read_past_the_end),
    KDK_FAULT(write_to_input), KDK_FAULT(misaligned), KDK_FAULT(two_cluster_barriers),
    KDK_FAULT(two_calls_of_a_barrier),
    KDK_FAULT(shuffle_for_a_barrier), KDK_FAULT(block_through_global), KDK_FAULT(cluster_through_global),
    KDK_FAULT(neighbour_rewritten), KDK_FAULT(neighbour_read), KDK_FAULT(written_twice)};
const std::map<std::string, BulkFault> bulk_faults = {
    KDK_FAULT(not_awaited), KDK_FAULT(buffer_in_use), KDK_FAULT(too_many_bytes), KDK_FAULT(too_few_bytes),
    KDK_FAULT(no_barrier_after_init), KDK_FAULT(left_under_way), KDK_FAULT(misaligned_copy),
    KDK_FAULT(initialised_twice), KDK_FAULT(init_not_fenced), KDK_FAULT(not_fenced),
    KDK_FAULT(fenced_after_the_barrier), KDK_FAULT(written_before)};
#undef KDK_FAULT

struct alignas(128) Line {
  float x[32];
};

// Runs a kernel on the numbers 0, 1, 2, ... and returns its output.
std::vector<float> run(const std::string& name, bool broken) {
  const bool in_bulk = bulk_faults.count(name);
  const int blocks = kCluster * kClusters, count = blocks * (in_bulk || name == "slot_reused" ? kBlockTotal : kThreads);
  std::vector<Line> memory(3 * count / 32 + 1);  // `in`, one line that belongs to neither, `out`, and as much behind it
  float *in = memory[0].x, *out = in + count + 32;
  for (int i = 0; i < count; ++i) in[i] = (float)i, out[i] = out[count + i] = NAN;
  model::readable.clear();
  model::writable.clear();
  model::readable.add((uintptr_t)in, count * sizeof(float));
  model::readable.add((uintptr_t)out, 2 * count * sizeof(float));
  model::writable.add((uintptr_t)out, 2 * count * sizeof(float));
  const size_t shared = kThreads * sizeof(float) + (kExchanging.count(name) ? sizeof(Arriving) : 0);
  if (in_bulk)
    launch(blocks, kThreads, 1, sizeof(Buffers), bulk, in, out, broken ? bulk_faults.at(name) : none);
  else
    launch(blocks, kThreads, kCluster, shared, kernels.at(name), in, out, broken);
  return std::vector<float>(out, out + count);
}

std::vector<uint32_t> votes(int threads) {
  std::vector<uint32_t> out(threads * kVotes);
  model::readable.clear();
  model::writable.clear();
  launch(1, threads, 1, 0, votes_and_widths, out.data());
  return out;
}

// The name of the error of a launch of these sizes, after the kernel's attributes were set on the device.
std::string launch_error(int device, int blocks, int threads, int cluster, int shared, int allowed_shared,
                         bool non_portable) {
  cudaSetDevice(device);
  cudaError_t refused = cudaFuncSetAttribute(no_work, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed_shared);
  cudaFuncSetAttribute(no_work, cudaFuncAttributeNonPortableClusterSizeAllowed, non_portable);
  std::string name = cudaGetErrorName(refused);
  try {
    if (refused == cudaSuccess) launch(blocks, threads, cluster, shared, no_work);
  } catch (const LaunchError& error) {
    name = error.what();
  }
  cudaSetDevice(0);
  return name;
}

}  // namespace kdk::cuda

PYBIND11_MODULE(faults, m) {
  using namespace kdk::cuda;
  kdk::model::bind_control(m);
  m.attr("cluster") = kCluster;
  m.attr("threads") = kThreads;
  m.def("run", &run);
  m.def("votes", &votes);
  using pybind11::arg;
  m.def("launch_error", &launch_error, arg("device"), arg("blocks"), arg("threads"), arg("cluster"), arg("shared"),
        arg("allowed_shared"), arg("non_portable"));
  m.def("many_switches", [](int cluster, int threads, int rounds) {
    cudaFuncSetAttribute(many_switches, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    launch(cluster, threads, cluster, 0, many_switches, rounds, cluster);
  });
  m.def("product_and_sum", [](float x, float y, float z) { return x * y + z; });
  m.def("exp2_approx", &exp2_approx);
  m.def("log2_approx", &log2_approx);
  m.def("reciprocal_approx", &reciprocal_approx);
  m.def("bf16x2_of_floats", &bf16x2_of_floats);
  m.def("f16x2_of_floats", &f16x2_of_floats);
  m.def("floats_of_bf16x2", [](uint32_t x) { return std::make_pair(floats_of_bf16x2(x).x, floats_of_bf16x2(x).y); });
  m.def("floats_of_f16x2", [](uint32_t x) { return std::make_pair(floats_of_f16x2(x).x, floats_of_f16x2(x).y); });
}
