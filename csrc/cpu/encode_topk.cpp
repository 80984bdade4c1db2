// acts, indices = the K largest of relu(scale · (x Wᵀ + b)) per token; (N, M) is never stored.
//
// A thread takes a panel of tokens: narrow it, guess a bar per token from a sample of the dictionary, screen the dictionary
// tile by tile against the bars, score the K best bounds of each token in fp32. A latent whose bound reaches the K-th score
// found is a rival; rivals of all tokens are scored latent by latent, so that the rows gathered are those of x, which stay in
// L3, and not those of W, which do not. A token whose K-th score does not clear the guessed bar has no certificate; it is
// redone with bar 0, under which nothing that counts is left out. What even then does not fit its list (masses of ties) or is
// not finite is scored in fp32 in full (exhaustive.h), and so are all tokens where there is no narrow copy. Where 8 bits leave
// many tokens without a certificate, as at D = 4096, a copy with tighter bounds is made for these tokens.
//
// Flops 2·N·M·D narrow, about 8·N·K·D in fp32. Bytes: the packed copy once per panel from L3, N·K rows of W, some 3·N·K of x.
// The result is the K best by (fp32 score, lower index), whatever the panel, the bar or the number of threads.
#include <omp.h>

#include <numeric>
#include <optional>

#include "exhaustive.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int64_t kWorthACopy = 32;   // tokens: scoring ten in full takes as long as making a copy (Zen 5)

// What is known of some tokens between the phases.
struct Tokens {
  std::vector<int64_t> which;                // rows of x
  std::vector<const float*> rows;            // the same, as fp32
  std::vector<float> widened;                // holds them where x is bf16
  std::vector<float> guessed;                // bars
  std::vector<uint8_t> spilled;
  std::vector<std::vector<Ranked>> best;     // scored exactly, at most K
  std::vector<std::vector<int32_t>> rivals;  // per panel: considered latents still to score, token after token
  std::vector<int64_t> offsets;              // per token into all rivals; before they are joined, sizes

  int64_t count() const { return int64_t(which.size()); }
};

void keep_positive(const EncodeArgs& a, float score, int64_t i, std::vector<Ranked>& best) {
  if (!(score <= 0.f)) best.push_back(rank_of(score, a.latent(i)));
}

float kth_score(std::vector<Ranked>& best, int64_t k) {
  if (k <= 0 || int64_t(best.size()) < k) return 0.f;
  best_first(best, k);
  return score_of(*std::min_element(best.begin(), best.begin() + k));
}

// From one token's list: score the K best bounds, name the rivals.
template <class T>
void shortlist(const EncodeArgs& a, const Lists& lists, int64_t in_panel, Tokens& tokens, int64_t t,
               std::vector<Ranked>& order, std::vector<int32_t>& rivals) {
  const float* value = lists.value.get() + in_panel * lists.capacity;
  const int32_t* where = lists.where.get() + in_panel * lists.capacity;
  order.clear();
  // A copy with NaN in it lets padding pass, which is no latent.
  for (int64_t j = 0; j < lists.size[in_panel]; ++j)
    if (const int64_t i = a.screen.latent_at(where[j]); i < a.screen.latents) order.push_back(rank_of(value[j], i));
  const int64_t first = std::min<int64_t>(a.k, order.size());
  best_first(order, first);
  std::vector<Ranked>& best = tokens.best[t];
  for (int64_t j = 0; j < first; ++j) {
    const int64_t i = index_of(order[j]), next = index_of(order[std::min(j + 3, first - 1)]);
    keep_positive(a, exact_score_fetching<T>(a, tokens.rows[t], i, next), i, best);
  }
  if (!a.rescore) return;
  const float bar = kth_score(best, a.k);
  for (int64_t j = first; j < int64_t(order.size()); ++j)
    if (!(score_of(order[j]) < bar)) rivals.push_back(int32_t(index_of(order[j])));
}

// What a token's list holds before its bar is raised, and at most where raising it does not help.
int64_t first_room(const EncodeArgs& a, bool guess) { return std::max<int64_t>(guess ? 1024 : 2048, 16 * a.k); }
constexpr int64_t kLongList = 8192;

