// Pieces of the persistent decode step: copying weights, products, inputs and outputs of stages. The loop over the
// layers must stay small: a kernel that does not fit the instruction caches waits for its code everywhere.
#pragma once

#include "kernels/cuda/decode_persistent_attention.cuh"
#include "kernels/cuda/hopper.cuh"

namespace mm::cuda::persistent {

// --- copying weights ----------------------------------------------------------------------------------------------
// Keeps the ring full: the work of the last n_copier warps (below sm_90) or of one lane of each.
constexpr int n_copier = 4;
template <class T>
struct Copier {
  static constexpr uint32_t slot_bytes = slot_units * T::unit;
  const unsigned char* from;
  uint32_t total, next, slot, taken = 0;  // units of the stream; this warp's next copy and its slot; units taken out
  static __device__ __forceinline__ bool mine() { return threadIdx.x / 32 >= n_warp - n_copier; }
  __device__ __forceinline__ explicit Copier(const Params& p) {
    const uint32_t begin = p.block_begin[blockIdx.x];
    from = p.stream + static_cast<int64_t>(begin) * T::unit;
    total = p.block_begin[blockIdx.x + 1] - begin;
    next = slot = threadIdx.x / 32 % n_copier;
  }
  __device__ __forceinline__ void init(const Params& p, unsigned char* smem) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr uint32_t arrivals = 1;
#else
    constexpr uint32_t arrivals = 32;
#endif
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t i = next + n_copier * lane; i < static_cast<uint32_t>(p.smem.n_slots); i += 32 * n_copier)
      init_barrier(shared_address(smem + p.smem.full) + 8 * i, arrivals);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    hopper::mbarrier_init_fence();
#endif
    __syncwarp();
  }
  __device__ __forceinline__ void fill(const Params& p, unsigned char* smem) {
    if (probing(p, 2)) return;
    const uint32_t n_slots = static_cast<uint32_t>(p.smem.n_slots), lane = threadIdx.x % 32;
    const uint32_t end = min((total + slot_units - 1) / slot_units, taken / slot_units + n_slots);
    const uint32_t ring = shared_address(smem), full = shared_address(smem + p.smem.full);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (lane != 0) return;
#endif
#pragma unroll 1
    while (next < end) {
      const uint32_t bytes = min(total - next * slot_units, static_cast<uint32_t>(slot_units)) * T::unit;
      const uint32_t to = ring + slot * slot_bytes, bar = full + 8 * slot;
      const unsigned char* source = from + static_cast<uint64_t>(next) * slot_bytes;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      // createpolicy's evict_last and evict_first
      const uint64_t policy =
          static_cast<int>(next & 15) < p.resident_16ths ? 0x14f0000000000000ull : 0x12f0000000000000ull;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
          "%4;" ::"r"(to),
          "l"(source), "r"(bytes), "r"(bar), "l"(policy)
          : "memory");
#else
      for (uint32_t i = lane * 16; i < bytes; i += 512) cp_async16(to + i, source + i);
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
#endif
      next += n_copier, slot += n_copier;
      if (slot >= n_slots) slot -= n_slots;
    }
  }
};

// --- keeping house: this step's words of the exchange into L2, the other set's back to `unset` --------------------
template <class F>
__device__ __forceinline__ void each_part_of_set(const Params& p, int64_t rows, int64_t parts, F&& f) {
#pragma unroll 1
  for (int layer = 0; layer < p.n_layer; layer++) {
    const int64_t base = layer * p.ex.layer_words;
    const int64_t at[6] = {p.ex.qkv, p.ex.merged, p.ex.mid, p.ex.act, p.ex.out, p.ex.parts};
    const int64_t n[6] = {rows * p.qkv_width, rows * (p.n_head * p.d_head / 2), rows * p.d_model, rows * (p.d_ff / 2),
                          rows * p.d_model,   parts * p.ex.part_words};
#pragma unroll
    for (int i = 0; i < 6; i++) f(base + at[i], n[i]);
  }
  f(p.ex.logits, rows * p.ex.logit_words);
  f(p.ex.stream, p.d_model);
}

