// One optimizer step: micro-batches in, updated weights out. Knows neither files nor schedules.
#pragma once

#include <vector>

#include "model/forward.h"
#include "model/lm_head.h"
#include "train/objective.h"

namespace mm {

struct OptimizerOptions {
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8,
         weight_decay = 0.01;  // torch.optim.AdamW's, on every parameter, as MiniMind
  double grad_clip = 1.0;      // norm over all gradients; 0: no clipping
};

struct StepResult {
  double loss = 0;       // mean cross-entropy a target token
  double aux_loss = 0;   // MoE balance loss, mean over micro-batches by tokens
  double grad_norm = 0;  // before clipping
  int64_t tokens = 0, targets = 0;
  bool finite() const;
};

// Owns gradients, moments and activations; the weights stay the model's.
class TrainStep {
 public:
  TrainStep(Model& model, const Device& dev, const OptimizerOptions& options, int64_t max_tok, uint64_t seed);

  // Forward and backward of all micro-batches into the gradients (zeroed first); the result tells loss and norm.
  // `number` is the optimizer step, counted from 1: the key of dropout's random numbers. Micro-batches without any
  // target (rows cut before their answers) leave gradients and loss 0.
  StepResult accumulate(const std::vector<TokenBatch>& micro_batches, int64_t number);
  // AdamW with what accumulate() left. update_count counts the updates done, this one included, from 1 (bias
  // correction).
  void update(double lr, double grad_norm, int64_t update_count);

  // Of the forward pass of micro-batch `micro` (from 0) of step `number`.
  DropoutKey dropout_key(int64_t number, size_t micro) const {
    return {seed_, static_cast<uint64_t>(number) << 12 | static_cast<uint64_t>(micro)};
  }

  Activations& activations() { return acts_; }
  LmHead& head() { return head_; }
  ParamBuffer& gradients() { return grads_; }
  ParamBuffer& moment1() { return m_; }
  ParamBuffer& moment2() { return v_; }

 private:
  Model& model_;
  Device dev_;
  OptimizerOptions options_;
  uint64_t seed_;
  ParamBuffer grads_, m_, v_;
  Activations acts_;
  LmHead head_;
  std::vector<float> g_, logp_;
};

}  // namespace mm
