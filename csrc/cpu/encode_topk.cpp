// acts, indices = the K largest of relu(scale · (x Wᵀ + b)) per token; (N, M) is never stored.
//
// A thread takes a panel of tokens: narrow it, guess a bar per token from a sample of the dictionary, screen the dictionary
// tile by tile against the bars. Of each token's latents those with the K largest lower bounds are scored in fp32; another is a
// rival if its upper bound reaches the K-th score found, and is scored too. Both go latent by latent through all tokens, so that the rows
// gathered are those of x, which stay in L3, and not those of W, which do not. A token has no certificate if its K-th score does not clear the
// guessed bar; it is redone with bar 0, under which nothing that counts is left out. What even then does not
// fit its list (masses of ties) or is not finite is scored in fp32 in full (exhaustive.h), and so are all tokens where there is
// no narrow copy. Where 8 bits leave many tokens without a certificate, as at D = 4096, a copy with tighter bounds is made for
// these tokens.
//
// Flops 2·N·M·D narrow, about 8·N·K·D in fp32. Bytes: the packed copy once per panel from L3, W twice, some 4·N·K rows of x.
// The result is the K best by (fp32 score, lower index), whatever the panel, the bar or the number of threads.
#include <omp.h>

#include <numeric>
#include <optional>
#include <utility>

#include "exhaustive.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int64_t kWorthACopy = 32;   // tokens: scoring ten in full takes as long as making a copy (Zen 5)

// Latents that tokens have still to be scored with: as they are found, a panel's in a part of its own, and joined.
struct Pairs {
  std::vector<std::vector<int32_t>> parts;
  std::vector<int64_t> offsets;    // per token; before they are joined, sizes
  std::vector<int32_t> latents;    // joined, token after token

  void join() {
    for (auto& part : parts) {
      latents.insert(latents.end(), part.begin(), part.end());
      std::vector<int32_t>().swap(part);
    }
    int64_t at = 0;
    for (int64_t& offset : offsets) at += std::exchange(offset, at);
  }
};

// What is known of some tokens between the phases.
struct Tokens {
  std::vector<int64_t> which;                // rows of x
  std::vector<const float*> rows;            // the same, as fp32
  std::vector<float> widened;                // holds them where x is bf16
  std::vector<float> guessed;                // bars
  std::vector<uint8_t> spilled;
  std::vector<std::vector<Ranked>> best;     // scored exactly
  Pairs nearest, rivals;                     // considered latents
  std::vector<std::vector<float>> bounds;    // per panel, of its rivals

  int64_t count() const { return int64_t(which.size()); }
};

void keep_positive(const EncodeArgs& a, float score, int64_t i, std::vector<Ranked>& best) {
  if (!(score <= 0.f)) best.push_back(rank_of(score, a.latent(i)));
}

float kth_score(const std::vector<Ranked>& best, int64_t k) {
  if (k <= 0 || int64_t(best.size()) < k) return 0.f;
  std::vector<int32_t> keys(best.size());
  for (size_t i = 0; i < best.size(); ++i) keys[i] = key_of(best[i]);
  return from_sortable(kth_largest(keys.data(), int64_t(keys.size()), k));
}

// One token's list, as it comes out of the screen.
struct Shortlist {
  std::vector<int32_t> latents;
  std::vector<float> bounds, low;   // the score is at most the bound and at least low

  void read(const ScreenCall& call, const Lists& lists, int64_t token) {
    const float* value = lists.value.get() + token * lists.capacity;
    const int32_t* where = lists.where.get() + token * lists.capacity;
    latents.clear(), bounds.clear(), low.clear();
    for (int64_t j = 0; j < lists.size[token]; ++j) {
      const int64_t i = call.screen.latent_at(where[j]);
      if (i >= call.screen.latents) continue;   // a copy with NaN in it lets padding pass, which is no latent
      const float least = value[j] - 2.f * error_bound(call, token, where[j]);
      latents.push_back(int32_t(i)), bounds.push_back(value[j]);
      // NaN: nothing is certain. Where estimates are trusted it is a score, which ranks above all.
      const float unknown = (call.bounded ? -1.f : 1.f) * std::numeric_limits<float>::infinity();
      low.push_back(least == least ? least : unknown);
    }
  }

