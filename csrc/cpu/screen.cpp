// The narrow copy of an encoder, and the upkeep of the lists of the screening pass.
#include "screen.h"

#include <omp.h>

#include <algorithm>

#include "narrow.h"
#include "registry.h"
#include "selection.h"

namespace fastsae::FASTSAE_ISA {

// 16 narrowed rows interleaved: word w of lane l stands at [w][l].
void pack_block(const uint32_t* rows, int64_t words, uint32_t* block) {
  for (int64_t w0 = 0; w0 < words; w0 += 16) {
    const int64_t w1 = std::min<int64_t>(words, w0 + 16);
    for (int64_t l = 0; l < kLanes; ++l)
      for (int64_t w = w0; w < w1; ++w) block[w * kLanes + l] = rows[l * words + w];
  }
}

// The copy of one row changed by an update, or made anew: its words go to `words`, its numbers to the screen's tables.
void narrow_latent(const Screen& s, int64_t position, const float* row, float* scratch, uint32_t* words) {
  const Narrowed n = narrow_in_basis(s, Side::latent, row, scratch, words, [&](const float* v, int64_t d, uint32_t* out) {
    return narrow_row(s.format, v, d, out);
  });
  s.scale[position] = std::isfinite(n.norm) ? n.scale : std::numeric_limits<float>::quiet_NaN();
  s.norm[position] = n.norm;
  s.residual[position] = n.residual;
}

void prepare_screen(const Matrix& W, const int32_t* rows, const Screen& s, int threads) {
  // Made before the threads start: an allocation that fails in there would end the process.
  std::vector<std::vector<uint32_t>> all_words(threads, std::vector<uint32_t>(kLanes * s.words_per_row));
  std::vector<std::vector<float>> buffers(threads, std::vector<float>(2 * s.d));
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t>& words = all_words[omp_get_thread_num()];
    std::vector<float>& buffer = buffers[omp_get_thread_num()];
#pragma omp for schedule(static)
    for (int64_t block = 0; block < s.blocks; ++block) {
      std::fill(words.begin(), words.end(), 0u);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t position = block * kLanes + lane, latent = s.latent_at(position);
        if (latent < s.latents)
          narrow_latent(s, position, as_floats(W, rows ? rows[latent] : latent, buffer.data()), buffer.data() + s.d,
                        words.data() + lane * s.words_per_row);
        else
          s.scale[position] = s.norm[position] = s.residual[position] = 0.f;
      }
      if (s.format != Format::f32)
        pack_block(words.data(), s.words_per_row, s.words + block * s.words_per_row * kLanes);
    }
  }
}

void prune(const ScreenCall& call, Lists& lists, int64_t token) {
  float* value = lists.value.get() + token * lists.capacity;
  int32_t* where = lists.where.get() + token * lists.capacity;
  const int64_t size = lists.size[token];
  std::vector<float> low(size);
  for (int64_t i = 0; i < size; ++i) {
    // The upper bound less one error is the estimate, less two the lower bound.
    low[i] = value[i] - (call.guessing ? 1.f : 2.f) * error_bound(call, token, where[i]);
    if (!(low[i] == low[i])) low[i] = -std::numeric_limits<float>::infinity();
  }
  float bar = lists.bar[token];
  if (lists.keep > 0 && lists.keep <= size) {
    // Strictly below, so that an equal score with a lower index stays in the race.
    bar = std::max(bar, std::nextafter(kth_largest(low, lists.keep), -std::numeric_limits<float>::infinity()));
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < size; ++i)
    if (!(value[i] <= bar)) value[kept] = value[i], where[kept] = where[i], ++kept;
  lists.bar[token] = bar;
  // A list that is cut by little would soon be cut again.
  if (2 * kept > lists.room[token]) lists.room[token] = int32_t(std::min<int64_t>(lists.capacity, 2 * lists.room[token]));
  if (kept + kLanes > lists.capacity) {
    lists.spilled[token] = 1, lists.bar[token] = std::numeric_limits<float>::infinity();
    kept = 0;
  }
  lists.size[token] = int32_t(kept);
}

}  // namespace fastsae::FASTSAE_ISA
