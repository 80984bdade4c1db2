// The K largest of a few tokens by scoring every latent: for tokens that no screen could certify, listed on the device.
//
// The host does not know how many there are, so the launches are fixed and return at once if there is nothing to do. The
// list's first tokens, as many as there are rows of scratch memory, come first: all blocks compute their scores together,
// each warp DOTS latents for one token after the other, and one block a token selects. Then one block a token does the
// rest: this suits the few tokens that a screen leaves, and is slow where it leaves many. The K-th largest key comes from
// four counts over the row. Then a pass over the row in order gives ties to the lower index. Scores are those of
// `rescore`, bit for bit.
// Bytes: M·D·sizeof(W) for each token. Of the first tokens' rows of W, from L2, or from L1 where the DOTS rows of a block's
// warps fit there (D <= 512 or so in float); 5·M·4 to select.
// Flops: 2·M·D a token.
#include "encode.h"
#include "keys.h"
#include "launch.h"
#include "scores.h"

namespace fastsae {
namespace {

constexpr int SCORE_WARPS = 8, SELECT_WARPS = 16;
constexpr int64_t MOST_BLOCKS = 1024;

struct Redo {
  const int32_t *rows, *count, *tokens, *listed;
  float* scratch;  // (slots, positions)
  Acts acts;
  int32_t* indices;
  int64_t N, positions;
  int slots, k, offset, last;

