// The backward of a whole SAE and its Adam step, latent by latent, in place: no dictionary gradient is ever stored.
//
//   dacts = <grad_n, W_dec_i> where act > 0        dW_dec_i = Σ acts · grad_n      b_enc, b_dec likewise
//   dW_enc_i = Σ dacts · x_n                        then project, Adam, renormalise, refresh the narrow copy
//
// For one latent the rows of W_enc, W_dec and both gradients live in L1; its tokens' grad and x rows are gathered, the next
// pair fetched while this one is added. Bytes: nnz·(D_in + D_out) gathered (from L3 for 4096 x 768), and once through
// weights and moments, 24 bytes a parameter. Flops 6·nnz·D + 15 a parameter.
//
// Deterministic: a latent's pairs are added in token order, in pieces of kPiece whose sums are added in order (so one latent
// that every token uses does not fall to one thread); sums over latents and tokens go by fixed chunks.
#include <omp.h>

#include <algorithm>

#include "adam.h"
#include "gather.h"
#include "narrow.h"
#include "registry.h"
#include "update.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int64_t kPiece = 1024;         // pairs of one latent added in one go
constexpr int64_t kBatch = 64;           // pairs of one latent whose grad rows stay in L2 between their two uses
constexpr int64_t kPairsAhead = 2;
constexpr int64_t kBlocksPerChunk = 16;  // latent blocks that a thread takes at a time, and one partial sum
constexpr int64_t kTokensPerChunk = 256;

template <class A> struct RowGradient {
  std::vector<A> dec, enc, more;
  A bias = 0;
  bool empty = true;
  RowGradient(int64_t d_out, int64_t d_in) : dec(d_out), enc(d_in), more(std::max(d_out, d_in)) {}
  void clear() {
    std::fill(dec.begin(), dec.end(), A(0)), std::fill(enc.begin(), enc.end(), A(0));
    bias = 0, empty = true;
  }
  void add(const RowGradient& other) {
    add_scaled(dec.data(), A(1), other.dec.data(), int64_t(dec.size()));
    add_scaled(enc.data(), A(1), other.enc.data(), int64_t(enc.size()));
    bias += other.bias;
  }
};

// What a thread works in, made before the threads start: an allocation that fails in there would end the process.
template <class A> struct Scratch {
  RowGradient<A> gradient;
  std::vector<A> wide;
  std::vector<float> buffer;
  std::vector<uint32_t> words;
  explicit Scratch(const UpdateArgs& a)
      : gradient(a.d_out, a.d_in), wide(a.d_out), buffer(a.d_in),
        words(a.screen.scale ? kLanes * a.screen.words_per_row : 0) {}
};

// The rows of x or grad that one latent's pairs begin .. end name, with a weight for each: see gather.h.
template <class A, class Weight> struct PairRows {
  Weight weight;
  const LatentOrder& order;
  const Matrix& rows;
  int64_t begin, end, last;

  const A* row(int64_t pair) const { return static_cast<const A*>(rows.data) + order.tokens[pair] * rows.stride; }
};

