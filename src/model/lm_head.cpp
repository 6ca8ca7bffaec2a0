#include "model/lm_head.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/ops.h"
#include "tensor/host_copy.h"

namespace mm {

// Rows of logits at once. On the CPU they stay in the caches; on a GPU they fill the machine, within 160 MB.
static int64_t chunk_rows(const ModelConfig& c, const Device& dev) {
  if (!dev.on_gpu()) return 512;
  const int64_t row = c.vocab_size * static_cast<int64_t>(dtype_size(dev.act));
  return std::clamp<int64_t>(int64_t{160'000'000} / row / 128 * 128, 512, 12288);
}

// The CPU gathers the rows that have a target; a GPU takes rows as they lie, and gathers few (for sampling).
static int64_t gathered_rows(const ModelConfig& c, const Device& dev) {
  return dev.on_gpu() ? 256 : chunk_rows(c, dev);
}

size_t LmHead::plan_bytes(const ModelConfig& c, const Device& dev) {
  const int64_t logits = chunk_rows(c, dev) * c.vocab_size, hidden = 2 * gathered_rows(c, dev) * c.hidden_size;
  return static_cast<size_t>(logits + hidden) * dtype_size(dev.act);
}

LmHead::LmHead(const ModelConfig& c, const Device& dev)
    : chunk_(chunk_rows(c, dev)),
      gather_(gathered_rows(c, dev)),
      d_model_(c.hidden_size),
      n_vocab_(c.vocab_size),
      dtype_(dev.act),
      buffer_(plan_bytes(c, dev), dev.memory()),
      chunk_logp_(static_cast<size_t>(chunk_)),
      chunk_lse_(static_cast<size_t>(chunk_)),
      chunk_g_(static_cast<size_t>(chunk_)) {
  if (dev.on_gpu()) gpu_lists_ = Buffer(static_cast<size_t>(chunk_) * 4 * sizeof(float), Memory::cuda);
}

View LmHead::piece(size_t offset, int64_t rows, int64_t cols) const {
  return View(static_cast<char*>(buffer_.data()) + offset * dtype_size(dtype_), dtype_, {rows, cols});
}

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
    const View logits = chunk_logits(count), hidden = chunk_hidden(count);
    ops::gather_rows(dev, hidden, h, rows_.data() + first);
    chunk_targets_.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; i++)
      chunk_targets_[static_cast<size_t>(i)] = targets[static_cast<size_t>(rows_[static_cast<size_t>(first + i)])];
    ops::linear_fwd(dev, logits, hidden, model.weights.head);
    const View logp(chunk_logp_.data(), DType::f32, {count}), lse(chunk_lse_.data(), DType::f32, {count});
    f(first, hidden, logits, logp, lse);
  }
}

void LmHead::logprob(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets, float* logp) {
  if (dev.on_gpu()) {
    const auto n = static_cast<int64_t>(targets.size());
    for (int64_t first = 0; first < n; first += chunk_) {
      const int64_t count = std::min(chunk_, n - first);
      auto* ids = static_cast<int32_t*>(gpu_lists_.data());
      const View out(gpu_lists_.f32() + chunk_, DType::f32, {count}), lse(out.f32() + chunk_, DType::f32, {count});
      copy_async(ids, targets.data() + first, static_cast<size_t>(count) * 4, dev.stream);
      ops::linear_fwd(dev, chunk_logits(count), h.row_slice(first, first + count), model.weights.head);
      ops::logprob_fwd(dev, out, lse, chunk_logits(count), ids);
      copy_async(logp + first, out.data, static_cast<size_t>(count) * 4, dev.stream);
      synchronize(dev.stream);
    }
    return;
  }
  std::fill_n(logp, targets.size(), 0.0f);
  for_each_chunk(dev, model, h, targets, [&](int64_t first, View, View logits, View chunk, View lse) {
    ops::logprob_fwd(dev, chunk, lse, logits, chunk_targets_.data());
    for (int64_t i = 0; i < chunk.numel(); i++) logp[rows_[static_cast<size_t>(first + i)]] = chunk.f32()[i];
  });
}

