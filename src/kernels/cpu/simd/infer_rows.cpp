// Row kernels of the inference step: norms, rotation, SwiGLU, and the conversion of rows to operands and to the formats
// of keys and values.
#include "kernels/cpu/simd/infer_simd.h"
#include "kernels/cpu/simd/rows.h"
#include "kernels/cpu/simd/simd_math.h"

namespace mm::MM_ISA {

static inline float inv_rms(const float* x, float eps, int64_t d) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < d; i++) s += x[i] * x[i];
  return 1.0f / __builtin_sqrtf(s / static_cast<float>(d) + eps);
}

void infer_norm_row(float* y, const float* x, const float* w, float eps, int64_t d) {
  const float r = inv_rms(x, eps, d);
#pragma omp simd
  for (int64_t i = 0; i < d; i++) y[i] = x[i] * r * w[i];
}

static void weigh(float* h, float* squares, const float* x, const float* w, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t j = i; j < i + 32; j++) s += x[j] * x[j];
    squares[i / 32] = s;
#pragma omp simd
    for (int64_t j = i; j < i + 32; j++) h[j] = x[j] * w[j];
  }
}

void infer_swiglu(float* act, const float* gate, const float* up, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) act[i] = gate[i] * sigmoid_f32(gate[i]) * up[i];
}

void infer_rope_head(float* y, const float* x, const float* w, const float* cos, const float* sin, float eps,
                     int d_head) {
  const int half = d_head / 2;
  if (w != nullptr) {
    const float r = inv_rms(x, eps, d_head);
#pragma omp simd
    for (int i = 0; i < half; i++) {
      const float a = x[i] * r * w[i], b = x[i + half] * r * w[i + half];
      y[i] = a * cos[i] - b * sin[i];
      y[i + half] = b * cos[i] + a * sin[i];
    }
  } else {
#pragma omp simd
    for (int i = 0; i < half; i++) {
      const float a = x[i], b = x[i + half];
      y[i] = a * cos[i] - b * sin[i];
      y[i + half] = b * cos[i] + a * sin[i];
    }
  }
}

// Scale absmax / 127; NaN where a value is not a number (max alone would lose it).
static inline float i8_scale(const float* x, int64_t n) {
  uint32_t top = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t u = bits_of(x[i]) & 0x7fffffffu;  // NaN is above infinity
    top = u > top ? u : top;
  }
  return f32_of(top) * (1.0f / 127.0f);
}

static inline int32_t i8_round(float x, float inv) {
  const float q = x * inv;
  if (!(q > -127.0f)) return q == q ? -127 : 0;
  if (q > 127.0f) return 127;
  return static_cast<int32_t>(bits_of(q + 12582912.0f) - 0x4b400000u);  // nearest even
}

void infer_put_kv(KvFormat format, void* to, float* scale, const float* x, int64_t n) {
  switch (format) {
    case KvFormat::f32:
      for (int64_t i = 0; i < n; i++) static_cast<float*>(to)[i] = x[i];
      break;
    case KvFormat::bf16:
      for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(to)[i] = f32_to_bf16(x[i]);
      break;
    case KvFormat::f16:
      for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(to)[i] = f32_to_f16(x[i]);
      break;
    case KvFormat::i8: {
      const float s = i8_scale(x, n), inv = s > 0 ? 1.0f / s : 0.0f;
      for (int64_t i = 0; i < n; i++) static_cast<int8_t*>(to)[i] = static_cast<int8_t>(i8_round(x[i], inv));
      *scale = s;
      break;
    }
  }
}

void infer_put_bf16(uint16_t* row_base, const float* x, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    uint16_t* to = row_base + (begin + i) / 32 * infer_tile;
    const int64_t m = n - i < 32 ? n - i : 32;
    for (int64_t j = 0; j < m; j++) to[j] = f32_to_bf16(x[i + j]);
    for (int64_t j = m; j < 32; j++) to[j] = 0;
  }
}

