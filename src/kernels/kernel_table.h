// The kernels of one device as a table of functions; ref and cpu each fill one, CUDA's are in cuda/cuda_kernels.h. Raw
// pointers and sizes only; ops.cpp has already checked them. All floating-point data is fp32; `ld*` is the distance
// between rows in elements. Gradient rule: parameter gradients and the residual stream's gradient are added to (+=),
// other activation gradients are set (=).
#pragma once

#include <cstdint>

namespace mm {

// Sequences of a packed batch. Queries of sequence s are rows [cu[s], cu[s+1]); its keys and values are rows
// [kv_start[s], kv_start[s] + kv_len[s]) of k and v. The last query sees all keys: query i sees keys up to
// kv_len - q_len + i.
struct AttentionArgs {
  const float* q = nullptr;  // [n_tok, n_head, d_head]
  const float* k = nullptr;  // [.., n_kv_head, d_head]
  const float* v = nullptr;
  float* out = nullptr;  // [n_tok, n_head, d_head]
  float* lse = nullptr;  // [n_tok, n_head] log of the softmax denominator; may be null when no backward follows
  int64_t ldq = 0, ldk = 0, ldv = 0, ldo = 0;
  const int32_t* cu = nullptr;
  const int32_t* kv_start = nullptr;  // null: same rows as the queries
  const int32_t* kv_len = nullptr;
  int64_t n_seq = 0;
  int n_head = 0, n_kv_head = 0, d_head = 0;
  float scale = 1.0f;
  // Dropout on the attention weights: element (query row, head, key) is kept when its Philox number says so.
  float dropout = 0.0f;
  uint64_t seed = 0, stream = 0;
};

struct AttentionBwdArgs {
  AttentionArgs fwd;            // out and lse as forward left them; kv rows = query rows
  const float* dout = nullptr;  // [n_tok, n_head, d_head]
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;
  int64_t lddout = 0, lddq = 0, lddk = 0, lddv = 0;
};

struct NormRopeArgs {
  const float* q_weight = nullptr;  // [d_head]; null: no qk-norm
  const float* k_weight = nullptr;
  const float* cos = nullptr;  // [max_pos, d_head / 2]
  const float* sin = nullptr;
  const int32_t* positions = nullptr;  // [n]
  float eps = 1e-6f;
  int64_t n = 0;
  int n_head = 0, n_kv_head = 0, d_head = 0;
};

struct AdamWArgs {
  double lr = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;  // double: 1 - beta2 keeps its digits
  float grad_scale = 1;                                                     // multiplies the gradient (clipping)
  int64_t step = 1;                                                         // counted from 1, for the bias correction
};

struct KernelTable {
  // y[M,N] = x[M,K] w[N,K]^T, or += when accumulate.
  void (*linear_fwd)(float* y, int64_t ldy, const float* x, int64_t ldx, const float* w, int64_t m, int64_t n,
                     int64_t k, bool accumulate, bool bf16);
  // dx[M,K] = dy[M,N] w[N,K] (+= when accumulate); skipped when dx is null. dw[N,K] += dy^T x; skipped when dw is null.
  void (*linear_bwd)(float* dx, int64_t lddx, float* dw, const float* dy, int64_t lddy, const float* x, int64_t ldx,
                     const float* w, int64_t m, int64_t n, int64_t k, bool accumulate_dx, bool bf16);
  void (*embed_fwd)(float* out, const float* table, const int32_t* ids, int64_t n, int64_t d);
  void (*embed_bwd)(float* dtable, const float* dout, const int32_t* ids, int64_t n, int64_t d);
  void (*rmsnorm_fwd)(float* y, float* rstd, const float* x, const float* w, float eps, int64_t n, int64_t d);
  void (*rmsnorm_bwd)(float* dx, float* dw, const float* dy, const float* x, const float* rstd, const float* w,
                      int64_t n, int64_t d);  // dx +=
  // qkv [n, (n_head + 2 n_kv_head) d_head] -> q_out [n, n_head d_head], k_out rows slots[t] (t when null); v is copied
  // to v_out rows when v_out.
  void (*qk_norm_rope_fwd)(float* q_out, float* k_out, int64_t ldk, float* v_out, int64_t ldv, const int64_t* slots,
                           const float* qkv, const NormRopeArgs& a);
  // dqkv's q and k parts hold d(q_out), d(k_out) and become d(q), d(k) in place; dq_weight, dk_weight +=.
  void (*qk_norm_rope_bwd)(float* dqkv, float* dq_weight, float* dk_weight, const float* qkv, const NormRopeArgs& a);
  void (*attention_fwd)(const AttentionArgs& a);
  void (*attention_bwd)(const AttentionBwdArgs& a);
  void (*swiglu_fwd)(float* act, const float* gate_up, int64_t n, int64_t f);  // silu(gate) * up
  void (*swiglu_bwd)(float* dgate_up, const float* dact, const float* gate_up, int64_t n,
                     int64_t f);  // dgate_up may be gate_up itself
  // logits [n,V] -> lse[n], logp[n] = logits[target] - lse (targets in [0,V)).
  void (*logprob_fwd)(float* logp, float* lse, const float* logits, const int32_t* targets, int64_t n, int64_t v);
  // logits -> dlogits in place: g[t] * (onehot(target) - softmax).
  void (*logprob_bwd)(float* logits, const float* lse, const float* g, const int32_t* targets, int64_t n, int64_t v);
  void (*dropout)(float* x, float p, uint64_t seed, uint64_t stream,
                  int64_t n);                        // in place; the same call on a gradient is its backward
  void (*add)(float* y, const float* x, int64_t n);  // y += x
  // scores [n,E] = softmax(logits); the k best experts (ties: lower index), weights normalised when norm.
  void (*moe_route_fwd)(float* scores, int32_t* experts, float* weights, const float* logits, int64_t n, int n_expert,
                        int top_k, bool norm);
  // dlogits [n,E] from dweights [n,k] and daux[e] (gradient of every token's score for expert e).
  void (*moe_route_bwd)(float* dlogits, const float* dweights, const float* daux, const float* scores,
                        const int32_t* experts, int64_t n, int n_expert, int top_k, bool norm);
  void (*gather_rows)(float* out, const float* x, const int32_t* rows, int64_t n, int64_t d);  // out[i] = x[rows[i]]
  void (*scatter_rows)(float* out, const float* x, const int32_t* rows, int64_t n,
                       int64_t d);  // out[rows[i]] = x[i], rows distinct
  // out[t] += sum_j weights[t,j] * y[slot[t,j]] over the k slots of token t.
  void (*moe_combine_fwd)(float* out, const float* y, const int32_t* slot, const float* weights, int64_t n, int top_k,
                          int64_t d);
  // dy[slot] = weight * dout[t]; dweights[t,j] = dout[t] . y[slot].
  void (*moe_combine_bwd)(float* dy, float* dweights, const float* dout, const float* y, const int32_t* slot,
                          const float* weights, int64_t n, int top_k, int64_t d);
  void (*scatter_add)(float* out, const float* x, const int32_t* slot, int64_t n, int top_k,
                      int64_t d);  // out[t] = sum_j x[slot[t,j]]
  void (*adamw)(float* p, const float* g, float* m, float* v, const AdamWArgs& a, int64_t n);
  void (*copy)(float* y, const float* x, int64_t n);
  void (*zero)(float* x, int64_t n);
  double (*sum_sq)(const float* x, int64_t n);  // fixed order: the same value on any number of threads
};

const KernelTable& ref_kernels();
const KernelTable& cpu_kernels();  // the instruction set is selected_isa(), read once
bool matmul_bf16_available();

}  // namespace mm
