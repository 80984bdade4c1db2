// The Python face of the CUDA ops of update.h.
#include "op.h"
#include "update.h"

using namespace fastsae;

void bind_update(py::module_& m) {
  m.def("list_slots", op("list_slots", &list_slots));
  m.def("sort_workspace", op("sort_workspace", &sort_workspace));
  m.def("sort_slots", op("sort_slots", &sort_slots));
  m.def("piece_workspace", op("piece_workspace", &piece_workspace));
  m.def("piece_starts", op("piece_starts", &piece_starts));
  m.def("active_outer", op("active_outer", &active_outer));
  m.def("step_numbers", op("step_numbers", &step_numbers));
  m.def("rows_are_staged", op("rows_are_staged", &rows_are_staged));
  m.def("update_rows", op("update_rows", &update_rows));
  m.def("bias_programs", &bias_programs);
  m.def("bias_parts", &bias_parts);
  m.def("update_bias", op("update_bias", &update_bias));
}
