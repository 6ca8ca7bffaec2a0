// Attention of one token and up to 4 heads in AMX tiles, by stretches of 512 keys:
//   S [key][4] = K q^T       keys are the first operand, as they lie in the cache
//   P = exp(S - max)         vectors of 4 keys x 4 rows
//   O [4][d] += P V          the second operand pairs keys: two rows of values interleaved
// Bytes bound: keys and values stream once. Memory would be idle during the exponentials, so they ask for the first
// values (+1.5 % of a decode step at 1,024 keys); asking ahead in the two products as well lost (12 -> 13 to 15 ns a
// key).
#include "kernels/cpu/isa/amx.h"

namespace mm {

namespace {

constexpr int64_t stretch = 512, n_row = 4;
constexpr int64_t asked_bytes = 16384;  // of values, before they are read; L1 has 48 KB

TileConfig tiles_of(const int (&rows)[8], const int (&bytes)[8]) {
  TileConfig c;
  for (int i = 0; i < 8; i++) {
    c.rows[i] = static_cast<uint8_t>(rows[i]);
    c.row_bytes[i] = static_cast<uint16_t>(bytes[i]);
  }
  return c;
}
// 0-3 scores [16 keys][4], 4 and 5 keys, 6 queries [16 pairs][4][2].
const TileConfig score_tiles = tiles_of({16, 16, 16, 16, 16, 16, 16, 16}, {16, 16, 16, 16, 64, 64, 16, 16});
// 0-3 output [4][16], 4 and 5 values [16 pairs][16][2], 6 weights [4][32 keys].
const TileConfig value_tiles = tiles_of({4, 4, 4, 4, 16, 16, 4, 4}, {64, 64, 64, 64, 64, 64, 64, 64});

// Of a cache that KvRows::direct() holds for: d_head is a multiple of 32.
struct FewRows {
  const AttendArgs& a;
  KvRows kv;
  int64_t d32, rows;
  uint16_t *qt, *copy, *vt, *pt;  // qt [d32 / 32] tiles [16][4][2]; pt [stretch / 32] tiles [4][32]
  float *st, *o;                  // [stretch][4], [4][d32], columns of o as `interleave` leaves them

  explicit FewRows(const AttendArgs& args) : a(args), kv(args), d32(kv.d32), rows(a.n_tok * a.group) {
    Pieces p{static_cast<char*>(a.scratch)};
    p.take(&qt, d32 * n_row);
    p.take(&copy, 64 * d32);
    p.take(&vt, 4 * infer_tile);
    p.take(&pt, stretch * n_row);
    p.take(&st, stretch * n_row);
    p.take(&o, n_row * d32);
  }

  void pack_queries() {
    // Lane 4 b + r: pair b of row r, from pairs of rows 0 and 1, 2 and 3.
    const __m512i order = _mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
    for (int64_t i = 0; i < d32; i += 16) {
      __m512 x[n_row];
      for (int64_t r = 0; r < n_row; r++) {
        const float* q = a.q + r / a.group * a.ldq + r % a.group * kv.dh + i;
        x[r] = r < rows ? _mm512_loadu_ps(q) : _mm512_setzero_ps();
      }
      const auto low = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]), high = (__m512i)_mm512_cvtne2ps_pbh(x[3], x[2]);
      _mm512_storeu_si512(qt + i * n_row, _mm512_permutex2var_epi32(low, order, high));
      _mm512_storeu_si512(qt + i * n_row + 32,
                          _mm512_permutex2var_epi32(low, _mm512_add_epi32(order, _mm512_set1_epi32(4)), high));
    }
  }

