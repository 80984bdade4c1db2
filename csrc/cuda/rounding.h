// Stochastic rounding by a counter, to bfloat16 and to 8 bits: the same bits as fastsae/reference/rounding.py.
//
//   key = mix(mix(mix(seed) + step) + stream);  bf16 = high half of (bits of t + low half of mix(key ^ index))
//   q = t / scale, scale = absmax / 448 of the block;  8 bits = high 12 of (bits of q + low 20 of mix(key ^ index))
//
// The random bits depend on (seed, step, stream, place in the tensor) alone, so no order of threads can change them.
#pragma once
#include "device.h"

namespace fastsae {

// A permutation of 32 bits that scatters neighbours (lowbias32 by C. Wellons).
__device__ inline uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h *= 0x846CA68Bu;
  return h ^ h >> 16;
}

// The key of one tensor in one step; seed and step count mod 2³².
__device__ inline uint32_t stream_key(uint32_t seed, uint32_t step, uint32_t stream) {
  return mix(mix(mix(seed) + step) + stream);
}

// t rounded up or down at random, so that its mean is t. index: its place in the tensor, mod 2³².
__device__ inline bf16 round_at_random(float t, uint32_t key, uint32_t index) {
  uint32_t bits = __float_as_uint(t);
  // bf16's largest number stays, which would become infinite, and so do infinities and NaN.
  if ((bits & 0x7FFFFFFFu) < 0x7F7F0000u) bits += mix(key ^ index) & 0xFFFFu;
  return __ushort_as_bfloat16(static_cast<unsigned short>(bits >> 16));
}

constexpr int SCALED = 4 * WARP;  // numbers of a row that share a scale: a warp's, four to a lane

// The scale of a block. NaN and infinities, which no number exceeds as bits, give one that is not finite.
__device__ inline float block_scale(const float (&t)[4]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(t[i]) & 0x7FFFFFFFu);
  return __fdiv_rn(__int_as_float(static_cast<int>(warp_max(largest))), 448.f);
}

// t / scale rounded up or down at random. POSITIVE: a positive number never becomes 0.
template <bool POSITIVE> __device__ inline fp8 round_at_random(float t, float scale, uint32_t key, uint32_t index) {
  const bool usable = scale > 0.f && scale < INFINITY;
  const uint32_t bits = __float_as_uint(usable ? __fdiv_rn(t, scale) : 0.f), size = bits & 0x7FFFFFFFu;
  const uint32_t noise = mix(key ^ index) & 0xFFFFFu;
  uint32_t code;
  if (size >= 0x3C800000u)  // 2⁻⁶, the smallest normal number: 120 exponents of 8 lie below what is stored
    code = min(((size + noise) >> 20) - 960u, 0x7Eu);
  else
    code = static_cast<uint32_t>(fmaf(__int_as_float(static_cast<int>(size)), 512.f, static_cast<float>(noise) * 0x1p-20f));
  if (POSITIVE && t > 0.f && !code) code = 1;
  return {static_cast<uint8_t>(code | (bits >> 24 & 0x80u))};
}

}  // namespace fastsae
