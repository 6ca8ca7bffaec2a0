// Grouped products for every GPU from sm_80 on. Hopper has a faster kernel for bf16 (hopper_gemm.cuh).
//
// grouped_mma: a block of 8 warps computes 128 x 128 of one expert's output in steps of 32 along the reduction; a warp
// 64 x 32 of it by mma.sync m16n8k16. cp.async fills a ring of 4 stages, 16 KB each; elements beyond an expert's rows
// or a matrix's edge are filled with zeros (never read: rows after the last expert's may hold anything).
//
//   K-major operand (fwd A, B; dgrad A): 128 tile rows of 32 k = 4 chunks of 16 bytes, chunk c of row r lies at
//     c ^ (r / 2 % 4); fragments by ldmatrix
//   MN-major operand (dgrad B; wgrad A, B): 32 tile rows (k) of 128 m or n = 16 chunks, chunk c of row r lies at
//     c ^ (r % 8); fragments by ldmatrix.trans
//
// grid: x = tiles of columns, y = tiles of rows (fwd, dgrad: as many as the rows could need, a block finds its expert
// from the offsets; wgrad: of each expert's matrix, z = expert). A wgrad tile sums over all rows of its expert, in
// order.
//
// Measured on an H100, 24576 rows, 4 experts unevenly: 190 to 215 TFLOP/s fwd and dgrad, 245 to 283 wgrad (hopper_gemm:
// 550 to 740).
//
// grouped_plain: 64 x 64 tiles, 4 x 4 sums a thread, any type, size and alignment.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/gemm_grouped.h"

namespace mm::cuda {

namespace {

struct Params {
  const void* a;
  const void* b;
  void* out;
  const int32_t* offset;
  int64_t stride;
  int n_expert;
  int64_t m, n, k;        // of the output; fwd, dgrad: m unused, wgrad: k unused
  int64_t lda, ldb, ldo;  // of the memory rows
};

// What a block computes: out[row .. row_end) x [column .. n) of an expert, reduction over [begin, end).
struct Block {
  int expert = -1;
  int64_t row = 0, row_end = 0, column = 0, begin = 0, end = 0;
};

template <bool kWgrad>
__device__ __forceinline__ Block find_block(const Params& p, int tile) {
  Block b;
  b.column = static_cast<int64_t>(blockIdx.x) * tile;
  if constexpr (kWgrad) {
    b.expert = static_cast<int>(blockIdx.z);
    b.row = static_cast<int64_t>(blockIdx.y) * tile, b.row_end = p.m;
    b.begin = p.offset[b.expert], b.end = p.offset[b.expert + 1];
    if (b.begin == b.end) b.expert = -1;
  } else {
    int first = 0;
    for (int e = 0; e < p.n_expert; e++) {
      const int rows = p.offset[e + 1] - p.offset[e], tiles = (rows + tile - 1) / tile;
      if (static_cast<int>(blockIdx.y) < first + tiles) {
        b.expert = e;
        b.row = p.offset[e] + static_cast<int64_t>(static_cast<int>(blockIdx.y) - first) * tile;
        b.row_end = p.offset[e + 1];
        b.begin = 0, b.end = p.k;
        break;
      }
      first += tiles;
    }
  }
  return b;
}

__device__ __forceinline__ void copy_16(uint32_t dst, const void* src, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
template <bool kTrans>
__device__ __forceinline__ void load_matrices(uint32_t addr, uint32_t (&h)[4]) {
  if constexpr (kTrans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(h[0]), "=r"(h[1]), "=r"(h[2]), "=r"(h[3])
                 : "r"(addr)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(h[0]), "=r"(h[1]), "=r"(h[2]), "=r"(h[3])
                 : "r"(addr)
                 : "memory");
}
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr int kTile = 128, kStep = 32, kStages = 4, kTileBytes = kTile * kStep * 2;

// One operand's tile of a stage. Memory rows run along k when kMnMajor.
template <bool kMnMajor, class T>
__device__ __forceinline__ void load_operand(uint32_t dst, const T* src, int64_t ld, int64_t mn, int64_t mn_end,
                                             int64_t k, int64_t k_end) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int at = static_cast<int>(threadIdx.x) + i * 256;
    if constexpr (kMnMajor) {
      const int r = at / 16, c = at % 16;
      const bool valid = k + r < k_end && mn + c * 8 < mn_end;
      copy_16(dst + r * 256 + ((c ^ (r & 7)) << 4), valid ? src + (k + r) * ld + mn + c * 8 : src, valid);
    } else {
      const int r = at / 4, c = at % 4;
      const bool valid = mn + r < mn_end && k + c * 8 < k_end;
      copy_16(dst + r * 64 + ((c ^ (r >> 1 & 3)) << 4), valid ? src + (mn + r) * ld + k + c * 8 : src, valid);
    }
  }
}
// Fragments of 16 of m or n (from mn) x 16 of k: in the order (mn 0-7, k 0-7), then k_second ? (mn 0-7, k 8-15) :
// (mn 8-15, k 0-7), ...
template <bool kMnMajor, bool kSecondIsK>
__device__ __forceinline__ void load_fragment(uint32_t tile, int mn, int k, int lane, uint32_t (&h)[4]) {
  const int low = lane >> 3 & 1, high = lane >> 4;
  const int mn_block = kSecondIsK ? high : low, k_block = kSecondIsK ? low : high;
  if constexpr (kMnMajor) {
    const int r = k + k_block * 8 + (lane & 7), c = mn / 8 + mn_block;
    load_matrices<true>(tile + r * 256 + ((c ^ (r & 7)) << 4), h);
  } else {
    const int r = mn + mn_block * 8 + (lane & 7), c = k / 8 + k_block;
    load_matrices<false>(tile + r * 64 + ((c ^ (r >> 1 & 3)) << 4), h);
  }
}

template <class T, GemmLayout kLayout>
__global__ void __launch_bounds__(256, 2) grouped_mma_kernel(const __grid_constant__ Params p) {
  constexpr bool kWgrad = kLayout == GemmLayout::wgrad, kAMn = kWgrad, kBMn = kLayout != GemmLayout::fwd;
  extern __shared__ __align__(128) uint8_t shared[];
  const Block block = find_block<kWgrad>(p, kTile);
  if (block.expert < 0) return;
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b) + (kWgrad ? 0 : block.expert * p.stride);
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int m0 = warp % 2 * 64, n0 = warp / 2 * 32;
  const int steps = static_cast<int>((block.end - block.begin + kStep - 1) / kStep);

