// Kernels for AVX-512 with VNNI and BF16 (Zen 4, Cooper Lake, Sapphire Rapids without AMX).
#include "kernels/cpu/isa/avx512.h"
#include "kernels/cpu/isa/infer_isa.h"

namespace mm {

namespace {

// One row with S x `each` panels, read as S streams side by side: panel p of stream s is panel s each + p. Memory
// serves four places at once faster than one (bf16, 128 MB, one core: 24 to 27 GB/s instead of 22 to 24). A panel's
// sums run in 4 vectors (the pairs of a tile in turn), so that latency hides behind 4 chains.
template <int S>
void streams_bf16(float* out, const uint16_t* w, int64_t kp, int64_t each, const uint16_t* x,
                  const WeightStream& stream) {
  const int64_t panel = kp * 16;
  for (int64_t p = 0; p < each; p++) {
    __m512 acc[S][4] = {};
    for (int64_t t = 0; t < kp / 32; t++) {
      const uint16_t* a = x + t * infer_tile;
      const int64_t at = p * panel + t * infer_tile;
      const uint16_t* from[S];
      const char* soon[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) {
        from[s] = w + s * each * panel + at;
        soon[s] = ahead_of_streams<S>(from[s], (each * panel - at) * 2, each * panel * 2, stream);
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const auto xi = (__m512bh)set1_quad(a + 2 * i);
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
          prefetch(soon[s] + i * 64);
          acc[s][i % 4] = _mm512_dpbf16_ps(acc[s][i % 4], (__m512bh)_mm512_loadu_si512(from[s] + i * 32), xi);
        }
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; s++)
      _mm512_storeu_ps(out + (s * each + p) * 16,
                       _mm512_add_ps(_mm512_add_ps(acc[s][0], acc[s][1]), _mm512_add_ps(acc[s][2], acc[s][3])));
  }
}

void few_bf16_1(float* out, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x,
                const WeightStream& stream) {
  const int64_t done = panels / 4 * 4;
  streams_bf16<4>(out, w, kp, panels / 4, x, stream);
  streams_bf16<1>(out + done * 16, w + done * kp * 16, kp, panels - done, x, stream);
}

// M rows and one panel: every weight vector serves M rows.
template <int M>
void few_bf16_m(float* out, int64_t ldo, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x,
                const WeightStream& stream) {
  for (int64_t p = 0; p < panels; p++) {
    __m512 acc[M] = {};
    for (int64_t t = 0; t < kp / 32; t++, w += infer_tile) {
      const uint16_t* a = x + t * infer_tile;
      const char* soon = ahead_of(w, stream);
#pragma GCC unroll 4
      for (int i = 0; i < 16; i++) {
        prefetch(soon + i * 64);
        const auto wi = (__m512bh)_mm512_loadu_si512(w + i * 32);
#pragma GCC unroll 16
        for (int r = 0; r < M; r++) acc[r] = _mm512_dpbf16_ps(acc[r], wi, (__m512bh)set1_quad(a + r * 32 + 2 * i));
      }
    }
    for (int r = 0; r < M; r++) _mm512_storeu_ps(out + r * ldo + p * 16, acc[r]);
  }
}

void few_bf16(float* out, int64_t ldo, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x, int64_t m,
              const WeightStream& stream) {
  while (m > 0) {
    int64_t n = 1;
    if (m >= 8) few_bf16_m<8>(out, ldo, w, kp, panels, x, stream), n = 8;
    else if (m >= 4) few_bf16_m<4>(out, ldo, w, kp, panels, x, stream), n = 4;
    else if (m == 3) few_bf16_m<3>(out, ldo, w, kp, panels, x, stream), n = 3;
    else if (m == 2) few_bf16_m<2>(out, ldo, w, kp, panels, x, stream), n = 2;
    else few_bf16_1(out, w, kp, panels, x, stream);
    out += n * ldo, x += n * 32, m -= n;
  }
}

template <int M>
void few_i8_m(float* out, int64_t ldo, const uint8_t* w, int64_t kp, int64_t panels, const int8_t* x, int64_t ldx,
              const WeightStream& stream) {
  const float* scales[M];
  const int32_t* corrections[M];
  for (int r = 0; r < M; r++) {
    scales[r] = reinterpret_cast<const float*>(x + r * ldx + kp);
    corrections[r] = reinterpret_cast<const int32_t*>(x + r * ldx + kp + kp / 32 * 4);
  }
  for (int64_t p = 0; p < panels; p++) {
    __m512 acc[M] = {};
    for (int64_t b = 0; b < kp / 64; b++, w += infer_i8_block) {
      const char* soon = ahead_of(w, stream);
      prefetch(soon + 1024);
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) {
        __m512i sum[M];
#pragma GCC unroll 8
        for (int r = 0; r < M; r++) sum[r] = _mm512_set1_epi32(corrections[r][2 * b + g]);
#pragma GCC unroll 8
        for (int q = 0; q < 8; q++) {
          prefetch(soon + g * 512 + q * 64);
          const __m512i wq = _mm512_loadu_si512(w + g * 512 + q * 64);
#pragma GCC unroll 8
          for (int r = 0; r < M; r++)
            sum[r] = _mm512_dpbusd_epi32(sum[r], wq, set1_quad(x + r * ldx + b * 64 + g * 32 + q * 4));
        }
        const __m512 ws = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 1024 + g * 32)));
#pragma GCC unroll 8
        for (int r = 0; r < M; r++) {
          const __m512 s = _mm512_mul_ps(ws, _mm512_set1_ps(scales[r][2 * b + g]));
          acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), s, acc[r]);
        }
      }
    }
    for (int r = 0; r < M; r++) _mm512_storeu_ps(out + r * ldo + p * 16, acc[r]);
  }
}

