// Helpers of the AMX units; static functions, as in avx512.h.
#pragma once

#include "kernels/cpu/isa/avx512.h"
#include "kernels/cpu/isa/infer_isa.h"

namespace mm {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

MM_INLINE TileConfig whole_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
  return config;
}

MM_INLINE void configure_tiles(const TileConfig& config) {
  __asm__ volatile("" : : "r"(&config) : "memory");  // GCC 12 drops the stores otherwise
  _tile_loadconfig(&config);
}

// GCC 12 does not know that loading a tile reads memory: between vector stores and tile loads of the same place, either
// way round, this keeps their order.
MM_INLINE void order_tiles() { __asm__ volatile("" : : : "memory"); }

void attend_amx(const AttendArgs& a);
// One token, up to 4 heads. Sets tiles up for itself and leaves them as begin_thread does.
void attend_few_amx(const AttendArgs& a);

// Keys and values of one sequence and kv head as rows of bf16.
struct KvRows {
  const AttendArgs& a;
  int64_t dh, d32;  // d_head, and rounded up to 32

  explicit KvRows(const AttendArgs& args) : a(args), dh(args.d_head), d32((args.d_head + 31) / 32 * 32) {}

  int64_t row_of(int64_t key) const {
    return a.table[key >> a.block_shift] + (key & ((int64_t{1} << a.block_shift) - 1));
  }
  // Rows that products can read as they are: whole tiles, and 16 keys from a multiple of 16 on in one piece.
  bool direct() const { return a.format == KvFormat::bf16 && d32 == dh && a.block_shift >= 4; }
  const uint16_t* row(const void* base, int64_t key) const {
    return static_cast<const uint16_t*>(base) + row_of(key) * a.d_head;
  }

  // One row as bf16, zeros up to d32.
  void load(uint16_t* to, const void* base, const float* scales, int64_t key) const {
    const int64_t row = row_of(key);
    for (int64_t i = 0; i < d32; i += 16) {
      const int64_t left = dh - i;
      const __mmask16 m = left > 0 ? first_lanes(left) : static_cast<__mmask16>(0);
      const int64_t at = row * a.d_head + i;
      __m256i x;
      switch (a.format) {
        case KvFormat::f32:
          x = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(m, static_cast<const float*>(base) + at));
          break;
        case KvFormat::bf16: x = _mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + at); break;
        case KvFormat::f16:
          x = (__m256i)_mm512_cvtneps_pbh(
              _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + at)));
          break;
        default: {
          const __m512 q =
              _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, static_cast<const int8_t*>(base) + at)));
          x = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(q, _mm512_set1_ps(scales[row])));
        }
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), x);
    }
  }

  // 16 keys from `key` (a multiple of 16) on as the first operand of a product, row distance in bytes: as they lie, or
  // converted into `copy` [16][d32]. Keys from `end` on become zeros.
  const uint16_t* tile_rows(const void* base, const float* scales, int64_t key, int64_t end, uint16_t* copy,
                            int64_t* stride) const {
    if (direct() && key + 16 <= end) {
      *stride = a.d_head * 2;
      return row(base, key);
    }
    for (int64_t j = 0; j < 16; j++) {
      if (key + j < end) load(copy + j * d32, base, scales, key + j);
      else __builtin_memset(copy + j * d32, 0, static_cast<size_t>(d32) * 2);
    }
    *stride = d32 * 2;
    return copy;
  }
};

// Cuts a scratch block into arrays.
struct Pieces {
  char* at;
  template <class T>
  void take(T** to, int64_t n) {
    *to = reinterpret_cast<T*>(at);
    at += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
};

}  // namespace mm
