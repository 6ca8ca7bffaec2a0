// One optimizer step: micro-batches in, updated weights out. Knows neither files nor schedules.
#pragma once

#include <memory>
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

struct StepOptions {
  OptimizerOptions optimizer;
  int64_t max_tok = 0;  // tokens of a forward pass; a GPU cuts larger micro-batches between sequences
  uint64_t seed = 42;
  Recompute recompute = Recompute::cheap;
  bool graph = true;  // GPU: passes are captured once a shape and replayed (not with dropout, whose numbers change)
};

struct StepResult {
  double loss = 0;       // mean cross-entropy a target token
  double aux_loss = 0;   // MoE balance loss, mean over micro-batches by tokens
  double grad_norm = 0;  // before clipping
  int64_t tokens = 0, targets = 0;
  bool overflow = false;  // fp16: the scaled gradients left its range; the GPU made no update and scales less now
  bool finite() const;
};

// fp16 gradients are computed times `scale`, a power of two that halves after an overflow and doubles after 2,000 steps
// without one (torch.amp.GradScaler's rule with a gentler start). 1 for every other type.
struct LossScale {
  double scale = 1;
  int64_t good_steps = 0;
};

class GpuStep;

// Owns gradients, moments and activations; the weights stay the model's. On a GPU it also owns the replica that
// computes and the fp32 masters; the model's own weights are then a copy that pull() makes current.
class TrainStep {
 public:
  TrainStep(Model& model, const Device& dev, const StepOptions& options);
  ~TrainStep();

  // Forward and backward of all micro-batches into the gradients (zeroed first). `number` is the optimizer step,
  // counted from 1: the key of dropout's random numbers. Micro-batches without any target (rows cut before their
  // answers) leave gradients and loss 0. A GPU only receives the work here.
  void begin(const std::vector<TokenBatch>& micro_batches, int64_t number);
  // Of the oldest step begun whose result was not yet asked for; waits for it.
  StepResult result();
  StepResult accumulate(const std::vector<TokenBatch>& micro_batches, int64_t number) {
    begin(micro_batches, number);
    return result();
  }
  // AdamW with the gradients of the last begin(). A GPU refuses by itself when they are not finite, so the result need
  // not be known.
  void update(double lr);
  // True where begin() and update() return before the work is done, so that results are best asked for a step late.
  bool asynchronous() const { return gpu_ != nullptr; }

  // Updates done: the bias correction's count. Waits on a GPU.
  int64_t updates() const;
  void set_updates(int64_t n);
  LossScale loss_scale() const;  // part of a checkpoint's state
  void set_loss_scale(const LossScale& s);
  // GPU: masters and moments to the host copies (before a checkpoint), and back (after one was read). Nothing
  // elsewhere.
  void pull();
  void push();

  // Of the forward pass of micro-batch `micro` (from 0) of step `number`.
  DropoutKey dropout_key(int64_t number, size_t micro) const {
    return {options_.seed, static_cast<uint64_t>(number) << 12 | static_cast<uint64_t>(micro)};
  }

  Model& model();  // the one that computes: a GPU's replica
  Activations& activations() { return acts_; }
  LmHead& head() { return head_; }
  ParamBuffer& gradients() { return grads_; }
  ParamBuffer& moment1();  // on the host, see pull()
  ParamBuffer& moment2();

 private:
  void begin_on_cpu(const std::vector<TokenBatch>& micro_batches, int64_t number);
  Model& model_;
  Device dev_;
  StepOptions options_;
  ParamBuffer grads_, m_, v_;
  Activations acts_;
  LmHead head_;
  std::vector<float> g_, logp_;
  StepResult result_;
  int64_t updates_ = 0;
  std::unique_ptr<GpuStep> gpu_;
};

}  // namespace mm
