// Row kernels for normalisation, rotary embedding and SwiGLU. Memory-bound: each reads and writes its rows once, the
// rest stays in L1. Formulas: RMSNorm (Zhang and Sennrich 2019), RoPE in the half-split form of HF (Su et al. 2021).
#include "kernels/cpu/simd/rows.h"

#include "kernels/cpu/simd/simd_math.h"

namespace mm::MM_ISA {

static inline float mean_square(const float* x, int64_t d) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < d; i++) s += x[i] * x[i];
  return s / static_cast<float>(d);
}

void rmsnorm_fwd(float* y, float* rstd, const float* x, const float* w, float eps, int64_t n, int64_t d) {
  for (int64_t t = 0; t < n; t++) {
    const float* xr = x + t * d;
    float* yr = y + t * d;
    const float r = 1.0f / __builtin_sqrtf(mean_square(xr, d) + eps);
#pragma omp simd
    for (int64_t i = 0; i < d; i++) yr[i] = xr[i] * r * w[i];
    if (rstd) rstd[t] = r;
  }
}

// dx += rstd * (w dy - xhat * mean(w dy xhat)); dw += dy xhat, xhat = x rstd
void rmsnorm_bwd(float* dx, float* dw, const float* dy, const float* x, const float* rstd, const float* w, int64_t n,
                 int64_t d) {
  for (int64_t t = 0; t < n; t++) {
    const float *dyr = dy + t * d, *xr = x + t * d;
    float* dxr = dx + t * d;
    const float r = rstd[t];
    float c = 0;
#pragma omp simd reduction(+ : c)
    for (int64_t i = 0; i < d; i++) c += dyr[i] * w[i] * xr[i];
    c = c * r * r / static_cast<float>(d);
#pragma omp simd
    for (int64_t i = 0; i < d; i++) {
      dxr[i] += r * (dyr[i] * w[i] - xr[i] * c);
      dw[i] += dyr[i] * xr[i] * r;
    }
  }
}

void norm_rope_fwd(float* y, int64_t ldy, const int64_t* slots, const float* x, int64_t ldx, const float* w,
                   const float* cos, const float* sin, const int32_t* positions, float eps, int64_t n, int d_head) {
  const int half = d_head / 2;
  for (int64_t t = 0; t < n; t++) {
    const float* xr = x + t * ldx;
    float* yr = y + (slots ? slots[t] : t) * ldy;
    const float *c = cos + static_cast<int64_t>(positions[t]) * half,
                *s = sin + static_cast<int64_t>(positions[t]) * half;
    if (w) {
      const float r = 1.0f / __builtin_sqrtf(mean_square(xr, d_head) + eps);
#pragma omp simd
      for (int i = 0; i < half; i++) {
        const float a = xr[i] * r * w[i], b = xr[i + half] * r * w[i + half];
        yr[i] = a * c[i] - b * s[i];
        yr[i + half] = b * c[i] + a * s[i];
      }
    } else {
#pragma omp simd
      for (int i = 0; i < half; i++) {
        const float a = xr[i], b = xr[i + half];
        yr[i] = a * c[i] - b * s[i];
        yr[i + half] = b * c[i] + a * s[i];
      }
    }
  }
}

void norm_rope_bwd(float* dx, int64_t lddx, float* dw, const float* x, int64_t ldx, const float* w, const float* cos,
                   const float* sin, const int32_t* positions, float eps, int64_t n, int d_head) {
  const int half = d_head / 2;
  for (int64_t t = 0; t < n; t++) {
    const float* xr = x + t * ldx;
    float* dr = dx + t * lddx;
    const float *c = cos + static_cast<int64_t>(positions[t]) * half,
                *s = sin + static_cast<int64_t>(positions[t]) * half;
#pragma omp simd
    for (int i = 0; i < half; i++) {  // the inverse rotation
      const float a = dr[i], b = dr[i + half];
      dr[i] = a * c[i] + b * s[i];
      dr[i + half] = b * c[i] - a * s[i];
    }
    if (!w) continue;
    const float r = 1.0f / __builtin_sqrtf(mean_square(xr, d_head) + eps);
    float m = 0;
#pragma omp simd reduction(+ : m)
    for (int i = 0; i < d_head; i++) m += dr[i] * w[i] * xr[i];
    m = m * r * r / static_cast<float>(d_head);
#pragma omp simd
    for (int i = 0; i < d_head; i++) {
      dw[i] += dr[i] * xr[i] * r;
      dr[i] = r * (dr[i] * w[i] - xr[i] * m);
    }
  }
}

void swiglu_fwd(float* act, const float* gate_up, int64_t n, int64_t f) {
  for (int64_t t = 0; t < n; t++) {
    const float *g = gate_up + t * 2 * f, *u = g + f;
    float* a = act + t * f;
#pragma omp simd
    for (int64_t i = 0; i < f; i++) a[i] = g[i] * sigmoid_f32(g[i]) * u[i];
  }
}

// d silu(g)/dg = s (1 + g (1 - s)), s = sigmoid(g)
void swiglu_bwd(float* dgate_up, const float* dact, const float* gate_up, int64_t n, int64_t f) {
  for (int64_t t = 0; t < n; t++) {
    const float *g = gate_up + t * 2 * f, *u = g + f, *da = dact + t * f;
    float *dg = dgate_up + t * 2 * f, *du = dg + f;
#pragma omp simd
    for (int64_t i = 0; i < f; i++) {
      const float gi = g[i], ui = u[i], s = sigmoid_f32(gi);  // read before writing: dgate_up may be gate_up itself
      du[i] = da[i] * gi * s;
      dg[i] = da[i] * ui * s * (1.0f + gi * (1.0f - s));
    }
  }
}

}  // namespace mm::MM_ISA
