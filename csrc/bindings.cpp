// The Python module kdkernels._native: pointers, strides and sizes in; nothing of torch.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arguments.h"
#include "cpu/linear.h"
#include "cpu/pairwise.h"
#include "cpu/rows.h"
#include "cpu/sinkhorn.h"
#include "cpu/topk.h"
#include "cpu/uld.h"
#include "topk_arguments.h"
#include "transport_arguments.h"
#include "uld_arguments.h"
#if defined(KDK_CUDA)
#include "cuda/bindings.h"
#endif

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
  void (*softcap)(void*, Dtype, int64_t, double, int) noexcept;
  void (*softcap_gradient)(void*, const void*, Dtype, int64_t, double, int) noexcept;
  void (*accumulate)(float*, const void*, Dtype, int64_t, int) noexcept;
  void (*topk_rows)(const kdk::TopkRowsCall&) noexcept;
  int64_t (*topk_rows_workspace_bytes)(int64_t, int64_t, bool, int) noexcept;
  void (*sort_entries)(const kdk::SortEntriesCall&) noexcept;
  int64_t (*sort_entries_workspace_bytes)(int64_t, int) noexcept;
  void (*topk)(const kdk::TopkCall&) noexcept;
  int64_t (*topk_workspace_bytes)(int64_t, int64_t, bool, int) noexcept;
  void (*pair_costs)(const kdk::PairCostsCall&) noexcept;
  int64_t (*pair_costs_workspace_bytes)(int64_t, int64_t, int64_t, bool, int) noexcept;
  void (*pair_gradient)(const kdk::PairGradientCall&) noexcept;
  int64_t (*pair_gradient_workspace_bytes)(int64_t, int64_t, int64_t, bool, int) noexcept;
  void (*sinkhorn)(const kdk::SinkhornCall&) noexcept;
  int64_t (*sinkhorn_workspace_bytes)(int64_t, int64_t, int64_t, int64_t, bool, bool, int) noexcept;
  void (*plan_gradient)(const kdk::PlanGradientCall&) noexcept;
  int64_t (*plan_gradient_workspace_bytes)(int64_t, int64_t, int) noexcept;
  void (*uld)(const kdk::UldCall&) noexcept;
  int64_t (*uld_workspace_bytes)(int64_t, bool, int) noexcept;
};

#define KDK_CPU(isa)                                                                         \
  Cpu{#isa, kdk::isa::rows, kdk::isa::scale_rows, kdk::isa::workspace_bytes,                 \
      kdk::isa::softcap, kdk::isa::softcap_gradient, kdk::isa::accumulate,                   \
      kdk::isa::topk_rows, kdk::isa::topk_rows_workspace_bytes,                              \
      kdk::isa::sort_entries, kdk::isa::sort_entries_workspace_bytes,                        \
      kdk::isa::topk, kdk::isa::topk_workspace_bytes,                                        \
      kdk::isa::pair_costs, kdk::isa::pair_costs_workspace_bytes,                            \
      kdk::isa::pair_gradient, kdk::isa::pair_gradient_workspace_bytes,                      \
      kdk::isa::sinkhorn, kdk::isa::sinkhorn_workspace_bytes,                                \
      kdk::isa::plan_gradient, kdk::isa::plan_gradient_workspace_bytes,                      \
      kdk::isa::uld, kdk::isa::uld_workspace_bytes}

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

// ---- the calls

// For a large tensor that nothing has been written to yet: its page faults cost as much as the kernel that writes it,
// and huge pages take most of that away.
void advise_huge_pages(uintptr_t data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  uintptr_t first = (data + page - 1) / page * page, last = (data + bytes) / page * page;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);  // advice: an error changes nothing
#else
  (void)data, (void)bytes;
#endif
}

bool rows(const RowsCall& arguments, uintptr_t workspace, int threads) {
  RowsCall call = arguments;
  call.workspace = (void*)workspace;
  call.threads = threads;
  return cpu.rows(call);
}

void scale_rows(uintptr_t x, int dtype, int64_t rows, int64_t columns, const kdk::PerRowArgument& factor,
                int threads) {
  py::gil_scoped_release release;
  cpu.scale_rows((void*)x, (Dtype)dtype, rows, columns, kdk::per_row(factor), threads);
}

