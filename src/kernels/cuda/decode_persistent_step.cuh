// The kernel of the persistent decode step: roles of the warps, products, and the script of a step.
#pragma once

#include "kernels/cuda/decode_persistent_attention.cuh"
#include "kernels/cuda/hopper.cuh"

namespace mm::cuda::persistent {

// Shared by the workers and the warp that copies: how many units of the stream have been taken out of the ring. Lies
// behind the ring's mbarriers.
__device__ __forceinline__ uint32_t taken_address(const Params& p, unsigned char* smem) {
  return shared_address(smem + p.smem.full) + 8 * static_cast<uint32_t>(p.smem.n_slots);
}

// --- the warp that copies -----------------------------------------------------------------------------------------
template <WeightFormat kFormat>
__device__ __forceinline__ void copy_slot(uint32_t to, const unsigned char* from, uint32_t bytes, uint32_t bar,
                                          [[maybe_unused]] uint64_t policy, [[maybe_unused]] bool hint) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 != 0) return;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
  if (hint) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(bar), "l"(policy)
        : "memory");
  } else {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
  }
#else
  for (uint32_t i = threadIdx.x % 32 * 16; i < bytes; i += 512) cp_async16(to + i, from + i);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
#endif
}

template <WeightFormat kFormat>
__device__ void copy_weights(const Params& p, unsigned char* smem) {
  constexpr int slot_bytes = slot_units * unit_bytes(kFormat);
  const int block = static_cast<int>(blockIdx.x);
  const uint32_t begin = p.block_begin[block], total = p.block_begin[block + 1] - begin;
  const unsigned char* from = p.stream + static_cast<int64_t>(begin) * unit_bytes(kFormat);
  const uint32_t n_slots = static_cast<uint32_t>(p.smem.n_slots), n_copy = (total + slot_units - 1) / slot_units;
  const uint32_t ring = shared_address(smem), full = shared_address(smem + p.smem.full), taken_at = taken_address(p, smem);
  uint64_t keep = 0, drop = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(drop));
#endif
  // Units before `free` have been taken by all warps. `end`: of the pass that they are taking.
  const int2* segments = p.segments + static_cast<int64_t>(block) * (4 * p.n_layer + 1);
  uint32_t free = 0, end = 0;
  int segment = 0, tiles_left = 0, units = 0, pass_tiles = 0;
  const auto next_end = [&] {
    while (tiles_left == 0) {
      const int kind = segment == 4 * p.n_layer ? 4 : segment % 4;
      units = p.shape[kind].units, pass_tiles = tiles_per_pass(units, p.smem.held);
      tiles_left = segments[segment++].y;
    }
    const int n = min(tiles_left, pass_tiles);
    tiles_left -= n;
    end += static_cast<uint32_t>(n * units);
  };
  uint32_t slot = 0;
  for (uint32_t c = 0; c < n_copy; c++) {
    if (c >= n_slots) {
      const uint32_t wanted = (c - n_slots + 1) * slot_units;
      SpinGuard guard(3);
      while (free < wanted) {
        if (end == free) next_end();
        uint32_t taken;
        asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(taken) : "r"(taken_at) : "memory");
        if (taken >= end) free = end;
        else __nanosleep(20), guard.spin();
      }
    }
    const uint32_t bytes = min(total - c * slot_units, static_cast<uint32_t>(slot_units)) * unit_bytes(kFormat);
    const bool kept = static_cast<int>(c & 15) < p.resident_16ths;
    copy_slot<kFormat>(ring + slot * slot_bytes, from + static_cast<int64_t>(c) * slot_bytes, bytes, full + 8 * slot,
                       kept ? keep : drop, p.resident_16ths >= 0);
    slot = slot + 1 == n_slots ? 0 : slot + 1;
  }
}

// --- the warp that keeps house: this step's words of the exchange into L2, the other set's back to `unset` --------
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

__device__ void keep_house(const Params& p, uint32_t step, bool parts) {
  const int set = static_cast<int>(step & 1);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32), stride = static_cast<int64_t>(gridDim.x) * 32;
  uint32_t* now = p.ex.set[set];
  each_part_of_set(p, p.n_tok, parts, [&](int64_t at, int64_t words) {
    for (int64_t i = first * 32; i < words; i += stride * 32)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(now + at + i));
  });
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
  __syncwarp();
  if (lane == 0) {
    const int mine = tiles * ((units - warp + n_warp - 1) / n_warp);
    asm volatile("red.release.cta.shared::cta.add.u32 [%0], %1;" ::"r"(taken_address(p, smem)), "r"(mine) : "memory");
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
  for (int first = static_cast<int>(threadIdx.x); first < n_item; first += batch * n_worker) {
    uint4 x[batch];
#pragma unroll
    for (int i = 0; i < batch; i++) {
      if (first + i * n_worker < n_item) x[i] = load_words(words + 4 * (first + i * n_worker));
    }
    SpinGuard guard(what);
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int item = first + i * n_worker;
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
  for (int first = warp * 32; first < n; first += n_worker) {
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
