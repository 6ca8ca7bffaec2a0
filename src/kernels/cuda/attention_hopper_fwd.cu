// Attention, forward, on Hopper's tensor cores (wgmma): out = softmax(scale Q K^T + causal mask) V over packed
// sequences, keys = the queries' rows, bf16 in and out, fp32 sums.
//
// An item is 128 query rows of one head. One block a processor; its one or two teams each take items from a counter
// until none is left. A team is two warpgroups of 64 rows and one warp that feeds them K and V through TMA into a ring
// of stages, from the diagonal back to key 0, and already the next item's while they are at the last. The feeding warps
// belong to a last warpgroup, which gives its registers to the others.
//
//            keys ->                       feeder:      k, v of tile n-1; q; k, v of tile n-2, ..., 0
//   rows  [ 0 ][ 1 ][ 2 ][ 3 \             warpgroup:   S = Q K^T (both from shared memory), online softmax in base 2,
//         [ 0 ][ 1 ][ 2 ][ 3 ][ 4 \                     P to bf16 in registers, O += P V (P from registers)
//
// Two teams (d <= 96; 112 registers a thread, 64 keys a stage): four warpgroups take turns on the tensor cores and the
// exponentials. One team (d 128; 240 registers, 128 keys): the product with V runs beside the next tile's softmax.
// Rows of a tile past the end of the sequence belong to the next one (or are zeros): the causal mask keeps them from
// the others, and they are not stored. Keys that the mask hides still meet P = 0 in the product with V, so a
// non-finite V reaches other rows of its tile.
// Flops 4 d a visible pair, bytes 2 (q + out) + reads of k and v per 128 rows, mostly from L2.
//
// Measured (H100, bf16, causal; TFLOP/s of visible pairs; 3% between runs): B32 T768 H8/4 D96 87 us 333,
// B64 T512 H8/2 D64 69 us 250, B16 T2048 H8/4 D96 223 us 463, B16 T2048 H8/2 D64 184 us 373, B16 T1024 H16/8 D128
// 151 us 456, 24576 tokens of sequences 20..600 H8/4 D96 64 us 234. With the last 400 / n_kv_head tiles of the list
// sorted by row (longest first) B32 T768 takes 76 us, B64 T512 63, B16 T2048 D64 162: the last items then are short.
// Lost: two blocks an SM without persistence (88 us at B32 T768, 76 at B64 T512: 4 us to start an item), 128 keys a
// stage with two teams (spills), one team with d 96 (88 us); rescaling the outputs in every tile (4% slower).
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cuda/attention_hopper.h"
#include "kernels/cuda/attention_hopper_common.cuh"

namespace mm::cuda {
namespace hopper {
namespace {

struct FwdParams {
  void* out;
  float* lse;
  const int32_t* cu;
  const int32_t* tiles;
  const int32_t* n_tiles;
  int64_t ldo;
  int n_head, group;
  float scale;
  int* counter;  // items taken beyond the blocks' first
};

// One tile of scores: s becomes exp(scale (s - m)) with m close to the row's largest score so far, l sums it up. m
// follows the largest score only when that has grown by more than 2^8 in the exponentials (any m gives the same result,
// large exponentials only have to stay finite): mostly nothing need be rescaled. True: earlier sums and outputs are to
// be multiplied by rescale (l is already).
template <int kKeys>
__device__ inline bool softmax_tile(float (&s)[kKeys / 2], float (&m)[2], float (&l)[2], float (&rescale)[2], float c) {
  float most[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    most[r] = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
    for (int i = 4; i < kKeys / 2; i += 4) most[r] = fmaxf(most[r], fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
    most[r] = quad_max(most[r]);
  }
  const bool grown = __any_sync(0xffffffffu, (most[0] - m[0]) * c > 8.0f || (most[1] - m[1]) * c > 8.0f);
  if (grown) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      most[r] = fmaxf(most[r], m[r]);
      rescale[r] = exp2_fast((m[r] - most[r]) * c);
      m[r] = most[r];
      l[r] *= rescale[r];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float shift = m[r] * c;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 4) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& x = s[i + 2 * r + e];
        x = exp2_fast(fmaf(x, c, -shift));
        sum += x;
      }
    }
    l[r] += sum;
  }
  return grown;
}

