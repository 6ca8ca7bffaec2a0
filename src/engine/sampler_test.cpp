#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "base/rng.h"
#include "formats/safetensors.h"

namespace mm {

static constexpr float kInf = std::numeric_limits<float>::infinity();

static std::vector<float> random_logits(size_t n, uint64_t seed, float scale = 3.0f) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; i++) x[i] = scale * philox_normal(seed, 1, i);
  return x;
}

// MiniMind's generate(), written plainly in double with full sorts.
static std::map<int32_t, double> reference(std::span<const float> logits, const SamplingParams& p,
                                           std::span<const int32_t> history, int64_t n_prompt) {
  std::vector<double> x(logits.begin(), logits.end());
  for (auto& v : x) v /= static_cast<double>(p.temperature);
  std::map<int32_t, int> seen, generated;
  for (size_t i = 0; i < history.size(); i++) {
    seen[history[i]]++;
    if (static_cast<int64_t>(i) >= n_prompt) generated[history[i]]++;
  }
  for (const auto& [id, n] : seen) {
    double& v = x[static_cast<size_t>(id)];
    v = v > 0 ? v / static_cast<double>(p.repetition_penalty) : v * static_cast<double>(p.repetition_penalty);
  }
  for (const auto& [id, n] : generated) {
    x[static_cast<size_t>(id)] -=
        static_cast<double>(p.presence_penalty + p.frequency_penalty * static_cast<float>(n)) /
        static_cast<double>(p.temperature);
  }
  std::vector<int32_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)]; });
  const auto value = [&](size_t rank) { return x[static_cast<size_t>(order[rank])]; };
  size_t n = x.size();
  if (p.top_k > 0) {
    const double bar = value(std::min(n, static_cast<size_t>(p.top_k)) - 1);
    while (n > 1 && value(n - 1) < bar) n--;
  }
  const auto weight = [&](size_t rank) { return std::exp(value(rank) - value(0)); };
  double total = 0;
  for (size_t i = 0; i < n; i++) total += weight(i);
  if (p.top_p < 1) {
    double cumulated = weight(0);
    size_t kept = 1;
    while (kept < n && cumulated <= static_cast<double>(p.top_p) * total) cumulated += weight(kept++);
    n = kept;
  }
  while (weight(n - 1) < static_cast<double>(p.min_p)) n--;
  total = 0;
  for (size_t i = 0; i < n; i++) total += weight(i);
  std::map<int32_t, double> probs;
  for (size_t i = 0; i < n; i++) {
    if (weight(i) > 0) probs[order[i]] = weight(i) / total;
  }
  return probs;
}

static void expect_equal(std::span<const Candidate> ours, const std::map<int32_t, double>& theirs, double tolerance) {
  EXPECT_EQ(ours.size(), theirs.size());
  for (const auto& c : ours) {
    ASSERT_TRUE(theirs.contains(c.id)) << c.id;
    EXPECT_NEAR(static_cast<double>(c.prob), theirs.at(c.id), tolerance) << c.id;
  }
}

TEST(Sampler, OracleProbabilities) {
  const std::string dir = MM_SOURCE_DIR "/../shared/oracle/objectives";
  if (!dir_exists(dir)) GTEST_SKIP() << "NOT TESTED: the oracle data " << dir << " is missing";
  const auto file = SafetensorsFile::open(dir + "/sampling.safetensors");
  const View logits = file.at("logits", {320}).view(), probs = file.at("probs", {320}).view();
  const View seen = file.at("seen_ids").view();
  const auto expected = load_json(dir + "/expected.json");
  const auto constants = json_get<ordered_json>(expected, "sampling", "expected.json");
  SamplingParams params;
  params.temperature = constants["temperature"].get<float>();
  params.repetition_penalty = constants["repetition_penalty"].get<float>();
  params.top_k = constants["top_k"].get<int32_t>();
  params.top_p = constants["top_p"].get<float>();
  const std::span<const int32_t> history(seen.as<int32_t>(), static_cast<size_t>(seen.numel()));
  Sampler sampler;
  const auto ours = sampler.candidates({logits.f32(), 320}, params, history, static_cast<int64_t>(history.size()));
  std::map<int32_t, double> theirs;
  for (int32_t i = 0; i < 320; i++) {
    if (probs.f32()[i] > 0) theirs[i] = static_cast<double>(probs.f32()[i]);
  }
  expect_equal(ours, theirs, 1e-6);
}

