// Layouts of packed weights and operands, and the single-threaded kernels of the inference step, one table an
// instruction set. simd/infer_*.cpp holds the portable versions (plain loops, every instruction set); isa/*.cpp
// replaces some of them by intrinsics. No functions here: this header is included by units of different instruction
// sets.
//
// Packed weights: panels of 16 rows of W, so that lane i of a vector is row 16 p + i and sums run along k in order.
//   f32   panel: [k][16] float
//   bf16  panel: [kp / 32] tiles of [16 pairs][16 rows][2]: the B operand of an AMX product, k padded to kp with zeros
//   i8    panel: [kp / 64] blocks of [16 quads][16 rows][4] bytes w + 128, then [2 groups][16 rows] f16 scales
// Bytes are w + 128 because VNNI multiplies unsigned by signed: sum (w + 128) x - 128 sum x, and the second term is one
// number a group for all rows.
// Operands (activations), rows of
//   f32   [k] float
//   bf16  tiles of [16 rows][32]: chunk t of row r at (r / 16 * kt + t) * 512 + r % 16 * 32, kt = kp / 32
//   q8    [kp] int8, then [kp / 32] float scales, then [kp / 32] int32 -128 * sum
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/infer.h"

namespace mm {

constexpr int64_t infer_panel = 16;       // rows of W a panel, rows of an operand a tile
constexpr int64_t infer_k_pad = 64;       // kp is a multiple of it for bf16 and i8
constexpr int64_t infer_i8_block = 1088;  // bytes of an i8 block of 64 k
constexpr int64_t infer_tile = 16 * 32;   // elements of a bf16 tile
constexpr int64_t infer_key_block = 64;   // keys of an attention block

// Query rows of one sequence and kv head against keys [key_begin, key_end).
struct AttendArgs {
  const float* q = nullptr;  // head g of token i at q + i * ldq + g * d_head, rotated, unscaled
  int64_t ldq = 0;
  int64_t n_tok = 0;
  int group = 0, d_head = 0;
  float scale = 1;
  int64_t visible = 0;  // keys that token 0 sees; token i sees visible + i
  int64_t key_begin = 0, key_end = 0;
  KvFormat format = KvFormat::f32;
  const void *k = nullptr, *v = nullptr;               // [row, d_head] of the layer and kv head
  const float *k_scale = nullptr, *v_scale = nullptr;  // [row], likewise
  const int32_t* table = nullptr;                      // of the sequence
  int block_shift = 0;
  float* out = nullptr;  // the result, head g of token i at out + i * ldo + g * d_head; or null and
  int64_t ldo = 0;
  float* partial = nullptr;  // row r = i * group + g: [d_head] unnormalised sum, then maximum and sum of exponentials
  void* scratch = nullptr;   // see ThreadBuffers
};

// Where a stream of weights goes on: behind `end` of this product's panels come those at `next`. Kernels ask for them
// ahead of time, across the end of a stage, so that memory is not idle while threads wait for each other.
constexpr int64_t infer_ahead = 16384;  // bytes
struct WeightStream {
  const char *end = nullptr, *next = nullptr;
};

struct InferKernels {
  // Rows.
  void (*norm_row)(float* y, const float* x, const float* w, float eps, int64_t d);
  // h = x w; squares[i] is the sum of the squares of x[32 i ..]. n is a multiple of 32.
  void (*weigh)(float* h, float* squares, const float* x, const float* w, int64_t n);
  void (*swiglu)(float* act, const float* gate, const float* up, int64_t n);
  // One head: RMSNorm with w where it is given, then the rotation.
  void (*rope_head)(float* y, const float* x, const float* w, const float* cos, const float* sin, float eps,
                    int d_head);
  void (*add)(float* y, const float* x, int64_t n);            // y += x
  void (*axpy)(float* y, float a, const float* x, int64_t n);  // y += a x
  // out [group, d_head] from partial sums as AttendArgs::partial has them.
  void (*merge_parts)(float* out, const float* const* parts, int n_part, int64_t group, int64_t d_head);
  void (*put_kv)(KvFormat format, void* to, float* scale, const float* x, int64_t n);  // one row of one head
  // Columns [begin, begin + n) of an operand row; begin and n are multiples of 32 (n may end at k, then zeros fill up
  // to kp). row_base: bf16: the row's first chunk, chunks are infer_tile apart; q8: the row.
  void (*put_bf16)(uint16_t* row_base, const float* x, int64_t begin, int64_t n);
  void (*put_q8)(int8_t* row, const float* x, int64_t begin, int64_t n, int64_t kp);
  void (*bf16_row)(float* y, const uint16_t* x, int64_t n);  // widens
  // Index of the first largest of n >= 1 numbers, which becomes *value; NaN where one is NaN or +infinity.
  int64_t (*first_largest)(const float* x, int64_t n, float* value);

  // Products of few operand rows with whole panels: out[r * ldo + 16 p + i].
  void (*few_f32)(float* out, int64_t ldo, const float* w, int64_t k, int64_t panels, const float* x, int64_t ldx,
                  int64_t m, const WeightStream& stream);
  void (*few_bf16)(float* out, int64_t ldo, const uint16_t* w, int64_t kp, int64_t panels, const uint16_t* x, int64_t m,
                   const WeightStream& stream);  // m <= 16
  void (*few_i8)(float* out, int64_t ldo, const uint8_t* w, int64_t kp, int64_t panels, const int8_t* x, int64_t ldx,
                 int64_t m, const WeightStream& stream);
  // Products of many rows: c [rows <= 32][32] from one or two operand tiles of rows and one or two panels, row distance
  // 32. The order of the sums does not depend on rows or panels. b1 null: one panel.
  void (*expand_i8)(uint16_t* tiles, const uint8_t* w, int64_t kp);
  // next: two panels to ask for meanwhile, or null.
  void (*many_bf16)(float* c, const uint16_t* a, int64_t kp, int64_t rows, const uint16_t* b0, const uint16_t* b1,
                    const uint16_t* next);
  void (*many_f32)(float* c, const float* a, int64_t lda, int64_t k, int64_t rows, const float* b0, const float* b1);

  void (*attend)(const AttendArgs& a);       // fp32 arithmetic
  void (*attend_bf16)(const AttendArgs& a);  // operands of the two products rounded to bf16
  // The same two for one token and up to 4 heads, with another order of sums; or null.
  void (*attend_few)(const AttendArgs& a);
  void (*attend_few_bf16)(const AttendArgs& a);
  void (*begin_thread)();  // before the first kernel on a thread of a step, e.g. tile configuration
  void (*end_thread)();

  int64_t few_rows_i8, few_rows_bf16;  // up to so many rows "few" is the faster product
};

namespace scalar {
extern const InferKernels infer_kernels;
}
#ifdef MM_X86
namespace avx2 {
extern const InferKernels infer_kernels;
}
namespace avx512 {
extern const InferKernels infer_kernels;
}
#endif

}  // namespace mm
