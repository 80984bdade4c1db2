// Declares one instruction set's ops, and turns a Dtype into a C++ type.
#pragma once
#include <vector>

#include "ops.h"
#include "simd.h"

namespace fastsae::FASTSAE_ISA {

void decode(const Codes&, const Matrix& W, const Matrix& out, int threads);
void active_dot(const Matrix& x, const Codes&, const Matrix& W, void* out, int threads);
void active_outer(const Codes&, const LatentOrder&, const Matrix& x, const Matrix& out, int threads);

template <class F> void by_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f64: return f(double{});
  }
}

}  // namespace fastsae::FASTSAE_ISA
