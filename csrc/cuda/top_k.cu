// The K largest positive scores of a token's candidates as a fixed code: indices ascending, ties to the lower index.
//
// A team takes one token: a warp where candidates are few, a block where they are many. It finds the K-th largest key and,
// where more share it than have a place, the largest index still taken, the same way; then the chosen are gathered in shared
// memory and sorted by latent, bitonically: 15 steps for K = 32, 66 for 2048, where counting the smaller ones would take 2048²
// of them. Bytes: 8 a candidate (again from L1 in each round), N·K·(4 + sizeof(acts)). Flops: about 25 a candidate, integer,
// and K·log²K.
#include "encode.h"
#include "keys.h"
#include "launch.h"
#include "scores.h"

namespace fastsae {
namespace {

struct Candidates {
  const int32_t* latents;
  const float* scores;
  const int32_t *counts, *certified;
  Acts acts;
  int32_t* indices;
  int64_t N, candidates;
  int k, places, offset, last;  // places: of the chosen in shared memory, a power of two
};

// Sorts `size` numbers, a power of two, ascending.
template <int WARPS> __device__ inline void sort(uint64_t* t, int size) {
  using Members = Team<WARPS>;
  Members::sync();
  for (int length = 2; length <= size; length *= 2)
    for (int step = length / 2; step > 0; step /= 2) {
      for (int i = Members::me(); i < size / 2; i += Members::SIZE) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const uint64_t a = t[low], b = t[high];
        if ((a > b) == ((low & length) == 0)) {
          t[low] = b;
          t[high] = a;
        }
      }
      Members::sync();
    }
}

template <int WARPS, int TEAMS, int BLOCKS>
__global__ void __launch_bounds__(WARPS* TEAMS* WARP, BLOCKS) top_k_kernel(Candidates s) {
  using Members = Team<WARPS>;
  const int team = WARPS == 1 ? warp() : 0;
  const int64_t n = int64_t{blockIdx.x} * TEAMS + team;
  if (n >= s.N || !s.certified[n]) return;  // exhaustive.cu does tokens that are not certified
  SHARED(Bins[TEAMS], bins);
  SHARED(int[WARPS], of_warp);
  uint64_t* chosen = dynamic_shared<uint64_t>() + team * s.places;  // latent above, score's bits below
  const int32_t* latents = s.latents + n * s.candidates;
  const float* scores = s.scores + n * s.candidates;
  const int count = static_cast<int>(min(int64_t{s.counts[n]}, s.candidates));

  // Choose: above the K-th largest key, and of those that share it the lowest latents.
  const Kth least = kth_key<WARPS>(count, s.k, bins[team], [&](int i) { return key_of(scores[i]); });
  int32_t last_tie = 0x7fffffff;
  if (least.ties > least.free) {
    const auto reversed = [&](int i) { return key_of(scores[i]) == least.key ? 0x7fffffff - latents[i] : -1; };
    last_tie = 0x7fffffff - kth_key<WARPS>(count, least.free, bins[team], reversed).key;
  }
  int filled = 0;
  for (int start = 0; start < count; start += Members::SIZE) {
    const int i = start + Members::me();
    bool take = false;
    float score = 0.f;
    int32_t latent = 0;
    if (i < count) {
      score = scores[i];
      latent = latents[i];
      const int32_t key = key_of(score);
      take = key > 0 && (key > least.key || (key == least.key && latent <= last_tie));
      take = take && s.acts.rounded(score) != 0.f;  // a narrow dtype can round a score to 0
    }
    int taken = 0;
    const int place = filled + rank_among<WARPS>(take, of_warp, taken);
    if (take && place < s.places)
      chosen[place] = static_cast<uint64_t>(latent) << 32 | static_cast<uint32_t>(__float_as_int(score));
    filled = min(filled + taken, s.k);
  }

  // Sort by latent: as many as the chosen are, filled up to a power of two with what comes last.
  int size = 1;
  while (size < filled) size *= 2;
  for (int i = filled + Members::me(); i < size; i += Members::SIZE) chosen[i] = ~uint64_t{0};
  sort<WARPS>(chosen, size);

  // Store the chosen, then the empty slots.
  for (int slot = Members::me(); slot < s.k; slot += Members::SIZE) {
    const bool there = slot < filled;
    s.acts.store(n * s.k + slot, there ? __int_as_float(static_cast<int32_t>(chosen[slot])) : 0.f);
    s.indices[n * s.k + slot] = there ? static_cast<int32_t>(chosen[slot] >> 32) + s.offset : s.last;
  }
}

constexpr int FEW = 512;  // candidates: 16 to a lane

}  // namespace

void top_k(const Where& where, const Array& latents, const Array& scores, const Array& counts, const Array& certified,
           const Array& acts, const Array& indices, int64_t offset, int64_t last) {
  const int64_t N = acts.rows;
  fit("indices", indices, N, counted("k", acts.cols)), fit("latents", latents, N, counted("candidates", latents.cols));
  fit("scores", scores, N, latents.cols), fit("counts", counts, N), fit("certified", certified, N);
  counted("offset", offset), counted("last", last), counted("N", N);
  if (latents.cols & (latents.cols - 1)) throw std::invalid_argument("candidates are not a power of two");
  if (!acts.size()) return;
  int places = 1;
  while (places < std::min(acts.cols, latents.cols)) places *= 2;
  const Candidates s{latents.as<const int32_t>(), scores.as<const float>(), counts.as<const int32_t>(),
                     certified.as<const int32_t>(), acts_of(acts), indices.as<int32_t>(), acts.rows, latents.cols,
                     static_cast<int>(acts.cols), places, static_cast<int>(offset), static_cast<int>(last)};
  if (latents.cols <= FEW)
    launch(where, "top_k", top_k_kernel<1, 4, 8>, {dim3(ceil_div(s.N, 4)), dim3(128), sizeof(uint64_t) * places * 4}, s);
  else
    launch(where, "top_k", top_k_kernel<8, 1, 4>, {dim3(s.N), dim3(256), sizeof(uint64_t) * places}, s);
}

}  // namespace fastsae
