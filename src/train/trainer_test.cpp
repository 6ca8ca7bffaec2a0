// What the trainer does when a step goes wrong: a weight or an activation that is not finite, a spike, rows without
// targets.
#include "train/trainer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "data/test_data.h"
#include "train/checkpoint.h"

namespace mm {
namespace {

constexpr int64_t n_rows = 12;
constexpr int64_t odd_line = 8;  // of the one row with a "z"

// A tiny run: one row a step, each row once, in an order that the seed decides.
class Training : public testing::Test {
 protected:
  void SetUp() override {
    const Tokenizer& t = tiny_tokenizer();
    config_.hidden_size = 32;
    config_.intermediate_size = 48;
    config_.num_hidden_layers = 2;
    config_.num_attention_heads = 4;
    config_.num_key_value_heads = 2;
    config_.head_dim = 8;
    config_.vocab_size = t.vocab_size();
    config_.max_position_embeddings = 64;
    odd_ = t.encode("z").at(0);
    options_.output = scratch_.path("run");
    options_.loader = {.batch_size = 1, .seq_len = 24, .packed = false, .seed = 1};
    options_.schedule.base_lr = 1e-5;
    options_.save_every = 1;
  }

  TokenDataset data(const std::string& odd_text) const {
    std::string text;
    for (int64_t line = 1; line <= n_rows; line++)
      text += line == odd_line ? "{\"text\": \"" + odd_text + "\"}\n"
                               : "{\"text\": \"hello world " + std::to_string(line) + "\"}\n";
    return TokenDataset::build({scratch_.write("data.jsonl", text)}, tiny_tokenizer(),
                               {.kind = SampleKind::pretrain, .max_len = 24}, "");
  }

  static View weight(Model& model, const std::string& name) { return model.weights.view(model.table.at(name)); }

  // Only "z" has something in channel 0, and neither layer writes there; other tokens differ in the other channels.
  std::unique_ptr<Model> marked_model() const {
    auto model = Model::random(config_, 1);
    const View embed = weight(*model, "model.embed_tokens.weight");
    for (int64_t i = 0; i < embed.rows(); i++) embed.f32()[i * 32] = i == odd_ ? 1.0f : 0.0f;
    for (const char* layer : {"model.layers.0.", "model.layers.1."}) {
      const std::string l = layer;
      for (const std::string& name : {l + "self_attn.o_proj.weight", l + "mlp.down_proj.weight"}) {
        const View w = weight(*model, name);
        std::fill_n(w.f32(), w.cols(), 0.0f);
      }
    }
    return model;
  }

  // "z" overflows the first unit of layer 1's gate; every other token gives 0 there, and the unit leads nowhere.
  std::unique_ptr<Model> overflowing_model() const {
    auto model = marked_model();
    const View gate = weight(*model, "model.layers.1.mlp.gate_proj.weight"),
               up = weight(*model, "model.layers.1.mlp.up_proj.weight"),
               down = weight(*model, "model.layers.1.mlp.down_proj.weight");
    std::fill_n(gate.f32(), gate.cols(), 0.0f);
    gate.f32()[0] = 3e38f;
    std::fill_n(up.f32(), up.cols(), 0.0f);
    for (int64_t i = 0; i < down.rows(); i++) down.f32()[i * down.cols()] = 0;
    return model;
  }

  TrainResult train(Model& model, const TokenDataset& rows) {
    return train_model(options_, model, tiny_tokenizer(), rows, std::nullopt);
  }

