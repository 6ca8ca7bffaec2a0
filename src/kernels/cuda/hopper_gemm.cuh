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
//        B  kN columns                     shared memory of a stage, rows of 128 bytes as TMA swizzles them:
//      +----------------+                  K-major:  tile row i = row i of A (or column i of B), 64 of k
//   A  | warpgroup 1    | block 0          MN-major: blocks of 64 rows of A (columns of B), 64 tile rows of k each
//      | warpgroup 2    |
//      +----------------+
//      | warpgroup 1    | block 1
//      | warpgroup 2    |
//      +----------------+
//
// Registers are moved from the loading warpgroup to the computing ones (40 / 232), which hold 64 x kN sums.
// While a warpgroup stores its tile the tensor cores would idle; so a finished tile is kept as bf16 (64 registers) and
// stored in portions behind the first products of the next tile (kDefer; 4 to 8 % faster than storing at once).
//
// Rows of another expert or beyond the end are computed and not stored; in a wgrad, where rows are summed over, they are
// overwritten with zeros in shared memory before the last product (they may hold anything, NaN too).
#pragma once

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/hopper_gemm.h"
#include "kernels/cuda/hopper_gemm_ops.cuh"
#include "kernels/cuda/hopper_gemm_plan.cuh"
#include "kernels/cuda/hopper_gemm_schedule.h"

namespace mm::cuda {

struct GemmParams {
  CUtensorMap a, b;
  void* out;
  const void* residual;
  void* act;
  float* partial;  // slots of a wgrad
  int64_t ldo, ldr, stride;
  ExpertRows experts;
  SegmentPlan plan;  // wgrad
  int m, n, k;       // n of swiglu: its half
  int ahead, out_ahead, pdl;
};

enum class GemmKind { store, residual, swiglu, add_f32 };

template <int kN>
struct GemmTile {
  static constexpr int a_bytes = 128 * 128, b_bytes = kN * 128, stage_bytes = a_bytes + b_bytes;
  static constexpr int stages = kN == 256 ? 4 : kN == 192 ? 5 : 6;
  static constexpr int staging_bytes = 8 * 2048;  // 16 rows x 64 columns of bf16 a warp
  static constexpr int shared_bytes = 1024 + stages * stage_bytes + staging_bytes + 256 + 4 * kMaxUnits;
};

// Where the sums of a warpgroup lie in a wgrad's slot: thread t's sums 4 i .. 4 i + 3 are float4 number i * 128 + t.
template <int kN>
__device__ __forceinline__ float4* slot_of(float* partial, int slot, int rank, int group) {
  return reinterpret_cast<float4*>(partial) + (static_cast<int64_t>(slot) * 4 + rank * 2 + group) * (kN / 8 * 128);
}

#if defined(MM_SM90A)

namespace hopper {

// 16 rows x 64 columns of one warp from registers (q[2 j], q[2 j + 1]: rows l / 4 and l / 4 + 8, columns 8 j + 2 (l % 4))
// by way of shared memory to out, whole rows of 128 bytes at a time.
__device__ __forceinline__ uint32_t staging_address(uint32_t staging, int row, int chunk) {
  return staging + row * 128 + ((chunk ^ (row & 7)) << 4);
}
__device__ __forceinline__ void stage_tile(uint32_t staging, const uint32_t* q, int lane) {
  const int row = (lane & 7) + (lane & 8);
#pragma unroll
  for (int j = 0; j < 4; j++)
    store_matrices(staging_address(staging, row, 2 * j + (lane >> 4)), q[4 * j], q[4 * j + 1], q[4 * j + 2],
                   q[4 * j + 3]);
}
__device__ __forceinline__ void store_tile(uint32_t staging, const uint32_t* q, int lane, bf16* out, int64_t ld, int row0,
                                           int row_end, int column0, int column_end) {
  stage_tile(staging, q, lane);
  __syncwarp();
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = load_shared(staging_address(staging, 4 * i + lane / 8, lane % 8));
  __syncwarp();
  const int row = row0 + lane / 8, column = column0 + lane % 8 * 8;
  bf16* p = out + row * ld + column;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (row + 4 * i < row_end && column < column_end) *reinterpret_cast<uint4*>(p + 4 * i * ld) = v[i];
  }
}

template <int kN, GemmKind kKind>
struct Epilogue {
  static constexpr int kColumns = kKind == GemmKind::swiglu ? kN / 2 : kN;
  const GemmParams& p;
  uint32_t staging;
  int lane;
  int row, row_end, column;  // of this warp's sums

