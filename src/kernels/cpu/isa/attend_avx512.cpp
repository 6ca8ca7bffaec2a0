// Attention of a block of query rows in fp32 with AVX-512: the algorithm of simd/infer_attention.cpp. Keys of a block
// are transposed, so scores are vectors over keys; 4 rows share every load of keys and of values.
#include "kernels/cpu/isa/avx512.h"
#include "kernels/cpu/isa/infer_isa.h"

namespace mm {

namespace {

constexpr int64_t kb = infer_key_block;

MM_INLINE __m512 load_kv(KvFormat format, const void* base, int64_t at, float scale, __mmask16 m) {
  switch (format) {
    case KvFormat::f32: return _mm512_maskz_loadu_ps(m, static_cast<const float*>(base) + at);
    case KvFormat::bf16: return widen_bf16(_mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + at));
    case KvFormat::f16: return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + at));
    case KvFormat::i8: break;
  }
  const __m128i q = _mm_maskz_loadu_epi8(m, static_cast<const int8_t*>(base) + at);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), _mm512_set1_ps(scale));
}

struct Attention {
  const AttendArgs& a;
  int64_t dh, d16, rows;
  float *kt, *v, *acc, *s, *row_max, *row_sum;  // [d16][64], [64][d16], [rows][d16], [4][64]

  explicit Attention(const AttendArgs& args)
      : a(args), dh(a.d_head), d16((dh + 15) / 16 * 16), rows(a.n_tok * a.group) {
    auto* at = static_cast<float*>(a.scratch);
    const auto take = [&](int64_t n) { return at += n, at - n; };
    kt = take(kb * d16), v = take(kb * d16), acc = take(rows * d16), s = take(4 * kb);
    row_max = take(rows), row_sum = take(rows);
  }

