// From a token's survivors those that can be among its K largest, and whether it is certain that they all are there.
//
// A team takes one token: a warp where lists are short, a block where they are long. With L the K-th largest lower end
// v - e of the survivors, K latents score at least L; so only v + e >= L can belong to the K largest. A latent that
// did not survive scores at most the bar τ: if L > τ no latent is missing, and if τ = 0 only latents whose act would be 0
// (an empty slot). Such a token is certified, unless a list was too short. Both ends of the first HELD survivors stay in shared
// memory; those of a longer list are computed anew in each of the selection's rounds, from L1 and L2.
// Bytes: 8 a survivor + three sectors of the table, from L2 mostly, 8 a candidate. Flops: about 30 a survivor.
#include "encode.h"
#include "keys.h"
#include "launch.h"
#include "screening.h"

namespace fastsae {
namespace {

struct Survivors {
  const float* values;
  const int32_t *places, *counts;
  const float *table, *bounds, *bars;
  const int32_t* rows;
  int32_t* latents;
  float* scores;
  int32_t *found, *certified;
  int64_t N, capacity, candidates;
  int width, chunks, k, held;
  bool exact;
  float roundoff;

  // The chunk and column that a place stands for: the token's bounds apart, all that is known of it.
  __device__ float error(float v, int32_t place, const TokenBounds& t) const {
    if (!exact) return 0.f;
    const int chunk = place / width, c = place - chunk * width;
    const float* entry = table + int64_t{chunk} * TABLE_ROWS * width + c;
    return error_of(v, t, entry[width], entry[2 * width], entry[3 * width], roundoff);
  }
  __device__ int32_t latent(int32_t place) const {
    const int chunk = place / width, position = chunk + (place - chunk * width) * chunks;
    return rows ? rows[position] : position;
  }
};

struct Ends {
  int32_t lower;  // a key; NaN has no lower end, and its upper end passes every test
  float upper;
};

template <int WARPS, int TEAMS, int BLOCKS>
__global__ void __launch_bounds__(WARPS* TEAMS* WARP, BLOCKS) select_kernel(Survivors s) {
  using Members = Team<WARPS>;
  const int team = WARPS == 1 ? warp() : 0;
  const int64_t n = int64_t{blockIdx.x} * TEAMS + team;
  if (n >= s.N) return;
  SHARED(Bins[TEAMS], bins);
  SHARED(int[WARPS], of_warp);
  Ends* held = dynamic_shared<Ends>() + team * s.held;

  // Both ends of every survivor. A thread looks only at its own here and in kth_key.
  const TokenBounds bounds = token_bounds(s.bounds, s.N, n);
  const float* values = s.values + n * s.capacity;
  const int32_t* places = s.places + n * s.capacity;
  const int given = s.counts[n], count = static_cast<int>(min(int64_t{given}, s.capacity));
  const auto ends_of = [&](int i) -> Ends {
    const float v = values[i], e = s.error(v, places[i], bounds), lower = v - e;
    return {lower == lower ? key_of(lower) : -1, v + e};
  };
#pragma unroll 4
  for (int i = Members::me(); i < min(count, s.held); i += Members::SIZE) held[i] = ends_of(i);
  const auto ends = [&](int i) { return i < s.held ? held[i] : ends_of(i); };
  const float least = __int_as_float(kth_key<WARPS>(count, s.k, bins[team], [&](int i) { return ends(i).lower; }).key);

  // Store, in the order of the list.
  int total = 0;
  for (int start = 0; start < count; start += Members::SIZE) {
    const int i = start + Members::me();
    bool keep = false;
    if (i < count) {
      const float upper = ends(i).upper;
      keep = !(upper < least || upper <= 0.f);
    }
    int kept = 0;
    const int slot = total + rank_among<WARPS>(keep, of_warp, kept);
    if (keep && slot < s.candidates) {
      s.latents[n * s.candidates + slot] = s.latent(places[i]);
      s.scores[n * s.candidates + slot] = values[i];
    }
    total += kept;
  }
  if (Members::me() == 0) {
    const float bar = s.bars[n];
    const bool certified = given <= s.capacity && total <= s.candidates && (least > bar || bar == 0.f);
    s.found[n] = certified ? total : 0;
    s.certified[n] = certified;
  }
}

constexpr int SHORT = 1024;  // 32 survivors to a lane
constexpr int HELD = 4096;   // 32 KiB

}  // namespace

void select(const Where& where, const Array& values, const Array& places, const Array& counts, const Array& table,
            const Array& bounds, const Array& bars, const Maybe& rows, const Array& latents, const Array& scores,
            const Array& found, const Array& certified, int64_t k, int64_t chunks, bool exact, float roundoff) {
  const int64_t N = counts.rows;
  fit("counts", counts, counted("N", N)), fit("values", values, N, counted("survivors", values.cols));
  fit("places", places, N, values.cols), fit("bounds", bounds, 4, N), fit("bars", bars, N);
  fit("table", table, 5 * counted("chunks", chunks), counted("width", table.cols));
  if (rows) fit("rows", rows, rows->rows);
  fit("latents", latents, N, counted("candidates", latents.cols)), fit("scores", scores, N, latents.cols);
  fit("found", found, N), fit("certified", certified, N), counted("k", k);
  const int held = static_cast<int>(std::min<int64_t>(values.cols, HELD));
  const Survivors s{values.as<const float>(), places.as<const int32_t>(), counts.as<const int32_t>(),
                    table.as<const float>(), bounds.as<const float>(), bars.as<const float>(),
                    pointer<const int32_t>(rows), latents.as<int32_t>(), scores.as<float>(), found.as<int32_t>(),
                    certified.as<int32_t>(), counts.rows, values.cols, latents.cols, static_cast<int>(table.cols),
                    static_cast<int>(chunks), static_cast<int>(k), held, exact, roundoff};
  // Few tokens leave multiprocessors for a block each.
  if (values.cols <= SHORT && s.N > FEW_TOKENS)
    launch(where, "select", select_kernel<1, 4, 8>, {dim3(ceil_div(s.N, 4)), dim3(128), sizeof(Ends) * held * 4}, s);
  else
    launch(where, "select", select_kernel<8, 1, 4>, {dim3(s.N), dim3(256), sizeof(Ends) * held}, s);
}

}  // namespace fastsae
