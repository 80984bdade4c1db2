// Gradient and optimizer step of latents whose rows do not fit in registers and shared memory, or do not begin at whole 16
// bytes.
//
// The formulas, the blocks' latents and the use of pieces are those of update_rows.cu. A block walks over the
// columns of one latent, a tile of THREADS · COLUMNS at a time, a warp taking 128 columns that follow each other (SCALED), of
// which neighbouring lanes have neighbouring ones:
//   1. dots: dact_e = ⟨grad_n, W_dec_i⟩ of every entry, into a workspace, and their sum db_enc_i; or those given
//   2. dW_dec_i and dW_enc_i, tile by tile, into a row of scratch; their norms and dW_dec_i's part along W_dec_i
//   3. the steps: W_dec_i's into the same row (unit_norm), and W_enc_i's
//   4. W_dec_i divided by its norm
// A column is the same thread's from beginning to end, so the row of scratch, which stays in L2, needs no barrier.
//
// Bytes: nnz·(D_in·sizeof(x) + 2·D_out·sizeof(grad)) gathered; M·(D_in + D_out)·(2·sizeof(W) + 4·sizeof(moment)), and W_dec
// three times more and the scratch twice, from L2. Flops: 6·nnz·D + 17·M·(D_in + D_out).
// In flight on a multiprocessor: COLUMNS · ENTRIES_AT_ONCE loads in each of 512 threads, 32 KiB of float.
#include "latent_rows.h"

namespace fastsae {
namespace {

constexpr int THREADS = 256, BLOCKS = 2, COLUMNS = 4, TILE = THREADS * COLUMNS;
static_assert(SCALED == COLUMNS * WARP);

__device__ inline int column(int tile, int q) { return tile + SCALED * warp() + q * WARP + lane(); }

// Fills dacts[begin:end], which all threads may read then, unless they are given; returns their sum.
template <class T, class S>
__device__ inline float dots(const LatentEntries<S>& entries, int begin, int end, const T* w, int D_out,
                             float* dacts, BlockSums& sums) {
  constexpr int AT_ONCE = ENTRIES_AT_ONCE;
  float total = 0.f;
  if (entries.dacts) {
    float of_thread[1] = {};
    for (int e = begin + threadIdx.x; e < end; e += THREADS) of_thread[0] += entries.dacts[e];
    sums.add(of_thread);
    return of_thread[0];
  }
  for (int e = begin; e < end; e += AT_ONCE) {
    const S* row[AT_ONCE];
    float dact[AT_ONCE] = {};
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) row[k] = e + k < end ? entries.grad_row(e + k, D_out) : nullptr;
    for (int tile = 0; tile < D_out; tile += TILE) {
#pragma unroll
      for (int q = 0; q < COLUMNS; ++q) {
        const int c = column(tile, q);
        const float of_w = c < D_out ? widen(w[c]) : 0.f;
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
          if (row[k] && c < D_out) dact[k] = fmaf(widen(row[k][c]), of_w, dact[k]);
      }
    }
    sums.add(dact);
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      if (!row[k]) continue;
      if (threadIdx.x == 0) dacts[e + k] = dact[k];
      total += dact[k];
    }
  }
  __syncthreads();
  return total;
}

// Adds Σ_e weights[e] · the row of e in `first` and `second`, at this thread's columns of a tile.
template <class S>
__device__ inline void add_entries(const LatentEntries<S>& entries, int begin, int end, const float* weights,
                                   const S* first, const S* second, int tile, int D, float (&sum)[COLUMNS]) {
  constexpr int AT_ONCE = ENTRIES_AT_ONCE;
  for (int e = begin; e < end; e += AT_ONCE) {
    float t[AT_ONCE][COLUMNS], weight[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      if (e + k >= end) continue;
      const S* row = entries.row_of(first, second, entries.split, entries.rows[e + k], D);
      weight[k] = weights[e + k];
#pragma unroll
      for (int q = 0; q < COLUMNS; ++q) t[k][q] = column(tile, q) < D ? widen(row[column(tile, q)]) : 0.f;
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      if (e + k >= end) continue;
#pragma unroll
      for (int q = 0; q < COLUMNS; ++q) sum[q] = fmaf(weight[k], t[k][q], sum[q]);
    }
  }
}

