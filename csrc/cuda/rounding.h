// Stochastic rounding to bfloat16 by a counter: the same bits as reference.round_to_bf16.
//
//   key = mix(mix(mix(seed) + step) + stream);  bf16 = high half of (bits of t + low half of mix(key ^ index))
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

}  // namespace fastsae
