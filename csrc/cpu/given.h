// What Python hands over, and the checks that every entry of bind.cpp makes of it before a kernel gets a pointer.
//
// Numbers is memory as Python made it: an address, how many numbers lie there, and of which dtype. A kernel gets a pointer
// only from `take`, which is told how many numbers of which dtype the kernel will use. So a buffer that Python made too short,
// or of another dtype, is an exception and never a write past its end. Sizes come from outside too: each is checked for its
// range before it is multiplied. Values that are used as indices are read once and checked (codes, rows, an order).
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "encode.h"
#include "ops.h"
#include "update.h"

namespace fastsae {

enum class Kind : int32_t { f32, bf16, f64, i32, i64, fp8 };

inline const char* name_of(Kind kind) {
  static const char* const names[] = {"float32", "bfloat16", "float64", "int32", "int64", "float8_e4m3fn"};
  return names[int(kind)];
}

inline uint64_t size_of(Kind kind) {
  static const uint64_t sizes[] = {4, 2, 8, 4, 8, 1};
  return sizes[int(kind)];
}

constexpr int64_t kMost = std::numeric_limits<int64_t>::max(), kMostInt32 = std::numeric_limits<int32_t>::max();

inline void refuse(const std::string& what, const std::string& got, const std::string& expected) {
  throw std::invalid_argument("the CPU extension was called with " + what + " = " + got + ", expected " + expected);
}

inline void fits(const char* what, int64_t got, int64_t expected) {
  if (got != expected) refuse(what, std::to_string(got), std::to_string(expected));
}

inline void in_range(const char* what, int64_t got, int64_t least, int64_t most) {
  if (got < least || got > most) refuse(what, std::to_string(got), std::to_string(least) + " to " + std::to_string(most));
}

inline void fits(const char* what, Kind got, Kind expected) {
  if (got != expected) refuse(std::string("the dtype of ") + what, name_of(got), name_of(expected));
}

// rows · cols: neither is negative, and the product of them and of 8 bytes fits int64.
inline int64_t product(const char* what, int64_t rows, int64_t cols) {
  in_range(what, rows, 0, kMost / 8), in_range(what, cols, 0, rows ? kMost / 8 / rows : kMost / 8);
  return rows * cols;
}

struct Numbers {
  void* data;
  int64_t count;
  Kind kind;

