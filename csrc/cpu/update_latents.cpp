// The backward of a whole SAE and its optimizer step, latent by latent, in place: no dictionary gradient is ever stored.
//
//   gradients of row_gradient.h, then project, clip, scale, optimizer, renormalize, refresh the narrow copy; b_dec last
//
// For one latent the rows of W_enc, W_dec and both gradients live in L1; its tokens' grad and x rows are gathered, the next
// pair fetched while this one is added. Bytes: nnz·(D_in + D_out) gathered (from L3 for 4096 x 768), and once through
// weights and moments, 24 bytes a parameter with Adam's in fp32, 12 in 8 bits. Flops 6·nnz·D + 15 a parameter.
//
// Deterministic: row_gradient.h says so of a latent's sums; sums over latents and tokens go by fixed chunks.
#include <omp.h>

#include "narrow.h"
#include "optimizers.h"
#include "registry.h"
#include "row_gradient.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int64_t kBlocksPerChunk = 16;  // latent blocks that a thread takes at a time, and one partial sum
constexpr int64_t kTokensPerChunk = 256;

// What a thread works in, made before the threads start: an allocation that fails in there would end the process.
template <class A> struct Scratch {
  RowGradient<A> gradient;
  std::vector<A> wide;
  std::vector<float> buffer;
  std::vector<uint32_t> words;
  explicit Scratch(const UpdateArgs& a)
      : gradient(a.d_out, a.d_in), wide(a.d_out), buffer(2 * a.d_in),
        words(a.screen.scale ? kLanes * a.screen.words_per_row : 0) {}
};

