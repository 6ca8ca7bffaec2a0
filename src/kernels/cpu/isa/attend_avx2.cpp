// Attention of a block of query rows in fp32 with AVX2: the algorithm of simd/infer_attention.cpp, 4 rows at a time.
// Scores are dot products; 4 rows share every load of a key, and of a value.
#include "kernels/cpu/isa/avx2.h"

namespace mm {

namespace {

constexpr int64_t kb = infer_key_block;

// One row as fp32, zeros up to a multiple of 8.
void widen(float* y, KvFormat format, const void* base, int64_t at, float scale, int64_t n) {
  const int64_t whole = n / 8 * 8;
  const __m256 s = _mm256_set1_ps(scale);
  const auto eight = [&](const char* p) {
    switch (format) {
      case KvFormat::f32: return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
      case KvFormat::bf16:
        return even_bf16(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
      case KvFormat::f16: return f16_to_ps(p);
      case KvFormat::i8: break;
    }
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
                         s);
  };
  const int64_t bytes = format == KvFormat::f32 ? 4 : format == KvFormat::i8 ? 1 : 2;
  const char* p = static_cast<const char*>(base) + at * bytes;
  for (int64_t i = 0; i < whole; i += 8) _mm256_storeu_ps(y + i, eight(p + i * bytes));
  if (whole < n) {
    char rest[32] = {};
    __builtin_memcpy(rest, p + whole * bytes, static_cast<size_t>((n - whole) * bytes));
    _mm256_storeu_ps(y + whole, eight(rest));
  }
}

struct Attention {
  const AttendArgs& a;
  int64_t dh, d8, rows;
  float *k, *v, *q, *acc, *s, *row_max, *row_sum;  // [64][d8], [64][d8], [4][d8], [rows][d8], [4][64]

  explicit Attention(const AttendArgs& args) : a(args), dh(a.d_head), d8((dh + 7) / 8 * 8), rows(a.n_tok * a.group) {
    auto* at = static_cast<float*>(a.scratch);
    const auto take = [&](int64_t n) { return at += n, at - n; };
    k = take(kb * d8), v = take(kb * d8), q = take(4 * d8), s = take(4 * kb), acc = take(rows * d8);
    row_max = take(rows), row_sum = take(rows);
  }

  // Rows [r0, r0 + n) against keys [lo, hi), n <= 4: s[r][j].
  void scores(int64_t r0, int64_t n, int64_t lo, int64_t hi) const {
    for (int64_t r = 0; r < 4; r++) {
      const int64_t row = r0 + (r < n ? r : 0);
      const float* from = a.q + row / a.group * a.ldq + row % a.group * dh;
      for (int64_t i = 0; i < d8; i++) q[r * d8 + i] = i < dh ? from[i] * a.scale : 0.0f;
    }
    for (int64_t j = lo; j < hi; j++) {
      __m256 x[4] = {};
      for (int64_t i = 0; i < d8; i += 8) {
        const __m256 key = _mm256_loadu_ps(k + j * d8 + i);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) x[r] = _mm256_fmadd_ps(_mm256_loadu_ps(q + r * d8 + i), key, x[r]);
      }
      const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
      alignas(16) float four[4];
      _mm_store_ps(four, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
      for (int r = 0; r < 4; r++) s[r * kb + j] = four[r];
    }
  }

  // Keys [lo, end) of row r, whose scores are line i of s; returns the factor of the sums so far.
  float softmax(int64_t r, int64_t i, int64_t lo, int64_t end) const {
    float* x = s + i * kb;
    float m = row_max[r];
    for (int64_t j = lo; j < end; j++) m = x[j] > m ? x[j] : m;
    const float shift = m == -__builtin_inff() ? 0.0f : m;  // nothing but -inf so far: exp(-inf - 0) = 0
    for (int64_t j = 0; j < lo; j++) x[j] = -__builtin_inff();
    for (int64_t j = end; j < kb; j++) x[j] = -__builtin_inff();
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < kb; j += 8) {
      const __m256 p = exp_ps(_mm256_sub_ps(_mm256_loadu_ps(x + j), _mm256_set1_ps(shift)));
      _mm256_storeu_ps(x + j, p);
      sum = _mm256_add_ps(sum, p);
    }
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    const float total = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    const float keep = _mm256_cvtss_f32(exp_ps(_mm256_set1_ps(row_max[r] - shift)));
    row_max[r] = m;
    row_sum[r] = row_sum[r] * keep + total;
    return keep;
  }

