// The attention of the persistent decode step. A block takes one (token, key head, share of the keys), 64 keys a round;
// heads of a key head are the 8 columns of mma.sync m16n8k16. Rounds of keys and values pass through two buffers in
// shared memory; the first two of the next layer are copied while the block works on other stages.
//
//   prepare  one warp a head: norm, rotation; queries as bf16, the own key and value as the cache holds them
//   scores   warp w < 4: 16 keys x heads; exp2(score - the 16 keys' maximum) as bf16, maxima and sums to shared memory
//   values   warp x < d_head / 16: 16 columns x heads, summed over the four warps' keys with their factors
//
// The own key and value are stored by the block whose share ends with them.
#pragma once

#include "kernels/cuda/decode_persistent.cuh"

namespace mm::cuda::persistent {

constexpr int keys_per_round = 64;

__host__ __device__ constexpr int kv_pitch(int d, int size) { return d * size + 16; }
__host__ __device__ constexpr int kv_round_bytes(int d, int size) {
  return 2 * keys_per_round * (kv_pitch(d, size) + (size == 1 ? 4 : 0));
}
constexpr int score_pitch = 2 * keys_per_round + 16;

// What a block does in every layer's attention.
struct Share {
  int row = -1, slot = -1, kv = 0, split = 0, n_split = 1, n_key = 0, begin = 0, end = 0;
  __device__ __forceinline__ bool any() const { return row >= 0; }
  __device__ __forceinline__ int rounds() const { return (end - begin + keys_per_round - 1) / keys_per_round; }
};

__device__ __forceinline__ int splits_of(const Params& p, int n_key) {
  const int per = p.roles ? alone_keys : keys_per_round;
  return max(1, min((n_key + per - 1) / per, p.max_split));
}

__device__ __forceinline__ int key_row(const Params& p, const Share& share, int key) {
  return p.table[share.row * p.table_ld + (key >> p.block_shift)] + (key & ((1 << p.block_shift) - 1));
}

__device__ __forceinline__ float reference(float m) { return m == minus_infinity() ? 0.0f : m; }

// A round's buffer: keys, values [kKeys][pitch], then (int8) scales of keys, of values [kKeys].
template <class T, int D, int kKeys = keys_per_round>
struct Round {
  static constexpr int size = static_cast<int>(sizeof(T)), pitch = kv_pitch(D, size);
  static constexpr int values = kKeys * pitch, scales = 2 * values, bytes = scales + (size == 1 ? 8 * kKeys : 0);
};

// Starts the copies of a round's old keys and values to the buffer `to`. row_of(key of the round): its cache row.
template <class T, int D, int kKeys, class F>
__device__ __forceinline__ void copy_keys(const Params& p, uint32_t to, const Share& share, int layer, int round,
                                          F&& row_of) {
  using R = Round<T, D, kKeys>;
  constexpr int per_key = D * R::size / 16, n = 2 * kKeys * per_key;
  const int count = min(share.end, share.n_key - 1) - share.begin - round * kKeys;
  const int64_t base = layer * p.kv_layer_stride + share.kv * D;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < n; i += n_thread) {
    const int which = i / (n / 2), key = i % (n / 2) / per_key, chunk = i % per_key;
    if (key >= count) continue;
    const int64_t row = row_of(key);
    const T* from =
        static_cast<const T*>(which == 0 ? p.k : p.v) + base + row * (p.n_kv_head * D) + chunk * (16 / R::size);
    cp_async16(to + static_cast<uint32_t>(which * R::values + key * R::pitch + chunk * 16), from);
  }
  if constexpr (R::size == 1) {
    static_assert(2 * kKeys <= n_thread);
    const int tid = static_cast<int>(threadIdx.x), which = tid / kKeys, key = tid % kKeys;
    if (which < 2 && key < count) {
      const int64_t row = row_of(key);
      cp_async4(to + static_cast<uint32_t>(R::scales + 4 * tid),
                (which == 0 ? p.k_scale : p.v_scale) + layer * (p.kv_layer_stride / D) + row * p.n_kv_head + share.kv,
                true);
    }
  }
}

// rows: cache rows of the first two rounds' keys in shared memory.
template <class T, int D>
__device__ __forceinline__ void copy_round(const Params& p, unsigned char* smem, const Share& share, int layer,
                                           int round) {
  const int* rows = reinterpret_cast<const int*>(smem + p.smem.rows) + round * keys_per_round;
  const int first = share.begin + round * keys_per_round;
  copy_keys<T, D, keys_per_round>(
      p, shared_address(smem + p.smem.kv_ring) + static_cast<uint32_t>(round % 2 * Round<T, D>::bytes), share, layer,
      round, [&](int key) -> int64_t { return round < 2 ? rows[key] : key_row(p, share, first + key); });
}

