// The GPU draws the tokens that the host's sampler draws, whatever the parameters.
#ifdef MM_CUDA
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "base/rng.h"
#include "engine/sampler.h"
#include "kernels/cases/cuda_arrays.h"
#include "kernels/cuda/infer_kernels.h"

namespace mm {
namespace {

struct Request {
  SamplingParams p;
  std::vector<int32_t> history;
  int64_t n_prompt = 0;
  uint64_t stream = 0;
};

// Edits as the engine makes them of a history.
void append_edits(const Request& r, std::vector<LogitEdit>& out) {
  std::map<int32_t, int32_t> counts;
  for (size_t i = 0; i < r.history.size(); i++) counts[r.history[i]] += static_cast<int64_t>(i) >= r.n_prompt ? 1 : 0;
  for (const auto& [id, count] : counts) out.push_back({.id = id, .seen = 1, .count = count});
}

// Does `id` own a place within 1e-5 of the draw, or would it if top-p were as little different?
bool near_border(Sampler& sampler, std::span<const float> logits, const Request& r, int32_t id) {
  const auto bits = philox4x32(r.p.seed, r.stream, r.history.size());
  const double u = static_cast<double>((uint64_t{bits[0]} << 32 | bits[1]) >> 11) * 0x1p-53;
  for (const float change : {0.0f, -1e-5f, 1e-5f}) {
    SamplingParams p = r.p;
    if (p.top_p < 1) p.top_p = std::min(p.top_p + change, 0.999999f);
    double below = 0;
    for (const Candidate& c : sampler.candidates(logits, p, r.history, r.n_prompt)) {
      const double above = below + static_cast<double>(c.prob);
      if (c.id == id && u > below - 1e-5 && u < above + 1e-5) return true;
      below = above;
    }
  }
  return false;
}

using SampleGpu = cases::CudaTest;

TEST_F(SampleGpu, DrawsAsTheHost) {
  constexpr size_t n_vocab = 6400, n_row = 500, n_batch = 12;
  Sampler sampler;
  size_t differ = 0, borders = 0;
  for (size_t batch = 0; batch < n_batch; batch++) {
    std::vector<float> logits(n_row * n_vocab);
    std::vector<Request> requests;
    std::vector<RowSampling> params;
    std::vector<LogitEdit> edits;
    for (size_t i = 0; i < n_row; i++) {
      uint32_t k = 0;
      const auto random = [&](uint32_t n) { return philox4x32(1, batch * n_row + i, k++)[0] % n; };
      const auto pick = [&](std::initializer_list<float> from) {
        return from.begin()[random(static_cast<uint32_t>(from.size()))];
      };
      const float spread = pick({0.5f, 2.0f, 3.0f, 6.0f});
      for (size_t j = 0; j < n_vocab; j++) {
        const float x = spread * philox_normal(2, batch * n_row + i, j);
        logits[i * n_vocab + j] = batch % 2 == 0 ? x : bf16_to_float(float_to_bf16(x));
      }
      Request r;
      r.p = {.greedy = random(16) == 0,
             .temperature = pick({0.3f, 0.7f, 0.85f, 1.0f, 1.5f}),
             .top_k = static_cast<int32_t>(pick({0, 5, 50, 50, 50, 400, 2000})),
             .top_p = pick({0.3f, 0.85f, 0.85f, 0.95f, 1.0f}),
             .min_p = pick({0, 0, 0.02f, 0.2f}),
             .repetition_penalty = pick({1, 1, 1.1f, 1.5f}),
             .presence_penalty = pick({0, 0, 0.5f}),
             .frequency_penalty = pick({0, 0, 0.3f}),
             .seed = random(1000)};
      r.stream = random(1000);
      r.n_prompt = random(40);
      for (uint32_t n = static_cast<uint32_t>(r.n_prompt) + random(60), j = 0; j < n; j++)
        r.history.push_back(static_cast<int32_t>(random(j % 2 == 0 ? 30 : n_vocab)));
      const auto begin = static_cast<int32_t>(edits.size());
      append_edits(r, edits);
      params.push_back({.temperature = r.p.greedy ? 0.0f : r.p.temperature,
                        .top_k = r.p.top_k,
                        .top_p = r.p.top_p,
                        .min_p = r.p.min_p,
                        .repetition = r.p.repetition_penalty,
                        .presence = r.p.presence_penalty,
                        .frequency = r.p.frequency_penalty,
                        .seed = r.p.seed,
                        .stream = r.stream,
                        .index = r.history.size(),
                        .edits_begin = begin,
                        .edits_end = static_cast<int32_t>(edits.size())});
      requests.push_back(std::move(r));
    }
    const cases::Device<float> logits_d(logits);
    const cases::Device<RowSampling> params_d(params);
    const cases::Device<LogitEdit> edits_d(edits);
    const cases::Device<int32_t> ids(std::vector<int32_t>(n_row, -7));
    cuda::sample_rows(cases::context(), DType::f32, ids, nullptr, logits_d, n_vocab, n_vocab, params_d, edits_d,
                      nullptr, n_row);
    const std::vector<int32_t> got = ids.get();
    for (size_t i = 0; i < n_row; i++) {
      const Request& r = requests[i];
      const std::span<const float> row(&logits[i * n_vocab], n_vocab);
      const int32_t want = sampler.sample(row, r.p, r.history, r.n_prompt, r.stream);
      if (got[i] == want) continue;
      differ++;
      if (!r.p.greedy && near_border(sampler, row, r, got[i])) {
        borders++;
        continue;
      }
      ADD_FAILURE() << "batch " << batch << " row " << i << ": the GPU draws " << got[i] << ", the host " << want
                    << "; temperature " << r.p.temperature << " top_k " << r.p.top_k << " top_p " << r.p.top_p
                    << " min_p " << r.p.min_p << " greedy " << r.p.greedy;
      if (differ > borders + 5) return;
    }
  }
  EXPECT_LE(borders, n_row * n_batch / 500) << "more draws at borders than chance explains";
}

}  // namespace
}  // namespace mm
#endif
