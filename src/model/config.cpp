#include "model/config.h"

#include <fmt/ranges.h>

#include <cmath>
#include <map>

#include "base/error.h"
#include "base/fs.h"

namespace mm {

namespace {

const std::map<std::string, ModelConfig>& presets() {
  static const std::map<std::string, ModelConfig> all = [] {
    std::map<std::string, ModelConfig> m;
    ModelConfig c;  // minimind-3, 64M
    m["minimind-3"] = c;
    c.architecture = "Qwen3MoeForCausalLM";  // 198M, 64M active
    c.num_experts = 4;
    c.num_experts_per_tok = 1;
    c.moe_intermediate_size = c.intermediate_size;
    m["minimind-3-moe"] = c;
    c = ModelConfig{};
    c.architecture = "LlamaForCausalLM";  // minimind2, 104M
    c.qk_norm = false;
    c.rms_norm_eps = 1e-5f;
    c.num_hidden_layers = 16;
    c.num_key_value_heads = 2;
    c.intermediate_size = 2048;
    m["minimind2"] = c;
    c.hidden_size = 512;  // minimind2-small, 26M
    c.num_hidden_layers = 8;
    c.head_dim = 64;
    c.intermediate_size = 1408;
    m["minimind2-small"] = c;
    c = ModelConfig{};  // the demo's: learns in minutes on a few cores
    c.hidden_size = 128;
    c.num_hidden_layers = 4;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.head_dim = 32;
    c.intermediate_size = 384;
    c.vocab_size = 2000;
    c.max_position_embeddings = 1024;
    m["demo"] = c;
    return m;
  }();
  return all;
}

void refuse(const ordered_json& j, const char* key, const ordered_json& wanted, const std::string& where) {
  const auto it = j.find(key);
  if (it == j.end() || it->is_null() || *it == wanted) return;
  throw Error(fmt::format("{}: field \"{}\"", where, key), wanted.dump(), it->dump(),
              "this program does not compute that variant");
}

std::string architecture_of(const ordered_json& j, const std::string& where) {
  std::string name = json_get_or<std::string>(j, "model_type", "", where);
  const auto it = j.find("architectures");
  if (it != j.end() && it->is_array() && !it->empty() && it->front().is_string()) name = it->front().get<std::string>();
  if (name == "LlamaForCausalLM" || name == "llama") return "LlamaForCausalLM";
  if (name == "Qwen3ForCausalLM" || name == "qwen3") return "Qwen3ForCausalLM";
  if (name == "Qwen3MoeForCausalLM" || name == "qwen3_moe") return "Qwen3MoeForCausalLM";
  if (name == "MiniMindForCausalLM" || name == "MiniMindLM" || name == "minimind") return "MiniMindForCausalLM";
  throw Error(where + ": field \"architectures\"",
              "LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM or MiniMindForCausalLM",
              name.empty() ? "none" : name, "");
}

void read_rope(const ordered_json& j, const std::string& where, ModelConfig& c) {
  c.rope_theta = json_get_or<double>(j, "rope_theta", c.rope_theta, where);
  // transformers 5 writes rope_parameters (with the base inside), earlier ones rope_scaling.
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const auto it = j.find(key);
    if (it == j.end() || it->is_null()) continue;
    const std::string at = fmt::format("{}: {}", where, key);
    if (!it->is_object()) throw Error(at, "an object", json_type_name(*it));
    c.rope_theta = json_get_or<double>(*it, "rope_theta", c.rope_theta, at);
    const std::string type =
        json_get_or<std::string>(*it, "rope_type", json_get_or<std::string>(*it, "type", "default", at), at);
    if (type == "default") continue;
    if (type != "yarn")
      throw Error(at + ".rope_type", "default or yarn", type, "this program does not compute that variant");
    YarnScaling y;
    y.factor = json_get_or<double>(*it, "factor", y.factor, at);
    y.beta_fast = json_get_or<double>(*it, "beta_fast", y.beta_fast, at);
    y.beta_slow = json_get_or<double>(*it, "beta_slow", y.beta_slow, at);
    y.original_max_position_embeddings =
        json_get_or<int64_t>(*it, "original_max_position_embeddings", y.original_max_position_embeddings, at);
    // The paper's temperature when the file gives none, as transformers does.
    y.attention_factor =
        json_get_or<double>(*it, "attention_factor", y.factor > 1 ? 0.1 * std::log(y.factor) + 1.0 : 1.0, at);
    c.rope_scaling = y;
  }
}

void positive(int64_t v, const char* name, const std::string& where, int64_t limit) {
  if (v < 1 || v > limit)
    throw Error(fmt::format("{}: field \"{}\"", where, name), fmt::format("1 to {}", limit), std::to_string(v));
}

}  // namespace