  Numbers(uintptr_t address, int64_t count_, Kind kind_) : data(reinterpret_cast<void*>(address)), count(count_), kind(kind_) {
    in_range("the size of a tensor", count, 0, kMost / 8);
    if (count && (!address || address % size_of(kind)))
      refuse("the address of a tensor", std::to_string(address), "a multiple of its element size, not 0");
  }
};
using Maybe = std::optional<Numbers>;

template <class T> struct KindOf;
template <> struct KindOf<float> { static constexpr Kind value = Kind::f32; };
template <> struct KindOf<double> { static constexpr Kind value = Kind::f64; };
template <> struct KindOf<int32_t> { static constexpr Kind value = Kind::i32; };
template <> struct KindOf<uint32_t> { static constexpr Kind value = Kind::i32; };
template <> struct KindOf<int64_t> { static constexpr Kind value = Kind::i64; };

// The pointer to exactly `count` numbers of this kind.
inline void* take(const char* what, const Numbers& given, int64_t count, Kind kind) {
  fits(what, given.kind, kind);
  if (given.count != count) fits((std::string("the size of ") + what).c_str(), given.count, count);
  return given.data;
}
template <class T> T* take(const char* what, const Numbers& given, int64_t count) {
  return static_cast<T*>(take(what, given, count, KindOf<T>::value));
}
template <class T> T* take(const char* what, const Maybe& given, int64_t count) {
  return given ? take<T>(what, *given, count) : nullptr;
}

inline Dtype dtype_of(const char* what, const Numbers& given) {
  switch (given.kind) {
    case Kind::f32: return Dtype::f32;
    case Kind::bf16: return Dtype::bf16;
    case Kind::f64: return Dtype::f64;
    default: refuse(std::string("the dtype of ") + what, name_of(given.kind), "float32, bfloat16 or float64");
  }
  throw std::logic_error("unreachable");
}

inline Kind kind_of(Dtype dtype) { return dtype == Dtype::f32 ? Kind::f32 : dtype == Dtype::bf16 ? Kind::bf16 : Kind::f64; }
// In which sums over a dtype are computed.
inline Kind accumulation(Dtype dtype) { return dtype == Dtype::f64 ? Kind::f64 : Kind::f32; }

inline void threads_fit(int threads) { in_range("threads", threads, 1, kMostInt32); }

// -- matrices and codes ------------------------------------------------------------------------------------------------

inline Matrix matrix(const Numbers& given, int64_t rows, int64_t cols, int64_t stride) {
  product("the shape of a matrix", rows, cols);
  in_range("the stride of a matrix", stride, 0, rows > 1 && cols ? (kMost / 8 - cols) / (rows - 1) : kMost);
  fits("the size of a matrix", given.count, rows && cols ? (rows - 1) * stride + cols : 0);
  return {given.data, rows, cols, stride, dtype_of("a matrix", given)};
}

inline void fits(const char* what, Dtype got, Dtype expected) { fits(what, kind_of(got), kind_of(expected)); }

inline void matrix_fits(const char* what, const Matrix& m, int64_t rows, int64_t cols, Dtype dtype) {
  fits(what, m.dtype, dtype);
  if (m.rows == rows && m.cols == cols) return;
  const auto shape = [](int64_t r, int64_t c) { return "(" + std::to_string(r) + ", " + std::to_string(c) + ")"; };
  refuse(std::string("the shape of ") + what, shape(m.rows, m.cols), shape(rows, cols));
}

// A matrix to write to: no two of its rows share memory.
inline void written_fits(const char* what, const Matrix& m, int64_t rows, int64_t cols, Dtype dtype) {
  matrix_fits(what, m, rows, cols, dtype);
  if (m.rows > 1) in_range("the stride of a matrix to write to", m.stride, m.cols, kMost);
}

inline Codes codes(const Numbers& acts, const Numbers& indices, const Maybe& offsets, int64_t n, int64_t k, int64_t d_sae) {
  in_range("tokens", n, 0, kMostInt32), in_range("latents", d_sae, 0, kMostInt32);
  if (!offsets) fits("the size of acts", acts.count, product("slots of a token", n, k));
  return {acts.data, take<int32_t>("indices", indices, acts.count), take<int64_t>("offsets", offsets, n + 1), n, k, d_sae,
          dtype_of("acts", acts), acts.count};
}

// Every slot that a kernel visits is one of the code's, and names a latent of its dictionary.
inline void codes_inside(const Codes& c) {
  int64_t begin = 0, end = c.slots;
  if (c.offsets) {
    begin = c.offsets[0], end = c.offsets[c.n];
    bool rising = begin >= 0 && end <= c.slots;
    for (int64_t n = 0; n < c.n; ++n) rising &= c.offsets[n] <= c.offsets[n + 1];
    if (!rising)
      refuse("offsets", std::to_string(begin) + " to " + std::to_string(end), "to rise from 0 to at most " + std::to_string(c.slots));
  }
  const uint32_t latents = uint32_t(c.d_sae);
  bool outside = false;
  for (int64_t s = begin; s < end; ++s) outside |= uint32_t(c.indices[s]) >= latents;
  for (int64_t s = begin; outside && s < end; ++s) in_range("an index of a code", c.indices[s], 0, c.d_sae - 1);
}

// -- a code in latent order --------------------------------------------------------------------------------------------

// With the sizes of its memory, and the code whose order by_latent wrote there.
struct Order {
  LatentOrder plain;
  int64_t latents, entries;
  const void* sorted = nullptr;   // that code's indices; null: the order comes from elsewhere

