// What the Hopper GEMM (hopper_gemm.cuh) does with finished tiles: parameters, stores, residual, SwiGLU forward and
// backward, fp32 additions.
//
// Sums leave in the layout of wgmma, two neighbours a thread. A warp exchanges 16 rows x 64 columns of bf16 through its
// own corner of shared memory (stmatrix, chunks of 16 bytes exchanged by row against bank conflicts) and then handles
// whole rows: a store instruction writes 4 rows of 128 bytes.
#pragma once

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/hopper_gemm.h"
#include "kernels/cuda/hopper_gemm_ops.cuh"
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
};

enum class GemmKind { store, residual, swiglu, swiglu_bwd, add_f32 };

template <int kN, GemmKind kKind>
struct GemmTile {
  static constexpr int a_bytes = 128 * 128, b_bytes = kN * 128, stage_bytes = a_bytes + b_bytes;
  // The staging area of a warp holds 16 rows of bf16: 64 columns, for swiglu_bwd all of them.
  static constexpr bool whole = kKind == GemmKind::swiglu_bwd;
  static constexpr int warp_staging = whole ? kN / 64 * 2048 : 2048, staging_bytes = 8 * warp_staging;
  static constexpr int stages = kN == 256 ? 4 : kN == 128 ? 6 : whole ? 4 : 5;
  static constexpr int shared_bytes = 1024 + stages * stage_bytes + staging_bytes + 256 + 4 * kMaxUnits;
};

// Where the sums of a warpgroup lie in a wgrad's slot: thread t's sums 4 i .. 4 i + 3 are float4 number i * 128 + t.
template <int kN>
__device__ __forceinline__ float4* slot_of(float* partial, int slot, int rank, int group) {
  return reinterpret_cast<float4*>(partial) + (static_cast<int64_t>(slot) * 4 + rank * 2 + group) * (kN / 8 * 128);
}

#if defined(MM_SM90A)

