// Attention of few query rows against many keys that lie in pages: out = softmax(scale q k^T) v.
//
// paged_kernel (bf16 and f16 with keys and values of the same type or int8): tensor cores, with the keys of a tile as
// the rows of the product, so that all query heads of a key head (up to 8 columns) share what is loaded:
//
//   S^T [16 keys, 8 heads] = K [16, D] Q^T        mma.m16n8k16, D / 16 of them
//   O^T [D, 8 heads]      += V^T [D, 16] P^T      the same; P^T from S^T by movmatrix
//
// Which elements of D stand at which place of the reduction (K) or of the rows (V^T) is free, so each lane takes pieces
// of 4 to 16 bytes from the rows as they lie (lane = 4 g + m):
//   keys    g and g + 8:                    elements 32 c + 8 m .. + 8 of each 32
//   values  2m, 2m + 1, 2m + 8, 2m + 9:     elements 8 VE c + VE g .. + VE, VE = 8 (D 64, 128) or 4 (D 32, 96); two
//           keys' words are interleaved by one permutation of bytes
// int8 becomes bf16 exactly by (0x4300 | low 7 bits) - (0x4300 | sign bit); the scales of keys multiply S, those of
// values P.
//
// Tiles of 16 keys are dealt out to the warps of a cluster of blocks (sm_90 and up; elsewhere of blocks whose parts a
// second kernel merges). A warp copies its tiles into a ring of its own in shared memory, 16 bytes at a time past the
// first-level cache (which would be too small for what must be under way), so blocks have no barriers before the merge.
// The row numbers of a tile are looked up one tile ahead of its copies. Partial results merge in a fixed order as in
// attention_decode.cu.
//
// Bytes: 2 d_head sizeof(C) a key and key head (int8: + 8).
//
// Measured on an H100 in a graph, keys not in L2, bf16 / int8 keys (us): H8/4 d96 1 x 100 2.5 / 2.9, 1 x 1,000 4.2 /
// 4.2, 1 x 4,000 7.7 / 8.1, 16 x 1,000 12.7 / 10.8, 32 x 500 11.5 / 9.4, 96 x 200 13.6 / 10.2, 96 x 500 29.5 (2.5 TB/s)
// / 21.2; 96 x 1,000 H8/2 d64 21.6 / 16.0; 128 x 1,000 H8/2 d128 51 / 31. `invariant`: 1 x 1,000 7.2, 96 x 200 20.9.
// Slower: copies of 4 and 8 bytes by the thread that uses them (they pass through the first-level cache, which is small
// beside 200 KB of shared memory: 96 x 500 int8 29.6), two parts a row where there are more rows than SMs (17.6 for 96
// x 200), 16 warps a block there (17.7), without the prefetch and overlap 1 x 1,000 5.6.
//
// plain_kernel: everything else (fp32, mixed formats), a block a (row, head), fp32 arithmetic.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/infer_kernels.h"
#include "kernels/cuda/launch.cuh"

