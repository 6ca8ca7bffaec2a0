// The attention of the persistent decode step. A block takes one (token, key head, share of the keys). 8 lanes (4 at
// d_head 32) hold one key's row; old keys and values come through a ring in shared memory of which each thread reads
// only what it copied itself, and the first rounds of it are under way long before the queries exist. The own token's
// key and value are normed, rotated and rounded here and stored by the block whose share ends with it.
#pragma once

#include "kernels/cuda/decode_persistent.cuh"

namespace mm::cuda::persistent {

constexpr int kv_rounds = 2;  // of keys in flight

template <class T, int D>
struct KeySpread {
  static constexpr int lanes = D >= 64 ? 8 : 4, elements = D / lanes, groups = n_thread / lanes;
  static constexpr int per_16 = 16 / static_cast<int>(sizeof(T));
  static constexpr int V = elements % per_16 == 0 ? per_16 : elements % (per_16 / 2) == 0 ? per_16 / 2 : per_16 / 4;
  static constexpr int per_lane = elements / V, chunk = V * static_cast<int>(sizeof(T));
  static constexpr int scale_bytes = sizeof(T) == 1 ? 4 * n_thread : 0;
  static constexpr int round_bytes = 2 * per_lane * chunk * n_thread + scale_bytes;
};

// What a block does in every layer's attention.
struct Share {
  int row = -1, kv = 0, split = 0, n_split = 1, n_key = 0, begin = 0, end = 0;
  __device__ __forceinline__ bool any() const { return row >= 0; }
  __device__ __forceinline__ int rounds(int groups) const { return (end - begin + groups - 1) / groups; }
};

__device__ __forceinline__ int splits_of(const Params& p, int n_key) { return max(1, min((n_key + 63) / 64, p.max_split)); }

__device__ __forceinline__ int64_t key_row(const Params& p, int row, int key) {
  return p.table[row * p.table_ld + (key >> p.block_shift)] + (key & ((1 << p.block_shift) - 1));
}

template <class T, int D>
__device__ __forceinline__ uint32_t ring_slot(int stage, int which, int c) {
  using S = KeySpread<T, D>;
  return static_cast<uint32_t>(stage * S::round_bytes + ((which * S::per_lane + c) * n_thread + static_cast<int>(threadIdx.x)) * S::chunk);
}

template <int bytes>
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool valid) {
  if constexpr (bytes == 16) cp_async16(to, from, valid);
  else if constexpr (bytes == 8) cp_async8(to, from, valid);
  else cp_async4(to, from, valid);
}

// Starts the copy of a round's keys and values of a layer. `at`: the key's row in the cache (unused where not valid).
template <class T, int D>
__device__ __forceinline__ void copy_round(const Params& p, uint32_t ring, const Share& share, int layer, int round,
                                           int64_t at) {
  using S = KeySpread<T, D>;
  const int tid = static_cast<int>(threadIdx.x), member = tid % S::lanes;
  const int key = share.begin + round * S::groups + tid / S::lanes;
  const bool valid = key < share.end && key < share.n_key - 1;
  const int64_t offset = valid ? layer * p.kv_layer_stride + (at * p.n_kv_head + share.kv) * D : 0;
  const T *k = static_cast<const T*>(p.k) + offset, *v = static_cast<const T*>(p.v) + offset;
  const int stage = round % kv_rounds;
#pragma unroll
  for (int c = 0; c < S::per_lane; c++) {
    copy_chunk<S::chunk>(ring + ring_slot<T, D>(stage, 0, c), k + (c * S::lanes + member) * S::V, valid);
    copy_chunk<S::chunk>(ring + ring_slot<T, D>(stage, 1, c), v + (c * S::lanes + member) * S::V, valid);
  }
  if constexpr (sizeof(T) == 1) {
    if (member < 2) {
      const float* scale = member == 0 ? p.k_scale : p.v_scale;
      const int64_t s = valid ? layer * (p.kv_layer_stride / D) + at * p.n_kv_head + share.kv : 0;
      cp_async4(ring + static_cast<uint32_t>((stage + 1) * S::round_bytes - S::scale_bytes + 4 * tid), scale + s, valid);
    }
  }
}

// The first rounds of a layer; rows[] are the cache rows of this thread's keys in them.
template <class T, int D>
__device__ __noinline__ void prefetch_keys(const Params& p, uint32_t ring, const Share& share, int layer, int64_t row0,
                                           int64_t row1) {
  using S = KeySpread<T, D>;
  const int n = probing(p, 4) ? 0 : share.rounds(S::groups);
  if (n > 0) copy_round<T, D>(p, ring, share, layer, 0, row0);
  cp_async_commit();
  if (n > 1) copy_round<T, D>(p, ring, share, layer, 1, row1);
  cp_async_commit();
}

