// Attention backward on tensor cores (mma.sync), two kernels without atomics, so the same bits every time:
//
//   P = 2^(scale log2(e) q k^T - lse log2(e)),  dP = dout v^T,  delta = rowsum(dout * out),  dS = P (dP - delta)
//   1. dq = scale dS k: a block is 128 query rows of one head, over the keys they see. On the way it computes delta and
//      leaves {lse log2(e), delta} of every (head, query) in scratch.
//   2. dk = scale dS^T q, dv = P^T dout: a block is 128 keys of one key head, over the queries that see them, all heads
//      of the group one after another.
//
//            queries ->                     The second works on transposed tiles, S^T = K Q^T: a warp owns rows that
//            are
//   keys [ \ # # # ]  \ masked             keys, P^T and dS^T go from accumulators to operands in registers, and
//        [   \ # # ]  # whole              nothing but the operands themselves passes through shared memory.
//
// One kernel would save computing S and dP twice (10 d flops for each visible pair, here 14 d), but then dq is summed
// across blocks: by atomics (not deterministic), in turns, or through one copy a key tile. Reads of fragments from
// shared memory bound both: with 16 rows a warp 256 bytes a product (2 clocks, the product itself takes 1.6), with 32
// rows half of that; so warps have 32 rows where the sums fit the registers (dk and dv of 32 x d: up to d 64).
//
// Measured on an H100 (bf16, causal; 10 d flops a pair; TFLOP/s; tiles in order of falling row, in brackets sequence by
// sequence): B32 T768 H8/4 d96 181 (171), B64 T512 H8/2 d64 171 (138), B16 T2048 d96 232 (217), d64 236 (182), B16
// T1024 d128 182 (157), B128 T512 d32 152 (139). In flops done, dq runs at 200 to 237 and dk, dv at 246 to 267. What
// lost, dq: at d96 q kept in registers (209 against 237: spills), 8 warps (204); at d64 one head a block (170). dk, dv:
// d64 with 16 keys a warp (239 against 265, or 163 with two such blocks an SM), d96 with 64 queries at a time (247
// against 263) or 32 keys a warp (188); steps of 16 queries everywhere.
#include "kernels/cuda/attention_mma.h"
#include "kernels/cuda/attention_mma_dq.cuh"