  const auto load_stage = [&](int i) {
    if (i < steps) {
      const uint32_t at = base + i % kStages * 2 * kTileBytes;
      const int64_t k = block.begin + static_cast<int64_t>(i) * kStep;
      load_operand<kAMn>(at, a, p.lda, block.row, block.row_end, k, block.end);
      load_operand<kBMn>(at + kTileBytes, b, p.ldb, block.column, p.n, k, block.end);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  float d[4][4][4] = {};
  for (int i = 0; i < kStages - 1; i++) load_stage(i);
  for (int i = 0; i < steps; i++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();
    load_stage(i + kStages - 1);
    const uint32_t at = base + i % kStages * 2 * kTileBytes;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t fa[4][4], fb[2][4];
#pragma unroll
      for (int j = 0; j < 4; j++) load_fragment<kAMn, false>(at, m0 + 16 * j, k, lane, fa[j]);
#pragma unroll
      for (int j = 0; j < 2; j++) load_fragment<kBMn, true>(at + kTileBytes, n0 + 16 * j, k, lane, fb[j]);
#pragma unroll
      for (int x = 0; x < 4; x++) {
#pragma unroll
        for (int y = 0; y < 4; y++) mma<T>(d[x][y], fa[x], fb[y / 2][y % 2 * 2], fb[y / 2][y % 2 * 2 + 1]);
      }
    }
  }
#pragma unroll
  for (int x = 0; x < 4; x++) {
#pragma unroll
    for (int y = 0; y < 4; y++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t row = block.row + m0 + 16 * x + 8 * half + lane / 4,
                      column = block.column + n0 + 8 * y + lane % 4 * 2;
        if (row >= block.row_end || column >= p.n) continue;
        const float s0 = d[x][y][2 * half], s1 = d[x][y][2 * half + 1];
        if constexpr (kWgrad) {
          float2* out =
              reinterpret_cast<float2*>(static_cast<float*>(p.out) + block.expert * p.stride + row * p.ldo + column);
          *out = {out->x + s0, out->y + s1};
        } else {
          *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + row * p.ldo + column) = pack2<T>(s0, s1);
        }
      }
    }
  }
}

