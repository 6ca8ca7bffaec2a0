// Tables of the rotary embedding: cos and sin of position times frequency, grown as positions are asked for.
#pragma once

#include <vector>

#include "model/config.h"

namespace mm {

class RopeTable {
 public:
  explicit RopeTable(const ModelConfig& config);
  // Makes rows [0, n_pos) available; pointers got before may move. Not thread safe. Error past max_position_embeddings.
  void ensure(int64_t n_pos);
  const float* cos() const { return cos_.data(); }  // [n_pos, head_dim / 2]
  const float* sin() const { return sin_.data(); }
  const std::vector<float>& frequencies() const { return freq_; }

 private:
  std::vector<float> freq_, cos_, sin_;
  float factor_ = 1;  // YaRN's attention factor
  int64_t max_pos_ = 0;
};

}  // namespace mm