namespace mm::cuda {
namespace {

constexpr int max_split = 8, invariant_split = 2;

// C: elements of keys and values.
template <class C, int D, int kWarps, int kStages>
struct Ring {
  static constexpr int size = static_cast<int>(sizeof(C)), stages = kStages;
  static constexpr int row = D * size, row_chunks = row / 16;  // a key's or value's bytes; copied 16 at a time
  // Distances of rows at which the lanes' reads meet no bank twice: an odd multiple of 64 bytes (int8: 32) for keys, 16
  // more than the row for values.
  static constexpr int k_unit = 32 * size, k_pitch = (row / k_unit | 1) * k_unit;
  // 16-bit values of d 96 have their chunks permuted instead, at two reads a bank: the padding would cost a block an
  // SM.
  static constexpr bool permuted = D == 96 && size == 2;
  static constexpr int v_pitch = permuted ? row : row + 16;
  static constexpr int k_bytes = 8 * size;  // a lane's piece of a row: D / 32 of them
  static constexpr int v_elements = D % 64 == 0 ? 8 : 4, v_chunks = D / 8 / v_elements, v_bytes = v_elements * size;
  static constexpr int v_at = 16 * k_pitch, scale_at = v_at + 16 * v_pitch;
  static constexpr int stage = scale_at + (size == 1 ? 128 : 0), warp = stages * stage, bytes = kWarps * warp;
};

__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// *p = x in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void cluster_store(float* p, int rank, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
#else
  *p = x;
#endif
}
template <int words>
__device__ __forceinline__ void load_words(uint32_t (&w)[words], const unsigned char* p) {
  if constexpr (words == 4) {
    const uint4 u = *reinterpret_cast<const uint4*>(p);
    w[0] = u.x, w[1] = u.y, w[2] = u.z, w[3] = u.w;
  } else if constexpr (words == 2) {
    const uint2 u = *reinterpret_cast<const uint2*>(p);
    w[0] = u.x, w[1] = u.y;
  } else {
    w[0] = *reinterpret_cast<const uint32_t*>(p);
  }
}
template <class T>
__device__ __forceinline__ void product(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// Two int8 (the low bytes of w's halves; what lies above them does not matter) -> two T.
template <class T>
__device__ __forceinline__ uint32_t widen(uint32_t w) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t a = (w & 0x007f007fu) | 0x43004300u, b = (w & 0x00800080u) | 0x43004300u;
    const __nv_bfloat162 d =
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&d);
  } else {  // 1024 + (x + 128) is exact
    const uint32_t a = ((w ^ 0x00800080u) & 0x00ff00ffu) | 0x64006400u, b = 0x64806480u;
    const __half2 d = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&d);
  }
}
__device__ __forceinline__ float reference(float m) { return m == minus_infinity() ? 0.0f : m; }

