#include "model/cost.h"

#include "kernels/open_device.h"
#include "model/lm_head.h"
#include "model/params.h"

namespace mm {

int64_t param_count(const ModelConfig& c) { return ParamTable(c).numel(); }

int64_t active_param_count(const ModelConfig& c) {
  if (!c.is_moe()) return param_count(c);
  return param_count(c) -
         c.num_hidden_layers * (c.num_experts - c.num_experts_per_tok) * 3 * c.hidden_size * c.moe_intermediate_size;
}

double forward_flops_per_token(const ModelConfig& c, double avg_len) {
  const auto embedding = static_cast<double>(c.vocab_size * c.hidden_size);
  // The input embedding is a lookup; tied, its one copy counts once as the head.
  const double matrices = static_cast<double>(active_param_count(c)) - (c.tie_word_embeddings ? 0.0 : embedding);
  const double pairs = avg_len / 2;  // a causal query sees half the sequence on average
  return 2 * matrices + 4 * pairs * static_cast<double>(c.q_width() * c.num_hidden_layers);
}

MemoryPlan training_memory(const ModelConfig& c, int64_t max_tok, const Device& dev, Recompute recompute) {
  const size_t params = static_cast<size_t>(param_count(c)), full = params * sizeof(float);
  const bool masters = dev.act != DType::f32;
  return {.weights = params * dtype_size(dev.act),
          .gradients = full,
          .optimizer = (masters ? 3 : 2) * full,
          .activations =
              Activations::plan_bytes(c, max_tok, true, dev.act, recompute) + BatchStage::gpu_bytes(dev, max_tok),
          .lm_head = LmHead::plan_bytes(c, dev),
          .kernels = kernel_scratch_bytes(dev)};
}

}  // namespace mm
