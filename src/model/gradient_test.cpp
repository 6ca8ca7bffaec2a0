// Backward against finite differences of forward, for the shapes that no PyTorch golden covers: shared experts, an
// untied head, attention with every head its own keys. For each parameter tensor the loss is differenced along the
// tensor's own gradient: the slope must be the gradient's norm.
#include <gtest/gtest.h>

#include <cmath>

#include "base/rng.h"
#include "kernels/ops.h"
#include "model/forward.h"
#include "model/lm_head.h"

namespace mm {
namespace {

ModelConfig small_config() {
  ModelConfig c;
  c.hidden_size = 24;
  c.intermediate_size = 40;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 3;
  c.num_key_value_heads = 3;
  c.head_dim = 8;
  c.vocab_size = 50;
  c.max_position_embeddings = 64;
  c.tie_word_embeddings = false;
  return c;
}

TokenBatch two_sequences(int64_t n_vocab) {
  TokenBatch b;
  b.clear();
  Rng rng{3, 1, 0};
  for (const int len : {9, 5}) {
    for (int t = 0; t < len; t++) {
      b.ids.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(n_vocab))));
      b.positions.push_back(t);
      b.targets.push_back(t + 1 < len ? static_cast<int32_t>(rng.below(static_cast<uint64_t>(n_vocab))) : -1);
    }
    b.cu_seqlens.push_back(static_cast<int32_t>(b.n_tok()));
  }
  return b;
}

void check_gradients(ModelConfig c, DeviceKind kind) {
  c.check("test");
  const auto model = Model::random(c, 5);
  for (const ParamSpec& spec :
       model->table.specs()) {  // a residual stream of about 1 and scores that are not all alike
    if (spec.init != Init::normal) continue;
    const float scale = spec.hf_name == "model.embed_tokens.weight" ? 40.0f : 8.0f;
    for (int64_t i = 0; i < spec.shape.numel(); i++) model->weights.view(spec).f32()[i] *= scale;
  }
  const TokenBatch batch = two_sequences(c.vocab_size);
  Device dev;
  dev.kind = kind;
  Activations acts(c, batch.n_tok(), true);
  LmHead head(c);
  ParamBuffer grads(c, model->table);
  std::vector<float> logp(batch.ids.size()), g(batch.ids.size());
  for (size_t t = 0; t < g.size(); t++) g[t] = batch.targets[t] < 0 ? 0.0f : -0.1f;
  const auto loss = [&] {
    forward(dev, *model, batch, acts);
    head.logprob(dev, *model, acts.h, batch.targets, logp.data());
    double sum = acts.aux_loss(dev);
    for (size_t t = 0; t < g.size(); t++) sum += static_cast<double>(g[t]) * logp[t];
    return sum;
  };
  loss();
  head.backward(dev, *model, acts.h, batch.targets, g.data(), acts.dh, grads, nullptr);
  backward(dev, *model, acts, grads);
  for (const ParamSpec& spec : model->table.specs()) {
    float *w = model->weights.view(spec).f32(), *d = grads.view(spec).f32();
    double norm = 0;
    for (int64_t i = 0; i < spec.shape.numel(); i++) norm += static_cast<double>(d[i]) * d[i];
    norm = std::sqrt(norm);
    if (norm < 1e-4) continue;  // the router of a top-1 choice, an expert nobody chose
    const std::vector<float> saved(w, w + spec.shape.numel());
    const double step = 2e-3;
    const auto moved = [&](double h) {
      for (int64_t i = 0; i < spec.shape.numel(); i++)
        w[i] = saved[static_cast<size_t>(i)] + static_cast<float>(h * d[i] / norm);
      return loss();
    };
    const double slope = (moved(step) - moved(-step)) / (2 * step);
    std::copy(saved.begin(), saved.end(), w);
    EXPECT_NEAR(slope, norm, 0.01 * norm + 1e-3) << spec.hf_name;
  }
}

TEST(ModelGradient, UntiedHeadAndOwnKeys) { check_gradients(small_config(), DeviceKind::cpu); }

TEST(ModelGradient, SharedExperts) {
  for (const bool norm : {true, false}) {
    for (const DeviceKind kind : {DeviceKind::ref, DeviceKind::cpu}) {
      ModelConfig c = small_config();
      c.architecture = "MiniMindForCausalLM";
      c.num_experts = 4;
      c.num_experts_per_tok = 2;
      c.moe_intermediate_size = 20;
      c.n_shared_experts = 2;
      c.norm_topk_prob = norm;
      c.router_aux_loss_coef = 0.05f;
      check_gradients(c, kind);
    }
  }
}

TEST(ModelGradient, LlamaWithoutQkNorm) {
  ModelConfig c = small_config();
  c.architecture = "LlamaForCausalLM";
  c.qk_norm = false;
  c.num_key_value_heads = 1;
  c.tie_word_embeddings = true;
  check_gradients(c, DeviceKind::cpu);
}

}  // namespace
}  // namespace mm
