// The types of the members of calls. A member's type says how fields.h reads the member from Python:
//
//     Logits                  a tensor [outer, inner, columns] whose last dimension has stride 1
//     PerRow                  a tensor [rows], or [1] for a number that all rows share, in the compute dtype; or None
//     Numbers                 a contiguous tensor in the compute dtype, or None
//     Stored                  a contiguous tensor in any storage dtype, or None
//     Classes                 a contiguous tensor of int64 or int32
//     int64_t*, int32_t*, bool*     a contiguous tensor of that dtype, or None
//     int, int64_t, bool, double    a number
//     Divergence, PairCost    a name
//     a struct with fields    a NamedTuple that has these fields
//
// An empty tensor counts as None, whose pointer is null. This header depends neither on torch nor on Python.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define KDK_EVERYWHERE __host__ __device__
#define KDK_IN_KERNEL __device__
#else
#define KDK_EVERYWHERE
#define KDK_IN_KERNEL
#endif

// Stands at the end of a struct and lists the members that the caller fills by name.
#define KDK_FIELDS(...)                                                \
  static constexpr const char* field_names() { return #__VA_ARGS__; } \
  template <class Visit> void visit_fields(Visit&& visit) { visit(__VA_ARGS__); }

namespace kdk {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// An index into KDK_DIVERGENCES.
enum class Divergence : int { none = -1 };

// A [outer, inner, columns] view of logits. Both row strides are free (in elements); the last dimension has stride 1.
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t outer_stride, inner_stride;
};

// A pointer that a kernel casts to its compute type, like a void*.
struct Pointer {
  void* data;
  KDK_EVERYWHERE explicit operator bool() const { return data != nullptr; }
  template <class T> KDK_EVERYWHERE explicit operator T*() const { return (T*)data; }
};

// Numbers in the compute type: double or float (Execution::fp64) for all PerRow and Numbers of a call.
struct Numbers : Pointer {};

// One number for each row, in the compute type. A number that all rows share has stride 0.
struct PerRow {
  const void* data;
  int64_t stride;
};

// Elements of any storage dtype of logits.
struct Stored : Pointer {
  Dtype dtype;
};

// Class indices in the caller's dtype.
struct Classes : Pointer {
  bool wide;  // int64, else int32
};

// How a call runs. The launcher fills the members, never by name; a kernel uses the members of its device.
struct Execution {
  bool fp64;           // the compute type is double, else float
  void* workspace;     // of the size that the kernel's _bytes function returns
  int threads;         // CPU: the number of threads
  int device;          // GPU: its index
  void* stream;        // GPU: a cudaStream_t
  const char* kernel;  // GPU: the kernel's name, for reports
};

}  // namespace kdk
