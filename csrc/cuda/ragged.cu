// Ragged codes: how many scores of each token are above its threshold, and then those, packed; and histograms of all keys.
//
// Two passes with a prefix sum between them: count, then emit. A token's scores come from its list of exactly scored
// survivors, a warp to a token; where that list was too short every latent is scored again, in both passes, by a block,
// because only the device knows which tokens those are. Entries ascend by latent because lists and walks do. For the
// histogram a warp takes DOTS rows of W for a few tokens, from L1 where D is small enough.
// Bytes: 8 a listed score in each pass, 8 an entry written; M·D·sizeof(W) in each for a token whose list was too short, and
// N/TOKENS times that for a histogram, from L2 mostly. Flops: 2·M·D a token that is scored again.
#include "encode.h"
#include "keys.h"
#include "launch.h"
#include "scores.h"

namespace fastsae {
namespace {

// Scores are above unless they are <= the threshold: NaN is.
struct Thresholds {
  const float* t;
  bool per_latent;
  int64_t latents;

  __device__ bool above(float score, int64_t n, int32_t latent) const {
    if (per_latent && static_cast<uint32_t>(latent) >= latents) return false;
    return !(score <= t[per_latent ? latent : n]);
  }
};

// Where entries go; what does not fit is not stored.
struct Code {
  Acts acts;
  int32_t* indices;
  int64_t capacity;

