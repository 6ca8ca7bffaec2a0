// A GPU's step against the CPU's: same losses, norms and weights in fp32, nearly so in bf16; the same bits whether
// passes are replayed from a graph or launched one by one, and from run to run. Only in builds with CUDA; skipped
// without a GPU.
#ifdef MM_CUDA

#include "train/gpu_step.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/rng.h"
#include "kernels/open_device.h"
#include "tensor/host_copy.h"

namespace mm {
namespace {

ModelConfig config_of(const std::string& kind) {
  ModelConfig c;
  c.hidden_size = 128;
  c.intermediate_size = 192;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 32;
  c.vocab_size = 203;  // odd rows of logits
  c.max_position_embeddings = 512;
  if (kind == "moe") {
    c.architecture = "Qwen3MoeForCausalLM";
    c.num_experts = 4;
    c.num_experts_per_tok = 2;
    c.moe_intermediate_size = 64;
    c.n_shared_experts = 0;
  }
  if (kind == "dropout") c.dropout = 0.1f;
  return c;
}

std::unique_ptr<Model> lively_model(const ModelConfig& c) {
  auto model = Model::random(c, 3);
  for (const ParamSpec& spec : model->table.specs()) {
    if (spec.init != Init::normal) continue;
    for (int64_t i = 0; i < spec.shape.numel(); i++) model->weights.view(spec).f32()[i] *= 4;
  }
  return model;
}

TokenBatch random_batch(const std::vector<int>& lengths, uint64_t seed) {
  TokenBatch b;
  b.clear();
  Rng rng{seed, 1, 0};
  for (const int n : lengths) {
    for (int t = 0; t < n; t++) {
      b.ids.push_back(static_cast<int32_t>(rng.below(203)));
      b.positions.push_back(t);
    }
    b.cu_seqlens.push_back(static_cast<int32_t>(b.n_tok()));
    for (int t = 0; t < n; t++) {
      const bool learns = t + 1 < n && t % 3 != 0;
      b.targets.push_back(learns ? b.ids[b.ids.size() - static_cast<size_t>(n - t) + 1] : -1);
      b.loss_weight.push_back(learns ? 1.0f : 0.0f);
    }
  }
  return b;
}

struct Outcome {
  std::vector<StepResult> steps;
  std::vector<float> weights, gradients;
};

Outcome train(const Device& dev, const std::string& kind, StepOptions options = {}, int64_t max_tok = 512) {
  const std::unique_ptr<Model> model = lively_model(config_of(kind));
  options.max_tok = max_tok;
  options.seed = 5;
  TrainStep step(*model, dev, options);
  Outcome o;
  for (int64_t n = 1; n <= 5; n++) {
    const auto seed = static_cast<uint64_t>(2 * n);
    step.begin({random_batch({60, 131, 1, 17, 129}, seed), random_batch({200, 64, 63, 2}, seed + 1)}, n);
    step.update(1e-3);
    if (n == 5) o.gradients = host_floats(dev, step.gradients().flat());
    if (n > 1) o.steps.push_back(step.result());
  }
  o.steps.push_back(step.result());
  step.pull();
  const View w = model->weights.flat();
  o.weights.assign(w.f32(), w.f32() + w.numel());
  EXPECT_EQ(step.updates(), 5);
  return o;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double diff = 0, norm = 0;
  for (size_t i = 0; i < a.size(); i++) {
    diff += std::pow(static_cast<double>(a[i]) - b[i], 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(diff / norm);
}

class GpuStepTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!cuda_status().usable) GTEST_SKIP() << "NOT TESTED: " << cuda_status().why_not;
  }
  static const Device& device(const std::string& dtype) {
    static const OpenDevice f32({.device = "cuda", .dtype = "f32"}), bf16({.device = "cuda", .dtype = "bf16"}),
        f16({.device = "cuda", .dtype = "f16"});
    return dtype == "f32" ? f32.device : dtype == "bf16" ? bf16.device : f16.device;
  }
};

// The CPU reports its own step at once, a GPU the one before: the last result is the same step's.
TEST_P(GpuStepTest, Fp32MatchesTheCpu) {
  const Outcome gpu = train(device("f32"), GetParam()), cpu = train(Device{}, GetParam());
  EXPECT_NEAR(gpu.steps.back().loss, cpu.steps.back().loss, 1e-4 * cpu.steps.back().loss);
  EXPECT_NEAR(gpu.steps.back().aux_loss, cpu.steps.back().aux_loss, 1e-6);
  EXPECT_NEAR(gpu.steps.back().grad_norm, cpu.steps.back().grad_norm, 2e-3 * cpu.steps.back().grad_norm);
  EXPECT_LE(distance(gpu.gradients, cpu.gradients), 2e-3);
  EXPECT_LE(distance(gpu.weights, cpu.weights), 1e-3);
}

TEST_P(GpuStepTest, HalfPrecisionStaysNear) {
  const Outcome f32 = train(device("f32"), GetParam());
  for (const char* dtype : {"bf16", "f16"}) {
    const Outcome half = train(device(dtype), GetParam());
    EXPECT_NEAR(half.steps.front().loss, f32.steps.front().loss, 1e-2 * f32.steps.front().loss) << dtype;
    EXPECT_NEAR(half.steps.back().loss, f32.steps.back().loss, 2e-2 * f32.steps.back().loss) << dtype;
    EXPECT_LE(distance(half.weights, f32.weights), 5e-2) << dtype;
  }
}

// Replayed passes are padded to a few sizes (not with experts), so sums of products may run in another order.
TEST_P(GpuStepTest, ReplayedPassesRepeatTheirBitsAndAgreeWithPlainOnes) {
  const Outcome graph = train(device("bf16"), GetParam()), plain = train(device("bf16"), GetParam(), {.graph = false}),
                again = train(device("bf16"), GetParam());
  EXPECT_EQ(graph.weights, again.weights);
  EXPECT_LE(distance(graph.weights, plain.weights), 1e-3);
}

TEST_P(GpuStepTest, SeveralPassesEqualOne) {
  if (GetParam() == "dropout") GTEST_SKIP() << "every pass draws its own numbers";
  const Outcome whole = train(device("f32"), GetParam()), parts = train(device("f32"), GetParam(), {}, 200);
  EXPECT_NEAR(parts.steps.back().loss, whole.steps.back().loss, 1e-4 * whole.steps.back().loss);
  // The balance loss is a product of two means over a pass, so with experts the parts' gradients differ a little.
  EXPECT_LE(distance(parts.weights, whole.weights), GetParam() == "moe" ? 2e-2 : 1e-3);
}

TEST_P(GpuStepTest, RecomputeChangesNoBit) {
  const Outcome cheap = train(device("bf16"), GetParam());
  EXPECT_EQ(train(device("bf16"), GetParam(), {.recompute = Recompute::none}).weights, cheap.weights);
  EXPECT_EQ(train(device("bf16"), GetParam(), {.recompute = Recompute::ffn}).weights, cheap.weights);
}

INSTANTIATE_TEST_SUITE_P(Kinds, GpuStepTest, testing::Values("dense", "moe", "dropout"),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace mm

#endif
