// See ragged.h.
//
// A thread takes a group of tiles past all tokens, panel by panel, and scores in fp32 the latents whose bound passed before it
// goes on: the group's rows of W stay in L2 throughout, a token's row comes from L3 once a group, and candidates, several
// times as many as survivors, are never stored. Where they are few that costs what gathering rows of x costs; where they are
// many, a token meets several of the group's latents and its row is read once for four of them.
//
// Flops 2·N·M·D narrow, 2·D in fp32 a candidate. Bytes: W and its copy once; x, packed and as it is, from L3 once a group.
#include "ragged.h"

#include <omp.h>

#include <numeric>
#include <utility>

#include "exhaustive.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int64_t kPanel = 240;              // tokens, a multiple of most kernels' groups: 184 KB of i8 at D = 768
constexpr int64_t kGroupBytes = 400 << 10;   // rows of W of a group of tiles
constexpr int64_t kMostTiles = 8;
constexpr int64_t kTokensAtOnce = 128;       // placed together: their counters stay in L1

// One lot of tokens, narrowed: what all threads read.
struct Lot {
  std::vector<const float*> rows;
  std::vector<float> widened;        // holds them where x is bf16
  std::vector<float> bars;           // infinite for tokens that are not finite
  std::vector<uint8_t> odd;          // not finite: scored in full
  std::vector<Panel> panels;
  int64_t panel;                     // tokens in each but the last

  int64_t count(int64_t p) const { return panels[p].count; }
};

Lot narrow_lot(const EncodeArgs& a, const float* bars) {
  const ScreenKernel& kernel = kernel_for(a.screen.format);
  const int64_t N = a.x.rows, D = a.x.cols;
  Lot lot;
  lot.panel = std::max<int64_t>(1, kPanel / kernel.group) * kernel.group;
  lot.rows.resize(N), lot.odd.assign(N, 0), lot.bars.assign(bars, bars + N);
  if (a.x.dtype != Dtype::f32) lot.widened.resize(N * D);
  lot.panels.resize((N + lot.panel - 1) / lot.panel);
  Guard guard;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t p = 0; p < int64_t(lot.panels.size()); ++p)
    guard.run([&] {
      const int64_t first = p * lot.panel, count = std::min(lot.panel, N - first);
      for (int64_t n = first; n < first + count; ++n)
        lot.rows[n] = as_floats(a.x, n, lot.widened.empty() ? nullptr : &lot.widened[n * D]);
      kernel.pack(a.screen, lot.rows.data() + first, count, lot.panels[p]);
      for (int64_t t = 0; t < count; ++t)
        if (!std::isfinite(lot.panels[p].error[t]))
          lot.odd[first + t] = 1, lot.bars[first + t] = std::numeric_limits<float>::infinity();
    });
  guard.rethrow();
  return lot;
}

// A thread's scratch: what passed in one panel and group, as found and by token.
struct Scratch {
  std::unique_ptr<uint32_t[]> found, by_token;
  std::vector<int32_t> begin;
};

// Candidates by token, stably: they are ascending in position already. A NaN passes every bar, and so does padding a bar of
// NaN: tokens that are not finite, and what is no latent, are left out here.
int64_t sort_by_token(const EncodeArgs& a, const Lot& lot, int64_t panel, Sieve& sieve, Scratch& scratch) {
  const uint8_t* odd = lot.odd.data() + panel * lot.panel;
  const auto out = std::remove_if(sieve.found, sieve.found + sieve.size, [&](uint32_t e) {
    return odd[e >> 16] || a.screen.latent_at(sieve.first + (e & 0xffff)) >= a.screen.latents;
  });
  sieve.size = out - sieve.found;
  scratch.begin.assign(lot.count(panel) + 1, 0);
  for (int64_t e = 0; e < sieve.size; ++e) ++scratch.begin[(sieve.found[e] >> 16) + 1];
  std::partial_sum(scratch.begin.begin(), scratch.begin.end(), scratch.begin.begin());
  for (int64_t e = 0; e < sieve.size; ++e) scratch.by_token[scratch.begin[sieve.found[e] >> 16]++] = sieve.found[e];
  return sieve.size;
}

// Scores one panel's candidates and keeps what is above.
template <class T>
void score_panel(const EncodeArgs& a, const Lot& lot, const float* per_latent, int64_t first_token, int64_t first_position,
                 const uint32_t* candidates, int64_t size, Found& out) {
  const auto token = [&](int64_t e) { return first_token + (candidates[e] >> 16); };
  const auto position = [&](int64_t e) { return first_position + (candidates[e] & 0xffff); };
  const auto latent = [&](int64_t e) { return a.screen.latent_at(position(e)); };
  score_runs<T>(a, lot.rows.data(), 0, size, size, token, latent, [&](int64_t e, float score) {
    if (!(score <= (per_latent ? per_latent[latent(e)] : lot.bars[token(e)]))) out.add(token(e), position(e), score);
  });
}

// Every latent scored for some tokens of the lot, in fp32: those above their thresholds.
template <class T>
void find_in_full(const EncodeArgs& a, const std::vector<int64_t>& tokens, const std::vector<const float*>& rows,
                  const float* per_latent, const float* bars, Survivors& out) {
  for (size_t from = 0; from < tokens.size(); from += kScoredTokens) {
    const int64_t count = std::min<int64_t>(kScoredTokens, tokens.size() - from), parts = int64_t(out.parts.size());
    const std::vector<const float*> some(rows.begin() + from, rows.begin() + from + count);
    out.parts.resize(parts + blocks_of_scores(a));
    score_every_latent<T>(a, some, [&](int64_t block, int64_t first, int64_t last, const float* scores) {
      for (int64_t t = 0; t < count; ++t)
        for (int64_t i = first; i < last; ++i) {
          const float score = scores[t * kScoredLatents + i - first];
          if (!(score <= (per_latent ? per_latent[i] : bars[tokens[from + t]])))
            out.parts[parts + block].add(tokens[from + t], a.screen.position_of(i), score);
        }
    });
  }
}

