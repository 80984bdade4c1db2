// Launching a kernel on the caller's stream, in one form for CUDA and for the emulation; every refusal is an exception.
#pragma once
#include <algorithm>
#include <type_traits>
#include <string>

#include "device.h"
#include "fit.h"
#include "ops.h"

namespace fastsae {

struct Shape {
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic_shared()
};

#ifndef FASTSAE_EMULATED

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // clears the error, so that no later call reports it again
  throw Error(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// The shared memory that a block can have, static and dynamic.
inline int most_shared(const Where& where) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, where.device), "no shared memory size");
  return bytes;
}

// A block has 48 KiB, static and dynamic memory together, unless its kernel is allowed more. That stays with the kernel, for
// every thread of the process, so it is always the most that there can be: no launch takes from another what it needs.
template <class... P> void allow_shared(const Where& where, const char* name, void (*kernel)(P...), const Shape& shape) {
  if (shape.shared <= 32 << 10) return;  // no kernel here has more than 16 KiB besides
  const void* const function = reinterpret_cast<const void*>(kernel);
  const std::string fails = std::string(name) + " does not fit in shared memory";
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, function), fails);
  const int most = most_shared(where) - static_cast<int>(attributes.sharedSizeBytes);
  if (shape.shared > static_cast<size_t>(most))
    throw Error(fails + ": it takes " + std::to_string(shape.shared) + " bytes, and there are " + std::to_string(most));
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most), fails);
}

// Throws where the kernel could not be launched, without launching it: before anything that is changed in place.
template <class... P> void foresee(const Where& where, const char* name, void (*kernel)(P...), const Shape& shape) {
  allow_shared(where, name, kernel, shape);
  int blocks = 0;
  const int threads = shape.block.x * shape.block.y * shape.block.z;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), threads, shape.shared),
        std::string(name) + " cannot be launched");
  if (blocks < 1)
    throw Error(std::string(name) + " cannot be launched: no multiprocessor takes " + std::to_string(threads) +
                " threads with " + std::to_string(shape.shared) + " bytes of shared memory");
}

template <class... P, class... A>
void launch(const Where& where, const char* name, void (*kernel)(P...), const Shape& shape, A&&... arguments) {
  if (!shape.grid.x || !shape.grid.y) return;
  allow_shared(where, name, kernel, shape);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(where.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...), std::string(name) + " was not launched");
}

#else

template <class... P> void foresee(const Where&, const char* name, void (*)(P...), const Shape& shape) {
  const std::string reason = emulation::refusal(name, shape.shared);
  if (!reason.empty()) throw Error(std::string(name) + " cannot be launched: " + reason);
}

template <class... P, class... A>
void launch(const Where& where, const char* name, void (*kernel)(P...), const Shape& shape, A&&... arguments) {
  if (!shape.grid.x || !shape.grid.y) return;
  foresee(where, name, kernel, shape);
  emulation::run(shape.grid, shape.block, shape.shared, [&] { kernel(static_cast<P>(arguments)...); });
}

inline int most_shared(const Where&) { return emulation::most_shared(); }

#endif

// Calls f with a value of the C++ type that a dtype stands for.
template <class F> void by_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
    default: throw std::invalid_argument("there is no kernel for this dtype, expected float32, bfloat16 or float16");
  }
}

// Whether every row of a matrix can be read 16 bytes at a time.
inline bool whole_packs(const Array& a) {
  return reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && a.cols * size_of(a.dtype) % 16 == 0;
}

// Calls f with std::true_type where that is so of all these matrices.
template <class F, class... Arrays> void by_alignment(F f, const Arrays&... arrays) {
  if ((whole_packs(arrays) && ...)) f(std::true_type{});
  else f(std::false_type{});
}

}  // namespace fastsae
