// dQ of attention, see attention_hopper_bwd.cu.
#pragma once

#include "kernels/cuda/attention_hopper_common.cuh"

namespace mm::cuda::hopper {

constexpr int kKeys = 64;  // keys of a stage

// Shared memory: two buffers of (q, do) tiles and mail, so that the next item's arrive while this one is computed, and
// the ring of k, v stages. The rows of `out` that delta needs travel through the ring too, before the keys: a stage
// holds 64 rows of k and 64 of v, together just a tile of 128.
template <int D, int kStages, int kBuffers>
struct DqShared {
  static constexpr int kOwn = Tile<D>::bytes(kRows), kKv = Tile<D>::bytes(kKeys);
  static constexpr int kQ = 0, kDo = kBuffers * kOwn, kK = 2 * kBuffers * kOwn, kV = kK + kStages * kKv,
                       kLse = kV + kStages * kKv;
  static constexpr int kMail = kLse + 2 * kRows * 4, kBars = kMail + 2 * 16;
  static constexpr int kBytes = kBars + 8 * (4 + 4 * kStages) + 1024;  // 1024: the base is rounded up
};

#if defined(MM_SM90A)

// Sum over d of a b for one row, by the four lanes of a quad: a and b are blocks of tiles with rows_a and rows_b rows.
template <class T, int D, int kRowsA, int kRowsB>
__device__ inline float quad_dot(const uint8_t* a, int row_a, const uint8_t* b, int row_b) {
  using S = Tile<D>;
  const auto chunk = [](int row, int c) {
    return row * S::kSwizzle + (c ^ (S::kSwizzle == 128 ? row & 7 : row >> 1 & 3)) * 16;
  };
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < D / 32; i++) {
    const int block = 32 * i / S::kCols, c = 32 * i % S::kCols / 8 + static_cast<int>(threadIdx.x % 4);
    float x[8], y[8];
    load<T, 8>(x, reinterpret_cast<const T*>(a + block * kRowsA * S::kSwizzle + chunk(row_a, c)));
    load<T, 8>(y, reinterpret_cast<const T*>(b + block * kRowsB * S::kSwizzle + chunk(row_b, c)));
#pragma unroll
    for (int e = 0; e < 8; e++) sum = fmaf(x[e], y[e], sum);
  }
  return quad_sum(sum);
}

#endif

