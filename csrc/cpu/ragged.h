// The latents of each token whose upper bound clears a bar, as one ragged list in (token, latent) order: what encode_above and
// encode_batch_topk decide among. Memory follows the number of candidates.
#pragma once
#include <vector>

#include "candidates.h"

namespace fastsae::FASTSAE_ISA {

struct Candidates {
  std::vector<int64_t> offsets;   // [N + 1]
  std::vector<int32_t> latents;
  std::vector<float> values;      // upper bounds, or exact scores where `scored`
  std::vector<uint8_t> scored;    // [N] the token was scored in fp32 in full
  int64_t spilled = 0;            // how many tokens were
};

// per_latent (may be null): thresholds taken off each latent's bound; bars: one per token.
Candidates collect(const EncodeArgs& args, const float* per_latent, const std::vector<float>& bars);

// values := exact scores of the listed latents `which` (ordinals into the candidates, ascending).
void score_candidates(const EncodeArgs& args, Candidates& c, const std::vector<int64_t>& which);

}  // namespace fastsae::FASTSAE_ISA
