// The kernel of the persistent decode step: roles of the warps, products, and the script of a step.
#pragma once

#include "kernels/cuda/decode_persistent_attention.cuh"
#include "kernels/cuda/hopper.cuh"

namespace mm::cuda::persistent {

// --- copying weights ----------------------------------------------------------------------------------------------
// One warp's work: keeps the ring full.
template <WeightFormat kFormat>
struct Copier {
  static constexpr uint32_t slot_bytes = slot_units * unit_bytes(kFormat);
  const unsigned char* from;
  uint32_t total, next = 0, taken = 0;  // units of the stream; slots copied; units that have left the ring
  __device__ __forceinline__ explicit Copier(const Params& p) {
    const uint32_t begin = p.block_begin[blockIdx.x];
    from = p.stream + static_cast<int64_t>(begin) * unit_bytes(kFormat);
    total = p.block_begin[blockIdx.x + 1] - begin;
  }
  __device__ __forceinline__ void fill(const Params& p, unsigned char* smem) {
    if (probing(p, 2)) return;
    const uint32_t n_slots = static_cast<uint32_t>(p.smem.n_slots), lane = threadIdx.x % 32;
    const uint32_t end = min((total + slot_units - 1) / slot_units, taken / slot_units + n_slots);
    const uint32_t ring = shared_address(smem), full = shared_address(smem + p.smem.full);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint64_t keep, drop;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(drop));
    for (uint32_t c = next + lane; c < end; c += 32) {
      const uint32_t slot = c % n_slots, bytes = min(total - c * slot_units, static_cast<uint32_t>(slot_units)) * unit_bytes(kFormat);
      const uint32_t to = ring + slot * slot_bytes, bar = full + 8 * slot;
      const unsigned char* source = from + static_cast<int64_t>(c) * slot_bytes;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
      if (p.resident_16ths >= 0) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
            "%4;" ::"r"(to),
            "l"(source), "r"(bytes), "r"(bar), "l"(static_cast<int>(c & 15) < p.resident_16ths ? keep : drop)
            : "memory");
      } else {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                     "l"(source), "r"(bytes), "r"(bar)
                     : "memory");
      }
    }
#else
    for (uint32_t c = next; c < end; c++) {
      const uint32_t slot = c % n_slots, bytes = min(total - c * slot_units, static_cast<uint32_t>(slot_units)) * unit_bytes(kFormat);
      for (uint32_t i = lane * 16; i < bytes; i += 512)
        cp_async16(ring + slot * slot_bytes + i, from + static_cast<int64_t>(c) * slot_bytes + i);
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full + 8 * slot) : "memory");
    }
#endif
    next = end;
  }
};

// --- keeping house: this step's words of the exchange into L2, the other set's back to `unset` --------------------
template <class F>
__device__ __forceinline__ void each_part_of_set(const Params& p, int64_t rows, bool parts, F&& f) {
  const int64_t qkv = static_cast<int64_t>(p.ex.parts - p.ex.qkv) / p.max_rows;
  for (int layer = 0; layer < p.n_layer; layer++) {
    const int64_t base = layer * p.ex.layer_words;
    f(base + p.ex.qkv, rows * qkv);
    if (parts) f(base + p.ex.parts, static_cast<int64_t>(p.ex.n_parts) * p.ex.part_words);
    f(base + p.ex.merged, rows * ((p.ex.mid - p.ex.merged) / p.max_rows));
    f(base + p.ex.mid, rows * p.d_model);
    f(base + p.ex.act, rows * (p.d_ff / 2));
    f(base + p.ex.out, rows * p.d_model);
  }
  f(p.ex.logits, rows * p.ex.logit_words);
}

__device__ __noinline__ void keep_house(const Params& p, uint32_t step, bool parts) {
  const int set = static_cast<int>(step & 1);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * n_thread + threadIdx.x), stride = static_cast<int64_t>(gridDim.x) * n_thread;
  uint32_t* now = p.ex.set[set];
  each_part_of_set(p, p.n_tok, parts, [&](int64_t at, int64_t words) {
    for (int64_t i = first * 32; i < words; i += stride * 32)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(now + at + i));
  });
  if (p.draw && first < p.n_tok) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.sampling + first));
  const float* norms = p.norms;
  const int64_t n_norms = static_cast<int64_t>(p.n_layer) * p.norm_stride + p.d_model;
  for (int64_t i = first * 32; i < n_norms; i += stride * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(norms + i));
  uint32_t* before = p.ex.set[set ^ 1];
  each_part_of_set(p, p.state->rows[set ^ 1], p.state->parts[set ^ 1] != 0, [&](int64_t at, int64_t words) {
    for (int64_t i = first * 4; i < words; i += stride * 4)
      *reinterpret_cast<uint4*>(before + at + i) = make_uint4(unset, unset, unset, unset);
  });
}

