// out[i] = Σ_e weight(e) · matrix[row(e), :] over the entries e of owner i: what decode does for tokens and active_outer
// for latents.
//
// A row of threads, whole warps, computes one owner, a pack of columns to a thread, AT_ONCE rows of the matrix in flight at a
// time and added in order; several owners share a block where rows are short. Long owners are cut into pieces (pieces.h): so
// rows of very different lengths cost what their entries cost. 4 or 8 loads of 16 bytes in each of 768 threads are 48 or 96
// KiB in flight on a multiprocessor; 32 hide the latency of an H200's memory at its full bandwidth.
#pragma once
#include "launch.h"
#include "pieces.h"

namespace fastsae {

constexpr int GATHER_THREADS = 256;  // of a block, at most
// On a multiprocessor, at least: registers for the rows in flight; values loaded one by one need more, for their addresses.
template <bool ALIGNED, class T> constexpr int GATHER_BLOCKS = ALIGNED ? 3 : 2;

// An Entries type says, in device code: begin(i), end(i), weight(e), row(e), which fits 32 bits. A weight of 0 is an empty
// entry: it adds nothing, whatever its row holds, and its row is not read.
template <bool ALIGNED, class T, class Entries>
__device__ inline void add_rows(const Entries& entries, int64_t begin, int64_t end, const T* matrix, int64_t D, int64_t c,
                                float (&sum)[V<T>]) {
  constexpr int AT_ONCE = ALIGNED && V<T> == 4 ? 8 : 4;  // of 16-bit rows eight spill
  static_assert(WARP % AT_ONCE == 0);
  for (int64_t first = begin; first < end; first += WARP) {
    // A lane reads one of the next 32 entries, and tells the others: what they are is not waited for at each of them.
    const int64_t mine = first + lane();
    const float my_weight = mine < end ? entries.weight(mine) : 0.f;
    const int my_row = my_weight != 0.f ? static_cast<int>(entries.row(mine)) : 0;
    const int count = static_cast<int>(min(int64_t{WARP}, end - first));
    for (int e = 0; e < count; e += AT_ONCE) {
      float weight[AT_ONCE];
      Loaded<ALIGNED, T> row[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        weight[j] = __shfl_sync(ALL, my_weight, e + j);
        const int64_t at = __shfl_sync(ALL, my_row, e + j);
        row[j].load(matrix + at * D, c, weight[j] != 0.f ? D : 0);
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        float t[V<T>];
        row[j].widen_to(t);
#pragma unroll
        for (int i = 0; i < V<T>; ++i) sum[i] = fmaf(weight[j], t[i], sum[i]);  // of an empty entry, zeros
      }
    }
  }
}

template <bool ALIGNED, class T, class Entries>
__global__ void __launch_bounds__(GATHER_THREADS, GATHER_BLOCKS<ALIGNED, T>)
    sum_pieces(Entries entries, Pieces pieces, const T* matrix, float* sums, int64_t D) {
  const int64_t j = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, c = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V<T>;
  if (j >= min(int64_t{pieces.first[pieces.owners]}, pieces.capacity)) return;
  const Piece piece = find_piece(pieces, j, entries);
  float sum[V<T>] = {};
  add_rows<ALIGNED>(entries, piece.begin, piece.end, matrix, D, c, sum);
  float* out = sums + j * D;
#pragma unroll
  for (int i = 0; i < V<T>; ++i)
    if (c + i < D) out[c + i] = sum[i];
}

// Finish: what is done with a sum, `finish(i, is_owner, c, sum)`; every thread calls it.
template <bool ALIGNED, class T, class Entries, class Finish>
__global__ void __launch_bounds__(GATHER_THREADS, GATHER_BLOCKS<ALIGNED, T>)
    sum_rows(Entries entries, Pieces pieces, const T* matrix, const float* sums, int64_t D, Finish finish) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, c = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V<T>;
  float sum[V<T>] = {};
  if (i < pieces.owners) {
    if (!pieces.cut(i)) {
      add_rows<ALIGNED>(entries, entries.begin(i), entries.end(i), matrix, D, c, sum);
    } else {
      // No further than there is memory: the order may be another code's.
      for (int64_t j = pieces.first[i]; j < min(int64_t{pieces.first[i + 1]}, pieces.capacity); ++j)
#pragma unroll
        for (int v = 0; v < V<T>; ++v)
          if (c + v < D) sum[v] += sums[j * D + c + v];
    }
  }
  finish(i, i < pieces.owners, c, sum);
}

// Blocks of whole warps that cover a row of D columns, and several rows where those are short.
template <class T> Shape gather_shape(int64_t owners, int64_t D) {
  const int64_t packs = ceil_div(ceil_div(D, V<T>), WARP) * WARP;
  const unsigned across = static_cast<unsigned>(std::clamp<int64_t>(packs, WARP, GATHER_THREADS));  // no column: no block
  const unsigned down = std::max(1u, 128 / across);
  return {dim3(ceil_div(owners, down), ceil_div(D, across * V<T>)), dim3(across, down)};
}

// sums: (pieces.capacity, D) float, where an owner can be long.
template <bool ALIGNED, class T, class Entries, class Finish>
void gather(const Where& where, const char* name, const Entries& entries, const Pieces& pieces, const T* matrix, float* sums,
            int64_t D, const Finish& finish) {
  if (pieces.first)
    launch(where, name, sum_pieces<ALIGNED, T, Entries>, gather_shape<T>(pieces.capacity, D), entries, pieces, matrix, sums, D);
  launch(where, name, sum_rows<ALIGNED, T, Entries, Finish>, gather_shape<T>(pieces.owners, D), entries, pieces, matrix, sums,
         D, finish);
}

}  // namespace fastsae