// part: where the blocks of one (row, heads) leave {m, l, out[D]}, [row, head, split, D + 2]; null: a cluster merges.
template <class T, class C, int D, int kHeads, int kWarps, int kStages, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    paged_kernel(const __grid_constant__ PagedAttention a, const __grid_constant__ KvLayer kv, float scale2,
                 int n_split, float* part) {
  using R = Ring<C, D, kWarps, kStages>;
  constexpr bool kInt8 = sizeof(C) == 1;
  using P = std::conditional_t<kInt8, bf16, T>;  // of P and V: with scales in P, f16 could underflow
  constexpr int n_thread = kWarps * 32, tile = 16, steps = D / 16;
  extern __shared__ __align__(128) unsigned char memory[];
  // What the blocks of the cluster sent: {maximum, sum} of all heads, and their values of this block's outputs.
  __shared__ float sent_ml[2][max_split][kHeads], sent_out[kHeads * D];
  const int split = static_cast<int>(blockIdx.x), first_head = static_cast<int>(blockIdx.y) * kHeads;
  const int row = static_cast<int>(blockIdx.z), kv_head = first_head / (a.n_head / a.n_kv_head);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, m4 = lane % 4;
  cluster_arrive();
  let_next_begin();
  const int n_key = a.n_key[row], seq = a.seq[row];  // the host's: no kernel of the step writes them or the table
  T* const out_row = static_cast<T*>(a.out) + row * a.ldo + first_head * D;
  if (n_key <= 0) {
    wait_for_previous();
    if (split == 0) {
      for (int i = tid; i < kHeads * D; i += n_thread) out_row[i] = from_float<T>(0.0f);
    }
    cluster_wait();
    return;
  }
  const int32_t* table = a.table + seq * a.table_ld;
  const int64_t ld = static_cast<int64_t>(a.n_kv_head) * D;
  const C *k = static_cast<const C*>(kv.k) + kv_head * D, *v = static_cast<const C*>(kv.v) + kv_head * D;
  const int n_tile = (n_key + tile - 1) / tile, tile_step = n_split * kWarps;
  unsigned char* const ring = memory + warp * R::warp;
  const uint32_t ring_at = shared_address(ring);

  // Row of key (lane % 16) of a tile; -1 behind the last key.
  const auto look_up = [&](int i) {
    const int key = i * tile + lane % 16;
    if (key >= n_key) return -1;
    return table[key >> a.block_shift] + static_cast<int>(key & ((1u << a.block_shift) - 1));
  };
  const auto copy_tile = [&](int rows, int stage) {
    const uint32_t at = ring_at + stage * R::stage;
#pragma unroll
    for (int i = 0; i < R::row_chunks / 2; i++) {
      const int chunk = i * 32 + lane, key = chunk / R::row_chunks, c = chunk % R::row_chunks;
      const int r = __shfl_sync(0xffffffffu, rows, key);
      const int64_t from = max(r, 0) * ld + c * (16 / R::size);
      cp_async16(at + key * R::k_pitch + c * 16, k + from, r >= 0);
      cp_async16(at + R::v_at + key * R::v_pitch + (R::permuted ? c ^ (key >> 1 & 3) : c) * 16, v + from, r >= 0);
    }
    if constexpr (kInt8) {  // [k: keys 0-7, 8-15, v: the same]
      const int r = __shfl_sync(0xffffffffu, rows, lane % 16);
      const float* from = (lane < 16 ? kv.k_scale : kv.v_scale) + static_cast<int64_t>(max(r, 0)) * a.n_kv_head;
      cp_async4(at + R::scale_at + lane * 4, from + kv_head, r >= 0);
    }
  };
  int next = split * kWarps + warp, rows = next < n_tile ? look_up(next) : -1;
  const auto fill_stage = [&](int stage) {
    if (next < n_tile) {
      copy_tile(rows, stage);
      next += tile_step;
      if (next < n_tile) rows = look_up(next);
    }
    cp_async_commit();
  };
  // Tiles of keys that earlier steps wrote are copied before the kernel waits; of others what lies there can come
  // closer.
  int filled = 0;
  while (filled < R::stages && next < n_tile && (next + 1) * tile <= n_key - a.n_new) fill_stage(filled++);
  if (filled < R::stages && rows >= 0) {
    const char* at =
        reinterpret_cast<const char*>(static_cast<const C*>(lane < 16 ? kv.k : kv.v) + rows * ld + kv_head * D);
#pragma unroll
    for (int i = 0; i < D * R::size; i += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(at + i));
  }
  wait_for_previous();
  for (; filled < R::stages; filled++) fill_stage(filled);

  uint32_t q[steps][2];
#pragma unroll
  for (int c = 0; c < D / 32; c++) {
    uint32_t w[4] = {};
    if (g < kHeads)
      load_words(w, reinterpret_cast<const unsigned char*>(static_cast<const T*>(a.q) + row * a.ldq +
                                                           (first_head + g) * D + c * 32 + m4 * 8));
    q[2 * c][0] = w[0], q[2 * c][1] = w[1], q[2 * c + 1][0] = w[2], q[2 * c + 1][1] = w[3];
  }
  float out[steps][4] = {}, top[2] = {minus_infinity(), minus_infinity()}, sum[2] = {};
  for (int i = split * kWarps + warp, stage = 0; i < n_tile; i += tile_step) {
    __syncwarp();  // all lanes have read what the copies overwrite
    if (i >= tile_step) fill_stage(stage == 0 ? R::stages - 1 : stage - 1);
    cp_async_wait<R::stages - 1>();
    __syncwarp();
    const unsigned char* at = ring + stage * R::stage;
    float s[4] = {}, odd[4] = {};  // two chains of products
#pragma unroll
    for (int c = 0; c < D / 32; c++) {
      constexpr int words = R::k_bytes / 4;
      uint32_t x[words], y[words];
      load_words(x, at + g * R::k_pitch + (4 * c + m4) * R::k_bytes);
      load_words(y, at + (g + 8) * R::k_pitch + (4 * c + m4) * R::k_bytes);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int t = 2 * c + j;
        if constexpr (kInt8)
          product<T>(j == 0 ? s : odd, widen<T>(__byte_perm(x[j], 0, 0x0100)), widen<T>(__byte_perm(y[j], 0, 0x0100)),
                     widen<T>(__byte_perm(x[j], 0, 0x0302)), widen<T>(__byte_perm(y[j], 0, 0x0302)), q[t][0], q[t][1]);
        else product<T>(j == 0 ? s : odd, x[2 * j], y[2 * j], x[2 * j + 1], y[2 * j + 1], q[t][0], q[t][1]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) s[e] += odd[e];
    float vs[2] = {1.0f, 1.0f};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float factor = scale2;
      if constexpr (kInt8) {
        const float* scales = reinterpret_cast<const float*>(at + R::scale_at);
        factor *= scales[8 * j + g];
        vs[j] = scales[16 + 8 * j + g];
      }
      const bool valid = i * tile + g + 8 * j < n_key;
      s[2 * j] = valid ? s[2 * j] * factor : minus_infinity();
      s[2 * j + 1] = valid ? s[2 * j + 1] * factor : minus_infinity();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = fmaxf(s[h], s[2 + h]);
#pragma unroll
      for (int b = 4; b < 32; b *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, b));
      if (__any_sync(0xffffffffu, x > top[h])) {
        const float f = x > top[h] ? exp2_fast(top[h] - x) : 1.0f;
        top[h] = fmaxf(top[h], x);
        sum[h] *= f;
#pragma unroll
        for (int t = 0; t < steps; t++) out[t][h] *= f, out[t][2 + h] *= f;
      }
      s[h] = exp2_fast(s[h] - reference(top[h]));
      s[2 + h] = exp2_fast(s[2 + h] - reference(top[h]));
      sum[h] += s[h] + s[2 + h];
    }
    const uint32_t b0 = transpose_8x8(pack2<P>(s[0] * vs[0], s[1] * vs[0])),
                   b1 = transpose_8x8(pack2<P>(s[2] * vs[1], s[3] * vs[1]));
#pragma unroll
    for (int c = 0; c < R::v_chunks; c++) {
      constexpr int words = R::v_bytes / 4, pairs = R::v_elements / 2;
      uint32_t x[4][words];
#pragma unroll
      for (int j = 0; j < 4; j++) {  // key / 2 % 4 is m4
        const int piece = R::permuted ? ((4 * c + g / 2) ^ m4) * 16 + g % 2 * 8 : (8 * c + g) * R::v_bytes;
        load_words(x[j], at + R::v_at + (2 * m4 + (j & 1) + (j & 2) * 4) * R::v_pitch + piece);
      }
#pragma unroll
      for (int e = 0; e < pairs; e++) {
        if constexpr (kInt8) {
          const int w = e / 2;
          const unsigned lo = e % 2 == 0 ? 0x0400 : 0x0602, hi = e % 2 == 0 ? 0x0501 : 0x0703;
          product<P>(out[c * pairs + e], widen<P>(__byte_perm(x[0][w], x[1][w], lo)),
                     widen<P>(__byte_perm(x[0][w], x[1][w], hi)), widen<P>(__byte_perm(x[2][w], x[3][w], lo)),
                     widen<P>(__byte_perm(x[2][w], x[3][w], hi)), b0, b1);
        } else {
          product<P>(out[c * pairs + e], __byte_perm(x[0][e], x[1][e], 0x5410), __byte_perm(x[0][e], x[1][e], 0x7632),
                     __byte_perm(x[2][e], x[3][e], 0x5410), __byte_perm(x[2][e], x[3][e], 0x7632), b0, b1);
        }
      }
    }
    stage = stage == R::stages - 1 ? 0 : stage + 1;
  }