// The first rounds of a layer.
template <class T, int D>
__device__ __forceinline__ void start_keys(const Params& p, unsigned char* smem, const Share& share, int layer) {
  const int n = probing(p, 4) ? 0 : share.rounds();
#pragma unroll 1
  for (int round = 0; round < 2; round++) {
    if (round < n) copy_round<T, D>(p, smem, share, layer, round);
    cp_async_commit();
  }
}

// What does not change from layer to layer: cache rows, rotation, zeros where there are no heads.
template <int D>
__device__ __forceinline__ void prepare_share(const Params& p, unsigned char* smem, const Share& share) {
  const int tid = static_cast<int>(threadIdx.x);
  if (tid < 2 * keys_per_round) {
    const int key = share.begin + tid;
    if (key < share.end && key < share.n_key - 1)
      reinterpret_cast<int*>(smem + p.smem.rows)[tid] = key_row(p, share, key);
  }
  float* turn = reinterpret_cast<float*>(smem + p.smem.rope);
  const int64_t from = static_cast<int64_t>(p.rows[share.row].position) * (D / 2);
  if (tid < D / 2) turn[tid] = p.cos[from + tid], turn[D / 2 + tid] = p.sin[from + tid];
  for (int i = tid; i < 2 * (2 * D + 16); i += n_thread) reinterpret_cast<uint32_t*>(smem + p.smem.q)[i] = 0;
}

// One warp: a head's raw values from the exchange, normed (weight not null) and rotated (turn not null). Lane l gets
// elements l + 32 i (a[i]) and those D / 2 on (b[i]).
template <int D>
struct HeadValues {
  static constexpr int n = (D / 2 + 31) / 32;
  float a[n], b[n];
  __device__ __forceinline__ void read(const Params& p, const uint32_t* raw, const float* weight, const float* turn) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t* from[2 * n];
    uint32_t x[2 * n];
    float wa[n], wb[n];
#pragma unroll
    for (int i = 0; i < n; i++) {
      const int e = min(lane + 32 * i, D / 2 - 1);
      from[2 * i] = raw + e, from[2 * i + 1] = raw + e + D / 2;
      wa[i] = weight != nullptr ? weight[e] : 1.0f, wb[i] = weight != nullptr ? weight[e + D / 2] : 1.0f;
    }
    await(p, x, from, 1);
    float ss = 0.0f;
#pragma unroll
    for (int i = 0; i < n; i++) {
      a[i] = __uint_as_float(x[2 * i]), b[i] = __uint_as_float(x[2 * i + 1]);
      if (lane + 32 * i < D / 2) ss += a[i] * a[i] + b[i] * b[i];
    }
    if (weight != nullptr) {
      const float rstd = rsqrtf(warp_sum(ss) * (1.0f / D) + p.eps);
#pragma unroll
      for (int i = 0; i < n; i++) a[i] *= rstd * wa[i], b[i] *= rstd * wb[i];
    }
    if (turn != nullptr) {
#pragma unroll
      for (int i = 0; i < n; i++) {
        const int e = min(lane + 32 * i, D / 2 - 1);
        const float c = turn[e], s = turn[D / 2 + e], u = a[i];
        a[i] = u * c - b[i] * s;
        b[i] = b[i] * c + u * s;
      }
    }
  }
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < n; i++) {
      const int e = lane + 32 * i;
      if (e < D / 2) f(e, a[i]), f(e + D / 2, b[i]);
    }
  }
  // As the cache holds it, to shared memory and (not null) to the cache.
  template <class T>
  __device__ __forceinline__ void keep(T* to, float* scale, T* cache, float* cache_scale) const {
    if constexpr (sizeof(T) == 2) {
      each([&](int e, float x) {
        const T y = from_float<bf16>(x);
        to[e] = y;
        if (cache != nullptr) cache[e] = y;
      });
    } else {
      float top = 0.0f;
      each([&](int, float x) { top = max_nan(top, fabsf(x)); });
      top = warp_max(top);
      const float inv = top > 0.0f ? __fdividef(127.0f, top) : 0.0f;
      each([&](int e, float x) {
        const T y = static_cast<int8_t>(max(-127, min(127, __float2int_rn(x * inv))));
        to[e] = y;
        if (cache != nullptr) cache[e] = y;
      });
      if (threadIdx.x % 32 == 0) {  // a NaN stays in the scale
        *scale = top * (1.0f / 127.0f);
        if (cache != nullptr) *cache_scale = top * (1.0f / 127.0f);
      }
    }
  }
};