// --- products -----------------------------------------------------------------------------------------------------
// The weights of a pass in registers: unit w + 16 j of tile i is w[i * kPer + j].
template <WeightFormat kFormat>
struct Held {
  uint4 w[held_units];
  uint32_t scale[kFormat == WeightFormat::i8 ? held_units : 1];
};

// Where the workers are in the stream.
struct Cursor {
  uint32_t at = 0, lap = 0;  // unit in the ring, parity of the laps
  __device__ __forceinline__ void advance(uint32_t units, uint32_t capacity) {
    at += units;
    if (at >= capacity) at -= capacity, lap ^= 1;
  }
};

// Takes a pass out of the ring.
template <WeightFormat kFormat, int kPer>
__device__ __forceinline__ void take(const Params& p, unsigned char* smem, Held<kFormat>& held, const Cursor& cursor,
                                     int units, int tiles) {
  constexpr int n_tile = tiles_per_pass(kPer * n_warp, held_units);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t capacity = static_cast<uint32_t>(p.smem.n_slots * slot_units);
  const uint32_t full = shared_address(smem + p.smem.full);
#pragma unroll
  for (int i = 0; i < n_tile; i++) {
    if (i < tiles) {
#pragma unroll
      for (int j = 0; j < kPer; j++) {
        const int unit = warp + n_warp * j;
        if (unit < units) {
          uint32_t at = cursor.at + static_cast<uint32_t>(i * units + unit), lap = cursor.lap;
          if (at >= capacity) at -= capacity, lap ^= 1;
          SpinGuard guard(4);
          if (!probing(p, 2)) {
            while (!mbarrier_done(full + at / slot_units * 8, lap)) guard.spin();
          }
          const unsigned char* from = smem + at * unit_bytes(kFormat);
          held.w[i * kPer + j] = reinterpret_cast<const uint4*>(from)[lane];
          if constexpr (kFormat == WeightFormat::i8)
            held.scale[i * kPer + j] = reinterpret_cast<const uint32_t*>(from + 512)[lane / 4];
        } else {
          held.w[i * kPer + j] = make_uint4(0, 0, 0, 0);
          if constexpr (kFormat == WeightFormat::i8) held.scale[i * kPer + j] = 0;
        }
      }
    }
  }
}

// 8 int8 as bf16 pairs: 0x43xx is 128 + the low 7 bits or, with the sign bit, 256 + them; take 128 or 256 away.
__device__ __forceinline__ void widen(uint32_t (&r)[4], uint32_t lo, uint32_t hi) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t two = __byte_perm(i < 2 ? lo : hi, 0x43434343u, i % 2 == 0 ? 0x4140u : 0x4342u);
    const uint32_t value = two & 0xff7fff7fu, offset = two & 0xff80ff80u;
    const __nv_bfloat162 x = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&value),
                                     *reinterpret_cast<const __nv_bfloat162*>(&offset));
    r[i] = *reinterpret_cast<const uint32_t*>(&x);
  }
}

// One unit's group of 32 columns times the tokens'. r[i]: columns 8 t + 2 i, + 1 of row l / 4 (t = l % 4). Up to 4
// tokens: the lower half of the operand is the same rows with the columns' second half, so that one product takes all
// 32 (columns 0..3 of the upper, 4..7 of the lower result are wanted). More: two products, half of each is idle.
template <bool kWide>
__device__ __forceinline__ void multiply_group(float (&c)[4], const uint32_t (&r)[4], const unsigned char* x) {
  if constexpr (kWide) {
    const uint4 b = *reinterpret_cast<const uint4*>(x);
    mma<bf16>(c, {r[0], 0u, r[1], 0u}, b.x, b.y);
    mma<bf16>(c, {r[2], 0u, r[3], 0u}, b.z, b.w);
  } else {
    const uint2 b = *reinterpret_cast<const uint2*>(x);
    mma<bf16>(c, {r[0], r[2], r[1], r[3]}, b.x, b.y);
  }
}

