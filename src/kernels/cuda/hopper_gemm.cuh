// The Hopper GEMM (sm_90a): out = A B^T for bf16 operands, sums in fp32; interface in hopper_gemm.h, the order of work
// in hopper_gemm_schedule.h.
//
// A block computes a tile of 128 rows x kN columns (256, 192 or 128) in steps of 64 along the reduction. Two blocks are
// a cluster: tiles one below the other, so that each loads half of their common B and sends it to both (the traffic
// from L2, 48 bytes a clock for 256 columns otherwise, falls to 32).
//
//   warpgroup 0, one thread: TMA -> ring of stages { A 128 x 64 | B kN x 64 }, "full" barrier of the stage
//   warpgroups 1, 2: wgmma m64 x kN x k16, four a stage; rows 0-63 and 64-127; then "empty" barriers of both blocks
//
//        B  kN columns
//      +----------------+          A stage's tiles, rows of 128 bytes as TMA swizzles them:
//   A  | warpgroup 1    | block 0    K-major operand: tile row i is row i of A (or column i of B), 64 of k long
//      | warpgroup 2    |            MN-major A: for each 64 rows of A, 64 tile rows (k) of 64 elements
//      +----------------+            MN-major B: for each half of the 64 k, which one of the blocks loads: for each 64
//      | warpgroup 1    | block 1      columns of B, 32 tile rows (k) of 64 elements
//      | warpgroup 2    |
//      +----------------+
//
// Registers are moved from the loading warpgroup to the computing ones (40 / 232), which hold 64 x kN sums.
// While a warpgroup stores its tile the tensor cores would idle; so a finished tile is kept as bf16 (64 registers) and
// stored in portions behind the first products of the next tile (kDefer; 4 to 8 % faster than storing at once). A wgrad
// changes tiles once or twice and stores at once.
//
// Rows of another expert or beyond the end are computed and not stored; in a wgrad, where rows are summed over, they
// are overwritten with zeros in shared memory before the last product (they may hold anything, NaN too).
//
// Measured on an H100 in TFLOP/s (beside it cuBLAS through torch, the same hour; its wgrad writes bf16 and adds
// nothing). The clock falls to about 1.55 GHz under this load: 8192^3 by cuBLAS runs at 768.
//                 n1536 k768   n768 k768   n4864 k768   n768 k2432
//   M 24576 fwd    688 (665)    614 (621)    736 (714)    716 (746)
//          dgrad   688 (693)    616 (602)    754 (761)    685 (645)
//          wgrad   596 (656)    478 (549)    693 (759)    633 (728)
//   M 12288 fwd    622 (624)    527 (331)    718 (698)    687 (733)
//          dgrad   649 (664)    525 (366)    734 (754)    637 (645)
//          wgrad   476 (573)    359 (293)    644 (743)    568 (709)
//   4 experts, 40 / 30 / 20 / 10 % of 24576 rows: fwd 704, 706; dgrad 741, 668; wgrad 618, 551 (last two columns)
//   M 24576 with residual 483, 651 (n768); with swiglu 648 (n4864), 284 us for both outputs
// A tile change costs a wgrad 4 us, a step (256 columns) 0.7 us; 24576 rows are 384 steps.
//
// Lost: the second warpgroup some steps behind the first (0 %: loads that come late bring them together again); TMA
// prefetches of later steps into L2 (-3 to -8 %); programmatic launch of the pass that adds slots (-5 to 0 %); one line
// of work for all experts' weight gradients, cut evenly (balanced, but every cluster reads other rows: 309 instead of
// 618); TMA issued in a branch on the thread's number (the compiler loops over lanes: wgrad -5 %).
#pragma once

#include "kernels/cuda/hopper_gemm_epilogue.cuh"
#include "kernels/cuda/hopper_gemm_plan.cuh"

