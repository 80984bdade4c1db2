// CUDA's device language for a C++ compiler: the sources of csrc/cuda run on the CPU, so that their logic can be tested
// against float64 truth, under AddressSanitizer and UndefinedBehaviorSanitizer, without a GPU.
//
// Every thread of a block is a fiber on one OS thread (fibers.cpp). A barrier or a warp's exchange suspends a fiber until
// all others of its block or warp have reached it too. Between these points, fibers run one after the other, in an order
// that a seed shuffles, so a missing barrier shows as a wrong result. A thread that exits, or waits elsewhere, while
// others wait for it is an error, and so is an incomplete warp. Shared memory is fresh for every block, filled with one
// bits (NaN, -1), and exactly as long as requested. Not emulated: the memory order of a real GPU, PTX, registers, speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define SHARED(type, name) \
  auto& name = emulation::shared<::fastsae::Plain<type>>([] { static const char key = 0; return &key; }())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };

namespace fastsae {
template <class T> using Plain = T;
}

namespace emulation {

struct Thread {
  dim3 index, block, block_shape, grid_shape;
  unsigned lane;
};
const Thread& thread();

// -- the host's side -----------------------------------------------------------------------------------------------------

struct Settings {
  uint64_t seed = 0;         // 0: threads and blocks in order
  int capability = 90;
  std::string refuse;        // the name of a kernel whose launch fails; "*": each
};
Settings& settings();
inline int capability() { return settings().capability; }
inline int most_shared() { return (capability() >= 90 ? 227 : 163) << 10; }  // bytes of a block
std::string refusal(const char* name, size_t shared);  // why a launch fails, or nothing
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body);

// -- a thread's side -----------------------------------------------------------------------------------------------------

void wait_for_block();
void pause();  // lets other fibers run; a polling thread calls it
void* dynamic_shared();
void* shared_of(const void* key, size_t size, size_t alignment);
// Shows 8 bytes to the warp and waits for all lanes. Its array of 32 stays valid until the next exchange but one.
const uint64_t* exchange(uint64_t mine);

template <class T> T& shared(const void* key) {
  return *static_cast<T*>(shared_of(key, sizeof(T), std::max<size_t>(16, alignof(T))));
}

template <class T> struct Lanes {  // what every lane of the warp showed
  const uint64_t* words;
  T operator[](unsigned lane) const {
    T t;
    std::memcpy(&t, words + lane % 32, sizeof t);
    return t;
  }
};

template <class T> Lanes<T> show(unsigned mask, T t) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  if (mask != 0xffffffffu) throw std::logic_error("the emulation has collectives of whole warps only");
  uint64_t word = 0;
  std::memcpy(&word, &t, sizeof t);
  return {exchange(word)};
}

// bfloat16 and half: raw bits, converted as the hardware does.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

}  // namespace emulation

#define threadIdx (emulation::thread().index)
#define blockIdx (emulation::thread().block)
#define blockDim (emulation::thread().block_shape)
#define gridDim (emulation::thread().grid_shape)

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __threadfence() {}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::show(mask, 0); }

template <class T> T __shfl_sync(unsigned mask, T t, int from, int width = 32) {
  const unsigned me = emulation::thread().lane;
  return emulation::show(mask, t)[me / width * width + from % width];
}
template <class T> T __shfl_xor_sync(unsigned mask, T t, int with) {
  return emulation::show(mask, t)[emulation::thread().lane ^ with];
}
template <class T> T __shfl_up_sync(unsigned mask, T t, unsigned by, int width = 32) {
  const unsigned me = emulation::thread().lane;
  const auto all = emulation::show(mask, t);
  return me % width >= by ? all[me - by] : t;
}
template <class T> T __shfl_down_sync(unsigned mask, T t, unsigned by, int width = 32) {
  const unsigned me = emulation::thread().lane;
  const auto all = emulation::show(mask, t);
  return me % width + by < static_cast<unsigned>(width) ? all[me + by] : t;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto all = emulation::show(mask, predicate != 0);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) ballot |= static_cast<unsigned>(all[i]) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

template <class T> T atomicAdd(T* p, T t) { const T before = *p; *p = before + t; return before; }

inline int __popc(unsigned t) { return __builtin_popcount(t); }

template <class To, class From> To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float t) { return bits_as<unsigned>(t); }
inline int __float_as_int(float t) { return bits_as<int>(t); }
inline float __int_as_float(int t) { return bits_as<float>(t); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float t) { return std::sqrt(t); }
template <class A, class B> constexpr auto min(A a, B b) -> std::common_type_t<A, B> { return b < a ? b : a; }
template <class A, class B> constexpr auto max(A a, B b) -> std::common_type_t<A, B> { return a < b ? b : a; }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T t) { *p = t; }

inline float __bfloat162float(emulation::bf16 t) { return bits_as<float>(static_cast<uint32_t>(t.bits) << 16); }
inline emulation::bf16 __float2bfloat16_rn(float t) {
  const uint32_t bits = bits_as<uint32_t>(t);
  if (t != t) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline emulation::bf16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline float __half2float(emulation::f16 t) { return static_cast<float>(bits_as<_Float16>(t.bits)); }
inline emulation::f16 __float2half_rn(float t) { return {bits_as<uint16_t>(static_cast<_Float16>(t))}; }