// Products of a pass: each warp's sums to part [n_warp][tile][token][8 rows].
template <WeightFormat kFormat, bool kWide, int kPer>
__device__ __forceinline__ void multiply(const Params& p, unsigned char* smem, const Held<kFormat>& held, int units,
                                         int tiles) {
  constexpr int n_tile = tiles_per_pass(kPer * n_warp, held_units);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  float* part = reinterpret_cast<float*>(smem + p.smem.part);
  const int token = min(kWide ? g : g % 4, p.n_tok - 1);
  const unsigned char* x = smem + p.smem.input + token * p.smem.input_stride + t * 16 + (!kWide && g >= 4 ? 8 : 0);
  float c[n_tile][4];
#pragma unroll
  for (int i = 0; i < n_tile; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.0f;
#pragma unroll
  for (int j = 0; j < kPer; j++) {
    const int unit = min(warp + n_warp * j, units - 1);
    if constexpr (kFormat == WeightFormat::i8) {
#pragma unroll
      for (int i = 0; i < n_tile; i++) {
        if (i >= tiles) break;
        const uint4 w = held.w[i * kPer + j];
        const uint32_t s = held.scale[i * kPer + j];
        const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&s));
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint32_t r[4];
          widen(r, half == 0 ? w.x : w.z, half == 0 ? w.y : w.w);
          float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          multiply_group<kWide>(d, r, x + unit * 128 + half * 64);
#pragma unroll
          for (int e = 0; e < 4; e++) c[i][e] += (half == 0 ? scale.x : scale.y) * d[e];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < n_tile; i++) {
        if (i >= tiles) break;
        const uint4 w = held.w[i * kPer + j];
        multiply_group<kWide>(c[i], {w.x, w.y, w.z, w.w}, x + unit * 64);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < n_tile; i++) {
    if (i >= tiles) break;
    if constexpr (!kWide) {
      c[i][0] += __shfl_down_sync(0xffffffffu, c[i][2], 2);
      c[i][1] += __shfl_down_sync(0xffffffffu, c[i][3], 2);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int to = 2 * t + e;
      if (to < p.n_tok && (kWide || t < 2)) part[((warp * tiles + i) * p.n_tok + to) * 8 + g] = c[i][e];
    }
  }
}

template <class F>
__device__ __forceinline__ void with_units_per_warp(int n, F&& f) {
  switch (n) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    default: return f(std::integral_constant<int, 8>());
  }
}

