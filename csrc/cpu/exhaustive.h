// Every considered latent scored in fp32 for some tokens: for a few of them, where making or reading a narrow copy would take
// longer than reading W, and for those that a copy cannot decide.
//
// A thread takes a few rows of W past all tokens, a tile of tokens at a time, so W is read once, and a token's row, from L2, once
// for those few. Flops 2·N·M·D in fp32. Bytes: W once; x from L2 M / kTileRows times.
#pragma once
#include <omp.h>

#include "candidates.h"
#include "guard.h"

namespace fastsae::FASTSAE_ISA {

constexpr int64_t kScoredLatents = 64;   // a block
constexpr int64_t kScoredTokens = 256;   // at once: as many rows of x as stay in L2

// A tile's sums fill the registers, and each number loaded serves several of them. Its rows of W stay in L1.
constexpr int kTileTokens = kRegisterBytes == 64 ? 4 : 3, kTileRows = kRegisterBytes == 64 ? 6 : 4;

inline int64_t blocks_of_scores(const EncodeArgs& a) { return (a.row_count + kScoredLatents - 1) / kScoredLatents; }

// Every score of a tile, each with the bits of `dots`: of the partial sums that it keeps for a score, one at a time, and added in
// the same order.
template <class T>
FASTSAE_INLINE void tile_dots(const float* const* x, const T* const* w, int64_t length, float (*out)[kTileRows]) {
  constexpr int L = reg_lanes<float>, U = kPartialSums;
  const int64_t whole = length / (U * L) * (U * L);
  reg<float> total[kTileTokens][kTileRows];
  for (int u = 0; u < U; ++u) {
    reg<float> sum[kTileTokens][kTileRows] = {};
    const auto add = [&](int64_t d) {
      reg<float> v[kTileTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTileTokens; ++t) v[t] = load_reg(x[t] + d);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const reg<float> row = load_reg(w[r] + d);
#pragma GCC unroll 4
        for (int t = 0; t < kTileTokens; ++t) sum[t][r] += v[t] * row;
      }
    };
    for (int64_t d = u * L; d < whole; d += U * L) add(d);
    if (u == 0)
      for (int64_t d = whole; d + L <= length; d += L) add(d);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < kTileTokens; ++t) total[t][r] = u == 0 ? sum[t][r] : total[t][r] + sum[t][r];
  }
  for (int t = 0; t < kTileTokens; ++t)
    for (int r = 0; r < kTileRows; ++r) {
      float s = sum_lanes<float>(total[t][r]);
      for (int64_t i = length / L * L; i < length; ++i) s = multiply_add(x[t][i], float(widen(w[r][i])), s);
      out[t][r] = s;
    }
}

// Scores of all tokens with considered latents [first, last), a block's: scores[t * kScoredLatents + i - first].
template <class T>
void score_block(const EncodeArgs& a, const std::vector<const float*>& tokens, int64_t first, int64_t last, float* scores) {
  const int64_t count = int64_t(tokens.size()), tiled = count / kTileTokens * kTileTokens;
  for (int64_t from = first; from < last; from += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, last - from);
    const T* w[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) w[r] = latent_row<T>(a, from + std::min(r, rows - 1));   // the last again, for none
    // The rows that come next are fetched in equal parts, one with each tile: memory takes as long for them as all tiles do.
    const int64_t lines = (a.W.cols * sizeof(T) + 63) / 64 * kTileRows, parts = (count + kTileTokens - 1) / kTileTokens;
    const auto fetch = [&](int64_t part) {
      for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i) {
        const T* row = latent_row<T>(a, std::min(from + kTileRows + i % kTileRows, a.row_count - 1));
        __builtin_prefetch(reinterpret_cast<const char*>(row) + i / kTileRows * 64, 0, 2);
      }
    };
    float found[kTileTokens][kTileRows], *out = scores + from - first;
    for (int64_t t = 0; t < tiled; t += kTileTokens) {
      fetch(t / kTileTokens);
      tile_dots(tokens.data() + t, w, a.W.cols, found);
      for (int64_t j = 0; j < kTileTokens; ++j) std::copy_n(found[j], rows, out + (t + j) * kScoredLatents);
    }
    if (tiled < count) fetch(parts - 1);
    for (int64_t t = tiled; t < count; ++t)
      for (int64_t r = 0; r < rows; ++r) out[t * kScoredLatents + r] = dot(tokens[t], w[r], a.W.cols);
  }
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = first; i < last; ++i) {
      float& score = scores[t * kScoredLatents + i - first];
      score = with_bias(a, score, i);
    }
}

// Calls visit(block, first, last, scores) for considered latents [first, last); the score of token t and latent i is
// scores[t * kScoredLatents + i - first].
template <class T, class Visit>
void score_every_latent(const EncodeArgs& a, const std::vector<const float*>& tokens, Visit visit) {
  const int64_t count = int64_t(tokens.size());
  Guard guard;
#pragma omp parallel num_threads(a.threads)
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks_of_scores(a); ++block)
      guard.run([&] {
        scores.resize(count * kScoredLatents);
        const int64_t first = block * kScoredLatents, last = std::min(a.row_count, first + kScoredLatents);
        score_block<T>(a, tokens, first, last, scores.data());
        visit(block, first, last, scores.data());
      });
  }
  guard.rethrow();
}

}  // namespace fastsae::FASTSAE_ISA
