// scores[n, r] = (⟨x[n], W[latents[n, r]]⟩ + b) · gate: the engine's own fp32 score of every latent of a list.
//
// A block takes one token, or a share of a long list where tokens are few; each of its warps DOTS latents at a time, x
// coming from L1 (dots.h). Bytes: list·D·sizeof(W) + N·D·sizeof(x) + 12·list, list being the length of all lists.
// Flops: 2·list·D.
#include "encode.h"
#include "launch.h"
#include "scores.h"

namespace fastsae {
namespace {

constexpr int THREADS = 128, BLOCKS = 5;
constexpr int WANTED_BLOCKS = 1024;  // a few on each multiprocessor

template <bool ALIGNED, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS) rescore_kernel(Encoder<T> encoder, const int32_t* latents,
                                                                  const int32_t* counts, float* scores, int64_t slots) {
  const int64_t n = blockIdx.x;
  const int count = static_cast<int>(min(int64_t{counts[n]}, slots)), step = gridDim.y * (THREADS / WARP) * DOTS;
  const int32_t* list = latents + n * slots;
  for (int first = (blockIdx.y * (THREADS / WARP) + warp()) * DOTS; first < count; first += step) {
    int32_t latent[DOTS];
#pragma unroll
    for (int j = 0; j < DOTS; ++j) latent[j] = first + j < count ? list[first + j] : -1;
    float s[DOTS];
    exact_scores<ALIGNED>(encoder, n, latent, s);
#pragma unroll
    for (int j = 0; j < DOTS; ++j)
      if (lane() == j && first + j < count) scores[n * slots + first + j] = s[j];
  }
}

}  // namespace

void rescore(const Where& where, const Array& x, const Array& W, const Array& b, const Maybe& gate, const Array& latents,
             const Array& counts, const Array& scores) {
  fit_encoder(x, W, b, gate);
  fit("latents", latents, x.rows, latents.cols), fit("scores", scores, x.rows, latents.cols), fit("counts", counts, x.rows);
  if (!x.rows || !latents.cols) return;
  const int64_t shares = std::min(ceil_div(WANTED_BLOCKS, x.rows), ceil_div(latents.cols, DOTS * (THREADS / WARP)));
  by_dtype(W.dtype, [&](auto t) {
    using T = decltype(t);
    by_alignment([&](auto aligned) {
      launch(where, "rescore", rescore_kernel<aligned.value, T>, {dim3(x.rows, shares), dim3(THREADS)},
             encoder<T>(x, W, b, gate), latents.as<int32_t>(), counts.as<int32_t>(), scores.as<float>(), latents.cols);
    }, x, W);
  });
}

}  // namespace fastsae
