// Kernels for AVX2 with FMA and F16C. A panel's 16 rows are two vectors.
#include "kernels/cpu/isa/avx2.h"

namespace mm {

namespace {

void put_bf16(uint16_t* row_base, const float* x, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    uint16_t* to = row_base + (begin + i) / 32 * infer_tile;
    float whole[32];
    const float* from = x + i;
    if (n - i < 32) {
      __builtin_memset(whole, 0, sizeof whole);
      __builtin_memcpy(whole, from, static_cast<size_t>(n - i) * 4);
      from = whole;
    }
    for (int64_t j = 0; j < 32; j += 16) {
      const __m256i lo = narrow_bf16(_mm256_loadu_ps(from + j)), hi = narrow_bf16(_mm256_loadu_ps(from + j + 8));
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), both);
    }
  }
}

// R rows with one panel; the sums of a row run along k in order whatever R.
template <int R>
void block_f32(float* c, int64_t ldc, const float* a, int64_t lda, int64_t k, const float* b) {
  __m256 acc[R][2] = {};
  for (int64_t i = 0; i < k; i++) {
    const __m256 w0 = _mm256_loadu_ps(b + i * 16), w1 = _mm256_loadu_ps(b + i * 16 + 8);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m256 x = _mm256_set1_ps(a[r * lda + i]);
      acc[r][0] = _mm256_fmadd_ps(x, w0, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(x, w1, acc[r][1]);
    }
  }
  for (int r = 0; r < R; r++) {
    _mm256_storeu_ps(c + r * ldc, acc[r][0]);
    _mm256_storeu_ps(c + r * ldc + 8, acc[r][1]);
  }
}

void rows_f32(float* c, int64_t ldc, const float* a, int64_t lda, int64_t k, int64_t rows, const float* b) {
  for (; rows >= 6; rows -= 6, a += 6 * lda, c += 6 * ldc) block_f32<6>(c, ldc, a, lda, k, b);
  if (rows >= 4) block_f32<4>(c, ldc, a, lda, k, b), rows -= 4, a += 4 * lda, c += 4 * ldc;
  if (rows >= 2) block_f32<2>(c, ldc, a, lda, k, b), rows -= 2, a += 2 * lda, c += 2 * ldc;
  if (rows >= 1) block_f32<1>(c, ldc, a, lda, k, b);
}

void many_f32(float* c, const float* a, int64_t lda, int64_t k, int64_t rows, const float* b0, const float* b1) {
  rows_f32(c, 32, a, lda, k, rows, b0);
  if (b1 != nullptr) rows_f32(c + 16, 32, a, lda, k, rows, b1);
}

// One row: its sums run in 4 pairs of vectors, so that latency hides behind 8 chains.
void few_f32_1(float* out, const float* w, int64_t k, int64_t panels, const float* x) {
  for (int64_t p = 0; p < panels; p++) {
    __m256 acc[4][2] = {};
    int64_t i = 0;
    const auto add = [&](int j) {
      const __m256 a = _mm256_set1_ps(x[i + j]);
      acc[j][0] = _mm256_fmadd_ps(a, _mm256_loadu_ps(w + 16 * j), acc[j][0]);
      acc[j][1] = _mm256_fmadd_ps(a, _mm256_loadu_ps(w + 16 * j + 8), acc[j][1]);
    };
    for (; i + 4 <= k; i += 4, w += 64) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) add(j);
    }
    for (; i < k; i++, w += 16) add(0);
    for (int h = 0; h < 2; h++)
      _mm256_storeu_ps(out + p * 16 + 8 * h,
                       _mm256_add_ps(_mm256_add_ps(acc[0][h], acc[1][h]), _mm256_add_ps(acc[2][h], acc[3][h])));
  }
}

void few_f32(float* out, int64_t ldo, const float* w, int64_t k, int64_t panels, const float* x, int64_t ldx, int64_t m,
             const WeightStream& /*stream*/) {
  if (m == 1) {
    few_f32_1(out, w, k, panels, x);
    return;
  }
  for (int64_t p = 0; p < panels; p++) rows_f32(out + p * 16, ldo, x, ldx, k, m, w + p * k * 16);
}

