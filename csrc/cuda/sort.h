// A stable sort by key and a running sum (sort.cu), on workspaces that the caller allocates; launches and workspaces follow
// from sizes alone.
#pragma once
#include "ops.h"

namespace fastsae {

struct Pairs {  // n keys from 0 to below 2^bits, and a number that goes along with each
  const int32_t *keys, *values;
  int32_t *sorted_keys, *sorted_values;
  int n, bits;
};

size_t sort_bytes(int n, int bits);
void sort(const Where&, const Pairs&, void* workspace, size_t bytes);

// counts[i] = counts[0] + ... + counts[i], in place.
size_t scan_bytes(int n);
void inclusive_sum(const Where&, int32_t* counts, int n, void* workspace, size_t bytes);

}  // namespace fastsae
