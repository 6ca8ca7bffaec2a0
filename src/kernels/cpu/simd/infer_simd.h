// The portable kernels of the inference step, in the namespace of the instruction set being compiled (see simd.h).
#pragma once

#include "kernels/cpu/infer_kernels.h"

namespace mm::MM_ISA {

void infer_norm_row(float* y, const float* x, const float* w, float eps, int64_t d);
void infer_swiglu(float* act, const float* gate, const float* up, int64_t n);
void infer_rope_head(float* y, const float* x, const float* w, const float* cos, const float* sin, float eps,
                     int d_head);
void infer_put_kv(KvFormat format, void* to, float* scale, const float* x, int64_t n);
void infer_put_bf16(uint16_t* row_base, const float* x, int64_t begin, int64_t n);
void infer_put_q8(int8_t* row, const float* x, int64_t begin, int64_t n, int64_t kp);
void infer_bf16_row(float* y, const uint16_t* x, int64_t n);

void few_f32(float* out, int64_t ldo, const float* w, int64_t k, int64_t panels, const float* x, int64_t ldx, int64_t m,
             const WeightStream& stream);
void few_bf16(float* out, int64_t ldo, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x, int64_t m,
              const WeightStream& stream);
void few_i8(float* out, int64_t ldo, const uint8_t* w, int64_t kp, int64_t panels, const int8_t* x, int64_t ldx,
            int64_t m, const WeightStream& stream);
void expand_i8(uint16_t* tiles, const uint8_t* w, int64_t kp);
void many_bf16(float* c, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b0, const uint16_t* b1,
               const uint16_t* next);
void many_f32(float* c, const float* a, int64_t lda, int64_t k, int64_t rows, const float* b0, const float* b1);
void attend(const AttendArgs& a);

static inline float f32_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
static inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
static inline float bf16_to_f32(uint16_t x) { return f32_of(static_cast<uint32_t>(x) << 16); }
// Round to nearest even; NaN becomes a quiet NaN.
static inline uint16_t f32_to_bf16(float x) {
  const uint32_t u = bits_of(x), rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40u) : rounded);
}
static inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent's bias; it also makes subnormals right, infinities and NaN need their own.
  const float scaled = f32_of(rest) * 0x1p112f;
  const uint32_t bits = (h & 0x7c00u) == 0x7c00u ? (rest | 0x7f800000u) : bits_of(scaled);
  return f32_of(sign | bits);
}
static inline uint16_t f32_to_f16(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (a < 0x38800000u) {                                               // subnormal: the addition rounds to its grid
    return static_cast<uint16_t>(sign | (bits_of(f32_of(a) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13));
}

}  // namespace mm::MM_ISA
