// Appends to each token's list the latents of a chunk whose screened score v ± e reaches the token's bar: v + e > τ.
//
// A block takes TOKENS tokens and walks over the chunk, each warp a stretch of 32 packs of neighbouring columns at a time:
// the four numbers that a column's bound needs are read once for all its tokens, which divides that traffic, 8 times the
// scores' own, by 4 and leaves it to L1. Few scores survive (0.2 % at K = 32 of 131072), so all are looked at by a bound
// that is a little wider and costs eight instructions, and only a pack with something above it by the real one. The lists stay
// in the columns' order: survivors of a pack by bits, of a warp by a prefix sum, of the block by a count a warp; what does
// not fit a list is counted and not stored. NaN always survives. One barrier for 2048 columns: at N = 8192, where a chunk
// has 2048, a block does one round, and 2048 blocks share the chunk. Few tokens have wide chunks; there a block is 32 warps
// and one token.
//
// The wider bound. Let ρ = r + 2⁻¹⁸, and rest = p·A + q·B + |bias|·r + t, so that v + e = v + |v|·r + rest. If that is above
// τ, then v + rest·(1 + 2ρ) is above τ·(1 - ρ), or for τ < 0 above τ·(1 + 2ρ): where v >= 0 because (v + rest)·(1 + r) > τ,
// where v < 0 because |v|·r is at most r/(1 - r) of rest - τ. 2⁻¹⁸ is 64 roundings of anything in it. Where thresholds
// come by latent, a column's is taken off its bias, and τ is 0.
//
// Bytes: N·columns·2 from L2, N/TOKENS·columns·16 from L1 + 8 a survivor. Flops: 7·N·columns.
#include "encode.h"
#include "launch.h"
#include "screening.h"

namespace fastsae {
namespace {

template <class S> struct Chunk {
  const S* scores;
  const float *table, *bounds, *bars;  // bars null: thresholds by latent
  const int32_t* limit;
  float* values;
  int32_t *places, *counts;
  int64_t N, row_stride, width, chunk, stride, base, capacity;
  float roundoff;

  __device__ const S* row(int64_t n) const { return scores + n * row_stride; }
  __device__ bool reaches(int64_t n, int64_t c, const TokenBounds& bounds_of_n, float bar) const {
    const float bias = table[width + c];
    const float v = screened(widen(row(n)[c]), bounds_of_n.scale, table[c], bias);
    const float e = error_of(v, bounds_of_n, bias, table[2 * width + c], table[3 * width + c], roundoff);
    return !(v + e <= (bars ? bar : table[4 * width + c]));
  }
  __device__ void store(int64_t n, int slot, int64_t c, float token_scale) const {
    values[n * capacity + slot] = screened(widen(row(n)[c]), token_scale, table[c], table[width + c]);
    places[n * capacity + slot] = static_cast<int32_t>(base + c);
  }
};

// V<S> neighbouring numbers of a row of floats.
template <bool ALIGNED, int COUNT> __device__ inline void load_some(const float* row, int c, int end, float (&out)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += V<float>) {
    float pack[V<float>];
    load_pack<ALIGNED>(row, c + i, end, pack);
#pragma unroll
    for (int j = 0; j < V<float>; ++j) out[i + j] = pack[j];
  }
}

// A pack of a row of scores, left as it is: widened, it would take twice the registers.
template <bool ALIGNED, class S> __device__ inline Pack<S> load_scores(const S* row, int c, int end) {
  Pack<S> pack{};
  if constexpr (ALIGNED) {
    if (c < end) pack = *reinterpret_cast<const Pack<S>*>(row + c);
  } else {
#pragma unroll
    for (int i = 0; i < V<S>; ++i)
      if (c + i < end) pack.t[i] = row[c + i];
  }
  return pack;
}

// The sum of the lanes up to this one.
__device__ inline int sum_up_to_lane(int sum) {
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const int of_lane = __shfl_up_sync(ALL, sum, step);
    if (lane() >= step) sum += of_lane;
  }
  return sum;
}