TEST(Sampler, EveryFilterEqualsThePlainOne) {
  const std::vector<int32_t> history{3, 5, 5, 0, 2, 2, 2, 5, 1};
  Sampler sampler;
  for (const size_t n_vocab : {7u, 64u, 331u, 6400u}) {
    for (const float scale : {0.3f, 3.0f}) {  // flat and peaked
      const auto logits = random_logits(n_vocab, n_vocab, scale);
      for (const int32_t top_k : {0, 1, 5, 50, 7000}) {
        for (const float top_p : {1.0f, 0.85f, 0.01f}) {
          for (const float min_p : {0.0f, 0.2f}) {
            for (const float penalty : {0.0f, 0.7f}) {
              const SamplingParams params{.temperature = 0.7f,
                                          .top_k = top_k,
                                          .top_p = top_p,
                                          .min_p = min_p,
                                          .repetition_penalty = 1 + penalty,
                                          .presence_penalty = penalty,
                                          .frequency_penalty = penalty / 3};
              SCOPED_TRACE(fmt::format("V {} scale {} k {} p {} min {} penalty {}", n_vocab, scale, top_k, top_p, min_p,
                                       penalty));
              expect_equal(sampler.candidates(logits, params, history, 4), reference(logits, params, history, 4), 2e-6);
            }
          }
        }
      }
    }
  }
}

TEST(Sampler, TiesWithTheKthStay) {
  const std::vector<float> logits{1, 2, 2, 0, 2};
  Sampler sampler;
  const auto kept = sampler.candidates(logits, {.temperature = 1, .top_k = 2, .top_p = 1}, {}, 0);
  ASSERT_EQ(kept.size(), 3u);
  for (const auto& c : kept) EXPECT_NEAR(c.prob, 1.0f / 3, 1e-6);
}

TEST(Sampler, GreedyTakesTheLargestAndTheLowestIdOnATie) {
  Sampler sampler;
  auto logits = random_logits(6400, 3);
  logits[77] = logits[4000] = 100;
  EXPECT_EQ(sampler.sample(logits, {.greedy = true}, {}, 0, 0), 77);
  EXPECT_EQ(sampler.sample(logits, {.temperature = 0}, {}, 0, 0), 77);
  const std::vector<int32_t> history{77};
  EXPECT_EQ(sampler.sample(logits, {.greedy = true, .repetition_penalty = 1.1f}, history, 1, 0), 4000);
  EXPECT_EQ(sampler.sample(logits, {.greedy = true, .presence_penalty = 1}, history, 1, 0), 77);  // a prompt token
  EXPECT_EQ(sampler.sample(logits, {.greedy = true, .presence_penalty = 1}, history, 0, 0), 4000);
  EXPECT_EQ(sampler.sample(std::vector<float>{5}, {}, {}, 0, 0), 0);
}

TEST(Sampler, DrawsFollowTheProbabilities) {
  const auto logits = random_logits(40, 11, 1.0f);
  const SamplingParams params{.temperature = 0.9f, .top_k = 12, .top_p = 0.9f};
  const auto probs = reference(logits, params, {}, 0);
  Sampler sampler;
  std::map<int32_t, int> counts;
  constexpr int n = 40000;
  for (uint64_t i = 0; i < n; i++) counts[sampler.sample(logits, params, {}, 0, i)]++;
  double chi2 = 0;
  for (const auto& [id, count] : counts) ASSERT_TRUE(probs.contains(id));
  for (const auto& [id, p] : probs) chi2 += std::pow(counts[id] - n * p, 2) / (n * p);
  EXPECT_LT(chi2, static_cast<double>(probs.size()) + 5 * std::sqrt(2.0 * static_cast<double>(probs.size())));
}

TEST(Sampler, ADrawDependsOnSeedStreamAndPositionAlone) {
  const auto logits = random_logits(6400, 5), other = random_logits(6400, 6);
  const SamplingParams params{.temperature = 1.5f, .top_k = 0, .top_p = 1, .seed = 42};
  const std::vector<int32_t> history{1, 2, 3};
  Sampler fresh, used;
  for (uint64_t i = 0; i < 20; i++) used.sample(other, {.repetition_penalty = 1.3f, .seed = i}, history, 1, i);
  std::map<int32_t, int> distinct;
  for (uint64_t stream = 0; stream < 20; stream++) {
    const int32_t id = fresh.sample(logits, params, history, 2, stream);
    EXPECT_EQ(used.sample(logits, params, history, 2, stream), id);
    distinct[id]++;
  }
  EXPECT_GT(distinct.size(), 10u);  // streams differ
  const std::vector<int32_t> longer{1, 2, 3, 4};
  auto seeded = params;
  seeded.seed = 43;
  int differ = 0;
  for (uint64_t stream = 0; stream < 20; stream++) {
    const int32_t id = fresh.sample(logits, params, history, 2, stream);
    differ += (fresh.sample(logits, params, longer, 2, stream) != id) +
              (fresh.sample(logits, seeded, history, 2, stream) != id);
  }
  EXPECT_GT(differ, 20);
}

