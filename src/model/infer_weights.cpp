#include "model/infer_weights.h"

#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/thread_team.h"
#include "kernels/cpu/infer.h"

namespace mm {

InferModel infer_dimensions(const ModelConfig& c, const RopeTable& rope) {
  return {.d_model = c.hidden_size,
          .d_ff = c.ffn_width(),
          .n_layer = c.num_hidden_layers,
          .n_vocab = c.vocab_size,
          .n_head = static_cast<int>(c.num_attention_heads),
          .n_kv_head = static_cast<int>(c.num_key_value_heads),
          .d_head = static_cast<int>(c.head_dim),
          .n_expert = static_cast<int>(c.num_experts),
          .n_expert_per_tok = static_cast<int>(c.num_experts_per_tok),
          .n_shared = static_cast<int>(c.n_shared_experts),
          .norm_topk = c.norm_topk_prob,
          .eps = c.rms_norm_eps,
          .attention_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
          .cos = rope.cos(),
          .sin = rope.sin()};
}

InferWeights::InferWeights(const Model& model, WeightFormat format, int64_t positions)
    : config_(model.config), format_(format), rope_(model.config) {
  MM_CHECK(format != WeightFormat::f16, "f16 weights are of a GPU");
  rope_.ensure(positions);
  build(model, false);  // adds up the bytes
  buffer_ = Buffer(used_);
  build(model, true);
}

void InferWeights::update(const Model& model) { build(model, true); }

void* InferWeights::take(size_t bytes) {
  char* at = static_cast<char*>(buffer_.data());
  void* p = at == nullptr ? nullptr : at + used_;
  used_ += (bytes + 63) / 64 * 64;
  return p;
}

InferMatrix InferWeights::matrix(View w, WeightFormat format, bool fill) {
  const int64_t n = w.rows(), k = w.cols();
  InferMatrix m{.format = format, .n = n, .k = k};
  void* to = take(cpu::packed_bytes(format, n, k));
  if (fill) cpu::pack_matrix(format, to, w.f32(), n, k);
  m.data = to;
  return m;
}

const float* InferWeights::vector(View w, bool fill) {
  if (!w) return nullptr;
  auto* to = static_cast<float*>(take(static_cast<size_t>(w.numel()) * sizeof(float)));
  if (fill) std::memcpy(to, w.data, static_cast<size_t>(w.numel()) * sizeof(float));
  return to;
}

void InferWeights::build(const Model& source, bool fill) {
  const ModelConfig& c = config_;
  used_ = 0;
  experts_.clear();
  layers_.assign(static_cast<size_t>(c.num_hidden_layers), {});
  const auto list = [&](const std::vector<View>& views) -> const InferMatrix* {
    if (views.empty()) return nullptr;
    auto& to = experts_.emplace_back();
    for (const View& w : views) to.push_back(matrix(w, format_, fill));
    return to.data();
  };
  for (size_t l = 0; l < layers_.size(); l++) {
    const LayerViews& w = source.weights.layers[l];
    InferLayer& to = layers_[l];
    to.input_norm = vector(w.input_norm, fill);
    to.post_norm = vector(w.post_norm, fill);
    to.q_norm = vector(w.q_norm, fill);
    to.k_norm = vector(w.k_norm, fill);
    to.qkv = matrix(w.qkv, format_, fill);
    to.o = matrix(w.o, format_, fill);
    if (c.is_moe()) {
      to.router = matrix(w.router, WeightFormat::f32, fill);
      to.expert_gate_up = list(w.expert_gate_up);
      to.expert_down = list(w.expert_down);
      to.shared_gate_up = list(w.shared_gate_up);
      to.shared_down = list(w.shared_down);
    } else {
      to.gate_up = matrix(w.gate_up, format_, fill);
      to.down = matrix(w.down, format_, fill);
    }
  }
  const View embed = source.weights.embed;
  const bool f32 = format_ == WeightFormat::f32;
  const auto n = static_cast<size_t>(embed.numel());
  void* rows = take(n * (f32 ? 4 : 2));
  if (fill && f32) std::memcpy(rows, embed.data, n * 4);
  if (fill && !f32) {
    parallel_for(static_cast<int64_t>(n), 1 << 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) static_cast<uint16_t*>(rows)[i] = float_to_bf16(embed.f32()[i]);
    });
  }
  model_ = infer_dimensions(c, rope_);
  model_.layers = layers_.data();
  model_.embed = {
      .format = f32 ? WeightFormat::f32 : WeightFormat::bf16, .data = rows, .n = c.vocab_size, .k = c.hidden_size};
  model_.final_norm = vector(source.weights.final_norm, fill);
  model_.head = matrix(source.weights.head, format_, fill);
}

}  // namespace mm
