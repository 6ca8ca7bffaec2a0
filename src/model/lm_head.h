// From the final hidden states to log-probabilities or logits. The loss of every objective depends on the network
// through the log-probabilities of its targets, so this is all that training needs; the full [n_tok, n_vocab] logits
// never exist.
#pragma once

#include <vector>

#include "model/activations.h"
#include "model/model.h"
#include "tensor/device.h"
#include "tensor/token_batch.h"

namespace mm {

// Scratch of the LM head: one chunk of logits. Allocate once. Targets, g and logp of the calls with vectors lie on the
// host; on a GPU these calls wait for their results.
class LmHead {
 public:
  explicit LmHead(const ModelConfig& config, const Device& dev = {});
  static size_t plan_bytes(const ModelConfig& config, const Device& dev = {});

  // logp[t] = log p(targets[t] | ...) where targets[t] >= 0, else 0. h [n_tok, d_model]; logp has n_tok elements.
  void logprob(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets, float* logp);

  // Given g[t] = dL/dlogp[t]: dh [n_tok, d_model] = dL/dh, head gradient +=. Recomputes the logits chunk by chunk;
  // logp, where not null, is filled on the way (one pass serves objectives whose g is known beforehand, such as
  // cross-entropy). Tokens with targets < 0 give zero.
  void backward(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets, const float* g,
                View dh, ParamBuffer& grads, float* logp);
  // GPU: the same over the staged batch, without waiting: from acts.h to acts.dh, log-probabilities to acts.logp.
  void backward_staged(const Device& dev, const Model& model, Activations& acts, ParamBuffer& grads);

  // GPU: the same with targets, g and logp on the device.
  void backward_device(const Device& dev, const Model& model, View h, const int32_t* targets, View g, View dh,
                       ParamBuffer& grads, View logp);

  // Logits of chosen rows of h: out [rows.size(), n_vocab], fp32 on the host.
  void logits(const Device& dev, const Model& model, View h, const std::vector<int32_t>& rows, View out);

  // GPU: the logits of all rows of h, at most max_rows() of them; the view is of this object's scratch. Does not wait.
  View project(const Device& dev, const Model& model, View h);
  View projected(int64_t n) const {
    return chunk_logits(n);
  }  // what project() of n rows left, also by a replayed graph
  int64_t max_rows() const { return chunk_; }

 private:
  template <class F>
  void for_each_chunk(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets, F&& f);
  View piece(size_t offset, int64_t rows, int64_t cols) const;
  View chunk_logits(int64_t n) const { return piece(0, n, n_vocab_); }
  View chunk_hidden(int64_t n) const { return piece(static_cast<size_t>(chunk_ * n_vocab_), n, d_model_); }
  View chunk_dhidden(int64_t n) const {
    return piece(static_cast<size_t>(chunk_ * n_vocab_ + gather_ * d_model_), n, d_model_);
  }
  int64_t chunk_, gather_, d_model_, n_vocab_;
  DType dtype_;
  Buffer buffer_;
  std::vector<int32_t> rows_, chunk_targets_;
  std::vector<float> chunk_logp_, chunk_lse_, chunk_g_;
  Buffer gpu_lists_;  // GPU: what the calls with vectors carry over, and lse
};

}  // namespace mm
