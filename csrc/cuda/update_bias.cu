// The decoder's bias: sums of columns in a fixed order, then its step.
//
//   db_dec = Σ_n grad_n over the terms that have the bias - Σ_i db_enc_i · W_enc_i (pre_bias)
//
// A block of column_sums adds ROWS rows, a warp each eighth of them, four columns to a thread, to one row of a workspace; a
// block of update_bias adds the workspace's rows, subtracts those of the pre-bias term, and takes the step on 32 columns.
// At N = 8192 and D = 4096 that is 2048 blocks for a term, and 64 rows a term for the second.
// Bytes: N·D·sizeof(grad) for each term, R·D·4 for the pre-bias term, and twice a (ROWS)th of both. Flops: (N + R)·D.
#include <cmath>
#include <vector>

#include "latent_rows.h"
#include "update.h"

namespace fastsae {
namespace {

constexpr int WARPS = 8, ROWS = 128, BLOCKS = 4;
constexpr int EACH = 4;  // columns of a thread in column_sums, 32 apart, so that rows need no alignment

// sums[p] (D,) = Σ of the rows p·ROWS .. (p + 1)·ROWS of t.
template <class T>
__global__ void __launch_bounds__(WARPS* WARP, BLOCKS) column_sums_kernel(const T* t, float* sums, int64_t rows, int64_t D) {
  const int64_t p = blockIdx.x, first = int64_t{blockIdx.y} * (EACH * WARP) + lane();
  float total[EACH] = {};
  for (int step = 0; step < ROWS; step += 4 * WARPS) {
    float part[4][EACH];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t row = p * ROWS + step + r * WARPS + warp();
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int64_t c = first + i * WARP;
        part[r][i] = row < rows && c < D ? widen(t[row * D + c]) : 0.f;
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int i = 0; i < EACH; ++i) total[i] += part[r][i];
  }

  // The warps, in order.
  SHARED(float[WARPS][EACH * WARP], of_warp);
#pragma unroll
  for (int i = 0; i < EACH; ++i) of_warp[warp()][i * WARP + lane()] = total[i];
  __syncthreads();
  if (threadIdx.x < EACH * WARP) {
    const int64_t c = int64_t{blockIdx.y} * (EACH * WARP) + threadIdx.x;
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += of_warp[w][threadIdx.x];
    if (c < D) sums[p * D + c] = sum;
  }
}

// b's step with the gradient Σ sums[:added] - Σ sums[added:rows]; stats[p] (4,) = (0, 0, 0, its squared norm). A step that
// is skipped changes nothing, and stats[p] is NaN.
template <class T, class Moment>
__global__ void __launch_bounds__(WARPS* WARP, BLOCKS)
    update_bias_kernel(Stepped<T, Moment> b, const float* sums, int64_t rows, int64_t added, int64_t D, Step step,
                       double* stats) {
  if (step.skipped()) {
    if (threadIdx.x < 4) stats[4 * int64_t{blockIdx.x} + threadIdx.x] = NAN;
    return;
  }
  const int64_t c = int64_t{blockIdx.x} * WARP + lane();
  float part = 0.f;
  if (c < D) {
#pragma unroll 4
    for (int64_t row = warp(); row < rows; row += WARPS) part += row < added ? sums[row * D + c] : -sums[row * D + c];
  }
  SHARED(float[WARPS][WARP], of_warp);
  of_warp[warp()][lane()] = part;
  __syncthreads();
  if (warp()) return;

  float g = 0.f;
  for (int w = 0; w < WARPS; ++w) g += of_warp[w][lane()];
  if (c < D) {
    BiasStep<T, Moment> of;
    of.load(b, c);
    of.finish(b, c, g, step);
  }
  const double square = warp_sum(double{g} * g);
  if (lane() == 0)
    for (int i = 0; i < 4; ++i) stats[4 * int64_t{blockIdx.x} + i] = i < 3 ? 0.0 : square;
}

Shape sums_shape(int64_t parts, int64_t D) {
  return {dim3(parts, ceil_div(D, EACH * WARP)), dim3(WARPS * WARP)};
}

Shape bias_shape(int64_t D) { return {dim3(bias_programs(D)), dim3(WARPS * WARP)}; }

}  // namespace

int64_t bias_programs(int64_t D) { return ceil_div(D, WARP); }

int64_t bias_parts(int64_t rows) { return ceil_div(rows, ROWS); }

void foresee_bias(const Where& where, Dtype weight, const Maybe& moment) {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16})
    by_dtype(dtype, [&](auto t) { foresee(where, "column_sums", column_sums_kernel<decltype(t)>, sums_shape(1, 1)); });
  by_dtype(weight, [&](auto t) {
    by_moment(moment, [&](auto m) {
      foresee(where, "update_bias", update_bias_kernel<decltype(t), BiasMoment<decltype(m)>>, bias_shape(1));
    });
  });
}

void update_bias(const Where& where, const Array& b, const Maybe& m, const Maybe& v, const std::vector<Array>& grads,
                 const Maybe& pre_bias, const Array& sums, const Array& stats, int64_t rule, const Array& numbers,
                 const Array& keys, double eps, double beta1, double rest1, double beta2, double rest2) {
  const int64_t D = b.rows;
  int64_t parts = 0, wanted = pre_bias ? bias_parts(pre_bias->rows) : 0;
  for (const Array& t : grads) fit("a gradient", t, t.rows, D), wanted += bias_parts(t.rows);
  fit("b", b, D), fit("m", m, D), fit("v", v, D), fit("stats", stats, bias_programs(D), 4);
  if (pre_bias) fit("pre_bias", pre_bias, pre_bias->rows, D);
  fit("sums", sums, wanted, D), in_range("keys", keys.rows, 2, 8);
  const Step step = step_of(rule, numbers, eps, beta1, rest1, beta2, rest2);
  if (m.has_value() + v.has_value() != moments_of(step.rule)) throw std::invalid_argument("moments that the rule does not keep");
  const uint32_t* random = keys.as<uint32_t>();
  const auto add = [&](const Array& t) {
    by_dtype(t.dtype, [&](auto zero) {
      using T = decltype(zero);
      launch(where, "column_sums", column_sums_kernel<T>, sums_shape(bias_parts(t.rows), D), t.as<T>(),
             sums.as<float>() + parts * D, t.rows, D);
    });
    parts += bias_parts(t.rows);
  };
  for (const Array& t : grads) add(t);
  const int64_t added = parts;
  if (pre_bias) add(*pre_bias);
  by_dtype(b.dtype, [&](auto t) {
    by_moment(m, [&](auto moment) {
      using T = decltype(t);
      using Moment = BiasMoment<decltype(moment)>;
      launch(where, "update_bias", update_bias_kernel<T, Moment>, bias_shape(D),
             Stepped<T, Moment>{b.as<T>(), pointer<Moment>(m), pointer<Moment>(v), nullptr, nullptr,
                                Keys{random, 0}},
             sums.as<float>(), parts, added, D, step, stats.as<double>());
    });
  });
}

}  // namespace fastsae