  // The k-th largest of the least scores: so many scores are certain to reach it.
  float certain_bar(int64_t k) {
    if (k <= 0) return std::numeric_limits<float>::infinity();
    if (k > int64_t(low.size())) return -std::numeric_limits<float>::infinity();
    return kth_largest(low, k);
  }
};

// From one token's list: the latents nearest to the top, and those that may turn out to belong there.
void shortlist(const EncodeArgs& a, Shortlist& list, Tokens& tokens, int64_t panel, int64_t t) {
  const float bar = list.certain_bar(a.k);
  std::vector<int32_t>&nearest = tokens.nearest.parts[panel], &rivals = tokens.rivals.parts[panel];
  const size_t before = nearest.size(), rivals_before = rivals.size();
  for (size_t j = 0; j < list.latents.size(); ++j)
    if (list.low[j] >= bar)
      nearest.push_back(list.latents[j]);
    else if (a.rescore && !(list.bounds[j] < bar))
      rivals.push_back(list.latents[j]), tokens.bounds[panel].push_back(list.bounds[j]);
  tokens.nearest.offsets[t] = int64_t(nearest.size() - before);
  tokens.rivals.offsets[t] = int64_t(rivals.size() - rivals_before);
}

// What a token's list holds before its bar is raised.
int64_t first_room(const EncodeArgs& a, bool guess) { return std::max<int64_t>(guess ? 1024 : 2048, 16 * a.k); }
constexpr int64_t kLongList = 8192;   // and at most, where raising it does not help

// Screens one panel of tokens, [first, first + count).
void screen_tokens(const EncodeArgs& a, const LatentTerms& terms, Tokens& tokens, int64_t p, int64_t first, int64_t count,
                   bool guess, Panel& panel, Lists& lists) {
  const ScreenKernel& kernel = kernel_for(a.screen.format);
  kernel.pack(a.screen, tokens.rows.data() + first, count, panel);
  lists.reset(count, first_room(a, guess));
  for (int64_t t = 0; t < count; ++t)
    if (!std::isfinite(panel.error[t])) lists.spilled[t] = 1, lists.bar[t] = std::numeric_limits<float>::infinity();
  ScreenCall call{a.screen, a, terms, panel, {}, a.rescore};
  if (guess) call.tiles = guess_bars(call, a.k, lists);
  std::copy(lists.bar.begin(), lists.bar.end(), tokens.guessed.begin() + first);
  kernel.pass(call, lists);
  Shortlist list;
  for (int64_t t = 0; t < count; ++t) {
    tokens.spilled[first + t] = lists.spilled[t];
    if (lists.spilled[t]) continue;
    list.read(call, lists, t);
    shortlist(a, list, tokens, p, first + t);
  }
}

// Measured on Zen 4, in turns: groups of 0.2, 0.4, 0.8 and 3 MB of rows of W take .92, .88, .83 and .79 of the time without
// groups at K = 256, and pay from about three latents on that a token meets in one.
constexpr int64_t kGroupBytes = 3200 << 10;
constexpr double kMet = 3;

