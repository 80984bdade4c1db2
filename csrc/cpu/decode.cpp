// x̂_n = Σ_k acts[n, k] · W[indices[n, k], :]
//
// One token at a time: its D outputs in tiles that stay in registers while its K rows are gathered (gather.h). Bytes:
// nnz·D·sizeof(W) gathered + N·D written. Flops: 2·nnz·D. Accumulation fp32 (fp64 for f64), in slot order, so the result
// does not depend on the number of threads. An act of 0 adds nothing, whatever its row holds.
#include "gather.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

template <class T> struct TokenRows {
  const T* acts;
  const int32_t* indices;
  const T* W;
  int64_t stride, begin, end, last;

  acc_t<T> weight(int64_t slot) const { return widen(acts[slot]); }
  const T* row(int64_t slot) const { return W + indices[slot] * stride; }
};

template <class T> void decode_typed(const Codes& c, const Matrix& W, const Matrix& out, int threads) {
  const T* acts = static_cast<const T*>(c.acts);
  const T* rows = static_cast<const T*>(W.data);
  const int64_t last = c.n ? c.end(c.n - 1) : 0;
  // Ragged tokens differ in length, so they are dealt out in small lots.
#pragma omp parallel for num_threads(team(threads, (last + c.n) * W.cols)) schedule(dynamic, 16)
  for (int64_t n = 0; n < c.n; ++n) {
    const TokenRows<T> token{acts, c.indices, rows, W.stride, c.begin(n), c.end(n), last};
    sum_rows<T>(token, W.cols, static_cast<T*>(out.data) + n * out.stride);
  }
}

}  // namespace

void decode(const Codes& c, const Matrix& W, const Matrix& out, int threads) {
  by_dtype(W.dtype, [&](auto t) { decode_typed<decltype(t)>(c, W, out, threads); });
}

}  // namespace fastsae::FASTSAE_ISA
