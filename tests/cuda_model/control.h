// The controls of the CUDA model, as functions of a Python module for the tests.
#pragma once
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

namespace kdk::model {

inline int& member(Device& device, const std::string& name) {
  if (name == "major") return device.major;
  if (name == "minor") return device.minor;
  if (name == "multiprocessors") return device.multiprocessors;
  if (name == "shared_memory_per_block") return device.shared_memory_per_block;
  if (name == "shared_memory_per_multiprocessor") return device.shared_memory_per_multiprocessor;
  if (name == "max_cluster") return device.max_cluster;
  if (name == "l2_bytes") return device.l2_bytes;
  if (name == "ptx_version") return device.ptx_version;
  throw std::invalid_argument("a device has no " + name);
}

inline cudaError_t error_of_name(const std::string& name) {
#define KDK_ERROR(error, number, text) if (name == #error) return error;
  KDK_CUDA_ERRORS(KDK_ERROR)
#undef KDK_ERROR
  throw std::invalid_argument("no error is named " + name);
}

inline pybind11::tuple numbers(dim3 x) { return pybind11::make_tuple(x.x, x.y, x.z); }

inline void bind_control(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("set_seed", [](uint64_t seed) { machine.random = scrambled(seed + 1); });
  // Adds a device and returns its index. Existing devices do not change, because the launcher stores answers about
  // them. Device 0 is like an H100.
  m.def("configure_device", [](const py::kwargs& attributes) {
    Device device;
    for (auto& [name, value] : attributes) member(device, py::cast<std::string>(name)) = py::cast<int>(value);
    machine.devices.push_back(device);
    return (int)machine.devices.size() - 1;
  });
  m.def("current_device", [] { return machine.current_device; });
  // The call returns this error until fail_call sets cudaSuccess.
  m.def("fail_call", [](const std::string& call, const std::string& error) {
    machine.failing.erase(call);
    if (error_of_name(error) != cudaSuccess) machine.failing[call] = error_of_name(error);
  });
  m.def("allow", [](uintptr_t address, size_t bytes, bool writable_too) {
    readable.add(address, bytes);
    if (writable_too) writable.add(address, bytes);
  });
  m.def("clear_memory", [] {
    readable.clear();
    writable.clear();
  });
  m.def("launches", [] {
    py::list all;
    for (const Launch& launch : machine.launches) {
      py::dict one;
      one["grid"] = numbers(launch.grid), one["block"] = numbers(launch.block);
      one["cluster"] = launch.cluster, one["shared"] = launch.shared;
      all.append(one);
    }
    return all;
  });
  m.def("clear_launches", [] { machine.launches.clear(); });
  m.def("switches", [] { return machine.switches; });
}

}  // namespace kdk::model
