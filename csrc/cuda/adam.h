// One step of torch.optim.Adam on numbers in registers, and how moments are stored.
//
//   m = m + (1-β₁)(g - m);  v = β₂ v + (1-β₂) g²;  p = p - lr/(1-β₁ᵗ) · m / (√v / √(1-β₂ᵗ) + eps)
//
// In float, with the root and the quotient rounded correctly: the approximate ones flush what is below 1e-38 to 0, and a
// step waits for memory either way. Fused multiply-adds are written out, so that every kernel gets the same bits. p is
// stepped with the moments before they are rounded to bfloat16. Source: Adam, arXiv:1412.6980 algorithm 1.
#pragma once
#include <type_traits>

#include "rounding.h"

namespace fastsae {

struct Betas {
  float beta1, rest1, beta2, rest2;  // β₁, 1-β₁, β₂, 1-β₂
};

struct Adam {  // of one step, for every parameter
  float step_size, inverse_root, eps;  // lr / (1-β₁ᵗ), 1 / √(1-β₂ᵗ)
  Betas betas;

  __device__ void operator()(float& p, float g, float& m, float& v) const {
    // As torch.lerp: from the nearer end, so that β₁ = 0 gives g itself.
    m = betas.rest1 < 0.5f ? fmaf(betas.rest1, g - m, m) : fmaf(-betas.beta1, g - m, g);
    v = fmaf(betas.beta2, v, __fmul_rn(__fmul_rn(betas.rest2, g), g));
    p = fmaf(-step_size, __fdiv_rn(m, fmaf(__fsqrt_rn(v), inverse_root, eps)), p);
  }
};

// Where the numbers of a step are: those that depend on its count lie on the device (adam.cu).
struct Step {
  const float* numbers;  // lr / (1-β₁ᵗ), 1 / √(1-β₂ᵗ), 1 or to skip the step 0
  float eps;
  Betas betas;

  __device__ bool skipped() const { return numbers[2] == 0.f; }
  __device__ Adam adam() const { return {numbers[0], numbers[1], eps, betas}; }
};

// The keys of the random bits of one parameter's m and v; null where moments are rounded to nearest.
struct Keys {
  const uint32_t* of;

  __device__ uint32_t m() const { return of ? of[0] : 0; }
  __device__ uint32_t v() const { return of ? of[1] : 0; }
};

// t as a moment is stored. index: its place in the tensor, mod 2³².
template <class Moment> __device__ inline Moment round_moment(float t, bool at_random, uint32_t key, uint32_t index) {
  if constexpr (std::is_same_v<Moment, bf16>)
    if (at_random) return round_at_random(t, key, index);
  return round_to<Moment>(t);
}

}  // namespace fastsae