// By `stride` threads of several blocks, each `first`.
inline __device__ __noinline__ void prefetch_step(const Params& p, uint32_t step, int parts, int64_t first,
                                                  int64_t stride) {
  uint32_t* now = p.ex.set[step & 1];
  each_part_of_set(p, p.n_tok, parts, [&](int64_t at, int64_t words) {
#pragma unroll 1
    for (int64_t i = first * 8; i < words; i += stride * 8)
      asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(now + at + i));
  });
  const int64_t n_norms = static_cast<int64_t>(p.n_layer) * p.norm_stride + p.d_model;
#pragma unroll 1
  for (int64_t i = first * 8; i < n_norms; i += stride * 8)
    asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(p.norms + i));
}
inline __device__ __noinline__ void reset_before(const Params& p, uint32_t step, int64_t first, int64_t stride) {
  const uint32_t set = (step & 1) ^ 1;
  uint32_t* before = p.ex.set[set];
  each_part_of_set(p, p.state->rows[set], p.state->parts[set], [&](int64_t at, int64_t words) {
#pragma unroll 1
    for (int64_t i = first * 4; i < words; i += stride * 4)
      *reinterpret_cast<uint4*>(before + at + i) = make_uint4(unset, unset, unset, unset);
  });
}

// For block 0: until every block has read the number of the step.
__device__ __forceinline__ void await_begun(const Params& p, uint32_t step) {
  SpinGuard guard(8);
  while (static_cast<int32_t>(load_word(&p.state->begun) - (step + 1) * gridDim.x) < 0) guard.spin();
}

// --- products -----------------------------------------------------------------------------------------------------
// The weights of a pass in registers: unit w + 16 j of tile i is w[i * kPer + j].
template <class T>
struct Held {
  uint4 w[held_units];
  uint32_t scale[T::format == WeightFormat::i8 ? held_units : 1];
};

// Where a block is in its stream: byte in the ring, parity of the laps.
struct Cursor {
  uint32_t at = 0, lap = 0;
  __device__ __forceinline__ void advance(uint32_t bytes, uint32_t capacity) {
    at += bytes;
    if (at >= capacity) at -= capacity, lap ^= 1;
  }
};

// Takes a pass out of the ring. What a warp takes beyond a tile's last unit is never used.
template <class T, int kPer>
__device__ __forceinline__ void take(const Params& p, unsigned char* smem, Held<T>& held, const Cursor& cursor,
                                     int units, int tiles) {
  constexpr int n_tile = tiles_per_pass(kPer * n_warp, held_units);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t n_slots = static_cast<uint32_t>(p.smem.n_slots), capacity = n_slots * slot_units * T::unit;
  if (!probing(p, 2)) {  // a lane waits for a slot
    constexpr uint32_t slot_bytes = slot_units * T::unit;
    const uint32_t first = cursor.at / slot_bytes;
    const uint32_t n = (cursor.at + static_cast<uint32_t>(tiles * units * T::unit) - 1) / slot_bytes - first + 1;
    uint32_t slot = first + static_cast<uint32_t>(lane), lap = cursor.lap;
    if (slot >= n_slots) slot -= n_slots, lap ^= 1;
    const uint32_t bar = shared_address(smem + p.smem.full) + 8 * slot;
    SpinGuard guard(4);
    while (static_cast<uint32_t>(lane) < n && !mbarrier_done(bar, lap)) guard.spin();
    __syncwarp();
  }
  const uint32_t own = cursor.at + static_cast<uint32_t>(warp * T::unit);
#pragma unroll
  for (int i = 0; i < n_tile; i++) {
    if (i >= tiles) break;
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      uint32_t at = own + static_cast<uint32_t>((i * units + n_warp * j) * T::unit);
      if (at >= capacity) at -= capacity;
      held.w[i * kPer + j] = *reinterpret_cast<const uint4*>(smem + at + lane * 16);
      if constexpr (T::format == WeightFormat::i8)
        held.scale[i * kPer + j] = *reinterpret_cast<const uint32_t*>(smem + at + 512 + lane / 4 * 4);
    }
  }
}

