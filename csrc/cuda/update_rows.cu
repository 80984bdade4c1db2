// Gradient and optimizer step of one latent's rows, kept in registers from the first gather to the last store.
//
//   dact_e = ⟨grad_n, W_dec_i⟩, or given    dW_dec_i = Σ act_e · grad_n    dW_enc_i = Σ dact_e · x_n    db_enc_i = Σ dact_e
//   then what other paths add (Parts); then W_dec's gradient loses its part along W_dec_i (unit_norm), each row is clipped and
//   scaled, stepped (optimizers.h), and W_dec_i is divided by its norm (unit_norm)
//
// over the entries e = (token n, act_e) of latent i. A block takes every R-th latent: neighbours, which are often alike in
// how much they are used, fall to different blocks, and it adds the pre-bias term Σ db_enc_i · W_enc_i of its latents in
// registers. A thread owns fours of columns: it holds both gradients and the pre-bias sum of those. A piece of a long
// latent (pieces.h) is added up by a block of row_pieces. For rows of whole 16 bytes that fit, x and grad in the weights'
// dtype; others: update_wide.cu.
//
// While a block adds up one latent, the rows that it will step next are on their way to shared memory (copy.h): the
// gathers of a latent's few entries (N·K/M is 4 or so) are chains of loads that wait for each other, about 3 µs, in which
// nothing else would be read. W_dec's row is wanted first and begun a latent ahead, so it has two places; W_enc's and the
// moments are begun where those of the latent before were used up. At D = 4096 in float that is 7 · 16 KiB = 112 KiB: two
// blocks in the 228 KiB of a multiprocessor of sm_90, each with 80 KiB under way or more, where 32 KiB hide the latency of
// its share of 4.3 TB/s; in 6 µs a multiprocessor can move the rows of one latent, 192 KiB there and back. At 2048 columns
// it is three blocks of 57 KiB, at 8192 one of 225. On sm_80 (164 KiB, of which a block gets 163) 4096 columns are one
// block, and 8192 in float do not fit.
//
// A loop over columns with a bound, and over entries with an end, has a branch for each, and no load moves over a branch: the
// eight steps of four entries would be eight exposed latencies, 18 µs a latent at D = 4096. So rows that a whole number of
// STEPS fills (both of them, 768 columns in three and 4096 in four) have kernels without a bound, where HOISTED entries are
// read in all columns before the first of them is used; past the end the last entry is read again, and counts as zeros.
//
// Bytes: nnz·(D_in·sizeof(x) + D_out·sizeof(grad)) gathered; M·(D_in + D_out)·(2·sizeof(W) + 4·sizeof(moment)).
// Flops: 6·nnz·D + 15·M·(D_in + D_out).
#include "copy.h"
#include "fours.h"
#include "latent_rows.h"

