// The weights of a model as inference on a GPU wants them: a replica of type dev.act, matrices quantized to int8 where
// asked for, and the description of both that the persistent step takes.
#pragma once

#include <memory>
#include <vector>

#include "kernels/infer.h"
#include "model/model.h"
#include "tensor/buffer.h"
#include "tensor/device.h"

namespace mm {

class GpuWeights {
 public:
  // format: that of dev.act, or i8 (widths that are multiples of 32; experts and the embedding's rows stay of type
  // dev.act). positions: rotary tables for positions below it.
  GpuWeights(const Model& model, WeightFormat format, int64_t positions, const Device& dev);
  void update(const Model& model);  // other values, same shape
  const Model& replica() const { return *replica_; }
  const InferModel& model() const { return model_; }

 private:
  void build(const Model& source, bool fill);

  Device dev_;
  WeightFormat format_;
  std::unique_ptr<Model> replica_;
  InferModel model_;
  std::vector<InferLayer> layers_;
  Buffer quantized_, norms_;
};

}  // namespace mm
