// From the final hidden states to log-probabilities or logits. The loss of every objective depends on the network
// through the log-probabilities of its targets, so this is all that training needs; the full [n_tok, n_vocab] logits
// never exist.
#pragma once

#include <vector>

#include "model/model.h"
#include "tensor/device.h"
#include "tensor/token_batch.h"

namespace mm {

// Scratch of the LM head: one chunk of logits. Allocate once.
class LmHead {
 public:
  explicit LmHead(const ModelConfig& config);
  static size_t plan_bytes(const ModelConfig& config);

  // logp[t] = log p(targets[t] | ...) where targets[t] >= 0, else 0. h [n_tok, d_model]; logp has n_tok elements.
  void logprob(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets, float* logp);

  // Given g[t] = dL/dlogp[t]: dh [n_tok, d_model] = dL/dh, head gradient +=. Recomputes the logits chunk by chunk;
  // logp, where not null, is filled on the way (one pass serves objectives whose g is known beforehand, such as
  // cross-entropy). Tokens with targets < 0 give zero.
  void backward(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets, const float* g,
                View dh, ParamBuffer& grads, float* logp);

  // Logits of chosen rows of h: out [rows.size(), n_vocab].
  void logits(const Device& dev, const Model& model, View h, const std::vector<int32_t>& rows, View out);

 private:
  static constexpr int64_t chunk_ = 512;
  template <class F>
  void for_each_chunk(const Device& dev, const Model& model, View h, const std::vector<int32_t>& targets, F&& f);
  int64_t d_model_, n_vocab_;
  Buffer buffer_;
  std::vector<int32_t> rows_, chunk_targets_;
  std::vector<float> chunk_logp_, chunk_lse_, chunk_g_;
};

}  // namespace mm
