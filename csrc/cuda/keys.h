// Floats as integers that order the same way, and the k-th largest of them: what every selection here is made of.
//
// A key is float's bits with negative numbers flipped, so that integers compare as the floats do; NaN has the largest key
// of all. Only positive floats are ever selected, and their keys are their bits.
#pragma once
#include "device.h"

namespace fastsae {

__device__ inline int32_t key_of(float t) {
  const int32_t bits = __float_as_int(t);
  return t == t ? bits ^ ((bits >> 31) & 0x7fffffff) : 0x7fffffff;
}

// -- teams: the threads that make one selection, a warp among others or all the warps of a block -----------------------

template <int WARPS> struct Team {
  static constexpr int SIZE = WARPS * WARP;

  __device__ static int me() { return WARPS == 1 ? lane() : static_cast<int>(threadIdx.x); }
  __device__ static void sync() {
    if constexpr (WARPS == 1) __syncwarp();
    else __syncthreads();
  }
};

// How many of the team's threads before this one say yes, and of all of them; of_warp: WARPS ints that the team shares.
template <int WARPS> __device__ inline int rank_among(bool yes, int* of_warp, int& total) {
  const unsigned ballot = __ballot_sync(ALL, yes);
  int rank = lanes_below(ballot);
  if constexpr (WARPS == 1) {
    total = __popc(ballot);
  } else {
    __syncthreads();  // the last call's counts have been read
    if (lane() == 0) of_warp[warp()] = __popc(ballot);
    __syncthreads();
    total = 0;
    for (int w = 0; w < WARPS; ++w) {
      if (w == warp()) rank += total;
      total += of_warp[w];
    }
  }
  return rank;
}

// -- the k-th largest --------------------------------------------------------------------------------------------------

struct alignas(16) Bins {  // in memory that a team shares
  int32_t count[256];
  int32_t digit, above, inside, unused;
};

struct Kth {
  int32_t key;   // the k-th largest; 0 where fewer than k are positive
  int32_t free;  // so many of those with this key belong to the k largest
  int32_t ties;  // and so many have it
};

// The k-th largest (k >= 1) of the positive keys key_at(0) .. key_at(count - 1), the same for every thread of the team.
// By radix: the keys that share the digits found so far are counted by their next 8 bits, by atomic additions of integers,
// whose order cannot matter; one warp sums the bins from the top. 4 rounds, or with ROUNDS = 3 those of the upper 24 bits:
// the lower 7 are then 0, and the key is never more than the true one. Thread i looks at the keys i, i + SIZE, ... only.
template <int WARPS, int ROUNDS = 4, class KeyAt>
__device__ inline Kth kth_key(int count, int k, Bins& bins, const KeyAt& key_at) {
  using Members = Team<WARPS>;
  int32_t found = 0;
  Kth result{0, k, 0};
  for (int round = 0; round < ROUNDS; ++round) {
    const int shift = round < 3 ? 23 - 8 * round : 0, width = round < 3 ? 8 : 7;
    for (int i = Members::me(); i < 256; i += Members::SIZE) bins.count[i] = 0;
    Members::sync();
#pragma unroll 4
    for (int i = Members::me(); i < count; i += Members::SIZE) {
      const int32_t key = key_at(i);
      if (key > 0 && (static_cast<uint32_t>(key ^ found) >> (shift + width)) == 0)
        atomicAdd(&bins.count[(key >> shift) & ((1 << width) - 1)], 1);
    }
    Members::sync();
    if (WARPS == 1 || warp() == 0) {
      // Lane 0 has the 8 largest digits.
      const int lowest = 8 * (WARP - 1 - lane());
      const Pack<int32_t> halves[2] = {*reinterpret_cast<const Pack<int32_t>*>(bins.count + lowest),
                                       *reinterpret_cast<const Pack<int32_t>*>(bins.count + lowest + 4)};
      int sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += halves[j / 4].t[j % 4];
      int above = sum;
#pragma unroll
      for (int step = 1; step < WARP; step *= 2) {
        const int of_lane = __shfl_up_sync(ALL, above, step);
        if (lane() >= step) above += of_lane;
      }
      const int total = __shfl_sync(ALL, above, WARP - 1);
      above -= sum;
#pragma unroll
      for (int j = 7; j >= 0; --j) {
        const int inside = halves[j / 4].t[j % 4];
        if (above < result.free && result.free <= above + inside) {
          bins.digit = lowest + j;
          bins.above = above;
          bins.inside = inside;
        }
        above += inside;
      }
      if (lane() == 0 && total < result.free) bins.digit = -1;
    }
    Members::sync();
    if (bins.digit < 0) return {0, 0, 0};
    found |= bins.digit << shift;
    result.free -= bins.above;
    result.ties = bins.inside;  // no thread writes here again before the second of the next round's barriers
  }
  result.key = found;
  return result;
}

}  // namespace fastsae
