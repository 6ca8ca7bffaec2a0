// CUDA kernels of inference with paged keys and values. The rules of cuda_kernels.h hold (asynchronous, capturable, the
// same bits every time); all pointers are device memory unless said otherwise.
#pragma once

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/infer.h"
#include "kernels/sample.h"

namespace mm::cuda {

// --- keys and values: paged_kv.cu --------------------------------------------------------------------------------
// One layer's keys and values (pointers already moved to the layer).
struct KvLayer {
  KvFormat format = KvFormat::bf16;
  void *k = nullptr, *v = nullptr;
  float *k_scale = nullptr, *v_scale = nullptr;  // i8: [rows, n_kv_head]
};
// qkv [n, (n_head + 2 n_kv_head) d_head] T -> q_out [n, n_head d_head] T normed and rotated; k likewise and v into rows
// slots[t] of kv (a negative slot: the token is padding, nothing is written). Where k_out, v_out are not null,
// [n, n_kv_head d_head] T, they receive keys and values too (for the attention of a prompt without history).
void paged_norm_rope(const Context& ctx, DType t, void* q_out, const KvLayer& kv, void* k_out, void* v_out,
                     const int32_t* slots, const void* qkv, const NormRope& a);
// Rows of sequences collected into contiguous memory as T: out row r of k_out, v_out [n_rows, n_kv_head d_head] is key
// r - start[s] of the sequence s with start[s] <= r < start[s + 1].
void kv_gather(const Context& ctx, DType t, void* k_out, void* v_out, const KvLayer& kv, const int32_t* start,
               const int32_t* table, int64_t table_ld, int block_shift, int64_t n_seq, int64_t n_rows, int n_kv_head,
               int d_head);
// Rows [from[i], from[i] + count[i]) of every layer to [to[i], ...): copy on write and the naive concatenating cache.
void kv_copy_rows(const Context& ctx, const InferKv& kv, int64_t n_layer, const int32_t* from, const int32_t* to,
                  const int32_t* count, int64_t n_copies, int64_t max_count, int n_kv_head, int d_head);

// --- attention over pages: attention_paged.cu --------------------------------------------------------------------
// Few query rows against many keys: query row r (of n_row) belongs to sequence seq[r] and sees n_key[r] keys (0:
// padding, out is set to zero). out, q [n_row, n_head, d_head] T. seq, n_key and table may be read before the kernels
// launched before have ended, as may slots and positions of paged_norm_rope and params of sample_rows: no kernel of the
// step may write them.
struct PagedAttention {
  const void* q = nullptr;
  void* out = nullptr;
  int64_t ldq = 0, ldo = 0;
  const int32_t *seq = nullptr, *n_key = nullptr;  // [n_row]
  const int32_t* table = nullptr;                  // [.., table_ld] see infer.h
  int64_t table_ld = 0;
  int block_shift = 0;
  int64_t n_row = 0;
  int64_t max_key = 0;  // bound of n_key that the host knows; only chooses how keys are split
  int n_new = 1 << 30;  // at most so many of a row's last keys are written by kernels of this step; the others may be
                        // read before those have ended
  bool invariant = false;  // the split depends on n_key alone, so that a row's bits do not depend on the batch
  int n_head = 0, n_kv_head = 0, d_head = 0;
  float scale = 1.0f;
  // Not null: [n_row, (n_head + 2 n_kv_head) d_head] T, one row a sequence; q is not read, and the kernel does what
  // paged_norm_rope does for a token: `rope` (its weights, tables and positions) and the write of the last key.
  const void* qkv = nullptr;
  NormRope rope;
};
bool attention_paged_ropes(const Context& ctx, DType t, const KvLayer& kv, const PagedAttention& a);  // can it?
void attention_paged(const Context& ctx, DType t, const KvLayer& kv, const PagedAttention& a);

// --- int8 weights: gemm_i8.cu ------------------------------------------------------------------------------------
// w [n, k] f32 -> data int8 [n, k], scales f16 [n, k / 32] (k a multiple of 32), as in infer.h.
void quantize_i8(const Context& ctx, int8_t* data, void* scales, const float* w, int64_t n, int64_t k);
// y [m, n] T = x [m, k] w^T (+ residual T [m, n], may be y). Sums fp32; the weights of many tokens are rounded to T.
void linear_i8(const Context& ctx, DType t, void* y, const void* x, const int8_t* data, const void* scales,
               const void* residual, int64_t m, int64_t n, int64_t k);

// What the product behind an RMSNorm reads in place of x [m, d] bf16, where linear_wide computes it; written by who
// writes x: embed_scaled, or the product whose y it is.
struct ScaledRows {
  const void* norm = nullptr;  // [d] the norm's weight; null: none is wanted
  void* scaled = nullptr;      // [m, d] x times it, rounded
  float* squares = nullptr;    // [d / 64, m] sums of the squares of 64 columns of x
};
// out = rows ids[t] of the table [.., d] (zeros where ids are negative), and `next` of them (embed.cu); d a multiple of
// 64, addresses aligned to 16 bytes.
void embed_scaled(const Context& ctx, void* out, const ScaledRows& next, const void* table, const int32_t* ids,
                  int64_t m, int64_t d);

// Products of few tokens with what stands around them, in one launch (linear_few.cu): y = f(norm(x) w^T) + residual,
// bf16 or f16. Right for any m, made for up to 256.
struct FewLinear {
  void* y = nullptr;               // [m, n], with swiglu [m, n / 2]
  const void* x = nullptr;         // [m, k] T
  const void* w = nullptr;         // [n, k] T, or int8 with `scales`
  const void* scales = nullptr;    // f16 [n, k / 32]
  const void* norm = nullptr;      // [k] T: x is normalized by its root mean square and multiplied by this; null: not
  const void* residual = nullptr;  // as y, may be y
  float eps = 1e-6f;
  bool swiglu = false;  // f = silu(first half) * second half
  int64_t m = 0, n = 0, k = 0;
  // linear_wide alone, which takes no `norm`:
  const float* squares = nullptr;  // [k / 64, m]: x is a `scaled`, and the products are multiplied by 1 / rms
  ScaledRows next;                 // of y, without swiglu
};
bool linear_few_fits(DType t, const FewLinear& a);  // k a multiple of 32, rows aligned to 16 bytes
// Is it faster than a norm, a product by the library and what follows, launched one after another (weights of type T)?
bool linear_few_pays(const FewLinear& a);
void linear_few(const Context& ctx, DType t, const FewLinear& a);
// The same for up to 128 tokens, by the tensor cores of a Hopper (linear_wide.cu): bf16, outputs a multiple of 4, k of
// 64, addresses aligned to 16 bytes, and all of it one wave of blocks.
bool linear_wide_fits(const Context& ctx, DType t, const FewLinear& a);
void linear_wide(const Context& ctx, DType t, const FewLinear& a);

// --- sampling: sample.cu -----------------------------------------------------------------------------------------
// Draws one token a row. logits [n, ld] T or f32 (unchanged); params [n]; edits, masks as in sample.h (masks
// [.., ceil(n_vocab / 32)]). The edits of a row name each id once. ids[i] receives the token, or -1 where a logit is
// NaN or +inf or nothing is allowed. ids_host (mapped pinned memory, may be null) receives a copy, written behind it.
// Same filters and random numbers as engine/sampler.h.
void sample_rows(const Context& ctx, DType t, int32_t* ids, int32_t* ids_host, const void* logits, int64_t ld,
                 int64_t n_vocab, const RowSampling* params, const LogitEdit* edits, const uint32_t* masks, int64_t n);
// logprob of ids[i] and of the n_top most probable tokens a row (best first, lowest id on a tie) under the raw logits:
// logprob [n], top_ids [n, n_top], top_logprob [n, n_top].
void row_logprobs(const Context& ctx, DType t, float* logprob, int32_t* top_ids, float* top_logprob, const void* logits,
                  int64_t ld, int64_t n_vocab, const int32_t* ids, int n_top, int64_t n);
// ids[t] = source[-1 - ids[t]] where ids[t] < 0: tokens that the step before drew and the host has not seen.
void resolve_ids(const Context& ctx, int32_t* ids, const int32_t* source, int64_t n);

// --- the persistent decode step: decode_persistent.cu ------------------------------------------------------------
// One cooperative kernel for a whole step of 1 to max_rows tokens, one a sequence (decode): embedding, all layers with
// paged attention, final norm, head, and optionally the draw. Dense models of type bf16 or i8 weights (activations
// rounded to bf16 between stages as the other path does), KV bf16 or i8.
struct PersistentDecode;  // plan: grid, stages, pointers of all layers on the device; owns device memory
struct PersistentDecodeLimits {
  int64_t max_rows = 8, max_keys = 0;
};
// Null where this GPU or model cannot (then use the other path); *why says so.
PersistentDecode* persistent_decode_create(const Context& ctx, const InferModel& model, const InferKv& kv,
                                           const PersistentDecodeLimits& limits, const char** why);
void persistent_decode_destroy(PersistentDecode* p) noexcept;
void persistent_decode_run(const Context& ctx, PersistentDecode* p, const PersistentStepBatch& step);

}  // namespace mm::cuda
