#include "model/activations.h"

#include <algorithm>

#include "base/error.h"

namespace mm {

void Activations::plan(Arena& arena, const ModelConfig& c, int64_t n, bool train) {
  const DType f = DType::f32, i = DType::i32;
  const int64_t d = c.hidden_size, top_k = c.is_moe() ? c.num_experts_per_tok : 1, pairs = n * top_k,
                ffn = c.ffn_width();
  layers.resize(static_cast<size_t>(train ? c.num_hidden_layers : 1));
  for (LayerActs& a : layers) {
    a.x_in = arena.take(f, {n, d});
    a.x_mid = train ? arena.take(f, {n, d}) : a.x_in;  // inference adds in place
    a.rstd_in = arena.take(f, {n});
    a.rstd_mid = arena.take(f, {n});
    a.qkv = arena.take(f, {n, c.qkv_width()});
    a.attn = arena.take(f, {n, c.q_width()});
    a.lse = arena.take(f, {n, c.num_attention_heads});
    a.gate_up = arena.take(f, {pairs, 2 * ffn});
    if (c.is_moe()) {
      a.scores = arena.take(f, {n, c.num_experts});
      a.weights = arena.take(f, {n, top_k});
      a.expert_out = arena.take(f, {pairs, d});
      a.experts = arena.take(i, {n, top_k});
      a.slot = arena.take(i, {n, top_k});
      a.rows = arena.take(i, {pairs});
      a.offset.assign(static_cast<size_t>(c.num_experts) + 1, 0);
      a.shared_gate_up.resize(static_cast<size_t>(c.n_shared_experts));
      for (View& v : a.shared_gate_up) v = arena.take(f, {n, 2 * ffn});
    }
  }
  x_out = train ? arena.take(f, {n, d}) : layers[0].x_in;
  rstd_out = arena.take(f, {n});
  h = arena.take(f, {n, d});
  if (c.dropout > 0) branch = arena.take(f, {n, d});
  if (c.is_moe()) {
    gathered = arena.take(f, {pairs, d});
    router_logits = arena.take(f, {n, c.num_experts});
  }
  if (train) {
    dres = arena.take(f, {n, d});
    dh = arena.take(f, {n, d});
    if (c.is_moe()) {
      dexpert = arena.take(f, {pairs, d});
      dweights = arena.take(f, {n, top_k});
      daux = arena.take(f, {c.num_experts});
    }
  }
  // The attention half and the FFN half of a layer are never alive together.
  const size_t mark = arena.used();
  q = arena.take(f, {n, c.q_width()});
  k = arena.take(f, {n, c.kv_width()});
  if (train) {
    dattn = arena.take(f, {n, c.q_width()});
    dqkv = arena.take(f, {n, c.qkv_width()});
  }
  const size_t attention_end = arena.used();
  arena.rewind(mark);
  act = arena.take(f, {pairs, ffn});
  if (train) dact = arena.take(f, {pairs, ffn});
  if (arena.used() < attention_end) arena.rewind(attention_end);
}

size_t Activations::plan_bytes(const ModelConfig& config, int64_t max_tok, bool train) {
  Arena counter;
  Activations probe(config, 0, train);
  probe.plan(counter, config, max_tok, train);
  return counter.used();
}

Activations::Activations(const ModelConfig& config, int64_t max_tok, bool train)
    : config_(config), max_tok_(max_tok), train_(train) {
  if (max_tok == 0) return;
  buffer_ = Buffer(plan_bytes(config, max_tok, train));
  set_tokens(max_tok);
}

void Activations::set_tokens(int64_t n_tok) {
  MM_CHECK(n_tok <= max_tok_, "{} tokens, planned for {}", n_tok, max_tok_);
  Arena arena(buffer_);
  plan(arena, config_, n_tok, train_);
}

}  // namespace mm
