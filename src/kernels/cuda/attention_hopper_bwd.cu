// Attention, backward, on Hopper's tensor cores (wgmma). With c = scale log2(e), P = exp2(c S - log2(e) lse) and
// delta = rowsum(dout * out):
//   S = Q K^T, dP = dO V^T, dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO.
// Two kernels, each a forward pass in shape, so that nothing is added up in memory and the order of every sum is fixed:
//   dq:   a block owns 128 query rows of one head (two warpgroups of 64), walks over the key tiles; also writes delta;
//   dkdv: a block owns 128 keys of one kv head, walks over the query tiles at and after them of all heads of the group;
//         it computes S^T and dP^T (rows: keys), so that P^T and dS^T are A operands straight from the accumulators.
// S and dP are computed twice: 14 d flops a visible pair instead of the 10 d of one fused kernel, which in return would
// need dQ added up in fp32 through L2 in a fixed order and dS transposed through shared memory.
//
// In both, warps 0-7 compute and warp 8 feeds them through TMA (its warpgroup gives its registers to the others):
//
//   dq:   [ q, do: 128 rows ] stays      k, v of 64 keys: ring of stages      dq [64, d] a warpgroup in registers
//   dkdv: [ k, v: 128 rows ]  stays      q, do, lse, delta of 64 rows: ring   dk, dv [64, d] a warpgroup in registers
#include <cmath>

#include "kernels/cuda/attention_hopper.h"
#include "kernels/cuda/attention_hopper_common.cuh"