// Keys after the row become invisible: key0 is the tile's first key, row this thread's first row.
template <int kKeys>
__device__ inline void mask_tile(float (&s)[kKeys / 2], int key0, int row) {
  const int first = row - key0 - 2 * static_cast<int>(threadIdx.x % 4);  // columns up to it are visible
#pragma unroll
  for (int i = 0; i < kKeys / 2; i++) {
    if (8 * (i / 4) + i % 2 > first + 8 * (i / 2 % 2)) s[i] = -INFINITY;
  }
}

template <int D>
__device__ inline void rescale_rows(float (&o)[D / 2], const float (&f)[2]) {
#pragma unroll
  for (int i = 0; i < D / 2; i++) o[i] *= f[i / 2 % 2];
}

// Shared memory of a team: q of its two warpgroups, the rings of k and v,
// mail.
template <int D, int kKeys, int kStages, int kTeams>
struct TeamShared {
  static constexpr int kQ = Tile<D>::bytes(64), kKv = Tile<D>::bytes(kKeys);
  static constexpr int kK = 2 * kQ, kV = kK + kStages * kKv, kTile = kV + kStages * kKv;  // a multiple of 1024
  static constexpr int kBarriers = 4 + 4 * kStages, kBytes = kTeams * (kTile + 2 * 16 + 8 * kBarriers) + 1024;
};

