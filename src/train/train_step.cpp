#include "train/train_step.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "kernels/ops.h"

namespace mm {

bool StepResult::finite() const { return std::isfinite(loss) && std::isfinite(aux_loss) && std::isfinite(grad_norm); }

TrainStep::TrainStep(Model& model, const Device& dev, const OptimizerOptions& options, int64_t max_tok, uint64_t seed)
    : model_(model),
      dev_(dev),
      options_(options),
      seed_(seed),
      grads_(model.config, model.table),
      m_(model.config, model.table),
      v_(model.config, model.table),
      acts_(model.config, max_tok, true),
      head_(model.config) {}

StepResult TrainStep::accumulate(const std::vector<TokenBatch>& micro_batches, int64_t number) {
  StepResult r;
  double weight = 0;
  for (const TokenBatch& b : micro_batches) {
    weight += CrossEntropy::total_weight(b);
    r.tokens += b.n_tok();
    r.targets += std::count_if(b.targets.begin(), b.targets.end(), [](int32_t t) { return t >= 0; });
  }
  ops::zero(dev_, grads_.flat());
  if (weight == 0) return r;
  size_t micro = 0;
  for (const TokenBatch& b : micro_batches) {
    const DropoutKey key = dropout_key(number, micro++);
    const double share = static_cast<double>(b.n_tok()) / static_cast<double>(r.tokens);
    forward(dev_, model_, b, acts_, nullptr, key);
    CrossEntropy::gradient(b, weight, g_);
    logp_.resize(g_.size());
    head_.backward(dev_, model_, acts_.h, b.targets, g_.data(), acts_.dh, grads_, logp_.data());
    backward(dev_, model_, b, acts_, grads_, static_cast<float>(share), key);
    r.loss += CrossEntropy::loss(b, logp_, weight);
    r.aux_loss += share * acts_.aux_loss;
  }
  r.grad_norm = std::sqrt(ops::sum_sq(dev_, grads_.flat()));
  return r;
}

void TrainStep::update(double lr, double grad_norm, int64_t update_count) {
  AdamWArgs a{.lr = lr,
              .beta1 = options_.beta1,
              .beta2 = options_.beta2,
              .eps = options_.eps,
              .weight_decay = options_.weight_decay};
  // torch.nn.utils.clip_grad_norm_
  a.grad_scale =
      options_.grad_clip > 0 ? static_cast<float>(std::min(1.0, options_.grad_clip / (grad_norm + 1e-6))) : 1.0f;
  a.step = update_count;
  ops::adamw(dev_, model_.weights.flat(), grads_.flat(), m_.flat(), v_.flat(), a);
}

}  // namespace mm
