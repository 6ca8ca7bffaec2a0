// What a model costs: operations a token and bytes of a training run, known before the first step.
#pragma once

#include "model/activations.h"
#include "model/config.h"

namespace mm {

int64_t param_count(const ModelConfig& config);
int64_t active_param_count(const ModelConfig& config);  // MoE: of the experts one token uses
// Matrix products of one token: 2 a weight (LM head included, embedding lookup not) and causal attention over avg_len
// tokens.
double forward_flops_per_token(const ModelConfig& config, double avg_len);
inline double train_flops_per_token(const ModelConfig& config, double avg_len) {
  return 3 * forward_flops_per_token(config, avg_len);
}

// Of host memory on the CPU, of a GPU's on a GPU (there beside what the driver keeps for itself).
struct MemoryPlan {
  size_t weights = 0, gradients = 0, optimizer = 0, activations = 0, lm_head = 0, kernels = 0;  // kernels: scratch
  size_t total() const { return weights + gradients + optimizer + activations + lm_head + kernels; }
};
MemoryPlan training_memory(const ModelConfig& config, int64_t max_tok, const Device& dev = {},
                           Recompute recompute = Recompute::cheap);

}  // namespace mm