  // Keys [lo, hi) of the block at j0; the others become zeros.
  void load_block(int64_t j0, int64_t lo, int64_t hi) const {
    int64_t row[kb];
    for (int64_t j = 0; j < kb; j++) {
      const int64_t key = j0 + j;
      row[j] = j >= lo && j < hi ? a.table[key >> a.block_shift] + (key & ((int64_t{1} << a.block_shift) - 1)) : -1;
    }
    for (int64_t d = 0; d < d16; d += 16) {
      const __mmask16 m = first_lanes(dh - d);
      for (int64_t j = 0; j < kb; j += 16) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
          const int64_t at = row[j + i];
          __m512 key = _mm512_setzero_ps(), value = _mm512_setzero_ps();
          if (at >= 0) {
            key = load_kv(a.format, a.k, at * a.d_head + d, a.k_scale != nullptr ? a.k_scale[at] : 1, m);
            value = load_kv(a.format, a.v, at * a.d_head + d, a.v_scale != nullptr ? a.v_scale[at] : 1, m);
          }
          r[i] = _mm512_castps_si512(key);
          _mm512_storeu_ps(v + (j + i) * d16 + d, value);
        }
        transpose16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(kt + (d + i) * kb + j, r[i]);
      }
    }
  }

  const float* query(int64_t r) const { return a.q + r / a.group * a.ldq + r % a.group * dh; }

  template <int R>
  void scores(int64_t r0) const {
    __m512 x[R][4] = {};
    const float* q[R];
    for (int r = 0; r < R; r++) q[r] = query(r0 + r);
    for (int64_t d = 0; d < dh; d++) {
      __m512 k[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) k[j] = _mm512_loadu_ps(kt + d * kb + 16 * j);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const __m512 b = _mm512_set1_ps(q[r][d]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) x[r][j] = _mm512_fmadd_ps(b, k[j], x[r][j]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++)
        _mm512_storeu_ps(s + r * kb + 16 * j, _mm512_mul_ps(x[r][j], _mm512_set1_ps(a.scale)));
  }

  // Keys [lo, end) of row r, whose scores are line i of s; returns the factor of the sums so far.
  float softmax(int64_t r, int64_t i, int64_t lo, int64_t end) const {
    const __m512 minus_inf = _mm512_set1_ps(-__builtin_inff());
    __m512 x[4], m = _mm512_set1_ps(row_max[r]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const auto mask = static_cast<__mmask16>(first_lanes(end - 16 * j < 0 ? 0 : end - 16 * j) &
                                               ~first_lanes(lo - 16 * j < 0 ? 0 : lo - 16 * j));
      x[j] = _mm512_mask_loadu_ps(minus_inf, mask, s + i * kb + 16 * j);
      m = _mm512_max_ps(x[j], m);  // a NaN leaves the maximum alone and makes its exponential NaN
    }
    const float top = _mm512_reduce_max_ps(m), shift = top == -__builtin_inff() ? 0.0f : top;
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512 p = exp_ps(_mm512_sub_ps(x[j], _mm512_set1_ps(shift)));
      _mm512_storeu_ps(s + i * kb + 16 * j, p);
      sum = _mm512_add_ps(sum, p);
    }
    const float keep = _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(row_max[r] - shift)));
    row_max[r] = top;
    row_sum[r] = row_sum[r] * keep + _mm512_reduce_add_ps(sum);
    return keep;
  }

  template <int R>
  void add_values(int64_t r0, const float* keep, int64_t end) const {
    for (int64_t d = 0; d < d16; d += 64) {
      const int n = d16 - d >= 64 ? 4 : static_cast<int>((d16 - d) / 16);
      __m512 o[R][4];
      for (int r = 0; r < R; r++) {
        for (int c = 0; c < 4; c++) {
          o[r][c] = c < n ? _mm512_mul_ps(_mm512_loadu_ps(acc + (r0 + r) * d16 + d + 16 * c), _mm512_set1_ps(keep[r]))
                          : _mm512_setzero_ps();
        }
      }
      for (int64_t j = 0; j < end; j++) {
        __m512 x[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) x[c] = _mm512_loadu_ps(v + j * d16 + d + (c < n ? 16 * c : 0));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const __m512 p = _mm512_set1_ps(s[r * kb + j]);
#pragma GCC unroll 4
          for (int c = 0; c < 4; c++) o[r][c] = _mm512_fmadd_ps(p, x[c], o[r][c]);
        }
      }
      for (int r = 0; r < R; r++)
        for (int c = 0; c < n; c++) _mm512_storeu_ps(acc + (r0 + r) * d16 + d + 16 * c, o[r][c]);
    }
  }

  template <int R>
  void block(int64_t r0, int64_t j0, int64_t lo, int64_t hi) const {
    int64_t most = 0;
    float keep[R];
    int64_t end[R];
    for (int r = 0; r < R; r++) {
      end[r] = a.visible + (r0 + r) / a.group - j0;
      end[r] = end[r] < hi ? end[r] : hi;
      most = end[r] > most ? end[r] : most;
    }
    if (most <= lo) return;
    scores<R>(r0);
    for (int r = 0; r < R; r++) keep[r] = softmax(r0 + r, r, lo, end[r]);
    add_values<R>(r0, keep, most);
  }

  void finish() const {
    for (int64_t r = 0; r < rows; r++) {
      float* to = a.partial != nullptr ? a.partial + r * (dh + 2) : a.out + r / a.group * a.ldo + r % a.group * dh;
      const __m512 inv = _mm512_set1_ps(a.partial != nullptr ? 1.0f : 1.0f / row_sum[r]);
      for (int64_t d = 0; d < dh; d += 16)
        _mm512_mask_storeu_ps(to + d, first_lanes(dh - d), _mm512_mul_ps(_mm512_loadu_ps(acc + r * d16 + d), inv));
      if (a.partial != nullptr) to[dh] = row_max[r], to[dh + 1] = row_sum[r];
    }
  }

  void run() const {
    for (int64_t i = 0; i < rows * d16; i += 16) _mm512_storeu_ps(acc + i, _mm512_setzero_ps());
    for (int64_t r = 0; r < rows; r++) row_max[r] = -__builtin_inff(), row_sum[r] = 0;
    for (int64_t j0 = a.key_begin / kb * kb; j0 < a.key_end; j0 += kb) {
      const int64_t lo = j0 < a.key_begin ? a.key_begin - j0 : 0, hi = a.key_end - j0 < kb ? a.key_end - j0 : kb;
      load_block(j0, lo, hi);
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) block<4>(r, j0, lo, hi);
      for (; r < rows; r++) block<1>(r, j0, lo, hi);
    }
    finish();
  }
};

}  // namespace

void attend_avx512(const AttendArgs& a) { Attention(a).run(); }

}  // namespace mm