template <int R>
void block_bf16(float* c, int64_t ldc, const uint16_t* a, int64_t kp, const uint16_t* b) {
  __m256 acc[R][2] = {};
  for (int64_t t = 0; t < kp / 32; t++, a += infer_tile, b += infer_tile) {
    for (int i = 0; i < 16; i++) {
      const __m256i w0 = load(b + i * 32), w1 = load(b + i * 32 + 16);
      const __m256 e0 = even_bf16(w0), e1 = even_bf16(w1), o0 = odd_bf16(w0), o1 = odd_bf16(w1);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const __m256i x = set1_quad(a + r * 32 + 2 * i);
        const __m256 xe = even_bf16(x), xo = odd_bf16(x);
        acc[r][0] = _mm256_fmadd_ps(xe, e0, acc[r][0]);
        acc[r][1] = _mm256_fmadd_ps(xe, e1, acc[r][1]);
        acc[r][0] = _mm256_fmadd_ps(xo, o0, acc[r][0]);
        acc[r][1] = _mm256_fmadd_ps(xo, o1, acc[r][1]);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    _mm256_storeu_ps(c + r * ldc, acc[r][0]);
    _mm256_storeu_ps(c + r * ldc + 8, acc[r][1]);
  }
}

void rows_bf16(float* c, int64_t ldc, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b) {
  for (int64_t r = 0; r < rows;) {
    const uint16_t* x = a + r / 16 * kp * 16 + r % 16 * 32;
    const int64_t left = rows - r, n = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (n == 4) block_bf16<4>(c + r * ldc, ldc, x, kp, b);
    else if (n == 2) block_bf16<2>(c + r * ldc, ldc, x, kp, b);
    else block_bf16<1>(c + r * ldc, ldc, x, kp, b);
    r += n;
  }
}

void many_bf16(float* c, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b0, const uint16_t* b1,
               const uint16_t* /*next*/) {
  rows_bf16(c, 32, a, kp, rows, b0);
  if (b1 != nullptr) rows_bf16(c + 16, 32, a, kp, rows, b1);
}

void few_bf16_1(float* out, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x) {
  for (int64_t p = 0; p < panels; p++) {
    __m256 even[2][2] = {}, odd[2][2] = {};
    for (int64_t t = 0; t < kp / 32; t++, w += infer_tile) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const __m256i a = set1_quad(x + t * infer_tile + 2 * i), w0 = load(w + i * 32), w1 = load(w + i * 32 + 16);
        even[i % 2][0] = _mm256_fmadd_ps(even_bf16(a), even_bf16(w0), even[i % 2][0]);
        even[i % 2][1] = _mm256_fmadd_ps(even_bf16(a), even_bf16(w1), even[i % 2][1]);
        odd[i % 2][0] = _mm256_fmadd_ps(odd_bf16(a), odd_bf16(w0), odd[i % 2][0]);
        odd[i % 2][1] = _mm256_fmadd_ps(odd_bf16(a), odd_bf16(w1), odd[i % 2][1]);
      }
    }
    for (int h = 0; h < 2; h++)
      _mm256_storeu_ps(out + p * 16 + 8 * h,
                       _mm256_add_ps(_mm256_add_ps(even[0][h], even[1][h]), _mm256_add_ps(odd[0][h], odd[1][h])));
  }
}

void few_bf16(float* out, int64_t ldo, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x, int64_t m,
              const WeightStream& /*stream*/) {
  if (m == 1) {
    few_bf16_1(out, w, kp, panels, x);
    return;
  }
  for (int64_t p = 0; p < panels; p++) rows_bf16(out + p * 16, ldo, x, kp, m, w + p * kp * 16);
}

