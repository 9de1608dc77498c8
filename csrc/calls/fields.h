// Fills a call from a Python dict, by the names of its fields; types.h says how each type of member is read. A missing
// field, an unknown field and a value of another kind raise a TypeError that says what was expected and what came.
//
// Tensors are read through their Python attributes, so that nothing here depends on a version of torch.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "pairwise.h"
#include "types.h"

namespace kdk {

namespace table {  // for the names of the divergences; no template is used, so the compiler emits none
#pragma push_macro("KDK_HD")
#undef KDK_HD
#define KDK_HD inline
#include "../divergences.h"
#pragma pop_macro("KDK_HD")
}  // namespace table

// The divergences in the order of their indices.
inline pybind11::tuple divergence_names() {
#define KDK_NAME(key, Struct) names.push_back(#key);
  std::vector<std::string> names;
  KDK_DIVERGENCES(KDK_NAME)
#undef KDK_NAME
  pybind11::tuple result(names.size());
  for (size_t i = 0; i < names.size(); ++i) result[i] = pybind11::str(names[i]);
  return result;
}

// The Python objects that FieldReader needs, looked up once. They live as long as the process.
struct Python {
  PyObject *data_ptr, *dtype, *stride, *is_contiguous, *numel;                 // names
  PyObject *float32, *bfloat16, *float16, *float64, *int64, *int32, *boolean;  // dtypes
  PyObject *divergences, *pair_costs;                                          // tuples of names

  Python() {
    auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    data_ptr = name("data_ptr"), dtype = name("dtype"), stride = name("stride");
    is_contiguous = name("is_contiguous"), numel = name("numel");
    auto torch = pybind11::module_::import("torch");
    auto of_torch = [&](const char* attribute) {
      return torch.attr(attribute).cast<pybind11::object>().release().ptr();
    };
    float32 = of_torch("float32"), bfloat16 = of_torch("bfloat16"), float16 = of_torch("float16");
    float64 = of_torch("float64"), int64 = of_torch("int64"), int32 = of_torch("int32"), boolean = of_torch("bool");
    divergences = divergence_names().release().ptr();
    pair_costs = pybind11::make_tuple("l1", "l2").release().ptr();  // in the order of PairCost
  }
};
inline const Python& python() {
  static const Python objects;  // constructed when the module is loaded (bind_fields)
  return objects;
}

// The names of a call's fields as Python strings, in the order of its KDK_FIELDS.
template <class Call> const std::vector<PyObject*>& field_names() {
  static const std::vector<PyObject*> names = [] {
    std::vector<PyObject*> found;
    std::string word;
    for (const char* c = Call::field_names();; ++c) {
      if (*c && *c != ',' && *c != ' ') word += *c;
      if ((!*c || *c == ',') && !word.empty()) found.push_back(PyUnicode_InternFromString(word.c_str())), word.clear();
      if (!*c) return found;
    }
  }();
  return names;
}

class FieldReader {
 public:
  explicit FieldReader(const char* kernel) : kernel(kernel) {}

  template <class Call> void read_call(PyObject* fields, Call& call) {
    const auto& names = field_names<Call>();
    call.visit_fields([&](auto&... members) {
      size_t i = 0;
      ((field = names[i++], read(item(fields), members)), ...);
    });
    if ((size_t)PyDict_GET_SIZE(fields) != names.size()) refuse_unknown(fields, names);
    call.run.fp64 = compute_dtype == python().float64;
  }

 private:
  using object = pybind11::object;

  const char* kernel;
  PyObject* field = nullptr;          // the name of the field that is being read
  PyObject* compute_dtype = nullptr;  // the dtype of the first PerRow or Numbers
  PyObject* first_number = nullptr;   // the name of the first PerRow or Numbers

  // ---- errors

  static std::string text(PyObject* x) { return pybind11::str(x).cast<std::string>(); }
  static std::string described(PyObject* x) {
    pybind11::handle given(x);
    if (pybind11::hasattr(given, "data_ptr"))
      return "a tensor of " + text(given.attr("dtype").ptr()) + ", shape " +
             text(pybind11::tuple(given.attr("shape")).ptr()) + ", strides " + text(given.attr("stride")().ptr());
    return std::string(Py_TYPE(x)->tp_name) + " " + pybind11::repr(given).cast<std::string>().substr(0, 80);
  }
  [[noreturn]] void refuse(const std::string& expected, PyObject* x) const {
    PyErr_Clear();
    throw pybind11::type_error(std::string(kernel) + ": " + text(field) + ": expected " + expected + "; got " +
                               described(x));
  }
  [[noreturn]] void refuse_unknown(PyObject* fields, const std::vector<PyObject*>& names) const {
    std::string unknown, known;
    for (PyObject* name : names) known += (known.empty() ? "" : ", ") + text(name);
    for (auto given : pybind11::reinterpret_borrow<pybind11::dict>(fields)) {
      bool found = false;
      for (PyObject* name : names) found |= given.first.equal(pybind11::handle(name));
      if (!found) unknown += (unknown.empty() ? "" : ", ") + text(given.first.ptr());
    }
    throw pybind11::type_error(std::string(kernel) + ": unknown field " + unknown + "; the fields are " + known);
  }

