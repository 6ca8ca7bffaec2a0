#include "train/gpu_step.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "base/error.h"
#include "kernels/ops.h"
#ifdef MM_CUDA
#include "kernels/cuda/session.h"
#endif

namespace mm {

StepTotals::StepTotals(const std::vector<TokenBatch>& micro_batches) {
  for (const TokenBatch& b : micro_batches) {
    weight += CrossEntropy::total_weight(b);
    tokens += b.n_tok();
    targets += std::count_if(b.targets.begin(), b.targets.end(), [](int32_t t) { return t >= 0; });
  }
}

std::vector<TokenBatch> split_batch(const TokenBatch& batch, int64_t max_tok) {
  std::vector<TokenBatch> parts;
  for (int64_t s = 0; s < batch.n_seq(); s++) {
    const auto begin = static_cast<size_t>(batch.cu_seqlens[static_cast<size_t>(s)]),
               end = static_cast<size_t>(batch.cu_seqlens[static_cast<size_t>(s) + 1]);
    const auto n = static_cast<int64_t>(end - begin);
    MM_CHECK(n <= max_tok, "a sequence of {} tokens, passes of {}", n, max_tok);
    if (parts.empty() || parts.back().n_tok() + n > max_tok) {
      parts.emplace_back();
      parts.back().clear();
    }
    TokenBatch& p = parts.back();
    const auto append = [&](auto& to, const auto& from) {
      if (!from.empty()) {
        to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(begin),
                  from.begin() + static_cast<std::ptrdiff_t>(end));
      }
    };
    append(p.ids, batch.ids);
    append(p.positions, batch.positions);
    append(p.targets, batch.targets);
    append(p.loss_weight, batch.loss_weight);
    p.cu_seqlens.push_back(static_cast<int32_t>(p.n_tok()));
    if (s < static_cast<int64_t>(batch.sample.size())) p.sample.push_back(batch.sample[static_cast<size_t>(s)]);
  }
  return parts;
}

#ifdef MM_CUDA

struct GpuStep::Numbers {
  double loss = 0, aux_loss = 0;
  cuda::AdamWState optimizer{};
};

static constexpr size_t n_slots = 4;

GpuStep::GpuStep(Model& model, const Device& dev, const StepOptions& options, ParamBuffer& m, ParamBuffer& v)
    : model_(model),
      dev_(dev),
      options_(options),
      host_m_(m),
      host_v_(v),
      replica_(model.replica(dev, std::min<int64_t>(model.config.max_position_embeddings, 32768))),
      m_(model.config, model.table, DType::f32, Memory::cuda),
      v_(model.config, model.table, DType::f32, Memory::cuda),
      numbers_(sizeof(Numbers), Memory::cuda),
      rates_(n_slots * sizeof(cuda::AdamWState), Memory::pinned),
      rate_fences_(n_slots) {
  if (dev.act == DType::f16) loss_scale_.scale = 4096;
  if (dev.act != DType::f32) master_ = ParamBuffer(model.config, model.table, DType::f32, Memory::cuda);
  for (size_t i = 0; i < n_slots; i++) free_.push_back({Buffer(sizeof(Numbers), Memory::pinned), Fence(), {}, 1});
  push();
}

GpuStep::~GpuStep() {
  try {
    synchronize(dev_.stream);  // nothing may still use what goes away now
  } catch (const Error&) {     // the error was or will be reported by whoever asked for a result
  }
}

GpuStep::Numbers* GpuStep::numbers() const { return static_cast<Numbers*>(numbers_.data()); }

void GpuStep::launches(Activations& acts, LmHead& head, ParamBuffer& grads, DropoutKey key) {
  Numbers* n = numbers();
  forward_staged(dev_, *replica_, acts, nullptr, key);
  head.backward_staged(dev_, *replica_, acts, grads);
  backward(dev_, *replica_, acts, grads, key);
  const StagedBatch& b = acts.stage.current();
  // loss = sum g logp, see objective.h; weighted_nll has the opposite sign and result() turns it round
  ops::weighted_nll(dev_, View(&n->loss, DType::f64, {1}), acts.logp,
                    View(const_cast<float*>(b.g), DType::f32, {b.n_tok}), true);
}

void GpuStep::pass(const TokenBatch& b, const StepTotals& totals, Activations& acts, LmHead& head, ParamBuffer& grads,
                   DropoutKey key) {
  check_batch(*replica_, b);
  CrossEntropy::gradient(b, totals.weight / step_scale_, g_);
  const float share = totals.share(b) * static_cast<float>(step_scale_);
  // Padding would take part in the balance loss: with experts only full passes are captured.
  const bool full = b.n_tok() == acts.max_tok();
  const bool graph = options_.graph && model_.config.dropout == 0 && dev_.profiler == nullptr &&
                     (full || !model_.config.is_moe()) && !dev_.cuda->ctx.naive_attention;
  const StagedBatch& staged = acts.stage.stage(dev_, b, nullptr, g_, share, graph);
  if (!graph) {
    launches(acts, head, grads, key);
    return;
  }
  graphs_.run(dev_, {staged.n_tok, staged.max_tiles}, [&] { launches(acts, head, grads, key); });
}