#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int b = 4; b < 32; b *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], b);
  }
  // The ring becomes warp_ml [2][kWarps][kHeads] and warp_out [kWarps][kHeads][D].
  static_assert(R::bytes >= 4 * (2 * kWarps * kHeads + kWarps * kHeads * D));
  float *const warp_ml = reinterpret_cast<float*>(memory), *const warp_out = warp_ml + 2 * kWarps * kHeads;
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int head = 2 * m4 + h;
    if (head >= kHeads) continue;
    if (g == 0) {
      warp_ml[warp * kHeads + head] = top[h];
      warp_ml[(kWarps + warp) * kHeads + head] = sum[h];
    }
#pragma unroll
    for (int e = 0; e < 2 * steps; e++) {
      const int d = (e / R::v_elements * 8 + g) * R::v_elements + e % R::v_elements;
      warp_out[(warp * kHeads + head) * D + d] = out[e / 2][e % 2 * 2 + h];
    }
  }
  __syncthreads();
  const int slice = kHeads * D / n_split;  // outputs that one block of the cluster finishes
  for (int i = tid; i < kHeads * D; i += n_thread) {
    const int h = i / D, c = i % D;
    float best = minus_infinity(), l = 0.0f, x = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) best = fmaxf(best, warp_ml[w * kHeads + h]);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float f = exp2_fast(warp_ml[w * kHeads + h] - reference(best));
      l += f * warp_ml[(kWarps + w) * kHeads + h];
      x += f * warp_out[(w * kHeads + h) * D + c];
    }
    if (part != nullptr) {
      float* to = part + ((static_cast<int64_t>(row) * a.n_head + first_head + h) * n_split + split) * (D + 2);
      to[2 + c] = x;
      if (c == 0) to[0] = best, to[1] = l;
    } else if (n_split == 1) {
      out_row[i] = from_float<T>(x / l);
    } else {
      if (i < n_thread) cluster_wait();  // all blocks have begun; every thread comes here or below once
      cluster_store(&sent_out[split * slice + i % slice], i / slice, x);
      if (c < n_split) {
        cluster_store(&sent_ml[0][split][h], c, best);
        cluster_store(&sent_ml[1][split][h], c, l);
      }
    }
  }
  if (part != nullptr || n_split == 1 || tid >= kHeads * D) cluster_wait();
  if (part != nullptr || n_split == 1) return;
  cluster_arrive();
  cluster_wait();
  for (int j = tid; j < slice; j += n_thread) {
    const int i = split * slice + j, h = i / D;
    float best = minus_infinity(), l = 0.0f, x = 0.0f;
    for (int r = 0; r < n_split; r++) best = fmaxf(best, sent_ml[0][r][h]);
    for (int r = 0; r < n_split; r++) {
      const float f = exp2_fast(sent_ml[0][r][h] - reference(best));
      l += f * sent_ml[1][r][h];
      x += f * sent_out[r * slice + j];
    }
    out_row[i] = from_float<T>(x / l);
  }
}