namespace mm::cuda {

template <int kN, GemmLayout kLayout, GemmKind kKind>
__global__ void __launch_bounds__(384, 1) hopper_gemm_kernel(const __grid_constant__ GemmParams p) {
#if defined(MM_SM90A)
  using namespace hopper;
  using Tile = GemmTile<kN, kKind>;
  constexpr int kStages = Tile::stages;
  constexpr bool kWgrad = kLayout == GemmLayout::wgrad, kDefer = !kWgrad && kKind != GemmKind::swiglu_bwd;
  constexpr int kAMajor = kWgrad ? 1 : 0, kBMajor = kLayout == GemmLayout::fwd ? 0 : 1;  // 1: MN
  constexpr int kColumns = kKind == GemmKind::swiglu ? kN / 2 : kN;
  constexpr int kPortions = Epilogue<kN, kKind>::kPortions;
  extern __shared__ uint8_t shared[];
  const uint32_t base = (smem_address(shared) + 1023) & ~1023u;
  const uint32_t staging = base + kStages * Tile::stage_bytes, full = staging + Tile::staging_bytes,
                 empty = full + 8 * kStages, unit_list = full + 256;
  const int warp_id = uniform(static_cast<int>(threadIdx.x) / 32), group = warp_id / 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = static_cast<int>(cluster_rank()), cluster = static_cast<int>(blockIdx.x) / 2,
            clusters = static_cast<int>(gridDim.x) / 2;
  const int column_tiles = (p.n + kColumns - 1) / kColumns;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 16);  // the 8 computing warps of both blocks
    }
    mbarrier_init_fence();
  }
  uint32_t* const units = reinterpret_cast<uint32_t*>(shared + (unit_list - smem_address(shared)));  // [0]: how many
  if constexpr (kWgrad) {
    if (p.plan.grouped() && warp_id == 0) {
      const int n = plans_units(p.plan) ? choose_units(p.plan, cluster, units + 1) : -1;
      if (lane == 0) units[0] = static_cast<uint32_t>(n);
    }
  }
  cluster_sync();

  // One stretch of steps after another, the same for all warps: f(expert, row, row_end, column, first step, last step,
  // slot).
  const auto for_work = [&](auto&& f) {
    if constexpr (kWgrad) {
      SegmentWalk walk(p.plan, cluster, units + 1, p.plan.grouped() ? static_cast<int>(units[0]) : -1);
      for (Segment s; walk.next(s);)
        f(s.expert, s.tile / column_tiles * 256 + rank * 128, p.m, s.tile % column_tiles * kN, s.begin, s.end, s.slot);
    } else {
      RowTileWalk walk(p.experts, 256, column_tiles, cluster, clusters);
      const int steps = (p.k + kGemmBlockK - 1) / kGemmBlockK;
      for (RowTile t; walk.next(t);) f(t.expert, t.row + rank * 128, t.row_end, t.column * kColumns, 0, steps, -1);
    }
  };

  if (group == 0) {
    registers_decrease<40>();
    if (warp_id == 0 && elect_one()) {
      prefetch_tensor_map(&p.a);
      prefetch_tensor_map(&p.b);
      int stage = 0;
      uint32_t phase = 0;
      for_work([&](int expert, int row, int, int column, int begin, int end, int) {
        int k = begin * kGemmBlockK;
        if constexpr (kWgrad) k += p.experts.begin(expert);
        for (int i = begin; i < end; i++, k += kGemmBlockK) {
          const uint32_t a = base + stage * Tile::stage_bytes, b = a + Tile::a_bytes, bar = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(bar, Tile::stage_bytes);
          if constexpr (kAMajor == 0) load_tile<1>(a, &p.a, bar, k, row, 0, 0);
          else load_tile<1>(a, &p.a, bar, 0, k, row / 64, 0);
          // Of B this block's half: of the columns, or of the steps.
          const int half_columns = kKind == GemmKind::swiglu ? p.n : kN / 2;
          const uint32_t half = b + rank * (Tile::b_bytes / 2);
          if constexpr (kBMajor == 0) load_tile<2>(half, &p.b, bar, k, column + rank * half_columns, expert, 0);
          else load_tile<2>(half, &p.b, bar, 0, k + 32 * rank, column / 64, kWgrad ? 0 : expert);
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
      });
    }
    __syncwarp();
  } else {
    registers_increase<232>();
    const int half = group - 1, warp = warp_id % 4;
    // Where 16 of k number j begin, in units of 16 bytes.
    const auto a_step = [](int j) { return kAMajor == 0 ? 2 * j : 128 * j; };
    const auto b_step = [](int j) { return kBMajor == 0 ? 2 * j : j / 2 * (Tile::b_bytes / 32) + j % 2 * 128; };
    const uint64_t a_desc = wgmma_descriptor<128>(base + half * 8192, 8192, 1024),
                   b_desc = wgmma_descriptor<128>(base + Tile::a_bytes, 4096, 1024);
    float d[kN / 2];
    uint32_t q[kDefer ? kN / 4 : 1];
    Epilogue<kN, kKind> kept{p, staging + (half * 4 + warp) * Tile::warp_staging, lane, 0, 0, 0};  // the tile in q
    SwigluBackward<kN> backward{p, staging + (half * 4 + warp) * Tile::warp_staging, lane};
    bool pending = false;
    int stage = 0, last_stage = 0;
    uint32_t phase = 0;
    const auto release = [&](int s) {
      if (lane < 2) barrier_arrive_at(empty + 8 * s, lane);
    };

    for_work([&](int expert, int row, int row_end, int column, int first_step, int last_step, int slot) {
      const int begin = uniform(first_step), end = uniform(last_step);
      Epilogue<kN, kKind> now{
          p, staging + (half * 4 + warp) * Tile::warp_staging, lane, row + half * 64 + warp * 16, row_end, column};
      if constexpr (kKind == GemmKind::residual) now.prefetch_residual();
      const int rows_from_begin = kWgrad ? p.experts.count(expert) : 0;
      const auto step = [&](int i) {
        barrier_wait(full + 8 * stage, phase);
        if constexpr (kWgrad) {
          if (const int rows = rows_from_begin - i * kGemmBlockK; rows < kGemmBlockK) {
            // A: 2 blocks of 64 tile rows; B: kN / 64 of the first 32, then of the last 32.
            const uint32_t at = base + stage * Tile::stage_bytes;
            constexpr int kChunks = (2 + kN / 64) * 8;  // of 16 bytes a row
            for (int j = static_cast<int>(threadIdx.x) - 128; j < (kGemmBlockK - rows) * kChunks; j += 256) {
              const int r = rows + j / kChunks, c = j % kChunks, block = c / 8;
              const uint32_t to =
                  block < 2 ? block * 8192 + r * 128
                            : Tile::a_bytes + r / 32 * (Tile::b_bytes / 2) + (block - 2) * 4096 + r % 32 * 128;
              store_shared(at + to + c % 8 * 16, make_uint4(0, 0, 0, 0));
            }
            fence_async_proxy();
            named_barrier_sync(1, 256);
          }
        }
        const uint64_t offset = static_cast<uint64_t>(stage) * (Tile::stage_bytes / 16);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; j++)
          wgmma_wide<kN, kAMajor, kBMajor>(d, a_desc + offset + a_step(j), b_desc + offset + b_step(j),
                                           i > begin || j > 0);
        wgmma_commit();
        if (i > begin) {
          wgmma_wait<1>();
          release(last_stage);
        }
        last_stage = stage;
        if (++stage == kStages) stage = 0, phase ^= 1;
      };
      int i = begin;
      if constexpr (kDefer) {
        if (i < end) step(i++);
        if (pending) kept.template store<0>(q);
        if (i < end) step(i++);
        if (pending) kept.template store<1>(q);
        if constexpr (kPortions > 2) {
          if (i < end) step(i++);
          if (pending) kept.template store<2>(q);
        }
        if constexpr (kPortions > 3) {
          if (i < end) step(i++);
          if (pending) kept.template store<3>(q);
        }
        if constexpr (kPortions > 4) {
          if (i < end) step(i++);
          if (pending) kept.template store<4>(q);
          if (i < end) step(i++);
          if (pending) kept.template store<5>(q);
        }
      }
      if constexpr (kKind == GemmKind::swiglu_bwd) {
        SwigluBackward<kN>::prefetch(p, lane, now.row, row_end, column);
        for (; i + 4 <= end; i += 4) {
          step(i);
          backward.template piece<0>();
          step(i + 1);
          backward.template piece<1>();
          step(i + 2);
          backward.template piece<2>();
          step(i + 3);
          backward.template piece<3>();
        }
        for (; i < end; i++) step(i);
        wgmma_wait<0>();
        wgmma_pin(d);
        release(last_stage);
        backward.finish();
        backward.begin(d, now.row, row_end, column);
      } else if constexpr (kKind == GemmKind::residual) {
        for (; i + 1 < end; i++) step(i);
        uint4 r[kN / 16];
        now.load_residual(r);
        if (i < end) step(i);
        wgmma_wait<0>();
        wgmma_pin(d);
        release(last_stage);
        now.pack_with_residual(q, d, r);
      } else {
        if constexpr (kWgrad) {
          for (; i + kPrefetchSteps < end; i++) step(i);
          if (slot < 0)
            prefetch_rows<kN>(static_cast<const float*>(p.out) + expert * p.stride, p.ldo, row + half * 64, p.m, column,
                              p.n);
        }
        for (; i < end; i++) step(i);
        wgmma_wait<0>();
        wgmma_pin(d);
        release(last_stage);
        if constexpr (kWgrad) {
          if (slot < 0) {
            add_to<kN>(static_cast<float*>(p.out) + expert * p.stride, p.ldo, d, now.row + lane / 4, p.m,
                       column + lane % 4 * 2, p.n);
          } else {
            float4* at = slot_of<kN>(p.partial, slot, rank, half) + threadIdx.x % 128;
#pragma unroll
            for (int j = 0; j < kN / 8; j++)
              at[j * 128] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kN / 64; j++) Epilogue<kN, kKind>::pack(q + 16 * j, d + 32 * j);
        }
      }
      if constexpr (kDefer) {
        kept.row = now.row, kept.row_end = row_end, kept.column = column;
        pending = true;
      }
    });
    if constexpr (kDefer) {
      if (pending) kept.store_all(q);
    }
    if constexpr (kKind == GemmKind::swiglu_bwd) {
      backward.finish();
    }
    __syncwarp();
  }
  cluster_sync();  // nobody leaves while the other block may still write here or arrive at a barrier
