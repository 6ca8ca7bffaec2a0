// Tables of the rotary embedding: cos and sin of position times frequency, grown as positions are asked for.
#pragma once

#include <optional>
#include <vector>

#include "model/config.h"
#include "tensor/buffer.h"
#include "tensor/device.h"

namespace mm {

class RopeTable {
 public:
  explicit RopeTable(const ModelConfig& config);
  // Makes rows [0, n_pos) available; pointers got before may move. Not thread safe. Error past max_position_embeddings.
  void ensure(int64_t n_pos);
  // Keeps a copy of the rows [0, n_pos) on the GPU, which cos() and sin() then name; ensure() beyond them is an Error.
  void place(const Device& dev, int64_t n_pos);
  const float* cos() const { return on_gpu_ ? on_gpu_->f32() : cos_.data(); }  // [n_pos, head_dim / 2]
  const float* sin() const { return on_gpu_ ? on_gpu_->f32() + cos_.size() : sin_.data(); }
  const std::vector<float>& frequencies() const { return freq_; }

 private:
  std::vector<float> freq_, cos_, sin_;
  float factor_ = 1;  // YaRN's attention factor
  int64_t max_pos_ = 0;
  std::optional<Buffer> on_gpu_;
};

}  // namespace mm
