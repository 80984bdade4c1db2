// out[n, k] = <x_n, W[indices[n, k], :]>, and 0 in the empty slots (act 0) of a fixed-K code
//
// One token at a time: x_n stays in L1, its rows of W are gathered, and the row some 9 KB on in that stream is fetched
// meanwhile, across tokens. Bytes: nnz·D·sizeof(W) gathered + N·D read. Flops: 2·nnz·D. The dot is the engine's score
// (simd.h): fp32 (fp64 for f64), fixed order. Slots past a ragged code's end are not touched.
#include <algorithm>

#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

// D=768, fp32, 131072 of 24576 rows, one Zen 5 core: 3 rows ahead 14.7 ms, 2 rows 15.4, 1 row 17.5, none 25.3.
constexpr int64_t kAheadBytes = 9216, kAheadRows = 8;

template <class T> void active_dot_typed(const Matrix& x, const Codes& c, const Matrix& W, T* out, int threads) {
  const T* acts = static_cast<const T*>(c.acts);
  const T* tokens = static_cast<const T*>(x.data);
  const auto row = [&](int64_t slot) { return static_cast<const T*>(W.data) + c.indices[slot] * W.stride; };
  const int64_t D = W.cols, last = c.n ? c.end(c.n - 1) : 0;
  const int64_t distance = std::clamp(kAheadBytes / std::max<int64_t>(D * sizeof(T), 1), int64_t(1), kAheadRows);
#pragma omp parallel for num_threads(team(threads, last * D)) schedule(dynamic, 16)
  for (int64_t n = 0; n < c.n; ++n)
    for (int64_t s = c.begin(n); s < c.end(n); ++s) {
      const int64_t ahead = std::min(s + distance, last - 1);
      const bool empty = !c.offsets && widen(acts[s]) == 0;
      out[s] = narrow<T>(empty ? acc_t<T>(0) : dot<true>(tokens + n * x.stride, row(s), D, row(ahead)));
    }
}

}  // namespace

void active_dot(const Matrix& x, const Codes& c, const Matrix& W, void* out, int threads) {
  by_dtype(W.dtype, [&](auto t) {
    using T = decltype(t);
    active_dot_typed<T>(x, c, W, static_cast<T*>(out), threads);
  });
}

}  // namespace fastsae::FASTSAE_ISA