  std::string error_of(Model& model, const TokenDataset& rows) {
    try {
      train(model, rows);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  }

  std::vector<ordered_json> metrics() const {
    std::vector<ordered_json> out;
    std::string text = read_file(path_join(options_.output, "metrics.jsonl"));
    for (size_t at = 0; at < text.size();) {
      const size_t end = text.find('\n', at);
      out.push_back(parse_json(text.substr(at, end - at), "line"));
      at = end + 1;
    }
    return out;
  }

  int64_t step_without_loss() const {
    for (const ordered_json& row : metrics())
      if (row["train/loss"].is_null()) return row["step"];
    return 0;
  }

  ordered_json state_of(const std::string& checkpoint) const {
    return load_json(path_join(checkpoint, "trainer/state.json"));
  }

  ScratchDir scratch_;
  ModelConfig config_;
  TrainOptions options_;
  int32_t odd_ = 0;
};

std::vector<float> values(const Model& model) {
  const View w = model.weights.flat();
  return {w.f32(), w.f32() + w.numel()};
}

TEST_F(Training, ANaNWeightIsNamed) {
  const auto model = Model::random(config_, 1);
  weight(*model, "model.layers.1.self_attn.k_proj.weight").f32()[37] = std::nanf("");
  const std::string what = error_of(*model, data("hello"));
  EXPECT_NE(what.find("step 1: "), std::string::npos) << what;
  EXPECT_NE(what.find("NaN or infinity in weight model.layers.1.self_attn.k_proj.weight at element 37"),
            std::string::npos)
      << what;
  EXPECT_NE(what.find("the last checkpoint is none"), std::string::npos) << what;
  EXPECT_EQ(what.find('\n'), std::string::npos);
}

TEST_F(Training, StopNamesLayerAndRowAndKeepsTheCheckpoint) {
  for (const float dropout : {0.0f, 0.2f}) {
    config_.dropout = dropout;
    options_.output = scratch_.path(dropout > 0 ? "dropout" : "plain");
    const auto model = overflowing_model();
    const std::string what = error_of(*model, data("hello z"));
    EXPECT_NE(what.find("activation layer 1 gate and up, first at token "), std::string::npos) << what;
    EXPECT_NE(what.find("data.jsonl:" + std::to_string(odd_line)), std::string::npos) << what;
    const auto rows = metrics();
    const int64_t last = rows.empty() ? 0 : rows.back()["step"].get<int64_t>();
    EXPECT_NE(what.find("step " + std::to_string(last + 1) + ": "), std::string::npos) << what;
    const std::string checkpoint = find_checkpoint(options_.output);
    ASSERT_FALSE(checkpoint.empty());
    EXPECT_NE(what.find(checkpoint), std::string::npos) << what;
    EXPECT_EQ(state_of(checkpoint)["step"], last);
    EXPECT_FALSE(file_exists(path_join(options_.output, "model.safetensors")));
  }
}

TEST_F(Training, SkipGoesOn) {
  options_.non_finite = NonFinitePolicy::skip;
  const auto model = overflowing_model();
  const TrainResult r = train(*model, data("hello z"));
  EXPECT_EQ(r.steps, n_rows);
  EXPECT_EQ(r.skipped, 1);
  EXPECT_EQ(state_of(find_checkpoint(options_.output))["updates"], n_rows - 1);
  int64_t without_loss = 0;
  for (const ordered_json& row : metrics()) {
    without_loss += row["train/loss"].is_null();
    EXPECT_EQ(row["train/skipped"], without_loss);
  }
  EXPECT_EQ(without_loss, 1);
  for (const float w : values(*model)) ASSERT_TRUE(std::isfinite(w));
}

TEST_F(Training, SkipGivesUpWhenEveryStepIsBad) {
  options_.non_finite = NonFinitePolicy::skip;
  options_.max_steps = 40;
  const auto model = Model::random(config_, 1);
  weight(*model, "model.norm.weight").f32()[0] = std::numeric_limits<float>::infinity();
  const std::string what = error_of(*model, data("hello"));
  EXPECT_NE(what.find("step 11: "), std::string::npos) << what;
}

TEST_F(Training, RollbackReturnsToTheLastCheckpoint) {
  options_.non_finite = NonFinitePolicy::skip;
  train(*overflowing_model(), data("hello z"));
  const int64_t bad = step_without_loss();
  ASSERT_GT(bad, 3) << "choose another odd_line";
  // The run ends at the bad step; the last checkpoint before it is two steps old.
  options_.output = scratch_.path("rolled");
  options_.non_finite = NonFinitePolicy::rollback;
  options_.max_steps = bad;
  options_.save_every = bad - 2;
  options_.keep_checkpoints = 5;
  const auto model = overflowing_model();
  const TrainResult r = train(*model, data("hello z"));
  EXPECT_EQ(r.steps, bad);
  EXPECT_EQ(r.skipped, 1);
  const std::string checkpoint = path_join(options_.output, fmt::format("checkpoints/step-{:08}", bad - 2));
  EXPECT_EQ(values(*model), values(*Model::load(checkpoint)));
  EXPECT_EQ(state_of(find_checkpoint(options_.output))["updates"], bad - 2);
  // And when more steps follow, they train on from there.
  options_.output = scratch_.path("rolled_on");
  options_.max_steps = bad + 2;
  const auto longer = overflowing_model();
  EXPECT_EQ(train(*longer, data("hello z")).skipped, 1);
  EXPECT_EQ(state_of(find_checkpoint(options_.output))["updates"], bad);
  EXPECT_NE(values(*longer), values(*model));
}

TEST_F(Training, RollbackWithoutACheckpointIsAnError) {
  options_.non_finite = NonFinitePolicy::rollback;
  options_.save_every = 0;
  const auto model = overflowing_model();
  const std::string what = error_of(*model, data("hello z"));
  EXPECT_NE(what.find("a checkpoint to roll back to"), std::string::npos) << what;
}

// The final norm turns channel 0 round, so the model is sure that no "z" follows a "z".
TEST_F(Training, ALossSpikeIsSkipped) {
  options_.spike = {.threshold = 6, .window = 8, .warmup = 3};
  const auto spiky_model = [&] {
    auto model = marked_model();
    weight(*model, "model.norm.weight").f32()[0] = -1;
    return model;
  };
  const auto model = spiky_model();
  const TrainResult r = train(*model, data("zzzzzzzz"));
  EXPECT_EQ(r.skipped, 1);
  EXPECT_EQ(state_of(find_checkpoint(options_.output))["updates"], n_rows - 1);
  const auto rows = metrics();
  double highest = 0;
  int64_t at = 0;
  for (const ordered_json& row : rows) {
    if (row["train/loss"].get<double>() > highest) {
      highest = row["train/loss"];
      at = row["step"];
    }
  }
  EXPECT_GT(highest, rows[0]["train/loss"].get<double>() + 2);
  for (const ordered_json& row : rows) EXPECT_EQ(row["train/skipped"], row["step"] >= at ? 1 : 0);
  options_.output = scratch_.path("off");
  options_.spike.threshold = 0;
  EXPECT_EQ(train(*spiky_model(), data("zzzzzzzz")).skipped, 0);
}

TEST_F(Training, AStepWithoutTargetsIsSkipped) {
  std::string text;
  for (int i = 0; i < 6; i++) {
    const std::string question = i == 2 ? std::string(200, 'q') : "hi";  // cut long before the answer
    text += R"({"conversations": [{"role": "user", "content": ")" + question +
            R"("}, {"role": "assistant", "content": "hello"}]})" + "\n";
  }
  const TokenDataset chats = TokenDataset::build({scratch_.write("chats.jsonl", text)}, tiny_tokenizer(),
                                                 {.kind = SampleKind::chat, .max_len = 60}, "");
  options_.loader.seq_len = 60;
  const auto model = Model::random(config_, 1);
  const TrainResult r = train(*model, chats);
  EXPECT_EQ(r.steps, 6);
  EXPECT_EQ(r.skipped, 1);
  EXPECT_GT(step_without_loss(), 0);
}

TEST_F(Training, SameSeedSameBits) {
  const auto run = [&](const std::string& name, uint64_t seed) {
    options_.output = scratch_.path(name);
    options_.loader.seed = options_.seed = seed;
    const auto model = Model::random(config_, seed);
    train(*model, data("hello z"));
    return values(*model);
  };
  const auto first = run("a", 4);
  EXPECT_EQ(run("b", 4), first);
  EXPECT_NE(run("c", 5), first);
}

}  // namespace
}  // namespace mm