template <class T> struct Updater {
  using A = acc_t<T>;
  const UpdateArgs& a;
  const StepNumbers<A> numbers{a.optimizer};
  const RowGradients<T> gradients{a};
  T* const enc = static_cast<T*>(a.W_enc.data);
  T* const dec = static_cast<T*>(a.W_dec.data);
  const bool tied = a.tied;

  Keys keys[4];   // of the i-th parameter's streams, 2i and 2i + 1

  explicit Updater(const UpdateArgs& args) : a(args) {
    for (uint32_t i = 0; i < 4; ++i)
      keys[i] = {stream_key(a.seed, a.step, 2 * i), stream_key(a.seed, a.step, 2 * i + 1)};
  }

  // Take out the part along the row, so that the step turns the row and does not stretch it.
  void project(const T* row, A* g) const {
    const A square = dot(row, row, a.d_out), along = dot(g, row, a.d_out);
    add_scaled(g, -along / (square > A(0) ? square : A(1)), row, a.d_out);
  }

  void normalize(A* row) const {
    const A norm = std::sqrt(dot(row, row, a.d_out));
    if (norm > A(0))
      for (int64_t d = 0; d < a.d_out; ++d) row[d] /= norm;
  }

  void scale(A* g, A by, int64_t length) const {
    for (int64_t d = 0; d < length; ++d) g[d] *= by;
  }

  void clip(A* g, int64_t length) const {
    const A norm = std::sqrt(dot(g, g, length));
    if (norm > A(a.clip_rows)) scale(g, A(a.clip_rows) / norm, length);
  }

  template <class R> void step(const Parameter& p, R* row, int64_t i, int64_t length, const A* g) const {
    step_row(a.optimizer, numbers, p, row, i, length, g, keys[p.stream / 2]);
  }

  // A row that keeps norm 1 is narrowed once, after both steps: rounding in between would stretch it.
  void step_decoder(int64_t i, const A* g, std::vector<A>& wide) const {
    T* row = dec + i * a.d_out;
    if (!a.unit_norm) return step(a.W_dec, row, i, a.d_out, g);
    if constexpr (std::is_same_v<T, A>) {
      step(a.W_dec, row, i, a.d_out, g);
      normalize(row);
    } else {
      for (int64_t d = 0; d < a.d_out; ++d) wide[d] = widen(row[d]);
      step(a.W_dec, wide.data(), i, a.d_out, g);
      normalize(wide.data());
      for (int64_t d = 0; d < a.d_out; ++d) row[d] = narrow<T>(wide[d]);
    }
  }

  void fetch(const Parameter& p, int64_t row, int64_t length) const {
    const int64_t moment = p.stored == Stored::wide ? sizeof(A) : p.stored == Stored::bf16 ? 2 : 1;
    prefetch_row(static_cast<const char*>(p.data) + row * length * sizeof(T), length * sizeof(T));
    if (p.m) prefetch_row(static_cast<const char*>(p.m) + row * length * moment, length * moment);
    if (p.v) prefetch_row(static_cast<const char*>(p.v) + row * length * moment, length * moment);
  }

  void add_norms(const RowGradient<A>& g, A bias, double* stats) const {
    if (!tied) stats[0] += dot(g.enc.data(), g.enc.data(), a.d_in);
    stats[1] += dot(g.dec.data(), g.dec.data(), a.d_out);
    stats[2] += double(bias) * bias;
  }

  // As the optimizer gets it, but for grad_scale.
  void shape(int64_t i, RowGradient<A>& g) const {
    if (a.unit_norm) project(dec + i * a.d_out, g.dec.data());
    if (a.clip_rows == 0) return;
    clip(g.dec.data(), a.d_out);
    if (!tied) clip(g.enc.data(), a.d_in);
  }

  // One latent: gradient, statistics, update. `words`: where its narrow copy goes, or null.
  void latent(int64_t i, int64_t position, Scratch<A>& s, A* bias_grads, A* bias_sum, double* stats, uint32_t* words) const {
    RowGradient<A>& g = s.gradient;
    if (!a.norms_only) {
      fetch(a.W_dec, i, a.d_out);
      if (!tied) fetch(a.W_enc, i, a.d_in);
    }
    gradients.of(i, g);
    const T* encoder = tied ? dec + i * a.d_out : enc + i * a.d_in;
    if (a.pre_bias && g.bias != A(0)) add_scaled(bias_sum, g.bias, encoder, a.d_in);
    if (tied) add_scaled(g.dec.data(), A(1), g.enc.data(), a.d_out);
    A bias = g.bias;
    if (a.parts.db_enc) bias += static_cast<const A*>(a.parts.db_enc)[i];
    if (a.norms_only) {
      // A row without a gradient adds nothing: its weights need not be read.
      if (!g.empty || a.parts.dec || a.parts.pull) shape(i, g);
      return add_norms(g, bias, stats);
    }
    add_norms(g, bias, stats);
    shape(i, g);
    if (a.grad_scale != 1) {
      scale(g.dec.data(), A(a.grad_scale), a.d_out), scale(g.enc.data(), A(a.grad_scale), a.d_in);
      bias *= A(a.grad_scale);
    }
    step_decoder(i, g.dec.data(), s.wide);
    if (!tied) step(a.W_enc, enc + i * a.d_in, i, a.d_in, g.enc.data());
    bias_grads[i] = bias;
    if constexpr (!std::is_same_v<T, double>)
      if (words) {
        const Matrix view{const_cast<T*>(encoder), 1, a.d_in, a.d_in, a.dtype};
        narrow_latent(a.screen, position, as_floats(view, 0, s.buffer.data()), s.buffer.data() + a.d_in, words);
      }
  }

  void run() {
    const int64_t blocks = blocks_of(a.latents), chunks = (blocks + kBlocksPerChunk - 1) / kBlocksPerChunk;
    const bool packed = a.screen.words != nullptr;
    // Everything that is allocated, is allocated before the first weight changes.
    std::vector<Scratch<A>> scratch(a.threads, Scratch<A>(a));
    std::vector<A> bias_grad = sum_of_grads(), latent_biases(a.latents);
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
            latent(i, block * kLanes + lane, mine, latent_biases.data(), bias_sums.data() + chunk * a.d_in,
                   chunk_stats.data() + chunk * 4,
                   words.empty() ? nullptr : words.data() + lane * a.screen.words_per_row);
          }
          if (packed)
            pack_block(words.data(), a.screen.words_per_row, a.screen.words + block * a.screen.words_per_row * kLanes);
        }
    }
    // All at once, not one by one with the rows: a step of one number costs as much as one of a register.
    if (!a.norms_only) step(a.b_enc, static_cast<T*>(a.b_enc.data), 0, a.latents, latent_biases.data());
    step_decoder_bias(bias_grad, bias_sums, chunks);
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
  void step_decoder_bias(std::vector<A>& g, const std::vector<A>& bias_sums, int64_t chunks) {
    if (a.pre_bias)
      for (int64_t c = 0; c < chunks; ++c) add_scaled(g.data(), A(-1), bias_sums.data() + c * a.d_in, a.d_in);
    a.stats[3] = dot(g.data(), g.data(), a.d_out);
    if (a.norms_only) return;
    if (a.grad_scale != 1) scale(g.data(), A(a.grad_scale), a.d_out);
    step(a.b_dec, static_cast<T*>(a.b_dec.data), 0, a.d_out, g.data());
  }
};

}  // namespace

void update_latents(const UpdateArgs& a) {
  by_dtype(a.dtype, [&](auto t) { Updater<decltype(t)>(a).run(); });
}

}  // namespace fastsae::FASTSAE_ISA
