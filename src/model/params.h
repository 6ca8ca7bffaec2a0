// The parameter table: the one list of a model's tensors, built from its config. Allocation, initialisation, load and
// save, the optimizer and every exporter walk it; no tensor is known by an index.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "model/config.h"
#include "tensor/buffer.h"
#include "tensor/view.h"

namespace mm {

enum class Init { normal, ones };  // normal(0, 0.02) as transformers initialises MiniMind

struct ParamSpec {
  std::string hf_name;  // "model.layers.0.self_attn.q_proj.weight"
  Shape shape;
  Init init = Init::normal;
  int64_t offset = 0;  // elements from the start of the flat range
};

// Tensors that one op reads as one (q|k|v, gate|up) lie next to each other, so the fused form is a view.
class ParamTable {
 public:
  explicit ParamTable(const ModelConfig& config);
  const std::vector<ParamSpec>& specs() const { return specs_; }
  const ParamSpec& at(const std::string& hf_name) const;  // MM_CHECK
  int64_t numel() const { return numel_; }                // of the flat range

 private:
  void add(std::string name, Shape shape, Init init = Init::normal);
  std::vector<ParamSpec> specs_;
  std::map<std::string, size_t> by_name_;
  int64_t numel_ = 0;
};

// The weights (or gradients) of one layer as the ops want them; views into one flat range.
struct LayerViews {
  View input_norm;                                // [d_model]
  View qkv;                                       // [(n_head + 2 n_kv_head) d_head, d_model]
  View q_norm, k_norm;                            // [d_head], empty without qk-norm
  View o;                                         // [d_model, n_head d_head]
  View post_norm;                                 // [d_model]
  View gate_up, down;                             // dense: [2 d_ff, d_model], [d_model, d_ff]
  View router;                                    // [n_expert, d_model]
  std::vector<View> expert_gate_up, expert_down;  // one an expert
  std::vector<View> shared_gate_up, shared_down;
};

// A flat range shaped by a table: weights, gradients, or a moment. fp32, but for the working weights of a GPU. Move
// only.
class ParamBuffer {
 public:
  ParamBuffer() = default;
  ParamBuffer(const ModelConfig& config, const ParamTable& table, DType dtype = DType::f32,
              Memory where = Memory::host);
  View flat() const;                       // [numel]
  View view(const ParamSpec& spec) const;  // one tensor
  View embed, final_norm, head;            // head is embed when tied
  std::vector<LayerViews> layers;
  // Elements from an expert's weights to those of the next in the same layer.
  static int64_t expert_stride(const ModelConfig& c) { return 3 * c.hidden_size * c.moe_intermediate_size; }

 private:
  View window(int64_t offset, Shape shape) const;
  View at(const std::string& name) const;
  View rows_from(const std::string& name, int64_t rows, int64_t cols) const;
  const ParamTable* table_ = nullptr;
  DType dtype_ = DType::f32;
  Buffer buffer_;
};

}  // namespace mm
