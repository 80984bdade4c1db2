// What the kernels share that step latents' rows: update_rows.cu, which keeps them in registers, and update_wide.cu.
//
// The rules are here: where an entry's rows are, how a row's gradient is projected, and what a program leaves behind.
#pragma once
#include "launch.h"
#include "optimizers.h"
#include "pieces.h"

namespace fastsae {

constexpr int ENTRIES_AT_ONCE = 4;  // whose rows are in flight together, and whose dots one block_sum adds

// The occupied slots of all terms in latent order. Row r is row r of x and grad, or from `split` on row r - split of more_x
// and more_grad, which are null with one term. dacts: given gradients of the pre-acts; null where kernels compute them.
template <class S> struct LatentEntries {
  const int64_t* starts;
  const int32_t* rows;
  const float *acts, *dacts;
  const S *x, *more_x, *grad, *more_grad;
  int64_t split;

  __device__ int64_t begin(int64_t i) const { return starts[i]; }
  __device__ int64_t end(int64_t i) const { return starts[i + 1]; }
  __device__ static const S* row_of(const S* first, const S* second, int64_t split, int64_t row, int64_t D) {
    return second && row >= split ? second + (row - split) * D : first + row * D;
  }
  __device__ const S* x_row(int64_t e, int64_t D) const { return row_of(x, more_x, split, rows[e], D); }
  __device__ const S* grad_row(int64_t e, int64_t D) const { return row_of(grad, more_grad, split, rows[e], D); }
};

// What pieces of long latents add: rows (capacity, D_out + D_in) and biases (capacity,), or nulls.
struct PieceSums {
  float *rows, *biases;
};

// What is added to the gradients besides the entries, each null where there is none: reference.Parts. `bias` comes before the
// pre-bias term, db_enc does not.
struct Parts {
  const float *pull, *db_enc, *enc, *dec, *bias;
  int64_t segments;  // of a row of pull

  __device__ float pulled(int64_t i, int64_t c, int64_t D_out, float w) const {
    return pull[i * segments + c / (D_out / segments)] * w;
  }
};

template <class Moment> using BiasMoment = std::conditional_t<std::is_same_v<Moment, fp8>, float, Moment>;

template <class T, class Moment> struct Update {
  Stepped<T, Moment> enc, dec;  // enc.p is null where the dictionaries are tied
  Stepped<T, BiasMoment<Moment>> bias;
  Parts parts;
  int64_t latents, D_in, D_out;
  Step step;
  float* pre_bias;  // (programs, D_in), or null
  double* stats;    // (programs, 4)
  float clip_rows;  // a norm, or 0: none
  bool unit_norm;

  __host__ __device__ bool tied() const { return !enc.p; }
  // A step that is skipped has no latents: a kernel that goes over them has nothing to write.
  __device__ int64_t latents_to_update() const { return step.skipped() ? 0 : latents; }
  // Whether the norm of W_dec's gradient is wanted after its projection, and not only before.
  __device__ bool projects_first() const { return unit_norm && (clip_rows > 0.f || step.rule == Rule::none); }
  // What a gradient with this square is multiplied by to be no longer than clip_rows.
  __device__ float clip(float square) const {
    const float norm = __fsqrt_rn(square);
    return clip_rows > 0.f && norm > clip_rows ? clip_rows / norm : 1.f;
  }
};

// The part of a row's gradient along the row, in units of the row. A row of 0 keeps its gradient.
__device__ inline float part_along(float dot, float square) { return dot / (square > 0.f ? square : 1.f); }

// What a new row is multiplied by to have norm 1; a row of 0 stays 0.
__device__ inline float to_unit(float square) {
  const float norm = __fsqrt_rn(square);
  return 1.f / (norm > 0.f ? norm : 1.f);
}

// The step of a bias' number i, by one thread, which loads it long before.
template <class T, class Moment> struct BiasStep {
  float p, m, v;

  __device__ void load(const Stepped<T, Moment>& bias, int64_t i) {
    p = widen(bias.p[i]);
    m = bias.m ? widen(bias.m[i]) : 0.f;
    v = bias.v ? widen(bias.v[i]) : 0.f;
  }
  __device__ void finish(const Stepped<T, Moment>& bias, int64_t i, float g, const Step& step) {
    const uint32_t at = bias.keys.before + static_cast<uint32_t>(i);
    by_rule<Moment>(step.rule, [&](auto rule) {
      step.stepper().template step<rule.value>(p, g * step.grad_scale(), m, v);
      bias.p[i] = round_to<T>(p);
      if constexpr (HAS_M<rule.value>) bias.m[i] = round_moment<Moment>(m, bias.keys.m(), at);
      if constexpr (HAS_V<rule.value>) bias.v[i] = round_moment<Moment>(v, bias.keys.v(), at);
    });
  }
};

// Squared norms of a program's gradients, in shared memory: one thread's, and not worth its registers.
using Squares = double[3];

__device__ inline void add_squares(Squares& squares, double enc, double dec, double bias) {
  squares[0] += enc;
  squares[1] += dec;
  squares[2] += bias * bias;
}

__device__ inline void store_squares(const Squares& squares, double* stats) {
  for (int i = 0; i < 4; ++i) stats[4 * int64_t{blockIdx.x} + i] = i < 3 ? squares[i] : 0.0;
}

// Sums over a block of whole warps in one order, known to every thread, with one barrier each: two buffers take turns.
struct BlockSums {
  static constexpr int MOST = ENTRIES_AT_ONCE, WARPS = 16;
  using Memory = float[2][MOST][WARPS];

