// Declarations of the row kernels, in the namespace of the instruction set being compiled (see simd.h).
#pragma once

#include "kernels/cpu/simd/simd.h"

namespace mm::MM_ISA {

void rmsnorm_fwd(float* y, float* rstd, const float* x, const float* w, float eps, int64_t n, int64_t d);
void rmsnorm_bwd(float* dx, float* dw, const float* dy, const float* x, const float* rstd, const float* w, int64_t n,
                 int64_t d);
void norm_rope_fwd(float* y, int64_t ldy, const int64_t* slots, const float* x, int64_t ldx, const float* w,
                   const float* cos, const float* sin, const int32_t* positions, float eps, int64_t n, int d_head);
void norm_rope_bwd(float* dx, int64_t lddx, float* dw, const float* x, int64_t ldx, const float* w, const float* cos,
                   const float* sin, const int32_t* positions, float eps, int64_t n, int d_head);
void swiglu_fwd(float* act, const float* gate_up, int64_t n, int64_t f);
void swiglu_bwd(float* dgate_up, const float* dact, const float* gate_up, int64_t n, int64_t f);

void logprob_fwd(float* logp, float* lse, const float* logits, const int32_t* targets, int64_t n, int64_t v);
void logprob_bwd(float* logits, const float* lse, const float* g, const int32_t* targets, int64_t n, int64_t v);
void softmax_row(float* s, int64_t n_valid, int64_t n, float* lse, float* inv_sum);
void softmax_row_bwd(float* s, float* dp, float lse, float delta, float scale, int64_t n_valid, int64_t n);

float dot(const float* a, const float* b, int64_t n);
void axpy(float* y, float a, const float* x, int64_t n);
void scale(float* y, float a, int64_t n);
void gemv(float* y, const float* w, const float* x, int64_t rows, int64_t k, bool accumulate);
void to_bf16(uint16_t* y, const float* x, int64_t n);
void adamw(float* p, const float* g, float* m, float* v, const AdamWStep& a, int64_t n);
double sum_sq(const float* x, int64_t n);

}  // namespace mm::MM_ISA
