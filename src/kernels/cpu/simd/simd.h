// Row kernels compiled once for each instruction set (namespace mm::scalar, mm::avx2, mm::avx512). Single-threaded;
// the drivers in kernels/cpu/ split the work. The sources are plain loops that the compiler vectorises; they include
// nothing with inline functions of its own, because such a function shared by two units links to one version only.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mm {

struct AdamWStep {
  float keep;       // 1 - lr * weight_decay
  float step_size;  // lr / (1 - beta1^step)
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^step)
  float eps, grad_scale;
};

struct SimdTable {
  void (*rmsnorm_fwd)(float* y, float* rstd, const float* x, const float* w, float eps, int64_t n, int64_t d);
  void (*rmsnorm_bwd)(float* dx, float* dw_partial, const float* dy, const float* x, const float* rstd, const float* w,
                      int64_t n, int64_t d);
  // One head of n tokens: x rows ldx apart -> y rows (slot[t] or t) ldy apart. w null: rotation only.
  void (*norm_rope_fwd)(float* y, int64_t ldy, const int64_t* slots, const float* x, int64_t ldx, const float* w,
                        const float* cos, const float* sin, const int32_t* positions, float eps, int64_t n, int d_head);
  void (*norm_rope_bwd)(float* dx, int64_t lddx, float* dw_partial, const float* x, int64_t ldx, const float* w,
                        const float* cos, const float* sin, const int32_t* positions, float eps, int64_t n, int d_head);
  void (*swiglu_fwd)(float* act, const float* gate_up, int64_t n, int64_t f);
  void (*swiglu_bwd)(float* dgate_up, const float* dact, const float* gate_up, int64_t n, int64_t f);
  void (*logprob_fwd)(float* logp, float* lse, const float* logits, const int32_t* targets, int64_t n, int64_t v);
  void (*logprob_bwd)(float* logits, const float* lse, const float* g, const int32_t* targets, int64_t n, int64_t v);
  // Scores of one query row over keys [0, n_valid): s becomes exp(s - max), s[n_valid..n) = 0; returns lse and 1/sum.
  void (*softmax_row)(float* s, int64_t n_valid, int64_t n, float* lse, float* inv_sum);
  // p = exp(s - lse) for valid keys, ds = p * (dp - delta) * scale; both 0 beyond. s holds p, dp holds ds afterwards.
  void (*softmax_row_bwd)(float* s, float* dp, float lse, float delta, float scale, int64_t n_valid, int64_t n);
  float (*dot)(const float* a, const float* b, int64_t n);
  void (*axpy)(float* y, float a, const float* x, int64_t n);  // y += a x
  void (*scale)(float* y, float a, int64_t n);
  void (*gemv)(float* y, const float* w, const float* x, int64_t rows, int64_t k, bool accumulate);  // y[rows] = w x
  void (*to_bf16)(uint16_t* y, const float* x, int64_t n);
  void (*adamw)(float* p, const float* g, float* m, float* v, const AdamWStep& a, int64_t n);
  double (*sum_sq)(const float* x, int64_t n);
};

namespace scalar {
extern const SimdTable table;
}
#ifdef MM_X86
namespace avx2 {
extern const SimdTable table;
}
namespace avx512 {
extern const SimdTable table;
}
#endif

}  // namespace mm
