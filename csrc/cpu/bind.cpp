// The Python face of the CPU ops. No torch header is needed: a tensor comes as Numbers, an address with the size and the dtype
// of what lies there. fastsae/backends/cpu/memory.py makes them. given.h checks all that Python hands over, for every call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "given.h"

namespace py = pybind11;
using namespace fastsae;
using release_gil = py::call_guard<py::gil_scoped_release>;

// A struct keeps alive, in Python, all that it was made of: down to the tensors that own the memory of its Numbers.
template <class T, class Init, size_t... I, class... Names>
void define(py::class_<T>& type, Init&& init, std::index_sequence<I...>, const Names&... names) {
  type.def(std::forward<Init>(init), names..., py::keep_alive<1, I + 2>()...);
}
template <class T, class Init, class... Names> void made_of(py::class_<T>& type, Init&& init, const Names&... names) {
  define(type, std::forward<Init>(init), std::index_sequence_for<Names...>(), names...);
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastsae's CPU ops on raw memory; use fastsae.ops instead";
  m.attr("sources") = FASTSAE_SOURCES;  // their digest: fastsae/backends/extension.py

  py::enum_<Kind>(m, "Dtype")
      .value("f32", Kind::f32)
      .value("bf16", Kind::bf16)
      .value("f64", Kind::f64)
      .value("i32", Kind::i32)
      .value("i64", Kind::i64)
      .value("fp8", Kind::fp8);
  py::class_<Numbers> numbers_type(m, "Numbers");
  made_of(numbers_type, py::init([](uintptr_t address, int64_t count, Kind kind, const py::object&) {
            return Numbers(address, count, kind);
          }),
          py::arg("address"), py::arg("count"), py::arg("dtype"), py::arg("owner") = py::none());

  py::class_<Matrix> matrix_type(m, "Matrix");
  made_of(matrix_type, py::init(&matrix), py::arg("data"), py::arg("rows"), py::arg("cols"), py::arg("stride"));

  py::class_<Codes> codes_type(m, "Codes");
  made_of(codes_type, py::init(&codes), py::arg("acts"), py::arg("indices"), py::arg("offsets"), py::arg("n"), py::arg("k"),
          py::arg("d_sae"));
  codes_type.def_readonly("n", &Codes::n).def_readonly("slots", &Codes::slots).def_readonly("d_sae", &Codes::d_sae);

  py::class_<Order> order_type(m, "LatentOrder");
  made_of(order_type, py::init<const Numbers&, const Numbers&, const Numbers&>(), py::arg("offsets"), py::arg("tokens"),
          py::arg("slots"));

  m.def("decode",
        [](const Codes& c, const Matrix& W, const Matrix& out, int threads) {
          threads_fit(threads), codes_inside(c);
          matrix_fits("W", W, c.d_sae, W.cols, c.dtype), written_fits("out", out, c.n, W.cols, c.dtype);
          ops().decode(c, W, out, threads);
        },
        release_gil());
  m.def("active_dot",
        [](const Matrix& x, const Codes& c, const Matrix& W, const Numbers& out, int threads) {
          threads_fit(threads), codes_inside(c);
          matrix_fits("W", W, c.d_sae, W.cols, c.dtype), matrix_fits("x", x, c.n, W.cols, c.dtype);
          ops().active_dot(x, c, W, take("out", out, c.slots, kind_of(c.dtype)), threads);
        },
        release_gil());
  m.def("active_outer",
        [](const Codes& c, const Order& order, const Matrix& x, const Matrix& out, int threads) {
          threads_fit(threads), codes_inside(c), order_is_of(c, order);
          matrix_fits("x", x, c.n, out.cols, c.dtype), written_fits("out", out, c.d_sae, out.cols, c.dtype);
          ops().active_outer(c, order.plain, x, out, threads);
        },
        release_gil());
  m.def("by_latent",
        [](const Codes& c, Order& out, int threads) {
          threads_fit(threads), codes_inside(c), order_fits(c, out);
          by_latent(c, out.plain, threads);
          out.sorted = c.indices;
        },
        release_gil());

  m.def("digest",
        [](const Matrix& W, int threads) {
          threads_fit(threads);
          const Digest d = ops().digest(W, threads);
          return std::make_pair(d.sum, d.products);
        },
        release_gil(), "Two numbers that tell one matrix from another.");

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

  py::class_<Screen> screen_type(m, "Screen");
  made_of(screen_type, py::init(&screen), py::arg("words"), py::arg("tables"), py::arg("factors"), py::arg("format"),
          py::arg("latents"), py::arg("d"));
  screen_type.def_readonly("latents", &Screen::latents);
  m.def("prepare_screen",
        [](const Matrix& W, const Maybe& rows, const Screen& out, int threads) {
          threads_fit(threads);
          if (out.blocks && out.is_absent()) refuse("a screen", "no memory", "some");
          ops().prepare_screen(W, rows_of_screen(W, rows, out), out, threads);
        },
        release_gil());

  py::class_<EncodeArgs> encode_type(m, "EncodeArgs");
  made_of(encode_type, py::init(&encode_args), py::arg("x"), py::arg("W"), py::arg("bias"), py::arg("scale"), py::arg("rows"),
          py::arg("index_offset"), py::arg("k"), py::arg("rescore"), py::arg("redo"), py::arg("screen"), py::arg("threads"));
  m.def("encode_topk",
        [](const EncodeArgs& a, const Numbers& acts, const Numbers& indices) {
          const int64_t size = product("k", a.x.rows, a.k);
          const TopkCounts c = ops().encode_topk(a, {take<float>("acts", acts, size), take<int32_t>("indices", indices, size)});
          return std::make_pair(c.redone, c.rivals);
        },
        release_gil(), "How many tokens were redone, and how many latents beyond the K best were scored.");

  const auto ragged = [](const EncodeArgs& a, const Numbers& acts, const Numbers& indices, const Numbers& offsets) {
    return RaggedCodes{take<float>("acts", acts, acts.count), take<int32_t>("indices", indices, acts.count),
                       take<int64_t>("offsets", offsets, a.x.rows + 1), acts.count};
  };
  m.def("encode_above",
        [ragged](const EncodeArgs& a, const Maybe& per_latent, const Maybe& per_token, const Numbers& acts,
                 const Numbers& indices, const Numbers& offsets) {
          if (per_latent.has_value() == per_token.has_value()) refuse("thresholds", "none or both", "per latent or per token");
          const AboveCounts c = ops().encode_above(a, take<float>("threshold", per_latent, a.row_count),
                                                   take<float>("threshold", per_token, a.x.rows),
                                                   ragged(a, acts, indices, offsets));
          return std::make_tuple(c.above, c.redone, c.candidates);
        },
        release_gil(), "How many latents are above, tokens scored in full, and latents scored in fp32 of the other tokens.");
  m.def("encode_batch_topk",
        [ragged](const EncodeArgs& a, const Numbers& acts, const Numbers& indices, const Numbers& offsets) {
          fits("the size of acts", acts.count, product("k", a.x.rows, a.k));
          return ops().encode_batch_topk(a, ragged(a, acts, indices, offsets));
        },
        release_gil(), "The number of tokens that were redone.");

  py::class_<UpdateTerm> term_type(m, "UpdateTerm");
  made_of(term_type, py::init([](const Codes& c, const Order& order, const Matrix& x, const Matrix& grad, const Maybe& dacts,
                                 bool has_bias) {
            codes_inside(c), order_is_of(c, order);
            return term(c, order, x, grad, dacts, has_bias);
          }),
          py::arg("codes"), py::arg("order"), py::arg("x"), py::arg("grad"), py::arg("dacts"), py::arg("has_bias"));
  py::class_<GivenParts> parts_type(m, "UpdateParts");
  made_of(parts_type, py::init<Maybe, int64_t, Maybe, Maybe, Maybe, Maybe>(), py::arg("pull"), py::arg("segments"),
          py::arg("db_enc"), py::arg("enc"), py::arg("dec"), py::arg("pre"));
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
  py::class_<GivenParameter> parameter_type(m, "Parameter");
  made_of(parameter_type, py::init<Maybe, Maybe, Maybe, Maybe, Maybe, uint32_t, uint32_t>(), py::arg("data"), py::arg("m"),
          py::arg("v"), py::arg("m_scales"), py::arg("v_scales"), py::arg("stream"), py::arg("before"));
  m.def("update_latents",
        [](const std::optional<GivenParameter>& W_enc, const GivenParameter& W_dec, const GivenParameter& b_enc,
           const GivenParameter& b_dec, int64_t latents, int64_t d_in, int64_t d_out, const std::vector<UpdateTerm>& terms,
           const GivenParts& given, const OptimizerArgs& optimizer, double clip_rows, double grad_scale, bool unit_norm,
           bool pre_bias, bool norms_only, uint32_t seed, int64_t step, const Screen& screen, int threads,
           const Numbers& stats) {
          if (!W_dec.data) refuse("W_dec", "no memory", "some");
          const Dtype dtype = dtype_of("W_dec", *W_dec.data);
          const auto one = [&](const char* what, const GivenParameter& p, int64_t rows, int64_t cols, bool is_dictionary) {
            return parameter(what, p, rows, cols, dtype, optimizer.kind, is_dictionary);
          };
          const UpdateArgs args{W_enc ? one("W_enc", *W_enc, latents, d_in, true) : Parameter{},
                                one("W_dec", W_dec, latents, d_out, true), one("b_enc", b_enc, 1, latents, false),
                                one("b_dec", b_dec, 1, d_out, false), !W_enc, latents, d_in, d_out, dtype, terms,
                                parts(given, latents, d_in, d_out, accumulation(dtype)), optimizer, clip_rows, grad_scale,
                                unit_norm, pre_bias, norms_only, seed, step, screen, threads,
                                take<double>("stats", stats, 4)};
          update_fits(args);
          ops().update_latents(args);
        },
        py::arg("W_enc"), py::arg("W_dec"), py::arg("b_enc"), py::arg("b_dec"), py::arg("latents"), py::arg("d_in"),
        py::arg("d_out"), py::arg("terms"), py::arg("parts"), py::arg("optimizer"), py::arg("clip_rows"),
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