// Where there are no clusters.
template <class T, int D>
__global__ void __launch_bounds__(D)
    merge_kernel(const __grid_constant__ PagedAttention a, int n_split, const float* part) {
  const int head = static_cast<int>(blockIdx.x), c = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.y;
  if (a.n_key[row] <= 0) return;
  const float* from = part + (row * a.n_head + head) * n_split * (D + 2);
  float best = minus_infinity(), l = 0.0f, x = 0.0f;
  for (int r = 0; r < n_split; r++) best = fmaxf(best, from[r * (D + 2)]);
  for (int r = 0; r < n_split; r++) {
    const float f = exp2_fast(from[r * (D + 2)] - reference(best));
    l += f * from[r * (D + 2) + 1];
    x += f * from[r * (D + 2) + 2 + c];
  }
  static_cast<T*>(a.out)[row * a.ldo + head * D + c] = from_float<T>(x / l);
}

// A block a (head, row), a warp a key at a time, D / 32 elements a lane.
constexpr int plain_warps = 8;

template <class T, class C, int D>
__global__ void __launch_bounds__(plain_warps * 32)
    plain_kernel(const __grid_constant__ PagedAttention a, const __grid_constant__ KvLayer kv, float scale2) {
  constexpr int E = D / 32, unroll = 4;
  __shared__ float warp_ml[2][plain_warps], warp_out[plain_warps][D];
  const int head = static_cast<int>(blockIdx.x), kv_head = head / (a.n_head / a.n_kv_head);
  const int64_t row = blockIdx.y;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int n_key = a.n_key[row];
  const int32_t* table = a.table + a.seq[row] * a.table_ld;
  float q[E], out[E] = {}, top = minus_infinity(), sum = 0.0f;
#pragma unroll
  for (int e = 0; e < E; e++)
    q[e] = to_float(static_cast<const T*>(a.q)[row * a.ldq + head * D + e * 32 + lane]) * scale2;
  for (int first = warp * unroll; first < n_key; first += plain_warps * unroll) {
    float s[unroll], v[unroll][E];
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      const int key = min(first + u, n_key - 1);
      const int64_t at =
          static_cast<int64_t>(table[key >> a.block_shift] + static_cast<int>(key & ((1u << a.block_shift) - 1))) *
              a.n_kv_head +
          kv_head;
      s[u] = 0.0f;
#pragma unroll
      for (int e = 0; e < E; e++) {
        if constexpr (sizeof(C) == 1) {
          s[u] += q[e] * static_cast<float>(static_cast<const C*>(kv.k)[at * D + e * 32 + lane]);
          v[u][e] = static_cast<float>(static_cast<const C*>(kv.v)[at * D + e * 32 + lane]) * kv.v_scale[at];
        } else {
          s[u] += q[e] * to_float(static_cast<const C*>(kv.k)[at * D + e * 32 + lane]);
          v[u][e] = to_float(static_cast<const C*>(kv.v)[at * D + e * 32 + lane]);
        }
      }
      if constexpr (sizeof(C) == 1) s[u] *= kv.k_scale[at];
    }
    float best = top;
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      s[u] = warp_sum(s[u]);
      if (first + u >= n_key) s[u] = minus_infinity();
      best = fmaxf(best, s[u]);
    }
    const float f = exp2f(top - reference(best));
    top = best, sum *= f;