template <class T>
void survivors_typed(const EncodeArgs& a, const float* per_latent, const float* bars, Survivors& out) {
  if (a.screen.is_absent()) {
    std::vector<float> widened(a.x.dtype == Dtype::f32 ? 0 : a.x.rows * a.x.cols);
    std::vector<int64_t> all(a.x.rows);
    std::vector<const float*> rows(a.x.rows);
    for (int64_t n = 0; n < a.x.rows; ++n)
      all[n] = n, rows[n] = as_floats(a.x, n, widened.empty() ? nullptr : &widened[n * a.x.cols]);
    return find_in_full<T>(a, all, rows, per_latent, bars, out);
  }
  const LatentTerms terms = latent_terms(a, per_latent);
  const Lot lot = narrow_lot(a, bars);
  const ScreenKernel& kernel = kernel_for(a.screen.format);
  const int64_t per_tile = kBlocksPerTile * kLanes, tiles = a.screen.blocks / kBlocksPerTile;
  const int64_t fitting = kGroupBytes / std::max<int64_t>(1, per_tile * a.W.cols * int64_t(sizeof(T)));
  const int64_t at_once = std::clamp(std::min(fitting, tiles / (4 * a.threads)), int64_t(1), kMostTiles);
  const int64_t groups = (tiles + at_once - 1) / at_once, panels = int64_t(lot.panels.size());
  // Few groups would leave threads idle: then the tokens are cut as well.
  const int64_t cuts = std::max<int64_t>(1, std::min(panels, 4 * a.threads / std::max<int64_t>(1, groups)));
  out.parts.resize(groups * cuts);
  std::vector<Scratch> scratch(a.threads);
  const int64_t room = lot.panel * at_once * per_tile + kLanes;
  for (Scratch& s : scratch) s.found.reset(new uint32_t[room]), s.by_token.reset(new uint32_t[room]);
  Guard guard;
  int64_t candidates = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads) reduction(+ : candidates)
  for (int64_t part = 0; part < groups * cuts; ++part)
    guard.run([&] {
      Scratch& own = scratch[omp_get_thread_num()];
      const int64_t first_tile = part / cuts * at_once, cut = part % cuts;
      for (int64_t p = panels * cut / cuts; p < panels * (cut + 1) / cuts; ++p) {
        Sieve sieve{lot.bars.data() + p * lot.panel, first_tile * per_tile, own.found.get()};
        const Tiles visited{first_tile, 1, false, first_tile + at_once};
        kernel.sift({a.screen, a, terms, lot.panels[p], visited, a.rescore}, sieve);
        const int64_t size = sort_by_token(a, lot, p, sieve, own);
        candidates += size;
        score_panel<T>(a, lot, per_latent, p * lot.panel, sieve.first, own.by_token.get(), size, out.parts[part]);
      }
    });
  guard.rethrow();
  out.candidates = candidates;

  std::vector<int64_t> odd;
  std::vector<const float*> rows;
  for (int64_t n = 0; n < a.x.rows; ++n)
    if (lot.odd[n]) odd.push_back(n), rows.push_back(lot.rows[n]);
  find_in_full<T>(a, odd, rows, per_latent, bars, out);
  out.scored_in_full = int64_t(odd.size());
}

// Calls visit(token, position, score) for the survivors of tokens [first, last), part after part.
template <class Visit> void visit_tokens(const Survivors& s, int64_t first, int64_t last, Visit visit) {
  for (const Found& part : s.parts) {
    const auto begin = std::lower_bound(part.tokens.begin(), part.tokens.end(), int32_t(first));
    for (int64_t e = begin - part.tokens.begin(); e < int64_t(part.tokens.size()) && part.tokens[e] < last; ++e)
      visit(int64_t(part.tokens[e]), part.positions[e], part.scores[e]);
  }
}

// A lane holds a range of latents, and positions ascend with the latents of a lane: sorting by (token, lane) is enough.
void count_places(int64_t N, int threads, Survivors& s) {
  s.places.assign(N * kLanes, 0), s.offsets.assign(N + 1, 0);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t first = 0; first < N; first += kTokensAtOnce)
    visit_tokens(s, first, std::min(N, first + kTokensAtOnce),
                 [&](int64_t token, int32_t position, float) { ++s.places[token * kLanes + position % kLanes]; });
  for (int64_t n = 0; n < N; ++n) {
    int32_t before = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) before += std::exchange(s.places[n * kLanes + lane], before);
    s.offsets[n + 1] = s.offsets[n] + before;
  }
}

}  // namespace

Survivors survivors(const EncodeArgs& a, const float* per_latent, const float* bars) {
  Survivors out;
  if (a.W.dtype == Dtype::bf16)
    survivors_typed<bf16>(a, per_latent, bars, out);
  else
    survivors_typed<float>(a, per_latent, bars, out);
  count_places(a.x.rows, a.threads, out);
  return out;
}

void place(const EncodeArgs& a, Survivors& s, float* scores, int32_t* latents, int64_t room) {
  const int64_t N = a.x.rows;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t first = 0; first < N; first += kTokensAtOnce)
    visit_tokens(s, first, std::min(N, first + kTokensAtOnce), [&](int64_t token, int32_t position, float score) {
      const int64_t to = s.offsets[token] + s.places[token * kLanes + position % kLanes]++;
      if (to < room) scores[to] = score, latents[to] = int32_t(a.screen.latent_at(position));
    });
}

}  // namespace fastsae::FASTSAE_ISA
