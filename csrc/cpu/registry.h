// Declares one instruction set's ops, and turns a Dtype into a C++ type.
#pragma once
#include <vector>

#include "encode.h"
#include "ops.h"
#include "simd.h"

namespace fastsae::FASTSAE_ISA {

void decode(const Codes&, const Matrix& W, const Matrix& out, int threads);
void active_dot(const Matrix& x, const Codes&, const Matrix& W, void* out, int threads);
void active_outer(const Codes&, const LatentOrder&, const Matrix& x, const Matrix& out, int threads);
void prepare_screen(const Matrix& W, const int32_t* rows, const Screen& out, int threads);
TopkCounts encode_topk(const EncodeArgs&, const FixedCodes& out);
AboveCounts encode_above(const EncodeArgs&, const float* per_latent, const float* per_token, const RaggedCodes& out);
int64_t encode_batch_topk(const EncodeArgs&, const RaggedCodes& out);
void update_latents(const UpdateArgs&);
Digest digest(const Matrix&, int threads);

// The narrow copy of one latent, and of one block of 16 narrowed rows (screen.cpp); update_latents_ keeps the copy with them.
// scratch: d numbers.
void narrow_latent(const Screen&, int64_t position, const float* row, float* scratch, uint32_t* words);
void pack_block(const uint32_t* rows, int64_t words, uint32_t* block);

template <class F> void by_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f64: return f(double{});
  }
}

}  // namespace fastsae::FASTSAE_ISA