namespace fastsae {
namespace {

constexpr int THREADS = most_threads(FOURS, false), BLOCKS = 1;
template <int STEPS, class Moment> constexpr int MOST_THREADS = most_threads(STEPS, std::is_same_v<Moment, fp8>);
constexpr int HOISTED = 2;  // entries: their fours of a thread are 32 registers in float

using RowPart = float[FOURS][4];

__device__ inline int column(int j) { return 4 * (threadIdx.x + j * blockDim.x); }

// Steps of a loop over a thread's columns, and whether column c is inside. STEPS 0: any rows; else those that it fills.
template <int STEPS> constexpr int COUNT = STEPS ? STEPS : FOURS;
template <int STEPS> __device__ inline bool inside(int c, int D) { return STEPS || c < D; }

// Calls use(j, c, k, four) for the fours of entries begin .. end, HOISTED entries at a time, each in all columns.
template <int STEPS, class T, class RowAt, class Use>
__device__ inline void each_four(int begin, int end, const RowAt& row_at, const Use& use) {
#pragma unroll
  for (int first = 0; first < ENTRIES_AT_ONCE; first += HOISTED) {
    if (begin + first >= end) break;
    const T* row[HOISTED];
#pragma unroll
    for (int k = 0; k < HOISTED; ++k) row[k] = row_at(min(begin + first + k, end - 1));
    Four<T> four[HOISTED][STEPS];
#pragma unroll
    for (int j = 0; j < STEPS; ++j)
#pragma unroll
      for (int k = 0; k < HOISTED; ++k) four[k][j].bits = __ldg(&four_at(row[k] + column(j))->bits);
    // Zeros past the end, and no branch around the use: the compiler would move the loads behind it.
#pragma unroll
    for (int k = 0; k < HOISTED; ++k)
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        float t[4];
        four[k][j].widen_to(t);
#pragma unroll
        for (int i = 0; i < 4; ++i) t[i] = begin + first + k < end ? t[i] : 0.f;
        use(j, first + k, t);
      }
  }
}

// Adds to dW_dec_i, dW_enc_i and db_enc_i the entries begin .. end; w: W_dec_i, in shared or global memory.
template <int STEPS, class T>
__device__ inline void add_entries(const LatentEntries<T>& entries, int begin, int end, const T* w, int D_in, int D_out,
                                   RowPart& dec, RowPart& enc, float& bias, BlockSums& sums) {
  constexpr int AT_ONCE = ENTRIES_AT_ONCE;
  if constexpr (STEPS != 0) {
    for (int e = begin; e < end; e += AT_ONCE) {
      float act[AT_ONCE], dact[AT_ONCE] = {};
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) act[k] = e + k < end ? entries.acts[e + k] : 0.f;
      each_four<STEPS, T>(e, end, [&](int at) { return entries.grad_row(at, D_out); }, [&](int j, int k, const float (&t)[4]) {
        float of_w[4];
        load_four(w + column(j), of_w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dact[k] = fmaf(t[i], of_w[i], dact[k]);
          dec[j][i] = fmaf(act[k], t[i], dec[j][i]);
        }
      });
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        dact[k] = e + k < end ? dact[k] : 0.f;  // 0 times infinity is not
        if (entries.dacts) dact[k] = e + k < end ? entries.dacts[e + k] : 0.f;
      }
      if (!entries.dacts) sums.add(dact);
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) bias += dact[k];
      each_four<STEPS, T>(e, end, [&](int at) { return entries.x_row(at, D_in); }, [&](int j, int k, const float (&t)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) enc[j][i] = fmaf(dact[k], t[i], enc[j][i]);
      });
    }
  } else {
    for (int e = begin; e < end; e += AT_ONCE) {
      const T* row[AT_ONCE];
      float act[AT_ONCE], dact[AT_ONCE] = {};
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        row[k] = e + k < end ? entries.grad_row(e + k, D_out) : nullptr;
        act[k] = e + k < end ? entries.acts[e + k] : 0.f;
      }
#pragma unroll
      for (int j = 0; j < FOURS; ++j) {
        const int c = column(j);
        if (c >= D_out) continue;
        float grad[AT_ONCE][4], of_w[4];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
          if (e + k < end) gather_four(row[k] + c, grad[k]);
        load_four(w + c, of_w);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
          if (e + k < end) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              dact[k] = fmaf(grad[k][i], of_w[i], dact[k]);
              dec[j][i] = fmaf(act[k], grad[k][i], dec[j][i]);
            }
          }
      }
      if (!entries.dacts) sums.add(dact);
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        if (entries.dacts) dact[k] = e + k < end ? entries.dacts[e + k] : 0.f;
        row[k] = e + k < end ? entries.x_row(e + k, D_in) : nullptr;
        bias += dact[k];
      }
#pragma unroll
      for (int j = 0; j < FOURS; ++j) {
        const int c = column(j);
        if (c >= D_in) continue;
        float x[AT_ONCE][4];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
          if (e + k < end) gather_four(row[k] + c, x[k]);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
          if (e + k < end) {
#pragma unroll
            for (int i = 0; i < 4; ++i) enc[j][i] = fmaf(dact[k], x[k][i], enc[j][i]);
          }
      }
    }
  }
}

