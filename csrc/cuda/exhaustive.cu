// The K largest of a few tokens by scoring every latent: for tokens that no screen could certify, listed on the device.
//
// A product in batches of as many tokens as there are rows of scratch memory. A block takes TILE latents at a time, for all
// tokens of the batch, and each of its warps DOTS of them for TOGETHER tokens at once, so that W is read once for so many.
// When a batch is scored, one block a token selects: the K-th largest key comes from four counts over the row, then a pass
// over the row in order gives ties to the lower index. Scores are those of `rescore`, bit for bit.
//
// The host does not know how many tokens there are, so the launches are fixed and return at once if there is nothing to do:
// two for the first batch, and one in which all blocks go through the other batches, tile by tile and token by token. They
// draw tickets in that order, and wait for what tickets before theirs have to finish: those belong to blocks that run.
// Bytes: M·D·sizeof(W) for each TOGETHER tokens, from L2 where several follow each other; 5·M·4 a token to select.
// Flops: 2·M·D a token. So, at D = 4096 and M = 131072, some 3 ms a batch of 64 (predicted for an H200: from L2).
#include "encode.h"
#include "keys.h"
#include "launch.h"
#include "scores.h"

namespace fastsae {
namespace {

constexpr int WARPS = 6, SELECT_WARPS = 16;  // two blocks of 6 warps leave a thread 168 registers; with 128 some target spills
template <class T> constexpr int TOGETHER = V<T> == 4 ? 8 : 4;  // tokens of a warp
constexpr int TILE = WARPS * DOTS;  // latents of a block
constexpr int64_t MOST_BLOCKS = 1024;
constexpr int STAYING_BLOCKS = 2 * 160;  // all that run at once, and few that find nothing left
enum { TAKEN, SCORED, SELECTED, COUNTS };

struct Redo {
  const int32_t *rows, *count, *tokens, *listed;
  float* scratch;  // (slots, positions)
  int32_t* progress;  // (COUNTS,): tickets, tiles and tokens of the batches after the first
  Acts acts;
  int32_t* indices;
  int64_t N, positions;
  int slots, k, offset, last;

