// One thread's panel of tokens against all packed latents: the interface between the encoders and the screening kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "encode.h"
#include "simd.h"

namespace fastsae::FASTSAE_ISA {

// Numbers that begin with a cache line: a tile or a vector loaded from them never straddles two.
template <class T> struct Lines {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};
template <class T> using Aligned = std::vector<T, Lines<T>>;

// Per latent, in packed order, what turns a raw product into the upper bound
// u = mult·token_scale·product + bias + token_error·norm + token_norm·residual + slack.
struct LatentTerms {
  Aligned<float> mult, bias, norm, residual, slack;   // slack: rounding of the bias, part of the bound
};

// A panel of tokens, narrowed and packed for one kernel in groups of `group` tokens: [words][group], or tile by tile.
struct Panel {
  int64_t count = 0;
  Aligned<uint32_t> words;
  std::vector<float> scale, error, norm;
  std::vector<int32_t> correction;
};

// Per token a short list of latents whose bound passed the token's bar; the bar rises when the list has outgrown its room.
// A list that stays long in spite of that gets more room, up to its capacity.
struct Lists {
  int64_t capacity, keep;
  std::unique_ptr<float[]> value;     // [count][capacity] the bound u; unset past `size`, so what is not used is not touched
  std::unique_ptr<int32_t[]> where;   // [count][capacity] packed position
  std::vector<int32_t> size, room;    // a list that has no room for 16 more is pruned
  std::vector<float> bar;             // a latent is left out only if u <= bar
  std::vector<uint8_t> spilled;       // the list could not hold all that passed: decide this token another way

  Lists(int64_t count, int64_t capacity_, int64_t keep_)
      : capacity(capacity_), keep(keep_), value(new float[count * capacity_]), where(new int32_t[count * capacity_]) {
    reset(count, capacity_);
  }
  void reset(int64_t count, int64_t first_room) {
    size.assign(count, 0), bar.assign(count, 0.f), spilled.assign(count, 0);
    give_room(first_room);
  }
  void give_room(int64_t first_room) { room.assign(size.size(), int32_t(std::min(first_room, capacity))); }
};

// Where bars are given and only they may leave out latents: those that passed, in (tile, token, position) order.
struct Sieve {
  const float* bar;      // [count] a latent is left out only if u <= bar
  int64_t first;         // packed position that counts as 0
  uint32_t* found;       // token << 16 | position - first; has room for all, and for a vector more
  int64_t size = 0;
};

// Which tiles a pass visits: every step-th from `first`, or all the others, up to `end`.
struct Tiles {
  int64_t first = 0, step = 1;
  bool others = false;
  int64_t end = std::numeric_limits<int64_t>::max();

  int64_t begin() const { return others ? next(-1) : first; }
  int64_t next(int64_t tile) const {
    if (!others) return tile + step;
    return tile + 1 + ((tile + 1) % step == first);
  }
};

struct ScreenCall {
  const Screen& screen;
  const EncodeArgs& args;       // f32 packs its tiles from args.W
  const LatentTerms& terms;
  const Panel& panel;
  Tiles tiles;
  bool bounded;                 // false: u is ŝ itself ("screened" precision)
  bool guessing = false;        // bars rise with the estimates ŝ, not with what is certain: see guess_bars
};

// One format's kernel: how tokens are narrowed, and the pass over the latents, into lists or through a sieve.
struct ScreenKernel {
  int64_t group;
  void (*pack)(const Screen& screen, const float* const* rows, int64_t count, Panel& panel);
  void (*pass)(const ScreenCall& call, Lists& lists);
  void (*sift)(const ScreenCall& call, Sieve& sieve);
  int64_t (*most_tokens)(int64_t words) = nullptr;   // that a panel should hold; null: the usual number
  bool from_bias = false;       // the bias is the first term of the sum, and takes part in its roundings
};

// How far an estimate ŝ of a latent at a packed position is from its score at most; 0 where scores are not bounded.
inline float error_bound(const ScreenCall& call, int64_t token, int64_t position) {
  const LatentTerms& t = call.terms;
  if (!call.bounded) return 0.f;
  return call.panel.error[token] * t.norm[position] + call.panel.norm[token] * t.residual[position] + t.slack[position];
}

// Makes room in a full list of one token. At least `keep` latents are known to score no less than the keep-th largest lower
// bound (or, guessing, the keep-th largest estimate): a latent whose upper bound is not above it is out.
void prune(const ScreenCall& call, Lists& lists, int64_t token);

extern const ScreenKernel screen_f32;
#if defined(__AVX512F__)
extern const ScreenKernel screen_i8, screen_bf16, screen_amx, screen_amx_emulated;
#endif

}  // namespace fastsae::FASTSAE_ISA