  void scores(int64_t begin, int64_t end) {
    configure_tiles(score_tiles);
    for (int64_t key = begin; key < end; key += 64) {
      const uint16_t* k[4];
      int64_t stride[4];
      for (int64_t i = 0; i < 4; i++) {
        k[i] = kv.tile_rows(a.k, a.k_scale, key + 16 * i, end, copy + i * 16 * d32, &stride[i]);
      }
      order_tiles();
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t t = 0; t < d32; t += 64) {
        const bool two = t + 32 < d32;
        _tile_loadd(6, qt + t * n_row, 16);
        if (two) _tile_loadd(7, qt + (t + 32) * n_row, 16);
#define MM_SCORE(i)                           \
  _tile_loadd(4, k[i] + t, stride[i]);        \
  _tile_dpbf16ps(i, 4, 6);                    \
  if (two) {                                  \
    _tile_loadd(5, k[i] + t + 32, stride[i]); \
    _tile_dpbf16ps(i, 5, 7);                  \
  }
        MM_SCORE(0) MM_SCORE(1) MM_SCORE(2) MM_SCORE(3)
#undef MM_SCORE
      }
      float* to = st + (key - begin) * n_row;
      _tile_stored(0, to, 16);
      _tile_stored(1, to + 64, 16);
      _tile_stored(2, to + 128, 16);
      _tile_stored(3, to + 192, 16);
    }
  }

  // Asks for 4 rows of values: memory is idle during the exponentials.
  inline __attribute__((always_inline)) void ask_for_values(int64_t key) const {
    const char* p = reinterpret_cast<const char*>(kv.row(a.v, key));
    for (int64_t i = 0; i < 4 * kv.dh * 2; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
  }

  // Weights of n keys, from `begin` on, into pt; top and sum are of 4 lanes (rows), repeated. Returns the factor for
  // earlier sums.
  __m512 softmax(int64_t begin, int64_t n, __m512* top, __m512* sum) {
    const __m512 minus_inf = _mm512_set1_ps(-__builtin_inff()), scale = _mm512_set1_ps(a.scale),
                 scale2 = _mm512_set1_ps(a.scale * 1.44269504088896341f);
    const int64_t padded = (n + 31) / 32 * 32;
    for (int64_t j = n; j < padded; j++) _mm_storeu_ps(st + j * 4, _mm512_castps512_ps128(minus_inf));
    __m512 m = minus_inf;
    // A NaN leaves the maximum alone and makes its exponential NaN.
    for (int64_t j = 0; j < padded; j += 4) m = _mm512_max_ps(_mm512_loadu_ps(st + j * 4), m);
    m = _mm512_max_ps(_mm512_mul_ps(m, scale), *top);
    m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0x4e));
    m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0xb1));
    const __m512 shift = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(m, minus_inf, _CMP_NEQ_UQ), m);
    const __m512 keep = exp_ps(_mm512_sub_ps(*top, shift));
    const __m512 shift2 = _mm512_mul_ps(shift, _mm512_set1_ps(1.44269504088896341f));
    // 8 keys x 4 rows of bf16 -> 4 rows x 8 keys.
    const __m512i by_row = _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2, 29, 25, 21, 17,
                                            13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
    __m512 s0 = _mm512_setzero_ps(), s1 = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += 8) {
      if (j * kv.dh < asked_bytes) ask_for_values(begin + j / 2);
      const __m512 p0 = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(st + j * 4), scale2, shift2));
      const __m512 p1 = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(st + j * 4 + 16), scale2, shift2));
      s0 = _mm512_add_ps(s0, p0);
      s1 = _mm512_add_ps(s1, p1);
      const __m512i p = _mm512_permutexvar_epi16(by_row, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
      uint16_t* to = pt + j / 32 * 128 + j % 32;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(p));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32), _mm512_extracti32x4_epi32(p, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 64), _mm512_extracti32x4_epi32(p, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 96), _mm512_extracti32x4_epi32(p, 3));
    }
    __m512 s = _mm512_add_ps(s0, s1);
    s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0x4e));
    s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0xb1));
    *sum = _mm512_fmadd_ps(*sum, keep, s);
    *top = m;
    return keep;
  }

  // Columns [c, c + 32) of 32 keys as two tiles.
  MM_INLINE void interleave(uint16_t* to, const uint16_t* const (&v)[2], const int64_t (&stride)[2], int64_t c) {
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; half++) {
      const uint16_t* row = v[half] + c;
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; i++, row += stride[half]) {  // two rows of stride / 2 elements
        const __m512i even = _mm512_loadu_si512(row), odd = _mm512_loadu_si512(row + stride[half] / 2);
        _mm512_storeu_si512(to + (half * 8 + i) * 32, _mm512_unpacklo_epi16(even, odd));
        _mm512_storeu_si512(to + infer_tile + (half * 8 + i) * 32, _mm512_unpackhi_epi16(even, odd));
      }
    }
  }

  void add_values(int64_t begin, int64_t end) {
    configure_tiles(value_tiles);
    for (int64_t c = 0; c < d32; c += 64) {
      const bool two = c + 32 < d32;
      order_tiles();
      _tile_loadd(0, o + c, d32 * 4);
      _tile_loadd(1, o + c + 16, d32 * 4);
      if (two) {
        _tile_loadd(2, o + c + 32, d32 * 4);
        _tile_loadd(3, o + c + 48, d32 * 4);
      }
      for (int64_t key = begin; key < end; key += 32) {
        const uint16_t* v[2];
        int64_t stride[2];
        for (int64_t i = 0; i < 2; i++)
          v[i] = kv.tile_rows(a.v, a.v_scale, key + 16 * i, end, copy + i * 16 * d32, &stride[i]);
        interleave(vt, v, stride, c);
        if (two) interleave(vt + 2 * infer_tile, v, stride, c + 32);
        order_tiles();
        _tile_loadd(6, pt + (key - begin) / 32 * 128, 64);
        _tile_loadd(4, vt, 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, vt + infer_tile, 64);
        _tile_dpbf16ps(1, 6, 5);
        if (two) {
          _tile_loadd(4, vt + 2 * infer_tile, 64);
          _tile_dpbf16ps(2, 6, 4);
          _tile_loadd(5, vt + 3 * infer_tile, 64);
          _tile_dpbf16ps(3, 6, 5);
        }
        order_tiles();
      }
      _tile_stored(0, o + c, d32 * 4);
      _tile_stored(1, o + c + 16, d32 * 4);
      if (two) {
        _tile_stored(2, o + c + 32, d32 * 4);
        _tile_stored(3, o + c + 48, d32 * 4);
      }
    }
  }

  // 32 columns of o in their order: unpack took dwords 0-3 of every 128 bits to the first tile, 4-7 to the second.
  void finish(__m512 top, __m512 sum) const {
    alignas(64) float m[16], s[16];
    _mm512_store_ps(m, top);
    _mm512_store_ps(s, sum);
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0),
                  second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t r = 0; r < rows; r++) {
      float* to =
          a.partial != nullptr ? a.partial + r * (kv.dh + 2) : a.out + r / a.group * a.ldo + r % a.group * kv.dh;
      const __m512 inv = _mm512_set1_ps(a.partial != nullptr ? 1.0f : 1.0f / s[r]);
      for (int64_t c = 0; c < d32; c += 32) {
        const __m512 lo = _mm512_loadu_ps(o + r * d32 + c), hi = _mm512_loadu_ps(o + r * d32 + c + 16);
        _mm512_storeu_ps(to + c, _mm512_mul_ps(_mm512_permutex2var_ps(lo, first, hi), inv));
        _mm512_storeu_ps(to + c + 16, _mm512_mul_ps(_mm512_permutex2var_ps(lo, second, hi), inv));
      }
      if (a.partial != nullptr) to[kv.dh] = m[r], to[kv.dh + 1] = s[r];
    }
  }

  void run() {
    pack_queries();
    __m512 top = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    __builtin_memset(o, 0, static_cast<size_t>(n_row * d32) * 4);
    for (int64_t key = a.key_begin; key < a.key_end; key += stretch) {
      const int64_t end = key + stretch < a.key_end ? key + stretch : a.key_end;
      scores(key, end);
      alignas(64) float keep[16];
      _mm512_store_ps(keep, softmax(key, end - key, &top, &sum));
      for (int64_t r = 0; key > a.key_begin && r < n_row; r++) {
        const __m512 f = _mm512_set1_ps(keep[r]);
        for (int64_t c = 0; c < d32; c += 16)
          _mm512_storeu_ps(o + r * d32 + c, _mm512_mul_ps(_mm512_loadu_ps(o + r * d32 + c), f));
      }
      add_values(key, end);
    }
    finish(top, sum);
  }
};

}  // namespace

void attend_few_amx(const AttendArgs& a) {
  if (!KvRows(a).direct()) {  // 21 to 25 ns a key with a conversion to tiles, 14 without tiles
    attend_few_avx512(a);
    return;
  }
  FewRows(a).run();
  configure_tiles(whole_tiles());
}

}  // namespace mm