// Two bytes (0 and 2, or 1 and 3, of x) as a bf16 pair: 0x43xx is 128 + the low 7 bits or, with the sign bit, 256 +
// them.
template <int selector>
__device__ __forceinline__ uint32_t widen_pair(uint32_t x) {
  const uint32_t two = __byte_perm(x, 0x43434343u, selector), value = two & 0xff7fff7fu, offset = two & 0xff80ff80u;
  const __nv_bfloat162 d =
      __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&value), *reinterpret_cast<const __nv_bfloat162*>(&offset));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// layer_words: this layer's words of the exchange.
template <class T, int D, int G>
__device__ __forceinline__ void attend(const Params& p, unsigned char* smem, const Share& share, int layer,
                                       uint32_t* layer_words) {
  using R = Round<T, D>;
  constexpr int q_pitch = 2 * D + 16;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  unsigned char* const ring = smem + p.smem.kv_ring;
  float* ml = reinterpret_cast<float*>(smem + p.smem.ml);  // [4 warps][8 heads]{maximum, sum}
  const int last = share.n_key - 1, own_at = last - share.begin;
  const bool owner = last >= share.begin && last < share.end;
  const int n_round = probing(p, 4) ? 0 : share.rounds();

  if (warp < G + 2) {
    const int width = (p.n_head + 2 * p.n_kv_head) * D;
    const int head = warp < G ? share.kv * G + warp : p.n_head + share.kv + (warp - G) * p.n_kv_head;
    const float* norms = p.norms + static_cast<int64_t>(layer) * p.norm_stride + p.norm_q;
    const float* weight = p.norm_q < 0 || warp == G + 1 ? nullptr : norms + (warp < G ? 0 : D);
    HeadValues<D> x;
    x.read(p, layer_words + p.ex.qkv + share.row * width + head * D, weight,
           warp <= G ? reinterpret_cast<const float*>(smem + p.smem.rope) : nullptr);
    if (warp < G) {
      bf16* q = reinterpret_cast<bf16*>(smem + p.smem.q + warp * q_pitch);
      x.each([&](int e, float v) { q[e] = from_float<bf16>(v * p.scale2); });
    } else {
      // Into the first round's buffer, or, where the share is longer, aside until its round comes.
      const int which = warp - G;
      const bool first = owner && own_at < keys_per_round;
      T* to = reinterpret_cast<T*>(first ? ring + which * R::values + own_at * R::pitch
                                         : smem + p.smem.own + which * D * R::size);
      float* scale = first ? reinterpret_cast<float*>(ring + R::scales) + which * keys_per_round + own_at
                           : reinterpret_cast<float*>(smem + p.smem.own + 2 * D * R::size) + which;
      const int64_t at = layer * (p.kv_layer_stride / D) + static_cast<int64_t>(share.slot) * p.n_kv_head + share.kv;
      const bool store = owner && share.slot >= 0;
      T* cache = store ? static_cast<T*>(which == 0 ? p.k : p.v) + at * D : nullptr;
      x.template keep<T>(to, scale, cache, R::size == 1 ? (which == 0 ? p.k_scale : p.v_scale) + at : nullptr);
    }
  }
  float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f}, top[2] = {minus_infinity(), minus_infinity()}, sum[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int round = 0; round < n_round; round++) {
    unsigned char* const buffer = ring + round % 2 * R::bytes;
    if (round == 0) cp_async_wait<1>();  // the second round's keys may be on their way
    else cp_async_wait<0>();
    __syncthreads();  // queries, the own key and value, the round's keys; the former round is done
    if (round > 0) {
      if (round + 1 < n_round) copy_round<T, D>(p, smem, share, layer, round + 1);
      cp_async_commit();
    }
    if (round > 0 && owner && own_at / keys_per_round == round) {
      constexpr int words = D * R::size / 4;
      if (tid < 2 * words) {
        const int which = tid / words;
        reinterpret_cast<uint32_t*>(buffer + which * R::values + own_at % keys_per_round * R::pitch)[tid % words] =
            reinterpret_cast<const uint32_t*>(smem + p.smem.own)[tid];
      } else if (R::size == 1 && tid < 2 * words + 2) {
        const int which = tid - 2 * words;
        reinterpret_cast<float*>(buffer + R::scales)[which * keys_per_round + own_at % keys_per_round] =
            reinterpret_cast<const float*>(smem + p.smem.own + 2 * D * R::size)[which];
      }
      __syncthreads();
    }
    if (warp < 4) {
      float c[2][4] = {};
      const unsigned char* q = smem + p.smem.q + g * q_pitch + t * 8;
      const unsigned char* k = buffer + (warp * 16 + g) * R::pitch + t * 4 * R::size;
#pragma unroll 2
      for (int i = 0; i < D / 16; i++) {
        const uint2 b = *reinterpret_cast<const uint2*>(q + 32 * i);
        if constexpr (R::size == 2) {
          const uint2 lo = *reinterpret_cast<const uint2*>(k + 32 * i),
                      hi = *reinterpret_cast<const uint2*>(k + 8 * R::pitch + 32 * i);
          mma<bf16>(c[i % 2], {lo.x, hi.x, lo.y, hi.y}, b.x, b.y);
        } else {
          const uint32_t lo = *reinterpret_cast<const uint32_t*>(k + 16 * i),
                         hi = *reinterpret_cast<const uint32_t*>(k + 8 * R::pitch + 16 * i);
          mma<bf16>(c[i % 2],
                    {widen_pair<0x4140>(lo), widen_pair<0x4140>(hi), widen_pair<0x4342>(lo), widen_pair<0x4342>(hi)},
                    b.x, b.y);
        }
      }
      const int key = warp * 16 + g, n = share.end - share.begin - round * keys_per_round;  // valid keys of the buffer
      float k_factor[2] = {1.0f, 1.0f}, v_factor[2] = {1.0f, 1.0f};
      if constexpr (R::size == 1) {
        const float* scales = reinterpret_cast<const float*>(buffer + R::scales) + key;
        k_factor[0] = scales[0], k_factor[1] = scales[8];
        v_factor[0] = scales[keys_per_round], v_factor[1] = scales[keys_per_round + 8];
      }
      bf16* scores = reinterpret_cast<bf16*>(smem + p.smem.scores);
#pragma unroll
      for (int e = 0; e < 2; e++) {  // head 2 t + e
        const float s0 = key < n ? (c[0][e] + c[1][e]) * k_factor[0] : minus_infinity();
        const float s1 = key + 8 < n ? (c[0][2 + e] + c[1][2 + e]) * k_factor[1] : minus_infinity();
        float m = fmaxf(s0, s1);
#pragma unroll
        for (int i = 4; i < 32; i *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, i));
        const float e0 = exp2_fast(s0 - reference(m)), e1 = exp2_fast(s1 - reference(m));
        float l = e0 + e1;
#pragma unroll
        for (int i = 4; i < 32; i *= 2) l += __shfl_xor_sync(0xffffffffu, l, i);
        bf16* row = scores + (2 * t + e) * (score_pitch / 2) + key;
        row[0] = from_float<bf16>(key < n ? e0 * v_factor[0] : 0.0f);
        row[8] = from_float<bf16>(key + 8 < n ? e1 * v_factor[1] : 0.0f);
        if (g == 0) *reinterpret_cast<float2*>(ml + (warp * 8 + 2 * t + e) * 2) = make_float2(m, l);
      }
    }
    __syncthreads();
    if (warp < D / 16) {
      const int n = share.end - share.begin - round * keys_per_round;
#pragma unroll 1
      for (int w = 0; 16 * w < min(n, keys_per_round); w++) {
        float f[2];  // of this warp's scores
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float2 x = *reinterpret_cast<const float2*>(ml + (w * 8 + 2 * t + e) * 2);
          const float m = fmaxf(top[e], x.x), r = reference(m), old = exp2_fast(top[e] - r);
          f[e] = exp2_fast(x.x - r);
          top[e] = m, sum[e] = sum[e] * old + f[e] * x.y;
          acc[e] *= old, acc[2 + e] *= old;
        }
        const unsigned char* scores = smem + p.smem.scores + g * score_pitch + (16 * w + 2 * t) * 2;
        const uint32_t b0 = *reinterpret_cast<const uint32_t*>(scores),
                       b1 = *reinterpret_cast<const uint32_t*>(scores + 16);
        const unsigned char* v = buffer + R::values + (16 * w + 2 * t) * R::pitch + (16 * warp + 2 * g) * R::size;
        // Values behind the last key are what the buffer held before: finite or not, they must not count.
        const auto pair = [&](int key) -> uint32_t {
          if (16 * w + 2 * t + key >= n) return 0;
          if constexpr (R::size == 2) return *reinterpret_cast<const uint32_t*>(v + key * R::pitch);
          else return *reinterpret_cast<const uint16_t*>(v + key * R::pitch);
        };
        const uint32_t x0 = pair(0), x1 = pair(1), x8 = pair(8), x9 = pair(9);
        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if constexpr (R::size == 2) {
          mma<bf16>(d,
                    {__byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632), __byte_perm(x8, x9, 0x5410),
                     __byte_perm(x8, x9, 0x7632)},
                    b0, b1);
        } else {
          const uint32_t lo = x0 | x1 << 16, hi = x8 | x9 << 16;
          mma<bf16>(d, {widen_pair<0x4240>(lo), widen_pair<0x4341>(lo), widen_pair<0x4240>(hi), widen_pair<0x4341>(hi)},
                    b0, b1);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) acc[e] += f[e % 2] * d[e];
      }
    }
  }
  if (warp >= D / 16 || 2 * t >= G) return;
  // Lane: columns 16 warp + 2 g, + 1 (acc[e], acc[2 + e]) of head 2 t + e.
  const int column = 16 * warp + 2 * g;
  const int item = (share.row * p.n_kv_head + share.kv) * p.max_split + share.split;
  uint32_t* const part = layer_words + p.ex.parts + item * p.ex.part_words;
  uint32_t* const merged = layer_words + p.ex.merged + share.row * (p.n_head * D / 2);
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int head = 2 * t + e;
    if (head >= G) break;
    if (share.n_split > 1) {
      publish(part + head * D + column, acc[e]);
      publish(part + head * D + column + 1, acc[2 + e]);
      if (warp == 0 && g == 0) publish(part + G * D + 2 * head, top[e]), publish(part + G * D + 2 * head + 1, sum[e]);
    } else {
      const float inv = n_round > 0 ? __fdividef(1.0f, sum[e]) : 0.0f;  // no keys: zero
      publish(merged + ((share.kv * G + head) * D + column) / 2, pack2<bf16>(acc[e] * inv, acc[2 + e] * inv));
    }
  }
}

