// The N·K largest of relu(x Wᵀ + b) over the whole batch, as ragged codes; ties go to the lower token, then the lower latent.
//
// One bar for the whole batch, guessed from a sample of tokens and latents; latents are collected against it, the best N·K
// bounds scored in fp32, then whoever's bound reaches the worst of those. If the N·K-th score does not clear the guessed bar
// the batch is redone with a lower one. No flat top-k over N·M numbers.
#include <cmath>
#include <stdexcept>

#include "guard.h"
#include "ragged.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int64_t kSampledTokens = 1024;

// Screened scores above 0 of a sample of the batch, largest first, and the share of (N, M) that was looked at.
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
    kernel.pack(rows.data(), count, a.x.cols, a.screen.words_per_row, panel);
    Lists lists(count, capacity, std::numeric_limits<int64_t>::max());
    kernel.pass({a.screen, a, terms, panel, {tile_step / 2, tile_step}, false}, lists);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = t * capacity; j < t * capacity + lists.size[t]; ++j)
        if (std::isfinite(lists.value[j])) parts[p].push_back(lists.value[j]);
  });
  guard.rethrow();
  std::vector<float> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  std::sort(all.begin(), all.end(), std::greater<float>());
  share = tiles && N ? double(tokens) / N * double(sampled_tiles) / tiles : 1.0;
  return all;
}

// Exact selection among the candidates; the worst chosen score, or 0 where there are fewer than `wanted` positive ones.
float choose(const EncodeArgs& a, Candidates& c, int64_t wanted, std::vector<Ranked>& chosen) {
  if (c.values.size() > UINT32_MAX) throw std::length_error("encode_batch_topk: more than 2^32 candidates; split the batch");
  std::vector<Ranked> order(c.values.size());
  for (int64_t e = 0; e < int64_t(order.size()); ++e) order[e] = rank_of(c.values[e], e);
  const auto score_and_rank = [&](int64_t from, int64_t to) {
    std::vector<int64_t> which(to - from);
    for (int64_t j = from; j < to; ++j) which[j - from] = index_of(order[j]);
    std::sort(which.begin(), which.end());
    score_candidates(a, c, which);
    for (const int64_t e : which)
      if (!(c.values[e] <= 0.f)) chosen.push_back(rank_of(c.values[e], e));
  };
  const auto worst = [&] {
    if (int64_t(chosen.size()) < wanted || !wanted) return 0.f;
    best_first(chosen, wanted);
    return score_of(*std::min_element(chosen.begin(), chosen.begin() + wanted));
  };
  chosen.clear();
  const int64_t first = std::min<int64_t>(wanted, order.size());
  best_first(order, first);
  score_and_rank(0, first);
  const float bar = worst();
  const auto end = std::partition(order.begin() + first, order.end(), [bar](Ranked r) { return !(score_of(r) < bar); });
  score_and_rank(first, end - order.begin());
  return worst();
}

}  // namespace

// Returns how many tokens were redone: all of them for each time the guessed bar was too high.
int64_t encode_batch_topk(const EncodeArgs& a, const RaggedCodes& out) {
  const int64_t N = a.x.rows, wanted = std::min(out.capacity, N * a.row_count);
  double share = 1;
  const std::vector<float> sample = sample_scores(a, latent_terms(a, nullptr), share);
  Candidates c;
  std::vector<Ranked> chosen;
  int64_t redone = 0;
  for (double margin = 1.2;; margin *= 4) {
    const double hits = double(wanted) * share * margin;
    const int64_t rank = int64_t(std::ceil(hits + 3 * std::sqrt(hits)));
    const float bar = rank < int64_t(sample.size()) ? sample[rank] : 0.f;
    c = collect(a, nullptr, std::vector<float>(N, bar));
    redone += c.spilled;
    const float worst = choose(a, c, wanted, chosen);
    if (bar <= 0.f || worst > bar || worst != worst) break;
    redone += N;
  }
  best_first(chosen, std::min<int64_t>(wanted, chosen.size()));
  chosen.resize(std::min<int64_t>(wanted, chosen.size()));
  std::sort(chosen.begin(), chosen.end(), [](Ranked p, Ranked q) { return index_of(p) < index_of(q); });
  int64_t slot = 0;
  out.offsets[0] = 0;
  for (int64_t n = 0; n < N; ++n) {
    for (; slot < int64_t(chosen.size()) && index_of(chosen[slot]) < c.offsets[n + 1]; ++slot) {
      out.acts[slot] = score_of(chosen[slot]);
      out.indices[slot] = c.latents[index_of(chosen[slot])];
    }
    out.offsets[n + 1] = slot;
  }
  return redone;
}

}  // namespace fastsae::FASTSAE_ISA