void GpuStep::begin(const std::vector<TokenBatch>& micro_batches, Activations& acts, LmHead& head, ParamBuffer& grads,
                    const std::function<DropoutKey(size_t)>& key) {
  MM_CHECK(!free_.empty(), "too many results were never asked for");
  const StepTotals totals(micro_batches);
  step_scale_ = loss_scale_.scale;
  Numbers* n = numbers();
  ops::zero(dev_, grads.flat());
  ops::zero(dev_, View(&n->loss, DType::f64, {1}));
  ops::zero(dev_, acts.aux);
  size_t micro = 0;
  for (const TokenBatch& whole : micro_batches) {
    if (totals.weight == 0) break;
    for (const TokenBatch& b : split_batch(whole, acts.max_tok())) pass(b, totals, acts, head, grads, key(micro++));
  }
  copy_async(&n->aux_loss, acts.aux.data, sizeof(double), dev_.stream);
  cuda::sum_sq(dev_.cuda->ctx, &n->optimizer.sum_sq, grads.flat().f32(), grads.flat().numel());
  Slot slot = std::move(free_.front());
  free_.pop_front();
  slot.known = totals.empty_result();
  slot.scale = step_scale_;
  copy_async(slot.numbers.data(), n, sizeof(Numbers), dev_.stream);
  slot.ready.record(dev_.stream);
  slots_.push_back(std::move(slot));
}

StepResult GpuStep::result() {
  MM_CHECK(!slots_.empty(), "no step was begun");
  Slot slot = std::move(slots_.front());
  slots_.pop_front();
  slot.ready.wait();
  const auto* n = static_cast<const Numbers*>(slot.numbers.data());
  StepResult r = slot.known;
  r.loss = -n->loss / slot.scale;
  r.aux_loss = n->aux_loss / slot.scale;
  r.grad_norm = std::sqrt(n->optimizer.sum_sq) / slot.scale;
  if (dev_.act == DType::f16) {
    r.overflow = slot.scale > 1 && std::isfinite(r.loss) && !std::isfinite(r.grad_norm);
    if (r.overflow) loss_scale_ = {std::min(loss_scale_.scale, slot.scale / 2), 0};
    else if (++loss_scale_.good_steps >= 2000 && loss_scale_.scale < 65536) loss_scale_ = {loss_scale_.scale * 2, 0};
  }
  free_.push_back(std::move(slot));
  return r;
}

void GpuStep::update(double lr, ParamBuffer& grads) {
  const OptimizerOptions& o = options_.optimizer;
  Numbers* n = numbers();
  rate_fences_[rate_turn_].wait();
  auto* rate = static_cast<cuda::AdamWState*>(rates_.data()) + rate_turn_;
  rate->lr = static_cast<float>(lr);
  rate->max_norm = static_cast<float>(o.grad_clip);
  rate->inv_scale = static_cast<float>(1 / step_scale_);
  static_assert(offsetof(cuda::AdamWState, lr) == 0 && offsetof(cuda::AdamWState, inv_scale) == 2 * sizeof(float));
  copy_async(&n->optimizer, rate, 3 * sizeof(float), dev_.stream);
  rate_fences_[rate_turn_].record(dev_.stream);
  rate_turn_ = (rate_turn_ + 1) % n_slots;
  const bool half = dev_.act != DType::f32;
  const View weights = replica_->weights.flat();
  cuda::adamw(dev_.cuda->ctx, dev_.act, half ? weights.data : nullptr, half ? master_.flat().f32() : weights.f32(),
              grads.flat().f32(), m_.flat().f32(), v_.flat().f32(), &n->optimizer,
              {.beta1 = o.beta1, .beta2 = o.beta2, .eps = o.eps, .weight_decay = o.weight_decay}, weights.numel());
}

int64_t GpuStep::updates() const {
  Numbers now;
  copy_async(&now, numbers(), sizeof(now), dev_.stream);
  synchronize(dev_.stream);
  return now.optimizer.update_count;
}

void GpuStep::set_updates(int64_t n) {
  MM_CHECK(n <= std::numeric_limits<int32_t>::max());
  const auto count = static_cast<int32_t>(n);
  copy_async(&numbers()->optimizer.update_count, &count, sizeof(count), dev_.stream);
  synchronize(dev_.stream);
}

void GpuStep::pull() {
  const View weights = dev_.act != DType::f32 ? master_.flat() : replica_->weights.flat();
  copy_async(model_.weights.flat().data, weights.data, weights.bytes(), dev_.stream);
  copy_async(host_m_.flat().data, m_.flat().data, m_.flat().bytes(), dev_.stream);
  copy_async(host_v_.flat().data, v_.flat().data, v_.flat().bytes(), dev_.stream);
  synchronize(dev_.stream);
}

void GpuStep::push() {
  const View weights = dev_.act != DType::f32 ? master_.flat() : replica_->weights.flat();
  copy_async(weights.data, model_.weights.flat().data, weights.bytes(), dev_.stream);
  copy_async(m_.flat().data, host_m_.flat().data, m_.flat().bytes(), dev_.stream);
  copy_async(v_.flat().data, host_v_.flat().data, v_.flat().bytes(), dev_.stream);
  if (dev_.act != DType::f32) ops::cast(dev_, replica_->weights.flat(), weights);
  synchronize(dev_.stream);
}

#else  // a build without CUDA never makes one

struct GpuStep::Numbers {};
GpuStep::GpuStep(Model& model, const Device& dev, const StepOptions& options, ParamBuffer& m, ParamBuffer& v)
    : model_(model), dev_(dev), options_(options), host_m_(m), host_v_(v) {
  MM_CHECK(false, "a build without CUDA");
}
GpuStep::~GpuStep() = default;
void GpuStep::begin(const std::vector<TokenBatch>&, Activations&, LmHead&, ParamBuffer&,
                    const std::function<DropoutKey(size_t)>&) {}
StepResult GpuStep::result() { return {}; }
void GpuStep::update(double, ParamBuffer&) {}
int64_t GpuStep::updates() const { return 0; }
void GpuStep::set_updates(int64_t) {}
void GpuStep::pull() {}
void GpuStep::push() {}

#endif

}  // namespace mm
