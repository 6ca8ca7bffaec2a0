// The weights of a model as inference wants them: matrices packed or quantized for the device, norms in fp32, rotary
// tables. A copy: the Model it was made from may go.
#pragma once

#include <vector>

#include "kernels/infer.h"
#include "model/model.h"
#include "tensor/buffer.h"
#include "tensor/device.h"

namespace mm {

// Sizes and rotary tables; layers and matrices are left to whoever lays the weights out.
InferModel infer_dimensions(const ModelConfig& config, const RopeTable& rope);

class InferWeights {
 public:
  // positions: rotary tables for positions below it. CPU: any format but f16.
  InferWeights(const Model& model, WeightFormat format, int64_t positions);
  InferWeights(const InferWeights&) = delete;
  InferWeights& operator=(const InferWeights&) = delete;
  // Packs the weights of a model of the same shape again (a policy that is being trained).
  void update(const Model& model);
  const InferModel& model() const { return model_; }
  size_t bytes() const { return buffer_.size(); }

 private:
  void build(const Model& model, bool fill);
  void* take(size_t bytes);
  InferMatrix matrix(View w, WeightFormat format, bool fill);
  const float* vector(View w, bool fill);

  ModelConfig config_;
  WeightFormat format_;
  RopeTable rope_;
  InferModel model_;
  std::vector<InferLayer> layers_;
  std::vector<std::vector<InferMatrix>> experts_;  // lists that layers point into
  Buffer buffer_;
  size_t used_ = 0;
};

}  // namespace mm
