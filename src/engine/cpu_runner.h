// Steps on the CPU: the fused step of the kernels, then the draw, row by row over the team.
#pragma once

#include "engine/runner.h"
#include "engine/sampler.h"
#include "model/infer_weights.h"

namespace mm {

class CpuRunner final : public Runner {
 public:
  CpuRunner(const Model& model, const EngineOptions& options, const RunnerLimits& limits);
  void submit(const StepBatch& batch) override;
  void collect(StepResult& result) override;
  void warm_up() override;
  std::string description() const override;
  void update(const Model& model) override { weights_.update(model); }

 private:
  EngineOptions options_;
  RunnerLimits limits_;
  InferWeights weights_;
  int64_t n_kv_row_;
  Buffer kv_buffer_, scratch_, logits_, hidden_;
  InferKv kv_;
  std::vector<int32_t> table_;
  std::vector<Sampler> samplers_;  // one a thread
  StepResult result_;
};

}  // namespace mm
