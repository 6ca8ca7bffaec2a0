// The ops of the model. Each checks shapes and types once, opens a profiler zone with its floor of bytes and
// operations, and calls the kernel of the device. Shapes are checked with MM_CHECK: callers are our own code. All
// activations are fp32, row-major; int32 lists are plain pointers with the length named. Gradient rule: parameter
// gradients and the residual stream's gradient +=, other activation gradients =. Ops run in call order; issue them from
// one thread.
#pragma once

#include "kernels/kernel_table.h"
#include "tensor/device.h"
#include "tensor/view.h"

namespace mm::ops {

// y [m, n] = x [m, k] w [n, k]^T; += when accumulate (a residual add for free)
void linear_fwd(const Device& dev, View y, View x, View w, bool accumulate = false);
// dx [m, k] = dy [m, n] w (+= when accumulate; an empty view: not wanted); dw [n, k] += dy^T x (an empty view: frozen)
void linear_bwd(const Device& dev, View dx, View dw, View dy, View x, View w, bool accumulate_dx = false);

void embed_fwd(const Device& dev, View out, View table, const int32_t* ids);    // out [n, d], table [n_vocab, d]
void embed_bwd(const Device& dev, View dtable, View dout, const int32_t* ids);  // dtable +=

void rmsnorm_fwd(const Device& dev, View y, View rstd, View x, View w, float eps);  // x, y [n, d], rstd [n] or empty
void rmsnorm_bwd(const Device& dev, View dx, View dw, View dy, View x, View rstd, View w);  // dx +=, dw +=

// qkv [n, (n_head + 2 n_kv_head) d_head] -> q [n, n_head d_head]; k rows slots[t] (t when null), v copied likewise
// unless empty
void qk_norm_rope_fwd(const Device& dev, View q, View k, View v, const int64_t* slots, View qkv,
                      const NormRopeArgs& args);
void qk_norm_rope_bwd(const Device& dev, View dqkv, View dq_weight, View dk_weight, View qkv, const NormRopeArgs& args);

void attention_fwd(const Device& dev, const AttentionArgs& args);
void attention_bwd(const Device& dev, const AttentionBwdArgs& args);

void swiglu_fwd(const Device& dev, View act, View gate_up);                  // act [n, f], gate_up [n, 2 f]
void swiglu_bwd(const Device& dev, View dgate_up, View dact, View gate_up);  // dgate_up may be gate_up itself

void logprob_fwd(const Device& dev, View logp, View lse, View logits,
                 const int32_t* targets);                                                    // [n], [n], [n, n_vocab]
void logprob_bwd(const Device& dev, View logits, View lse, View g, const int32_t* targets);  // logits become dlogits

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

void adamw(const Device& dev, View p, View g, View m, View v, const AdamWArgs& args);
void copy(const Device& dev, View y, View x);  // contiguous, same number of elements
void zero(const Device& dev, View x);
double sum_sq(const Device& dev, View x);

}  // namespace mm::ops