#endif
}

// Adds the slots of every tile to the output, in the order of the rows. A block: 64 rows (one warpgroup's sums), an
// eighth of the columns. z: the how-manieth expert that has slots.
template <int kN>
__global__ void __launch_bounds__(128) hopper_gemm_add_slots(const __grid_constant__ GemmParams p) {
  constexpr int kParts = 8, kCount = kN / 8 / kParts;
  const int column_tiles = (p.n + kN - 1) / kN, part = static_cast<int>(blockIdx.y) % kParts,
            group = static_cast<int>(blockIdx.y) / kParts % 2, rank = static_cast<int>(blockIdx.y) / kParts / 2,
            tile = static_cast<int>(blockIdx.x);
  const SlotList slots = slots_of(p.plan, tile, static_cast<int>(blockIdx.z));
  if (slots.expert < 0 || slots.count() == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % 32,
            row = tile / column_tiles * 256 + rank * 128 + group * 64 + static_cast<int>(threadIdx.x) / 32 * 16 +
                  lane / 4,
            column = tile % column_tiles * kN + part * (kN / kParts) + lane % 4 * 2;
  float4 s[kCount] = {};
#pragma unroll 4
  for (int j = 0; j < slots.count(); j++) {
    const float4* from = slot_of<kN>(p.partial, slots.at(j), rank, group) + part * kCount * 128 + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const float4 v = from[i * 128];
      s[i] = make_float4(s[i].x + v.x, s[i].y + v.y, s[i].z + v.z, s[i].w + v.w);
    }
  }
  float* out = static_cast<float*>(p.out) + slots.expert * p.stride + column;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    if (column + 8 * i >= p.n) continue;
    float2* at = reinterpret_cast<float2*>(out + row * p.ldo + 8 * i);
    if (row < p.m) *at = {at->x + s[i].x, at->y + s[i].y};
    at = reinterpret_cast<float2*>(out + (row + 8) * p.ldo + 8 * i);
    if (row + 8 < p.m) *at = {at->x + s[i].z, at->y + s[i].w};
  }
}

}  // namespace mm::cuda
