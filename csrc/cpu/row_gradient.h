// The gradient of one latent's rows, gathered from the tokens that use it; nothing of it is kept.
//
//   dacts = <grad_n, W_dec_i> or given      dW_dec_i = Σ acts · grad_n      dW_enc_i = Σ dacts · x_n      db_enc_i = Σ dacts
//
// A latent's pairs are added in token order, in pieces of kPiece whose sums are added in order, so that one latent that every
// token uses does not fall to one thread.
#pragma once
#include <algorithm>
#include <vector>

#include "gather.h"
#include "update.h"

namespace fastsae::FASTSAE_ISA {

constexpr int64_t kPiece = 1024;         // pairs of one latent added in one go
constexpr int64_t kBatch = 64;           // pairs of one latent whose grad rows stay in L2 between their two uses
constexpr int64_t kPairsAhead = 2;

template <class A> struct RowGradient {
  std::vector<A> dec, enc, more;
  A bias = 0;          // Σ dacts, which b_dec sees through the pre-bias
  bool empty = true;   // no pair was added
  RowGradient(int64_t d_out, int64_t d_in) : dec(d_out), enc(d_in), more(std::max(d_out, d_in)) {}
  void clear() {
    std::fill(dec.begin(), dec.end(), A(0)), std::fill(enc.begin(), enc.end(), A(0));
    bias = 0, empty = true;
  }
  void add(const RowGradient& other) {
    add_scaled(dec.data(), A(1), other.dec.data(), int64_t(dec.size()));
    add_scaled(enc.data(), A(1), other.enc.data(), int64_t(enc.size()));
    bias += other.bias, empty = false;
  }
};

// The rows of x or grad that one latent's pairs begin .. end name, with a weight for each: see gather.h.
template <class A, class Weight> struct PairRows {
  Weight weight;
  const LatentOrder& order;
  const Matrix& rows;
  int64_t begin, end, last;

  const A* row(int64_t pair) const { return static_cast<const A*>(rows.data) + order.tokens[pair] * rows.stride; }
};

template <class T> class RowGradients {
  using A = acc_t<T>;

 public:
  // Sums long latents at once. Allocates all that is needed later.
  explicit RowGradients(const UpdateArgs& args) : a(args), dec(static_cast<const T*>(args.W_dec.data)) {
    cut_long_latents();
  }

  // Of latent i, over terms and parts.
  void of(int64_t i, RowGradient<A>& out) const {
    out.clear();
    if (first_piece[i] < 0) {
      for (const UpdateTerm& t : a.terms) accumulate(t, i, t.order.offsets[i], t.order.offsets[i + 1], out);
    } else {
      for (int64_t j = first_piece[i]; j < int64_t(pieces.size()) && pieces[j].latent == i; ++j) out.add(piece_sums[j]);
    }
    add_parts(i, out);
  }

 private:
  const UpdateArgs& a;
  const T* const dec;

  // Long latents, cut: piece j of latent i in term t is summed apart, then added in order.
  struct Piece { int64_t term, latent, begin, end; };
  std::vector<Piece> pieces;
  std::vector<RowGradient<A>> piece_sums;
  std::vector<int64_t> first_piece;   // per latent, -1: none

  void accumulate(const UpdateTerm& t, int64_t i, int64_t begin, int64_t end, RowGradient<A>& out) const {
    for (int64_t b = begin; b < end; b += kBatch) batch(t, i, b, std::min(b + kBatch, end), out);
  }

  // dacts first, row after row; then both sums, tile after tile in registers: the rows of grad are still in the cache.
  // 131072 pairs of D = 768, one Zen 5 core: 30 ms, and 44 with both sums kept in L1 (AVX2: 35 and 85).
  void batch(const UpdateTerm& t, int64_t i, int64_t begin, int64_t end, RowGradient<A>& out) const {
    const T* acts = static_cast<const T*>(t.codes.acts);
    const A* given = static_cast<const A*>(t.dacts);
    const int64_t last = t.order.offsets[a.latents];
    A dacts[kBatch];
    const auto act = [&](int64_t e) { return widen(acts[t.order.slots[e]]); };
    const auto dact = [&](int64_t e) { return dacts[e - begin]; };
    // Where dacts are computed here, the rows of grad are at hand afterwards: nothing to fetch.
    const PairRows<A, decltype(act)> grads{act, t.order, t.grad, begin, end, given ? last : begin};
    const PairRows<A, decltype(dact)> inputs{dact, t.order, t.x, begin, end, last};
    if (given) {
      for (int64_t e = begin; e < end; ++e) out.bias += dacts[e - begin] = given[t.order.slots[e]];
    } else {
      for (int64_t e = begin; e < end; ++e) {
        const A* next = grads.row(std::min(e + kPairsAhead, last - 1));
        dacts[e - begin] = act(e) == A(0) ? A(0) : dot<true>(dec + i * a.d_out, grads.row(e), a.d_out, next);
        out.bias += dacts[e - begin];
      }
    }
    if (out.empty) {
      sum_rows<A>(grads, a.d_out, out.dec.data()), sum_rows<A>(inputs, a.d_in, out.enc.data());
    } else {
      sum_rows<A>(grads, a.d_out, out.more.data()), add_scaled(out.dec.data(), A(1), out.more.data(), a.d_out);
      sum_rows<A>(inputs, a.d_in, out.more.data()), add_scaled(out.enc.data(), A(1), out.more.data(), a.d_in);
    }
    out.empty = false;
  }

  void cut_long_latents() {
    first_piece.assign(a.latents, -1);
    for (int64_t i = 0; i < a.latents; ++i) {
      int64_t total = 0;
      for (const UpdateTerm& t : a.terms) total += t.order.offsets[i + 1] - t.order.offsets[i];
      if (total <= kPiece) continue;
      first_piece[i] = int64_t(pieces.size());
      for (int64_t t = 0; t < int64_t(a.terms.size()); ++t) {
        const int64_t* o = a.terms[t].order.offsets;
        for (int64_t b = o[i]; b < o[i + 1]; b += kPiece) pieces.push_back({t, i, b, std::min(b + kPiece, o[i + 1])});
      }
    }
    piece_sums.assign(pieces.size(), RowGradient<A>(a.d_out, a.d_in));
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
    for (int64_t j = 0; j < int64_t(pieces.size()); ++j)
      accumulate(a.terms[pieces[j].term], pieces[j].latent, pieces[j].begin, pieces[j].end, piece_sums[j]);
  }

  void add_parts(int64_t i, RowGradient<A>& out) const {
    const UpdateParts& p = a.parts;
    if (p.enc) add_scaled(out.enc.data(), A(1), static_cast<const A*>(p.enc) + i * a.d_in, a.d_in);
    if (p.dec) add_scaled(out.dec.data(), A(1), static_cast<const A*>(p.dec) + i * a.d_out, a.d_out);
    if (p.pre) out.bias += static_cast<const A*>(p.pre)[i];
    if (!p.pull) return;
    const int64_t width = a.d_out / p.segments;
    for (int64_t l = 0; l < p.segments; ++l)
      add_scaled(out.dec.data() + l * width, static_cast<const A*>(p.pull)[i * p.segments + l], dec + i * a.d_out + l * width,
                 width);
  }
};

}  // namespace fastsae::FASTSAE_ISA