// The warps' sums of an output lie side by side: n_sum of them, sum_pitch floats on the next output's (no bank
// conflicts, 16-byte aligned).
template <class T>
constexpr int n_sum = T::wide ? n_warp : 2 * n_warp;
template <class T>
constexpr int sum_pitch = n_sum<T> + 4;

// Products of a pass: sums to part [tile][token][8 rows][sum_pitch]. Register i of a lane's unit: a pair of columns of
// row g = lane / 4, see above. Up to 4 tokens: the lower half of the operand is the same rows with the columns' other
// half, so that one product takes all 32 (of the result, columns 0..3 of the upper and 4..7 of the lower half are
// wanted). More: two products, half of each is idle.
template <class T, int kPer>
__device__ __forceinline__ void multiply(const Params& p, unsigned char* smem, const Held<T>& held, int units,
                                         int tiles) {
  constexpr int n_tile = tiles_per_pass(kPer * n_warp, held_units);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4,
            t = lane % 4;
  const int n_tok = T::n_tok(p);
  const int token = min(T::wide ? g : g % 4, n_tok - 1);
  const unsigned char* x = smem + p.smem.input + token * p.smem.input_stride + t * 16 + (!T::wide && g >= 4 ? 8 : 0);
  // r: column pairs 0, 4, 2, 6; b: of x, pairs 0, 2, 4, 6 (wide) or this lane's two.
  const auto add = [&](float(&c)[4], const uint32_t(&r)[4], const uint4& b) {
    if constexpr (T::wide) {
      mma<bf16>(c, {r[0], 0u, r[2], 0u}, b.x, b.y);
      mma<bf16>(c, {r[1], 0u, r[3], 0u}, b.z, b.w);
    } else {
      mma<bf16>(c, r, b.x, b.y);
    }
  };
  const auto operand = [&](const unsigned char* at) -> uint4 {
    if constexpr (T::wide) return *reinterpret_cast<const uint4*>(at);
    const uint2 b = *reinterpret_cast<const uint2*>(at);
    return make_uint4(b.x, b.y, 0, 0);
  };
  constexpr int halves = T::format == WeightFormat::i8 ? 2 : 1, chains = kPer >= 6 ? 2 : 1;
  constexpr bool ahead = !T::wide && kPer * halves <= 10;  // all operands before the first product
  uint4 b[ahead ? kPer : 1][halves];
  const auto load_operands = [&](int j, uint4(&to)[halves]) {
    const int unit = (j + 1) * n_warp > units ? min(warp + n_warp * j, units - 1) : warp + n_warp * j;
#pragma unroll
    for (int h = 0; h < halves; h++) to[h] = operand(x + unit * 64 * halves + 64 * h);
  };
  if constexpr (ahead) {
#pragma unroll
    for (int j = 0; j < kPer; j++) load_operands(j, b[j]);
  }
  float c[n_tile][chains][4];
#pragma unroll
  for (int j = 0; j < kPer; j++) {
    const bool missing = (j + 1) * n_warp > units && warp + n_warp * j >= units;  // can be only in a tile's last round
    if constexpr (!ahead) load_operands(j, b[0]);
#pragma unroll
    for (int i = 0; i < n_tile; i++) {
      if (i >= tiles) break;
      float(&sum)[4] = c[i][j % chains];
      if (j < chains) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
      if (missing) continue;
      const uint4 w = held.w[i * kPer + j];
      const uint4(&operands)[halves] = b[ahead ? j : 0];
      if constexpr (T::format == WeightFormat::i8) {
        const uint32_t s = held.scale[i * kPer + j];
        const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&s));
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint32_t lo = h == 0 ? w.x : w.z, hi = h == 0 ? w.y : w.w;
          float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          add(d, {widen_pair<0x4140>(lo), widen_pair<0x4140>(hi), widen_pair<0x4342>(lo), widen_pair<0x4342>(hi)},
              operands[h]);
#pragma unroll
          for (int e = 0; e < 4; e++) sum[e] += (h == 0 ? scale.x : scale.y) * d[e];
        }
      } else {
        add(sum, {w.x, w.y, w.z, w.w}, operands[0]);
      }
    }
  }
  if constexpr (chains == 2) {
#pragma unroll
    for (int i = 0; i < n_tile; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) c[i][0][e] += c[i][1][e];
    }
  }
  // Lane: row g, of tokens 2 t, 2 t + 1 (wide) or 2 (t % 2), + 1 the sum over the upper or lower half.
  const bool lower = !T::wide && t >= 2;
  const int first = T::wide ? 2 * t : 2 * (t % 2);
  float* part =
      reinterpret_cast<float*>(smem + p.smem.part) + (first * 8 + g) * sum_pitch<T> + warp + (lower ? n_warp : 0);
