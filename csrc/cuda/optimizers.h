// One step of each optimizer on numbers in registers, and how moments are stored.
//
//   adam      m = m + (1-β₁)(g - m);  v = β₂ v + (1-β₂) g²;  p = p·kept - lr/(1-β₁ᵗ) · m / (√v / √(1-β₂ᵗ) + eps)
//   lion      p = p·kept - lr · sign(β₁ m + (1-β₁) g);  m = β₂ m + (1-β₂) g
//   signsgd   p = p·kept - lr · sign(g)
//
// kept = 1 - lr · weight_decay, 1 for plain Adam. In float, with the root and the quotient rounded correctly: the
// approximate ones flush what is below 1e-38 to 0, and a step waits for memory either way. Fused multiply-adds are written
// out, so that every kernel gets the same bits. p is stepped with the moments before they are rounded.
//
// A kernel is compiled for each storage of moments, which decides the bytes that it moves. The rule is chosen inside, once
// for each row: loops over columns are there once for each, and no kernel. Formulas: fastsae/reference/optimizers.py.
#pragma once
#include <type_traits>

#include "rounding.h"

namespace fastsae {

enum class Rule : int32_t { adam, lion, signsgd, none };  // none: no step, norms of gradients only

inline Rule rule_of(int64_t number) {
  if (number < 0 || number > static_cast<int64_t>(Rule::none)) throw std::invalid_argument("there is no such rule");
  return static_cast<Rule>(number);
}
inline int moments_of(Rule rule) { return rule == Rule::adam ? 2 : rule == Rule::lion ? 1 : 0; }

struct Betas {
  float beta1, rest1, beta2, rest2;  // β₁, 1-β₁, β₂, 1-β₂
};

__device__ inline float sign_of(float t) { return static_cast<float>((t > 0.f) - (t < 0.f)); }  // 0 of NaN

struct Stepper {  // of one step, for every parameter
  float step_size, inverse_root, kept, eps;  // the rule's learning rate, 1 / √(1-β₂ᵗ)
  Betas betas;

  // m and v stay as they are where the rule keeps none.
  template <Rule RULE> __device__ void step(float& p, float g, float& m, float& v) const {
    float move;
    if constexpr (RULE == Rule::adam) {
      // As torch.lerp: from the nearer end, so that β₁ = 0 gives g itself.
      m = betas.rest1 < 0.5f ? fmaf(betas.rest1, g - m, m) : fmaf(-betas.beta1, g - m, g);
      v = fmaf(betas.beta2, v, __fmul_rn(__fmul_rn(betas.rest2, g), g));
      move = __fdiv_rn(m, fmaf(__fsqrt_rn(v), inverse_root, eps));
    } else if constexpr (RULE == Rule::lion) {
      move = sign_of(fmaf(betas.rest1, g, __fmul_rn(betas.beta1, m)));
      m = fmaf(betas.rest2, g, __fmul_rn(betas.beta2, m));
    } else {
      move = sign_of(g);
    }
    p = fmaf(-step_size, move, __fmul_rn(p, kept));
  }
};

// Where the numbers of a step are: those that depend on its count lie on the device (step_numbers.cu).
struct Step {
  const float* numbers;  // the step size, 1 / √(1-β₂ᵗ), 1 or to skip the step 0, kept, what gradients are multiplied by
  float eps;
  Betas betas;
  Rule rule;

  __device__ bool skipped() const { return numbers[2] == 0.f; }
  __device__ Stepper stepper() const { return {numbers[0], numbers[1], numbers[3], eps, betas}; }
  __device__ float grad_scale() const { return numbers[4]; }
};

template <Rule RULE> constexpr bool HAS_M = RULE == Rule::adam || RULE == Rule::lion;
template <Rule RULE> constexpr bool HAS_V = RULE == Rule::adam;

// The keys of the random bits of one parameter's m and v, and how many numbers of the whole parameter come before the first
// one here, mod 2³²: a part of the latents is rounded as it is in the whole.
struct Keys {
  const uint32_t* of;
  uint32_t before;

  __device__ uint32_t m() const { return of[0]; }
  __device__ uint32_t v() const { return of[1]; }
};

// t as a moment is stored in 16 bits or more: float, or bfloat16 rounded at random. index: its place in the whole tensor, mod 2³².
template <class Moment> __device__ inline Moment round_moment(float t, uint32_t key, uint32_t index) {
  if constexpr (std::is_same_v<Moment, bf16>) return round_at_random(t, key, index);
  return round_to<Moment>(t);
}

// One parameter, its moments as far as the rule keeps them, the scales of those in 8 bits, and its keys.
template <class T, class Moment> struct Stepped {
  T* p;
  Moment *m, *v;
  float *m_scales, *v_scales;
  Keys keys;
};

// Four numbers of a moment from what was stored. scale: of 8 bits; else it is not used.
template <class Moment> __device__ inline void widen_moment(float scale, float (&t)[4]) {
  if constexpr (std::is_same_v<Moment, fp8>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) t[i] *= scale;
  }
}

// Rounds four numbers of a moment in row `row` of length D; all lanes of a warp come here, and those of 8 bits have the
// numbers of one block together, with zeros past the end of the row. c[i]: their columns. POSITIVE: v, which stays so.
template <bool POSITIVE, class Moment>
__device__ inline void round_moments(const float (&t)[4], const Keys& keys, int64_t row, int64_t D, const int (&c)[4],
                                     float* scales, Moment (&out)[4]) {
  const uint32_t key = POSITIVE ? keys.v() : keys.m(), first = keys.before + static_cast<uint32_t>(row * D);
  if constexpr (std::is_same_v<Moment, fp8>) {
    const float scale = block_scale(t);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = round_at_random<POSITIVE>(t[i], scale, key, first + c[i]);
    if (lane() == 0 && c[0] < D) scales[row * ceil_div(D, SCALED) + c[0] / SCALED] = scale;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = round_moment<Moment>(t[i], key, first + c[i]);
  }
}

template <class Moment> __device__ inline float scale_at(const float* scales, int64_t row, int64_t D, int c) {
  if constexpr (std::is_same_v<Moment, fp8>) return c < D ? scales[row * ceil_div(D, SCALED) + c / SCALED] : 0.f;
  return 0.f;
}

// Calls f with the rule as a type, of those that moments can be stored for like this: 8 bits are Adam's, and a rule without
// moments has the kernel of float ones.
template <class Moment, class F> __device__ inline void by_rule(Rule rule, const F& f) {
  if (rule == Rule::adam) return f(std::integral_constant<Rule, Rule::adam>{});
  if constexpr (!std::is_same_v<Moment, fp8>)
    if (rule == Rule::lion) return f(std::integral_constant<Rule, Rule::lion>{});
  if constexpr (std::is_same_v<Moment, float>)
    if (rule == Rule::signsgd) return f(std::integral_constant<Rule, Rule::signsgd>{});
}

}  // namespace fastsae
