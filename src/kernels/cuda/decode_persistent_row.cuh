// The products of a step with one row, for models of a known shape, by blocks that do nothing else (attention:
// decode_persistent_alone.cuh). Two things keep a step short:
//
//   code     the loop over the stages is small (13 KB, bf16): what does not fit the instruction caches takes twice as
//            long, and a register that is spilled costs as much. Hence a plan made by the host: a block's weights
//            arrive pass by pass, each in one piece of the ring and with a barrier of its own.
//   arrival  a warp polls just the words that it multiplies, straight into the registers of mma's B operand; the block
//            meets once a pass, to add up the warps' sums. Two sets of sums alternate, so nobody waits for readers.
#pragma once

#include "kernels/cuda/decode_persistent_step.cuh"

namespace mm::cuda::persistent {

// --- copying weights ----------------------------------------------------------------------------------------------
// Copies passes as early as the ring has room, an eighth each by the warps, little by little while they poll: bursts of
// all blocks at once hold up the words that they exchange (64M: whole passes behind each stage 111 us a step, pieces of
// 1, 2, 4 KB 98, 94, 98).
constexpr uint32_t copy_piece = 2048;
template <class T>
struct RowCopier {
  const RowPass* pass;  // the next
  const unsigned char* from;
  uint32_t full, ring, index = 0, done = 0;  // done: bytes of this warp's share
  __device__ __forceinline__ RowCopier(const Params& p, unsigned char* smem)
      : pass(reinterpret_cast<const RowPass*>(smem + p.smem.passes)),
        from(p.stream + static_cast<int64_t>(p.block_begin[blockIdx.x]) * T::unit),
        full(shared_address(smem + p.smem.full)),
        ring(shared_address(smem)) {}
  // A piece of the next pass, if `taken` passes leave room for it.
  __device__ __forceinline__ void step(const Params& p, uint32_t taken) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const uint4 c = *reinterpret_cast<const uint4*>(pass);  // from, bytes, to, after
    if (c.w > taken || probing(p, 2)) return;
    const uint32_t share = (c.y + 16 * n_warp - 1) / (16 * n_warp) * 16, begin = share * (threadIdx.x / 32);
    const uint32_t own = min(share, c.y - begin), bytes = min(copy_piece, own - done);
    if (threadIdx.x % 32 == 0) {
      const uint32_t bar = full + 8 * (index % row_barriers);
      // createpolicy's evict_last and evict_first
      const uint64_t policy =
          static_cast<int>(index % 16) < p.resident_16ths ? 0x14f0000000000000ull : 0x12f0000000000000ull;
      if (done == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(own) : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
          "%4;" ::"r"(ring + c.z + begin + done),
          "l"(from + c.x + begin + done), "r"(bytes), "r"(bar), "l"(policy)
          : "memory");
    }
    done += bytes;
    if (done == own) done = 0, index++, pass++;
#endif
  }
};

template <class T>
struct RowWeights {  // of a pass: mma's A operand
  uint4 w[T::format == WeightFormat::i8 ? 2 * (held_units / 2) : held_units];
  uint32_t scale[T::format == WeightFormat::i8 ? held_units / 2 : 1];
};

// --- a pass -------------------------------------------------------------------------------------------------------
// Of tiles of kUnits units, kPer a warp, kTiles at most: the weights and the input as registers hold them.
template <class T, int kPer, int kUnits, int kTiles>
struct RowProduct {
  static constexpr int halves = T::format == WeightFormat::i8 ? 2 : 1, n = kPer * halves;  // 32 columns each
  static constexpr int width = kUnits * 32 * halves;
  uint2 b[n];  // a lane multiplies 4 columns of 32, as bf16
  float ss;    // this lane's squares

  // A tile's last round may lack units for some warps.
  static __device__ __forceinline__ bool exists(int j) {
    return (j + 1) * n_warp <= kUnits || static_cast<int>(threadIdx.x) / 32 + n_warp * j < kUnits;
  }
  // The first of the lane's columns.
  static __device__ __forceinline__ int column(int i) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, j = i / halves;
    const int unit = exists(j) ? warp + n_warp * j : kUnits - 1;
    return (unit * halves + i % halves) * 32 + 8 * (lane % 4) + lane / 16 * 4;
  }
  static __device__ __forceinline__ uint2 load_pair(const uint32_t* p) {
    uint2 x;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p) : "memory");
    return x;
  }

  // What a warp takes beyond a tile's last unit is never used. INT8 is widened here, where there is time.
  static __device__ __forceinline__ void take(RowWeights<T>& to, const unsigned char* at, int tiles) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    at += warp * T::unit;
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
      if (i >= tiles) break;
