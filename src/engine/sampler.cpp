#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/rng.h"

namespace mm {

static constexpr float kInf = std::numeric_limits<float>::infinity();
static constexpr float kGreedyBelow = 1e-3f;  // a lower temperature could overflow logit / temperature

static void check_range(const char* field, float value, float lowest, float highest) {
  if (!(value >= lowest && value <= highest)) {
    throw Error(field, fmt::format("a number from {} to {}", lowest, highest), fmt::format("{}", value));
  }
}

void check_sampling(const SamplingParams& p) {
  check_range("temperature", p.temperature, 0, 1000);
  if (p.top_k < 0) throw Error("top_k", "0 (off) or more", fmt::format("{}", p.top_k));
  if (!(p.top_p > 0 && p.top_p <= 1)) throw Error("top_p", "above 0 and at most 1", fmt::format("{}", p.top_p));
  check_range("min_p", p.min_p, 0, 1);
  check_range("repetition_penalty", p.repetition_penalty, 0.01f, 100);
  check_range("presence_penalty", p.presence_penalty, -100, 100);
  check_range("frequency_penalty", p.frequency_penalty, -100, 100);
}

// Largest value; Error when any is NaN or +infinity or all are -infinity. Sixteen lanes, so that it vectorises without
// fast-math.
static float checked_max(std::span<const float> x) {
  constexpr size_t lanes = 16;
  float best[lanes];
  int bad[lanes] = {};
  std::fill(best, best + lanes, -kInf);
  size_t i = 0;
  for (; i + lanes <= x.size(); i += lanes) {
    for (size_t j = 0; j < lanes; j++) {
      const float v = x[i + j];
      best[j] = v > best[j] ? v : best[j];
      bad[j] |= !(v < kInf);
    }
  }
  for (; i < x.size(); i++) {
    best[0] = x[i] > best[0] ? x[i] : best[0];
    bad[0] |= !(x[i] < kInf);
  }
  const float max = *std::max_element(best, best + lanes);
  if (std::any_of(bad, bad + lanes, [](int b) { return b != 0; }) || max == -kInf) {
    const auto at = std::find_if(x.begin(), x.end(), [](float v) { return !(v < kInf); });
    throw Error("logits", "finite numbers",
                at == x.end() ? "no finite one" : fmt::format("{} for token {}", *at, at - x.begin()),
                "the model's weights or its run are broken; check them with `minimind eval ppl`");
  }
  return max;
}

static int32_t argmax(std::span<const float> x) {
  return static_cast<int32_t>(std::find(x.begin(), x.end(), checked_max(x)) - x.begin());
}

bool draws_largest(const RowSampling& row) {
  return row.temperature < kGreedyBelow && row.edits_begin == row.edits_end && row.mask < 0;
}

// The k-th largest of x (1 <= k <= size). Keeps a pool of the best so far; once it has filled, few values pass its bar.
static float kth_largest(std::span<const float> x, size_t k, std::vector<float>& pool) {
  const size_t room = 2 * k + 64;
  pool.clear();
  pool.reserve(room);
  float bar = -kInf;
  for (const float v : x) {
    if (v < bar) continue;
    pool.push_back(v);
    if (pool.size() == room) {
      std::nth_element(pool.begin(), pool.begin() + static_cast<std::ptrdiff_t>(k - 1), pool.end(), std::greater<>());
      pool.resize(k);
      bar = pool[k - 1];
    }
  }
  std::nth_element(pool.begin(), pool.begin() + static_cast<std::ptrdiff_t>(k - 1), pool.end(), std::greater<>());
  return pool[k - 1];
}

RowSampling sampling_of(const SamplingParams& p, uint64_t stream, uint64_t index) {
  return {.temperature = p.greedy ? 0.0f : p.temperature,
          .top_k = p.top_k,
          .top_p = p.top_p,
          .min_p = p.min_p,
          .repetition = p.repetition_penalty,
          .presence = p.presence_penalty,
          .frequency = p.frequency_penalty,
          .seed = p.seed,
          .stream = stream,
          .index = index};
}

// Parameters of a row from a whole history; its edits are left in edits_.
RowSampling Sampler::row_of(const SamplingParams& p, std::span<const int32_t> history, int64_t n_prompt,
                            uint64_t stream) {
  edits_.clear();
  if (p.repetition_penalty != 1.0f || p.presence_penalty != 0 || p.frequency_penalty != 0) {
    for (size_t i = 0; i < history.size(); i++) {
      const auto id = static_cast<size_t>(history[i]);
      if (history[i] < 0 || id >= place_.size()) continue;
      if (place_[id] == 0) {
        edits_.push_back({.id = history[i], .seen = 1});
        place_[id] = static_cast<int32_t>(edits_.size());
      }
      edits_[static_cast<size_t>(place_[id] - 1)].count += static_cast<int64_t>(i) >= n_prompt;
    }
    for (const LogitEdit& e : edits_) place_[static_cast<size_t>(e.id)] = 0;
  }
  return sampling_of(p, stream, history.size());
}

static void apply_edits(std::span<float> scores, const RowSampling& row, std::span<const LogitEdit> edits) {
  for (const LogitEdit& e : edits) {
    float& x = scores[static_cast<size_t>(e.id)];
    if (e.seen != 0) x = x > 0 ? x / row.repetition : x * row.repetition;
    if (e.count > 0) x -= row.presence + row.frequency * static_cast<float>(e.count);
    x += e.bias;
  }
}

void Sampler::keep_top_k(int64_t k) {
  const bool all = k == 0 || k >= static_cast<int64_t>(scores_.size());
  const float bar = all ? -kInf : kth_largest(scores_, static_cast<size_t>(k), values_);
  pool_.clear();
  for (size_t i = 0; i < scores_.size(); i++) {
    if (scores_[i] >= bar && scores_[i] > -kInf) pool_.push_back({scores_[i], static_cast<int32_t>(i)});
  }
}

// pool_ holds exp(score - max) here. Sorted in growing chunks: a peaked distribution needs only the first.
void Sampler::keep_top_p(float top_p) {
  const auto before = [](const Scored& a, const Scored& b) {
    return a.score != b.score ? a.score > b.score : a.id < b.id;
  };
  double total = 0;
  for (const auto& c : pool_) total += static_cast<double>(c.score);
  double cumulated = 0;
  size_t kept = 0;
  for (size_t sorted = 0; sorted < pool_.size();) {
    const size_t end = std::min(pool_.size(), std::max<size_t>(64, sorted * 4));
    const auto at = [&](size_t i) { return pool_.begin() + static_cast<std::ptrdiff_t>(i); };
    if (end < pool_.size()) std::nth_element(at(sorted), at(end), pool_.end(), before);
    std::sort(at(sorted), at(end), before);
    sorted = end;
    while (kept < sorted && (kept == 0 || cumulated <= static_cast<double>(top_p) * total)) {
      cumulated += static_cast<double>(pool_[kept++].score);
    }
    if (kept < sorted) break;
  }
  pool_.resize(kept);
}

std::span<const Candidate> Sampler::filter(std::span<const float> logits, const RowSampling& row,
                                           std::span<const LogitEdit> edits) {
  scores_.assign(logits.begin(), logits.end());
  apply_edits(scores_, row, edits);
  for (float& x : scores_) x /= row.temperature;
  const float max = checked_max(scores_);
  keep_top_k(row.top_k);
  for (auto& c : pool_) c.score = std::exp(c.score - max);
  if (row.top_p < 1.0f) keep_top_p(row.top_p);
  double total = 0;
  size_t kept = 0;
  for (const auto& c : pool_) {  // the largest has exp(0) = 1
    if (c.score < row.min_p) continue;
    pool_[kept++] = c;
    total += static_cast<double>(c.score);
  }
  kept_.resize(kept);
  for (size_t i = 0; i < kept; i++) {
    kept_[i] = {pool_[i].id, static_cast<float>(static_cast<double>(pool_[i].score) / total)};
  }
  return kept_;
}

std::span<const Candidate> Sampler::candidates(std::span<const float> logits, const SamplingParams& p,
                                               std::span<const int32_t> history, int64_t n_prompt) {
  place_.resize(logits.size());
  const RowSampling row = row_of(p, history, n_prompt, 0);
  return filter(logits, row, edits_);
}

int32_t Sampler::draw(std::span<const float> logits, const RowSampling& row, std::span<const LogitEdit> edits) {
  if (row.temperature < kGreedyBelow) {
    if (edits.empty()) return argmax(logits);
    scores_.assign(logits.begin(), logits.end());
    apply_edits(scores_, row, edits);
    return argmax(scores_);
  }
  const auto from = filter(logits, row, edits);
  const auto bits = philox4x32(row.seed, row.stream, row.index);
  const double u = static_cast<double>((uint64_t{bits[0]} << 32 | bits[1]) >> 11) * 0x1p-53;  // [0, 1)
  double cumulated = 0;
  for (const auto& c : from) {
    cumulated += static_cast<double>(c.prob);
    if (u < cumulated) return c.id;
  }
  return from.back().id;  // the sum of the rounded probabilities may stay just below 1
}

int32_t Sampler::sample(std::span<const float> logits, const SamplingParams& p, std::span<const int32_t> history,
                        int64_t n_prompt, uint64_t stream) {
  MM_CHECK(!logits.empty());
  place_.resize(logits.size());
  const RowSampling row = row_of(p, history, n_prompt, stream);
  return draw(logits, row, edits_);
}

int32_t Sampler::sample_row(std::span<const float> logits, const RowSampling& row, std::span<const LogitEdit> edits,
                            std::span<const uint32_t> mask) {
  try {
    if (mask.empty()) return draw(logits, row, edits);
    checked_max(logits);
    masked_.assign(logits.begin(), logits.end());
    for (size_t i = 0; i < masked_.size(); i++)
      if ((mask[i / 32] >> (i % 32) & 1u) == 0) masked_[i] = -kInf;
    return draw(masked_, row, edits);
  } catch (const Error&) {  // of checked_max: nothing else throws
    return -1;
  }
}

float Sampler::logprobs(std::span<const float> logits, int32_t id, int64_t n, std::vector<TokenLogprob>& top) {
  MM_CHECK(id >= 0 && static_cast<size_t>(id) < logits.size() && n >= 0);
  const float max = checked_max(logits);
  double sum = 0;
  for (const float x : logits) sum += static_cast<double>(std::exp(x - max));
  const auto log_sum = static_cast<float>(std::log(sum));
  top.clear();
  if (n > 0) {
    const auto k = std::min(static_cast<size_t>(n), logits.size());
    const float bar = kth_largest(logits, k, values_);
    for (size_t i = 0; i < logits.size(); i++) {
      if (logits[i] >= bar) top.push_back({static_cast<int32_t>(i), (logits[i] - max) - log_sum});
    }
    std::sort(top.begin(), top.end(), [](const auto& a, const auto& b) {
      return a.logprob != b.logprob ? a.logprob > b.logprob : a.id < b.id;
    });
    top.resize(k);
  }
  return (logits[static_cast<size_t>(id)] - max) - log_sum;
}

}  // namespace mm
