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

// Relative to ‖x‖‖W‖: the engine's score and the screening product each add at most D roundings of 2⁻²⁴, and 128 are more
// than those of scaling and of a change of basis: two factors, and two stages for each bit of kLargestBlock.
inline float accumulation_error(int64_t d) { return float(2 * d + 128) * 0x1p-24f; }

FASTSAE_INLINE float max_abs(const float* v, int64_t d) {
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

// -- the basis -----------------------------------------------------------------------------------------------------------

// 8 bits have one step for a whole row, so what counts is its largest number: rotated, large and small are mixed. The other
// formats have an exponent for each number, and are only balanced.
constexpr int64_t kLargestBlock = 256;

// Numbers in a block of the rotation: the largest power of two that divides d; 1: no rotation.
inline int64_t rotation_block(Format format, int64_t d) {
  return format != Format::i8 || d % 16 || !d ? 1 : std::min(d & -d, kLargestBlock);
}

// One stage of a Walsh-Hadamard transform inside a vector: lanes whose bit is clear become sums, the others differences.
template <int BIT> FASTSAE_INLINE vec<float> butterfly(vec<float> v) {
  constexpr i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vec<float> signs = (lane & BIT) != 0 ? splat(-1.f) : splat(1.f);
  return __builtin_shuffle(v, lane ^ BIT) + signs * v;
}

// H(gain · v∘factors) of 16·VECTORS numbers, H the Walsh-Hadamard matrix of ±1.
template <int VECTORS> FASTSAE_INLINE void turn_block(const float* v, const float* factors, float gain, float* out) {
  vec<float> r[VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; ++i)
    r[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(v + 16 * i) * (load(factors + 16 * i) * gain)))));
#pragma GCC unroll 4
  for (int step = 1; step < VECTORS; step *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; ++i)
      if (!(i & step)) {
        const vec<float> a = r[i], b = r[i + step];
        r[i] = a + b, r[i + step] = a - b;
      }
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; ++i) std::memcpy(out + 16 * i, &r[i], sizeof r[i]);
}

template <int VECTORS> void turn_row(const float* v, int64_t d, const float* factors, float gain, float* out) {
  for (int64_t i = 0; i < d; i += 16 * VECTORS) turn_block<VECTORS>(v + i, factors + i, gain, out + i);
}

enum class Side { token, latent };

// A row in the screen's basis: v itself where it has none, else in `out`. H is orthogonal but for a factor √B; the latents'
// rows are divided by B, a power of two, so that nothing is rounded to make up for it.
inline const float* in_basis(const Screen& s, Side side, const float* v, float* out) {
  if (!s.factors || s.format == Format::f32) return v;
  const float* factors = s.factors + (side == Side::latent ? s.d : 0);
  const int64_t block = rotation_block(s.format, s.d);
  const float gain = side == Side::latent ? 1.f / float(block) : 1.f;
  switch (block) {
    case 256: turn_row<16>(v, s.d, factors, gain, out); break;
    case 128: turn_row<8>(v, s.d, factors, gain, out); break;
    case 64: turn_row<4>(v, s.d, factors, gain, out); break;
    case 32: turn_row<2>(v, s.d, factors, gain, out); break;
    case 16: turn_row<1>(v, s.d, factors, gain, out); break;
    default:
      for (int64_t i = 0; i < s.d; ++i) out[i] = v[i] * factors[i];
  }
  return out;
}

// -- the formats ---------------------------------------------------------------------------------------------------------

inline Narrowed narrow_f32(const float* v, int64_t d, uint32_t* words) {
  if (words) std::memcpy(words, v, d * 4);
  return {1.f, rounded_up_norm(dot(v, v, d), d, max_abs(v, d) == 0.f), 0.f, 0};
}

// Words, both sums of squares and whether all is 0, in one pass.
inline Narrowed narrow_bf16(const float* v, int64_t d, uint32_t* words) {
  typedef uint32_t bits __attribute__((vector_size(kRegisterBytes)));
  constexpr int L = reg_lanes<float>, U = 2;
  bf16* out = reinterpret_cast<bf16*>(words);
  reg<float> squares[U] = {}, lost[U] = {};
  bits any{};
  int64_t i = 0;
  for (; i + U * L <= d; i += U * L)
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      const reg<float> a = load_reg(v + i + u * L);
      store_reg(out + i + u * L, a);
      const reg<float> r = a - load_reg(out + i + u * L);
      squares[u] += a * a, lost[u] += r * r, any |= (bits)a << 1;
    }
  float square = sum_lanes<float>(squares[0] + squares[1]), loss = sum_lanes<float>(lost[0] + lost[1]);
  bool zero = true;
  for (int l = 0; l < L; ++l) zero &= any[l] == 0;
  for (; i < d; ++i) {
    out[i] = narrow<bf16>(v[i]);
    const float r = v[i] - widen(out[i]);
    square = multiply_add(v[i], v[i], square), loss = multiply_add(r, r, loss), zero &= v[i] == 0.f;
  }
  return {1.f, rounded_up_norm(square, d, zero), rounded_up_norm(loss, d, zero), 0};
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

// A row brought into the screen's basis, through `scratch` of d numbers, and narrowed by narrow(row, d, words).
template <class Narrow> Narrowed narrow_in_basis(const Screen& s, Side side, const float* v, float* scratch, uint32_t* words,
                                                 Narrow narrow) {
  const float* turned = in_basis(s, side, v, scratch);
  Narrowed n = narrow(turned, s.d, words);
  // A row that vanished in there is not 0: what its norm and its loss are, the floor bounds.
  if (n.norm == 0.f && turned != v && max_abs(v, s.d) != 0.f) n.norm = n.residual = rounded_up_norm(0.f, s.d, false);
  return n;
}

// fp32 view of a row: itself, or widened into `buffer`.
FASTSAE_INLINE const float* as_floats(const Matrix& m, int64_t row, float* buffer) {
  if (m.dtype == Dtype::f32) return static_cast<const float*>(m.data) + row * m.stride;
  const bf16* p = static_cast<const bf16*>(m.data) + row * m.stride;
  for (int64_t d = 0; d < m.cols; ++d) buffer[d] = widen(p[d]);
  return buffer;
}

}  // namespace fastsae::FASTSAE_ISA
