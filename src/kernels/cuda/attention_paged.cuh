// The kernel of attention_paged.cu, which says what it does.
#pragma once

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/cluster.cuh"
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

// 8 elements of a head, D / 8 lanes a head from `first` on: RMSNorm and rotation as in paged_kv.cu.
template <int D>
struct Rotation {
  float cos[8], sin[8];
  __device__ __forceinline__ void load(const NormRope& r, int row, int c) {
    const int64_t at = static_cast<int64_t>(r.positions[row]) * (D / 2) + c % (D / 16) * 8;
    mm::cuda::load(cos, r.cos + at), mm::cuda::load(sin, r.sin + at);
  }
  // All lanes call it, with their chunk c of a head. normed: by the norm's weights; turns: not a value.
  __device__ __forceinline__ uint4 operator()(uint4 raw, uint4 weights, bool normed, float eps, int first, int c,
                                              bool turns) const {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w}, by[4] = {weights.x, weights.y, weights.z, weights.w};
    float u[8], y[8], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 f = unpack2<bf16>(words[i]);
      u[2 * i] = f.x, u[2 * i + 1] = f.y;
      sum += f.x * f.x + f.y * f.y;
    }
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 8; i++) all += __shfl_sync(0xffffffffu, sum, first + i);
    if (normed) {
      const float r = __frsqrt_rn(all * (1.0f / D) + eps);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 w = unpack2<bf16>(by[i]);
        u[2 * i] = u[2 * i] * r * w.x, u[2 * i + 1] = u[2 * i + 1] * r * w.y;
      }
    }
    const bool low = c < D / 16;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float other = __shfl_sync(0xffffffffu, u[i], first + (low ? c + D / 16 : c - D / 16));
      y[i] = !turns ? u[i] : low ? u[i] * cos[i] - other * sin[i] : u[i] * cos[i] + other * sin[i];
    }
    return make_uint4(pack2<bf16>(y[0], y[1]), pack2<bf16>(y[2], y[3]), pack2<bf16>(y[4], y[5]),
                      pack2<bf16>(y[6], y[7]));
  }
};

// kRope: q, the row's last key and its value come from a.qkv, and the latter two go to the pool too; then all other
// keys are of earlier steps. part: where the blocks of one (row, heads) leave {m, l, out[D]}, [row, head, split, D +
// 2]; null: a cluster merges.
template <class T, class C, int D, int kHeads, int kWarps, int kStages, int kBlocks, bool kRope>
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

  // Row of key (lane % 16) of a tile; -1 behind the last key that lies in the pool.
  const auto look_up = [&](int i) {
    const int key = i * tile + lane % 16;
    if (key >= n_key - (kRope ? 1 : 0)) return -1;
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
  while (filled < R::stages && next < n_tile && (kRope || (next + 1) * tile <= n_key - a.n_new)) fill_stage(filled++);
  if (filled < R::stages && rows >= 0) {
    const char* at =
        reinterpret_cast<const char*>(static_cast<const C*>(lane < 16 ? kv.k : kv.v) + rows * ld + kv_head * D);
#pragma unroll
    for (int i = 0; i < D * R::size; i += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(at + i));
  }
  // kRope: a lane's 8 elements of a head of q, then of the key (of 0) and the value (of 1).
  constexpr int chunks = D / 8;
  const int of = lane / chunks, c8 = lane % chunks, first_lane = min(of * chunks, 32 - chunks);
  const bool has_last = kRope && (n_tile - 1) % tile_step == split * kWarps + warp, fresh_here = has_last && of < 2;
  uint4 fresh = {}, turned = {}, q_by = {}, k_by = {};
  Rotation<D> rotation;
  C* fresh_at = nullptr;
  if constexpr (kRope) {
    rotation.load(a.rope, row, c8);
    if (a.rope.q_weight != nullptr) q_by = __ldg(static_cast<const uint4*>(a.rope.q_weight) + c8);
    if (has_last) {
      if (a.rope.k_weight != nullptr) k_by = __ldg(static_cast<const uint4*>(a.rope.k_weight) + c8);
      const int last = n_key - 1;
      const int64_t at = table[last >> a.block_shift] + static_cast<int>(last & ((1u << a.block_shift) - 1));
      fresh_at = static_cast<C*>(of == 0 ? kv.k : kv.v) + at * ld + kv_head * D + c8 * 8;
    }
  }
  wait_for_previous();
  for (; filled < R::stages; filled++) fill_stage(filled);
  if constexpr (kRope) {
    const auto* raw =
        static_cast<const bf16*>(a.qkv) + static_cast<int64_t>(row) * (a.n_head + 2 * a.n_kv_head) * D + c8 * 8;
    if (of < kHeads) turned = *reinterpret_cast<const uint4*>(raw + (first_head + of) * D);
    if (fresh_here) fresh = *reinterpret_cast<const uint4*>(raw + (a.n_head + of * a.n_kv_head + kv_head) * D);
    turned = rotation(turned, q_by, a.rope.q_weight != nullptr, a.rope.eps, first_lane, c8, true);
    if (has_last) {
      fresh = rotation(fresh, k_by, of == 0 && a.rope.k_weight != nullptr, a.rope.eps, first_lane, c8, of == 0);
      if (fresh_here) *reinterpret_cast<uint4*>(fresh_at) = fresh;
    }
  }

  uint32_t q[steps][2];
#pragma unroll
  for (int c = 0; c < D / 32; c++) {
    uint32_t w[4] = {};
    if constexpr (kRope) {
      const int from = min(g, kHeads - 1) * chunks + 4 * c + m4;
      const uint32_t words[4] = {turned.x, turned.y, turned.z, turned.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const uint32_t x = __shfl_sync(0xffffffffu, words[e], from);
        if (g < kHeads) w[e] = x;
      }
    } else if (g < kHeads)
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
    unsigned char* at = ring + stage * R::stage;
    if constexpr (kRope) {
      if (i == n_tile - 1) {
        const int key = (n_key - 1) % tile;
        if (fresh_here)
          *reinterpret_cast<uint4*>(of == 0 ? at + key * R::k_pitch + c8 * 16
                                            : at + R::v_at + key * R::v_pitch +
                                                  (R::permuted ? c8 ^ (key >> 1 & 3) : c8) * 16) = fresh;
        __syncwarp();
      }
    }
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

}  // namespace
}  // namespace mm::cuda
