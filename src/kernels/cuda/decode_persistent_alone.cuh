// The attention of a step with one row, by blocks that do nothing else (attention_blocks of them; the others run the
// products). A block takes a key head and a share of the row's keys. All its shared memory is for keys and values:
// rounds of 128 keys pass through n_buffer buffers, filled with the next layer's keys while the other blocks work.
//
//   prepare  one warp a head: norm, rotation; queries as bf16, the own key and value as the cache holds them
//   round    a warp's own 16 keys, scores and values, all in registers: no block-wide meeting
//   merge    the warps' sums through shared memory; published unnormalized with maximum and sum, for the readers to
//            merge (RowProduct::take_parts)
#pragma once

#include "kernels/cuda/decode_persistent_attention.cuh"

namespace mm::cuda::persistent {

// Byte offsets in shared memory.
template <class V, int D, int G>
struct AloneLayout {
  using R = Round<V, D, alone_keys>;
  static constexpr int q_pitch = 2 * D + 16, sum_pitch = D + 4;
  static constexpr int rope = 0, q = rope + 4 * D, own = q + 8 * q_pitch;
  static constexpr int own_scale = own + 2 * D * R::size, ml = (own_scale + 8 + 15) / 16 * 16;
  static constexpr int sums = ml + n_warp * G * 8, ring = (sums + n_warp * G * sum_pitch * 4 + 127) / 128 * 128;
  static constexpr int fit = (alone_bytes - ring) / R::bytes, n_buffer = fit < 6 ? fit : 6;
  static_assert(n_buffer >= 2 && R::bytes % 16 == 0);
};

// 8 x 8 16-bit values, row g columns 2 t, 2 t + 1 in lane 4 g + t, transposed.
__device__ __forceinline__ uint32_t transpose8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// A warp's running attention over its keys: for heads 2 t, 2 t + 1 the maximum, this lane's part of the sum, and of 16
// columns c the sums of values: acc[c][e] of column `column(c, 0)`, acc[c][2 + e] of `column(c, 1)`, head 2 t + e.
template <class V, int D, int G>
struct WarpAttention {
  using L = AloneLayout<V, D, G>;
  using R = typename L::R;
  float acc[D / 16][4], top[2], sum[2];
  uint2 q[D / 16];

  static __device__ __forceinline__ int column(int c, int which) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4;
    return R::size == 2 ? 16 * c + g + 8 * which : 16 * c + 2 * g + which;
  }
  __device__ __forceinline__ void begin(const unsigned char* smem) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const unsigned char* from = smem + L::q + lane / 4 * L::q_pitch + lane % 4 * 8;
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
      q[c] = *reinterpret_cast<const uint2*>(from + 32 * c);
      acc[c][0] = acc[c][1] = acc[c][2] = acc[c][3] = 0.0f;
    }
    top[0] = top[1] = minus_infinity(), sum[0] = sum[1] = 0.0f;
  }
  // The 16 keys from key `first` of the buffer on, of which n are valid.
  __device__ __forceinline__ void add(const unsigned char* buffer, int first, int n) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    float c[2][4] = {};
    const unsigned char* k = buffer + (first + g) * R::pitch + t * 4 * R::size;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      if constexpr (R::size == 2) {
        const uint2 lo = *reinterpret_cast<const uint2*>(k + 32 * i),
                    hi = *reinterpret_cast<const uint2*>(k + 8 * R::pitch + 32 * i);
        mma<bf16>(c[i % 2], {lo.x, hi.x, lo.y, hi.y}, q[i].x, q[i].y);
      } else {
        const uint32_t lo = *reinterpret_cast<const uint32_t*>(k + 16 * i),
                       hi = *reinterpret_cast<const uint32_t*>(k + 8 * R::pitch + 16 * i);
        mma<bf16>(c[i % 2],
                  {widen_pair<0x4140>(lo), widen_pair<0x4140>(hi), widen_pair<0x4342>(lo), widen_pair<0x4342>(hi)},
                  q[i].x, q[i].y);
      }
    }
    float k_factor[2] = {1.0f, 1.0f}, v_factor[2] = {1.0f, 1.0f};
    if constexpr (R::size == 1) {
      const float* scales = reinterpret_cast<const float*>(buffer + R::scales) + first + g;
      k_factor[0] = scales[0], k_factor[1] = scales[8];
      v_factor[0] = scales[alone_keys], v_factor[1] = scales[alone_keys + 8];
    }
    const bool valid[2] = {g < n, g + 8 < n};
    float w[2][2];  // [key g, g + 8][head]
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float s[2], m = top[e];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        s[h] = valid[h] ? (c[0][2 * h + e] + c[1][2 * h + e]) * k_factor[h] : minus_infinity();
        m = fmaxf(m, s[h]);
      }
