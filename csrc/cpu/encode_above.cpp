// The raw pre-acts x Wᵀ + b, sign kept, of every latent above its threshold, as ragged codes.
//
// Screened like encode_topk, but a threshold needs no certificate: whoever's upper bound stays below it is below it. What
// passes is scored in fp32 and compared again. NaN counts as above. Thresholds are per latent or per token.
#include <algorithm>
#include <numeric>

#include "ragged.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {

// Returns {how many latents are above, how many tokens were scored in full}. Where there is no room for all, the first
// `capacity` in token order are kept and the offsets end there; the rest is only counted.
AboveCounts encode_above(const EncodeArgs& a, const float* per_latent, const float* per_token, const RaggedCodes& out) {
  AboveCounts counts{0, 0};
  const int64_t width = a.x.dtype == Dtype::bf16 ? 2 : 4;
  out.offsets[0] = 0;
  for (int64_t first = 0; first < a.x.rows; first += kAtOnce) {
    EncodeArgs part = a;
    part.x.data = static_cast<char*>(a.x.data) + first * a.x.stride * width;
    part.x.rows = std::min(kAtOnce, a.x.rows - first);
    std::vector<float> bars(part.x.rows, 0.f);
    if (per_token) std::copy(per_token + first, per_token + first + part.x.rows, bars.begin());
    Candidates c = collect(part, per_latent, bars);
    std::vector<int64_t> all(c.values.size());
    std::iota(all.begin(), all.end(), int64_t(0));
    score_candidates(part, c, all);
    counts.redone += c.spilled;
    for (int64_t n = 0; n < part.x.rows; ++n) {
      for (int64_t e = c.offsets[n]; e < c.offsets[n + 1]; ++e) {
        const int32_t latent = c.latents[e];
        if (c.values[e] <= (per_latent ? per_latent[latent] : bars[n])) continue;
        if (counts.above < out.capacity) out.acts[counts.above] = c.values[e], out.indices[counts.above] = latent;
        ++counts.above;
      }
      out.offsets[first + n + 1] = std::min(counts.above, out.capacity);
    }
  }
  return counts;
}

}  // namespace fastsae::FASTSAE_ISA