template <class T, GemmLayout kLayout>
__global__ void __launch_bounds__(256) grouped_plain_kernel(const __grid_constant__ Params p) {
  constexpr bool kWgrad = kLayout == GemmLayout::wgrad, kAMn = kWgrad, kBMn = kLayout != GemmLayout::fwd;
  __shared__ float ta[16][65], tb[16][65];
  const Block block = find_block<kWgrad>(p, 64);
  if (block.expert < 0) return;
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b) + (kWgrad ? 0 : block.expert * p.stride);
  const int tx = static_cast<int>(threadIdx.x) % 16, ty = static_cast<int>(threadIdx.x) / 16;
  float d[4][4] = {};
  // Neighbouring threads read neighbouring elements, whichever way the operand lies.
  const auto load_operand_plain = [&](float(&t)[16][65], const T* src, int64_t ld, bool mn_major, int64_t mn,
                                      int64_t mn_end, int64_t k) {
    for (int i = static_cast<int>(threadIdx.x); i < 16 * 64; i += 256) {
      const int x = mn_major ? i % 64 : i / 16, y = mn_major ? i / 64 : i % 16;
      const bool valid = mn + x < mn_end && k + y < block.end;
      t[y][x] = valid ? to_float(mn_major ? src[(k + y) * ld + mn + x] : src[(mn + x) * ld + k + y]) : 0.0f;
    }
  };
  for (int64_t k = block.begin; k < block.end; k += 16) {
    load_operand_plain(ta, a, p.lda, kAMn, block.row, block.row_end, k);
    load_operand_plain(tb, b, p.ldb, kBMn, block.column, p.n, k);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 16; j++) {
      float fa[4], fb[4];
#pragma unroll
      for (int i = 0; i < 4; i++) fa[i] = ta[j][ty + 16 * i], fb[i] = tb[j][tx + 16 * i];
#pragma unroll
      for (int x = 0; x < 4; x++) {
#pragma unroll
        for (int y = 0; y < 4; y++) d[x][y] += fa[x] * fb[y];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int x = 0; x < 4; x++) {
#pragma unroll
    for (int y = 0; y < 4; y++) {
      const int64_t row = block.row + ty + 16 * x, column = block.column + tx + 16 * y;
      if (row >= block.row_end || column >= p.n) continue;
      if constexpr (kWgrad) static_cast<float*>(p.out)[block.expert * p.stride + row * p.ldo + column] += d[x][y];
      else static_cast<T*>(p.out)[row * p.ldo + column] = from_float<T>(d[x][y]);
    }
  }
}

Params make_params(const GroupedGemm& g) {
  Params p{g.a, g.b, g.out, g.offset, g.stride, g.n_expert};
  switch (g.layout) {
    case GemmLayout::fwd: p.n = g.n, p.k = g.k, p.lda = g.k, p.ldb = g.k, p.ldo = g.n; break;
    case GemmLayout::dgrad: p.n = g.k, p.k = g.n, p.lda = g.n, p.ldb = g.k, p.ldo = g.k; break;
    case GemmLayout::wgrad: p.m = g.n, p.n = g.k, p.lda = g.n, p.ldb = g.k, p.ldo = g.k; break;
  }
  return p;
}

dim3 make_grid(const GroupedGemm& g, const Params& p, int tile) {
  const bool wgrad = g.layout == GemmLayout::wgrad;
  // Each expert's last tile may be a partial one.
  const int64_t rows = wgrad ? div_up(p.m, tile) : div_up(g.max_rows, tile) + g.n_expert - 1;
  return dim3(static_cast<unsigned>(div_up(p.n, tile)), static_cast<unsigned>(rows),
              static_cast<unsigned>(wgrad ? g.n_expert : 1));
}

template <class T, GemmLayout kLayout>
void launch_mma(const Context& ctx, const GroupedGemm& g) {
  constexpr int kShared = kStages * 2 * kTileBytes;
  const auto kernel = grouped_mma_kernel<T, kLayout>;
  MM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const Params p = make_params(g);
  kernel<<<make_grid(g, p, kTile), 256, kShared, ctx.stream>>>(p);
  MM_CUDA_LAUNCHED();
}
template <class T, GemmLayout kLayout>
void launch_plain(const Context& ctx, const GroupedGemm& g) {
  const Params p = make_params(g);
  grouped_plain_kernel<T, kLayout><<<make_grid(g, p, 64), 256, 0, ctx.stream>>>(p);
  MM_CUDA_LAUNCHED();
}

}  // namespace

void grouped_mma(const Context& ctx, DType t, const GroupedGemm& g) {
  dispatch(t, [&]<class T>(T) {
    if constexpr (sizeof(T) == 2) {
      switch (g.layout) {
        case GemmLayout::fwd: return launch_mma<T, GemmLayout::fwd>(ctx, g);
        case GemmLayout::dgrad: return launch_mma<T, GemmLayout::dgrad>(ctx, g);
        case GemmLayout::wgrad: return launch_mma<T, GemmLayout::wgrad>(ctx, g);
      }
    }
  });
}

void grouped_plain(const Context& ctx, DType t, const GroupedGemm& g) {
  dispatch(t, [&]<class T>(T) {
    switch (g.layout) {
      case GemmLayout::fwd: return launch_plain<T, GemmLayout::fwd>(ctx, g);
      case GemmLayout::dgrad: return launch_plain<T, GemmLayout::dgrad>(ctx, g);
      case GemmLayout::wgrad: return launch_plain<T, GemmLayout::wgrad>(ctx, g);
    }
  });
}

}  // namespace mm::cuda
