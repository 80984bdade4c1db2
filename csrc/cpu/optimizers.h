// One optimizer step on a run of numbers, with moments in the accumulation type, in bf16 or in 8 bits (rounding.h).
// Formulas: fastsae/reference/optimizers.py.
#pragma once
#include <cmath>

#include "rounding.h"
#include "update.h"

namespace fastsae::FASTSAE_ISA {

template <class A> struct StepNumbers {
  A beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, root2, eps, lr, kept;
  explicit StepNumbers(const OptimizerArgs& o)
      : beta1(A(o.beta1)), beta2(A(o.beta2)), one_minus_beta1(A(1 - o.beta1)), one_minus_beta2(A(1 - o.beta2)),
        step_size(A(o.step_size)), root2(A(o.root2)), eps(A(o.eps)), lr(A(o.lr)), kept(A(o.kept)) {}
};

struct Keys {
  uint32_t m, v;   // of the streams of random bits
};

template <class A> FASTSAE_INLINE A sign_of(A v) { return A(v > A(0)) - A(v < A(0)); }

template <class S, class A> FASTSAE_INLINE S stored_as(A v, uint32_t key, uint32_t index) {
  if constexpr (std::is_same_v<S, A>) return v;
  else return round_at_random(float(v), key, index);
}

// `length` numbers, `first` being their flat index in the whole parameter. Where two products are added, multiply_add says which is
// fused with the sum: the compiler would choose for each instance of this loop, and storage would decide over a last bit.
template <OptimizerKind KIND, class T, class S>
FASTSAE_INLINE void step_run(const StepNumbers<acc_t<T>> s, T* p, S* m, S* v, const acc_t<T>* g, int64_t length,
                             uint32_t first, Keys keys) {
  using A = acc_t<T>;
#pragma omp simd
  for (int64_t d = 0; d < length; ++d) {
    const A gd = g[d], old = A(widen(p[d]));
    if constexpr (KIND == OptimizerKind::signsgd) {
      p[d] = narrow<T>(multiply_add(-s.lr, sign_of(gd), old * s.kept));
    } else if constexpr (KIND == OptimizerKind::lion) {
      const A m_old = widen(m[d]);
      const A turning = multiply_add(s.one_minus_beta1, gd, s.beta1 * m_old);
      p[d] = narrow<T>(multiply_add(-s.lr, sign_of(turning), old * s.kept));
      m[d] = stored_as<S>(multiply_add(s.one_minus_beta2, gd, s.beta2 * m_old), keys.m, first + uint32_t(d));
    } else {
      const A m_old = widen(m[d]);
      const A m_new = m_old + s.one_minus_beta1 * (gd - m_old);
      const A v_new = s.beta2 * A(widen(v[d])) + s.one_minus_beta2 * gd * gd;
      const A move = m_new / (std::sqrt(v_new) / s.root2 + s.eps);
      if constexpr (KIND == OptimizerKind::adam) p[d] = narrow<T>(old - s.step_size * move);
      else p[d] = narrow<T>(multiply_add(-s.step_size, move, old * s.kept));
      m[d] = stored_as<S>(m_new, keys.m, first + uint32_t(d));
      v[d] = stored_as<S>(v_new, keys.v, first + uint32_t(d));
    }
  }
}

// The same with moments in 8 bits, block by block: widened, stepped, and rounded again.
template <OptimizerKind KIND, class T>
FASTSAE_INLINE void step_run_8bit(const StepNumbers<acc_t<T>>& s, T* p, uint8_t* m, uint8_t* v, float* m_scales,
                                  float* v_scales, const acc_t<T>* g, int64_t length, uint32_t first, Keys keys) {
  using A = acc_t<T>;
  A wide_m[kScaleBlock], wide_v[kScaleBlock];
  for (int64_t b = 0; b < length; b += kScaleBlock, ++m_scales, ++v_scales) {
    const int64_t n = std::min(kScaleBlock, length - b);
    decode_block(m + b, *m_scales, n, wide_m), decode_block(v + b, *v_scales, n, wide_v);
    step_run<KIND, T, A>(s, p + b, wide_m, wide_v, g + b, n, 0, keys);
    encode_block<false>(wide_m, n, m + b, m_scales, keys.m, first + uint32_t(b));
    encode_block<true>(wide_v, n, v + b, v_scales, keys.v, first + uint32_t(b));
  }
}

// One row of a parameter, whatever its optimizer and however its moments are stored. row: row `i` of p, in its own type or
// widened. The choice costs nothing beside a row, and templates on it would multiply everything that calls this.
template <class A, class R>
void step_row(const OptimizerArgs& o, const StepNumbers<A>& s, const Parameter& p, R* row, int64_t i, int64_t length,
              const A* g, Keys keys) {
  const int64_t at = i * length, scales_at = i * ((length + kScaleBlock - 1) / kScaleBlock);
  const uint32_t first = p.before + uint32_t(at);
  const auto step = [&](auto kind, auto stored) {
    using S = decltype(stored);
    step_run<kind.value, R, S>(s, row, static_cast<S*>(p.m) + at, static_cast<S*>(p.v) + at, g, length, first, keys);
  };
  const auto adam = [&](auto kind) {
    switch (p.stored) {
      case Stored::wide: return step(kind, A{});
      case Stored::bf16: return step(kind, bf16{});
      case Stored::fp8:
        return step_run_8bit<kind.value>(s, row, static_cast<uint8_t*>(p.m) + at, static_cast<uint8_t*>(p.v) + at,
                                         p.m_scales + scales_at, p.v_scales + scales_at, g, length, first, keys);
    }
  };
  switch (o.kind) {
    case OptimizerKind::adam: return adam(std::integral_constant<OptimizerKind, OptimizerKind::adam>{});
    case OptimizerKind::adamw: return adam(std::integral_constant<OptimizerKind, OptimizerKind::adamw>{});
    case OptimizerKind::lion: {
      const std::integral_constant<OptimizerKind, OptimizerKind::lion> lion;
      return p.stored == Stored::bf16 ? step(lion, bf16{}) : step(lion, A{});
    }
    case OptimizerKind::signsgd: return step(std::integral_constant<OptimizerKind, OptimizerKind::signsgd>{}, A{});
  }
}

}  // namespace fastsae::FASTSAE_ISA