#pragma unroll
      for (int i = 4; i < 32; i *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, i));
      const float r = reference(m), old = exp2_fast(top[e] - r);
      top[e] = m, sum[e] *= old;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float x = exp2_fast(s[h] - r);
        sum[e] += x;
        w[h][e] = valid[h] ? x * v_factor[h] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < D / 16; i++) acc[i][e] *= old, acc[i][2 + e] *= old;
    }
    const uint32_t b0 = transpose8(pack2<bf16>(w[0][0], w[0][1])), b1 = transpose8(pack2<bf16>(w[1][0], w[1][1]));
    if constexpr (R::size == 2) {
      // Four 8 x 8 matrices: keys 0-7 and columns 0-7, columns 8-15, then keys 8-15.
      const uint32_t v = shared_address(buffer + R::values + (first + lane / 16 * 8 + lane % 8) * R::pitch) +
                         static_cast<uint32_t>(lane / 8 % 2 * 16);
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        uint32_t a[4];
        ldmatrix_transposed(a, v + static_cast<uint32_t>(32 * i));
        mma<bf16>(acc[i], a, b0, b1);
      }
    } else {
      const unsigned char* v = buffer + R::values + (first + 2 * t) * R::pitch + 2 * g;
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        const auto pair = [&](int key) -> uint32_t {
          return *reinterpret_cast<const uint16_t*>(v + key * R::pitch + 16 * i);
        };
        const uint32_t lo = pair(0) | pair(1) << 16, hi = pair(8) | pair(9) << 16;
        mma<bf16>(acc[i],
                  {widen_pair<0x4240>(lo), widen_pair<0x4341>(lo), widen_pair<0x4240>(hi), widen_pair<0x4341>(hi)}, b0,
                  b1);
      }
    }
  }
  // To shared memory, for the block to merge.
  __device__ __forceinline__ void hand_over(unsigned char* smem) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4,
              t = lane % 4;
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
      for (int i = 4; i < 32; i *= 2) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], i);
      const int head = 2 * t + e;
      if (head >= G) continue;
      float* to = reinterpret_cast<float*>(smem + L::sums) + (warp * G + head) * L::sum_pitch;
#pragma unroll
      for (int i = 0; i < D / 16; i++) to[column(i, 0)] = acc[i][e], to[column(i, 1)] = acc[i][2 + e];
      if (g == 0) reinterpret_cast<float2*>(smem + L::ml)[warp * G + head] = make_float2(top[e], sum[e]);
    }
  }
};