// sums.rows[j] (D_out + D_in,), sums.biases[j] = what piece j adds to dW_dec_i, dW_enc_i and db_enc_i of its latent.
template <int STEPS, class T>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    row_pieces_kernel(LatentEntries<T> entries, Pieces pieces, PieceSums out, const T* W_dec, int D_in, int D_out) {
  const int64_t piece = blockIdx.x;
  if (piece >= pieces.first[pieces.owners]) return;
  SHARED(BlockSums::Memory, memory);
  BlockSums sums{memory};
  const Piece p = find_piece(pieces, piece, entries);
  RowPart dec = {}, enc = {};
  float bias = 0.f;
  add_entries<STEPS>(entries, p.begin, p.end, W_dec + p.owner * D_out, D_in, D_out, dec, enc, bias, sums);

  float* row = out.rows + piece * (D_out + D_in);
#pragma unroll
  for (int j = 0; j < COUNT<STEPS>; ++j) {
    const int c = column(j);
    if (inside<STEPS>(c, D_out)) store_four(row + c, dec[j]);
    if (inside<STEPS>(c, D_in)) store_four(row + D_out + c, enc[j]);
  }
  if (threadIdx.x == 0) out.biases[piece] = bias;
}

// The rows of a latent in shared memory, one after the other: W_dec's twice, its moments, W_enc's and its moments.
template <class T, class Moment> struct Staged {
  char* memory;
  int D_in, D_out, kept;  // kept: moments of each

  __device__ T* dec(int stage) const { return reinterpret_cast<T*>(memory) + stage * D_out; }
  __device__ Moment* m_dec() const { return reinterpret_cast<Moment*>(dec(2)); }
  __device__ Moment* v_dec() const { return m_dec() + D_out; }
  __device__ T* enc() const { return reinterpret_cast<T*>(m_dec() + kept * D_out); }
  __device__ Moment* m_enc() const { return reinterpret_cast<Moment*>(enc() + D_in); }
  __device__ Moment* v_enc() const { return m_enc() + D_in; }
};

// p (float) of four columns from c on, or none where c is past the end of the row: their step with the gradient g. m and v
// come from shared memory and go to global; all lanes of a warp come here. scales: m's and v's.
template <Rule RULE, class T, class Moment>
__device__ inline void step_four(const Stepped<T, Moment>& of, const Stepper& stepper, int64_t row, int D, int c, bool inside,
                                 const Moment* m_staged, const Moment* v_staged, const float (&scales)[2],
                                 const float (&g)[4], float (&p)[4]) {
  float m[4] = {}, v[4] = {};
  if (inside) {
    if constexpr (HAS_M<RULE>) load_four(m_staged + c, m), widen_moment<Moment>(scales[0], m);
    if constexpr (HAS_V<RULE>) load_four(v_staged + c, v), widen_moment<Moment>(scales[1], v);
#pragma unroll
    for (int i = 0; i < 4; ++i) stepper.template step<RULE>(p[i], g[i], m[i], v[i]);
  }
  const int columns[4] = {c, c + 1, c + 2, c + 3};
  Moment rounded[4];
  if constexpr (HAS_M<RULE>) {
    round_moments<false>(m, of.keys, row, D, columns, of.m_scales, rounded);
    if (inside) stream_four(of.m + row * D + c, rounded);
  }
  if constexpr (HAS_V<RULE>) {
    round_moments<true>(v, of.keys, row, D, columns, of.v_scales, rounded);
    if (inside) stream_four(of.v + row * D + c, rounded);
  }
}

// The scales of a row's moments at this thread's columns, read together and long before they are needed.
template <int STEPS, class T, class Moment>
__device__ inline void load_scales(const Stepped<T, Moment>& of, int64_t row, int D, float (&scales)[COUNT<STEPS>][2]) {
  if constexpr (std::is_same_v<Moment, fp8>)
    if (of.m_scales) {
#pragma unroll
      for (int j = 0; j < COUNT<STEPS>; ++j) {
        scales[j][0] = scale_at<Moment>(of.m_scales, row, D, column(j));
        scales[j][1] = scale_at<Moment>(of.v_scales, row, D, column(j));
      }
    }
}

template <class T> __device__ inline void stream_weights(T* p, const float (&t)[4], float scale) {
  T rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded[i] = round_to<T>(t[i] * scale);
  stream_four(p, rounded);
}

