#include "train/train_step.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "kernels/ops.h"
#include "train/gpu_step.h"

namespace mm {

bool StepResult::finite() const { return std::isfinite(loss) && std::isfinite(aux_loss) && std::isfinite(grad_norm); }

TrainStep::TrainStep(Model& model, const Device& dev, const StepOptions& options)
    : model_(model),
      dev_(dev),
      options_(options),
      grads_(model.config, model.table, DType::f32, dev.memory()),
      m_(model.config, model.table),
      v_(model.config, model.table),
      acts_(model.config, options.max_tok, true, dev, options.recompute),
      head_(model.config, dev) {
  if (dev.on_gpu()) gpu_ = std::make_unique<GpuStep>(model, dev, options, m_, v_);
}

TrainStep::~TrainStep() = default;

void TrainStep::begin(const std::vector<TokenBatch>& micro_batches, int64_t number) {
  if (gpu_) gpu_->begin(micro_batches, acts_, head_, grads_, [&](size_t micro) { return dropout_key(number, micro); });
  else begin_on_cpu(micro_batches, number);
}

void TrainStep::begin_on_cpu(const std::vector<TokenBatch>& micro_batches, int64_t number) {
  const StepTotals totals(micro_batches);
  StepResult r = totals.empty_result();
  ops::zero(dev_, grads_.flat());
  ops::zero(dev_, acts_.aux);
  for (size_t i = 0; i < micro_batches.size() && totals.weight > 0; i++) {
    const TokenBatch& b = micro_batches[i];
    const DropoutKey key = dropout_key(number, i);
    check_batch(model_, b);
    acts_.stage.stage(dev_, b, nullptr, {}, totals.share(b));
    forward_staged(dev_, model_, acts_, nullptr, key);
    CrossEntropy::gradient(b, totals.weight, g_);
    logp_.resize(g_.size());
    head_.backward(dev_, model_, acts_.h, b.targets, g_.data(), acts_.dh, grads_, logp_.data());
    backward(dev_, model_, acts_, grads_, key);
    r.loss += CrossEntropy::loss(b, logp_, totals.weight);
  }
  r.aux_loss = acts_.aux_loss(dev_);
  if (totals.weight > 0) r.grad_norm = std::sqrt(ops::sum_sq(dev_, grads_.flat()));
  result_ = r;
}

StepResult TrainStep::result() { return gpu_ ? gpu_->result() : result_; }

void TrainStep::update(double lr) {
  if (gpu_) {
    gpu_->update(lr, grads_);
    return;
  }
  const OptimizerOptions& o = options_.optimizer;
  AdamWArgs a{.lr = lr, .beta1 = o.beta1, .beta2 = o.beta2, .eps = o.eps, .weight_decay = o.weight_decay};
  // torch.nn.utils.clip_grad_norm_
  a.grad_scale = o.grad_clip > 0 ? static_cast<float>(std::min(1.0, o.grad_clip / (result_.grad_norm + 1e-6))) : 1.0f;
  a.step = ++updates_;
  ops::adamw(dev_, model_.weights.flat(), grads_.flat(), m_.flat(), v_.flat(), a);
}

int64_t TrainStep::updates() const { return gpu_ ? gpu_->updates() : updates_; }

void TrainStep::set_updates(int64_t n) {
  updates_ = n;
  if (gpu_) gpu_->set_updates(n);
}

LossScale TrainStep::loss_scale() const { return gpu_ ? gpu_->loss_scale() : LossScale(); }

void TrainStep::set_loss_scale(const LossScale& s) {
  if (gpu_) gpu_->set_loss_scale(s);
}

void TrainStep::pull() {
  if (gpu_) gpu_->pull();
}

void TrainStep::push() {
  if (gpu_) gpu_->push();
}

Model& TrainStep::model() { return gpu_ ? gpu_->replica() : model_; }
ParamBuffer& TrainStep::moment1() { return m_; }
ParamBuffer& TrainStep::moment2() { return v_; }

}  // namespace mm
