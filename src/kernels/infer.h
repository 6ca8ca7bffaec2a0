// The whole model's step over a batch of tokens with paged keys and values, as inference runs it: what the fused CPU
// step (cpu/infer*.cpp) and the persistent GPU kernel (cuda/decode_persistent.cu) take. Raw pointers and sizes; whoever
// fills these structs has checked them (model/infer_weights.h, engine/runner.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/sample.h"

namespace mm {

// How a weight matrix is held. i8: groups of 32 along k, each with one scale = absmax / 127, rounded to nearest.
// A further quantization is a further value here, a packer and a product of each backend.
enum class WeightFormat : uint8_t { f32, bf16, f16, i8 };
constexpr int64_t weight_group = 32;

// y = x w^T, w [n, k]. `data` is laid out by the backend's packer: CPU cpu::pack_matrix; GPU f32, bf16, f16 row-major,
// i8 row-major with `scales`.
struct InferMatrix {
  WeightFormat format = WeightFormat::f32;
  const void* data = nullptr;
  const void* scales = nullptr;  // GPU, i8: f16 [n, k / 32]; the CPU keeps them inside data
  int64_t n = 0, k = 0;
};

struct InferLayer {
  const float *input_norm = nullptr, *post_norm = nullptr;  // [d_model] fp32
  const float *q_norm = nullptr, *k_norm = nullptr;         // [d_head] fp32; null: no qk-norm
  InferMatrix qkv;                                          // [(n_head + 2 n_kv_head) d_head, d_model]
  InferMatrix o;                                            // [d_model, n_head d_head]
  InferMatrix gate_up, down;                                // dense: [2 d_ff, d_model] gate rows first, [d_model, d_ff]
  InferMatrix router;                                       // MoE: [n_expert, d_model], always f32
  const InferMatrix *expert_gate_up = nullptr, *expert_down = nullptr;  // [n_expert]
  const InferMatrix *shared_gate_up = nullptr, *shared_down = nullptr;  // [n_shared]
};

struct InferModel {
  int64_t d_model = 0, d_ff = 0, n_layer = 0, n_vocab = 0;  // d_ff: of an expert where there are experts
  int n_head = 0, n_kv_head = 0, d_head = 0;
  int n_expert = 0, n_expert_per_tok = 0, n_shared = 0;
  bool norm_topk = true;
  float eps = 1e-6f;
  float attention_scale = 1.0f;                // 1 / sqrt(d_head)
  const float *cos = nullptr, *sin = nullptr;  // [max_pos, d_head / 2]; element i of a head turns with i + d_head / 2
  const InferLayer* layers = nullptr;          // [n_layer], host memory
  InferMatrix embed;                           // [n_vocab, d_model]; rows are looked up. CPU: row-major f32 or bf16
  const float* final_norm = nullptr;           // [d_model]
  InferMatrix head;                            // [n_vocab, d_model]
};

// Keys and values of a pool of n_row = layer_stride / (n_kv_head * d_head) rows, k and v each
//   CPU [n_layer, n_kv_head, n_row, d_head]: a thread reads one kv head, and a stretch of its rows lies in one piece
//   GPU [n_layer, n_row, n_kv_head, d_head]
// i8: one fp32 scale a (row, kv head) = absmax / 127, in the same order.
enum class KvFormat : uint8_t { f32, bf16, f16, i8 };
struct InferKv {
  KvFormat format = KvFormat::f32;
  void *k = nullptr, *v = nullptr;
  float *k_scale = nullptr, *v_scale = nullptr;
  int64_t layer_stride = 0;  // elements
};

// The tokens of one step. Sequence s owns tokens [cu[s], cu[s + 1]) and, after the step, kv_len[s] keys, the last ones
// its own tokens'. Key j of it lies in row table[s * table_ld + (j >> block_shift)] + (j & ((1 << block_shift) - 1)):
// blocks of a paged pool; with one entry and a large block_shift, one run of rows.
struct InferStep {
  int64_t n_tok = 0, n_seq = 0, n_out = 0;
  const int32_t* ids = nullptr;        // [n_tok]
  const int32_t* positions = nullptr;  // [n_tok]
  const int32_t* slots = nullptr;      // [n_tok] the row that receives the token's key and value
  const int32_t* cu = nullptr;         // [n_seq + 1]
  const int32_t* kv_len = nullptr;     // [n_seq]
  const int32_t* table = nullptr;      // [n_seq, table_ld]
  int64_t table_ld = 0;
  int block_shift = 0;
  const int32_t* out_rows = nullptr;  // [n_out] tokens whose logits are wanted
  float* logits = nullptr;            // [n_out, n_vocab]; null: not wanted
  float* hidden = nullptr;            // [n_out, d_model] behind the final norm; null: not wanted
  // [n_out] the first largest of the row's logits, -1 where one is NaN or +infinity or all are -infinity; null: not
  // wanted. Needs logits. CPU only: each thread looks at the logits it has just made.
  int32_t* best = nullptr;
};

// A step of the persistent kernel: one token a sequence, its numbers by the host. All host arrays are read before the
// call returns.
struct PersistentRow {
  int32_t id = 0;  // or, negative, -1 - i: what the step before drew for its row i (prev_ids)
  int32_t position = 0;
  int32_t slot = -1;   // the row of the cache that receives the token's key and value; -1: none
  int32_t kv_len = 0;  // keys, the last one its own
};
struct PersistentStepBatch {
  std::span<const PersistentRow> rows;    // host
  std::span<const RowSampling> sampling;  // host; empty: nothing is drawn
  const int32_t* table = nullptr;         // device [rows, table_ld], see InferStep
  int64_t table_ld = 0;
  int block_shift = 0;
  const LogitEdit* edits = nullptr;                       // device
  const uint32_t* masks = nullptr;                        // device
  const int32_t* prev_ids = nullptr;                      // device
  int32_t *next_ids = nullptr, *next_ids_host = nullptr;  // [rows] device; pinned, may be null
  float *logits = nullptr, *hidden = nullptr;             // device [rows, n_vocab], [rows, d_model]; null: not wanted
};

}  // namespace mm
