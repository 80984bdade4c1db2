// Screening in bf16 on the AMX units: tiles of 16 tokens x 32 numbers times 32 numbers x 16 latents. Two by two tiles of scores
// stay in registers over all of D; they are stored once and examined from L1.
//
// The tile instructions come through `Unit`, so that the same loop runs on a software twin where there is no AMX: the twin is
// what tests use to prove the packing and the loop on any machine.
#include <immintrin.h>

#include "narrow.h"
#include "registry.h"
#include "screen_kernel.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int kRows = 16, kWords = 16;   // a tile: 16 rows of 16 words (64 bytes)

// gcc 12 drops stores to a local array handed to _tile_loadconfig; a static one is safe.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kConfig;

struct Hardware {
  void begin() { _tile_loadconfig(&kConfig); }
  void end() { _tile_release(); }
  void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  void step(const uint32_t* a0, const uint32_t* a1, int64_t stride, const uint32_t* b0, const uint32_t* b1) {
    _tile_loadd(4, a0, stride * 4);
    _tile_loadd(6, b0, 64);
    _tile_loadd(7, b1, 64);
    _tile_loadd(5, a1, stride * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  void finish(float* c) {
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 16 * 32, 128);
    _tile_stored(3, c + 16 * 32 + 16, 128);
  }
};

struct Twin {
  float c[32][32];
  void begin() {}
  void end() {}
  void clear() { std::memset(c, 0, sizeof c); }
  static float half(uint32_t word, int h) { return widen(bf16{uint16_t(word >> 16 * h)}); }
  void step(const uint32_t* a0, const uint32_t* a1, int64_t stride, const uint32_t* b0, const uint32_t* b1) {
    for (int r = 0; r < 32; ++r)
      for (int k = 0; k < kWords; ++k) {
        const uint32_t a = (r < kRows ? a0 + r * stride : a1 + (r - kRows) * stride)[k];
        for (int l = 0; l < 32; ++l) {
          const uint32_t b = l < 16 ? b0[k * 16 + l] : b1[k * 16 + l - 16];
          c[r][l] += half(a, 0) * half(b, 0) + half(a, 1) * half(b, 1);
        }
      }
  }
  void finish(float* out) { std::memcpy(out, c, sizeof c); }
};

template <class Unit, class Sink> void amx_pass(const ScreenCall& call, Sink& sink) {
  const int64_t words = call.screen.words_per_row, end = end_tile(call);
  Unit unit;
  alignas(64) float scores[2 * kRows * 2 * kLanes];
  unit.begin();
  for (int64_t tile = call.tiles.begin(); tile < end; tile = call.tiles.next(tile)) {
    const uint32_t* w0 = call.screen.words + tile * kBlocksPerTile * words * kLanes;
    const uint32_t* w1 = w0 + words * kLanes;
    for (int64_t first = 0; first < call.panel.count; first += 2 * kRows) {
      const uint32_t* x = call.panel.words.data() + first * words;
      unit.clear();
      for (int64_t k = 0; k < words; k += kWords)
        unit.step(x + k, x + kRows * words + k, words, w0 + k * kLanes, w1 + k * kLanes);
      unit.finish(scores);
      examine(call, sink, first, std::min<int64_t>(2 * kRows, call.panel.count - first), tile,
              [&](int64_t t, int64_t b) { return load(scores + (t * kBlocksPerTile + b) * kLanes); });
    }
  }
  unit.end();
}

struct AmxTokens {
  static constexpr int kGroup = 2 * kRows;
  static constexpr bool kInterleaved = false;
  static Narrowed narrow(const float* v, int64_t d, uint32_t* words) { return narrow_bf16(v, d, words); }
};

}  // namespace

const ScreenKernel screen_amx = {AmxTokens::kGroup, pack_panel<AmxTokens>, amx_pass<Hardware, Lists>,
                                 amx_pass<Hardware, Sieve>};
const ScreenKernel screen_amx_emulated = {AmxTokens::kGroup, pack_panel<AmxTokens>, amx_pass<Twin, Lists>,
                                          amx_pass<Twin, Sieve>};

}  // namespace fastsae::FASTSAE_ISA