  __device__ int tokens_listed() const { return static_cast<int>(min(int64_t{*listed}, N)); }
  __device__ int positions_counted() const { return static_cast<int>(min(int64_t{*count}, positions)); }
  __device__ bool token(int t, int64_t& n) const { return (n = tokens[t]) >= 0 && n < N; }
  __device__ int32_t latent(int position) const { return rows ? rows[position] : position; }
};

// Scores of tokens [first, first + many) of the list for the positions that block `block` of `blocks` takes, into the rows
// of scratch from `row` on.
template <bool ALIGNED, int WARPS, class T>
__device__ inline void score_positions(const Redo& s, const Encoder<T>& encoder, int first, int many, int row, int block,
                                       int blocks) {
  const int count = s.positions_counted(), step = blocks * WARPS * DOTS;
  for (int start = (block * WARPS + warp()) * DOTS; start < count; start += step) {
    int32_t latents[DOTS];
#pragma unroll
    for (int j = 0; j < DOTS; ++j) latents[j] = start + j < count ? s.latent(start + j) : -1;
    for (int t = 0; t < many; ++t) {
      int64_t n;
      if (!s.token(first + t, n)) continue;
      float scores[DOTS];
      exact_scores<ALIGNED>(encoder, n, latents, scores);
#pragma unroll
      for (int j = 0; j < DOTS; ++j)
        if (lane() == j && start + j < count) s.scratch[(row + t) * s.positions + start + j] = scores[j];
    }
  }
}

// The K largest positive of a row of scratch as token n of the code, by a block.
template <int WARPS> __device__ inline void select_row(const Redo& s, int64_t row, int64_t n) {
  using Members = Team<WARPS>;
  SHARED(Bins, bins);
  SHARED(int[WARPS], of_warp);
  const float* scores = s.scratch + row * s.positions;
  const int count = s.positions_counted();
  const Kth least = kth_key<WARPS>(count, s.k, bins, [&](int i) { return key_of(scores[i]); });

  int ties = 0, filled = 0;
  for (int start = 0; start < count; start += Members::SIZE) {
    const int i = start + Members::me();
    const float score = i < count ? scores[i] : -1.f;
    const int32_t key = key_of(score);
    bool take = key > 0 && key >= least.key;
    if (least.ties > least.free) {
      const bool tie = take && key == least.key;
      int more = 0;
      const int rank = ties + rank_among<WARPS>(tie, of_warp, more);
      if (tie && rank >= least.free) take = false;
      ties += more;
    }
    take = take && s.acts.rounded(score) != 0.f;  // a narrow dtype can round a score to 0
    int taken = 0;
    const int slot = filled + rank_among<WARPS>(take, of_warp, taken);
    if (take && slot < s.k) {
      s.acts.store(n * s.k + slot, score);
      s.indices[n * s.k + slot] = s.latent(i) + s.offset;
    }
    filled += taken;
  }
  for (int slot = filled + Members::me(); slot < s.k; slot += Members::SIZE) {
    s.acts.store(n * s.k + slot, 0.f);
    s.indices[n * s.k + slot] = s.last;
  }
}

template <bool ALIGNED, class T>
__global__ void __launch_bounds__(SCORE_WARPS* WARP, 2) score_kernel(Redo s, Encoder<T> encoder) {
  const int many = min(s.tokens_listed(), s.slots);
  score_positions<ALIGNED, SCORE_WARPS>(s, encoder, 0, many, 0, blockIdx.x, gridDim.x);
}

__global__ void __launch_bounds__(SELECT_WARPS* WARP, 2) select_rows_kernel(Redo s) {
  const int t = blockIdx.x;
  int64_t n;
  if (t < s.tokens_listed() && s.token(t, n)) select_row<SELECT_WARPS>(s, t, n);
}

template <bool ALIGNED, class T>
__global__ void __launch_bounds__(SELECT_WARPS* WARP, 1) rest_kernel(Redo s, Encoder<T> encoder) {
  const int row = blockIdx.x, listed = s.tokens_listed();
  for (int t = s.slots + row; t < listed; t += s.slots) {
    int64_t n;
    if (!s.token(t, n)) continue;
    __syncthreads();  // the row has been read to its end
    score_positions<ALIGNED, SELECT_WARPS>(s, encoder, t, 1, row, 0, 1);
    __syncthreads();
    select_row<SELECT_WARPS>(s, row, n);
  }
}

}  // namespace

void exhaustive_top_k(const Where& where, const Array& x, const Array& W, const Array& b, const Maybe& gate, const Maybe& rows,
                      const Array& count, const Array& tokens, const Array& listed, const Array& acts,
                      const Array& indices, int64_t offset, int64_t last, const Array& scratch) {
  const int64_t positions = rows ? rows->rows : W.rows;
  fit_encoder(x, W, b, gate), fit("rows", rows, positions), fit("count", count, 1), fit("listed", listed, 1);
  fit("acts", acts, x.rows, counted("k", acts.cols)), fit("indices", indices, x.rows, acts.cols);
  fit("tokens", tokens, x.rows + 1), fit("scratch", scratch, counted("slots", scratch.rows), positions);
  counted("offset", offset), counted("last", last);
  if (!acts.size()) return;
  const Redo s{pointer<const int32_t>(rows), count.as<const int32_t>(), tokens.as<const int32_t>(),
               listed.as<const int32_t>(), scratch.as<float>(), acts_of(acts), indices.as<int32_t>(), x.rows,
               scratch.cols, static_cast<int>(scratch.rows), static_cast<int>(acts.cols), static_cast<int>(offset),
               static_cast<int>(last)};
  const int64_t blocks = std::max<int64_t>(1, std::min(MOST_BLOCKS, ceil_div(s.positions, SCORE_WARPS * DOTS)));
  by_dtype(W.dtype, [&](auto t) {
    using T = decltype(t);
    const Encoder<T> of_all = encoder<T>(x, W, b, gate);
    by_alignment([&](auto aligned) {
      launch(where, "exhaustive_scores", score_kernel<aligned.value, T>, {dim3(blocks), dim3(SCORE_WARPS * WARP)}, s, of_all);
      launch(where, "exhaustive_select", select_rows_kernel, {dim3(s.slots), dim3(SELECT_WARPS * WARP)}, s);
      if (s.N > s.slots)
        launch(where, "exhaustive_rest", rest_kernel<aligned.value, T>, {dim3(s.slots), dim3(SELECT_WARPS * WARP)}, s, of_all);
    }, x, W);
  });
}

}  // namespace fastsae
