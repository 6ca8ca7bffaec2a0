#include "model/params.h"

#include "base/error.h"

namespace mm {

void ParamTable::add(std::string name, Shape shape, Init init) {
  by_name_[name] = specs_.size();
  const int64_t n = shape.numel();
  specs_.push_back({std::move(name), shape, init, numel_});
  numel_ += n;
}

static std::string layer_prefix(int64_t layer) { return fmt::format("model.layers.{}.", layer); }

ParamTable::ParamTable(const ModelConfig& c) {
  const int64_t d = c.hidden_size;
  add("model.embed_tokens.weight", {c.vocab_size, d});
  for (int64_t l = 0; l < c.num_hidden_layers; l++) {
    const std::string p = layer_prefix(l);
    add(p + "input_layernorm.weight", {d}, Init::ones);
    add(p + "self_attn.q_proj.weight", {c.q_width(), d});
    add(p + "self_attn.k_proj.weight", {c.kv_width(), d});
    add(p + "self_attn.v_proj.weight", {c.kv_width(), d});
    if (c.qk_norm) {
      add(p + "self_attn.q_norm.weight", {c.head_dim}, Init::ones);
      add(p + "self_attn.k_norm.weight", {c.head_dim}, Init::ones);
    }
    add(p + "self_attn.o_proj.weight", {d, c.q_width()});
    add(p + "post_attention_layernorm.weight", {d}, Init::ones);
    const auto ffn = [&](const std::string& at, int64_t f) {
      add(at + "gate_proj.weight", {f, d});
      add(at + "up_proj.weight", {f, d});
      add(at + "down_proj.weight", {d, f});
    };
    if (!c.is_moe()) {
      ffn(p + "mlp.", c.intermediate_size);
    } else {
      add(p + "mlp.gate.weight", {c.num_experts, d});
      for (int64_t e = 0; e < c.num_experts; e++) ffn(fmt::format("{}mlp.experts.{}.", p, e), c.moe_intermediate_size);
      for (int64_t e = 0; e < c.n_shared_experts; e++)
        ffn(fmt::format("{}mlp.shared_experts.{}.", p, e), c.moe_intermediate_size);
    }
  }
  add("model.norm.weight", {d}, Init::ones);
  if (!c.tie_word_embeddings) add("lm_head.weight", {c.vocab_size, d});
}

const ParamSpec& ParamTable::at(const std::string& hf_name) const {
  const auto it = by_name_.find(hf_name);
  MM_CHECK(it != by_name_.end(), "no parameter {}", hf_name);
  return specs_[it->second];
}

ParamBuffer::ParamBuffer(const ModelConfig& c, const ParamTable& table, DType dtype, Memory where)
    : table_(&table), dtype_(dtype), buffer_(static_cast<size_t>(table.numel()) * dtype_size(dtype), where) {
  const int64_t d = c.hidden_size;
  embed = at("model.embed_tokens.weight");
  final_norm = at("model.norm.weight");
  head = c.tie_word_embeddings ? embed : at("lm_head.weight");
  for (int64_t l = 0; l < c.num_hidden_layers; l++) {
    const std::string p = layer_prefix(l);
    LayerViews v;
    v.input_norm = at(p + "input_layernorm.weight");
    v.qkv = rows_from(p + "self_attn.q_proj.weight", c.qkv_width(), d);
    if (c.qk_norm) {
      v.q_norm = at(p + "self_attn.q_norm.weight");
      v.k_norm = at(p + "self_attn.k_norm.weight");
    }
    v.o = at(p + "self_attn.o_proj.weight");
    v.post_norm = at(p + "post_attention_layernorm.weight");
    const auto ffn = [&](const std::string& name, int64_t f, View& gate_up, View& down) {
      gate_up = rows_from(name + "gate_proj.weight", 2 * f, d);
      down = at(name + "down_proj.weight");
    };
    if (!c.is_moe()) {
      ffn(p + "mlp.", c.intermediate_size, v.gate_up, v.down);
    } else {
      v.router = at(p + "mlp.gate.weight");
      v.expert_gate_up.resize(static_cast<size_t>(c.num_experts));
      v.expert_down.resize(static_cast<size_t>(c.num_experts));
      for (size_t e = 0; e < v.expert_down.size(); e++) {
        ffn(fmt::format("{}mlp.experts.{}.", p, e), c.moe_intermediate_size, v.expert_gate_up[e], v.expert_down[e]);
      }
      v.shared_gate_up.resize(static_cast<size_t>(c.n_shared_experts));
      v.shared_down.resize(static_cast<size_t>(c.n_shared_experts));
      for (size_t e = 0; e < v.shared_down.size(); e++) {
        ffn(fmt::format("{}mlp.shared_experts.{}.", p, e), c.moe_intermediate_size, v.shared_gate_up[e],
            v.shared_down[e]);
      }
    }
    layers.push_back(std::move(v));
  }
}

View ParamBuffer::window(int64_t offset, Shape shape) const {
  return View(static_cast<char*>(buffer_.data()) + static_cast<size_t>(offset) * dtype_size(dtype_), dtype_, shape);
}

View ParamBuffer::flat() const { return window(0, {table_->numel()}); }

View ParamBuffer::view(const ParamSpec& spec) const { return window(spec.offset, spec.shape); }

View ParamBuffer::at(const std::string& name) const { return view(table_->at(name)); }

View ParamBuffer::rows_from(const std::string& name, int64_t rows, int64_t cols) const {
  return window(table_->at(name).offset, {rows, cols});
}

}  // namespace mm
