// Kernels for AVX-512 F, BW, DQ, VL: row conversions for every machine with AVX-512, and products in fp32 for weights
// in fp32 and for machines without BF16 and VNNI instructions.
#include "kernels/cpu/isa/avx512.h"
#include "kernels/cpu/isa/infer_isa.h"

namespace mm {

namespace {

void norm_row(float* y, const float* x, const float* w, float eps, int64_t d) {
  __m512 s[4] = {};
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
      s[j] = _mm512_fmadd_ps(v, v, s[j]);
    }
  }
  for (; i < d; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(first_lanes(d - i), x + i);
    s[0] = _mm512_fmadd_ps(v, v, s[0]);
  }
  const float sum = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
  const __m512 r = _mm512_set1_ps(1.0f / __builtin_sqrtf(sum / static_cast<float>(d) + eps));
  for (i = 0; i < d; i += 16) {
    const __mmask16 m = first_lanes(d - i);
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), r);
    _mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, w + i)));
  }
}

void put_bf16(uint16_t* row_base, const float* x, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    uint16_t* to = row_base + (begin + i) / 32 * infer_tile;
    const __m512 lo = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
    const __m512 hi = n - i > 16 ? _mm512_maskz_loadu_ps(first_lanes(n - i - 16), x + i + 16) : _mm512_setzero_ps();
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow_bf16(lo));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), narrow_bf16(hi));
  }
}

// Largest absolute value as bits, in which NaN is above infinity, so it is not lost.
MM_INLINE __m512i abs_bits(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }

void put_q8(int8_t* row, const float* x, int64_t begin, int64_t n, int64_t kp) {
  float* scales = reinterpret_cast<float*>(row + kp) + begin / 32;
  int32_t* corrections = reinterpret_cast<int32_t*>(row + kp + kp / 32 * 4) + begin / 32;
  for (int64_t i = 0; i < n; i += 32, scales++, corrections++) {
    const __m512 lo = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
    const __m512 hi = n - i > 16 ? _mm512_maskz_loadu_ps(first_lanes(n - i - 16), x + i + 16) : _mm512_setzero_ps();
    const uint32_t top = _mm512_reduce_max_epu32(_mm512_max_epu32(abs_bits(lo), abs_bits(hi)));
    const float s = __builtin_bit_cast(float, top) * (1.0f / 127.0f);
    const __m512 inv = _mm512_set1_ps(s > 0 ? 1.0f / s : 0.0f);
    const __m512i q_lo = _mm512_cvtps_epi32(_mm512_mul_ps(lo, inv)), q_hi = _mm512_cvtps_epi32(_mm512_mul_ps(hi, inv));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + begin + i), _mm512_cvtsepi32_epi8(q_lo));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + begin + i + 16), _mm512_cvtsepi32_epi8(q_hi));
    *scales = s;
    const auto sum = static_cast<uint32_t>(_mm512_reduce_add_epi32(_mm512_add_epi32(q_lo, q_hi)));
    *corrections = static_cast<int32_t>(-128u * sum);  // wraps where a value was not a number; the scale is NaN then
  }
}

void put_kv(KvFormat format, void* to, float* scale, const float* x, int64_t n) {
  __m512 inv = _mm512_set1_ps(1.0f);
  if (format == KvFormat::i8) {
    __m512i top = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16)
      top = _mm512_max_epu32(top, abs_bits(_mm512_maskz_loadu_ps(first_lanes(n - i), x + i)));
    const float s = __builtin_bit_cast(float, _mm512_reduce_max_epu32(top)) * (1.0f / 127.0f);
    inv = _mm512_set1_ps(s > 0 ? 1.0f / s : 0.0f);
    *scale = s;
  }
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = first_lanes(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(m, x + i);
    switch (format) {
      case KvFormat::f32: _mm512_mask_storeu_ps(static_cast<float*>(to) + i, m, v); break;
      case KvFormat::bf16: _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + i, m, narrow_bf16(v)); break;
      case KvFormat::f16:
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + i, m, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        break;
      case KvFormat::i8:
        _mm_mask_storeu_epi8(static_cast<int8_t*>(to) + i, m,
                             _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(v, inv))));
        break;
    }
  }
}

