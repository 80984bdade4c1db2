// Screening in 8 bits on AVX-512 VNNI: vpdpbusd multiplies unsigned latents (offset by 128) with signed tokens, four to a lane,
// at four times the rate of fp32. Integer sums are exact, so the whole error is what the two roundings lost.
#include "narrow.h"
#include "registry.h"
#include "screen_kernel.h"

namespace fastsae::FASTSAE_ISA {

struct ScreenI8 {
  static constexpr int kGroup = 12;   // 24 accumulators, 2 latent words and a broadcast: 27 of 32 registers
  static constexpr bool kPacked = true, kInterleaved = true;
  using Acc = __m512i;
  using Words = __m512i;
  static FASTSAE_INLINE Acc zero() { return _mm512_setzero_si512(); }
  static FASTSAE_INLINE Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static FASTSAE_INLINE Words broadcast(uint32_t word) { return _mm512_set1_epi32(int32_t(word)); }
  static FASTSAE_INLINE Acc multiply_add(Acc a, Words w, Words x) { return _mm512_dpbusd_epi32(a, w, x); }
  static FASTSAE_INLINE vec<float> product(Acc a, int32_t correction) {
    return (vec<float>)_mm512_cvtepi32_ps(_mm512_sub_epi32(a, _mm512_set1_epi32(correction)));
  }
  static Narrowed narrow(const float* v, int64_t d, uint32_t* words) { return narrow_i8<0>(v, d, words); }
};

const ScreenKernel screen_i8 = {ScreenI8::kGroup, pack_panel<ScreenI8>, pass<ScreenI8, Lists>, pass<ScreenI8, Sieve>};

}  // namespace fastsae::FASTSAE_ISA