#pragma unroll
    for (int e = 0; e < E; e++) out[e] *= f;
#pragma unroll
    for (int u = 0; u < unroll; u++) {
      const float p = first + u < n_key ? exp2f(s[u] - reference(top)) : 0.0f;
      sum += p;
#pragma unroll
      for (int e = 0; e < E; e++) out[e] += first + u < n_key ? p * v[u][e] : 0.0f;
    }
  }
  if (lane == 0) warp_ml[0][warp] = top, warp_ml[1][warp] = sum;
#pragma unroll
  for (int e = 0; e < E; e++) warp_out[warp][e * 32 + lane] = out[e];
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < D; c += plain_warps * 32) {
    float best = minus_infinity(), l = 0.0f, x = 0.0f;
    for (int w = 0; w < plain_warps; w++) best = fmaxf(best, warp_ml[0][w]);
    for (int w = 0; w < plain_warps; w++) {
      const float f = exp2f(warp_ml[0][w] - reference(best));
      l += f * warp_ml[1][w], x += f * warp_out[w][c];
    }
    static_cast<T*>(a.out)[row * a.ldo + head * D + c] = from_float<T>(n_key > 0 ? x / l : 0.0f);
  }
}

template <class T, class C, int D, int kHeads, int kWarps, int kStages, int kBlocks>
void launch(const Context& ctx, const KvLayer& kv, const PagedAttention& a, int n_split) {
  constexpr int shared = Ring<C, D, kWarps, kStages>::bytes;
  const auto kernel = paged_kernel<T, C, D, kHeads, kWarps, kStages, kBlocks>;
  static const cudaError_t once = [&] {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    return e != cudaSuccess ? e : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }();
  MM_CUDA_CHECK(once);
  const dim3 grid(static_cast<unsigned>(n_split), static_cast<unsigned>(a.n_head / kHeads),
                  static_cast<unsigned>(a.n_row));
  const float scale2 = a.scale * log2_e;
  if (ctx.arch >= 90 || n_split == 1)
    return launch_overlapped(ctx, kernel, grid, kWarps * 32, shared, static_cast<unsigned>(n_split), a, kv, scale2,
                             n_split, nullptr);
  auto* part =
      Scratch(ctx).take<float>(static_cast<size_t>(a.n_row) * static_cast<size_t>(a.n_head * n_split * (D + 2)));
  kernel<<<grid, kWarps * 32, shared, ctx.stream>>>(a, kv, scale2, n_split, part);
  MM_CUDA_LAUNCHED();
  merge_kernel<T, D>
      <<<dim3(static_cast<unsigned>(a.n_head), static_cast<unsigned>(a.n_row)), D, 0, ctx.stream>>>(a, n_split, part);
  MM_CUDA_LAUNCHED();
}

