// The Python face of the CPU ops: memory comes as integers (torch's data_ptr()), so no torch header is needed.
// fastsae/backends/cpu.py is the only caller; shapes and dtypes were checked above it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;
using namespace fastsae;
using release_gil = py::call_guard<py::gil_scoped_release>;

template <class T> static T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastsae's CPU ops on raw memory; use fastsae.ops instead";

  py::enum_<Dtype>(m, "Dtype").value("f32", Dtype::f32).value("bf16", Dtype::bf16).value("f64", Dtype::f64);

  py::class_<Matrix>(m, "Matrix")
      .def(py::init([](uintptr_t data, int64_t rows, int64_t cols, int64_t stride, Dtype dtype) {
             return Matrix{pointer<void>(data), rows, cols, stride, dtype};
           }),
           py::arg("data"), py::arg("rows"), py::arg("cols"), py::arg("stride"), py::arg("dtype"));

  py::class_<Codes>(m, "Codes")
      .def(py::init([](uintptr_t acts, uintptr_t indices, uintptr_t offsets, int64_t n, int64_t k, int64_t d_sae,
                       Dtype dtype) {
             return Codes{pointer<void>(acts), pointer<int32_t>(indices), pointer<int64_t>(offsets), n, k, d_sae, dtype};
           }),
           py::arg("acts"), py::arg("indices"), py::arg("offsets"), py::arg("n"), py::arg("k"), py::arg("d_sae"),
           py::arg("dtype"));

  py::class_<LatentOrder>(m, "LatentOrder")
      .def(py::init([](uintptr_t offsets, uintptr_t tokens, uintptr_t slots) {
             return LatentOrder{pointer<int64_t>(offsets), pointer<int32_t>(tokens), pointer<int64_t>(slots)};
           }),
           py::arg("offsets"), py::arg("tokens"), py::arg("slots"));

  m.def("decode", [](const Codes& c, const Matrix& W, const Matrix& out, int threads) { ops().decode(c, W, out, threads); },
        release_gil());
  m.def("active_dot",
        [](const Matrix& x, const Codes& c, const Matrix& W, uintptr_t out, int threads) {
          ops().active_dot(x, c, W, pointer<void>(out), threads);
        },
        release_gil());
  m.def("active_outer",
        [](const Codes& c, const LatentOrder& order, const Matrix& x, const Matrix& out, int threads) {
          ops().active_outer(c, order, x, out, threads);
        },
        release_gil());
  m.def("by_latent", &by_latent, release_gil());

  m.def("isa", [] { return std::string(ops().name); }, "The instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Ops* const* t = all_ops; *t; ++t)
      if (isa_supported((*t)->name)) names.emplace_back((*t)->name);
    return names;
  }, "The instruction sets of this processor that the build has code for, fastest first.");
  m.def("use_isa", [](const std::string& name) { use_isa(name.c_str()); }, "Switch; for tests and measurements.");
}
