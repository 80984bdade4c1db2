// What every kernel needs: value types, 16-byte loads with their tails, sums over a warp and a block.
//
// The same sources are compiled by nvcc, and by a C++ compiler against tests/emulation, which runs a kernel's threads as
// fibers. So CUDA's syntax for launches and shared memory is behind launch.h and the two SHARED forms below, and PTX has
// a twin wherever it is used.
#pragma once
#ifdef FASTSAE_EMULATED
#include <emulation.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// Memory of a block: SHARED(float[8], sums) declares `sums`.
#define SHARED(type, name) __shared__ fastsae::Plain<type> name
#endif

#include <cmath>
#include <cstdint>

#include "ops.h"

namespace fastsae {

template <class T> using Plain = T;
constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;  // the lanes of a warp

#ifdef FASTSAE_EMULATED
using bf16 = emulation::bf16;
using f16 = emulation::f16;
template <class T> T* dynamic_shared() { return reinterpret_cast<T*>(emulation::dynamic_shared()); }
#else
using bf16 = __nv_bfloat16;
using f16 = __half;
// The memory whose size a launch gives, aligned to 128 bytes.
template <class T> __device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}
#endif

struct fp8 {  // float8_e4m3fn, of moments only
  uint8_t bits;
};

template <> struct DtypeOf<bf16> { static constexpr Dtype value = Dtype::bf16; };
template <> struct DtypeOf<f16> { static constexpr Dtype value = Dtype::f16; };
template <> struct DtypeOf<fp8> { static constexpr Dtype value = Dtype::f8; };

// -- values: computed in float, rounded once, to nearest even, when stored ---------------------------------------------

__device__ inline float widen(float t) { return t; }
__device__ inline float widen(bf16 t) { return __bfloat162float(t); }
__device__ inline float widen(f16 t) { return __half2float(t); }
// Exponent and mantissa moved to a float's, then its bias: exact, below the smallest normal number too.
__device__ inline float widen(fp8 t) {
  const int size = t.bits & 0x7f;
  const float value = size == 0x7f ? NAN : __int_as_float(size << 20) * 0x1p120f;
  return t.bits & 0x80 ? -value : value;
}
template <class T> __device__ T round_to(float t);
template <> __device__ inline float round_to<float>(float t) { return t; }
template <> __device__ inline bf16 round_to<bf16>(float t) { return __float2bfloat16_rn(t); }
template <> __device__ inline f16 round_to<f16>(float t) { return __float2half_rn(t); }

// -- packs: the V values of 16 bytes -----------------------------------------------------------------------------------

template <class T> constexpr int V = 16 / sizeof(T);

template <class T> struct alignas(16) Pack {
  T t[V<T>];
};

// Values c .. c + V of a row of D; zeros past its end. ALIGNED: every row of the matrix begins at a multiple of 16 bytes
// and has whole packs, so that one load does. What a sum over them gives does not depend on ALIGNED.
template <bool ALIGNED, class T> __device__ inline void load_pack(const T* row, int64_t c, int64_t D, float (&out)[V<T>]) {
  if constexpr (ALIGNED) {
    Pack<T> pack{};
    if (c < D) pack = *reinterpret_cast<const Pack<T>*>(row + c);
#pragma unroll
    for (int i = 0; i < V<T>; ++i) out[i] = widen(pack.t[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V<T>; ++i) out[i] = c + i < D ? widen(row[c + i]) : 0.f;
  }
}

// A pack as it was loaded, to be widened when it is used: 16 bytes of registers whatever the type, if rows are aligned.
template <bool ALIGNED, class T> struct Loaded {
  Pack<T> pack;

  __device__ void load(const T* row, int64_t c, int64_t D) {
    pack = {};
    if (c < D) pack = *reinterpret_cast<const Pack<T>*>(row + c);
  }
  __device__ void widen_to(float (&out)[V<T>]) const {
#pragma unroll
    for (int i = 0; i < V<T>; ++i) out[i] = widen(pack.t[i]);
  }
};

template <class T> struct Loaded<false, T> {
  float t[V<T>];

  __device__ void load(const T* row, int64_t c, int64_t D) { load_pack<false>(row, c, D, t); }
  __device__ void widen_to(float (&out)[V<T>]) const {
#pragma unroll
    for (int i = 0; i < V<T>; ++i) out[i] = t[i];
  }
};

template <bool ALIGNED, class T> __device__ inline void store_pack(T* row, int64_t c, int64_t D, const float (&t)[V<T>]) {
  if constexpr (ALIGNED) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < V<T>; ++i) pack.t[i] = round_to<T>(t[i]);
    if (c < D) *reinterpret_cast<Pack<T>*>(row + c) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < V<T>; ++i)
      if (c + i < D) row[c + i] = round_to<T>(t[i]);
  }
}

// -- threads and sums --------------------------------------------------------------------------------------------------

__device__ inline int lane() { return threadIdx.x % WARP; }
__device__ inline int warp() { return threadIdx.x / WARP; }

// The sum over a warp, in one order, known to every lane.
template <class T> __device__ inline T warp_sum(T t) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) t += __shfl_xor_sync(ALL, t, step);
  return t;
}

// The largest of a warp, known to every lane.
__device__ inline uint32_t warp_max(uint32_t t) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) t = max(t, __shfl_xor_sync(ALL, t, step));
  return t;
}

// How many of the lanes below this one say yes.
__device__ inline int lanes_below(unsigned ballot) { return __popc(ballot & ((1u << lane()) - 1)); }

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastsae
