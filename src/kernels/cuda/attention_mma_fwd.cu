// Attention forward on tensor cores (mma.sync): out = softmax(scale q k^T + causal mask) v, lse = log of its
// denominator.
//
// A block is 128 query rows of one head, 4 warps of 32 rows. Keys and values come in blocks of 64 rows through two
// stages of shared memory (cp.async), the last visible ones first: the masked blocks come first, and the running
// maximum is mostly right from the start.
//
//            keys ->   0    64   128  192         warp 0: rows   0-31  reads blocks 1 (half), 0
//   rows    0 - 63   [ #\ ]                       warp 1: rows  32-63  1 is wholly masked for it when shift = 0 ...
//   rows   64 - 127  [ ## ][ #\ ]                 a warp skips what none of its rows sees, in steps of 32 keys
//
// A warp computes S = Q K^T (32 x 64, fp32 in registers), P = 2^(S scale log2(e) - m), O += P V, P going from
// accumulator to operand without leaving registers. 32 rows a warp, not 16: each fragment of K and V read from shared
// memory then feeds two products, else shared memory (128 bytes a clock) would be the limit.
//
// m, the reference of the exponent, is the maximum of the first keys; it follows the true maximum only when a sum of P
// shows that this has become much larger (fp32 sums and 16-bit P are as exact at 2^13 as at 1). So the usual step
// computes no maximum at all: a fifth fewer instructions, and no shuffles to wait for. A step that finds m too low
// starts again.
//
// Work: 4 d flops for each (query, visible key); memory: q, out once, k, v once a tile (from L2 mostly).
//
// Measured on an H100 (bf16, causal; TFLOP/s; tiles in order of falling row, in brackets sequence by sequence): B32
// T768 H8/4 d96 237 (218), B64 T512 H8/2 d64 193 (183), B16 T2048 d96 315 (295), d64 307 (272), B16 T1024 d128 274
// (243), B128 T512 d32 157 (150). The order matters because the grid's tail must not hold long tiles. What lost: 16
// rows a warp and twice the warps (d64 174, d96 208); 3 blocks an SM at d96 (214); q in registers at d64 with 2 blocks
// (182); steps of 64 keys at d64 and d128 (187, 245); a maximum in every step (d64 183, T2048 280); several heads a
// block, the next one's q coming in meanwhile (the loop over heads alone made the code 14 % slower).
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_mma.h"

namespace mm::cuda {

namespace {

constexpr int key_block = 64;
constexpr float slack = 8.0f;          // how far, in powers of two, the maximum may exceed the reference
constexpr float sum_limit = 16384.0f;  // of a lane's P in one step, and so of P, which f16 must hold

// MT: tiles of 16 rows a warp; kStep: keys at a time in registers; kKeepQ: q in registers, not read at each use.
template <class T_, int D_, int MT_, int kStep_, bool kKeepQ_, int kBlocksPerSm_>
struct ForwardShape {
  using T = T_;
  static constexpr int D = D_, MT = MT_, step = kStep_, per_sm = kBlocksPerSm_;
  static constexpr bool keep_q = kKeepQ_;
  static constexpr int warp_rows = 16 * MT, threads = 32 * tile_rows / warp_rows;
  static constexpr int shared = 2 * D * (tile_rows + 4 * key_block);
};

template <class C>
struct ForwardWarp {
  using T = typename C::T;
  static constexpr int D = C::D, MT = C::MT, n_row = 2 * MT;
  FragmentAddress<D> rows, cols;
  RowOperand<D, MT, C::keep_q> q;
  float o[MT][D / 8][4], m[n_row], l[n_row];  // row m * 16 + half * 8 + lane / 4 is number 2 * m + half
  float scale2;
  int lane;

  __device__ __forceinline__ ForwardWarp(uint32_t q_shared, float s, int lane_)
      : rows(0, Pattern::rows, lane_), cols(0, Pattern::cols, lane_), q{q_shared}, scale2(s), lane(lane_) {
    set_zero(o);
#pragma unroll
    for (int r = 0; r < n_row; r++) m[r] = minus_infinity(), l[r] = 0.0f;
  }

