// What the attention kernels share: the tile a block works on, and for the tensor-core ones (mma.sync m16n8k16, sm_80
// and up) copies to shared memory, fragments and products.
//
// A tile in shared memory is row-major, [rows, D] 16-bit elements, its 16-byte chunks permuted so that the 8 rows of
// one ldmatrix lie in 8 different groups of banks: within groups of `lanes` chunks, chunk c of row r lies at
// c ^ key(r). D = 64, 128: 8 chunks are one line of banks, key = r % 8. D = 32, 96: rows start at even or odd halves of
// a line in turn, so 4 chunks and key = r / 2 % 4 are enough.
#pragma once

#include "kernels/cuda/device_math.cuh"

namespace mm::cuda {

// --- work of a block ----------------------------------------------------------------------------------------------
constexpr int tile_rows = 128;

struct Tile {
  int seq, row;  // seq < 0: nothing to do
};

// Tile `index` of `rows` query rows: from the list, else (no list, or of other tiles) counted from the lengths, later
// rows of a sequence first. Every warp must call it whole.
__device__ __forceinline__ Tile find_tile(const Attention& a, int index, int rows) {
  if (a.tiles != nullptr && rows == tile_rows) {
    const Tile tile = {a.tiles[2 * index], a.tiles[2 * index + 1]};  // read beside the count, not after it
    return index < *a.n_tiles ? tile : Tile{-1, 0};
  }
  const int lane = static_cast<int>(threadIdx.x) % 32, n_seq = static_cast<int>(a.n_seq);
  for (int first = 0; first < n_seq; first += 32) {
    const int s = first + lane, n = s < n_seq ? (a.cu[s + 1] - a.cu[s] + rows - 1) / rows : 0;
    int end = n;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int x = __shfl_up_sync(0xffffffffu, end, i);
      if (lane >= i) end += x;
    }
    const unsigned beyond = __ballot_sync(0xffffffffu, end > index);
    if (beyond != 0) {
      const int owner = __ffs(static_cast<int>(beyond)) - 1;
      return {first + owner, (__shfl_sync(0xffffffffu, end, owner) - 1 - index) * rows};
    }
    index -= __shfl_sync(0xffffffffu, end, 31);
  }
  return {-1, 0};
}

// Blocks that surely cover all tiles of `rows` query rows.
inline int64_t tile_grid(const Attention& a, int rows) {
  if (a.tiles != nullptr && rows == tile_rows) return a.max_tiles;
  return a.n_tok / rows + std::min(a.n_seq, a.n_tok);
}

// Heads that a block works through one after another: as many as leave enough blocks to balance the load.
inline int heads_per_block(int64_t tiles, int n_head, int blocks_at_once) {
  int heads = 1;
  while (n_head % (2 * heads) == 0 && tiles * n_head / (2 * heads) >= 2 * blocks_at_once) heads *= 2;
  return heads;
}

// Rows of a sequence; query i sees keys up to i + shift.
struct Sequence {
  int q0, q_len, kv0, kv_len, shift;
  __device__ __forceinline__ Sequence(const Attention& a, int s) {
    q0 = a.cu[s], q_len = a.cu[s + 1] - q0;
    kv0 = a.kv_start != nullptr ? a.kv_start[s] : q0;
    kv_len = a.kv_len != nullptr ? a.kv_len[s] : q_len;
    shift = kv_len - q_len;
  }
};

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }
__device__ __forceinline__ float exp2_fast(float x) {  // 2^x within 2 ulp; 2^-inf = 0, NaN stays
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- shared memory ------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void cp_async16(uint32_t dst, const void* src, bool valid) {  // zeros when not valid
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void cp_async16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src));
}
__device__ __forceinline__ void cp_async4(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0));
}
__device__ __forceinline__ void cp_async8(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(src), "r"(valid ? 8 : 0));
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

template <int D>
struct RowLayout {
  static_assert(D == 32 || D == 64 || D == 96 || D == 128);
  static constexpr int lanes = D % 64 == 0 ? 8 : 4;  // threads that copy a row; chunks permuted among themselves
  static constexpr int bytes = 2 * D;                // a row
  static __device__ __forceinline__ int key(int row) { return lanes == 8 ? row & 7 : (row >> 1) & 3; }
};