namespace mm::cuda {
namespace hopper {
namespace {

struct BwdArgs {
  const void* out;
  const void* dout;
  const float* lse;
  float* delta;  // [n_tok, n_head]
  void *dq, *dk, *dv;
  const int32_t* cu;
  const int32_t* tiles;
  const int32_t* n_tiles;
  int64_t ldo, lddout, lddq, lddk, lddv;
  int n_head, n_kv_head, group;
  float scale;
};

constexpr int kThreads = 384;  // two warpgroups and the feeding one
constexpr int kQueries = 64;   // query rows of a stage of dkdv

template <int D, int kKeys, int kStages>
struct DqShared {
  static constexpr int kOwn = Tile<D>::bytes(kRows), kKv = Tile<D>::bytes(kKeys);
  static constexpr int kQ = 0, kDo = kOwn, kK = 2 * kOwn, kV = kK + kStages * kKv, kBars = kV + kStages * kKv;
  static constexpr int kBytes = kBars + 8 * (2 + 4 * kStages) + 1024;  // 1024: the base is rounded up
};
template <int D, int kStages>
struct DkdvShared {
  static constexpr int kOwn = Tile<D>::bytes(kRows), kQo = Tile<D>::bytes(kQueries);
  static constexpr int kK = 0, kV = kOwn, kQ = 2 * kOwn, kDo = kQ + kStages * kQo, kLse = kDo + kStages * kQo;
  static constexpr int kDelta = kLse + kStages * kQueries * 4, kBars = kDelta + kStages * kQueries * 4;
  static constexpr int kBytes = kBars + 8 * (1 + 3 * kStages) + 1024;
};

#if defined(MM_SM90A)

// Sum of a[i] b[i] over one row of D, by the four lanes of a quad.
template <class T, int D>
__device__ inline float quad_dot(const T* a, const T* b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < D / 32; i++) {
    float x[8], y[8];
    load<T, 8>(x, a + 32 * i + 8 * (threadIdx.x % 4));
    load<T, 8>(y, b + 32 * i + 8 * (threadIdx.x % 4));
#pragma unroll
    for (int e = 0; e < 8; e++) sum = fmaf(x[e], y[e], sum);
  }
  return quad_sum(sum);
}

#endif

template <class T, int D, int kKeys, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    attention_dq_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_do,
                        const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                        const BwdArgs p) {
#if defined(MM_SM90A)
  using L = DqShared<D, kKeys, kStages>;
  const int tile = static_cast<int>(blockIdx.x) / p.n_head, head = static_cast<int>(blockIdx.x) % p.n_head;
  if (tile >= *p.n_tiles) return;
  extern __shared__ uint8_t raw[];
  uint8_t* const shared = align_1024(raw);
  uint64_t *const q_full = reinterpret_cast<uint64_t*>(shared + L::kBars), *const do_full = q_full + 1;
  uint64_t *const k_full = q_full + 2, *const k_empty = k_full + kStages;
  uint64_t *const v_full = k_empty + kStages, *const v_empty = v_full + kStages;
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32), lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(q_full, 1);
    mbarrier_init(do_full, 1);
    for (int s = 0; s < kStages; s++) {
      mbarrier_init(k_full + s, 1);
      mbarrier_init(v_full + s, 1);
      mbarrier_init(k_empty + s, 8);
      mbarrier_init(v_empty + s, 8);
    }
    mbarrier_init_fence();
  }
  const Place at = place_of(p.tiles, p.cu, tile);
  const int n_key_tiles = (min(at.row + kRows, at.len) + kKeys - 1) / kKeys;
  __syncthreads();

  if (warp >= 8) {
    registers_decrease<24>();
    if (warp > 8 || lane != 0) return;
    const int kv_head = head / p.group;
    mbarrier_arrive_expect(q_full, L::kOwn);
    load_tile<D>(shared + L::kQ, &map_q, q_full, at.start + at.row, head);
    for (int i = 0; i < n_key_tiles; i++) {
      const int s = i % kStages, row = at.start + (n_key_tiles - 1 - i) * kKeys;
      const uint32_t parity = (i / kStages + 1) & 1;
      mbarrier_wait(k_empty + s, parity);
      mbarrier_arrive_expect(k_full + s, L::kKv);
      load_tile<D>(shared + L::kK + s * L::kKv, &map_k, k_full + s, row, kv_head);
      if (i == 0) {
        mbarrier_arrive_expect(do_full, L::kOwn);
        load_tile<D>(shared + L::kDo, &map_do, do_full, at.start + at.row, head);
      }
      mbarrier_wait(v_empty + s, parity);
      mbarrier_arrive_expect(v_full + s, L::kKv);
      load_tile<D>(shared + L::kV + s * L::kKv, &map_v, v_full + s, row, kv_head);
    }
    return;
  }
  registers_increase<240>();

  const int group_row = at.row + warp / 4 * 64;          // the warpgroup's first row
  const int row = group_row + warp % 4 * 16 + lane / 4;  // this thread's rows are row, row + 8
  const uint32_t q = smem_address(shared + L::kQ) + warp / 4 * 64 * Tile<D>::kSwizzle;
  const uint32_t d_out = smem_address(shared + L::kDo) + warp / 4 * 64 * Tile<D>::kSwizzle;
  const uint32_t k0 = smem_address(shared + L::kK), v0 = smem_address(shared + L::kV);
  const float c = p.scale * kLog2e;
  const int n_mine = group_row < at.len ? (min(group_row + 64, at.len) + kKeys - 1) / kKeys : 0;
  int i = 0;
  for (; i < n_key_tiles - n_mine; i++) {
    const int s = i % kStages;
    mbarrier_wait(k_full + s, i / kStages & 1);
    mbarrier_wait(v_full + s, i / kStages & 1);
    if (lane == 0) mbarrier_arrive(k_empty + s), mbarrier_arrive(v_empty + s);
  }
  if (n_mine == 0) return;

  float lse[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int64_t at_row = at.start + min(row + 8 * r, at.len - 1), index = at_row * p.n_head + head;
    lse[r] = p.lse[index] * kLog2e;
    delta[r] = quad_dot<T, D>(static_cast<const T*>(p.out) + at_row * p.ldo + head * D,
                              static_cast<const T*>(p.dout) + at_row * p.lddout + head * D);
    if (lane % 4 == 0 && row + 8 * r < at.len) p.delta[index] = delta[r];
  }

  float dq[D / 2], s[kKeys / 2], dp[kKeys / 2];
  uint32_t ds[kKeys / 4];
