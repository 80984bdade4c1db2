// See ragged.h.
#include "ragged.h"

#include <omp.h>

#include <numeric>

#include "guard.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

struct PanelResult {
  std::vector<int64_t> sizes;
  std::vector<int32_t> latents;
  std::vector<float> values;
  std::vector<uint8_t> scored;
};

PanelResult collect_panel(const EncodeArgs& a, const LatentTerms& terms, const float* per_latent,
                          const std::vector<float>& bars, int64_t first, int64_t count, int64_t capacity) {
  std::vector<float> widened(a.x.dtype == Dtype::f32 ? 0 : count * a.x.cols);
  std::vector<const float*> rows(count);
  for (int64_t t = 0; t < count; ++t)
    rows[t] = as_floats(a.x, first + t, widened.data() + (widened.empty() ? 0 : t * a.x.cols));
  const ScreenKernel& kernel = kernel_for(a.screen.format);
  Panel panel;
  kernel.pack(rows.data(), count, a.x.cols, a.screen.words_per_row, panel);
  // Nothing may be pruned here, so a full list can only spill: `keep` is out of reach.
  Lists lists(count, capacity, std::numeric_limits<int64_t>::max());
  for (int64_t t = 0; t < count; ++t) {
    lists.bar[t] = bars[first + t];
    if (!std::isfinite(panel.error[t])) lists.spilled[t] = 1, lists.bar[t] = std::numeric_limits<float>::infinity();
  }
  kernel.pass({a.screen, a, terms, panel, {}, a.rescore}, lists);

  PanelResult out;
  std::vector<std::pair<int32_t, float>> found;
  std::vector<Ranked> exact;
  for (int64_t t = 0; t < count; ++t) {
    found.clear();
    if (lists.spilled[t]) {
      exact.clear();
      score_all(a, rows[t], per_latent, bars[first + t], exact);
      for (const Ranked r : exact) found.emplace_back(int32_t(index_of(r)), score_of(r));
    } else {
      for (int64_t j = t * capacity; j < t * capacity + lists.size[t]; ++j)
        found.emplace_back(int32_t(a.screen.latent_at(lists.where[j])), lists.value[j]);
    }
    std::sort(found.begin(), found.end(), [](const auto& p, const auto& q) { return p.first < q.first; });
    for (const auto& [latent, value] : found) out.latents.push_back(latent), out.values.push_back(value);
    out.sizes.push_back(int64_t(found.size()));
    out.scored.push_back(lists.spilled[t]);
  }
  return out;
}

}  // namespace

Candidates collect(const EncodeArgs& a, const float* per_latent, const std::vector<float>& bars) {
  const LatentTerms terms = latent_terms(a, per_latent);
  // Nothing may be left out but by its bar, so a list has room for the whole dictionary.
  const int64_t N = a.x.rows, capacity = a.screen.latents + 2 * kLanes;
  const int64_t size = panel_size(a, N, capacity), panels = (N + size - 1) / size;
  std::vector<PanelResult> parts(panels);
  Guard guard;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t p = 0; p < panels; ++p)
    guard.run([&] {
      parts[p] = collect_panel(a, terms, per_latent, bars, p * size, std::min(size, N - p * size), capacity);
    });
  guard.rethrow();

  Candidates c;
  c.offsets.assign(1, 0);
  for (PanelResult& part : parts) {
    for (const int64_t s : part.sizes) c.offsets.push_back(c.offsets.back() + s);
    c.latents.insert(c.latents.end(), part.latents.begin(), part.latents.end());
    c.values.insert(c.values.end(), part.values.begin(), part.values.end());
    c.scored.insert(c.scored.end(), part.scored.begin(), part.scored.end());
    part = {};
  }
  c.spilled = std::accumulate(c.scored.begin(), c.scored.end(), int64_t(0));
  return c;
}

template <class T> static void score_typed(const EncodeArgs& a, Candidates& c, const std::vector<int64_t>& which) {
  const int64_t count = int64_t(which.size());
  // Made before the threads start: an allocation that fails in there would end the process.
  std::vector<std::vector<float>> buffers(a.threads, std::vector<float>(a.x.cols));
#pragma omp parallel num_threads(a.threads)
  {
    std::vector<float>& buffer = buffers[omp_get_thread_num()];
    const float* row = nullptr;
    int64_t token = -1;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < count; ++j) {
      const int64_t e = which[j];
      if (token < 0 || e >= c.offsets[token + 1] || e < c.offsets[token]) {
        token = std::upper_bound(c.offsets.begin(), c.offsets.end(), e) - c.offsets.begin() - 1;
        row = as_floats(a.x, token, buffer.data());
      }
      const int64_t next = c.latents[which[std::min(j + 3, count - 1)]];
      if (!c.scored[token]) c.values[e] = exact_score_fetching<T>(a, row, c.latents[e], next);
    }
  }
}

void score_candidates(const EncodeArgs& a, Candidates& c, const std::vector<int64_t>& which) {
  if (a.W.dtype == Dtype::bf16) return score_typed<bf16>(a, c, which);
  score_typed<float>(a, c, which);
}

}  // namespace fastsae::FASTSAE_ISA
