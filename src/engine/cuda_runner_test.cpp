// The engine on a GPU against the same engine on the CPU.
#include <gtest/gtest.h>

#include "base/error.h"
#include "engine/generate.h"
#include "engine/test_model.h"
#include "kernels/open_device.h"

namespace mm {

namespace {

class CudaEngine : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda_status().usable) GTEST_SKIP() << "NOT TESTED: no GPU (" << cuda_status().why_not << ")";
  }
};

ModelConfig gpu_config(bool qk_norm = true) {
  ModelConfig c = small_config(512);
  c.hidden_size = 128;
  c.intermediate_size = 256;
  c.head_dim = 32;
  c.qk_norm = qk_norm;
  c.max_position_embeddings = 512;
  return c;
}

std::vector<GenerateRequest> mixed_requests(int64_t vocab) {
  std::vector<GenerateRequest> all;
  for (int64_t i = 0; i < 24; i++) {
    GenerateRequest r;
    r.prompt = some_prompt(1 + i * 13 % 200, vocab, i % 3 == 0 ? 5 : i);  // every third begins like the others
    r.max_new_tokens = 5 + i;
    r.sampling.greedy = i % 2 == 0;
    r.sampling.temperature = 0.8f;
    r.sampling.seed = static_cast<uint64_t>(i);
    if (i % 5 == 1) r.sampling.repetition_penalty = 1.2f;
    if (i % 7 == 3) r.logprobs = 2;
    all.push_back(r);
  }
  return all;
}

GeneratorOptions options(const Device& dev, int64_t places, KvLayout layout = KvLayout::paged) {
  GeneratorOptions o;
  o.max_sequences = places;
  o.prefill_chunk = 96;
  o.reuse_prefix = true;
  o.device = dev;
  o.kv_layout = layout;
  return o;
}

TEST_F(CudaEngine, TheCpusTokensInFp32) {
  const OpenDevice gpu({.device = "cuda", .dtype = "f32"});
  for (const bool qk_norm : {true, false}) {
    const auto model = lively_model(gpu_config(qk_norm), 3);
    const auto requests = mixed_requests(512);
    const auto expected = Generator(*model, std::nullopt, options({}, 6)).run(requests);
    for (const KvLayout layout : {KvLayout::paged, KvLayout::preallocated, KvLayout::concat}) {
      for (const int64_t places : {1, 6, 20, 33}) {
        SCOPED_TRACE(fmt::format("{} {} places, qk_norm {}", kv_layout_name(layout), places, qk_norm));
        Generator g(*model, std::nullopt, options(gpu.device, places, layout));
        const auto got = g.run(requests);
        for (size_t i = 0; i < requests.size(); i++) {
          EXPECT_EQ(got[i].ids, expected[i].ids) << i;
          ASSERT_EQ(got[i].logprobs.size(), expected[i].logprobs.size());
          for (size_t t = 0; t < got[i].logprobs.size(); t++)
            EXPECT_NEAR(got[i].logprobs[t], expected[i].logprobs[t], 2e-3f);
        }
      }
    }
  }
}

// Types of 16 bits: the probability of the CPU's fp32 text, token by token, stays near.
TEST_F(CudaEngine, Bf16AndInt8StayNearTheCpu) {
  const OpenDevice gpu({.device = "cuda", .dtype = "bf16"});
  auto model = Model::random(gpu_config(), 4);
  for (const ParamSpec& spec : model->table.specs()) {
    if (spec.init == Init::ones) continue;
    float* w = model->weights.view(spec).f32();
    for (int64_t i = 0; i < spec.shape.numel(); i++) w[i] *= 4;
  }
  for (const WeightFormat weights : {WeightFormat::bf16, WeightFormat::i8}) {
    for (const KvFormat kv : {KvFormat::bf16, KvFormat::i8}) {
      for (const int64_t places : {1, 4, 16}) {  // the persistent kernel for one and four where it runs
        SCOPED_TRACE(fmt::format("{} {} {}", weight_format_name(weights), kv_format_name(kv), places));
        GeneratorOptions o = options(gpu.device, places);
        o.weights = weights;
        o.kv = kv;
        o.reuse_prefix = false;  // a cached beginning is computed another way, which rounds otherwise
        Generator g(*model, std::nullopt, o);
        GeneratorOptions cpu = options({}, places);
        cpu.weights = weights == WeightFormat::i8 ? WeightFormat::i8 : WeightFormat::f32;
        Generator reference(*model, std::nullopt, cpu);
        std::vector<GenerateRequest> requests;
        for (int64_t i = 0; i < 16; i++) {
          GenerateRequest r;
          r.prompt = some_prompt(60 + i, 512, i);
          r.max_new_tokens = 24;
          r.sampling.greedy = true;
          r.logprobs = 0;
          requests.push_back(r);
        }
        const auto got = g.run(requests), expected = reference.run(requests);
        double difference = 0;
        int64_t n = 0;
        for (size_t i = 0; i < requests.size(); i++) {
          for (size_t t = 0; t < expected[i].ids.size() && got[i].ids[t] == expected[i].ids[t]; t++, n++)
            difference += std::abs(static_cast<double>(got[i].logprobs[t] - expected[i].logprobs[t]));
        }
        EXPECT_GE(n, 32);  // of 16 texts of 24 tokens: the longest common beginnings
        EXPECT_LT(difference / static_cast<double>(n), weights == WeightFormat::i8 || kv == KvFormat::i8 ? 0.1 : 0.03);
        EXPECT_EQ(g.run(requests)[0].ids, got[0].ids);  // the same bits again
      }
    }
  }
}

