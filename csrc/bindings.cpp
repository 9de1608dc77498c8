// The Python module kdkernels._native: pointers, strides and sizes in; nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/rows.h"

namespace table {  // for the names in it
#define KDK_HD inline
template <class T> T exp_of(T x);
template <class T> T log_of(T x);
template <class T> T sqrt_of(T x);
#include "divergences.h"
}  // namespace table

namespace py = pybind11;
using kdk::Dtype;
using kdk::RowsCall;

namespace {

// ---- the instruction set, chosen once when the module is loaded

struct Cpu {
  const char* isa;
  bool (*rows)(const RowsCall&) noexcept;
  void (*scale_rows)(void*, Dtype, int64_t, int64_t, kdk::PerRow, int) noexcept;
  int64_t (*workspace_bytes)(int64_t, bool, int) noexcept;
};

#define KDK_CPU(isa) Cpu{#isa, kdk::isa::rows, kdk::isa::scale_rows, kdk::isa::workspace_bytes}

bool runs(const std::string& isa) {
#if defined(KDK_X86)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx2") return avx2;
  if (isa == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == "baseline";
}

Cpu choose_cpu() {
#if defined(KDK_X86)
  const Cpu built[] = {KDK_CPU(avx512), KDK_CPU(avx2), KDK_CPU(baseline)};
#else
  const Cpu built[] = {KDK_CPU(baseline)};
#endif
  const char* forced = std::getenv("KDKERNELS_CPU_ISA");
  for (const Cpu& cpu : built) {
    if (forced && *forced ? std::strcmp(forced, cpu.isa) == 0 : runs(cpu.isa)) {
      if (!runs(cpu.isa))
        throw std::runtime_error(std::string("KDKERNELS_CPU_ISA=") + cpu.isa + ", which this processor does not run");
      return cpu;
    }
  }
  throw std::runtime_error(std::string("KDKERNELS_CPU_ISA: expected baseline, avx2 or avx512 as built; got ") + forced);
}

Cpu cpu;

// ---- arguments

using LogitsArgument = std::tuple<uintptr_t, int, int64_t, int64_t>;  // pointer, dtype, outer and inner stride
using PerRowArgument = std::tuple<uintptr_t, int64_t>;                // pointer, stride

kdk::Logits logits(const LogitsArgument& x) {
  return {(const void*)std::get<0>(x), (Dtype)std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}
kdk::PerRow per_row(const PerRowArgument& x) { return {(const void*)std::get<0>(x), std::get<1>(x)}; }

// The page faults of a large fresh gradient cost as much as the kernel; huge pages take most of that away.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  uintptr_t first = ((uintptr_t)data + page - 1) / page * page, last = ((uintptr_t)data + bytes) / page * page;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);  // advice: an error changes nothing
#else
  (void)data, (void)bytes;
#endif
}

bool rows(int sweeps, int divergence, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes,
          const LogitsArgument& student, const LogitsArgument& teacher,
          const PerRowArgument& row_scale, const PerRowArgument& temperature,
          const PerRowArgument& hard_weight, uintptr_t labels, uintptr_t parameters,
          bool temperature_squared, bool unit_log_sum, uintptr_t floats, uintptr_t sums,
          uintptr_t loss, uintptr_t statistics, uintptr_t top1, uintptr_t gradient,
          uintptr_t workspace, int threads) {
  RowsCall call{};
  call.sweeps = sweeps;
  call.divergence = divergence;
  std::tie(call.rows, call.inner, call.columns, call.gradient_columns) = sizes;
  call.student = logits(student);
  call.teacher = logits(teacher);
  call.row_scale = per_row(row_scale);
  call.temperature = per_row(temperature);
  call.hard_weight = per_row(hard_weight);
  call.labels = (const int64_t*)labels;
  call.parameters = (const void*)parameters;
  call.temperature_squared = temperature_squared;
  call.unit_log_sum = unit_log_sum;
  call.floats = (void*)floats;
  call.sums = (void*)sums;
  call.loss = (void*)loss;
  call.statistics = (void*)statistics;
  call.top1 = (int64_t*)top1;
  call.gradient = (void*)gradient;
  call.workspace = (void*)workspace;
  call.threads = threads;

  py::gil_scoped_release release;
  if (call.gradient) {
    int64_t element = call.student.dtype == Dtype::f64 ? 8 : call.student.dtype == Dtype::f32 ? 4 : 2;
    advise_huge_pages(call.gradient, call.rows * call.gradient_columns * element);
  }
  return cpu.rows(call);
}

void scale_rows(uintptr_t x, int dtype, int64_t rows, int64_t columns, const PerRowArgument& factor, int threads) {
  py::gil_scoped_release release;
  cpu.scale_rows((void*)x, (Dtype)dtype, rows, columns, per_row(factor), threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  cpu = choose_cpu();
  m.attr("cpu_isa") = cpu.isa;
  std::vector<std::string> names;
#define KDK_NAME(key, Struct) names.push_back(#key);
  KDK_DIVERGENCES(KDK_NAME)
  m.attr("divergences") = py::tuple(py::cast(names));
  m.def("rows", &rows);
  m.def("scale_rows", &scale_rows);
  m.def("workspace_bytes", [](int64_t columns, bool fp64, int threads) {
    return cpu.workspace_bytes(columns, fp64, threads);
  });
}