void bf16_row(float* y, const uint16_t* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = first_lanes(n - i);
    _mm512_mask_storeu_ps(y + i, m, widen_bf16(_mm256_maskz_loadu_epi16(m, x + i)));
  }
}

// R rows with one or two panels; the sums of a row run along k in order whatever R and P.
template <int R, int P>
void block_f32(float* c, int64_t ldc, const float* a, int64_t lda, int64_t k, const float* b0, const float* b1) {
  __m512 acc[R][P] = {};
  for (int64_t i = 0; i < k; i++) {
    __m512 w[P];
    w[0] = _mm512_loadu_ps(b0 + i * 16);
    if (P > 1) w[P - 1] = _mm512_loadu_ps(b1 + i * 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const __m512 x = _mm512_set1_ps(a[r * lda + i]);
#pragma GCC unroll 2
      for (int p = 0; p < P; p++) acc[r][p] = _mm512_fmadd_ps(x, w[p], acc[r][p]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) _mm512_storeu_ps(c + r * ldc + p * 16, acc[r][p]);
}

template <int P>
void rows_f32(float* c, int64_t ldc, const float* a, int64_t lda, int64_t k, int64_t rows, const float* b0,
              const float* b1) {
  for (; rows >= 8; rows -= 8, a += 8 * lda, c += 8 * ldc) block_f32<8, P>(c, ldc, a, lda, k, b0, b1);
  if (rows >= 4) block_f32<4, P>(c, ldc, a, lda, k, b0, b1), rows -= 4, a += 4 * lda, c += 4 * ldc;
  if (rows >= 2) block_f32<2, P>(c, ldc, a, lda, k, b0, b1), rows -= 2, a += 2 * lda, c += 2 * ldc;
  if (rows >= 1) block_f32<1, P>(c, ldc, a, lda, k, b0, b1);
}

void many_f32(float* c, const float* a, int64_t lda, int64_t k, int64_t rows, const float* b0, const float* b1) {
  if (b1 != nullptr) rows_f32<2>(c, 32, a, lda, k, rows, b0, b1);
  else rows_f32<1>(c, 32, a, lda, k, rows, b0, b0);
}

// One row: its sums run in 4 vectors, so that latency hides behind 4 chains.
void few_f32_1(float* out, const float* w, int64_t k, int64_t panels, const float* x, const WeightStream& stream) {
  for (int64_t p = 0; p < panels; p++) {
    __m512 acc[4] = {};
    int64_t i = 0;
    for (; i + 4 <= k; i += 4, w += 64) {
      const char* soon = ahead_of(w, stream);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        prefetch(soon + 64 * j);
        acc[j] = _mm512_fmadd_ps(_mm512_set1_ps(x[i + j]), _mm512_loadu_ps(w + 16 * j), acc[j]);
      }
    }
    for (; i < k; i++, w += 16) acc[0] = _mm512_fmadd_ps(_mm512_set1_ps(x[i]), _mm512_loadu_ps(w), acc[0]);
    _mm512_storeu_ps(out + p * 16, _mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])));
  }
}

void few_f32(float* out, int64_t ldo, const float* w, int64_t k, int64_t panels, const float* x, int64_t ldx, int64_t m,
             const WeightStream& stream) {
  if (m == 1) {
    few_f32_1(out, w, k, panels, x, stream);
    return;
  }
  int64_t p = 0;
  for (; p + 2 <= panels; p += 2) rows_f32<2>(out + p * 16, ldo, x, ldx, k, m, w + p * k * 16, w + (p + 1) * k * 16);
  if (p < panels) rows_f32<1>(out + p * 16, ldo, x, ldx, k, m, w + p * k * 16, w + p * k * 16);
}

