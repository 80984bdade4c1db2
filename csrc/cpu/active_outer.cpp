// out_i = Σ_{n: i active} acts[n, i] · x_n: Aᵀ x, latent by latent
//
// Every output row is written once, by the thread that summed it: no atomics, no zeroing beforehand, and a latent without
// entries becomes a row of 0. A latent with more than kPiece entries is cut into pieces of that length, summed by any
// thread and added in order: the load is even when one latent is active for every token, and the result depends neither on
// the number of threads nor on which of them did what. Bytes: nnz·D·sizeof(x) gathered + M·D written. Flops: 2·nnz·D.
// Accumulation fp32 (fp64 for f64), tokens ascending. An act of 0 adds nothing, whatever its x holds.
#include <memory>

#include "gather.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

// 512 rows of 3 KB take a core some 50 us: small against a step, large against the cost of adding a partial sum.
constexpr int64_t kPiece = 512;

template <class T> struct LatentRows {
  const T* acts;
  const LatentOrder& order;
  const T* x;
  int64_t stride, begin, end, last;

  acc_t<T> weight(int64_t entry) const { return widen(acts[order.slots[entry]]); }
  const T* row(int64_t entry) const { return x + order.tokens[entry] * stride; }
};

template <class A> struct PartialRows {
  const A* sums;
  int64_t D, begin, end, last;

  A weight(int64_t) const { return 1; }
  const A* row(int64_t piece) const { return sums + piece * D; }
};

struct LongLatent {
  int64_t latent, first_piece, end_piece;
};

struct Piece {
  int64_t begin, end;
};

template <class T>
void active_outer_typed(const Codes& c, const LatentOrder& order, const Matrix& x, const Matrix& out, int threads) {
  using A = acc_t<T>;
  const int64_t M = out.rows, D = out.cols, last = order.offsets[M];
  std::vector<LongLatent> long_latents;
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < M; ++i) {
    const int64_t begin = order.offsets[i], end = order.offsets[i + 1];
    if (end - begin <= kPiece) continue;
    const int64_t first = pieces.size();
    for (int64_t e = begin; e < end; e += kPiece) pieces.push_back({e, std::min(e + kPiece, end)});
    long_latents.push_back({i, first, int64_t(pieces.size())});
  }
  const std::unique_ptr<A[]> partial(new A[pieces.size() * D]);
  const auto rows = [&](int64_t begin, int64_t end) {
    return LatentRows<T>{static_cast<const T*>(c.acts), order, static_cast<const T*>(x.data), x.stride, begin, end, last};
  };
  const auto out_row = [&](int64_t i) { return static_cast<T*>(out.data) + i * out.stride; };
#pragma omp parallel num_threads(team(threads, (last + M) * D))
  {
    // The largest first; a thread that finds none left goes on with the short ones.
#pragma omp for schedule(dynamic, 1) nowait
    for (size_t p = 0; p < pieces.size(); ++p)
      sum_rows<T>(rows(pieces[p].begin, pieces[p].end), D, partial.get() + p * D);
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < M; ++i)
      if (order.offsets[i + 1] - order.offsets[i] <= kPiece)
        sum_rows<T>(rows(order.offsets[i], order.offsets[i + 1]), D, out_row(i));
#pragma omp for schedule(dynamic, 1)
    for (size_t l = 0; l < long_latents.size(); ++l) {
      const LongLatent& hot = long_latents[l];
      sum_rows<A>(PartialRows<A>{partial.get(), D, hot.first_piece, hot.end_piece, hot.end_piece}, D, out_row(hot.latent));
    }
  }
}

}  // namespace

void active_outer(const Codes& c, const LatentOrder& order, const Matrix& x, const Matrix& out, int threads) {
  by_dtype(x.dtype, [&](auto t) { active_outer_typed<decltype(t)>(c, order, x, out, threads); });
}

}  // namespace fastsae::FASTSAE_ISA
