// The model against PyTorch: our own goldens (tests/golden, made with transformers) and MiniMind's own outputs
// (../shared/oracle).
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "base/cpu_features.h"
#include "base/fs.h"
#include "base/json.h"
#include "formats/safetensors.h"
#include "kernels/open_device.h"
#include "kernels/ops.h"
#include "model/forward.h"
#include "model/lm_head.h"
#include "tensor/host_copy.h"

namespace mm {
namespace {

const std::string golden_dir = MM_SOURCE_DIR "/tests/golden/";
const std::string oracle_dir = MM_SOURCE_DIR "/../shared/oracle/";

std::vector<int64_t> read_ints(const TensorEntry& t) {
  std::vector<int64_t> v(static_cast<size_t>(t.numel()));
  for (size_t i = 0; i < v.size(); i++) {
    if (t.dtype() == DType::i64) std::memcpy(&v[i], static_cast<const char*>(t.data) + 8 * i, 8);
    else {
      int32_t x = 0;
      std::memcpy(&x, static_cast<const char*>(t.data) + 4 * i, 4);
      v[i] = x;
    }
  }
  return v;
}

// Rows of [B, T] as B sequences; labels (-100 = none) at t+1 are the targets at t.
TokenBatch padded_batch(const std::vector<int64_t>& ids, const std::vector<int64_t>& labels, int64_t rows) {
  TokenBatch b;
  b.clear();
  const auto len = static_cast<int64_t>(ids.size()) / rows;
  int64_t n_target = 0;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t t = 0; t < len; t++) {
      b.ids.push_back(static_cast<int32_t>(ids[static_cast<size_t>(r * len + t)]));
      b.positions.push_back(static_cast<int32_t>(t));
      const int64_t label = t + 1 < len ? labels[static_cast<size_t>(r * len + t + 1)] : -100;
      b.targets.push_back(label == -100 ? -1 : static_cast<int32_t>(label));
      n_target += label != -100;
    }
    b.cu_seqlens.push_back(static_cast<int32_t>(b.n_tok()));
  }
  for (const int32_t t : b.targets) b.loss_weight.push_back(t < 0 ? 0.0f : 1.0f / static_cast<float>(n_target));
  return b;
}

// Smallest distance, over tokens and layers, between the scores of the last chosen and the first rejected expert.
double smallest_routing_gap(const Device& dev, const ModelConfig& c, const Activations& acts) {
  double gap = 1;
  for (const LayerActs& a : acts.layers) {
    const std::vector<float> scores = host_floats(dev, a.scores);
    for (int64_t t = 0; t < a.scores.rows(); t++) {
      const float* p = scores.data() + t * c.num_experts;
      std::vector<float> sorted(p, p + c.num_experts);
      std::sort(sorted.rbegin(), sorted.rend());
      const auto k = static_cast<size_t>(c.num_experts_per_tok);
      if (k < sorted.size()) gap = std::min(gap, static_cast<double>(sorted[k - 1] - sorted[k]));
    }
  }
  return gap;
}

struct Step {
  double loss = 0, aux = 0;
};

// One forward and backward with mean cross-entropy + aux; grads must start as zeros.
Step loss_and_grads(const Device& dev, Model& model, const TokenBatch& batch, Activations& acts, LmHead& head,
                    ParamBuffer& grads) {
  forward(dev, model, batch, acts);
  std::vector<float> g(batch.targets.size()), logp(batch.targets.size());
  for (size_t t = 0; t < g.size(); t++) g[t] = -batch.loss_weight[t];
  head.backward(dev, model, acts.h, batch.targets, g.data(), acts.dh, grads, logp.data());
  Step s;
  for (size_t t = 0; t < g.size(); t++) s.loss += static_cast<double>(g[t]) * logp[t];
  s.aux = acts.aux_loss(dev);
  backward(dev, model, acts, grads);
  return s;
}

struct Case {
  std::string dir, name;
  DeviceKind device;
};

// One session serves all cases on a GPU; fp32, as the CPU.
const Device& gpu_device() {
  static const OpenDevice open({.device = "cuda", .dtype = "f32"});
  return open.device;
}

class Parity : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    dir_ = GetParam().dir + GetParam().name;
    if (!dir_exists(dir_))
      GTEST_SKIP() << "NOT TESTED: " << dir_ << " is missing (the oracle lies beside the project in ../shared)";
    dev_.kind = GetParam().device;
    model_ = Model::load(dir_);
    if (dev_.on_gpu()) {
      dev_ = gpu_device();
      model_ = model_->replica(dev_, 4096);
    }
    expected_ = load_json(dir_ + "/expected.json");
  }
  std::string dir_;
  Device dev_;
  std::unique_ptr<Model> model_;
  ordered_json expected_;
};

