// t̂ = fp16(t · 2ᵉ) row by row, with ‖t̂‖ and ‖t - t̂‖ measured at the cast: the copy that a product screens with.
//
// A warp takes a row: once for its largest magnitude, which puts the row's largest element into [1/2, 1), and once, from
// L1 or L2, to round and to measure. The norms are those of the unscaled row, rounded up, so that a bound built on them
// holds: with x = x̂ + r, w = ŵ + q, |⟨x, w⟩ - ⟨x̂, ŵ⟩| <= ‖r‖‖ŵ‖ + ‖x‖‖q‖. A copy in fp32 is a plain one.
// Bytes: D·(sizeof(t) + 2) a row. Flops: 8·D a row.
#include "encode.h"
#include "launch.h"

namespace fastsae {
namespace {

constexpr int THREADS = 128, BLOCKS = 8;

template <class L, int COUNT> struct alignas(sizeof(L) * COUNT < 16 ? sizeof(L) * COUNT : 16) Few {
  L t[COUNT];
};

template <bool ALIGNED, class L, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) narrow_kernel(const T* t, L* low, float* scale, float* norm,
                                                                 float* residual, int64_t rows, int64_t D, int64_t padded) {
  const int64_t row = int64_t{blockIdx.x} * (THREADS / WARP) + warp();
  if (row >= rows) return;
  const T* source = t + row * D;
  L* target = low + row * padded;

  // The largest magnitude decides the scale: 2ᵉ brings it into [1/2, 1); of 0, inf and NaN something finite results.
  float up = 1.f, down = 1.f;
  if constexpr (std::is_same_v<L, f16>) {
    float most = 0.f;
#pragma unroll 4
    for (int64_t c = lane() * V<T>; c < D; c += WARP * V<T>) {
      float value[V<T>];
      load_pack<ALIGNED>(source, c, D, value);
#pragma unroll
      for (int i = 0; i < V<T>; ++i) most = fmaxf(most, fabsf(value[i]));
    }
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, step));
    const int exponent = min(max((__float_as_int(most) >> 23) & 0xff, 1), 252);
    up = __int_as_float((253 - exponent) << 23);
    down = __int_as_float((exponent + 1) << 23);
  }

  // Round, and measure what was kept and what was lost.
  float kept[V<T>] = {}, lost[V<T>] = {};
#pragma unroll(ALIGNED ? 2 : 1)
  for (int64_t c = lane() * V<T>; c < padded; c += WARP * V<T>) {
    float value[V<T>];
    load_pack<ALIGNED>(source, c, D, value);
    Few<L, V<T>> rounded;
#pragma unroll
    for (int i = 0; i < V<T>; ++i) {
      const float scaled = value[i] * up;
      rounded.t[i] = round_to<L>(scaled);
      const float back = widen(rounded.t[i]), rest = scaled - back;
      kept[i] = fmaf(back, back, kept[i]);
      lost[i] = fmaf(rest, rest, lost[i]);
    }
    if constexpr (ALIGNED) {
      *reinterpret_cast<Few<L, V<T>>*>(target + c) = rounded;
    } else {
#pragma unroll
      for (int i = 0; i < V<T>; ++i)
        if (c + i < padded) target[c + i] = rounded.t[i];
    }
  }
#pragma unroll
  for (int i = 1; i < V<T>; ++i) {
    kept[0] += kept[i];
    lost[0] += lost[i];
  }
  const float of_kept = warp_sum(kept[0]), of_lost = warp_sum(lost[0]);

  // 2⁻¹⁵ is more than sums of D/128 + 9 roundings and their roots can have lost, for every D that is narrowed.
  constexpr float ROUND_UP = 1.f + 1.f / 32768;
  if (lane() == 0) {
    scale[row] = down;
    norm[row] = __fsqrt_rn(of_kept) * down * ROUND_UP;
    residual[row] = __fsqrt_rn(of_lost) * down * ROUND_UP;
  }
}

}  // namespace

void narrow_rows(const Where& where, const Array& t, const Array& low, const Array& scale, const Array& norm,
                 const Array& residual) {
  in_range("columns of low", low.cols, t.cols, std::numeric_limits<int32_t>::max());
  fit("low", low, t.rows, low.cols), fit("scale", scale, t.rows), fit("norm", norm, t.rows), fit("residual", residual, t.rows);
  by_dtype(t.dtype, [&](auto of_t) {
    using T = decltype(of_t);
    const auto run = [&](auto of_low) {
      using L = decltype(of_low);
      const auto start = [&](auto aligned) {
        launch(where, "narrow_rows", narrow_kernel<aligned.value, L, T>,
               {dim3(ceil_div(t.rows, THREADS / WARP)), dim3(THREADS)}, t.as<T>(), low.as<L>(), scale.as<float>(),
               norm.as<float>(), residual.as<float>(), t.rows, t.cols, low.cols);
      };
      if (low.cols % V<T>) start(std::false_type{});
      else by_alignment(start, t, low);
    };
    if (low.dtype == Dtype::f16) run(f16{});
    else run(float{});
  });
}

}  // namespace fastsae
