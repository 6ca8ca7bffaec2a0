// Kernels for AMX with BF16: tiles of 16 rows x 32 terms times 32 terms x 16 columns. All tiles keep full size, so one
// configuration a thread and step serves all products; rows behind the last one of an operand's tile hold garbage that
// no result reads.
#include "kernels/cpu/isa/amx.h"
#include "kernels/cpu/isa/infer_isa.h"

namespace mm {

namespace {

void begin_thread() { configure_tiles(whole_tiles()); }

void end_thread() { _tile_release(); }

MM_INLINE void ask_for(const uint16_t* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm_prefetch(reinterpret_cast<const char*>(tile + i * 32), _MM_HINT_T1);
}

void many_bf16(float* c, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b0, const uint16_t* b1,
               const uint16_t* next) {
  const int64_t tiles = kp / 32;
  const uint16_t* a1 = a + kp * 16;
  if (rows > 16 && b1 != nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < tiles; t++) {
      if (next != nullptr) ask_for(next + t * infer_tile), ask_for(next + kp * 16 + t * infer_tile);
      _tile_stream_loadd(4, a + t * infer_tile, 64);
      _tile_loadd(6, b0 + t * infer_tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b1 + t * infer_tile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, a1 + t * infer_tile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 16 * 32, 128);
    _tile_stored(3, c + 16 * 32 + 16, 128);
  } else if (b1 != nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t t = 0; t < tiles; t++) {
      if (next != nullptr) ask_for(next + t * infer_tile), ask_for(next + kp * 16 + t * infer_tile);
      _tile_stream_loadd(4, a + t * infer_tile, 64);
      _tile_loadd(6, b0 + t * infer_tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b1 + t * infer_tile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
  } else {
    _tile_zero(0);
    _tile_zero(2);
    for (int64_t t = 0; t < tiles; t++) {
      _tile_stream_loadd(4, a + t * infer_tile, 64);
      _tile_loadd(6, b0 + t * infer_tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (rows > 16) {
        _tile_stream_loadd(5, a1 + t * infer_tile, 64);
        _tile_dpbf16ps(2, 5, 6);
      }
    }
    _tile_stored(0, c, 128);
    if (rows > 16) _tile_stored(2, c + 16 * 32, 128);
  }
}

}  // namespace

void use_amx(InferKernels* k) {
  k->begin_thread = begin_thread;
  k->end_thread = end_thread;
  k->many_bf16 = many_bf16;
  k->attend_bf16 = attend_amx;
  k->attend_few_bf16 = attend_few_amx;
}

}  // namespace mm
