// A row of fp32 numbers in a narrow format, with the norm of what was lost: measured here, so the bound of encode.h holds for
// any data, whatever the rounding.
#pragma once
#include <algorithm>
#include <cmath>

#include "encode.h"
#include "simd.h"

namespace fastsae::FASTSAE_ISA {

struct Narrowed {
  float scale;          // value of one step (1 for bf16 and f32)
  float norm;           // ‖row‖, rounded up
  float residual;       // ‖row - narrowed row‖, rounded up
  int32_t correction;   // i8 tokens: 128·Σ q, what the latents' offset of 128 adds to a product
};

// Sums of squares below are fp32 with relative error far under 1e-3, so this factor rounds a norm up. Squares of numbers
// below 2⁻⁷⁵ vanish, and products of denormals may be flushed: kFloor·√d, added to what is not 0, is more than they hold.
constexpr float kRoundUp = 1.001f;
constexpr float kFloor = 0x1p-62f;

inline float rounded_up_norm(float squares, int64_t d, bool zero) {
  return zero && squares == 0.f ? 0.f : kRoundUp * std::sqrt(squares) + kFloor * std::sqrt(float(d));
}

// Relative to ‖x‖‖W‖: the engine's score and the screening product each add at most D roundings of 2⁻²⁴, and a few for scaling.
inline float accumulation_error(int64_t d) { return float(2 * d + 128) * 0x1p-24f; }

FASTSAE_INLINE float max_abs(const float* v, int64_t d) {
  typedef int32_t i32x16 __attribute__((vector_size(64)));
  vec<float> top{};
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) {
    const vec<float> a = (vec<float>)((i32x16)load(v + i) & 0x7fffffff);
    top = a > top ? a : top;
  }
  float m = 0;
  for (int l = 0; l < 16; ++l) m = std::max(m, top[l]);
  for (; i < d; ++i) m = std::max(m, std::fabs(v[i]));
  return m;
}

inline Narrowed narrow_f32(const float* v, int64_t d, uint32_t* words) {
  if (words) std::memcpy(words, v, d * 4);
  return {1.f, rounded_up_norm(dot(v, v, d), d, max_abs(v, d) == 0.f), 0.f, 0};
}

inline Narrowed narrow_bf16(const float* v, int64_t d, uint32_t* words) {
  bf16* out = reinterpret_cast<bf16*>(words);
  float lost = 0;
#pragma omp simd reduction(+ : lost)
  for (int64_t i = 0; i < d; ++i) {
    const bf16 h = narrow<bf16>(v[i]);
    const float r = v[i] - widen(h);
    out[i] = h;
    lost += r * r;
  }
  const bool zero = max_abs(v, d) == 0.f;
  return {1.f, rounded_up_norm(dot(v, v, d), d, zero), rounded_up_norm(lost, d, zero), 0};
}

// q = round(v / scale) in -127 .. 127. OFFSET: stored as q + 128, unsigned, as the latents are.
template <int OFFSET> Narrowed narrow_i8(const float* v, int64_t d, uint32_t* words) {
  uint8_t* out = reinterpret_cast<uint8_t*>(words);
  const float top = max_abs(v, d), norm = rounded_up_norm(dot(v, v, d), d, top == 0.f);
  const bool finite = top <= 3e38f;   // else the caller scores the row in full; keep the conversion below defined
  const float scale = finite ? top / 127.f : top, inverse = finite && top > 1e-30f ? 127.f / top : 0.f;
  float lost = 0;
  int32_t sum = 0;
#pragma omp simd reduction(+ : lost, sum)
  for (int64_t i = 0; i < d; ++i) {
    // Adding and taking away 1.5·2²³ rounds to the nearest integer, without a call.
    const float q = (v[i] * inverse + 12582912.f) - 12582912.f;
    const float r = v[i] - q * scale;
    const int32_t n = q >= -127.f && q <= 127.f ? int32_t(q) : 0;   // NaN
    out[i] = uint8_t(n + OFFSET);
    sum += n;
    lost += r * r;
  }
  // q·scale is rounded once in the line above: at most 2⁻²⁴ of each narrowed number.
  return {scale, norm, rounded_up_norm(lost, d, top == 0.f) + 0x1p-22f * norm, sum * 128};
}

inline Narrowed narrow_row(Format format, const float* v, int64_t d, uint32_t* words) {
  switch (format) {
    case Format::i8: return narrow_i8<128>(v, d, words);
    case Format::f32: return narrow_f32(v, d, words);
    default: return narrow_bf16(v, d, words);
  }
}

// fp32 view of a row: itself, or widened into `buffer`.
FASTSAE_INLINE const float* as_floats(const Matrix& m, int64_t row, float* buffer) {
  if (m.dtype == Dtype::f32) return static_cast<const float*>(m.data) + row * m.stride;
  const bf16* p = static_cast<const bf16*>(m.data) + row * m.stride;
  for (int64_t d = 0; d < m.cols; ++d) buffer[d] = widen(p[d]);
  return buffer;
}

}  // namespace fastsae::FASTSAE_ISA
