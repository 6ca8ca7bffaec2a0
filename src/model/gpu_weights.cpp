#include "model/gpu_weights.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/ops_infer.h"
#include "model/infer_weights.h"

namespace mm {

GpuWeights::GpuWeights(const Model& model, WeightFormat format, int64_t positions, const Device& dev)
    : dev_(dev), format_(format), replica_(model.replica(dev, positions)) {
  const WeightFormat native = dev.act == DType::bf16  ? WeightFormat::bf16
                              : dev.act == DType::f16 ? WeightFormat::f16
                                                      : WeightFormat::f32;
  if (format != native && format != WeightFormat::i8)
    throw Error("weights", fmt::format("i8, or {} as the GPU computes", dtype_name(dev.act)), "another type",
                "set --dtype to the type of the weights");
  if (format == WeightFormat::i8) {
    const ModelConfig& c = model.config;
    for (const int64_t k : {c.hidden_size, c.q_width(), c.ffn_width()}) {
      if (k % weight_group != 0)
        throw Error("weights", "widths that are multiples of 32 for i8", fmt::format("{}", k), "use bf16 weights");
    }
  }
  build(model, false);
  build(model, true);
}

void GpuWeights::update(const Model& model) {
  const int64_t n = model.table.numel();
  const Buffer staged(static_cast<size_t>(n) * sizeof(float), Memory::cuda);
  copy_async(staged.data(), model.weights.flat().data, staged.size(), dev_.stream);
  ops::cast(dev_, replica_->weights.flat(), View(staged.data(), DType::f32, {n}));
  synchronize(dev_.stream);
  build(model, true);
}

// The first pass, without memory, adds up the bytes.
void GpuWeights::build(const Model& source, bool fill) {
  const ModelConfig& c = source.config;
  const bool i8 = format_ == WeightFormat::i8;
  const WeightFormat native = dev_.act == DType::bf16  ? WeightFormat::bf16
                              : dev_.act == DType::f16 ? WeightFormat::f16
                                                       : WeightFormat::f32;
  size_t used = 0, used_norms = 0, largest = 0;
  Buffer staged;  // a matrix in fp32, on its way to int8
  if (fill && i8) {
    for (const ParamSpec& s : source.table.specs()) largest = std::max(largest, static_cast<size_t>(s.shape.numel()));
    staged = Buffer(4 * largest * sizeof(float), Memory::cuda);  // fused ones are up to four tensors
  }
  const auto take = [](size_t& at, size_t bytes, const Buffer& from) -> void* {
    void* p = from.data() == nullptr ? nullptr : static_cast<char*>(from.data()) + at;
    at += (bytes + 255) / 256 * 256;
    return p;
  };
  const auto matrix = [&](View host, View mine, bool quantize) {
    InferMatrix m{.format = native, .data = mine.data, .n = mine.rows(), .k = mine.cols()};
    if (!quantize) return m;
    m.format = WeightFormat::i8;
    const auto n = static_cast<size_t>(mine.numel());
    m.data = take(used, n, quantized_);
    m.scales = take(used, n / weight_group * 2, quantized_);
    if (!fill) return m;
    MM_CHECK(host.bytes() <= staged.size());
    copy_async(staged.data(), host.data, host.bytes(), dev_.stream);
    ops::quantize_i8(dev_, m, View(staged.data(), DType::f32, host.shape));
    synchronize(dev_.stream);
    return m;
  };
  const auto norm = [&](View host) -> const float* {
    if (!host) return nullptr;
    void* to = take(used_norms, host.bytes(), norms_);
    if (fill) copy_async(to, host.data, host.bytes(), dev_.stream);
    return static_cast<const float*>(to);
  };
  layers_.assign(static_cast<size_t>(c.num_hidden_layers), {});
  for (size_t l = 0; l < layers_.size(); l++) {
    const LayerViews &host = source.weights.layers[l], &mine = replica_->weights.layers[l];
    InferLayer& to = layers_[l];
    to.input_norm = norm(host.input_norm);
    to.post_norm = norm(host.post_norm);
    to.q_norm = norm(host.q_norm);
    to.k_norm = norm(host.k_norm);
    to.qkv = matrix(host.qkv, mine.qkv, i8);
    to.o = matrix(host.o, mine.o, i8);
    if (c.is_moe()) continue;  // experts run through the ops of the replica
    to.gate_up = matrix(host.gate_up, mine.gate_up, i8);
    to.down = matrix(host.down, mine.down, i8);
  }
  const View embed = replica_->weights.embed;
  model_ = infer_dimensions(c, replica_->rope);
  model_.layers = layers_.data();
  model_.embed = {.format = native, .data = embed.data, .n = c.vocab_size, .k = c.hidden_size};
  model_.final_norm = norm(source.weights.final_norm);
  model_.head = matrix(source.weights.head, replica_->weights.head, i8);
  if (fill) {
    synchronize(dev_.stream);
    return;
  }
  if (used > 0) quantized_ = Buffer(used, Memory::cuda);
  norms_ = Buffer(used_norms, Memory::cuda);
}

}  // namespace mm
