// All memory of a forward (and backward) pass, planned from the config and the largest batch, allocated once.
#pragma once

#include <string>
#include <vector>

#include "model/config.h"
#include "model/staged_batch.h"
#include "tensor/buffer.h"
#include "tensor/view.h"

namespace mm {

// How much of a layer's forward pass backward computes again instead of keeping it.
//   none:  nothing but silu(gate) * up, which backward of that op gets almost for free
//   cheap: normed inputs, rotated q and k too, which cost memory traffic but no matrix product (the default)
//   ffn:   gate_up as well, the largest of all: one product more a layer
enum class Recompute { none, cheap, ffn };
Recompute recompute_from_name(const std::string& name);  // Error on an unknown one

// What backward needs of one layer. Views marked (s) are the pass's scratch, shared by all layers, where Recompute says
// so.
struct LayerActs {
  View x_in;               // [n_tok, d_model] residual stream entering the layer
  View x_mid;              // [n_tok, d_model] after attention
  View rstd_in, rstd_mid;  // [n_tok]
  View qkv;                // [n_tok, (n_head + 2 n_kv_head) d_head] before norm and rotation
  View attn;               // [n_tok, n_head d_head] attention output, before o_proj
  View lse;                // [n_tok, n_head]
  View gate_up;            // [n_tok top_k, 2 d_ff], rows in expert order when MoE (s)
  View h_in, h_mid;        // [n_tok, d_model] normed x_in and x_mid (s)
  View q, k;               // [n_tok, n_head d_head], [n_tok, n_kv_head d_head] normed and rotated (s)
  View act;                // [n_tok top_k, d_ff] (s)
  // MoE: routing and the experts' outputs, rows in expert order
  View scores, weights, expert_out;  // [n_tok, n_expert], [n_tok, top_k], [n_tok top_k, d_model]
  View experts, slot,
      rows;     // i32: [n_tok, top_k] chosen expert; [n_tok, top_k] row of the pair; [n_tok top_k] token of the row
  View offset;  // i32 [n_expert + 1] first row of each expert
  std::vector<View> shared_gate_up;  // one a shared expert [n_tok, 2 d_ff]
};

class Activations {
 public:
  // train: keeps what backward needs and its scratch. Otherwise one layer's memory serves all layers.
  Activations(const ModelConfig& config, int64_t max_tok, bool train, const Device& dev = {},
              Recompute recompute = Recompute::cheap);
  static size_t plan_bytes(const ModelConfig& config, int64_t max_tok, bool train, DType dtype = DType::f32,
                           Recompute recompute = Recompute::cheap);

  int64_t max_tok() const { return max_tok_; }
  bool train() const { return train_; }
  Recompute recompute() const { return recompute_; }
  double aux_loss(const Device& dev) const;  // value of aux; waits on a GPU
  // Views cut to n_tok rows. Shared scratch is overwritten by every layer.
  void set_tokens(int64_t n_tok);

  std::vector<LayerActs> layers;  // inference: one element, used by all
  View x_out;                     // [n_tok, d_model] residual stream after the last layer
  View rstd_out;                  // [n_tok]
  View h;                         // [n_tok, d_model] the final norm's output, input of the LM head
  View aux;                       // f64 [1] balance loss times the pass's share, summed over layers and passes
  View gathered;                  // MoE: [n_tok top_k, d_model] inputs in expert order
  View router_logits;             // MoE: [n_tok, n_expert]
  View branch;                    // [n_tok, d_model] branch output, where it cannot be added at once (dropout)
  // backward
  View dres, dh, dattn, dqkv, dact, dexpert, dweights, daux;
  View logp;  // f32 [n_tok] of the targets, when train
  BatchStage stage;

 private:
  void plan(Arena& arena, const ModelConfig& c, int64_t n, bool train);
  ModelConfig config_;
  int64_t max_tok_;
  bool train_;
  DType dtype_;
  Recompute recompute_;
  Buffer buffer_;
};

}  // namespace mm