#pragma unroll
  for (int e = 0; e < D / 2; e++) dq[e] = 0.0f;
  wgmma_pin(dq);
  const auto products = [&](int at_i) {  // issues S = Q K^T and dP = dO V^T
    const int stage = at_i % kStages;
    mbarrier_wait(k_full + stage, at_i / kStages & 1);
    wgmma_pin(s);
    wgmma_fence();
    product_abt<T, D, kKeys, kRows>(s, q, k0 + stage * L::kKv);
    wgmma_commit();
    mbarrier_wait(v_full + stage, at_i / kStages & 1);
    wgmma_pin(dp);
    wgmma_fence();
    product_abt<T, D, kKeys, kRows>(dp, d_out, v0 + stage * L::kKv);
    wgmma_commit();
  };
  mbarrier_wait(q_full, 0);
  mbarrier_wait(do_full, 0);
  const int first = i;
  products(i);
  while (true) {
    wgmma_wait<1>();  // S, and the product with K before it
    wgmma_pin(s);
    if (i > first && lane == 0) mbarrier_arrive(k_empty + (i - 1) % kStages);
    const int key0 = (n_key_tiles - 1 - i) * kKeys;
    if (key0 + kKeys - 1 > group_row) {
      const int visible = row - key0 - 2 * (lane % 4);  // columns up to it are visible
#pragma unroll
      for (int e = 0; e < kKeys / 2; e++) {
        if (8 * (e / 4) + e % 2 > visible + 8 * (e / 2 % 2)) s[e] = -INFINITY;
      }
    }
#pragma unroll
    for (int e = 0; e < kKeys / 2; e++) s[e] = exp2_fast(fmaf(s[e], c, -lse[e / 2 % 2]));
    wgmma_wait<0>();
    wgmma_pin(dp);
    if (lane == 0) mbarrier_arrive(v_empty + i % kStages);
#pragma unroll
    for (int e = 0; e < kKeys / 2; e++) s[e] *= dp[e] - delta[e / 2 % 2];
    pack_operand<T, kKeys>(ds, s);
    wgmma_fence();
    product_pb<T, D, kKeys>(dq, ds, k0 + i % kStages * L::kKv);
    wgmma_commit();
    if (++i == n_key_tiles) break;
    products(i);
  }
  wgmma_wait<0>();
  wgmma_pin(dq);
  const float f[2] = {p.scale, p.scale};
  store_rows<T, D>(static_cast<T*>(p.dq) + (at.start + row) * p.lddq + head * D, p.lddq, dq, f, row < at.len,
                   row + 8 < at.len);
#endif
}

