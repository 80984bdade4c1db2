// The latents of each token that score above a bar, exactly: what encode_above returns and encode_batch_topk chooses among.
#pragma once
#include <vector>

#include "candidates.h"

namespace fastsae::FASTSAE_ISA {

// What one group of tiles found in some tokens, in (token, packed position) order.
struct Found {
  std::vector<int32_t> tokens, positions;
  std::vector<float> scores;

  void add(int64_t token, int64_t position, float score) {
    tokens.push_back(int32_t(token)), positions.push_back(int32_t(position)), scores.push_back(score);
  }
};

struct Survivors {
  std::vector<Found> parts;           // ascending tokens in each, ascending positions of a token from part to part
  std::vector<int32_t> places;        // [N][16] where a token's latents of each lane begin, counted from its first
  std::vector<int64_t> offsets;       // [N + 1]
  int64_t scored_in_full = 0;         // tokens that are not finite
  int64_t candidates = 0;             // pairs that were scored because their bound passed

  int64_t count() const { return offsets.back(); }
};

// `args.x`: at most kAtOnce tokens. per_latent (may be null): a threshold for each latent, with bars of 0; bars: one per token.
Survivors survivors(const EncodeArgs& args, const float* per_latent, const float* bars);

// Writes them in (token, latent) order: survivor e to scores[e] and latents[e], those past `room` not at all.
void place(const EncodeArgs& args, Survivors& s, float* scores, int32_t* latents, int64_t room);

}  // namespace fastsae::FASTSAE_ISA
