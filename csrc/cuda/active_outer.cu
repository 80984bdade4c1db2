// out[i] = Σ_e acts[slots[e]] · x[tokens[e], :] over the entries e of latent i: Aᵀ x, a dictionary's gradient.
//
// gather.h with latents as owners, from a code in latent order (by_latent.cu). Every sum has one order, so the bits never
// change. Bytes: nnz·D·sizeof(x) gathered + M·D·sizeof(x) + nnz·(4 + 8 + sizeof(act)) for each tile of columns.
// Flops: 2·nnz·D.
#include "gather.h"
#include "update.h"

namespace fastsae {
namespace {

// The order may be another code's (its caller's mistake, which shows on the device only): what is outside counts as empty.
template <class T> struct LatentRows {
  const int64_t* starts;
  const int32_t* tokens;
  const int64_t* slots;
  const T* acts;
  int64_t n, capacity;

  __device__ int64_t at(int64_t i) const { return starts[i] < 0 ? 0 : starts[i] < capacity ? starts[i] : capacity; }
  __device__ int64_t begin(int64_t i) const { return at(i); }
  __device__ int64_t end(int64_t i) const { return at(i + 1); }
  __device__ float weight(int64_t e) const {
    const uint64_t slot = slots[e];
    return slot < static_cast<uint64_t>(capacity) && static_cast<uint32_t>(tokens[e]) < n ? widen(acts[slot]) : 0.f;
  }
  __device__ int64_t row(int64_t e) const { return tokens[e]; }
};

template <bool ALIGNED, class T> struct Store {
  T* out;
  int64_t D;

  __device__ void operator()(int64_t i, bool is_latent, int64_t c, const float (&sum)[V<T>]) const {
    if (is_latent) store_pack<ALIGNED>(out + i * D, c, D, sum);
  }
};

}  // namespace

void active_outer(const Where& where, const Array& starts, const Array& tokens, const Array& slots, const Array& acts,
                  const Array& x, const Array& out, const Maybe& first_piece, int64_t piece_length, const Maybe& sums) {
  fit("starts", starts, out.rows + 1), fit("tokens", tokens, acts.size()), fit("slots", slots, acts.size());
  fit("out", out, out.rows, x.cols), fit_pieces(first_piece, out.rows, piece_length, sums, x.cols);
  by_dtype(x.dtype, [&](auto t) {
    using T = decltype(t);
    const LatentRows<T> rows{starts.as<int64_t>(), tokens.as<int32_t>(), slots.as<int64_t>(), acts.as<T>(), x.rows,
                             slots.rows};
    const Pieces pieces{pointer<int32_t>(first_piece), out.rows, piece_length, sums ? sums->rows : 0};
    by_alignment([&](auto aligned) {
      gather<aligned.value>(where, "active_outer", rows, pieces, x.as<const T>(), pointer<float>(sums), x.cols,
                            Store<aligned.value, T>{out.as<T>(), x.cols});
    }, x, out);
  });
}

}  // namespace fastsae