// bf16 pairs by fp32: the even and the odd halves of a pair in turn.
template <int R, int P>
void block_bf16(float* c, int64_t ldc, const uint16_t* a, int64_t kp, const uint16_t* b0, const uint16_t* b1) {
  __m512 acc[R][P] = {};
  for (int64_t t = 0; t < kp / 32; t++, a += infer_tile, b0 += infer_tile, b1 += infer_tile) {
    for (int i = 0; i < 16; i++) {
      __m512i w[P];
      w[0] = _mm512_loadu_si512(b0 + i * 32);
      if (P > 1) w[P - 1] = _mm512_loadu_si512(b1 + i * 32);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i x = set1_quad(a + r * 32 + 2 * i);
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
          acc[r][p] = _mm512_fmadd_ps(even_bf16(x), even_bf16(w[p]), acc[r][p]);
          acc[r][p] = _mm512_fmadd_ps(odd_bf16(x), odd_bf16(w[p]), acc[r][p]);
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) _mm512_storeu_ps(c + r * ldc + p * 16, acc[r][p]);
}

template <int P>
void rows_bf16(float* c, int64_t ldc, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b0,
               const uint16_t* b1) {
  for (int64_t r = 0; r < rows;) {
    const uint16_t* x = a + r / 16 * kp * 16 + r % 16 * 32;
    const int64_t left = rows - r, n = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (n == 4) block_bf16<4, P>(c + r * ldc, ldc, x, kp, b0, b1);
    else if (n == 2) block_bf16<2, P>(c + r * ldc, ldc, x, kp, b0, b1);
    else block_bf16<1, P>(c + r * ldc, ldc, x, kp, b0, b1);
    r += n;
  }
}

void many_bf16(float* c, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b0, const uint16_t* b1,
               const uint16_t* /*next*/) {
  if (b1 != nullptr) rows_bf16<2>(c, 32, a, kp, rows, b0, b1);
  else rows_bf16<1>(c, 32, a, kp, rows, b0, b0);
}

void few_bf16_1(float* out, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x,
                const WeightStream& stream) {
  for (int64_t p = 0; p < panels; p++) {
    __m512 even[2] = {}, odd[2] = {};
    for (int64_t t = 0; t < kp / 32; t++, w += infer_tile) {
      const char* soon = ahead_of(w, stream);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        prefetch(soon + i * 64);
        const __m512i v = _mm512_loadu_si512(w + i * 32), a = set1_quad(x + t * infer_tile + 2 * i);
        even[i % 2] = _mm512_fmadd_ps(even_bf16(a), even_bf16(v), even[i % 2]);
        odd[i % 2] = _mm512_fmadd_ps(odd_bf16(a), odd_bf16(v), odd[i % 2]);
      }
    }
    _mm512_storeu_ps(out + p * 16, _mm512_add_ps(_mm512_add_ps(even[0], even[1]), _mm512_add_ps(odd[0], odd[1])));
  }
}

void few_bf16(float* out, int64_t ldo, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x, int64_t m,
              const WeightStream& stream) {
  if (m == 1) {
    few_bf16_1(out, w, kp, panels, x, stream);
    return;
  }
  int64_t p = 0;
  const int64_t panel = kp * 16;
  for (; p + 2 <= panels; p += 2) rows_bf16<2>(out + p * 16, ldo, x, kp, m, w + p * panel, w + (p + 1) * panel);
  if (p < panels) rows_bf16<1>(out + p * 16, ldo, x, kp, m, w + p * panel, w + p * panel);
}

