// The one batch type: packed training, padded parity tests, prefill, decode and evaluation all use it.
#pragma once

#include <cstdint>
#include <vector>

namespace mm {

// Tokens of several sequences one after the other. Sequence s owns tokens [cu_seqlens[s], cu_seqlens[s+1]); attention
// is causal and never crosses that border. With a KV cache the sequence continues what the cache already holds.
struct TokenBatch {
  std::vector<int32_t> ids;         // [n_tok]
  std::vector<int32_t> positions;   // [n_tok] position within the sequence (rotary angle)
  std::vector<int32_t> cu_seqlens;  // [n_seq + 1], starts with 0, ends with n_tok
  std::vector<int32_t> targets;     // [n_tok] id to predict at each token, -1 = none; empty: no loss
  std::vector<float> loss_weight;   // [n_tok] weight of each target (0 where targets is -1); empty: no loss
  std::vector<int64_t> sample;      // [n_seq] index of the data-set row(s) the sequence began with, for diagnostics

  int64_t n_tok() const { return static_cast<int64_t>(ids.size()); }
  int64_t n_seq() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
  void clear() {
    ids.clear();
    positions.clear();
    cu_seqlens.assign(1, 0);
    targets.clear();
    loss_weight.clear();
    sample.clear();
  }
};

}  // namespace mm