ModelConfig ModelConfig::from_json(const ordered_json& j, const std::string& where) {
  ModelConfig c;
  c.architecture = architecture_of(j, where);
  refuse(j, "attention_bias", false, where);
  refuse(j, "mlp_bias", false, where);
  refuse(j, "hidden_act", "silu", where);
  refuse(j, "use_sliding_window", false, where);
  refuse(j, "decoder_sparse_step", 1, where);
  refuse(j, "mlp_only_layers", ordered_json::array(), where);
  c.hidden_size = json_get<int64_t>(j, "hidden_size", where);
  c.num_hidden_layers = json_get<int64_t>(j, "num_hidden_layers", where);
  c.num_attention_heads = json_get<int64_t>(j, "num_attention_heads", where);
  c.num_key_value_heads = json_get_or<int64_t>(j, "num_key_value_heads", c.num_attention_heads, where);
  positive(c.num_attention_heads, "num_attention_heads", where, 1024);
  c.head_dim = json_get_or<int64_t>(j, "head_dim", c.hidden_size / c.num_attention_heads, where);
  c.vocab_size = json_get<int64_t>(j, "vocab_size", where);
  const bool own = c.architecture == "MiniMindForCausalLM";
  // MiniMind leaves intermediate_size out and computes it; its first generation rounded 8/3 d up to 64, the current one
  // pi d.
  const bool current = !own || j.contains("num_experts") || j.contains("moe_intermediate_size");
  const auto rounded = [](double x) { return static_cast<int64_t>(std::ceil(x / 64)) * 64; };
  const int64_t eight_thirds = c.hidden_size * 8 / 3;
  const int64_t computed = current ? rounded(static_cast<double>(c.hidden_size) * 3.14159265358979)
                                   : rounded(static_cast<double>(eight_thirds));
  c.intermediate_size = own ? json_get_or<int64_t>(j, "intermediate_size", computed, where)
                            : json_get<int64_t>(j, "intermediate_size", where);
  c.max_position_embeddings = json_get_or<int64_t>(j, "max_position_embeddings", c.max_position_embeddings, where);
  c.rms_norm_eps = json_get_or<float>(j, "rms_norm_eps", 1e-6f, where);
  c.tie_word_embeddings = json_get_or<bool>(j, "tie_word_embeddings", own, where);
  c.dropout = json_get_or<float>(j, "dropout", 0.0f, where);
  c.bos_token_id = json_get_or<int64_t>(j, "bos_token_id", 1, where);
  c.pad_token_id = json_get_or<int64_t>(j, "pad_token_id", 0, where);
  const auto eos = j.find("eos_token_id");
  if (eos != j.end() && eos->is_array() && !eos->empty() && eos->front().is_number_integer())
    c.eos_token_id = eos->front().get<int64_t>();
  else c.eos_token_id = json_get_or<int64_t>(j, "eos_token_id", 2, where);
  c.qk_norm = c.architecture != "LlamaForCausalLM" && current;
  if (c.architecture == "Qwen3MoeForCausalLM" || (own && json_get_or<bool>(j, "use_moe", false, where))) {
    refuse(j, "scoring_func", "softmax", where);
    c.num_experts =
        json_get_or<int64_t>(j, "num_experts", json_get_or<int64_t>(j, "n_routed_experts", 4, where), where);
    c.num_experts_per_tok = json_get_or<int64_t>(j, "num_experts_per_tok", 1, where);
    c.moe_intermediate_size = json_get_or<int64_t>(j, "moe_intermediate_size", c.intermediate_size, where);
    c.n_shared_experts = json_get_or<int64_t>(j, "n_shared_experts", 0, where);
    c.norm_topk_prob = json_get_or<bool>(j, "norm_topk_prob", true, where);
    c.router_aux_loss_coef = json_get_or<float>(j, "router_aux_loss_coef", 5e-4f, where);
  }
  read_rope(j, where, c);
  c.check(where);
  return c;
}