void softcap(uintptr_t x, int dtype, int64_t count, double cap, int threads) {
  py::gil_scoped_release release;
  cpu.softcap((void*)x, (Dtype)dtype, count, cap, threads);
}

void softcap_gradient(uintptr_t gradient, uintptr_t logits, int dtype, int64_t count, double cap, int threads) {
  py::gil_scoped_release release;
  cpu.softcap_gradient((void*)gradient, (const void*)logits, (Dtype)dtype, count, cap, threads);
}

void accumulate(uintptr_t total, uintptr_t part, int dtype, int64_t count, int threads) {
  py::gil_scoped_release release;
  cpu.accumulate((float*)total, (const void*)part, (Dtype)dtype, count, threads);
}

template <class Call, void (*Cpu::*kernel)(const Call&) noexcept>
void run(const Call& arguments, uintptr_t workspace, int threads) {
  Call call = arguments;
  call.workspace = (void*)workspace;
  call.threads = threads;
  (cpu.*kernel)(call);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  cpu = choose_cpu();
  m.attr("cpu_isa") = cpu.isa;
  m.attr("divergences") = kdk::divergence_names();
  m.def("rows", kdk::taking_rows_call(&rows));
  m.def("scale_rows", &scale_rows);
  m.def("softcap", &softcap);
  m.def("softcap_gradient", &softcap_gradient);
  m.def("accumulate", &accumulate);
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("workspace_bytes", [](int64_t columns, bool fp64, int threads) {
    return cpu.workspace_bytes(columns, fp64, threads);
  });
  m.def("topk_rows", kdk::taking_topk_rows_call(&run<kdk::TopkRowsCall, &Cpu::topk_rows>));
  m.def("topk", kdk::taking_topk_call(&run<kdk::TopkCall, &Cpu::topk>));
  m.def("sort_entries", kdk::taking_sort_entries_call(&run<kdk::SortEntriesCall, &Cpu::sort_entries>));
  m.def("sort_entries_workspace_bytes", [](int64_t entries, int threads) {
    return cpu.sort_entries_workspace_bytes(entries, threads);
  });
  m.def("topk_rows_workspace_bytes", [](int64_t columns, int64_t entries, bool fp64, int threads) {
    return cpu.topk_rows_workspace_bytes(columns, entries, fp64, threads);
  });
  m.def("topk_workspace_bytes", [](int64_t columns, int64_t k, bool fp64, int threads) {
    return cpu.topk_workspace_bytes(columns, k, fp64, threads);
  });
  m.def("pair_costs", kdk::taking_pair_costs_call(&run<kdk::PairCostsCall, &Cpu::pair_costs>));
  m.def("pair_costs_workspace_bytes", [](int64_t clouds, int64_t rows, int64_t columns, bool fp64, int threads) {
    return cpu.pair_costs_workspace_bytes(clouds, rows, columns, fp64, threads);
  });
  m.def("pair_gradient", kdk::taking_pair_gradient_call(&run<kdk::PairGradientCall, &Cpu::pair_gradient>));
  m.def("pair_gradient_workspace_bytes", [](int64_t clouds, int64_t rows, int64_t columns, bool fp64, int threads) {
    return cpu.pair_gradient_workspace_bytes(clouds, rows, columns, fp64, threads);
  });
  m.def("sinkhorn", kdk::taking_sinkhorn_call(&run<kdk::SinkhornCall, &Cpu::sinkhorn>));
  m.def("sinkhorn_workspace_bytes", [](int64_t problems, int64_t n, int64_t m, int64_t iterations, bool fp64,
                                       bool unrolled, int threads) {
    return cpu.sinkhorn_workspace_bytes(problems, n, m, iterations, fp64, unrolled, threads);
  });
  m.def("plan_gradient", kdk::taking_plan_gradient_call(&run<kdk::PlanGradientCall, &Cpu::plan_gradient>));
  m.def("plan_gradient_workspace_bytes", [](int64_t n, int64_t m, int threads) {
    return cpu.plan_gradient_workspace_bytes(n, m, threads);
  });
  m.def("uld", kdk::taking_uld_call(&run<kdk::UldCall, &Cpu::uld>));
  m.def("uld_workspace_bytes", [](int64_t columns, bool fp64, int threads) {
    return cpu.uld_workspace_bytes(columns, fp64, threads);
  });
#if defined(KDK_CUDA)
  kdk::bind_cuda(m);
#endif
}
