// Screening in bf16 on the AMX units: 32 tokens x 32 latents at once, as two by two of the unit's tiles (16 rows of 64 bytes).
//
// Both operands lie tile by tile, 1 KB each, so a tile load reads 16 lines that follow each other: rows of x at a stride of
// D = 1024 or 4096 would all fall into one set of L1. D is cut into parts: what a part holds of 32 latents (16 KB) stays in L1
// while all tokens of the panel come past it from L2, and their sums wait in L2 for the next part. The latents of the next tile
// come from L3 meanwhile. A product starts from the latent's bias. Its scores are stored once and compared while the unit
// works on the next group, each with one bar per token and tile: the lowest score that any of the 32 bounds could lift over
// the token's bar. The bound itself is computed only for what passes.
//
// The tile instructions come through a `Unit`, so that the same loop runs on a software twin where there is no AMX: the twin
// is what tests use to prove the packing and the loop on any machine.
#include <immintrin.h>
#include <unistd.h>

#include "narrow.h"
#include "registry.h"
#include "screen_kernel.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int64_t kRows = 16, kWords = 16, kTileWords = kRows * kWords;   // of one of the unit's tiles
constexpr int64_t kGroup = 2 * kRows;                                     // tokens multiplied at once
constexpr int64_t kLatents = kBlocksPerTile * kLanes;                     // and latents
constexpr int64_t kPart = 8;                // tiles along D in a part: 16 KB of 32 latents, of the 48 KB of L1
constexpr int64_t kMostTokens = 512;        // in a panel
constexpr int64_t kUsualL2 = 2 << 20;

// gcc 12 drops stores to a local array handed to _tile_loadconfig; a static one is safe. Nor do its tile loads say that they
// read memory: what they load here was written in other functions, or by tile stores, which do.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kConfig;

// Tiles 0-3 are sums: [upper, lower 16 tokens][first, second block of latents]. 4 and 5 hold tokens, 6 and 7 latents.
struct Hardware {
  void begin() { _tile_loadconfig(&kConfig); }
  void end() { _tile_release(); }
  void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // Each token starts from the same numbers: a stride of 0.
  void start(const float* bias) {
    _tile_loadd(0, bias, 0);
    _tile_loadd(1, bias + kLanes, 0);
    _tile_loadd(2, bias, 0);
    _tile_loadd(3, bias + kLanes, 0);
  }
  void resume(const float* sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTileWords, 64);
    _tile_loadd(2, sums + 2 * kTileWords, 64);
    _tile_loadd(3, sums + 3 * kTileWords, 64);
  }
  void park(float* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTileWords, 64);
    _tile_stored(2, sums + 2 * kTileWords, 64);
    _tile_stored(3, sums + 3 * kTileWords, 64);
  }
  void upper(const uint32_t* x0, const uint32_t* w0, const uint32_t* w1) {
    _tile_loadd(4, x0, 64);
    _tile_loadd(6, w0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w1, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  void lower(const uint32_t* x1) {
    _tile_loadd(5, x1, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  void finish(float* scores) {   // [kGroup][kLatents]
    _tile_stored(0, scores, 128);
    _tile_stored(1, scores + kLanes, 128);
    _tile_stored(2, scores + kRows * kLatents, 128);
    _tile_stored(3, scores + kRows * kLatents + kLanes, 128);
  }
};

// The same tiles in memory, and the products as Intel's manual defines them: even and odd numbers of a row are summed apart,
// from 0, with fused multiply-adds; denormals are 0 wherever they come or go.
struct Twin {
  alignas(64) float sum[4][kRows][kLanes];
  alignas(64) uint32_t tokens[2][kTileWords], latents[2][kTileWords];

  static __m512 flush(__m512 v) {
    const __m512i size = _mm512_and_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(size, _mm512_set1_epi32(0x00800000)), v);
  }
  static __m512 even(__m512i words) { return flush(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))); }
  static __m512 odd(__m512i words) {
    return flush(_mm512_castsi512_ps(_mm512_and_epi32(words, _mm512_set1_epi32(int32_t(0xffff0000)))));
  }
  void multiply(int to, const uint32_t* a, const uint32_t* b) {
    for (int64_t r = 0; r < kRows; ++r) {
      __m512 first = _mm512_setzero_ps(), second = first;
      for (int64_t k = 0; k < kWords; ++k) {
        const __m512i x = _mm512_set1_epi32(int32_t(a[r * kWords + k])), w = _mm512_load_si512(b + k * kLanes);
        first = flush(_mm512_fmadd_ps(even(x), even(w), first));
        second = flush(_mm512_fmadd_ps(odd(x), odd(w), second));
      }
      const __m512 before = flush(_mm512_load_ps(sum[to][r]));
      _mm512_store_ps(sum[to][r], flush(_mm512_add_ps(before, flush(_mm512_add_ps(first, second)))));
    }
  }
  void begin() {}
  void end() {}
  void clear() { std::memset(sum, 0, sizeof sum); }
  void start(const float* bias) {
    for (int i = 0; i < 4; ++i)
      for (int64_t r = 0; r < kRows; ++r) std::memcpy(sum[i][r], bias + i % 2 * kLanes, 64);
  }
  void resume(const float* sums) { std::memcpy(sum, sums, sizeof sum); }
  void park(float* sums) { std::memcpy(sums, sum, sizeof sum); }
  void upper(const uint32_t* x0, const uint32_t* w0, const uint32_t* w1) {
    std::memcpy(tokens[0], x0, sizeof tokens[0]);
    std::memcpy(latents[0], w0, sizeof latents[0]), std::memcpy(latents[1], w1, sizeof latents[1]);
    multiply(0, tokens[0], latents[0]), multiply(1, tokens[0], latents[1]);
  }
  void lower(const uint32_t* x1) {
    std::memcpy(tokens[1], x1, sizeof tokens[1]);
    multiply(2, tokens[1], latents[0]), multiply(3, tokens[1], latents[1]);
  }
  void finish(float* scores) {
    for (int i = 0; i < 4; ++i)
      for (int64_t r = 0; r < kRows; ++r) std::memcpy(scores + (i / 2 * kRows + r) * kLatents + i % 2 * kLanes, sum[i][r], 64);
  }
};

