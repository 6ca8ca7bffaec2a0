// Attention of a block of query rows in AMX tiles.
#include <string.h>

#include "kernels/cpu/isa/amx.h"

namespace mm {

namespace {

// Everything is held transposed, so that a vector is 16 query rows: S^T = K Q^T takes keys as they lie in
// the cache, maxima, sums and rescaling are vertical, and P^T is the second operand of O^T = V^T P^T.
//   qt  [row tile][d / 32] tiles [16 pairs of d][16 rows][2]        vt  [d / 16][2] tiles [16 of d][32 keys]
//   st  [64 keys][16 rows] fp32   pt  [2] tiles [16 pairs of keys][16 rows][2]   ot  [row tile][d][16 rows] fp32
struct Attention {
  const AttendArgs& a;
  KvRows kv;
  int64_t dh, d16, d32, rows, row_tiles;  // d_head, rounded up to 16 and 32
  uint16_t *qt, *kb, *vb, *vt, *pt;
  float *st, *ot, *row_max, *row_sum;

  explicit Attention(const AttendArgs& args) : a(args), kv(args) {
    dh = a.d_head, d16 = (dh + 15) / 16 * 16, d32 = (dh + 31) / 32 * 32;
    rows = a.n_tok * a.group, row_tiles = (rows + 15) / 16;
    Pieces p{static_cast<char*>(a.scratch)};
    p.take(&qt, row_tiles * 16 * d32);
    p.take(&kb, infer_key_block * d32);
    p.take(&vb, infer_key_block * d32);
    p.take(&vt, infer_key_block * d32);
    p.take(&pt, 2 * infer_tile);
    p.take(&st, infer_key_block * 16);
    p.take(&ot, row_tiles * 16 * d16);
    p.take(&row_max, row_tiles * 16);
    p.take(&row_sum, row_tiles * 16);
  }

  void pack_queries() {
    for (int64_t rt = 0; rt < row_tiles; rt++) {
      for (int64_t t = 0; t < d32 / 32; t++) {
        __m512i r[16];
        for (int64_t i = 0; i < 16; i++) {
          const int64_t row = rt * 16 + i;
          if (row >= rows) {
            r[i] = _mm512_setzero_si512();
            continue;
          }
          const float* q = a.q + row / a.group * a.ldq + row % a.group * dh + t * 32;
          const __m512 lo = _mm512_maskz_loadu_ps(first_lanes(dh - t * 32), q);
          const __m512 hi =
              dh - t * 32 > 16 ? _mm512_maskz_loadu_ps(first_lanes(dh - t * 32 - 16), q + 16) : _mm512_setzero_ps();
          r[i] = (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
        }
        transpose16(r);
        for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(qt + (rt * (d32 / 32) + t) * infer_tile + i * 32, r[i]);
      }
    }
  }

  // Row `row` of keys or values as bf16, zeros up to d32.
  void pack_values(int64_t key, int64_t end) {
    const uint16_t* row[infer_key_block];
    for (int64_t j = 0; j < infer_key_block; j += 16) {
      int64_t stride = 0;
      const uint16_t* first = kv.tile_rows(a.v, a.v_scale, key + j, end, vb + j * d32, &stride);
      for (int64_t i = 0; i < 16; i++) row[j + i] = first + i * (stride / 2);
    }
    for (int64_t d = 0; d < d16; d += 16) {
      for (int64_t half = 0; half < 2; half++) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
          const uint16_t *even = row[half * 32 + 2 * i] + d, *odd = row[half * 32 + 2 * i + 1] + d;
          const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
          const __m512i hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
          r[i] = _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
        }
        transpose16(r);
        uint16_t* to = vt + (d / 16 * 2 + half) * infer_tile;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * 32, r[i]);
      }
    }
  }