#pragma unroll
      for (int j = 0; j < kPer; j++) {
        const unsigned char* unit = at + (i * kUnits + j * n_warp) * T::unit;
        const uint4 x = *reinterpret_cast<const uint4*>(unit + lane * 16);
        const int u = i * kPer + j;
        if constexpr (T::format == WeightFormat::i8) {
          to.w[2 * u] = widened(x.x, x.y), to.w[2 * u + 1] = widened(x.z, x.w);
          to.scale[u] = *reinterpret_cast<const uint32_t*>(unit + 512 + lane / 4 * 4);
        } else {
          to.w[u] = x;
        }
      }
    }
  }
  static __device__ __forceinline__ uint4 widened(uint32_t lo, uint32_t hi) {
    return make_uint4(widen_pair<0x4140>(lo), widen_pair<0x4140>(hi), widen_pair<0x4342>(lo), widen_pair<0x4342>(hi));
  }
  // The residual stream [width] fp32, times the norm's weight.
  template <class F>
  __device__ __forceinline__ void take_stream(const Params& p, const uint32_t* words, const float* weight,
                                              F&& meanwhile) {
    uint4 x[n];
    float4 g[n];
#pragma unroll
    for (int i = 0; i < n; i++) g[i] = *reinterpret_cast<const float4*>(weight + column(i));
    SpinGuard guard(5);
#pragma unroll 1
    for (bool missing = true; missing; guard.spin()) {
      missing = false;
#pragma unroll
      for (int i = 0; i < n; i++) x[i] = load_words(words + column(i));
      meanwhile();
#pragma unroll
      for (int i = 0; i < n; i++) missing |= any_unset(x[i]);
      if (probing(p, 1)) break;
    }
    __syncwarp();
    ss = 0.0f;
#pragma unroll
    for (int i = 0; i < n; i++) {
      const float v[4] = {__uint_as_float(x[i].x), __uint_as_float(x[i].y), __uint_as_float(x[i].z),
                          __uint_as_float(x[i].w)};
      b[i] = make_uint2(pack2<bf16>(v[0] * g[i].x, v[1] * g[i].y), pack2<bf16>(v[2] * g[i].z, v[3] * g[i].w));
      if (exists(i / halves)) ss += (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]);
    }
  }
  // The attention's parts of n_split shares of the keys, merged: values, then for each 32 of them maximum and sum, on a
  // cache line of their own, since all blocks poll them.
  template <class F>
  __device__ __forceinline__ void take_parts(const Params& p, const uint32_t* words, int n_split, F&& meanwhile) {
    constexpr int most = row_splits(width / T::d_head / T::group);
    uint4 x[n][most];
    uint2 ml[n][most];  // maximum, sum
    SpinGuard guard(7);
#pragma unroll 1
    for (bool missing = true; missing; guard.spin()) {
      missing = false;
#pragma unroll
      for (int s = 0; s < most; s++) {
        if (s >= n_split) break;
#pragma unroll
        for (int i = 0; i < n; i++) {
          x[i][s] = load_words(words + s * width + column(i));
          ml[i][s] = load_pair(words + (most + s) * width + column(i) / 32 * 32);
        }
      }
      meanwhile();
#pragma unroll
      for (int s = 0; s < most; s++) {
        if (s >= n_split) break;
#pragma unroll
        for (int i = 0; i < n; i++) missing |= any_unset(x[i][s]) || ml[i][s].x == unset || ml[i][s].y == unset;
      }
      if (probing(p, 1)) break;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < n; i++) {
      float top = __uint_as_float(ml[i][0].x), sum = 0.0f, out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int s = 1; s < most; s++) {
        if (s < n_split) top = fmaxf(top, __uint_as_float(ml[i][s].x));
      }
#pragma unroll
      for (int s = 0; s < most; s++) {
        if (s >= n_split) break;
        const float f = exp2_fast(__uint_as_float(ml[i][s].x) - reference(top));
        sum += f * __uint_as_float(ml[i][s].y);
        out[0] += f * __uint_as_float(x[i][s].x), out[1] += f * __uint_as_float(x[i][s].y);
        out[2] += f * __uint_as_float(x[i][s].z), out[3] += f * __uint_as_float(x[i][s].w);
      }
      const float inv = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);  // no keys: zero
      b[i] = make_uint2(pack2<bf16>(out[0] * inv, out[1] * inv), pack2<bf16>(out[2] * inv, out[3] * inv));
    }
  }
  // bf16 pairs [width / 2].
  template <class F>
  __device__ __forceinline__ void take_pairs(const Params& p, const uint32_t* words, F&& meanwhile) {
    SpinGuard guard(6);
#pragma unroll 1
    for (bool missing = true; missing; guard.spin()) {
      missing = false;
#pragma unroll
      for (int i = 0; i < n; i++) b[i] = load_pair(words + column(i) / 2);
      meanwhile();
#pragma unroll
      for (int i = 0; i < n; i++) missing |= b[i].x == unset || b[i].y == unset;
      if (probing(p, 1)) break;
    }
    __syncwarp();
  }

  // Sums to part [tile][8 rows][row_sum_pitch]. For the operands see `multiply`.
  __device__ __forceinline__ void products(float* part, const RowWeights<T>& from, int tiles) const {
    constexpr int chains = kPer >= 6 ? 2 : 1;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    float c[kTiles][chains][4];
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
      if (i >= tiles) break;
#pragma unroll
      for (int j = 0; j < kPer; j++) {
        float(&sum)[4] = c[i][j % chains];
        if (j < chains) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        if (!exists(j)) continue;
        const int u = i * kPer + j;
        if constexpr (T::format == WeightFormat::i8) {
          const float2 by = __half22float2(*reinterpret_cast<const __half2*>(&from.scale[u]));
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const uint4 a = from.w[2 * u + h];
            float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            mma<bf16>(d, {a.x, a.y, a.z, a.w}, b[2 * j + h].x, b[2 * j + h].y);
#pragma unroll
            for (int e = 0; e < 4; e++) sum[e] += (h == 0 ? by.x : by.y) * d[e];
          }
        } else {
          const uint4 a = from.w[u];
          mma<bf16>(sum, {a.x, a.y, a.z, a.w}, b[j].x, b[j].y);
        }
      }
    }
    // Lanes t = 0 and 2 hold row g's sum over the columns' upper and lower halves.
    const int g = lane / 4, t = lane % 4;
    float* const to = part + g * row_sum_pitch + warp + t / 2 * n_warp;
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
      if (i >= tiles) break;
      float x = t == 0 ? c[i][0][0] : c[i][0][2];
      if constexpr (chains == 2) x += t == 0 ? c[i][1][0] : c[i][1][2];
      if (t % 2 == 0) to[i * rows_per_tile * row_sum_pitch] = x;
    }
  }
};

