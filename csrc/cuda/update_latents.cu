// update_rows: gradient and Adam step of every latent's rows and of b_enc, in place, by update_rows.cu or update_wide.cu.
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
          pointer<S>(entries[3]),       pointer<S>(entries[4]),       pointer<S>(entries[5]),
          pointer<S>(entries[6]),       split};
}

void fit_update(const std::vector<Maybe>& params, const std::vector<Maybe>& moments, const std::vector<Maybe>& entries,
                int64_t split, const Maybe& first_piece, int64_t piece_length, const std::vector<Maybe>& workspaces,
                const Maybe& pre_bias, int64_t programs) {
  const Array& W_dec = *params[1];
  const int64_t M = counted("latents", W_dec.rows), D_out = W_dec.cols, D_in = params[0] ? params[0]->cols : D_out;
  const auto step = [&](const char* what, int i, int64_t cols) {
    fit(what, params[i], M, cols), fit(what, moments[2 * i], M, cols), fit(what, moments[2 * i + 1], M, cols);
    if (params[i] && (!moments[2 * i] || !moments[2 * i + 1])) throw std::invalid_argument("a parameter has no moments");
  };
  step("W_enc or a moment of it", 0, D_in), step("W_dec or a moment of it", 1, D_out), step("b_enc or a moment of it", 2, 1);
  fit("starts", entries[0], M + 1), fit("rows", entries[1], entries[1]->rows), fit("acts", entries[2], entries[1]->rows);
  const int64_t first = entries[3]->rows, more = entries[4] ? entries[4]->rows : 0;
  if (entries[4].has_value() != entries[6].has_value()) throw std::invalid_argument("more_x without more_grad, or this alone");
  // Without a term x and grad are stand-ins that no row is read of.
  if (split) in_range("split", split, first, first);
  fit("x", entries[3], first, D_in), fit("grad", entries[5], first, D_out);
  fit("more_x", entries[4], more, D_in), fit("more_grad", entries[6], more, D_out);
  fit_pieces(first_piece, M, piece_length, workspaces[0], D_out + D_in);
  if (first_piece) fit("the biases of pieces", workspaces[1].value(), workspaces[0]->rows);
  if (workspaces[2]) fit("dacts", workspaces[2], entries[1]->rows), fit("scratch", workspaces[3].value(), programs, D_out);
  in_range("programs", programs, 1, std::numeric_limits<int32_t>::max()), fit("pre_bias", pre_bias, programs, D_in);
}

}  // namespace

bool rows_are_staged(const Where& where, const Maybe& W_enc, const Array& W_dec, const std::vector<Maybe>& moments,
                     const std::vector<Maybe>& sources) {
  const int64_t D_in = W_enc ? W_enc->cols : W_dec.cols;
  if (std::max(D_in, W_dec.cols) > STAGED_COLUMNS) return false;
  const auto whole = [](const Maybe& a) { return !a || whole_packs(*a); };
  for (const Maybe& source : sources)
    if (!whole(source) || (source && source->dtype != W_dec.dtype)) return false;
  for (int i = 0; i < 4; ++i)  // those of b_enc have no rows
    if (!whole(moments[i])) return false;
  const int64_t bytes = staged_bytes(size_of(W_dec.dtype), size_of(moments[2]->dtype), !W_enc, D_in, W_dec.cols);
  return whole(W_enc) && whole(W_dec) && bytes + STATIC_SHARED <= most_shared(where);
}

void update_rows(const Where& where, const std::vector<Maybe>& params, const std::vector<Maybe>& moments,
                 const std::vector<Maybe>& entries, int64_t split, const Maybe& first_piece, int64_t piece_length,
                 const std::vector<Maybe>& workspaces, const Maybe& pre_bias, const Array& stats, const Array& numbers,
                 const Array& keys, double eps, double beta1, double rest1, double beta2, double rest2, bool unit_norm,
                 bool stochastic, int64_t programs) {
  in_range("tensors", params.size(), 3, 3), in_range("moments", moments.size(), 6, 6);
  in_range("entries", entries.size(), 7, 7), in_range("workspaces", workspaces.size(), 4, 4);
  for (const Maybe* m : {&params[1], &params[2], &moments[2], &moments[3], &moments[4], &moments[5], &entries[0], &entries[1],
                         &entries[2], &entries[3], &entries[5]})
    if (!*m) throw std::invalid_argument("a tensor that is always needed is missing");
  fit_update(params, moments, entries, split, first_piece, piece_length, workspaces, pre_bias, programs);
  fit("stats", stats, stats.rows, 4), in_range("rows of stats", stats.rows, programs, std::numeric_limits<int32_t>::max());
  fit("numbers", numbers, 3), fit("keys", keys, 8);
  const uint32_t* random = keys.as<uint32_t>();
  const Maybe &W_enc = params[0], &dacts = workspaces[2];
  const Array &W_dec = *params[1], &b_enc = *params[2], &grad = *entries[5];
  foresee_bias(where, W_dec.dtype, moments[2]->dtype);

  const Pieces pieces{pointer<int32_t>(first_piece), W_dec.rows, piece_length, workspaces[0] ? workspaces[0]->rows : 0};
  const PieceSums sums{pointer<float>(workspaces[0]), pointer<float>(workspaces[1])};
  const Step step = step_of(numbers, eps, beta1, rest1, beta2, rest2);
  by_dtype(W_dec.dtype, [&](auto t) {
    by_moment(moments[2]->dtype, [&](auto moment) {
      using T = decltype(t);
      using Moment = decltype(moment);
      const int of_dec = W_enc ? 2 : 0;  // its first stream of random bits
      const auto stepped = [&](const Maybe& p, int i, int stream) {
        return Stepped<T, Moment>{pointer<T>(p), pointer<Moment>(moments[i]), pointer<Moment>(moments[i + 1]),
                                  Keys{stochastic ? random + stream : nullptr}};
      };
      const Update<T, Moment> u{stepped(W_enc, 0, 0), stepped(W_dec, 2, of_dec), stepped(b_enc, 4, of_dec + 2),
                                W_dec.rows, W_enc ? W_enc->cols : W_dec.cols, W_dec.cols, step,
                                pointer<float>(pre_bias), stats.as<double>(), unit_norm};
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