// Without VNNI: bytes 0 and 2, and 1 and 3, of every quad as pairs of 16-bit numbers.
template <int M>
void few_i8_m(float* out, int64_t ldo, const uint8_t* w, int64_t kp, int64_t panels, const int8_t* x, int64_t ldx,
              const WeightStream& stream) {
  const __m512i low = _mm512_set1_epi16(255);
  for (int64_t p = 0; p < panels; p++) {
    __m512 acc[M] = {};
    for (int64_t g = 0; g < kp / 32; g++) {
      const uint8_t* group = w + g / 2 * infer_i8_block + g % 2 * 512;
      const char* soon = ahead_of(group, stream);
      const __m512 ws = _mm512_cvtph_ps(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + g / 2 * infer_i8_block + 1024 + g % 2 * 32)));
      __m512i sum[M];
      for (int r = 0; r < M; r++)
        sum[r] = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(x + r * ldx + kp + kp / 32 * 4)[g]);
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {
        prefetch(soon + q * 64);
        const __m512i v = _mm512_loadu_si512(group + q * 64), even = _mm512_and_si512(v, low),
                      odd = _mm512_srli_epi16(v, 8);
#pragma GCC unroll 4
        for (int r = 0; r < M; r++) {
          const __m512i a = set1_quad(x + r * ldx + g * 32 + q * 4);
          sum[r] = _mm512_add_epi32(sum[r], _mm512_madd_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8)));
          sum[r] = _mm512_add_epi32(sum[r], _mm512_madd_epi16(odd, _mm512_srai_epi16(a, 8)));
        }
      }
      for (int r = 0; r < M; r++) {
        const float s = reinterpret_cast<const float*>(x + r * ldx + kp)[g];
        acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), _mm512_mul_ps(ws, _mm512_set1_ps(s)), acc[r]);
      }
    }
    for (int r = 0; r < M; r++) _mm512_storeu_ps(out + r * ldo + p * 16, acc[r]);
    w += kp / 64 * infer_i8_block;
  }
}

void few_i8(float* out, int64_t ldo, const uint8_t* w, int64_t kp, int64_t panels, const int8_t* x, int64_t ldx,
            int64_t m, const WeightStream& stream) {
  for (; m >= 4; m -= 4, out += 4 * ldo, x += 4 * ldx) few_i8_m<4>(out, ldo, w, kp, panels, x, ldx, stream);
  if (m >= 2) few_i8_m<2>(out, ldo, w, kp, panels, x, ldx, stream), m -= 2, out += 2 * ldo, x += 2 * ldx;
  if (m >= 1) few_i8_m<1>(out, ldo, w, kp, panels, x, ldx, stream);
}

void expand_i8(uint16_t* tiles, const uint8_t* w, int64_t kp) {
  const __m512i byte = _mm512_set1_epi32(255), offset = _mm512_set1_epi32(128);
  for (int64_t g = 0; g < kp / 32; g++, tiles += infer_tile) {
    const uint8_t* group = w + g / 2 * infer_i8_block + g % 2 * 512;
    const __m512 scale = _mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + g / 2 * infer_i8_block + 1024 + g % 2 * 32)));
    for (int q = 0; q < 8; q++) {
      const __m512i v = _mm512_loadu_si512(group + q * 64);
      const auto value = [&](__m512i x) {
        const __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(x, byte), offset)), scale);
        return _mm512_cvtepu16_epi32(narrow_bf16(f));
      };
      const __m512i x0 = value(v), x1 = value(_mm512_srli_epi32(v, 8)), x2 = value(_mm512_srli_epi32(v, 16)),
                    x3 = value(_mm512_srli_epi32(v, 24));
      _mm512_storeu_si512(tiles + q * 64, _mm512_or_si512(x0, _mm512_slli_epi32(x1, 16)));
      _mm512_storeu_si512(tiles + q * 64 + 32, _mm512_or_si512(x2, _mm512_slli_epi32(x3, 16)));
    }
  }
}

}  // namespace

void use_avx512(InferKernels* k) {
  k->norm_row = norm_row;
  k->put_bf16 = put_bf16;
  k->put_q8 = put_q8;
  k->put_kv = put_kv;
  k->bf16_row = bf16_row;
  k->few_f32 = few_f32;
  k->few_bf16 = few_bf16;
  k->few_i8 = few_i8;
  k->expand_i8 = expand_i8;
  k->many_bf16 = many_bf16;
  k->many_f32 = many_f32;
  k->attend = attend_avx512;
  k->attend_bf16 = attend_avx512;
  k->attend_few = attend_few_avx512;
  k->attend_few_bf16 = attend_few_avx512;
}

}  // namespace mm