void few_i8(float* out, int64_t ldo, const uint8_t* w, int64_t kp, int64_t panels, const int8_t* x, int64_t ldx,
            int64_t m, const WeightStream& stream) {
  while (m > 0) {
    int64_t n = 1;
    if (m >= 8) few_i8_m<8>(out, ldo, w, kp, panels, x, ldx, stream), n = 8;
    else if (m >= 4) few_i8_m<4>(out, ldo, w, kp, panels, x, ldx, stream), n = 4;
    else if (m == 3) few_i8_m<3>(out, ldo, w, kp, panels, x, ldx, stream), n = 3;
    else if (m == 2) few_i8_m<2>(out, ldo, w, kp, panels, x, ldx, stream), n = 2;
    else few_i8_m<1>(out, ldo, w, kp, panels, x, ldx, stream);
    out += n * ldo, x += n * ldx, m -= n;
  }
}

// Four bytes a lane: the pairs (0, 1) and (2, 3) become two vectors of bf16 pairs. A byte u in bits 8-15 under the
// exponent of 2^15 is the float 2^15 + u, and (2^15 + u) scale - (2^15 + 128) scale is exact in one fma, because the
// second product has 9 + 11 bits.
void expand_i8(uint16_t* tiles, const uint8_t* w, int64_t kp) {
  const __m512i mask = _mm512_set1_epi32(0xff00), magic = _mm512_set1_epi32(0x47000000);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t b = 0; b < kp / 64; b++, w += infer_i8_block) {
    for (int g = 0; g < 2; g++, tiles += infer_tile) {
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 1024 + g * 32)));
      const __m512 offset = _mm512_mul_ps(scale, _mm512_set1_ps(32768.0f + 128.0f));
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {
        prefetch(reinterpret_cast<const char*>(w) + infer_ahead + g * 512 + q * 64);
        const __m512i v = _mm512_loadu_si512(w + g * 512 + q * 64);
        const auto value = [&](__m512i x) {
          const __m512i f = _mm512_ternarylogic_epi32(x, mask, magic, 0xea);  // x & mask | magic
          return _mm512_fmsub_ps(_mm512_castsi512_ps(f), scale, offset);
        };
        const __m512 x0 = value(_mm512_slli_epi32(v, 8)), x1 = value(v), x2 = value(_mm512_srli_epi32(v, 8)),
                     x3 = value(_mm512_srli_epi32(v, 16));
        const auto low = (__m512i)_mm512_cvtne2ps_pbh(x1, x0), high = (__m512i)_mm512_cvtne2ps_pbh(x3, x2);
        _mm512_storeu_si512(tiles + q * 64, _mm512_permutexvar_epi16(interleave, low));
        _mm512_storeu_si512(tiles + q * 64 + 32, _mm512_permutexvar_epi16(interleave, high));
      }
    }
  }
}

void put_bf16(uint16_t* row_base, const float* x, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    const __m512 lo = _mm512_maskz_loadu_ps(first_lanes(n - i), x + i);
    const __m512 hi = n - i > 16 ? _mm512_maskz_loadu_ps(first_lanes(n - i - 16), x + i + 16) : _mm512_setzero_ps();
    _mm512_storeu_si512(row_base + (begin + i) / 32 * infer_tile, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
  }
}

template <int R, int P>
void block_bf16(float* c, const uint16_t* a, int64_t kp, const uint16_t* b0, const uint16_t* b1) {
  __m512 acc[R][P] = {};
  for (int64_t t = 0; t < kp / 32; t++, a += infer_tile, b0 += infer_tile, b1 += infer_tile) {
#pragma GCC unroll 2
    for (int i = 0; i < 16; i++) {
      __m512bh w[P];
      w[0] = (__m512bh)_mm512_loadu_si512(b0 + i * 32);
      if (P > 1) w[P - 1] = (__m512bh)_mm512_loadu_si512(b1 + i * 32);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const auto x = (__m512bh)set1_quad(a + r * 32 + 2 * i);
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], w[p], x);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) _mm512_storeu_ps(c + r * 32 + p * 16, acc[r][p]);
}

template <int P>
void many_bf16_p(float* c, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b0, const uint16_t* b1) {
  for (int64_t r = 0; r < rows;) {
    const uint16_t* x = a + r / 16 * kp * 16 + r % 16 * 32;
    const int64_t left = rows - r;
    int64_t n = 1;
    if (left >= 8) block_bf16<8, P>(c + r * 32, x, kp, b0, b1), n = 8;
    else if (left >= 4) block_bf16<4, P>(c + r * 32, x, kp, b0, b1), n = 4;
    else if (left >= 2) block_bf16<2, P>(c + r * 32, x, kp, b0, b1), n = 2;
    else block_bf16<1, P>(c + r * 32, x, kp, b0, b1);
    r += n;
  }
}

void many_bf16(float* c, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b0, const uint16_t* b1,
               const uint16_t* /*next*/) {
  if (b1 != nullptr) many_bf16_p<2>(c, a, kp, rows, b0, b1);
  else many_bf16_p<1>(c, a, kp, rows, b0, b0);
}

}  // namespace

void use_avx512_bf16(InferKernels* k) {
  k->put_bf16 = put_bf16;
  k->few_bf16 = few_bf16;
  k->few_i8 = few_i8;
  k->expand_i8 = expand_i8;
  k->many_bf16 = many_bf16;
  k->few_rows_i8 = 16;
  k->few_rows_bf16 = 4;
}

}  // namespace mm