TEST_F(CudaEngine, SpeculationAndInvarianceInFp32) {
  const OpenDevice gpu({.device = "cuda", .dtype = "f32"});
  ModelConfig c = gpu_config();
  c.vocab_size = 64;
  const auto model = lively_model(c, 5);
  std::vector<GenerateRequest> requests;
  for (int64_t i = 0; i < 5; i++) {
    GenerateRequest r;
    r.prompt = some_prompt(30, 6, i);
    r.max_new_tokens = 200;
    r.sampling.greedy = i % 2 == 0;
    r.sampling.top_k = 3;
    r.sampling.seed = static_cast<uint64_t>(i);
    requests.push_back(r);
  }
  GeneratorOptions o = options(gpu.device, 5);
  const auto expected = Generator(*model, std::nullopt, o).run(requests);
  o.ngram_draft = 4;
  const auto got = Generator(*model, std::nullopt, o).run(requests);
  int64_t accepted = 0;
  for (size_t i = 0; i < requests.size(); i++) {
    EXPECT_EQ(got[i].ids, expected[i].ids) << i;
    accepted += got[i].accepted_tokens;
  }
  EXPECT_GT(accepted, 0);
}

TEST_F(CudaEngine, BatchInvariantModeGivesTheSameBits) {
  const OpenDevice gpu({.device = "cuda", .dtype = "bf16"});
  const auto model = lively_model(gpu_config(), 6);
  auto requests = mixed_requests(512);
  for (auto& r : requests) r.logprobs = 0;
  GeneratorOptions o = options(gpu.device, 16);
  o.batch_invariant = true;
  o.reuse_prefix = false;
  Generator g(*model, std::nullopt, o);
  const auto together = g.run(requests);
  for (const size_t i : {0u, 5u, 11u, 23u}) {
    const auto alone = g.run({&requests[i], 1})[0];
    EXPECT_EQ(alone.ids, together[i].ids) << i;
    EXPECT_EQ(alone.logprobs, together[i].logprobs) << i;
  }
}

// A server warms up; what it captures then must serve every step that follows.
TEST_F(CudaEngine, WarmedUpItSaysTheSame) {
  const OpenDevice gpu({.device = "cuda", .dtype = "f32"});
  const auto model = lively_model(gpu_config(), 8);
  const auto requests = mixed_requests(512);
  for (const int64_t places : {3, 20, 80}) {
    GeneratorOptions o = options(gpu.device, places);
    const auto expected = Generator(*model, std::nullopt, o).run(requests);
    o.warm_up = true;
    const auto got = Generator(*model, std::nullopt, o).run(requests);
    for (size_t i = 0; i < requests.size(); i++) EXPECT_EQ(got[i].ids, expected[i].ids) << places << " " << i;
  }
}

TEST_F(CudaEngine, MixtureOfExperts) {
  const OpenDevice gpu({.device = "cuda", .dtype = "f32"});
  ModelConfig c = gpu_config();
  c.num_experts = 4;
  c.num_experts_per_tok = 2;
  c.moe_intermediate_size = 96;
  const auto model = lively_model(c, 7);
  const auto requests = mixed_requests(512);
  const auto expected = Generator(*model, std::nullopt, options({}, 6)).run(requests);
  const auto got = Generator(*model, std::nullopt, options(gpu.device, 6)).run(requests);
  for (size_t i = 0; i < requests.size(); i++) EXPECT_EQ(got[i].ids, expected[i].ids) << i;
}

}  // namespace

}  // namespace mm
