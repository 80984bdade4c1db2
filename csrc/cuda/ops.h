// The arguments of every op, as plain memory: no torch and no CUDA header, so one build serves every torch version and
// the binding is compiled by any C++ compiler. Nothing here allocates: results and workspaces come from the caller.
#pragma once
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastsae {

enum class Dtype : int32_t { f32, bf16, f16, f64, i32, i64, b8, f8 };

inline int64_t size_of(Dtype t) {
  switch (t) {
    case Dtype::f64: case Dtype::i64: return 8;
    case Dtype::f32: case Dtype::i32: return 4;
    case Dtype::bf16: case Dtype::f16: return 2;
    case Dtype::b8: case Dtype::f8: return 1;
  }
  throw std::invalid_argument("there is no such dtype");
}

template <class T> struct DtypeOf;  // of the type that a kernel reads it as; bf16, f16 and fp8: device.h
template <> struct DtypeOf<float> { static constexpr Dtype value = Dtype::f32; };
template <> struct DtypeOf<double> { static constexpr Dtype value = Dtype::f64; };
template <> struct DtypeOf<int32_t> { static constexpr Dtype value = Dtype::i32; };
template <> struct DtypeOf<uint32_t> { static constexpr Dtype value = Dtype::i32; };
template <> struct DtypeOf<int64_t> { static constexpr Dtype value = Dtype::i64; };
template <> struct DtypeOf<unsigned long long> { static constexpr Dtype value = Dtype::i64; };
template <> struct DtypeOf<uint8_t> { static constexpr Dtype value = Dtype::b8; };

inline const char* name_of(Dtype t) {
  static const char* const names[] = {"float32", "bfloat16", "float16", "float64", "int32", "int64", "bool", "float8_e4m3fn"};
  return names[static_cast<int>(t)];
}

// A contiguous tensor of at most two dimensions; a vector has cols = 1, a scalar both.
struct Array {
  void* data;
  int64_t rows, cols;
  Dtype dtype;

  int64_t size() const { return rows * cols; }
  // Throws where the memory holds another dtype.
  template <class T> T* as() const {
    constexpr Dtype expected = DtypeOf<std::remove_const_t<T>>::value;
    if (dtype != expected)
      throw std::invalid_argument(std::string("a tensor is of ") + name_of(dtype) + ", expected " + name_of(expected));
    return static_cast<T*>(data);
  }
};
using Maybe = std::optional<Array>;

template <class T> T* pointer(const Maybe& a) { return a ? a->as<T>() : nullptr; }

// The device whose tensors an op takes, and the stream it is put on. device -1 is the CPU, where kernels are emulated.
struct Where {
  int device;
  void* stream;
};

// Something that CUDA refused. The binding adds the op, the device and the shapes.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace fastsae