void ModelConfig::check(const std::string& where) const {
  positive(hidden_size, "hidden_size", where, 1 << 16);
  positive(intermediate_size, "intermediate_size", where, 1 << 20);
  positive(num_hidden_layers, "num_hidden_layers", where, 1024);
  positive(num_attention_heads, "num_attention_heads", where, 1024);
  positive(num_key_value_heads, "num_key_value_heads", where, 1024);
  positive(head_dim, "head_dim", where, 1024);
  positive(vocab_size, "vocab_size", where, 1 << 22);
  positive(max_position_embeddings, "max_position_embeddings", where, 1 << 24);
  if (head_dim % 2 != 0)
    throw Error(where + ": field \"head_dim\"", "an even number", std::to_string(head_dim),
                "rotary embedding works on pairs");
  if (num_attention_heads % num_key_value_heads != 0) {
    throw Error(where + ": field \"num_key_value_heads\"",
                fmt::format("a divisor of num_attention_heads {}", num_attention_heads),
                std::to_string(num_key_value_heads));
  }
  if (!(rms_norm_eps > 0 && rms_norm_eps < 1))
    throw Error(where + ": field \"rms_norm_eps\"", "above 0 and below 1", std::to_string(rms_norm_eps));
  if (!(rope_theta > 1)) throw Error(where + ": field \"rope_theta\"", "above 1", std::to_string(rope_theta));
  if (!(dropout >= 0 && dropout < 1))
    throw Error(where + ": field \"dropout\"", "0 or more and below 1", std::to_string(dropout));
  if (rope_scaling && !(rope_scaling->factor >= 1 && rope_scaling->original_max_position_embeddings >= 1 &&
                        rope_scaling->beta_fast > 0 && rope_scaling->beta_slow > 0)) {
    throw Error(where + ": rope_scaling", "factor >= 1 and positive betas and length", "other values");
  }
  if (num_experts != 0) {
    positive(num_experts, "num_experts", where, 256);
    positive(num_experts_per_tok, "num_experts_per_tok", where, num_experts);
    positive(moe_intermediate_size, "moe_intermediate_size", where, 1 << 20);
    if (n_shared_experts < 0 || n_shared_experts > 16)
      throw Error(where + ": field \"n_shared_experts\"", "0 to 16", std::to_string(n_shared_experts));
  }
}

ordered_json ModelConfig::to_json() const {
  const std::string model_type = architecture == "LlamaForCausalLM"      ? "llama"
                                 : architecture == "Qwen3ForCausalLM"    ? "qwen3"
                                 : architecture == "Qwen3MoeForCausalLM" ? "qwen3_moe"
                                                                         : "minimind";
  ordered_json j{
      {"architectures", {architecture}},
      {"model_type", model_type},
      {"hidden_size", hidden_size},
      {"intermediate_size", intermediate_size},
      {"num_hidden_layers", num_hidden_layers},
      {"num_attention_heads", num_attention_heads},
      {"num_key_value_heads", num_key_value_heads},
      {"head_dim", head_dim},
      {"vocab_size", vocab_size},
      {"max_position_embeddings", max_position_embeddings},
      {"rms_norm_eps", std::stod(fmt::format("{}", rms_norm_eps))},  // the short decimal, not the float's tail
      {"rope_theta", rope_theta},
      {"tie_word_embeddings", tie_word_embeddings},
      {"hidden_act", "silu"},
      {"attention_bias", false},
      {"bos_token_id", bos_token_id},
      {"eos_token_id", eos_token_id},
      {"pad_token_id", pad_token_id},
      {"torch_dtype", "float32"}};
  if (architecture == "LlamaForCausalLM") j["mlp_bias"] = false;
  if (dropout > 0) j["dropout"] = std::stod(fmt::format("{}", dropout));
  if (rope_scaling) {
    j["rope_scaling"] = {{"rope_type", "yarn"},
                         {"type", "yarn"},
                         {"factor", rope_scaling->factor},
                         {"original_max_position_embeddings", rope_scaling->original_max_position_embeddings},
                         {"beta_fast", rope_scaling->beta_fast},
                         {"beta_slow", rope_scaling->beta_slow},
                         {"attention_factor", rope_scaling->attention_factor}};
  }
  if (is_moe()) {
    if (model_type == "minimind") j["use_moe"] = true;
    j["num_experts"] = num_experts;
    j["num_experts_per_tok"] = num_experts_per_tok;
    j["moe_intermediate_size"] = moe_intermediate_size;
    if (n_shared_experts > 0) j["n_shared_experts"] = n_shared_experts;
    j["norm_topk_prob"] = norm_topk_prob;
    j["decoder_sparse_step"] = 1;
    j["mlp_only_layers"] = ordered_json::array();
    j["router_aux_loss_coef"] = std::stod(fmt::format("{}", router_aux_loss_coef));
  }
  return j;
}

std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  for (const auto& [name, config] : presets()) names.push_back(name);
  return names;
}

ModelConfig load_config(const std::string& name_or_path) {
  const auto it = presets().find(name_or_path);
  if (it != presets().end()) return it->second;
  const std::string path = dir_exists(name_or_path) ? path_join(name_or_path, "config.json") : name_or_path;
  if (!file_exists(path)) {
    throw Error(name_or_path, fmt::format("a preset ({}) or a config.json", fmt::join(preset_names(), ", ")),
                "neither");
  }
  return ModelConfig::from_json(load_json(path), path);
}

}  // namespace mm
