// What the Hopper attention kernels share: tiles of one head in shared memory, products of them, softmax pieces.
//
// A tile is `rows` rows of one head, brought by one TMA copy: blocks of kCols columns one behind the other, each
// [rows][kCols] with kSwizzle = 2 kCols bytes a row (d 64, 128: blocks of 64 columns, 128-byte swizzle; d 32, 96:
// blocks of 32, 64-byte swizzle). The tensor map sees q, k, v as [head * block][row][kCols], so that a whole tile is
// one box.
#pragma once

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/hopper.cuh"

namespace mm::cuda::hopper {

constexpr int kRows = 128;  // rows that a block owns: the tiles of the list
constexpr float kLog2e = 1.4426950408889634f;

template <int D>
struct Tile {
  static constexpr int kCols = D % 64 == 0 ? 64 : 32;
  static constexpr int kBlocks = D / kCols;
  static constexpr int kSwizzle = 2 * kCols;
  __host__ __device__ static constexpr int bytes(int rows) { return rows * D * 2; }
};

// --- host ---------------------------------------------------------------------------------------------------------
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled() {  // through the runtime, so that nothing links against libcuda
  static const EncodeTiled f = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    MM_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &found));
#else
    MM_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &p, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) fail("cuTensorMapEncodeTiled", "not in this driver", __FILE__, __LINE__);
    return reinterpret_cast<EncodeTiled>(p);
  }();
  return f;
}

// Map of x [n_rows, n_head, D] with ld elements from row to row, for tiles of box_rows rows of one head.
template <int D>
CUtensorMap tile_map(DType t, const void* x, int64_t ld, int64_t n_rows, int n_head, int box_rows) {
  CUtensorMap m;
  const cuuint64_t dims[3] = {Tile<D>::kCols, static_cast<cuuint64_t>(n_rows),
                              static_cast<cuuint64_t>(n_head) * Tile<D>::kBlocks};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(ld) * 2, Tile<D>::kSwizzle};
  const cuuint32_t box[3] = {Tile<D>::kCols, static_cast<cuuint32_t>(box_rows), Tile<D>::kBlocks};
  const cuuint32_t step[3] = {1, 1, 1};
  const CUresult r =
      encode_tiled()(&m, t == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                     const_cast<void*>(x), dims, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     Tile<D>::kSwizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) fail("cuTensorMapEncodeTiled", "refused", __FILE__, __LINE__);
  return m;
}

inline bool tma_readable(const void* x, int64_t ld) { return reinterpret_cast<uintptr_t>(x) % 16 == 0 && ld % 8 == 0; }

// --- device -------------------------------------------------------------------------------------------------------
// A value that all lanes of a warp share, in a form that lets the compiler keep what follows from it (descriptors) in
// uniform registers.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Where a tile of query rows lies.
struct Place {
  int start;  // row of the sequence's first token
  int len;
  int row;  // first row of the tile, within the sequence
};
__device__ inline Place place_of(const int32_t* tiles, const int32_t* cu, int tile) {
  const int s = tiles[2 * tile], start = cu[s];
  return {uniform(start), uniform(cu[s + 1] - start), uniform(tiles[2 * tile + 1])};
}

__device__ inline uint8_t* align_1024(uint8_t* p) { return p + (1024 - smem_address(p) % 1024) % 1024; }

template <int D>
__device__ inline void load_tile(void* dst, const CUtensorMap* map, uint64_t* bar, int row, int head) {
  tma_load_3d(dst, map, bar, 0, row, head * Tile<D>::kBlocks);
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the four lanes that hold one row of an accumulator.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Accumulators [64, N] as A operands of N / 16 products.
template <class T, int N>
__device__ inline void pack_operand(uint32_t (&a)[N / 4], const float (&s)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; i++) a[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

// Rows row and row + 8 of this thread (see hopper.cuh) of acc [64, D], times f, to out. The four lanes of a row
// exchange their words so that each stores 16 bytes.
template <class T, int D>
__device__ inline void store_rows(T* out, int64_t ld, const float (&acc)[D / 2], const float (&f)[2], bool first,
                                  bool second) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int b = 0; b < D / 32; b++) {
      uint32_t w[4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const int i = 4 * (4 * b + n) + 2 * r;
        w[n] = pack2<T>(acc[i] * f[r], acc[i + 1] * f[r]);
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, (q & 1) != 0 ? w[i] : w[i + 1], 1);
        ((q & 1) != 0 ? w[i] : w[i + 1]) = got;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, (q & 2) != 0 ? w[i] : w[i + 2], 2);
        ((q & 2) != 0 ? w[i] : w[i + 2]) = got;
      }
      if (r == 0 ? first : second)
        *reinterpret_cast<uint4*>(out + (r * 8) * ld + 32 * b + 8 * q) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

#if defined(MM_SM90A)

// acc [64, N] = A B^T over D columns: a is row 0 of the 64 rows within a tile of rows_a rows, b a tile of N rows.
template <class T, int D, int N, int kRowsA>
__device__ inline void product_abt(float (&acc)[N / 2], uint32_t a, uint32_t b) {
  using S = Tile<D>;
  const uint64_t da = wgmma_descriptor<S::kSwizzle>(a, 16, 8 * S::kSwizzle);
  const uint64_t db = wgmma_descriptor<S::kSwizzle>(b, 16, 8 * S::kSwizzle);
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    const int block = k / S::kCols, within = k % S::kCols * 2;
    wgmma_ss<T, N>(acc, da + ((block * kRowsA * S::kSwizzle + within) >> 4),
                   db + ((block * N * S::kSwizzle + within) >> 4), k != 0);
  }
}

// acc [64, D] += P B: P [64, K] as A operands, b a tile of K rows.
template <class T, int D, int K>
__device__ inline void product_pb(float (&acc)[D / 2], const uint32_t (&p)[K / 4], uint32_t b) {
  using S = Tile<D>;
  const uint64_t db = wgmma_descriptor<S::kSwizzle>(b, K * S::kSwizzle, 8 * S::kSwizzle);
#pragma unroll
  for (int k = 0; k < K; k += 16) wgmma_rs<T, D, 1>(acc, p + k / 4, db + (k * S::kSwizzle >> 4), 1);
}

#endif

// --- backward ----------------------------------------------------------------------------------------------------
constexpr int kBwdThreads = 384;  // two warpgroups and the feeding one

struct BwdParams {
  const float* lse;
  float* delta;   // [n_tok, n_head]
  int* counters;  // [2] items that the blocks of dq, of dkdv have taken beyond their first
  void *dq, *dk, *dv;
  const int32_t* cu;
  const int32_t* tiles;
  const int32_t* n_tiles;
  int64_t lddq, lddk, lddv;
  int n_head, n_kv_head, group;
  float scale;
};

}  // namespace mm::cuda::hopper