  // N keys; first_hidden: of row 0 of the warp, counted from the first of these keys.
  template <int N, bool kMask>
  __device__ __forceinline__ void step(uint32_t k, uint32_t v, int first_hidden) {
    float s[MT][N / 8][4];
    set_zero(s);
    multiply_rows<T, D, MT, N>(s, q, k, rows, cols);
    if constexpr (kMask) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int c = 0; c < N / 8; c++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int row = i * 16 + e / 2 * 8 + lane / 4, key = c * 8 + lane % 4 * 2 + e % 2;
            if (key >= row + first_hidden) s[i][c][e] = minus_infinity();
          }
        }
      }
      softmax<N>(s);
    } else if (!try_softmax<N>(s)) {
      set_zero(s);
      multiply_rows<T, D, MT, N>(s, q, k, rows, cols);
      softmax<N>(s);
    }
    multiply_columns<T, D, MT, N>(o, s, v, rows);
  }

  // With the reference as it is: P, and its sums, unless a sum says that the reference is too low (or there is none
  // yet).
  template <int N>
  __device__ __forceinline__ bool try_softmax(float (&s)[MT][N / 8][4]) {
    float sum[n_row];
    bool fits = true;
#pragma unroll
    for (int r = 0; r < n_row; r++) {
      const int i = r / 2, e = r % 2 * 2;
      float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
      for (int c = 0; c < N / 8; c++) {
        sum0 += s[i][c][e] = exp2_fast(s[i][c][e] * scale2 - m[r]);
        sum1 += s[i][c][e + 1] = exp2_fast(s[i][c][e + 1] * scale2 - m[r]);
      }
      sum[r] = sum0 + sum1;
      fits &= sum[r] <= sum_limit;  // false for NaN
    }
    if (!__all_sync(0xffffffffu, fits)) return false;
#pragma unroll
    for (int r = 0; r < n_row; r++) l[r] += sum[r];
    return true;
  }

  // With a new reference where the maximum has grown by more than the slack.
  template <int N>
  __device__ __forceinline__ void softmax(float (&s)[MT][N / 8][4]) {
    float top[n_row];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < n_row; r++) {
      const int i = r / 2, e = r % 2 * 2;
      float x = fmaxf(s[i][0][e], s[i][0][e + 1]);
#pragma unroll
      for (int c = 1; c < N / 8; c++) x = fmaxf(x, fmaxf(s[i][c][e], s[i][c][e + 1]));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
      top[r] = x * scale2;
      grown |= top[r] > m[r] + slack;
    }
    if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
      for (int r = 0; r < n_row; r++) {
        const float to = fmaxf(m[r], top[r]), f = to == m[r] ? 1.0f : exp2_fast(m[r] - to);
        m[r] = to;
        l[r] *= f;
#pragma unroll
        for (int c = 0; c < D / 8; c++) o[r / 2][c][r % 2 * 2] *= f, o[r / 2][c][r % 2 * 2 + 1] *= f;
      }
    }
