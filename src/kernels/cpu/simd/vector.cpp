// Vector kernels: dot products, matrix times vector for single-token steps, bf16 conversion, AdamW, sum of squares.
// Also the table that hands all row kernels of this instruction set to the drivers.
#include "kernels/cpu/simd/rows.h"

namespace mm::MM_ISA {

float dot(const float* a, const float* b, int64_t n) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
  return s;
}

void axpy(float* y, float a, const float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

void scale(float* y, float a, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] *= a;
}

// Four rows share each load of x; the weights stream through once (bytes = 4 rows k).
void gemv(float* y, const float* w, const float* x, int64_t rows, int64_t k, bool accumulate) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float *w0 = w + r * k, *w1 = w0 + k, *w2 = w1 + k, *w3 = w2 + k;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < k; i++) {
      s0 += w0[i] * x[i];
      s1 += w1[i] * x[i];
      s2 += w2[i] * x[i];
      s3 += w3[i] * x[i];
    }
    if (accumulate) y[r] += s0, y[r + 1] += s1, y[r + 2] += s2, y[r + 3] += s3;
    else y[r] = s0, y[r + 1] = s1, y[r + 2] = s2, y[r + 3] = s3;
  }
  for (; r < rows; r++) {
    const float s = dot(w + r * k, x, k);
    y[r] = accumulate ? y[r] + s : s;
  }
}

// Round to nearest even; NaN becomes a quiet NaN.
void to_bf16(uint16_t* y, const float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const uint32_t u = __builtin_bit_cast(uint32_t, x[i]);
    const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    y[i] = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40u) : rounded);
  }
}

// AdamW as torch.optim.AdamW computes it (Loshchilov and Hutter 2019).
void adamw(float* p, const float* g, float* m, float* v, const AdamWStep& a, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float gi = g[i] * a.grad_scale;
    const float mi = a.beta1 * m[i] + a.one_minus_beta1 * gi;
    const float vi = a.beta2 * v[i] + a.one_minus_beta2 * gi * gi;
    m[i] = mi;
    v[i] = vi;
    p[i] = p[i] * a.keep - a.step_size * mi / (__builtin_sqrtf(vi) * a.inv_sqrt_correction2 + a.eps);
  }
}

double sum_sq(const float* x, int64_t n) {
  double s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; i++) s += static_cast<double>(x[i]) * x[i];
  return s;
}

extern const SimdTable table;  // NOLINT(readability-redundant-declaration): const alone would be internal
const SimdTable table = {
    .rmsnorm_fwd = rmsnorm_fwd,
    .rmsnorm_bwd = rmsnorm_bwd,
    .norm_rope_fwd = norm_rope_fwd,
    .norm_rope_bwd = norm_rope_bwd,
    .swiglu_fwd = swiglu_fwd,
    .swiglu_bwd = swiglu_bwd,
    .logprob_fwd = logprob_fwd,
    .logprob_bwd = logprob_bwd,
    .softmax_row = softmax_row,
    .softmax_row_bwd = softmax_row_bwd,
    .dot = dot,
    .axpy = axpy,
    .scale = scale,
    .gemv = gemv,
    .to_bf16 = to_bf16,
    .adamw = adamw,
    .sum_sq = sum_sq,
};

}  // namespace mm::MM_ISA