// sums.rows[j] (D_out + D_in,), sums.biases[j] = what piece j adds to dW_dec_i, dW_enc_i and db_enc_i of its latent.
template <class T, class S>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    wide_pieces_kernel(LatentEntries<S> entries, Pieces pieces, PieceSums out, const T* W_dec, int D_in, int D_out,
                       float* dacts) {
  const int64_t piece = blockIdx.x;
  if (piece >= pieces.first[pieces.owners]) return;
  SHARED(BlockSums::Memory, memory);
  BlockSums sums{memory};
  const Piece p = find_piece(pieces, piece, entries);
  const float bias = dots(entries, p.begin, p.end, W_dec + p.owner * D_out, D_out, dacts, sums);
  if (threadIdx.x == 0) out.biases[piece] = bias;

  const auto fill = [&](float* row, const float* weights, const S* first, const S* second, int D) {
    for (int tile = 0; tile < D; tile += TILE) {
      float sum[COLUMNS] = {};
      add_entries(entries, p.begin, p.end, weights, first, second, tile, D, sum);
#pragma unroll
      for (int q = 0; q < COLUMNS; ++q)
        if (column(tile, q) < D) row[column(tile, q)] = sum[q];
    }
  };
  float* row = out.rows + piece * (D_out + D_in);
  fill(row, entries.acts, entries.grad, entries.more_grad, D_out);
  fill(row + D_out, entries.dacts ? entries.dacts : dacts, entries.x, entries.more_x, D_in);
}

// The new p of this thread's columns of a tile of row `row`, with the gradient g; moments are stepped in memory. All lanes
// of a warp come here.
template <Rule RULE, class T, class Moment>
__device__ inline void step_tile(const Stepped<T, Moment>& of, const Stepper& stepper, int64_t row, int64_t D, int tile,
                                 const float (&g)[COLUMNS], float (&p)[COLUMNS]) {
  int c[COLUMNS];
  float m[COLUMNS] = {}, v[COLUMNS] = {};
#pragma unroll
  for (int q = 0; q < COLUMNS; ++q) {
    c[q] = column(tile, q);
    if (c[q] >= D) continue;
    if constexpr (HAS_M<RULE>) m[q] = widen(of.m[row * D + c[q]]);
    if constexpr (HAS_V<RULE>) v[q] = widen(of.v[row * D + c[q]]);
  }
  if constexpr (HAS_M<RULE>) widen_moment<Moment>(scale_at<Moment>(of.m_scales, row, D, c[0]), m);
  if constexpr (HAS_V<RULE>) widen_moment<Moment>(scale_at<Moment>(of.v_scales, row, D, c[0]), v);
#pragma unroll
  for (int q = 0; q < COLUMNS; ++q)
    if (c[q] < D) stepper.template step<RULE>(p[q], g[q], m[q], v[q]);
  const auto store = [&](auto positive, const float (&t)[COLUMNS], Moment* to, float* scales) {
    Moment rounded[COLUMNS];
    round_moments<positive.value>(t, of.keys, row, D, c, scales, rounded);
#pragma unroll
    for (int q = 0; q < COLUMNS; ++q)
      if (c[q] < D) to[row * D + c[q]] = rounded[q];
  };
  if constexpr (HAS_M<RULE>) store(std::false_type{}, m, of.m, of.m_scales);
  if constexpr (HAS_V<RULE>) store(std::true_type{}, v, of.v, of.v_scales);
}