template <int STEPS, class T, class Moment>
__global__ void __launch_bounds__(MOST_THREADS<STEPS, Moment>, BLOCKS)
    update_rows_kernel(LatentEntries<T> entries, Pieces pieces, PieceSums of_pieces, Update<T, Moment> u) {
  const int R = gridDim.x, M = u.latents_to_update(), D_in = u.D_in, D_out = u.D_out;
  SHARED(BlockSums::Memory, memory);
  SHARED(uint64_t[3], arrived);
  SHARED(Squares, squares);
  if (threadIdx.x == 0) squares[0] = squares[1] = squares[2] = 0;
  BlockSums sums{memory};
  const Staged<T, Moment> staged{dynamic_shared<char>(), D_in, D_out, (u.dec.m != nullptr) + (u.dec.v != nullptr)};
  const Stages stages(arrived, 3);

  constexpr int REST = 2;  // the stage of all but W_dec's rows, which are stages 0 and 1 in turn
  const auto begin_dec = [&](int64_t latent, int stage) {
    stages.begin(stage, {RowCopy{staged.dec(stage), u.dec.p + latent * D_out, static_cast<uint32_t>(D_out * sizeof(T))}},
                 latent >= M);
  };
  const auto begin_rest = [&](int64_t latent) {
    const auto row = [&](auto* to, const auto* from, int D) {
      return RowCopy{to, from + latent * D, from ? static_cast<uint32_t>(D * sizeof(*from)) : 0};
    };
    stages.begin(REST, {row(staged.m_dec(), u.dec.m, D_out), row(staged.v_dec(), u.dec.v, D_out),
                        row(staged.enc(), u.enc.p, D_in), row(staged.m_enc(), u.enc.m, D_in),
                        row(staged.v_enc(), u.enc.v, D_in)}, latent >= M);
  };
  begin_dec(blockIdx.x, 0);
  begin_rest(blockIdx.x);
  begin_dec(int64_t{blockIdx.x} + R, 1);

  RowPart pre_bias = {};
  uint32_t use = 0;
  for (int latent = blockIdx.x; latent < M; latent += R, ++use) {
    // Gradients. A latent in pieces has no entries left to add here.
    const bool cut = pieces.cut(latent);
    const int end = entries.end(latent), begin = cut ? end : static_cast<int>(entries.begin(latent));
    RowPart dec = {}, enc = {};
    float bias = 0.f;
    stages.template wait<2>(use % 2, use / 2);
    const T* const w = staged.dec(use % 2);
    add_entries<STEPS>(entries, begin, end, w, D_in, D_out, dec, enc, bias, sums);
    if (cut)
      for (int piece = pieces.first[latent]; piece < pieces.first[latent + 1]; ++piece) {
        const float* row = of_pieces.rows + int64_t{piece} * (D_out + D_in);
#pragma unroll
        for (int j = 0; j < COUNT<STEPS>; ++j) {
          const int c = column(j);
          if (inside<STEPS>(c, D_out)) add_four(row + c, dec[j]);
          if (inside<STEPS>(c, D_in)) add_four(row + D_out + c, enc[j]);
        }
        bias += of_pieces.biases[piece];
      }
    if (u.parts.bias) bias += u.parts.bias[latent];
    // With bf16 moments: update_wide.cu (rows_are_staged).
    if (!std::is_same_v<Moment, bf16> && (u.parts.pull || u.parts.dec || u.parts.enc)) {
#pragma unroll
      for (int j = 0; j < COUNT<STEPS>; ++j) {
        const int c = column(j);
        if (u.parts.pull && inside<STEPS>(c, D_out)) {
          float of_w[4];
          load_four(w + c, of_w);
#pragma unroll
          for (int i = 0; i < 4; ++i) dec[j][i] += u.parts.pulled(latent, c + i, D_out, of_w[i]);
        }
        if (u.parts.dec && inside<STEPS>(c, D_out)) add_four(u.parts.dec + int64_t{latent} * D_out + c, dec[j]);
        if (u.parts.enc && inside<STEPS>(c, D_in)) add_four(u.parts.enc + int64_t{latent} * D_in + c, enc[j]);
      }
    }

    // Their norms, and how far W_dec's lies along its row.
    float total[4] = {};  // ‖dW_dec‖², ⟨dW_dec, W_dec⟩, ‖W_dec‖², ‖dW_enc‖²
#pragma unroll
    for (int j = 0; j < COUNT<STEPS>; ++j) {
      const int c = column(j);
      if (!inside<STEPS>(c, D_out)) continue;
      float of_w[4];
      load_four(w + c, of_w);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (u.tied()) dec[j][i] += enc[j][i];
        total[0] = fmaf(dec[j][i], dec[j][i], total[0]);
        total[1] = fmaf(dec[j][i], of_w[i], total[1]);
        total[2] = fmaf(of_w[i], of_w[i], total[2]);
        if (u.tied()) pre_bias[j][i] = fmaf(bias, of_w[i], pre_bias[j][i]);
      }
    }
    if (!u.tied()) {
#pragma unroll
      for (int j = 0; j < COUNT<STEPS>; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[3] = fmaf(enc[j][i], enc[j][i], total[3]);
    }
    sums.add(total);
    const float along = part_along(total[1], total[2]);
    const bool projected = u.projects_first();
    if (projected) {
      float square[1] = {};
#pragma unroll
      for (int j = 0; j < COUNT<STEPS>; ++j) {
        const int c = column(j);
        if (!inside<STEPS>(c, D_out)) continue;
        float of_w[4];
        load_four(w + c, of_w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dec[j][i] = fmaf(-along, of_w[i], dec[j][i]);
          square[0] = fmaf(dec[j][i], dec[j][i], square[0]);
        }
      }
      sums.add(square);
      total[1] = square[0];
    }
    const float clip_dec = u.clip(projected ? total[1] : total[0]), clip_enc = u.clip(total[3]);
    const float of_bias = u.parts.db_enc ? bias + u.parts.db_enc[latent] : bias;
    if (threadIdx.x == 0) {
      if (u.step.rule == Rule::none)
        add_squares(squares, double{total[3]} * clip_enc * clip_enc,
                    double{projected ? total[1] : total[0]} * clip_dec * clip_dec, of_bias);
      else
        add_squares(squares, total[3], total[0], of_bias);
    }

    // Steps. dec becomes the decoder's new row, which waits for its norm.
    // What gradients are multiplied by is not live in there, where registers are scarce.
    BiasStep<T, BiasMoment<Moment>> b;
    if (threadIdx.x == 0) b.load(u.bias, latent);
    {
      const float by_dec = clip_dec * u.step.grad_scale(), by_enc = clip_enc * u.step.grad_scale();
#pragma unroll
      for (int j = 0; j < COUNT<STEPS>; ++j) {
        const int c = column(j);
        float of_w[4] = {};
        if (u.unit_norm && !projected && inside<STEPS>(c, D_out)) load_four(w + c, of_w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (u.unit_norm && !projected) dec[j][i] = fmaf(-along, of_w[i], dec[j][i]);
          dec[j][i] *= by_dec;
          enc[j][i] *= by_enc;
        }
      }
    }
    float scales[COUNT<STEPS>][2];
    load_scales<STEPS>(u.dec, latent, D_out, scales);
    stages.template wait<1>(REST, use);
    if (u.pre_bias && !u.tied()) {
#pragma unroll
      for (int j = 0; j < COUNT<STEPS>; ++j) {
        if (!inside<STEPS>(column(j), D_in)) continue;
        float p[4];
        load_four(staged.enc() + column(j), p);
#pragma unroll
        for (int i = 0; i < 4; ++i) pre_bias[j][i] = fmaf(bias, p[i], pre_bias[j][i]);
      }
    }
    float square[1] = {};
    by_rule<Moment>(u.step.rule, [&](auto rule) {
      if constexpr (rule.value == Rule::lion && std::is_same_v<Moment, bf16>) return;  // update_wide.cu: rows_are_staged
      // Else the compiler reads the row ahead of the choice, since every rule does, and spills it.
      __syncwarp();
      const Stepper stepper = u.step.stepper();
#pragma unroll
      for (int j = 0; j < COUNT<STEPS>; ++j) {
        const int c = column(j);
        const bool in = inside<STEPS>(c, D_out);
        float p[4] = {};
        if (in) load_four(w + c, p);
        step_four<rule.value>(u.dec, stepper, latent, D_out, c, in, staged.m_dec(), staged.v_dec(), scales[j], dec[j], p);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          square[0] = fmaf(p[i], p[i], square[0]);
          dec[j][i] = p[i];
        }
      }
      if (u.tied()) return;
      load_scales<STEPS>(u.enc, latent, D_in, scales);
#pragma unroll
      for (int j = 0; j < COUNT<STEPS>; ++j) {
        const int c = column(j);
        const bool in = inside<STEPS>(c, D_in);
        float p[4] = {};
        if (in) load_four(staged.enc() + c, p);
        step_four<rule.value>(u.enc, stepper, latent, D_in, c, in, staged.m_enc(), staged.v_enc(), scales[j], enc[j], p);
        if (in) stream_weights(u.enc.p + int64_t{latent} * D_in + c, p, 1.f);
      }
    });

    // The barrier in add is also the one behind which no thread reads the staged rows. The next ones are begun where the
    // fewest registers are in use.
    if (u.unit_norm) sums.add(square);
    else __syncthreads();
    const float scale = u.unit_norm ? to_unit(square[0]) : 1.f;
#pragma unroll
    for (int j = 0; j < COUNT<STEPS>; ++j) {
      const int c = column(j);
      if (inside<STEPS>(c, D_out) && u.step.rule != Rule::none)
        stream_weights(u.dec.p + int64_t{latent} * D_out + c, dec[j], scale);
    }
    begin_rest(int64_t{latent} + R);
    begin_dec(latent + 2 * int64_t{R}, use % 2);
    if (threadIdx.x == 0) b.finish(u.bias, latent, of_bias, u.step);
  }

  // Sums over this block's latents.
  if (u.pre_bias) {
#pragma unroll
    for (int j = 0; j < COUNT<STEPS>; ++j)
      if (inside<STEPS>(column(j), D_in)) store_four(u.pre_bias + int64_t{blockIdx.x} * D_in + column(j), pre_bias[j]);
  }
  if (threadIdx.x == 0) store_squares(squares, u.stats);
}