  // ---- values, by the type of the member

  PyObject* item(PyObject* fields) const {
    PyObject* x = PyDict_GetItemWithError(fields, field);
    if (!x) {
      PyErr_Clear();
      throw pybind11::type_error(std::string(kernel) + ": the field " + text(field) + " is missing");
    }
    return x;
  }

  void read(PyObject* x, int64_t& to) {
    if (!PyLong_CheckExact(x)) refuse("an int", x);
    to = PyLong_AsLongLong(x);
    if (to == -1 && PyErr_Occurred()) refuse("an int of 64 bits", x);
  }
  void read(PyObject* x, int& to) {
    int64_t wide;
    read(x, wide);
    to = (int)wide;
    if (to != wide) refuse("an int of 32 bits", x);
  }
  void read(PyObject* x, bool& to) {
    if (!PyBool_Check(x)) refuse("a bool", x);
    to = x == Py_True;
  }
  void read(PyObject* x, double& to) {
    if (!PyFloat_Check(x) && !PyLong_CheckExact(x)) refuse("a number", x);
    to = PyFloat_AsDouble(x);
    if (to == -1 && PyErr_Occurred()) refuse("a number that a double holds", x);
  }
  void read(PyObject* x, Divergence& to) {
    to = Divergence::none;
    if (x != Py_None) to = (Divergence)index_of(x, python().divergences, "None or a name of ");
  }
  void read(PyObject* x, PairCost& to) { to = (PairCost)index_of(x, python().pair_costs, "a name of "); }
  int index_of(PyObject* x, PyObject* names, const char* expected) const {
    for (Py_ssize_t i = 0; PyUnicode_Check(x) && i < PyTuple_GET_SIZE(names); ++i)
      if (PyUnicode_Compare(x, PyTuple_GET_ITEM(names, i)) == 0) return (int)i;
    refuse(expected + text(names), x);
  }

