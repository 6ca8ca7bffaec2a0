// Keys and values of past tokens, one contiguous run of rows a sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "tensor/buffer.h"
#include "tensor/device.h"
#include "tensor/token_batch.h"

namespace mm {

// Rows [slot * max_len, slot * max_len + length(slot)) of every layer belong to sequence `slot`. Not thread safe.
class KvCache {
 public:
  KvCache(const ModelConfig& config, int64_t n_slots, int64_t max_len, const Device& dev = {});
  View k(int64_t layer) const;  // [n_slots * max_len, n_kv_head * d_head]
  View v(int64_t layer) const;
  int64_t n_slots() const { return n_slots_; }
  int64_t max_len() const { return max_len_; }
  int64_t length(int64_t slot) const { return length_[static_cast<size_t>(slot)]; }
  void truncate(int64_t slot, int64_t length);  // forget everything after the first `length` tokens
  static size_t bytes(const ModelConfig& config, int64_t n_slots, int64_t max_len, DType dtype = DType::f32);

  // Appends ids to a batch as the continuation of `slot` and books their rows; forward() then fills them. Error when
  // the sequence would pass max_len.
  void append(TokenBatch& batch, int64_t slot, const int32_t* ids, int64_t n);

  // Where the batch's tokens go and what its sequences may see; valid from append() to clear_batch().
  struct Plan {
    std::vector<int64_t> slots;             // [n_tok] row of each token
    std::vector<int32_t> kv_start, kv_len;  // [n_seq]
  };
  const Plan& plan() const { return plan_; }
  void clear_batch() { plan_ = {}; }

 private:
  View rows(int64_t index) const;
  int64_t n_slots_, max_len_, width_;
  DType dtype_;
  std::vector<int64_t> length_;
  Buffer buffer_;
  Plan plan_;
};

}  // namespace mm