void infer_put_q8(int8_t* row, const float* x, int64_t begin, int64_t n, int64_t kp) {
  float* scales = reinterpret_cast<float*>(row + kp);
  int32_t* corrections = reinterpret_cast<int32_t*>(row + kp + kp / 32 * 4);
  for (int64_t i = 0; i < n; i += 32) {
    int8_t* to = row + begin + i;
    const int64_t m = n - i < 32 ? n - i : 32;
    const float s = i8_scale(x + i, m), inv = s > 0 ? 1.0f / s : 0.0f;
    int32_t sum = 0;
    for (int64_t j = 0; j < m; j++) {
      const int32_t q = i8_round(x[i + j], inv);
      to[j] = static_cast<int8_t>(q);
      sum += q;
    }
    for (int64_t j = m; j < 32; j++) to[j] = 0;
    scales[(begin + i) / 32] = s;
    corrections[(begin + i) / 32] = -128 * sum;
  }
}

void infer_bf16_row(float* y, const uint16_t* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = bf16_to_f32(x[i]);
}

static void add_row(float* y, const float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

static void merge_parts(float* out, const float* const* parts, int n_part, int64_t group, int64_t d_head) {
  constexpr float infinity = __builtin_inff();
  for (int64_t h = 0; h < group; h++, out += d_head) {
    const int64_t at = h * (d_head + 2);
    float top = -infinity, sum = 0;
    for (int i = 0; i < n_part; i++) top = parts[i][at + d_head] > top ? parts[i][at + d_head] : top;
    const float shift = top == -infinity ? 0.0f : top;
    for (int64_t d = 0; d < d_head; d++) out[d] = 0;
    for (int i = 0; i < n_part; i++) {
      const float* x = parts[i] + at;
      const float weight = x[d_head] == shift ? 1.0f : exp_f32(x[d_head] - shift);
      sum += weight * x[d_head + 1];
#pragma omp simd
      for (int64_t d = 0; d < d_head; d++) out[d] += weight * x[d];
    }
    const float inv = 1.0f / sum;
#pragma omp simd
    for (int64_t d = 0; d < d_head; d++) out[d] *= inv;
  }
}

static int64_t first_largest(const float* x, int64_t n, float* value) {
  constexpr float infinity = __builtin_inff();
  float top = -infinity;
  int bad = 0;
#pragma omp simd reduction(max : top) reduction(| : bad)
  for (int64_t i = 0; i < n; i++) {
    top = x[i] > top ? x[i] : top;
    bad |= !(x[i] < infinity);
  }
  *value = bad != 0 ? __builtin_nanf("") : top;
  for (int64_t i = 0; bad == 0 && i < n; i += 64) {
    const int64_t end = n - i < 64 ? n : i + 64;
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t j = i; j < end; j++) found |= x[j] == top;
    for (int64_t j = i; found != 0 && j < end; j++)
      if (x[j] == top) return j;
  }
  return 0;
}

static void nothing() {}

extern const InferKernels infer_kernels;  // NOLINT(readability-redundant-declaration): const alone would be internal
const InferKernels infer_kernels = {
    .norm_row = infer_norm_row,
    .weigh = weigh,
    .swiglu = infer_swiglu,
    .rope_head = infer_rope_head,
    .add = add_row,
    .axpy = axpy,
    .merge_parts = merge_parts,
    .put_kv = infer_put_kv,
    .put_bf16 = infer_put_bf16,
    .put_q8 = infer_put_q8,
    .bf16_row = infer_bf16_row,
    .first_largest = first_largest,
    .few_f32 = few_f32,
    .few_bf16 = few_bf16,
    .few_i8 = few_i8,
    .expand_i8 = expand_i8,
    .many_bf16 = many_bf16,
    .many_f32 = many_f32,
    .attend = attend,
    .attend_bf16 = attend,
    .attend_few = nullptr,
    .attend_few_bf16 = nullptr,
    .begin_thread = nothing,
    .end_thread = nothing,
    .few_rows_i8 = 8,
    .few_rows_bf16 = 4,
};

}  // namespace mm::MM_ISA