template <class T, int D, int kKeys, int kStages, int kTeams, bool kOverlap>
__global__ void __launch_bounds__(kTeams * 256 + 128, 1)
    attention_fwd_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                         const __grid_constant__ CUtensorMap map_v, const FwdParams p) {
#if defined(MM_SM90A)
  using L = TeamShared<D, kKeys, kStages, kTeams>;
  extern __shared__ uint8_t raw[];
  uint8_t* const base = align_1024(raw);
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32), lane = static_cast<int>(threadIdx.x) % 32;
  const int team = warp < 8 * kTeams ? warp / 8 : warp % kTeams;
  uint8_t* const shared = base + team * L::kTile;
  int4* const mail = reinterpret_cast<int4*>(base + kTeams * L::kTile) + 2 * team;  // of each warpgroup
  uint64_t* const q_full = reinterpret_cast<uint64_t*>(base + kTeams * (L::kTile + 32)) + team * L::kBarriers;
  uint64_t *const q_empty = q_full + 2, *const k_full = q_full + 4, *const k_empty = k_full + kStages;
  uint64_t *const v_full = k_empty + kStages, *const v_empty = v_full + kStages;
  if (threadIdx.x % 256 == 0 && warp < 8 * kTeams) {
    for (int g = 0; g < 2; g++) {
      mbarrier_init(q_full + g, 1);
      mbarrier_init(q_empty + g, 4);
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

  if (warp >= 8 * kTeams) {
    registers_decrease<24>();
    if (warp >= 9 * kTeams) return;
    const int n_items = uniform(*p.n_tiles) * p.n_head;
    int item = static_cast<int>(blockIdx.x + team * gridDim.x), use = 0, n = 0;
    for (; item < n_items; n++) {
      int next = 0;
      if (lane == 0) next = kTeams * static_cast<int>(gridDim.x) + atomicAdd(p.counter, 1);
      const int head = item % p.n_head, kv_head = head / p.group;
      const Place at = place_of(p.tiles, p.cu, item / p.n_head);
      const int n_key_tiles = (min(at.row + kRows, at.len) + kKeys - 1) / kKeys;
      for (int i = 0; i < n_key_tiles; i++, use++) {
        const int s = use % kStages, row = at.start + (n_key_tiles - 1 - i) * kKeys;
        const uint32_t parity = (use / kStages + 1) & 1;
        mbarrier_wait(k_empty + s, parity);
        if (lane == 0) {
          mbarrier_arrive_expect(k_full + s, L::kKv);
          load_tile<D>(shared + L::kK + s * L::kKv, &map_k, k_full + s, row, kv_head);
        }
        mbarrier_wait(v_empty + s, parity);
        if (lane == 0) {
          mbarrier_arrive_expect(v_full + s, L::kKv);
          load_tile<D>(shared + L::kV + s * L::kKv, &map_v, v_full + s, row, kv_head);
        }
        if (i > 0) continue;
        for (int g = 0; g < 2;
             g++) {  // after the first keys, which need not wait for the last item's q to be done with
          mbarrier_wait(q_empty + g, (n + 1) & 1);
          if (lane == 0) {
            mail[g] = make_int4(at.start, at.len, at.row, head);
            mbarrier_arrive_expect(q_full + g, L::kQ);
            load_tile<D>(shared + g * L::kQ, &map_q, q_full + g, at.start + at.row + 64 * g, head);
          }
        }
      }
      item = uniform(next);
    }
    for (int g = 0; g < 2; g++) {
      mbarrier_wait(q_empty + g, (n + 1) & 1);
      if (lane == 0) {
        mail[g] = make_int4(0, 0, -1, 0);
        mbarrier_arrive(q_full + g);
      }
    }
    return;
  }
  registers_increase<kTeams == 1 ? 240 : 112>();

  const int wg = warp / 4 % 2, first_row = wg * 64 + warp % 4 * 16 + lane / 4;  // this thread's rows: first_row, 8 on
  const uint32_t q = smem_address(shared + wg * L::kQ);
  const uint32_t k0 = smem_address(shared + L::kK), v0 = smem_address(shared + L::kV);
  const float c = p.scale * kLog2e;
  int use = 0;
  for (int n = 0;; n++) {
    mbarrier_wait(q_full + wg, n & 1);
    const int4 item = mail[wg];
    const int start = uniform(item.x), len = uniform(item.y), tile_row = uniform(item.z), head = uniform(item.w);
    if (tile_row < 0) return;
    const int group_row = tile_row + wg * 64, row = tile_row + first_row;
    const int end = use + (min(tile_row + kRows, len) + kKeys - 1) / kKeys;
    // At least one, also without rows of the sequence: cheaper than a second way through (nothing is stored).
    const int n_mine = group_row < len ? (min(group_row + 64, len) + kKeys - 1) / kKeys : 1;
    for (const int mine = end - n_mine; use < mine; use++) {  // keys after all rows of this warpgroup
      const int s = use % kStages;
      mbarrier_wait(k_full + s, use / kStages & 1);
      mbarrier_wait(v_full + s, use / kStages & 1);
      if (lane == 0) mbarrier_arrive(k_empty + s), mbarrier_arrive(v_empty + s);
    }

    float o[D / 2], s[kKeys / 2], m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f}, rescale[2];
    uint32_t pa[kKeys / 4];
#pragma unroll
    for (int e = 0; e < D / 2; e++) o[e] = 0.0f;

    const auto scores = [&](int at_use) {  // issues S = Q K^T
      const int stage = at_use % kStages;
      mbarrier_wait(k_full + stage, at_use / kStages & 1);
      wgmma_pin(s);
      wgmma_fence();
      product_abt<T, D, kKeys, 64>(s, q, k0 + stage * L::kKv);
      wgmma_commit();
    };
    const auto values = [&](int at_use) {  // issues O += P V
      const int stage = at_use % kStages;
      mbarrier_wait(v_full + stage, at_use / kStages & 1);
      wgmma_pin(o);
      wgmma_fence();
      product_pb<T, D, kKeys>(o, pa, v0 + stage * L::kKv);
      wgmma_commit();
    };
    const auto softmax = [&](int at_use) {
      const int key0 = (end - 1 - at_use) * kKeys;
      wgmma_pin(s);
      if (lane == 0) {
        mbarrier_arrive(k_empty + at_use % kStages);
        if (at_use + 1 == end) mbarrier_arrive(q_empty + wg);
      }
      if (key0 + kKeys - 1 > group_row) mask_tile<kKeys>(s, key0, row);
      return softmax_tile<kKeys>(s, m, l, rescale, c);
    };
    if constexpr (kOverlap) {
      scores(use);
      wgmma_wait<0>();
      softmax(use);
      pack_operand<T, kKeys>(pa, s);
      for (use++; use < end; use++) {
        scores(use);
        values(use - 1);
        wgmma_wait<1>();
        const bool grown = softmax(use);
        wgmma_pin(s);
        const int old = use - 1;  // its V has been there long: the branch keeps ptxas from waiting before the softmax
        mbarrier_wait(v_full + old % kStages, old / kStages & 1);
        wgmma_wait<0>();
        wgmma_pin(o);
        if (lane == 0) mbarrier_arrive(v_empty + (use - 1) % kStages);
        if (grown) rescale_rows<D>(o, rescale);
        pack_operand<T, kKeys>(pa, s);
      }
      values(use - 1);
      wgmma_wait<0>();
      wgmma_pin(o);
      if (lane == 0) mbarrier_arrive(v_empty + (use - 1) % kStages);
    } else {
      for (; use < end; use++) {
        scores(use);
        wgmma_wait<0>();
        if (softmax(use)) rescale_rows<D>(o, rescale);
        pack_operand<T, kKeys>(pa, s);
        values(use);
        wgmma_wait<0>();
        wgmma_pin(o);
        if (lane == 0) mbarrier_arrive(v_empty + use % kStages);
      }
    }

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float sum = quad_sum(l[r]);
      inverse[r] = 1.0f / sum;
      if (p.lse != nullptr && lane % 4 == 0 && row + 8 * r < len)
        p.lse[static_cast<int64_t>(start + row + 8 * r) * p.n_head + head] = m[r] * p.scale + logf(sum);
    }
    store_rows<T, D>(static_cast<T*>(p.out) + (start + row) * p.ldo + head * D, p.ldo, o, inverse, row < len,
                     row + 8 < len);
  }