template <class T, int D, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    attention_dkdv_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_do,
                          const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                          const BwdArgs p) {
#if defined(MM_SM90A)
  using L = DkdvShared<D, kStages>;
  const int tile = static_cast<int>(blockIdx.x) / p.n_kv_head, kv_head = static_cast<int>(blockIdx.x) % p.n_kv_head;
  if (tile >= *p.n_tiles) return;
  extern __shared__ uint8_t raw[];
  uint8_t* const shared = align_1024(raw);
  uint64_t* const kv_full = reinterpret_cast<uint64_t*>(shared + L::kBars);
  uint64_t *const q_full = kv_full + 1, *const do_full = q_full + kStages, *const empty = do_full + kStages;
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32), lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(kv_full, 1);
    for (int s = 0; s < kStages; s++) {
      mbarrier_init(q_full + s, 1);
      mbarrier_init(do_full + s, 1);
      mbarrier_init(empty + s, 8);
    }
    mbarrier_init_fence();
  }
  // The list's tiles come last rows first, which is shortest first for keys: mirrored within the sequence.
  Place at = place_of(p.tiles, p.cu, tile);
  at.row = (at.len - 1) / kRows * kRows - at.row;
  const int n_query_tiles = (at.len - at.row + kQueries - 1) / kQueries;  // of one head
  __syncthreads();

  if (warp >= 8) {
    registers_decrease<24>();
    if (warp > 8) return;
    if (lane == 0) {
      mbarrier_arrive_expect(kv_full, 2 * L::kOwn);
      load_tile<D>(shared + L::kK, &map_k, kv_full, at.start + at.row, kv_head);
      load_tile<D>(shared + L::kV, &map_v, kv_full, at.start + at.row, kv_head);
    }
    float* const lse = reinterpret_cast<float*>(shared + L::kLse);
    float* const delta = reinterpret_cast<float*>(shared + L::kDelta);
    int i = 0;
    for (int g = 0; g < p.group; g++) {
      const int head = kv_head * p.group + g;
      for (int t = 0; t < n_query_tiles; t++, i++) {
        const int s = i % kStages, row0 = at.row + t * kQueries;
        float a[2], b[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int row = row0 + lane + 32 * e;
          const int64_t index = static_cast<int64_t>(at.start + row) * p.n_head + head;
          a[e] = row < at.len ? p.lse[index] * kLog2e : INFINITY;  // P = 0 past the end
          b[e] = row < at.len ? p.delta[index] : 0.0f;
        }
        mbarrier_wait(empty + s, (i / kStages + 1) & 1);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          lse[s * kQueries + lane + 32 * e] = a[e];
          delta[s * kQueries + lane + 32 * e] = b[e];
        }
        __syncwarp();
        if (lane == 0) {
          mbarrier_arrive_expect(q_full + s, L::kQo);
          load_tile<D>(shared + L::kQ + s * L::kQo, &map_q, q_full + s, at.start + row0, head);
          mbarrier_arrive_expect(do_full + s, L::kQo);
          load_tile<D>(shared + L::kDo + s * L::kQo, &map_do, do_full + s, at.start + row0, head);
        }
      }
    }
    return;
  }
  registers_increase<240>();

  const int wg = warp / 4, total = p.group * n_query_tiles;
  const int row = at.row + wg * 64 + warp % 4 * 16 + lane / 4;  // this thread's keys are row, row + 8
  const uint32_t k = smem_address(shared + L::kK) + wg * 64 * Tile<D>::kSwizzle;
  const uint32_t v = smem_address(shared + L::kV) + wg * 64 * Tile<D>::kSwizzle;
  const uint32_t q0 = smem_address(shared + L::kQ), do0 = smem_address(shared + L::kDo);
  const float2* const lse = reinterpret_cast<const float2*>(shared + L::kLse) + lane % 4;
  const float2* const delta = reinterpret_cast<const float2*>(shared + L::kDelta) + lane % 4;
  const float c = p.scale * kLog2e;

  int i = 0, t = 0;        // stage use and query tile of the head
  const auto skip = [&] {  // the second warpgroup's keys lie after all rows of the first query tile
    while (t < wg && i < total) {
      mbarrier_wait(q_full + i % kStages, i / kStages & 1);
      mbarrier_wait(do_full + i % kStages, i / kStages & 1);
      if (lane == 0) mbarrier_arrive(empty + i % kStages);
      i++;
      t = t + 1 == n_query_tiles ? 0 : t + 1;
    }
  };
  skip();
  if (i == total) return;  // only when n_query_tiles is 1: no keys for the second warpgroup

  float dk[D / 2], dv[D / 2], s[kQueries / 2], dp[kQueries / 2];
  // With wide heads there are no registers for dS beside P: dV's product is waited for, then dS takes P's place.
  constexpr bool kTight = D > 96;
  uint32_t pa[kQueries / 4], ds[kQueries / 4];
