// Owners of many entries (long tokens of a ragged code, latents in common use), cut into pieces of equal length, so that
// no block has much more to add than another and the order of every sum stays fixed.
//
// An owner with more than `length` entries is summed by pieces: a block adds one piece into a row of a workspace, and the
// owner's own block adds those rows in order. first (owners + 1,) int32: the first piece of each owner, ascending;
// first[owners] is how many there are, which only the device knows, so as many blocks are launched as there can be.
// fastsae/backends/gpu/pieces.py has the arithmetic.
#pragma once
#include "device.h"
#include "ops.h"
#include "search.h"

namespace fastsae {

struct Pieces {
  const int32_t* first;  // null where no owner can be long
  int64_t owners, length, capacity;

  __device__ bool cut(int64_t owner) const { return first && first[owner + 1] > first[owner]; }
};

struct Piece {
  int64_t owner, begin, end;
};

// Piece j of those that there are; Starts: where an owner's entries begin and end.
template <class Starts> __device__ inline Piece find_piece(const Pieces& p, int64_t j, const Starts& starts) {
  const int64_t owner = count_up_to(p.first, p.owners + 1, static_cast<int32_t>(j)) - 1;
  const int64_t begin = starts.begin(owner) + (j - p.first[owner]) * p.length;
  const int64_t end = starts.end(owner);
  return {owner, begin, begin + p.length < end ? begin + p.length : end};
}

}  // namespace fastsae