// Exact scores of pairs, in their order. Taken latent by latent, and the latent's row stays in L1; or, where a token meets several
// of a group of latents, group by group: then the token's row comes from afar once for up to four of them.
template <class T> std::vector<float> score_pairs(const EncodeArgs& a, const Tokens& tokens, const Pairs& pairs) {
  const int64_t count = int64_t(pairs.latents.size());
  const int64_t fitting = std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, a.x.cols * int64_t(sizeof(T))));
  const bool grouped = double(count) * double(fitting) >= kMet * double(tokens.count()) * double(a.row_count);
  const int64_t rows = grouped ? fitting : 1, groups = (a.row_count + rows - 1) / rows;
  std::vector<float> scores(count);
  std::vector<int64_t> offsets(groups + 1), slots(count);
  std::vector<int32_t> owners(count), keys(grouped ? count : 0);
  for (int64_t e = 0; grouped && e < count; ++e) keys[e] = int32_t(pairs.latents[e] / rows);
  const int32_t* by = grouped ? keys.data() : pairs.latents.data();
  by_latent({nullptr, by, pairs.offsets.data(), tokens.count(), 0, groups, Dtype::f32},
            {offsets.data(), owners.data(), slots.data()}, a.threads);
#pragma omp parallel for schedule(dynamic, grouped ? 1 : 64) num_threads(a.threads)
  for (int64_t g = 0; g < groups; ++g)
    score_runs<T>(
        a, tokens.rows.data(), offsets[g], offsets[g + 1], count, [&](int64_t e) { return owners[e]; },
        [&](int64_t e) { return pairs.latents[slots[e]]; }, [&](int64_t e, float score) { scores[slots[e]] = score; });
  return scores;
}

// Keeps those of one panel's rivals that have a bound as large as the K-th score of the nearest.
void narrow_down(const EncodeArgs& a, const std::vector<float>& scores, Tokens& tokens, int64_t p, int64_t first, int64_t last) {
  std::vector<int32_t>& rivals = tokens.rivals.parts[p];
  size_t from = 0, kept = 0;
  for (int64_t t = first; t < last; ++t) {
    std::vector<Ranked>& best = tokens.best[t];
    for (int64_t e = tokens.nearest.offsets[t]; e < tokens.nearest.offsets[t + 1]; ++e)
      keep_positive(a, scores[e], tokens.nearest.latents[e], best);
    const float bar = kth_score(best, a.k);
    const size_t end = from + tokens.rivals.offsets[t], before = kept;
    for (; from < end; ++from)
      if (!(tokens.bounds[p][from] < bar)) rivals[kept++] = rivals[from];
    tokens.rivals.offsets[t] = int64_t(kept - before);
  }
  rivals.resize(kept);
  std::vector<float>().swap(tokens.bounds[p]);
}

void write_code(const EncodeArgs& a, std::vector<Ranked>& best, int64_t token, const FixedCodes& out) {
  best_first(best, a.k);
  best.resize(std::min<int64_t>(a.k, best.size()));
  std::sort(best.begin(), best.end(), [](Ranked p, Ranked q) { return index_of(p) < index_of(q); });
  float* acts = out.acts + token * a.k;
  int32_t* indices = out.indices + token * a.k;
  int64_t slot = 0;
  for (const Ranked r : best) acts[slot] = score_of(r), indices[slot] = int32_t(index_of(r) + a.index_offset), ++slot;
  for (; slot < a.k; ++slot) acts[slot] = 0.f, indices[slot] = int32_t(a.W.rows - 1 + a.index_offset);
}

// Merges a token's scores and writes its code; false if there is no certificate.
bool decide(const EncodeArgs& a, Tokens& tokens, int64_t t, const std::vector<float>& scores, const FixedCodes& out) {
  if (tokens.spilled[t]) return false;
  std::vector<Ranked>& best = tokens.best[t];
  for (int64_t e = tokens.rivals.offsets[t]; e < tokens.rivals.offsets[t + 1]; ++e)
    keep_positive(a, scores[e], tokens.rivals.latents[e], best);
  const float guessed = tokens.guessed[t], kth = kth_score(best, a.k);
  const bool certain = guessed <= 0.f || kth > guessed || kth != kth || (!a.rescore && int64_t(best.size()) >= a.k);
  if (certain) write_code(a, best, tokens.which[t], out);
  return certain;
}