__device__ __forceinline__ float add_up(const float* x, int n4) {  // 4 n4 floats, 16-byte aligned
  float4 a = reinterpret_cast<const float4*>(x)[0];
#pragma unroll
  for (int i = 1; i < n4; i++) {
    const float4 b = reinterpret_cast<const float4*>(x)[i];
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
  }
  return (a.x + a.y) + (a.z + a.w);
}

// The script of a block with weights.
template <class T>
__device__ __forceinline__ void work_row(const Params& p, unsigned char* smem, uint32_t step, RowCopier<T>& copier) {
  using ProductD = RowProduct<T, T::per_d, T::units_d, row_tiles(T::format, T::units_d)>;
  using ProductFf = RowProduct<T, T::per_ff, T::units_ff, 1>;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32;
  const RowPass* pass = reinterpret_cast<const RowPass*>(smem + p.smem.passes);
  const int n_split = splits_of(p, p.rows[0].kv_len);
  uint32_t* const set = p.ex.set[step & 1];
  uint32_t* words = set;                       // of the layer
  const uint32_t* before = set + p.ex.stream;  // the residual stream that the layer begins with
  const float* norms = p.norms;
  int kind = stage_qkv, taken = 0, parity = 0;
  const auto factor = [&] {
    const float* squares = reinterpret_cast<const float*>(smem + p.smem.sums) + parity * n_warp;
    return rsqrtf(add_up(squares, n_warp / 4) * p.inv_d + p.eps);
  };
  const auto meanwhile = [&] { copier.step(p, static_cast<uint32_t>(taken)); };
#pragma unroll 1
  for (int s = 0; s <= 4 * p.n_layer; s++) {
    const bool adds = kind == stage_o || kind == stage_down;  // to the residual stream
    const uint32_t* const own = kind == stage_o ? before : words + p.ex.mid;
    ProductD d;
    ProductFf ff;
    MM_TRACE(s * 8);
#pragma unroll 1
    for (bool first = true; pass->stage == s; first = false) {
      const int n = pass->tiles, column = pass->first_tile * rows_per_tile + tid;
      const bool on = tid < n * rows_per_tile;
      float* const part = reinterpret_cast<float*>(smem + p.smem.part + parity * row_part_bytes);
      uint32_t residual = adds && on ? load_word(own + column) : 0;
      while (copier.index <= static_cast<uint32_t>(taken) && !probing(p, 2)) meanwhile();
      const uint32_t bar = shared_address(smem + p.smem.full) + 8 * static_cast<uint32_t>(taken % row_barriers);
      SpinGuard guard(4);
      while (!probing(p, 2) && !mbarrier_done(bar, static_cast<uint32_t>(taken / row_barriers) & 1)) guard.spin();
      RowWeights<T> weights;
      if (kind != stage_down) {
        ProductD::take(weights, smem + pass->to, n);
        MM_TRACE(s * 8 + 1);
        if (first) {
          if (kind == stage_o) {
            d.take_parts(p, words + p.ex.parts, n_split, meanwhile);
          } else {
            const bool second = kind == stage_gate_up;
            d.take_stream(p, second ? words + p.ex.mid : before, second ? norms + T::d_model(p) : norms, meanwhile);
          }
        }
        MM_TRACE(s * 8 + 2);
        d.products(part, weights, n);
        if (!adds) {
          float ss = d.ss;
          ss += __shfl_xor_sync(0xffffffffu, ss, 1);
          ss += __shfl_xor_sync(0xffffffffu, ss, 2);
          ss += __shfl_xor_sync(0xffffffffu, ss, 16);
          if (tid % 32 == 0) reinterpret_cast<float*>(smem + p.smem.sums)[parity * n_warp + warp] = ss;
        }
      } else {
        ProductFf::take(weights, smem + pass->to, n);
        MM_TRACE(s * 8 + 1);
        if (first) ff.take_pairs(p, words + p.ex.act, meanwhile);
        MM_TRACE(s * 8 + 2);
        ff.products(part, weights, n);
      }
      __syncthreads();  // the sums are there, and the pass's weights are in registers
      MM_TRACE(s * 8 + 3);
      taken++, pass++;
      if (tid / 32 * 32 < n * rows_per_tile) {
        const float sum = add_up(part + min(tid, n * rows_per_tile - 1) * row_sum_pitch, 2 * n_warp / 4);
        if (adds) {
          SpinGuard unread(9);
          while (on && residual == unset && !probing(p, 1)) residual = load_word(own + column), unread.spin();
          if (on) publish(words + (kind == stage_o ? p.ex.mid : p.ex.out) + column, __uint_as_float(residual) + sum);
        } else {
          const float x = factor() * sum;
          if (kind == stage_gate_up) {
            const float up = __shfl_down_sync(0xffffffffu, x, 4), act = silu(x) * up;
            const float next = __shfl_down_sync(0xffffffffu, act, 1);
            if (on && tid % 8 < 4 && tid % 2 == 0)
              publish(words + p.ex.act + column / 8 * 2 + tid % 8 / 2, pack2<bf16>(act, next));
          } else {
            const bool last = kind == stage_head;
            if (on && (!last || p.draw)) publish((last ? set + p.ex.logits : words + p.ex.qkv) + column, x);
            if (on && last && p.logits != nullptr && column < p.n_vocab) p.logits[column] = x;
          }
        }
      }
      parity ^= 1;
    }
    MM_TRACE(s * 8 + 4);
    if (kind == stage_down) {
      before = words + p.ex.out, words += p.ex.layer_words, norms += p.norm_stride;
      kind = s + 1 < 4 * p.n_layer ? static_cast<int>(stage_qkv) : static_cast<int>(stage_head);
    } else {
      kind++;
    }
  }
  if (p.hidden != nullptr && static_cast<int>(blockIdx.x) == p.n_attention) {  // a block that has had tiles of the head
    parity ^= 1;
    for (int i = tid; i < T::d_model(p); i += n_thread)
      p.hidden[i] = __uint_as_float(load_word(before + i)) * factor() * norms[i];
  }
  MM_TRACE((4 * p.n_layer + 1) * 8);
}

}  // namespace mm::cuda::persistent