template <class T> struct Updater {
  using A = acc_t<T>;
  const UpdateArgs& a;
  const AdamStep<A> adam{a};
  T* const enc = static_cast<T*>(a.W_enc.data);
  T* const dec = static_cast<T*>(a.W_dec.data);
  T* const b_enc = static_cast<T*>(a.b_enc.data);
  const bool tied = !enc;

  explicit Updater(const UpdateArgs& args) : a(args) {}

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
    const int64_t last = t.order.offsets[a.latents];
    A dacts[kBatch];
    const auto act = [&](int64_t e) { return widen(acts[t.order.slots[e]]); };
    const auto dact = [&](int64_t e) { return dacts[e - begin]; };
    const PairRows<A, decltype(act)> grads{act, t.order, t.grad, begin, end, begin};   // at hand: nothing to fetch
    const PairRows<A, decltype(dact)> inputs{dact, t.order, t.x, begin, end, last};
    for (int64_t e = begin; e < end; ++e) {
      const A* next = grads.row(std::min(e + kPairsAhead, last - 1));
      dacts[e - begin] = act(e) == A(0) ? A(0) : dot<true>(dec + i * a.d_out, grads.row(e), a.d_out, next);
      out.bias += dacts[e - begin];
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

  void gradient_of(int64_t i, RowGradient<A>& out) const {
    out.clear();
    if (first_piece[i] < 0) {
      for (const UpdateTerm& t : a.terms) accumulate(t, i, t.order.offsets[i], t.order.offsets[i + 1], out);
      return;
    }
    for (int64_t j = first_piece[i]; j < int64_t(pieces.size()) && pieces[j].latent == i; ++j) out.add(piece_sums[j]);
  }

  // Take out the part along the row, so that the step turns the row and does not stretch it.
  void project(const T* row, A* g) const {
    const A square = dot(row, row, a.d_out), along = dot(g, row, a.d_out);
    add_scaled(g, -along / (square > A(0) ? square : A(1)), row, a.d_out);
  }

  void normalise(A* row) const {
    const A norm = std::sqrt(dot(row, row, a.d_out));
    if (norm > A(0))
      for (int64_t d = 0; d < a.d_out; ++d) row[d] /= norm;
  }

  // `row`: where the row stands while it is updated, in its own type or widened.
  template <class S, class R> void step_row(const Parameter& p, R* row, int64_t i, int64_t length, const A* g) const {
    const uint32_t m = stream_key(a.seed, a.step, p.stream), v = stream_key(a.seed, a.step, p.stream + 1);
    adam_row<R, S>(adam, row, static_cast<S*>(p.m) + i * length, static_cast<S*>(p.v) + i * length, g, length,
                   uint32_t(i * length), m, v);
  }

  // A row that keeps norm 1 is narrowed once, after both steps: rounding in between would stretch it.
  template <class S> void step_decoder(int64_t i, const A* g, std::vector<A>& wide) const {
    T* row = dec + i * a.d_out;
    if (!a.unit_norm) return step_row<S>(a.W_dec, row, i, a.d_out, g);
    if constexpr (std::is_same_v<T, A>) {
      step_row<S>(a.W_dec, row, i, a.d_out, g);
      normalise(row);
    } else {
      for (int64_t d = 0; d < a.d_out; ++d) wide[d] = widen(row[d]);
      step_row<S>(a.W_dec, wide.data(), i, a.d_out, g);
      normalise(wide.data());
      for (int64_t d = 0; d < a.d_out; ++d) row[d] = narrow<T>(wide[d]);
    }
  }

  void fetch(const Parameter& p, int64_t row, int64_t length, size_t moment) const {
    prefetch_row(static_cast<const char*>(p.data) + row * length * sizeof(T), length * sizeof(T));
    prefetch_row(static_cast<const char*>(p.m) + row * length * moment, length * moment);
    prefetch_row(static_cast<const char*>(p.v) + row * length * moment, length * moment);
  }

  // One latent: gradient, statistics, update. `words`: where its narrow copy goes, or null.
  template <class S>
  void latent(int64_t i, int64_t position, Scratch<A>& s, A* bias_sum, double* stats, uint32_t* words) {
    RowGradient<A>& g = s.gradient;
    fetch(a.W_dec, i, a.d_out, sizeof(S));
    if (!tied) fetch(a.W_enc, i, a.d_in, sizeof(S));
    gradient_of(i, g);
    const T* encoder = tied ? dec + i * a.d_out : enc + i * a.d_in;
    if (a.pre_bias && g.bias != A(0)) add_scaled(bias_sum, g.bias, encoder, a.d_in);
    if (tied) add_scaled(g.dec.data(), A(1), g.enc.data(), a.d_out);
    if (!tied) stats[0] += dot(g.enc.data(), g.enc.data(), a.d_in);
    stats[1] += dot(g.dec.data(), g.dec.data(), a.d_out);
    stats[2] += double(g.bias) * g.bias;
    if (a.unit_norm) project(dec + i * a.d_out, g.dec.data());
    step_decoder<S>(i, g.dec.data(), s.wide);
    if (!tied) step_row<S>(a.W_enc, enc + i * a.d_in, i, a.d_in, g.enc.data());
    step_row<S>(a.b_enc, b_enc + i, i, 1, &g.bias);
    if constexpr (!std::is_same_v<T, double>)
      if (words) {
        const Matrix view{const_cast<T*>(encoder), 1, a.d_in, a.d_in, a.dtype};
        narrow_latent(a.screen, position, as_floats(view, 0, s.buffer.data()), words);
      }
  }

  template <class S> void run() {
    cut_long_latents();
    const int64_t blocks = blocks_of(a.latents), chunks = (blocks + kBlocksPerChunk - 1) / kBlocksPerChunk;
    const bool packed = a.screen.words != nullptr;
    // Everything that is allocated, is allocated before the first weight changes.
    std::vector<Scratch<A>> scratch(a.threads, Scratch<A>(a));
    std::vector<A> bias_grad = sum_of_grads();
    std::vector<A> bias_sums(chunks * a.d_in, A(0));
    std::vector<double> chunk_stats(chunks * 4, 0.0);
#pragma omp parallel num_threads(a.threads)
    {
      Scratch<A>& mine = scratch[omp_get_thread_num()];
      std::vector<uint32_t>& words = mine.words;
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t block = chunk * kBlocksPerChunk; block < std::min(blocks, (chunk + 1) * kBlocksPerChunk); ++block) {
          std::fill(words.begin(), words.end(), 0u);
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            const int64_t i = block + lane * blocks;   // as Screen::latent_at
            if (i >= a.latents) break;
            latent<S>(i, block * kLanes + lane, mine, bias_sums.data() + chunk * a.d_in, chunk_stats.data() + chunk * 4,
                      words.empty() ? nullptr : words.data() + lane * a.screen.words_per_row);
          }
          if (packed)
            pack_block(words.data(), a.screen.words_per_row, a.screen.words + block * a.screen.words_per_row * kLanes);
        }
    }
    step_decoder_bias<S>(bias_grad, bias_sums, chunks);
    for (int s = 0; s < 3; ++s) {
      a.stats[s] = 0;
      for (int64_t c = 0; c < chunks; ++c) a.stats[s] += chunk_stats[c * 4 + s];
    }
  }

  // Σ_n grad_n over the terms whose reconstruction includes b_dec.
  std::vector<A> sum_of_grads() const {
    std::vector<A> g(a.d_out, A(0));
    for (const UpdateTerm& t : a.terms) {
      if (!t.has_bias) continue;
      const int64_t parts = (t.grad.rows + kTokensPerChunk - 1) / kTokensPerChunk;
      std::vector<A> sums(parts * a.d_out, A(0));
#pragma omp parallel for schedule(static) num_threads(a.threads)
      for (int64_t c = 0; c < parts; ++c)
        for (int64_t n = c * kTokensPerChunk; n < std::min(t.grad.rows, (c + 1) * kTokensPerChunk); ++n)
          add_scaled(sums.data() + c * a.d_out, A(1), static_cast<const A*>(t.grad.data) + n * t.grad.stride, a.d_out);
      for (int64_t c = 0; c < parts; ++c) add_scaled(g.data(), A(1), sums.data() + c * a.d_out, a.d_out);
    }
    return g;
  }

  // db_dec = g = Σ_n grad_n, less Σ_i db_enc_i · W_enc_i where the encoder sees x - b_dec.
  template <class S> void step_decoder_bias(std::vector<A>& g, const std::vector<A>& bias_sums, int64_t chunks) {
    if (a.pre_bias)
      for (int64_t c = 0; c < chunks; ++c) add_scaled(g.data(), A(-1), bias_sums.data() + c * a.d_in, a.d_in);
    a.stats[3] = dot(g.data(), g.data(), a.d_out);
    step_row<S>(a.b_dec, static_cast<T*>(a.b_dec.data), 0, a.d_out, g.data());
  }
};

template <class T> void update_typed(const UpdateArgs& a) {
  Updater<T> updater(a);
  if (a.narrow_moments)
    updater.template run<bf16>();
  else
    updater.template run<acc_t<T>>();
}

}  // namespace

void update_latents(const UpdateArgs& a) {
  by_dtype(a.dtype, [&](auto t) { update_typed<decltype(t)>(a); });
}

}  // namespace fastsae::FASTSAE_ISA