// Screens one panel of tokens, [first, first + count).
template <class T>
void screen_tokens(const EncodeArgs& a, const LatentTerms& terms, Tokens& tokens, int64_t first, int64_t count, bool guess,
                   Panel& panel, Lists& lists, std::vector<int32_t>& rivals) {
  const ScreenKernel& kernel = kernel_for(a.screen.format);
  kernel.pack(a.screen, tokens.rows.data() + first, count, panel);
  lists.reset(count, first_room(a, guess));
  for (int64_t t = 0; t < count; ++t)
    if (!std::isfinite(panel.error[t])) lists.spilled[t] = 1, lists.bar[t] = std::numeric_limits<float>::infinity();
  ScreenCall call{a.screen, a, terms, panel, {}, a.rescore};
  if (guess) call.tiles = guess_bars(call, a.k, lists);
  std::copy(lists.bar.begin(), lists.bar.end(), tokens.guessed.begin() + first);
  kernel.pass(call, lists);
  std::vector<Ranked> order;
  for (int64_t t = 0; t < count; ++t) {
    const size_t before = rivals.size();
    tokens.spilled[first + t] = lists.spilled[t];
    if (!lists.spilled[t]) shortlist<T>(a, lists, t, tokens, first + t, order, rivals);
    tokens.offsets[first + t] = int64_t(rivals.size() - before);
  }
}

// Exact scores of all rivals, latent by latent; result in the order of `rivals`.
template <class T>
std::vector<float> score_rivals(const EncodeArgs& a, const Tokens& tokens, const std::vector<int32_t>& rivals) {
  std::vector<float> scores(rivals.size());
  std::vector<int64_t> offsets(a.row_count + 1), slots(rivals.size());
  std::vector<int32_t> owners(rivals.size());
  const Codes pairs{nullptr, rivals.data(), tokens.offsets.data(), tokens.count(), 0, a.row_count, Dtype::f32};
  by_latent(pairs, {offsets.data(), owners.data(), slots.data()}, a.threads);
  const int64_t D = a.x.cols, last = int64_t(rivals.size()) - 1;
#pragma omp parallel for schedule(dynamic, 64) num_threads(a.threads)
  for (int64_t i = 0; i < a.row_count; ++i)
    for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
      // <x, w> = <w, x>: the row gathered is the token's.
      const float* next = tokens.rows[owners[std::min(e + 3, last)]];
      scores[slots[e]] = with_bias(a, dot<true>(latent_row<T>(a, i), tokens.rows[owners[e]], D, next), i);
    }
  return scores;
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
template <class T>
bool decide(const EncodeArgs& a, Tokens& tokens, int64_t t, const std::vector<int32_t>& rivals,
            const std::vector<float>& scores, const FixedCodes& out) {
  if (tokens.spilled[t]) return false;
  std::vector<Ranked>& best = tokens.best[t];
  for (int64_t e = tokens.offsets[t]; e < tokens.offsets[t + 1]; ++e) keep_positive(a, scores[e], rivals[e], best);
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
  tokens.offsets.assign(count + 1, 0);
  if (a.x.dtype != Dtype::f32) tokens.widened.resize(count * D);

  // No list outgrows the dictionary. Long ones are rare, and memory past a list's end is never touched.
  const int64_t room = first_room(a, guess);
  const int64_t capacity = std::min(std::max(room, std::min(4 * room, kLongList)), a.screen.latents + 2 * kLanes);
  const int64_t size = panel_size(a, count, capacity), panels = (count + size - 1) / size;
  tokens.rivals.resize(panels);
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
        screen_tokens<T>(a, terms, tokens, first, last - first, guess, panel, *lists[omp_get_thread_num()],
                         tokens.rivals[p]);
      });
  }
  guard.rethrow();
  lists.clear();

  std::vector<int32_t> rivals;
  for (auto& part : tokens.rivals) {
    rivals.insert(rivals.end(), part.begin(), part.end());
    std::vector<int32_t>().swap(part);
  }
  for (int64_t t = 0, at = 0; t <= count; ++t) {
    const int64_t length = tokens.offsets[t];
    tokens.offsets[t] = at;
    at += length;
  }
  rival_count += int64_t(rivals.size());
  const std::vector<float> scores = score_rivals<T>(a, tokens, rivals);

  std::vector<uint8_t> decided(count);
#pragma omp parallel for schedule(dynamic, 64) num_threads(a.threads)
  for (int64_t t = 0; t < count; ++t) guard.run([&] { decided[t] = decide<T>(a, tokens, t, rivals, scores, out); });
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
          best.bar = kth_score(best.found, a.k);
          best.found.resize(a.k);
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