#endif
}

template <class T, int D, int kKeys, int kStages, int kTeams, bool kOverlap>
void launch(const Context& ctx, DType t, const Attention& a) {
  using L = TeamShared<D, kKeys, kStages, kTeams>;
  FwdParams p{a.out,     a.lse,
              a.cu,      a.tiles,
              a.n_tiles, a.ldo,
              a.n_head,  a.n_head / a.n_kv_head,
              a.scale,   static_cast<int*>(ctx.scratch)};
  const auto kernel = attention_fwd_kernel<T, D, kKeys, kStages, kTeams, kOverlap>;
  static const bool once = [&] {
    MM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes));
    return true;
  }();
  (void)once;
  MM_CUDA_CHECK(cudaMemsetAsync(p.counter, 0, sizeof(int), ctx.stream));
  const int64_t items = a.max_tiles * a.n_head;
  kernel<<<static_cast<unsigned>(std::min<int64_t>(ctx.n_sm, items)), kTeams * 256 + 128, L::kBytes, ctx.stream>>>(
      tile_map<D>(t, a.q, a.ldq, a.n_tok, a.n_head, 64), tile_map<D>(t, a.k, a.ldk, a.n_tok, a.n_kv_head, kKeys),
      tile_map<D>(t, a.v, a.ldv, a.n_tok, a.n_kv_head, kKeys), p);
  MM_CUDA_LAUNCHED();
}

}  // namespace
}  // namespace hopper

bool hopper_attention_supported(const Context& ctx, DType t, const Attention& a) {
  return ctx.arch == 90 && t == DType::bf16 &&
         (a.d_head == 32 || a.d_head == 64 || a.d_head == 96 || a.d_head == 128) && a.kv_start == nullptr &&
         a.kv_len == nullptr && a.dropout == 0.0f && a.tiles != nullptr && a.scale > 0.0f &&
         hopper::tma_readable(a.q, a.ldq) && hopper::tma_readable(a.k, a.ldk) && hopper::tma_readable(a.v, a.ldv) &&
         hopper::tma_readable(a.out, a.ldo);
}

void hopper_attention_fwd(const Context& ctx, DType t, const Attention& a) {
  if (a.n_tok == 0 || a.max_tiles == 0) return;
  switch (a.d_head) {
    case 32: return hopper::launch<bf16, 32, 64, 4, 2, true>(ctx, t, a);
    case 64: return hopper::launch<bf16, 64, 64, 4, 2, true>(ctx, t, a);
    case 96: return hopper::launch<bf16, 96, 64, 3, 2, false>(ctx, t, a);
    default: return hopper::launch<bf16, 128, 128, 2, 1, true>(ctx, t, a);
  }
}

}  // namespace mm::cuda