TEST_P(Parity, LogitsLossAndGradients) {
  const SafetensorsFile f = SafetensorsFile::open(dir_ + "/forward.safetensors");
  const TensorEntry& ids = f.at("input_ids");
  const TokenBatch batch = padded_batch(read_ints(ids), read_ints(f.at("labels")), ids.dims[0]);
  Activations acts(model_->config, batch.n_tok(), true, dev_);
  LmHead head(model_->config, dev_);

  forward(dev_, *model_, batch, acts);
  std::vector<float> logits(static_cast<size_t>(batch.n_tok() * model_->config.vocab_size)), want(logits.size());
  std::vector<int32_t> rows(batch.ids.size());
  for (size_t i = 0; i < rows.size(); i++) rows[i] = static_cast<int32_t>(i);
  const Shape shape{batch.n_tok(), model_->config.vocab_size};
  head.logits(dev_, *model_, acts.h, rows, View(logits.data(), DType::f32, shape));
  const TensorEntry& expected_logits = f.at("logits");
  expected_logits.read_floats(View(want.data(), DType::f32, expected_logits.shape()));
  double worst = 0;
  for (size_t i = 0; i < want.size(); i++) worst = std::max(worst, static_cast<double>(std::abs(logits[i] - want[i])));
  EXPECT_LE(worst, 2e-4) << "logits";

  ParamBuffer grads(model_->config, model_->table, DType::f32, dev_.memory());
  const Step s = loss_and_grads(dev_, *model_, batch, acts, head, grads);
  EXPECT_NEAR(s.loss, expected_["loss"].get<double>(), 1e-4 * expected_["loss"].get<double>());
  EXPECT_NEAR(s.aux, expected_["aux_loss"].get<double>(), 1e-6);
  EXPECT_NEAR(std::sqrt(ops::sum_sq(dev_, grads.flat())), expected_["grad_norm"].get<double>(),
              1e-4 * expected_["grad_norm"].get<double>());

  const SafetensorsFile g = SafetensorsFile::open(dir_ + "/grads.safetensors");
  for (const ParamSpec& spec : model_->table.specs()) {
    std::vector<float> w(static_cast<size_t>(spec.shape.numel()));
    g.at(spec.hf_name, spec.shape).read_floats(View(w.data(), DType::f32, spec.shape));
    const std::vector<float> have = host_floats(dev_, grads.view(spec));
    double diff = 0, norm = 0;
    for (size_t i = 0; i < w.size(); i++) {
      diff += std::pow(static_cast<double>(have[i]) - w[i], 2);
      norm += std::pow(static_cast<double>(w[i]), 2);
    }
    EXPECT_LE(std::sqrt(diff), 1e-4 * std::sqrt(norm) + 1e-8) << spec.hf_name;
  }
}

TEST_P(Parity, GreedyTokens) {
  const ordered_json& greedy = expected_["greedy"];
  auto ids = greedy["prompt"].get<std::vector<int32_t>>();
  const auto tokens = greedy["tokens"].get<std::vector<int32_t>>();
  KvCache cache(model_->config, 1, static_cast<int64_t>(ids.size() + tokens.size()), dev_);
  Activations acts(model_->config, static_cast<int64_t>(ids.size()), false, dev_);
  LmHead head(model_->config, dev_);
  std::vector<float> logits(static_cast<size_t>(model_->config.vocab_size));
  for (const int32_t want : tokens) {
    TokenBatch batch;
    cache.clear_batch();
    cache.append(batch, 0, ids.data(), static_cast<int64_t>(ids.size()));
    forward(dev_, *model_, batch, acts, &cache);
    head.logits(dev_, *model_, acts.h, {static_cast<int32_t>(batch.n_tok() - 1)},
                View(logits.data(), DType::f32, {1, model_->config.vocab_size}));
    const auto best = static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    ASSERT_EQ(best, want);
    ids = {best};
  }
}

