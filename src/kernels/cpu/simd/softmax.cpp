// Softmax rows of the LM head and of attention.
#include "kernels/cpu/simd/rows.h"
#include "kernels/cpu/simd/simd_math.h"

namespace mm::MM_ISA {

static inline float row_max(const float* x, int64_t n) {
  float m = -__builtin_inff();
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : m;
  return m;
}

void logprob_fwd(float* logp, float* lse, const float* logits, const int32_t* targets, int64_t n, int64_t v) {
  for (int64_t t = 0; t < n; t++) {
    const float* x = logits + t * v;
    const float m = row_max(x, v);
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < v; i++) s += exp_f32(x[i] - m);
    const float log_s = __builtin_logf(s);
    lse[t] = m + log_s;
    logp[t] = x[targets[t]] - m - log_s;  // not x - lse: a value near 0 would carry the rounding of a large lse
  }
}

void logprob_bwd(float* logits, const float* lse, const float* g, const int32_t* targets, int64_t n, int64_t v) {
  for (int64_t t = 0; t < n; t++) {
    float* x = logits + t * v;
    const float l = lse[t], gt = g[t];
#pragma omp simd
    for (int64_t i = 0; i < v; i++) x[i] = -gt * exp_f32(x[i] - l);
    x[targets[t]] += gt;
  }
}

void softmax_row(float* s, int64_t n_valid, int64_t n, float* lse, float* inv_sum) {
  const float m = row_max(s, n_valid);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n_valid; i++) {
    const float e = exp_f32(s[i] - m);
    s[i] = e;
    sum += e;
  }
  for (int64_t i = n_valid; i < n; i++) s[i] = 0;
  if (lse) *lse = m + __builtin_logf(sum);
  *inv_sum = 1.0f / sum;
}

void softmax_row_bwd(float* s, float* dp, float lse, float delta, float scale_, int64_t n_valid, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n_valid; i++) {
    const float p = exp_f32(s[i] - lse);
    s[i] = p;
    dp[i] = p * (dp[i] - delta) * scale_;
  }
  for (int64_t i = n_valid; i < n; i++) s[i] = dp[i] = 0;
}

}  // namespace mm::MM_ISA
