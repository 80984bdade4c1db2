// The arguments of update_latents_: the fused backward and Adam step of one SAE, in place.
#pragma once
#include <cstdint>
#include <vector>

#include "encode.h"

namespace fastsae {

// One reconstruction in the loss. x and grad hold the accumulation type of the weights (f32, or f64 for f64).
struct UpdateTerm {
  Codes codes;
  LatentOrder order;   // of codes; a pair of an empty slot is not in it
  Matrix x;            // (N, D), the encoder's input
  Matrix grad;         // (N, D_out), dL/d recon
  bool has_bias;       // recon includes b_dec
};

// A parameter of `rows` rows with Adam's two moments. data is null for the encoder of a tied SAE.
struct Parameter {
  void *data, *m, *v;
  uint32_t stream;     // its m takes the random stream `stream`, its v the next one
};

struct UpdateArgs {
  Parameter W_enc, W_dec, b_enc, b_dec;
  int64_t latents, d_in, d_out;
  Dtype dtype;             // of the weights
  bool narrow_moments;     // moments are bf16, rounded at random
  std::vector<UpdateTerm> terms;
  double step_size;        // lr / (1 - β1ᵗ)
  double root2;            // sqrt(1 - β2ᵗ)
  double beta1, beta2, eps;
  bool unit_norm, pre_bias;
  uint32_t seed;
  int64_t step;
  Screen screen;           // words and scale null: no narrow copy is kept
  int threads;
  double* stats;           // [4] Σ dW_enc², Σ dW_dec², Σ db_enc², Σ db_dec²
};

}  // namespace fastsae
