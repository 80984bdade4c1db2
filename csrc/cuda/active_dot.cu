// out[n, k] = ⟨x[n], W[indices[n, k]]⟩ at the active latents only; 0 in empty slots (the gradient of the acts).
//
// A warp takes DOTS neighbouring slots, of one token or several, so that tokens of any length are shared out evenly; a ragged
// slot finds its token by search. The bits are those of the exact score (dots.h).
// Bytes: nnz·D·sizeof(W) + nnz·D·sizeof(x), the latter from L1 + nnz·(4 + 2·sizeof(acts)). Flops: 2·nnz·D.
#include "codes.h"
#include "declarations.h"
#include "dots.h"
#include "launch.h"
#include "search.h"

namespace fastsae {
namespace {

constexpr int THREADS = 128, BLOCKS = 4;

template <bool ALIGNED, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    active_dot_kernel(Codes<T> codes, const T* x, const T* W, T* out, int64_t D) {
  const int64_t first = (int64_t{blockIdx.x} * (THREADS / WARP) + warp()) * DOTS;

  // Shapes: a slot past the end of a ragged code is 0; in a fixed one an act of 0 is an empty slot.
  const T *rows[DOTS], *latents[DOTS];
#pragma unroll
  for (int j = 0; j < DOTS; ++j) {
    const int64_t slot = first + j;
    bool live = slot < (codes.offsets ? codes.offset(codes.n) : codes.slots) && codes.inside(slot);
    int64_t n = 0;
    if (live && codes.offsets) n = max(int64_t{0}, min(count_up_to(codes.offsets, codes.n + 1, slot) - 1, codes.n - 1));
    if (live && !codes.offsets) {
      n = slot / codes.k;
      live = widen(codes.acts[slot]) != 0.f;
    }
    rows[j] = x + n * D;
    latents[j] = live ? W + codes.indices[slot] * D : nullptr;
  }

  float dots[DOTS];
  row_dots<ALIGNED, false>(rows, latents, D, dots);
#pragma unroll
  for (int j = 0; j < DOTS; ++j)
    if (lane() == j && first + j < codes.slots) out[first + j] = round_to<T>(dots[j]);
}

}  // namespace

void active_dot(const Where& where, const Array& x, const Array& acts, const Array& indices, const Maybe& offsets,
                const Array& W, const Array& out) {
  fit("x", x, fit_code(acts, indices, offsets), W.cols), fit("out", out, acts.rows, acts.cols);
  by_dtype(W.dtype, [&](auto t) {
    using T = decltype(t);
    const Codes<T> c = codes<T>(acts, indices, offsets, W.rows);
    by_alignment([&](auto aligned) {
      launch(where, "active_dot", active_dot_kernel<aligned.value, T>,
             {dim3(ceil_div(c.slots, DOTS * (THREADS / WARP))), dim3(THREADS)}, c, x.as<T>(), W.as<T>(), out.as<T>(), W.cols);
    }, x, W);
  });
}

}  // namespace fastsae