#pragma unroll
  for (int i = 0; i < n_tile; i++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (i < tiles && first + e < n_tok)
        part[(i * n_tok + e) * 8 * sum_pitch<T>] = lower ? c[i][0][2 + e] : c[i][0][e];
    }
  }
}

// f(integral_constant): kPer where it is known, else units_per_warp(units).
template <int kPer, class F>
__device__ __forceinline__ void with_units_per_warp(int units, F&& f) {
  if constexpr (kPer > 0) {
    f(std::integral_constant<int, kPer>());
  } else {
    switch (units_per_warp(units)) {
      case 1: return f(std::integral_constant<int, 1>());
      case 2: return f(std::integral_constant<int, 2>());
      case 3: return f(std::integral_constant<int, 3>());
      case 4: return f(std::integral_constant<int, 4>());
      case 5: return f(std::integral_constant<int, 5>());
      case 6: return f(std::integral_constant<int, 6>());
      case 8: return f(std::integral_constant<int, 8>());
      case 10: return f(std::integral_constant<int, 10>());
      case 12: return f(std::integral_constant<int, 12>());
      default: return f(std::integral_constant<int, 16>());
    }
  }
}

// --- inputs of a stage --------------------------------------------------------------------------------------------
inline __device__ __noinline__ float4 embedded(const Params& p, int64_t id, int c) {
  const int64_t at = id * p.d_model + c;
  if (p.embed_format == WeightFormat::f32)
    return *reinterpret_cast<const float4*>(static_cast<const float*>(p.embed) + at);
  if (p.embed_format == WeightFormat::i8) {
    const char4 q = *reinterpret_cast<const char4*>(static_cast<const int8_t*>(p.embed) + at);
    const float s = __half2float(static_cast<const f16*>(p.embed_scales)[at / 32]);
    return make_float4(s * q.x, s * q.y, s * q.z, s * q.w);
  }
  float x[4];
  load<bf16, 4>(x, static_cast<const bf16*>(p.embed) + at);
  return make_float4(x[0], x[1], x[2], x[3]);
}

// The residual stream x [n_tok][d_model] fp32, from words of the exchange (or, words null, the embedding): kept in
// `residual`; x * weight as bf16 in `input`; partial sums of squares in sums [token][chunk of 128]. The division by the
// root of the mean comes behind the product.
template <class T>
__device__ __forceinline__ void take_residual(const Params& p, unsigned char* smem, const uint32_t* words,
                                              const int32_t* tokens, const float* weight) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int d_model = T::d_model(p), chunks = (d_model + 127) / 128, n_item = chunks * T::n_tok(p);
  constexpr int batch = 3;