TEST_P(Parity, AdamWCurve) {
  const ordered_json& train = expected_["train"];
  const SafetensorsFile f = SafetensorsFile::open(dir_ + "/train_tokens.safetensors");
  const TensorEntry& t = f.entries()[0];
  const std::vector<int64_t> tokens = read_ints(t);
  const int64_t steps = t.dims[0], rows = t.dims[1], per_step = t.dims[1] * t.dims[2];
  const auto buffer = [&] { return ParamBuffer(model_->config, model_->table, DType::f32, dev_.memory()); };
  ParamBuffer grads = buffer(), m = buffer(), v = buffer();
  Activations acts(model_->config, per_step, true, dev_);
  LmHead head(model_->config, dev_);
  // The oracle's curves were made without zeroing the gradients of the forward case first; ours say that they were not.
  const bool carried = !train.contains("carried_gradients");
  if (carried) {
    const SafetensorsFile first = SafetensorsFile::open(dir_ + "/forward.safetensors");
    const TensorEntry& ids = first.at("input_ids");
    const TokenBatch batch = padded_batch(read_ints(ids), read_ints(first.at("labels")), ids.dims[0]);
    Activations once(model_->config, batch.n_tok(), true, dev_);
    loss_and_grads(dev_, *model_, batch, once, head, grads);
  }
  // A token whose two best experts are closer than fp32 rounding (here 7e-7 at step 18 and 3e-6 at step 27 of moe_top1,
  // against 1e-4 in other steps) may take either, and the curves part by the third digit. The ref device sums in
  // double, takes PyTorch's side and is held to every step; the fast kernels are held to every step up to the first
  // such tie, and to 1e-3 (two such forks) after it.
  bool tied = false;
  for (int64_t step = 1; step <= steps; step++) {
    const std::vector<int64_t> ids(tokens.begin() + (step - 1) * per_step, tokens.begin() + step * per_step);
    if (step > 1 || !carried) ops::zero(dev_, grads.flat());
    const Step s = loss_and_grads(dev_, *model_, padded_batch(ids, ids, rows), acts, head, grads);
    const auto i = static_cast<size_t>(step - 1);
    const double want = train["loss"][i].get<double>(), norm = std::sqrt(ops::sum_sq(dev_, grads.flat()));
    if (model_->config.is_moe() && dev_.kind != DeviceKind::ref)
      tied = tied || smallest_routing_gap(dev_, model_->config, acts) < 4e-6;
    EXPECT_NEAR(s.loss, want, (tied ? 1e-3 : 1e-4) * want) << "step " << step;
    EXPECT_NEAR(s.aux, train["aux_loss"][i].get<double>(), 1e-5) << "step " << step;
    const double want_norm = train["grad_norm_before_clip"][i].get<double>();
    EXPECT_NEAR(norm, want_norm, (tied ? 1e-2 : 2e-3) * want_norm) << "step " << step;
    const double base = train["base_lr"].get<double>();
    AdamWArgs a{
        .lr = base * (0.1 + 0.45 * (1 + std::cos(M_PI * static_cast<double>(step) / static_cast<double>(steps)))),
        .weight_decay = 0.01};
    a.grad_scale = static_cast<float>(std::min(1.0, 1.0 / (norm + 1e-6)));
    a.step = step;
    ops::adamw(dev_, model_->weights.flat(), grads.flat(), m.flat(), v.flat(), a);
  }
  const SafetensorsFile final_weights = SafetensorsFile::open(dir_ + "/train_final.safetensors");
  for (const ParamSpec& spec : model_->table.specs()) {
    std::vector<float> w(static_cast<size_t>(spec.shape.numel()));
    const std::vector<float> have = host_floats(dev_, model_->weights.view(spec));
    final_weights.at(spec.hf_name, spec.shape).read_floats(View(w.data(), DType::f32, spec.shape));
    double diff = 0, sum = 0;
    for (size_t i = 0; i < w.size(); i++) {
      diff += std::pow(static_cast<double>(have[i]) - w[i], 2);
      sum += std::pow(static_cast<double>(w[i]), 2);
    }
    EXPECT_LE(std::sqrt(diff), (tied ? 1e-2 : 2e-3) * std::sqrt(sum)) << spec.hf_name;
  }
}

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const std::string& dir : {golden_dir, oracle_dir}) {
    for (const char* name : {"qwen3", "llama", "moe_top1", "moe_top2", "yarn"})
      out.push_back({dir, name, DeviceKind::cpu});
  }
  for (const std::string& dir : {golden_dir, oracle_dir}) {
    for (const char* name : {"qwen3", "llama", "moe_top1", "moe_top2", "yarn"}) {
      if (cuda_status().usable) out.push_back({dir, name, DeviceKind::cuda});
    }
  }
  for (const char* name : {"qwen3", "moe_top2"}) out.push_back({golden_dir, name, DeviceKind::ref});
  out.push_back({oracle_dir, "moe_top1", DeviceKind::ref});
  return out;
}

INSTANTIATE_TEST_SUITE_P(PyTorch, Parity, testing::ValuesIn(cases()), [](const auto& test) {
  const Case& c = test.param;
  return std::string(c.dir == golden_dir ? "golden_" : "oracle_") + c.name +
         (c.device == DeviceKind::ref    ? "_ref"
          : c.device == DeviceKind::cuda ? "_cuda"
                                         : "");
});

}  // namespace
}  // namespace mm
