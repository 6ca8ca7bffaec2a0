// Small random models for the engine's tests.
#pragma once

#include <memory>

#include "model/model.h"

namespace mm {

inline ModelConfig small_config(int64_t vocab) {
  ModelConfig c;
  c.hidden_size = 48;
  c.intermediate_size = 64;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 12;
  c.vocab_size = vocab;
  c.max_position_embeddings = 96;
  return c;
}

// A random model says something of its own: without this its logits are all but equal.
inline std::unique_ptr<Model> lively_model(const ModelConfig& config, uint64_t seed) {
  auto model = Model::random(config, seed);
  for (const ParamSpec& spec : model->table.specs()) {
    if (spec.init == Init::ones) continue;
    float* w = model->weights.view(spec).f32();
    for (int64_t i = 0; i < spec.shape.numel(); i++) w[i] *= 12;
  }
  return model;
}

inline std::vector<int32_t> some_prompt(int64_t n, int64_t vocab, int64_t from = 0) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; i++) ids.push_back(static_cast<int32_t>(((from + i) * 37 + 11) % vocab));
  return ids;
}

}  // namespace mm