namespace hopper {

// 16 rows x 64 columns of one warp from registers (q[2 j], q[2 j + 1]: rows l / 4 and l / 4 + 8, columns 8 j + 2 (l %
// 4)) by way of shared memory to out, whole rows of 128 bytes at a time.
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
__device__ __forceinline__ void store_tile(uint32_t staging, const uint32_t* q, int lane, bf16* out, int64_t ld,
                                           int row0, int row_end, int column0, int column_end) {
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
    for (int i = lane % 2; i < kN / 64; i += 2) {
      const int at = column + i * 64;
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
__device__ __forceinline__ void prefetch_rows(const float* out, int64_t ld, int row, int rows, int column,
                                              int columns) {
  for (int i = static_cast<int>(threadIdx.x) % 128; i < 64 * (kN / 32); i += 128) {
    const int r = row + i / (kN / 32), at = column + i % (kN / 32) * 32;
    if (r < rows && at < columns) prefetch_l2(out + r * ld + at);
  }
}

// The backward pass of SwiGLU on a finished tile of dact = product, which lies in shared memory as bf16: 16 rows of a
// warp, in pieces of 4 rows x 64 columns. One piece is computed behind each step of the next tile's products; its gates
// and ups are loaded four steps earlier, and asked into L2 when the tile itself was begun.
// M 24576, f 2432, k 768 on an H100, in place: 337 us (M 12288: 175), the product and swiglu_bwd apart 129 + 242 (205).
// Loaded one step earlier, with 8 KB of loads on their way in a multiprocessor, it took 387 us. Bytes alone: 211 us.
template <int kN>
struct SwigluBackward {
  static constexpr int kChunks = kN / 64;
  const GemmParams& p;
  uint32_t staging;
  int lane;
  int row = 0, row_end = 0, column = 0, chunk = kChunks;  // of 64 columns; the one that is next
  uint4 gate[4], up[4];                                   // of its four pieces, 4 rows each

  __device__ __forceinline__ static void prefetch(const GemmParams& p, int lane, int row, int row_end, int column) {
    const bf16* from = static_cast<const bf16*>(p.residual);
#pragma unroll
    for (int i = 0; i < kN / 64; i++) {
      const int r = row + lane / 2, at = column + 64 * i;
      if (r < row_end && at < p.n) prefetch_l2(from + r * p.ldr + at + (lane % 2 == 0 ? 0 : p.n));
    }
  }
  __device__ __forceinline__ void load(int c, int piece) {
    const int r = row + piece * 4 + lane / 8, at = column + c * 64 + lane % 8 * 8;
    gate[piece] = up[piece] = make_uint4(0, 0, 0, 0);
    if (c < kChunks && r < row_end && at < p.n) {
      const bf16* from = static_cast<const bf16*>(p.residual) + r * p.ldr + at;
      gate[piece] = *reinterpret_cast<const uint4*>(from), up[piece] = *reinterpret_cast<const uint4*>(from + p.n);
    }
  }
  __device__ __forceinline__ void begin(const float* d, int tile_row, int tile_row_end, int tile_column) {
    row = tile_row, row_end = tile_row_end, column = tile_column, chunk = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) load(0, i);
    __syncwarp();  // all lanes have read the last tile
#pragma unroll
    for (int c = 0; c < kN / 64; c++) {
      uint32_t q[16];
#pragma unroll
      for (int i = 0; i < 16; i++) q[i] = pack2<bf16>(d[32 * c + 2 * i], d[32 * c + 2 * i + 1]);
      stage_tile(staging + 2048 * c, q, lane);
    }
    __syncwarp();
  }
  template <int kPiece>
  __device__ __forceinline__ void piece() {
    if (chunk == kChunks) return;
    const int now = chunk;
    const uint32_t g[4] = {gate[kPiece].x, gate[kPiece].y, gate[kPiece].z, gate[kPiece].w};
    const uint32_t u[4] = {up[kPiece].x, up[kPiece].y, up[kPiece].z, up[kPiece].w};
    const uint4 v = load_shared(staging_address(staging + now * 2048, kPiece * 4 + lane / 8, lane % 8));
    const uint32_t d[4] = {v.x, v.y, v.z, v.w};
    uint32_t dg[4], du[4], a[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 gf = unpack2<bf16>(g[i]), uf = unpack2<bf16>(u[i]), df = unpack2<bf16>(d[i]);
      const float s0 = __fdividef(1.0f, 1.0f + __expf(-gf.x)), s1 = __fdividef(1.0f, 1.0f + __expf(-gf.y));
      const float silu0 = gf.x * s0, silu1 = gf.y * s1;
      a[i] = pack2<bf16>(silu0 * uf.x, silu1 * uf.y);
      dg[i] =
          pack2<bf16>(df.x * uf.x * s0 * (1.0f + gf.x * (1.0f - s0)), df.y * uf.y * s1 * (1.0f + gf.y * (1.0f - s1)));
      du[i] = pack2<bf16>(df.x * silu0, df.y * silu1);
    }
    load(now + 1, kPiece);
    if (kPiece == 3) chunk++;
    const int r = row + kPiece * 4 + lane / 8, at = column + now * 64 + lane % 8 * 8;
    if (r >= row_end || at >= p.n) return;
    bf16* out = static_cast<bf16*>(p.out) + r * p.ldo + at;
    *reinterpret_cast<uint4*>(out) = make_uint4(dg[0], dg[1], dg[2], dg[3]);
    *reinterpret_cast<uint4*>(out + p.n) = make_uint4(du[0], du[1], du[2], du[3]);
    if (p.act != nullptr) {
      bf16* act = static_cast<bf16*>(p.act) + static_cast<int64_t>(r) * p.n + at;
      *reinterpret_cast<uint4*>(act) = make_uint4(a[0], a[1], a[2], a[3]);
    }
  }
  __device__ __forceinline__ void finish() {
    while (chunk < kChunks) piece<0>(), piece<1>(), piece<2>(), piece<3>();
  }
};

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

}  // namespace mm::cuda