template <class T, class S, class Moment>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    update_wide_kernel(LatentEntries<S> entries, Pieces pieces, PieceSums of_pieces, Update<T, Moment> u, float* dacts,
                       float* scratch) {
  const int D_in = u.D_in, D_out = u.D_out;
  SHARED(BlockSums::Memory, memory);
  SHARED(Squares, squares);
  if (threadIdx.x == 0) squares[0] = squares[1] = squares[2] = 0;
  BlockSums sums{memory};
  // dW_dec_i, and then W_dec_i before it has norm 1; behind it dW_enc_i, unless tied.
  float* const row = scratch + int64_t{blockIdx.x} * (D_out + D_in);
  float* const pre_bias = u.pre_bias ? u.pre_bias + int64_t{blockIdx.x} * D_in : nullptr;
  if (pre_bias)
    for (int c = threadIdx.x; c < D_in; c += THREADS) pre_bias[c] = 0.f;

  const int64_t latents = u.latents_to_update();
  for (int64_t i = blockIdx.x; i < latents; i += gridDim.x) {
    // Dots. A latent in pieces has no entries left to add here, and its pieces have the sums.
    const int first = pieces.first ? pieces.first[i] : 0, last = pieces.first ? pieces.first[i + 1] : 0;
    const int end = entries.end(i), begin = last > first ? end : static_cast<int>(entries.begin(i));
    T* const w_dec = u.dec.p + i * D_out;
    float bias = dots(entries, begin, end, w_dec, D_out, dacts, sums);
    for (int j = first; j < last; ++j) bias += of_pieces.biases[j];
    if (u.parts.bias) bias += u.parts.bias[i];
    // Adds to a tile of the gradient what the decoder's side gives, or the encoder's.
    const auto add_gradient = [&](bool decoder, int tile, int D, float (&g)[COLUMNS]) {
      add_entries(entries, begin, end, decoder ? entries.acts : entries.dacts ? entries.dacts : dacts, decoder ? entries.grad : entries.x,
                  decoder ? entries.more_grad : entries.more_x, tile, D, g);
      for (int j = first; j < last; ++j)
#pragma unroll
        for (int q = 0; q < COLUMNS; ++q)
          if (column(tile, q) < D)
            g[q] += of_pieces.rows[int64_t{j} * (D_out + D_in) + (decoder ? 0 : D_out) + column(tile, q)];
    };

    // Gradients.
    float total[4] = {};  // ‖dW_dec‖², ⟨dW_dec, W_dec⟩, ‖W_dec‖², ‖dW_enc‖²
    for (int tile = 0; tile < D_out; tile += TILE) {
      float g[COLUMNS] = {};
#pragma unroll 1  // one copy of the code
      for (int side = 0; side < (u.tied() ? 2 : 1); ++side) add_gradient(side == 0, tile, D_out, g);
#pragma unroll
      for (int q = 0; q < COLUMNS; ++q) {
        const int c = column(tile, q);
        if (c >= D_out) continue;
        const float w = widen(w_dec[c]);
        if (u.parts.pull) g[q] += u.parts.pulled(i, c, D_out, w);
        if (u.parts.dec) g[q] += u.parts.dec[i * D_out + c];
        total[0] = fmaf(g[q], g[q], total[0]);
        total[1] = fmaf(g[q], w, total[1]);
        total[2] = fmaf(w, w, total[2]);
        row[c] = g[q];
        if (u.tied() && pre_bias) pre_bias[c] = fmaf(bias, w, pre_bias[c]);
      }
    }
    for (int tile = 0; !u.tied() && tile < D_in; tile += TILE) {
      float g[COLUMNS] = {};
      add_gradient(false, tile, D_in, g);
#pragma unroll
      for (int q = 0; q < COLUMNS; ++q) {
        const int c = column(tile, q);
        if (c >= D_in) continue;
        if (u.parts.enc) g[q] += u.parts.enc[i * D_in + c];
        total[3] = fmaf(g[q], g[q], total[3]);
        row[D_out + c] = g[q];
        if (pre_bias) pre_bias[c] = fmaf(bias, widen(u.enc.p[i * D_in + c]), pre_bias[c]);
      }
    }
    sums.add(total);
    const float along = part_along(total[1], total[2]);
    const bool projected = u.projects_first();
    const auto each_of_dec = [&](const auto& use) {
      for (int tile = 0; tile < D_out; tile += TILE)
#pragma unroll
        for (int q = 0; q < COLUMNS; ++q)
          if (column(tile, q) < D_out) use(column(tile, q));
    };
    float square[1] = {};
    if (projected) {
      each_of_dec([&](int c) {
        row[c] = fmaf(-along, widen(w_dec[c]), row[c]);
        square[0] = fmaf(row[c], row[c], square[0]);
      });
      sums.add(square);
    }
    const float of_dec = projected ? square[0] : total[0], clip_dec = u.clip(of_dec), clip_enc = u.clip(total[3]);
    const float of_bias = u.parts.db_enc ? bias + u.parts.db_enc[i] : bias, grad_scale = u.step.grad_scale();
    if (threadIdx.x == 0) {
      if (u.step.rule == Rule::none)
        add_squares(squares, double{total[3]} * clip_enc * clip_enc, double{of_dec} * clip_dec * clip_dec, of_bias);
      else
        add_squares(squares, total[3], total[0], of_bias);
    }

    // Steps.
    square[0] = 0.f;
    by_rule<Moment>(u.step.rule, [&](auto rule) {
      const Stepper stepper = u.step.stepper();
      const auto step_row = [&](const Stepped<T, Moment>& of, int D, const float* gradient, const auto& shaped, const auto& use) {
        for (int tile = 0; tile < D; tile += TILE) {
          float g[COLUMNS] = {}, p[COLUMNS] = {};
#pragma unroll
          for (int q = 0; q < COLUMNS; ++q) {
            const int c = column(tile, q);
            if (c >= D) continue;
            p[q] = widen(of.p[i * D + c]);
            g[q] = shaped(gradient[c], p[q]);
          }
          step_tile<rule.value>(of, stepper, i, D, tile, g, p);
#pragma unroll
          for (int q = 0; q < COLUMNS; ++q)
            if (column(tile, q) < D) use(column(tile, q), p[q]);
        }
      };
      step_row(
          u.dec, D_out, row,
          [&](float g, float w) {
            return (u.unit_norm && !projected ? fmaf(-along, w, g) : g) * (clip_dec * grad_scale);
          },
          [&](int c, float p) {
            square[0] = fmaf(p, p, square[0]);
            if (u.unit_norm) row[c] = p;
            else w_dec[c] = round_to<T>(p);
          });
      if (u.tied()) return;
      step_row(
          u.enc, D_in, row + D_out, [&](float g, float) { return g * (clip_enc * grad_scale); },
          [&](int c, float p) { u.enc.p[i * D_in + c] = round_to<T>(p); });
    });
    sums.add(square);

    // The norm, and the bias.
    if (u.unit_norm && u.step.rule != Rule::none) {
      const float scale = to_unit(square[0]);
      each_of_dec([&](int c) { w_dec[c] = round_to<T>(row[c] * scale); });
    }
    if (threadIdx.x == 0) {
      BiasStep<T, BiasMoment<Moment>> b;
      b.load(u.bias, i);
      b.finish(u.bias, i, of_bias, u.step);
    }
  }
  if (threadIdx.x == 0) store_squares(squares, u.stats);
}

}  // namespace

