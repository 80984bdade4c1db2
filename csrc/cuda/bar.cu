// τ[n] = the rank-th largest screened score of token n's sample, or 0: a guess of a bar that a few K latents clear.
//
// A block takes up to TOKENS tokens, each thread the same few columns of all of them, so that the table and the columns'
// arithmetic are shared. rank is small beside the sample (14 of 8192 at N = 8192, M = 131072, K = 32), so nearly all of it
// can be ruled out by one comparison each: the rank-th largest of the threads' own largest keys is a floor, as `rank`
// samples reach it; a second look (from L1 or L2) lists what is above the floor, and a warp per token selects from floor
// and list. Where a list overflows, because the largest are few threads' or rank is above THREADS, the block selects from
// the whole sample. What it returns is never more than the true one and less by at most 2⁻¹⁶ of it: a guess costs nothing
// when it is wrong, as what the encoder returns is certified.
// Bytes: 2·N·samples·2 from L2 + N/TOKENS·samples·8. Flops: about 12·N·samples.
#include "encode.h"
#include "keys.h"
#include "launch.h"
#include "screening.h"

namespace fastsae {
namespace {

constexpr int TOKENS = 8, THREADS = TOKENS * WARP;
constexpr int COLUMNS = 8;    // of a thread at a time: a pack of fp16
constexpr int LISTED = 1024;  // keys of a token's list
constexpr int WANTED_BLOCKS = 132;  // a multiprocessor of an H100 each

template <class S> struct Sample {
  const S* scores;
  const float *table, *bounds;
  const int32_t* count;
  float* bars;
  int64_t row_stride, N;
  int width, chunks, step, limit, rank;

  __device__ int size() const { return (limit - 1) / step + 1; }
  __device__ const S* row(int64_t n) const { return scores + n * row_stride; }
};

// COLUMNS of the sampled columns, which lie chunk beside chunk; FLAT: neighbours, in whole packs.
template <bool FLAT, class S> struct Columns {
  int first, step, limit;
  unsigned inside;  // bit i: column i is sampled, and its position exists
  float scale[COLUMNS], bias[COLUMNS];

  __device__ Columns(const Sample<S>& s, int from, int by, int positions) : first(from), step(by), limit(s.limit), inside(0) {
    if constexpr (FLAT) {
      const int chunk = first / s.width, c = first - chunk * s.width;
      const float* entry = s.table + int64_t{chunk} * TABLE_ROWS * s.width + c;
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i)
        if (first + i < limit && chunk + int64_t{c + i} * s.chunks < positions) inside |= 1u << i;
#pragma unroll
      for (int i = 0; i < COLUMNS; i += V<float>) {
        float some[V<float>], more[V<float>];
        load_pack<true>(entry, i, inside ? COLUMNS : 0, some);
        load_pack<true>(entry + s.width, i, inside ? COLUMNS : 0, more);
#pragma unroll
        for (int j = 0; j < V<float>; ++j) scale[i + j] = some[j], bias[i + j] = more[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) {
        const int64_t column = first + int64_t{i} * step;
        const int chunk = static_cast<int>(column / s.width), c = static_cast<int>(column - int64_t{chunk} * s.width);
        if (column < limit && chunk + int64_t{c} * s.chunks < positions) inside |= 1u << i;
        const float* entry = s.table + int64_t{chunk} * TABLE_ROWS * s.width + c;
        scale[i] = inside >> i & 1 ? entry[0] : 0.f;
        bias[i] = inside >> i & 1 ? entry[s.width] : 0.f;
      }
    }
  }

  // Keys of a token's scores; -1 where there is none.
  __device__ void keys(const S* row, float token_scale, int32_t (&key)[COLUMNS]) const {
    float stored[COLUMNS];
    if constexpr (FLAT) {
#pragma unroll
      for (int i = 0; i < COLUMNS; i += V<S>) {
        float some[V<S>];
        load_pack<true>(row, first + i, limit, some);
#pragma unroll
        for (int j = 0; j < V<S>; ++j) stored[i + j] = some[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) stored[i] = inside >> i & 1 ? widen(row[first + int64_t{i} * step]) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i)
      key[i] = inside >> i & 1 ? key_of(screened(stored[i], token_scale, scale[i], bias[i])) : -1;
  }
};

// Calls f(t, keys) with every thread's share of the sample, for each of the block's tokens.
template <bool FLAT, class S, class F>
__device__ inline void walk(const Sample<S>& s, int64_t first, int tokens, const float* token_scales, const F& f) {
  const int positions = *s.count, size = s.size();
  for (int start = 0; start < size; start += THREADS * COLUMNS) {
    const int sample = start + threadIdx.x * (FLAT ? COLUMNS : 1);
    if (int64_t{sample} * s.step >= s.limit) break;
    const Columns<FLAT, S> columns(s, sample * s.step, THREADS * s.step, positions);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
      if (t < tokens) {
        int32_t key[COLUMNS];
        columns.keys(s.row(first + t), token_scales[t], key);
        f(t, key);
      }
  }
}

template <bool FLAT, class S>
__global__ void __launch_bounds__(THREADS, FLAT ? 3 : 2) bars_kernel(Sample<S> s, int per_block) {
  const int64_t first = int64_t{blockIdx.x} * per_block;
  const int tokens = static_cast<int>(min(int64_t{per_block}, s.N - first));
  SHARED(float[TOKENS], token_scales);
  SHARED(int32_t[TOKENS], floors);
  SHARED(int32_t[TOKENS], filled);
  SHARED(Bins[TOKENS], bins);
  int32_t* lists = dynamic_shared<int32_t>();  // TOKENS of LISTED; first, at its front, a token's largest keys
  if (threadIdx.x < TOKENS) {
    const int t = threadIdx.x;
    token_scales[t] = t < tokens ? s.bounds[first + t] : 0.f;
    filled[t] = 0;
  }
  __syncthreads();

  // Every thread's largest keys, and a floor of each token from them. A warp has a token from here on.
  int32_t most[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) most[t] = -1;
  walk<FLAT>(s, first, tokens, token_scales, [&](int t, const int32_t (&key)[COLUMNS]) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) most[t] = max(most[t], key[i]);
  });
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) lists[t * LISTED + threadIdx.x] = most[t];
  __syncthreads();
  const int mine = warp();
  int32_t* list = lists + mine * LISTED;
  if (mine < tokens) {
    int32_t floor = 0;
    if (s.rank <= THREADS) floor = kth_key<1, 3>(THREADS, s.rank, bins[mine], [&](int i) { return list[i]; }).key;
    if (lane() == 0) floors[mine] = floor;
  }
  __syncthreads();

