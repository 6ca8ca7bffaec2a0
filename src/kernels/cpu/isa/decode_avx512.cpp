// Attention of one token and up to 4 heads in fp32 with AVX-512, by stretches of 512 keys: scores [key][4] as dot
// products, exponentials in vectors of 4 keys x 4 rows, then the weighted sum with 4 rows sharing every load of a
// value.
#include "kernels/cpu/isa/avx512.h"
#include "kernels/cpu/isa/infer_isa.h"

namespace mm {

namespace {

constexpr int64_t stretch = 512;

// 16 numbers of a row of keys or values; the format is a template argument so that it is decided once.
template <KvFormat format>
MM_INLINE __m512 load_kv(const void* base, int64_t at, __m512 scale, __mmask16 m) {
  if constexpr (format == KvFormat::f32) return _mm512_maskz_loadu_ps(m, static_cast<const float*>(base) + at);
  if constexpr (format == KvFormat::bf16)
    return widen_bf16(_mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + at));
  if constexpr (format == KvFormat::f16)
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + at));
  const __m128i q = _mm_maskz_loadu_epi8(m, static_cast<const int8_t*>(base) + at);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), scale);
}

// Sums of 4 vectors, in the lanes of one.
MM_INLINE __m128 sums_of_4(const __m512 (&x)[4]) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

template <KvFormat format>
struct FewRows {
  const AttendArgs& a;
  int64_t dh, d16, rows;
  float *q, *st, *o;  // [4][d16], [stretch][4], [4][d16]

  explicit FewRows(const AttendArgs& args) : a(args), dh(a.d_head), d16((dh + 15) / 16 * 16), rows(a.group) {
    q = static_cast<float*>(a.scratch), o = q + 4 * d16, st = o + 4 * d16;
  }

  int64_t row_of(int64_t key) const {
    return a.table[key >> a.block_shift] + (key & ((int64_t{1} << a.block_shift) - 1));
  }
  __m512 scale_of(const float* scales, int64_t row) const {
    return format == KvFormat::i8 ? _mm512_set1_ps(scales[row]) : _mm512_setzero_ps();
  }

  void pack_queries() const {
    for (int64_t r = 0; r < 4; r++) {
      for (int64_t i = 0; i < d16; i += 16) {
        const __mmask16 m = r < rows ? first_lanes(dh - i) : static_cast<__mmask16>(0);
        const __m512 x = _mm512_maskz_loadu_ps(m, a.q + (r < rows ? r : 0) * dh + i);
        _mm512_storeu_ps(q + r * d16 + i, _mm512_mul_ps(x, _mm512_set1_ps(a.scale)));
      }
    }
  }

  void scores(int64_t begin, int64_t end) const {
    for (int64_t key = begin; key < end; key++) {
      const int64_t row = row_of(key);
      const __m512 scale = scale_of(a.k_scale, row);
      __m512 x[4] = {};
      for (int64_t i = 0; i < d16; i += 16) {
        const __m512 k = load_kv<format>(a.k, row * a.d_head + i, scale, first_lanes(dh - i));
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) x[r] = _mm512_fmadd_ps(_mm512_loadu_ps(q + r * d16 + i), k, x[r]);
      }
      _mm_storeu_ps(st + (key - begin) * 4, sums_of_4(x));
    }
  }

  // Scores of n keys become weights; top and sum are of 4 lanes (rows), repeated. Returns the factor for earlier sums.
  __m512 softmax(int64_t n, __m512* top, __m512* sum) const {
    const __m512 minus_inf = _mm512_set1_ps(-__builtin_inff());
    const int64_t padded = (n + 3) / 4 * 4;
    for (int64_t j = n; j < padded; j++) _mm_storeu_ps(st + j * 4, _mm512_castps512_ps128(minus_inf));
    __m512 m = *top;
    // A NaN leaves the maximum alone and makes its exponential NaN.
    for (int64_t j = 0; j < padded; j += 4) m = _mm512_max_ps(_mm512_loadu_ps(st + j * 4), m);
    m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0x4e));
    m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0xb1));
    const __m512 shift = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(m, minus_inf, _CMP_NEQ_UQ), m);
    const __m512 keep = exp_ps(_mm512_sub_ps(*top, shift));
    __m512 s = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += 4) {
      const __m512 p = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(st + j * 4), shift));
      _mm512_storeu_ps(st + j * 4, p);
      s = _mm512_add_ps(s, p);
    }
    s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0x4e));
    s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0xb1));
    *sum = _mm512_fmadd_ps(*sum, keep, s);
    *top = m;
    return keep;
  }

  // Columns [d, d + 16 C).
  template <int C>
  void add_values(int64_t d, int64_t begin, int64_t end, const float* keep) const {
    __m512 x[4][C];
    for (int r = 0; r < 4; r++)
      for (int c = 0; c < C; c++)
        x[r][c] = _mm512_mul_ps(_mm512_loadu_ps(o + r * d16 + d + 16 * c), _mm512_set1_ps(keep[r]));
    for (int64_t key = begin; key < end; key++) {
      const int64_t row = row_of(key);
      const __m512 scale = scale_of(a.v_scale, row);
      const float* p = st + (key - begin) * 4;
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        const __m512 v = load_kv<format>(a.v, row * a.d_head + d + 16 * c, scale, first_lanes(dh - d - 16 * c));
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) x[r][c] = _mm512_fmadd_ps(_mm512_set1_ps(p[r]), v, x[r][c]);
      }
    }
    for (int r = 0; r < 4; r++)
      for (int c = 0; c < C; c++) _mm512_storeu_ps(o + r * d16 + d + 16 * c, x[r][c]);
  }

  void run() const {
    pack_queries();
    __m512 top = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < 4 * d16; i += 16) _mm512_storeu_ps(o + i, _mm512_setzero_ps());
    for (int64_t key = a.key_begin; key < a.key_end; key += stretch) {
      const int64_t end = key + stretch < a.key_end ? key + stretch : a.key_end;
      scores(key, end);
      alignas(64) float keep[16];
      _mm512_store_ps(keep, softmax(end - key, &top, &sum));
      for (int64_t d = 0; d < d16;) {
        const int64_t left = d16 - d;
        if (left >= 64) add_values<4>(d, key, end, keep), d += 64;
        else if (left >= 32) add_values<2>(d, key, end, keep), d += 32;
        else add_values<1>(d, key, end, keep), d += 16;
      }
    }
    alignas(64) float m[16], s[16];
    _mm512_store_ps(m, top);
    _mm512_store_ps(s, sum);
    for (int64_t r = 0; r < rows; r++) {
      float* to = a.partial != nullptr ? a.partial + r * (dh + 2) : a.out + r * dh;
      const __m512 inv = _mm512_set1_ps(a.partial != nullptr ? 1.0f : 1.0f / s[r]);
      for (int64_t d = 0; d < dh; d += 16)
        _mm512_mask_storeu_ps(to + d, first_lanes(dh - d), _mm512_mul_ps(_mm512_loadu_ps(o + r * d16 + d), inv));
      if (a.partial != nullptr) to[dh] = m[r], to[dh + 1] = s[r];
    }
  }
};

}  // namespace

void attend_few_avx512(const AttendArgs& a) {
  switch (a.format) {
    case KvFormat::f32: FewRows<KvFormat::f32>(a).run(); break;
    case KvFormat::bf16: FewRows<KvFormat::bf16>(a).run(); break;
    case KvFormat::f16: FewRows<KvFormat::f16>(a).run(); break;
    case KvFormat::i8: FewRows<KvFormat::i8>(a).run(); break;
  }
}

}  // namespace mm
