// Attention of one token and up to 4 heads in fp32 with AVX2: as decode_avx512.cpp, with vectors of 2 keys x 4 rows.
#include "kernels/cpu/isa/avx2.h"

namespace mm {

namespace {

constexpr int64_t stretch = 512;

// 8 numbers; n < 8: so many, and zeros.
template <KvFormat format>
MM_INLINE __m256 load_kv(const void* base, int64_t at, __m256 scale, int64_t n) {
  constexpr int64_t bytes = format == KvFormat::f32 ? 4 : format == KvFormat::i8 ? 1 : 2;
  const char* p = static_cast<const char*>(base) + at * bytes;
  char rest[32];
  if (n < 8) {
    __builtin_memset(rest, 0, sizeof rest);
    __builtin_memcpy(rest, p, static_cast<size_t>(n * bytes));
    p = rest;
  }
  if constexpr (format == KvFormat::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  if constexpr (format == KvFormat::bf16)
    return even_bf16(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  if constexpr (format == KvFormat::f16) return f16_to_ps(p);
  const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), scale);
}

template <KvFormat format>
struct FewRows {
  const AttendArgs& a;
  int64_t dh, d8, rows;
  float *q, *st, *o;  // [4][d8], [stretch][4], [4][d8]

  explicit FewRows(const AttendArgs& args) : a(args), dh(a.d_head), d8((dh + 7) / 8 * 8), rows(a.group) {
    q = static_cast<float*>(a.scratch), o = q + 4 * d8, st = o + 4 * d8;
  }

  int64_t row_of(int64_t key) const {
    return a.table[key >> a.block_shift] + (key & ((int64_t{1} << a.block_shift) - 1));
  }
  __m256 scale_of(const float* scales, int64_t row) const {
    return format == KvFormat::i8 ? _mm256_set1_ps(scales[row]) : _mm256_setzero_ps();
  }

  void scores(int64_t begin, int64_t end) const {
    for (int64_t key = begin; key < end; key++) {
      const int64_t row = row_of(key);
      const __m256 scale = scale_of(a.k_scale, row);
      __m256 x[4] = {};
      for (int64_t i = 0; i < d8; i += 8) {
        const __m256 k = load_kv<format>(a.k, row * a.d_head + i, scale, dh - i);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) x[r] = _mm256_fmadd_ps(_mm256_loadu_ps(q + r * d8 + i), k, x[r]);
      }
      const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
      _mm_storeu_ps(st + (key - begin) * 4, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
    }
  }

  // Scores of n keys become weights; top and sum are of 4 lanes (rows), twice. Returns the factor for earlier sums.
  __m256 softmax(int64_t n, __m256* top, __m256* sum) const {
    const __m256 minus_inf = _mm256_set1_ps(-__builtin_inff());
    if (n % 2 != 0) _mm_storeu_ps(st + n * 4, _mm256_castps256_ps128(minus_inf));
    __m256 m = *top;
    // A NaN leaves the maximum alone and makes its exponential NaN.
    for (int64_t j = 0; j < n; j += 2) m = _mm256_max_ps(_mm256_loadu_ps(st + j * 4), m);
    m = _mm256_max_ps(m, _mm256_permute2f128_ps(m, m, 1));
    const __m256 shift = _mm256_and_ps(m, _mm256_cmp_ps(m, minus_inf, _CMP_NEQ_UQ));
    const __m256 keep = exp_ps(_mm256_sub_ps(*top, shift));
    __m256 s = _mm256_setzero_ps();
    for (int64_t j = 0; j < n; j += 2) {
      const __m256 p = exp_ps(_mm256_sub_ps(_mm256_loadu_ps(st + j * 4), shift));
      _mm256_storeu_ps(st + j * 4, p);
      s = _mm256_add_ps(s, p);
    }
    *sum = _mm256_fmadd_ps(*sum, keep, _mm256_add_ps(s, _mm256_permute2f128_ps(s, s, 1)));
    *top = m;
    return keep;
  }

  // Columns [d, d + 8 C).
  template <int C>
  void add_values(int64_t d, int64_t begin, int64_t end, const float* keep) const {
    __m256 x[4][C];
    for (int r = 0; r < 4; r++)
      for (int c = 0; c < C; c++)
        x[r][c] = _mm256_mul_ps(_mm256_loadu_ps(o + r * d8 + d + 8 * c), _mm256_set1_ps(keep[r]));
    for (int64_t key = begin; key < end; key++) {
      const int64_t row = row_of(key);
      const __m256 scale = scale_of(a.v_scale, row);
      const float* p = st + (key - begin) * 4;
#pragma GCC unroll 2
      for (int c = 0; c < C; c++) {
        const __m256 v = load_kv<format>(a.v, row * a.d_head + d + 8 * c, scale, dh - d - 8 * c);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) x[r][c] = _mm256_fmadd_ps(_mm256_set1_ps(p[r]), v, x[r][c]);
      }
    }
    for (int r = 0; r < 4; r++)
      for (int c = 0; c < C; c++) _mm256_storeu_ps(o + r * d8 + d + 8 * c, x[r][c]);
  }

  void run() const {
    for (int64_t r = 0; r < 4; r++) {
      for (int64_t i = 0; i < d8; i++) {
        q[r * d8 + i] = r < rows && i < dh ? a.q[r * dh + i] * a.scale : 0.0f;
        o[r * d8 + i] = 0;
      }
    }
    __m256 top = _mm256_set1_ps(-__builtin_inff()), sum = _mm256_setzero_ps();
    for (int64_t key = a.key_begin; key < a.key_end; key += stretch) {
      const int64_t end = key + stretch < a.key_end ? key + stretch : a.key_end;
      scores(key, end);
      alignas(32) float keep[8];
      _mm256_store_ps(keep, softmax(end - key, &top, &sum));
      int64_t d = 0;
      for (; d + 16 <= d8; d += 16) add_values<2>(d, key, end, keep);
      if (d < d8) add_values<1>(d, key, end, keep);
    }
    alignas(32) float m[8], s[8];
    _mm256_store_ps(m, top);
    _mm256_store_ps(s, sum);
    for (int64_t r = 0; r < rows; r++) {
      float* to = a.partial != nullptr ? a.partial + r * (dh + 2) : a.out + r * dh;
      const float inv = a.partial != nullptr ? 1.0f : 1.0f / s[r];
      for (int64_t i = 0; i < dh; i++) to[i] = o[r * d8 + i] * inv;
      if (a.partial != nullptr) to[dh] = m[r], to[dh + 1] = s[r];
    }
  }
};

}  // namespace

void attend_few_avx2(const AttendArgs& a) {
  switch (a.format) {
    case KvFormat::f32: FewRows<KvFormat::f32>(a).run(); break;
    case KvFormat::bf16: FewRows<KvFormat::bf16>(a).run(); break;
    case KvFormat::f16: FewRows<KvFormat::f16>(a).run(); break;
    case KvFormat::i8: FewRows<KvFormat::i8>(a).run(); break;
  }
}

}  // namespace mm
