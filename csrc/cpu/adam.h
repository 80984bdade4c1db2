// Adam on one row, with moments in the accumulation type or in bf16 rounded at random.
#pragma once
#include <cmath>

#include "simd.h"
#include "update.h"

namespace fastsae::FASTSAE_ISA {

// A permutation of 32-bit integers that scatters neighbours (lowbias32 by C. Wellons), as in fastsae/reference/update.py.
FASTSAE_INLINE uint32_t mix(uint32_t h) {
  h ^= h >> 16, h *= 0x7FEB352Du, h ^= h >> 15, h *= 0x846CA68Bu;
  return h ^ h >> 16;
}

inline uint32_t stream_key(uint32_t seed, int64_t step, uint32_t stream) {
  return mix(mix(mix(seed) + uint32_t(step)) + stream);
}

// Round up with probability equal to the fraction dropped: 16 random bits are added below the bits that stay.
FASTSAE_INLINE bf16 round_at_random(float v, uint32_t key, uint32_t index) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const uint32_t noise = (u & 0x7f800000u) == 0x7f800000u ? 0u : mix(key ^ index) & 0xffffu;
  return {uint16_t((u + noise) >> 16)};
}

template <class A> struct AdamStep {
  A beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, root2, eps;
  explicit AdamStep(const UpdateArgs& a)
      : beta1(A(a.beta1)), beta2(A(a.beta2)), one_minus_beta1(A(1 - a.beta1)), one_minus_beta2(A(1 - a.beta2)),
        step_size(A(a.step_size)), root2(A(a.root2)), eps(A(a.eps)) {}
};

// p -= step_size · m / (√v / root2 + eps) for `length` numbers, `first` being their flat index in the parameter.
template <class T, class S>
FASTSAE_INLINE void adam_row(const AdamStep<acc_t<T>>& s, T* p, S* m, S* v, const acc_t<T>* g, int64_t length, uint32_t first,
                             uint32_t key_m, uint32_t key_v) {
  using A = acc_t<T>;
#pragma omp simd
  for (int64_t d = 0; d < length; ++d) {
    const A gd = g[d];
    const A m_old = widen(m[d]);
    const A m_new = m_old + s.one_minus_beta1 * (gd - m_old);
    const A v_new = s.beta2 * A(widen(v[d])) + s.one_minus_beta2 * gd * gd;
    p[d] = narrow<T>(A(widen(p[d])) - s.step_size * (m_new / (std::sqrt(v_new) / s.root2 + s.eps)));
    if constexpr (std::is_same_v<S, A>) {
      m[d] = m_new, v[d] = v_new;
    } else {
      m[d] = round_at_random(float(m_new), key_m, first + uint32_t(d));
      v[d] = round_at_random(float(v_new), key_v, first + uint32_t(d));
    }
  }
}

}  // namespace fastsae::FASTSAE_ISA