// Of the 32 latents of a tile, what serves all of them.
struct Summary {
  bool from_bias;                // every score is counted once, so its product may start from the bias
  float norm, residual, slack;   // the largest
};

Summary summarize(const LatentTerms& terms, int64_t at) {
  const auto largest = [](const float* v) {
    const vec<float> a = load(v), b = load(v + kLanes), both = a > b ? a : b;
    float top = 0;
    for (int64_t l = 0; l < kLanes; ++l) top = std::max(top, both[l]);
    return top;
  };
  bool from_bias = true;
  for (int64_t i = at; i < at + kLatents; i += kLanes) {
    const __mmask16 once = _mm512_cmpeq_ps_mask(_mm512_load_ps(&terms.mult[i]), _mm512_set1_ps(1.f));
    const __m512 never = _mm512_set1_ps(-std::numeric_limits<float>::infinity());   // masked, or padding
    from_bias &= (once | _mm512_cmpeq_ps_mask(_mm512_load_ps(&terms.bias[i]), never)) == 0xffff;
  }
  return {from_bias, largest(&terms.norm[at]), largest(&terms.residual[at]), largest(&terms.slack[at])};
}

// The scores ŝ of one group of tokens and one tile of latents, as they wait to be compared.
struct Waiting {
  alignas(64) float scores[kGroup * kLatents];
  alignas(64) float bars[kGroup];       // a score up to this one is left out
  alignas(64) uint32_t passed[kGroup];  // what was not, one bit a latent
  int64_t first, live, tile;            // first token, tokens, position of the first latent / 32
};