template <class T, int D>
__device__ __forceinline__ int64_t first_row(const Params& p, const Share& share, int round) {
  using S = KeySpread<T, D>;
  const int key = share.begin + round * S::groups + static_cast<int>(threadIdx.x) / S::lanes;
  return key < share.end && key < share.n_key - 1 ? key_row(p, share.row, key) : 0;
}

__device__ __forceinline__ float reference(float m) { return m == minus_infinity() ? 0.0f : m; }

template <class T, int V>
__device__ __forceinline__ void load_chunk(float (&x)[V], const unsigned char* p) {
  if constexpr (sizeof(T) == 2) {
    load<bf16, V>(x, reinterpret_cast<const bf16*>(p));
  } else {
    uint32_t w[V / 4];
    if constexpr (V == 16) {
      const uint4 u = *reinterpret_cast<const uint4*>(p);
      w[0] = u.x, w[1] = u.y, w[2] = u.z, w[3] = u.w;
    } else if constexpr (V == 8) {
      const uint2 u = *reinterpret_cast<const uint2*>(p);
      w[0] = u.x, w[1] = u.y;
    } else {
      w[0] = *reinterpret_cast<const uint32_t*>(p);
    }
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = static_cast<float>(static_cast<int8_t>(w[i / 4] >> (8 * (i % 4)) & 0xff));
  }
}

// Merges the warps' parts (maximum, sum, outputs of n_heads heads: ml [n_warp][n_heads][2], out [n_warp][n_heads][D])
// and publishes: the whole result as bf16 pairs (merged: words of the row), or a part (part: out [n_heads][D], then
// {m, l} [n_heads]).
template <int D>
__device__ __forceinline__ void finish_heads(const float* ml, const float* out, int n_heads, int first_head,
                                             uint32_t* merged, uint32_t* part) {
  for (int i = static_cast<int>(threadIdx.x); i < n_heads * D / 2; i += n_thread) {
    const int h = i / (D / 2), c = i % (D / 2) * 2;
    float top = minus_infinity(), sum = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
    for (int w = 0; w < n_warp; w++) top = fmaxf(top, ml[(w * n_heads + h) * 2]);
#pragma unroll
    for (int w = 0; w < n_warp; w++) {
      const float f = exp2_fast(ml[(w * n_heads + h) * 2] - reference(top));
      const float2 o = *reinterpret_cast<const float2*>(out + (w * n_heads + h) * D + c);
      sum += f * ml[(w * n_heads + h) * 2 + 1];
      x += f * o.x, y += f * o.y;
    }
    if (part != nullptr) {
      publish(part + h * D + c, x);
      publish(part + h * D + c + 1, y);
      if (c == 0) {
        publish(part + n_heads * D + 2 * h, top);
        publish(part + n_heads * D + 2 * h + 1, sum);
      }
    } else {
      const float inv = sum > 0.0f || sum != sum ? 1.0f / sum : 0.0f;  // no keys: zero
      publish(merged + ((first_head + h) * D + c) / 2, pack2<bf16>(x * inv, y * inv));
    }
  }
}

// One warp: a head's raw values from the exchange, normed (weight not null) and rotated (turn). Lane l gets elements
// l + 32 i (a[i]) and those D / 2 on (b[i]).
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
      const float rstd = rsqrtf(warp_sum(ss) / D + p.eps);
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
  // As the cache holds it.
  template <class T>
  __device__ __forceinline__ void keep(T* to, float* scale) const {
    if constexpr (sizeof(T) == 2) {
      each([&](int e, float x) { to[e] = from_float<bf16>(x); });
    } else {
      float top = 0.0f;
      each([&](int, float x) { top = max_nan(top, fabsf(x)); });
      top = warp_max(top);
      const float inv = top > 0.0f ? 127.0f / top : 0.0f;
      each([&](int e, float x) { to[e] = static_cast<int8_t>(max(-127, min(127, __float2int_rn(x * inv)))); });
      if (threadIdx.x % 32 == 0) *scale = top / 127.0f;  // a NaN stays in the scale
    }
  }
};

