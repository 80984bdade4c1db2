// The Python face of the CUDA ops. fastsae/backends/cuda*.py are the only callers; tensors are read through their Python
// attributes (arrays.h), so neither torch's nor CUDA's headers are needed here.
#include "declarations.h"
#include "op.h"
#ifdef FASTSAE_EMULATED
#include <emulation.h>
#endif

using namespace fastsae;

void bind_encode(py::module_&);  // bind_encode.cpp
void bind_update(py::module_&);  // bind_update.cpp

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastsae's CUDA ops on torch tensors; use fastsae.ops instead";
  py::register_local_exception<Error>(m, "Error", PyExc_RuntimeError);
  learn_dtypes();
#ifdef FASTSAE_SOURCES
  m.attr("sources") = FASTSAE_SOURCES;  // their digest: fastsae/backends/extension.py
#endif
  py::class_<Where>(m, "Where", py::module_local()).def(py::init([](int device, uintptr_t stream) {
    return Where{device, reinterpret_cast<void*>(stream)};
  }), py::arg("device"), py::arg("stream"));

  m.def("status", &status, "(devices, why there are none or \"\", CUDA runtime, CUDA driver)");
  m.attr("architectures") = architectures();

  bind_encode(m);
  bind_update(m);

  m.def("decode", op("decode", &decode));
  m.def("decode_error", op("decode_error", &decode_error));
  m.def("decode_tiles", [](py::object tensor, int64_t D) { return decode_tiles(dtype_of(tensor), D); });
  m.def("active_dot", op("active_dot", &active_dot));

#ifdef FASTSAE_EMULATED
  m.def("emulate", [](uint64_t seed, int capability, const std::string& refuse) {
    emulation::settings() = {seed, capability, refuse};
  }, py::arg("seed") = 0, py::arg("capability") = 90, py::arg("refuse") = "");
#endif
  m.attr("emulated") =
#ifdef FASTSAE_EMULATED
      true;
#else
      false;
#endif
}