  Order(const Numbers& offsets, const Numbers& tokens, const Numbers& slots)
      : latents(offsets.count - 1), entries(slots.count) {
    in_range("the offsets of an order", offsets.count, 1, kMostInt32 + int64_t(1));
    plain = {take<int64_t>("the offsets of an order", offsets, offsets.count),
             take<int32_t>("the tokens of an order", tokens, entries), take<int64_t>("the slots of an order", slots, entries)};
  }
};

inline void order_fits(const Codes& c, const Order& o) {
  fits("the latents of an order", o.latents, c.d_sae), fits("the slots of an order", o.entries, c.slots);
}

inline bool is_empty(const Codes& c, int64_t slot) {
  switch (c.dtype) {
    case Dtype::f32: return static_cast<const float*>(c.acts)[slot] == 0;
    case Dtype::f64: return static_cast<const double*>(c.acts)[slot] == 0;
    case Dtype::bf16: return (static_cast<const uint16_t*>(c.acts)[slot] & 0x7fff) == 0;
  }
  return true;
}

// Each entry is a slot of the code that lies with this latent and this token, none comes twice, and none is missing that
// adds anything. An order from elsewhere may be of another code of the same size. It may list empty slots too: an order of
// acts serves their gradients, some of which are 0.
inline bool is_order_of(const Codes& c, const LatentOrder& o, int64_t entries) {
  if (o.offsets[0] || o.offsets[c.d_sae] > entries) return false;
  for (int64_t i = 0; i < c.d_sae; ++i)
    if (o.offsets[i] > o.offsets[i + 1]) return false;
  int64_t missing = c.offsets ? c.offsets[c.n] - c.offsets[0] : 0;
  for (int64_t s = 0; !c.offsets && s < c.slots; ++s) missing += !is_empty(c, s);
  for (int64_t i = 0; i < c.d_sae; ++i)
    for (int64_t e = o.offsets[i]; e < o.offsets[i + 1]; ++e) {
      const int64_t n = o.tokens[e], s = o.slots[e];
      if (n < 0 || n >= c.n || s < c.begin(n) || s >= c.end(n) || c.indices[s] != i) return false;
      if (e > o.offsets[i] && s <= o.slots[e - 1]) return false;
      missing -= c.offsets || !is_empty(c, s);
    }
  return missing == 0;
}

inline void order_is_of(const Codes& c, const Order& o) {
  order_fits(c, o);
  if (o.sorted == c.indices && c.indices) return;
  if (!is_order_of(c, o.plain, o.entries))
    throw std::invalid_argument("by_latent is not the order of this code; it was made of another one: use ops.by_latent(codes)");
}

// -- the encoders ------------------------------------------------------------------------------------------------------

// Neither words nor tables: no narrow copy.
inline Screen screen(const Maybe& words, const Maybe& tables, const Maybe& factors, Format format, int64_t latents, int64_t d) {
  in_range("format of the screen", int64_t(format), int64_t(Format::f32), int64_t(Format::amx_emulated));
  in_range("latents of the screen", latents, 0, kMostInt32), in_range("columns of the screen", d, 0, kMostInt32);
  const int64_t blocks = blocks_of(latents), positions = blocks * kLanes, width = words_per_row(format, d);
  if (tables.has_value() != words.has_value()) refuse("a screen", "words or tables", "both or neither");
  const int64_t size = format == Format::f32 ? 0 : product("words of the screen", positions, width);
  float* table = take<float>("the tables of the screen", tables, 3 * positions);
  uint32_t* packed = take<uint32_t>("the words of the screen", words, size);
  const float* basis = take<float>("the factors of the screen", factors, 2 * d);
  if (!table) return {packed, nullptr, nullptr, nullptr, nullptr, format, latents, d, blocks, width};
  return {packed, table, table + positions, table + 2 * positions, basis, format, latents, d, blocks, width};
}

// rows: whether a list of latents is given; then there is one for each latent of the screen.
inline const int32_t* rows_of_screen(const Matrix& W, const Maybe& rows, const Screen& s) {
  fits("columns of the screen", s.d, W.cols);
  in_range("latents of W", W.rows, 0, kMostInt32), in_range("latents of the screen", s.latents, 0, W.rows);
  if (W.dtype == Dtype::f64) refuse("the dtype of W", "float64", "float32 or bfloat16");
  if (!rows) return fits("latents of the screen", s.latents, W.rows), nullptr;
  const int32_t* given = take<int32_t>("rows", rows, s.latents);
  for (int64_t i = 0; i < s.latents; ++i) in_range("a latent in rows", given[i], 0, W.rows - 1);
  return given;
}

inline EncodeArgs encode_args(const Matrix& x, const Matrix& W, const Numbers& bias, const Maybe& scale, const Maybe& rows,
                              int64_t index_offset, int64_t k, bool rescore, bool redo, const Screen& s, int threads) {
  threads_fit(threads);
  const int32_t* given = rows_of_screen(W, rows, s);
  in_range("tokens", x.rows, 0, kMostInt32), matrix_fits("x", x, x.rows, W.cols, W.dtype);
  in_range("index_offset", index_offset, 0, kMostInt32 - W.rows);
  in_range("k", k, 0, kMostInt32);
  // A row with a norm past fp32 has no screened score (screen.cpp), so a call that would trust it alone may not.
  const int64_t positions = s.is_absent() ? 0 : s.blocks * kLanes;
  const bool screened = std::all_of(s.norm, s.norm + positions, [](float norm) { return std::isfinite(norm); });
  return {x, W, take<float>("b", bias, W.rows), take<float>("scale", scale, W.rows), given, s.latents, index_offset, k,
          rescore || !screened, redo, s, threads};
}

// -- the update --------------------------------------------------------------------------------------------------------

struct GivenParameter {
  Maybe data, m, v, m_scales, v_scales;
  uint32_t stream, before;
};

// rows and cols: of a dictionary; a bias is one row.
inline Parameter parameter(const char* what, const GivenParameter& g, int64_t rows, int64_t cols, Dtype dtype,
                           OptimizerKind kind, bool is_dictionary) {
  const bool has_v = kind == OptimizerKind::adam || kind == OptimizerKind::adamw, has_m = has_v || kind == OptimizerKind::lion;
  if (!g.data || g.m.has_value() != has_m || g.v.has_value() != has_v)
    refuse(std::string("the memory of ") + what, "another number of tensors", "the parameter and its optimizer's moments");
  const int64_t count = product(what, rows, cols), scales = rows * ((cols + 127) / 128);
  const Kind kept = has_m ? g.m->kind : accumulation(dtype);
  const bool eight = kept == Kind::fp8;
  if (kept != accumulation(dtype) && kept != Kind::bf16 && !(eight && has_v && is_dictionary))
    refuse(std::string("the dtype of a moment of ") + what, name_of(kept), name_of(accumulation(dtype)));
  if (g.m_scales.has_value() != eight || g.v_scales.has_value() != eight)
    refuse(std::string("the scales of ") + what, "another number of tensors", eight ? "two" : "none");
  const auto moment = [&](const Maybe& t) { return t ? take(what, *t, count, kept) : nullptr; };
  return {take(what, *g.data, count, kind_of(dtype)), moment(g.m), moment(g.v),
          take<float>("the scales of a moment", g.m_scales, scales), take<float>("the scales of a moment", g.v_scales, scales),
          eight ? Stored::fp8 : kept == Kind::bf16 ? Stored::bf16 : Stored::wide, g.stream,
          g.before};
}

struct GivenParts {
  Maybe pull;
  int64_t segments;
  Maybe db_enc, enc, dec, pre;
};

inline UpdateParts parts(const GivenParts& g, int64_t latents, int64_t d_in, int64_t d_out, Kind kind) {
  const auto place = [&](const char* what, const Maybe& t, int64_t rows, int64_t cols) {
    return t ? take(what, *t, product(what, rows, cols), kind) : nullptr;
  };
  in_range("segments", g.segments, 1, std::max<int64_t>(1, d_out));
  if (g.pull) fits("width of W_dec past whole segments", d_out % g.segments, 0);
  return {place("decoder_pull", g.pull, latents, g.segments), g.segments, place("db_enc", g.db_enc, latents, 1),
          place("dW_enc", g.enc, latents, d_in), place("dW_dec", g.dec, latents, d_out), place("dpre", g.pre, latents, 1)};
}

inline UpdateTerm term(const Codes& c, const Order& o, const Matrix& x, const Matrix& grad, const Maybe& dacts, bool has_bias) {
  return {c, o.plain, x, grad, dacts ? take("dacts", *dacts, c.slots, accumulation(c.dtype)) : nullptr, has_bias};
}

inline void update_fits(const UpdateArgs& a) {
  threads_fit(a.threads);
  in_range("latents", a.latents, 0, kMostInt32);
  const Dtype wide = a.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  for (const UpdateTerm& t : a.terms) {
    fits("latents of a term", t.codes.d_sae, a.latents), fits("a term's acts", t.codes.dtype, a.dtype);
    matrix_fits("a term's x", t.x, t.codes.n, a.d_in, wide), matrix_fits("a term's grad", t.grad, t.codes.n, a.d_out, wide);
  }
  fits("latents of the screen", a.screen.latents, a.latents), fits("columns of the screen", a.screen.d, a.d_in);
  if (a.screen.scale && wide == Dtype::f64) refuse("a screen", "a narrow copy", "none of float64 weights");
  if (a.pre_bias || a.tied) fits("width of a tied encoder, or of one with pre_bias", a.d_in, a.d_out);
}

}  // namespace fastsae
