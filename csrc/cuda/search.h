// Binary search in ascending numbers.
#pragma once
#include "device.h"

namespace fastsae {

// How many of the `size` ascending numbers are <= value.
template <class T> __device__ inline int64_t count_up_to(const T* sorted, int64_t size, T value) {
  int64_t low = 0;
  while (size > 0) {
    const int64_t half = size / 2;
    if (sorted[low + half] <= value) {
      low += half + 1;
      size -= half + 1;
    } else {
      size = half;
    }
  }
  return low;
}

}  // namespace fastsae