// Encodes these tokens, counts their rivals, and returns those without a certificate.
template <class T>
std::vector<int64_t> encode_tokens(const EncodeArgs& a, const LatentTerms& terms, std::vector<int64_t> which, bool guess,
                                   const FixedCodes& out, int64_t& rival_count) {
  Tokens tokens;
  tokens.which = std::move(which);
  const int64_t count = tokens.count(), D = a.x.cols;
  tokens.rows.resize(count), tokens.guessed.resize(count), tokens.spilled.resize(count), tokens.best.resize(count);
  tokens.nearest.offsets.assign(count + 1, 0), tokens.rivals.offsets.assign(count + 1, 0);
  if (a.x.dtype != Dtype::f32) tokens.widened.resize(count * D);

  // No list outgrows the dictionary. Long ones are rare, and memory past a list's end is never touched.
  const int64_t room = first_room(a, guess);
  const int64_t capacity = std::min(std::max(room, std::min(4 * room, kLongList)), a.screen.latents + 2 * kLanes);
  const int64_t size = panel_size(a, count, capacity), panels = (count + size - 1) / size;
  tokens.nearest.parts.resize(panels), tokens.rivals.parts.resize(panels), tokens.bounds.resize(panels);
  std::vector<std::unique_ptr<Lists>> lists(a.threads);
  for (auto& own : lists) own = std::make_unique<Lists>(size, capacity, a.k);
  Guard guard;
#pragma omp parallel num_threads(a.threads)
  {
    Panel panel;
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < panels; ++p)
      guard.run([&] {
        const int64_t first = p * size, last = std::min(count, first + size);
        for (int64_t t = first; t < last; ++t)
          tokens.rows[t] = as_floats(a.x, tokens.which[t], tokens.widened.empty() ? nullptr : &tokens.widened[t * D]);
        screen_tokens(a, terms, tokens, p, first, last - first, guess, panel, *lists[omp_get_thread_num()]);
      });
  }
  guard.rethrow();
  lists.clear();

  tokens.nearest.join();
  const std::vector<float> nearest = score_pairs<T>(a, tokens, tokens.nearest);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t p = 0; p < panels; ++p)
    guard.run([&] { narrow_down(a, nearest, tokens, p, p * size, std::min(count, (p + 1) * size)); });
  guard.rethrow();
  tokens.rivals.join();
  rival_count += int64_t(tokens.rivals.latents.size());
  const std::vector<float> scores = score_pairs<T>(a, tokens, tokens.rivals);

  std::vector<uint8_t> decided(count);
#pragma omp parallel for schedule(dynamic, 64) num_threads(a.threads)
  for (int64_t t = 0; t < count; ++t) guard.run([&] { decided[t] = decide(a, tokens, t, scores, out); });
  guard.rethrow();
  std::vector<int64_t> undecided;
  for (int64_t t = 0; t < count; ++t)
    if (!decided[t]) undecided.push_back(tokens.which[t]);
  return undecided;
}