// layer_words: this layer's words of the exchange.
template <class T, int D, int G>
__device__ __noinline__ void attend(const Params& p, unsigned char* smem, const Share& share, int layer,
                                    uint32_t* layer_words) {
  using S = KeySpread<T, D>;
  constexpr int E = S::elements, V = S::V;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, member = tid % S::lanes;
  float* q = reinterpret_cast<float*>(smem + p.smem.q);                    // [G][D]
  unsigned char* own = smem + p.smem.knew;                                 // key, then value, as T
  float* own_scale = reinterpret_cast<float*>(smem + p.smem.knew + 4 * D);  // of key, value
  const float* turn = reinterpret_cast<const float*>(smem + p.smem.rope);  // cos [D / 2], sin
  float* ml = reinterpret_cast<float*>(smem + p.smem.part);                // [n_warp][G][2]
  float* part_out = ml + n_warp * G * 2;                                   // [n_warp][G][D]
  const uint32_t ring = shared_address(smem + p.smem.kv_ring);

  if (warp < G + 2) {
    const int width = (p.n_head + 2 * p.n_kv_head) * D;
    const int column = (warp < G ? share.kv * G + warp : warp == G ? p.n_head + share.kv : p.n_head + p.n_kv_head + share.kv) * D;
    const float* norms = p.norms + static_cast<int64_t>(layer) * p.norm_stride + p.norm_q;
    const float* weight = p.norm_q < 0 || warp == G + 1 ? nullptr : norms + (warp < G ? 0 : D);
    HeadValues<D> x;
    x.read(p, layer_words + p.ex.qkv + static_cast<int64_t>(share.row) * width + column, weight,
           warp <= G ? turn : nullptr);
    if (warp < G) x.each([&](int e, float v) { q[warp * D + e] = v * p.scale2; });
    else x.template keep<T>(reinterpret_cast<T*>(own) + (warp - G) * D, own_scale + (warp - G));
  }
  __syncthreads();
  // The own key and value into the cache.
  const int last = share.n_key - 1;
  if (share.begin <= last && last < share.end) {
    const int64_t slot = p.slots[share.row];
    constexpr int words = D * static_cast<int>(sizeof(T)) / 4;
    if (slot >= 0) {
      const int64_t at = layer * p.kv_layer_stride + (slot * p.n_kv_head + share.kv) * D;
      if (tid < 2 * words) {
        void* cache = tid < words ? p.k : p.v;
        reinterpret_cast<uint32_t*>(static_cast<T*>(cache) + at)[tid % words] = reinterpret_cast<const uint32_t*>(own)[tid];
      } else if (sizeof(T) == 1 && tid < 2 * words + 2) {
        float* scale = tid == 2 * words ? p.k_scale : p.v_scale;
        scale[at / D] = own_scale[tid - 2 * words];
      }
    }
  }

  float out[G][E], m[G], l[G];
#pragma unroll
  for (int h = 0; h < G; h++) {
    m[h] = minus_infinity(), l[h] = 0.0f;
#pragma unroll
    for (int e = 0; e < E; e++) out[h][e] = 0.0f;
  }
  const int n_round = probing(p, 4) ? 0 : share.rounds(S::groups);
  for (int round = 0; round < n_round; round++) {
    const int stage = round % kv_rounds, key = share.begin + round * S::groups + tid / S::lanes;
    const bool is_own = key == last;
    cp_async_wait<kv_rounds - 1>();
    const auto chunk_at = [&](int which, int c) -> const unsigned char* {
      return is_own ? own + (which * D + (c * S::lanes + member) * V) * static_cast<int>(sizeof(T))
                    : smem + p.smem.kv_ring + ring_slot<T, D>(stage, which, c);
    };
    float k_factor = 1.0f, v_factor = 1.0f;
    if constexpr (sizeof(T) == 1) {
      const float* at = is_own ? own_scale + (member & 1)
                               : reinterpret_cast<const float*>(smem + p.smem.kv_ring + (stage + 1) * S::round_bytes - S::scale_bytes) + tid;
      const float f = member < 2 ? *at : 0.0f;
      k_factor = __shfl_sync(0xffffffffu, f, lane - member), v_factor = __shfl_sync(0xffffffffu, f, lane - member + 1);
    }
    float s[G];
#pragma unroll
    for (int h = 0; h < G; h++) s[h] = 0.0f;
#pragma unroll
    for (int c = 0; c < S::per_lane; c++) {
      float x[V];
      load_chunk<T, V>(x, chunk_at(0, c));
#pragma unroll
      for (int h = 0; h < G; h++) {
        float y[V];
        load<float, V>(y, q + h * D + (c * S::lanes + member) * V);
#pragma unroll
        for (int e = 0; e < V; e++) s[h] += x[e] * y[e];
      }
    }
#pragma unroll
    for (int h = 0; h < G; h++) {
      s[h] = warp_sum<S::lanes>(s[h]) * k_factor;
      if (key >= share.end) s[h] = minus_infinity();
      const float top = fmaxf(m[h], s[h]), f = exp2_fast(m[h] - reference(top));
      m[h] = top;
      s[h] = exp2_fast(s[h] - reference(top));
      l[h] = l[h] * f + s[h];
      s[h] *= v_factor;
      if (key >= share.end) s[h] = 0.0f;
#pragma unroll
      for (int e = 0; e < E; e++) out[h][e] *= f;
    }
#pragma unroll
    for (int c = 0; c < S::per_lane; c++) {
      float x[V];
      load_chunk<T, V>(x, chunk_at(1, c));
#pragma unroll
      for (int h = 0; h < G; h++) {
#pragma unroll
        for (int e = 0; e < V; e++) out[h][c * V + e] += s[h] * x[e];
      }
    }
    asm volatile("" ::: "memory");  // what the copies overwrite has been read
    if (round + kv_rounds < n_round)
      copy_round<T, D>(p, ring, share, layer, round + kv_rounds, first_row<T, D>(p, share, round + kv_rounds));
    cp_async_commit();
  }

  // Groups of a warp, by halves.
#pragma unroll
  for (int h = 0; h < G; h++) {
    float top = m[h];
#pragma unroll
    for (int i = S::lanes; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, i));
    const float f = exp2_fast(m[h] - reference(top));
    l[h] *= f;
#pragma unroll
    for (int i = S::lanes; i < 32; i *= 2) l[h] += __shfl_xor_sync(0xffffffffu, l[h], i);
#pragma unroll
    for (int e = 0; e < E; e++) {
      out[h][e] *= f;
#pragma unroll
      for (int i = S::lanes; i < 32; i *= 2) out[h][e] += __shfl_xor_sync(0xffffffffu, out[h][e], i);
    }
    if (lane == 0) ml[(warp * G + h) * 2] = top, ml[(warp * G + h) * 2 + 1] = l[h];
    if (lane < S::lanes) {
#pragma unroll
      for (int e = 0; e < E; e++) part_out[(warp * G + h) * D + (e / V * S::lanes + member) * V + e % V] = out[h][e];
    }
  }
  __syncthreads();
  uint32_t* merged = layer_words + p.ex.merged + static_cast<int64_t>(share.row) * (p.n_head * D / 2);
  const int item = (share.row * p.n_kv_head + share.kv) * p.max_split + share.split;
  uint32_t* part = layer_words + p.ex.parts + static_cast<int64_t>(item) * p.ex.part_words;
  finish_heads<D>(ml, part_out, G, share.kv * G, merged, share.n_split > 1 ? part : nullptr);
}

