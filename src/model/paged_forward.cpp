#include "model/paged_forward.h"

#include <optional>

#include "base/error.h"
#include "model/moe.h"

namespace mm {

PagedScratch::PagedScratch(const ModelConfig& c, int64_t max_out, int64_t gather_rows, const Device& dev) {
  const auto plan = [&](Arena& arena) {
    hidden = arena.take(dev.act, {max_out, c.hidden_size});
    normed = arena.take(dev.act, {max_out, c.hidden_size});
    logits = arena.take(dev.act, {max_out, c.vocab_size});
    k = arena.take(dev.act, {gather_rows, c.kv_width()});
    v = arena.take(dev.act, {gather_rows, c.kv_width()});
    squares = arena.take(DType::f32, {(c.hidden_size + 63) / 64, ops::most_scaled});
  };
  Arena counter;
  plan(counter);
  buffer = Buffer(counter.used(), Memory::cuda);
  Arena arena(buffer);
  plan(arena);
}

namespace {

using Scaled = std::optional<ops::ScaledRows>;  // none: other kernels than linear_scaled compute this step

void product(const Device& dev, View y, View x, const InferMatrix& w, View residual = {}) {
  if (ops::linear_few(dev, y, x, View(), 0, w, residual)) return;
  if (w.format == WeightFormat::i8) return ops::linear_i8(dev, y, x, w, residual);
  ops::linear_fwd(dev, y, x, View(const_cast<void*>(w.data), x.dtype, {w.n, w.k}), residual);
}

// x = y w^T + x
void product_add(const Device& dev, View x, View y, const InferMatrix& w, const Scaled& next) {
  if (next) return ops::linear_scaled_add(dev, x, y, w, *next);
  product(dev, x, y, w, x);
}

// y = norm(x) w^T; `normed` [rows of x] may receive norm(x). scaled: of x.
void norm_product(const Device& dev, View y, View normed, View x, View norm, float eps, const InferMatrix& w,
                  const Scaled& scaled) {
  if (scaled && ops::linear_scaled(dev, y, *scaled, eps, w)) return;
  if (ops::linear_few(dev, y, x, norm, eps, w)) return;
  ops::rmsnorm_fwd(dev, normed, View(), x, norm, eps);
  product(dev, y, normed, w);
}

void prompt_attention(const Device& dev, const ModelConfig& c, const InferModel& m, const InferKv& kv, int64_t layer,
                      const PagedBatch& b, LayerActs& a, PagedScratch& scratch) {
  const StagedBatch& p = *b.prompts;
  View k = a.k.row_slice(b.n_decode, b.n_tok), v = scratch.v.row_slice(b.n_decode, b.n_tok);
  if (b.gather) {
    k = scratch.k.row_slice(0, b.gather_rows);
    v = scratch.v.row_slice(0, b.gather_rows);
    ops::kv_gather(dev, k, v, kv, layer, b.gather_start, b.prompt_table, b.n_prompt, m.d_head);
  }
  ops::attention_fwd(dev, {.q = a.q.row_slice(b.n_decode, b.n_tok),
                           .k = k,
                           .v = v,
                           .out = a.attn.row_slice(b.n_decode, b.n_tok),
                           .cu = p.cu_seqlens,
                           .kv_start = b.gather ? p.kv_start : nullptr,
                           .kv_len = b.gather ? p.kv_len : nullptr,
                           .n_seq = p.n_seq,
                           .n_tok = p.n_tok,
                           .pairs = p.pairs,
                           .keys = p.keys,
                           .tiles = p.tiles,
                           .n_tiles = p.n_tiles,
                           .max_tiles = p.max_tiles,
                           .max_len = p.max_len,
                           .n_head = static_cast<int>(c.num_attention_heads),
                           .n_kv_head = static_cast<int>(c.num_key_value_heads),
                           .d_head = static_cast<int>(c.head_dim),
                           .scale = m.attention_scale});
}

}  // namespace

void paged_forward(const Device& dev, const GpuWeights& weights, const InferKv& kv, const PagedBatch& b,
                   Activations& acts, PagedScratch& scratch, bool hidden_only) {
  const Model& model = weights.replica();
  const ModelConfig& c = model.config;
  const InferModel& m = weights.model();
  acts.set_tokens(b.n_tok);
  LayerActs& a = acts.layers[0];
  const View x = a.x_in;
  const bool packed = b.prompts != nullptr && !b.gather;  // prompts attend to their own tokens alone
  // Who writes x leaves what the product behind the next norm reads, where all products of a layer can do so.
  const bool wide = ops::linear_scaled_takes(dev, x.dtype, m, b.n_tok);
  const auto scaled = [&](View norm) { return wide ? Scaled({norm, a.h_in, scratch.squares}) : Scaled(); };
  if (wide) ops::embed_scaled(dev, x, *scaled(model.weights.layers[0].input_norm), model.weights.embed, b.ids);
  else ops::embed_fwd(dev, x, model.weights.embed, b.ids);
  for (int64_t l = 0; l < c.num_hidden_layers; l++) {
    const LayerViews& w = model.weights.layers[static_cast<size_t>(l)];
    const InferLayer& matrices = m.layers[l];
    const bool last = l + 1 == c.num_hidden_layers;
    const Scaled next =
        scaled(last ? model.weights.final_norm : model.weights.layers[static_cast<size_t>(l) + 1].input_norm);
    const Scaled mid = scaled(w.post_norm);
    norm_product(dev, a.qkv, a.h_in, x, w.input_norm, c.rms_norm_eps, matrices.qkv, scaled(w.input_norm));
    const ops::NormRope rope = {.q_weight = w.q_norm,
                                .k_weight = w.k_norm,
                                .cos = m.cos,
                                .sin = m.sin,
                                .positions = b.positions,
                                .eps = c.rms_norm_eps,
                                .n = b.n_tok,
                                .n_head = m.n_head,
                                .n_kv_head = m.n_kv_head,
                                .d_head = m.d_head};
    const ops::PagedAttention rows = {.seq = b.seq,
                                      .n_key = b.n_key,
                                      .table = b.table,
                                      .max_key = b.max_key,
                                      .n_new = b.n_new,
                                      .invariant = b.invariant,
                                      .n_head = m.n_head,
                                      .n_kv_head = m.n_kv_head,
                                      .d_head = m.d_head,
                                      .scale = m.attention_scale};
    if (b.n_decode < b.n_tok || !ops::attention_paged_rope(dev, a.attn, kv, l, rows, a.qkv, rope)) {
      ops::paged_norm_rope(dev, a.q, kv, l, packed ? a.k : View(), packed ? scratch.v.row_slice(0, b.n_tok) : View(),
                           b.slots, a.qkv, rope);
      if (b.n_decode > 0)
        ops::attention_paged(dev, a.attn.row_slice(0, b.n_decode), a.q.row_slice(0, b.n_decode), kv, l, rows);
    }
    if (b.prompts != nullptr) prompt_attention(dev, c, m, kv, l, b, a, scratch);
    product_add(dev, x, a.attn, matrices.o, mid);
    if (mid) {
      ops::linear_scaled(dev, a.act, *mid, c.rms_norm_eps, matrices.gate_up, true);
      product_add(dev, x, a.act, matrices.down, next);
      continue;
    }
    if (!c.is_moe() && ops::linear_few(dev, a.act, x, w.post_norm, c.rms_norm_eps, matrices.gate_up, {}, true)) {
      product(dev, x, a.act, matrices.down, x);
      continue;
    }
    ops::rmsnorm_fwd(dev, a.h_mid, View(), x, w.post_norm, c.rms_norm_eps);
    if (c.is_moe()) {
      moe_forward(dev, c, w, a, acts, x, x);
    } else if (matrices.gate_up.format == WeightFormat::i8) {
      product(dev, a.gate_up, a.h_mid, matrices.gate_up);
      ops::swiglu_fwd(dev, a.act, a.gate_up);
      product(dev, x, a.act, matrices.down, x);
    } else {
      ops::linear_swiglu_fwd(dev, a.gate_up, a.act, a.h_mid, w.gate_up);
      product(dev, x, a.act, matrices.down, x);
    }
  }
  if (b.n_out == 0) return;
  const View normed = scratch.normed.row_slice(0, b.n_out);
  View last = x;
  if (b.out_rows != nullptr) {
    last = scratch.hidden.row_slice(0, b.n_out);
    ops::gather_rows(dev, last, x, b.out_rows);
  }
  if (!hidden_only) {
    const View logits = scratch.logits.row_slice(0, b.n_out);
    return norm_product(dev, logits, normed, last, model.weights.final_norm, c.rms_norm_eps, m.head,
                        b.out_rows == nullptr ? scaled(model.weights.final_norm) : Scaled());
  }
  ops::rmsnorm_fwd(dev, normed, View(), last, model.weights.final_norm, c.rms_norm_eps);
}

}  // namespace mm