// No latent of the tile has a bound above the token's bar if its score is not above bars[t]. Bounds of infinity or NaN let all
// pass, and a bar of infinity only NaN.
void set_bars(const ScreenCall& call, const Summary& s, const float* bar, Waiting& out) {
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  for (int64_t h = 0; h < kGroup; h += kLanes) {
    const int64_t live = std::clamp<int64_t>(out.live - h, 0, kLanes);
    const __m512 given = _mm512_maskz_loadu_ps(__mmask16((1u << live) - 1), bar + h);
    __m512 most = _mm512_setzero_ps();
    if (call.bounded) {
      const __m512 error = _mm512_loadu_ps(&call.panel.error[out.first + h]);
      const __m512 size = _mm512_loadu_ps(&call.panel.norm[out.first + h]);
      most = _mm512_fmadd_ps(error, _mm512_set1_ps(s.norm), _mm512_set1_ps(s.slack));
      most = _mm512_fmadd_ps(size, _mm512_set1_ps(s.residual), most);
    }
    // More than the roundings here and in the bound.
    const __m512 rounding = _mm512_mul_ps(_mm512_add_ps(_mm512_abs_ps(given), most), _mm512_set1_ps(0x1p-20f));
    const __m512 below = _mm512_sub_ps(_mm512_sub_ps(given, most), rounding);
    const __mmask16 finite = _mm512_cmp_ps_mask(most, infinity, _CMP_LT_OQ);
    const __mmask16 closed = _mm512_mask_cmpeq_ps_mask(finite, given, infinity);
    const __m512 open = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
    _mm512_store_ps(out.bars + h, _mm512_mask_mov_ps(_mm512_mask_mov_ps(open, finite, below), closed, infinity));
  }
}

// Two tokens' scores compared with their bars: NaN passes.
FASTSAE_INLINE void compare(Waiting& w, int64_t token) {
  for (int64_t t = token; t < token + 2; ++t) {
    const __m512 bar = _mm512_set1_ps(w.bars[t]);
    const __mmask16 first = _mm512_cmp_ps_mask(_mm512_load_ps(w.scores + t * kLatents), bar, _CMP_NLE_UQ);
    const __mmask16 second = _mm512_cmp_ps_mask(_mm512_load_ps(w.scores + t * kLatents + kLanes), bar, _CMP_NLE_UQ);
    w.passed[t] = _cvtmask32_u32(_mm512_kunpackw(second, first));
  }
}

// The bounds of what passed, against the tokens' own bars.
template <class Sink> __attribute__((noinline)) void settle(const ScreenCall& call, Sink& sink, const Waiting& w) {
  uint32_t tokens = 0;
  for (int64_t h = 0; h < kGroup; h += kLanes) {
    const __m512i passed = _mm512_load_si512(w.passed + h);
    tokens |= uint32_t(_mm512_test_epi32_mask(passed, passed)) << h;
  }
  if (w.live < kGroup) tokens &= (1u << w.live) - 1;
  for (; tokens; tokens &= tokens - 1) {
    const int64_t in_group = __builtin_ctz(tokens), t = w.first + in_group;
    for (int64_t b = 0; b < kBlocksPerTile; ++b) {
      if (!(w.passed[in_group] >> b * kLanes & 0xffff)) continue;
      const int64_t at = w.tile * kLatents + b * kLanes;
      vec<float> u = load(w.scores + in_group * kLatents + b * kLanes);
      if (call.bounded)
        u += load(&call.terms.slack[at]) + splat(call.panel.error[t]) * load(&call.terms.norm[at]) +
             splat(call.panel.norm[t]) * load(&call.terms.residual[at]);
      if (const unsigned mask = above(u, sink.bar[t])) take(call, sink, t, u, mask, at);
    }
  }
}

// The lines of the next tile of latents, to be asked for in equal shares.
struct Fetch {
  const char *next = nullptr, *end = nullptr;
  int64_t share = 0;

