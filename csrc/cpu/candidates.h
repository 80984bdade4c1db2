// Exact scores and their order, shared by the encoders. A scored latent is one 64-bit integer in the op contract's order:
// larger score first, NaN above all, ties to the lower index.
#pragma once
#include <algorithm>
#include <vector>

#include "narrow.h"
#include "screen.h"
#include "selection.h"

namespace fastsae::FASTSAE_ISA {

using Ranked = int64_t;

// Tokens whose candidates are held, and scored, together: 12 MB of fp32 x at D = 768, which stay in L3.
constexpr int64_t kAtOnce = 4096;

// The same call for the kAtOnce tokens from `first`, or those that are left.
inline EncodeArgs tokens_from(const EncodeArgs& a, int64_t first) {
  EncodeArgs part = a;
  part.x.data = static_cast<char*>(a.x.data) + first * a.x.stride * (a.x.dtype == Dtype::bf16 ? 2 : 4);
  part.x.rows = std::min(kAtOnce, a.x.rows - first);
  return part;
}

FASTSAE_INLINE Ranked rank_of(float score, int64_t index) {
  return Ranked(sortable(score)) * (int64_t(1) << 32) + int64_t(UINT32_MAX - uint32_t(index));
}
FASTSAE_INLINE int32_t key_of(Ranked r) { return int32_t(r >> 32); }
FASTSAE_INLINE float score_of(Ranked r) { return from_sortable(key_of(r)); }
FASTSAE_INLINE int64_t index_of(Ranked r) { return int64_t(UINT32_MAX - uint32_t(r)); }

// Leaves the `count` best in front, in no order.
inline void best_first(std::vector<Ranked>& v, int64_t count) {
  if (count < int64_t(v.size())) std::nth_element(v.begin(), v.begin() + count, v.end(), std::greater<Ranked>());
}

// Latents that one token is scored with at a time: sums of more rows do not fit into registers.
constexpr int kTogether = kRegisterBytes == 64 ? 4 : 1;

// The engine's score of one considered latent: fixed-order fp32 dot, bias, scale.
template <class T> FASTSAE_INLINE const T* latent_row(const EncodeArgs& a, int64_t i) {
  return static_cast<const T*>(a.W.data) + a.latent(i) * a.W.stride;
}
FASTSAE_INLINE float with_bias(const EncodeArgs& a, float dot, int64_t i) {
  const int64_t latent = a.latent(i);
  return a.scale ? (dot + a.bias[latent]) * a.scale[latent] : dot + a.bias[latent];
}
template <class T> FASTSAE_INLINE float exact_score(const EncodeArgs& a, const float* x, int64_t i) {
  return with_bias(a, dot(x, latent_row<T>(a, i), a.W.cols), i);
}

// Exact scores of pairs of tokens and considered latents, [begin, end) of all pairs up to `last`, those of a token side by side:
// emit(e, score). rows: the tokens'. A token's row, which comes from afar, is fetched ahead, and read once for up to
// kTogether latents.
template <class T, class Token, class Latent, class Emit>
FASTSAE_INLINE void score_runs(const EncodeArgs& a, const float* const* rows, int64_t begin, int64_t end, int64_t last,
                               Token token, Latent latent, Emit emit) {
  for (int64_t e = begin; e < end;) {
    const bool together = kTogether > 1 && e + kTogether <= end && token(e) == token(e + kTogether - 1);
    const int64_t count = together ? kTogether : 1;
    const float *x = rows[token(e)], *next = rows[token(std::min(e + count + 2, last - 1))];
    const T* w[kTogether];
    float dot[kTogether];
    for (int64_t c = 0; c < count; ++c) w[c] = latent_row<T>(a, latent(e + c));
    if (together) dots<kTogether, true>(x, w, a.x.cols, next, dot);
    else dots<1, true>(x, {w[0]}, a.x.cols, next, dot);
    for (int64_t c = 0; c < count; ++c) emit(e + c, with_bias(a, dot[c], latent(e + c)));
    e += count;
  }
}

// What turns products into bounds, for this call's bias and scale. `shift` (per considered latent, may be null) is taken off
// the score: thresholds of encode_above.
LatentTerms latent_terms(const EncodeArgs& args, const float* shift);

// The kernel for the screen's format.
const ScreenKernel& kernel_for(Format format);

// How many tokens a thread screens at a time, with lists of `capacity` latents each.
int64_t panel_size(const EncodeArgs& args, int64_t count, int64_t capacity);

// Every how many tiles one is sampled; below 2 the dictionary is too small for a sample to pay.
int64_t sample_step(int64_t blocks);

// Screens a sample of the dictionary and sets the bar of every token in `lists` to a guess that about three times `wanted`
// of its latents pass. The lists then hold what passed in the sample, and the tiles still to visit come back: nothing is
// multiplied twice. Where the dictionary is too small for a sample to pay, bars stay 0 and all tiles come back.
Tiles guess_bars(const ScreenCall& call, int64_t wanted, Lists& lists);

}  // namespace fastsae::FASTSAE_ISA