  __device__ __forceinline__ static void pack(uint32_t* q, const float* d) {
#pragma unroll
    for (int i = 0; i < 16; i++) q[i] = pack2<bf16>(d[2 * i], d[2 * i + 1]);
  }
  // Portion c of a tile, packed in q. Those of swiglu (256 columns): gate, gate, up, act, up, act of 64 columns each.
  static constexpr int kPortions = kKind == GemmKind::swiglu ? 6 : kN / 64;
  template <int c>
  __device__ __forceinline__ void store(const uint32_t* q) const {
    bf16* out = static_cast<bf16*>(p.out);
    if constexpr (kKind != GemmKind::swiglu) {
      store_tile(staging, q + 16 * c, lane, out, p.ldo, row, row_end, column + 64 * c, p.n);
    } else if constexpr (c < 2) {
      if (out != nullptr) store_tile(staging, q + 16 * c, lane, out, p.ldo, row, row_end, column + 64 * c, p.n);
    } else if constexpr (c % 2 == 0) {
      if (out != nullptr)
        store_tile(staging, q + 16 * (1 + c / 2), lane, out + p.n, p.ldo, row, row_end, column + (c / 2 - 1) * 64, p.n);
    } else {
      uint32_t act[16];
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const float2 g = unpack2<bf16>(q[16 * (c / 2 - 1) + i]), u = unpack2<bf16>(q[16 * (1 + c / 2) + i]);
        act[i] = pack2<bf16>(__fdividef(g.x, 1.0f + __expf(-g.x)) * u.x, __fdividef(g.y, 1.0f + __expf(-g.y)) * u.y);
      }
      store_tile(staging, act, lane, static_cast<bf16*>(p.act), p.n, row, row_end, column + (c / 2 - 1) * 64, p.n);
    }
  }
  template <int c = 0>
  __device__ __forceinline__ void store_all(const uint32_t* q) const {
    store<c>(q);
    if constexpr (c + 1 < kPortions) store_all<c + 1>(q);
  }

  // The residual in the order of store_tile: asked into L2 at the tile's start, loaded near its end, added last.
  __device__ __forceinline__ void prefetch_residual() const {
    const bf16* from = static_cast<const bf16*>(p.residual) + (row + lane / 2) * p.ldr;
#pragma unroll
    for (int i = 0; i < kN / 128; i++) {
      const int at = column + (lane % 2 + 2 * i) * 64;
      if (row + lane / 2 < row_end && at < p.n) prefetch_l2(from + at);
    }
  }
  __device__ __forceinline__ void load_residual(uint4 (&r)[kN / 16]) const {
    const bf16* from = static_cast<const bf16*>(p.residual) + (row + lane / 8) * p.ldr;
#pragma unroll
    for (int i = 0; i < kN / 16; i++) {
      const int at = column + i / 4 * 64 + lane % 8 * 8;
      r[i] = make_uint4(0, 0, 0, 0);
      if (row + lane / 8 + i % 4 * 4 < row_end && at < p.n)
        r[i] = *reinterpret_cast<const uint4*>(from + i % 4 * 4 * p.ldr + at);
    }
  }
  __device__ __forceinline__ void pack_with_residual(uint32_t* q, const float* d, const uint4 (&r)[kN / 16]) const {
#pragma unroll
    for (int c = 0; c < kN / 64; c++) {
#pragma unroll
      for (int i = 0; i < 4; i++) store_shared(staging_address(staging, 4 * i + lane / 8, lane % 8), r[4 * c + i]);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t h[4];
        load_matrices(staging_address(staging, (lane & 7) + (lane & 8), 2 * j + (lane >> 4)), h);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 f = unpack2<bf16>(h[i]);
          const float* s = d + 32 * c + 8 * j + 2 * i;
          q[16 * c + 4 * j + i] = pack2<bf16>(s[0] + f.x, s[1] + f.y);
        }
      }
      __syncwarp();
    }
  }
};