  void read(PyObject* x, Logits& to) {
    static const char* expected =
        "a tensor [outer, inner, columns] of fp32, bf16, fp16 or fp64, of stride 1 along columns";
    to.data = data_of(x, expected);
    to.dtype = storage_dtype(x, expected);
    object strides = method(x, python().stride, expected);
    if (!to.data || PyTuple_GET_SIZE(strides.ptr()) != 3) refuse(expected, x);
    auto stride = [&](int dimension) { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), dimension)); };
    if (stride(2) != 1 && !has_one_column(x)) refuse(expected, x);
    to.outer_stride = stride(0), to.inner_stride = stride(1);
  }
  void read(PyObject* x, PerRow& to) {
    static const char* expected = "a tensor [rows] or [1] in the compute dtype, or None";
    to = {nullptr, 0};
    if (x == Py_None) return;
    to.data = data_of(x, expected);
    if (!to.data) return;
    check_compute_dtype(x, expected);
    if (number(x, python().numel, expected) == 1) return;
    object strides = method(x, python().stride, expected);
    if (PyTuple_GET_SIZE(strides.ptr()) != 1) refuse(expected, x);
    to.stride = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), 0));
  }
  void read(PyObject* x, Numbers& to) {
    static const char* expected = "a contiguous tensor in the compute dtype, or None";
    to.data = contiguous(x, expected);
    if (to.data) check_compute_dtype(x, expected);
  }
  void read(PyObject* x, Stored& to) {
    static const char* expected = "a contiguous tensor of fp32, bf16, fp16 or fp64, or None";
    to.data = contiguous(x, expected);
    if (to.data) to.dtype = storage_dtype(x, expected);
  }
  void read(PyObject* x, Classes& to) {
    static const char* expected = "a contiguous tensor of int64 or int32";
    to.data = contiguous(x, expected);
    if (!to.data) return;
    to.wide = has_dtype(x, python().int64);
    if (!to.wide && !has_dtype(x, python().int32)) refuse(expected, x);
  }
  void read(PyObject* x, const int64_t*& to) { to = (int64_t*)contiguous(x, kInt64, python().int64); }
  void read(PyObject* x, int64_t*& to) { to = (int64_t*)contiguous(x, kInt64, python().int64); }
  void read(PyObject* x, const int32_t*& to) { to = (int32_t*)contiguous(x, kInt32, python().int32); }
  void read(PyObject* x, int32_t*& to) { to = (int32_t*)contiguous(x, kInt32, python().int32); }
  void read(PyObject* x, bool*& to) { to = (bool*)contiguous(x, kBool, python().boolean); }
  static constexpr const char *kInt64 = "a contiguous tensor of int64, or None",
                              *kInt32 = "a contiguous tensor of int32, or None",
                              *kBool = "a contiguous tensor of bool, or None";

  // A struct with fields of its own is read from a NamedTuple.
  template <class Nested> void read(PyObject* x, Nested& to) {
    const auto& names = field_names<Nested>();
    PyObject* const outer = field;
    if (!PyTuple_Check(x) || (size_t)PyTuple_GET_SIZE(x) != names.size())
      refuse(std::string("a NamedTuple of ") + Nested::field_names(), x);
    to.visit_fields([&](auto&... members) {
      size_t i = 0;
      ((field = names[i++], read(attribute(x, outer).ptr(), members)), ...);
    });
    field = outer;
  }
  object attribute(PyObject* x, PyObject* outer) const {
    PyObject* found = PyObject_GetAttr(x, field);
    if (!found) {
      PyErr_Clear();
      throw pybind11::type_error(std::string(kernel) + ": " + text(outer) + ": the field " + text(field) +
                                 " is missing");
    }
    return pybind11::reinterpret_steal<object>(found);
  }

  // ---- tensors

  object method(PyObject* x, PyObject* name, const char* expected) const {
    PyObject* found = PyObject_CallMethodNoArgs(x, name);
    if (!found) refuse(expected, x);
    return pybind11::reinterpret_steal<object>(found);
  }
  int64_t number(PyObject* x, PyObject* name, const char* expected) const {
    return PyLong_AsLongLong(method(x, name, expected).ptr());
  }
  // The address of a tensor's first element; null for an empty tensor.
  void* data_of(PyObject* x, const char* expected) const {
    object address = method(x, python().data_ptr, expected);
    if (!PyLong_Check(address.ptr())) refuse(expected, x);
    return (void*)PyLong_AsUnsignedLongLong(address.ptr());
  }
  void* contiguous(PyObject* x, const char* expected) const {
    if (x == Py_None) return nullptr;
    void* data = data_of(x, expected);
    if (!data && number(x, python().numel, expected) != 0) refuse(expected, x);  // the tensor has no memory
    if (data && method(x, python().is_contiguous, expected).ptr() != Py_True) refuse(expected, x);
    return data;
  }
  void* contiguous(PyObject* x, const char* expected, PyObject* dtype) const {
    void* data = contiguous(x, expected);
    if (data && !has_dtype(x, dtype)) refuse(expected, x);
    return data;
  }
  // torch has one object for each dtype, so that dtypes are compared by address.
  static object dtype_of(PyObject* x) {
    return pybind11::reinterpret_steal<object>(PyObject_GetAttr(x, python().dtype));
  }
  static bool has_dtype(PyObject* x, PyObject* dtype) { return dtype_of(x).ptr() == dtype; }
  Dtype storage_dtype(PyObject* x, const char* expected) const {
    const object dtype = dtype_of(x);
    if (dtype.ptr() == python().float32) return Dtype::f32;
    if (dtype.ptr() == python().bfloat16) return Dtype::bf16;
    if (dtype.ptr() == python().float16) return Dtype::f16;
    if (dtype.ptr() == python().float64) return Dtype::f64;
    refuse(expected, x);
  }
  // All PerRow and Numbers of a call have one dtype, fp32 or fp64.
  void check_compute_dtype(PyObject* x, const char* expected) {
    const object dtype = dtype_of(x);
    if (dtype.ptr() == compute_dtype) return;
    if (compute_dtype)
      refuse(std::string(expected) + ", which is " + text(compute_dtype) + " as " + text(first_number), x);
    if (dtype.ptr() != python().float32 && dtype.ptr() != python().float64)
      refuse(std::string(expected) + ", which is torch.float32 or torch.float64", x);
    compute_dtype = dtype.ptr(), first_number = field;
  }
  static bool has_one_column(PyObject* x) {
    return pybind11::handle(x).attr("shape")[pybind11::int_(-1)].cast<int64_t>() == 1;
  }
};

// Holds a call's workspace: a tensor of bytes that the Python function `allocate` returns.
struct Workspace {
  pybind11::object tensor;
  void* data = nullptr;

  Workspace(int64_t bytes, const pybind11::object& allocate) {
    if (bytes <= 0) return;
    tensor = allocate(bytes);
    data = (void*)tensor.attr("data_ptr")().cast<uintptr_t>();
  }
};

// Binds the attributes of every module with kernels. Looks the Python objects up, so that the first call need not.
inline void bind_fields(pybind11::module_& m) {
  python();
  m.attr("divergences") = divergence_names();
}

}  // namespace kdk