// Bytes 0 and 2, and 1 and 3, of every quad as pairs of 16-bit numbers: unsigned times signed bytes in 16 bits would
// saturate.
template <int M>
void few_i8_m(float* out, int64_t ldo, const uint8_t* w, int64_t kp, int64_t panels, const int8_t* x, int64_t ldx) {
  const __m256i low = _mm256_set1_epi16(255);
  for (int64_t p = 0; p < panels; p++) {
    __m256 acc[M][2] = {};
    for (int64_t g = 0; g < kp / 32; g++) {
      const uint8_t* block = w + g / 2 * infer_i8_block;
      const uint8_t* group = block + g % 2 * 512;
      alignas(32) int32_t even[M][8], odd[M][8];
      __m256i sum[M][2];
#pragma GCC unroll 4
      for (int r = 0; r < M; r++) {
        const __m256i a = load(x + r * ldx + g * 32);
        _mm256_store_si256(reinterpret_cast<__m256i*>(even[r]), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
        _mm256_store_si256(reinterpret_cast<__m256i*>(odd[r]), _mm256_srai_epi16(a, 8));
        sum[r][0] = sum[r][1] = _mm256_set1_epi32(reinterpret_cast<const int32_t*>(x + r * ldx + kp + kp / 32 * 4)[g]);
      }
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {
        const __m256i v0 = load(group + q * 64), v1 = load(group + q * 64 + 32);
        const __m256i e0 = _mm256_and_si256(v0, low), e1 = _mm256_and_si256(v1, low), o0 = _mm256_srli_epi16(v0, 8),
                      o1 = _mm256_srli_epi16(v1, 8);
#pragma GCC unroll 4
        for (int r = 0; r < M; r++) {
          const __m256i xe = _mm256_set1_epi32(even[r][q]), xo = _mm256_set1_epi32(odd[r][q]);
          sum[r][0] =
              _mm256_add_epi32(sum[r][0], _mm256_add_epi32(_mm256_madd_epi16(e0, xe), _mm256_madd_epi16(o0, xo)));
          sum[r][1] =
              _mm256_add_epi32(sum[r][1], _mm256_add_epi32(_mm256_madd_epi16(e1, xe), _mm256_madd_epi16(o1, xo)));
        }
      }
      const __m256 s0 = f16_to_ps(block + 1024 + g % 2 * 32), s1 = f16_to_ps(block + 1024 + g % 2 * 32 + 16);
#pragma GCC unroll 4
      for (int r = 0; r < M; r++) {
        const __m256 s = _mm256_set1_ps(reinterpret_cast<const float*>(x + r * ldx + kp)[g]);
        acc[r][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][0]), _mm256_mul_ps(s0, s), acc[r][0]);
        acc[r][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][1]), _mm256_mul_ps(s1, s), acc[r][1]);
      }
    }
    for (int r = 0; r < M; r++) {
      _mm256_storeu_ps(out + r * ldo + p * 16, acc[r][0]);
      _mm256_storeu_ps(out + r * ldo + p * 16 + 8, acc[r][1]);
    }
    w += kp / 64 * infer_i8_block;
  }
}

void few_i8(float* out, int64_t ldo, const uint8_t* w, int64_t kp, int64_t panels, const int8_t* x, int64_t ldx,
            int64_t m, const WeightStream& /*stream*/) {
  for (; m >= 2; m -= 2, out += 2 * ldo, x += 2 * ldx) few_i8_m<2>(out, ldo, w, kp, panels, x, ldx);
  if (m >= 1) few_i8_m<1>(out, ldo, w, kp, panels, x, ldx);
}

void expand_i8(uint16_t* tiles, const uint8_t* w, int64_t kp) {
  const __m256i byte = _mm256_set1_epi32(255), offset = _mm256_set1_epi32(128);
  for (int64_t g = 0; g < kp / 32; g++, tiles += infer_tile) {
    const uint8_t* block = w + g / 2 * infer_i8_block;
    for (int h = 0; h < 2; h++) {
      const __m256 scale = f16_to_ps(block + 1024 + g % 2 * 32 + h * 16);
      for (int q = 0; q < 8; q++) {
        const __m256i v = load(block + g % 2 * 512 + q * 64 + h * 32);
        const auto value = [&](__m256i x) {
          return narrow_bf16(
              _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(x, byte), offset)), scale));
        };
        const __m256i x0 = value(v), x1 = value(_mm256_srli_epi32(v, 8)), x2 = value(_mm256_srli_epi32(v, 16)),
                      x3 = value(_mm256_srli_epi32(v, 24));
        uint16_t* to = tiles + q * 64 + h * 16;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_or_si256(x0, _mm256_slli_epi32(x1, 16)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_or_si256(x2, _mm256_slli_epi32(x3, 16)));
      }
    }
  }
}

}  // namespace

void use_avx2(InferKernels* k) {
  k->put_bf16 = put_bf16;
  k->few_f32 = few_f32;
  k->few_bf16 = few_bf16;
  k->few_i8 = few_i8;
  k->expand_i8 = expand_i8;
  k->many_bf16 = many_bf16;
  k->many_f32 = many_f32;
  k->attend = attend_avx2;
  k->attend_bf16 = attend_avx2;
  k->attend_few = attend_few_avx2;
  k->attend_few_bf16 = attend_few_avx2;
}

}  // namespace mm
