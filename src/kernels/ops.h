// The ops of the model. Each checks shapes and types once, opens a profiler zone with its floor of bytes and
// operations, and calls the kernel of the device. Shapes are checked with MM_CHECK: callers are our own code.
// Activations and weights are of type dev.act, row-major; statistics, parameter gradients, scores and weights of
// experts are fp32; int32 lists are plain pointers with the length named. Everything lies in the device's memory.
// Gradient rule: parameter gradients and the residual stream's gradient +=, other activation gradients =. Ops run in
// call order (on a GPU asynchronously, on its session's stream); issue them from one thread.
#pragma once

#include "kernels/kernel_table.h"
#include "tensor/device.h"
#include "tensor/view.h"

namespace mm::ops {

// y [m, n] = x [m, k] w [n, k]^T (+ residual [m, n], which may be y itself)
void linear_fwd(const Device& dev, View y, View x, View w, View residual = {});
// dx [m, k] = dy [m, n] w (+= when accumulate; an empty view: not wanted); dw [n, k] += dy^T x (an empty view: frozen)
void linear_bwd(const Device& dev, View dx, View dw, View dy, View x, View w, bool accumulate_dx = false);

void embed_fwd(const Device& dev, View out, View table, const int32_t* ids);    // out [n, d], table [n_vocab, d]
void embed_bwd(const Device& dev, View dtable, View dout, const int32_t* ids);  // dtable +=

void rmsnorm_fwd(const Device& dev, View y, View rstd, View x, View w, float eps);  // x, y [n, d], rstd [n] or empty
void rmsnorm_bwd(const Device& dev, View dx, View dw, View dy, View x, View rstd, View w);  // dx +=, dw +=

struct NormRope {
  View q_weight, k_weight;                     // [d_head]; empty: no qk-norm
  const float *cos = nullptr, *sin = nullptr;  // [max_pos, d_head / 2]
  const int32_t* positions = nullptr;          // [n]
  float eps = 1e-6f;
  int64_t n = 0;
  int n_head = 0, n_kv_head = 0, d_head = 0;
};
// qkv [n, (n_head + 2 n_kv_head) d_head] -> q [n, n_head d_head]; k rows slots[t] (t when null), v copied likewise
// unless empty
void qk_norm_rope_fwd(const Device& dev, View q, View k, View v, const int64_t* slots, View qkv, const NormRope& args);
void qk_norm_rope_bwd(const Device& dev, View dqkv, View dq_weight, View dk_weight, View qkv, const NormRope& args);

// See AttentionArgs of kernel_table.h.
struct Attention {
  View q, k, v, out;  // [n_tok, n_head d_head], [.., n_kv_head d_head] twice, [n_tok, n_head d_head]
  View lse;           // [n_tok, n_head], empty when no backward follows
  const int32_t *cu = nullptr, *kv_start = nullptr, *kv_len = nullptr;
  int64_t n_seq = 0, n_tok = 0;
  double pairs = 0, keys = 0;  // visible (query, key) pairs of one head and keys read, for the zone
  // GPU: the work list, see cuda_kernels.h
  const int32_t *tiles = nullptr, *n_tiles = nullptr;
  int64_t max_tiles = 0, max_len = 0;  // max_len: of the longest sequence
  int n_head = 0, n_kv_head = 0, d_head = 0;
  float scale = 1.0f;
  float dropout = 0.0f;
  uint64_t seed = 0, stream = 0;
};
void attention_fwd(const Device& dev, const Attention& args);
void attention_bwd(const Device& dev, const Attention& fwd, View dout, View dq, View dk, View dv);

void swiglu_fwd(const Device& dev, View act, View gate_up);  // act [n, f], gate_up [n, 2 f]
// gate_up = x w^T and act from it; on a Hopper GPU in one kernel
void linear_swiglu_fwd(const Device& dev, View gate_up, View act, View x, View w);
// Backward through y = act w^T and act = swiglu(gate_up): dgate_up from dy, act computed again on the way. dact:
// scratch [n, f], left alone where a Hopper GPU does it in one kernel. dgate_up may be gate_up itself.
void linear_swiglu_bwd(const Device& dev, View dgate_up, View act, View dact, View dy, View w, View gate_up);
// dgate_up may be gate_up itself; act is computed again on the way
void swiglu_bwd(const Device& dev, View dgate_up, View act, View dact, View gate_up);

void logprob_fwd(const Device& dev, View logp, View lse, View logits,
                 const int32_t* targets);                                                    // [n], [n], [n, n_vocab]
void logprob_bwd(const Device& dev, View logits, View lse, View g, const int32_t* targets);  // logits become dlogits
// Both, where g is known beforehand: one pass over the logits on a GPU.
void logprob_fwd_bwd(const Device& dev, View logits, View logp, View lse, View g, const int32_t* targets);
// *out (f64) = -sum_t w[t] logp[t], += when accumulate
void weighted_nll(const Device& dev, View out, View logp, View w, bool accumulate);

void dropout(const Device& dev, View x, float p, uint64_t seed, uint64_t stream);
void add(const Device& dev, View y, View x);                                  // y += x
void gather_rows(const Device& dev, View out, View x, const int32_t* rows);   // out[i] = x[rows[i]]
void scatter_rows(const Device& dev, View out, View x, const int32_t* rows);  // out[rows[i]] = x[i]

// scores, logits [n, n_expert]; experts int32 [n, top_k]; weights [n, top_k]
void moe_route_fwd(const Device& dev, View scores, int32_t* experts, View weights, View logits, bool norm_topk);
void moe_route_bwd(const Device& dev, View dlogits, View dweights, View daux, View scores, const int32_t* experts,
                   bool norm_topk);
void moe_combine_fwd(const Device& dev, View out, View y, const int32_t* slot,
                     View weights);  // out [n, d] +=, y [n top_k, d]
void moe_combine_bwd(const Device& dev, View dy, View dweights, View dout, View y, const int32_t* slot, View weights);
void scatter_add(const Device& dev, View out, View x, const int32_t* slot,
                 int top_k);  // out [n, d] = sums of x [n top_k, d]
// Stable order of the (token, choice) pairs by expert: slot [n, top_k] = row of the pair, rows [n top_k] = its token,
// offset [n_expert + 1] = first row of each expert. All i32.
void moe_sort(const Device& dev, View slot, View rows, View offset, View experts);
// loss = coef * E * sum_e load_e * mean_t(scores[t, e]), load_e = pairs of e / n: aux (f64) += share * loss unless
// empty; daux [E] = share * its gradient with respect to one score of expert e unless empty. share: one float on the
// device.
void moe_balance(const Device& dev, View aux, View daux, const float* share, View scores, View offset, double coef);
// Products of each expert with its rows. w, dw: the first expert's, the next one `stride` elements on.
void grouped_fwd(const Device& dev, View y, View x, View w, int64_t stride, View offset);  // y = x w_e^T
void grouped_bwd(const Device& dev, View dx, View dw, View dy, View x, View w, int64_t stride,
                 View offset);  // dx = dy w_e; dw_e += dy^T x

void adamw(const Device& dev, View p, View g, View m, View v, const AdamWArgs& args);  // waits on a GPU
void copy(const Device& dev, View y, View x);  // contiguous, same number of elements
void cast(const Device& dev, View y, View x);  // GPU: from one type to another
void zero(const Device& dev, View x);
double sum_sq(const Device& dev, View x);  // waits on a GPU

}  // namespace mm::ops
