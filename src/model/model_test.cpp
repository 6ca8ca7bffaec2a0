// Model folders: what is written loads as it was, the layouts of others load too, and what does not fit is refused in
// one line.
#include "model/model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "base/fs.h"
#include "formats/safetensors.h"
#include "model/test_config.h"

namespace mm {
namespace {

class ModelFolder : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = testing::TempDir() + "model_folder_" + testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(dir_);
    make_dirs(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string file(const std::string& name) const { return path_join(dir_, name); }

  void write_config(const ordered_json& j) const { write_file(file("config.json"), j.dump()); }

  // The model's tensors, to be changed before they are written.
  static std::vector<TensorToWrite> tensors_of(const Model& m) {
    std::vector<TensorToWrite> out;
    for (const ParamSpec& spec : m.table.specs()) out.push_back({spec.hf_name, m.weights.view(spec), DType::f32});
    return out;
  }

  static TensorToWrite& named(std::vector<TensorToWrite>& tensors, const std::string& name) {
    return *std::find_if(tensors.begin(), tensors.end(), [&](const TensorToWrite& t) { return t.name == name; });
  }

  std::string error_of_load() const {
    try {
      Model::load(dir_);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  }

  std::string dir_;
};

std::vector<float> values(const Model& model) {
  const View w = model.weights.flat();
  return {w.f32(), w.f32() + w.numel()};
}

TEST_F(ModelFolder, SavedAndLoadedIsTheSame) {
  ModelConfig llama = tiny_config(), yarn = tiny_config(), shared = moe_config();
  llama.architecture = "LlamaForCausalLM";
  llama.qk_norm = false;
  llama.tie_word_embeddings = false;
  llama.dropout = 0.1f;
  yarn.rope_scaling = YarnScaling{.factor = 8, .original_max_position_embeddings = 32};
  shared.architecture = "MiniMindForCausalLM";
  shared.n_shared_experts = 1;
  shared.norm_topk_prob = false;
  for (const ModelConfig& c : {tiny_config(), llama, yarn, moe_config(), shared}) {
    const auto model = Model::random(c, 7);
    model->save(dir_);
    const auto loaded = Model::load(dir_);
    EXPECT_EQ(values(*loaded), values(*model)) << c.architecture;
    EXPECT_EQ(loaded->config.to_json(), c.to_json());
    EXPECT_EQ(loaded->config.qk_norm, c.qk_norm);
  }
}

TEST_F(ModelFolder, HalfPrecision) {
  const auto model = Model::random(tiny_config(), 7);
  const auto exact = values(*model);
  for (const auto& [dtype, bits] : {std::pair{DType::f16, 11}, std::pair{DType::bf16, 8}}) {
    model->save(dir_, dtype);
    const auto loaded = values(*Model::load(dir_));
    bool changed = false;
    for (size_t i = 0; i < exact.size(); i++) {
      changed = changed || loaded[i] != exact[i];
      ASSERT_NEAR(loaded[i], exact[i], std::abs(exact[i]) * std::ldexp(1.0, -bits) + 3e-8);  // f16 below 6e-5: 2^-25
    }
    EXPECT_TRUE(changed);
  }
}

TEST_F(ModelFolder, Shards) {
  const auto model = Model::random(tiny_config(), 7);
  write_config(model->config.to_json());
  const auto tensors = tensors_of(*model);
  const auto half = static_cast<std::ptrdiff_t>(tensors.size() / 2);
  write_safetensors(file("model-00001-of-00002.safetensors"), {tensors.begin(), tensors.begin() + half});
  write_safetensors(file("model-00002-of-00002.safetensors"), {tensors.begin() + half, tensors.end()});
  ordered_json index{{"metadata", {{"total_size", 1}}}, {"weight_map", ordered_json::object()}};
  for (size_t i = 0; i < tensors.size(); i++)
    index["weight_map"][tensors[i].name] =
        fmt::format("model-0000{}-of-00002.safetensors", i < tensors.size() / 2 ? 1 : 2);
  write_file(file("model.safetensors.index.json"), index.dump());
  EXPECT_EQ(values(*Model::load(dir_)), values(*model));
  std::filesystem::remove(file("model-00002-of-00002.safetensors"));
  const std::string what = error_of_load();
  EXPECT_NE(what.find("model-00002-of-00002.safetensors"), std::string::npos) << what;
}

// transformers 5: gate_up_proj [E, 2f, d] and down_proj [E, d, f].
std::vector<TensorToWrite> stacked(const Model& m, int64_t n_expert, std::vector<std::vector<float>>& memory) {
  std::vector<TensorToWrite> out;
  const int64_t f = m.config.moe_intermediate_size, d = m.config.hidden_size;
  for (const ParamSpec& spec : m.table.specs()) {
    if (spec.hf_name.find(".mlp.experts.") == std::string::npos)
      out.push_back({spec.hf_name, m.weights.view(spec), DType::f32});
  }
  for (int64_t l = 0; l < m.config.num_hidden_layers; l++) {
    for (const bool down : {false, true}) {
      std::vector<float>& all = memory.emplace_back();
      for (int64_t e = 0; e < n_expert; e++) {
        const LayerViews& w = m.weights.layers[static_cast<size_t>(l)];
        const View& v = (down ? w.expert_down : w.expert_gate_up)[static_cast<size_t>(e % m.config.num_experts)];
        all.insert(all.end(), v.f32(), v.f32() + v.numel());
      }
      const Shape shape = down ? Shape{n_expert, d, f} : Shape{n_expert, 2 * f, d};
      out.push_back({fmt::format("model.layers.{}.mlp.experts.{}", l, down ? "down_proj" : "gate_up_proj"),
                     View(all.data(), DType::f32, shape), DType::f32});
    }
  }
  return out;
}

TEST_F(ModelFolder, StackedExperts) {
  const auto model = Model::random(moe_config(), 7);
  write_config(model->config.to_json());
  std::vector<std::vector<float>> memory;
  write_safetensors(file("model.safetensors"), stacked(*model, 4, memory));
  EXPECT_EQ(values(*Model::load(dir_)), values(*model));
  for (const int64_t n_expert : {3, 5}) {
    write_safetensors(file("model.safetensors"), stacked(*model, n_expert, memory));
    EXPECT_EQ(error_of_load(),
              fmt::format("{}: tensor \"model.layers.0.mlp.experts.gate_up_proj\": expected shape [4, 48, 32], found "
                          "[{}, 48, 32]; does the config belong to these weights?",
                          file("model.safetensors"), n_expert));
  }
}

// MiniMind's own config.json: model_type minimind, fields of its own, the shape of the FFN computed.
TEST_F(ModelFolder, MiniMindsOwnConfig) {
  const ordered_json base{{"model_type", "minimind"},     {"hidden_size", 32},        {"num_hidden_layers", 2},
                          {"num_attention_heads", 4},     {"num_key_value_heads", 2}, {"vocab_size", 53},
                          {"max_position_embeddings", 64}};
  const auto loads_as = [&](ordered_json j, ModelConfig c) {
    const auto model = Model::random(c, 7);
    auto tensors = tensors_of(*model);
    std::vector<float> tables(16, 1.0f);  // buffers of its checkpoints, recomputed here
    tensors.push_back({"model.freqs_cos", View(tables.data(), DType::f32, {4, 4}), DType::f32});
    tensors.push_back({"model.freqs_sin", View(tables.data(), DType::f32, {4, 4}), DType::f32});
    tensors.push_back({"lm_head.weight", model->weights.embed, DType::f32});  // tied, and saved twice
    write_safetensors(file("model.safetensors"), tensors);
    write_config(j);
    const auto loaded = Model::load(dir_);
    EXPECT_EQ(values(*loaded), values(*model)) << j.dump();
    EXPECT_EQ(loaded->config.architecture, c.architecture);
    EXPECT_EQ(loaded->config.to_json(), c.to_json());
  };
  ModelConfig c = tiny_config();
  c.head_dim = 8;
  // The first generation: 8/3 d rounded up to 64, no qk-norm.
  ordered_json first = base;
  first["use_moe"] = false;
  first["rms_norm_eps"] = 1e-5;
  ModelConfig llama = c;
  llama.architecture = "LlamaForCausalLM";
  llama.qk_norm = false;
  llama.intermediate_size = 128;
  llama.rms_norm_eps = 1e-5f;
  loads_as(first, llama);
  // The current one: pi d rounded up to 64, qk-norm; its config always has the experts' fields.
  ordered_json current = base;
  current["use_moe"] = false;
  current["num_experts"] = 4;
  ModelConfig qwen = c;
  qwen.intermediate_size = 128;
  loads_as(current, qwen);
  current["use_moe"] = true;
  current["num_experts_per_tok"] = 2;
  current["moe_intermediate_size"] = 24;
  ModelConfig moe = moe_config();
  moe.head_dim = 8;
  moe.intermediate_size = 128;
  loads_as(current, moe);
  current["n_shared_experts"] = 1;  // no other tool's name for that
  moe.architecture = "MiniMindForCausalLM";
  moe.n_shared_experts = 1;
  loads_as(current, moe);
}

TEST_F(ModelFolder, MissingTensor) {
  const auto model = Model::random(tiny_config(), 7);
  write_config(model->config.to_json());
  auto tensors = tensors_of(*model);
  std::erase_if(tensors, [](const TensorToWrite& t) { return t.name == "model.layers.1.mlp.up_proj.weight"; });
  write_safetensors(file("model.safetensors"), tensors);
  EXPECT_EQ(error_of_load(),
            dir_ +
                ": expected tensor \"model.layers.1.mlp.up_proj.weight\", found none of that name; does the config "
                "belong to these weights?");
}

TEST_F(ModelFolder, WrongShape) {
  const auto model = Model::random(tiny_config(), 7);
  write_config(model->config.to_json());
  auto tensors = tensors_of(*model);
  View& norm = named(tensors, "model.norm.weight").view;
  norm = View(norm.data, DType::f32, {31});
  write_safetensors(file("model.safetensors"), tensors);
  EXPECT_EQ(error_of_load(),
            file("model.safetensors") +
                ": tensor \"model.norm.weight\": expected shape [32], found [31]; does the config belong "
                "to these weights?");
}

TEST_F(ModelFolder, ExtraTensor) {
  const auto model = Model::random(tiny_config(), 7);
  ordered_json j = model->config.to_json();
  j["num_hidden_layers"] = 1;
  write_config(j);
  write_safetensors(file("model.safetensors"), tensors_of(*model));
  const std::string what = error_of_load();
  EXPECT_EQ(what.find(dir_ + ": tensor \"model.layers.1."), 0u) << what;
  const std::string end =
      "\": expected only tensors that config.json calls for, found this one; check that config.json belongs to these "
      "weights";
  EXPECT_TRUE(what.ends_with(end)) << what;
}

TEST_F(ModelFolder, NotAFolder) {
  std::filesystem::remove_all(dir_);
  EXPECT_EQ(error_of_load(),
            dir_ + ": expected a model folder (config.json and model.safetensors), found nothing there");
  write_file(dir_, "x");
  EXPECT_EQ(error_of_load(), dir_ + ": expected a model folder (config.json and model.safetensors), found a file");
}

}  // namespace
}  // namespace mm
