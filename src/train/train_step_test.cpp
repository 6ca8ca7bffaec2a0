// One optimizer step must not depend on how its rows are laid out: packed or padded, one batch or several, how many
// threads.
#include "train/train_step.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>

#include "base/rng.h"
#include "base/thread_team.h"
#include "model/test_config.h"

namespace mm {
namespace {

constexpr int32_t vocabulary = 61;

ModelConfig small_config() {
  ModelConfig c = tiny_config();
  c.head_dim = 8;
  c.vocab_size = vocabulary;
  return c;
}

ModelConfig small_moe_config(float balance) {
  ModelConfig c = moe_config();
  c.head_dim = 8;
  c.vocab_size = vocabulary;
  c.router_aux_loss_coef = balance;
  return c;
}

std::unique_ptr<Model> lively_model(const ModelConfig& c) {  // random weights of 0.02 make all tokens nearly alike
  auto model = Model::random(c, 3);
  for (const ParamSpec& spec : model->table.specs()) {
    if (spec.init != Init::normal) continue;
    for (int64_t i = 0; i < spec.shape.numel(); i++) model->weights.view(spec).f32()[i] *= 10;
  }
  return model;
}

using Rows = std::vector<std::vector<int32_t>>;

Rows random_rows(const std::vector<int>& lengths) {
  Rows rows;
  Rng rng{8, 1, 0};
  for (const int n : lengths) {
    rows.emplace_back();
    for (int i = 0; i < n; i++) rows.back().push_back(static_cast<int32_t>(rng.below(vocabulary)));
  }
  return rows;
}

// Every second row learns from its second half only, as answers do. pad_to 0: packed.
TokenBatch batch_of(const Rows& rows, size_t begin, size_t end, int64_t pad_to) {
  TokenBatch b;
  b.clear();
  for (size_t r = begin; r < end; r++) {
    const auto n = static_cast<int64_t>(rows[r].size());
    for (int64_t t = 0; t < std::max(n, pad_to); t++) {
      const bool learns = t + 1 < n && (r % 2 == 0 || t >= n / 2);
      b.ids.push_back(t < n ? rows[r][static_cast<size_t>(t)] : 0);
      b.positions.push_back(static_cast<int32_t>(t));
      b.targets.push_back(learns ? rows[r][static_cast<size_t>(t) + 1] : -1);
      b.loss_weight.push_back(learns ? 1.0f : 0.0f);
    }
    b.cu_seqlens.push_back(static_cast<int32_t>(b.n_tok()));
  }
  return b;
}

struct Outcome {
  StepResult result;
  std::vector<float> gradients;
};

Outcome accumulate(Model& model, const std::vector<TokenBatch>& batches, int64_t number = 1, uint64_t seed = 5) {
  TrainStep step(model, Device{}, {.max_tok = 512, .seed = seed});
  Outcome o;
  o.result = step.accumulate(batches, number);
  const View g = step.gradients().flat();
  o.gradients.assign(g.f32(), g.f32() + g.numel());
  return o;
}

void expect_equal_steps(const Model& model, const Outcome& a, const Outcome& b) {
  EXPECT_NEAR(a.result.loss, b.result.loss, 1e-5 * std::abs(b.result.loss));
  EXPECT_EQ(a.result.targets, b.result.targets);
  for (const ParamSpec& spec : model.table.specs()) {
    double diff = 0, norm = 0;
    for (int64_t i = spec.offset; i < spec.offset + spec.shape.numel(); i++) {
      const double x = a.gradients[static_cast<size_t>(i)], y = b.gradients[static_cast<size_t>(i)];
      diff += (x - y) * (x - y);
      norm += y * y;
    }
    EXPECT_GT(norm, 0) << spec.hf_name;
    EXPECT_LE(std::sqrt(diff), 1e-4 * std::sqrt(norm)) << spec.hf_name;
  }
}

const std::vector<int> some_lengths{23, 5, 31, 2, 17, 29, 11, 8};

TEST(TrainStep, PackedEqualsPadded) {
  for (const ModelConfig& c :
       {small_config(), small_moe_config(0)}) {  // the balance loss counts padding, as MiniMind's does
    const auto model = lively_model(c);
    const Rows rows = random_rows(some_lengths);
    const Outcome packed = accumulate(*model, {batch_of(rows, 0, rows.size(), 0)}),
                  padded = accumulate(*model, {batch_of(rows, 0, rows.size(), 40)});
    EXPECT_LT(packed.result.tokens, padded.result.tokens);
    expect_equal_steps(*model, packed, padded);
  }
}

TEST(TrainStep, AccumulatedMicroBatchesEqualOneBatch) {
  for (const ModelConfig& c : {small_config(), small_moe_config(0)}) {
    const auto model = lively_model(c);
    const Rows rows = random_rows(some_lengths);
    const Outcome whole = accumulate(*model, {batch_of(rows, 0, 8, 0)});
    // Micro-batches of unequal sizes: what counts is the mean over the tokens of the step.
    const Outcome parts = accumulate(
        *model, {batch_of(rows, 0, 1, 0), batch_of(rows, 1, 4, 0), batch_of(rows, 4, 6, 0), batch_of(rows, 6, 8, 0)});
    EXPECT_EQ(parts.result.tokens, whole.result.tokens);
    expect_equal_steps(*model, parts, whole);
    EXPECT_NEAR(parts.result.grad_norm, whole.result.grad_norm, 1e-4 * whole.result.grad_norm);
  }
}

// The mean over micro-batches weighs them by their tokens.
TEST(TrainStep, BalanceLossOfMicroBatches) {
  const auto model = lively_model(small_moe_config(0.1f));
  const Rows rows = random_rows(some_lengths);
  double expected = 0, tokens = 0;
  std::vector<TokenBatch> parts;
  for (size_t r = 0; r < rows.size(); r += 2) {
    parts.push_back(batch_of(rows, r, r + 2, 0));
    const auto n = static_cast<double>(parts.back().n_tok());
    expected += n * accumulate(*model, {parts.back()}).result.aux_loss;
    tokens += n;
  }
  EXPECT_NEAR(accumulate(*model, parts).result.aux_loss, expected / tokens, 1e-6);
}

// A step whose rows were all cut before their answers teaches nothing, and does no harm.
TEST(TrainStep, NoTargets) {
  const auto model = lively_model(small_config());
  TokenBatch batch = batch_of(random_rows({7, 4}), 0, 2, 0);
  std::fill(batch.targets.begin(), batch.targets.end(), -1);
  std::fill(batch.loss_weight.begin(), batch.loss_weight.end(), 0.0f);
  const Outcome o = accumulate(*model, {batch});
  EXPECT_TRUE(o.result.finite());
  EXPECT_EQ(o.result.loss, 0);
  EXPECT_EQ(o.result.targets, 0);
  EXPECT_EQ(o.result.grad_norm, 0);
}

ModelConfig with_dropout(ModelConfig c, float p) {
  c.dropout = p;
  return c;
}

// Along the gradient of each tensor the loss must rise by the gradient's norm, with the same elements dropped.
TEST(TrainStep, DropoutGradientsAgreeWithDifferences) {
  for (const ModelConfig& c : {with_dropout(small_config(), 0.3f), with_dropout(small_moe_config(0.01f), 0.2f)}) {
    const auto model = lively_model(c);
    const Rows rows = random_rows({19, 12, 7});
    const std::vector<TokenBatch> batches{batch_of(rows, 0, 2, 0), batch_of(rows, 2, 3, 0)};
    const Outcome at = accumulate(*model, batches, 4);
    for (const ParamSpec& spec : model->table.specs()) {
      float* w = model->weights.view(spec).f32();
      const float* d = at.gradients.data() + spec.offset;
      const auto n = static_cast<size_t>(spec.shape.numel());
      double norm = 0;
      for (size_t i = 0; i < n; i++) norm += static_cast<double>(d[i]) * d[i];
      norm = std::sqrt(norm);
      const std::vector<float> saved(w, w + n);
      const auto moved = [&](double h) {
        for (size_t i = 0; i < n; i++) w[i] = saved[i] + static_cast<float>(h * d[i] / norm);
        const StepResult r = accumulate(*model, batches, 4).result;
        return r.loss + r.aux_loss;
      };
      constexpr double h = 1e-3;
      const double slope = (moved(h) - moved(-h)) / (2 * h);
      std::copy(saved.begin(), saved.end(), w);
      EXPECT_NEAR(slope, norm, 0.02 * norm + 1e-3) << spec.hf_name;
    }
  }
}

TEST(TrainStep, DropoutDrawsByStepAndMicroBatch) {
  const auto model = lively_model(with_dropout(small_config(), 0.3f));
  const Rows rows = random_rows({19, 12});
  const TokenBatch b = batch_of(rows, 0, 2, 0);
  const double one = accumulate(*model, {b}, 1).result.loss;
  EXPECT_EQ(accumulate(*model, {b}, 1).result.loss, one);
  EXPECT_NE(accumulate(*model, {b}, 2).result.loss, one);
  EXPECT_NE(accumulate(*model, {b}, 1, /*seed=*/6).result.loss, one);
  EXPECT_NE(accumulate(*model, {b, b}, 1).result.loss, one);  // the second draws its own
  model->config.dropout = 0;                                  // then nothing is drawn at all
  const double none = accumulate(*model, {b}, 1).result.loss;
  EXPECT_NE(none, one);
  EXPECT_EQ(accumulate(*model, {b}, 2, /*seed=*/6).result.loss, none);
}

class Threads {
 public:
  explicit Threads(int n) : before_(num_threads()) { set_num_threads(n); }
  ~Threads() { set_num_threads(before_); }

