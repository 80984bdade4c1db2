// The Python face of the CUDA ops of encode.h.
#include "encode.h"
#include "op.h"

using namespace fastsae;

void bind_encode(py::module_& m) {
  m.def("narrow_rows", op("narrow_rows", &narrow_rows));
  m.def("bars", op("bars", &bars));
  m.def("append", op("append", &append));
  m.def("select", op("select", &select));
  m.def("rescore", op("rescore", &rescore));
  m.def("top_k", op("top_k", &top_k));
  m.def("exhaustive_top_k", op("exhaustive_top_k", &exhaustive_top_k));
  m.def("count_listed", op("count_listed", &count_listed));
  m.def("emit_listed", op("emit_listed", &emit_listed));
  m.def("every_latent", op("every_latent", &every_latent));
  m.def("histogram", op("histogram", &histogram));
}
