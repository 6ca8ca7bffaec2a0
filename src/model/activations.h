// All memory of a forward (and backward) pass, planned from the config and the largest batch, allocated once.
#pragma once

#include <vector>

#include "model/config.h"
#include "tensor/buffer.h"
#include "tensor/view.h"

namespace mm {

// What backward needs of one layer. Everything cheap is recomputed instead: normed inputs, rotated q and k, silu(gate)
// * up.
struct LayerActs {
  View x_in;               // [n_tok, d_model] residual stream entering the layer
  View x_mid;              // [n_tok, d_model] after attention
  View rstd_in, rstd_mid;  // [n_tok]
  View qkv;                // [n_tok, (n_head + 2 n_kv_head) d_head] before norm and rotation
  View attn;               // [n_tok, n_head d_head] attention output, before o_proj
  View lse;                // [n_tok, n_head]
  View gate_up;            // [n_tok top_k, 2 d_ff], rows in expert order when MoE
  // MoE: routing and the experts' outputs, rows in expert order
  View scores, weights, expert_out;  // [n_tok, n_expert], [n_tok, top_k], [n_tok top_k, d_model]
  View experts, slot,
      rows;  // i32: [n_tok, top_k] chosen expert; [n_tok, top_k] row of the pair; [n_tok top_k] token of the row
  std::vector<int64_t> offset;       // [n_expert + 1] rows of each expert
  std::vector<View> shared_gate_up;  // one a shared expert [n_tok, 2 d_ff]
};

class Activations {
 public:
  // train: keeps what backward needs and its scratch. Otherwise one layer's memory serves all layers.
  Activations(const ModelConfig& config, int64_t max_tok, bool train);
  static size_t plan_bytes(const ModelConfig& config, int64_t max_tok, bool train);

  int64_t max_tok() const { return max_tok_; }
  bool train() const { return train_; }
  // Views cut to n_tok rows. Shared scratch is overwritten by every layer.
  void set_tokens(int64_t n_tok);

  std::vector<LayerActs> layers;  // inference: one element, used by all
  View x_out;                     // [n_tok, d_model] residual stream after the last layer
  View rstd_out;                  // [n_tok]
  View h;                         // [n_tok, d_model] normed: input of a projection, finally of the LM head
  View q, k;                      // [n_tok, n_head d_head], [n_tok, n_kv_head d_head] normed and rotated
  View act;                       // [n_tok top_k, d_ff]
  View gathered;                  // MoE: [n_tok top_k, d_model] inputs in expert order
  View router_logits;             // MoE: [n_tok, n_expert]
  View branch;                    // [n_tok, d_model] branch output, where it cannot be added at once (dropout)
  // backward
  View dres, dh, dattn, dqkv, dact, dexpert, dweights, daux;
  double aux_loss = 0;  // sum over layers of the balance loss of the last forward

 private:
  void plan(Arena& arena, const ModelConfig& c, int64_t n, bool train);
  ModelConfig config_;
  int64_t max_tok_;
  bool train_;
  Buffer buffer_;
};

}  // namespace mm