 private:
  int before_;
};

// Several steps with updates: the weights afterwards.
std::vector<float> trained_weights(const ModelConfig& c) {
  const auto model = lively_model(c);
  TrainStep step(*model, Device{}, {.max_tok = 512, .seed = 5});
  const Rows rows = random_rows(some_lengths);
  for (int64_t n = 1; n <= 3; n++) {
    step.accumulate({batch_of(rows, 0, 4, 0), batch_of(rows, 4, 8, 0)}, n);
    step.update(1e-2);
  }
  const View w = model->weights.flat();
  return {w.f32(), w.f32() + w.numel()};
}

TEST(TrainStep, SameSeedSameBits) {
  for (const ModelConfig& c : {with_dropout(small_config(), 0.1f), with_dropout(small_moe_config(0.01f), 0.1f)}) {
    for (const int n : {1, 4}) {
      const Threads threads(n);
      const auto a = trained_weights(c), b = trained_weights(c);
      EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0) << n << " threads";
    }
  }
}

// Everything but the matrix products promises the same bits on any number of threads; those stay within rounding.
TEST(TrainStep, ThreadsChangeRoundingAtMost) {
  const auto on = [](int n) {
    const Threads threads(n);
    const auto model = lively_model(with_dropout(small_config(), 0.1f));
    const Rows rows = random_rows(some_lengths);
    return accumulate(*model, {batch_of(rows, 0, 8, 0)});
  };
  const auto model = lively_model(small_config());
  expect_equal_steps(*model, on(4), on(1));
}

}  // namespace
}  // namespace mm
