// A sparse code over n tokens, as kernels read it. Fixed K: offsets is null, k slots a token, and an act of 0 is an empty
// slot. Ragged: token t owns slots offsets[t] .. offsets[t + 1]. On a GPU nothing checks indices before a kernel reads them, so
// a slot whose latent is outside the dictionary counts as empty, and offsets end where the slots do: nothing is read there.
#pragma once
#include "device.h"
#include "ops.h"

namespace fastsae {

template <class T> struct Codes {
  const T* acts;
  const int32_t* indices;
  const int64_t* offsets;
  int64_t n, k, slots, latents;

  __device__ int64_t offset(int64_t token) const { return max(int64_t{0}, min(offsets[token], slots)); }
  __device__ int64_t begin(int64_t token) const { return offsets ? offset(token) : token * k; }
  __device__ int64_t end(int64_t token) const { return offsets ? offset(token + 1) : (token + 1) * k; }
  __device__ bool inside(int64_t slot) const { return static_cast<uint32_t>(indices[slot]) < latents; }
};

template <class T> Codes<T> codes(const Array& acts, const Array& indices, const Maybe& offsets, int64_t latents) {
  return {acts.as<T>(), indices.as<int32_t>(), pointer<int64_t>(offsets), offsets ? offsets->rows - 1 : acts.rows,
          offsets ? 0 : acts.cols, acts.size(), latents};
}

}  // namespace fastsae