// Rows [0, n_valid) of src into a tile of kRows rows, zeros below them. By kThreads threads, tid < kThreads. kWhole: no
// row is missing; a loop without questions, 4 % of forward at d 64. Where that is not known, asking once a tile pays at
// d 96 (2 % of dq) and costs elsewhere (4 % at d 128, by registers).
template <int D, int kRows, int kThreads, bool kWhole = false, class T>
__device__ __forceinline__ void copy_rows_async(uint32_t dst, const T* src, int64_t ld, int n_valid, int tid) {
  using L = RowLayout<D>;
  constexpr int step = kThreads / L::lanes;
  static_assert(kRows % step == 0 && step % 8 == 0);
  constexpr bool ask_once = D == 96;
  const int row = tid / L::lanes, c = tid % L::lanes;
  const uint32_t to = dst + static_cast<uint32_t>(row * L::bytes + (c ^ L::key(row)) * 16);
  const T* from = src + row * ld + c * 8;
  const bool whole = kWhole || (ask_once && n_valid >= kRows);
  if (whole) {
#pragma unroll
    for (int r = 0; r < kRows; r += step) {
#pragma unroll
      for (int j = 0; j < D / 8; j += L::lanes)
        cp_async16(to + static_cast<uint32_t>(r * L::bytes + j * 16), from + j * 8);
      from += step * ld;
    }
  }
  if constexpr (!kWhole) {
    if (whole) return;
#pragma unroll(ask_once ? 1 : kRows / step)
    for (int r = 0; r < kRows; r += step) {
      const bool valid = row + r < n_valid;
      const T* row_from = valid ? from : src;
#pragma unroll
      for (int j = 0; j < D / 8; j += L::lanes)
        cp_async16(to + static_cast<uint32_t>(r * L::bytes + j * 16), row_from + j * 8, valid);
      from += step * ld;
    }
  }
}

// Where this lane's row of an ldmatrix.x4 lies. `rows` pattern: the four 8x8 matrices are (rows 0-7, chunk 0), (8-15,
// 0), (0-7, 1), (8-15, 1): operand A from [m, k], or, transposed, operand B from [k, n]. `cols` pattern: (0-7, 0),
// (0-7, 1), (8-15, 0), (8-15, 1): operand B from [n, k].
enum class Pattern { rows, cols };
template <int D>
struct FragmentAddress {
  using L = RowLayout<D>;
  static constexpr int n = L::lanes / 2;
  uint32_t offset[n];
  __device__ __forceinline__ FragmentAddress(uint32_t base, Pattern pattern, int lane) {
    const int row = lane % 8 + 8 * (pattern == Pattern::rows ? lane / 8 % 2 : lane / 16);
    const int chunk = pattern == Pattern::rows ? lane / 16 : lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < n; i++)
      offset[i] = base + static_cast<uint32_t>(row * L::bytes + ((2 * i + chunk) ^ L::key(row)) * 16);
  }
  // Of the 16 x 16 block that starts at row `row` (a multiple of 8) and column 16 * block.
  __device__ __forceinline__ uint32_t at(int row, int block) const {
    return offset[block % n] + static_cast<uint32_t>(row * L::bytes + block / n * (L::lanes * 16));
  }
};

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// --- products -----------------------------------------------------------------------------------------------------
// c [16, 8] += a [16, 16] b [16, 8]. Lane l holds rows l/4 (c[0], c[1]) and l/4 + 8 (c[2], c[3]), columns 2 (l%4) + {0,
// 1}.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two neighbouring accumulators [16, 8] as operand A [16, 16].
template <class T>
__device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack2<T>(left[0], left[1]);
  a[1] = pack2<T>(left[2], left[3]);
  a[2] = pack2<T>(right[0], right[1]);
  a[3] = pack2<T>(right[2], right[3]);
}

