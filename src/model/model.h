// A model: config, parameter table, weights, rotary tables; made from random numbers or read from a Hugging Face
// folder.
#pragma once

#include <memory>
#include <string>

#include "model/config.h"
#include "model/params.h"
#include "model/rope.h"
#include "tensor/device.h"

namespace mm {

// Weights are fp32 in host memory, those of a replica as its device wants them. Forward reads them, training updates
// them in place; share a Model between threads only while nobody does.
struct Model {
  ModelConfig config;
  ParamTable table;
  ParamBuffer weights;
  RopeTable rope;

  explicit Model(const ModelConfig& c, DType dtype = DType::f32, Memory where = Memory::host)  // zero weights
      : config(c), table(c), weights(c, table, dtype, where), rope(c) {}
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  static std::unique_ptr<Model> random(const ModelConfig& config,
                                       uint64_t seed);  // normal(0, 0.02), norms 1; the same on any machine
  // HF folder (config.json + safetensors, sharded or not), names of transformers or of MiniMind. Error on missing,
  // misshapen or unknown tensors.
  static std::unique_ptr<Model> load(const std::string& dir);
  // The weights of a folder whose config has this shape, into this model; same Errors as load.
  void read_weights(const std::string& dir);
  // A copy for dev: weights of type dev.act in its memory, rotary tables for positions below max_len.
  std::unique_ptr<Model> replica(const Device& dev, int64_t max_len) const;
  // Writes config.json, generation_config.json and model.safetensors (fp32, or f16/bf16); not the tokenizer.
  void save(const std::string& dir, DType dtype = DType::f32) const;
};

}  // namespace mm