// The parts of one (row, head), merged: a warp takes every 16th part, then the warps' sums meet.
template <int D>
__device__ __noinline__ void merge_parts(const Params& p, unsigned char* smem, int row, int head, int n_split,
                                         uint32_t* layer_words) {
  constexpr int n = D / 32;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int group = p.n_head / p.n_kv_head, kv = head / group, h = head % group;
  float* ml = reinterpret_cast<float*>(smem + p.smem.part);  // [n_warp][2]
  float* out_of = ml + n_warp * 2;                           // [n_warp][D]
  float m = minus_infinity(), l = 0.0f, out[n];
#pragma unroll
  for (int i = 0; i < n; i++) out[i] = 0.0f;
#pragma unroll 1
  for (int s = warp; s < n_split; s += n_warp) {
    const uint32_t* part = layer_words + p.ex.parts + ((row * p.n_kv_head + kv) * p.max_split + s) * p.ex.part_words;
    const uint32_t* from[n + 2];
    uint32_t x[n + 2];
#pragma unroll
    for (int i = 0; i < n; i++) from[i] = part + h * D + lane + 32 * i;
    from[n] = part + group * D + 2 * h, from[n + 1] = from[n] + 1;
    await(p, x, from, 2);
    const float sm = __uint_as_float(x[n]), to = fmaxf(m, sm);
    const float f = exp2_fast(m - reference(to)), g = exp2_fast(sm - reference(to));
    m = to;
    l = l * f + __uint_as_float(x[n + 1]) * g;
#pragma unroll
    for (int i = 0; i < n; i++) out[i] = out[i] * f + __uint_as_float(x[i]) * g;
  }
  __syncthreads();  // the readers of what lies there now are done
  if (lane == 0) *reinterpret_cast<float2*>(ml + 2 * warp) = make_float2(m, l);
#pragma unroll
  for (int i = 0; i < n; i++) out_of[warp * D + lane + 32 * i] = out[i];
  __syncthreads();
  if (tid >= D / 2) return;
  const int n_part = min(n_split, n_warp);
  float top = minus_infinity(), sum = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll 4
  for (int w = 0; w < n_part; w++) top = fmaxf(top, ml[2 * w]);
#pragma unroll 4
  for (int w = 0; w < n_part; w++) {
    const float f = exp2_fast(ml[2 * w] - reference(top));
    const float2 o = *reinterpret_cast<const float2*>(out_of + w * D + 2 * tid);
    sum += f * ml[2 * w + 1];
    x += f * o.x, y += f * o.y;
  }
  const float inv = __fdividef(1.0f, sum);
  publish(layer_words + p.ex.merged + (row * p.n_head + head) * (D / 2) + tid, pack2<bf16>(x * inv, y * inv));
}

}  // namespace mm::cuda::persistent
