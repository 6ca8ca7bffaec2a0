// The GPU's half of TrainStep: replica, masters, moments, captured passes, and results that arrive a step late.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/graph_cache.h"
#include "train/train_step.h"

namespace mm {

// What normalises a step, known before its first pass.
struct StepTotals {
  double weight = 0;
  int64_t tokens = 0, targets = 0;
  explicit StepTotals(const std::vector<TokenBatch>& micro_batches);
  float share(const TokenBatch& b) const {
    return static_cast<float>(static_cast<double>(b.n_tok()) / static_cast<double>(tokens));
  }
  StepResult empty_result() const { return {.tokens = tokens, .targets = targets}; }
};

class GpuStep {
 public:
  // m, v: the host copies that pull() and push() fill and read.
  GpuStep(Model& model, const Device& dev, const StepOptions& options, ParamBuffer& m, ParamBuffer& v);
  ~GpuStep();
  void begin(const std::vector<TokenBatch>& micro_batches, Activations& acts, LmHead& head, ParamBuffer& grads,
             const std::function<DropoutKey(size_t)>& key);
  StepResult result();
  void update(double lr, ParamBuffer& grads);
  int64_t updates() const;
  void set_updates(int64_t n);
  LossScale loss_scale() const { return loss_scale_; }
  void set_loss_scale(const LossScale& s) { loss_scale_ = s; }
  void pull();
  void push();
  Model& replica() { return *replica_; }

 private:
  struct Numbers;  // what lies on the GPU beside the tensors
  struct Slot {    // of a step under way
    Buffer numbers;
    Fence ready;
    StepResult known;
    double scale = 1;
  };
  void pass(const TokenBatch& b, const StepTotals& totals, Activations& acts, LmHead& head, ParamBuffer& grads,
            DropoutKey key);
  void launches(Activations& acts, LmHead& head, ParamBuffer& grads, DropoutKey key);
  Numbers* numbers() const;
  void read_numbers(Numbers& to) const;

  Model& model_;
  Device dev_;
  StepOptions options_;
  ParamBuffer &host_m_, &host_v_;
  std::unique_ptr<Model> replica_;
  ParamBuffer master_, m_, v_;  // master_ is empty when the replica itself is fp32
  Buffer numbers_;
  Buffer rates_;  // pinned, one learning rate a slot
  std::vector<Fence> rate_fences_;
  size_t rate_turn_ = 0;
  LossScale loss_scale_;
  double step_scale_ = 1;  // of the last begin()
  std::vector<float> g_;
  std::deque<Slot> slots_, free_;
  GraphCache graphs_;
};

// Cuts a batch between sequences into parts of at most max_tok tokens.
std::vector<TokenBatch> split_batch(const TokenBatch& batch, int64_t max_tok);

}  // namespace mm