// Operand A of a warp, 16 * MT rows: in registers, or read from shared memory at each use.
template <int D, int MT, bool kKeep>
struct RowOperand {
  uint32_t address;
  uint32_t kept[kKeep ? MT : 1][kKeep ? D / 16 : 1][4];
  __device__ __forceinline__ void load(const FragmentAddress<D>& rows) {
    if constexpr (kKeep) {
#pragma unroll
      for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int c = 0; c < D / 16; c++) ldmatrix(kept[m][c], address + rows.at(16 * m, c));
      }
    }
  }
  __device__ __forceinline__ void get(uint32_t (&a)[MT][4], const FragmentAddress<D>& rows, int c) const {
#pragma unroll
    for (int m = 0; m < MT; m++) {
      if constexpr (kKeep)
        a[m][0] = kept[m][c][0], a[m][1] = kept[m][c][1], a[m][2] = kept[m][c][2], a[m][3] = kept[m][c][3];
      else ldmatrix(a[m], address + rows.at(16 * m, c));
    }
  }
};

template <int MT, int N>
__device__ __forceinline__ void set_zero(float (&x)[MT][N][4]) {
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int c = 0; c < N; c++) x[m][c][0] = x[m][c][1] = x[m][c][2] = x[m][c][3] = 0.0f;
  }
}

// c [16 MT, N] += a [16 MT, D] b^T, b [N, D] rows in shared memory.
template <class T, int D, int MT, int N, bool kKeep>
__device__ __forceinline__ void multiply_rows(float (&acc)[MT][N / 8][4], const RowOperand<D, MT, kKeep>& a, uint32_t b,
                                              const FragmentAddress<D>& rows, const FragmentAddress<D>& cols) {
#pragma unroll
  for (int c = 0; c < D / 16; c++) {
    uint32_t x[MT][4];
    a.get(x, rows, c);
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
      uint32_t y[4];
      ldmatrix(y, b + cols.at(16 * j, c));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma<T>(acc[m][2 * j], x[m], y[0], y[1]);
        mma<T>(acc[m][2 * j + 1], x[m], y[2], y[3]);
      }
    }
  }
}

// acc [16 MT, D] += x [16 MT, N] b, b [N, D] rows in shared memory.
template <class T, int D, int MT, int N>
__device__ __forceinline__ void multiply_columns(float (&acc)[MT][D / 8][4], const float (&x)[MT][N / 8][4], uint32_t b,
                                                 const FragmentAddress<D>& rows) {
#pragma unroll
  for (int j = 0; j < N / 16; j++) {
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) as_operand<T>(a[m], x[m][2 * j], x[m][2 * j + 1]);
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
      uint32_t y[4];
      ldmatrix_transposed(y, b + rows.at(16 * j, c));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma<T>(acc[m][2 * c], a[m], y[0], y[1]);
        mma<T>(acc[m][2 * c + 1], a[m], y[2], y[3]);
      }
    }
  }
}

// One warp: accumulators of kRows = 16 * MT rows, times the factors of their rows (r = 2 * m + half), through its own
// rows of a tile in shared memory to dst rows [0, n_valid).
template <int D, int MT, class T>
__device__ __forceinline__ void store_rows(T* dst, int64_t ld, int n_valid, unsigned char* tile, int lane,
                                           const float (&acc)[MT][D / 8][4], const float (&factor)[2 * MT]) {
  using L = RowLayout<D>;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = m * 16 + half * 8 + lane / 4;
      const float f = factor[2 * m + half];
#pragma unroll
      for (int c = 0; c < D / 8; c++) {
        const int at = (c / L::lanes * L::lanes + (c % L::lanes ^ L::key(row))) * 16 + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(tile + row * L::bytes + at) =
            pack2<T>(acc[m][c][2 * half] * f, acc[m][c][2 * half + 1] * f);
      }
    }
  }
  __syncwarp();
  const int c = lane % L::lanes;
#pragma unroll
  for (int r = 0; r < 16 * MT; r += 32 / L::lanes) {
    const int row = r + lane / L::lanes;
    if (row < n_valid) {
#pragma unroll
      for (int j = 0; j < D / 8; j += L::lanes)
        *reinterpret_cast<uint4*>(dst + row * ld + (c + j) * 8) =
            *reinterpret_cast<const uint4*>(tile + row * L::bytes + j * 16 + (c ^ L::key(row)) * 16);
    }
  }
}

}  // namespace mm::cuda
