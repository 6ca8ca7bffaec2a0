#include "model/rope.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/thread_team.h"

namespace mm {

RopeTable::RopeTable(const ModelConfig& c) : max_pos_(c.max_position_embeddings) {
  const auto half = static_cast<int>(c.head_dim / 2);
  const auto dim = static_cast<double>(c.head_dim);
  // fp32 like the original: at far positions the rounding of the frequency is visible in the logits.
  for (int i = 0; i < half; i++) {
    freq_.push_back(
        1.0f / std::pow(static_cast<float>(c.rope_theta), static_cast<float>(2 * i) / static_cast<float>(c.head_dim)));
  }
  if (!c.rope_scaling) return;
  const YarnScaling& y = *c.rope_scaling;
  factor_ = static_cast<float>(y.attention_factor);
  const auto original = static_cast<double>(y.original_max_position_embeddings);
  if (static_cast<double>(c.max_position_embeddings) / original <= 1.0)
    return;  // MiniMind scales only beyond the trained length
  // Dimensions that turn more than beta_fast times within the trained length keep their frequency, those that turn less
  // than beta_slow times are interpolated by 1/factor, a linear ramp joins them.
  const auto turning = [&](double beta) {
    return dim * std::log(original / (beta * 2 * M_PI)) / (2 * std::log(c.rope_theta));
  };
  const double low = std::max(std::floor(turning(y.beta_fast)), 0.0);
  const double high = std::min(std::ceil(turning(y.beta_slow)), static_cast<double>(half - 1));
  for (int i = 0; i < half; i++) {
    const auto ramp = static_cast<float>(std::clamp((i - low) / std::max(high - low, 0.001), 0.0, 1.0));
    freq_[static_cast<size_t>(i)] *= 1.0f - ramp + ramp / static_cast<float>(y.factor);
  }
}

void RopeTable::ensure(int64_t n_pos) {
  const auto half = static_cast<int64_t>(freq_.size());
  const int64_t have = static_cast<int64_t>(cos_.size()) / half;
  if (n_pos <= have) return;
  if (n_pos > max_pos_) {
    throw Error("sequence length", fmt::format("at most max_position_embeddings = {}", max_pos_), std::to_string(n_pos),
                "shorten it or use a longer-context model");
  }
  MM_CHECK(!on_gpu_, "position {} of {} on the GPU", n_pos, have);
  const int64_t rows = std::min(max_pos_, std::max<int64_t>(n_pos, 2 * have));
  cos_.resize(static_cast<size_t>(rows * half));
  sin_.resize(static_cast<size_t>(rows * half));
  parallel_for(rows - have, 64, [&](int64_t begin, int64_t end) {
    for (int64_t p = have + begin; p < have + end; p++) {
      for (int64_t i = 0; i < half; i++) {
        const float angle = static_cast<float>(p) * freq_[static_cast<size_t>(i)];
        cos_[static_cast<size_t>(p * half + i)] = std::cos(angle) * factor_;
        sin_[static_cast<size_t>(p * half + i)] = std::sin(angle) * factor_;
      }
    }
  });
}

void RopeTable::place(const Device& dev, int64_t n_pos) {
  ensure(std::min(n_pos, max_pos_));
  if (!dev.on_gpu()) return;
  Buffer b(2 * cos_.size() * sizeof(float), Memory::cuda);
  copy_async(b.f32(), cos_.data(), cos_.size() * sizeof(float), dev.stream);
  copy_async(b.f32() + cos_.size(), sin_.data(), sin_.size() * sizeof(float), dev.stream);
  synchronize(dev.stream);
  on_gpu_ = std::move(b);
}

}  // namespace mm
