// The arguments of every op, as plain memory: no torch headers, so one build serves every torch version.
// An instruction set's implementation is one `Ops` table; dispatch.cpp holds the tables and picks one.
#pragma once
#include <cstdint>

namespace fastsae {

enum class Dtype : int32_t { f32, bf16, f64 };

// A row-major matrix; `stride` counts elements between rows, and a row's elements are contiguous.
struct Matrix {
  void* data;
  int64_t rows, cols, stride;
  Dtype dtype;
};

// A sparse code over n tokens. Fixed K: offsets is null, k slots a token, act 0 = empty slot.
// Ragged: token t owns slots offsets[t] .. offsets[t + 1].
struct Codes {
  void* acts;
  const int32_t* indices;
  const int64_t* offsets;
  int64_t n, k, d_sae;
  Dtype dtype;
  int64_t slots = 0;  // how many acts and indices there are; 0 where a kernel makes a code of its own

  int64_t begin(int64_t token) const { return offsets ? offsets[token] : token * k; }
  int64_t end(int64_t token) const { return offsets ? offsets[token + 1] : (token + 1) * k; }
};

// A code regrouped latent by latent: latent i owns entries offsets[i] .. offsets[i + 1]; entry e belongs to tokens[e] and
// stands at slots[e] of the flattened acts. Tokens ascend within a latent.
struct LatentOrder {
  int64_t* offsets;
  int32_t* tokens;
  int64_t* slots;
};

// Two numbers that tell one matrix from another (digest.cpp).
struct Digest {
  uint64_t sum, products;
};

struct Screen;        // encode.h
struct EncodeArgs;
struct FixedCodes;
struct RaggedCodes;
struct TopkCounts;
struct AboveCounts;
struct UpdateArgs;    // update.h

struct Ops {
  const char* name;
  void (*decode)(const Codes&, const Matrix& W, const Matrix& out, int threads);
  void (*active_dot)(const Matrix& x, const Codes&, const Matrix& W, void* out, int threads);
  void (*active_outer)(const Codes&, const LatentOrder&, const Matrix& x, const Matrix& out, int threads);
  void (*prepare_screen)(const Matrix& W, const int32_t* rows, const Screen& out, int threads);
  TopkCounts (*encode_topk)(const EncodeArgs&, const FixedCodes& out);
  AboveCounts (*encode_above)(const EncodeArgs&, const float* per_latent, const float* per_token, const RaggedCodes& out);
  int64_t (*encode_batch_topk)(const EncodeArgs&, const RaggedCodes& out);
  void (*update_latents)(const UpdateArgs&);
  Digest (*digest)(const Matrix&, int threads);
};

// Threads for a call that multiplies this many numbers: under some 20 us of work, starting and joining them costs more than
// they save, above all where other processes hold the cores. No result depends on it.
inline int team(int threads, int64_t numbers) { return numbers < (1 << 17) ? 1 : threads; }

// Independent of the instruction set.
void by_latent(const Codes&, const LatentOrder&, int threads);

extern const Ops* const all_ops[];   // fastest first, ends with nullptr
const Ops& ops();                    // the table in use
void use_isa(const char* name);      // throws std::invalid_argument, naming those this processor has
bool isa_supported(const char* name);

}  // namespace fastsae
