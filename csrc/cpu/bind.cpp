// The Python face of the CPU ops: memory comes as integers (torch's data_ptr()), so no torch header is needed.
// fastsae/backends/cpu/memory.py is where they are made: each address has the dtype and the size that its struct says. What
// an op is told by several structs must fit together, and that is checked here, so that no kernel reads or writes past one
// of them. Not checked: the latents in a code, the rows of a screen, an order of latents (fastsae/ops/checks.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "encode.h"
#include "ops.h"
#include "update.h"

namespace py = pybind11;
using namespace fastsae;
using release_gil = py::call_guard<py::gil_scoped_release>;

template <class T> static T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

static void fits(const char* what, int64_t got, int64_t expected) {
  if (got != expected)
    throw std::invalid_argument("the CPU extension was called with " + std::string(what) + " = " + std::to_string(got) +
                                ", expected " + std::to_string(expected));
}

static void in_range(const char* what, int64_t got, int64_t least, int64_t most) {
  if (got < least || got > most)
    throw std::invalid_argument("the CPU extension was called with " + std::string(what) + " = " + std::to_string(got) +
                                ", expected " + std::to_string(least) + " to " + std::to_string(most));
}

static void fits(const char* what, Dtype got, Dtype expected) { fits(what, int64_t(got), int64_t(expected)); }

constexpr int64_t kMost = std::numeric_limits<int64_t>::max(), kMostInt32 = std::numeric_limits<int32_t>::max();

// Sizes whose product indexes memory: none is negative, and the product fits int64.
static void countable(const char* what, int64_t rows, int64_t cols) {
  in_range(what, rows, 0, kMost);
  in_range(what, cols, 0, rows ? kMost / 8 / rows : kMost);
}

static void matrix_fits(const Matrix& m, const char* rows, int64_t expected_rows, const char* cols, int64_t expected_cols) {
  fits(rows, m.rows, expected_rows);
  fits(cols, m.cols, expected_cols);
}

static void threads_fit(int threads) { in_range("threads", threads, 1, kMostInt32); }