// 64 rows of the fp32 output into L2, by one warpgroup.
constexpr int kPrefetchSteps = 8;
template <int kN>
__device__ __forceinline__ void prefetch_rows(const float* out, int64_t ld, int row, int rows, int column, int columns) {
  for (int i = static_cast<int>(threadIdx.x) % 128; i < 64 * (kN / 32); i += 128) {
    const int r = row + i / (kN / 32), at = column + i % (kN / 32) * 32;
    if (r < rows && at < columns) prefetch_l2(out + r * ld + at);
  }
}

// Sums of a warpgroup += into the fp32 output; row: of this thread's first sums.
template <int kN>
__device__ __forceinline__ void add_to(float* out, int64_t ld, const float* d, int row, int rows, int column,
                                       int columns) {
#pragma unroll
  for (int j0 = 0; j0 < kN / 8; j0 += 8) {
    float2 v[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int at = column + (j0 + i / 2) * 8, r = row + i % 2 * 8;
      if (r < rows && at < columns) v[i] = *reinterpret_cast<const float2*>(out + r * ld + at);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int at = column + (j0 + i / 2) * 8, r = row + i % 2 * 8;
      const float* s = d + (j0 + i / 2) * 4 + i % 2 * 2;
      if (r < rows && at < columns) *reinterpret_cast<float2*>(out + r * ld + at) = {v[i].x + s[0], v[i].y + s[1]};
    }
  }
}

}  // namespace hopper

#endif  // MM_SM90A