  template <int R>
  void add_values(int64_t r0, const float* keep, int64_t lo, int64_t end) const {
    for (int64_t d = 0; d < d8; d += 16) {
      const int64_t second = d + 8 < d8 ? 8 : 0;
      __m256 o[R][2];
      for (int r = 0; r < R; r++) {
        const __m256 f = _mm256_set1_ps(keep[r]);
        o[r][0] = _mm256_mul_ps(_mm256_loadu_ps(acc + (r0 + r) * d8 + d), f);
        o[r][1] = _mm256_mul_ps(_mm256_loadu_ps(acc + (r0 + r) * d8 + d + second), f);
      }
      for (int64_t j = lo; j < end; j++) {
        const __m256 x0 = _mm256_loadu_ps(v + j * d8 + d), x1 = _mm256_loadu_ps(v + j * d8 + d + second);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const __m256 p = _mm256_set1_ps(s[r * kb + j]);
          o[r][0] = _mm256_fmadd_ps(p, x0, o[r][0]);
          o[r][1] = _mm256_fmadd_ps(p, x1, o[r][1]);
        }
      }
      for (int r = 0; r < R; r++) {
        _mm256_storeu_ps(acc + (r0 + r) * d8 + d, o[r][0]);
        if (second != 0) _mm256_storeu_ps(acc + (r0 + r) * d8 + d + 8, o[r][1]);
      }
    }
  }

  template <int R>
  void block(int64_t r0, int64_t j0, int64_t lo, int64_t hi) const {
    int64_t most = 0, end[R];
    float keep[R];
    for (int r = 0; r < R; r++) {
      end[r] = a.visible + (r0 + r) / a.group - j0;
      end[r] = end[r] < hi ? end[r] : hi;
      most = end[r] > most ? end[r] : most;
    }
    if (most <= lo) return;
    scores(r0, R, lo, most);
    for (int r = 0; r < R; r++) keep[r] = softmax(r0 + r, r, lo, end[r]);
    add_values<R>(r0, keep, lo, most);
  }

  void run() const {
    for (int64_t i = 0; i < rows * d8; i++) acc[i] = 0;
    for (int64_t r = 0; r < rows; r++) row_max[r] = -__builtin_inff(), row_sum[r] = 0;
    for (int64_t j0 = a.key_begin / kb * kb; j0 < a.key_end; j0 += kb) {
      const int64_t lo = j0 < a.key_begin ? a.key_begin - j0 : 0, hi = a.key_end - j0 < kb ? a.key_end - j0 : kb;
      for (int64_t j = lo; j < hi; j++) {
        const int64_t key = j0 + j, row = a.table[key >> a.block_shift] + (key & ((int64_t{1} << a.block_shift) - 1));
        widen(k + j * d8, a.format, a.k, row * a.d_head, a.k_scale != nullptr ? a.k_scale[row] : 1, dh);
        widen(v + j * d8, a.format, a.v, row * a.d_head, a.v_scale != nullptr ? a.v_scale[row] : 1, dh);
      }
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) block<4>(r, j0, lo, hi);
      for (; r < rows; r++) block<1>(r, j0, lo, hi);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* to = a.partial != nullptr ? a.partial + r * (dh + 2) : a.out + r / a.group * a.ldo + r % a.group * dh;
      const float inv = a.partial != nullptr ? 1.0f : 1.0f / row_sum[r];
      for (int64_t i = 0; i < dh; i++) to[i] = acc[r * d8 + i] * inv;
      if (a.partial != nullptr) to[dh] = row_max[r], to[dh + 1] = row_sum[r];
    }
  }
};

}  // namespace

void attend_avx2(const AttendArgs& a) { Attention(a).run(); }

}  // namespace mm
