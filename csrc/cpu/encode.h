// What the encoders share: the narrow copy of the encoder ("screen"), the bounds that make it safe, and their arguments.
//
// A pre-act s_i = <x, W_i> + b_i is first computed in a narrow format, ŝ_i, with a bound on the error that is measured, not
// guessed:  |ŝ_i - s_i| <= ‖x - x̂‖·‖W_i‖ + ‖x̂‖·‖W_i - Ŵ_i‖ + accumulation,  hats being the narrowed operands. So
// u_i = ŝ_i + bound is at least s_i, and a latent whose u_i stays below the K-th exact score needs no exact score of its own.
//
// Narrow operands may stand in another basis, since <x, w> = <R(x∘b), R(w/b)> for any factors b and rotation R, and every
// norm above is then taken there. Factors that give both sides the same second moments, and a rotation that spreads what is
// left of large dimensions over many, let 8 bits of trained weights lose several times less (narrow.h).
//
// Latents are packed in blocks of 16 lanes. Lane l of block p holds latent p + l·blocks: neighbours in the dictionary lie in
// different blocks, so every 16th block is a sample of the whole dictionary even when it is sorted.
#pragma once
#include <cstdint>

#include "ops.h"

namespace fastsae {

// f32 keeps no copy: its panels are packed from W on the fly. i8 is row-scaled 8 bit, stored with an offset of 128.
enum class Format : int32_t { f32, bf16, i8, amx, amx_emulated };

constexpr int64_t kLanes = 16;
constexpr int64_t kBlocksPerTile = 2;

struct Screen {
  uint32_t* words;    // [blocks][words_per_row][16], one 32-bit word = 4 int8, 2 bf16 or 1 float of one latent
  float* scale;       // [blocks·16] in packed order: value of one step of i8, else 1
  float* norm;        // ‖W_i‖, rounded up
  float* residual;    // ‖W_i - Ŵ_i‖, rounded up
  const float* factors;   // [2][d] b, then 1/b: what x and W_i are multiplied by before they are narrowed; null: nothing
  Format format;
  int64_t latents, d, blocks, words_per_row;

  bool is_absent() const { return !scale; }   // there is no narrow copy: every latent is scored in fp32
  int64_t latent_at(int64_t position) const { return position / kLanes + position % kLanes * blocks; }
  int64_t position_of(int64_t latent) const { return latent % blocks * kLanes + latent / blocks; }
};

struct EncodeArgs {
  Matrix x, W;             // f32 or bf16, the same
  const float* bias;       // [M]
  const float* scale;      // [M] or null: pre-acts are multiplied by it
  const int32_t* rows;     // the latents to consider, ascending, or null: all
  int64_t row_count;       // M where rows is null
  int64_t index_offset, k;
  bool rescore;            // false: select by the screened score alone ("screened" precision)
  bool redo;               // false: only count the tokens without a certificate; their codes are not written
  Screen screen;           // over the considered latents, in their order
  int threads;

  int64_t latent(int64_t i) const { return rows ? rows[i] : i; }
};

struct FixedCodes {        // encode_topk's result
  float* acts;
  int32_t* indices;
};

struct RaggedCodes {       // encode_above's and encode_batch_topk's result
  float* acts;
  int32_t* indices;
  int64_t* offsets;
  int64_t capacity;
};

struct TopkCounts {
  int64_t redone;   // tokens without a certificate at first
  int64_t rivals;   // latents scored in fp32 beyond those with the K largest lower bounds: how loose the format is on this input
};

struct AboveCounts {
  int64_t above;
  int64_t redone;       // tokens scored in full
  int64_t candidates;   // latents scored in fp32 of all others: how loose the format is on this input
};

int64_t words_per_row(Format format, int64_t d);
bool format_supported(Format format, const char* isa);
Format tight_format(const char* isa);
Format fastest_format(const char* isa, int64_t d);
inline int64_t blocks_of(int64_t latents) {
  const int64_t blocks = (latents + kLanes - 1) / kLanes;
  return (blocks + kBlocksPerTile - 1) / kBlocksPerTile * kBlocksPerTile;
}

}  // namespace fastsae
