// Screening in bf16 on AVX-512 BF16: vdpbf16ps adds two products to a lane.
#include "narrow.h"
#include "registry.h"
#include "screen_kernel.h"

namespace fastsae::FASTSAE_ISA {

struct ScreenBf16 {
  static constexpr int kGroup = 12;
  static constexpr bool kPacked = true, kInterleaved = true;
  using Acc = __m512;
  using Words = __m512i;
  static FASTSAE_INLINE Acc zero() { return _mm512_setzero_ps(); }
  static FASTSAE_INLINE Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static FASTSAE_INLINE Words broadcast(uint32_t word) { return _mm512_set1_epi32(int32_t(word)); }
  static FASTSAE_INLINE Acc multiply_add(Acc a, Words w, Words x) {
    return _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)x);
  }
  static FASTSAE_INLINE vec<float> product(Acc a, int32_t) { return (vec<float>)a; }
  static Narrowed narrow(const float* v, int64_t d, uint32_t* words) { return narrow_bf16(v, d, words); }
};

const ScreenKernel screen_bf16 = {ScreenBf16::kGroup, pack_panel<ScreenBf16>, pass<ScreenBf16, Lists>, pass<ScreenBf16, Sieve>};

}  // namespace fastsae::FASTSAE_ISA