template <int kN, GemmLayout kLayout, GemmKind kKind, bool kDefer>
__global__ void __launch_bounds__(384, 1) hopper_gemm_kernel(const __grid_constant__ GemmParams p) {
#if defined(MM_SM90A)
  using namespace hopper;
  using Tile = GemmTile<kN>;
  constexpr int kStages = Tile::stages;
  constexpr bool kWgrad = kLayout == GemmLayout::wgrad;
  constexpr int kAMajor = kWgrad ? 1 : 0, kBMajor = kLayout == GemmLayout::fwd ? 0 : 1;  // 1: MN
  constexpr int kColumns = kKind == GemmKind::swiglu ? kN / 2 : kN;
  constexpr int kPortions = Epilogue<kN, kKind>::kPortions;
  extern __shared__ uint8_t shared[];
  const uint32_t base = (smem_address(shared) + 1023) & ~1023u;
  const uint32_t staging = base + kStages * Tile::stage_bytes, full = staging + Tile::staging_bytes,
                 empty = full + 8 * kStages, unit_list = full + 256;
  // From lane 0, so that the compiler knows these to be the same for the warp (descriptors live in uniform registers).
  const int warp_id = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), group = warp_id / 4;
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
    if (kWgrad && p.pdl) let_next_kernel_start();
    if (threadIdx.x == 0) {
      prefetch_tensor_map(&p.a);
      prefetch_tensor_map(&p.b);
      int stage = 0;
      uint32_t phase = 0;
      // Asks for the A (rows of x or dy) of a later step, so that TMA finds it in L2: by one of the clusters that share it.
      const auto prefetch_a = [&](int row, int k) {
        if constexpr (kAMajor == 0) {
          prefetch_tile(&p.a, k, row, 0);
        } else {
          prefetch_tile(&p.a, row, k, 0);
          prefetch_tile(&p.a, row + 64, k, 0);
        }
      };
      RowTileWalk later(p.experts, 256, column_tiles, cluster, clusters);
      RowTile next{};
      bool more = !kWgrad && later.next(next);
      for_work([&](int expert, int row, int, int column, int begin, int end, int) {
        const int first = kWgrad ? p.experts.begin(expert) : 0;
        if (!kWgrad && more) more = later.next(next);
        for (int i = begin; i < end; i++) {
          const int k = first + i * kGemmBlockK;
          const uint32_t a = base + stage * Tile::stage_bytes, b = a + Tile::a_bytes, bar = full + 8 * stage;
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(bar, Tile::stage_bytes);
          if constexpr (kAMajor == 0) {
            load_tile<1>(a, &p.a, bar, k, row, 0);
          } else {
            load_tile<1>(a, &p.a, bar, row, k, 0);
            load_tile<1>(a + 8192, &p.a, bar, row + 64, k, 0);
          }
          if constexpr (kBMajor == 0) {  // this block's half of the columns
            const int half = kKind == GemmKind::swiglu ? p.n : kN / 2;
            load_tile<2>(b + rank * (Tile::b_bytes / 2), &p.b, bar, k, column + rank * half, expert);
          } else {  // ... of the steps
#pragma unroll
            for (int j = 0; j < kN / 64; j++)
              load_tile<2>(b + j * 8192 + rank * 4096, &p.b, bar, column + 64 * j, k + 32 * rank, kWgrad ? 0 : expert);
          }
          if (p.ahead > 0) {
            const int j = i + p.ahead, later_k = first + j * kGemmBlockK;
            if (j < end) {
              if (column == 0) prefetch_a(row, later_k);
              if constexpr (kWgrad) {
                if (row < 256) {
#pragma unroll
                  for (int c = 0; c < kN / 64; c++) prefetch_tile(&p.b, column + 64 * c, later_k + 32 * rank, 0);
                }
              }
            } else if (!kWgrad && more && next.column == 0 && j - end < end) {
              prefetch_a(next.row + rank * 128, (j - end) * kGemmBlockK);
            }
          }
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
      });
    }
    __syncwarp();
  } else {
    registers_increase<232>();
    const int half = group - 1, warp = warp_id % 4;
    constexpr uint32_t kAStep = kAMajor == 0 ? 2 : 128, kBStep = kBMajor == 0 ? 2 : 128;  // 16 of k, in 16 bytes
    const uint64_t a_desc = wgmma_descriptor<128>(base + half * 8192, 8192, 1024),
                   b_desc = wgmma_descriptor<128>(base + Tile::a_bytes, 8192, 1024);
    float d[kN / 2];
    uint32_t q[kDefer ? kN / 4 : 1];
    Epilogue<kN, kKind> kept{p, staging + (half * 4 + warp) * 2048, lane, 0, 0, 0};  // the tile in q
    bool pending = false;
    int stage = 0, last_stage = 0;
    uint32_t phase = 0;
    const auto release = [&](int s) {
      if (lane < 2) barrier_arrive_at(empty + 8 * s, lane);
    };

    for_work([&](int expert, int row, int row_end, int column, int begin, int end, int slot) {
      Epilogue<kN, kKind> now{p, staging + (half * 4 + warp) * 2048, lane, row + half * 64 + warp * 16, row_end, column};
      if constexpr (kKind == GemmKind::residual) now.prefetch_residual();
      const int rows_from_begin = kWgrad ? p.experts.count(expert) : 0;
      const auto step = [&](int i) {
        barrier_wait(full + 8 * stage, phase);
        if constexpr (kWgrad) {
          if (const int rows = rows_from_begin - i * kGemmBlockK; rows < kGemmBlockK) {
            const int per_block = (kGemmBlockK - rows) * 8;
            for (int j = static_cast<int>(threadIdx.x) - 128; j < (2 + kN / 64) * per_block; j += 256)
              store_shared(base + stage * Tile::stage_bytes + j / per_block * 8192 + rows * 128 + j % per_block * 16,
                           make_uint4(0, 0, 0, 0));
            fence_async_proxy();
            named_barrier_sync(1, 256);
          }
        }
        const uint64_t offset = static_cast<uint64_t>(stage) * (Tile::stage_bytes / 16);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; j++)
          wgmma_wide<kN, kAMajor, kBMajor>(d, a_desc + offset + j * kAStep, b_desc + offset + j * kBStep,
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
      uint32_t packed[kN / 4];
      uint32_t* const to = kDefer ? q : packed;
      if constexpr (kKind == GemmKind::residual) {
        for (; i + 1 < end; i++) step(i);
        uint4 r[kN / 16];
        now.load_residual(r);
        if (i < end) step(i);
        wgmma_wait<0>();
        wgmma_pin(d);
        release(last_stage);
        now.pack_with_residual(to, d, r);
      } else {
        if constexpr (kWgrad) {
          for (; i + kPrefetchSteps < end; i++) step(i);
          if (slot < 0 && p.out_ahead)
            prefetch_rows<kN>(static_cast<const float*>(p.out) + expert * p.stride, p.ldo, row + half * 64, p.m, column, p.n);
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
          for (int j = 0; j < kN / 64; j++) Epilogue<kN, kKind>::pack(to + 16 * j, d + 32 * j);
        }
      }
      if constexpr (kDefer) {
        kept.row = now.row, kept.row_end = row_end, kept.column = column;
        pending = true;
      } else if constexpr (!kWgrad) {
        now.store_all(packed);
      }
    });
    if constexpr (kDefer) {
      if (pending) kept.store_all(q);
    }
    __syncwarp();
  }
  cluster_sync();  // nobody leaves while the other block may still write here or arrive at a barrier
#endif
}

