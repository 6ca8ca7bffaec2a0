#include "eval/perplexity.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "base/fs.h"
#include "base/json.h"
#include "model/forward.h"
#include "model/lm_head.h"
#include "text/bpe_trainer.h"

namespace mm {

static Tokenizer small_tokenizer() {
  BpeTrainer trainer({.vocab_size = 300});
  trainer.feed({"the sea is wide and the sky is high", "one two three four"});
  return trainer.train();
}

static std::unique_ptr<Model> small_model(uint64_t seed) {
  ModelConfig c;
  c.hidden_size = 32;
  c.intermediate_size = 48;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 2;
  c.num_key_value_heads = 1;
  c.head_dim = 16;
  c.vocab_size = 300;
  c.max_position_embeddings = 64;
  auto model = Model::random(c, seed);
  for (const ParamSpec& spec : model->table.specs()) {  // so that its logits differ from each other
    if (spec.init == Init::ones) continue;
    float* w = model->weights.view(spec).f32();
    for (int64_t i = 0; i < spec.shape.numel(); i++) w[i] *= 8;
  }
  return model;
}

// Sum of -log p and count of the targets, one row a pass, from full logits.
static std::pair<double, int64_t> by_hand(Model& model, const std::vector<int32_t>& ids) {
  TokenBatch batch;
  batch.clear();
  for (size_t i = 0; i < ids.size(); i++) {
    batch.ids.push_back(ids[i]);
    batch.positions.push_back(static_cast<int32_t>(i));
  }
  batch.cu_seqlens.push_back(static_cast<int32_t>(ids.size()));
  Activations acts(model.config, batch.n_tok(), false);
  forward({}, model, batch, acts);
  LmHead head(model.config);
  std::vector<int32_t> rows;
  for (size_t i = 0; i + 1 < ids.size(); i++) rows.push_back(static_cast<int32_t>(i));
  std::vector<float> logits(rows.size() * 300);
  head.logits({}, model, acts.h, rows, View(logits.data(), DType::f32, {static_cast<int64_t>(rows.size()), 300}));
  double sum = 0;
  for (size_t t = 0; t < rows.size(); t++) {
    const float* x = logits.data() + t * 300;
    double total = 0;
    for (int i = 0; i < 300; i++) total += std::exp(static_cast<double>(x[i]));
    sum -= static_cast<double>(x[ids[t + 1]]) - std::log(total);
  }
  return {sum, static_cast<int64_t>(rows.size())};
}

TEST(Perplexity, EqualsRowsByHandWhateverTheBatch) {
  const auto tokenizer = small_tokenizer();
  const auto model = small_model(1);
  const std::string path = testing::TempDir() + "ppl.jsonl";
  const std::vector<std::string> texts{"the sea", "one two three four and the sky is high and wide", "x",
                                       "the sky is the sea"};
  std::string file;
  for (const auto& t : texts) file += ordered_json{{"text", t}}.dump() + "\n";
  write_file(path, file);
  double sum = 0;
  int64_t targets = 0;
  for (const auto& t : texts) {
    std::vector<int32_t> ids{tokenizer.bos_id()};
    tokenizer.encode_append(t, ids);
    ids.resize(std::min<size_t>(ids.size(), 11));
    ids.push_back(tokenizer.eos_id());
    const auto [row_sum, row_targets] = by_hand(*model, ids);
    sum += row_sum;
    targets += row_targets;
  }
  for (const int64_t batch_tokens : {1, 13, 4096}) {
    const auto result = perplexity(*model, tokenizer, {path}, {.max_len = 12, .batch_tokens = batch_tokens});
    EXPECT_NEAR(result.nll, sum / static_cast<double>(targets), 1e-5);
    EXPECT_DOUBLE_EQ(result.ppl, std::exp(result.nll));
    EXPECT_EQ(result.targets, targets);
    EXPECT_EQ(result.rows, 4);
  }
}

TEST(Perplexity, TrainedModelsRecordedLoss) {
  const std::string dir = MM_SOURCE_DIR "/../shared/models/qwen3-8m", data = MM_SOURCE_DIR "/../shared/data";
  if (!dir_exists(dir) || !dir_exists(data)) GTEST_SKIP() << "NOT TESTED: " << dir << " or " << data << " is missing";
  const auto model = Model::load(dir);
  const auto tokenizer = Tokenizer::load(dir);
  const ordered_json expected = load_json(dir + "/expected.json");
  const ordered_json& recorded = expected["fp32_from_fp16_weights"];
  for (const char* name : {"pretrain_valid", "sft_valid"}) {
    const auto result = perplexity(*model, tokenizer, {data + "/" + name + ".jsonl"}, {.keep_empty_think = false});
    EXPECT_NEAR(result.nll, recorded[name]["mean_nll"].get<double>(), 1e-3) << name;
    EXPECT_EQ(result.targets, recorded[name]["targets"].get<int64_t>()) << name;
  }
}

TEST(Perplexity, BadInputIsAnError) {
  const auto tokenizer = small_tokenizer();
  const auto model = small_model(2);
  const std::string path = testing::TempDir() + "ppl_bad.jsonl";
  write_file(path, "{\"text\": \"the sea\"}\n");
  EXPECT_NO_THROW(perplexity(*model, tokenizer, {path}, {.max_len = 64}));
  EXPECT_THROW(perplexity(*model, tokenizer, {path}, {.max_len = 65}), Error);
  EXPECT_THROW(perplexity(*model, tokenizer, {path}, {.max_len = 1}), Error);
  EXPECT_THROW(perplexity(*model, tokenizer, {path}, {.max_len = 64, .batch_tokens = 0}), Error);
  EXPECT_THROW(perplexity(*model, tokenizer, {path + ".none"}, {.max_len = 64}), Error);
  *model->weights.final_norm.f32() = std::nanf("");
  EXPECT_THROW(perplexity(*model, tokenizer, {path}, {.max_len = 64}), Error);
  write_file(path, "");
  EXPECT_THROW(perplexity(*small_model(2), tokenizer, {path}, {.max_len = 64}), Error);
}

}  // namespace mm
