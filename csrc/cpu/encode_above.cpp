// The raw pre-acts x Wᵀ + b, sign kept, of every latent above its threshold, as ragged codes.
//
// Screened like encode_topk, but a threshold needs no certificate: whoever's upper bound stays below it is below it. What
// passes is scored in fp32 and compared again. NaN counts as above. Thresholds are per latent or per token.
#include <numeric>

#include "ragged.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {

// Returns {how many latents are above, how many tokens were scored in full}. Where there is no room for all, the first
// `capacity` in token order are kept and the offsets end there.
AboveCounts encode_above(const EncodeArgs& a, const float* per_latent, const float* per_token, const RaggedCodes& out) {
  const std::vector<float> bars = per_token ? std::vector<float>(per_token, per_token + a.x.rows)
                                            : std::vector<float>(a.x.rows, 0.f);
  Candidates c = collect(a, per_latent, bars);
  std::vector<int64_t> all(c.values.size());
  std::iota(all.begin(), all.end(), int64_t(0));
  score_candidates(a, c, all);

  int64_t above = 0;
  out.offsets[0] = 0;
  for (int64_t n = 0; n < a.x.rows; ++n) {
    for (int64_t e = c.offsets[n]; e < c.offsets[n + 1]; ++e) {
      const int32_t latent = c.latents[e];
      if (c.values[e] <= (per_latent ? per_latent[latent] : bars[n])) continue;
      if (above < out.capacity) out.acts[above] = c.values[e], out.indices[above] = latent;
      ++above;
    }
    out.offsets[n + 1] = std::min(above, out.capacity);
  }
  return {above, c.spilled};
}

}  // namespace fastsae::FASTSAE_ISA
