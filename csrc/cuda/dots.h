// s = Σ_d x[d] · w[d]: the engine's exact score, in float and in one fixed order, a warp to a few of them.
//
// Lane l adds the packs l, l + 32, ... by fused multiply-adds, element by element, and the lanes are added by warp_sum; so
// active_dot, rescoring and the walks over all latents get the same bits, aligned rows or not. Products are IEEE float
// whatever the dtype, never TF32. |s - exact| <= (D/32 + 6) · 2⁻²⁴ · ‖x‖‖w‖.
#pragma once
#include "device.h"

namespace fastsae {

constexpr int DOTS = 4;  // dots of a warp at once: as many independent loads in flight in every lane

// s[j] = ⟨x[j], w[j]⟩, known to every lane; 0 where w[j] is null. SAME: x[0] stands for every x.
template <bool ALIGNED, bool SAME, class T>
__device__ inline void row_dots(const T* const (&x)[DOTS], const T* const (&w)[DOTS], int64_t D, float (&s)[DOTS]) {
#pragma unroll
  for (int j = 0; j < DOTS; ++j) s[j] = 0.f;
  for (int64_t c = lane() * V<T>; c < D; c += WARP * V<T>) {
    float a[DOTS][V<T>], b[DOTS][V<T>];
#pragma unroll
    for (int j = 0; j < DOTS; ++j)
      if (w[j]) load_pack<ALIGNED>(w[j], c, D, b[j]);
#pragma unroll
    for (int j = 0; j < DOTS; ++j)
      if (SAME ? j == 0 : w[j] != nullptr) load_pack<ALIGNED>(x[j], c, D, a[j]);
#pragma unroll
    for (int j = 0; j < DOTS; ++j)
      if (w[j]) {
#pragma unroll
        for (int i = 0; i < V<T>; ++i) s[j] = fmaf(a[SAME ? 0 : j][i], b[j][i], s[j]);
      }
  }
#pragma unroll
  for (int j = 0; j < DOTS; ++j) s[j] = warp_sum(s[j]);
}

// s[t][j] = ⟨x[t], w[j]⟩, known to every lane, of several x with the same rows of w, which are read once for all of them; 0
// where x[t] or w[j] is null. Each in the order of row_dots, and so with its bits.
template <bool ALIGNED, int TOKENS, class T>
__device__ inline void tile_dots(const T* const (&x)[TOKENS], const T* const (&w)[DOTS], int64_t D, float (&s)[TOKENS][DOTS]) {
#pragma unroll
  for (int t = 0; t < TOKENS; ++t)
#pragma unroll
    for (int j = 0; j < DOTS; ++j) s[t][j] = 0.f;
  for (int64_t c = lane() * V<T>; c < D; c += WARP * V<T>) {
    float b[DOTS][V<T>];
#pragma unroll
    for (int j = 0; j < DOTS; ++j)
      if (w[j]) load_pack<ALIGNED>(w[j], c, D, b[j]);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (!x[t]) continue;
      float a[V<T>];
      load_pack<ALIGNED>(x[t], c, D, a);
#pragma unroll
      for (int j = 0; j < DOTS; ++j)
        if (w[j]) {
#pragma unroll
          for (int i = 0; i < V<T>; ++i) s[t][j] = fmaf(a[i], b[j][i], s[t][j]);
        }
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t)
#pragma unroll
    for (int j = 0; j < DOTS; ++j) s[t][j] = warp_sum(s[t][j]);
}

}  // namespace fastsae