// Every latent in fp32 for these tokens.
template <class T> void encode_in_full(const EncodeArgs& a, const std::vector<int64_t>& tokens, const FixedCodes& out) {
  struct Best {
    std::vector<Ranked> found;
    float bar = 0;   // the k-th score when the list was last cut
  };
  const size_t most = 2 * a.k + 64;
  std::vector<float> widened(a.x.dtype == Dtype::f32 ? 0 : std::min<int64_t>(kScoredTokens, tokens.size()) * a.x.cols);
  for (size_t from = 0; from < tokens.size(); from += kScoredTokens) {
    const int64_t count = std::min<int64_t>(kScoredTokens, tokens.size() - from);
    std::vector<const float*> rows(count);
    for (int64_t t = 0; t < count; ++t)
      rows[t] = as_floats(a.x, tokens[from + t], widened.empty() ? nullptr : &widened[t * a.x.cols]);
    std::vector<Best> all(a.threads * count);
    score_every_latent<T>(a, rows, [&](int64_t, int64_t first, int64_t last, const float* scores) {
      for (int64_t t = 0; t < count; ++t) {
        Best& best = all[omp_get_thread_num() * count + t];
        for (int64_t i = first; i < last; ++i) {
          const float score = scores[t * kScoredLatents + i - first];
          if (score < best.bar) continue;
          keep_positive(a, score, i, best.found);
          if (best.found.size() < most) continue;
          best_first(best.found, a.k);
          best.found.resize(a.k);
          best.bar = kth_score(best.found, a.k);
        }
      }
    });
    for (int64_t t = 0; t < count; ++t) {
      std::vector<Ranked>& best = all[t].found;
      for (int64_t thread = 1; thread < a.threads; ++thread) {
        const std::vector<Ranked>& more = all[thread * count + t].found;
        best.insert(best.end(), more.begin(), more.end());
      }
      write_code(a, best, tokens[from + t], out);
    }
  }
}

// A copy of the encoder in the format with the tightest bounds, for one call.
struct TightCopy {
  std::vector<uint32_t> words;
  std::vector<float> tables;
  EncodeArgs args;   // the call with this copy

  TightCopy(const EncodeArgs& a, Format format) : args(a) {
    Screen& s = args.screen;
    s.format = format, s.words_per_row = words_per_row(format, s.d);
    const int64_t positions = s.blocks * kLanes;
    words.resize(format == Format::f32 ? 0 : positions * s.words_per_row), tables.resize(3 * positions);
    s.words = words.data();
    s.scale = tables.data(), s.norm = s.scale + positions, s.residual = s.norm + positions;
    prepare_screen(a.W, a.rows, s, a.threads);
  }
};

// Encodes tokens in lots of kAtOnce; returns those without a certificate.
template <class T>
std::vector<int64_t> encode_lots(const EncodeArgs& a, const std::vector<int64_t>& tokens, bool guess, const FixedCodes& out,
                                 int64_t& rivals) {
  if (tokens.empty()) return {};
  const LatentTerms terms = latent_terms(a, nullptr);
  std::vector<int64_t> open;
  for (size_t first = 0; first < tokens.size(); first += kAtOnce) {
    const auto from = tokens.begin() + first;
    const std::vector<int64_t> part(from, from + std::min<int64_t>(kAtOnce, tokens.end() - from));
    const std::vector<int64_t> back = encode_tokens<T>(a, terms, part, guess, out, rivals);
    open.insert(open.end(), back.begin(), back.end());
  }
  return open;
}

template <class T> TopkCounts encode_topk_typed(const EncodeArgs& a, const FixedCodes& out) {
  std::vector<int64_t> all(a.x.rows);
  std::iota(all.begin(), all.end(), int64_t(0));
  if (a.screen.is_absent()) return encode_in_full<T>(a, all, out), TopkCounts{0, 0};
  TopkCounts counts{0, 0};
  std::vector<int64_t> again = encode_lots<T>(a, all, true, out, counts.rivals);
  counts.redone = int64_t(again.size());
  if (!a.redo) return counts;
  int64_t more = 0;
  const Format tight = tight_format(ops().name);
  std::optional<TightCopy> copy;
  if (a.screen.format == Format::i8 && tight != Format::i8 && int64_t(again.size()) >= kWorthACopy) {
    copy.emplace(a, tight);
    again = encode_lots<T>(copy->args, again, true, out, more);
  }
  encode_in_full<T>(a, encode_lots<T>(copy ? copy->args : a, again, false, out, more), out);
  return counts;
}

}  // namespace

TopkCounts encode_topk(const EncodeArgs& a, const FixedCodes& out) {
  return a.W.dtype == Dtype::bf16 ? encode_topk_typed<bf16>(a, out) : encode_topk_typed<float>(a, out);
}

}  // namespace fastsae::FASTSAE_ISA
