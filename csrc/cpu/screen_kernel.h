// The screening pass, written once for every format: a register tile of GROUP tokens x 2 blocks of 16 latents runs over all of
// D, and its epilogue compares with each token's bar while the scores are still in registers. (N, M) never reaches memory.
//
// A Policy names its format, its accumulator and one multiply-add of 32-bit words: `acc += <token word, latent words>`.
#pragma once
#include <algorithm>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "narrow.h"
#include "screen.h"

namespace fastsae::FASTSAE_ISA {

FASTSAE_INLINE unsigned above(vec<float> u, float bar) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)u, _mm512_set1_ps(bar), _CMP_NLE_UQ);   // a NaN bound passes: never leave out unknowns
#else
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
  // Compressed in registers and stored whole (a list keeps a vector of room): compressing into memory is microcode on Zen.
  const __m512i where = _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lane, _mm512_set1_epi32(position)));
  _mm512_storeu_ps(lists.value.get() + at, _mm512_maskz_compress_ps(mask, (__m512)u));
  _mm512_storeu_si512(lists.where.get() + at, where);
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

// What becomes of the latents of one block that passed.
FASTSAE_INLINE void take(const ScreenCall& call, Lists& lists, int64_t token, vec<float> u, unsigned mask, int64_t position) {
  append(lists, token, u, mask, int32_t(position));
  if (__builtin_expect(lists.size[token] + kLanes > lists.room[token], 0)) prune(call, lists, token);
}

FASTSAE_INLINE void take(const ScreenCall&, Sieve& sieve, int64_t token, vec<float>, unsigned mask, int64_t position) {
  const uint32_t base = uint32_t(token << 16 | (position - sieve.first));
#if defined(__AVX512F__)
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i entries = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(base)));
  _mm512_storeu_si512(sieve.found + sieve.size, _mm512_maskz_compress_epi32(mask, entries));
  sieve.size += __builtin_popcount(mask);
#else
  for (; mask; mask &= mask - 1) sieve.found[sieve.size++] = base + uint32_t(__builtin_ctz(mask));
#endif
}

// Bound and compare the products of up to `live` tokens with one tile: product(t, b) are 16 of token first + t.
template <class Sink, class Product>
FASTSAE_INLINE void examine(const ScreenCall& call, Sink& sink, int64_t first, int64_t live, int64_t tile, Product product) {
  constexpr int B = kBlocksPerTile;
  const Panel& p = call.panel;
  vec<float> mult[B], bias[B], norm[B], residual[B];
  for (int b = 0; b < B; ++b) {
    const int64_t at = (tile * B + b) * kLanes;
    mult[b] = load(&call.terms.mult[at]), bias[b] = load(&call.terms.bias[at]);
    norm[b] = residual[b] = vec<float>{};
    if (call.bounded) {
      norm[b] = load(&call.terms.norm[at]), residual[b] = load(&call.terms.residual[at]);
      bias[b] += load(&call.terms.slack[at]);
    }
  }
  for (int64_t t = first; t < first + live; ++t) {
    const vec<float> scale = splat(p.scale[t]), error = splat(p.error[t]), size = splat(p.norm[t]);
    for (int b = 0; b < B; ++b) {
      const vec<float> u = mult[b] * (product(t - first, b) * scale) + (bias[b] + error * norm[b] + size * residual[b]);
      const unsigned mask = above(u, sink.bar[t]);
      if (__builtin_expect(mask != 0, 0)) take(call, sink, t, u, mask, (tile * B + b) * kLanes);
    }
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

inline int64_t end_tile(const ScreenCall& call) { return std::min(call.tiles.end, call.screen.blocks / kBlocksPerTile); }

// One part of `parts` of the next tile, asked for while this one is multiplied: the copy comes from L3 or memory.
FASTSAE_INLINE void fetch_share(const ScreenCall& call, int64_t tile, int64_t part, int64_t parts) {
  if (tile >= end_tile(call)) return;
  const int64_t lines = kBlocksPerTile * call.screen.words_per_row;   // a word of 16 lanes is a line
  const uint32_t* next = call.screen.words + tile * lines * kLanes;
  for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i) __builtin_prefetch(next + i * kLanes, 0, 2);
}

template <class Policy, class Sink> void pass(const ScreenCall& call, Sink& sink) {
  constexpr int64_t G = Policy::kGroup, B = kBlocksPerTile;
  const int64_t words = call.screen.words_per_row, end = end_tile(call);
  std::vector<uint32_t> scratch(Policy::kPacked ? 0 : B * words * kLanes);
  typename Policy::Acc products[G * B];
  for (int64_t tile = call.tiles.begin(); tile < end; tile = call.tiles.next(tile)) {
    const uint32_t* w = Policy::kPacked ? call.screen.words + tile * B * words * kLanes : scratch.data();
    if constexpr (!Policy::kPacked) Policy::pack_tile(call, tile, scratch.data());
    for (int64_t first = 0; first < call.panel.count; first += G) {
      if constexpr (Policy::kPacked) fetch_share(call, call.tiles.next(tile), first / G, (call.panel.count + G - 1) / G);
      multiply_tile<Policy>(call.panel.words.data() + first * words, w, words, products);
      examine(call, sink, first, std::min(G, call.panel.count - first), tile, [&](int64_t t, int64_t b) {
        return Policy::product(products[t * B + b], call.panel.correction[first + t]);
      });
    }
  }
}

// Tokens narrowed by the Policy and interleaved, word w of token t of a group at [w][t], or as the Policy places them.
template <class Policy> void pack_panel(const Screen& screen, const float* const* rows, int64_t count, Panel& p) {
  constexpr int64_t G = Policy::kGroup;
  const int64_t d = screen.d, words = screen.words_per_row;
  const int64_t padded = (count + G - 1) / G * G;
  p.count = count;
  p.words.assign(padded * words, 0);
  p.scale.assign(padded, 0.f), p.error.assign(padded, 0.f), p.norm.assign(padded, 0.f);
  p.correction.assign(padded, 0);
  std::vector<uint32_t> row(words);
  std::vector<float> scratch(d);
  for (int64_t t = 0; t < count; ++t) {
    std::fill(row.begin(), row.end(), 0u);
    const Narrowed n = narrow_in_basis(screen, Side::token, rows[t], scratch.data(), row.data(), Policy::narrow);
    p.scale[t] = n.scale;
    p.correction[t] = n.correction;
    p.error[t] = n.residual + accumulation_error(d) * n.norm;
    p.norm[t] = n.norm + n.residual;   // at least ‖x̂‖
    uint32_t* group = p.words.data() + t / G * G * words;
    if constexpr (Policy::kInterleaved)
      for (int64_t w = 0; w < words; ++w) group[w * G + t % G] = row[w];
    else
      Policy::place(row.data(), words, t % G, group);
  }
}

}  // namespace fastsae::FASTSAE_ISA