  float (*memory)[MOST][WARPS];
  int turn = 0;

  template <int COUNT> __device__ void add(float (&t)[COUNT]) {
    static_assert(COUNT <= MOST);
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      t[j] = warp_sum(t[j]);
      if (lane() == 0) memory[turn][j][warp()] = t[j];
    }
    __syncthreads();
    const int warps = blockDim.x / WARP;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) t[j] = warp_sum(lane() < warps ? memory[turn][j][lane()] : 0.f);
    turn ^= 1;
  }
};

// -- the host's side -----------------------------------------------------------------------------------------------------

// Calls f with a value of the C++ type of a dictionary's moment; float where the rule keeps none.
template <class F> void by_moment(const Maybe& moment, F f) {
  const Dtype dtype = moment ? moment->dtype : Dtype::f32;
  if (dtype == Dtype::f32) return f(float{});
  if (dtype == Dtype::bf16) return f(bf16{});
  if (dtype == Dtype::f8) return f(fp8{});
  throw std::invalid_argument("there is no kernel for moments of this dtype, expected float32, bfloat16 or float8_e4m3fn");
}

inline Step step_of(int64_t rule, const Array& numbers, double eps, double beta1, double rest1, double beta2, double rest2) {
  const auto narrow = [](double t) { return static_cast<float>(t); };
  fit("numbers", numbers, 5);
  return {numbers.as<float>(), narrow(eps), {narrow(beta1), narrow(rest1), narrow(beta2), narrow(rest2)}, rule_of(rule)};
}

// Bytes of shared memory that a latent's rows take on their way (update_rows.cu), from those of a weight and of a moment.
inline int64_t staged_bytes(int64_t weight, int64_t moment, int64_t kept, bool tied, int64_t D_in, int64_t D_out) {
  return D_out * (2 * weight + kept * moment) + (tied ? 0 : D_in * (weight + kept * moment));
}

// How update_rows.cu shares the columns of a row: fours of a thread, and steps that fill a row with them, or 0 where none do.
constexpr int FOURS = 4;
struct StagedShape {
  int64_t steps, threads;
};
inline StagedShape staged_shape(int64_t D_in, int64_t D_out) {
  const auto fill = [&](int64_t steps) { return D_in == D_out && D_in % (4 * steps * WARP) == 0; };
  if (fill(4)) return {4, D_out / 16};
  if (fill(3)) return {3, D_out / 12};
  return {0, ceil_div(std::max(D_in, D_out), 4 * FOURS * WARP) * WARP};
}
// 128 registers a thread are 512 threads on a multiprocessor in any number of blocks: eight blocks of two warps at 768 columns.
// Columns with a bound, and rounding to 8 bits, take 168: rows of 6144 columns at most.
constexpr int most_threads(int64_t steps, bool eight_bit) { return steps && !eight_bit ? 512 : 384; }

// Both check the launch (foresee) before they change anything. update_rows.cu: for rows of whole 16 bytes, at most
// 16 · most_threads of them, that fit.
template <class T, class Moment>
void update_rows(const Where&, const LatentEntries<T>&, const Pieces&, const PieceSums&, const Update<T, Moment>&,
                 int64_t programs);
// update_wide.cu: any rows. dacts (slots,) float; scratch (programs, D_out) float.
template <class T, class S, class Moment>
void update_wide(const Where&, const LatentEntries<S>&, const Pieces&, const PieceSums&, const Update<T, Moment>&,
                 int64_t programs, float* dacts, float* scratch);
// update_bias.cu: throws where any of what steps b_dec afterwards could not be launched.
void foresee_bias(const Where&, Dtype weight, const Maybe& moment);

}  // namespace fastsae
