// How a torch tensor becomes an Array: through its Python attributes, so that neither torch's headers nor its ABI matter.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace fastsae {

namespace py = pybind11;

struct Tensor {  // as it was given; `array` is what kernels get
  Array array;
  int device;  // -1: the CPU
  int dimensions;

  std::string shape() const {
    if (!dimensions) return "()";
    const std::string rows = "(" + std::to_string(array.rows) + ",";
    return dimensions == 1 ? rows + ")" : rows + " " + std::to_string(array.cols) + ")";
  }
};

// torch's dtypes, in the order of ours. They are never released: the interpreter may end first.
inline std::vector<py::handle>& known_dtypes() {
  static std::vector<py::handle> known;
  return known;
}

// Once, when the module is made: an import under a lock of C++'s could wait forever for a thread that waits for that lock.
inline void learn_dtypes() {
  const py::module_ torch = py::module_::import("torch");
  for (int i = 0; i <= static_cast<int>(Dtype::f8); ++i)
    known_dtypes().push_back(torch.attr(name_of(static_cast<Dtype>(i))).cast<py::object>().release());
}

inline Dtype dtype_of(py::handle tensor) {
  const py::object dtype = tensor.attr("dtype");
  for (size_t i = 0; i < known_dtypes().size(); ++i)
    if (dtype.is(known_dtypes()[i])) return static_cast<Dtype>(i);
  throw py::type_error("got a tensor of " + std::string(py::str(dtype)) + ", and no kernel takes one");
}

inline Tensor read_tensor(py::handle t) {
  Tensor r{};
  const py::tuple shape = t.attr("shape");
  r.array.dtype = dtype_of(t);
  r.device = t.attr("get_device")().cast<int>();
  r.array.data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
  if (shape.size() > 2)
    throw py::value_error("got a tensor of shape " + std::string(py::str(shape)) + ", expected at most two dimensions");
  r.dimensions = static_cast<int>(shape.size());
  r.array.rows = shape.size() > 0 ? shape[0].cast<int64_t>() : 1;
  r.array.cols = shape.size() > 1 ? shape[1].cast<int64_t>() : 1;
  // fastsae.ops sees storages that were cut short; asking for a storage here would add half to what each launch costs.
  if (r.array.size() && !r.array.data) throw py::value_error("got a " + r.shape() + " tensor without memory; was it freed?");
  if (!t.attr("is_contiguous")().cast<bool>())
    throw py::value_error("got a " + r.shape() + " tensor that is not contiguous; pass t.contiguous()");
  if (reinterpret_cast<uintptr_t>(r.array.data) % size_of(r.array.dtype))
    throw py::value_error("got a " + r.shape() + " tensor of " + name_of(r.array.dtype) +
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
