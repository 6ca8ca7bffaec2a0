#include "model/forward.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "kernels/ops.h"
#include "model/moe.h"

namespace mm {

namespace {

// Random streams of dropout: one a place, distinct for every layer and micro-batch.
enum class DropSite : uint64_t { embed = 0, attention = 1, attention_out = 2 };
uint64_t drop_stream(DropoutKey key, int64_t layer, DropSite site) {
  return key.step << 16 | static_cast<uint64_t>(layer) << 2 | static_cast<uint64_t>(site);
}

ops::NormRope norm_rope_args(const Model& model, const LayerViews& w, const StagedBatch& batch) {
  const ModelConfig& c = model.config;
  return {.q_weight = w.q_norm,
          .k_weight = w.k_norm,
          .cos = model.rope.cos(),
          .sin = model.rope.sin(),
          .positions = batch.positions,
          .eps = c.rms_norm_eps,
          .n = batch.n_tok,
          .n_head = static_cast<int>(c.num_attention_heads),
          .n_kv_head = static_cast<int>(c.num_key_value_heads),
          .d_head = static_cast<int>(c.head_dim)};
}

// Keys and values: of the batch itself (k rotated, v inside qkv), or of the cache.
ops::Attention attention_args(const ModelConfig& c, const StagedBatch& batch, const Activations& acts,
                              const LayerActs& a, const KvCache* cache, int64_t layer, DropoutKey key) {
  return {.q = a.q,
          .k = cache != nullptr ? cache->k(layer) : a.k,
          .v = cache != nullptr ? cache->v(layer) : a.qkv.col_slice(c.q_width() + c.kv_width(), c.qkv_width()),
          .out = a.attn,
          .lse = acts.train() ? a.lse : View(),
          .cu = batch.cu_seqlens,
          .kv_start = batch.kv_start,
          .kv_len = batch.kv_len,
          .n_seq = batch.n_seq,
          .n_tok = batch.n_tok,
          .pairs = batch.pairs,
          .keys = batch.keys,
          .tiles = batch.tiles,
          .n_tiles = batch.n_tiles,
          .max_tiles = batch.max_tiles,
          .max_len = batch.max_len,
          .n_head = static_cast<int>(c.num_attention_heads),
          .n_kv_head = static_cast<int>(c.num_key_value_heads),
          .d_head = static_cast<int>(c.head_dim),
          .scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
          .dropout = acts.train() ? c.dropout : 0.0f,
          .seed = key.seed,
          .stream = drop_stream(key, layer, DropSite::attention)};
}

void attention_forward(const Device& dev, const Model& model, const LayerViews& w, Activations& acts, LayerActs& a,
                       const KvCache* cache, int64_t layer, DropoutKey key) {
  const ModelConfig& c = model.config;
  const StagedBatch& batch = acts.stage.current();
  ops::rmsnorm_fwd(dev, a.h_in, a.rstd_in, a.x_in, w.input_norm, c.rms_norm_eps);
  ops::linear_fwd(dev, a.qkv, a.h_in, w.qkv);
  if (cache != nullptr) {
    ops::qk_norm_rope_fwd(dev, a.q, cache->k(layer), cache->v(layer), batch.slots, a.qkv,
                          norm_rope_args(model, w, batch));
  } else {
    ops::qk_norm_rope_fwd(dev, a.q, a.k, View(), nullptr, a.qkv, norm_rope_args(model, w, batch));
  }
  ops::attention_fwd(dev, attention_args(c, batch, acts, a, cache, layer, key));
  if (acts.train() && c.dropout > 0) {
    ops::linear_fwd(dev, acts.branch, a.attn, w.o);
    ops::dropout(dev, acts.branch, c.dropout, key.seed, drop_stream(key, layer, DropSite::attention_out));
    ops::copy(dev, a.x_mid, a.x_in);
    ops::add(dev, a.x_mid, acts.branch);
  } else {
    ops::linear_fwd(dev, a.x_mid, a.attn, w.o, a.x_in);
  }
}

void attention_backward(const Device& dev, Model& model, const LayerViews& w, LayerViews& g, Activations& acts,
                        LayerActs& a, int64_t layer, DropoutKey key) {
  const ModelConfig& c = model.config;
  const StagedBatch& batch = acts.stage.current();
  const bool again = acts.recompute() != Recompute::none;
  if (again) ops::qk_norm_rope_fwd(dev, a.q, a.k, View(), nullptr, a.qkv, norm_rope_args(model, w, batch));
  View dout = acts.dres;
  if (c.dropout > 0) {
    ops::copy(dev, acts.branch, acts.dres);
    ops::dropout(dev, acts.branch, c.dropout, key.seed, drop_stream(key, layer, DropSite::attention_out));
    dout = acts.branch;
  }
  ops::linear_bwd(dev, acts.dattn, g.o, dout, a.attn, w.o);
  const int64_t q_end = c.q_width(), k_end = q_end + c.kv_width();
  ops::attention_bwd(dev, attention_args(c, batch, acts, a, nullptr, layer, key), acts.dattn,
                     acts.dqkv.col_slice(0, q_end), acts.dqkv.col_slice(q_end, k_end),
                     acts.dqkv.col_slice(k_end, c.qkv_width()));
  ops::qk_norm_rope_bwd(dev, acts.dqkv, g.q_norm, g.k_norm, a.qkv, norm_rope_args(model, w, batch));
  if (again) ops::rmsnorm_fwd(dev, a.h_in, View(), a.x_in, w.input_norm, c.rms_norm_eps);
  ops::linear_bwd(dev, acts.dh, g.qkv, acts.dqkv, a.h_in, w.qkv);
  ops::rmsnorm_bwd(dev, acts.dres, g.input_norm, acts.dh, a.x_in, a.rstd_in, w.input_norm);
}

void ffn_forward(const Device& dev, const ModelConfig& c, const LayerViews& w, Activations& acts, LayerActs& a,
                 View x_out) {
  ops::rmsnorm_fwd(dev, a.h_mid, a.rstd_mid, a.x_mid, w.post_norm, c.rms_norm_eps);
  if (c.is_moe()) {
    moe_forward(dev, c, w, a, acts, x_out, a.x_mid);
    return;
  }
  ops::linear_swiglu_fwd(dev, a.gate_up, a.act, a.h_mid, w.gate_up);
  ops::linear_fwd(dev, x_out, a.act, w.down, a.x_mid);
}

void ffn_backward(const Device& dev, const ModelConfig& c, const LayerViews& w, LayerViews& g, Activations& acts,
                  LayerActs& a) {
  if (acts.recompute() != Recompute::none) ops::rmsnorm_fwd(dev, a.h_mid, View(), a.x_mid, w.post_norm, c.rms_norm_eps);
  if (c.is_moe()) {
    moe_backward(dev, c, w, g, a, acts);
  } else {
    // The forward's own op: another product could round otherwise.
    if (acts.recompute() == Recompute::ffn) ops::linear_swiglu_fwd(dev, a.gate_up, a.act, a.h_mid, w.gate_up);
    ops::linear_swiglu_bwd(dev, a.gate_up, a.act, acts.dact, acts.dres, w.down, a.gate_up);  // becomes its gradient
    ops::linear_bwd(dev, View(), g.down, acts.dres, a.act, w.down);
    ops::linear_bwd(dev, acts.dh, g.gate_up, a.gate_up, a.h_mid, w.gate_up);
  }
  ops::rmsnorm_bwd(dev, acts.dres, g.post_norm, acts.dh, a.x_mid, a.rstd_mid, w.post_norm);
}

}  // namespace

void check_batch(Model& model, const TokenBatch& batch, const KvCache* cache) {
  MM_CHECK(batch.n_tok() > 0 && batch.positions.size() == batch.ids.size() && batch.cu_seqlens.size() >= 2 &&
           batch.cu_seqlens.back() == batch.n_tok());
  MM_CHECK(cache == nullptr || (static_cast<int64_t>(cache->plan().slots.size()) == batch.n_tok() &&
                                static_cast<int64_t>(cache->plan().kv_len.size()) == batch.n_seq()));
  for (size_t i = 0; i < batch.ids.size(); i++) {
    if (batch.ids[i] < 0 || batch.ids[i] >= model.config.vocab_size) {
      throw Error(fmt::format("token {} of the input", i), fmt::format("an id in [0, {})", model.config.vocab_size),
                  std::to_string(batch.ids[i]), "check that the tokenizer belongs to this model");
    }
  }
  model.rope.ensure(*std::max_element(batch.positions.begin(), batch.positions.end()) + 1);
}

void forward(const Device& dev, Model& model, const TokenBatch& batch, Activations& acts, KvCache* cache,
             DropoutKey key) {
  check_batch(model, batch, cache);
  acts.stage.stage(dev, batch, cache != nullptr ? &cache->plan() : nullptr);
  ops::zero(dev, acts.aux);
  forward_staged(dev, model, acts, cache, key);
}

void forward_staged(const Device& dev, Model& model, Activations& acts, KvCache* cache, DropoutKey key) {
  const ModelConfig& c = model.config;
  const StagedBatch& batch = acts.stage.current();
  acts.set_tokens(batch.n_tok);
  ops::embed_fwd(dev, acts.layers[0].x_in, model.weights.embed, batch.ids);
  if (acts.train() && c.dropout > 0)
    ops::dropout(dev, acts.layers[0].x_in, c.dropout, key.seed, drop_stream(key, 0, DropSite::embed));
  for (int64_t l = 0; l < c.num_hidden_layers; l++) {
    const LayerViews& w = model.weights.layers[static_cast<size_t>(l)];
    LayerActs& a = acts.layers[acts.train() ? static_cast<size_t>(l) : 0];
    const bool last = l + 1 == c.num_hidden_layers;
    attention_forward(dev, model, w, acts, a, cache, l, key);
    ffn_forward(dev, c, w, acts, a,
                !acts.train() ? a.x_mid
                : last        ? acts.x_out
                              : acts.layers[static_cast<size_t>(l) + 1].x_in);
  }
  ops::rmsnorm_fwd(dev, acts.h, acts.rstd_out, acts.x_out, model.weights.final_norm, c.rms_norm_eps);
}

void backward(const Device& dev, Model& model, Activations& acts, ParamBuffer& grads, DropoutKey key) {
  const ModelConfig& c = model.config;
  MM_CHECK(acts.train());
  ops::zero(dev, acts.dres);
  ops::rmsnorm_bwd(dev, acts.dres, grads.final_norm, acts.dh, acts.x_out, acts.rstd_out, model.weights.final_norm);
  for (int64_t l = c.num_hidden_layers - 1; l >= 0; l--) {
    const LayerViews& w = model.weights.layers[static_cast<size_t>(l)];
    LayerViews& g = grads.layers[static_cast<size_t>(l)];
    LayerActs& a = acts.layers[static_cast<size_t>(l)];
    ffn_backward(dev, c, w, g, acts, a);
    attention_backward(dev, model, w, g, acts, a, l, key);
  }
  if (c.dropout > 0) ops::dropout(dev, acts.dres, c.dropout, key.seed, drop_stream(key, 0, DropSite::embed));
  ops::embed_bwd(dev, grads.embed, acts.dres, acts.stage.current().ids);
}

}  // namespace mm
