// The code regrouped latent by latent (CSC): a counting sort, stable, so tokens ascend within a latent.
//
// Each thread counts the latents of its own range of tokens; a scan over (latent, thread) turns the counts into places;
// each thread puts its entries there. A stable sort has one result, whatever the number of threads. Empty slots (act 0) of
// a fixed-K code are left out; NaN is not empty. Entries past offsets[M] are not touched. Scratch: 8·M bytes a thread.
#include <omp.h>

#include <vector>

#include "ops.h"

namespace fastsae {
namespace {

// One Zen 5 core sorts 131072 slots in 0.45 ms, two in 0.5; and where other processes hold the cores, each of the barriers
// below may wait for a time slice (50 ms in all). So threads are for codes whose sort takes longer than that is worth.
constexpr int64_t kParallelSlots = 1 << 20;

struct Never {
  bool operator()(int64_t) const { return false; }
};

struct ZeroBf16 {
  const uint16_t* acts;
  bool operator()(int64_t slot) const { return (acts[slot] & 0x7fff) == 0; }
};

template <class T> struct Zero {
  const T* acts;
  bool operator()(int64_t slot) const { return acts[slot] == 0; }
};

// The part of `total` that belongs to one of `parts`.
int64_t cut(int64_t total, int part, int parts) { return total / parts * part + total % parts * part / parts; }

template <class Empty> void sort(const Codes& c, const LatentOrder& out, Empty empty, int threads) {
  const int64_t M = c.d_sae, slots = c.n ? c.end(c.n - 1) : 0;
  const int size = slots < kParallelSlots ? 1 : threads;
  std::vector<int64_t> places(size * M, 0), before(size + 1, 0);
#pragma omp parallel num_threads(size)
  {
    const int me = omp_get_thread_num(), parts = omp_get_num_threads();
    const int64_t token_end = cut(c.n, me + 1, parts), latent_begin = cut(M, me, parts), latent_end = cut(M, me + 1, parts);
    int64_t* mine = places.data() + me * M;
    for (int64_t n = cut(c.n, me, parts); n < token_end; ++n)
      for (int64_t s = c.begin(n); s < c.end(n); ++s)
        if (!empty(s)) ++mine[c.indices[s]];
#pragma omp barrier
    int64_t entries = 0;
    for (int part = 0; part < parts; ++part)
      for (int64_t i = latent_begin; i < latent_end; ++i) entries += places[part * M + i];
    before[me + 1] = entries;
#pragma omp barrier
    int64_t place = 0;
    for (int part = 0; part <= me; ++part) place += before[part];
    for (int64_t i = latent_begin; i < latent_end; ++i) {
      out.offsets[i] = place;
      for (int part = 0; part < parts; ++part) {
        const int64_t count = places[part * M + i];
        places[part * M + i] = place;
        place += count;
      }
    }
    if (me == parts - 1) out.offsets[M] = place;
#pragma omp barrier
    for (int64_t n = cut(c.n, me, parts); n < token_end; ++n)
      for (int64_t s = c.begin(n); s < c.end(n); ++s) {
        if (empty(s)) continue;
        const int64_t at = mine[c.indices[s]]++;
        out.tokens[at] = int32_t(n);
        out.slots[at] = s;
      }
  }
}

}  // namespace

void by_latent(const Codes& c, const LatentOrder& out, int threads) {
  if (c.offsets) return sort(c, out, Never{}, threads);
  switch (c.dtype) {
    case Dtype::f32: return sort(c, out, Zero<float>{static_cast<const float*>(c.acts)}, threads);
    case Dtype::bf16: return sort(c, out, ZeroBf16{static_cast<const uint16_t*>(c.acts)}, threads);
    case Dtype::f64: return sort(c, out, Zero<double>{static_cast<const double*>(c.acts)}, threads);
  }
}

}  // namespace fastsae
