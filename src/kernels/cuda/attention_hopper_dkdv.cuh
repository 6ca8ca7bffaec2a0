// dK and dV of attention, see attention_hopper_bwd.cu.
#pragma once

#include "kernels/cuda/attention_hopper_common.cuh"

namespace mm::cuda::hopper {

constexpr int kQueries = 64;  // query rows of a stage

// Two buffers of (k, v) tiles and mail, and the ring of q, do, lse, delta.
template <int D, int kStages>
struct DkdvShared {
  static constexpr int kOwn = Tile<D>::bytes(kRows), kQo = Tile<D>::bytes(kQueries);
  static constexpr int kK = 0, kV = 2 * kOwn, kQ = 4 * kOwn, kDo = kQ + kStages * kQo, kLse = kDo + kStages * kQo;
  static constexpr int kDelta = kLse + kStages * kQueries * 4, kMail = kDelta + kStages * kQueries * 4;
  static constexpr int kBars = kMail + 2 * 16, kBytes = kBars + 8 * (4 + 3 * kStages) + 1024;
};

template <class T, int D, int kStages>
__global__ void __launch_bounds__(kBwdThreads, 1)
    attention_dkdv_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_do,
                          const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                          const BwdParams p) {
#if defined(MM_SM90A)
  using L = DkdvShared<D, kStages>;
  extern __shared__ uint8_t raw[];
  uint8_t* const shared = align_1024(raw);
  uint64_t *const own_full = reinterpret_cast<uint64_t*>(shared + L::kBars), *const own_empty = own_full + 2;
  uint64_t *const q_full = own_full + 4, *const do_full = q_full + kStages, *const empty = do_full + kStages;
  int4* const mail = reinterpret_cast<int4*>(shared + L::kMail);
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32), lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) {
      mbarrier_init(own_full + s, 1);
      mbarrier_init(own_empty + s, 8);
    }
    for (int s = 0; s < kStages; s++) {
      mbarrier_init(q_full + s, 1);
      mbarrier_init(do_full + s, 1);
      mbarrier_init(empty + s, 8);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp >= 8) {
    registers_decrease<(D > 96 ? 24 : 40)>();
    if (warp > 8) return;
    float* const lse = reinterpret_cast<float*>(shared + L::kLse);
    float* const delta = reinterpret_cast<float*>(shared + L::kDelta);
    const int n_items = uniform(*p.n_tiles) * p.n_kv_head;
    int item = static_cast<int>(blockIdx.x), use = 0;
    for (int n = 0;; n++) {
      const int buf = n & 1;
      if (item >= n_items) {
        mbarrier_wait(own_empty + buf, (n / 2 + 1) & 1);
        if (lane == 0) {
          mail[buf] = make_int4(0, 0, -1, 0);
          mbarrier_arrive(own_full + buf);
        }
        return;
      }
      int next = 0;
      if (lane == 0) next = static_cast<int>(gridDim.x) + atomicAdd(p.counters + 1, 1);
      const int kv_head = item % p.n_kv_head;
      // The list's tiles come last rows first, which is shortest first for keys: mirrored within the sequence.
      Place at = place_of(p.tiles, p.cu, item / p.n_kv_head);
      at.row = (at.len - 1) / kRows * kRows - at.row;
      mbarrier_wait(own_empty + buf, (n / 2 + 1) & 1);
      if (lane == 0) {
        mail[buf] = make_int4(at.start, at.len, at.row, kv_head);
        mbarrier_arrive_expect(own_full + buf, 2 * L::kOwn);
        load_tile<D>(shared + L::kK + buf * L::kOwn, &map_k, own_full + buf, at.start + at.row, kv_head);
        load_tile<D>(shared + L::kV + buf * L::kOwn, &map_v, own_full + buf, at.start + at.row, kv_head);
      }
      for (int g = 0; g < p.group; g++) {
        const int head = kv_head * p.group + g;
        for (int row0 = at.row; row0 < at.len; row0 += kQueries, use++) {
          const int s = use % kStages;
          float a[2], b[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int row = row0 + lane + 32 * e;
            const int64_t index = static_cast<int64_t>(at.start + row) * p.n_head + head;
            a[e] = row < at.len ? p.lse[index] * kLog2e : INFINITY;  // P = 0 past the end
            b[e] = row < at.len ? p.delta[index] : 0.0f;
          }
          mbarrier_wait(empty + s, (use / kStages + 1) & 1);
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
      item = uniform(next);
    }
  }
  registers_increase<(D > 96 ? 240 : 232)>();

  const int wg = warp / 4, first_row = wg * 64 + warp % 4 * 16 + lane / 4;  // this thread's keys: first_row and 8 on
  const uint32_t q0 = smem_address(shared + L::kQ), do0 = smem_address(shared + L::kDo);
  const float2* const lse = reinterpret_cast<const float2*>(shared + L::kLse) + lane % 4;
  const float2* const delta = reinterpret_cast<const float2*>(shared + L::kDelta) + lane % 4;
  const float c = p.scale * kLog2e;
  // The next S before dK, which then runs beside the exponentials: 11% faster with d 96, 5% slower with 64 and 128.
  constexpr bool kEarly = D == 96;
  // With wide heads there are no registers for dS beside P: dV's product is waited for, then dS takes P's place.
  constexpr bool kTight = D > 96;
  int use = 0;
  for (int n = 0;; n++) {
    const int buf = n & 1;
    mbarrier_wait(own_full + buf, n / 2 & 1);
    const int4 item = mail[buf];
    const int start = uniform(item.x), len = uniform(item.y), tile_row = uniform(item.z), kv_head = uniform(item.w);
    if (tile_row < 0) return;
    const int n_query_tiles = (len - tile_row + kQueries - 1) / kQueries;  // of one head
    const int end = use + p.group * n_query_tiles;
    const uint32_t k = smem_address(shared + L::kK + buf * L::kOwn) + wg * 64 * Tile<D>::kSwizzle;
    const uint32_t v = smem_address(shared + L::kV + buf * L::kOwn) + wg * 64 * Tile<D>::kSwizzle;

    int t = 0;               // query tile of the head
    const auto skip = [&] {  // the second warpgroup's keys lie after all rows of the first query tile
      while (t < wg && use < end) {
        const int stage = use % kStages;
        mbarrier_wait(q_full + stage, use / kStages & 1);
        mbarrier_wait(do_full + stage, use / kStages & 1);
        if (lane == 0) mbarrier_arrive(empty + stage);
        use++;
        t = t + 1 == n_query_tiles ? 0 : t + 1;
      }
    };
    skip();
    if (use == end) {  // only when n_query_tiles is 1: no keys for the second warpgroup
      if (lane == 0) mbarrier_arrive(own_empty + buf);
      continue;
    }

    float dk[D / 2], dv[D / 2], s[kQueries / 2], dp[kQueries / 2];
    uint32_t pa[kQueries / 4], ds[kQueries / 4];
#pragma unroll
    for (int e = 0; e < D / 2; e++) dk[e] = dv[e] = 0.0f;
    wgmma_pin(dk);
    wgmma_pin(dv);
    const auto issue_s = [&] {  // S^T = K Q^T
      const int stage = use % kStages;
      mbarrier_wait(q_full + stage, use / kStages & 1);
      wgmma_pin(s);
      wgmma_fence();
      product_abt<T, D, kQueries, kRows>(s, k, q0 + stage * L::kQo);
      wgmma_commit();
    };
    const auto issue_dp = [&] {  // dP^T = V dO^T
      const int stage = use % kStages;
      mbarrier_wait(do_full + stage, use / kStages & 1);
      wgmma_pin(dp);
      wgmma_fence();
      product_abt<T, D, kQueries, kRows>(dp, v, do0 + stage * L::kQo);
      wgmma_commit();
    };
    issue_s();
    issue_dp();
    wgmma_wait<1>();
    int before = -1;  // stage that products in flight still read
    while (true) {
      const int stage = use % kStages;
      wgmma_pin(s);
      if (t == wg) {                                               // on the diagonal
        const int visible = first_row - wg * 64 - 2 * (lane % 4);  // columns from it on are visible
#pragma unroll
        for (int e = 0; e < kQueries / 2; e++) {
          if (8 * (e / 4) + e % 2 < visible + 8 * (e / 2 % 2)) s[e] = -INFINITY;
        }
      }
#pragma unroll
      for (int j = 0; j < kQueries / 8; j++) {
        const float2 x = lse[stage * kQueries / 2 + 4 * j];
        s[4 * j] = exp2_fast(fmaf(s[4 * j], c, -x.x));
        s[4 * j + 1] = exp2_fast(fmaf(s[4 * j + 1], c, -x.y));
        s[4 * j + 2] = exp2_fast(fmaf(s[4 * j + 2], c, -x.x));
        s[4 * j + 3] = exp2_fast(fmaf(s[4 * j + 3], c, -x.y));
      }
      pack_operand<T, kQueries>(pa, s);
      wgmma_fence();
      product_pb<T, D, kQueries>(dv, pa, do0 + stage * L::kQo);
      wgmma_commit();
      wgmma_wait<kTight ? 0 : 1>();  // dP, and dK of the tile before
      wgmma_pin(dp);
      if (before >= 0 && lane == 0) mbarrier_arrive(empty + before);
#pragma unroll
      for (int j = 0; j < kQueries / 8; j++) {
        const float2 x = delta[stage * kQueries / 2 + 4 * j];
        s[4 * j] *= dp[4 * j] - x.x;
        s[4 * j + 1] *= dp[4 * j + 1] - x.y;
        s[4 * j + 2] *= dp[4 * j + 2] - x.x;
        s[4 * j + 3] *= dp[4 * j + 3] - x.y;
      }
      uint32_t(&da)[kQueries / 4] = kTight ? pa : ds;
      pack_operand<T, kQueries>(da, s);
      const auto issue_dk = [&] {
        wgmma_fence();
        product_pb<T, D, kQueries>(dk, da, q0 + stage * L::kQo);
        wgmma_commit();
      };
      before = stage;
      use++;
      t = t + 1 == n_query_tiles ? 0 : t + 1;
      skip();
      if (use == end) {
        issue_dk();
        break;
      }
      if constexpr (kEarly) {
        issue_s();
        issue_dk();
        issue_dp();
        wgmma_wait<2>();  // S, and dV; dK and dP go on
      } else {
        issue_dk();
        issue_s();
        issue_dp();
        wgmma_wait<1>();
      }
    }
    wgmma_wait<0>();
    wgmma_pin(dk);
    wgmma_pin(dv);
    if (lane == 0) {
      mbarrier_arrive(empty + before);
      mbarrier_arrive(own_empty + buf);
    }
    const float one[2] = {1.0f, 1.0f}, f[2] = {p.scale, p.scale};
    const int row = tile_row + first_row;
    const int64_t at_row = start + row;
    store_rows<T, D>(static_cast<T*>(p.dv) + at_row * p.lddv + kv_head * D, p.lddv, dv, one, row < len, row + 8 < len);
    store_rows<T, D>(static_cast<T*>(p.dk) + at_row * p.lddk + kv_head * D, p.lddk, dk, f, row < len, row + 8 < len);
  }
#endif
}

}  // namespace mm::cuda::hopper
