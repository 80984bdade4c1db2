// Scores as integers of the same order, and the k-th largest of some.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "simd.h"

namespace fastsae::FASTSAE_ISA {

FASTSAE_INLINE int32_t sortable(float score) {
  int32_t i;
  std::memcpy(&i, &score, 4);
  return score != score ? INT32_MAX : i ^ (i >> 31 & INT32_MAX);
}
FASTSAE_INLINE float from_sortable(int32_t key) {
  if (key == INT32_MAX) return std::numeric_limits<float>::quiet_NaN();
  const int32_t i = key ^ (key >> 31 & INT32_MAX);
  float score;
  std::memcpy(&score, &i, 4);
  return score;
}

inline int64_t count_reaching(const int32_t* keys, int64_t count, int32_t least) {
  constexpr int64_t kAtOnce = 1 << 20;   // the count of so many is summed in 32 bits
  int64_t reaching = 0;
  for (int64_t first = 0; first < count; first += kAtOnce) {
    const int64_t last = std::min(count, first + kAtOnce);
    int32_t some = 0;
    for (int64_t i = first; i < last; ++i) some += keys[i] >= least;
    reaching += some;
  }
  return reaching;
}

// The k-th largest key, 1 <= k <= count: by halving the range and counting, up to 32 times, which vectorizes. Of 4,096 keys that
// takes 5 us on Zen 4; std::nth_element, with a branch for each key that is a guess, takes 28.
inline int32_t kth_largest(const int32_t* keys, int64_t count, int64_t k) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) low = std::min(low, keys[i]), high = std::max(high, keys[i]);
  while (low < high) {
    const int32_t middle = int32_t(low + (int64_t(high) - low + 1) / 2);
    if (count_reaching(keys, count, middle) >= k) low = middle;
    else high = middle - 1;
  }
  return low;
}

inline float kth_largest(const std::vector<float>& scores, int64_t k) {
  std::vector<int32_t> keys(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) keys[i] = sortable(scores[i]);
  return from_sortable(kth_largest(keys.data(), int64_t(keys.size()), k));
}

}  // namespace fastsae::FASTSAE_ISA
