#include "model/lm_head.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/ops.h"

namespace mm {

size_t LmHead::plan_bytes(const ModelConfig& c) {
  return static_cast<size_t>(chunk_ * (c.vocab_size + 2 * c.hidden_size)) * sizeof(float);
}

LmHead::LmHead(const ModelConfig& c)
    : d_model_(c.hidden_size),
      n_vocab_(c.vocab_size),
      buffer_(plan_bytes(c)),
      chunk_logp_(chunk_),
      chunk_lse_(chunk_),
      chunk_g_(chunk_) {}

// Rows with a target, gathered 512 at a time: f(first row of the chunk in rows_, h rows, logits, logp, lse).
template <class F>
void LmHead::for_each_chunk(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets, F&& f) {
  MM_CHECK(h.cols() == d_model_ && static_cast<int64_t>(targets.size()) == h.rows());
  rows_.clear();
  for (size_t t = 0; t < targets.size(); t++) {
    if (targets[t] < 0) continue;
    MM_CHECK(targets[t] < n_vocab_);
    rows_.push_back(static_cast<int32_t>(t));
  }
  const auto n = static_cast<int64_t>(rows_.size());
  for (int64_t first = 0; first < n; first += chunk_) {
    const int64_t count = std::min(chunk_, n - first);
    View logits(buffer_.f32(), DType::f32, {count, n_vocab_});
    View hidden(buffer_.f32() + chunk_ * n_vocab_, DType::f32, {count, d_model_});
    ops::gather_rows(dev, hidden, h, rows_.data() + first);
    chunk_targets_.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; i++)
      chunk_targets_[static_cast<size_t>(i)] = targets[static_cast<size_t>(rows_[static_cast<size_t>(first + i)])];
    ops::linear_fwd(dev, logits, hidden, model.weights.head);
    const View logp(chunk_logp_.data(), DType::f32, {count}), lse(chunk_lse_.data(), DType::f32, {count});
    ops::logprob_fwd(dev, logp, lse, logits, chunk_targets_.data());
    f(first, hidden, logits, logp, lse);
  }
}

void LmHead::logprob(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets, float* logp) {
  std::fill_n(logp, targets.size(), 0.0f);
  for_each_chunk(dev, model, h, targets, [&](int64_t first, View, View, View chunk, View) {
    for (int64_t i = 0; i < chunk.numel(); i++) logp[rows_[static_cast<size_t>(first + i)]] = chunk.f32()[i];
  });
}

void LmHead::backward(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets,
                      const float* g, View dh, ParamBuffer& grads, float* logp) {
  if (logp != nullptr) std::fill_n(logp, targets.size(), 0.0f);
  ops::zero(dev, dh);
  for_each_chunk(dev, model, h, targets, [&](int64_t first, View hidden, View logits, View chunk, View lse) {
    const int64_t count = chunk.numel();
    for (int64_t i = 0; i < count; i++) {
      const auto t = static_cast<size_t>(rows_[static_cast<size_t>(first + i)]);
      chunk_g_[static_cast<size_t>(i)] = g[t];
      if (logp != nullptr) logp[t] = chunk.f32()[i];
    }
    ops::logprob_bwd(dev, logits, lse, View(chunk_g_.data(), DType::f32, {count}), chunk_targets_.data());
    View dhidden(buffer_.f32() + chunk_ * (n_vocab_ + d_model_), DType::f32, {count, d_model_});
    ops::linear_bwd(dev, dhidden, grads.head, logits, hidden, model.weights.head);
    ops::scatter_rows(dev, dh, dhidden, rows_.data() + first);
  });
}

void LmHead::logits(const Device& dev, const Model& model, View h, const std::vector<int32_t>& rows, View out) {
  const auto n = static_cast<int64_t>(rows.size());
  for (int64_t first = 0; first < n; first += chunk_) {
    const int64_t count = std::min(chunk_, n - first);
    View hidden(buffer_.f32() + chunk_ * n_vocab_, DType::f32, {count, d_model_});
    ops::gather_rows(dev, hidden, h, rows.data() + first);
    ops::linear_fwd(dev, out.row_slice(first, first + count), hidden, model.weights.head);
  }
}

}  // namespace mm