#pragma unroll 1
  for (int first = warp; first < n_item; first += batch * n_warp) {
    uint4 x[batch];
    float4 g[batch];
    int token[batch], column[batch];
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int item = min(first + i * n_warp, n_item - 1);
      token[i] = item / chunks, column[i] = (item - token[i] * chunks) * 128 + lane * 4;
      if (!T::fixed) column[i] = min(column[i], d_model - 4);
      g[i] = *reinterpret_cast<const float4*>(weight + column[i]);
      if (words != nullptr) {
        x[i] = load_words(words + token[i] * d_model + column[i]);
      } else {
        const float4 e = embedded(p, tokens[token[i]], column[i]);
        x[i] = make_uint4(__float_as_uint(e.x), __float_as_uint(e.y), __float_as_uint(e.z), __float_as_uint(e.w));
      }
    }
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int item = first + i * n_warp;
      if (item >= n_item) break;
      SpinGuard guard(5);
      while (any_unset(x[i]) && words != nullptr && !probing(p, 1))
        x[i] = load_words(words + token[i] * d_model + column[i]), guard.spin();
      const float4 v = make_float4(__uint_as_float(x[i].x), __uint_as_float(x[i].y), __uint_as_float(x[i].z),
                                   __uint_as_float(x[i].w));
      // The readers of `residual` (o, down) have read their words before they published what was awaited here.
      *reinterpret_cast<float4*>(smem + p.smem.residual + (token[i] * d_model + column[i]) * 4) = v;
      *reinterpret_cast<uint2*>(smem + p.smem.input + token[i] * p.smem.input_stride + 2 * column[i]) =
          make_uint2(pack2<bf16>(v.x * g[i].x, v.y * g[i].y), pack2<bf16>(v.z * g[i].z, v.w * g[i].w));
      float ss = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      const int chunk = item - token[i] * chunks;
      if (!T::fixed && chunk * 128 + lane * 4 >= d_model) ss = 0.0f;  // this lane repeats another's columns
      ss = warp_sum(ss);
      if (lane == 0) reinterpret_cast<float*>(smem + p.smem.sums)[token[i] * p.sum_stride + chunk] = ss;
    }
  }
}

// bf16 pairs [n_tok][n] of the exchange into `input`.
template <class T>
__device__ __forceinline__ void take_pairs(const Params& p, unsigned char* smem, const uint32_t* words, int n) {
  const int per = n / 4, n_item = per * T::n_tok(p);
  constexpr int batch = 2;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < n_item; first += batch * n_thread) {
    uint4 x[batch];
#pragma unroll
    for (int i = 0; i < batch; i++) x[i] = load_words(words + 4 * min(first + i * n_thread, n_item - 1));
#pragma unroll
    for (int i = 0; i < batch; i++) {
      const int item = min(first + i * n_thread, n_item - 1);
      SpinGuard guard(6);
      while (any_unset(x[i]) && !probing(p, 1)) x[i] = load_words(words + 4 * item), guard.spin();
      const int token = item / per;
      *reinterpret_cast<uint4*>(smem + p.smem.input + token * p.smem.input_stride + (item - token * per) * 16) = x[i];
    }
  }
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

template <class T>
__device__ __forceinline__ float norm_factor(const Params& p, const unsigned char* smem, int token) {
  const float4* sums = reinterpret_cast<const float4*>(smem + p.smem.sums + token * p.sum_stride * 4);
  float ss = 0.0f;
  const int n = T::fixed ? (T::d_model(p) + 511) / 512 : p.sum_stride / 4;
#pragma unroll(T::fixed ? 4 : 1)
  for (int i = 0; i < n; i++) {
    const float4 b = sums[i];
    ss += (b.x + b.y) + (b.z + b.w);
  }
  return rsqrtf(ss * p.inv_d + p.eps);
}

// Adds up the warps' parts of a pass and hands the sums over: out(on, tile of the pass, token, row of the tile, sum),
// called by whole warps, 8 neighbouring lanes hold the rows of a tile.
template <class T, class F>
__device__ __forceinline__ void reduce_parts(const Params& p, const unsigned char* smem, int tiles, F&& out) {
  const int n_tok = T::n_tok(p), n = tiles * n_tok * 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i / 32 * 32 < n; i += n_thread) {
    const float4* part = reinterpret_cast<const float4*>(smem + p.smem.part) + min(i, n - 1) * (sum_pitch<T> / 4);
    float4 a = part[0];
#pragma unroll
    for (int j = 1; j < n_sum<T> / 4; j++) {
      const float4 b = part[j];
      a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
    }
    const float x = (a.x + a.y) + (a.z + a.w);
    const int tile = (i >> 3) / n_tok;
    out(i < n, tile, (i >> 3) - tile * n_tok, i & 7, x);
  }
}

}  // namespace mm::cuda::persistent
