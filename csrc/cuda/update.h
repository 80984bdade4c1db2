// Host functions of the CUDA kernels of the latent-major half, as declarations.h has the others. What each computes is said
// in fastsae/backends/gpu/stages.py, whose stages fastsae/backends/cuda/stages.py makes of them.
#pragma once
#include <vector>

#include "ops.h"

namespace fastsae {

// by_latent.cu. values (slots,) float, or none.
void list_slots(const Where&, const Array& acts, const Array& indices, const Maybe& offsets, int64_t latents,
                const Array& keys, const Array& rows, const Maybe& values, int64_t first_row, bool zeros);
int64_t sort_workspace(const Where&, int64_t slots, int64_t latents);  // bytes
// numbers: 0, 1, ... of the slots; sorted_keys and order (slots,) int32 and the workspace are not wanted afterwards.
void sort_slots(const Where&, const Array& keys, const Array& rows, const Maybe& values, int64_t latents,
                const Array& numbers, const Array& sorted_keys, const Array& order, const Array& workspace,
                const Array& starts, const Array& sorted_rows, const Array& sorted_slots, const Maybe& sorted_values);

// pieces.cu
int64_t piece_workspace(const Where&, int64_t latents);  // bytes
void piece_starts(const Where&, const Array& starts, int64_t length, const Array& workspace, const Array& first);

// active_outer.cu. first_piece and sums (capacity, D) float, or neither.
void active_outer(const Where&, const Array& starts, const Array& tokens, const Array& slots, const Array& acts,
                  const Array& x, const Array& out, const Maybe& first_piece, int64_t piece_length, const Maybe& sums);

// step_numbers.cu. rule: 0 adam, 1 lion, 2 signsgd, 3 none, here and below.
void step_numbers(const Where&, const Array& lr, const Array& step, const Maybe& skip, const Maybe& grad_scale, int64_t rule,
                  double beta1, double beta2, double weight_decay, int64_t seed, const Array& numbers, const Array& keys);

// update_latents.cu. params: W_enc or none, W_dec, b_enc; moments: m and v of each, as far as the rule keeps them; scales:
// m's and v's of W_enc and W_dec, where those have 8 bits; entries: starts, rows, acts, dacts, x, more_x, grad, more_grad;
// parts, all float: decoder_pull (M, L), db_enc (M,), W_enc, W_dec, pre (M,). sources: x, more_x, grad, more_grad, which have
// one dtype, that of W_dec or float.
// first_latent: the number of the first row in the whole parameter, mod 2³². workspaces, all float: piece sums (capacity, D_out + D_in) and (capacity,), or none; dacts (slots,) and scratch (programs,
// D_out + D_in), or none where rows_are_staged.
bool rows_are_staged(const Where&, const Maybe& W_enc, const Array& W_dec, const std::vector<Maybe>& moments,
                     const std::vector<Maybe>& sources, const std::vector<Maybe>& parts);
void update_rows(const Where&, const std::vector<Maybe>& params, const std::vector<Maybe>& moments,
                 const std::vector<Maybe>& scales, const std::vector<Maybe>& entries, int64_t split,
                 const std::vector<Maybe>& parts, const Maybe& first_piece, int64_t piece_length,
                 const std::vector<Maybe>& workspaces, const Maybe& pre_bias, const Array& stats, int64_t rule,
                 const Array& numbers, const Array& keys, double eps, double beta1, double rest1, double beta2, double rest2,
                 bool unit_norm, double clip_rows, int64_t first_latent, int64_t programs);

// update_bias.cu. m, v as above; sums (Σ bias_parts(rows of each of grads and of pre_bias), D) float.
int64_t bias_programs(int64_t D);
int64_t bias_parts(int64_t rows);
void update_bias(const Where&, const Array& b, const Maybe& m, const Maybe& v, const std::vector<Array>& grads,
                 const Maybe& pre_bias, const Array& sums, const Array& stats, int64_t rule, const Array& numbers,
                 const Array& keys, double eps, double beta1, double rest1, double beta2, double rest2);

}  // namespace fastsae