// The whole step of an attention block whose share is not empty. between(): called once, while the others work.
template <class V, int D, int G, class F>
__device__ __forceinline__ void attend_alone(const Params& p, unsigned char* smem, const Share& share, uint32_t* set,
                                             F&& between) {
  using L = AloneLayout<V, D, G>;
  using R = typename L::R;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int length = share.end - share.begin, n_round = (length + alone_keys - 1) / alone_keys;
  const int own_at = share.n_key - 1 - share.begin;  // of this row's new token
  const bool owner = own_at >= 0 && own_at < length;

  // What does not change from layer to layer: rotation, zeros where there are no heads. Values behind the last key
  // count zero times, so they must be finite.
  float* turn = reinterpret_cast<float*>(smem + L::rope);
  const int64_t angle = static_cast<int64_t>(p.rows[share.row].position) * (D / 2);
  if (tid < D / 2) turn[tid] = p.cos[angle + tid], turn[D / 2 + tid] = p.sin[angle + tid];
  for (int i = tid; i < 2 * L::q_pitch; i += n_thread) reinterpret_cast<uint32_t*>(smem + L::q)[i] = 0;
  if constexpr (R::size == 2) {
    for (int b = 0; b < min(L::n_buffer, n_round * p.n_layer); b++) {
      uint4* values = reinterpret_cast<uint4*>(smem + L::ring + b * R::bytes + R::values);
      for (int i = tid; i < (R::scales - R::values) / 16; i += n_thread) values[i] = make_uint4(0, 0, 0, 0);
    }
  }
  __syncthreads();  // zeros before copies and queries

  int copied_layer = 0, copied_round = 0, buffer = 0;
  const uint32_t ring = shared_address(smem + L::ring);
  const auto copy_next = [&](int to) {
    if (n_round > 0 && copied_layer < p.n_layer && !probing(p, 4)) {
      const int first = share.begin + copied_round * alone_keys;
      copy_keys<V, D, alone_keys>(p, ring + static_cast<uint32_t>(to * R::bytes), share, copied_layer, copied_round,
                                  [&](int key) -> int64_t { return key_row(p, share, first + key); });
      if (++copied_round == n_round) copied_round = 0, copied_layer++;
    }
    cp_async_commit();  // an empty group keeps the count
  };
#pragma unroll 1
  for (int b = 0; b < L::n_buffer; b++) copy_next(b);

  WarpAttention<V, D, G> a;
  uint32_t* words = set;
  const float* norms = p.norms + p.norm_q;
#pragma unroll 1
  for (int layer = 0; layer < p.n_layer; layer++) {
    MM_TRACE(layer * 8);
    if (warp < G + (owner ? 2 : 0)) {
      const int head = warp < G ? share.kv * G + warp : p.n_head + share.kv + (warp - G) * p.n_kv_head;
      const float* weight = p.norm_q < 0 || warp == G + 1 ? nullptr : norms + (warp < G ? 0 : D);
      HeadValues<D> x;
      x.read(p, words + p.ex.qkv + head * D, weight, warp <= G ? turn : nullptr);
      if (warp < G) {
        bf16* q = reinterpret_cast<bf16*>(smem + L::q + warp * L::q_pitch);
        x.each([&](int e, float v) { q[e] = from_float<bf16>(v * p.scale2); });
      } else {
        const int which = warp - G;
        const int64_t at = layer * (p.kv_layer_stride / D) + static_cast<int64_t>(share.slot) * p.n_kv_head + share.kv;
        V* cache = share.slot >= 0 ? static_cast<V*>(which == 0 ? p.k : p.v) + at * D : nullptr;
        x.template keep<V>(reinterpret_cast<V*>(smem + L::own) + which * D,
                           reinterpret_cast<float*>(smem + L::own_scale) + which, cache,
                           R::size == 1 ? (which == 0 ? p.k_scale : p.v_scale) + at : nullptr);
      }
    }
    MM_TRACE(layer * 8 + 1);
    cp_async_wait<L::n_buffer - 1>();
    __syncthreads();  // queries, the own key and value, the first round's keys
    MM_TRACE(layer * 8 + 2);
    a.begin(smem);
#pragma unroll 1
    for (int round = 0; round < n_round; round++) {
      unsigned char* const now = smem + L::ring + buffer * R::bytes;
      const int first = 16 * warp, n = length - round * alone_keys - first, own = own_at - round * alone_keys;
      if (n > 0) {
        if (owner && own >= first && own < first + 16) {
          constexpr int n_word = D * R::size / 4;
#pragma unroll
          for (int which = 0; which < 2; which++) {
            for (int i = lane; i < n_word; i += 32)
              reinterpret_cast<uint32_t*>(now + which * R::values + own * R::pitch)[i] =
                  reinterpret_cast<const uint32_t*>(smem + L::own)[which * n_word + i];
          }
          if (R::size == 1 && lane < 2)
            reinterpret_cast<float*>(now + R::scales)[lane * alone_keys + own] =
                reinterpret_cast<const float*>(smem + L::own_scale)[lane];
          __syncwarp();
        }
        a.add(now, first, n);
      }
      if (round + 1 == n_round) break;
      cp_async_wait<L::n_buffer - 2>();
      __syncthreads();  // the next round's keys are there, these are done with
      copy_next(buffer);
      if (++buffer == L::n_buffer) buffer = 0;
    }
    MM_TRACE(layer * 8 + 3);
    const int n_part = min(n_warp, (length + 15) / 16);
    if (warp < n_part) a.hand_over(smem);
    __syncthreads();
    MM_TRACE(layer * 8 + 4);
    // [split][n_head D], then [split][n_head D / 32] lines of {maximum, sum}
    uint32_t* const part = words + p.ex.parts + (share.split * p.n_head + share.kv * G) * D;
    if (tid < G * D / 4) {
      const int head = tid / (D / 4), i = 4 * tid;
      const float2* of_warp = reinterpret_cast<const float2*>(smem + L::ml) + head;
      const float* of = reinterpret_cast<const float*>(smem + L::sums) + head * L::sum_pitch + (i - head * D);
      float2 y[n_warp];  // maximum, sum
      float4 v[n_warp];
#pragma unroll
      for (int w = 0; w < n_warp; w++) {
        y[w] = make_float2(minus_infinity(), 0.0f), v[w] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (w < n_part) y[w] = of_warp[w * G], v[w] = *reinterpret_cast<const float4*>(of + w * G * L::sum_pitch);
      }
      float top = minus_infinity(), sum = 0.0f;
#pragma unroll
      for (int w = 0; w < n_warp; w++) top = fmaxf(top, y[w].x);
      const float r = reference(top);
      float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < n_warp; w++) {
        const float f = exp2_fast(y[w].x - r);
        sum += f * y[w].y;
        x.x += f * v[w].x, x.y += f * v[w].y, x.z += f * v[w].z, x.w += f * v[w].w;
      }
      publish(part + i, x.x, x.y, x.z, x.w);
      uint32_t* const line = part + p.max_split * p.n_head * D + i;
      if (i % 32 == 0) publish(line, top), publish(line + 1, sum);
    }
    MM_TRACE(layer * 8 + 5);
    if (n_round > 0) {
      copy_next(buffer);
      if (++buffer == L::n_buffer) buffer = 0;
    }
    if (layer == 0) between();
    MM_TRACE(layer * 8 + 6);
    words += p.ex.layer_words, norms += p.norm_stride;
  }
}

}  // namespace mm::cuda::persistent
