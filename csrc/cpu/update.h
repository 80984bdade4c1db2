// The arguments of update_latents_: the fused backward and optimizer step of one SAE, in place.
#pragma once
#include <cstdint>
#include <vector>

#include "encode.h"

namespace fastsae {

// One reconstruction in the loss. x, grad and dacts hold the accumulation type of the weights (f32, or f64 for f64).
struct UpdateTerm {
  Codes codes;
  LatentOrder order;   // of codes; a pair of an empty slot is not in it
  Matrix x;            // (N, D), the encoder's input
  Matrix grad;         // (N, D_out), dL/d recon
  const void* dacts;   // dL/d pre-act at each slot, or null: <grad_n, W_dec_i> where the act is not 0
  bool has_bias;       // recon includes b_dec
};

// What adds to the gradients beside the terms, in the accumulation type; each may be null.
struct UpdateParts {
  const void* pull;    // (M, segments): dW_dec_i gains pull[i, l] · W_dec_i in segment l of its row
  int64_t segments;
  const void* db_enc;  // (M,), of b_enc alone
  const void *enc, *dec, *pre;   // (M, D), (M, D_out), (M,): of the dictionaries and of the pre-acts, summed over tokens
};

enum class OptimizerKind : int32_t { adam, adamw, lion, signsgd };
enum class Stored : int32_t { wide, bf16, fp8 };   // wide: the accumulation type

struct OptimizerArgs {
  OptimizerKind kind;
  double lr, step_size, root2;   // step_size: lr / (1 - β1ᵗ); root2: sqrt(1 - β2ᵗ)
  double beta1, beta2, eps;
  double kept;                   // 1 - lr · weight decay
};

// A parameter with its moments, which are null where the optimizer has none. Memory of no numbers is null too.
struct Parameter {
  void *data, *m, *v;
  float *m_scales, *v_scales;   // of 8-bit moments, one for every 128 numbers of a row
  Stored stored;
  uint32_t stream;              // its m takes the random stream `stream`, its v the next one
  uint32_t before;              // numbers of the whole parameter before these, of a part of its rows; mod 2³²
};

struct UpdateArgs {
  Parameter W_enc, W_dec, b_enc, b_dec;
  bool tied;               // the encoder is W_dec, and there is no W_enc
  int64_t latents, d_in, d_out;
  Dtype dtype;             // of the weights
  std::vector<UpdateTerm> terms;
  UpdateParts parts;
  OptimizerArgs optimizer;
  double clip_rows;        // the largest norm of a dictionary row's gradient; 0: any
  double grad_scale;       // multiplies every gradient
  bool unit_norm, pre_bias;
  bool norms_only;         // nothing is changed, and stats are of the gradients as they are before grad_scale
  uint32_t seed;
  int64_t step;
  Screen screen;           // words and scale null: no narrow copy is kept
  int threads;
  double* stats;           // [4] Σ dW_enc², Σ dW_dec², Σ db_enc², Σ db_dec²
};

}  // namespace fastsae
