// Sizes of the layouts of the CPU inference step, and the plan of a step's scratch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/cpu_features.h"
#include "kernels/cpu/infer_kernels.h"

namespace mm::cpu {

constexpr int64_t few_panels = 8, few_columns = few_panels * infer_panel;  // of a "few" product at a time
constexpr int64_t staging_floats = 16 * few_columns;  // results of a product before they reach their rows
constexpr int64_t attend_rows = 128;                  // query rows of an attention task, or one token's if it has more

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t panels_of(int64_t n) { return (n + infer_panel - 1) / infer_panel; }
inline int64_t padded_k(int64_t k) { return round_up(k, infer_k_pad); }
int64_t panel_bytes(WeightFormat format, int64_t k);

const InferKernels& infer_kernels();  // of selected_isa()
// Of every instruction set that this machine has, for tests.
std::vector<std::pair<Isa, InferKernels>> all_infer_kernels();
// infer_step with kernels chosen by the caller.
void infer_step_with(const InferKernels& kernels, const InferModel& model, const InferKv& kv, const InferStep& step,
                     void* scratch, bool batch_invariant);

// Activations as a product takes them; see infer_kernels.h.
enum class OperandKind : uint8_t { f32, bf16, q8 };
struct Operand {
  OperandKind kind = OperandKind::f32;
  int64_t k = 0, kp = 0;
  char* data = nullptr;

  static int64_t bytes(OperandKind kind, int64_t rows, int64_t k);
  int64_t row_bytes() const { return kind == OperandKind::f32 ? k * 4 : kp + kp / 32 * 8; }  // f32 and q8
  float* f32(int64_t r) const { return reinterpret_cast<float*>(data + r * row_bytes()); }
  int8_t* q8(int64_t r) const { return reinterpret_cast<int8_t*>(data + r * row_bytes()); }
  // The first chunk of row r; r = 16 i: tile row i.
  uint16_t* bf16(int64_t r) const { return reinterpret_cast<uint16_t*>(data) + r / 16 * kp * 16 + r % 16 * 32; }
};

// Rows that go through the same feed-forward weights: all tokens of a dense model, an expert's, a shared expert's.
struct FfnGroup {
  const InferMatrix *gate_up = nullptr, *down = nullptr;
  int64_t row0 = 0, rows = 0;  // of the inner activations and, for experts, of expert_out; row0 is a multiple of 16
  int64_t input_row = 0;       // row0 in the operand that comes in
};

// Where decode's share of a thread begins: blocks of keys of items (sequence, kv head) in order.
struct KeyBoundary {
  int64_t item = 0, block = 0;
};

// The first largest of a thread's part of a row of logits; value is NaN where one is NaN or +infinity.
struct PartBest {
  float value = 0;
  int32_t id = 0;
};

// Buffers of a step, all inside the caller's scratch.
struct StepPlan {
  int64_t n_tok = 0, n_out = 0, n_slot = 0, max_k = 0, ffn = 0;
  float *x = nullptr, *qkv = nullptr, *attn = nullptr, *h = nullptr, *gate_up = nullptr, *expert_out = nullptr;
  char *operand = nullptr, *act = nullptr;  // operands of the next product, and of the feed-forward's second one
  char* shares = nullptr;                   // [threads][share_bytes]: see Worker::offer
  float* partial = nullptr;                 // [2 threads][group][d_head + 2]
  KeyBoundary* bounds = nullptr;            // [threads + 1]
  PartBest* best = nullptr;                 // [threads][n_out]
  int32_t *experts = nullptr, *slot_token = nullptr, *token_slot = nullptr;
  float* expert_weights = nullptr;
  FfnGroup* groups = nullptr;
  char* thread_memory = nullptr;
  int64_t thread_bytes = 0, partial_floats = 0;
  int64_t share_columns = 0, share_bytes = 0;  // of x; 0: it does not divide into groups of 32 for every thread
  int n_thread = 1;

  // Lays the buffers out from `scratch` (null: only counts) for so many threads; returns the bytes used.
  size_t lay_out(char* scratch, const InferModel& m, int64_t n_tok, int64_t n_out, int n_thread);
};

// The private buffers of one thread, in its part of StepPlan::thread_memory.
struct ThreadBuffers {
  float *row = nullptr, *c = nullptr, *c2 = nullptr;  // a row of any width; staging of products
  uint16_t* tiles = nullptr;                          // 4 panels of expanded weights
  char* operand = nullptr;                            // of one row
  FfnGroup* groups = nullptr;                         // of one token
  int32_t* experts = nullptr;
  float* expert_weights = nullptr;
  const float** parts = nullptr;  // partial sums of one sequence and kv head
  float* q = nullptr;             // rotated queries of one kv head
  char* attend = nullptr;         // AttendArgs::scratch

  size_t lay_out(char* memory, const StepPlan& plan, const InferModel& m);
};

}  // namespace mm::cpu
