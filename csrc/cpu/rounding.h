// Narrow storage of moments, rounded at random: bf16, and 8 bits under a scale for each block of a row. Formulas and the
// reason why nearest will not do: fastsae/reference/rounding.py, whose bits these are.
#pragma once
#include <algorithm>
#include <limits>

#include "simd.h"

namespace fastsae::FASTSAE_ISA {

constexpr int64_t kScaleBlock = 128;   // numbers of a row that share a scale
constexpr float kLargest8 = 448.f;     // of e4m3, as code 126; codes from 8 on are normal, those below count steps of 2⁻⁹

// A permutation of 32-bit integers that scatters neighbours (lowbias32 by C. Wellons).
FASTSAE_INLINE uint32_t mix(uint32_t h) {
  h ^= h >> 16, h *= 0x7FEB352Du, h ^= h >> 15, h *= 0x846CA68Bu;
  return h ^ h >> 16;
}

inline uint32_t stream_key(uint32_t seed, int64_t step, uint32_t stream) {
  return mix(mix(mix(seed) + uint32_t(step)) + stream);
}

FASTSAE_INLINE uint32_t bits_of(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}

FASTSAE_INLINE float from_bits(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

// Round up with probability equal to the fraction dropped: 16 random bits are added below the bits that stay. Not from
// bf16's largest number on, 0x7f7f: above it is infinity.
FASTSAE_INLINE bf16 round_at_random(float v, uint32_t key, uint32_t index) {
  const uint32_t u = bits_of(v);
  const uint32_t noise = (u & 0x7fffffffu) >= 0x7f7f0000u ? 0u : mix(key ^ index) & 0xffffu;
  return {uint16_t((u + noise) >> 16)};
}

// yes where `chosen`, else no, without a branch: GCC 12 vectorizes no loop that would compute a float for one side only.
FASTSAE_INLINE uint32_t pick(bool chosen, uint32_t yes, uint32_t no) { return no ^ ((yes ^ no) & -uint32_t(chosen)); }

template <class A> FASTSAE_INLINE void decode_block(const uint8_t* codes, float scale, int64_t n, A* out) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) {
    const int32_t code = codes[d], size = code & 0x7f;
    const uint32_t small = bits_of(float(size) * 0x1p-9f), normal = uint32_t(size + 960) << 20;   // 960: exponent 127 - 7
    const uint32_t value = pick(size < 8, small, normal) | pick(size == 127, 0x7fc00000u, 0u);    // code 127 is NaN
    out[d] = from_bits(value | uint32_t(code & 0x80) << 24) * scale;
  }
}

// KEEP_POSITIVE: a positive number never becomes code 0.
template <bool KEEP_POSITIVE, class A>
FASTSAE_INLINE void encode_block(const A* t, int64_t n, uint8_t* codes, float* scale, uint32_t key, uint32_t first) {
  uint32_t top = 0;   // compared as integers: NaN is largest, and so not lost
#pragma omp simd reduction(max : top)
  for (int64_t d = 0; d < n; ++d) top = std::max(top, bits_of(float(t[d])) & 0x7fffffffu);
  const float by = from_bits(top) / kLargest8;
  *scale = by;
  if (!(by > 0 && by < std::numeric_limits<float>::infinity())) {
    for (int64_t d = 0; d < n; ++d) codes[d] = KEEP_POSITIVE && float(t[d]) > 0;
    return;
  }
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) {
    const float value = float(t[d]);
    const uint32_t q = bits_of(value / by), size = q & 0x7fffffffu, noise = mix(key ^ (first + uint32_t(d))) & 0xfffffu;
    const int32_t normal = std::min(int32_t((size + noise) >> 20) - 960, 126);
    const int32_t small = int32_t(from_bits(size) * 512.f + float(int32_t(noise)) * 0x1p-20f);
    uint32_t code = pick(size >= 0x3c800000u, uint32_t(normal), uint32_t(small));   // normal from 2⁻⁶ on
    if constexpr (KEEP_POSITIVE) code |= uint32_t(value > 0) & uint32_t(code == 0);
    codes[d] = uint8_t(code | (q >> 24 & 0x80u));
  }
}

}  // namespace fastsae::FASTSAE_ISA
