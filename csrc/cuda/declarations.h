// The host functions that bind.cpp shows to Python, one group a source file. Each puts its kernels on where.stream and
// throws before it launches anything where it cannot, or where sizes or dtypes do not fit (fit.h).
#pragma once
#include "ops.h"

namespace fastsae {

// decode.cu. first_piece (N+1,) int32 and sums (capacity, D) float: long tokens' pieces (pieces.h), or neither.
void decode(const Where&, const Array& acts, const Array& indices, const Maybe& offsets, const Array& W, const Array& out,
            const Maybe& first_piece, int64_t piece_length, const Maybe& sums);
// squares (decode_tiles(dtype, D), N) float: each tile of columns' part of Σ error².
void decode_error(const Where&, const Array& acts, const Array& indices, const Maybe& offsets, const Array& W,
                  const Array& target, const Maybe& bias, const Array& error, const Array& squares, const Maybe& first_piece,
                  int64_t piece_length, const Maybe& sums);
int64_t decode_tiles(Dtype, int64_t D);

// active_dot.cu
void active_dot(const Where&, const Array& x, const Array& acts, const Array& indices, const Maybe& offsets, const Array& W,
                const Array& out);

}  // namespace fastsae
