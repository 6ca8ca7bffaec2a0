// The ops of inference on a GPU, over paged keys and values. The CPU has one fused step instead (cpu/infer.h). Rules of
// ops.h; pointers are device memory.
#pragma once

#include <memory>

#include "kernels/infer.h"
#include "kernels/ops.h"
#include "kernels/sample.h"

namespace mm::ops {

// Block table of sequences, see InferStep.
struct PageTable {
  const int32_t* rows = nullptr;  // [n_seq, ld]
  int64_t ld = 0;
  int block_shift = 0;
};

// qkv [n, ..] -> q [n, n_head d_head]; keys and values into rows slots[t] of a layer (none where negative), and into k,
// v [n, n_kv_head d_head] unless empty.
void paged_norm_rope(const Device& dev, View q, const InferKv& kv, int64_t layer, View k, View v, const int32_t* slots,
                     View qkv, const NormRope& args);
// Keys and values of n_seq sequences one after another: rows [start[s], start[s + 1]) of k, v are those of sequence s.
void kv_gather(const Device& dev, View k, View v, const InferKv& kv, int64_t layer, const int32_t* start,
               const PageTable& table, int64_t n_seq, int d_head);
// See cuda::kv_copy_rows; lists [n], which one call does in any order.
void kv_copy_rows(const Device& dev, const InferKv& kv, int64_t n_layer, const int32_t* from, const int32_t* to,
                  const int32_t* count, int64_t n, int64_t max_count, int n_kv_head, int d_head);

struct PagedAttention {
  const int32_t *seq = nullptr, *n_key = nullptr;  // [n_row]
  PageTable table;
  int64_t max_key = 0;
  int n_new = 1 << 30;  // of a row's last keys, at most so many are of this step
  bool invariant = false;
  int n_head = 0, n_kv_head = 0, d_head = 0;
  float scale = 1.0f;
};
void attention_paged(const Device& dev, View out, View q, const InferKv& kv, int64_t layer, const PagedAttention& a);
// paged_norm_rope and attention_paged in one launch, for one row a sequence whose key is its last (n_new 1). False
// where only two can do it; then nothing was done.
bool attention_paged_rope(const Device& dev, View out, const InferKv& kv, int64_t layer, const PagedAttention& a,
                          View qkv, const NormRope& rope);

void quantize_i8(const Device& dev, const InferMatrix& to, View w);                           // w f32 [n, k]
void linear_i8(const Device& dev, View y, View x, const InferMatrix& w, View residual = {});  // y = x w^T (+ residual)
// For the few tokens of a decode step, in one launch: y = norm(x) w^T (+ residual), or with swiglu (w: gate, then up
// rows) silu(gate) * up. norm empty: x as it is. False where launches one after another are faster or the only way;
// then nothing was done.
bool linear_few(const Device& dev, View y, View x, View norm, float eps, const InferMatrix& w, View residual = {},
                bool swiglu = false);

// A step whose products cuda::linear_wide computes (5 to 128 tokens on a Hopper). Who writes the residual stream x
// [n_tok, d_model] also writes what the product behind the next norm reads instead: `scaled` = x times the norm's
// weight, and `squares` f32 [d_model / 64, n_tok], sums of squares of 64 columns of x.
struct ScaledRows {
  View norm, scaled, squares;
};
constexpr int64_t most_scaled = 128;                                                           // tokens of such a step
bool linear_scaled_takes(const Device& dev, DType t, const InferModel& model, int64_t n_tok);  // all layers' products?
void embed_scaled(const Device& dev, View x, const ScaledRows& next, View table, const int32_t* ids);
// x = y w^T + x
void linear_scaled_add(const Device& dev, View x, View y, const InferMatrix& w, const ScaledRows& next);
// y = norm(x) w^T, with swiglu as in linear_few. False where this product is none of linear_wide's; nothing was done.
bool linear_scaled(const Device& dev, View y, const ScaledRows& x, float eps, const InferMatrix& w,
                   bool swiglu = false);

// ids [n] drawn from logits [n, n_vocab], -1 where impossible.
void sample_rows(const Device& dev, int32_t* ids, View logits, const RowSampling* params, const LogitEdit* edits,
                 const uint32_t* masks);
void resolve_ids(const Device& dev, int32_t* ids, const int32_t* source, int64_t n);

// The whole step of a few decoding sequences in one kernel. Move only; waits in its destructor.
class PersistentStep {
 public:
  // Empty where this GPU or model cannot; then why() says so.
  PersistentStep(const Device& dev, const InferModel& model, const InferKv& kv, int64_t max_rows, int64_t max_keys);
  PersistentStep() = default;
  explicit operator bool() const { return plan_ != nullptr; }
  const char* why() const { return why_; }
  void run(const Device& dev, const PersistentStepBatch& step) const;

 private:
  std::shared_ptr<void> plan_;
  const char* why_ = "not asked for";
};

}  // namespace mm::ops