#pragma unroll
    for (int r = 0; r < n_row; r++) {
      const int i = r / 2, e = r % 2 * 2;
      const float from = m[r] == minus_infinity() ? 0.0f : m[r];  // no visible key so far: all 2^-inf
      float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
      for (int c = 0; c < N / 8; c++) {
        sum0 += s[i][c][e] = exp2_fast(s[i][c][e] * scale2 - from);
        sum1 += s[i][c][e + 1] = exp2_fast(s[i][c][e + 1] * scale2 - from);
      }
      l[r] += sum0 + sum1;
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::threads, C::per_sm)
    attention_fwd_kernel(const __grid_constant__ Attention a, float scale2, int least_queries) {
  using T = typename C::T;
  constexpr int D = C::D, MT = C::MT, warp_rows = C::warp_rows, n_thread = C::threads;
  const int head = static_cast<int>(blockIdx.x) % a.n_head;
  const Tile tile = find_tile(a, static_cast<int>(blockIdx.x) / a.n_head, tile_rows);
  if (tile.seq < 0) return;
  const Sequence seq(a, tile.seq);
  const int n_row = seq.q_len - tile.row;
  if (n_row <= 0 || seq.q_len < least_queries) return;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int kv_head = head / (a.n_head / a.n_kv_head);
  const int n_key = min(seq.kv_len, tile.row + tile_rows + seq.shift);  // seen by some row
  const T* q = static_cast<const T*>(a.q) + (seq.q0 + tile.row) * a.ldq + head * D;
  const T* k = static_cast<const T*>(a.k) + seq.kv0 * a.ldk + kv_head * D;
  const T* v = static_cast<const T*>(a.v) + seq.kv0 * a.ldv + kv_head * D;

  extern __shared__ __align__(128) unsigned char shared[];
  constexpr uint32_t stage_bytes = 2 * D * key_block;
  const uint32_t q_shared = shared_address(shared), kv_shared = q_shared + 2 * D * tile_rows;
  const auto copy_block = [&]<bool kWhole>(int i, int stage) {
    const uint32_t to = kv_shared + static_cast<uint32_t>(stage) * 2 * stage_bytes;
    const int first = i * key_block;
    copy_rows_async<D, key_block, n_thread, kWhole>(to, k + first * a.ldk, a.ldk, seq.kv_len - first, tid);
    copy_rows_async<D, key_block, n_thread, kWhole>(to + stage_bytes, v + first * a.ldv, a.ldv, seq.kv_len - first,
                                                    tid);
    cp_async_commit();
  };

  int i = (n_key + key_block - 1) / key_block - 1, stage = 0;
  copy_rows_async<D, tile_rows, n_thread>(q_shared, q, a.ldq, n_row, tid);
  if (i >= 0) copy_block.template operator()<false>(i, 0);
  const int warp_row = warp * warp_rows, first_row = tile.row + warp_row;
  ForwardWarp<C> w(q_shared + static_cast<uint32_t>(warp_row * RowLayout<D>::bytes), scale2, lane);
  cp_async_wait<0>();
  __syncthreads();
  w.q.load(w.rows);
  while (i >= 0) {
    if (i > 0) copy_block.template operator()<true>(i - 1, stage ^ 1);
    const int first = i * key_block, seen = min(n_key, first_row + warp_rows + seq.shift) - first;
    const uint32_t ks = kv_shared + static_cast<uint32_t>(stage) * 2 * stage_bytes, vs = ks + stage_bytes;
    const int first_hidden = first_row + seq.shift + 1 - first;
    if (warp_row < n_row && first_hidden >= key_block) {
#pragma unroll 1
      for (int part = 0; part < key_block; part += C::step) {
        const auto at = static_cast<uint32_t>(part * RowLayout<D>::bytes);
        w.template step<C::step, false>(ks + at, vs + at, 0);
      }
    } else if (warp_row < n_row) {
#pragma unroll 1
      for (int part = 0; part < seen && part < key_block; part += 32) {
        const auto at = static_cast<uint32_t>(part * RowLayout<D>::bytes);
        w.template step<32, true>(ks + at, vs + at, first_hidden - part);
      }
    }
    if (i-- == 0) break;
    stage ^= 1;
    cp_async_wait<0>();
    __syncthreads();
  }

  if (warp_row >= n_row) return;
  float inverse[2 * MT];
#pragma unroll
  for (int r = 0; r < 2 * MT; r++) {
    float l = w.l[r];
    l += __shfl_xor_sync(0xffffffffu, l, 1);
    l += __shfl_xor_sync(0xffffffffu, l, 2);
    inverse[r] = 1.0f / l;
    const int row = warp_row + r * 8 + lane / 4;
    if (a.lse != nullptr && lane % 4 == 0 && row < n_row)
      a.lse[static_cast<int64_t>(seq.q0 + tile.row + row) * a.n_head + head] = (w.m[r] + log2f(l)) * ln_2;
  }
  T* out = static_cast<T*>(a.out) + (seq.q0 + first_row) * a.ldo + head * D;
  store_rows<D, MT>(out, a.ldo, n_row - warp_row, shared + warp_row * RowLayout<D>::bytes, lane, w.o, inverse);
}

template <class C>
void launch(const Context& ctx, const Attention& a, int least_queries) {
  const auto kernel = attention_fwd_kernel<C>;
  static const cudaError_t once = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared);
  MM_CUDA_CHECK(once);
  const auto blocks = static_cast<unsigned>(tile_grid(a, tile_rows) * a.n_head);
  kernel<<<blocks, C::threads, C::shared, ctx.stream>>>(a, a.scale * log2_e, least_queries);
  MM_CUDA_LAUNCHED();
}

template <class T>
void launch_for_width(const Context& ctx, const Attention& a, int least_queries) {
  switch (a.d_head) {
    case 32: return launch<ForwardShape<T, 32, 2, 32, true, 4>>(ctx, a, least_queries);
    case 64: return launch<ForwardShape<T, 64, 2, 32, false, 3>>(ctx, a, least_queries);
    case 96: return launch<ForwardShape<T, 96, 2, 32, true, 2>>(ctx, a, least_queries);
    case 128: return launch<ForwardShape<T, 128, 2, 32, false, 2>>(ctx, a, least_queries);
    default: fail("attention", "d_head is not 32, 64, 96 or 128", __FILE__, __LINE__);
  }
}

}  // namespace

void mma_attention_fwd(const Context& ctx, DType t, const Attention& a, int least_queries) {
  if (tile_grid(a, tile_rows) == 0) return;
  t == DType::bf16 ? launch_for_width<bf16>(ctx, a, least_queries) : launch_for_width<f16>(ctx, a, least_queries);
}

}  // namespace mm::cuda
