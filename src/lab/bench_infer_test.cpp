#include "lab/bench_infer.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "base/thread_team.h"
#include "engine/runner.h"
#include "model/cost.h"

namespace mm {
namespace {

ModelConfig tiny_config() {
  ModelConfig c = load_config("demo");
  c.num_hidden_layers = 2;
  c.vocab_size = 97;
  return c;
}

TEST(BenchInfer, BytesOfAStep) {
  ModelConfig c = tiny_config();
  const auto n = static_cast<double>(param_count(c));
  EXPECT_DOUBLE_EQ(decode_step_bytes(c, WeightFormat::f32, KvFormat::f32, 1, 0), 4 * n);
  EXPECT_DOUBLE_EQ(decode_step_bytes(c, WeightFormat::bf16, KvFormat::f32, 7, 0), 2 * n);  // once for all sequences
  EXPECT_DOUBLE_EQ(decode_step_bytes(c, WeightFormat::i8, KvFormat::f32, 1, 0), 1.0625 * n);
  EXPECT_DOUBLE_EQ(decode_step_bytes(c, WeightFormat::f32, KvFormat::bf16, 3, 10),
                   4 * n + 30 * static_cast<double>(kv_bytes_per_token(c, KvFormat::bf16)));
  c.tie_word_embeddings = false;
  EXPECT_DOUBLE_EQ(decode_step_bytes(c, WeightFormat::f32, KvFormat::f32, 1, 0), 4 * n);  // one more matrix, not read
}

TEST(BenchInfer, BytesOfAMixture) {
  ModelConfig c = load_config("minimind-3-moe");
  const auto step = [&](int64_t batch) { return decode_step_bytes(c, WeightFormat::f32, KvFormat::f32, batch, 0); };
  EXPECT_DOUBLE_EQ(step(1), 4.0 * static_cast<double>(active_param_count(c)));
  EXPECT_DOUBLE_EQ(step(100), 4.0 * static_cast<double>(param_count(c)));
  EXPECT_LT(step(1), step(2));
}

TEST(BenchInfer, ARowForEachCombination) {
  const auto model = Model::random(tiny_config(), 1);
  InferBenchOptions o{.weights = {WeightFormat::f32, WeightFormat::i8},
                      .kv = {KvFormat::f32},
                      .batch = {1, 3},
                      .length = {0, 20},
                      .n_tok = 8,
                      .rounds = 2};
  int n_shown = 0;
  const ordered_json decode = bench_decode(*model, o, [&](const ordered_json&) { n_shown++; });
  ASSERT_EQ(decode["rows"].size(), 8u);
  EXPECT_EQ(n_shown, 8);
  for (const ordered_json& r : decode["rows"]) {
    const auto speed = r["tokens_per_second"].get<double>();
    EXPECT_TRUE(std::isfinite(speed) && speed > 0) << r;
    EXPECT_LE(r["lowest"].get<double>(), speed);
    EXPECT_GE(r["highest"].get<double>(), speed);
    EXPECT_NEAR(r["step_ms"].get<double>() * speed, 1e3 * r["batch"].get<double>(), 1e-6);
    EXPECT_GT(r["share_of_limit"].get<double>(), 0);
  }
  EXPECT_EQ(decode["rows"][3]["depth"], 20);
  EXPECT_EQ(decode["rows"][4]["weights"], "i8");
  o.length = {20};
  const ordered_json prefill = bench_prefill(*model, o, [](const ordered_json&) {});
  ASSERT_EQ(prefill["rows"].size(), 4u);
  EXPECT_GT(prefill["rows"][0]["tokens_per_second"].get<double>(), 0);
  EXPECT_EQ(prefill["rows"][0]["threads"], num_threads());
  o.length = {100000};
  EXPECT_THROW(bench_prefill(*model, o, [](const ordered_json&) {}), Error);
}

TEST(BenchInfer, ThreadsAreSweptAndPutBack) {
  const auto model = Model::random(tiny_config(), 1);
  const int before = num_threads();
  const InferBenchOptions o{.threads = {2, 1}, .batch = {1, 2}, .length = {4}, .n_tok = 8, .rounds = 1};
  const ordered_json decode = bench_decode(*model, o, [](const ordered_json&) {});
  ASSERT_EQ(decode["rows"].size(), 4u);
  for (size_t i = 0; i < 4; i++) EXPECT_EQ(decode["rows"][i]["threads"], i < 2 ? 2 : 1);
  EXPECT_EQ(decode["threads"], 2);
  EXPECT_TRUE(decode["engine"].is_null());
  EXPECT_EQ(num_threads(), before);
}

TEST(BenchInfer, DraftsHaveNoLimit) {
  const auto model = Model::random(tiny_config(), 1), draft = Model::random(tiny_config(), 2);
  InferBenchOptions o{.draft = draft.get(), .batch = {2}, .length = {4}, .n_tok = 8, .rounds = 1};
  o.engine.draft_tokens = 3;
  const ordered_json r = bench_decode(*model, o, [](const ordered_json&) {})["rows"][0];
  EXPECT_GT(r["tokens_per_second"].get<double>(), 0);
  for (const char* key : {"step_bytes", "gbytes_per_second", "limit_gbytes_per_second", "share_of_limit"})
    EXPECT_TRUE(r.at(key).is_null()) << key;
}

}  // namespace
}  // namespace mm
