// The N·K largest of relu(x Wᵀ + b) over the whole batch, as ragged codes; ties go to the lower token, then the lower latent.
//
// One bar for the whole batch, guessed from a sample of tokens and latents; the latents above it are found as encode_above
// does, and the N·K best of those are chosen. If they are fewer than N·K the batch is redone with a lower bar. No flat top-k
// over N·M numbers.
#include <cmath>

#include "guard.h"
#include "ragged.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int64_t kSampledTokens = 1024;

// Screened scores above 0 of a sample of the batch, in no order, and the share of (N, M) that was looked at.
std::vector<float> sample_scores(const EncodeArgs& a, const LatentTerms& terms, double& share) {
  const int64_t N = a.x.rows, tiles = a.screen.blocks / kBlocksPerTile;
  const int64_t token_step = std::max<int64_t>(1, N / kSampledTokens);
  const int64_t tile_step = std::max<int64_t>(1, std::min<int64_t>(16, tiles * kBlocksPerTile * kLanes / 1024));
  const int64_t tokens = (N + token_step - 1) / token_step;
  const int64_t sampled_tiles = tiles ? (tiles - tile_step / 2 + tile_step - 1) / tile_step : 0;
  const int64_t capacity = sampled_tiles * kBlocksPerTile * kLanes + kLanes;
  constexpr int64_t kPanel = 48;
  std::vector<std::vector<float>> parts((tokens + kPanel - 1) / kPanel);
  Guard guard;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t p = 0; p < int64_t(parts.size()); ++p) guard.run([&] {
    const int64_t count = std::min(kPanel, tokens - p * kPanel);
    std::vector<float> widened(count * a.x.cols);
    std::vector<const float*> rows(count);
    for (int64_t t = 0; t < count; ++t)
      rows[t] = as_floats(a.x, (p * kPanel + t) * token_step, widened.data() + t * a.x.cols);
    const ScreenKernel& kernel = kernel_for(a.screen.format);
    Panel panel;
    kernel.pack(a.screen, rows.data(), count, panel);
    Lists lists(count, capacity, std::numeric_limits<int64_t>::max());
    kernel.pass({a.screen, a, terms, panel, {tile_step / 2, tile_step}, false}, lists);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = t * capacity; j < t * capacity + lists.size[t]; ++j)
        if (std::isfinite(lists.value[j])) parts[p].push_back(lists.value[j]);
  });
  guard.rethrow();
  std::vector<float> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  share = tiles && N ? double(tokens) / N * double(sampled_tiles) / tiles : 1.0;
  return all;
}

// All survivors of one bar, in (token, latent) order.
struct Scored {
  std::vector<int64_t> offsets{0};
  std::vector<float> scores;
  std::vector<int32_t> latents;
  int64_t scored_in_full = 0;
};

Scored score_above(const EncodeArgs& a, float bar) {
  Scored all;
  const std::vector<float> bars(std::min(kAtOnce, a.x.rows), bar);
  for (int64_t first = 0; first < a.x.rows; first += kAtOnce) {
    const EncodeArgs part = tokens_from(a, first);
    Survivors found = survivors(part, nullptr, bars.data());
    const int64_t before = all.offsets.back(), count = found.count();
    all.scores.resize(before + count), all.latents.resize(before + count);
    place(part, found, all.scores.data() + before, all.latents.data() + before, count);
    for (int64_t n = 1; n <= part.x.rows; ++n) all.offsets.push_back(before + found.offsets[n]);
    all.scored_in_full += found.scored_in_full;
  }
  return all;
}

// The `wanted` best, in their order: ties go to those that come first.
void write_best(const Scored& all, int64_t wanted, const RaggedCodes& out) {
  const int64_t count = int64_t(all.scores.size());
  std::vector<int32_t> keys(count);
  for (int64_t e = 0; e < count; ++e) keys[e] = sortable(all.scores[e]);
  int32_t worst = INT32_MIN;
  int64_t ties = count;   // how many of the worst score are chosen
  if (wanted && wanted < count) {
    worst = kth_largest(keys.data(), count, wanted);
    ties = wanted - std::count_if(keys.begin(), keys.end(), [=](int32_t key) { return key > worst; });
  }
  int64_t slot = 0;
  for (int64_t n = 0; n + 1 < int64_t(all.offsets.size()); ++n) {
    for (int64_t e = all.offsets[n]; e < all.offsets[n + 1] && slot < wanted; ++e)
      if (keys[e] > worst || (keys[e] == worst && ties-- > 0))
        out.acts[slot] = from_sortable(keys[e]), out.indices[slot] = all.latents[e], ++slot;
    out.offsets[n + 1] = slot;
  }
}

}  // namespace

// Returns how many tokens were redone: all of them for each time the guessed bar was too high.
int64_t encode_batch_topk(const EncodeArgs& a, const RaggedCodes& out) {
  const int64_t N = a.x.rows, wanted = std::min(out.capacity, N * a.row_count);
  double share = 1;
  std::vector<float> sample;
  if (!a.screen.is_absent()) sample = sample_scores(a, latent_terms(a, nullptr), share);
  int64_t redone = 0;
  out.offsets[0] = 0;
  for (double margin = 1.2;; margin *= 4) {
    const double hits = double(wanted) * share * margin;
    const int64_t rank = int64_t(std::ceil(hits + 3 * std::sqrt(hits)));
    float bar = 0.f;
    if (rank < int64_t(sample.size())) bar = kth_largest(sample, rank + 1);
    const Scored all = score_above(a, bar);
    redone += all.scored_in_full;
    // A latent left out scores no more than the bar: as many as wanted above it are the best.
    if (bar <= 0.f || int64_t(all.scores.size()) >= wanted) {
      write_best(all, wanted, out);
      break;
    }
    redone += N;
  }
  return redone;
}

}  // namespace fastsae::FASTSAE_ISA
