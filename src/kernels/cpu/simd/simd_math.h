// exp and friends that vectorise, in the namespace of the instruction set being compiled.
#pragma once

#include <stdint.h>

namespace mm::MM_ISA {

// exp(x) to about 1 ulp for x in [-87.3, 88.37]; below it is 0, above it is +inf (2^128), NaN stays NaN.
// Range reduction x = n ln2 + r, then a degree-6 polynomial on |r| <= ln2/2 (coefficients: Cephes expf).
static inline float exp_f32(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // adds 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (__builtin_bit_cast(int32_t, shifted) - 0x4b400000 + 127) << 23;
  const float e = p * __builtin_bit_cast(float, bits);
  return x < -87.3f ? 0.0f : e;
}

static inline float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

}  // namespace mm::MM_ISA
