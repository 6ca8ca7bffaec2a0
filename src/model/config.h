// The shape of a model, in Hugging Face's names.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"

namespace mm {

// Context extension by YaRN (Peng et al. 2023), as MiniMind's precompute_freqs_cis computes it.
struct YarnScaling {
  double factor = 16, beta_fast = 32, beta_slow = 1, attention_factor = 1;
  int64_t original_max_position_embeddings = 2048;
};

struct ModelConfig {
  std::string architecture =
      "Qwen3ForCausalLM";  // LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, MiniMindForCausalLM
  int64_t hidden_size = 768;
  int64_t intermediate_size = 2432;
  int64_t num_hidden_layers = 8;
  int64_t num_attention_heads = 8;
  int64_t num_key_value_heads = 4;
  int64_t head_dim = 96;
  int64_t vocab_size = 6400;
  int64_t max_position_embeddings = 32768;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 1e6;
  std::optional<YarnScaling> rope_scaling;
  bool tie_word_embeddings = true;
  bool qk_norm = true;
  float dropout = 0;  // training: embeddings, attention weights, attention output
  int64_t bos_token_id = 1, eos_token_id = 2, pad_token_id = 0;
  // Mixture of experts; num_experts 0: dense.
  int64_t num_experts = 0, num_experts_per_tok = 1, moe_intermediate_size = 0, n_shared_experts = 0;
  bool norm_topk_prob = true;
  float router_aux_loss_coef = 5e-4f;

  bool is_moe() const { return num_experts > 0; }
  int64_t q_width() const { return num_attention_heads * head_dim; }
  int64_t kv_width() const { return num_key_value_heads * head_dim; }
  int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
  int64_t ffn_width() const { return is_moe() ? moe_intermediate_size : intermediate_size; }

  // Reads an HF config.json (Llama, Qwen3, Qwen3Moe, MiniMind's own). Error on anything this program would compute
  // differently.
  static ModelConfig from_json(const ordered_json& j, const std::string& where);
  ordered_json to_json() const;                // loads in transformers
  void check(const std::string& where) const;  // Error naming the field that makes no sense
};

std::vector<std::string> preset_names();
// A preset's name (minimind-3, minimind-3-moe, minimind2, minimind2-small, demo), a config.json or a folder that holds
// one.
ModelConfig load_config(const std::string& name_or_path);

}  // namespace mm