template <class T, int D, int kStages, int kBuffers>
__global__ void __launch_bounds__(kBwdThreads, 1)
    attention_dq_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_do,
                        const __grid_constant__ CUtensorMap map_out, const __grid_constant__ CUtensorMap map_k,
                        const __grid_constant__ CUtensorMap map_v, const BwdParams p) {
#if defined(MM_SM90A)
  using L = DqShared<D, kStages, kBuffers>;
  extern __shared__ uint8_t raw[];
  uint8_t* const shared = align_1024(raw);
  uint64_t *const own_full = reinterpret_cast<uint64_t*>(shared + L::kBars), *const own_empty = own_full + 2;
  uint64_t *const k_full = own_full + 4, *const k_empty = k_full + kStages;
  uint64_t *const v_full = k_empty + kStages, *const v_empty = v_full + kStages;
  float* const mail_lse = reinterpret_cast<float*>(shared + L::kLse);
  int4* const mail = reinterpret_cast<int4*>(shared + L::kMail);
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32), lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) {
      mbarrier_init(own_full + s, 1);
      mbarrier_init(own_empty + s, 8);
    }
    for (int s = 0; s < kStages; s++) {
      mbarrier_init(k_full + s, 1);
      mbarrier_init(v_full + s, 1);
      mbarrier_init(k_empty + s, 8);
      mbarrier_init(v_empty + s, 8);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp >= 8) {
    registers_decrease<40>();
    if (warp > 8) return;
    const int n_items = uniform(*p.n_tiles) * p.n_head;
    int item = static_cast<int>(blockIdx.x), use = 0;
    for (int n = 0;; n++) {
      const int buf = n % kBuffers;
      if (item >= n_items) {
        mbarrier_wait(own_empty + buf, (n / kBuffers + 1) & 1);
        if (lane == 0) {
          mail[buf] = make_int4(0, 0, -1, 0);
          mbarrier_arrive(own_full + buf);
        }
        return;
      }
      int next = 0;
      if (lane == 0) next = static_cast<int>(gridDim.x) + atomicAdd(p.counters, 1);
      const int head = item % p.n_head, kv_head = head / p.group;
      const Place at = place_of(p.tiles, p.cu, item / p.n_head);
      float lse[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = at.row + lane + 32 * e;
        lse[e] = row < at.len ? p.lse[static_cast<int64_t>(at.start + row) * p.n_head + head] * kLog2e : 0.0f;
      }
      const int n_key_tiles = (min(at.row + kRows, at.len) + kKeys - 1) / kKeys;
      for (int i = -1; i < n_key_tiles; i++, use++) {
        const int s = use % kStages, row = at.start + (n_key_tiles - 1 - i) * kKeys;
        const uint32_t parity = (use / kStages + 1) & 1;
        mbarrier_wait(k_empty + s, parity);
        if (lane == 0) {
          mbarrier_arrive_expect(k_full + s, L::kKv);
          if (i < 0) load_tile<D>(shared + L::kK + s * L::kKv, &map_out, k_full + s, at.start + at.row, head);
          else load_tile<D>(shared + L::kK + s * L::kKv, &map_k, k_full + s, row, kv_head);
        }
        mbarrier_wait(v_empty + s, parity);
        if (lane == 0) {
          mbarrier_arrive_expect(v_full + s, L::kKv);
          if (i < 0) load_tile<D>(shared + L::kV + s * L::kKv, &map_out, v_full + s, at.start + at.row + 64, head);
          else load_tile<D>(shared + L::kV + s * L::kKv, &map_v, v_full + s, row, kv_head);
        }
        if (i != 0) continue;
        // After the first keys, which need not wait for the last item's q and do to be done with.
        mbarrier_wait(own_empty + buf, (n / kBuffers + 1) & 1);
#pragma unroll
        for (int e = 0; e < 4; e++) mail_lse[buf * kRows + lane + 32 * e] = lse[e];
        __syncwarp();
        if (lane == 0) {
          mail[buf] = make_int4(at.start, at.len, at.row, head);
          mbarrier_arrive_expect(own_full + buf, 2 * L::kOwn);
          load_tile<D>(shared + L::kQ + buf * L::kOwn, &map_q, own_full + buf, at.start + at.row, head);
          load_tile<D>(shared + L::kDo + buf * L::kOwn, &map_do, own_full + buf, at.start + at.row, head);
        }
      }
      item = uniform(next);
    }
  }
  registers_increase<232>();

  const int wg = warp / 4, first_row = wg * 64 + warp % 4 * 16 + lane / 4;  // this thread's rows: first_row and 8 on
  const uint32_t k0 = smem_address(shared + L::kK), v0 = smem_address(shared + L::kV);
  const float c = p.scale * kLog2e;
  int use = 0;
  for (int n = 0;; n++) {
    const int buf = n % kBuffers;
    mbarrier_wait(own_full + buf, n / kBuffers & 1);
    const int4 item = mail[buf];
    const int start = uniform(item.x), len = uniform(item.y), tile_row = uniform(item.z), head = uniform(item.w);
    if (tile_row < 0) return;
    const int group_row = tile_row + wg * 64, row = tile_row + first_row;
    const int n_key_tiles = (min(tile_row + kRows, len) + kKeys - 1) / kKeys;
    // At least one, also without rows of the sequence: cheaper than a second way through (nothing is stored).
    const int n_mine = group_row < len ? (min(group_row + 64, len) + kKeys - 1) / kKeys : 1;
    const uint32_t q = smem_address(shared + L::kQ + buf * L::kOwn) + wg * 64 * Tile<D>::kSwizzle;
    const uint32_t d_out = smem_address(shared + L::kDo + buf * L::kOwn) + wg * 64 * Tile<D>::kSwizzle;

    float lse[2], delta[2];
    {
      const int s = use % kStages;
      mbarrier_wait(k_full + s, use / kStages & 1);
      mbarrier_wait(v_full + s, use / kStages & 1);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        lse[r] = mail_lse[buf * kRows + first_row + 8 * r];
        delta[r] = quad_dot<T, D, kKeys, kRows>(shared + (wg == 0 ? L::kK : L::kV) + s * L::kKv, first_row % 64 + 8 * r,
                                                shared + L::kDo + buf * L::kOwn, first_row + 8 * r);
        if (lane % 4 == 0 && row + 8 * r < len)
          p.delta[static_cast<int64_t>(start + row + 8 * r) * p.n_head + head] = delta[r];
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(k_empty + s), mbarrier_arrive(v_empty + s);
      use++;
    }
    const int end = use + n_key_tiles;
    for (const int mine = end - n_mine; use < mine; use++) {  // keys after all rows of this warpgroup
      const int s = use % kStages;
      mbarrier_wait(k_full + s, use / kStages & 1);
      mbarrier_wait(v_full + s, use / kStages & 1);
      if (lane == 0) mbarrier_arrive(k_empty + s), mbarrier_arrive(v_empty + s);
    }
    // Step i issues S of tile i + 1, turns S of tile i into P, P and dP into dS, issues dQ += dS K and dP of tile i
    // + 1. The tensor cores have up to three products queued while the exponentials of tile i are taken.
    float dq[D / 2], s0[kKeys / 2], s1[kKeys / 2], dp[kKeys / 2];
    uint32_t ds[kKeys / 4];
#pragma unroll
    for (int e = 0; e < D / 2; e++) dq[e] = 0.0f;
    wgmma_pin(dq);
    const auto issue_s = [&](float(&s)[kKeys / 2], int u) {
      mbarrier_wait(k_full + u % kStages, u / kStages & 1);
      wgmma_pin(s);
      wgmma_fence();
      product_abt<T, D, kKeys, kRows>(s, q, k0 + u % kStages * L::kKv);
      wgmma_commit();
    };
    const auto issue_dp = [&](int u) {
      mbarrier_wait(v_full + u % kStages, u / kStages & 1);
      wgmma_pin(dp);
      wgmma_fence();
      product_abt<T, D, kKeys, kRows>(dp, d_out, v0 + u % kStages * L::kKv);
      wgmma_commit();
    };
    const int first = use;
    // kWait: groups that may be in flight when S must be there
    const auto step = [&](float(&s)[kKeys / 2], float(&s_next)[kKeys / 2], auto more) {
      constexpr bool kMore = decltype(more)::value;
      const int stage = use % kStages;
      if constexpr (kMore) issue_s(s_next, use + 1);
      const int key0 = (end - 1 - use) * kKeys;
      if (key0 + kKeys - 1 > group_row) {
        const int visible = row - key0 - 2 * (lane % 4);  // columns up to it are visible
#pragma unroll
        for (int e = 0; e < kKeys / 2; e++) {
          if (8 * (e / 4) + e % 2 > visible + 8 * (e / 2 % 2)) s[e] = -INFINITY;
        }
      }
#pragma unroll
      for (int e = 0; e < kKeys / 2; e++) s[e] = exp2_fast(fmaf(s[e], c, -lse[e / 2 % 2]));
      wgmma_pin(s);
      mbarrier_wait(v_full + stage, use / kStages & 1);  // done long ago: its branch keeps ptxas from waiting before P
      wgmma_wait<kMore ? 1 : 0>();                       // dP, and dQ of the tile before
      wgmma_pin(dp);
      if (lane == 0) {
        if (use > first) mbarrier_arrive(k_empty + (use - 1) % kStages);
        mbarrier_arrive(v_empty + stage);
        if (!kMore) mbarrier_arrive(own_empty + buf);
      }
#pragma unroll
      for (int e = 0; e < kKeys / 2; e++) s[e] *= dp[e] - delta[e / 2 % 2];
      pack_operand<T, kKeys>(ds, s);
      wgmma_fence();
      product_pb<T, D, kKeys>(dq, ds, k0 + stage * L::kKv);
      wgmma_commit();
      use++;
      if constexpr (kMore) {
        issue_dp(use);
        wgmma_wait<2>();  // the next S; dQ and dP go on
        wgmma_pin(s_next);
      }
    };
    issue_s(s0, use);
    issue_dp(use);
    wgmma_wait<1>();
    wgmma_pin(s0);
    while (true) {
      if (use + 1 == end) {
        step(s0, s1, std::false_type());
        break;
      }
      step(s0, s1, std::true_type());
      if (use + 1 == end) {
        step(s1, s0, std::false_type());
        break;
      }
      step(s1, s0, std::true_type());
    }
    wgmma_wait<0>();
    wgmma_pin(dq);
    if (lane == 0) mbarrier_arrive(k_empty + (use - 1) % kStages);
    const float f[2] = {p.scale, p.scale};
    store_rows<T, D>(static_cast<T*>(p.dq) + (start + row) * p.lddq + head * D, p.lddq, dq, f, row < len,
                     row + 8 < len);
  }
#endif
}

}  // namespace mm::cuda::hopper