template <bool ALIGNED, int TOKENS, int WARPS, int BLOCKS, class S>
__global__ void __launch_bounds__(WARPS* WARP, BLOCKS) append_kernel(Chunk<S> s) {
  constexpr int COLUMNS = V<S>;
  const int64_t first = int64_t{blockIdx.x} * TOKENS;
  const int columns = static_cast<int>(min(s.width, (*s.limit - s.chunk + s.stride - 1) / s.stride));
  if (columns <= 0) return;
  const float rho = s.roundoff + 1.f / (1 << 18), grow = 1.f + 2.f * rho, shrink = 1.f - rho;
  const auto lower = [&](float t) { return t * (t >= 0.f ? shrink : grow); };

  // What belongs to the tokens. filled and of_warp have two places, for odd and even rounds: one barrier a round is enough.
  SHARED(TokenBounds[TOKENS], exact);
  SHARED(float4[TOKENS], wide);  // scale, p, q, bar of the wider bound
  SHARED(float[TOKENS], bars);
  SHARED(int32_t[2][TOKENS], filled);
  SHARED(int32_t[2][TOKENS][WARPS], of_warp);
  if (threadIdx.x < TOKENS) {
    const int t = threadIdx.x;
    const int64_t n = first + t;
    const TokenBounds b = n < s.N ? token_bounds(s.bounds, s.N, n) : TokenBounds{};
    exact[t] = b;
    bars[t] = s.bars && n < s.N ? s.bars[n] : 0.f;
    wide[t] = float4{b.scale, b.p * grow, b.q * grow, lower(bars[t]) - 4e-37f};  // t is below 2e-37
    filled[0][t] = n < s.N ? s.counts[n] : 0;
  }
  __syncthreads();

  int round = 0;
  for (int start = 0; start < columns; start += WARPS * WARP * COLUMNS, round ^= 1) {
    // The wider bound: bit COLUMNS·t of `above` says that one of this thread's columns may be above the bar of token t.
    const int c = start + static_cast<int>(threadIdx.x) * COLUMNS;
    unsigned above = 0;
    {
      Pack<S> stored[TOKENS];
#pragma unroll
      for (int t = 0; t < TOKENS; ++t)
        stored[t] = load_scores<ALIGNED>(s.row(first + t), c, first + t < s.N ? columns : 0);
      float scale[COLUMNS], offset[COLUMNS], A[COLUMNS], B[COLUMNS];
      load_some<ALIGNED>(s.table, c, columns, scale);
      load_some<ALIGNED>(s.table + s.width, c, columns, offset);
      load_some<ALIGNED>(s.table + 2 * s.width, c, columns, A);
      load_some<ALIGNED>(s.table + 3 * s.width, c, columns, B);
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) offset[i] = fmaf(fabsf(offset[i]), rho * grow, offset[i]);
      if (!s.bars) {
        float threshold[COLUMNS];
        load_some<ALIGNED>(s.table + 4 * s.width, c, columns, threshold);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) offset[i] -= lower(threshold[i]);
      }
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        const float4 w = wide[t];
        bool some = false;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          const float v = fmaf(widen(stored[t].t[i]), w.x * scale[i], offset[i]);
          const float upper = fmaf(w.z, B[i], fmaf(w.y, A[i], v));
          some |= !(upper <= w.w) || upper < -3.4e38f;  // of a score of -inf, v + e is NaN
        }
        above |= static_cast<unsigned>(some) << COLUMNS * t;
      }
    }

    // The real one: bit COLUMNS·t + i stands for column i. Scores are in L1.
#pragma unroll 1
    for (int t = 0; t < TOKENS; ++t) {
      int total = 0;
      const unsigned mask = (1u << COLUMNS) - 1, mine = above >> COLUMNS * t & mask;
      if (__any_sync(ALL, mine)) {
        unsigned keep = 0;
        if (mine && first + t < s.N)
#pragma unroll 1
          for (int i = 0; i < COLUMNS; ++i)
            if (c + i < columns) keep |= static_cast<unsigned>(s.reaches(first + t, c + i, exact[t], bars[t])) << i;
        above = (above & ~(mask << COLUMNS * t)) | keep << COLUMNS * t;
        total = warp_sum(__popc(keep));
      }
      if (lane() == 0) of_warp[round][t][warp()] = total;
    }
    __syncthreads();

    // Store, after those that are there, those of earlier warps, and of earlier lanes; and count, for the next round.
#pragma unroll 1
    for (int t = 0; t < TOKENS; ++t) {
      const unsigned keep = above >> COLUMNS * t & ((1u << COLUMNS) - 1);
      if (!__any_sync(ALL, keep)) continue;
      int slot = filled[round][t] - __popc(keep) + sum_up_to_lane(__popc(keep));
      for (int w = 0; w < warp(); ++w) slot += of_warp[round][t][w];
#pragma unroll 1
      for (int i = 0; i < COLUMNS; ++i)
        if (keep >> i & 1) {
          if (slot < s.capacity) s.store(first + t, slot, c + i, exact[t].scale);
          ++slot;
        }
    }
    if (threadIdx.x < TOKENS) {
      const int t = threadIdx.x;
      int count = filled[round][t];
      for (int w = 0; w < WARPS; ++w) count += of_warp[round][t][w];
      filled[round ^ 1][t] = count;
      if (first + t < s.N) s.counts[first + t] = count;
    }
  }
}

}  // namespace

void append(const Where& where, const Array& scores, int64_t row_stride, const Array& table, const Array& bounds,
            const Array& bars, const Array& limit, const Array& values, const Array& places, const Array& counts,
            int64_t chunk, int64_t stride, int64_t base, bool per_latent, float roundoff) {
  const int64_t N = counts.rows;
  if (!N) return;
  counted("row_stride", row_stride), counted("chunk", chunk), counted("stride", stride), counted("base", base);
  fit("counts", counts, counted("N", N)), fit("values", values, N, counted("survivors", values.cols));
  fit("places", places, N, values.cols), fit("table", table, 5, counted("width", table.cols));
  fit("bounds", bounds, 4, N), fit("limit", limit, 1), fit("scores", scores, scores.rows);
  in_range("numbers of scores", scores.rows, (N - 1) * row_stride + table.cols, std::numeric_limits<int64_t>::max());
  if (!per_latent) fit("bars", bars, N);
  const auto run = [&](auto of_scores) {
    using S = decltype(of_scores);
    const Chunk<S> s{scores.as<const S>(), table.as<const float>(), bounds.as<const float>(),
                     per_latent ? nullptr : bars.as<const float>(), limit.as<const int32_t>(), values.as<float>(),
                     places.as<int32_t>(), counts.as<int32_t>(), N, row_stride, table.cols, chunk, stride, base,
                     values.cols, roundoff};
    const Array rows{scores.data, N, row_stride, scores.dtype};
    by_alignment([&](auto aligned) {
      constexpr bool ALIGNED = aligned.value;
      if (N <= FEW_TOKENS) launch(where, "append", append_kernel<ALIGNED, 1, 32, 1, S>, {dim3(N), dim3(1024)}, s);
      else launch(where, "append", append_kernel<ALIGNED, 4, 8, ALIGNED ? 3 : 2, S>, {dim3(ceil_div(N, 4)), dim3(256)}, s);
    }, rows, table);
  };
  if (scores.dtype == Dtype::f16) run(f16{});
  else run(float{});
}

}  // namespace fastsae
