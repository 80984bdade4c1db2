// update_rows: gradient and optimizer step of every latent's rows and of b_enc, in place, by update_rows.cu or update_wide.cu.
//
// Nothing is written before it is known that every kernel of the whole update can be launched, those that step b_dec
// afterwards too: a step that fails leaves no parameter and no moment changed.
#include "latent_rows.h"
#include "update.h"

namespace fastsae {
namespace {

constexpr int64_t STATIC_SHARED = 1 << 10;  // more than a block of update_rows has besides the staged rows

template <class S> LatentEntries<S> entries_of(const std::vector<Maybe>& entries, int64_t split) {
  return {pointer<int64_t>(entries[0]), pointer<int32_t>(entries[1]), pointer<float>(entries[2]),
          pointer<float>(entries[3]),   pointer<S>(entries[4]),       pointer<S>(entries[5]),
          pointer<S>(entries[6]),       pointer<S>(entries[7]),       split};
}

Parts parts_of(const std::vector<Maybe>& parts) {
  const auto at = [&](int i) { return pointer<float>(parts[i]); };
  return {at(0), at(1), at(2), at(3), at(4), parts[0] ? parts[0]->cols : 1};
}

void fit_moments(const std::vector<Maybe>& params, const std::vector<Maybe>& moments, const std::vector<Maybe>& scales,
                 Rule rule) {
  for (int i = 0; i < 3; ++i) {
    const int kept = params[i] ? moments_of(rule) : 0;
    for (int j = 0; j < 2; ++j) {
      const Maybe& moment = moments[2 * i + j];
      if (moment.has_value() != (j < kept)) throw std::invalid_argument("moments that the rule does not keep, or too few");
      if (!moment) continue;
      fit("a moment", moment, params[i]->rows, params[i]->cols);
      const bool scaled = moment->dtype == Dtype::f8;
      if (scaled && rule != Rule::adam) throw std::invalid_argument("only Adam's moments can have 8 bits");
      if (scaled != (i < 2 && scales[2 * i + j].has_value())) throw std::invalid_argument("8 bits without scales, or these alone");
      if (scaled) fit("scales", scales[2 * i + j], moment->rows, ceil_div(moment->cols, SCALED));
    }
  }
}

void fit_update(const std::vector<Maybe>& params, const std::vector<Maybe>& entries, int64_t split,
                const std::vector<Maybe>& parts, const Maybe& first_piece, int64_t piece_length,
                const std::vector<Maybe>& workspaces, const Maybe& pre_bias, int64_t programs) {
  const Array& W_dec = *params[1];
  const int64_t M = counted("latents", W_dec.rows), D_out = W_dec.cols, D_in = params[0] ? params[0]->cols : D_out;
  fit("W_enc", params[0], M, D_in), fit("b_enc", params[2], M);
  fit("starts", entries[0], M + 1), fit("rows", entries[1], entries[1]->rows), fit("acts", entries[2], entries[1]->rows);
  fit("dacts", entries[3], entries[1]->rows);
  const int64_t first = entries[4]->rows, more = entries[5] ? entries[5]->rows : 0;
  if (entries[5].has_value() != entries[7].has_value()) throw std::invalid_argument("more_x without more_grad, or this alone");
  // Without a term x and grad are stand-ins that no row is read of.
  if (split) in_range("split", split, first, first);
  fit("x", entries[4], first, D_in), fit("grad", entries[6], first, D_out);
  fit("more_x", entries[5], more, D_in), fit("more_grad", entries[7], more, D_out);
  if (parts[0]) {
    in_range("segments", parts[0]->cols, 1, D_out), fit("decoder_pull", parts[0], M, parts[0]->cols);
    if (D_out % parts[0]->cols) throw std::invalid_argument("the segments of decoder_pull do not divide a row");
  }
  fit("db_enc", parts[1], M), fit("dW_enc", parts[2], M, D_in), fit("dW_dec", parts[3], M, D_out), fit("dpre", parts[4], M);
  fit_pieces(first_piece, M, piece_length, workspaces[0], D_out + D_in);
  if (first_piece) fit("the biases of pieces", workspaces[1].value(), workspaces[0]->rows);
  if (workspaces[2])
    fit("dacts", workspaces[2], entries[1]->rows), fit("scratch", workspaces[3].value(), programs, D_out + D_in);
  in_range("programs", programs, 1, std::numeric_limits<int32_t>::max()), fit("pre_bias", pre_bias, programs, D_in);
}

}  // namespace

bool rows_are_staged(const Where& where, const Maybe& W_enc, const Array& W_dec, const std::vector<Maybe>& moments,
                     const std::vector<Maybe>& sources, const std::vector<Maybe>& parts) {
  const int64_t D_in = W_enc ? W_enc->cols : W_dec.cols;
  const StagedShape shape = staged_shape(D_in, W_dec.cols);
  if (shape.threads > most_threads(shape.steps, moments[2] && moments[2]->dtype == Dtype::f8)) return false;
  // With bf16 moments, Lion's code beside Adam's, or what adds parts of rows, takes more registers than there are.
  const bool adds_rows = parts[0] || parts[2] || parts[3];
  if (moments[2] && moments[2]->dtype == Dtype::bf16 && (!moments[3] || adds_rows)) return false;
  const auto whole = [](const Maybe& a) { return !a || whole_packs(*a); };
  for (const Maybe& source : sources)
    if (!whole(source) || (source && source->dtype != W_dec.dtype)) return false;
  int64_t kept = 0;
  for (int i = 0; i < 4; ++i) {  // those of b_enc have no rows
    if (!whole(moments[i])) return false;
    kept += i >= 2 && moments[i];
  }
  const int64_t moment = moments[2] ? size_of(moments[2]->dtype) : 0;
  const int64_t bytes = staged_bytes(size_of(W_dec.dtype), moment, kept, !W_enc, D_in, W_dec.cols);
  return whole(W_enc) && whole(W_dec) && whole(parts[2]) && whole(parts[3]) && bytes + STATIC_SHARED <= most_shared(where);
}

void update_rows(const Where& where, const std::vector<Maybe>& params, const std::vector<Maybe>& moments,
                 const std::vector<Maybe>& scales, const std::vector<Maybe>& entries, int64_t split,
                 const std::vector<Maybe>& parts, const Maybe& first_piece, int64_t piece_length,
                 const std::vector<Maybe>& workspaces, const Maybe& pre_bias, const Array& stats, int64_t rule,
                 const Array& numbers, const Array& keys, double eps, double beta1, double rest1, double beta2, double rest2,
                 bool unit_norm, double clip_rows, int64_t first_latent, int64_t programs) {
  in_range("tensors", params.size(), 3, 3), in_range("moments", moments.size(), 6, 6), in_range("scales", scales.size(), 4, 4);
  in_range("entries", entries.size(), 8, 8), in_range("workspaces", workspaces.size(), 4, 4);
  in_range("parts", parts.size(), 5, 5);
  for (const Maybe* m : {&params[1], &params[2], &entries[0], &entries[1], &entries[2], &entries[4], &entries[6]})
    if (!*m) throw std::invalid_argument("a tensor that is always needed is missing");
  fit_update(params, entries, split, parts, first_piece, piece_length, workspaces, pre_bias, programs);
  fit("stats", stats, stats.rows, 4), in_range("rows of stats", stats.rows, programs, std::numeric_limits<int32_t>::max());
  fit("keys", keys, 8);
  const uint32_t* random = keys.as<uint32_t>();
  const Maybe &W_enc = params[0], &dacts = workspaces[2];
  const Array &W_dec = *params[1], &b_enc = *params[2], &grad = *entries[6];
  const Step step = step_of(rule, numbers, eps, beta1, rest1, beta2, rest2);
  fit_moments(params, moments, scales, step.rule);
  foresee_bias(where, W_dec.dtype, moments[2]);

  const Pieces pieces{pointer<int32_t>(first_piece), W_dec.rows, piece_length, workspaces[0] ? workspaces[0]->rows : 0};
  const PieceSums sums{pointer<float>(workspaces[0]), pointer<float>(workspaces[1])};
  by_dtype(W_dec.dtype, [&](auto t) {
    by_moment(moments[2], [&](auto moment) {
      using T = decltype(t);
      using Moment = decltype(moment);
      const int of_dec = W_enc ? 2 : 0;  // its first stream of random bits
      const auto first = static_cast<uint32_t>(first_latent);
      const auto stepped = [&](const Maybe& p, int i, int stream) {
        return Stepped<T, Moment>{pointer<T>(p), pointer<Moment>(moments[i]), pointer<Moment>(moments[i + 1]),
                                  pointer<float>(scales[i]), pointer<float>(scales[i + 1]),
                                  Keys{random + stream, p ? first * static_cast<uint32_t>(p->cols) : 0}};
      };
      using OfBias = BiasMoment<Moment>;
      const Stepped<T, OfBias> bias{b_enc.as<T>(), pointer<OfBias>(moments[4]), pointer<OfBias>(moments[5]), nullptr, nullptr,
                                    Keys{random + of_dec + 2, first}};
      const Update<T, Moment> u{stepped(W_enc, 0, 0), stepped(W_dec, 2, of_dec), bias, parts_of(parts), W_dec.rows,
                                W_enc ? W_enc->cols : W_dec.cols, W_dec.cols, step, pointer<float>(pre_bias),
                                stats.as<double>(), static_cast<float>(clip_rows), unit_norm};
      if (!dacts) {
        update_rows(where, entries_of<T>(entries, split), pieces, sums, u, programs);
        return;
      }
      const auto wide = [&](auto source) {
        update_wide(where, entries_of<decltype(source)>(entries, split), pieces, sums, u, programs, dacts->as<float>(),
                    pointer<float>(workspaces[3]));
      };
      if (grad.dtype == W_dec.dtype) wide(T{});
      else wide(float{});
    });
  });
}

}  // namespace fastsae
