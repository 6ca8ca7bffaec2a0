// The CPU kernels: split the work over the thread team, call the row kernels of the selected instruction set, and
// oneDNN for matrix products. Signatures are those of KernelTable (kernel_table.h).
#pragma once

#include <cstddef>

#include "kernels/cpu/simd/simd.h"
#include "kernels/kernel_table.h"

namespace mm::cpu {

const SimdTable& simd();  // of selected_isa()

// Grow-only scratch of the calling thread, one block a slot: steady state allocates nothing.
float* thread_scratch(int slot, size_t n);

// C[m,n] = alpha op(A) op(B) + beta C, row-major, op transposes when the flag is set. Runs on the whole team, or on the
// calling thread alone inside a parallel region.
void sgemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
           const float* b, int64_t ldb, float beta, float* c, int64_t ldc);

// linear.cpp
void linear_fwd(float* y, int64_t ldy, const float* x, int64_t ldx, const float* w, int64_t m, int64_t n, int64_t k,
                bool accumulate, bool bf16);
void linear_bwd(float* dx, int64_t lddx, float* dw, const float* dy, int64_t lddy, const float* x, int64_t ldx,
                const float* w, int64_t m, int64_t n, int64_t k, bool accumulate_dx, bool bf16);
// attention.cpp
void attention_fwd(const AttentionArgs& a);
void attention_bwd(const AttentionBwdArgs& a);
// norms.cpp
void rmsnorm_fwd(float* y, float* rstd, const float* x, const float* w, float eps, int64_t n, int64_t d);
void rmsnorm_bwd(float* dx, float* dw, const float* dy, const float* x, const float* rstd, const float* w, int64_t n,
                 int64_t d);
void qk_norm_rope_fwd(float* q_out, float* k_out, int64_t ldk, float* v_out, int64_t ldv, const int64_t* slots,
                      const float* qkv, const NormRopeArgs& a);
void qk_norm_rope_bwd(float* dqkv, float* dq_weight, float* dk_weight, const float* qkv, const NormRopeArgs& a);
// moe.cpp
void moe_route_fwd(float* scores, int32_t* experts, float* weights, const float* logits, int64_t n, int n_expert,
                   int top_k, bool norm);
void moe_route_bwd(float* dlogits, const float* dweights, const float* daux, const float* scores,
                   const int32_t* experts, int64_t n, int n_expert, int top_k, bool norm);
void gather_rows(float* out, const float* x, const int32_t* rows, int64_t n, int64_t d);
void scatter_rows(float* out, const float* x, const int32_t* rows, int64_t n, int64_t d);
void moe_combine_fwd(float* out, const float* y, const int32_t* slot, const float* weights, int64_t n, int top_k,
                     int64_t d);
void moe_combine_bwd(float* dy, float* dweights, const float* dout, const float* y, const int32_t* slot,
                     const float* weights, int64_t n, int top_k, int64_t d);
void scatter_add(float* out, const float* x, const int32_t* slot, int64_t n, int top_k, int64_t d);

}  // namespace mm::cpu
