// 64-byte vectors in GCC's generic notation: the same source becomes one zmm, two ymm or four xmm (or NEON) registers,
// depending on the flags that the file is compiled with. Each op's file is compiled once per instruction set, inside the
// namespace FASTSAE_ISA that the build sets; dispatch.cpp picks one namespace when the module is imported.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef FASTSAE_ISA
#error "FASTSAE_ISA names the instruction set that this file is compiled for; setup.py sets it"
#endif
#define FASTSAE_INLINE inline __attribute__((always_inline))

namespace fastsae::FASTSAE_ISA {

struct bf16 {
  uint16_t bits;
};

// The type in which sums over a stored type are accumulated.
template <class T> struct accumulate { using type = float; };
template <> struct accumulate<double> { using type = double; };
template <class T> using acc_t = typename accumulate<T>::type;

template <class A> struct vector_of;
template <> struct vector_of<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct vector_of<double> { typedef double type __attribute__((vector_size(64))); };
template <class A> using vec = typename vector_of<A>::type;
typedef int32_t i32x16 __attribute__((vector_size(64)));

FASTSAE_INLINE float widen(float v) { return v; }
FASTSAE_INLINE double widen(double v) { return v; }
FASTSAE_INLINE float widen(bf16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

template <class T> FASTSAE_INLINE T narrow(acc_t<T> v) { return v; }
template <> FASTSAE_INLINE bf16 narrow<bf16>(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  if (v != v) return {uint16_t(u >> 16 | 0x40)};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

FASTSAE_INLINE vec<float> load(const float* p) {
  vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTSAE_INLINE vec<float> splat(float a) { return a - vec<float>{}; }

// Fetch a row that is about to be read; gathers of whole rows run at twice the speed with it (Zen 5, 3 KB rows).
template <class T> FASTSAE_INLINE void prefetch_row(const T* p, int64_t length) {
  const char* c = reinterpret_cast<const char*>(p);
  for (int64_t o = 0; o < length * int64_t(sizeof(T)); o += 64) __builtin_prefetch(c + o);
}

// One register of the instruction set. GCC 12 keeps a `vec` wider than a register on the stack and copies it there in
// pieces: a dot in AVX2 ran several times slower. So loops that must be fast everywhere use `reg` and unroll by hand.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
template <class A> struct register_of;
template <> struct register_of<float> { typedef float type __attribute__((vector_size(kRegisterBytes))); };
template <> struct register_of<double> { typedef double type __attribute__((vector_size(kRegisterBytes))); };
template <class A> using reg = typename register_of<A>::type;
template <class A> constexpr int reg_lanes = kRegisterBytes / sizeof(A);

template <class T> FASTSAE_INLINE reg<acc_t<T>> load_reg(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    // By name: GCC 12 widens in two halves and puts them together again, at twice the time of a decode.
#if defined(__AVX512F__)
    return (reg<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (reg<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    typedef uint16_t half __attribute__((vector_size(kRegisterBytes / 2)));
    typedef uint32_t full __attribute__((vector_size(kRegisterBytes)));
    half h;
    std::memcpy(&h, p, sizeof h);
    return (reg<float>)(__builtin_convertvector(h, full) << 16);
#endif
  } else {
    reg<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class T> FASTSAE_INLINE void store_reg(T* p, reg<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    typedef uint16_t half __attribute__((vector_size(kRegisterBytes / 2)));
    typedef uint32_t full __attribute__((vector_size(kRegisterBytes)));
    const full u = (full)v, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, quiet = u >> 16 | 0x40;
    const half h = __builtin_convertvector(v != v ? quiet : rounded, half);
    std::memcpy(p, &h, sizeof h);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// a * b + c with one rounding, where the instruction set has it. For scalar tails: left to itself the compiler makes two
// versions of such a loop, one of them vectorized, and takes one or the other by where the arrays happen to lie; only
// one of them fuses, and the last bit of a sum would depend on addresses.
template <class A> FASTSAE_INLINE A multiply_add(A a, A b, A c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (std::is_same_v<A, float>) return __builtin_fmaf(a, b, c);
  else return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// v with its lanes moved down by WIDTH, around the end. Indices are constants by construction: GCC 12 does not find out by itself that
// those of a loop are, and built them in every call.
template <int WIDTH, class A, size_t... I> FASTSAE_INLINE reg<A> moved(reg<A> v, std::index_sequence<I...>) {
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Index;
  typedef Index index __attribute__((vector_size(kRegisterBytes)));
  return __builtin_shuffle(v, index{Index((I + WIDTH) % sizeof...(I))...});
}

// Halves added to halves until one lane is left, in registers: through memory it cost as much as 768 products do.
template <class A, int WIDTH = reg_lanes<A> / 2> FASTSAE_INLINE A sum_lanes(reg<A> v) {
  v += moved<WIDTH, A>(v, std::make_index_sequence<reg_lanes<A>>());
  if constexpr (WIDTH > 1) return sum_lanes<A, WIDTH / 2>(v);
  else return v[0];
}

constexpr int kPartialSums = kRegisterBytes == 64 ? 4 : 8;

// The engine's score: <x, w> in fixed order, kPartialSums registers of partial sums and a scalar tail; COUNT rows w
// at once, each with the bits that it has alone.
// FETCH: meanwhile the row `next` comes into the cache, line by line: where rows are gathered that is faster than asking for
// all of it at once (D=768, fp32, 131072 of 24576 rows, one Zen 5 core: 14.7 ms for 18.5).
template <int COUNT, bool FETCH, class X, class W, class N>
FASTSAE_INLINE void dots(const X* x, const W* const (&w)[COUNT], int64_t length, const N* next, acc_t<W>* out) {
  using A = acc_t<W>;
  constexpr int L = reg_lanes<A>, U = kPartialSums, kLine = 64 / sizeof(N);
  reg<A> sum[COUNT][U] = {};
  int64_t d = 0;
  for (; d + U * L <= length; d += U * L) {
    if constexpr (FETCH) {
#pragma GCC unroll 8
      for (int i = 0; i < U * L; i += kLine) __builtin_prefetch(next + d + i);
    }
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const reg<A> v = load_reg(x + d + u * L);
#pragma GCC unroll 4
      for (int c = 0; c < COUNT; ++c) sum[c][u] += v * load_reg(w[c] + d + u * L);
    }
  }
  if constexpr (FETCH)
    for (int64_t i = d; i < length; i += kLine) __builtin_prefetch(next + i);
  for (; d + L <= length; d += L)
#pragma GCC unroll 4
    for (int c = 0; c < COUNT; ++c) sum[c][0] += load_reg(x + d) * load_reg(w[c] + d);
#pragma GCC unroll 4
  for (int c = 0; c < COUNT; ++c) {
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u) sum[c][0] += sum[c][u];
    A s = sum_lanes<A>(sum[c][0]);
    for (int64_t i = d; i < length; ++i) s = multiply_add(A(widen(x[i])), A(widen(w[c][i])), s);
    out[c] = s;
  }
}

template <bool FETCH = false, class X, class W>
FASTSAE_INLINE acc_t<W> dot(const X* x, const W* w, int64_t length, const W* next = nullptr) {
  const W* const rows[1] = {w};
  acc_t<W> out;
  dots<1, FETCH>(x, rows, length, next, &out);
  return out;
}

// y += a * x
template <class A, class X> FASTSAE_INLINE void add_scaled(A* y, A a, const X* x, int64_t length) {
  constexpr int L = reg_lanes<A>;
  int64_t d = 0;
  for (; d + L <= length; d += L) store_reg(y + d, load_reg(y + d) + a * load_reg(x + d));
  for (; d < length; ++d) y[d] = multiply_add(a, A(widen(x[d])), y[d]);
}

}  // namespace fastsae::FASTSAE_ISA
