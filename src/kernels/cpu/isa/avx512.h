// Helpers of the AVX-512 units. All functions are static: every unit that includes this keeps code for its own
// instruction set.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu/infer_kernels.h"

namespace mm {

#define MM_INLINE static inline __attribute__((always_inline))

MM_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1u);
}

// exp as simd_math.h computes it.
MM_INLINE __m512 exp_ps(__m512 x) {
  const __m512 low = _mm512_set1_ps(-87.3f);
  const __mmask16 vanish = _mm512_cmp_ps_mask(x, low, _CMP_LT_OQ);
  // min and max return their second operand where one is NaN, so NaN stays.
  const __m512 c = _mm512_max_ps(low, _mm512_min_ps(_mm512_set1_ps(88.7f), x));
  const __m512 n =
      _mm512_roundscale_ps(_mm512_mul_ps(c, _mm512_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT);
  const __m512 r =
      _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), c));
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(static_cast<__mmask16>(~vanish), p, n);
}

// 2^x, relative error 1.6e-7 (a polynomial of degree 5 fitted to 2^r, |r| <= 1/2); 0 below 2^-149, NaN stays.
MM_INLINE __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // -infinity would make r NaN
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.3264726760e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6715127159e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5507337446e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022242084e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314697760e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Two bf16 a lane, the even and the odd one of each pair, as floats.
MM_INLINE __m512 even_bf16(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
MM_INLINE __m512 odd_bf16(__m512i x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
MM_INLINE __m512 widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Round to nearest even; NaN becomes a quiet NaN.
MM_INLINE __m256i narrow_bf16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(rounded, nan, _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40))));
}

// r[i] lane j <-> r[j] lane i, 32-bit lanes.
MM_INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4 g + c], 128-bit lane b: rows 4 g .. 4 g + 3 of column 4 b + c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd),
                  d = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88),
                  e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

// The place in a stream of weights that lies `infer_ahead` of p. Weights of a decode step come from beyond L2, and the
// hardware's prefetcher stops at every 4 KB page.
MM_INLINE const char* ahead_of(const void* p, const WeightStream& stream) {
  const char* q = static_cast<const char*>(p) + infer_ahead;
  return q < stream.end ? q : stream.next + (q - stream.end);
}
// The same for S streams side by side: p's own goes on for `left` bytes, and behind all S of `size` bytes come the next
// S. All together ask for no more than one would.
template <int S>
MM_INLINE const char* ahead_of_streams(const void* p, int64_t left, int64_t size, const WeightStream& stream) {
  const char* q = static_cast<const char*>(p) + infer_ahead / S + (infer_ahead / S < left ? 0 : (S - 1) * size);
  return q < stream.end ? q : stream.next + (q - stream.end);
}
// Into L2: what goes to L1 keeps one of its few fill buffers for as long as memory takes (64M bf16, one core: 109
// tokens a second with T0, 160 with T1; with weights in the last-level cache no difference).
MM_INLINE void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

MM_INLINE __m512i set1_quad(const void* four_bytes) {
  int32_t v;
  __builtin_memcpy(&v, four_bytes, 4);
  return _mm512_set1_epi32(v);
}

}  // namespace mm