// The parts of one (row, head), merged.
template <int D>
__device__ __noinline__ void merge_parts(const Params& p, unsigned char* smem, int row, int head, int n_split,
                                         uint32_t* layer_words) {
  constexpr int n = D / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = p.n_head / p.n_kv_head, kv = head / group, h = head % group;
  float* ml = reinterpret_cast<float*>(smem + p.smem.part);  // [n_warp][2]
  float* part_out = ml + n_warp * 2;                         // [n_warp][D]
  float m = minus_infinity(), l = 0.0f, out[n];
#pragma unroll
  for (int i = 0; i < n; i++) out[i] = 0.0f;
  for (int s = warp; s < n_split; s += n_warp) {
    const int item = (row * p.n_kv_head + kv) * p.max_split + s;
    const uint32_t* part = layer_words + p.ex.parts + static_cast<int64_t>(item) * p.ex.part_words;
    const uint32_t* from[n + 2];
    uint32_t x[n + 2];
#pragma unroll
    for (int i = 0; i < n; i++) from[i] = part + h * D + lane + 32 * i;
    from[n] = part + group * D + 2 * h, from[n + 1] = from[n] + 1;
    await(p, x, from, 2);
    const float sm = __uint_as_float(x[n]), top = fmaxf(m, sm);
    const float f = exp2_fast(m - reference(top)), g = exp2_fast(sm - reference(top));
    m = top;
    l = l * f + __uint_as_float(x[n + 1]) * g;
#pragma unroll
    for (int i = 0; i < n; i++) out[i] = out[i] * f + __uint_as_float(x[i]) * g;
  }
  __syncthreads();  // the readers of what lies there now are done
  if (lane == 0) ml[2 * warp] = m, ml[2 * warp + 1] = l;
#pragma unroll
  for (int i = 0; i < n; i++) part_out[warp * D + lane + 32 * i] = out[i];
  __syncthreads();
  finish_heads<D>(ml, part_out, 1, head, layer_words + p.ex.merged + static_cast<int64_t>(row) * (p.n_head * D / 2),
                  nullptr);
}

}  // namespace mm::cuda::persistent
