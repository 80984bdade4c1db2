// acts, indices = the K largest of relu(scale · (x Wᵀ + b)) per token; (N, M) is never stored.
//
// A thread takes a panel of tokens: narrow it, guess a bar per token from a sample of the dictionary, screen the dictionary
// tile by tile against the bars, then decide each token among the latents that passed. Deciding is exact: the K best bounds
// are scored in fp32, then whoever's bound reaches the K-th score found. A token whose K-th score does not clear the guessed
// bar has no certificate; it is redone with bar 0, under which nothing that counts is left out. What even then does not fit
// its list (masses of ties) or is not finite is scored in fp32 in full.
//
// Flops 2·N·M·D narrow, about 8·N·K·D in fp32. Bytes: the packed copy once per panel from L3, about 4·N·K rows of W.
// The result is the K best by (fp32 score, lower index), whatever the panel, the bar or the number of threads.
#include "candidates.h"
#include "registry.h"

namespace fastsae::FASTSAE_ISA {
namespace {

constexpr int64_t kPanel = 240;   // tokens: 240 x 768 bytes of i8 stay in half of a 1 MB L2, beside the lists

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

// Scores `order[from..to)` exactly and keeps the positive ones (and NaN).
template <class T>
void score_listed(const EncodeArgs& a, const float* x, const std::vector<Ranked>& order, int64_t from, int64_t to,
                  std::vector<Ranked>& best) {
  for (int64_t j = from; j < to; ++j) {
    if (j + 1 < to) fetch_latent<T>(a, index_of(order[j + 1]));
    const int64_t i = index_of(order[j]);
    const float s = exact_score<T>(a, x, i);
    if (!(s <= 0.f)) best.push_back(rank_of(s, a.latent(i)));
  }
}

float kth_score(std::vector<Ranked>& best, int64_t k) {
  if (int64_t(best.size()) < k) return 0.f;
  best_first(best, k);
  return score_of(*std::min_element(best.begin(), best.begin() + k));
}

// Decides one token from its list; false if there is no certificate.
template <class T>
bool decide(const EncodeArgs& a, const float* x, const Lists& lists, int64_t t, float guessed, std::vector<Ranked>& order,
            std::vector<Ranked>& best) {
  order.clear(), best.clear();
  if (lists.spilled[t]) return false;
  const float* value = lists.value.data() + t * lists.capacity;
  const int32_t* where = lists.where.data() + t * lists.capacity;
  for (int64_t j = 0; j < lists.size[t]; ++j) order.push_back(rank_of(value[j], a.screen.latent_at(where[j])));
  const int64_t first = std::min<int64_t>(a.k, order.size());
  best_first(order, first);
  score_listed<T>(a, x, order, 0, first, best);
  if (a.rescore) {
    const float bar = kth_score(best, a.k);
    const auto end = std::partition(order.begin() + first, order.end(), [bar](Ranked r) { return !(score_of(r) < bar); });
    score_listed<T>(a, x, order, first, end - order.begin(), best);
  }
  const float kth = kth_score(best, a.k);
  return guessed <= 0.f || kth > guessed || kth != kth || (!a.rescore && int64_t(best.size()) >= a.k);
}

// One panel of tokens; those without a certificate are appended to `undecided`.
template <class T>
void encode_panel(const EncodeArgs& a, const LatentTerms& terms, const std::vector<int64_t>& tokens, bool guess,
                  const FixedCodes& out, std::vector<int64_t>& undecided) {
  const int64_t D = a.x.cols, count = int64_t(tokens.size());
  std::vector<float> widened(a.x.dtype == Dtype::f32 ? 0 : count * D);
  std::vector<const float*> rows(count);
  for (int64_t t = 0; t < count; ++t) rows[t] = as_floats(a.x, tokens[t], widened.data() + (widened.empty() ? 0 : t * D));

  const ScreenKernel& kernel = kernel_for(a.screen.format);
  Panel panel;
  kernel.pack(rows.data(), count, D, a.screen.words_per_row, panel);
  std::vector<float> bars(count, 0.f);
  if (guess) bars = guess_bars(a, terms, panel, a.k);

  Lists lists(count, std::max<int64_t>(guess ? 1024 : 2048, 16 * a.k), a.k);
  lists.bar = bars;
  for (int64_t t = 0; t < count; ++t)
    if (!std::isfinite(panel.error[t])) lists.spilled[t] = 1, lists.bar[t] = std::numeric_limits<float>::infinity();
  kernel.pass({a.screen, a, terms, panel, 0, 1, a.rescore}, lists);

  std::vector<Ranked> order, best;
  for (int64_t t = 0; t < count; ++t) {
    if (decide<T>(a, rows[t], lists, t, bars[t], order, best))
      write_code(a, best, tokens[t], out);
    else
      undecided.push_back(tokens[t]);
  }
}

template <class T>
std::vector<int64_t> encode_tokens(const EncodeArgs& a, const LatentTerms& terms, const std::vector<int64_t>& tokens,
                                   bool guess, const FixedCodes& out) {
  const int64_t group = kernel_for(a.screen.format).group, count = int64_t(tokens.size());
  const int64_t share = (count + a.threads * 2 - 1) / (a.threads * 2);
  const int64_t size = std::min(kPanel, (share + group - 1) / group * group);
  const int64_t panels = size ? (count + size - 1) / size : 0;
  std::vector<std::vector<int64_t>> undecided(panels);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t p = 0; p < panels; ++p) {
    const auto from = tokens.begin() + p * size;
    encode_panel<T>(a, terms, {from, from + std::min(size, count - p * size)}, guess, out, undecided[p]);
  }
  std::vector<int64_t> all;
  for (const auto& u : undecided) all.insert(all.end(), u.begin(), u.end());
  return all;
}

// Every latent in fp32 for the tokens that nothing else decides.
void encode_in_full(const EncodeArgs& a, const std::vector<int64_t>& tokens, const FixedCodes& out) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t j = 0; j < int64_t(tokens.size()); ++j) {
    std::vector<float> buffer(a.x.cols);
    std::vector<Ranked> best;
    score_all(a, as_floats(a.x, tokens[j], buffer.data()), nullptr, 0.f, best);
    write_code(a, best, tokens[j], out);
  }
}

template <class T> int64_t encode_topk_typed(const EncodeArgs& a, const FixedCodes& out) {
  const LatentTerms terms = latent_terms(a, nullptr);
  std::vector<int64_t> tokens(a.x.rows);
  for (int64_t n = 0; n < a.x.rows; ++n) tokens[n] = n;
  std::vector<int64_t> again = encode_tokens<T>(a, terms, tokens, true, out);
  const int64_t redone = int64_t(again.size());
  if (redone) again = encode_tokens<T>(a, terms, again, false, out);
  encode_in_full(a, again, out);
  return redone;
}

}  // namespace

// Returns how many tokens had to be redone.
int64_t encode_topk(const EncodeArgs& a, const FixedCodes& out) {
  return a.W.dtype == Dtype::bf16 ? encode_topk_typed<bf16>(a, out) : encode_topk_typed<float>(a, out);
}

}  // namespace fastsae::FASTSAE_ISA
