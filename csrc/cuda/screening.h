// The bound on the error of a screened score, as fastsae/backends/gpu/bounds.py writes it and proves it: |v - s| <= e with
//     v = ŝ · scale_n · scale_i + bias_i        e = p_n · A_i + q_n · B_i + (|v| + |bias_i|) · r + t_n
// from a table (chunks, TABLE_ROWS, width) of latents and the bounds (4, N) of tokens. t_n is left out for a latent of
// zeros, so that nothing of it survives a bar of 0.
#pragma once
#include "device.h"

namespace fastsae {

constexpr int64_t FEW_TOKENS = 264;  // two blocks for each multiprocessor of an H100: so many can have one each
constexpr int TABLE_ROWS = 5;  // scale, bias, A, B, threshold

struct TokenBounds {
  float scale, p, q, tiny;
};

__device__ inline TokenBounds token_bounds(const float* bounds, int64_t N, int64_t n) {
  return {bounds[n], bounds[N + n], bounds[2 * N + n], bounds[3 * N + n]};
}

// The same bits wherever a score is looked at.
__device__ inline float screened(float stored, float token_scale, float scale, float bias) {
  return fmaf(stored, __fmul_rn(token_scale, scale), bias);
}

__device__ inline float error_of(float v, const TokenBounds& t, float bias, float A, float B, float roundoff) {
  const float rounding = (fabsf(v) + fabsf(bias)) * roundoff, slack = A + B > 0.f ? t.tiny : 0.f;
  return t.p * A + t.q * B + rounding + slack;
}

}  // namespace fastsae