namespace mm::cuda {

namespace {

// --- dk, dv -------------------------------------------------------------------------------------------------------
// kBlock queries a stage, kStep at a time in registers.
template <class T_, int D_, int kWarps_, int kBlock_, int kStep_, bool kKeepK_, bool kKeepV_, int kBlocksPerSm_>
struct KeyShape {
  using T = T_;
  static constexpr int D = D_, warps = kWarps_, block = kBlock_, step = kStep_, MT = tile_rows / (16 * warps);
  static constexpr bool keep_k = kKeepK_, keep_v = kKeepV_;
  static constexpr int threads = 32 * warps, per_sm = kBlocksPerSm_;
  static constexpr int shared = 2 * D * (2 * tile_rows + 4 * block) + 2 * block * static_cast<int>(sizeof(Stats));
};

template <class C>
__global__ void __launch_bounds__(C::threads, C::per_sm)
    attention_dkv_kernel(const __grid_constant__ AttentionBwd b, float scale2, const Stats* stats) {
  using T = typename C::T;
  constexpr int D = C::D, MT = C::MT, N = C::step;
  using L = RowLayout<D>;
  const Attention& a = b.fwd;
  const int kv_head = static_cast<int>(blockIdx.x) % a.n_kv_head;
  const Tile tile = find_tile(a, static_cast<int>(blockIdx.x) / a.n_kv_head, tile_rows);
  if (tile.seq < 0) return;
  const Sequence seq(a, tile.seq);
  // The list has later rows first; here the earlier ones are seen by most queries.
  const int key0 = ((seq.q_len - 1) / tile_rows - tile.row / tile_rows) * tile_rows, n_key = seq.q_len - key0;
  if (n_key <= 0 || key0 < 0) return;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int group = a.n_head / a.n_kv_head;
  const int64_t token = seq.q0 + key0;
  const T* k = static_cast<const T*>(a.k) + (seq.kv0 + key0) * a.ldk + kv_head * D;
  const T* v = static_cast<const T*>(a.v) + (seq.kv0 + key0) * a.ldv + kv_head * D;
  const T* q = static_cast<const T*>(a.q) + token * a.ldq + kv_head * group * D;
  const T* dout = static_cast<const T*>(b.dout) + token * b.lddout + kv_head * group * D;
  const Stats* head_stats = stats + static_cast<int64_t>(kv_head) * group * a.n_tok + token;

  extern __shared__ __align__(128) unsigned char shared[];
  constexpr uint32_t tile_bytes = 2 * D * tile_rows, block_bytes = 2 * D * C::block;
  const uint32_t k_shared = shared_address(shared), q_shared = k_shared + 2 * tile_bytes;
  const uint32_t stats_shared = q_shared + 4 * block_bytes;
  const Stats* const block_stats = reinterpret_cast<const Stats*>(shared + 2 * tile_bytes + 4 * block_bytes);
  const int n_block = (n_key + C::block - 1) / C::block, n_turn = group * n_block;
  // Queries from key0 + block * C::block on, of head `head` of the group.
  const auto copy_block = [&](int head, int block, int stage) {
    const uint32_t to = q_shared + static_cast<uint32_t>(stage) * 2 * block_bytes;
    const int first = block * C::block, left = n_key - first;
    copy_rows_async<D, C::block, C::threads>(to, q + first * a.ldq + head * D, a.ldq, left, tid);
    copy_rows_async<D, C::block, C::threads>(to + block_bytes, dout + first * b.lddout + head * D, b.lddout, left, tid);
    if (tid < C::block) {
      const Stats* from = head_stats + head * a.n_tok + first;
      cp_async8(stats_shared + static_cast<uint32_t>(stage * C::block + tid) * 8, tid < left ? from + tid : stats,
                tid < left);
    }
    cp_async_commit();
  };
  copy_rows_async<D, tile_rows, C::threads>(k_shared, k, a.ldk, n_key, tid);
  copy_rows_async<D, tile_rows, C::threads>(k_shared + tile_bytes, v, a.ldv, n_key, tid);
  copy_block(0, 0, 0);

  const int warp_row = warp * 16 * MT;
  const FragmentAddress<D> rows(0, Pattern::rows, lane), cols(0, Pattern::cols, lane);
  const auto row_bytes = static_cast<uint32_t>(warp_row * L::bytes);
  RowOperand<D, MT, C::keep_k> k_rows{k_shared + row_bytes};
  RowOperand<D, MT, C::keep_v> v_rows{k_shared + tile_bytes + row_bytes};
  float dk[MT][D / 8][4], dv[MT][D / 8][4];
  set_zero(dk);
  set_zero(dv);
  cp_async_wait<0>();
  __syncthreads();
  k_rows.load(rows);
  v_rows.load(rows);

  // first_seen: column of the first query that sees row 0 of the warp.
  const auto step = [&]<int M, bool kMask>(uint32_t qs, uint32_t ds, const Stats* st, int first_seen) {
    float p[MT][M / 8][4], dp[MT][M / 8][4];
    set_zero(p);
    set_zero(dp);
    multiply_rows<T, D, MT, M>(p, k_rows, qs, rows, cols);
    multiply_rows<T, D, MT, M>(dp, v_rows, ds, rows, cols);
#pragma unroll
    for (int c = 0; c < M / 8; c++) {
      const float4 x = *reinterpret_cast<const float4*>(st + c * 8 + lane % 4 * 2);  // of two queries
#pragma unroll
      for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float w = exp2_fast(p[m][c][e] * scale2 - (e % 2 == 0 ? x.x : x.z));
          if constexpr (kMask) {
            const int row = m * 16 + e / 2 * 8 + lane / 4, query = c * 8 + lane % 4 * 2 + e % 2;
            if (query < row + first_seen) w = 0.0f;
          }
          p[m][c][e] = w;
          dp[m][c][e] = w * (dp[m][c][e] - (e % 2 == 0 ? x.y : x.w));
        }
      }
    }
    multiply_columns<T, D, MT, M>(dv, p, ds, rows);
    multiply_columns<T, D, MT, M>(dk, dp, qs, rows);
  };

  int next_head = 0, next_block = 0;
  for (int turn = 0, block = 0;; turn++) {
    if (++next_block == n_block) next_block = 0, next_head++;
    if (turn + 1 < n_turn) copy_block(next_head, next_block, (turn + 1) & 1);
    const uint32_t qs = q_shared + static_cast<uint32_t>(turn & 1) * 2 * block_bytes, ds = qs + block_bytes;
    const int first = block * C::block, first_seen = warp_row - first;
    const Stats* st = block_stats + (turn & 1) * C::block;
    if (warp_row < n_key && first_seen + 16 * MT <= 1) {
#pragma unroll 1
      for (int part = 0; part < C::block; part += N) {
        const auto at = static_cast<uint32_t>(part * L::bytes);
        step.template operator()<N, false>(qs + at, ds + at, st + part, 0);
      }
    } else if (warp_row < n_key) {
#pragma unroll 1
      for (int part = max(first_seen, 0) / 32 * 32; part < C::block; part += 32) {
        const auto at = static_cast<uint32_t>(part * L::bytes);
        step.template operator()<32, true>(qs + at, ds + at, st + part, first_seen - part);
      }
    }
    block = next_block;
    if (turn + 1 >= n_turn) break;
    cp_async_wait<0>();
    __syncthreads();
  }
  if (warp_row >= n_key) return;
  float factor[2 * MT];
#pragma unroll
  for (int r = 0; r < 2 * MT; r++) factor[r] = a.scale;
  T* dk_to = static_cast<T*>(b.dk) + (seq.kv0 + key0 + warp_row) * b.lddk + kv_head * D;
  store_rows<D, MT>(dk_to, b.lddk, n_key - warp_row, shared + row_bytes, lane, dk, factor);
#pragma unroll
  for (int r = 0; r < 2 * MT; r++) factor[r] = 1.0f;
  T* dv_to = static_cast<T*>(b.dv) + (seq.kv0 + key0 + warp_row) * b.lddv + kv_head * D;
  store_rows<D, MT>(dv_to, b.lddv, n_key - warp_row, shared + tile_bytes + row_bytes, lane, dv, factor);
}