template <class T, class C, int D>
void launch_for_group(const Context& ctx, const KvLayer& kv, const PagedAttention& a) {
  const int group = a.n_head / a.n_kv_head;
  const auto with_heads = [&](auto heads) {
    constexpr int kHeads = heads.value;
    const int64_t pairs = a.n_row * (a.n_head / kHeads);
    const bool large = ctx.arch == 90 || ctx.arch == 100;  // 227 KB of shared memory a block; else 99 or more
    if (a.invariant) {
      if constexpr (sizeof(C) == 2) {
        if (D == 128 || !large) return launch<T, C, D, kHeads, 4, 2, 2>(ctx, kv, a, invariant_split);
      }
      if constexpr (sizeof(C) == 1 || D < 128) launch<T, C, D, kHeads, 8, 2, 2>(ctx, kv, a, invariant_split);
      return;
    }
    // As many parts as leave each block an SM of its own and its warps a tile.
    int n_split = 1;
    while (n_split < max_split && 2 * n_split * pairs <= ctx.n_sm && n_split * 8 * 16 < a.max_key) n_split *= 2;
    if constexpr (sizeof(C) == 1) {
      if (large && n_split * pairs <= ctx.n_sm && a.max_key > n_split * 128)
        return launch<T, C, D, kHeads, 16, 2, 1>(ctx, kv, a, n_split);
      return launch < T, C, D, kHeads, 8, 2, D == 128 ? 2 : 3 > (ctx, kv, a, n_split);  // as the registers allow
    } else if constexpr (D == 128) {
      if (large) return launch<T, C, D, kHeads, 4, 3, 2>(ctx, kv, a, n_split);
      return launch<T, C, D, kHeads, 4, 2, 2>(ctx, kv, a, n_split);
    } else {
      // Few keys: all of a row's are under way at once, and a block of the next kernel finds room beside three of
      // these.
      if (pairs > ctx.n_sm && a.max_key <= 256) return launch<T, C, D, kHeads, 4, 2, 3>(ctx, kv, a, n_split);
      if (pairs > ctx.n_sm || !large) return launch<T, C, D, kHeads, 4, 3, 3>(ctx, kv, a, n_split);
      if (large && a.max_key > n_split * 128) return launch<T, C, D, kHeads, 16, 2, 1>(ctx, kv, a, n_split);
      return launch<T, C, D, kHeads, 8, 2, 2>(ctx, kv, a, n_split);
    }
  };
  if (group % 8 == 0) return with_heads(std::integral_constant<int, 8>{});
  if (group % 4 == 0) return with_heads(std::integral_constant<int, 4>{});
  if (group % 2 == 0) return with_heads(std::integral_constant<int, 2>{});
  with_heads(std::integral_constant<int, 1>{});
}

template <class T, class C, int D>
void attention(const Context& ctx, const KvLayer& kv, const PagedAttention& a) {
  if constexpr (sizeof(T) == 2 && (std::is_same_v<T, C> || sizeof(C) == 1)) {
    if (aligned({a.q, kv.k, kv.v}) && a.ldq % 8 == 0) return launch_for_group<T, C, D>(ctx, kv, a);
  }
  const dim3 grid(static_cast<unsigned>(a.n_head), static_cast<unsigned>(a.n_row));
  plain_kernel<T, C, D><<<grid, plain_warps * 32, 0, ctx.stream>>>(a, kv, a.scale * log2_e);
  MM_CUDA_LAUNCHED();
}

template <class T, class C>
void attention_of(const Context& ctx, const KvLayer& kv, const PagedAttention& a) {
  switch (a.d_head) {
    case 32: return attention<T, C, 32>(ctx, kv, a);
    case 64: return attention<T, C, 64>(ctx, kv, a);
    case 96: return attention<T, C, 96>(ctx, kv, a);
    case 128: return attention<T, C, 128>(ctx, kv, a);
    default: fail("attention", "d_head is not 32, 64, 96 or 128", __FILE__, __LINE__);
  }
}

}  // namespace

void attention_paged(const Context& ctx, DType t, const KvLayer& kv, const PagedAttention& a) {
  if (a.n_row == 0) return;
  dispatch(t, [&]<class T>(T) {
    switch (kv.format) {
      case KvFormat::f32: return attention_of<T, float>(ctx, kv, a);
      case KvFormat::bf16: return attention_of<T, bf16>(ctx, kv, a);
      case KvFormat::f16: return attention_of<T, f16>(ctx, kv, a);
      case KvFormat::i8: return attention_of<T, int8_t>(ctx, kv, a);
    }
  });
}

}  // namespace mm::cuda
