// x̂_n = Σ_k acts[n, k] · W[indices[n, k], :]
//
// One token at a time: its D outputs in tiles that stay in registers, its K rows gathered. The next row is fetched while
// this one is added. Bytes: nnz·D·sizeof(W) gathered + N·D written. Flops: 2·nnz·D. Accumulation fp32 (fp64 for f64), in
// slot order, so the result does not depend on the number of threads. An act of 0 adds nothing, whatever its row holds.
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

template <class T> void decode_token(const Codes& c, int64_t token, const Matrix& W, T* out, acc_t<T>* sum) {
  using A = acc_t<T>;
  const T* acts = static_cast<const T*>(c.acts);
  const T* rows = static_cast<const T*>(W.data);
  const int64_t D = W.cols, end = c.end(token);
  for (int64_t d = 0; d < D; ++d) sum[d] = 0;
  for (int64_t s = c.begin(token); s < end; ++s) {
    if (s + 1 < end) prefetch_row(rows + c.indices[s + 1] * W.stride, D);
    const A act = widen(acts[s]);
    if (act != A(0)) add_scaled(sum, act, rows + c.indices[s] * W.stride, D);
  }
  for (int64_t d = 0; d < D; ++d) out[d] = narrow<T>(sum[d]);
}

template <class T> void decode_typed(const Codes& c, const Matrix& W, const Matrix& out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<acc_t<T>> sum(W.cols);
#pragma omp for schedule(dynamic, 16)
    for (int64_t n = 0; n < c.n; ++n) decode_token<T>(c, n, W, static_cast<T*>(out.data) + n * out.stride, sum.data());
  }
}

}  // namespace

void decode(const Codes& c, const Matrix& W, const Matrix& out, int threads) {
  by_dtype(W.dtype, [&](auto t) { decode_typed<decltype(t)>(c, W, out, threads); });
}

}  // namespace fastsae::FASTSAE_ISA