#pragma unroll
  for (int e = 0; e < D / 2; e++) dk[e] = dv[e] = 0.0f;
  wgmma_pin(dk);
  wgmma_pin(dv);
  const auto products = [&] {  // issues S^T = K Q^T and dP^T = V dO^T
    const int stage = i % kStages;
    mbarrier_wait(q_full + stage, i / kStages & 1);
    wgmma_pin(s);
    wgmma_fence();
    product_abt<T, D, kQueries, kRows>(s, k, q0 + stage * L::kQo);
    wgmma_commit();
    mbarrier_wait(do_full + stage, i / kStages & 1);
    wgmma_pin(dp);
    wgmma_fence();
    product_abt<T, D, kQueries, kRows>(dp, v, do0 + stage * L::kQo);
    wgmma_commit();
  };
  mbarrier_wait(kv_full, 0);
  products();
  int before = -1;  // stage that the products in flight before S still read
  while (true) {
    const int stage = i % kStages;
    wgmma_wait<1>();  // S, and the products before it
    wgmma_pin(s);
    if (before >= 0 && lane == 0) mbarrier_arrive(empty + before);
    if (t == wg) {                                                  // on the diagonal
      const int visible = row - at.row - wg * 64 - 2 * (lane % 4);  // columns from it on are visible
#pragma unroll
      for (int e = 0; e < kQueries / 2; e++) {
        if (8 * (e / 4) + e % 2 < visible + 8 * (e / 2 % 2)) s[e] = -INFINITY;
      }
    }
#pragma unroll
    for (int n = 0; n < kQueries / 8; n++) {
      const float2 x = lse[stage * kQueries / 2 + 4 * n];
      s[4 * n] = exp2_fast(fmaf(s[4 * n], c, -x.x));
      s[4 * n + 1] = exp2_fast(fmaf(s[4 * n + 1], c, -x.y));
      s[4 * n + 2] = exp2_fast(fmaf(s[4 * n + 2], c, -x.x));
      s[4 * n + 3] = exp2_fast(fmaf(s[4 * n + 3], c, -x.y));
    }
    pack_operand<T, kQueries>(pa, s);
    wgmma_fence();
    product_pb<T, D, kQueries>(dv, pa, do0 + stage * L::kQo);
    wgmma_commit();
    wgmma_wait<kTight ? 0 : 1>();  // dP
    wgmma_pin(dp);
#pragma unroll
    for (int n = 0; n < kQueries / 8; n++) {
      const float2 x = delta[stage * kQueries / 2 + 4 * n];
      s[4 * n] *= dp[4 * n] - x.x;
      s[4 * n + 1] *= dp[4 * n + 1] - x.y;
      s[4 * n + 2] *= dp[4 * n + 2] - x.x;
      s[4 * n + 3] *= dp[4 * n + 3] - x.y;
    }
    uint32_t(&da)[kQueries / 4] = kTight ? pa : ds;
    pack_operand<T, kQueries>(da, s);
    wgmma_fence();
    product_pb<T, D, kQueries>(dk, da, q0 + stage * L::kQo);
    wgmma_commit();
    before = stage;
    i++;
    t = t + 1 == n_query_tiles ? 0 : t + 1;
    skip();
    if (i == total) break;
    products();
  }
  wgmma_wait<0>();
  wgmma_pin(dk);
  wgmma_pin(dv);
  const float one[2] = {1.0f, 1.0f}, f[2] = {p.scale, p.scale};
  const int64_t at_row = at.start + row;
  store_rows<T, D>(static_cast<T*>(p.dv) + at_row * p.lddv + kv_head * D, p.lddv, dv, one, row < at.len,
                   row + 8 < at.len);
  store_rows<T, D>(static_cast<T*>(p.dk) + at_row * p.lddk + kv_head * D, p.lddk, dk, f, row < at.len,
                   row + 8 < at.len);
#endif
}

BwdArgs params_of(const Context& ctx, const AttentionBwd& b) {
  const Attention& a = b.fwd;
  BwdArgs p;
  p.out = a.out, p.dout = b.dout, p.lse = a.lse, p.delta = static_cast<float*>(ctx.scratch);
  p.dq = b.dq, p.dk = b.dk, p.dv = b.dv;
  p.cu = a.cu, p.tiles = a.tiles, p.n_tiles = a.n_tiles;
  p.ldo = a.ldo, p.lddout = b.lddout, p.lddq = b.lddq, p.lddk = b.lddk, p.lddv = b.lddv;
  p.n_head = a.n_head, p.n_kv_head = a.n_kv_head, p.group = a.n_head / a.n_kv_head;
  p.scale = a.scale;
  return p;
}

