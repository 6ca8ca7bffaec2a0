// What the persistent decode step's parts share: the layout of the packed weights, its parameters, and how blocks hand
// activations to each other. decode_persistent.cu describes the whole.
#pragma once

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/infer_kernels.h"

namespace mm::cuda::persistent {

// Few warps: each runs through all instructions of a stage, which there are more of than work.
constexpr int n_warp = 8, n_thread = 32 * n_warp;
constexpr int max_tokens = 8, max_layers = 64;

// --- packed weights -----------------------------------------------------------------------------------------------
// A tile is 8 rows of a matrix, stored as units of 8 rows x unit_k columns in the order in which a warp's lanes hold
// them: lane l has row l / 4.
//   bf16: 512 bytes, 32 columns; 16 bytes a lane, of columns 8 (l % 4) + 0..7 the pairs 0, 4, 2, 6 (as mma wants them)
//   i8: 544 bytes, 64 columns; 16 bytes a lane, columns 8 (l % 4) + 0..7 of the first group of 32, then of the second;
//       behind them 8 x {f16 scale of the first group, of the second}
// Tiles of gate_up hold 4 rows of gate, then the same 4 of up. A block's tiles of all stages lie one after another in
// the order in which it uses them: one stream.
constexpr int rows_per_tile = 8, slot_units = 16;
__host__ __device__ constexpr int unit_k(WeightFormat f) { return f == WeightFormat::i8 ? 64 : 32; }
__host__ __device__ constexpr int unit_bytes(WeightFormat f) { return f == WeightFormat::i8 ? 544 : 512; }
constexpr int held_units = 21, held_tiles = 7;  // weights that a warp holds in registers: units, of so many tiles

// Tiles of a stage are computed in passes; a warp takes units w, w + n_warp, ... of every tile of the pass: so many.
__host__ __device__ constexpr int units_per_warp(int units) {
  const int n = (units + n_warp - 1) / n_warp;
  return n <= 6 ? n : n <= 8 ? 8 : n <= 10 ? 10 : n <= 12 ? 12 : n <= 16 ? 16 : n;  // products are compiled for these
}
constexpr int most_units_per_warp = 16;
__host__ __device__ constexpr int tiles_per_pass(int units, int held) {
  const int n = held / units_per_warp(units);
  return n < held_tiles ? n : held_tiles;
}

// --- exchange -----------------------------------------------------------------------------------------------------
// Blocks exchange activations through 32-bit words in global memory that hold `unset` until they are written: a reader
// polls the word it needs, so data and the news of it travel together and there is no barrier over the grid. Every word
// is written once a step. Two sets alternate from step to step; the set of the step before is reset during a step.
// `unset` is a NaN that arithmetic does not make (it makes 0x7fffffff).
constexpr uint32_t unset = 0xffffffffu;

// Words of one set: [n_layer][layer_words], then logits [max_rows][logit_words], stream [d_model]. Within a layer
// (words from its start):
struct Exchange {
  uint32_t* set[2] = {};
  int64_t layer_words = 0, logits = 0, set_words = 0;
  int64_t qkv = 0, parts = 0, merged = 0, mid = 0, act = 0, out = 0;  // each [max_rows][width], parts see attention
  int64_t stream = 0;  // of the set: a single row's residual stream before the first layer
  int part_words = 0, n_parts = 0;
  int logit_words = 0;
};

struct State {  // on the device; block 0 changes it at the end of a step
  uint32_t step;
  uint32_t begun;    // blocks that ever read `step`, modulo 2^32: block 0 must not change it before all have
  int32_t rows[2];   // of the last step on each set
  int32_t parts[2];  // of `parts`, how many it may have written
};

struct StageShape {
  int units = 0, tiles_per_pass = 0;  // units of a tile
  int k = 0;
};
enum StageKind { stage_qkv = 0, stage_o = 1, stage_gate_up = 2, stage_down = 3, stage_head = 4 };

// The host's plan for a step with one row: a block's weights pass by pass, each in one piece of the ring.
struct RowPass {
  uint32_t from, bytes;                  // of the block's stream
  uint32_t to, after;                    // byte in the ring; may be copied once so many passes have been taken
  int stage, first_tile, tiles, unused;  // stage -1: the end
};
static_assert(sizeof(RowPass) == 32);

// Byte offsets in a block's shared memory.
struct SharedPlan {
  int full, passes, segments, residual, input, part, sums, q, own, ml, scores, rows, rope, kv_ring, ring, bytes;
  int input_stride;  // bytes between tokens of `input`
  int n_slots, held;
};

struct Params {
  int d_model, d_ff, n_layer, n_vocab, n_head, n_kv_head, d_head;
  float eps, scale2, inv_d;  // attention scale * log2 e, 1 / d_model
  int n_tok, max_rows, max_split, qkv_width;
  int n_attention;  // the first blocks, which have no weights; 0: none. They run a single row's attention.
  bool roles;       // this step has a single row, whose attention they run
  int n_row_parts;  // of ex.parts, what that writes
  StageShape shape[5];
  const unsigned char* stream;
  const uint32_t* block_begin;  // [grid + 1] units
  const int2* segments;         // [grid][4 n_layer + 1] first tile, tiles
  const RowPass* passes;        // [grid][n_pass]
  int n_pass;                   // with the end
  const float* norms;           // [n_layer][norm_stride]: input, post, q, k; then final
  int norm_stride, norm_q;      // norm_q: where q's begins, k's follows; -1: no qk-norm
  const void* embed;
  const void* embed_scales;
  WeightFormat embed_format;
  const float *cos, *sin;
  KvFormat kv_format;
  void *k, *v;
  float *k_scale, *v_scale;
  int64_t kv_layer_stride;
  int sum_stride;  // of `sums`, a multiple of 4
  Exchange ex;
  State* state;
  SharedPlan smem;
  int resident_16ths;  // of the weights that L2 is asked to keep; < 0: no hint
  // of the step
  PersistentRow rows[max_tokens];
  RowSampling sampling[max_tokens];
  const int32_t *prev_ids, *table;
  int64_t table_ld;
  int block_shift;
  float *logits, *hidden;
  bool draw;
  float* scores;  // [max_rows][logit_words] where they do not fit shared memory; else null
  const LogitEdit* edits;
  const uint32_t* masks;
  int32_t *next_ids, *next_ids_host;
#ifdef MM_PERSISTENT_PROBE
  int probe;  // 1: polls do not wait, 2: no weights are copied or waited for, 4: no attention over old keys
  long long* trace;
#endif
};

// Shapes with kernels of their own: minimind-3's and minimind2-small's.
inline int known_shape(const Params& p) {
  const auto is = [&](int d, int ff, int head, int kv, int dh) {
    return p.d_model == d && p.d_ff == ff && p.n_head == head && p.n_kv_head == kv && p.d_head == dh;
  };
  return is(768, 2432, 8, 4, 96) ? 1 : is(512, 1408, 8, 2, 64) ? 2 : 0;
}

// A step with one row: the first blocks run its attention, the others products (decode_persistent_alone.cuh,
// decode_persistent_row.cuh).
constexpr int attention_blocks = 8, alone_most_keys = 560;  // of a block; with more, all blocks together are faster
__host__ __device__ constexpr int row_splits(int n_kv_head) { return attention_blocks / n_kv_head; }  // of its keys
constexpr int alone_keys = 16 * n_warp;                                                               // of a round
constexpr int alone_bytes = 216 * 1024;  // of shared memory
constexpr int row_barriers = 32;         // passes under way at most
// Tiles of a pass, by the units of a tile: what fits the registers, INT8 weights widened to bf16.
__host__ __device__ constexpr int row_tiles(WeightFormat f, int units) {
  const int n = (f == WeightFormat::i8 ? held_units / 2 : held_units) / units_per_warp(units);
  return n < held_tiles ? n : held_tiles;
}
constexpr int row_sum_pitch = 2 * n_warp + 4;  // floats between a pass's outputs, for the sums of its warps
constexpr int row_part_bytes = held_tiles * rows_per_tile * row_sum_pitch * 4;

using Kernel = void (*)(Params);
Kernel kernel_of_bf16(const Params&p), kernel_of_i8(const Params&p);  // for p's shape and number of tokens

// What a kernel is compiled for: kTok 1 or up to 4 or 8 tokens; a model's shape, or 0 for any.
template <WeightFormat kFormat, int kTok, int kD = 0, int kFf = 0, int kDHead = 0, int kGroup = 0>
struct Traits {
  static constexpr WeightFormat format = kFormat;
  static constexpr int tok = kTok, unit = unit_bytes(kFormat), d_head = kDHead, group = kGroup;
  static constexpr bool wide = kTok > 4, fixed = kD > 0;
  static constexpr bool roles = kTok == 1;  // the first blocks run the attention and nothing else
  // Units a warp has of a tile of width d_model or d_ff; 0: known at run time.
  static constexpr int units_d = kD / unit_k(kFormat), units_ff = kFf / unit_k(kFormat);
  static constexpr int per_d = units_per_warp(units_d), per_ff = units_per_warp(units_ff);
  static __device__ __forceinline__ int n_tok(const Params& p) { return kTok == 1 ? 1 : p.n_tok; }
  static __device__ __forceinline__ int d_model(const Params& p) { return fixed ? kD : p.d_model; }
  static __device__ __forceinline__ int d_ff(const Params& p) { return fixed ? kFf : p.d_ff; }
};

#ifdef MM_PERSISTENT_PROBE
__device__ __forceinline__ bool probing(const Params& p, int bit) { return (p.probe & bit) != 0; }
#else
__device__ __forceinline__ bool probing(const Params&, int) { return false; }
#endif

#ifdef MM_PERSISTENT_PROBE
#define MM_TRACE(event) \
  if (p.trace != nullptr && threadIdx.x == 0) p.trace[static_cast<int64_t>(blockIdx.x) * 1024 + (event)] = clock64()
#else
#define MM_TRACE(event)
#endif

// A wait that lasts longer than any step is a bug: stop instead of hanging the GPU.
#ifdef MM_PERSISTENT_GUARD
struct SpinGuard {
  unsigned n = 0;
  int what;
  __device__ __forceinline__ explicit SpinGuard(int w) : what(w) {}
  __device__ __forceinline__ void spin() {
    if (++n == (1u << 22)) {
      if (threadIdx.x % 32 == 0)
        printf("persistent decode: stuck at %d, block %d\n", what, static_cast<int>(blockIdx.x));
      __trap();
    }
  }
};
#else
struct SpinGuard {
  __device__ __forceinline__ explicit SpinGuard(int) {}
  __device__ __forceinline__ void spin() {}
};
#endif

__device__ __forceinline__ uint32_t load_word(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ uint4 load_words(const uint32_t* p) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p)
               : "memory");
  return x;
}
__device__ __forceinline__ void publish(uint32_t* p, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x == unset ? 0x7fffffffu : x) : "memory");
}
__device__ __forceinline__ void publish(uint32_t* p, float x) { publish(p, __float_as_uint(x)); }