  // What is above the floor, in any order: only the value is wanted.
  walk<FLAT>(s, first, tokens, token_scales, [&](int t, const int32_t (&key)[COLUMNS]) {
    const int32_t floor = floors[t];
    int32_t largest = key[0];
#pragma unroll
    for (int i = 1; i < COLUMNS; ++i) largest = max(largest, key[i]);
    if (largest <= floor) return;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i)
      if (key[i] > floor) {
        const int place = atomicAdd(&filled[t], 1);
        if (place < LISTED) lists[t * LISTED + place] = key[i];
      }
  });
  __syncthreads();
  if (mine < tokens && filled[mine] <= LISTED) {
    const int count = filled[mine];
    int32_t found = floors[mine];
    if (count >= s.rank) found = kth_key<1, 3>(count, s.rank, bins[mine], [&](int i) { return list[i]; }).key;
    if (lane() == 0) s.bars[first + mine] = __int_as_float(found);
  }

  // The tokens whose list was too short, one after the other.
  for (int t = 0; t < tokens; ++t) {
    if (filled[t] <= LISTED) continue;
    __syncthreads();
    const int positions = *s.count;
    const S* row = s.row(first + t);
    const auto key_at = [&](int i) {
      const int64_t column = int64_t{i} * s.step, chunk = column / s.width, c = column - chunk * s.width;
      if (chunk + c * s.chunks >= positions) return -1;
      const float* entry = s.table + chunk * TABLE_ROWS * s.width + c;
      return key_of(screened(widen(row[column]), token_scales[t], entry[0], entry[s.width]));
    };
    const int32_t found = kth_key<THREADS / WARP, 3>(s.size(), s.rank, bins[0], key_at).key;
    if (threadIdx.x == 0) s.bars[first + t] = __int_as_float(found);
  }
}

}  // namespace

void bars(const Where& where, const Array& scores, const Array& table, const Array& bounds, const Array& count,
          const Array& out, int64_t chunks, int64_t step, int64_t limit, int64_t rank) {
  const int64_t N = out.rows, width = table.cols;
  counted("chunks", chunks), counted("limit", limit), counted("rank", rank), counted("width", width), counted("N", N);
  in_range("step", step, 1, std::numeric_limits<int32_t>::max()), in_range("limit", limit, 0, std::min(scores.cols, chunks * width));
  fit("scores", scores, N, scores.cols), fit("bounds", bounds, 4, N), fit("count", count, 1), fit("out", out, N);
  fit("table", table, 5 * chunks, width);
  if (!N) return;
  // As many tokens to a block as leave every multiprocessor one.
  const int per_block = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(TOKENS, N / WANTED_BLOCKS)));
  const auto run = [&](auto of_scores) {
    using S = decltype(of_scores);
    const Sample<S> sample{scores.as<const S>(), table.as<const float>(), bounds.as<const float>(),
                           count.as<const int32_t>(), out.as<float>(), scores.cols, N, static_cast<int>(width),
                           static_cast<int>(chunks), static_cast<int>(step), static_cast<int>(limit),
                           static_cast<int>(rank)};
    const auto start = [&](auto flat) {
      launch(where, "bars", bars_kernel<flat.value, S>,
             {dim3(ceil_div(N, per_block)), dim3(THREADS), sizeof(int32_t) * TOKENS * LISTED}, sample, per_block);
    };
    if (step != 1 || width % COLUMNS || limit % COLUMNS) start(std::false_type{});
    else by_alignment(start, scores, table);
  };
  if (scores.dtype == Dtype::f16) run(f16{});
  else run(float{});
}

}  // namespace fastsae