// Calls f with the STEPS that suit the rows, and the threads.
template <class F> void by_steps(int64_t D_in, int64_t D_out, F f) {
  const auto [steps, threads] = staged_shape(D_in, D_out);
  if (steps == 4) f(std::integral_constant<int, 4>{}, static_cast<unsigned>(threads));
  else if (steps == 3) f(std::integral_constant<int, 3>{}, static_cast<unsigned>(threads));
  else f(std::integral_constant<int, 0>{}, static_cast<unsigned>(threads));
}

}  // namespace

template <class T, class Moment>
void update_rows(const Where& where, const LatentEntries<T>& entries, const Pieces& pieces, const PieceSums& sums,
                 const Update<T, Moment>& u, int64_t programs) {
  const size_t shared = staged_bytes(sizeof(T), sizeof(Moment), moments_of(u.step.rule), u.tied(), u.D_in, u.D_out);
  by_steps(u.D_in, u.D_out, [&](auto steps, unsigned threads) {
    constexpr int STEPS = decltype(steps)::value;
    const Shape shape{dim3(programs), dim3(threads), shared};
    foresee(where, "update_rows", update_rows_kernel<STEPS, T, Moment>, shape);
    if (pieces.first)
      launch(where, "row_pieces", row_pieces_kernel<STEPS, T>, {dim3(pieces.capacity), dim3(threads)}, entries, pieces, sums,
             u.dec.p, u.D_in, u.D_out);
    launch(where, "update_rows", update_rows_kernel<STEPS, T, Moment>, shape, entries, pieces, sums, u);
  });
}

#define FOR(T, Moment)                                                                                                       \
  template void update_rows(const Where&, const LatentEntries<T>&, const Pieces&, const PieceSums&, const Update<T, Moment>&, \
                            int64_t);
#define FOR_WEIGHT(T) FOR(T, float) FOR(T, bf16) FOR(T, fp8)
FOR_WEIGHT(float)
FOR_WEIGHT(bf16)
FOR_WEIGHT(f16)

}  // namespace fastsae