  void scores(int64_t rt, const uint16_t* const* k, const int64_t* stride) const {
    order_tiles();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < d32 / 32; t++) {
      _tile_loadd(6, qt + (rt * (d32 / 32) + t) * infer_tile, 64);
      _tile_loadd(4, k[0] + t * 32, stride[0]);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, k[1] + t * 32, stride[1]);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, k[2] + t * 32, stride[2]);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, k[3] + t * 32, stride[3]);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, st, 64);
    _tile_stored(1, st + 256, 64);
    _tile_stored(2, st + 512, 64);
    _tile_stored(3, st + 768, 64);
  }

  // st -> pt, row_max, row_sum; ot is rescaled. in_block: how many keys of the block each row sees.
  void softmax(int64_t rt, __m512i in_block) {
    const __m512 minus_inf = _mm512_set1_ps(-__builtin_inff()), scale = _mm512_set1_ps(a.scale);
    const bool whole = _mm512_cmplt_epi32_mask(in_block, _mm512_set1_epi32(infer_key_block)) == 0;
    __m512 top[4] = {minus_inf, minus_inf, minus_inf, minus_inf};
    for (int j = 0; j < infer_key_block; j += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(st + (j + i) * 16), scale);
        if (!whole) {
          s = _mm512_mask_mov_ps(minus_inf, _mm512_cmpgt_epi32_mask(in_block, _mm512_set1_epi32(j + i)), s);
        }
        _mm512_storeu_ps(st + (j + i) * 16, s);
        top[i] = _mm512_max_ps(s, top[i]);  // a NaN leaves the maximum alone and makes its exponential NaN
      }
    }
    const __m512 old = _mm512_loadu_ps(row_max + rt * 16);
    const __m512 m = _mm512_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])), old);
    // Rows with nothing but -inf so far: exp(-inf - 0) = 0.
    const __m512 shift = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(m, minus_inf, _CMP_NEQ_UQ), m);
    const __m512 keep = exp_ps(_mm512_sub_ps(old, shift));
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 sum[2] = {};
    for (int j = 0; j < infer_key_block; j += 2) {
      const __m512 p0 = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(st + j * 16), shift));
      const __m512 p1 = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(st + j * 16 + 16), shift));
      sum[0] = _mm512_add_ps(sum[0], p0);
      sum[1] = _mm512_add_ps(sum[1], p1);
      _mm512_storeu_si512(pt + j * 16, _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(p1, p0)));
    }
    const __m512 before = _mm512_loadu_ps(row_sum + rt * 16);
    _mm512_storeu_ps(row_max + rt * 16, m);
    _mm512_storeu_ps(row_sum + rt * 16, _mm512_fmadd_ps(before, keep, _mm512_add_ps(sum[0], sum[1])));
    if (_mm512_cmp_ps_mask(keep, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) return;
    float* o = ot + rt * 16 * d16;
    for (int64_t d = 0; d < d16; d++) _mm512_storeu_ps(o + d * 16, _mm512_mul_ps(_mm512_loadu_ps(o + d * 16), keep));
  }

  void add_values(int64_t rt) const {
    float* o = ot + rt * 16 * d16;
    order_tiles();
    _tile_loadd(6, pt, 64);
    _tile_loadd(7, pt + infer_tile, 64);
    for (int64_t d = 0; d < d16; d += 16) {
      _tile_loadd(0, o + d * 16, 64);
      _tile_loadd(4, vt + d / 16 * 2 * infer_tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, vt + (d / 16 * 2 + 1) * infer_tile, 64);
      _tile_dpbf16ps(0, 5, 7);
      _tile_stored(0, o + d * 16, 64);
    }
  }

  void finish() const {
    for (int64_t rt = 0; rt < row_tiles; rt++) {
      const float *o = ot + rt * 16 * d16, *m = row_max + rt * 16, *sum = row_sum + rt * 16;
      const int64_t n = rows - rt * 16 < 16 ? rows - rt * 16 : 16;
      for (int64_t d = 0; d < d16; d += 16) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(o + (d + i) * 16);
        transpose16(r);
        const __mmask16 lanes = first_lanes(dh - d);
        for (int64_t i = 0; i < n; i++) {
          const int64_t row = rt * 16 + i;
          const __m512 x = _mm512_castsi512_ps(r[i]);
          if (a.partial != nullptr) {
            _mm512_mask_storeu_ps(a.partial + row * (dh + 2) + d, lanes, x);
          } else {
            _mm512_mask_storeu_ps(a.out + row / a.group * a.ldo + row % a.group * dh + d, lanes,
                                  _mm512_mul_ps(x, _mm512_set1_ps(1.0f / sum[i])));
          }
        }
      }
      for (int64_t i = 0; a.partial != nullptr && i < n; i++) {
        float* to = a.partial + (rt * 16 + i) * (dh + 2) + dh;
        to[0] = m[i], to[1] = sum[i];
      }
    }
  }

  void run() {
    pack_queries();
    for (int64_t i = 0; i < row_tiles * 16; i++) row_max[i] = -__builtin_inff(), row_sum[i] = 0;
    memset(ot, 0, static_cast<size_t>(row_tiles * 16 * d16) * 4);
    for (int64_t key = a.key_begin; key < a.key_end; key += infer_key_block) {
      const uint16_t* k[4];
      int64_t stride[4];
      for (int64_t i = 0; i < 4; i++) {
        k[i] = kv.tile_rows(a.k, a.k_scale, key + i * 16, a.key_end, kb + i * 16 * d32, &stride[i]);
      }
      pack_values(key, a.key_end);
      for (int64_t rt = 0; rt < row_tiles; rt++) {
        alignas(64) int32_t in_block[16];
        int64_t most = 0;
        for (int64_t i = 0; i < 16; i++) {
          const int64_t row = rt * 16 + i < rows ? rt * 16 + i : rows - 1;
          int64_t end = a.visible + row / a.group;
          end = (end < a.key_end ? end : a.key_end) - key;
          most = end > most ? end : most;
          in_block[i] = static_cast<int32_t>(end);
        }
        if (most <= 0) continue;
        scores(rt, k, stride);
        softmax(rt, _mm512_load_si512(in_block));
        add_values(rt);
      }
    }
    finish();
  }
};

}  // namespace

void attend_amx(const AttendArgs& a) { Attention(a).run(); }

}  // namespace mm
