// The forward pass must not depend on how tokens are laid out: several sequences in a batch or each alone, through a
// cache in one piece, in pieces, or token by token.
#include "model/forward.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "base/rng.h"
#include "model/lm_head.h"
#include "model/test_config.h"

namespace mm {
namespace {

std::vector<ModelConfig> configs() {
  ModelConfig llama = tiny_config(), yarn = tiny_config();
  llama.architecture = "LlamaForCausalLM";
  llama.qk_norm = false;
  llama.tie_word_embeddings = false;
  yarn.rope_scaling = YarnScaling{.factor = 4, .original_max_position_embeddings = 16};
  return {tiny_config(), llama, moe_config(), yarn};
}

std::unique_ptr<Model> lively_model(const ModelConfig& c) {
  auto model = Model::random(c, 3);
  for (const ParamSpec& spec : model->table.specs()) {
    if (spec.init != Init::normal) continue;
    for (int64_t i = 0; i < spec.shape.numel(); i++) model->weights.view(spec).f32()[i] *= 10;
  }
  return model;
}

using Ids = std::vector<int32_t>;

std::vector<Ids> sequences(const std::vector<int>& lengths) {
  std::vector<Ids> out;
  Rng rng{2, 7, 0};
  for (const int n : lengths) {
    out.emplace_back();
    for (int i = 0; i < n; i++) out.back().push_back(static_cast<int32_t>(rng.below(53)));
  }
  return out;
}

void append(TokenBatch& b, const Ids& ids) {
  for (size_t t = 0; t < ids.size(); t++) {
    b.ids.push_back(ids[t]);
    b.positions.push_back(static_cast<int32_t>(t));
  }
  b.cu_seqlens.push_back(static_cast<int32_t>(b.n_tok()));
}

// Logits of every token, after forward().
std::vector<float> logits_of(const Model& model, const Activations& acts, int64_t n_tok) {
  LmHead head(model.config);
  std::vector<float> out(static_cast<size_t>(n_tok * model.config.vocab_size));
  Ids rows;
  for (int64_t t = 0; t < n_tok; t++) rows.push_back(static_cast<int32_t>(t));
  head.logits(Device{}, model, acts.h, rows, View(out.data(), DType::f32, {n_tok, model.config.vocab_size}));
  return out;
}

std::vector<float> logits_alone(Model& model, const Ids& ids, bool train) {
  TokenBatch b;
  b.clear();
  append(b, ids);
  Activations acts(model.config, b.n_tok(), train);
  forward(Device{}, model, b, acts);
  return logits_of(model, acts, b.n_tok());
}

void expect_close(const std::vector<float>& a, const std::vector<float>& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size());
  double worst = 0, largest = 0;
  for (size_t i = 0; i < a.size(); i++) {
    worst = std::max(worst, static_cast<double>(std::abs(a[i] - b[i])));
    largest = std::max(largest, static_cast<double>(std::abs(b[i])));
  }
  EXPECT_LE(worst, 1e-4) << what;
  EXPECT_GT(largest, 0.5) << what << ": the logits say nothing";
}

TEST(Forward, ABatchIsItsSequences) {
  for (const ModelConfig& c : configs()) {
    const auto model = lively_model(c);
    const auto all = sequences({13, 1, 29, 6});
    std::vector<float> expected;
    TokenBatch b;
    b.clear();
    for (const Ids& ids : all) {
      append(b, ids);
      const auto alone = logits_alone(*model, ids, true);
      expected.insert(expected.end(), alone.begin(), alone.end());
      expect_close(logits_alone(*model, ids, false), alone, c.architecture + " without training's memory");
    }
    Activations acts(c, b.n_tok(), true);
    forward(Device{}, *model, b, acts);
    expect_close(logits_of(*model, acts, b.n_tok()), expected, c.architecture);
  }
}

TEST(Forward, TheCacheChangesNothing) {
  for (const ModelConfig& c : configs()) {
    const auto model = lively_model(c);
    const auto all = sequences({31, 19});
    std::vector<std::vector<float>> expected;
    for (const Ids& ids : all) expected.push_back(logits_alone(*model, ids, false));
    for (const int64_t piece : {1, 2, 7, 31}) {
      KvCache cache(c, 2, 40);
      Activations acts(c, 64, false);
      std::vector<std::vector<float>> got(2);
      while (cache.length(0) < 31 || cache.length(1) < 19) {  // both sequences in one batch while both last
        TokenBatch b;
        cache.clear_batch();
        std::vector<std::pair<size_t, int64_t>> parts;
        for (size_t s = 0; s < 2; s++) {
          const auto slot = static_cast<int64_t>(s);
          const int64_t at = cache.length(slot), n = std::min(piece, static_cast<int64_t>(all[s].size()) - at);
          if (n == 0) continue;
          cache.append(b, slot, all[s].data() + at, n);
          parts.emplace_back(s, n);
        }
        forward(Device{}, *model, b, acts, &cache);
        const auto logits = logits_of(*model, acts, b.n_tok());
        auto from = logits.begin();
        for (const auto& [s, n] : parts) {
          got[s].insert(got[s].end(), from, from + n * c.vocab_size);
          from += n * c.vocab_size;
        }
      }
      for (size_t s = 0; s < 2; s++) expect_close(got[s], expected[s], fmt::format("pieces of {}", piece));
    }
  }
}

TEST(Forward, ATruncatedCacheForgets) {
  const ModelConfig c = tiny_config();
  const auto model = lively_model(c);
  const auto all = sequences({20, 12});
  KvCache cache(c, 1, 40);
  Activations acts(c, 40, false);
  TokenBatch b;
  cache.append(b, 0, all[0].data(), 20);
  forward(Device{}, *model, b, acts, &cache);
  cache.truncate(0, 9);
  cache.clear_batch();
  TokenBatch rest;
  cache.append(rest, 0, all[1].data(), 12);
  forward(Device{}, *model, rest, acts, &cache);
  Ids joined(all[0].begin(), all[0].begin() + 9);
  joined.insert(joined.end(), all[1].begin(), all[1].end());
  const auto expected = logits_alone(*model, joined, false);
  expect_close(logits_of(*model, acts, 12), {expected.begin() + 9 * c.vocab_size, expected.end()}, "after truncate");
}

TEST(Forward, RefusesIdsAndLengthsFromOutside) {
  const ModelConfig c = tiny_config();
  const auto model = Model::random(c, 1);
  Activations acts(c, 8, false);
  for (const int32_t bad : {-1, 53}) {
    TokenBatch b;
    b.clear();
    append(b, {3, bad});
    try {
      forward(Device{}, *model, b, acts);
      FAIL() << bad;
    } catch (const Error& e) {
      EXPECT_EQ(
          std::string(e.what()),
          fmt::format("token 1 of the input: expected an id in [0, 53), found {}; check that the tokenizer belongs "
                      "to this model",
                      bad));
    }
  }
  KvCache cache(c, 1, 4);
  TokenBatch b;
  const Ids ids{1, 2, 3, 4, 5};
  EXPECT_THROW(cache.append(b, 0, ids.data(), 5), Error);
  EXPECT_EQ(cache.length(0), 0);
  EXPECT_EQ(b.n_tok(), 0);
}

}  // namespace
}  // namespace mm
