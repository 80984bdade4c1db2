// The raw pre-acts x Wᵀ + b, sign kept, of every latent above its threshold, as ragged codes.
//
// Screened like encode_topk, but a threshold needs no certificate: a latent whose upper bound stays below it is below it. What
// passes is scored in fp32 and compared again. NaN counts as above. Thresholds are per latent or per token.
#include <algorithm>

#include "ragged.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {

// Where there is no room for all, the first `capacity` in token order are kept and the offsets end there. Memory follows
// what is above among kAtOnce tokens, which is more than the capacity there.
AboveCounts encode_above(const EncodeArgs& a, const float* per_latent, const float* per_token, const RaggedCodes& out) {
  AboveCounts counts{0, 0, 0};
  out.offsets[0] = 0;
  for (int64_t first = 0; first < a.x.rows; first += kAtOnce) {
    const EncodeArgs part = tokens_from(a, first);
    const std::vector<float> zeros(per_token ? 0 : part.x.rows, 0.f);
    Survivors found = survivors(part, per_latent, per_token ? per_token + first : zeros.data());
    const int64_t kept = std::min(counts.above, out.capacity);
    place(part, found, out.acts + kept, out.indices + kept, out.capacity - kept);
    for (int64_t n = 1; n <= part.x.rows; ++n) out.offsets[first + n] = std::min(counts.above + found.offsets[n], out.capacity);
    counts.above += found.count();
    counts.redone += found.scored_in_full;
    counts.candidates += found.candidates;
  }
  return counts;
}

}  // namespace fastsae::FASTSAE_ISA
