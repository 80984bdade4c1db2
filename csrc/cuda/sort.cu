// A stable sort by key and a running sum: CUB's, from the CUDA toolkit, in a file of their own, as CUB takes long to compile.
//
// Both use no atomics on data and give the same bits every time: a stable sort has one result, and whole numbers add up in
// any order. The emulation has std::stable_sort and a loop.
// Bytes: 4·n, and 16·n for each 8 bits of a key; 8·n for a sum. Flops: n.
#ifndef FASTSAE_EMULATED
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#endif

#include <algorithm>
#include <numeric>
#include <vector>

#include "launch.h"
#include "sort.h"

namespace fastsae {

#ifndef FASTSAE_EMULATED

size_t sort_bytes(int n, int bits) {
  size_t bytes = 0;
  const int32_t* in = nullptr;
  int32_t* out = nullptr;
  check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, in, out, in, out, n, 0, bits), "no size for a sort");
  return bytes;
}

void sort(const Where& where, const Pairs& p, void* workspace, size_t bytes) {
  check(cub::DeviceRadixSort::SortPairs(workspace, bytes, p.keys, p.sorted_keys, p.values, p.sorted_values, p.n, 0, p.bits,
                                        static_cast<cudaStream_t>(where.stream)), "the sort was not launched");
}

size_t scan_bytes(int n) {
  size_t bytes = 0;
  int32_t* counts = nullptr;
  check(cub::DeviceScan::InclusiveSum(nullptr, bytes, counts, counts, n), "no size for a running sum");
  return bytes;
}

void inclusive_sum(const Where& where, int32_t* counts, int n, void* workspace, size_t bytes) {
  check(cub::DeviceScan::InclusiveSum(workspace, bytes, counts, counts, n, static_cast<cudaStream_t>(where.stream)),
        "the running sum was not launched");
}

#else

// The workspaces are written to their end, so that one which is too short is seen.
size_t sort_bytes(int n, int) { return 8 * static_cast<size_t>(n) + 1; }

void sort(const Where&, const Pairs& p, void* workspace, size_t bytes) {
  std::fill_n(static_cast<char*>(workspace), bytes, char{-1});
  const uint32_t mask = p.bits < 32 ? (1u << p.bits) - 1 : ~0u;  // as a radix sort, which sees these bits only
  std::vector<int> order(p.n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return (p.keys[a] & mask) < (p.keys[b] & mask); });
  for (int i = 0; i < p.n; ++i) {
    p.sorted_keys[i] = p.keys[order[i]];
    p.sorted_values[i] = p.values[order[i]];
  }
}

size_t scan_bytes(int) { return 1; }

void inclusive_sum(const Where&, int32_t* counts, int n, void* workspace, size_t bytes) {
  std::fill_n(static_cast<char*>(workspace), bytes, char{-1});
  std::partial_sum(counts, counts + n, counts);
}

#endif

}  // namespace fastsae