void LmHead::backward(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets,
                      const float* g, View dh, ParamBuffer& grads, float* logp) {
  if (dev.on_gpu()) {
    const size_t bytes = targets.size() * sizeof(float);
    const auto n = static_cast<int64_t>(targets.size());
    const Buffer lists(3 * std::max<size_t>(bytes, 1), Memory::cuda);
    const View of_g(lists.f32() + n, DType::f32, {n}), of_logp(lists.f32() + 2 * n, DType::f32, {n});
    copy_async(lists.data(), targets.data(), bytes, dev.stream);
    copy_async(of_g.data, g, bytes, dev.stream);
    backward_device(dev, model, h, static_cast<const int32_t*>(lists.data()), of_g, dh, grads, of_logp);
    if (logp != nullptr) copy_async(logp, of_logp.data, bytes, dev.stream);
    synchronize(dev.stream);
    return;
  }
  if (logp != nullptr) std::fill_n(logp, targets.size(), 0.0f);
  ops::zero(dev, dh);
  for_each_chunk(dev, model, h, targets, [&](int64_t first, View hidden, View logits, View chunk, View lse) {
    const int64_t count = chunk.numel();
    for (int64_t i = 0; i < count; i++) chunk_g_[static_cast<size_t>(i)] = g[rows_[static_cast<size_t>(first + i)]];
    ops::logprob_fwd_bwd(dev, logits, chunk, lse, View(chunk_g_.data(), DType::f32, {count}), chunk_targets_.data());
    for (int64_t i = 0; i < count && logp != nullptr; i++) logp[rows_[static_cast<size_t>(first + i)]] = chunk.f32()[i];
    const View dhidden = chunk_dhidden(count);
    ops::linear_bwd(dev, dhidden, grads.head, logits, hidden, model.weights.head);
    ops::scatter_rows(dev, dh, dhidden, rows_.data() + first);
  });
}

void LmHead::backward_staged(const Device& dev, const Model& model, Activations& acts, ParamBuffer& grads) {
  const StagedBatch& b = acts.stage.current();
  const View g(const_cast<float*>(b.g), DType::f32, {b.n_tok});
  backward_device(dev, model, acts.h, b.targets, g, acts.dh, grads, acts.logp);
}

// All rows take part: rows without a target have a zero gradient, and the host need not know which they are.
void LmHead::backward_device(const Device& dev, const Model& model, View h, const int32_t* targets, View g, View dh,
                             ParamBuffer& grads, View logp) {
  if (h.rows() == 0) return;
  const int64_t n_chunk = (h.rows() + chunk_ - 1) / chunk_;  // of equal size, in whole tiles
  const int64_t size = (h.rows() + n_chunk * 128 - 1) / (n_chunk * 128) * 128;
  for (int64_t first = 0; first < h.rows(); first += size) {
    const int64_t end = std::min(first + size, h.rows());
    const View logits = chunk_logits(end - first), hidden = h.row_slice(first, end);
    const View lse(gpu_lists_.f32() + 2 * chunk_, DType::f32, {end - first});
    ops::linear_fwd(dev, logits, hidden, model.weights.head);
    ops::logprob_fwd_bwd(dev, logits, logp.row_slice(first, end), lse, g.row_slice(first, end), targets + first);
    ops::linear_bwd(dev, dh.row_slice(first, end), grads.head, logits, hidden, model.weights.head);
  }
}

View LmHead::project(const Device& dev, const Model& model, View h) {
  MM_CHECK(h.rows() <= chunk_);
  ops::linear_fwd(dev, chunk_logits(h.rows()), h, model.weights.head);
  return chunk_logits(h.rows());
}

void LmHead::logits(const Device& dev, const Model& model, View h, const std::vector<int32_t>& rows, View out) {
  const auto n = static_cast<int64_t>(rows.size());
  for (int64_t first = 0; first < n; first += gather_) {
    const int64_t count = std::min(gather_, n - first);
    const View hidden = chunk_hidden(count), to = out.row_slice(first, first + count);
    if (!dev.on_gpu()) {
      ops::gather_rows(dev, hidden, h, rows.data() + first);
      ops::linear_fwd(dev, to, hidden, model.weights.head);
      continue;
    }
    copy_async(gpu_lists_.data(), rows.data() + first, static_cast<size_t>(count) * 4, dev.stream);
    ops::gather_rows(dev, hidden, h, static_cast<const int32_t*>(gpu_lists_.data()));
    const std::vector<float> values = host_floats(dev, project(dev, model, hidden));
    std::copy(values.begin(), values.end(), to.f32());
  }
}

}  // namespace mm
