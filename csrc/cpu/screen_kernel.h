// The screening pass, written once for every format: a register tile of GROUP tokens x 2 blocks of 16 latents runs over all of
// D, and its epilogue compares with each token's bar while the scores are still in registers. (N, M) never reaches memory.
//
// A Policy names its format, its accumulator and one multiply-add of 32-bit words: `acc += <token word, latent words>`.
#pragma once
#include <algorithm>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "screen.h"

namespace fastsae::FASTSAE_ISA {

FASTSAE_INLINE unsigned above(vec<float> u, float bar) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)u, _mm512_set1_ps(bar), _CMP_NLE_UQ);   // a NaN bound passes: never leave out unknowns
#else
  typedef int32_t i32x16 __attribute__((vector_size(64)));
  const i32x16 passed = ~(i32x16)(u <= splat(bar));
  int32_t any = 0;
  for (int i = 0; i < 16; ++i) any |= passed[i];
  if (!any) return 0;
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned(passed[i] & 1) << i;
  return mask;
#endif
}

FASTSAE_INLINE void append(Lists& lists, int64_t token, vec<float> u, unsigned mask, int32_t position) {
  const int64_t at = token * lists.capacity + lists.size[token];
#if defined(__AVX512F__)
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_mask_compressstoreu_ps(lists.value.get() + at, mask, (__m512)u);
  _mm512_mask_compressstoreu_epi32(lists.where.get() + at, mask, _mm512_add_epi32(lane, _mm512_set1_epi32(position)));
  lists.size[token] += __builtin_popcount(mask);
#else
  int64_t to = at;
  for (; mask; mask &= mask - 1, ++to) {
    const int l = __builtin_ctz(mask);
    lists.value[to] = u[l];
    lists.where[to] = position + l;
  }
  lists.size[token] += int32_t(to - at);
#endif
}

// Bound and compare one vector of 16 products of one token.
FASTSAE_INLINE void examine(const ScreenCall& call, Lists& lists, int64_t token, int64_t block, vec<float> product) {
  const Panel& p = call.panel;
  const int64_t at = block * kLanes;
  vec<float> u = load(&call.terms.mult[at]) * (product * splat(p.scale[token])) + load(&call.terms.bias[at]);
  if (call.bounded)
    u += splat(p.error[token]) * load(&call.terms.norm[at]) + splat(p.norm[token]) * load(&call.terms.residual[at]) +
         load(&call.terms.slack[at]);
  const unsigned mask = above(u, lists.bar[token]);
  if (__builtin_expect(mask != 0, 0)) {
    append(lists, token, u, mask, int32_t(at));
    if (__builtin_expect(lists.size[token] + kLanes > lists.capacity, 0)) prune(call, lists, token);
  }
}

// Products of one group of tokens with one tile of latents, stored as [token][block][lane].
template <class Policy>
FASTSAE_INLINE void multiply_tile(const uint32_t* x, const uint32_t* w0, int64_t words, typename Policy::Acc* out) {
  constexpr int G = Policy::kGroup, B = kBlocksPerTile;
  typename Policy::Acc acc[G][B];   // every index below is a constant once unrolled, so these are registers
#pragma GCC unroll 16
  for (int t = 0; t < G; ++t)
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) acc[t][b] = Policy::zero();
  for (int64_t k = 0; k < words; ++k) {
    typename Policy::Words w[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) w[b] = Policy::load_words(w0 + (b * words + k) * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < G; ++t) {
      const typename Policy::Words v = Policy::broadcast(x[k * G + t]);
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) acc[t][b] = Policy::multiply_add(acc[t][b], w[b], v);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < G; ++t)
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) out[t * B + b] = acc[t][b];
}

template <class Policy> void pass(const ScreenCall& call, Lists& lists) {
  constexpr int64_t G = Policy::kGroup, B = kBlocksPerTile;
  const int64_t words = call.screen.words_per_row, tiles = call.screen.blocks / B;
  std::vector<uint32_t> scratch(Policy::kPacked ? 0 : B * words * kLanes);
  typename Policy::Acc products[G * B];
  for (int64_t tile = call.first_tile; tile < tiles; tile += call.tile_step) {
    const uint32_t* w = Policy::kPacked ? call.screen.words + tile * B * words * kLanes : scratch.data();
    if constexpr (!Policy::kPacked) Policy::pack_tile(call, tile, scratch.data());
    for (int64_t first = 0; first < call.panel.count; first += G) {
      multiply_tile<Policy>(call.panel.words.data() + first * words, w, words, products);
      const int64_t live = std::min(G, call.panel.count - first);
      for (int64_t t = 0; t < live; ++t)
        for (int64_t b = 0; b < B; ++b)
          examine(call, lists, first + t, tile * B + b,
                  Policy::product(products[t * B + b], call.panel.correction[first + t]));
    }
  }
}

// Tokens narrowed by the Policy and interleaved: word w of token t of a group stands at [w][t].
template <class Policy> void pack_panel(const float* const* rows, int64_t count, int64_t d, int64_t words, Panel& p) {
  constexpr int64_t G = Policy::kGroup;
  const int64_t padded = (count + G - 1) / G * G;
  p.count = count;
  p.words.assign(padded * words, 0);
  p.scale.assign(padded, 0.f), p.error.assign(padded, 0.f), p.norm.assign(padded, 0.f);
  p.correction.assign(padded, 0);
  std::vector<uint32_t> row(words);
  for (int64_t t = 0; t < count; ++t) {
    std::fill(row.begin(), row.end(), 0u);
    const Narrowed n = Policy::narrow(rows[t], d, row.data());
    p.scale[t] = n.scale;
    p.correction[t] = n.correction;
    p.error[t] = n.residual + accumulation_error(d) * n.norm;
    p.norm[t] = n.norm + n.residual;   // at least ‖x̂‖
    uint32_t* group = p.words.data() + t / G * G * words;
    for (int64_t w = 0; w < words; ++w)
      if constexpr (Policy::kInterleaved)
        group[w * G + t % G] = row[w];
      else
        group[t % G * words + w] = row[w];
  }
}

}  // namespace fastsae::FASTSAE_ISA
