// A recording of launches, for reports. The bindings include this file, and have no headers of CUDA.
#pragma once
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace kdk {
namespace cuda {

struct Recorded {
  std::string kernel, way;
  int blocks, threads, shared, grid;  // as in Launch
};

// The launches of every thread since the recording began: autograd has threads of its own.
struct Recording {
  std::mutex mutex;
  bool on = false;
  std::vector<Recorded> launches;

  void add(const char* kernel, const char* way, int blocks, int threads, int shared, int grid) {
    std::lock_guard<std::mutex> lock(mutex);
    if (on) launches.push_back({kernel, way, blocks, threads, shared, grid});
  }
  // Begins or ends a recording. Returns the launches of the one before.
  std::vector<Recorded> turn(bool to) {
    std::lock_guard<std::mutex> lock(mutex);
    on = to;
    return std::exchange(launches, {});
  }
};
inline Recording recording;

}  // namespace cuda
}  // namespace kdk
