// Small shapes for tests; widths that fill no vector, so that ends of rows are tested too.
#pragma once

#include "model/config.h"

namespace mm {

inline ModelConfig tiny_config() {
  ModelConfig c;
  c.hidden_size = 32;
  c.intermediate_size = 48;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 10;
  c.vocab_size = 53;
  c.max_position_embeddings = 64;
  return c;
}

inline ModelConfig moe_config() {
  ModelConfig c = tiny_config();
  c.architecture = "Qwen3MoeForCausalLM";
  c.num_experts = 4;
  c.num_experts_per_tok = 2;
  c.moe_intermediate_size = 24;
  return c;
}

}  // namespace mm