  Fetch(const ScreenCall& call, int64_t tile, int64_t shares) {
    if (tile >= end_tile(call) || !shares) return;
    const int64_t bytes = kLatents * call.screen.words_per_row * 4;
    next = reinterpret_cast<const char*>(call.screen.words) + tile * bytes, end = next + bytes;
    share = (bytes / 64 + shares - 1) / shares;
  }
  FASTSAE_INLINE void some() {
    for (int64_t i = 0; i < share && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

struct alignas(64) Parked {
  float sums[kGroup * kLatents];
};

template <class Unit, class Sink> void amx_pass(const ScreenCall& call, Sink& sink) {
  const int64_t words = call.screen.words_per_row, steps = words / kWords, end = end_tile(call);
  const int64_t groups = (call.panel.count + kGroup - 1) / kGroup;
  const int64_t parts = std::max<int64_t>(1, (steps + kPart - 1) / kPart);   // as even as they come
  const std::unique_ptr<Parked[]> parked(parts > 1 ? new Parked[groups] : nullptr);
  Unit unit;
  Waiting turns[2];
  Waiting* waiting = turns;
  int64_t compared = kGroup;   // of its tokens; all: there is nothing to compare
  unit.begin();
  for (int64_t tile = call.tiles.begin(); tile < end; tile = call.tiles.next(tile)) {
    const uint32_t* w0 = call.screen.words + tile * kLatents * words;
    const uint32_t* w1 = w0 + kLanes * words;
    const float *mult = &call.terms.mult[tile * kLatents], *bias = &call.terms.bias[tile * kLatents];
    const Summary latents = summarize(call.terms, tile * kLatents);
    Fetch fetch(call, call.tiles.next(tile), groups * steps);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t from = steps * part / parts * kTileWords, to = steps * (part + 1) / parts * kTileWords;
      for (int64_t g = 0; g < groups; ++g) {
        const uint32_t* x0 = call.panel.words.data() + g * kGroup * words;
        const uint32_t* x1 = x0 + kRows * words;
        if (part) unit.resume(parked[g].sums);
        else if (latents.from_bias) unit.start(bias);
        else unit.clear();
        const bool is_waiting = compared < kGroup;
        for (int64_t k = from; k < to; k += kTileWords) {
          unit.upper(x0 + k, w0 + k, w1 + k);
          if (compared < kGroup) compare(*waiting, compared), compared += 2;
          unit.lower(x1 + k);
          if (compared < kGroup) compare(*waiting, compared), compared += 2;
          fetch.some();
        }
        if (is_waiting) {
          for (; compared < kGroup; compared += 2) compare(*waiting, compared);
          settle(call, sink, *waiting);
        }
        if (part + 1 < parts) {
          unit.park(parked[g].sums);
          continue;
        }
        waiting = waiting == turns ? turns + 1 : turns;
        unit.finish(waiting->scores);
        if (!latents.from_bias)
          for (int64_t i = 0; i < kGroup * kLatents; i += kLanes) {
            const __m512 product = _mm512_load_ps(waiting->scores + i), gain = _mm512_load_ps(mult + i % kLatents);
            _mm512_store_ps(waiting->scores + i, _mm512_fmadd_ps(gain, product, _mm512_load_ps(bias + i % kLatents)));
          }
        waiting->first = g * kGroup, waiting->live = std::min(kGroup, call.panel.count - g * kGroup), waiting->tile = tile;
        set_bars(call, latents, &sink.bar[g * kGroup], *waiting);
        compared = 0;
      }
    }
  }
  if (compared < kGroup) {
    for (; compared < kGroup; compared += 2) compare(*waiting, compared);
    settle(call, sink, *waiting);
  }
  unit.end();
}

// Half of L2 for the tokens; the other half for the sums that wait, two tiles of latents and the lists.
int64_t most_tokens(int64_t words) {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE), level2 = found > 0 ? found : kUsualL2;
#else
  constexpr int64_t level2 = kUsualL2;
#endif
  const int64_t fitting = level2 / 2 / std::max<int64_t>(1, words * 4);
  return std::clamp(fitting / kGroup * kGroup, kGroup, kMostTokens);
}

struct AmxTokens {
  static constexpr int kGroup = 2 * kRows;
  static constexpr bool kInterleaved = false;
  static Narrowed narrow(const float* v, int64_t d, uint32_t* words) { return narrow_bf16(v, d, words); }
  // Token t of a group, tile by tile.
  static void place(const uint32_t* row, int64_t words, int64_t t, uint32_t* group) {
    uint32_t* to = group + t / kRows * kRows * words + t % kRows * kWords;
    for (int64_t w = 0; w < words; w += kWords) std::memcpy(to + w * kRows, row + w, kWords * 4);
  }
};

}  // namespace

const ScreenKernel screen_amx = {kGroup, pack_panel<AmxTokens>, amx_pass<Hardware, Lists>, amx_pass<Hardware, Sieve>,
                                 most_tokens, true};
const ScreenKernel screen_amx_emulated = {kGroup, pack_panel<AmxTokens>, amx_pass<Twin, Lists>, amx_pass<Twin, Sieve>,
                                          most_tokens, true};

}  // namespace fastsae::FASTSAE_ISA