template <class T, class S, class Moment>
void update_wide(const Where& where, const LatentEntries<S>& entries, const Pieces& pieces, const PieceSums& sums,
                 const Update<T, Moment>& u, int64_t programs, float* dacts, float* scratch) {
  const Shape shape{dim3(programs), dim3(THREADS)};
  foresee(where, "update_wide", update_wide_kernel<T, S, Moment>, shape);
  if (pieces.first)
    launch(where, "wide_pieces", wide_pieces_kernel<T, S>, {dim3(pieces.capacity), dim3(THREADS)}, entries, pieces, sums,
           u.dec.p, u.D_in, u.D_out, dacts);
  launch(where, "update_wide", update_wide_kernel<T, S, Moment>, shape, entries, pieces, sums, u, dacts, scratch);
}

#define FOR_MOMENT(T, S, Moment)                                                                                     \
  template void update_wide(const Where&, const LatentEntries<S>&, const Pieces&, const PieceSums&,                  \
                            const Update<T, Moment>&, int64_t, float*, float*);
#define FOR(T, S) FOR_MOMENT(T, S, float) FOR_MOMENT(T, S, bf16) FOR_MOMENT(T, S, fp8)
FOR(float, float)
FOR(bf16, bf16)
FOR(bf16, float)
FOR(f16, f16)
FOR(f16, float)

}  // namespace fastsae
