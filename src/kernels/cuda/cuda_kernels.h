// The CUDA kernels. Raw device pointers and sizes only: ops.cpp has checked them. Every call is asynchronous on
// ctx.stream, allocates nothing, waits for nothing (so a CUDA graph can capture it) and gives the same bits every time
// (no floating-point atomics, fixed orders of summation).
//
// Activations and weights have type T = `t` (bf16, f16 or f32) and are summed in fp32; statistics, parameter gradients
// and optimizer state are fp32. `ld*` is the distance between rows in elements. Gradient rule: parameter gradients and
// the residual stream's gradient are added to (+=), other activation gradients are set (=). Lists of int32 lie on the
// device. Rows of activations are 16-byte aligned when their width is a multiple of 8 (4 for f32); kernels must still
// be right (if slower) when not.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor/dtype.h"

struct CUstream_st;

namespace mm::cuda {

// What a launch needs to know of the device. Not thread safe: one context, one stream, one issuing thread.
struct Context {
  CUstream_st* stream = nullptr;
  int arch = 0;  // compute capability times 10: 80, 90, ...
  int n_sm = 0;
  void* scratch = nullptr;   // contents do not outlive one call; 256-byte aligned
  size_t scratch_bytes = 0;  // at least 32 MiB
  bool naive_norm = false, naive_attention = false, naive_ce = false;  // the unfused variants the course compares with
};

// --- rows: norm.cu, rope.cu, swiglu.cu ---------------------------------------------------------------------------
void rmsnorm_fwd(const Context& ctx, DType t, void* y, float* rstd, const void* x, const void* w, float eps, int64_t n,
                 int64_t d);  // x, y [n, d] T, w [d] T, rstd [n] or null
void rmsnorm_bwd(const Context& ctx, DType t, void* dx, float* dw, const void* dy, const void* x, const float* rstd,
                 const void* w, int64_t n, int64_t d);  // dx [n, d] T +=, dw [d] +=

struct NormRope {
  const void* q_weight = nullptr;  // [d_head] T; null: no qk-norm
  const void* k_weight = nullptr;
  const float* cos = nullptr;  // [max_pos, d_head / 2]
  const float* sin = nullptr;
  const int32_t* positions = nullptr;  // [n]
  float eps = 1e-6f;
  int64_t n = 0;
  int n_head = 0, n_kv_head = 0, d_head = 0;
};
// Semantics of kernel_table.h (rotation pairs element i with i + d_head / 2).
void qk_norm_rope_fwd(const Context& ctx, DType t, void* q_out, void* k_out, int64_t ldk, void* v_out, int64_t ldv,
                      const int64_t* slots, const void* qkv, const NormRope& a);
void qk_norm_rope_bwd(const Context& ctx, DType t, void* dqkv, float* dq_weight, float* dk_weight, const void* qkv,
                      const NormRope& a);

void swiglu_fwd(const Context& ctx, DType t, void* act, const void* gate_up, int64_t n, int64_t f);
// dgate_up may be gate_up itself; act (may be null) receives silu(gate) * up on the way, for the weight gradient that
// follows.
void swiglu_bwd(const Context& ctx, DType t, void* dgate_up, void* act, const void* dact, const void* gate_up,
                int64_t n, int64_t f);

// --- embedding, loss: embed.cu, logprob.cu -----------------------------------------------------------------------
void embed_fwd(const Context& ctx, DType t, void* out, const void* table, const int32_t* ids, int64_t n, int64_t d);
// dtable [n_vocab, d] +=; tokens of one id are summed in their order. Ids of -1 are skipped.
void embed_bwd(const Context& ctx, DType t, float* dtable, const void* dout, const int32_t* ids, int64_t n, int64_t d,
               int64_t n_vocab);
// Targets of -1 give logp 0, lse 0 and a zero row of gradients.
void logprob_fwd(const Context& ctx, DType t, float* logp, float* lse, const void* logits, const int32_t* targets,
                 int64_t n, int64_t v);
void logprob_bwd(const Context& ctx, DType t, void* logits, const float* lse, const float* g, const int32_t* targets,
                 int64_t n, int64_t v);
// Both at once, one read and one write of the logits (g known beforehand, as for cross-entropy); lse may be null.
void logprob_fwd_bwd(const Context& ctx, DType t, void* logits, float* logp, float* lse, const float* g,
                     const int32_t* targets, int64_t n, int64_t v);

// --- elementwise and optimizer: elementwise.cu, optimizer.cu -----------------------------------------------------
void dropout(const Context& ctx, DType t, void* x, float p, uint64_t seed, uint64_t stream, int64_t n);
void add(const Context& ctx, DType t, void* y, const void* x, int64_t n);  // y += x
void copy(const Context& ctx, DType t, void* y, const void* x, int64_t n);
void zero(const Context& ctx, void* x, size_t bytes);
void cast(const Context& ctx, DType to, void* y, DType from, const void* x, int64_t n);
void gather_rows(const Context& ctx, DType t, void* out, const void* x, const int32_t* rows, int64_t n, int64_t d);
void scatter_rows(const Context& ctx, DType t, void* out, const void* x, const int32_t* rows, int64_t n, int64_t d);
// out[t] = sum_j x[slot[t, j]]
void scatter_add(const Context& ctx, DType t, void* out, const void* x, const int32_t* slot, int64_t n, int top_k,
                 int64_t d);

// What changes from step to step, on the device, so that a captured graph reads it afresh. One float or int each.
struct AdamWState {
  float lr, max_norm;    // max_norm 0: no clipping
  float inv_scale;       // 1 / loss scale: the gradients are that much too large (fp16), 1 elsewhere
  double sum_sq;         // written by sum_sq: squared norm of the gradients, as they are
  int32_t update_count;  // updates done; adamw's last kernel adds 1 unless it skipped
};
struct AdamWConst {
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.01;
};
// torch.optim.AdamW with clip_grad_norm_(max_norm) on fp32 masters p [n]; w [n] (type t, null for f32: p is the weight)
// receives the rounded result. Does nothing when state->sum_sq is not finite. Bias correction
// uses update_count + 1. Reads g, m, v, p once, 16 bytes a thread.
void adamw(const Context& ctx, DType t, void* w, float* p, const float* g, float* m, float* v, AdamWState* state,
           const AdamWConst& c, int64_t n);
void sum_sq(const Context& ctx, double* out, const float* x, int64_t n);  // out is on the device
// sum over t of -w[t] * logp[t], into *out (double, device): += when accumulate
void weighted_nll(const Context& ctx, double* out, const float* logp, const float* w, int64_t n, bool accumulate);

// --- attention: attention.cu chooses; attention_fp32.cu, attention_mma_*.cu, attention_hopper_*.cu ----------------
struct Attention {
  const void* q = nullptr;  // [n_tok, n_head, d_head] T
  const void* k = nullptr;  // [.., n_kv_head, d_head]
  const void* v = nullptr;
  void* out = nullptr;   // [n_tok, n_head, d_head]
  float* lse = nullptr;  // [n_tok, n_head]; null when no backward follows
  int64_t ldq = 0, ldk = 0, ldv = 0, ldo = 0;
  const int32_t* cu = nullptr;        // [n_seq + 1]; sequences may be empty
  const int32_t* kv_start = nullptr;  // null: same rows as the queries
  const int32_t* kv_len = nullptr;
  int64_t n_seq = 0, n_tok = 0;
  // Tiles of 128 query rows: tiles[i] = {sequence, first row within the sequence}, n_tiles of them on the device, at
  // most max_tiles (the grid; blocks past *n_tiles leave). Any order is right; a good one keeps the tiles of a
  // sequence together and has no long ones at its end (staged_batch.cpp).
  const int32_t* tiles = nullptr;  // [max_tiles, 2]
  const int32_t* n_tiles = nullptr;
  int64_t max_tiles = 0;
  int64_t max_len = 0;  // longest sequence, when the host knows it (the naive variant needs it); 0: unknown
  int n_head = 0, n_kv_head = 0, d_head = 0;
  float scale = 1.0f;
  float dropout = 0.0f;
  uint64_t seed = 0, stream = 0;
};
struct AttentionBwd {
  Attention fwd;               // out and lse as forward left them; kv rows = query rows
  const void* dout = nullptr;  // [n_tok, n_head, d_head]
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  int64_t lddout = 0, lddq = 0, lddk = 0, lddv = 0;
};
void attention_fwd(const Context& ctx, DType t, const Attention& a);
void attention_bwd(const Context& ctx, DType t, const AttentionBwd& b);
// Bytes of ctx.scratch that attention_bwd takes (row sums of dout * out, fp32 gradients of queries, ...).
size_t attention_bwd_scratch(DType t, int64_t n_tok, int n_head, int n_kv_head, int d_head);

// --- mixture of experts: moe.cu, gemm_grouped*.cu -----------------------------------------------------------------
void moe_route_fwd(const Context& ctx, DType t, float* scores, int32_t* experts, float* weights, const void* logits,
                   int64_t n, int n_expert, int top_k, bool norm);
void moe_route_bwd(const Context& ctx, DType t, void* dlogits, const float* dweights, const float* daux,
                   const float* scores, const int32_t* experts, int64_t n, int n_expert, int top_k, bool norm);
// Stable order of the (token, choice) pairs by expert: slot[t, j] = row of the pair, rows[row] = token, offset
// [n_expert + 1] = first row of each expert. All on the device.
void moe_sort(const Context& ctx, int32_t* slot, int32_t* rows, int32_t* offset, const int32_t* experts, int64_t n,
              int top_k, int n_expert);
// Balance loss coef * E * sum_e load_e mean_t(scores[t, e]), load_e = pairs of e / n. *aux += share * loss (double,
// device; null: not wanted); daux[e] = share * its gradient with respect to one score of e (null: not wanted). *share
// lies on the device.
void moe_balance(const Context& ctx, double* aux, float* daux, const float* share, const float* scores,
                 const int32_t* offset, int64_t n, int n_expert, double coef);
void moe_combine_fwd(const Context& ctx, DType t, void* out, const void* y, const int32_t* slot, const float* weights,
                     int64_t n, int top_k, int64_t d);  // out[t] += sum_j weights[t,j] * y[slot[t,j]]
void moe_combine_bwd(const Context& ctx, DType t, void* dy, float* dweights, const void* dout, const void* y,
                     const int32_t* slot, const float* weights, int64_t n, int top_k, int64_t d);
// Products of expert e on rows [offset[e], offset[e+1]) of x [rows, k] and y [rows, n]; weights of expert e start at
// w + e * stride elements. Row counts are known to the device alone; max_rows bounds their sum.
//   fwd: y = x w_e^T (w_e [n, k]);  dgrad: dx = dy w_e;  wgrad: dw_e [n, k] fp32 += dy^T x (experts without rows: as
//   is)
void grouped_fwd(const Context& ctx, DType t, void* y, const void* x, const void* w, int64_t stride,
                 const int32_t* offset, int64_t max_rows, int64_t n, int64_t k, int n_expert);
void grouped_dgrad(const Context& ctx, DType t, void* dx, const void* dy, const void* w, int64_t stride,
                   const int32_t* offset, int64_t max_rows, int64_t n, int64_t k, int n_expert);
void grouped_wgrad(const Context& ctx, DType t, float* dw, int64_t stride, const void* dy, const void* x,
                   const int32_t* offset, int64_t max_rows, int64_t n, int64_t k, int n_expert);

}  // namespace mm::cuda