static Dtype accumulation(Dtype t) { return t == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

static void decode_fits(const Codes& c, const Matrix& W, const Matrix& out, int threads) {
  threads_fit(threads);
  matrix_fits(out, "rows of out", c.n, "columns of out", W.cols);
  fits("rows of W", W.rows, c.d_sae);
  fits("dtype of acts", c.dtype, W.dtype), fits("dtype of out", out.dtype, W.dtype);
}

static void dot_fits(const Matrix& x, const Codes& c, const Matrix& W, int threads) {
  threads_fit(threads);
  matrix_fits(x, "rows of x", c.n, "columns of x", W.cols);
  fits("rows of W", W.rows, c.d_sae);
  fits("dtype of acts", c.dtype, W.dtype), fits("dtype of x", x.dtype, W.dtype);
}

static void outer_fits(const Codes& c, const Matrix& x, const Matrix& out, int threads) {
  threads_fit(threads);
  fits("rows of x", x.rows, c.n);
  matrix_fits(out, "rows of out", c.d_sae, "columns of out", x.cols);
  fits("dtype of acts", c.dtype, x.dtype), fits("dtype of out", out.dtype, x.dtype);
}

// rows: whether a list of latents is given; then there is one for each latent of the screen.
static void screen_fits(const Matrix& W, bool rows, const Screen& s) {
  fits("columns of the screen", s.d, W.cols);
  if (!rows && s.latents) fits("latents of the screen", s.latents, W.rows);  // a list of none has no address either
  in_range("latents of the screen", s.latents, 0, W.rows);
  in_range("dtype of W", int64_t(W.dtype), int64_t(Dtype::f32), int64_t(Dtype::bf16));
}

static void encode_fits(const EncodeArgs& a) {
  threads_fit(a.threads);
  screen_fits(a.W, a.rows != nullptr, a.screen);
  fits("rows to consider", a.row_count, a.screen.latents);
  fits("columns of x", a.x.cols, a.W.cols), fits("dtype of x", a.x.dtype, a.W.dtype);
  in_range("tokens", a.x.rows, 0, kMostInt32), in_range("latents", a.W.rows, 0, kMostInt32);
  in_range("index_offset", a.index_offset, 0, kMostInt32 - a.W.rows);
  countable("k", a.x.rows, a.k);
}

static void update_fits(const UpdateArgs& a) {
  threads_fit(a.threads);
  countable("width of W_enc", a.latents, a.d_in), countable("width of W_dec", a.latents, a.d_out);
  for (const UpdateTerm& t : a.terms) {
    fits("latents of a term", t.codes.d_sae, a.latents), fits("dtype of a term's acts", t.codes.dtype, a.dtype);
    matrix_fits(t.x, "rows of x", t.codes.n, "columns of x", a.d_in);
    matrix_fits(t.grad, "rows of grad", t.codes.n, "columns of grad", a.d_out);
    fits("dtype of x", t.x.dtype, accumulation(a.dtype)), fits("dtype of grad", t.grad.dtype, accumulation(a.dtype));
  }
  fits("latents of the screen", a.screen.latents, a.latents), fits("columns of the screen", a.screen.d, a.d_in);
  const bool tied = !a.W_enc.data && a.latents && a.d_in;  // memory of no numbers has no address either
  if (a.pre_bias || tied) fits("width of a tied encoder, or of one with pre_bias", a.d_in, a.d_out);
  in_range("segments", a.parts.segments, 1, kMost);
  if (a.parts.pull) fits("width of W_dec past whole segments", a.d_out % a.parts.segments, 0);
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastsae's CPU ops on raw memory; use fastsae.ops instead";

  py::enum_<Dtype>(m, "Dtype").value("f32", Dtype::f32).value("bf16", Dtype::bf16).value("f64", Dtype::f64);

  py::class_<Matrix>(m, "Matrix")
      .def(py::init([](uintptr_t data, int64_t rows, int64_t cols, int64_t stride, Dtype dtype) {
             countable("columns of a matrix", rows, cols);
             return Matrix{pointer<void>(data), rows, cols, stride, dtype};
           }),
           py::arg("data"), py::arg("rows"), py::arg("cols"), py::arg("stride"), py::arg("dtype"));

  py::class_<Codes>(m, "Codes")
      .def(py::init([](uintptr_t acts, uintptr_t indices, uintptr_t offsets, int64_t n, int64_t k, int64_t slots,
                       int64_t d_sae, Dtype dtype) {
             in_range("tokens", n, 0, kMostInt32), in_range("latents", d_sae, 0, kMostInt32);
             countable("slots of a token", n, k), in_range("slots", slots, 0, kMost);
             if (!offsets) fits("slots", slots, n * k);
             return Codes{pointer<void>(acts), pointer<int32_t>(indices), pointer<int64_t>(offsets), n, k, d_sae, dtype, slots};
           }),
           py::arg("acts"), py::arg("indices"), py::arg("offsets"), py::arg("n"), py::arg("k"), py::arg("slots"),
           py::arg("d_sae"), py::arg("dtype"))
      .def_readonly("n", &Codes::n)
      .def_readonly("slots", &Codes::slots)
      .def_readonly("d_sae", &Codes::d_sae);

  py::class_<LatentOrder>(m, "LatentOrder")
      .def(py::init([](uintptr_t offsets, uintptr_t tokens, uintptr_t slots) {
             return LatentOrder{pointer<int64_t>(offsets), pointer<int32_t>(tokens), pointer<int64_t>(slots)};
           }),
           py::arg("offsets"), py::arg("tokens"), py::arg("slots"));

  m.def("decode",
        [](const Codes& c, const Matrix& W, const Matrix& out, int threads) {
          decode_fits(c, W, out, threads);
          ops().decode(c, W, out, threads);
        },
        release_gil());
  m.def("active_dot",
        [](const Matrix& x, const Codes& c, const Matrix& W, uintptr_t out, int threads) {
          dot_fits(x, c, W, threads);
          ops().active_dot(x, c, W, pointer<void>(out), threads);
        },
        release_gil());
  m.def("active_outer",
        [](const Codes& c, const LatentOrder& order, const Matrix& x, const Matrix& out, int threads) {
          outer_fits(c, x, out, threads);
          ops().active_outer(c, order, x, out, threads);
        },
        release_gil());
  m.def("by_latent",
        [](const Codes& c, const LatentOrder& out, int threads) {
          threads_fit(threads);
          by_latent(c, out, threads);
        },
        release_gil());

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
             in_range("format of the screen", int64_t(format), int64_t(Format::f32), int64_t(Format::amx_emulated));
             in_range("latents of the screen", latents, 0, kMostInt32), in_range("columns of the screen", d, 0, kMostInt32);
             return Screen{pointer<uint32_t>(words), pointer<float>(scale), pointer<float>(norm), pointer<float>(residual),
                           format, latents, d, blocks_of(latents), words_per_row(format, d)};
           }),
           py::arg("words"), py::arg("scale"), py::arg("norm"), py::arg("residual"), py::arg("format"),
           py::arg("latents"), py::arg("d"))
      .def_readonly("latents", &Screen::latents);
  m.def("prepare_screen",
        [](const Matrix& W, uintptr_t rows, const Screen& out, int threads) {
          threads_fit(threads);
          screen_fits(W, rows, out);
          ops().prepare_screen(W, pointer<int32_t>(rows), out, threads);
        },
        release_gil());

  py::class_<EncodeArgs>(m, "EncodeArgs")
      .def(py::init([](const Matrix& x, const Matrix& W, uintptr_t bias, uintptr_t scale, uintptr_t rows, int64_t row_count,
                       int64_t index_offset, int64_t k, bool rescore, bool redo, const Screen& screen, int threads) {
             const EncodeArgs args{x, W, pointer<float>(bias), pointer<float>(scale), pointer<int32_t>(rows), row_count,
                                   index_offset, k, rescore, redo, screen, threads};
             encode_fits(args);
             return args;
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
        [](const EncodeArgs& args, uintptr_t acts, uintptr_t indices, uintptr_t offsets, int64_t capacity) {
          fits("capacity", capacity, args.k * args.x.rows);
          return ops().encode_batch_topk(args, {pointer<float>(acts), pointer<int32_t>(indices), pointer<int64_t>(offsets),
                                                capacity});
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
          const UpdateArgs args{W_enc, W_dec, b_enc, b_dec, latents, d_in, d_out, dtype, std::move(terms), parts, optimizer,
                                clip_rows, grad_scale, unit_norm, pre_bias, norms_only, seed, step, screen, threads,
                                pointer<double>(stats)};
          update_fits(args);
          ops().update_latents(args);
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