  __device__ int tokens_listed() const { return static_cast<int>(min(int64_t{*listed}, N)); }
  __device__ int positions_counted() const { return static_cast<int>(min(int64_t{*count}, positions)); }
  __device__ bool token(int t, int64_t& n) const { return (n = tokens[t]) >= 0 && n < N; }
  __device__ int32_t latent(int position) const { return rows ? rows[position] : position; }
};

// Scores of tokens [first, first + many) of the list for the tile of positions from `start` on, into rows of scratch.
template <bool ALIGNED, class T>
__device__ inline void score_tile(const Redo& s, const Encoder<T>& encoder, int first, int many, int start) {
  const int count = s.positions_counted(), mine = start + warp() * DOTS;
  if (mine >= count) return;
  int32_t latents[DOTS];
#pragma unroll
  for (int j = 0; j < DOTS; ++j) latents[j] = mine + j < count ? s.latent(mine + j) : -1;
  constexpr int TOKENS = TOGETHER<T>;
  for (int row = 0; row < many; row += TOKENS) {
    int64_t tokens[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
      if (row + t >= many || !s.token(first + row + t, tokens[t])) tokens[t] = -1;
    float scores[TOKENS][DOTS];
    exact_scores<ALIGNED>(encoder, tokens, latents, scores);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
#pragma unroll
      for (int j = 0; j < DOTS; ++j)
        if (lane() == t * DOTS + j && tokens[t] >= 0 && mine + j < count)
          s.scratch[(row + t) * s.positions + mine + j] = scores[t][j];
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
__global__ void __launch_bounds__(WARPS* WARP, 2) score_kernel(Redo s, Encoder<T> encoder) {
  if (blockIdx.x == 0 && threadIdx.x < COUNTS) s.progress[threadIdx.x] = 0;
  const int many = min(s.tokens_listed(), s.slots), count = s.positions_counted();
  if (many)
    for (int start = blockIdx.x * TILE; start < count; start += gridDim.x * TILE)
      score_tile<ALIGNED>(s, encoder, 0, many, start);
}

__global__ void __launch_bounds__(SELECT_WARPS* WARP, 2) select_rows_kernel(Redo s) {
  const int t = blockIdx.x;
  int64_t n;
  if (t < s.tokens_listed() && s.token(t, n)) select_row<SELECT_WARPS>(s, t, n);
}

// Says that this block has finished a part, whose writes are then visible to blocks that wait for the count.
__device__ inline void finish(int32_t* count) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(count, 1);
}

__device__ inline void wait_for(const int32_t* count, int least) {
  if (threadIdx.x == 0)
    while (*static_cast<const volatile int32_t*>(count) < least) {
    }
  __threadfence();
  __syncthreads();
}

template <bool ALIGNED, class T>
__global__ void __launch_bounds__(WARPS* WARP, 2) rest_kernel(Redo s, Encoder<T> encoder) {
  SHARED(int, drawn);
  const int listed = s.tokens_listed(), tiles = static_cast<int>(ceil_div(s.positions_counted(), TILE));
  if (listed <= s.slots) return;
  for (;;) {
    __syncthreads();  // all have read the last ticket
    if (threadIdx.x == 0) drawn = atomicAdd(s.progress + TAKEN, 1);
    __syncthreads();
    const int batch = drawn / (tiles + s.slots) + 1, part = drawn % (tiles + s.slots), first = batch * s.slots;
    if (first >= listed) return;
    const int many = min(s.slots, listed - first), row = part - tiles;
    int64_t n;
    if (part < tiles) {
      wait_for(s.progress + SELECTED, (batch - 1) * s.slots);  // the rows have been read
      score_tile<ALIGNED>(s, encoder, first, many, part * TILE);
      finish(s.progress + SCORED);
    } else if (row < many) {
      wait_for(s.progress + SCORED, batch * tiles);
      if (s.token(first + row, n)) select_row<WARPS>(s, row, n);
      finish(s.progress + SELECTED);
    }
  }
}

}  // namespace

void exhaustive_top_k(const Where& where, const Array& x, const Array& W, const Array& b, const Maybe& gate, const Maybe& rows,
                      const Array& count, const Array& tokens, const Array& listed, const Array& acts,
                      const Array& indices, int64_t offset, int64_t last, const Array& scratch, const Array& progress) {
  const int64_t positions = rows ? rows->rows : W.rows;
  fit_encoder(x, W, b, gate), fit("rows", rows, positions), fit("count", count, 1), fit("listed", listed, 1);
  fit("acts", acts, x.rows, counted("k", acts.cols)), fit("indices", indices, x.rows, acts.cols);
  fit("tokens", tokens, x.rows + 1), fit("scratch", scratch, counted("slots", scratch.rows), positions);
  fit("progress", progress, COUNTS);
  counted("offset", offset), counted("last", last);
  if (!acts.size()) return;
  const Redo s{pointer<const int32_t>(rows), count.as<const int32_t>(), tokens.as<const int32_t>(),
               listed.as<const int32_t>(), scratch.as<float>(), progress.as<int32_t>(), acts_of(acts),
               indices.as<int32_t>(), x.rows, scratch.cols, static_cast<int>(scratch.rows), static_cast<int>(acts.cols),
               static_cast<int>(offset), static_cast<int>(last)};
  const int64_t tiles = std::max<int64_t>(1, ceil_div(s.positions, TILE));
  by_dtype(W.dtype, [&](auto t) {
    using T = decltype(t);
    const Encoder<T> of_all = encoder<T>(x, W, b, gate);
    by_alignment([&](auto aligned) {
      launch(where, "exhaustive_scores", score_kernel<aligned.value, T>,
             {dim3(std::min(MOST_BLOCKS, tiles)), dim3(WARPS * WARP)}, s, of_all);
      launch(where, "exhaustive_select", select_rows_kernel, {dim3(s.slots), dim3(SELECT_WARPS * WARP)}, s);
      if (s.N > s.slots)
        launch(where, "exhaustive_rest", rest_kernel<aligned.value, T>, {dim3(STAYING_BLOCKS), dim3(WARPS * WARP)}, s, of_all);
    }, x, W);
  });
}

}  // namespace fastsae
