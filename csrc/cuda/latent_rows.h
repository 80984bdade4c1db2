// What the kernels share that step latents' rows: update_rows.cu, which keeps them in registers, and update_wide.cu.
//
// The rules are here: where an entry's rows are, how a row's gradient is projected, and what a program leaves behind.
#pragma once
#include "adam.h"
#include "launch.h"
#include "pieces.h"

namespace fastsae {

constexpr int ENTRIES_AT_ONCE = 4;  // whose rows are in flight together, and whose dots one block_sum adds

// The occupied slots of all terms in latent order. Row r is row r of x and grad, or from `split` on row r - split of more_x
// and more_grad, which are null with one term.
template <class S> struct LatentEntries {
  const int64_t* starts;
  const int32_t* rows;
  const float* acts;
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

template <class T, class Moment> struct Stepped {  // one parameter, its moments and its keys
  T* p;
  Moment *m, *v;
  Keys keys;
};

template <class T, class Moment> struct Update {
  Stepped<T, Moment> enc, dec, bias;  // enc.p is null where the dictionaries are tied
  int64_t latents, D_in, D_out;
  Step step;
  float* pre_bias;  // (programs, D_in), or null
  double* stats;    // (programs, 4)
  bool unit_norm;

  __host__ __device__ bool tied() const { return !enc.p; }
  // A step that is skipped has no latents: a kernel that goes over them has nothing to write.
  __device__ int64_t latents_to_update() const { return step.skipped() ? 0 : latents; }
};

// The part of a row's gradient along the row, in units of the row. A row of 0 keeps its gradient.
__device__ inline float part_along(float dot, float square) { return dot / (square > 0.f ? square : 1.f); }

// What a new row is multiplied by to have norm 1; a row of 0 stays 0.
__device__ inline float to_unit(float square) {
  const float norm = __fsqrt_rn(square);
  return 1.f / (norm > 0.f ? norm : 1.f);
}

// The step of b_enc's number i, by one thread, which loads it long before.
template <class T, class Moment> struct BiasStep {
  float p, m, v;

  __device__ void load(const Stepped<T, Moment>& bias, int64_t i) {
    p = widen(bias.p[i]);
    m = widen(bias.m[i]);
    v = widen(bias.v[i]);
  }
  __device__ void finish(const Stepped<T, Moment>& bias, int64_t i, float g, const Adam& adam) {
    const uint32_t at = static_cast<uint32_t>(i);
    adam(p, g, m, v);
    bias.p[i] = round_to<T>(p);
    bias.m[i] = round_moment<Moment>(m, bias.keys.of, bias.keys.m(), at);
    bias.v[i] = round_moment<Moment>(v, bias.keys.of, bias.keys.v(), at);
  }
};

// Squared norms of a program's gradients before projection, in shared memory: one thread's, and not worth its registers.
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

// Calls f with a value of the C++ type of a moment.
template <class F> void by_moment(Dtype dtype, F f) {
  if (dtype == Dtype::f32) return f(float{});
  if (dtype == Dtype::bf16) return f(bf16{});
  throw std::invalid_argument("there is no kernel for moments of this dtype, expected float32 or bfloat16");
}

inline Step step_of(const Array& numbers, double eps, double beta1, double rest1, double beta2, double rest2) {
  const auto narrow = [](double t) { return static_cast<float>(t); };
  return {numbers.as<float>(), narrow(eps), {narrow(beta1), narrow(rest1), narrow(beta2), narrow(rest2)}};
}

// Bytes of shared memory that a latent's rows take on their way (update_rows.cu), from those of a weight and of a moment.
inline int64_t staged_bytes(int64_t weight, int64_t moment, bool tied, int64_t D_in, int64_t D_out) {
  return D_out * 2 * (weight + moment) + (tied ? 0 : D_in * (weight + 2 * moment));
}

constexpr int64_t STAGED_COLUMNS = 8192;  // the most of a row in registers

// Both check the launch (foresee) before they change anything. update_rows.cu: for rows of whole 16 bytes, at most
// STAGED_COLUMNS of them, that fit.
template <class T, class Moment>
void update_rows(const Where&, const LatentEntries<T>&, const Pieces&, const PieceSums&, const Update<T, Moment>&,
                 int64_t programs);
// update_wide.cu: any rows. dacts (slots,) float; scratch (programs, D_out) float.
template <class T, class S, class Moment>
void update_wide(const Where&, const LatentEntries<S>&, const Pieces&, const PieceSums&, const Update<T, Moment>&,
                 int64_t programs, float* dacts, float* scratch);
// update_bias.cu: throws where any of what steps b_dec afterwards could not be launched.
void foresee_bias(const Where&, Dtype weight, Dtype moment);

}  // namespace fastsae