template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  MM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <class T, int D, int kKeys, int kStages>
void launch_dq(const Context& ctx, DType t, const AttentionBwd& b) {
  const Attention& a = b.fwd;
  constexpr int kBytes = DqShared<D, kKeys, kStages>::kBytes;
  const auto kernel = attention_dq_kernel<T, D, kKeys, kStages>;
  static const bool once = (allow_shared(kernel, kBytes), true);
  (void)once;
  kernel<<<static_cast<unsigned>(a.max_tiles * a.n_head), kThreads, kBytes, ctx.stream>>>(
      tile_map<D>(t, a.q, a.ldq, a.n_tok, a.n_head, kRows), tile_map<D>(t, b.dout, b.lddout, a.n_tok, a.n_head, kRows),
      tile_map<D>(t, a.k, a.ldk, a.n_tok, a.n_kv_head, kKeys), tile_map<D>(t, a.v, a.ldv, a.n_tok, a.n_kv_head, kKeys),
      params_of(ctx, b));
  MM_CUDA_LAUNCHED();
}

template <class T, int D, int kStages>
void launch_dkdv(const Context& ctx, DType t, const AttentionBwd& b) {
  const Attention& a = b.fwd;
  constexpr int kBytes = DkdvShared<D, kStages>::kBytes;
  const auto kernel = attention_dkdv_kernel<T, D, kStages>;
  static const bool once = (allow_shared(kernel, kBytes), true);
  (void)once;
  kernel<<<static_cast<unsigned>(a.max_tiles * a.n_kv_head), kThreads, kBytes, ctx.stream>>>(
      tile_map<D>(t, a.q, a.ldq, a.n_tok, a.n_head, kQueries),
      tile_map<D>(t, b.dout, b.lddout, a.n_tok, a.n_head, kQueries),
      tile_map<D>(t, a.k, a.ldk, a.n_tok, a.n_kv_head, kRows), tile_map<D>(t, a.v, a.ldv, a.n_tok, a.n_kv_head, kRows),
      params_of(ctx, b));
  MM_CUDA_LAUNCHED();
}

template <int D>
void launch(const Context& ctx, DType t, const AttentionBwd& b) {
  launch_dq<bf16, D, 64, 4>(ctx, t, b);
  launch_dkdv<bf16, D, 4>(ctx, t, b);
}

}  // namespace
}  // namespace hopper

bool hopper_attention_bwd_supported(const Context& ctx, DType t, const AttentionBwd& b) {
  return hopper_attention_supported(ctx, t, b.fwd) && b.fwd.lse != nullptr && hopper::tma_readable(b.dout, b.lddout) &&
         hopper::tma_readable(b.dq, b.lddq) && hopper::tma_readable(b.dk, b.lddk) &&
         hopper::tma_readable(b.dv, b.lddv) &&
         ctx.scratch_bytes >= hopper_attention_bwd_scratch(t, b.fwd.n_tok, b.fwd.n_head, b.fwd.n_kv_head, b.fwd.d_head);
}

size_t hopper_attention_bwd_scratch(DType t, int64_t n_tok, int n_head, int, int) {
  return t == DType::bf16 ? sizeof(float) * static_cast<size_t>(n_tok) * static_cast<size_t>(n_head) : 0;
}

void hopper_attention_bwd(const Context& ctx, DType t, const AttentionBwd& b) {
  if (b.fwd.n_tok == 0 || b.fwd.max_tiles == 0) return;
  switch (b.fwd.d_head) {
    case 32: return hopper::launch<32>(ctx, t, b);
    case 64: return hopper::launch<64>(ctx, t, b);
    case 96: return hopper::launch<96>(ctx, t, b);
    default: return hopper::launch<128>(ctx, t, b);
  }
}

}  // namespace mm::cuda
