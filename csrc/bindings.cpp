// The Python module kdkernels._native: the CPU kernels, and the CUDA kernels if the build has them.
//
//     cpu_NAME(fields, allocate, threads) -> bool
//     cuda_NAME(fields, allocate, device, stream)
//
// `fields` is a dict, which calls/fields.h reads into the kernel's call. allocate(bytes) returns a tensor of bytes;
// only a kernel that needs a workspace calls it. cpu_NAME returns whether a kept row has an invalid option; if so, the
// kernel does not run and writes nothing.
//
// The build defines KDK_BORDER: the hash of the sources that decide how Python calls the kernels
// (kdkernels/sources.py).
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "calls/fields.h"
#include "calls/kernels.h"
#if defined(KDK_CUDA)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

// ---- the instruction set, which the module chooses once, at its import

struct Cpu {
  const char* isa;
#define KDK_POINTERS(name, Call)                  \
  void (*name)(const kdk::Call&) noexcept;       \
  int64_t (*name##_bytes)(const kdk::Call&) noexcept;
  KDK_CPU_KERNELS(KDK_POINTERS)
#undef KDK_POINTERS
};

#define KDK_ENTRY(name, Call) name, name##_bytes,
#define KDK_TABLE(isa)                                                       \
  Cpu table_of_##isa() {                                                     \
    using namespace kdk::isa;                                                \
    return {#isa, KDK_CPU_KERNELS(KDK_ENTRY)};                               \
  }
KDK_TABLE(baseline)
#if defined(KDK_X86)
KDK_TABLE(avx2)
KDK_TABLE(avx512)
#endif
#undef KDK_TABLE
#undef KDK_ENTRY

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
  const Cpu built[] = {table_of_avx512(), table_of_avx2(), table_of_baseline()};
#else
  const Cpu built[] = {table_of_baseline()};
#endif
  const char* forced = std::getenv("KDKERNELS_CPU_ISA");
  for (const Cpu& cpu : built) {
    if (forced && *forced ? std::strcmp(forced, cpu.isa) == 0 : runs(cpu.isa)) {
      if (!runs(cpu.isa))
        throw std::runtime_error(std::string("KDKERNELS_CPU_ISA=") + cpu.isa + ", which this processor does not run");
      return cpu;
    }
  }
  std::string names;
  for (const Cpu& cpu : built) names = names.empty() ? cpu.isa : cpu.isa + (", " + names);
  throw std::runtime_error("KDKERNELS_CPU_ISA: expected one of " + names + ", as built; got " + forced);
}

Cpu cpu;

// Call this for a large tensor before the first write to it. The page faults of such a tensor cost as much as the
// kernel that writes it. Huge pages avoid most of the page faults.
void advise_huge_pages(uintptr_t data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  uintptr_t first = (data + page - 1) / page * page, last = (data + bytes) / page * page;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);  // only advice: an error changes nothing
#else
  (void)data, (void)bytes;
#endif
}

// ---- the processors

// The processors that the calling thread may use. OpenMP counts: where it has bound the thread to one processor, the
// thread's own affinity is that one.
int processors() { return omp_get_num_procs(); }

// ---- the calls

// Whether a kept row has an invalid option.
template <class T, class Call> bool has_bad_row(const Call& call) {
  for (int64_t row = 0; row < call.rows; ++row) {
    kdk::RowValues<T> values;
    values.read(call.options, row, [](const auto* from) { return *from; });
    if (!values.skipped() && values.bad(call.columns)) return true;
  }
  return false;
}

// The first overload serves the calls that have row options. The argument 0 prefers `int` to `long`, so the compiler
// takes the second overload only for a call without row options.
template <class Call> auto has_bad_value(int, const Call& call) -> decltype(call.options, true) {
  return call.run.fp64 ? has_bad_row<double>(call) : has_bad_row<float>(call);
}
template <class Call> bool has_bad_value(long, const Call&) { return false; }

// The Python function cpu_NAME.
template <class Call>
void define(py::module_& m, const char* name, void (*kernel)(const Call&) noexcept,
            int64_t (*bytes)(const Call&) noexcept) {
  m.def(name, [=](const py::dict& fields, const py::object& allocate, int threads) {
    Call call{};
    kdk::FieldReader(name).read_call(fields.ptr(), call);
    call.run.threads = threads;
    if (has_bad_value(0, call)) return true;
    const kdk::Workspace workspace(bytes(call), allocate);
    call.run.workspace = workspace.data;
    py::gil_scoped_release release;
    kernel(call);
    return false;
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  cpu = choose_cpu();
  kdk::bind_fields(m);
  m.attr("cpu_isa") = cpu.isa;
  m.attr("border") = KDK_BORDER;
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("processors", &processors);
#define KDK_DEFINE(name, Call) define(m, "cpu_" #name, cpu.name, cpu.name##_bytes);
  KDK_CPU_KERNELS(KDK_DEFINE)
#undef KDK_DEFINE
#if defined(KDK_CUDA)
  kdk::bind_cuda(m);
#endif
}
