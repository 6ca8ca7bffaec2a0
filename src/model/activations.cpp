#include "model/activations.h"

#include <algorithm>

#include "base/error.h"

namespace mm {

Recompute recompute_from_name(const std::string& name) {
  if (name == "none") return Recompute::none;
  if (name == "cheap") return Recompute::cheap;
  if (name == "ffn") return Recompute::ffn;
  throw Error("--recompute", "none, cheap or ffn", name);
}

void Activations::plan(Arena& arena, const ModelConfig& c, int64_t n, bool train) {
  const DType t = dtype_, f = DType::f32, i = DType::i32;
  const int64_t d = c.hidden_size, top_k = c.is_moe() ? c.num_experts_per_tok : 1, pairs = n * top_k,
                ffn = c.ffn_width();
  const bool keep_all = train && recompute_ == Recompute::none, keep_gate_up = !train || recompute_ != Recompute::ffn;
  aux = arena.take(DType::f64, {1});  // first, where it stays whatever the number of tokens
  layers.resize(static_cast<size_t>(train ? c.num_hidden_layers : 1));
  for (LayerActs& a : layers) {
    a.x_in = arena.take(t, {n, d});
    a.x_mid = train ? arena.take(t, {n, d}) : a.x_in;  // inference adds in place
    a.rstd_in = arena.take(f, {n});
    a.rstd_mid = arena.take(f, {n});
    a.qkv = arena.take(t, {n, c.qkv_width()});
    a.attn = arena.take(t, {n, c.q_width()});
    a.lse = arena.take(f, {n, c.num_attention_heads});
    if (keep_gate_up) a.gate_up = arena.take(t, {pairs, 2 * ffn});
    if (keep_all) {
      a.h_in = arena.take(t, {n, d});
      a.h_mid = arena.take(t, {n, d});
      a.q = arena.take(t, {n, c.q_width()});
      a.k = arena.take(t, {n, c.kv_width()});
    }
    if (c.is_moe()) {
      a.scores = arena.take(f, {n, c.num_experts});
      a.weights = arena.take(f, {n, top_k});
      a.expert_out = arena.take(t, {pairs, d});
      a.experts = arena.take(i, {n, top_k});
      a.slot = arena.take(i, {n, top_k});
      a.rows = arena.take(i, {pairs});
      a.offset = arena.take(i, {c.num_experts + 1});
      a.shared_gate_up.resize(static_cast<size_t>(c.n_shared_experts));
      for (View& v : a.shared_gate_up) v = arena.take(t, {n, 2 * ffn});
    }
  }
  x_out = train ? arena.take(t, {n, d}) : layers[0].x_in;
  rstd_out = arena.take(f, {n});
  h = arena.take(t, {n, d});
  if (c.dropout > 0) branch = arena.take(t, {n, d});
  if (c.is_moe()) {
    gathered = arena.take(t, {pairs, d});
    router_logits = arena.take(t, {n, c.num_experts});
  }
  if (train) {
    logp = arena.take(f, {n});
    dres = arena.take(t, {n, d});
    dh = arena.take(t, {n, d});
    if (c.is_moe()) {
      dexpert = arena.take(t, {pairs, d});
      dweights = arena.take(f, {n, top_k});
      daux = arena.take(f, {c.num_experts});
    }
  }
  // The attention half and the FFN half of a layer are never alive together.
  LayerActs scratch;
  scratch.h_in = scratch.h_mid = h;
  const size_t mark = arena.used();
  if (!keep_all) {
    scratch.q = arena.take(t, {n, c.q_width()});
    scratch.k = arena.take(t, {n, c.kv_width()});
  }
  if (train) {
    dattn = arena.take(t, {n, c.q_width()});
    dqkv = arena.take(t, {n, c.qkv_width()});
  }
  const size_t attention_end = arena.used();
  arena.rewind(mark);
  scratch.act = arena.take(t, {pairs, ffn});
  if (!keep_gate_up) scratch.gate_up = arena.take(t, {pairs, 2 * ffn});
  if (train) dact = arena.take(t, {pairs, ffn});
  if (arena.used() < attention_end) arena.rewind(attention_end);
  for (LayerActs& a : layers) {
    if (!keep_gate_up) a.gate_up = scratch.gate_up;
    a.act = scratch.act;
    if (keep_all) continue;
    a.h_in = scratch.h_in;
    a.h_mid = scratch.h_mid;
    a.q = scratch.q;
    a.k = scratch.k;
  }
}

size_t Activations::plan_bytes(const ModelConfig& config, int64_t max_tok, bool train, DType dtype,
                               Recompute recompute) {
  Arena counter;
  Device dev;
  dev.act = dtype;
  Activations probe(config, 0, train, dev, recompute);
  probe.plan(counter, config, max_tok, train);
  return counter.used();
}

Activations::Activations(const ModelConfig& config, int64_t max_tok, bool train, const Device& dev, Recompute recompute)
    : stage(dev, max_tok, config.num_key_value_heads),
      config_(config),
      max_tok_(max_tok),
      train_(train),
      dtype_(dev.act),
      recompute_(recompute) {
  if (max_tok == 0) return;
  buffer_ = Buffer(plan_bytes(config, max_tok, train, dev.act, recompute), dev.memory());
  set_tokens(max_tok);
}

void Activations::set_tokens(int64_t n_tok) {
  MM_CHECK(n_tok <= max_tok_, "{} tokens, planned for {}", n_tok, max_tok_);
  Arena arena(buffer_);
  plan(arena, config_, n_tok, train_);
}

double Activations::aux_loss(const Device& dev) const {
  double value = 0;
  if (!dev.on_gpu()) return *aux.as<double>();
  copy_async(&value, aux.data, sizeof(value), dev.stream);
  synchronize(dev.stream);
  return value;
}

}  // namespace mm