__device__ __forceinline__ void publish(uint32_t* p, float x, float y, float z, float w) {  // 16-byte aligned
  const auto word = [](float f) { return __float_as_uint(f) == unset ? 0x7fffffffu : __float_as_uint(f); };
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word(x)), "r"(word(y)),
               "r"(word(z)), "r"(word(w))
               : "memory");
}

__device__ __forceinline__ bool any_unset(const uint4& x) {
  return x.x == unset || x.y == unset || x.z == unset || x.w == unset;
}
// Waits for n words at from[i * stride] (n a compile-time constant, all loads in flight at once).
template <int n>
__device__ __forceinline__ void await(const Params& p, uint32_t (&x)[n], const uint32_t* (&from)[n], int what) {
#pragma unroll
  for (int i = 0; i < n; i++) x[i] = load_word(from[i]);
  SpinGuard guard(what);
#pragma unroll
  for (int i = 0; i < n; i++) {
    while (x[i] == unset && !probing(p, 1)) x[i] = load_word(from[i]), guard.spin();
  }
}

// --- the ring of weights in shared memory -------------------------------------------------------------------------
__device__ __forceinline__ void init_barrier(uint32_t bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ __forceinline__ bool mbarrier_done(uint32_t bar, uint32_t parity) {
  uint32_t done;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(bar), "r"(parity)
               : "memory");
#else
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(bar), "r"(parity)
               : "memory");
#endif
  return done != 0;
}

}  // namespace mm::cuda::persistent