// Adds the slots of every tile to the output, in the order of the rows. A block: 64 rows (one warpgroup's sums), 16
// columns: two float4 a thread.
template <int kN>
__global__ void __launch_bounds__(128) hopper_gemm_add_slots(const __grid_constant__ GemmParams p) {
  constexpr int kParts = kN / 16;
#if defined(MM_SM90A)
  hopper::wait_for_kernel_before();
#endif
  const int column_tiles = (p.n + kN - 1) / kN, part = static_cast<int>(blockIdx.y) % kParts,
            group = static_cast<int>(blockIdx.y) / kParts % 2, rank = static_cast<int>(blockIdx.y) / kParts / 2,
            tile = static_cast<int>(blockIdx.x), expert = static_cast<int>(blockIdx.z);
  const int lane = static_cast<int>(threadIdx.x) % 32,
            row = tile / column_tiles * 256 + rank * 128 + group * 64 + static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4,
            column = tile % column_tiles * kN + part * 16 + lane % 4 * 2;
  float4 s[2] = {};
  bool any = false;
  for_slots(p.plan, expert, tile, [&](int slot) {
    const float4* from = slot_of<kN>(p.partial, slot, rank, group) + part * 2 * 128 + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 v = from[i * 128];
      s[i] = make_float4(s[i].x + v.x, s[i].y + v.y, s[i].z + v.z, s[i].w + v.w);
    }
    any = true;
  });
  if (!any) return;
  float* out = static_cast<float*>(p.out) + expert * p.stride + column;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (column + 8 * i >= p.n) continue;
    float2* at = reinterpret_cast<float2*>(out + row * p.ldo + 8 * i);
    if (row < p.m) *at = {at->x + s[i].x, at->y + s[i].y};
    at = reinterpret_cast<float2*>(out + (row + 8) * p.ldo + 8 * i);
    if (row + 8 < p.m) *at = {at->x + s[i].z, at->y + s[i].w};
  }
}

}  // namespace mm::cuda
