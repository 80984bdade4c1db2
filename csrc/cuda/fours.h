// Four neighbouring columns of a row, as update_rows.cu moves them: 16 bytes of float, 8 of bfloat16, 4 of 8 bits, at multiples
// of that.
#pragma once
#include <type_traits>

#include "device.h"

namespace fastsae {

template <class T> union Four {
  std::conditional_t<sizeof(T) == 4, float4, std::conditional_t<sizeof(T) == 2, uint2, uint32_t>> bits;
  T t[4];

  __device__ Four() {}
  __device__ void widen_to(float (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = widen(t[i]);
  }
};

template <class T> __device__ inline Four<T>* four_at(T* p) { return reinterpret_cast<Four<T>*>(p); }
template <class T> __device__ inline const Four<T>* four_at(const T* p) { return reinterpret_cast<const Four<T>*>(p); }

template <class T> __device__ inline void load_four(const T* p, float (&out)[4]) {
  Four<T> four;
  four.bits = four_at(p)->bits;
  four.widen_to(out);
}

// From what no kernel in flight writes.
template <class T> __device__ inline void gather_four(const T* p, float (&out)[4]) {
  Four<T> four;
  four.bits = __ldg(&four_at(p)->bits);
  four.widen_to(out);
}

__device__ inline void add_four(const float* p, float (&sum)[4]) {
  float t[4];
  load_four(p, t);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += t[i];
}

__device__ inline void store_four(float* p, const float (&t)[4]) { *reinterpret_cast<float4*>(p) = {t[0], t[1], t[2], t[3]}; }

// For what is not read again in this step: out of L2 first.
template <class T> __device__ inline void stream_four(T* p, const T (&t)[4]) {
  Four<T> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.t[i] = t[i];
  __stcs(&four_at(p)->bits, four.bits);
}

}  // namespace fastsae
