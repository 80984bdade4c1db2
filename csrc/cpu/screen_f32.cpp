// Screening in fp32, for processors without a narrow multiply-add: only the order of summation is uncertain, so the bound is
// tight. Tiles are packed from W on the fly; nothing is kept between calls.
#include "narrow.h"
#include "registry.h"
#include "screen_kernel.h"

namespace fastsae::FASTSAE_ISA {
namespace {

void pack_latents(const ScreenCall& call, int64_t tile, uint32_t* out) {
  const int64_t d = call.screen.d;
  std::vector<float> buffer(d);
  for (int64_t b = 0; b < kBlocksPerTile; ++b)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t i = call.screen.latent_at((tile * kBlocksPerTile + b) * kLanes + lane);
      float* to = reinterpret_cast<float*>(out) + b * d * kLanes + lane;
      if (i < call.screen.latents) {
        const float* row = as_floats(call.args.W, call.args.latent(i), buffer.data());
        for (int64_t w = 0; w < d; ++w) to[w * kLanes] = row[w];
      } else {
        for (int64_t w = 0; w < d; ++w) to[w * kLanes] = 0.f;
      }
    }
}

struct ScreenF32 {
#if defined(__AVX512F__)
  static constexpr int kGroup = 12;   // 24 accumulators of 32 registers
#elif defined(__AVX2__)
  static constexpr int kGroup = 3;    // 12 accumulators (two registers a vector) of 16
#else
  static constexpr int kGroup = 1;
#endif
  static constexpr bool kPacked = false, kInterleaved = true;
  // 16 lanes in as many registers as that takes: a vec<float> would live on the stack (AVX2: 14 GFLOP/s a core).
  struct Lanes {
    reg<float> part[kLanes / reg_lanes<float>];
  };
  using Acc = Lanes;
  using Words = Lanes;
  static constexpr int kParts = kLanes / reg_lanes<float>;
  static FASTSAE_INLINE Acc zero() { return Acc{}; }
  static FASTSAE_INLINE Words load_words(const uint32_t* p) {
    Words w;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) w.part[i] = load_reg(reinterpret_cast<const float*>(p) + i * reg_lanes<float>);
    return w;
  }
  static FASTSAE_INLINE Words broadcast(uint32_t word) {
    float f;
    std::memcpy(&f, &word, 4);
    Words w;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) w.part[i] = f - reg<float>{};
    return w;
  }
  static FASTSAE_INLINE Acc multiply_add(Acc a, Words w, Words x) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) a.part[i] += w.part[i] * x.part[i];
    return a;
  }
  static FASTSAE_INLINE vec<float> product(Acc a, int32_t) {
    vec<float> v;
    std::memcpy(&v, &a, sizeof v);
    return v;
  }
  static void pack_tile(const ScreenCall& call, int64_t tile, uint32_t* out) { pack_latents(call, tile, out); }
  static Narrowed narrow(const float* v, int64_t d, uint32_t* words) { return narrow_f32(v, d, words); }
};

}  // namespace

const ScreenKernel screen_f32 = {ScreenF32::kGroup, pack_panel<ScreenF32>, pass<ScreenF32, Lists>, pass<ScreenF32, Sieve>};

}  // namespace fastsae::FASTSAE_ISA