TEST(Sampler, MinusInfinityMasksATokenForGood) {
  auto logits = random_logits(64, 9);
  for (size_t i = 1; i < 64; i++) logits[i] = -kInf;
  Sampler sampler;
  const std::vector<int32_t> history{0, 1};
  for (uint64_t i = 0; i < 50; i++) {
    EXPECT_EQ(sampler.sample(logits, {.top_k = 0, .top_p = 1, .repetition_penalty = 1.2f}, history, 0, i), 0);
  }
  EXPECT_EQ(sampler.sample(logits, {.top_k = 10}, {}, 0, 0), 0);
}

TEST(Sampler, BrokenLogitsAreAnErrorAndLeaveTheSamplerUsable) {
  const auto good = random_logits(100, 9);
  Sampler sampler;
  const std::vector<int32_t> history{5, 5, 7};
  const SamplingParams penalized{.repetition_penalty = 1.2f, .frequency_penalty = 0.5f};
  const int32_t id = sampler.sample(good, penalized, history, 1, 0);
  std::vector<TokenLogprob> top;
  for (const float bad : {std::nanf(""), kInf}) {
    for (const size_t at : {0u, 50u, 99u}) {
      auto logits = good;
      logits[at] = bad;
      EXPECT_THROW(sampler.sample(logits, {}, {}, 0, 0), Error);
      EXPECT_THROW(sampler.sample(logits, {.greedy = true}, {}, 0, 0), Error);
      EXPECT_THROW(sampler.sample(logits, penalized, history, 1, 0), Error);
      EXPECT_THROW(sampler.logprobs(logits, 1, 2, top), Error);
    }
  }
  EXPECT_THROW(sampler.sample(std::vector<float>(100, -kInf), {}, {}, 0, 0), Error);
  EXPECT_EQ(sampler.sample(good, penalized, history, 1, 0), id);
}

TEST(Sampler, HistoryOutsideTheVocabularyIsIgnored) {
  const auto logits = random_logits(100, 9);
  Sampler sampler;
  const std::vector<int32_t> history{-1, 100, 1 << 30};
  const auto with = sampler.candidates(logits, {.repetition_penalty = 2}, history, 1);
  const std::vector<Candidate> kept(with.begin(), with.end());
  const auto without = sampler.candidates(logits, {}, {}, 0);
  ASSERT_EQ(kept.size(), without.size());
  for (size_t i = 0; i < kept.size(); i++) EXPECT_EQ(kept[i].id, without[i].id);
}

TEST(Sampler, LogprobsAreOfTheRawLogits) {
  auto logits = random_logits(6400, 21);
  logits[10] = logits[20] = 50;
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - 50);
  Sampler sampler;
  std::vector<TokenLogprob> top;
  EXPECT_NEAR(static_cast<double>(sampler.logprobs(logits, 123, 3, top)),
              static_cast<double>(logits[123]) - 50 - std::log(sum), 1e-5);
  ASSERT_EQ(top.size(), 3u);
  EXPECT_EQ(top[0].id, 10);
  EXPECT_EQ(top[1].id, 20);
  EXPECT_GT(top[1].logprob, top[2].logprob);
  EXPECT_NEAR(static_cast<double>(top[0].logprob), -std::log(sum), 1e-6);
  sampler.logprobs(logits, 0, 0, top);
  EXPECT_TRUE(top.empty());
  sampler.logprobs(std::span(logits).first(3), 0, 20, top);
  EXPECT_EQ(top.size(), 3u);
}

TEST(Sampler, ParametersOutOfRangeAreErrors) {
  EXPECT_NO_THROW(check_sampling({}));
  EXPECT_THROW(check_sampling({.temperature = -1}), Error);
  EXPECT_THROW(check_sampling({.temperature = std::nanf("")}), Error);
  EXPECT_THROW(check_sampling({.top_k = -1}), Error);
  EXPECT_THROW(check_sampling({.top_p = 0}), Error);
  EXPECT_THROW(check_sampling({.top_p = 1.01f}), Error);
  EXPECT_THROW(check_sampling({.min_p = -0.1f}), Error);
  EXPECT_THROW(check_sampling({.repetition_penalty = 0}), Error);
  EXPECT_THROW(check_sampling({.presence_penalty = kInf}), Error);
  EXPECT_THROW(check_sampling({.frequency_penalty = std::nanf("")}), Error);
}

}  // namespace mm
