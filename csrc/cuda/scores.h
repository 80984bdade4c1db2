// s = (⟨x[n], W[i]⟩ + b[i]) · gate[i]: the exact score, the same bits in every kernel that needs it; and acts that are
// stored in a dtype of their own.
#pragma once
#include "dots.h"
#include "fit.h"
#include "ops.h"

namespace fastsae {

template <class T> struct Encoder {
  const T *x, *W, *b, *gate;  // gate may be null
  int64_t latents, D;
};

inline void fit_encoder(const Array& x, const Array& W, const Array& b, const Maybe& gate = {}) {
  counted("tokens", x.rows), counted("latents", W.rows);
  fit("x", x, x.rows, W.cols), fit("b", b, W.rows), fit("gate", gate, W.rows);
}

template <class T>
Encoder<T> encoder(const Array& x, const Array& W, const Array& b, const Maybe& gate = {}) {
  return {x.as<const T>(), W.as<const T>(), b.as<const T>(), pointer<const T>(gate), W.rows, W.cols};
}

// The score of a latent whose dot is known. Addition and product are rounded one by one, so that no kernel fuses what
// another does not.
template <class T> __device__ inline float score_of(const Encoder<T>& e, int32_t latent, float dot) {
  const float s = __fadd_rn(dot, widen(e.b[latent]));
  return e.gate ? __fmul_rn(s, widen(e.gate[latent])) : s;
}

// The scores of token n for DOTS latents, known to every lane; 0 for what is no latent.
template <bool ALIGNED, class T>
__device__ inline void exact_scores(const Encoder<T>& e, int64_t n, const int32_t (&latents)[DOTS], float (&s)[DOTS]) {
  const T *rows[DOTS], *weights[DOTS];
#pragma unroll
  for (int j = 0; j < DOTS; ++j) {
    rows[j] = e.x + n * e.D;
    weights[j] = static_cast<uint32_t>(latents[j]) < e.latents ? e.W + latents[j] * e.D : nullptr;
  }
  row_dots<ALIGNED, true>(rows, weights, e.D, s);
#pragma unroll
  for (int j = 0; j < DOTS; ++j)
    if (weights[j]) s[j] = score_of(e, latents[j], s[j]);
}

// The same for several tokens, with the same bits; those that are negative are no tokens.
template <bool ALIGNED, int TOKENS, class T>
__device__ inline void exact_scores(const Encoder<T>& e, const int64_t (&tokens)[TOKENS], const int32_t (&latents)[DOTS],
                                    float (&s)[TOKENS][DOTS]) {
  const T *rows[TOKENS], *weights[DOTS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) rows[t] = tokens[t] < 0 ? nullptr : e.x + tokens[t] * e.D;
#pragma unroll
  for (int j = 0; j < DOTS; ++j)
    weights[j] = static_cast<uint32_t>(latents[j]) < e.latents ? e.W + latents[j] * e.D : nullptr;
  tile_dots<ALIGNED>(rows, weights, e.D, s);
#pragma unroll
  for (int j = 0; j < DOTS; ++j)
    if (weights[j]) {
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) s[t][j] = score_of(e, latents[j], s[t][j]);
    }
}

// Acts of a dtype that is known when a kernel runs: the switch costs nothing beside the store, and saves a kernel for
// every pair of dtypes.
struct Acts {
  void* data;
  Dtype dtype;

  __device__ float rounded(float t) const {
    return dtype == Dtype::f32 ? t : dtype == Dtype::bf16 ? widen(round_to<bf16>(t)) : widen(round_to<f16>(t));
  }
  __device__ void store(int64_t i, float t) const {
    if (dtype == Dtype::f32) static_cast<float*>(data)[i] = t;
    else if (dtype == Dtype::bf16) static_cast<bf16*>(data)[i] = round_to<bf16>(t);
    else static_cast<f16*>(data)[i] = round_to<f16>(t);
  }
};

inline Acts acts_of(const Array& a) {
  by_dtype(a.dtype, [](auto) {});  // refuses the others
  return {a.data, a.dtype};
}

}  // namespace fastsae