// --- launches -----------------------------------------------------------------------------------------------------
template <class C>
void launch_dq(const Context& ctx, const AttentionBwd& b, Stats* stats) {
  const auto kernel = attention_dq_kernel<C>;
  static const cudaError_t once = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared);
  MM_CUDA_CHECK(once);
  const auto blocks = static_cast<unsigned>(tile_grid(b.fwd, tile_rows) * b.fwd.n_head);
  kernel<<<blocks, C::threads, C::shared, ctx.stream>>>(b, b.fwd.scale * log2_e, stats);
  MM_CUDA_LAUNCHED();
}

template <class C>
void launch_dq_heads(const Context& ctx, const AttentionBwd& b, Stats* stats, int heads = 0) {
  const auto kernel = attention_dq_heads_kernel<C>;
  static const cudaError_t once = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared);
  MM_CUDA_CHECK(once);
  const int64_t tiles = tile_grid(b.fwd, tile_rows);
  if (heads == 0) heads = heads_per_block(tiles, b.fwd.n_head, ctx.n_sm * C::per_sm);
  const auto blocks = static_cast<unsigned>(tiles * (b.fwd.n_head / heads));
  kernel<<<blocks, C::threads, C::shared, ctx.stream>>>(b, b.fwd.scale * log2_e, stats, heads);
  MM_CUDA_LAUNCHED();
}

template <class C>
void launch_dkv(const Context& ctx, const AttentionBwd& b, const Stats* stats) {
  const auto kernel = attention_dkv_kernel<C>;
  static const cudaError_t once = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared);
  MM_CUDA_CHECK(once);
  const auto blocks = static_cast<unsigned>(tile_grid(b.fwd, tile_rows) * b.fwd.n_kv_head);
  kernel<<<blocks, C::threads, C::shared, ctx.stream>>>(b, b.fwd.scale * log2_e, stats);
  MM_CUDA_LAUNCHED();
}

template <class T>
void launch_for_width(const Context& ctx, const AttentionBwd& b, Stats* stats) {
  switch (b.fwd.d_head) {
    case 32:
      launch_dq<QueryShape<T, 32, 4, 64, 32, true, true, 3>>(ctx, b, stats);
      return launch_dkv<KeyShape<T, 32, 4, 64, 32, true, true, 2>>(ctx, b, stats);
    case 64:
      launch_dq_heads<QueryHeadsShape<T, 64, 4, 64, 32, 2>>(ctx, b, stats);
      return launch_dkv<KeyShape<T, 64, 4, 64, 32, false, false, 2>>(ctx, b, stats);
    case 96:
      launch_dq<QueryShape<T, 96, 4, 64, 32, false, false, 2>>(ctx, b, stats);
      return launch_dkv<KeyShape<T, 96, 8, 64, 32, true, true, 1>>(ctx, b, stats);
    case 128:
      launch_dq<QueryShape<T, 128, 4, 32, 32, false, false, 2>>(ctx, b, stats);
      return launch_dkv<KeyShape<T, 128, 8, 32, 32, true, false, 1>>(ctx, b, stats);
    default: fail("attention", "d_head is not 32, 64, 96 or 128", __FILE__, __LINE__);
  }
}

}  // namespace

size_t mma_attention_bwd_scratch(int64_t n_tok, int n_head) {
  return (static_cast<size_t>(n_tok) * static_cast<size_t>(n_head) * sizeof(Stats) + 255) / 256 * 256;
}

void mma_attention_bwd(const Context& ctx, DType t, const AttentionBwd& b) {
  if (tile_grid(b.fwd, tile_rows) == 0) return;
  Stats* stats = Scratch(ctx).take<Stats>(static_cast<size_t>(b.fwd.n_tok) * static_cast<size_t>(b.fwd.n_head));
  t == DType::bf16 ? launch_for_width<bf16>(ctx, b, stats) : launch_for_width<f16>(ctx, b, stats);
}

}  // namespace mm::cuda