// --- inputs of a stage --------------------------------------------------------------------------------------------
// The residual stream x [n_tok][d_model] fp32, from words of the exchange (or, words null, the embedding): kept in
// `residual`; x * weight as bf16 in `input`; partial sums of squares in sums [token][chunk of 128]. The division by the
// root of the mean comes behind the product.
__device__ __forceinline__ float4 embedded(const Params& p, const int32_t* tokens, int token, int c) {
  const int64_t id = tokens[token], at = id * p.d_model + c;
  if (p.embed_format == WeightFormat::f32) return *reinterpret_cast<const float4*>(static_cast<const float*>(p.embed) + at);
  if (p.embed_format == WeightFormat::i8) {
    const char4 q = *reinterpret_cast<const char4*>(static_cast<const int8_t*>(p.embed) + at);
    const float s = __half2float(static_cast<const f16*>(p.embed_scales)[at / 32]);
    return make_float4(s * q.x, s * q.y, s * q.z, s * q.w);
  }
  float x[4];
  load<bf16, 4>(x, static_cast<const bf16*>(p.embed) + at);
  return make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void take_residual(const Params& p, unsigned char* smem, const uint32_t* words,
                                              const int32_t* tokens, const float* weight, int what) {
  constexpr int batch = 2;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int chunks = (p.d_model + 127) / 128, n_item = chunks * p.n_tok;
  float* residual = reinterpret_cast<float*>(smem + p.smem.residual);
  float* sums = reinterpret_cast<float*>(smem + p.smem.sums);
  for (int first = warp; first < n_item; first += batch * n_warp) {
    uint4 x[batch];
    float4 g[batch];
    int token[batch], column[batch];
    bool on[batch];
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int item = first + i * n_warp;
      token[i] = item / chunks, column[i] = (item % chunks) * 128 + lane * 4;
      on[i] = item < n_item && column[i] < p.d_model;
      if (!on[i]) continue;
      g[i] = *reinterpret_cast<const float4*>(weight + column[i]);
      if (words != nullptr) {
        x[i] = load_words(words + token[i] * p.d_model + column[i]);
      } else {
        const float4 e = embedded(p, tokens, token[i], column[i]);
        x[i] = make_uint4(__float_as_uint(e.x), __float_as_uint(e.y), __float_as_uint(e.z), __float_as_uint(e.w));
      }
    }
    SpinGuard guard(what);
#pragma unroll
    for (int i = 0; i < batch; i++) {
      if (first + i * n_warp >= n_item) break;
      float ss = 0.0f;
      if (on[i]) {
        while (words != nullptr && any_unset(x[i]) && !probing(p, 1))
          x[i] = load_words(words + token[i] * p.d_model + column[i]), guard.spin();
        const float4 v = make_float4(__uint_as_float(x[i].x), __uint_as_float(x[i].y), __uint_as_float(x[i].z),
                                     __uint_as_float(x[i].w));
        ss = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        // The readers of `residual` (o, down) have read their words before they published what is awaited here.
        *reinterpret_cast<float4*>(residual + token[i] * p.d_model + column[i]) = v;
        *reinterpret_cast<uint2*>(smem + p.smem.input + token[i] * p.smem.input_stride + 2 * column[i]) =
            make_uint2(pack2<bf16>(v.x * g[i].x, v.y * g[i].y), pack2<bf16>(v.z * g[i].z, v.w * g[i].w));
      }
      ss = warp_sum(ss);
      if (lane == 0) sums[first + i * n_warp] = ss;
    }
  }
}

// bf16 pairs [n_tok][n] of the exchange into `input`.
__device__ __forceinline__ void take_pairs(const Params& p, unsigned char* smem, const uint32_t* words, int n, int what) {
  constexpr int batch = 2;
  const int per = n / 4, n_item = per * p.n_tok;
  for (int first = static_cast<int>(threadIdx.x); first < n_item; first += batch * n_thread) {
    uint4 x[batch];
#pragma unroll
    for (int i = 0; i < batch; i++) {
      if (first + i * n_thread < n_item) x[i] = load_words(words + 4 * (first + i * n_thread));
    }
    SpinGuard guard(what);
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int item = first + i * n_thread;
      if (item >= n_item) break;
      while (any_unset(x[i]) && !probing(p, 1)) x[i] = load_words(words + 4 * item), guard.spin();
      *reinterpret_cast<uint4*>(smem + p.smem.input + item / per * p.smem.input_stride + item % per * 16) = x[i];
    }
  }
}

__device__ __forceinline__ float norm_factor(const Params& p, const unsigned char* smem, int token) {
  const int chunks = (p.d_model + 127) / 128;
  const float* sums = reinterpret_cast<const float*>(smem + p.smem.sums) + token * chunks;
  float ss = sums[0];
  for (int i = 1; i < chunks; i++) ss += sums[i];
  return rsqrtf(ss / static_cast<float>(p.d_model) + p.eps);
}

// Adds up the warps' parts of a pass and hands the sums over: out(on, tile of the pass, token, row of the tile, sum),
// called by whole warps, 8 neighbouring lanes hold the rows of a tile.
template <class F>
__device__ __forceinline__ void reduce_parts(const Params& p, const unsigned char* smem, int tiles, F&& out) {
  const float* part = reinterpret_cast<const float*>(smem + p.smem.part);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int n = tiles * p.n_tok * 8;
  for (int first = warp * 32; first < n; first += n_thread) {
    const int i = first + lane;
    float x = 0.0f;
    if (i < n) {
#pragma unroll
      for (int w = 0; w < n_warp; w++) x += part[w * n + i];
    }
    out(i < n, (i >> 3) / p.n_tok, (i >> 3) % p.n_tok, i & 7, x);
  }
}

}  // namespace mm::cuda::persistent