  __device__ void put(int64_t slot, float score, int32_t latent) const {
    if (slot < 0 || slot >= capacity) return;
    acts.store(slot, score);
    indices[slot] = latent;
  }
};

// -- listed scores -----------------------------------------------------------------------------------------------------

constexpr int LIST_THREADS = 128;

// With offsets it emits, without it counts into totals.
__global__ void __launch_bounds__(LIST_THREADS, 8)
    listed_kernel(const int32_t* latents, const float* scores, const int32_t* found, Thresholds thresholds,
                  const int64_t* offsets, int64_t* totals, Code code, int64_t N, int64_t slots) {
  constexpr int AT_ONCE = 4;  // loads in flight of a lane
  const int64_t n = int64_t{blockIdx.x} * (LIST_THREADS / WARP) + warp();
  if (n >= N || found[n] > slots) return;  // its list was too short
  const int count = found[n];
  const int64_t first = offsets ? offsets[n] : 0;
  latents += n * slots;
  scores += n * slots;
  int filled = 0;
  for (int start = 0; start < count; start += AT_ONCE * WARP) {
    float score[AT_ONCE];
    int32_t latent[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int i = start + j * WARP + lane();
      score[j] = i < count ? scores[i] : 0.f;
      latent[j] = i < count ? latents[i] : 0;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const bool keep = start + j * WARP + lane() < count && thresholds.above(score[j], n, latent[j]);
      const unsigned ballot = __ballot_sync(ALL, keep);
      if (offsets && keep) code.put(first + filled + lanes_below(ballot), score[j], latent[j]);
      filled += __popc(ballot);
    }
  }
  if (!offsets && lane() == 0) totals[n] = filled;
}

// -- every latent ------------------------------------------------------------------------------------------------------

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int64_t MOST_BLOCKS = 1024;

struct Walk {
  const int32_t *tokens, *listed;
  Thresholds thresholds;
  const int32_t* least;  // a key; null: thresholds
  int64_t *ties, *totals;
  const int64_t* offsets;  // null: it counts
  Code code;
  int64_t N;
};

template <bool ALIGNED, class T>
__global__ void __launch_bounds__(THREADS, 2) every_kernel(Walk s, Encoder<T> encoder) {
  SHARED(int[WARPS], of_warp);
  const int listed = static_cast<int>(min(int64_t{*s.listed}, s.N)), M = static_cast<int>(encoder.latents);
  const int32_t least = s.least ? *s.least : 0;
  for (int t = blockIdx.x; t < listed; t += gridDim.x) {
    const int64_t n = s.tokens[t];
    if (n < 0 || n >= s.N) continue;
    const int64_t first = s.offsets ? s.offsets[n] : 0, free = s.offsets && s.ties ? s.ties[n] : 0;
    int filled = 0, ties = 0;
    for (int start = 0; start < M; start += THREADS) {
      // Score a latent for each thread, DOTS of a warp at a time.
      const int of_warp_first = start + warp() * WARP, latent = of_warp_first + lane();
      float score = 0.f;
#pragma unroll 1
      for (int j = 0; j < WARP; j += DOTS) {
        int32_t latents[DOTS];
        float scores[DOTS];
#pragma unroll
        for (int i = 0; i < DOTS; ++i) latents[i] = of_warp_first + j + i < M ? of_warp_first + j + i : -1;
        exact_scores<ALIGNED>(encoder, n, latents, scores);
#pragma unroll
        for (int i = 0; i < DOTS; ++i) score = lane() == j + i ? scores[i] : score;
      }

      // Keep what is above, in order.
      bool keep = latent < M;
      if (s.least) {
        const int32_t key = key_of(score);
        const bool seen = keep && key > 0 && s.code.acts.rounded(score) != 0.f, tie = seen && key == least;
        int more = 0;
        const int64_t rank = ties + rank_among<WARPS>(tie, of_warp, more);
        keep = seen && (key > least || (s.offsets && tie && rank < free));
        ties += more;
      } else {
        keep = keep && s.thresholds.above(score, n, latent);
      }
      int kept = 0;
      const int64_t slot = first + filled + rank_among<WARPS>(keep, of_warp, kept);
      if (s.offsets && keep) s.code.put(slot, score, latent);
      filled += kept;
    }
    if (!s.offsets && threadIdx.x == 0) {
      s.totals[n] = filled;
      if (s.least) s.ties[n] = ties;
    }
  }
}

// -- histograms --------------------------------------------------------------------------------------------------------

constexpr int TOKENS = 8;

// Positive keys by their upper 15 bits, or by their lower 16 among those that share the upper ones with `prefix`.
template <bool ALIGNED, class T>
__global__ void __launch_bounds__(THREADS, 2)
    histogram_kernel(Encoder<T> encoder, const int32_t* needed, const int32_t* prefix, unsigned long long* bins, int64_t N) {
  if (!*needed) return;
  const int64_t first = int64_t{blockIdx.x} * TOKENS, end = min(first + TOKENS, N);
  const int M = static_cast<int>(encoder.latents), step = gridDim.y * WARPS * DOTS;
  for (int start = (blockIdx.y * WARPS + warp()) * DOTS; start < M; start += step) {
    int32_t latents[DOTS];
#pragma unroll
    for (int j = 0; j < DOTS; ++j) latents[j] = start + j < M ? start + j : -1;
    for (int64_t n = first; n < end; ++n) {
      float scores[DOTS];
      exact_scores<ALIGNED>(encoder, n, latents, scores);
#pragma unroll
      for (int j = 0; j < DOTS; ++j) {
        const int32_t key = key_of(scores[j]);
        // Counts of integers: whatever the order of the additions, the sum is the same.
        if (lane() == j && start + j < M && key > 0 && (!prefix || key >> 16 == *prefix))
          atomicAdd(bins + (prefix ? key & 0xffff : key >> 16), 1ull);
      }
    }
  }
}

void run_listed(const char* name, const Where& where, const Array& latents, const Array& scores, const Array& found,
                const Array& thresholds, bool per_latent, const int64_t* offsets, int64_t* totals, const Code& code) {
  const int64_t N = found.rows;
  fit("found", found, counted("N", N)), fit("latents", latents, N, counted("candidates", latents.cols));
  fit("scores", scores, N, latents.cols), fit("thresholds", thresholds, per_latent ? thresholds.rows : N);
  launch(where, name, listed_kernel, {dim3(ceil_div(N, LIST_THREADS / WARP)), dim3(LIST_THREADS)},
         latents.as<const int32_t>(), scores.as<const float>(), found.as<const int32_t>(),
         Thresholds{thresholds.as<const float>(), per_latent, thresholds.rows}, offsets, totals, code, N, latents.cols);
}

}  // namespace

void count_listed(const Where& where, const Array& latents, const Array& scores, const Array& found, const Array& thresholds,
                  bool per_latent, const Array& totals) {
  fit("totals", totals, found.rows);
  run_listed("count_listed", where, latents, scores, found, thresholds, per_latent, nullptr, totals.as<int64_t>(), {});
}

void emit_listed(const Where& where, const Array& latents, const Array& scores, const Array& found, const Array& thresholds,
                 bool per_latent, const Array& offsets, const Array& acts, const Array& indices) {
  fit("offsets", offsets, found.rows + 1), fit("acts", acts, acts.rows), fit("indices", indices, acts.rows);
  run_listed("emit_listed", where, latents, scores, found, thresholds, per_latent, offsets.as<const int64_t>(), nullptr,
             {acts_of(acts), indices.as<int32_t>(), acts.rows});
}

void every_latent(const Where& where, const Array& x, const Array& W, const Array& b, const Array& tokens, const Array& listed,
                  const Array& acts, const Array& indices, const Maybe& totals, const Maybe& offsets,
                  const Maybe& thresholds, bool per_latent, const Maybe& least, const Maybe& ties) {
  fit_encoder(x, W, b), fit("tokens", tokens, tokens.rows), fit("listed", listed, 1);
  in_range("rows of tokens", tokens.rows, x.rows, x.rows + 1);
  fit("acts", acts, acts.rows), fit("indices", indices, acts.rows), fit("totals", totals, x.rows);
  fit("offsets", offsets, x.rows + 1), fit("thresholds", thresholds, per_latent ? W.rows : x.rows);
  fit("least", least, 1), fit("ties", ties, x.rows);
  const Walk s{tokens.as<const int32_t>(), listed.as<const int32_t>(),
               {pointer<const float>(thresholds), per_latent, W.rows}, pointer<const int32_t>(least),
               pointer<int64_t>(ties), pointer<int64_t>(totals), pointer<const int64_t>(offsets),
               {acts_of(acts), indices.as<int32_t>(), acts.rows}, x.rows};
  by_dtype(W.dtype, [&](auto t) {
    using T = decltype(t);
    by_alignment([&](auto aligned) {
      launch(where, "every_latent", every_kernel<aligned.value, T>,
             {dim3(std::min(MOST_BLOCKS, x.rows)), dim3(THREADS)}, s, encoder<T>(x, W, b));
    }, x, W);
  });
}

void histogram(const Where& where, const Array& x, const Array& W, const Array& b, const Array& needed, const Maybe& prefix,
               const Array& bins) {
  fit_encoder(x, W, b), fit("needed", needed, 1), fit("prefix", prefix, 1), fit("bins", bins, 1 << 16);
  const int64_t groups = ceil_div(x.rows, TOKENS), tiles = ceil_div(W.rows, WARPS * DOTS);
  const int64_t shares = groups ? std::min(tiles, ceil_div(MOST_BLOCKS, groups)) : 0;
  by_dtype(W.dtype, [&](auto t) {
    using T = decltype(t);
    by_alignment([&](auto aligned) {
      launch(where, "histogram", histogram_kernel<aligned.value, T>, {dim3(groups, shares), dim3(THREADS)},
             encoder<T>(x, W, b), needed.as<const int32_t>(), pointer<const int32_t>(prefix),
             bins.as<unsigned long long>(), x.rows);
    }, x, W);
  });
}

}  // namespace fastsae
