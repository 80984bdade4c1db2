// Every considered latent scored in fp32 for some tokens: for a few of them, where making or reading a narrow copy would take
// longer than reading W, and for those that a copy cannot decide.
//
// A thread takes a few rows of W past all tokens, so W is read once, and a token's row, from L2, once for those few.
// Flops 2·N·M·D in fp32. Bytes: W once; x from L2 M / 8 times.
#pragma once
#include <omp.h>

#include "candidates.h"
#include "guard.h"

namespace fastsae::FASTSAE_ISA {

constexpr int64_t kScoredLatents = 64;   // a block
constexpr int64_t kRowsTogether = 8;     // past each token: 24 KB of W at D = 768 stay in L1
constexpr int64_t kScoredTokens = 256;   // at once: as many rows of x as stay in L2

inline int64_t blocks_of_scores(const EncodeArgs& a) { return (a.row_count + kScoredLatents - 1) / kScoredLatents; }

// One token against considered latents [from, to).
template <class T>
FASTSAE_INLINE void score_rows(const EncodeArgs& a, const float* x, int64_t from, int64_t to, const T* next, float* out) {
  int64_t i = from;
  for (; i + kTogether <= to; i += kTogether) {
    const T* rows[kTogether];
    for (int c = 0; c < kTogether; ++c) rows[c] = latent_row<T>(a, i + c);
    float dot[kTogether];
    if (i == from) dots<kTogether, true>(x, rows, a.W.cols, next, dot);
    else dots<kTogether, false>(x, rows, a.W.cols, next, dot);
    for (int c = 0; c < kTogether; ++c) out[i + c - from] = with_bias(a, dot[c], i + c);
  }
  for (; i < to; ++i) out[i - from] = exact_score<T>(a, x, i);
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
        for (int64_t from = first; from < last; from += kRowsTogether)
          for (int64_t t = 0; t < count; ++t) {
            const int64_t to = std::min(last, from + kRowsTogether);
            // Each of the first tokens fetches one of the rows that come next.
            const T* next = latent_row<T>(a, std::min(to + t % kRowsTogether, a.row_count - 1));
            score_rows<T>(a, tokens[t], from, to, next, scores.data() + t * kScoredLatents + from - first);
          }
        visit(block, first, last, scores.data());
      });
  }
  guard.rethrow();
}

}  // namespace fastsae::FASTSAE_ISA
