// See candidates.h.
#include "candidates.h"

#include <utility>

#include "registry.h"

namespace fastsae::FASTSAE_ISA {

constexpr int64_t kPanel = 240;             // tokens: 240 x 768 bytes of i8 stay in L2, beside the lists
constexpr int64_t kPanelBytes = 64 << 20;   // a thread's lists; what is not used of them is never touched

LatentTerms latent_terms(const EncodeArgs& a, const float* shift) {
  const Screen& s = a.screen;
  const int64_t positions = s.blocks * kLanes;
  LatentTerms t;
  t.mult.resize(positions), t.bias.resize(positions), t.norm.resize(positions), t.residual.resize(positions);
  t.slack.resize(positions);
  const bool from_bias = kernel_for(s.format).from_bias;
  for (int64_t p = 0; p < positions; ++p) {
    const int64_t i = s.latent_at(p);
    const int64_t latent = i < s.latents ? a.latent(i) : 0;
    const float gain = a.scale && i < s.latents ? a.scale[latent] : 1.f, width = std::fabs(gain);
    const float off = shift && i < s.latents ? shift[i] : 0.f;
    // Padding never passes a bar, nor does a latent that its bias or threshold masks, unless its weights make it NaN.
    const bool masked = a.row_count && a.bias[latent] * gain - off == -std::numeric_limits<float>::infinity();
    if (i >= s.latents || (masked && std::isfinite(s.norm[p]))) {
      t.mult[p] = t.norm[p] = t.residual[p] = t.slack[p] = 0.f;
      t.bias[p] = -std::numeric_limits<float>::infinity();
      continue;
    }
    t.mult[p] = s.scale[p] * gain;
    t.norm[p] = s.norm[p] * width * kRoundUp;
    t.residual[p] = s.residual[p] * width * kRoundUp;
    t.bias[p] = a.bias[latent] * gain - off;
    // Adding the bias, the scale and the shift are roundings of their own.
    t.slack[p] = (std::fabs(a.bias[latent] * gain) + std::fabs(off)) * 0x1p-21f;
    // The floor: such a sum takes a denormal number for 0.
    if (from_bias && t.bias[p] != 0.f) t.slack[p] += std::fabs(t.bias[p]) * accumulation_error(s.d) + 0x1p-120f;
  }
  return t;
}

const ScreenKernel& kernel_for(Format format) {
#if defined(__AVX512F__)
  switch (format) {
    case Format::i8: return screen_i8;
    case Format::bf16: return screen_bf16;
    case Format::amx: return screen_amx;
    case Format::amx_emulated: return screen_amx_emulated;
    case Format::f32: break;
  }
#else
  (void)format;
#endif
  return screen_f32;
}

int64_t sample_step(int64_t blocks) { return std::min<int64_t>(8, blocks * kLanes / 1024); }

int64_t panel_size(const EncodeArgs& a, int64_t count, int64_t capacity) {
  // As many panels for every thread, and no larger than fits.
  const ScreenKernel& kernel = kernel_for(a.screen.format);
  const int64_t fitting = kernel.most_tokens ? kernel.most_tokens(a.screen.words_per_row) : kPanel;
  const int64_t largest = std::max<int64_t>(1, std::min(fitting, kPanelBytes / (capacity * 8))), group = kernel.group;
  const int64_t rounds = std::max<int64_t>(2, (count + a.threads * largest - 1) / (a.threads * largest));
  const int64_t share = std::max<int64_t>(1, (count + a.threads * rounds - 1) / (a.threads * rounds));
  return (share + group - 1) / group * group;
}

Tiles guess_bars(const ScreenCall& call, int64_t wanted, Lists& lists) {
  const Screen& screen = call.screen;
  const int64_t tiles = screen.blocks / kBlocksPerTile, per_tile = kBlocksPerTile * kLanes;
  const int64_t step = sample_step(screen.blocks);
  if (step < 2 || wanted * 8 > screen.latents) return {};
  // Of the wanted latents about `hits` are in the sample; take a rank that this number exceeds about once in a thousand tokens.
  const double hits = double(wanted) / step;
  const int64_t rank = int64_t(std::ceil(hits + 3.2 * std::sqrt(hits) + 0.5));
  const Tiles sample{step / 2, step};
  if (rank * 4 > tiles / step * per_tile) return {};

  ScreenCall guess = call;
  guess.tiles = sample, guess.guessing = true;
  const int64_t keep = std::exchange(lists.keep, rank), room = lists.room.empty() ? 0 : lists.room[0];
  lists.give_room(std::max<int64_t>(256, 8 * rank));
  kernel_for(screen.format).pass(guess, lists);
  // A last pruning raises each bar to the estimate of that rank and keeps only what clears it.
  for (int64_t t = 0; t < call.panel.count; ++t) prune(guess, lists, t);
  lists.keep = keep, lists.give_room(room);
  return {sample.first, sample.step, true};
}

}  // namespace fastsae::FASTSAE_ISA
