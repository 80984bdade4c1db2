// The Python face of the CPU ops: memory comes as integers (torch's data_ptr()), so no torch header is needed.
// fastsae/backends/cpu.py is the only caller; shapes and dtypes were checked above it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "encode.h"
#include "ops.h"
#include "update.h"

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

  py::enum_<Format>(m, "Format")
      .value("f32", Format::f32)
      .value("bf16", Format::bf16)
      .value("i8", Format::i8)
      .value("amx", Format::amx)
      .value("amx_emulated", Format::amx_emulated);
  m.def("fastest_format", [](int64_t d) { return fastest_format(ops().name, d); });
  m.def("tight_format", [] { return tight_format(ops().name); });
  m.def("format_supported", [](Format f) { return format_supported(f, ops().name); });
  m.def("words_per_row", &words_per_row);
  m.def("blocks_of", &blocks_of);

  py::class_<Screen>(m, "Screen")
      .def(py::init([](uintptr_t words, uintptr_t scale, uintptr_t norm, uintptr_t residual, Format format, int64_t latents,
                       int64_t d) {
             return Screen{pointer<uint32_t>(words), pointer<float>(scale), pointer<float>(norm), pointer<float>(residual),
                           format, latents, d, blocks_of(latents), words_per_row(format, d)};
           }),
           py::arg("words"), py::arg("scale"), py::arg("norm"), py::arg("residual"), py::arg("format"),
           py::arg("latents"), py::arg("d"))
      .def_readonly("latents", &Screen::latents);
  m.def("prepare_screen",
        [](const Matrix& W, uintptr_t rows, const Screen& out, int threads) {
          ops().prepare_screen(W, pointer<int32_t>(rows), out, threads);
        },
        release_gil());

  py::class_<EncodeArgs>(m, "EncodeArgs")
      .def(py::init([](const Matrix& x, const Matrix& W, uintptr_t bias, uintptr_t scale, uintptr_t rows, int64_t row_count,
                       int64_t index_offset, int64_t k, bool rescore, bool redo, const Screen& screen, int threads) {
             return EncodeArgs{x, W, pointer<float>(bias), pointer<float>(scale), pointer<int32_t>(rows), row_count,
                               index_offset, k, rescore, redo, screen, threads};
           }),
           py::arg("x"), py::arg("W"), py::arg("bias"), py::arg("scale"), py::arg("rows"), py::arg("row_count"),
           py::arg("index_offset"), py::arg("k"), py::arg("rescore"), py::arg("redo"), py::arg("screen"), py::arg("threads"));
  m.def("encode_topk",
        [](const EncodeArgs& args, uintptr_t acts, uintptr_t indices) {
          const TopkCounts c = ops().encode_topk(args, {pointer<float>(acts), pointer<int32_t>(indices)});
          return std::make_pair(c.redone, c.rivals);
        },
        release_gil(), "How many tokens were redone, and how many latents beyond the K best were scored.");

  m.def("encode_above",
        [](const EncodeArgs& args, uintptr_t per_latent, uintptr_t per_token, uintptr_t acts, uintptr_t indices,
           uintptr_t offsets, int64_t capacity) {
          const AboveCounts c = ops().encode_above(args, pointer<float>(per_latent), pointer<float>(per_token),
                                                   {pointer<float>(acts), pointer<int32_t>(indices),
                                                    pointer<int64_t>(offsets), capacity});
          return std::make_pair(c.above, c.redone);
        },
        release_gil(), "How many latents are above, and how many tokens were scored in full.");
  m.def("encode_batch_topk",
        [](const EncodeArgs& args, uintptr_t acts, uintptr_t indices, uintptr_t offsets) {
          return ops().encode_batch_topk(args, {pointer<float>(acts), pointer<int32_t>(indices), pointer<int64_t>(offsets),
                                                args.k * args.x.rows});
        },
        release_gil(), "The number of tokens that were redone.");

  py::class_<UpdateTerm>(m, "UpdateTerm")
      .def(py::init([](const Codes& codes, const LatentOrder& order, const Matrix& x, const Matrix& grad, uintptr_t dacts,
                       bool has_bias) {
             return UpdateTerm{codes, order, x, grad, pointer<void>(dacts), has_bias};
           }),
           py::arg("codes"), py::arg("order"), py::arg("x"), py::arg("grad"), py::arg("dacts"), py::arg("has_bias"));
  py::class_<UpdateParts>(m, "UpdateParts")
      .def(py::init([](uintptr_t pull, int64_t segments, uintptr_t db_enc, uintptr_t enc, uintptr_t dec, uintptr_t pre) {
             return UpdateParts{pointer<void>(pull), segments, pointer<void>(db_enc), pointer<void>(enc),
                                pointer<void>(dec), pointer<void>(pre)};
           }),
           py::arg("pull"), py::arg("segments"), py::arg("db_enc"), py::arg("enc"), py::arg("dec"), py::arg("pre"));
  py::enum_<OptimizerKind>(m, "OptimizerKind")
      .value("adam", OptimizerKind::adam)
      .value("adamw", OptimizerKind::adamw)
      .value("lion", OptimizerKind::lion)
      .value("signsgd", OptimizerKind::signsgd);
  py::class_<OptimizerArgs>(m, "OptimizerArgs")
      .def(py::init([](OptimizerKind kind, double lr, double step_size, double root2, double beta1, double beta2, double eps,
                       double kept) { return OptimizerArgs{kind, lr, step_size, root2, beta1, beta2, eps, kept}; }),
           py::arg("kind"), py::arg("lr"), py::arg("step_size"), py::arg("root2"), py::arg("beta1"), py::arg("beta2"),
           py::arg("eps"), py::arg("kept"));
  py::enum_<Stored>(m, "Stored").value("wide", Stored::wide).value("bf16", Stored::bf16).value("fp8", Stored::fp8);
  py::class_<Parameter>(m, "Parameter")
      .def(py::init([](uintptr_t data, uintptr_t moment1, uintptr_t moment2, uintptr_t scales1, uintptr_t scales2,
                       Stored stored, uint32_t stream) {
             return Parameter{pointer<void>(data), pointer<void>(moment1), pointer<void>(moment2), pointer<float>(scales1),
                              pointer<float>(scales2), stored, stream};
           }),
           py::arg("data"), py::arg("m"), py::arg("v"), py::arg("m_scales"), py::arg("v_scales"), py::arg("stored"),
           py::arg("stream"));
  m.def("update_latents",
        [](const Parameter& W_enc, const Parameter& W_dec, const Parameter& b_enc, const Parameter& b_dec, int64_t latents,
           int64_t d_in, int64_t d_out, Dtype dtype, std::vector<UpdateTerm> terms, const UpdateParts& parts,
           const OptimizerArgs& optimizer, double clip_rows, double grad_scale, bool unit_norm, bool pre_bias,
           bool norms_only, uint32_t seed, int64_t step, const Screen& screen, int threads, uintptr_t stats) {
          ops().update_latents({W_enc, W_dec, b_enc, b_dec, latents, d_in, d_out, dtype, std::move(terms), parts, optimizer,
                                clip_rows, grad_scale, unit_norm, pre_bias, norms_only, seed, step, screen, threads,
                                pointer<double>(stats)});
        },
        py::arg("W_enc"), py::arg("W_dec"), py::arg("b_enc"), py::arg("b_dec"), py::arg("latents"), py::arg("d_in"),
        py::arg("d_out"), py::arg("dtype"), py::arg("terms"), py::arg("parts"), py::arg("optimizer"), py::arg("clip_rows"),
        py::arg("grad_scale"), py::arg("unit_norm"), py::arg("pre_bias"), py::arg("norms_only"), py::arg("seed"),
        py::arg("step"), py::arg("screen"), py::arg("threads"), py::arg("stats"), release_gil());

  m.def("isa", [] { return std::string(ops().name); }, "The instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Ops* const* t = all_ops; *t; ++t)
      if (isa_supported((*t)->name)) names.emplace_back((*t)->name);
    return names;
  }, "The instruction sets of this processor that the build has code for, fastest first.");
  m.def("use_isa", [](const std::string& name) { use_isa(name.c_str()); }, "Switch; for tests and measurements.");
}
