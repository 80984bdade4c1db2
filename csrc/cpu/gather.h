// out_d = Σ_e weight(e) · row(e)_d: the inner loop of decode and active_outer, sums of gathered rows.
//
// D is cut into tiles that stay in registers while all rows pass: one load and one multiply-add per register, no store
// until the end. Rows lie anywhere, so the tile that comes some 8 KB later in that stream is fetched meanwhile.
// N=4096, D=768, K=32 of 24576 rows, fp32, two Zen 5 cores: 5.2 ms; without the fetch 5.8; with the sum in L1 instead of
// registers 10.5 at best.
#pragma once
#include <algorithm>

#include "simd.h"

namespace fastsae::FASTSAE_ISA {

constexpr int kTile = kRegisterBytes == 64 ? 16 : 12;   // registers; half of what there are, the rest hold loads in flight
constexpr int64_t kAheadBytes = 8192, kAheadRows = 16;

// Keeps GCC 12 from folding the tile's offset into one index per register, which spills them all (AVX2: 13.7 ms for 9).
template <class T> FASTSAE_INLINE const T* in_register(const T* p) {
  asm("" : "+r"(p));
  return p;
}

// `Rows` names the entries of one sum: begin, end, last (end of all entries, those of later sums too),
// weight(e) -> acc_t<T>, and row(e) -> const T*. A weight of 0 adds nothing, whatever its row holds.
template <int REGISTERS, class T, class Rows, class Out>
FASTSAE_INLINE void sum_tile(const Rows& rows, int64_t d, int64_t next_d, Out* out) {
  using A = acc_t<T>;
  constexpr int L = reg_lanes<A>, kLine = 64 / sizeof(T);
  const int64_t length = rows.end - rows.begin;
  const int64_t distance = std::min(std::min(kAheadBytes / (REGISTERS * L * int64_t(sizeof(T))), kAheadRows), length);
  reg<A> sum[REGISTERS] = {};
  for (int64_t e = rows.begin; e < rows.end; ++e) {
    // What comes `distance` entries on: in this tile, else in this sum's next tile, else in the next sum.
    int64_t ahead = e + distance, ahead_d = d;
    if (ahead >= rows.end) {
      ahead_d = next_d;
      if (next_d) ahead -= length;
    }
    if (ahead < rows.last) {
      const T* p = in_register(rows.row(ahead) + ahead_d);
#pragma GCC unroll 16
      for (int i = 0; i < REGISTERS * L; i += kLine) __builtin_prefetch(p + i);
    }
    const A weight = rows.weight(e);
    if (weight == A(0)) continue;
    const T* row = in_register(rows.row(e) + d);
#pragma GCC unroll 16
    for (int r = 0; r < REGISTERS; ++r) sum[r] += weight * load_reg(row + r * L);
  }
#pragma GCC unroll 16
  for (int r = 0; r < REGISTERS; ++r) store_reg(out + d + r * L, sum[r]);
}

template <int REGISTERS, class T, class Rows, class Out>
FASTSAE_INLINE void sum_tiles(const Rows& rows, int64_t d, int64_t D, Out* out) {
  constexpr int64_t width = REGISTERS * reg_lanes<acc_t<T>>;
  for (; d + width <= D; d += width) sum_tile<REGISTERS, T>(rows, d, d + width < D ? d + width : 0, out);
  if constexpr (REGISTERS > 1) {
    sum_tiles<REGISTERS / 2, T>(rows, d, D, out);
  } else {
    for (; d < D; ++d) {
      acc_t<T> sum = 0;
      for (int64_t e = rows.begin; e < rows.end; ++e)
        if (const acc_t<T> weight = rows.weight(e); weight != 0) sum = multiply_add(weight, widen(rows.row(e)[d]), sum);
      out[d] = narrow<Out>(sum);
    }
  }
}

// `out`: D numbers of the stored type T, or of acc_t<T> for a partial sum. Added in the order of the entries.
template <class T, class Rows, class Out> void sum_rows(const Rows& rows, int64_t D, Out* out) {
  sum_tiles<kTile, T>(rows, 0, D, out);
}

}  // namespace fastsae::FASTSAE_ISA
