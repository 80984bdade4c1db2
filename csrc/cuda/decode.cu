// out[n] = Σ_k acts[n, k] · W[indices[n, k], :]: A W, and decode_error, which goes on to the loss while it has the sum:
// error = A W (+ bias) - target, and Σ error² of each token.
//
// gather.h with tokens as owners. Bytes: nnz·D·sizeof(W) gathered, of latents in common use from L2, + N·D·sizeof(W)
// (twice with a target) + (4 + sizeof(acts))·nnz. Flops: 2·nnz·D.
#include "codes.h"
#include "declarations.h"
#include "gather.h"

namespace fastsae {
namespace {

template <class T> struct TokenRows {
  Codes<T> codes;

  __device__ int64_t begin(int64_t n) const { return codes.begin(n); }
  __device__ int64_t end(int64_t n) const { return codes.end(n); }
  __device__ float weight(int64_t slot) const { return codes.inside(slot) ? widen(codes.acts[slot]) : 0.f; }
  __device__ int64_t row(int64_t slot) const { return codes.indices[slot]; }
};

template <bool ALIGNED, class T> struct Store {
  T* out;
  int64_t D;

  __device__ void operator()(int64_t n, bool is_token, int64_t c, const float (&sum)[V<T>]) const {
    if (is_token) store_pack<ALIGNED>(out + n * D, c, D, sum);
  }
};

template <bool ALIGNED, class T> struct Subtract {
  const T *target, *bias;
  T* error;
  float* squares;  // (tiles of columns, N): each tile has a row of its own, so that their order is fixed
  int64_t N, D;

  __device__ void operator()(int64_t n, bool is_token, int64_t c, const float (&sum)[V<T>]) const {
    float square = 0.f;
    if (is_token) {
      float of_target[V<T>], rest[V<T>];
      load_pack<ALIGNED>(target + n * D, c, D, of_target);
#pragma unroll
      for (int i = 0; i < V<T>; ++i) {
        const float b = bias && c + i < D ? widen(bias[c + i]) : 0.f;
        rest[i] = c + i < D ? sum[i] + b - of_target[i] : 0.f;
        square = fmaf(rest[i], rest[i], square);
      }
      store_pack<ALIGNED>(error + n * D, c, D, rest);
    }
    // The warps of a token, in order.
    SHARED(float[GATHER_THREADS / WARP], of_warp);
    const int warps = blockDim.x / WARP, first = threadIdx.y * warps;
    square = warp_sum(square);
    if (lane() == 0) of_warp[first + warp()] = square;
    __syncthreads();
    if (threadIdx.x == 0 && is_token) {
      float total = 0.f;
      for (int w = 0; w < warps; ++w) total += of_warp[first + w];
      squares[int64_t{blockIdx.y} * N + n] = total;
    }
  }
};

}  // namespace

void decode(const Where& where, const Array& acts, const Array& indices, const Maybe& offsets, const Array& W,
            const Array& out, const Maybe& first_piece, int64_t piece_length, const Maybe& sums) {
  fit("out", out, fit_code(acts, indices, offsets), W.cols), fit_pieces(first_piece, out.rows, piece_length, sums, W.cols);
  by_dtype(W.dtype, [&](auto t) {
    using T = decltype(t);
    const TokenRows<T> rows{codes<T>(acts, indices, offsets, W.rows)};
    const Pieces pieces{pointer<int32_t>(first_piece), out.rows, piece_length, sums ? sums->rows : 0};
    by_alignment([&](auto aligned) {
      gather<aligned.value>(where, "decode", rows, pieces, W.as<const T>(), pointer<float>(sums), W.cols,
                            Store<aligned.value, T>{out.as<T>(), W.cols});
    }, W, out);
  });
}

void decode_error(const Where& where, const Array& acts, const Array& indices, const Maybe& offsets, const Array& W,
                  const Array& target, const Maybe& bias, const Array& error, const Array& squares, const Maybe& first_piece,
                  int64_t piece_length, const Maybe& sums) {
  const int64_t n = fit_code(acts, indices, offsets);
  fit("target", target, n, W.cols), fit("error", error, n, W.cols), fit("bias", bias, W.cols);
  fit("squares", squares, decode_tiles(W.dtype, W.cols), n), fit_pieces(first_piece, n, piece_length, sums, W.cols);
  by_dtype(W.dtype, [&](auto t) {
    using T = decltype(t);
    const TokenRows<T> rows{codes<T>(acts, indices, offsets, W.rows)};
    const Pieces pieces{pointer<int32_t>(first_piece), error.rows, piece_length, sums ? sums->rows : 0};
    by_alignment([&](auto aligned) {
      gather<aligned.value>(where, "decode_error", rows, pieces, W.as<const T>(), pointer<float>(sums), W.cols,
                            Subtract<aligned.value, T>{target.as<const T>(), pointer<const T>(bias), error.as<T>(),
                                                       squares.as<float>(), error.rows, W.cols});
    }, W, target, error);
  });
}

int64_t decode_tiles(Dtype dtype, int64_t D) {
  int64_t tiles = 0;
  by_dtype(dtype, [&](auto t) { tiles = gather_shape<decltype(t)>(1, D).grid.y; });
  return tiles;
}

}  // namespace fastsae
