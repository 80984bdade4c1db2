// How a torch tensor becomes an Array: through its Python attributes, so that neither torch's headers nor its ABI matter.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace fastsae {

namespace py = pybind11;

struct Tensor {  // as it was given; `array` is what kernels get
  Array array;
  int device;    // -1: the CPU
  std::string shape;
};

inline const char* name_of(Dtype t) {
  static const char* const names[] = {"float32", "bfloat16", "float16", "float64", "int32", "int64"};
  return names[static_cast<int>(t)];
}

inline Dtype dtype_of(py::handle tensor) {
  static const std::vector<py::object>* const known = [] {  // never freed: the interpreter may be gone first
    auto* found = new std::vector<py::object>;
    for (int i = 0; i < 6; ++i) found->push_back(py::module_::import("torch").attr(name_of(static_cast<Dtype>(i))));
    return found;
  }();
  const py::object dtype = tensor.attr("dtype");
  for (int i = 0; i < 6; ++i)
    if (dtype.is((*known)[i])) return static_cast<Dtype>(i);
  throw py::type_error("got a tensor of " + std::string(py::str(dtype)) + ", and no kernel takes one");
}

inline Tensor read_tensor(py::handle t) {
  Tensor r{};
  const py::tuple shape = t.attr("shape");
  for (const py::handle size : shape) r.shape += (r.shape.empty() ? "(" : ", ") + std::string(py::str(size));
  r.shape += r.shape.empty() ? "()" : shape.size() == 1 ? ",)" : ")";
  r.array.dtype = dtype_of(t);
  r.device = t.attr("get_device")().cast<int>();
  r.array.data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
  if (shape.size() > 2) throw py::value_error("got a tensor of shape " + r.shape + ", expected at most two dimensions");
  r.array.rows = shape.size() > 0 ? shape[0].cast<int64_t>() : 1;
  r.array.cols = shape.size() > 1 ? shape[1].cast<int64_t>() : 1;
  if (!t.attr("is_contiguous")().cast<bool>())
    throw py::value_error("got a " + r.shape + " tensor that is not contiguous; pass t.contiguous()");
  if (reinterpret_cast<uintptr_t>(r.array.data) % size_of(r.array.dtype))
    throw py::value_error("got a " + r.shape + " tensor of " + name_of(r.array.dtype) +
                          " whose memory does not begin at a multiple of its element size; pass t.clone()");
  return r;
}

}  // namespace fastsae

namespace pybind11::detail {

template <> struct type_caster<fastsae::Tensor> {
  PYBIND11_TYPE_CASTER(fastsae::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (!source || source.is_none() || !hasattr(source, "data_ptr")) return false;
    value = fastsae::read_tensor(source);
    return true;
  }
};

}  // namespace pybind11::detail
